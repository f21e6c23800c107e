"""Bad input to `circuit`, from the command line to the message: what is wrong and where, and what to do."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mechinterp_cli.cli.main import main
from tests.refusing import changed, check_refused

GOOD = """\
name: bad
model: {id: planted-induction}
task: {name: induction, n: 6, block: 6, prefix: 2}
circuit:
  scores: [eap]
  sizes: [0.1, 1.0]
  random: {draws: 0}
  tests: null
  stability: null
  files: false
metrics: [logit_diff]
output: {figures: []}
"""
TASK = "task: {name: induction, n: 6, block: 6, prefix: 2}"
SCORES, METRICS, SIZES = "scores: [eap]", "metrics: [logit_diff]", "sizes: [0.1, 1.0]"
Refused = Callable[..., None]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own, so that paths in messages are short and `runs` begins empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))


def with_key(lines: str) -> str:
    """The good config with more in its section."""
    return changed(GOOD, "  tests: null\n", f"  tests: null\n{lines}\n")


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a config and checks how it ends."""
    return partial(check_refused, capfd, "circuit")


def test_the_good_config_runs(capfd: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(GOOD)
    assert main(["circuit", "c.yaml", "--quiet"]) == 0
    assert capfd.readouterr().out.startswith("runs/")


@pytest.mark.parametrize(
    ("lines", "cause", "remedy"),
    [
        (
            "  reference: {edges: [a1.h2->a0.h1.v]}",
            "c.yaml:9: circuit.reference.edges[0]: a1.h2->a0.h1.v is no edge: a1.h2 writes after a0.h1.v has read",
            "Edges go from an earlier part to a later one",
        ),
        (
            "  reference: {edges: ['1.2->0.1.v']}",
            "reference.edges[0]: a1.h2->a0.h1.v is no edge",
            "the wrong way round",
        ),
        (
            "  reference: {heads: ['1.2', '7.1']}",
            "c.yaml:9: circuit.reference.heads[1]: there is no head 7.1: layers are 0..1, heads 0..3",
            "Head 6 of layer 9 is 9.6.",
        ),
        ("  given: {edges: [embed->a0.h9.v]}", "given.edges[0]: a0.h9.v is not in this model's graph", "heads 0..3"),
        ("  given: {edges: [embed]}", "given.edges[0]: 'embed' is not the name of an edge", "a3.h5->m7"),
        ("  given: {heads: [first]}", "given.heads[0]: 'first' names no head", "9.6"),
        ("  given: {heads: ['0.1'], mlps: [5]}", "given.mlps[0]: layer 5 has no MLP", "Layers are 0..1."),
        ("  given: {}", "circuit.given: {} is not valid; allowed: text or a circuit that is not empty: heads", ""),
        (
            "  given: {edges: [a0.h1->a1.h2.k]}",
            "c.yaml:9: circuit.given: an empty circuit: no edge of it lies on a path from the embedding to the logits",
            "Give edges such as",
        ),
        ("  given: {heads: ['0.1'], edges: [embed->logits]}", "allowed: text or edges, or heads and mlps", ""),
        ("  given: none.json", "c.yaml:9: circuit.given: none.json: cannot be read: No such file", "a .json file"),
        ("  select: greedy\n  granularity: nodes", "circuit.select: greedy goes from edge to edge", "select: top"),
        ("  spans: [middle]", "circuit.spans[0]: 'middle' is not a span of every prompt", "copied, end, matched"),
    ],
)
def test_circuits_and_choices_that_cannot_be(refused: Refused, lines: str, cause: str, remedy: str) -> None:
    refused(with_key(lines), cause, remedy)


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        (
            (METRICS, "metrics: [kl]"),
            "c.yaml:5: circuit.scores[0]: eap with the metric kl is 0 for every edge under direction: noise",
            "Use direction: denoise, eap_ig_inputs",
        ),
        (
            (METRICS, "metrics: [accuracy]"),
            "circuit.scores[0]: eap needs a gradient, and accuracy has none",
            "logit_diff",
        ),
        ((SCORES, "scores: [eap, eap]"), "listed twice: eap", ""),
        ((SCORES, "scores: [eapp]"), "circuit.scores[0]", ""),
        ((SIZES, "sizes: [0.5, 0.1]"), "circuit.sizes: [0.5, 0.1] is not valid; allowed: each larger", ""),
        ((SIZES, "sizes: [0.0, 0.1]"), "circuit.sizes[0]", ""),
        (
            ("  tests: null", "  tests: {size: given}"),
            "circuit.tests.size: tests are of the circuit `given`",
            "circuit.given",
        ),
        (
            (TASK, "task: {prompts: [{clean: k1 k2 k3 k1, answer: k2, wrong_answer: k3}]}"),
            "c.yaml:3: task: edges that are not kept carry the corrupted prompt, and prompts of this task have none",
            "Give each prompt a `corrupt`",
        ),
        ((TASK, TASK.replace("n: 6", "n: 1")), "circuit.split: 1 prompt cannot be split", "Raise task.n"),
    ],
)
def test_scores_metrics_and_tasks_that_say_nothing_together(
    refused: Refused, change: tuple[str, ...], cause: str, remedy: str
) -> None:
    refused(changed(GOOD, *change), cause, remedy)


