"""Edge patching against whole passes with hooks for every single target, and against the streams themselves."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.tiny import tiny_tokens
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine import edge_columns
from mechinterp_cli.engine.circuit_graph import Graph, Source, Target
from mechinterp_cli.engine.edge_patching import EdgePatching, Pairs, exact_edge_effects, run_circuits
from mechinterp_cli.engine.edge_routing import Bools
from mechinterp_cli.engine.wiring import Wiring, wired
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.load import load_model
from tests.edge_plain import PlainEdges
from tests.families import build

FAMILIES = ("gpt2", "gpt_neox", "gemma2", "qwen3", "granite", "olmo2")
LENGTH, FIRST = 12, 4
"""Longer than two windows; the streams part at the fifth token."""


def logits_of(logits: Tensor, _prompt: Tensor, _read: Tensor) -> Tensor:
    """The logits themselves: nothing that an edge changes is averaged away."""
    return logits


def pairs_of(prompts: int = 2) -> Pairs:
    """Random prompts that begin alike."""
    own, other = (tiny_tokens(batch=prompts, length=LENGTH, seed=seed) for seed in (1, 2))
    other[:, :FIRST] = own[:, :FIRST]
    return Pairs.of(own, other)


def wiring_of(family: str) -> Wiring:
    model = build(family, attn_implementation="eager")
    return wired(model, find_anatomy(model))


def native(wiring: Wiring, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = wiring.model(input_ids=tokens).logits[:, -1]
    return logits.double()


def random_masks(graph: Graph, *shares: float) -> Bools:
    """Circuits of about these shares of all edges."""
    generator = np.random.default_rng(0)
    return np.stack([generator.random(graph.n_edges) < share for share in shares])


def far(got: Tensor, want: Tensor, scale: Tensor) -> float:
    """Largest difference, in parts of the largest logit."""
    return float((got - want).abs().max() / scale.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_circuits_are_those_of_hooks_for_every_single_target(family: str) -> None:
    wiring, pairs = wiring_of(family), pairs_of()
    masks = random_masks(wiring.graph, 0.3, 0.7)
    got = EdgePatching(wiring, pairs).run(masks, logits_of)
    plain = PlainEdges(family, wiring.graph, wiring.model)
    streams = torch.stack([native(wiring, tokens) for tokens in (pairs.own, pairs.other)])
    for mine, kept in zip(got, masks, strict=True):
        want = plain.run(pairs.own, pairs.other, kept)[:, -1]
        assert far(mine, want, streams) <= 1e-5
        assert far(mine, streams[0], streams) > 0.01 < far(mine, streams[1], streams)


@pytest.mark.parametrize("family", [*FAMILIES, "llama", "phi"])
def test_all_edges_are_one_stream_and_none_the_other(family: str) -> None:
    wiring, pairs = wiring_of(family), pairs_of()
    patching = EdgePatching(wiring, pairs)
    streams = torch.stack([native(wiring, tokens) for tokens in (pairs.own, pairs.other)])
    assert far(patching.streams(logits_of), streams, streams) <= 1e-5
    assert far(streams[0], streams[1], streams) > 0.1
    everything = np.ones(wiring.graph.n_edges, dtype=np.bool_)
    far_anchor = [(everything, "other"), (~everything, "own")]
    states = [next(patching.parts[0].states([kept], anchor))[0] for kept, anchor in far_anchor]  # type: ignore[arg-type]
    with patching.parts[0].layers.open():
        computed = patching.parts[0].measured(torch.stack(states), logits_of)
    assert far(computed, streams, streams) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_into_the_logits_are_the_other_stream_and_all_into_one_node_are_its_input(family: str) -> None:
    wiring, pairs = wiring_of(family), pairs_of()
    targets = [Target("mlp", 1), Target("q", 1, 2), Target("k", 2, 0), Target("v", 0, 1)]
    check_sums(wiring, pairs, PlainEdges(family, wiring.graph, wiring.model), targets, 1e-5)


@pytest.mark.parametrize(
    ("name", "family", "spread"),
    [
        ("toy-induction", "llama", 1),
        ("planted-induction", "gpt2", 1),
        pytest.param("smollm2-135m-instruct", "llama", 307, marks=pytest.mark.slow),
    ],
)
def test_the_sums_of_models_that_were_trained_or_made(name: str, family: str, spread: int) -> None:
    loaded = load_model(ModelOptions(id=name, attn_implementation="eager"))
    wiring = wired(loaded.model, loaded.anatomy)
    own = torch.tensor([[5, 9, 14, 21, 30, 40, 9], [6, 11, 8, 19, 33, 41, 11]]) * spread
    other = own.clone()
    other[:, 1] = 7 * spread
    last = loaded.anatomy.n_layers - 1
    targets = [Target("mlp", last // 2), Target("q", last, 2), Target("k", last, 1), Target("v", last // 2, 0)]
    check_sums(wiring, Pairs.of(own, other), PlainEdges(family, wiring.graph, loaded.model), targets, 1e-4)


def check_sums(wiring: Wiring, pairs: Pairs, plain: PlainEdges, targets: Sequence[Target], tolerance: float) -> None:
    """All edges into the logits, and into each of some targets, against what stands there in the other stream."""
    graph, patching = wiring.graph, EdgePatching(wiring, pairs)
    _, seen = plain.oracle.run(pairs.other)
    into = [graph.edge_target != graph.target_index[target] for target in (graph.targets[-1], *targets)]
    got, want = patching.run(np.stack(into), logits_of), [native(wiring, pairs.other)]
    for target in targets:
        if target.kind == "mlp":
            place = "resid_pre" if plain.oracle.names.parallel else "resid_mid"
            want.append(mlp_patched(plain, pairs, seen[place, target.layer], target.layer))
        else:
            site, head = (target.kind, target.layer), target.head
            want.append(plain.oracle.run(pairs.own, {site: head_from(seen[site], head)})[0][:, -1].double())
    scale = native(wiring, pairs.own)
    for mine, theirs in zip(got, want, strict=True):
        assert far(mine, theirs, scale) <= tolerance
    assert far(got[0], scale, scale) > 0.05


def mlp_patched(plain: PlainEdges, pairs: Pairs, mlp_input: Tensor, layer: int) -> Tensor:
    """Logits where one MLP reads another stream and all else its own: its output is taken from a pass of its own."""
    place = "resid_pre" if plain.oracle.names.parallel else "resid_mid"
    _, apart = plain.oracle.run(pairs.own, {(place, layer): lambda _x: mlp_input})
    logits, _ = plain.oracle.run(pairs.own, {("mlp_out", layer): lambda _x: apart["mlp_out", layer]})
    return logits[:, -1].double()


def head_from(source: Tensor, head: int) -> Callable[[Tensor], Tensor]:
    """Puts one head's part of another stream in place."""

    def change(x: Tensor) -> Tensor:
        x[:, :, head] = source[:, :, head]
        return x

    return change


