"""Scores of edges: against brute force and finite differences by whole passes, batches, spans, and what is refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechinterp_cli.engine.atp import Batching, atp
from mechinterp_cli.engine.circuit_graph import Graph, Source, Target
from mechinterp_cli.engine.edge_scores import EdgeScores, Method, Pairs, Rule, edge_scores, places
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.wiring import Wiring, wired
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.models.loaded import LoadedModel
from tests.attribution_cases import LENGTH, PROMPTS, Case, build, in_float64, linear_model, two_metrics
from tests.edge_oracle import Stream, both
from tests.models_fixtures import smollm2

__all__ = ["smollm2"]

SIX = ("gpt2", "gpt_neox", "gemma2", "qwen3", "granite", "olmo2")
STEP = 1e-4


def difference(logits: Tensor, prompts: Tensor) -> Tensor:
    return two_metrics(logits, prompts)[:, :1]


@cache
def case_of(family: str) -> tuple[Case, Wiring]:
    case = Case.of(build(family))
    return case, wired(case.model, case.anatomy)


def pairs_of(case: Case, **others: Any) -> Pairs:
    return Pairs(case.base, case.source, torch.tensor(case.read), **others)


def scored(family: str, method: Method = "eap", **others: Any) -> EdgeScores:
    case, wiring = case_of(family)
    return edge_scores(wiring, pairs_of(case), difference, method=method, **others)


def change(source: Source, streams: tuple[Stream, Stream]) -> Tensor:
    base, other = streams
    return other.output(source) - base.output(source)


def largest(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest error in parts of the largest number."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("family", SIX)
def test_eap_is_the_definition_by_brute_force_for_every_edge(family: str) -> None:
    case = Case.of(build(family))
    with in_float64(case.model):
        wiring = wired(case.model, case.anatomy)
        graph, streams = wiring.graph, both(case)
        found = edge_scores(wiring, pairs_of(case), difference, method="eap").by_prompt
        changes = [change(source, streams) for source in graph.sources]
        gradients = [streams[0].gradient(target, difference) for target in graph.targets]
        pairs = zip(graph.edge_source, graph.edge_target, strict=True)
        want = torch.stack([(changes[u] * gradients[v]).sum((1, 2)) for u, v in pairs], 1).numpy()
        assert np.abs(want).max(0).min() > 0, "no edge is out of the metric's sight"
        assert largest(found, want) < 1e-10
        rng = np.random.default_rng(0)
        for edge in rng.choice(graph.n_edges, 4, replace=False).tolist():
            slope = finite_difference(streams[0], graph, edge, changes[graph.edge_source[edge]])
            assert np.abs(slope - want[:, edge]).max() < 1e-5 * max(np.abs(slope).max(), 1e-3 * np.abs(want).max())


def finite_difference(base: Stream, graph: Graph, edge: int, by: Tensor, step: float = STEP) -> np.ndarray:
    """What the metric gains when an edge's target reads a little of the source's output, per unit."""
    target = graph.targets[graph.edge_target[edge]]

    def moved(size: float) -> Tensor:
        with torch.no_grad():
            return base.with_own_stream(target, lambda own: own + size * by, difference)

    return ((moved(step) - moved(-step)) / (2 * step)).numpy()


def test_an_estimate_has_the_sign_of_the_patch_and_a_score_the_other() -> None:
    """The model is linear, so that estimates are exact."""
    case = Case.of(linear_model())
    with in_float64(case.model):
        wiring = wired(case.model, case.anatomy)
        found, streams = edge_scores(wiring, pairs_of(case), difference, method="eap"), both(case)
        everyone = torch.arange(PROMPTS)
        base = difference(streams[0].run({}, set())[0], everyone)[:, 0]
        for name in ("embed->logits", "a0.h1->m1", "m0->a1.h0.v", "embed->a0.h2.v"):
            edge = wiring.graph.edge_named(name)
            source = wiring.graph.sources[wiring.graph.edge_source[edge]]
            target = wiring.graph.targets[wiring.graph.edge_target[edge]]
            patched = streams[0].with_own_stream(target, change(source, streams).add, difference)
            exact = (patched - base).detach().numpy()
            assert np.abs(exact).max() > 1e-6
            assert np.abs(found.by_prompt[:, edge] - exact).max() < 1e-8 * np.abs(base.detach().numpy()).max()
            assert found.scores[edge] == pytest.approx(-exact.mean(), abs=1e-8)


TARGETS = (Target("q", 1, 0), Target("k", 2, 1), Target("mlp", 1), Target("logits", 3))


def mean_gradients(family_case: Case, target: Target, line: Sequence[float]) -> Tensor:
    """Along the line of embeddings, the base's tokens apart."""
    ends, site = both(family_case), Site("embed", 0)
    along = [torch.lerp(ends[0].seen[site], ends[1].seen[site], place) for place in line]
    streams = [Stream(family_case, family_case.base, {site: x}) for x in along]
    return torch.stack([stream.gradient(target, difference) for stream in streams]).mean(0)


