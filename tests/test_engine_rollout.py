"""Attention rollout: against a product made by hand from what transformers gives out as attention."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tiny import tiny_model, tiny_tokens
from mechinterp_cli.engine import patterns
from mechinterp_cli.engine.entering import acts_through_embed, entering
from mechinterp_cli.engine.patterns import WORKING_COPIES
from mechinterp_cli.engine.rollout import rollout
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.loaded import LoadedModel
from tests.families import build
from tests.models_fixtures import planted, smollm2, toy

__all__ = ["planted", "smollm2", "toy"]

LENGTH = 14
TOKENS = tiny_tokens(batch=5, length=LENGTH)
READ = torch.tensor([LENGTH - 1, LENGTH - 4, LENGTH - 1, 3, LENGTH - 1])
TOLERANCE = 1e-5
FAMILIES = ["gpt2", "gpt_neox", "llama", "mistral", "gemma2", "deepseek_v3", "deepseek_v32"]
"""Grouped queries from `llama` on; windows, soft-caps, a sparse mask, a parallel block."""


@torch.no_grad()
def by_hand(model: Any, tokens: Tensor, read: Tensor) -> Tensor:
    """One prompt at a time, in float64, from the answer's row down: [prompts, positions]; the model must be eager."""
    rows = []
    for ids, at in zip(tokens, read.tolist(), strict=True):
        row = torch.zeros(len(ids), dtype=torch.float64)
        row[at] = 1
        for attention in reversed(model(input_ids=ids[None], output_attentions=True, use_cache=False).attentions):
            mean = torch.stack([head.double() for head in attention[0]]).mean(0)
            row = row @ (0.5 * mean + 0.5 * torch.eye(len(ids), dtype=torch.float64))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_is_the_product_of_the_layers_by_hand(family: str) -> None:
    model = build(family)
    got, proof = rollout(model, find_anatomy(model), TOKENS, READ)
    want = by_hand(build(family, attn_implementation="eager"), TOKENS, READ)
    assert (got - want).abs().max() <= TOLERANCE
    assert want.std(1).min() > 0.02  # far from uniform
    assert proof.deviation <= proof.tolerance


def test_grouped_queries_are_averaged_over_query_heads() -> None:
    model = build("llama")
    heads = find_anatomy(model).layers[0].heads
    assert heads is not None
    assert heads.query > heads.key_value


@pytest.mark.parametrize("name", ["toy", "planted"])
def test_rollout_of_the_shipped_models_is_that_by_hand(name: str, request: pytest.FixtureRequest) -> None:
    loaded: LoadedModel = request.getfixturevalue(name)
    tokens = TOKENS % loaded.anatomy.vocab_size
    got, _ = rollout(loaded.model, loaded.anatomy, tokens, READ)
    assert (got - by_hand(loaded.model, tokens, READ)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_shares_sum_to_one_and_nothing_comes_from_later_tokens(family: str) -> None:
    model = build(family)
    got, _ = rollout(model, find_anatomy(model), TOKENS, READ)
    assert (got.sum(1) - 1).abs().max() <= TOLERANCE
    assert got.min() >= 0
    for row, at in zip(got, READ.tolist(), strict=True):
        assert not row[at + 1 :].any()
        assert row[: at + 1].count_nonzero() > 1


@torch.no_grad()
def test_with_sinks_rows_are_normalised() -> None:
    model: Any = build("gpt_oss")
    row = torch.eye(LENGTH, dtype=torch.float64)[LENGTH - 1]
    lost = row.clone()  # half and half loses what goes to the sink
    for attention in reversed(model(input_ids=TOKENS[:1], output_attentions=True, use_cache=False).attentions):
        mixed = attention[0, :, :, :LENGTH].double().mean(0) + torch.eye(LENGTH)
        row, lost = row @ (mixed / mixed.sum(1, keepdim=True)), lost @ (mixed / 2)
    got, _ = rollout(model, find_anatomy(model), TOKENS[:1], READ[:1])
    assert (got[0] - row).abs().max() <= TOLERANCE
    assert lost.sum() < 0.95


def test_shares_depend_neither_on_the_budget_nor_on_company(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    whole, _ = rollout(model, anatomy, TOKENS, READ)
    shown: list[tuple[slice, slice]] = []
    smallest = 2 * LENGTH * max(LENGTH, WORKING_COPIES) * 4
    real: Any = patterns.attention_patterns

    def counted(*args: Any, **options: Any) -> Any:
        visit = args[4]

        def watch(layer: int, pattern: Tensor, prompts: slice, heads: slice) -> None:
            shown.append((prompts, heads))
            visit(layer, pattern, prompts, heads)

        return real(*args[:4], watch, **options)

    monkeypatch.setattr("mechinterp_cli.engine.rollout.attention_patterns", counted)
    for budget, prompts, heads in ((smallest, 1, 1), (3 * smallest, 1, 3), (8 * smallest, 2, 4)):
        shown.clear()
        parts, _ = rollout(model, anatomy, TOKENS, READ, budget=budget)
        assert (parts - whole).abs().max() <= 1e-6
        assert max(part.stop - part.start for part, _ in shown) == prompts
        assert max(which.stop - which.start for _, which in shown) == heads
    alone = torch.cat([rollout(model, anatomy, TOKENS[i : i + 1], READ[i : i + 1])[0] for i in range(len(TOKENS))])
    assert (alone - whole).abs().max() <= 1e-6


@pytest.mark.parametrize(("family", "words"), [("gptj", "layers 0, 1, 2 have"), ("qwen3_next", "layers 0, 2 have")])
def test_layers_without_patterns_are_refused(family: str, words: str) -> None:
    model = build(family)
    with pytest.raises(UserError, match=f"{words} no attention pattern: ") as caught:
        rollout(model, find_anatomy(model), TOKENS, READ)
    assert caught.value.remedy.startswith("Layers of this model that have one: ")


def test_what_enters_is_the_embedding() -> None:
    llama: Any = build("llama")
    assert torch.equal(entering(llama, find_anatomy(llama), TOKENS), llama.get_input_embeddings()(TOKENS))
    gpt2: Any = build("gpt2")
    want = gpt2.transformer.wte(TOKENS) + gpt2.transformer.wpe(torch.arange(LENGTH))
    assert torch.equal(entering(gpt2, find_anatomy(gpt2), TOKENS), want)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma", "llama", "mamba", "granite"])
def test_tokens_act_through_what_enters_layer_0(family: str) -> None:
    model = build(family)
    assert acts_through_embed(model, find_anatomy(model), TOKENS[:1])


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_embeddings_of_each_layers_own_are_found_out(model_type: str) -> None:
    model = tiny_model(model_type, layers=4)
    assert not acts_through_embed(model, find_anatomy(model), TOKENS[:1])


@pytest.mark.slow
def test_rollout_of_a_real_model_is_that_by_hand(smollm2: LoadedModel) -> None:
    model: Any = smollm2.model
    tokens = TOKENS[:2] * 500
    got, _ = rollout(model, smollm2.anatomy, tokens, READ[:2])
    assert smollm2.anatomy.attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    try:
        want = by_hand(model, tokens, READ[:2])
    finally:
        model.set_attn_implementation("sdpa")
    assert (got - want).abs().max() <= TOLERANCE
