"""Heads and single neurons: scores against edges and finite differences, circuits against ordinary forward hooks."""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine import edge_patching
from mechinterp_cli.engine.atp import Batching
from mechinterp_cli.engine.circuit_graph import Graph, Source
from mechinterp_cli.engine.circuit_items import Items
from mechinterp_cli.engine.edge_routing import AllButOne, Bools
from mechinterp_cli.engine.edge_scores import Method, Pairs, edge_scores
from mechinterp_cli.engine.neuron_patching import NeuronPatching
from mechinterp_cli.engine.neuron_scores import neuron_scores
from mechinterp_cli.engine.neuron_wiring import NeuronWiring, neurons_wired
from mechinterp_cli.engine.wiring import wired
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.load import load_model
from tests.attribution_cases import Case, build, in_float64, two_metrics
from tests.oracle import Change, Oracle, Place

SIX = ("gpt2", "gpt_neox", "gemma2", "qwen3", "granite", "olmo2")
POST_NORMED = ("gemma2", "olmo2")
METHODS: tuple[Method, ...] = ("eap", "eap_ig_inputs", "eap_ig_activations", "clean_corrupted")
TWO_SPANS = ("early", "late")


def difference(logits: Tensor, prompts: Tensor) -> Tensor:
    return two_metrics(logits, prompts)[:, :1]


def logits_of(logits: Tensor, _prompt: Tensor, _read: Tensor) -> Tensor:
    """The logits themselves: nothing that an item changes is averaged away."""
    return logits


def wiring_of(case: Case, spans: Sequence[str] = ("all",)) -> NeuronWiring:
    graph = Graph.of(case.anatomy, spans=spans)
    return neurons_wired(wired(case.model, case.anatomy, graph), Items.of(case.anatomy, graph))


@cache
def case_of(family: str) -> tuple[Case, NeuronWiring]:
    case = Case.of(build(family, attn_implementation="eager"))
    return case, wiring_of(case)


def halves(case: Case) -> Tensor:
    """The first half of the positions and the second, as spans."""
    return (torch.arange(case.base.shape[1]) >= case.base.shape[1] // 2).long().expand_as(case.base)


def largest(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest error in parts of the largest number."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# --- items


def test_items_stand_in_the_order_of_sources_and_have_names() -> None:
    _, wiring = case_of("llama")
    items, graph = wiring.items, wiring.items.graph
    d_mlp = wiring.wiring.anatomy.layers[0].d_mlp
    heads = sum(source.kind == "head" for source in graph.sources)
    assert len(items) == 1 + heads + 3 * d_mlp
    assert items.named("m1.n17") == [items.named("m1")[17]]
    assert [items.name(item) for item in items.named("m1")] == [f"m1.n{i}" for i in range(d_mlp)]
    assert items.named("embed") == [0]
    assert all(items.named(items.name(item)) == [item] for item in range(len(items)))
    two = Items.of(wiring.wiring.anatomy, Graph.of(wiring.wiring.anatomy, spans=TWO_SPANS))
    assert len(two) == 2 * len(items)
    assert two.named("m0.n1") == [items.named("m0.n1")[0], items.named("m0.n1")[0] + len(items)]
    assert two.name(two.named("m0.n1")[1]) == "m0.n1@late"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("m1.n9999", "there is no m1.n9999: neurons of layer 1 are 0.."),
        ("m9.n1", "there is no m9.n1 in this model"),
        ("a0.h99", "there is no a0.h99"),
        ("n3", "'n3' is nothing that writes"),
    ],
)
def test_what_is_no_item_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        case_of("llama")[1].items.named(name)
    assert said in error.value.cause
    assert error.value.remedy


def test_mixtures_of_experts_have_no_neurons() -> None:
    anatomy = find_anatomy(build("mixtral"))
    with pytest.raises(UserError, match="layer 0 has no neuron.*mixture of experts") as error:
        Items.of(anatomy, Graph.of(anatomy))
    assert "nodes" in error.value.remedy


def test_a_bias_behind_a_norm_is_refused_and_without_the_norm_it_is_not() -> None:
    for family, refused in (("olmo2", True), ("llama", False)):
        model = build(family, attn_implementation="eager")
        down = model.model.layers[1].mlp.down_proj
        down.bias = torch.nn.Parameter(torch.ones(down.out_features))
        case = Case.of(model)
        if refused:
            with pytest.raises(UserError, match="MLP of layer 1 .*bias, and a norm after it"):
                wiring_of(case)
        else:
            assert wiring_of(case).deviation <= 1e-5