@pytest.mark.parametrize(
    ("family", "method", "rule", "line"),
    [
        ("gpt_neox", "eap_ig_inputs", "right", (2 / 3, 1 / 3, 0.0)),
        ("gemma2", "eap_ig_inputs", "left", (1.0, 2 / 3, 1 / 3)),
        ("qwen3", "eap_ig_inputs", "midpoint", (5 / 6, 1 / 2, 1 / 6)),
        ("olmo2", "clean_corrupted", "right", (0.0, 1.0)),
    ],
)
def test_mean_gradients_along_the_embeddings(family: str, method: Method, rule: Rule, line: Sequence[float]) -> None:
    case = Case.of(build(family))
    with in_float64(case.model):
        wiring = wired(case.model, case.anatomy)
        found = edge_scores(wiring, pairs_of(case), difference, method=method, steps=3, rule=rule).by_prompt
        gradients = {target: mean_gradients(case, target, line) for target in TARGETS}
        check(found, wiring.graph, case, lambda target, _source: gradients[target])


def check(found: np.ndarray, graph: Graph, case: Case, gradient: Callable[[Target, Source], Tensor]) -> None:
    """Edges from one source of each kind into some targets."""
    streams = both(case)
    for target, source in product(TARGETS, (Source("embed"), Source("head", 0, 2), Source("mlp", 0))):
        want = (change(source, streams) * gradient(target, source)).sum((1, 2)).numpy()
        assert np.abs(found[:, graph.edge(source, target)] - want).max() < 1e-10 * np.abs(found).max()


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_activations_go_along_the_line_block_by_block(family: str) -> None:
    """Two steps: halfway, and the base."""
    case = Case.of(build(family))
    with in_float64(case.model):
        wiring = wired(case.model, case.anatomy)
        found = edge_scores(wiring, pairs_of(case), difference, method="eap_ig_activations", steps=2).by_prompt
        base, other = both(case)
        sites = {"embed": Site("embed", 0), "head": Site("attn_out", 0), "mlp": Site("mlp_out", 0)}
        memory: dict[tuple[Target, str], Tensor] = {}

        def gradient(target: Target, source: Source) -> Tensor:
            if (target, source.kind) not in memory:
                site = sites[source.kind]
                halfway = Stream(case, case.base, {site: (base.seen[site] + other.seen[site]) / 2})
                ends = [stream.gradient(target, difference) for stream in (halfway, base)]
                memory[target, source.kind] = torch.stack(ends).mean(0)
            return memory[target, source.kind]

        check(found, wiring.graph, case, gradient)


def test_a_node_is_the_gradient_at_its_own_output() -> None:
    """AtP of heads and MLPs, positions summed, comes by another way to the same."""
    case, wiring = case_of("llama")
    graph = replace(wiring.graph, granularity="node")
    nodes = scored("llama").of_items(graph)
    sites = frozenset({Site("embed", 0), *(Site(kind, layer) for kind in ("z", "mlp_out") for layer in range(3))})
    by_site = atp(case.ask(sites, metric=difference)).by_site
    for index, source in enumerate(graph.sources):
        site = {"embed": Site("embed", 0), "head": Site("z", source.layer), "mlp": Site("mlp_out", source.layer)}
        estimates = by_site[site[source.kind]][0]
        want = (estimates[..., source.head] if source.kind == "head" else estimates).sum(1).numpy()
        assert np.abs(nodes[:, index] - want).max() < 1e-4 * np.abs(nodes).max()


@pytest.mark.parametrize("method", ["eap", "eap_ig_inputs", "eap_ig_activations"])
@pytest.mark.parametrize("tokens", [1, LENGTH, 2 * LENGTH])
def test_scores_do_not_depend_on_batches(method: Method, tokens: int) -> None:
    whole = scored("llama", method, steps=2, batching=Batching(10**6))
    parts = scored("llama", method, steps=2, batching=Batching(tokens))
    assert largest(parts.by_prompt, whole.by_prompt) <= 1e-6
    assert largest(parts.scores, whole.scores) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eap", "eap_ig_inputs"])
def test_scores_of_a_real_model_depend_on_batches_by_rounding_alone(smollm2: LoadedModel, method: Method) -> None:
    """In float32 products of other shapes differ by 3e-5 of its logits' scale; of the scores' it is 5e-6 (measured)."""
    wiring = wired(smollm2.model, smollm2.anatomy)
    draws = torch.Generator().manual_seed(0)
    base = torch.randint(1000, 20000, (8, 15), generator=draws)
    source = base.clone()
    source[:, 6] = torch.randint(1000, 20000, (8,), generator=draws)
    pairs = Pairs(base, source, torch.full((8,), 14))

    def by_prompt(tokens: int) -> np.ndarray:
        found = edge_scores(wiring, pairs, difference, method=method, steps=5, batching=Batching(tokens))
        return found.by_prompt

    whole = by_prompt(10**6)
    for tokens in (60, 15):
        assert largest(by_prompt(tokens), whole) <= 2e-5


