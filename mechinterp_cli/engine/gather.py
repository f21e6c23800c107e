"""Arguments of a decoder layer for rows instead of prompts.

The model hands each layer position ids, rotary tables, per-layer inputs, masks. Which axis of each is the
prompt and which the position is found by asking the model twice, with other numbers of both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mechinterp_cli.models.walk import LayerCall, Walker

Role = Literal["fixed", "prompt", "position", "flat", "prompt_heads", "odd"]
"""`flat` is prompts × positions in one axis, `prompt_heads` prompts × something fixed (Bloom's ALiBi)."""
Roles = Mapping[str, tuple[Role, ...]]


class NotGatherable(Exception):
    """A layer argument cannot be taken row by row; says which."""


def axis_roles(walker: Walker, length: int, vocab_size: int, device: torch.device) -> list[Roles]:
    """For each layer the role of every axis of every tensor argument, by path.

    Args:
        walker: The model's walker.
        length: Prompt length of the bucket (what the model hands over may depend on it).
        vocab_size: Number of token ids that are safe to use.
        device: Where the model is.
    """
    other = length - 1 if length > 1 else 2
    sizes = ((2, length), (5, other))  # so that no product of one pair equals one of the other
    seen = [walker.calls(_tokens(prompts, positions, vocab_size).to(device)) for prompts, positions in sizes]
    return [_compare(a, b, sizes[0], sizes[1]) for a, b in zip(*seen, strict=True)]


def _tokens(prompts: int, positions: int, vocab_size: int) -> Tensor:
    return (torch.arange(prompts * positions) % max(1, min(vocab_size, 50) - 5) + min(5, vocab_size - 1)).view(
        prompts, positions
    )


def _shapes(call: LayerCall) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def note(tensor: Tensor, path: str) -> Tensor:
        shapes[path] = tuple(tensor.shape)
        return tensor

    call.change(note)
    return shapes


def _compare(a: LayerCall, b: LayerCall, size_a: tuple[int, int], size_b: tuple[int, int]) -> Roles:
    shapes_a, shapes_b = _shapes(a), _shapes(b)
    kinds: dict[tuple[int, int], Role] = {
        (size_a[0], size_b[0]): "prompt",
        (size_a[1], size_b[1]): "position",
        (size_a[0] * size_a[1], size_b[0] * size_b[1]): "flat",
    }

    def role(m: int, n: int) -> Role:
        by_prompt: Role = "prompt_heads" if m * size_b[0] == n * size_a[0] else "odd"
        return "fixed" if m == n else kinds.get((m, n), by_prompt)

    roles: dict[str, tuple[Role, ...]] = {}
    for path, shape in shapes_a.items():
        other = shapes_b.get(path, ())
        if len(other) == len(shape):
            roles[path] = tuple(role(m, n) for m, n in zip(shape, other, strict=True))
        else:
            roles[path] = _roles_alone(shape, size_a)
    return roles


def _roles_alone(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[Role, ...]:
    """The roles of an argument that one pass has and the other has not, as a mask at the window's very length."""

    def role(axis: int, m: int) -> Role:
        if axis == 0 and m == size[0]:
            return "prompt"
        return "position" if m == size[1] else "fixed"

    return tuple(role(axis, m) for axis, m in enumerate(shape))


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Prompt and position of every row of a packed call."""

    prompt: Tensor
    position: Tensor
    length: int


def packed_call(call: LayerCall, roles: Roles, rows: RowIndex) -> LayerCall:
    """The layer's arguments for one packed row of positions, [1, rows, …].

    Masks (two position axes) are left out: attention gets its mask from the stream's own call.

    Raises:
        NotGatherable: An argument depends on prompts or positions in another way.
    """

    def gather(tensor: Tensor, path: str) -> Tensor | None:
        axes = roles.get(path, ())
        positions = [i for i, role in enumerate(axes) if role == "position"]
        prompts = [i for i, role in enumerate(axes) if role == "prompt"]
        flat = [i for i, role in enumerate(axes) if role == "flat"]
        if len(positions) >= 2:
            return None
        if (
            {"odd", "prompt_heads"} & set(axes)
            or len(prompts) > 1
            or (prompts and not positions)
            or (flat and positions)
        ):
            raise NotGatherable(f"argument {path.lstrip('.')} of shape {tuple(tensor.shape)}")
        if flat:
            return tensor.index_select(flat[0], rows.prompt * rows.length + rows.position)
        if not positions:
            return tensor
        if not prompts or tensor.shape[prompts[0]] == 1:
            return tensor.index_select(positions[0], rows.position)
        source, target = (prompts[0], positions[0]), (0, 1)
        picked = tensor.movedim(source, target)[rows.prompt, rows.position]
        return picked[None].movedim(target, source)

    return call.change(gather)


def batched_call(call: LayerCall, roles: Roles, prompts: Tensor) -> LayerCall:
    """The layer's arguments for whole prompts, picked by prompt: [items, positions, …]."""

    def pick(tensor: Tensor, path: str) -> Tensor:
        axes = roles.get(path, ())
        together = [i for i, role in enumerate(axes) if role in ("prompt_heads", "flat")]
        if together:
            axis = together[0]
            by_prompt = torch.unflatten(tensor, axis, (call.hidden.shape[0], -1))
            return by_prompt.index_select(axis, prompts).flatten(axis, axis + 1)
        if "prompt" not in axes or tensor.shape[axes.index("prompt")] == 1:
            return tensor
        return tensor.index_select(axes.index("prompt"), prompts)

    return call.change(pick)
