"""Bad input to `ablate`, from the command line to the message: what is wrong and where, and what to do."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mechinterp_cli.cli.main import main
from tests.refusing import changed, check_refused

GOOD = """\
name: bad
model: {id: toy-induction}
task: {name: induction, n: 4, block: 6, prefix: 2}
ablate:
  units: [{kind: head}, {kind: mlp}]
  values: [zero]
  design: single
metrics: [logit_diff]
output: {figures: []}
"""
TASK = "task: {name: induction, n: 4, block: 6, prefix: 2}"
TEXT = "task: {name: repeats, n: 4, block: 6, repeats: 2}"
UNITS = "[{kind: head}, {kind: mlp}]"
METRICS = "metrics: [logit_diff]"
SINGLE = "  design: single\n"
RANKING = "  design: cumulative\n  cumulative: {ranking: ['1.2', mlp0], k: [1, 2], random: 3}\n"
KEYS = "`mechinterp schema` prints every key"
Refused = Callable[..., None]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own, so that paths in messages are short and `runs` begins empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a config and checks how it ends."""
    return partial(check_refused, capfd, "ablate")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param((), id="single"),
        pytest.param((SINGLE, RANKING), id="cumulative"),
        pytest.param((SINGLE, "  design: set\n  sets: {a: ['1.2', mlp0]}\n"), id="set"),
        pytest.param((SINGLE, "  design: keep\n  sets: {a: ['1.2', mlp0]}\n"), id="keep"),
        pytest.param((SINGLE, "  design: pairs\n  pairs: [['1.2', mlp0]]\n"), id="pairs"),
        pytest.param((TASK, TEXT, METRICS, "metrics: [loss, kl]"), id="texts"),
        pytest.param((UNITS, "[{kind: edge, positions: [end], keys: [matched]}]"), id="edges"),
    ],
)
def test_the_configs_that_the_cases_damage_are_good(capfd: pytest.CaptureFixture[str], change: tuple[str, ...]) -> None:
    Path("c.yaml").write_text(changed(GOOD, *change))
    assert main(["ablate", "c.yaml", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert [str(path) for path in Path("runs").iterdir()] == [out.removesuffix("\n")]


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        # designs and their sections
        pytest.param(
            ("single", "set"), "c.yaml:7: ablate.design: design set needs `ablate.sets`", "Add `sets:`", id="set"
        ),
        pytest.param(
            ("single", "keep"), "c.yaml:7: ablate.design: design keep needs `ablate.sets`", "Add `sets:`", id="keep"
        ),
        pytest.param(
            ("single", "pairs"),
            "c.yaml:7: ablate.design: design pairs needs `ablate.pairs`",
            "Add `pairs:`",
            id="pairs",
        ),
        pytest.param(
            ("single", "cumulative"),
            "c.yaml:7: ablate.design: design cumulative needs `ablate.cumulative`",
            "Add `cumulative:` to the section.",
            id="cumulative",
        ),
        pytest.param(
            (SINGLE, SINGLE + "  sets: {a: ['1.2']}\n"),
            "c.yaml:8: ablate.sets: design single does not use `sets`",
            "Take it out, or choose another design.",
            id="sets of single",
        ),
        pytest.param(
            (SINGLE, RANKING + "  pairs: [['1.2', mlp0]]\n"),
            "c.yaml:9: ablate.pairs: design cumulative does not use `pairs`",
            "Take it out",
            id="pairs of cumulative",
        ),
        pytest.param((SINGLE, "  design: set\n  sets: {}\n"), "needs `ablate.sets`", "Add `sets:`", id="no set"),
        pytest.param((SINGLE, "  design: pairs\n  pairs: []\n"), "needs `ablate.pairs`", "Add `pairs:`", id="no pair"),
        pytest.param(("single", "singles"), "c.yaml:7: ablate.design: 'singles'", "single", id="unknown design"),
        # names of units
        pytest.param(
            (SINGLE, "  design: set\n  sets: {a: ['1.2', '1.22']}\n"),
            "c.yaml:8: ablate.sets.a[1]: '1.22' is not among the units: 0.0, 0.1, 0.2, 0.3, 1.0, 1.1, 1.2, 1.3 and",
            "1.2",
            id="unknown member",
        ),
        pytest.param(
            (SINGLE, "  design: pairs\n  pairs: [['1.2', mpl0]]\n"),
            "ablate.pairs[0]: 'mpl0' is not among the units",
            "mlp0",
            id="unknown member of a pair",
        ),
        pytest.param(
            (SINGLE, RANKING.replace("mlp0", "mlp7")),
            "c.yaml:8: ablate.cumulative.ranking[1]: 'mlp7' is not among the units",
            "mlp",
            id="unknown ranked unit",
        ),
        # overlaps
        pytest.param(
            (UNITS, "[{kind: head}, {kind: kv_head}]", SINGLE, "  design: set\n  sets: {a: ['1.2', kv1.2]}\n"),
            "c.yaml:8: ablate.sets.a: 1.2 and kv1.2 overlap: one is part of the other",
            "Keep one of the two.",
            id="overlap in a set",
        ),
        pytest.param(
            (UNITS, "[{kind: mlp}, {kind: layer}]", SINGLE, "  design: keep\n  sets: {a: [mlp0]}\n"),
            "c.yaml:5: ablate.units: mlp0 and layer0 overlap",
            "Keep one of the two.",
            id="overlap of what keep takes away",
        ),
        pytest.param(
            (UNITS, "[{kind: head}, {kind: attention}]", SINGLE, "  design: pairs\n  pairs: [['1.2', attention1]]\n"),
            "ablate.pairs[0]: 1.2 and attention1 overlap",
            "Keep one of the two.",
            id="overlap of a pair",
        ),
        pytest.param(
            (UNITS, "[{kind: mlp}, {kind: layer}]", SINGLE, RANKING.replace("'1.2'", "layer0")),
            "ablate.cumulative.ranking: layer0 and mlp0 overlap",
            "Keep one of the two.",
            id="overlap of a ranking",
        ),
        pytest.param(
            (SINGLE, "  design: pairs\n  pairs: [['1.2', '1.2']]\n"),
            "ablate.pairs[0]: 1.2 stands there twice",
            "Name it once.",
            id="a pair of one",
        ),
        pytest.param(
            (SINGLE, "  design: set\n  sets: {a: [mlp0, mlp0]}\n"),
            "mlp0 stands there twice",
            "Name it once.",
            id="twice",
        ),
        # grid
        pytest.param(
            (SINGLE, RANKING.replace("k: [1, 2]", "k: [1, 3]")),
            "c.yaml:8: ablate.cumulative.k[1]: 3 is more than the 2 units that are ranked",
            "Choose 1 to 2.",
            id="k beyond the ranking",
        ),
        pytest.param(
            (SINGLE, RANKING.replace("k: [1, 2]", "k: [0]")), "cumulative.k[0]: 0 is not valid", KEYS, id="k 0"
        ),
        pytest.param((SINGLE, RANKING.replace("k: [1, 2]", "k: [2, 2]")), "listed twice: 2", KEYS, id="k twice"),
        # units
        pytest.param((UNITS, "[]"), "c.yaml:5: ablate.units", KEYS, id="no units"),
        pytest.param((UNITS, "[{kind: heads}]"), "c.yaml:5: ablate.units[0].kind: 'heads'", "head", id="unknown kind"),
        pytest.param(
            (UNITS, "[{kind: head}, {kind: head}]"),
            "c.yaml:5: ablate.units[1]: 0.0@all is there already (ablate.units[0])",
            "Leave it out in one place.",
            id="a block twice",
        ),
        pytest.param(
            (UNITS, "[{kind: mlp, heads: each}]"),
            "ablate.units[0].heads: mlp has no heads",
            "Leave out",
            id="mlp's heads",
        ),
        pytest.param(
            (UNITS, "[{kind: head, keys: [0]}]"),
            "ablate.units[0].keys: head has no keys",
            "Leave out",
            id="head's keys",
        ),
        pytest.param(
            (UNITS, "[{kind: edge}]"), "ablate.units[0]: an edge needs keys", "`keys: all`", id="edge without keys"
        ),
        pytest.param(
            (UNITS, "[{kind: direction}]"), "a direction needs a file", ".safetensors", id="direction without file"
        ),
        pytest.param(
            (UNITS, "[{kind: direction, file: no.safetensors}]"),
            "c.yaml:5: ablate.units[0].file",
            "",
            id="no such file",
        ),
        pytest.param(
            (UNITS, "[{kind: head, layers: [2]}]"),
            "ablate.units[0].layers[0]: 2 is outside 0..1",
            "toy-induction has 2 layers, counted from 0.",
            id="layer out of range",
        ),
        pytest.param(
            (UNITS, "[{kind: kv_head, heads: [4]}]"),
            "ablate.units[0].heads[0]: 4 is outside 0..3",
            "counted from 0.",
            id="head out of range",
        ),
        pytest.param(
            (UNITS, "[{kind: head, positions: [nowhere]}]"),
            "ablate.units[0].positions[0]: span 'nowhere' of task 'induction' does not exist",
            "A neighbour is written 'end-1'",
            id="unknown span",
        ),
        pytest.param(
            (UNITS, "[{kind: edge, positions: [matched], keys: [end]}]"),
            "c.yaml:5: ablate.units[0].positions[0]: the edge from matched to end looks forward in time",
            "A token sees itself and those before it",
            id="an edge that looks forward",
        ),
        # values
        pytest.param(("values: [zero]", "values: []"), "c.yaml:6: ablate.values", KEYS, id="no values"),
        pytest.param(("values: [zero]", "values: [zeros]"), "ablate.values[0]: 'zeros'", "zero", id="unknown value"),
        pytest.param(("values: [zero]", "values: [zero, zero]"), "listed twice: zero", KEYS, id="value twice"),
        pytest.param(
            ("values: [zero]", "values: [zero, project]"),
            "c.yaml:6: ablate.values[1]: project takes directions out of a stream, and z in layer 0 is none",
            "Use units of kind direction, or values: [zero].",
            id="project of heads",
        ),
        pytest.param(
            (UNITS, "[{kind: edge, positions: [end], keys: [matched]}]", "values: [zero]", "values: [mean]"),
            "c.yaml:6: ablate.values[0]: mean: an edge is masked, nothing stands in its place",
            "Use values: [zero].",
            id="mean of an edge",
        ),
        pytest.param(
            ("n: 4", "n: 1", "values: [zero]", "values: [mean]"),
            "ablate.mean: induction has a single prompt, and a mean takes 2 prompts or more",
            "Raise the number of prompts.",
            id="a mean of one prompt",
        ),
        pytest.param(
            (
                "values: [zero]",
                "values: [mean]\n  mean: {reference: {name: induction, n: 1, block: 6, prefix: 2}}",
            ),
            "c.yaml:7: ablate.mean.reference: induction has a single prompt, and a mean takes 2 prompts or more",
            "Raise the number of prompts.",
            id="a reference of one prompt",
        ),
        pytest.param(
            (TASK, TEXT, METRICS, "metrics: [loss]", "values: [zero]", "values: [mean]\n  mean: {stream: corrupt}"),
            "c.yaml:7: ablate.mean.stream: corrupt: prompt 0 of repeats has no corrupted twin",
            "use stream: clean.",
            id="corrupt prompts that are not there",
        ),
        pytest.param(
            ("n: 4", "n: 1", "values: [zero]", "values: [resample]"),
            "ablate.resample: template '2-6-3' has a single prompt of 11 tokens",
            "Raise task.n",
            id="resample of one prompt",
        ),
        pytest.param(
            ("n: 4", "n: 1", "values: [zero]", "values: [optimal]"),
            "c.yaml:6: ablate.values[0]: optimal: constants are fitted on some prompts and measured on others",
            "Raise the number of prompts.",
            id="optimal of one prompt",
        ),
        pytest.param(
            (
                TASK,
                "task: {name: repeats, n: 2, block: [4, 6], repeats: 2}",
                UNITS,
                "[{kind: mlp, layers: [1], positions: each}]",
                "values: [zero]",
                "values: [zero, optimal]",
                METRICS,
                "metrics: [loss]",
            ),
            "c.yaml:6: ablate.values[1]: optimal: mlp1@0/6x2 is in none of the 1 prompts that constants are fitted on",
            "Raise the number of prompts or ablate.optimal.share, or try another ablate.optimal.seed.",
            id="a unit of prompts that are not fitted on",
        ),
        pytest.param(
            ("values: [zero]", "values: [optimal]\n  optimal: {share: 1.0}"),
            "c.yaml:7: ablate.optimal.share: 1.0 is not valid",
            KEYS,
            id="all prompts are fitted on",
        ),
        pytest.param(
            ("values: [zero]", "values: [noise]\n  noise: {scale: 0}"),
            "c.yaml:7: ablate.noise.scale: 0",
            KEYS,
            id="scale",
        ),
        pytest.param(
            ("values: [zero]", "values: [resample]\n  resample: {draws: 0}"),
            "c.yaml:7: ablate.resample.draws: 0 is not valid",
            KEYS,
            id="no draws",
        ),
        # metrics
        pytest.param(
            (METRICS, "metrics: [loss]"), "metrics: 'loss' is not a metric", "logit_diff", id="loss of answers"
        ),
        pytest.param(
            (TASK, TEXT),
            "metrics: 'logit_diff' is not a metric of whole texts",
            "Choose from loss, kl, top1, repeated_loss, first_loss, loss_gap.",
            id="answers of texts",
        ),
        pytest.param((METRICS, "metrics: [logits]"), "metrics: 'logits' is not a metric", "logit_diff", id="no metric"),
        # words
        pytest.param((SINGLE, SINGLE + "  generate: -1\n"), "c.yaml:8: ablate.generate: -1", KEYS, id="generate -1"),
        pytest.param((SINGLE, SINGLE + "  generate: 201\n"), "c.yaml:8: ablate.generate: 201", KEYS, id="generate 201"),
        pytest.param(
            (SINGLE, SINGLE + "  generate: 60\n"),
            "c.yaml:8: ablate.generate: 60 tokens after a prompt of 11 are more than the model takes (64)",
            "Generate 54 tokens at most, or shorten the prompts.",
            id="longer than the context",
        ),
        pytest.param(
            ("name: bad\nmodel: {id: toy-induction}", "name: bad\nmodel: {id: toy-induction}", SINGLE, "  sngle: 1\n"),
            "c.yaml:7: ablate.sngle",
            "",
            id="unknown key",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    refused: Refused, change: tuple[str, ...], cause: str, remedy: str
) -> None:
    refused(changed(GOOD, *change), cause, remedy)


def test_a_ranking_of_another_model_is_refused(refused: Refused, capfd: pytest.CaptureFixture[str]) -> None:
    Path("heads.yaml").write_text(
        f"name: heads\nmodel: {{id: planted-induction}}\n{TEXT}\n"
        "heads: {scores: [copying]}\noutput: {figures: []}\n"
    )
    assert main(["heads", "heads.yaml", "--out", "earlier", "--quiet"]) == 0
    run = capfd.readouterr().out.strip()
    ranking = f"  design: cumulative\n  cumulative: {{ranking: {{run: {run}}}, k: [1], random: 3}}\n"
    config = changed(GOOD, SINGLE, ranking)
    cause = (
        f"c.yaml:8: ablate.cumulative.ranking.run: {run} is of another model (planted-induction): d_model 288, here 64"
    )
    refused(config, cause, "Give a run of this model.")
    # The same run serves the model that it is of.
    Path("c.yaml").write_text(changed(config, "toy-induction", "planted-induction"))
    assert main(["ablate", "c.yaml", "--quiet"]) == 0


def test_an_override_is_named_in_place_of_a_line(refused: Refused) -> None:
    cause = "--set ablate.values=[project]: ablate.values[0]: project takes directions"
    refused(GOOD, cause, "Use units of kind direction", "--set", "ablate.values=[project]")


def test_a_dry_run_refuses_the_same(refused: Refused) -> None:
    refused(changed(GOOD, "zero", "project"), "project takes directions", "kind direction", "--dry-run")
