"""Ablations by hand for the tests of `ablate`: hooks on named modules, nothing of the engine."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.loaded import LoadedModel, ModelSource
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from tests.families import build

Place = tuple[str, int]
"""Kind of site and layer."""
Change = Callable[[Tensor], Tensor]
"""From [prompts, positions, *features] to the same; its argument is a copy."""
NAMES = {
    "llama": ("model.layers", {"z": "self_attn.o_proj", "neuron": "mlp.down_proj", "attn_out": "self_attn"}),
    "gpt2": ("transformer.h", {"z": "attn.c_proj", "neuron": "mlp.c_proj", "attn_out": "attn"}),
}
INPUTS = ("z", "neuron")


class Hand:
    """Reads and changes activations of a model whose modules are named as in `NAMES`.

    Args:
        model: The model.
        family: Whose names it has.
    """

    def __init__(self, model: Any, family: str) -> None:
        self.model = model
        self.stack, self.modules = NAMES[family]
        self.heads = int(model.config.num_attention_heads)

    def _module(self, kind: str, layer: int) -> nn.Module:
        name = {"mlp_out": "mlp", "resid_post": ""} | self.modules
        found: nn.Module = self.model.get_submodule(f"{self.stack}.{layer}.{name[kind]}".rstrip("."))
        return found

    def _hook(self, stack: ExitStack, kind: str, layer: int, change: Change) -> None:
        def shaped(x: Tensor) -> Tensor:
            inner = torch.unflatten(x, -1, (self.heads, -1)) if kind == "z" else x
            return change(inner.clone()).reshape(x.shape)

        def before(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (shaped(inputs[0]), *inputs[1:])

        def after(_: object, _inputs: object, output: Any) -> Any:
            return (shaped(output[0]), *output[1:]) if isinstance(output, tuple) else shaped(output)

        module = self._module(kind, layer)
        handle = module.register_forward_pre_hook(before) if kind in INPUTS else module.register_forward_hook(after)
        stack.callback(handle.remove)

    def logits(self, tokens: Sequence[Sequence[int]], changes: Mapping[Place, Change]) -> Tensor:
        """[prompts, positions, vocabulary] of prompts of one length."""
        with ExitStack() as stack, torch.no_grad():
            for (kind, layer), change in changes.items():
                self._hook(stack, kind, layer, change)
            logits: Tensor = self.model(torch.tensor([list(row) for row in tokens])).logits
        return logits

    def seen(self, tokens: Sequence[Sequence[int]], place: Place) -> list[Tensor]:
        """Activations [positions, *features] of each of some prompts of any lengths, one by one."""
        found: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            found.append(x[0].clone())
            return x

        for row in tokens:
            self.logits([row], {place: keep})
        return found


def tiny(family: str, like: LoadedModel) -> LoadedModel:
    """A tiny random model; its tokenizer is never asked."""
    model = build(family)
    source = ModelSource(id=family, path="folder", revision=None, weight_files={"model.safetensors": f"of {family}"})
    return LoadedModel(model, like.tokenizer, find_anatomy(model), source)


def prompt(tokens: Sequence[int], corrupt: Sequence[int] | None, template: str) -> Prompt:
    """A prompt of these tokens."""
    other = None if corrupt is None else tuple(corrupt)
    return Prompt("text", tuple(tokens), (), "", None if other is None else "other", other, template=template)


def prompt_set(lengths: Mapping[str, Sequence[int]], *, corrupt: bool = True, seed: int = 0) -> PromptSet:
    """Random prompts: template to the lengths of its prompts; templates take turns.

    Args:
        lengths: By template.
        corrupt: Whether each has a corrupted twin, other tokens throughout.
        seed: Of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return [int(token) for token in torch.randint(5, 60, (length,), generator=generator)]

    rows = [(name, length) for name, wanted in lengths.items() for length in wanted]
    order = sorted(range(len(rows)), key=lambda i: (i % 3, i))
    chosen = [rows[i] for i in order]
    return PromptSet("made", tuple(prompt(draw(n), draw(n) if corrupt else None, name) for name, n in chosen))
