"""Bad input to `attribute`, from the command line to the message: what is wrong and where, and what to do."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from benchmarks.tiny import tiny_model
from mechinterp_cli import models
from mechinterp_cli.cli.main import main
from mechinterp_cli.metrics import Measurer
from tests.refusing import changed, check_refused

GOOD = """\
name: bad
model: {id: toy-induction}
task: {name: induction, n: 4, block: 6, prefix: 2}
attribute:
  direction: denoise
  estimators: [atp]
  sites:
    - {kind: z, layers: all, heads: each, positions: all}
metrics: [logit_diff]
output: {figures: []}
"""
SITE = "    - {kind: z, layers: all, heads: each, positions: all}\n"
ESTIMATORS = "  estimators: [atp]\n"
METRICS = "metrics: [logit_diff]"
SYMBOLS = Path(models.__path__[0]) / "data" / "symbols" / "tokenizer.json"
Refused = Callable[..., None]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own, so that paths in messages are short and `runs` begins empty."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a config and checks how it ends."""
    return partial(check_refused, capfd, "attribute")


def test_the_config_that_the_others_break_runs(capfd: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(GOOD)
    assert main(["attribute", "c.yaml", "--quiet"]) == 0
    assert capfd.readouterr().out.startswith("runs/")


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_steps_below_one(steps: str, refused: Refused) -> None:
    config = changed(GOOD, ESTIMATORS, f"  estimators: [ig_inputs]\n  steps: {steps}\n")
    refused(config, f"c.yaml:7: attribute.steps: {steps}", "`mechinterp schema` prints every key")


@pytest.mark.parametrize("key", ["top", "random"])
def test_more_verified_than_there_are(key: str, refused: Refused) -> None:
    config = changed(GOOD, ESTIMATORS, ESTIMATORS + f"  verify: {{{key}: 9}}\n")
    cause = f"c.yaml:7: attribute.verify.{key}: 9 nodes are to be verified, and the sweep has 8 that can have an effect"
    refused(config, cause, "Lower it, or ask for more sites.")


def test_nothing_is_asked_for(refused: Refused) -> None:
    config = changed(GOOD, "  sites:\n" + SITE, "")
    refused(config, "attribute: nothing is asked for", "Give at least one of sites, direct, lens and inputs.")


@pytest.mark.parametrize("metric", ["rank", "accuracy"])
def test_a_metric_without_gradient(metric: str, refused: Refused) -> None:
    config = changed(GOOD, METRICS, f"metrics: [logit_diff, {metric}]")
    refused(config, f"c.yaml:9: metrics[1]: {metric} is a count and has no gradient", "or measure")


@pytest.mark.parametrize("estimator", ["atp", "atp_star", "relp"])
def test_kl_at_the_clean_prompt(estimator: str, refused: Refused) -> None:
    config = changed(
        GOOD, METRICS, "metrics: [kl]", "denoise", "noise", ESTIMATORS, f"  estimators: [ig_inputs, {estimator}]\n"
    )
    cause = (
        f"c.yaml:6: attribute.estimators[1]: {estimator} with the metric kl says 0 everywhere under direction: noise"
    )
    refused(config, cause, "Use direction: denoise, ig_inputs or conductance, or another metric.")


def test_a_window_of_layers(refused: Refused) -> None:
    config = changed(GOOD, "layers: all", "layers: {window: 2}")
    refused(config, "attribute.sites[0].layers: estimates are of single layers", "Use all or a list, or use patch.")


@pytest.mark.parametrize("kind", ["q", "k", "scores", "pattern"])
def test_relp_where_attention_is_held_fixed(kind: str, refused: Refused) -> None:
    config = changed(
        GOOD, "kind: z", f"kind: {kind}", ESTIMATORS, "  estimators: [atp, relp]\n  rules: [norm, attention]\n"
    )
    refused(config, "c.yaml:6: attribute.estimators[1]: ", "attention")


def test_a_layer_head_or_position_that_is_not_there(refused: Refused) -> None:
    refused(changed(GOOD, "layers: all", "layers: [2]"), "attribute.sites[0].layers[0]: 2 is outside 0..1", "2 layers")
    refused(changed(GOOD, "heads: each", "heads: [4]"), "attribute.sites[0].heads[0]: 4 is outside 0..3", "4 heads")
    refused(changed(GOOD, "positions: all", "positions: [subject]"), "attribute.sites[0].positions", "A neighbour is")


def test_no_corrupted_prompt(refused: Refused) -> None:
    task = "task: {name: induction, n: 4, block: 6, prefix: 2}"
    config = changed(GOOD, task, "task: {name: repeats, n: 4, block: 6, repeats: 2}", METRICS, "metrics: [kl]")
    refused(config, "c.yaml:4: attribute: prompt 0 has no corrupted twin", "Give every prompt a `corrupt`")


def test_an_estimator_that_there_is_not(refused: Refused) -> None:
    refused(changed(GOOD, "[atp]", "[apt]"), "attribute.estimators[0]: 'apt'", "atp")


def test_neurons_of_a_mixture_of_experts_say_what_is_possible_instead(refused: Refused) -> None:
    tiny_model("mixtral", layers=2).save_pretrained("experts")
    shutil.copy(SYMBOLS, "experts")
    nodes = "{kind: z, layers: all, heads: each, positions: all}"
    config = changed(GOOD, "toy-induction", "experts", nodes, "{kind: neuron}")
    refused(
        config, "attribute.sites[0].kind: neuron: the MLP has no single down projection (mixture of experts)", "mlp_out"
    )


def test_relp_without_attention_is_refused_before_other_estimators_begin(capfd: pytest.CaptureFixture[str]) -> None:
    tiny_model("mamba", layers=2).save_pretrained("mamba")
    shutil.copy(SYMBOLS, "mamba")
    Path("mamba/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    nodes = "{kind: z, layers: all, heads: each, positions: all}"
    good = changed(GOOD, "toy-induction", "mamba", nodes, "{kind: resid_pre}")
    Path("good.yaml").write_text(good)
    assert main(["attribute", "good.yaml"]) == 0
    Path("c.yaml").write_text(changed(good, ESTIMATORS, "  estimators: [atp, relp]\n"))
    capfd.readouterr()
    assert main(["attribute", "c.yaml"]) == 2
    err = capfd.readouterr().err
    assert "c.yaml:6: attribute.estimators[1]: layer 0 mixes positions without softmax attention" in err
    assert "fix: Leave gate out of attribute.rules" in err
    assert "estimating: atp" not in err


def test_sites_without_a_gradient_are_refused_at_their_key(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    own = Measurer.differentiable
    monkeypatch.setattr(Measurer, "differentiable", lambda *asked: own(*asked).detach())
    Path("c.yaml").write_text(GOOD)
    assert main(["attribute", "c.yaml"]) == 2
    err = capfd.readouterr().err
    assert "c.yaml:7: attribute.sites: there is no gradient at z of layer 0, z of layer 1: the metric does not" in err
    assert "fix: Leave these sites out, or measure their effects exactly with patch." in err