def test_each_position_needs_prompts_of_one_length(refused: Refused) -> None:
    prompts = "".join(
        f"{{clean: {' '.join(words)}, corrupt: {' '.join([*words[:-1], 'k50'])}, answer: k2, wrong_answer: k3}}, "
        for words in (["k1", "k2", "k3", "k1"], ["k4", "k5", "k4"])
    )
    config = changed(with_key("  spans: each"), TASK, f"task: {{prompts: [{prompts}]}}")
    cause = "circuit.spans: `each` needs prompts of one template and length, and these have 2 (lengths 3, 4)"
    refused(config, cause, "Name spans, or choose one template")


def test_one_prompt_on_both_sides_is_refused(refused: Refused) -> None:
    twice = "".join(
        f"{{clean: k1 k2 k3 k1, corrupt: k9 k2 k3 k1, answer: {answer}, wrong_answer: k3, cluster: {answer}}}, "
        for answer in ("k2", "k5")
    )
    config = changed(GOOD, TASK, f"task: {{prompts: [{twice}]}}")
    refused(config, "circuit.split: prompt 1 ('k1 k2 k3 k1') is in training and evaluation", "give them one cluster")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "not JSON"),
        ("{}", "has no `edges`"),
        (json.dumps({"edges": {"input->logits": {"score": 1.0}}}), "edge 'input->logits' has no `in_graph`"),
        (json.dumps({"edges": {"input->logits": {"in_graph": False}}}), "no edge is in the circuit"),
        (
            json.dumps({"cfg": {"n_layers": 12}, "edges": {"input->logits": {"in_graph": True}}}),
            "it is of a model of 12 layers",
        ),
        (json.dumps({"edges": {"a9.h9->logits": {"in_graph": True}}}), "a9.h9 is not in this model's graph"),
    ],
)
def test_files_that_hold_no_circuit_of_this_model(refused: Refused, content: str, cause: str) -> None:
    Path("x.json").write_text(content)
    refused(with_key("  given: {file: x.json}"), f"c.yaml:9: circuit.given.file: x.json: {cause}", "")


def test_a_residual_stream_that_is_no_sum_of_parts_is_refused(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechinterp_cli.engine import circuit_graph
    from mechinterp_cli.errors import UserError

    def unproved(_layer: object) -> object:
        reason = "resid_pre + attn_out + mlp_out = resid_post does not hold in this layer"
        raise UserError(f"layer 0 has no attn_out, which edges of a circuit need: {reason}", "Take another model.")

    monkeypatch.setattr(circuit_graph, "_heads", unproved)
    refused(GOOD, "c.yaml:2: model.id: layer 0 has no attn_out, which edges of a circuit need", "Take another model.")
