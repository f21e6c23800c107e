"""ACDC against the published algorithm written out, one circuit at a time, and on the planted circuit."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from benchmarks.tiny import tiny_tokens
from mechinterp_cli.engine.acdc import Pruned, acdc
from mechinterp_cli.engine.edge_patching import EdgePatching, Pairs
from mechinterp_cli.engine.edge_routing import Bools
from mechinterp_cli.engine.wiring import Wiring, wired
from mechinterp_cli.models.anatomy import find_anatomy
from tests.families import build


class Divergence:
    """KL of the whole model's answer from a circuit's, mean over prompts, nats."""

    def __init__(self, wiring: Wiring) -> None:
        own, other = (tiny_tokens(batch=2, length=6, seed=seed) for seed in (1, 2))
        other[:, :3] = own[:, :3]
        self.patching = EdgePatching(wiring, Pairs.of(own, other))
        with torch.no_grad():
            self.whole = wiring.model(input_ids=own).logits[:, -1].log_softmax(-1)
        self.asked = list[int]()

    def measure(self, logits: Tensor, prompt: Tensor, _read: Tensor) -> Tensor:
        whole = self.whole[prompt]
        divergence: Tensor = (whole.exp() * (whole - logits.log_softmax(-1))).sum(-1, keepdim=True)
        return divergence

    def __call__(self, circuits: Sequence[Bools]) -> npt.NDArray[np.float64]:
        self.asked.append(len(circuits))
        values: npt.NDArray[np.float64] = self.patching.run(circuits, self.measure)[..., 0].mean(1).numpy()
        return values


def written_out(wiring: Wiring, divergence: Divergence, threshold: float, *, absolute: bool) -> Bools:
    """Conmy et al., algorithm 1, every edge tried."""
    graph = wiring.graph
    kept = np.ones(graph.n_edges, dtype=np.bool_)
    value = divergence([kept])[0]
    for target in reversed(graph.targets):
        for source in reversed(graph.sources_before(target)):
            kept[graph.edge(source, target)] = False
            without = divergence([kept])[0]
            change = without - value
            if (abs(change) if absolute else change) < threshold:
                value = without
            else:
                kept[graph.edge(source, target)] = True
    return kept


@pytest.mark.parametrize(("family", "share", "absolute"), [("gpt_neox", 0.01, False), ("olmo2", 0.02, True)])
def test_acdc_makes_the_published_decisions(family: str, share: float, absolute: bool) -> None:
    model = build(family)
    wiring = wired(model, find_anatomy(model))
    divergence = Divergence(wiring)
    threshold = share * float(divergence([np.zeros(wiring.graph.n_edges, dtype=np.bool_)])[0])
    found = acdc(wiring, divergence, threshold, absolute=absolute)
    want = written_out(wiring, divergence, threshold, absolute=absolute)
    assert 5 < want.sum() < wiring.graph.n_edges - 5
    assert np.array_equal(found.kept, want)
    assert found.value == pytest.approx(divergence([want])[0], abs=1e-7)


def test_runs_ahead_change_nothing_and_are_counted() -> None:
    model = build("gpt_neox")
    wiring = wired(model, find_anatomy(model))
    divergence, told = Divergence(wiring), list[int]()
    ahead = acdc(wiring, divergence, 1e-4, tick=told.append)
    assert sum(divergence.asked) == ahead.runs and max(divergence.asked) > 4
    alone: Pruned = acdc(wiring, divergence, 1e-4, ahead=1)
    assert np.array_equal(ahead.kept, alone.kept)
    assert alone.runs == alone.evaluations + 1 == ahead.evaluations + 1 <= ahead.runs
    assert told[-1] == wiring.graph.n_edges