# --- scores


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SIX)
def test_items_are_the_sums_of_the_edges_that_leave_them(family: str, method: Method) -> None:
    case = Case.of(build(family, attn_implementation="eager"))
    with in_float64(case.model):
        wiring = wiring_of(case)
        pairs = Pairs(case.base, case.source, torch.tensor(case.read))
        edges = edge_scores(wiring.wiring, pairs, difference, method=method, steps=3)
        found = neuron_scores(wiring, pairs, difference, method=method, steps=3)
    nodes = edges.of_items(Graph.of(case.anatomy, granularity="node"))
    sums = np.stack([np.bincount(wiring.items.source, weights=row) for row in found.by_prompt])
    # Estimates are handed over in single precision, and a sum of many loses a digit.
    assert largest(sums, nodes) < 1e-5
    assert largest(found.base, edges.base) < 1e-12
    neurons = found.by_prompt[:, wiring.items.named("m1")]
    assert np.abs(neurons).max() > 0.01 * np.abs(nodes).max(), "neurons are in the metric's sight"


@pytest.mark.parametrize("family", SIX)
def test_eap_of_a_neuron_is_what_a_little_of_its_change_does(family: str) -> None:
    case = Case.of(build(family, attn_implementation="eager"))
    with in_float64(case.model):
        wiring = wiring_of(case)
        found = neuron_scores(wiring, Pairs(case.base, case.source, torch.tensor(case.read)), difference, method="eap")
        oracle = Oracle(family, case.model)
        _, base = oracle.run(case.base)
        _, other = oracle.run(case.source)
        for layer, neuron in ((0, 3), (2, 11)):
            change = written_by(oracle, family, layer, neuron, other) - written_by(oracle, family, layer, neuron, base)
            values = [moved(oracle, case, layer, size * change) for size in (1e-4, -1e-4)]
            slope = ((values[0] - values[1]) / 2e-4).numpy()
            mine = found.by_prompt[:, wiring.items.named(f"m{layer}.n{neuron}")[0]]
            assert np.abs(mine - slope).max() <= 1e-4 * np.abs(slope).max()


def written_by(oracle: Oracle, family: str, layer: int, neuron: int, seen: Mapping[Place, Tensor]) -> Tensor:
    """What one neuron adds to the stream: through the projection, and what a norm does to each element of the sum."""
    names, module = oracle.names, oracle.layers[layer]
    down, activation = module.get_submodule(names.down), seen["neuron", layer]
    alone = torch.zeros_like(activation)
    alone[..., neuron] = activation[..., neuron]
    with torch.no_grad():
        own, whole = down.forward(alone) - down.forward(torch.zeros_like(alone)), down.forward(activation)
        found: Tensor = own * seen["mlp_out", layer] / whole if family in POST_NORMED else own * names.scale
        return found


def moved(oracle: Oracle, case: Case, layer: int, by: Tensor) -> Tensor:
    """The metric of each prompt with something added to what an MLP adds."""
    logits, _ = oracle.run(case.base, {("mlp_out", layer): lambda x: x + by})
    prompts = torch.arange(len(case.base))
    return difference(logits[prompts, torch.tensor(case.read)], prompts)[:, 0]


@pytest.mark.parametrize("method", METHODS)
def test_scores_do_not_depend_on_batches(method: Method) -> None:
    case, wiring = case_of("gemma2")
    pairs = Pairs(case.base, case.source, torch.tensor(case.read))

    def scored(tokens: int) -> np.ndarray:
        batching = Batching(tokens)
        return neuron_scores(wiring, pairs, difference, method=method, steps=3, batching=batching).by_prompt

    assert largest(scored(1), scored(10_000)) < 1e-5


def test_spans_add_up_to_all_positions() -> None:
    case, whole = case_of("llama")
    read = torch.tensor(case.read)
    two = wiring_of(case, TWO_SPANS)
    found = neuron_scores(two, Pairs(case.base, case.source, read, halves(case)), difference).by_prompt
    want = neuron_scores(whole, Pairs(case.base, case.source, read), difference).by_prompt
    parts = found.reshape(len(want), 2, -1)
    assert largest(parts.sum(1), want) < 1e-5
    assert np.abs(parts).max((0, 2)).min() > 0


