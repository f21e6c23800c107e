"""The causal follow-up: planted truths, edits against plain hooks, matched random directions, verdicts, resuming."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mechinterp_cli.config.schema import EngineOptions, StatsOptions
from mechinterp_cli.engine import plan
from mechinterp_cli.engine.edits import Bucket, Site, Trial
from mechinterp_cli.engine.execute import executor_named
from mechinterp_cli.engine.under_edits import activations_under
from mechinterp_cli.engine.wavefront import Settings
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.bench import Bench, Tally
from mechinterp_cli.methods.dry_run import cost_of
from mechinterp_cli.methods.job import Swept
from mechinterp_cli.methods.measure import Metrics
from mechinterp_cli.methods.probe import columns
from mechinterp_cli.methods.probe.causal import Arm, check_apart, lay_out, make_job
from mechinterp_cli.methods.probe.causal_options import CausalOptions
from mechinterp_cli.methods.probe.causal_tables import Followed
from mechinterp_cli.methods.probe.downstream import captured_under, downstream_rows
from mechinterp_cli.methods.probe.interventions import (
    PROBE,
    AffineMap,
    Change,
    Changes,
    ProbedSite,
    Subspace,
    blank_site,
    probed_site,
)
from mechinterp_cli.methods.probe.random_directions import (
    MATCH_TOLERANCE,
    Cloud,
    gaussians,
    isotropic_subspaces,
    matched_subspaces,
)
from mechinterp_cli.methods.probe.verdicts import Beside, Readability, family_rows, p_values
from mechinterp_cli.methods.specs import Place
from mechinterp_cli.models.checkpoints import Moment
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.runs.outcome import SilentProgress
from mechinterp_cli.runs.recorder import RunRecorder, record
from mechinterp_cli.runs.schema import table_keys, validate
from mechinterp_cli.tasks.prompts import PromptSet
from tests.ablate_hooks import Hand, prompt_set, tiny
from tests.engine_trials import logits_measure
from tests.experiments import config_of
from tests.models_fixtures import toy
from tests.probe_cases import (
    SIZE,
    UNUSED,
    USED,
    last_labels,
    mean_difference,
    planted_model,
    planted_prompts,
    stream,
)

__all__ = ["toy"]
assert columns  # registers the tables

CASES = ("toy", "llama", "gpt2")
TOLERANCE = 1e-4
DRAWS = 199
STATS = StatsOptions(bootstrap=200)
FITTED, MEASURED = planted_prompts(800, seed=1), planted_prompts(48, seed=2)
Rows = pd.DataFrame


@pytest.fixture(scope="module")
def models(toy: LoadedModel) -> dict[str, LoadedModel]:
    return {"toy": toy, "llama": tiny("llama", toy), "gpt2": tiny("gpt2", toy)}


@pytest.fixture(scope="module")
def planted(toy: LoadedModel) -> LoadedModel:
    return planted_model(toy)


def last(prompts: PromptSet) -> Place:
    return Place(tuple((prompt.length - 1,) for prompt in prompts.prompts), span="end")


def random_basis(rank: int, features: int, seed: int = 5) -> Tensor:
    rows = torch.randn(rank, features, generator=torch.Generator().manual_seed(seed))
    basis: Tensor = torch.linalg.qr(rows.T)[0].T
    return basis.contiguous()


def cloud_of(features: int = 40, decay: float = 1.5, seed: int = 0, samples: int = 300) -> tuple[Cloud, Tensor]:
    """Activations whose variance falls by a power law, in no coordinate's direction."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, features + 1).double() ** -decay
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator).double())[0]
    x = torch.randn(samples, features, generator=generator).double() * scale.sqrt() @ turn + 3
    return Cloud.of(x), x


# --- random directions


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("share", [0.005, 0.05, 0.2, 0.35])
def test_matched_directions_remove_the_wanted_share_and_isotropic_ones_do_not(rank: int, share: float) -> None:
    cloud, x = cloud_of()
    found = matched_subspaces(cloud, share, rank, draws=30, seed=4)
    away = x - x.mean(0)
    assert found.matched
    for basis in found.bases.double():
        torch.testing.assert_close(basis @ basis.T, torch.eye(rank).double(), atol=1e-6, rtol=0)
        left = away - away @ basis.T @ basis
        removed = 1 - float(left.square().sum() / away.square().sum())
        assert removed == pytest.approx(share, rel=MATCH_TOLERANCE)
    control = isotropic_subspaces(cloud, share, rank, draws=30, seed=4)
    assert not control.matched
    typical = float(control.removed.median())
    assert abs(typical - share) > 20 * MATCH_TOLERANCE * share


def test_matched_directions_are_different_ones() -> None:
    cloud, _ = cloud_of()
    bases = matched_subspaces(cloud, 0.1, 1, draws=50, seed=4).bases[:, 0]
    cosines = (bases @ bases.T).abs() - torch.eye(50)
    assert float(cosines.max()) < 0.95
    assert float(cosines.mean()) < 0.4


