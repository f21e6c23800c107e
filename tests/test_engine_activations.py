"""Gathered activations are those of plain hooks, whatever the passes; nothing is run or kept beyond what is asked."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.tiny import tiny_model
from mechinterp_cli.engine import activations as module
from mechinterp_cli.engine.activations import Asked, Key, View, feature_shape, gather, row_shapes
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import read_sites
from mechinterp_cli.errors import RunError
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.record import hooked
from mechinterp_cli.models.walk import forward
from tests.families import FAMILIES, build
from tests.models_fixtures import toy
from tests.test_engine_cleanup import assert_untouched, hooks_on, native

__all__ = ["toy"]

TOLERANCE = 1e-5
LENGTHS = (7, 11, 7, 5, 11, 7, 9)
CASES = ["gpt2", "gpt_neox", "llama", "gemma2", "gptj", "deepseek_v3"]
"""Fused qkv, parallel blocks, grouped queries, post-norms, no interface, narrow values and experts."""
KINDS = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "neuron")


def prompts(lengths: Sequence[int] = LENGTHS, *, low: int = 5, high: int = 60) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [[int(t) for t in torch.randint(low, high, (length,), generator=generator)] for length in lengths]


TOKENS = prompts()
EVERYONE = tuple(range(len(TOKENS)))
LAST = View("last", EVERYONE, tuple((len(t) - 1,) for t in TOKENS))
MEAN = View("mean", EVERYONE, tuple(tuple(range(len(t))) for t in TOKENS))
SPAN = View("span", EVERYONE, tuple(tuple(range(1, 2 + i % 3)) for i in EVERYONE))
WORDS = View("word", (3, 0, 0, 6, 3), ((0,), (2, 3), (6,), (1, 4, 8), (4,)))
VIEWS = (LAST, MEAN, SPAN, WORDS)


def everywhere(anatomy: Anatomy, views: Sequence[View] = VIEWS) -> Asked:
    """Every site of every layer with one vector per token."""
    sites = [Site(kind, layer.index) for layer in anatomy.layers for kind in KINDS if kind not in layer.missing]
    return {site: views for site in sites}


def by_hand(
    model: nn.Module, anatomy: Anatomy, asked: Asked, tokens: Sequence[Sequence[int]] = TOKENS
) -> dict[Key, Tensor]:
    """The same, prompt by prompt, everything held."""
    seen = [
        read_sites(model, anatomy, set(asked), partial(forward, model, torch.tensor([list(row)]))) for row in tokens
    ]
    return {
        (site, view.name): torch.stack(
            [
                seen[prompt][site][0, list(at)].double().mean(0).float()
                for prompt, at in zip(view.prompts, view.positions, strict=True)
            ]
        )
        for site, views in asked.items()
        for view in views
    }


def worst(found: Any, wanted: Any) -> float:
    assert found.keys() == wanted.keys()
    return max(float(((found[key] - wanted[key]).abs() / wanted[key].abs().max().clamp(min=1)).max()) for key in wanted)


@pytest.mark.parametrize("name", CASES)
def test_every_site_and_view_is_what_each_prompt_alone_gives(name: str) -> None:
    model = build(name)
    before = native(model)
    anatomy = find_anatomy(model)
    asked = everywhere(anatomy)
    assert {kind for kind in KINDS if kind not in FAMILIES[name].lacks} == {site.kind for site in asked}
    found = gather(model, anatomy, TOKENS, asked)
    assert {key: tuple(rows.shape) for key, rows in found.items()} == row_shapes(anatomy, asked)
    assert {rows.dtype for rows in found.values()} == {torch.float32}
    assert worst(found, by_hand(model, anatomy, asked)) <= TOLERANCE
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "qwen3", "phi3", "olmo2"])
def test_residual_streams_are_the_hidden_states_that_transformers_gives_out(name: str) -> None:
    model = build(name)
    anatomy = find_anatomy(model)
    asked = {Site(kind, layer): VIEWS for kind in ("resid_pre", "resid_post") for layer in range(anatomy.n_layers)}
    asked[Site("embed", 0)] = VIEWS
    found = gather(model, anatomy, TOKENS, asked)
    for prompt, row in enumerate(TOKENS):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False).hidden_states
        stacked = torch.stack(states)[:, 0]
        for layer in range(anatomy.n_layers):
            torch.testing.assert_close(
                found[Site("resid_pre", layer), "last"][prompt], stacked[layer, -1], rtol=1e-5, atol=TOLERANCE
            )
            torch.testing.assert_close(
                found[Site("resid_pre", layer), "mean"][prompt], stacked[layer].mean(0), rtol=1e-5, atol=TOLERANCE
            )
            if layer + 1 < anatomy.n_layers:  # after the last layer transformers gives the normed state
                torch.testing.assert_close(
                    found[Site("resid_post", layer), "last"][prompt], stacked[layer + 1, -1], rtol=1e-5, atol=TOLERANCE
                )
        torch.testing.assert_close(found[Site("embed", 0), "last"][prompt], stacked[0, -1], rtol=0, atol=0)


def test_heads_are_those_that_the_models_own_modules_read_and_give() -> None:
    model: Any = build("llama")
    anatomy = find_anatomy(model)
    heads = anatomy.layers[1].heads
    assert heads is not None and heads.key_value < heads.query
    asked = {Site("z", 1): [LAST], Site("v", 1): [LAST], Site("neuron", 1): [LAST]}
    found = gather(model, anatomy, TOKENS, asked)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    seen: dict[str, Tensor] = {}
    handles = [
        attention.o_proj.register_forward_pre_hook(lambda _m, args: seen.update(z=args[0])),
        attention.v_proj.register_forward_hook(lambda _m, _args, out: seen.update(v=out)),
        mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.update(neuron=args[0])),
    ]
    with hooked(handles):
        for prompt, row in enumerate(TOKENS):
            forward(model, torch.tensor([row]))
            for kind, shape in (("z", (heads.query, -1)), ("v", (heads.key_value, -1)), ("neuron", (-1,))):
                wanted = seen[kind][0, -1].view(shape)
                torch.testing.assert_close(found[Site(kind, 1), "last"][prompt], wanted, rtol=1e-5, atol=TOLERANCE)


def test_one_pass_of_the_same_batch_gives_the_same_bits(toy: LoadedModel) -> None:
    model, anatomy = toy.model, toy.anatomy
    tokens = prompts([9] * 6, low=0, high=30)
    view = View("third", tuple(range(6)), ((2,),) * 6)
    asked = everywhere(anatomy, [view])
    found = gather(model, anatomy, tokens, asked)
    seen = read_sites(model, anatomy, set(asked), lambda: forward(model, torch.tensor(tokens), last_only=True))
    for site in asked:
        assert torch.equal(found[site, "third"], seen[site][:, 2]), site


def test_how_prompts_are_shared_out_over_passes_changes_rounding_only(toy: LoadedModel) -> None:
    tokens = prompts([7, 11, 7, 5, 11, 7, 9] * 3, low=0, high=30)
    everyone = tuple(range(len(tokens)))
    views = [
        View("last", everyone, tuple((len(t) - 1,) for t in tokens)),
        View("mean", everyone, tuple(tuple(range(len(t))) for t in tokens)),
    ]
    asked = everywhere(toy.anatomy, views)
    whole = gather(toy.model, toy.anatomy, tokens, asked)
    for limit in (1, 16, 40):
        assert worst(gather(toy.model, toy.anatomy, tokens, asked, tokens_per_pass=limit), whole) <= TOLERANCE
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(2)).tolist()
    moved = [View(v.name, tuple(v.prompts[i] for i in order), tuple(v.positions[i] for i in order)) for v in views]
    shuffled = gather(toy.model, toy.anatomy, tokens, everywhere(toy.anatomy, moved))
    assert worst(shuffled, {key: rows[order] for key, rows in whole.items()}) == 0.0
    assert worst(shuffled, whole) > 0.1  # the order of examples does matter


def test_means_that_are_taken_in_parts_are_the_same(toy: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = everywhere(toy.anatomy, [MEAN, WORDS])
    tokens = prompts(low=0, high=30)
    whole = gather(toy.model, toy.anatomy, tokens, asked)
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 1)
    assert worst(gather(toy.model, toy.anatomy, tokens, asked), whole) == 0.0


@contextmanager
def counted(model: nn.Module, anatomy: Anatomy) -> Iterator[list[int]]:
    """How often each layer is run, and at the end of the list the head."""
    counts = [0] * (anatomy.n_layers + 1)

    def count(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    layers = [model.get_submodule(layer.module) for layer in anatomy.layers]
    head: Any = model
    modules = [*layers, head.get_output_embeddings()]
    handles = [m.register_forward_hook(count(i)) for i, m in enumerate(modules)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ([Site("resid_post", 2)], [4, 4, 4, 0]),
        ([Site("resid_post", 0), Site("z", 1)], [4, 4, 0, 0]),
        ([Site("resid_pre", 1)], [4, 0, 0, 0]),
        ([Site("embed", 0)], [0, 0, 0, 0]),
        ([Site("embed", 0), Site("mlp_out", 0)], [4, 0, 0, 0]),
    ],
)
def test_a_pass_ends_with_the_last_layer_asked_for(sites: list[Site], expected: list[int]) -> None:
    model = build("gpt2")
    anatomy = find_anatomy(model)
    asked = {site: [LAST] for site in sites}
    with counted(model, anatomy) as counts:
        found = gather(model, anatomy, TOKENS, asked)
    assert counts == expected  # four lengths, four passes
    assert worst(found, by_hand(model, anatomy, asked)) <= TOLERANCE


def test_prompts_of_which_nothing_is_asked_are_not_run_and_progress_counts_the_others() -> None:
    model = build("gpt2")
    anatomy = find_anatomy(model)
    told: list[tuple[int, int]] = []
    asked = {Site("resid_post", 0): [WORDS]}
    with counted(model, anatomy) as counts:
        gather(model, anatomy, TOKENS, asked, tick=lambda done, total: told.append((done, total)))
    assert counts[0] == 3  # prompts 3, 0 and 6 have three lengths
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_nothing_asked_runs_nothing() -> None:
    model = build("gpt2")
    anatomy = find_anatomy(model)
    with counted(model, anatomy) as counts:
        assert gather(model, anatomy, TOKENS, {}) == {}
    assert counts == [0] * 4


def test_only_the_rows_asked_for_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    held: list[int] = []
    activations: list[weakref.ref[Tensor]] = []
    write = module._Reader.write
    visit = module._Reader.__call__

    def noting(reader: module._Reader, site: Site, activation: Tensor) -> None:
        activations.append(weakref.ref(activation))
        visit(reader, site, activation)

    def counting(reader: module._Reader, rows: Any) -> None:
        parts = [part for found in reader.seen.values() for _, _, part in found]
        held.append(sum(part.untyped_storage().nbytes() for part in parts))
        assert not any(ref() is not None for ref in activations), "an activation outlived its pass"
        write(reader, rows)

    monkeypatch.setattr(module._Reader, "__call__", noting)
    monkeypatch.setattr(module._Reader, "write", counting)
    asked = everywhere(anatomy, [LAST, MEAN])
    gather(model, anatomy, TOKENS, asked)
    features = sum(torch.Size(feature_shape(anatomy, site)).numel() for site in asked)
    assert activations
    assert sum(held) == 4 * features * 2 * len(TOKENS)
    everything = 4 * features * sum(map(len, TOKENS))
    assert sum(held) < everything / 4


def test_rows_of_a_model_in_half_precision_are_float32() -> None:
    model: Any = build("llama")
    model.to(torch.bfloat16)
    anatomy = find_anatomy(model)
    asked = everywhere(anatomy)
    found = gather(model, anatomy, TOKENS, asked)
    assert {rows.dtype for rows in found.values()} == {torch.float32}
    single = found[Site("resid_post", 1), "last"]
    assert torch.equal(single, single.bfloat16().float())
    mean = found[Site("resid_post", 1), "mean"]
    assert not torch.equal(mean, mean.bfloat16().float())  # means are not rounded to the model's type
    assert worst(found, by_hand(model, anatomy, asked)) <= 0.05


def test_rows_are_written_to_the_tensors_that_are_given(toy: LoadedModel) -> None:
    tokens = prompts(low=0, high=30)
    asked = {Site("z", 1): [LAST, MEAN]}
    into = {key: torch.full(shape, torch.nan) for key, shape in row_shapes(toy.anatomy, asked).items()}
    gather(toy.model, toy.anatomy, tokens, asked, into=into)
    assert worst(into, gather(toy.model, toy.anatomy, tokens, asked)) == 0.0


def test_nan_names_the_layer_unless_it_is_to_be_recorded() -> None:
    model = tiny_model("gpt2")
    anatomy = find_anatomy(model)
    broken: Any = model.get_submodule(f"{anatomy.layers[1].module}.mlp.c_proj")
    broken.bias.data[3] = torch.nan
    asked = {Site("resid_post", layer): [LAST] for layer in range(3)}
    with pytest.raises(RunError, match="layer 1 gives NaN or infinity in resid_post"):
        gather(model, anatomy, TOKENS, asked)
    assert hooks_on(model) == 0
    found = gather(model, anatomy, TOKENS, asked, finite=False)
    assert found[Site("resid_post", 1), "last"][:, 3].isnan().all()
    assert found[Site("resid_post", 0), "last"].isfinite().all()


def test_a_pass_that_fails_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    before = native(model)
    anatomy = find_anatomy(model)
    beyond = [[*TOKENS[0][:-1], 10**6]]
    with pytest.raises(IndexError):
        gather(model, anatomy, beyond, {Site("q", 2): [View("last", (0,), ((6,),))]})
    assert_untouched(model, before)