# --- circuits


class PlainNeurons:
    """Circuits run by ordinary hooks on `z`, `neuron`, and what blocks add where a norm stands behind them."""

    def __init__(self, family: str, wiring: NeuronWiring, model: object = None) -> None:
        self.family, self.wiring, self.oracle = family, wiring, Oracle(family, model)

    def run(self, own: Tensor, other: Tensor, kept: Bools, spans: Tensor | None = None) -> Tensor:
        """Logits [prompts, positions, vocab]."""
        _, there = self.oracle.run(other)
        items = self.wiring.items
        by_span = torch.from_numpy(kept.reshape(len(items.graph.spans), -1))
        cells = by_span[torch.zeros_like(own) if spans is None else spans]  # [prompts, positions, items]
        changes: dict[Place, Change] = {("embed", 0): _mix(cells[..., :1], there["embed", 0])}
        self._live: dict[Place, Tensor] = {}
        for layer in range(len(self.oracle.layers)):
            heads = [i for i, s in enumerate(items.graph.sources) if s.kind == "head" and s.layer == layer]
            own_heads = cells[..., items.first[heads[0]] : items.first[heads[0]] + len(heads), None]
            own_neurons = cells[..., items.within(items.graph.source_index[Source("mlp", layer)])]
            if self.family not in POST_NORMED:
                changes["z", layer] = _mix(own_heads, there["z", layer])
                changes["neuron", layer] = _mix(own_neurons, there["neuron", layer])
                continue
            for kind, out, mask in (("z", "attn_out", own_heads), ("neuron", "mlp_out", own_neurons)):
                changes[kind, layer] = self._noted(kind, layer)
                changes[out, layer] = self._assembled(kind, out, layer, mask, there)
        return self.oracle.run(own, changes)[0]

    def _noted(self, kind: str, layer: int) -> Change:
        def note(x: Tensor) -> Tensor:
            self._live[kind, layer] = x
            return x

        return note

    def _assembled(self, kind: str, out: str, layer: int, kept: Tensor, there: Mapping[Place, Tensor]) -> Change:
        names, module = self.oracle.names, self.oracle.layers[layer]
        project = module.get_submodule(names.o_proj if kind == "z" else names.down).forward

        def change(added: Tensor) -> Tensor:
            live, theirs = self._live[kind, layer], there[kind, layer]
            here: Tensor = project(_flat(torch.where(kept, live, 0))) * (added / project(_flat(live)))
            gone: Tensor = project(_flat(torch.where(kept, 0, theirs))) * (there[out, layer] / project(_flat(theirs)))
            return here + gone

        return change


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2)


def _mix(kept: Tensor, other: Tensor) -> Change:
    return lambda x: torch.where(kept, x, other)


def circuits(items: Items, *shares: float) -> Bools:
    """Random circuits, the embedding in each."""
    generator = np.random.default_rng(0)
    found = np.stack([generator.random(len(items)) < share for share in shares])
    found.reshape(len(shares), len(items.graph.spans), -1)[:, :, 0] = True
    return found


def pairs_of(case: Case, spans: Tensor | None = None) -> edge_patching.Pairs:
    own, other = case.base[:2], case.source[:2].clone()
    other[:, :4] = own[:, :4]
    return edge_patching.Pairs(own, other, torch.tensor(case.read[:2]), None if spans is None else spans[:2])


def far(got: Tensor, want: Tensor, scale: Tensor) -> float:
    """Largest difference, in parts of the largest logit."""
    return float((got - want).abs().max() / scale.abs().max())


def check_circuits(
    plain: PlainNeurons, pairs: edge_patching.Pairs, masks: Bools, tolerance: float, least: float = 0.01
) -> None:
    """Circuits beside those of plain hooks; no circuit is a stream."""
    prompts = torch.arange(len(pairs.own))
    patching = NeuronPatching(plain.wiring, pairs)
    streams = [plain.oracle.run(tokens)[0][prompts, pairs.read] for tokens in (pairs.own, pairs.other)]
    scale = torch.stack(streams)
    ends = patching.streams(logits_of)
    assert far(ends, scale, scale) <= tolerance
    without = masks[:1].copy()
    without.reshape(len(plain.wiring.items.graph.spans), -1)[:, 0] = False
    assert far(patching.run(without, logits_of)[0], streams[1], scale) <= tolerance, "nothing but the embedding differs"
    for mine, kept in zip(patching.run(masks, logits_of), masks, strict=True):
        want = plain.run(pairs.own, pairs.other, kept, pairs.span_of)[prompts, pairs.read]
        assert far(mine, want, scale) <= tolerance
        assert far(mine, streams[0], scale) > least < far(mine, streams[1], scale)