def test_with_fewer_activations_than_features_a_share_is_matched_too() -> None:
    cloud, _ = cloud_of(samples=20)
    for share in (0.001, 0.1):
        assert matched_subspaces(cloud, share, 2, draws=20, seed=0).matched


def test_draws_depend_on_the_seed_alone_and_more_draws_begin_with_the_same() -> None:
    cloud, _ = cloud_of()
    few, many = (matched_subspaces(cloud, 0.1, 2, draws=draws, seed=7).bases for draws in (5, 12))
    torch.testing.assert_close(few, many[:5], atol=1e-6, rtol=0)
    assert float((few - matched_subspaces(cloud, 0.1, 2, draws=5, seed=8).bases).abs().max()) > 0.1


def test_one_draw_is_alike_over_layers_whose_activations_are_alike() -> None:
    first, _ = cloud_of(samples=2000)
    bent = Cloud(first.mean, first.covariance + 0.002 * torch.eye(40).double())
    a, b = (matched_subspaces(cloud, 0.1, 1, draws=40, seed=7).bases[:, 0] for cloud in (first, bent))
    cosines = a @ b.T
    assert float(cosines.diagonal().min()) > 0.8
    others = cosines - torch.diag(cosines.diagonal())
    assert float(others.abs().mean()) < 0.4


def test_orthogonal_draws_have_nothing_of_the_probe_and_still_match() -> None:
    cloud, _ = cloud_of()
    probe = random_basis(2, 40)
    share = cloud.removed(probe)
    apart = matched_subspaces(cloud, share, 2, draws=20, seed=0, apart_from=probe)
    assert apart.matched
    assert float((apart.bases @ probe.T).abs().max()) < 1e-6
    free = matched_subspaces(cloud, share, 2, draws=20, seed=0)
    assert float((free.bases @ probe.T).abs().max()) > 0.05


def test_a_share_that_is_not_there_is_told_and_gives_no_verdict() -> None:
    cloud, x = cloud_of()
    largest = torch.linalg.eigh(cloud.covariance)[1][:, -1:].T
    wanted = cloud.removed(largest)
    apart = matched_subspaces(cloud, wanted, 1, draws=5, seed=0, apart_from=largest)
    second = float(torch.linalg.eigvalsh(cloud.covariance)[-2]) / cloud.total
    assert not apart.matched
    torch.testing.assert_close(apart.removed, torch.full((5,), second).double(), rtol=0.01, atol=0)
    strong = np.full(20, 5.0)
    clear = Beside(strong, np.zeros((DRAWS, 20)), list(map(str, range(20))))
    doubtful = Beside(clear.own, clear.random, clear.clusters, matched=False)
    rows = [family_rows([one], STATS, margin=0.1)[0]["verdict"] for one in (clear, doubtful)]
    assert rows == ["yes", "inconclusive"]
    site = probed_site("resid_post", 0, largest.float(), x.float(), draws=5, orthogonal=True)
    assert "no verdict" in followed_of([site], MEASURED).warnings()[0]
    assert not followed_of([probed_site("resid_post", 0, largest.float(), x.float(), draws=5)], MEASURED).warnings()


def followed_of(sites: Sequence[ProbedSite], prompts: PromptSet) -> Followed:
    """A follow-up without values."""
    nothing = Swept(np.zeros((0, len(prompts.prompts), 1, 1)), {})
    return Followed([], sites, [last(prompts)], prompts, ("logit_diff",), nothing, CausalOptions(), STATS)


# --- what a subspace says of its activations


def test_spread_and_removed_variance_are_those_of_the_projections() -> None:
    cloud, x = cloud_of()
    basis = random_basis(2, 40)
    own = Subspace.of("made", basis, cloud)
    assert own.spread == pytest.approx(float((x @ basis[0].double()).std(correction=0)), rel=1e-6)
    torch.testing.assert_close(own.centre, (x.mean(0) @ basis.T.double() @ basis.double()).float())
    oblique = torch.eye(40) - torch.outer(random_basis(1, 40, 8)[0] * 2, basis[0])
    moved = (x - x.mean(0)) @ (torch.eye(40) - oblique).double().T
    share = float(moved.square().sum() / (x - x.mean(0)).square().sum())
    assert cloud.moved(oblique) == pytest.approx(share, rel=1e-6)
    assert AffineMap(oblique, torch.zeros(40)).rank == 1


@pytest.mark.parametrize("basis", [torch.ones(1, 40), torch.eye(39)[:1]])
def test_rows_that_are_not_orthonormal_or_of_another_size_are_refused(basis: Tensor) -> None:
    with pytest.raises(ValueError, match=r"orthonormal|features"):
        Subspace.of("made", basis, cloud_of()[0])


# --- edits against plain hooks

SPOTS: tuple[tuple[str, int | None], ...] = (("resid_post", None), ("attn_out", None), ("z", 1))
PROMPTS = prompt_set({"long": [7, 7, 7], "short": [5, 5]})