def test_a_single_edge_is_its_source_in_its_targets_input_alone() -> None:
    wiring, pairs = wiring_of("qwen3"), pairs_of()
    graph, patching = wiring.graph, EdgePatching(wiring, pairs_of())
    edges = [graph.edge(Source("head", 0, 1), Target("mlp", 2)), graph.edge(Source("embed"), Target("logits", 3))]
    edges += list(range(0, graph.n_edges, 60))
    got = exact_edge_effects(patching, edges, logits_of)
    plain, base = PlainEdges("qwen3", graph, wiring.model), native(wiring, pairs.own)
    for effect, edge in zip(got, edges, strict=True):
        kept = np.arange(graph.n_edges) != edge
        want = plain.run(pairs.own, pairs.other, kept)[:, -1] - base
        assert far(effect, want, base) <= 1e-5
    assert float(got.abs().amax((1, 2)).min()) > 1e-4


def test_the_reverse_base_swaps_the_streams() -> None:
    wiring, pairs = wiring_of("llama"), pairs_of()
    model, anatomy, graph = wiring.model, wiring.anatomy, wiring.graph
    masks = random_masks(graph, 0.3)
    given = (model, anatomy, graph, pairs.own, pairs.other, masks, logits_of)
    forth, back = (run_circuits(*given, base=base) for base in ("clean", "corrupt"))
    plain = PlainEdges("llama", graph, model)
    for got, (own, other) in ((forth, (pairs.own, pairs.other)), (back, (pairs.other, pairs.own))):
        assert far(got[0], plain.run(own, other, masks[0])[:, -1], native(wiring, own)) <= 1e-5
    assert far(forth, back, forth) > 0.01


def test_edges_can_carry_given_vectors_in_place_of_the_other_stream() -> None:
    wiring, pairs = wiring_of("gemma2"), pairs_of()
    graph, plain = wiring.graph, PlainEdges("gemma2", wiring.graph, wiring.model)
    own = plain.outputs(pairs.own)
    means = {source: own[source].mean((0, 1), keepdim=True).expand_as(own[source]) for source in graph.sources}
    stacked = torch.stack([means[source][:1, :1] for source in graph.sources])
    masks = random_masks(graph, 0.2, 0.7)
    patching = EdgePatching(wiring, Pairs(pairs.own, pairs.other, pairs.read, ablation=stacked))
    for got, kept in zip(patching.run(masks, logits_of), masks, strict=True):
        want = plain.run(pairs.own, pairs.other, kept, means)[:, -1]
        assert far(got, want, native(wiring, pairs.own)) <= 1e-5


