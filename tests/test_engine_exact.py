"""Packed rows and layer resume give what plain hooks give: every site, every operation, every family."""

import pytest
import torch
from torch import nn

from mechinterp_cli.engine.edits import Bucket, Op, Site, Trial
from mechinterp_cli.engine.wavefront import Values
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.loaded import LoadedModel
from tests.engine_trials import deviation, ops_of, run, sweep, two_streams
from tests.families import FAMILIES, WINDOW, build
from tests.models_fixtures import planted, smollm2, toy

__all__ = ["planted", "smollm2", "toy"]

TOLERANCE = 1e-4
"""Of the logits' scale: the bound of the proof at load; what is measured is a hundred times less."""


def executors(name: str) -> tuple[str, ...]:
    return ("packed", "resume") if FAMILIES[name].executor == "packed" else ("resume",)


def check(model: nn.Module, anatomy: Anatomy, bucket: Bucket, trials: list[Trial], names: tuple[str, ...]) -> Values:
    """The executors against plain hooks; no kind of trial may be without effect, or it would prove nothing."""
    want = run("hooks", model, anatomy, bucket, trials)
    assert without_effect(trials, want.trials, want.streams["corrupt"]) == set()
    for name in names:
        assert deviation(run(name, model, anatomy, bucket, trials), want) <= TOLERANCE, name
    return want


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_operation_at_every_site_is_what_plain_hooks_give(name: str, full: bool) -> None:
    model = build(name)
    anatomy, bucket = find_anatomy(model), two_streams()
    assert bucket.length > 2 * WINDOW
    trials = sweep(anatomy, full=full)
    seen = {(edit.site.kind, edit.op) for trial in trials for edit in trial.edits}
    assert seen == {(kind, op) for kind in anatomy.sites for op in ops_of(kind)}
    assert {e.site for t in trials for e in t.edits} == {Site(k, la.index) for la in anatomy.layers for k in la.sites}
    check(model, anatomy, bucket, trials, executors(name))


def test_the_planted_model_is_exact_too(planted: LoadedModel) -> None:
    bucket = two_streams(60)
    trials = [t for t in sweep(planted.anatomy, full=True) if "affine" not in {e.op for e in t.edits}]
    want = run("hooks", planted.model, planted.anatomy, bucket, trials)
    for name in ("packed", "resume"):
        assert deviation(run(name, planted.model, planted.anatomy, bucket, trials), want) <= TOLERANCE, name


def test_the_toy_model_is_exact_too(toy: LoadedModel) -> None:
    check(toy.model, toy.anatomy, two_streams(60), sweep(toy.anatomy), ("packed", "resume"))


@pytest.mark.slow
def test_smollm2_is_exact_too(smollm2: LoadedModel) -> None:
    trials = [t for t in sweep(smollm2.anatomy) if "affine" not in {e.op for e in t.edits}]
    want = run("hooks", smollm2.model, smollm2.anatomy, two_streams(), trials)
    assert len({e.site.layer for t in trials for e in t.edits}) > 8
    for name in ("packed", "resume"):
        assert deviation(run(name, smollm2.model, smollm2.anatomy, two_streams(), trials), want) <= TOLERANCE, name


def without_effect(trials: list[Trial], values: torch.Tensor, base: torch.Tensor) -> set[tuple[str, Op]]:
    """(kind, operation) pairs none of whose trials moved a logit: comparing them would prove nothing."""
    moved = (values - base).abs().nan_to_num().amax((1, 2, 3)) > 0
    every = {(e.site.kind, e.op) for t in trials for e in t.edits}
    return every - {(e.site.kind, e.op) for t, m in zip(trials, moved.tolist(), strict=True) if m for e in t.edits}