def site_at(model: LoadedModel, hand: Hand, kind: str, unit: int | None, rank: int = 2) -> ProbedSite:
    """A site of layer 0 with random directions, fitted on the prompts' own activations."""
    seen = torch.cat(hand.seen([p.clean_tokens for p in PROMPTS.prompts], (kind, 0)))
    x = seen if unit is None else seen[:, unit]
    d = x.shape[-1]
    generator = torch.Generator().manual_seed(9)
    leace = AffineMap(torch.eye(d) - 0.5 * torch.randn(d, d, generator=generator) / d**0.5, x.mean(0))
    return probed_site(kind, 0, random_basis(rank, d), x, draws=3, unit=unit, leace=leace)


def by_hand(
    site: ProbedSite, name: str, strength: float, other: Tensor, draw: int | None
) -> Callable[[Tensor], Tensor]:
    """An intervention as a function of activations [prompts, positions, features], from its definition."""
    chosen = site.random["erase" if name == "swap" else name].bases[draw] if draw is not None else site.probe.basis
    onto = chosen.T @ chosen
    if name == "erase" or (name == "leace" and draw is not None):
        return lambda x: x - (x - site.mean) @ onto
    if name == "leace":
        assert site.leace is not None
        matrix, centre = site.leace.matrix, site.leace.centre
        return lambda x: centre + (x - centre) @ matrix.T
    if name == "steer":
        return lambda x: x + strength * site.probe.spread * chosen[0]
    return lambda x: x + (other - x) @ onto


