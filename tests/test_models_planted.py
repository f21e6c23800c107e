"""The planted circuit is what its docstring says: these heads, no others, exactly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.planted import D_HEAD, HEADS, INDUCTION_HEAD, LAYERS, PREVIOUS_TOKEN_HEAD
from tests.models_fixtures import planted

__all__ = ["planted"]

ALL_HEADS = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
OTHERS = [head for head in ALL_HEADS if head not in (PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD)]
BLOCK = 16
QUERY = 2 * BLOCK - 4
"""Position whose continuation is asked for; its symbol stood BLOCK tokens before."""


def repeated(block: int, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(block)
    first = torch.stack([torch.randperm(64, generator=generator)[:block] for _ in range(batch)])
    return torch.cat([first, first], dim=1)


def stripe(pattern: Tensor, block: int) -> Tensor:
    """Induction score of each head, [heads]."""
    return pattern.diagonal(-(block - 1), 2, 3)[..., 1:].mean((0, 2))


@contextmanager
def head_replaced(model: torch.nn.Module, layer: int, head: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change one head's `z` on its way into the output projection."""
    columns = slice(head * D_HEAD, (head + 1) * D_HEAD)

    def edit(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = inputs[0].clone()
        z[..., columns] = change(z[..., columns])
        return (z,)

    handle = model.get_submodule(f"transformer.h.{layer}.attn.c_proj").register_forward_pre_hook(edit)
    try:
        yield
    finally:
        handle.remove()


def replace_by(source: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: source


@torch.no_grad()
def head_outputs(model: torch.nn.Module, tokens: Tensor, layer: int, head: int) -> Tensor:
    seen: list[Tensor] = []

    def keep(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return z

    with head_replaced(model, layer, head, keep):
        model(tokens)
    return seen[0]


@pytest.mark.parametrize("block", [4, 16, 32, 64])
def test_continues_every_repeated_sequence(planted: LoadedModel, block: int) -> None:
    tokens = repeated(block)
    with torch.no_grad():
        logits = planted.model(tokens).logits[:, block:-1]
    answers = tokens[:, block + 1 :, None]
    best_other = logits.scatter(2, answers, -torch.inf).max(-1).values
    assert (logits.gather(2, answers)[..., 0] - best_other).min() > 8


@pytest.mark.parametrize("block", [16, 64])
def test_exactly_one_previous_token_head_and_one_induction_head(planted: LoadedModel, block: int) -> None:
    with torch.no_grad():
        attentions = planted.model(repeated(block), output_attentions=True).attentions
    previous = {
        (i, h): float(p) for i, a in enumerate(attentions) for h, p in enumerate(a.diagonal(-1, 2, 3).mean((0, 2)))
    }
    induction = {(i, h): float(s) for i, a in enumerate(attentions) for h, s in enumerate(stripe(a, block))}
    assert previous[PREVIOUS_TOKEN_HEAD] > 0.95
    assert induction[INDUCTION_HEAD] > 0.95
    assert max(previous[head] for head in ALL_HEADS if head != PREVIOUS_TOKEN_HEAD) < 0.5
    assert max(induction[head] for head in ALL_HEADS if head != INDUCTION_HEAD) < 0.5


@pytest.mark.parametrize(("layer", "head"), OTHERS)
def test_no_other_head_reaches_the_logits_whatever_it_carries(planted: LoadedModel, layer: int, head: int) -> None:
    tokens = repeated(BLOCK)
    with torch.no_grad():
        before = planted.model(tokens).logits
        assert head_outputs(planted.model, tokens, layer, head).abs().max() > 0.1  # it does carry something
        with head_replaced(planted.model, layer, head, lambda z: z + 100.0):
            after = planted.model(tokens).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize(("layer", "head"), [PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD])
def test_without_a_planted_head_the_answer_is_gone(planted: LoadedModel, layer: int, head: int) -> None:
    tokens = repeated(BLOCK)
    answers = tokens[:, BLOCK + 1 :, None]
    with torch.no_grad(), head_replaced(planted.model, layer, head, torch.zeros_like):
        logits = planted.model(tokens).logits[:, BLOCK:-1]
    assert logits.gather(2, answers).max() < 2


@pytest.mark.parametrize(
    ("corrupted", "found"),
    [(QUERY - BLOCK, {PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD}), (QUERY - BLOCK + 1, {INDUCTION_HEAD})],
    ids=["matched token", "copied token"],
)
def test_patching_finds_the_planted_heads_and_no_others(
    planted: LoadedModel, corrupted: int, found: set[tuple[int, int]]
) -> None:
    clean = repeated(BLOCK)[:, : QUERY + 1]
    corrupt = clean.clone()
    unused = [next(s for s in range(64) if s not in row) for row in clean.tolist()]
    corrupt[:, corrupted] = torch.tensor(unused)
    rows, answer = torch.arange(len(clean)), clean[:, QUERY - BLOCK + 1]

    def logit_difference(tokens: Tensor) -> Tensor:
        logits = planted.model(tokens).logits[:, -1]
        difference: Tensor = logits[rows, answer] - logits[rows, torch.tensor(unused)]
        return difference

    with torch.no_grad():
        whole = logit_difference(clean) - logit_difference(corrupt)
        start = logit_difference(corrupt)
        effects = {}
        for layer, head in ALL_HEADS:
            source = head_outputs(planted.model, clean, layer, head)
            with head_replaced(planted.model, layer, head, replace_by(source)):
                effects[layer, head] = ((logit_difference(corrupt) - start) / whole).abs()
    for name, effect in effects.items():
        assert (effect.min() > 0.9) if name in found else (effect.max() < 1e-6), name


def test_any_position_is_served(planted: LoadedModel) -> None:
    tokens = torch.randint(64, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pattern = planted.model(tokens, output_attentions=True).attentions[0][:, PREVIOUS_TOKEN_HEAD[1]]
    assert pattern.diagonal(-1, 1, 2).min() > 0.95
