"""The benchmark of circuit runs: its plain hooks and the engine agree, and it notices where they do not."""

import numpy as np
import pytest
import torch

from benchmarks.circuit_evaluation import HEAD, SIZES, Evaluated, Ours, PlainHooks, evaluate, row, top_circuits
from benchmarks.sweep_prompts import Pairs
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine.wiring import Wiring, wired
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.load import load_model


@pytest.fixture(scope="module")
def toy() -> Wiring:
    loaded = load_model(ModelOptions(id="toy-induction"))
    return wired(loaded.model, loaded.anatomy)


def pairs() -> Pairs:
    clean = torch.tensor([[5, 9, 14, 21, 30, 40, 9], [6, 11, 8, 19, 33, 41, 11]])
    corrupt = clean.clone()
    corrupt[:, 1] = 7
    return Pairs(clean, corrupt, torch.tensor([[14, 21], [8, 19]]), prefix=0)


def test_both_ways_agree_on_circuits_of_every_size(toy: Wiring, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).random(toy.graph.n_edges)
    result = evaluate(toy, pairs(), scores, rounds=1)
    assert result.equal and result.ratio > 0
    assert result.kept == tuple(int(size * toy.graph.n_edges) for size in SIZES)
    assert len(row(result)) == len(HEAD)
    monkeypatch.setattr(Ours, "values", lambda self, circuits: PlainHooks.values(plain(toy), circuits[::-1]))
    assert not evaluate(toy, pairs(), scores, rounds=1).equal


def plain(toy: Wiring) -> PlainHooks:
    return PlainHooks(toy.model, toy.graph, pairs())


def test_the_plain_version_gives_both_streams(toy: Wiring) -> None:
    everything = np.ones(toy.graph.n_edges, dtype=np.bool_)
    found = plain(toy).values([everything, ~everything])
    for got, tokens in zip(found, (pairs().clean, pairs().corrupt), strict=True):
        with torch.no_grad():
            logits = toy.model(input_ids=tokens).logits[:, -1].gather(1, pairs().answers)
        torch.testing.assert_close(got, (logits[:, 0] - logits[:, 1]).double(), rtol=0, atol=1e-4)


def test_circuits_are_nested_and_other_models_are_refused(toy: Wiring) -> None:
    circuits = top_circuits(np.arange(1000.0))
    assert [int(kept.sum()) for kept in circuits] == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert circuits[0].nonzero()[0].tolist() == [999]
    loaded = load_model(ModelOptions(id="planted-induction"))
    with pytest.raises(UserError, match="shaped like Llama"):
        PlainHooks(loaded.model, toy.graph, pairs())
    assert Evaluated(1, 1, (1,), 1.0, 4.0, 0, 0.0).ratio == 4