@pytest.mark.parametrize("family", [*SIX, "llama", "phi", "opt"])
def test_circuits_are_those_of_ordinary_hooks(family: str) -> None:
    case, wiring = case_of(family)
    check_circuits(
        PlainNeurons(family, wiring, case.model), pairs_of(case), circuits(wiring.items, 0.3, 0.5, 0.8), 1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_circuits_by_span_are_those_of_ordinary_hooks(family: str) -> None:
    case = case_of(family)[0]
    wiring = wiring_of(case, TWO_SPANS)
    pairs = pairs_of(case, halves(case))
    check_circuits(PlainNeurons(family, wiring, case.model), pairs, circuits(wiring.items, 0.3, 0.7), 1e-5)


@pytest.mark.parametrize(
    ("name", "family", "spread"),
    [
        ("toy-induction", "llama", 1),
        pytest.param("smollm2-135m-instruct", "llama", 307, marks=pytest.mark.slow),
    ],
)
def test_circuits_of_models_that_were_trained_or_made(name: str, family: str, spread: int) -> None:
    loaded = load_model(ModelOptions(id=name, attn_implementation="eager"))
    graph = Graph.of(loaded.anatomy)
    wiring = neurons_wired(wired(loaded.model, loaded.anatomy, graph), Items.of(loaded.anatomy, graph))
    own = torch.tensor([[5, 9, 14, 21, 30, 40, 9], [6, 11, 8, 19, 33, 41, 11]]) * spread
    other = own.clone()
    other[:, 1] = 7 * spread
    pairs = edge_patching.Pairs.of(own, other)
    check_circuits(PlainNeurons(family, wiring, loaded.model), pairs, circuits(wiring.items, 0.3, 0.7), 1e-4, 1e-4)


def test_circuits_of_some_prompts_at_a_time_and_one_by_one_are_the_same() -> None:
    case, wiring = case_of("llama")
    masks, pairs = circuits(wiring.items, *np.linspace(0.1, 0.9, 7)), pairs_of(case)
    together = NeuronPatching(wiring, pairs).run(masks, logits_of)
    small = NeuronPatching(wiring, pairs, memory=1)
    assert len(small.parts) == 2
    apart = torch.cat([small.run(masks[i : i + 1], logits_of) for i in range(len(masks))])
    assert far(apart, together, together) <= 1e-5


def test_an_item_taken_out_alone_does_what_is_estimated_where_little_changes() -> None:
    case, wiring = case_of("gpt2")
    pairs = pairs_of(case)
    items = np.array([*wiring.items.named("m2")[:30], *wiring.items.named("a2.h1")])
    exact = effects(wiring, pairs, items)
    estimates = neuron_scores(wiring, Pairs(pairs.own, pairs.other, pairs.read), difference, method="eap")
    mine = estimates.by_prompt[:, items].T
    assert np.corrcoef(exact.flatten(), mine.flatten())[0, 1] > 0.99
    assert largest(mine, exact) < 0.2


def effects(wiring: NeuronWiring, pairs: edge_patching.Pairs, items: np.ndarray) -> np.ndarray:
    """What the metric gains when each item alone carries the other stream, [items, prompts]."""

    def measure(logits: Tensor, prompt: Tensor, _read: Tensor) -> Tensor:
        return difference(logits, prompt)

    patching = NeuronPatching(wiring, pairs)
    found = patching.run(AllButOne(len(wiring.items), items), measure) - patching.streams(measure)[:1]
    return found[..., 0].numpy()


def test_half_precision_is_refused_for_circuits() -> None:
    case, wiring = case_of("llama")
    half = build("llama", attn_implementation="eager")
    half.bfloat16()
    anatomy = find_anatomy(half)
    graph = Graph.of(anatomy)
    narrow = neurons_wired(wired(half, anatomy, graph), Items.of(anatomy, graph))
    with pytest.raises(UserError, match="neurons of this model cannot be patched: it is not in float32"):
        NeuronPatching(narrow, pairs_of(case))
    assert NeuronPatching(wiring, pairs_of(case)).deviation <= 1e-5