@pytest.mark.parametrize("family", ["gpt_neox", "olmo2"])
def test_edges_by_span_of_positions(family: str) -> None:
    wiring, pairs = wiring_of(family), pairs_of()
    graph = Graph.of(wiring.anatomy, spans=("a", "b", "c"))
    span_of = torch.tensor([[0, 2, 1] * (LENGTH // 3), [2, 2, 0, 1] * (LENGTH // 4)])
    masks = random_masks(graph, 0.3, 0.7)
    spanned = Pairs(pairs.own, pairs.other, pairs.read, span_of=span_of)
    plain = PlainEdges(family, graph, wiring.model)
    for got, kept in zip(EdgePatching(wiring, spanned, graph=graph).run(masks, logits_of), masks, strict=True):
        want = plain.run(pairs.own, pairs.other, kept, span_of=span_of)[:, -1]
        assert far(got, want, native(wiring, pairs.own)) <= 1e-5


def test_neither_memory_nor_batch_nor_the_place_that_is_read_changes_anything() -> None:
    wiring, pairs = wiring_of("granite"), pairs_of(3)
    pairs = Pairs(pairs.own, pairs.other, torch.tensor([LENGTH - 1, FIRST - 2, 7]))
    masks, told = random_masks(wiring.graph, 0.1, 0.4, 0.6, 0.9), list[int]()
    together = EdgePatching(wiring, pairs).run(masks, logits_of, told.append)
    small = EdgePatching(wiring, pairs, memory=20_000)
    assert len(small.parts) > 1
    assert far(small.run(masks, logits_of), together, together) <= 2e-6
    one = EdgePatching(wiring, pairs.part(1, 2)).run(masks[2:3], logits_of)
    assert far(one[0, 0], together[2, 1], together) <= 2e-6
    assert told[-1] == len(masks)
    plain = PlainEdges("granite", wiring.graph, wiring.model)
    want = plain.run(pairs.own, pairs.other, masks[2])[torch.arange(3), pairs.read]
    assert far(together[2], want, want) <= 1e-5


def test_nothing_is_computed_before_a_removed_edge_and_equal_inputs_share_their_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wiring = wiring_of("llama")
    graph, patching = wiring.graph, EdgePatching(wiring, pairs_of())
    layers, fronts = patching.parts[0].layers, list[tuple[int, int]]()
    front = layers.front

    def counted(layer: int, inputs: Tensor, reads: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        fronts.append((layer, len(inputs)))
        return front(layer, inputs, reads)

    monkeypatch.setattr(layers, "front", counted)
    exact_edge_effects(patching, [graph.edge(Source("head", 0, 1), Target("mlp", 1))], logits_of)
    assert fronts == [(2, 1)]
    fronts.clear()
    exact_edge_effects(patching, [graph.edge(Source("embed"), Target("q", 0, 3))], logits_of)
    assert fronts == [(0, 1), (1, 1), (2, 1)]


def test_prompts_that_do_not_differ_and_streams_of_unequal_length() -> None:
    wiring, pairs = wiring_of("llama"), pairs_of()
    same = EdgePatching(wiring, Pairs.of(pairs.own, pairs.own))
    got = same.run(random_masks(wiring.graph, 0.5), logits_of)
    assert far(got[0], native(wiring, pairs.own), got) <= 1e-5
    with pytest.raises(UserError, match="prompts of one length"):
        Pairs.of(pairs.own, pairs.other[:, 1:])


def test_half_precision_is_refused_and_no_hook_is_left_behind() -> None:
    wiring = wiring_of("llama")
    before = hooks_of(wiring)
    EdgePatching(wiring, pairs_of()).run(random_masks(wiring.graph, 0.5), logits_of)
    assert hooks_of(wiring) == before == 0
    wiring.model.bfloat16()
    with pytest.raises(UserError, match="float32"):
        EdgePatching(wiring, pairs_of())


def hooks_of(wiring: Wiring) -> int:
    modules = wiring.model.modules()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in modules)


@pytest.mark.parametrize(
    ("family", "share"), [("gpt_neox", 1 / 12), ("gpt2", 1 / 12), ("qwen3", 1 / 4), ("olmo2", 1.0)]
)
def test_projections_are_computed_for_the_heads_that_are_read(family: str, share: float) -> None:
    wiring, pairs = wiring_of(family), pairs_of()
    patching = EdgePatching(wiring, pairs)
    patching.run(random_masks(wiring.graph, 0.5), logits_of)
    assert {1, 2} <= set(patching.columns)
    for columns in patching.columns.values():
        assert columns is not None
        first = next(iter(columns.needed.values()))
        assert first[0].mean() == pytest.approx(share)


def test_columns_that_do_not_give_a_layers_own_numbers_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wiring, pairs = wiring_of("qwen3"), pairs_of()
    dependence = edge_columns._dependence

    def short(*given: Any) -> dict[edge_columns.Projection, Bools]:
        found = dependence(*given)
        for needed in found.values():
            needed[0] = False
        return found

    monkeypatch.setattr(edge_columns, "_dependence", short)
    patching, masks = EdgePatching(wiring, pairs), random_masks(wiring.graph, 0.5)
    got = patching.run(masks, logits_of)
    assert set(patching.columns.values()) == {None}
    want = PlainEdges("qwen3", wiring.graph, wiring.model).run(pairs.own, pairs.other, masks[0])[:, -1]
    assert far(got[0], want, want) <= 1e-5