def changed(unit: int | None, positions: Sequence[int], new: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A hook that changes one unit at some positions."""

    def change(x: Tensor) -> Tensor:
        part = x if unit is None else x[:, :, unit]
        put = new(part)
        for position in positions:
            part[:, position] = put[:, position]
        return x

    return change


def engine_logits(
    model: LoadedModel, site: ProbedSite, made: Sequence[Change], executor: str, positions: Any
) -> Tensor:
    """Logits [prompts, positions, vocabulary] of one trial on the long prompts."""
    prompts = [p for p in PROMPTS.prompts if p.length == 7]
    tokens = {
        "clean": torch.tensor([p.clean_tokens for p in prompts]),
        "corrupt": torch.tensor([p.corrupt_tokens for p in prompts]),
    }
    bucket = Bucket.of(tokens, torch.arange(7).expand(len(prompts), -1))
    edits = site.edits(made, (tuple(positions),) * len(prompts), "corrupt")
    trial = Trial(0, "clean", edits, tuple(range(len(prompts))))
    engine = executor_named(executor, model.model, model.anatomy, Settings())
    return engine.run(bucket, [trial], logits_measure).trials[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "unit"), SPOTS)
@pytest.mark.parametrize(("name", "strength"), [("erase", 0.0), ("leace", 0.0), ("steer", -3.0), ("swap", 0.0)])
def test_interventions_are_what_plain_hooks_do(
    models: Mapping[str, LoadedModel], case: str, kind: str, unit: int | None, name: Any, strength: float
) -> None:
    model = models[case]
    hand = Hand(model.model, "gpt2" if case == "gpt2" else "llama")
    site = site_at(model, hand, kind, unit)
    prompts = [p for p in PROMPTS.prompts if p.length == 7]
    other = torch.stack(hand.seen([p.corrupt_tokens or () for p in prompts], (kind, 0)))
    other = other if unit is None else other[:, :, unit]
    for draw, executor, positions in ((None, "packed", (6,)), (None, "hooks", (1, 4)), (2, "packed", range(7))):
        new = by_hand(site, name, strength, other, draw)
        change = changed(unit, positions, new)
        wanted = hand.logits([p.clean_tokens for p in prompts], {(kind, 0): change})
        plain = hand.logits([p.clean_tokens for p in prompts], {})
        made = Changes(site).of(name, PROBE, draw=draw, strength=strength)
        found = engine_logits(model, site, made, executor, positions)
        assert float((found - wanted).abs().max()) < TOLERANCE
        assert float((found - plain).abs().max()) > 10 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_identities(models: Mapping[str, LoadedModel], case: str) -> None:
    model = models[case]
    hand = Hand(model.model, "gpt2" if case == "gpt2" else "llama")
    site = site_at(model, hand, "resid_post", None)
    changes = Changes(site)
    plain = engine_logits(model, site, changes.of("steer", PROBE, strength=0.0), "packed", (3, 6))
    tokens = [p.clean_tokens for p in PROMPTS.prompts if p.length == 7]
    assert float((plain - hand.logits(tokens, {})).abs().max()) < 1e-5
    once = changes.of("erase", PROBE)
    first, twice = (engine_logits(model, site, made, "packed", (3, 6)) for made in (once, (*once, *once)))
    assert float((first - twice).abs().max()) < 1e-5
    assert float((first - plain).abs().max()) > 1e-3
    there = changes.of("steer", PROBE, strength=2.0) + changes.of("steer", PROBE, strength=-2.0)
    assert float((engine_logits(model, site, there, "packed", (3, 6)) - plain).abs().max()) < 1e-4


def test_swapping_equal_prompts_changes_nothing(planted: LoadedModel) -> None:
    same = PromptSet(
        "made", tuple(type(p)(**{**vars(p), "corrupt_tokens": p.clean_tokens}) for p in MEASURED.prompts[:8])
    )
    for prompts, alike in ((same, True), (PromptSet("made", MEASURED.prompts[:8]), False)):
        site = site_of(planted, USED)
        rows = follow(planted, [site], prompts, interventions=("swap",), random=3)
        largest = rows[rows["direction"] == PROBE]["effect"].abs().max()
        assert largest < 1e-5 if alike else largest > 1


# --- planted truths


def site_of(model: LoadedModel, which: int, layer: int = 0, draws: int = 3, **others: Any) -> ProbedSite:
    """The simplest probe of a label, fitted on other prompts than are measured."""
    x = stream(model, FITTED, Site("resid_post", layer))
    label = last_labels(FITTED, 0 if which == UNUSED else 1)
    name = "unused" if which == UNUSED else "used"
    return probed_site("resid_post", layer, mean_difference(x, label), x, draws=draws, name=name, **others)


@dataclass(frozen=True)
class Sides:
    """Everything that `follow` needs beside the sites."""

    options: CausalOptions
    arms: list[Arm]
    places: list[Place]
    metrics: Metrics

    @classmethod
    def of(cls, model: LoadedModel, sites: Sequence[ProbedSite], prompts: PromptSet, **section: Any) -> "Sides":
        options = CausalOptions.model_validate(section)
        places = [last(prompts)]
        arms = lay_out(sites, places, options, prompts)
        return cls(options, arms, places, Metrics.of(("logit_diff",), prompts, None, model))


def followed(model: LoadedModel, sites: Sequence[ProbedSite], prompts: PromptSet, **section: Any) -> Followed:
    """The follow-up of some sites, computed without a run directory."""
    sides = Sides.of(model, sites, prompts, **section)
    job = make_job(sides.arms, sites, sides.places, prompts, sides.metrics)
    engine = executor_named("packed", model.model, model.anatomy, Settings())
    values = np.full((job.trials, job.prompts, 1, 1), np.nan)
    streams: dict[str, Any] = {}
    for number, work in enumerate(job.works):
        found = engine.run(work.bucket, work.trials, job.measures[number])
        members = list(job.members[number])
        for row, trial in enumerate(work.trials):
            values[trial.index, members, 0] = job.reduced(number, found.trials)[row]
        for name, seen in found.streams.items():
            streams.setdefault(name, np.full((job.prompts, 1, 1), np.nan))[members, 0] = job.reduced(number, seen)
    return Followed(
        sides.arms, sites, sides.places, prompts, ("logit_diff",), Swept(values, streams), sides.options, STATS
    )


def table(rows: Sequence[Mapping[str, Any]], name: str) -> Rows:
    frame: Rows = validate(name, list(rows), "probe").to_pandas()
    keys = list(table_keys(name))
    assert not frame.duplicated(keys).any()
    return frame


def follow(model: LoadedModel, sites: Sequence[ProbedSite], prompts: PromptSet, **section: Any) -> Rows:
    """Rows of all prompts together."""
    rows = table(followed(model, sites, prompts, **section).effect_rows(), "causal_effects")
    return rows[rows["group"] == "all"]


def test_a_direction_that_is_readable_but_unused_is_told_from_one_that_is_used(planted: LoadedModel) -> None:
    sites = [site_of(planted, which, layer, DRAWS) for which in (UNUSED, USED) for layer in (0, 1)]
    for site, which in zip(sites, (UNUSED, UNUSED, USED, USED), strict=True):
        x, label = stream(planted, MEASURED, site.site), last_labels(MEASURED, 0 if which == UNUSED else 1)
        cut = float(site.mean @ site.probe.basis[0])
        read = ((x @ site.probe.basis[0] > cut).long() == label).float().mean()
        assert float(read) > 0.95, "both labels are readable"
        assert site.random["erase"].matched
        assert 0.02 < site.probe.removed < 0.5
    done = followed(planted, sites, MEASURED, interventions=("erase", "steer", "swap"), margin=1.0)
    readable = {i: Readability(score=0.99, p=0.005, chance=0.5) for i in range(4)}
    verdicts = table(done.verdict_rows(done.effect_rows(), readable, score_margin=0.05), "causal_verdicts")
    assert set(verdicts["readable"]) == {"yes"}
    assert not verdicts["p_adjusted"].isna().any()
    for name in ("erase", "swap"):
        seen = verdicts[(verdicts["intervention"] == name) & (verdicts["group"] == "all")]
        assert seen["used"].tolist() == ["no", "no", "yes", "yes"]
        size = seen["effect"].abs().tolist()
        assert max(size[:2]) < 0.3 < 3 < min(size[2:])
    # along the used direction the two labels move in opposite ways: the mean alone would not show it
    steered = verdicts[verdicts["intervention"] == "steer"]
    effects, used = (steered.groupby("group")[name].apply(list).to_dict() for name in ("effect", "used"))
    assert max(map(abs, effects["all"])) < 0.2
    assert min(effects["used 1"][2:]) > 3
    assert used == dict.fromkeys(("all", "used 0", "used 1"), ["no", "no", "yes", "yes"])


def test_erasing_steering_and_swapping_move_the_answer_by_what_linear_algebra_says(planted: LoadedModel) -> None:
    site = site_of(planted, USED, layer=1)
    done = followed(planted, [site], MEASURED, interventions=("erase", "steer", "swap"), random=3)
    rows = table(done.prompt_rows(), "causal_prompts")
    clean, twin = (stream(planted, MEASURED, site.site, corrupt=corrupt) for corrupt in (False, True))
    head = planted.model.lm_head.weight
    reads = torch.stack([head[p.answer[0]] - head[p.wrong_answer[0]] for p in MEASURED.prompts])
    u, gain = site.probe.basis[0], reads @ site.probe.basis[0]
    wanted = {
        ("erase", None): -gain * ((clean - site.mean) @ u),
        ("swap", None): gain * ((twin - clean) @ u),
        ("steer", -4.0): -4.0 * site.probe.spread * gain,
        ("steer", 2.0): 2.0 * site.probe.spread * gain,
    }
    for (name, strength), effect in wanted.items():
        mine = rows[rows["intervention"] == name]
        mine = mine[mine["strength"] == strength] if strength is not None else mine
        found = torch.tensor(mine.sort_values("prompt")["effect"].tolist())
        torch.testing.assert_close(found, effect, atol=TOLERANCE, rtol=0)
        assert float(effect.abs().max()) > 1


def test_dose_and_response_are_proportional_where_the_model_is_linear(planted: LoadedModel) -> None:
    # the metric has a sign of its own on every prompt, so only one answer's prompts are looked at
    ones = PromptSet("made", tuple(p for p in MEASURED.prompts if p.answer_text == "1"))
    rows = follow(planted, [site_of(planted, USED)], ones, interventions=("steer",), random=3)
    own = rows[rows["direction"] == PROBE]
    slopes = (own["effect"] / own["strength"]).tolist()
    assert slopes == pytest.approx([slopes[0]] * len(slopes), rel=1e-3)
    assert abs(slopes[0]) > 1
    assert own["random_effect"].notna().tolist() == [strength == 4.0 for strength in own["strength"]]


def test_leace_erases_in_the_model_and_stands_beside_draws_of_what_it_moves(planted: LoadedModel) -> None:
    x = stream(planted, FITTED, Site("resid_post", 0))
    label = last_labels(FITTED, 1).float()
    away = (x - x.mean(0)).double()
    sigma = away.T @ away / len(x) + 1e-9 * torch.eye(x.shape[1])
    cross = away.T @ (label - label.mean()).double() / len(x)
    # one label: W⁺ P W = σ_xz (Σ⁻¹ σ_xz)ᵀ / (σ_xz Σ⁻¹ σ_xz)
    solved = torch.linalg.solve(sigma, cross)
    oblique = torch.eye(len(sigma)).double() - torch.outer(cross, solved) / (cross @ solved)
    leace = AffineMap(oblique.float(), x.mean(0))
    site = site_of(planted, USED, draws=DRAWS, leace=leace)
    rows = follow(planted, [site], MEASURED, interventions=("leace",), margin=0.5)
    row = rows[rows["direction"] == PROBE].iloc[0]
    assert (row["verdict"], row["rank"]) == ("yes", 1)
    assert row["removed"] == pytest.approx(float(site.random["leace"].removed.mean()), rel=1e-3)
    erased = x + (x - x.mean(0)) @ (oblique.float() - torch.eye(len(sigma))).T
    left = (erased - erased.mean(0)).T @ (label - label.mean()) / len(x)
    assert float(left.abs().max()) < 1e-4 < float(cross.abs().max())


def test_control_labels_stand_beside_the_probe(planted: LoadedModel) -> None:
    x = stream(planted, FITTED, Site("resid_post", 0))
    other = site_of(planted, UNUSED).probe.basis
    controls = {"unused": other, "drawn": random_basis(1, x.shape[1])}
    site = site_of(planted, USED, controls=controls)
    rows = follow(planted, [site], MEASURED, interventions=("erase",), random=3)
    by_name = rows.set_index("direction")
    assert set(by_name.index) == {PROBE, "unused", "drawn"}
    assert by_name.loc[PROBE, "control_effect"] == pytest.approx(by_name.loc[["unused", "drawn"], "effect"].mean())
    assert by_name["control_high"].to_dict()[PROBE] < -1
    assert by_name.loc[["unused", "drawn"], "control_effect"].isna().all()


def test_swapping_back_undoes_the_corruption(planted: LoadedModel) -> None:
    site = site_of(planted, USED)
    rows = follow(planted, [site], MEASURED, interventions=("swap",), into=("clean", "corrupt"), random=3)
    into = {row["stream"]: float(row["effect"]) for row in rows[rows["direction"] == PROBE].to_dict("records")}
    assert into["clean"] < -1
    assert into["corrupt"] > 1


def test_prompts_without_the_position_are_left_out(planted: LoadedModel) -> None:
    prompts = PromptSet("made", MEASURED.prompts[:10])
    site = site_of(planted, USED)
    some = Place(tuple((p.length - 1,) if i % 2 else None for i, p in enumerate(prompts.prompts)), span="odd")
    options = CausalOptions.model_validate({"interventions": ["erase"], "random": 3})
    arms = lay_out([site], [last(prompts), some], options, prompts)
    metrics = Metrics.of(("logit_diff",), prompts, None, planted)
    job = make_job(arms, [site], [last(prompts), some], prompts, metrics)
    assert {trial.prompts for trial in job.works[0].trials if arms[trial.index].place == 1} == {(1, 3, 5, 7, 9)}
    whole = followed(planted, [site], prompts, interventions=("erase",), random=3)
    assert whole.members(0) == list(range(10))
    values = np.arange(len(arms) * 10, dtype=float).reshape(len(arms), 10, 1, 1)
    streams = {"clean": np.zeros((10, 1, 1))}
    done = Followed(
        arms, [site], [last(prompts), some], prompts, ("logit_diff",), Swept(values, streams), options, STATS
    )
    rows = table(done.effect_rows(), "causal_effects").set_index("span")
    rows = rows[rows["group"] == "all"]
    first = next(arm.index for arm in arms if arm.place == 1)
    assert rows.loc["odd", "effect"] == values[first, [1, 3, 5, 7, 9], 0, 0].mean()
    assert rows.loc["odd", "n"] == 5


def test_numbers_that_are_not_finite_are_marked_and_have_no_verdict(planted: LoadedModel) -> None:
    done = followed(planted, [site_of(planted, USED)], MEASURED, interventions=("erase",), random=3)
    assert [row["status"] for row in done.effect_rows()] == ["ok"] * 3
    done.swept.values[0, 3] = np.nan
    rows = {row["group"]: (row["status"], row.get("difference") is None) for row in done.effect_rows()}
    assert rows == {"all": ("nan", True), "used 0": ("ok", False), "used 1": ("nan", True)}


# --- statistics


def test_p_and_max_t_against_counting() -> None:
    generator = np.random.default_rng(0)
    family = [
        Beside(generator.normal(shift, 1, 8), generator.normal(0, scale, (DRAWS, 8)), list("abcdefgh"))
        for shift, scale in ((0.0, 1.0), (1.5, 1.0), (8.0, 9.0))
    ]
    p, adjusted = p_values(family)
    own = np.array([abs(one.own.mean()) for one in family])
    random = np.stack([abs(one.random.mean(1)) for one in family])
    both = np.concatenate([own[:, None], random], axis=1)
    centre, scale = both.mean(1), both.std(1)
    for i in range(3):
        assert p[i] == (1 + sum(random[i] >= own[i])) / (DRAWS + 1)
    stepped, least = {}, 0.0
    order = np.argsort(-(own - centre) / scale)
    for place, i in enumerate(order):
        rest = order[place:]
        highest = ((random[rest] - centre[rest, None]) / scale[rest, None]).max(0)
        least = max(least, (1 + sum(highest >= (own[i] - centre[i]) / scale[i])) / (DRAWS + 1))
        stepped[i] = least
    assert adjusted.tolist() == pytest.approx([stepped[i] for i in range(3)])
    assert (adjusted >= p).all()


def test_where_the_probe_is_one_of_the_random_directions_verdicts_of_yes_are_rare() -> None:
    generator = np.random.default_rng(1)
    single, family = 0, 0
    for _ in range(200):
        shared = generator.normal(0, 1, DRAWS + 1)
        layers = []
        for _layer in range(4):
            means = shared + generator.normal(0, 0.5, DRAWS + 1)
            effects = means[:, None] + generator.normal(0, 0.1, (DRAWS + 1, 6))
            layers.append(Beside(effects[0], effects[1:], list("abcdef")))
        p, adjusted = p_values(layers)
        single += p[0] <= 0.05
        family += bool((adjusted <= 0.05).any())
    assert 1 <= single <= 20
    assert 1 <= family <= 20


@pytest.mark.parametrize(
    ("own", "spread", "verdict"),
    [(3.0, 0.1, "yes"), (0.0, 0.1, "no"), (0.3, 1.0, "inconclusive"), (0.45, 0.01, "inconclusive")],
)
def test_three_outcomes(own: float, spread: float, verdict: str) -> None:
    generator = np.random.default_rng(2)
    noise = generator.normal(0, spread, 40)
    # beyond the margin, but no larger than many random ones are
    random = generator.normal(0, 1.0, (DRAWS, 1)) + generator.normal(0, 0.1, (DRAWS, 40))
    one = Beside(own + noise - noise.mean(), random - random.mean(), [str(i) for i in range(40)])
    (row,) = family_rows([one], STATS, margin=0.2)
    assert row["verdict"] == verdict


def test_prompts_that_move_in_opposite_ways_are_used_though_their_mean_is_nothing() -> None:
    clusters = [str(i) for i in range(40)]
    random = np.random.default_rng(3).normal(0, 0.3, (DRAWS, 40))
    signs = np.where(np.arange(40) % 2, 1.0, -1.0)
    for size, verdict in ((2.0, "yes"), (0.0, "no")):
        (row,) = family_rows([Beside(size * signs, random, clusters)], STATS, margin=0.4)
        assert row["verdict"] == verdict
        assert row["difference"] == pytest.approx(0, abs=0.05)
        assert row["p"] > 0.9
        assert (row["size_p"] <= 0.05) == (verdict == "yes")


def test_nothing_lost_is_no_use_even_where_random_directions_lose_much() -> None:
    clusters = [str(i) for i in range(30)]
    random = np.random.default_rng(3).normal(-4, 1, (DRAWS, 30))
    small = np.random.default_rng(4).normal(0, 0.05, 30)
    answers = [family_rows([Beside(own, random, clusters)], STATS, margin=0.2)[0] for own in (small, small - 1)]
    assert [row["verdict"] for row in answers] == ["no", "inconclusive"]
    assert all(row["p"] > 0.9 for row in answers)


def test_fewer_draws_give_a_band_and_no_verdict(planted: LoadedModel) -> None:
    few, many = (
        follow(planted, [site_of(planted, USED, draws=draws)], MEASURED, interventions=("erase",), random=draws)
        for draws in (DRAWS - 1, DRAWS)
    )
    for rows, known in ((few, False), (many, True)):
        row = rows[rows["direction"] == PROBE].iloc[0]
        assert row["random_low"] < row["random_high"]
        assert row["effect"] < row["random_low"]
        assert pd.notna(row["p"]) == pd.notna(row["p_adjusted"]) == pd.notna(row["verdict"]) == known


@pytest.mark.parametrize(
    ("read", "answer"),
    [
        (Readability(0.9, 0.005), "yes"),
        (Readability(0.9, 0.3), "inconclusive"),
        (Readability(0.9), "inconclusive"),
        (Readability(0.9, 0.005, 0.5, 0.3, 0.5), "yes"),
        (Readability(0.9, 0.3, 0.5, 0.3, 0.5), "inconclusive"),
        (Readability(0.51, 0.4, 0.5, -0.02, 0.04), "no"),
        (Readability(0.55, 0.4, 0.5, -0.2, 0.3), "inconclusive"),
    ],
)
def test_readable_has_three_outcomes(read: Readability, answer: str) -> None:
    assert read.answer(margin=0.05) == answer


# --- downstream


def test_activations_under_edits_are_those_of_hooks(models: Mapping[str, LoadedModel]) -> None:
    for case in CASES:
        model = models[case]
        hand = Hand(model.model, "gpt2" if case == "gpt2" else "llama")
        site = site_at(model, hand, "resid_post", None)
        tokens = torch.tensor([p.clean_tokens for p in PROMPTS.prompts if p.length == 7])
        made = Changes(site).of("erase", PROBE)
        edits = site.edits(made, ((2, 6),) * len(tokens))
        sites = {Site("resid_post", 0), Site("z", 1), Site("resid_post", 1)}
        found = activations_under(model.model, model.anatomy, tokens, edits, sites)
        change = changed(None, (2, 6), by_hand(site, "erase", 0.0, torch.zeros(()), None))
        for asked in sites:
            seen: list[Tensor] = []

            def keep(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(x.clone())
                return x

            before = hand.seen(tokens.tolist(), (asked.kind, asked.layer))
            if asked == site.site:
                wanted = change(torch.stack(before))
            else:
                hand.logits(tokens.tolist(), {("resid_post", 0): change, (asked.kind, asked.layer): keep})
                wanted = seen[0]
            assert float((found[asked] - wanted).abs().max()) < TOLERANCE
            assert float((found[asked] - torch.stack(before)).abs().max()) > 10 * TOLERANCE


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_erased_comes_back_only_where_a_copy_was_left(planted: LoadedModel, whole: bool) -> None:
    x = stream(planted, FITTED, Site("resid_post", 0))
    basis = mean_difference(x, last_labels(FITTED, 0)) if whole else torch.eye(x.shape[1])[:1]
    erased = probed_site("resid_post", 0, basis, x, draws=1)
    label = last_labels(MEASURED, 0)
    later = stream(planted, FITTED, Site("resid_post", 1))
    fitted = last_labels(FITTED, 0).double()
    design = torch.cat([later, torch.ones(len(later), 1)], 1).double()
    weights = torch.linalg.solve(design.T @ design + torch.eye(design.shape[1]), design.T @ (2 * fitted - 1))

    def score(_site: Site, activations: Tensor) -> float:
        rows = torch.cat([activations, torch.ones(len(activations), 1)], 1).double()
        return float(((rows @ weights > 0).long() == label).double().mean())

    captured = captured_under(planted, MEASURED, erased, last(MEASURED), [Site("resid_post", 1)])
    (row,) = downstream_rows(erased, captured, score, {Site("resid_post", 1): 0.5})
    assert row["score_before"] > 0.95
    assert row["score_after"] < 0.75 if whole else row["score_after"] > 0.95
    assert len(table([row], "causal_downstream")) == 1


# --- through the bench


def bench_of(folder: Path, run: RunRecorder, model: LoadedModel, recorded: Sequence[dict[str, Any]] = ()) -> Bench:
    loaded = config_of(folder, {"sites": [{"kind": "resid_pre"}]})
    moment = Moment(None, None, loaded.config.model)
    return Bench(run, model, loaded.config.engine, moment, 0, 1, SilentProgress(), Tally(), recorded)


def test_units_that_were_saved_are_not_computed_again_and_give_the_same_bytes(
    tmp_path: Path, planted: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "ROWS_PER_UNIT", 64)
    site = site_of(planted, USED, draws=5)
    sides = Sides.of(planted, [site], MEASURED, interventions=("erase", "swap"), random=5)
    job = make_job(sides.arms, [site], sides.places, MEASURED, sides.metrics)
    with record(config_of(tmp_path, {"sites": [{"kind": "resid_pre"}]}), tmp_path / "runs") as run:
        first = bench_of(tmp_path, run, planted)
        whole = first.sweep(job)
        units = run.units.finished()
        assert len(units) > 4
        lost = sorted(units)[::2]
        for unit in lost:
            run.units.path(unit).unlink()
        written: list[str] = []
        write = run.units.write

        def keep(_store: object, key: str, rows: Any) -> None:
            written.append(key)
            write(key, rows)

        monkeypatch.setattr(type(run.units), "write", keep)
        parts = [dict(part) for part in run.manifest.engine["parts"]]
        again = bench_of(tmp_path, run, planted, parts).sweep(job)
    assert sorted(written) == lost
    assert again.values.tobytes() == whole.values.tobytes()
    assert parts[0]["proof"]["deviation"] < 1e-4


def test_the_plan_of_blank_sites_is_that_of_fitted_ones(planted: LoadedModel) -> None:
    features = planted.anatomy.d_model
    fitted = [site_of(planted, USED, layer, draws=7) for layer in (0, 1)]
    blank = [blank_site("resid_post", layer, features, draws=7) for layer in (0, 1)]
    costs, engine = [], EngineOptions()
    for sites in (fitted, blank):
        sides = Sides.of(planted, sites, MEASURED, interventions=("erase", "steer", "swap"), random=7)
        job = make_job(sides.arms, sites, sides.places, MEASURED, sides.metrics)
        costs.append({k: v for k, v in cost_of(engine, planted, job).items() if k != "seconds"})
    assert costs[0] == costs[1]
    assert costs[0]["trials"] == 2 * ((1 + 7) + (6 + 7) + (1 + 7))


# --- what is refused


def test_what_cannot_be_done_is_refused(planted: LoadedModel) -> None:
    site = site_of(planted, USED)
    alone = PromptSet("made", tuple(type(p)(**{**vars(p), "corrupt_tokens": None}) for p in MEASURED.prompts))
    pattern = blank_site("pattern", 0, 8, draws=1)
    for sites, prompts, name, words in (
        ([site], alone, "swap", "corrupted twin"),
        ([site], MEASURED, "leace", "leace needs"),
        ([pattern], MEASURED, "erase", "one number per key"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            lay_out(sites, [last(prompts)], CausalOptions.model_validate({"interventions": [name]}), prompts)
        assert caught.value.remedy


def test_prompts_that_were_fitted_on_are_not_measured() -> None:
    fitted = [p.clean_tokens for p in FITTED.prompts]
    check_apart(fitted, MEASURED)
    with pytest.raises(UserError, match="1 of 48 measured prompts were fitted on, prompt 7 first"):
        check_apart([*fitted, MEASURED.prompts[7].clean_tokens], MEASURED)


def test_random_strengths_are_some_of_the_strengths() -> None:
    assert CausalOptions().steered_at_random == (4.0,)
    assert CausalOptions(strengths=(-2.0, 0.0, 1.0), random_strengths="all").steered_at_random == (-2.0, 1.0)
    with pytest.raises(ValidationError, match="not among strengths"):
        CausalOptions(strengths=(-2.0, 1.0), random_strengths=(3.0,))


def test_gaussians_of_a_rank_begin_with_those_of_a_smaller_one() -> None:
    assert torch.equal(gaussians(4, 1, 6, 0), gaussians(4, 3, 6, 0)[:, :1])
    assert not torch.equal(gaussians(4, 2, 6, 0)[:, 0], gaussians(4, 2, 6, 0)[:, 1])


def test_planted_labels_have_the_size_that_was_planted(planted: LoadedModel) -> None:
    seen = stream(planted, FITTED, Site("resid_post", 1))
    for coordinate, which in ((UNUSED, 0), (USED, 1)):
        torch.testing.assert_close(seen[:, coordinate], SIZE * (2.0 * last_labels(FITTED, which) - 1))