def test_half_of_the_prompts_have_the_same_numbers_by_themselves() -> None:
    case, wiring = case_of("gemma2")
    order = [2, 0]
    few = Pairs(case.base[order], case.source[order], torch.tensor(case.read)[order])
    part = edge_scores(wiring, few, lambda x, prompts: difference(x, torch.tensor(order)[prompts]), method="eap")
    whole = scored("gemma2")
    assert largest(part.by_prompt, whole.by_prompt[order]) <= 1e-6
    again = EdgeScores.joined([part, part])
    assert np.allclose(again.scores, part.scores)
    assert again.base.shape == (4,)


def test_checkpointing_changes_nothing() -> None:
    for family in ("gpt_neox", "llama"):
        with_it = scored(family, "eap_ig_inputs", batching=Batching(256, checkpointing=True))
        assert largest(with_it.by_prompt, scored(family, "eap_ig_inputs").by_prompt) <= 1e-6


def test_metrics_at_both_ends() -> None:
    case, _ = case_of("llama")
    found, swapped = scored("llama"), Case(case.model, case.anatomy, case.source, case.base, case.read)
    for stream, values in zip(both(case), (found.base, found.source), strict=True):
        with torch.no_grad():
            want = difference(stream.run({}, set())[0], torch.arange(PROMPTS))[:, 0].numpy()
        assert np.allclose(values, want, atol=1e-5)
    _, wiring = case_of("llama")
    back = edge_scores(wiring, pairs_of(swapped), difference, method="clean_corrupted")
    assert largest(back.by_prompt, -scored("llama", "clean_corrupted").by_prompt) < 1e-5


def test_spans_share_out_the_whole() -> None:
    case, whole = case_of("llama")
    graph = Graph.of(case.anatomy, spans=("front", "back"))
    spans = torch.where(torch.arange(LENGTH) < 5, 0, 1).expand(PROMPTS, -1).clone()
    found = edge_scores(replace(whole, graph=graph), pairs_of(case, spans=spans), difference, method="eap")
    by_span = found.by_prompt.reshape(PROMPTS, 2, -1)
    assert largest(by_span.sum(1), scored("llama").by_prompt) < 1e-5
    base, source = both(case)
    last = graph.edge_named("embed->logits@front")
    assert not found.by_prompt[:, last].any(), "early positions reach no logits but through attention"
    edge = graph.edge_named("embed->a1.h0.v@front")
    gradient = base.gradient(Target("v", 1, 0), difference)
    by = source.output(Source("embed")) - base.output(Source("embed"))
    want = (by * gradient)[:, :5].sum((1, 2)).numpy()
    assert np.abs(found.by_prompt[:, edge] - want).max() < 1e-4 * np.abs(want).max()
    spans[:] = -1
    nothing = edge_scores(replace(whole, graph=graph), pairs_of(case, spans=spans), difference, method="eap")
    assert not nothing.by_prompt.any()


def kl_to_base(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    with torch.no_grad():
        clean = both(case)[0].run({}, set())[0].log_softmax(-1)

    def metric(logits: Tensor, prompts: Tensor) -> Tensor:
        own = clean[prompts]
        return (own.exp() * (own - logits.log_softmax(-1))).sum(-1, keepdim=True)

    return metric


def test_kl_at_the_clean_base_is_refused_where_its_gradient_is_zero() -> None:
    case, wiring = case_of("llama")
    metric, pairs = kl_to_base(case), pairs_of(case)
    with pytest.raises(UserError) as error:
        edge_scores(wiring, pairs, metric, method="eap")
    assert "eap says 0 of every edge" in error.value.cause
    assert "eap_ig_inputs" in error.value.remedy
    with pytest.raises(UserError, match="eap_ig_inputs says 0 of every edge"):
        edge_scores(wiring, pairs, metric, method="eap_ig_inputs", steps=1)
    for method in ("eap_ig_inputs", "clean_corrupted"):
        assert np.abs(edge_scores(wiring, pairs, metric, method=method, steps=3).scores).max() > 1e-3
    swapped = Pairs(case.source, case.base, torch.tensor(case.read))
    assert np.abs(edge_scores(wiring, swapped, metric, method="eap").scores).max() > 1e-3


def test_numbers_that_are_not_finite_stop_the_run() -> None:
    case, wiring = case_of("llama")
    handle = case.model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: output * torch.nan)
    with pytest.raises(RunError, match=r"the estimate of edge .*->.* is NaN"):
        edge_scores(wiring, pairs_of(case), difference, method="eap")
    handle.remove()
    assert scored("llama")


def test_places() -> None:
    assert places(4) == (0.75, 0.5, 0.25, 0.0)
    assert places(4, "left") == (1.0, 0.75, 0.5, 0.25)
    assert places(2, "midpoint") == (0.75, 0.25)
    with pytest.raises(ValueError, match="at least one"):
        places(0)


def test_prompts_pair_up() -> None:
    case, _ = case_of("llama")
    with pytest.raises(ValueError, match="do not fit"):
        Pairs(case.base, case.source[:, 1:], torch.tensor(case.read))
    with pytest.raises(ValueError, match="2 reads"):
        Pairs(case.base, case.source, torch.tensor(case.read)[:2])
