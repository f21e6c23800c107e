"""Path patching against two passes with hooks, and on the planted circuit."""

import pytest
import torch

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine.circuit_graph import Graph, Source, Target
from mechinterp_cli.engine.edge_patching import EdgePatching, Pairs, exact_edge_effects
from mechinterp_cli.engine.path_patching import Path, Rest, patch_paths
from mechinterp_cli.engine.wiring import wired
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.load import load_model
from tests.families import build
from tests.oracle import Oracle
from tests.path_plain import logits_with
from tests.test_engine_edge_patching import far, logits_of, native, pairs_of, wiring_of

LOGITS = Target("logits", 3)
HEAD = Source("head", 0, 3)
ENDS = (
    ((HEAD,), (LOGITS,)),
    ((HEAD,), (Target("q", 2, 1),)),
    ((HEAD, Source("mlp", 1)), (Target("k", 1, 0), Target("v", 2, 1), Target("q", 2, 3))),
    ((Source("embed"),), (Target("mlp", 1), Target("q", 1, 0), Target("mlp", 2))),
    ((Source("mlp", 0),), (Target("k", 1, 1), Target("v", 1, 1), Target("mlp", 2))),
)


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3"])
@pytest.mark.parametrize("rest", ["frozen", "mlps", "heads", "free"])
def test_paths_are_those_of_two_passes_with_hooks(family: str, rest: Rest) -> None:
    wiring, pairs = wiring_of(family), pairs_of()
    paths = [Path(senders, receivers, rest) for senders, receivers in ENDS]
    told: list[int] = []
    got = patch_paths(EdgePatching(wiring, pairs), paths, logits_of, told.append)
    oracle, base = Oracle(family, wiring.model), native(wiring, pairs.own)
    for mine, path in zip(got, paths, strict=True):
        want = logits_with(oracle, pairs.own, pairs.other, path)[:, -1]
        assert far(mine, want, base) <= 1e-5, path.name
        assert far(mine, base, base) > 1e-4, path.name
    assert told[-1] == len(paths)


def test_one_direct_path_is_one_edge_where_a_norm_follows_attention_too() -> None:
    wiring, pairs = wiring_of("olmo2"), pairs_of()
    patching, graph = EdgePatching(wiring, pairs), wiring.graph
    ends = [(HEAD, Target("v", 1, 1)), (Source("mlp", 0), Target("mlp", 2)), (Source("embed"), LOGITS)]
    got = patch_paths(patching, [Path((source,), (target,)) for source, target in ends], logits_of)
    want = exact_edge_effects(patching, [graph.edge(*edge) for edge in ends], logits_of)
    assert far(got - native(wiring, pairs.own), want, got) <= 1e-6


def test_all_that_enters_and_everything_free_is_the_other_stream() -> None:
    wiring, pairs = wiring_of("gemma2"), pairs_of()
    got = patch_paths(EdgePatching(wiring, pairs), [Path((Source("embed"),), (LOGITS,), "free")], logits_of)
    assert far(got[0], native(wiring, pairs.other), got) <= 1e-5


def test_the_planted_circuit_composes_by_keys_and_nothing_else() -> None:
    loaded = load_model(ModelOptions(id="planted-induction"))
    wiring = wired(loaded.model, loaded.anatomy)
    own, other = torch.tensor([[5, 9, 14, 21, 30, 40, 9]]), torch.tensor([[5, 7, 14, 21, 30, 40, 9]])
    pairs = Pairs.of(own, other)
    previous = (Source("head", 0, 1),)
    ends = [(Target(kind, 1, 2),) for kind in ("q", "k", "v")] + [(Target("logits", 2),)]
    got = patch_paths(EdgePatching(wiring, pairs), [Path(previous, end) for end in ends], logits_of)[..., 14]
    base = native(wiring, pairs.own)[:, 14]
    assert float(base) > 11
    assert float(got[1]) < 2.1, "without the note of the token before, attention is spread over six keys"
    for number in (0, 2, 3):
        torch.testing.assert_close(got[number], base, rtol=0, atol=1e-3)


def test_what_is_no_path_is_refused() -> None:
    graph = Graph.of(find_anatomy(build("qwen3")))
    patching = EdgePatching(wiring_of("qwen3"), pairs_of())
    late, early = Source("head", 2, 0), Target("q", 1, 0)
    for path, words in (
        (Path((late,), (early,)), "a2.h0 writes after a1.h0.q has read"),
        (Path((HEAD, late), (Target("q", 1, 0),)), "a2.h0 writes after"),
        (Path((late,), (LOGITS, early)), "logits are where every path ends"),
        (Path((Source("head", 1, 0),), (Target("q", 0, 1), Target("q", 2, 1))), "a0.h1.q reads before a1.h0 write"),
        (Path((Source("head", 9, 9),), (LOGITS,)), "a9.h9 is not in this model's graph"),
    ):
        with pytest.raises(UserError, match=words):
            patch_paths(patching, [path], logits_of)
    assert Path((HEAD,), (Target("k", 1, 0), Target("v", 1, 0))).name == "a0.h3->a1.h0.k+a1.h0.v"
    assert len(graph.sources) == 16
