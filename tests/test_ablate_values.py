"""What stands in place of an ablated part: against activations that plain hooks give, one prompt at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechinterp_cli.engine.capture import group_moments
from mechinterp_cli.engine.edits import Bucket, Edit, RowValues, Site, Trial
from mechinterp_cli.engine.execute import executor_named
from mechinterp_cli.engine.wavefront import Settings
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.ablate.options import AblateOptions, ValueName
from mechinterp_cli.methods.ablate.rows import Held
from mechinterp_cli.methods.ablate.units import Merged, Part
from mechinterp_cli.methods.ablate.values import OTHER, Optimal, Values, values_of
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.methods.specs import Place
from mechinterp_cli.models.checkpoints import Moment
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.runs.outcome import SilentProgress
from mechinterp_cli.tasks.prompts import PromptSet
from tests.ablate_hooks import Hand, prompt_set, tiny
from tests.engine_trials import logits_measure
from tests.experiments import config_of
from tests.models_fixtures import toy

__all__ = ["toy"]

CASES = ("toy", "llama", "gpt2")
TOLERANCE = 5e-5
PROMPTS = prompt_set({"long": [7, 7, 7], "short": [5, 5, 5, 5]})
Spot = tuple[str, int, tuple[int, ...] | None]
SPOTS: tuple[Spot, ...] = (
    ("z", 1, (1, 3)),
    ("z", 0, None),
    ("neuron", 0, (0, 5, 7)),
    ("attn_out", 1, None),
    ("mlp_out", 0, None),
)
"""Kind of site, layer, units."""
MEANS: dict[str, dict[str, Any]] = {
    "all": {},
    "template": {"by": "template"},
    "position": {"per": "position"},
    "corrupt": {"per": "position", "stream": "corrupt"},
    "all corrupt": {"stream": "corrupt"},
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def models(toy: LoadedModel) -> dict[str, LoadedModel]:
    return {"toy": toy, "llama": tiny("llama", toy), "gpt2": tiny("gpt2", toy)}


def hand_of(case: str, models: Mapping[str, LoadedModel]) -> Hand:
    return Hand(models[case].model, "gpt2" if case == "gpt2" else "llama")


def setting_of(
    folder: Path, model: LoadedModel, prompts: PromptSet = PROMPTS, compute: bool = True, **section: Any
) -> Setting:
    section = {"units": [{"kind": "head"}], "values": ["zero", "mean"]} | section
    loaded = config_of(folder, section, method="ablate")
    return Setting(loaded, model, Moment(None, None, loaded.config.model), prompts, SilentProgress(), compute)


def options_of(setting: Setting) -> AblateOptions:
    assert isinstance(setting.loaded.config.method, AblateOptions)
    return setting.loaded.config.method


def made(name: ValueName, setting: Setting, parts: Sequence[Merged]) -> Values:
    return values_of(name, options_of(setting), setting, parts)


def at(prompts: PromptSet, *chosen: int) -> Place:
    """Some positions of every prompt; none chosen: all."""
    return Place(tuple(chosen or tuple(range(p.length)) for p in prompts.prompts))


def part(spot: Spot, prompts: PromptSet = PROMPTS, *positions: int) -> Merged:
    return Merged(Part(*spot), at(prompts, *positions), None, None)


def direction(count: int, features: int, layer: int = 0, prompts: PromptSet = PROMPTS) -> Merged:
    rows = torch.randn(count, features, generator=torch.Generator().manual_seed(3))
    basis = torch.linalg.qr(rows.T)[0].T.contiguous()
    return Merged(Part("resid_post", layer), at(prompts), None, basis)


def run(
    model: LoadedModel, values: Values, merged: Sequence[Merged], members: Sequence[int], executor: str = "packed"
) -> Tensor:
    """Logits [prompts × draws, positions, vocabulary] of one trial on a bucket."""
    prompts = [p for p in (values.prompts.prompts[i] for i in members) for _ in range(values.draws)]
    tokens = {"clean": torch.tensor([p.clean_tokens for p in prompts])} | values.tokens(members)
    bucket = Bucket.of(tokens, torch.arange(tokens["clean"].shape[1]).expand(len(prompts), -1))
    edits = tuple(edit for one in merged for edit in values.edits(one, members))
    trial = Trial(0, "clean", edits, tuple(range(len(prompts))))
    engine = executor_named(executor, model.model, model.anatomy, Settings())
    with torch.no_grad():
        return engine.run(bucket, [trial], logits_measure).trials[0]


def buckets(prompts: PromptSet = PROMPTS) -> list[tuple[int, ...]]:
    return list(prompts.buckets().values())


def putting(
    new: Tensor, units: Sequence[int] | None, positions: Sequence[int], add: bool
) -> Callable[[Tensor], Tensor]:
    """A change that puts (or adds) parts of `new` [prompts, positions, *features] in place."""

    def change(x: Tensor) -> Tensor:
        for position in positions:
            for unit in [slice(None)] if units is None else units:
                x[:, position, unit] = new[:, position, unit] + (x[:, position, unit] if add else 0)
        return x

    return change


Wanted = Mapping[tuple[int, int], Tensor]
"""(prompt, draw) to [positions, *features]."""


def keys(values: Values) -> list[tuple[int, int]]:
    return [(i, draw) for i in range(len(values.prompts.prompts)) for draw in range(values.draws)]


def check(
    hand: Hand, model: LoadedModel, values: Values, spot: Spot, wanted: Wanted, other: Wanted, add: bool = False
) -> None:
    """The engine's logits are those by hand with `wanted`, and those of no prompt are the ones with `other`."""
    for executor, positions in (("packed", ()), ("hooks", (1, 3))):
        merged = part(spot, values.prompts, *positions)
        for members in buckets(values.prompts):
            rows = [(i, draw) for i in members for draw in range(values.draws)]
            tokens = [values.prompts.prompts[i].clean_tokens for i, _ in rows]
            found = run(model, values, [merged], members, executor)
            plain = []
            for given in (wanted, other):
                new = torch.stack([given[key] for key in rows])
                change = putting(new, spot[2], positions or range(new.shape[1]), add)
                plain.append(hand.logits(tokens, {spot[:2]: change}))
            right, wrong = ((logits - found).abs().amax((1, 2)) for logits in plain)
            assert float(right.max()) < TOLERANCE
            assert float(wrong.min()) > 10 * TOLERANCE


def activations(hand: Hand, prompts: PromptSet, place: tuple[str, int], stream: str = "clean") -> list[Tensor]:
    """Of every prompt, [positions, *features]."""
    return hand.seen([p.clean_tokens if stream == "clean" else p.corrupt_tokens or () for p in prompts.prompts], place)


def mean_by_hand(seen: Sequence[Tensor], name: str, prompts: PromptSet, i: int) -> Tensor:
    """What stands in place of prompt i's activation."""
    mine = prompts.prompts[i]
    alike = [x for x, p in zip(seen, prompts.prompts, strict=True) if p.template == mine.template]
    if MEANS[name].get("per") == "position":
        return torch.stack(alike).double().mean(0).float()
    over = torch.cat(alike if name == "template" else list(seen)).double().mean(0).float()
    return over.expand(mine.length, *over.shape)


# --- every value against hooks


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MEANS)
def test_means(tmp_path: Path, models: dict[str, LoadedModel], case: str, name: str) -> None:
    model, hand = models[case], hand_of(case, models)
    values = made("mean", setting_of(tmp_path, model, mean=MEANS[name]), [part(spot) for spot in SPOTS])
    for spot in SPOTS:
        seen = activations(hand, PROMPTS, spot[:2], MEANS[name].get("stream", "clean"))
        right, wrong = (
            {key: mean_by_hand(seen, chosen, PROMPTS, key[0]) for key in keys(values)}
            for chosen in (name, "template" if name == "all" else "all")
        )
        if name == "all corrupt":
            clean = activations(hand, PROMPTS, spot[:2])
            wrong = {key: mean_by_hand(clean, "all", PROMPTS, key[0]) for key in keys(values)}
        check(hand, model, values, spot, right, wrong)


@pytest.mark.parametrize("case", CASES)
def test_zero_and_the_mean_of_the_prompt(tmp_path: Path, models: dict[str, LoadedModel], case: str) -> None:
    model, hand = models[case], hand_of(case, models)
    setting, parts = setting_of(tmp_path, model), [part(spot) for spot in SPOTS]
    zero, mean = made("zero", setting, parts), made("mean_of_prompt", setting, parts)
    for spot in SPOTS:
        seen = activations(hand, PROMPTS, spot[:2])
        nothing = {(i, 0): torch.zeros_like(x) for i, x in enumerate(seen)}
        own = {(i, 0): x.mean(0).expand_as(x) for i, x in enumerate(seen)}
        check(hand, model, zero, spot, nothing, own)
        check(hand, model, mean, spot, own, nothing)


@pytest.mark.parametrize("stream", ["clean", "corrupt"])
@pytest.mark.parametrize("case", CASES)
def test_resample(tmp_path: Path, models: dict[str, LoadedModel], case: str, stream: str) -> None:
    model, hand = models[case], hand_of(case, models)
    setting = setting_of(tmp_path, model, resample={"draws": 2, "stream": stream})
    values = made("resample", setting, [part(spot) for spot in SPOTS])
    assert (values.draws, values.notes) == (2, ())
    donor = donors_of(values, stream)
    for spot in SPOTS:
        seen = activations(hand, PROMPTS, spot[:2], stream)
        right, wrong = ({(i, d): seen[donor[i][d ^ swap]] for i, d in keys(values)} for swap in (0, 1))
        check(hand, model, values, spot, right, wrong)


@pytest.mark.parametrize("case", CASES)
def test_noise(tmp_path: Path, models: dict[str, LoadedModel], case: str) -> None:
    model, hand = models[case], hand_of(case, models)
    setting = setting_of(tmp_path, model, noise={"draws": 2, "scale": 0.5})
    values = made("noise", setting, [part(spot) for spot in SPOTS])
    for spot in SPOTS:
        spread = torch.cat(activations(hand, PROMPTS, spot[:2])).double().std(0, correction=0)
        drawn = noise_of(values, spot)
        used = list(range(spread.shape[0])) if spot[2] is None else list(spot[2])
        unit = torch.cat([x[:, used] / (0.5 * spread[used]) for x in drawn.values()]).flatten().double()
        assert abs(float(unit.mean())) < 5 / math.sqrt(len(unit))
        assert abs(float(unit.std()) - 1) < 5 / math.sqrt(2 * len(unit))
        check(hand, model, values, spot, drawn, {(i, d): drawn[i, 1 - d] for i, d in drawn}, add=True)


def donors_of(values: Values, stream: str = "clean") -> dict[int, list[int]]:
    """For every prompt the prompts it is given activations of, found by their tokens."""
    prompts = values.prompts.prompts
    known = {p.clean_tokens if stream == "clean" else p.corrupt_tokens: i for i, p in enumerate(prompts)}
    found = {}
    for members in buckets(values.prompts):
        rows = iter(values.tokens(members)[OTHER].tolist())
        for i in members:
            found[i] = [known[tuple(next(rows))] for _ in range(values.draws)]
    return found


def noise_of(
    values: Values, spot: Spot, split: Callable[[tuple[int, ...]], Sequence[Sequence[int]]] = lambda members: [members]
) -> dict[tuple[int, int], Tensor]:
    """(prompt, draw) to what is added to every unit, [positions, *features]."""
    found = {}
    for whole in buckets(values.prompts):
        for members in split(whole):
            (edit,) = values.edits(part(spot, values.prompts), members)
            assert isinstance(edit.values, RowValues)
            for row, key in enumerate((i, draw) for i in members for draw in range(values.draws)):
                positions = torch.arange(values.prompts.prompts[key[0]].length)
                found[key] = edit.values.at(torch.full_like(positions, row), positions, None)
    return found


# --- directions and edges


def test_directions(tmp_path: Path, models: dict[str, LoadedModel]) -> None:
    model, hand = models["llama"], hand_of("llama", models)
    merged = direction(2, model.anatomy.d_model)
    assert merged.basis is not None
    basis = merged.basis
    setting = setting_of(tmp_path, model, resample={"draws": 1}, mean=MEANS["position"])
    names: tuple[ValueName, ...] = ("zero", "project", "mean", "mean_of_prompt", "resample")
    seen = activations(hand, PROMPTS, ("resid_post", 0))
    for name in names:
        values = made(name, setting, [merged])
        new = {
            "mean": [mean_by_hand(seen, "position", PROMPTS, i) for i in range(len(seen))],
            "mean_of_prompt": [x.mean(0).expand_as(x) for x in seen],
            "resample": [seen[donors_of(values)[i][0]] for i in range(len(seen))] if name == "resample" else [],
        }.get(name, [torch.zeros_like(x) for x in seen])
        for members in buckets():
            goal = torch.stack([new[i] for i in members])
            tokens = [PROMPTS.prompts[i].clean_tokens for i in members]

            def change(x: Tensor, goal: Tensor = goal) -> Tensor:
                return x + (goal - x) @ basis.T @ basis

            found = run(model, values, [merged], members)
            plain, unedited = hand.logits(tokens, {("resid_post", 0): change}), hand.logits(tokens, {})
            assert float((plain - found).abs().max()) < TOLERANCE
            assert float((unedited - found).abs().amax((1, 2)).min()) > 10 * TOLERANCE


def test_each_direction_of_a_site_has_its_own_component(tmp_path: Path, models: dict[str, LoadedModel]) -> None:
    model = models["llama"]
    parts = [direction(count, model.anatomy.d_model) for count in (1, 2)]
    values = made("mean", setting_of(tmp_path, model), parts)
    for merged in parts:
        _, add = values.edits(merged, buckets()[0])
        assert merged.basis is not None
        assert isinstance(add.values, RowValues)
        found = add.values.at(torch.tensor([0]), torch.tensor([0]), None)[0]
        seen = torch.cat(activations(hand_of("llama", models), PROMPTS, ("resid_post", 0)))
        torch.testing.assert_close(found, seen.mean(0) @ merged.basis.T @ merged.basis, atol=1e-5, rtol=1e-4)


def test_what_makes_no_sense_is_refused(tmp_path: Path, models: dict[str, LoadedModel]) -> None:
    model = models["llama"]
    names: list[ValueName] = ["zero", "mean", "noise", "project"]
    setting = setting_of(tmp_path, model, values=names)
    edge = Merged(Part("scores", 0), at(PROMPTS, 3), at(PROMPTS, 1), None)
    with pytest.raises(UserError, match=r"experiment.yaml:\d+: ablate.values\[1\]: mean: an edge is masked") as caught:
        made("mean", setting, [part(SPOTS[0]), edge])
    assert caught.value.remedy == "Use values: [zero]."
    with pytest.raises(UserError, match=r"ablate.values\[2\]: noise: .* nothing of a direction"):
        made("noise", setting, [direction(1, model.anatomy.d_model)])
    with pytest.raises(UserError, match=r"ablate.values\[3\]: project takes directions out .* z in layer 1 is none"):
        made("project", setting, [direction(1, model.anatomy.d_model), part(SPOTS[0])])


def test_an_edge_is_masked(tmp_path: Path, models: dict[str, LoadedModel]) -> None:
    model = models["toy"]
    edge = Merged(Part("scores", 1, (2,)), at(PROMPTS, 3, 4), at(PROMPTS, 1), None)
    values = made("zero", setting_of(tmp_path, model), [edge])
    (edit,) = values.edits(edge, (1, 0))
    assert (edit.op, edit.units) == ("mask", (2,))
    assert (edit.positions, edit.keys) == (((3, 4), (3, 4)), ((1,), (1,)))
    members = buckets()[0]
    clean = run(model, values, [], members)
    changed = (run(model, values, [edge], members) - clean).abs().amax((0, 2))
    assert torch.equal(changed[:3], torch.zeros(3, dtype=changed.dtype))
    assert bool((changed[3:] > 0).all())


# --- draws and seeds


def test_resample_takes_other_prompts_of_the_same_template_and_length(
    tmp_path: Path, models: dict[str, LoadedModel]
) -> None:
    prompts = prompt_set({"a": [6] * 5, "b": [6] * 4})
    values = made("resample", setting_of(tmp_path, models["llama"], prompts, resample={"draws": 5}), [])
    assert values.draws == 3
    assert values.notes == ("resample: 3 draws of 5: a template has no more other prompts of one length",)
    found = donors_of(values)
    for i, chosen in found.items():
        assert len({*chosen, i}) == 4
        assert {prompts.prompts[other].template for other in chosen} == {prompts.prompts[i].template}
    for draw in range(values.draws):
        assert sorted(chosen[draw] for chosen in found.values()) == list(range(9))


def test_the_seed_decides_and_batching_does_not(tmp_path: Path, models: dict[str, LoadedModel]) -> None:
    model, spot, prompts = models["llama"], SPOTS[0], prompt_set({"a": [6] * 9, "b": [5] * 8})

    def both(seed: int) -> tuple[Values, Values]:
        section: dict[str, Any] = {name: {"draws": 2, "seed": seed} for name in ("resample", "noise")}
        setting, parts = setting_of(tmp_path, model, prompts, **section), [part(spot, prompts)]
        return made("resample", setting, parts), made("noise", setting, parts)

    (resample, noise), (again, noise_again), (other, other_noise) = both(1), both(1), both(2)
    assert donors_of(resample) == donors_of(again)
    assert donors_of(resample) != donors_of(other)
    drawn, elsewhere = noise_of(noise, spot), noise_of(other_noise, spot)
    one_by_one = noise_of(noise_again, spot, lambda members: [(i,) for i in reversed(members)])
    for key, x in drawn.items():
        assert x.numpy().tobytes() == one_by_one[key].numpy().tobytes()
        assert not torch.allclose(x, elsewhere[key])
        assert not torch.allclose(x, drawn[key[0], 1 - key[1]])
    assert not torch.allclose(drawn[0, 0][:5], drawn[1, 0][:5])  # prompts, too
    members = buckets(prompts)[0]
    alone = torch.cat([resample.tokens((i,))[OTHER] for i in members])
    assert torch.equal(resample.tokens(members)[OTHER], alone)


def test_noise_of_another_site_is_other_noise_and_twice_the_scale_is_twice_the_noise(
    tmp_path: Path, models: dict[str, LoadedModel]
) -> None:
    spots = SPOTS[:2]
    single, double = (
        made("noise", setting_of(tmp_path, models["llama"], noise={"scale": s}), [part(s) for s in spots])
        for s in (1.0, 2.0)
    )
    first, second = noise_of(single, spots[0])[0, 0], noise_of(single, spots[1])[0, 0]
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    assert abs(float(cosine)) < 0.2
    torch.testing.assert_close(noise_of(double, spots[0])[0, 0], 2 * first)


def test_noise_that_was_dropped_comes_back_the_same() -> None:
    held, ample = Held(3 * 4 * 100), Held(10**6)
    first = [held.get(seed, (10, 10)).clone() for seed in range(10)]
    assert len(held._known) == 3
    for seed, noise in enumerate(first):
        assert torch.equal(held.get(seed, (10, 10)), noise)
        assert torch.equal(ample.get(seed, (10, 10)), noise)


def test_trials_share_what_they_hold(tmp_path: Path, models: dict[str, LoadedModel]) -> None:
    setting, spots = setting_of(tmp_path, models["llama"]), [("z", 1, (0,)), ("z", 1, (2, 3)), ("z", 0, (0,))]
    for name in ("mean", "noise"):
        values = made(name, setting, [part(spot) for spot in spots])
        one, two, elsewhere = (values.edits(part(spot), buckets()[0])[0].values for spot in spots)
        assert one is two
        assert one is not elsewhere
        assert isinstance(one, RowValues)
        some = one.of([2, 0])
        prompt, position = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 3])
        whole = one.at(torch.tensor([2, 0, 0]), position, (1, 3))
        assert torch.equal(some.at(prompt, position, (1, 3)), whole)
        assert some.shape[1:] == one.shape[1:]


# --- which prompts a mean is of


def refusal(
    tmp_path: Path, model: LoadedModel, prompts: PromptSet, name: ValueName = "mean", **section: Any
) -> UserError:
    with pytest.raises(UserError) as caught:
        made(name, setting_of(tmp_path, model, prompts, **section), [part(SPOTS[0], prompts)])
    assert caught.value.remedy
    return caught.value


def test_a_mean_is_never_of_other_positions(tmp_path: Path, models: dict[str, LoadedModel]) -> None:
    model, unequal = models["llama"], prompt_set({"a": [6, 6, 7]})
    error = refusal(tmp_path, model, unequal, mean=MEANS["position"])
    assert "ablate.mean.per: made has a single prompt of template 'a' with 7 tokens" in error.cause
    assert "lengths of this template there: 6, 7" in error.cause
    made("mean", setting_of(tmp_path, model, unequal), [part(SPOTS[0], unequal)])
    equal = prompt_set({"a": [6, 6, 7, 7]})
    made("mean", setting_of(tmp_path, model, equal, mean=MEANS["position"]), [part(SPOTS[0], equal)])


def test_a_mean_is_of_two_prompts_or_more(tmp_path: Path, models: dict[str, LoadedModel]) -> None:
    model = models["llama"]
    one = refusal(tmp_path, model, prompt_set({"a": [6]}))
    assert "ablate.mean: made has a single prompt, and a mean takes 2 prompts or more" in one.cause
    some = prompt_set({"a": [6, 6], "b": [6]})
    error = refusal(tmp_path, model, some, mean=MEANS["template"])
    assert "ablate.mean.by: made has a single prompt of template 'b'" in error.cause
    assert "template 'b' has a single prompt of 6 tokens" in refusal(tmp_path, model, some, "resample").cause
    made("mean", setting_of(tmp_path, model, some), [part(SPOTS[0], some)])


@pytest.mark.parametrize("name", ["mean", "resample"])
def test_a_corrupt_stream_must_be_there(tmp_path: Path, models: dict[str, LoadedModel], name: ValueName) -> None:
    prompts = prompt_set({"a": [6, 6]}, corrupt=False)
    error = refusal(tmp_path, models["llama"], prompts, name, **{name: {"stream": "corrupt"}})
    assert f"ablate.{name}.stream: corrupt: prompt 0 of made has no corrupted twin" in error.cause


REFERENCE = {"name": "repeats", "n": 6, "block": 4, "repeats": 2}


def test_a_reference_set(tmp_path: Path, models: dict[str, LoadedModel]) -> None:
    model, hand, spot = models["toy"], hand_of("toy", models), SPOTS[0]
    setting = setting_of(tmp_path, model, mean={"reference": REFERENCE})
    values = made("mean", setting, [part(spot)])
    reference = PromptSet("", tuple(p for p in built_reference(setting)))
    over = torch.cat(activations(hand, reference, spot[:2])).double().mean(0).float()
    seen = activations(hand, PROMPTS, spot[:2])
    right = {(i, 0): over.expand_as(x) for i, x in enumerate(seen)}
    wrong = {(i, 0): mean_by_hand(seen, "all", PROMPTS, i) for i in range(len(seen))}
    check(hand, model, values, spot, right, wrong)
    assert values.reference == "mean over all positions, 6 prompts of repeats"


def built_reference(setting: Setting) -> Sequence[Any]:
    from mechinterp_cli.tasks.build import build

    reference = options_of(setting).mean.reference
    assert reference is not None
    return build(reference, setting.model.tokenizer).prompts


def test_a_reference_set_with_other_positions_is_refused(tmp_path: Path, models: dict[str, LoadedModel]) -> None:
    model = models["toy"]
    error = refusal(tmp_path, model, PROMPTS, mean={"reference": REFERENCE, "per": "position"})
    assert "ablate.mean.reference: repeats has no prompt of template 'long' with 7 tokens" in error.cause
    template = built_reference(setting_of(tmp_path, model, mean={"reference": REFERENCE}))[0].template
    assert f"(templates there: {template!r})" in error.cause
    length = built_reference(setting_of(tmp_path, model, mean={"reference": REFERENCE}))[0].length
    other = prompt_set({template: [length + 1] * 2})
    error = refusal(tmp_path, model, other, mean={"reference": REFERENCE, "per": "position"})
    assert f"with {length + 1} tokens" in error.cause
    assert f"lengths of this template there: {length})" in error.cause
    same = prompt_set({template: [length] * 2})
    made("mean", setting_of(tmp_path, model, same, mean={"reference": REFERENCE, "per": "position"}), [])


def test_spreads_far_from_zero_keep_their_digits(models: dict[str, LoadedModel]) -> None:
    model = models["llama"]
    tokens = torch.tensor([p.clean_tokens for p in PROMPTS.prompts if p.length == 7])
    site = Site("mlp_out", 0)
    module = model.model.get_submodule("model.layers.0.mlp")
    handle = module.register_forward_hook(lambda _m, _i, out: torch.round(out * 4) / 4 + 2.0**18)
    try:
        moments = group_moments(model.model, model.anatomy, {site}, [tokens], [[0] * len(tokens)])[site]
        hand = Hand(model.model, "llama")
        seen = torch.cat(hand.seen(tokens.tolist(), ("mlp_out", 0))).double()
    finally:
        handle.remove()
    spread = seen.std(0, correction=0)
    assert float(spread.max()) > 0.1
    torch.testing.assert_close(moments.spread[0].double(), spread, atol=1e-6, rtol=1e-6)


# --- the cache


@pytest.fixture
def passes(models: dict[str, LoadedModel]) -> Iterator[list[int]]:
    """Grows with every forward pass of the tiny Llama."""
    seen: list[int] = []
    handle = models["llama"].model.register_forward_pre_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "activations").glob("*"))


def table(values: Values, spot: Spot = SPOTS[0]) -> bytes:
    """The bytes of every constant of a spot."""
    out = b""
    for members in buckets(values.prompts):
        (edit,) = values.edits(part(spot, values.prompts), members)
        assert isinstance(edit.values, RowValues)
        for row, i in enumerate(members):
            positions = torch.arange(values.prompts.prompts[i].length)
            out += edit.values.at(torch.full_like(positions, row), positions, None).numpy().tobytes()
    return out


def test_a_later_run_reads_what_an_earlier_one_computed(
    tmp_path: Path, models: dict[str, LoadedModel], passes: list[int]
) -> None:
    setting, parts = setting_of(tmp_path, models["llama"]), [part(SPOTS[0]), part(SPOTS[1])]
    first = made("mean", setting, parts)
    assert len(passes) == len(buckets())
    assert len(kept(tmp_path)) == 2
    assert table(made("mean", setting, parts)) == table(first)
    assert len(passes) == len(buckets())
    made("mean", setting, [*parts, part(SPOTS[3])])
    assert len(passes) == 2 * len(buckets())
    assert len(kept(tmp_path)) == 3
    assert not [path for path in kept(tmp_path) if path.suffix != ".safetensors"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "folder"])
def test_a_damaged_file_is_written_again(
    tmp_path: Path, models: dict[str, LoadedModel], passes: list[int], damage: str
) -> None:
    setting, parts = setting_of(tmp_path, models["llama"]), [part(SPOTS[0]), part(("z", 0, (1, 3)))]
    first = made("mean", setting, parts)
    for path, other in zip(kept(tmp_path), reversed(kept(tmp_path)), strict=True):
        good = path.read_bytes()
        bad = {"cut": good[:-10], "flipped": good[:-1] + bytes([good[-1] ^ 1]), "empty": b""}
        if damage == "folder":
            path.unlink()
            path.mkdir()
        elif damage == "other" and path < other:
            path.write_bytes(other.read_bytes())
        elif damage in bad:
            path.write_bytes(bad[damage])
    before = len(passes)
    again = made("mean", setting, parts)
    assert len(passes) > before
    assert table(again) == table(first)
    if damage != "folder":
        before = len(passes)
        assert table(made("mean", setting, parts)) == table(first)
        assert len(passes) == before


def test_what_another_model_or_other_prompts_gave_is_not_read(
    tmp_path: Path, models: dict[str, LoadedModel], passes: list[int]
) -> None:
    model, tokens = models["llama"], [p.clean_tokens for p in PROMPTS.prompts]

    def count(loaded: LoadedModel, prompts: PromptSet = PROMPTS, spot: Spot = SPOTS[0], **mean: Any) -> int:
        before = len(passes)
        made("mean", setting_of(tmp_path, loaded, prompts, mean=mean), [part(spot, prompts)])
        return len(passes) - before

    assert count(model) > 0
    assert count(model) == 0
    changed = list(PROMPTS.prompts)
    changed[-1] = replace(changed[-1], clean_tokens=(*tokens[-1][:-1], tokens[-1][-1] + 1))
    assert count(model, replace(PROMPTS, prompts=tuple(changed))) > 0
    for source in ({"weight_files": {"model.safetensors": "others"}}, {"dtype": "bfloat16"}, {"revision": "step1"}):
        assert count(replace(model, source=replace(model.source, **source))) > 0
    assert count(model, **MEANS["template"]) > 0
    assert count(model, **MEANS["position"]) > 0
    assert count(model, stream="corrupt") > 0
    assert count(model, spot=("z", 0, None)) > 0
    assert count(model, spot=("z", 1, (0,))) == 0
    files = len(kept(tmp_path))
    unknown = replace(model, source=replace(model.source, weight_files={}))
    assert count(unknown) > 0
    assert count(unknown) > 0
    assert len(kept(tmp_path)) == files


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, models: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    setting = setting_of(tmp_path, models["llama"])
    good = table(made("mean", setting, [part(SPOTS[0])]))
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "file"))
    assert table(made("mean", setting, [part(SPOTS[0])])) == good


# --- without computing; constants from outside


def test_a_dry_run_computes_nothing(tmp_path: Path, models: dict[str, LoadedModel], passes: list[int]) -> None:
    names: tuple[ValueName, ...] = ("zero", "mean", "resample", "noise", "mean_of_prompt", "optimal")
    spot: Spot = ("z", 1, (1,))
    for mean in (MEANS["all"], MEANS["position"]):
        setting = setting_of(tmp_path, models["llama"], compute=False, resample={"draws": 1}, mean=mean)
        for name in names:
            values = made(name, setting, [part(spot)])
            for members in buckets():
                for edit in values.edits(part(spot), members):
                    assert len(edit.positions) == values.draws * len(members)
                    assert_zero(edit, len(edit.positions))
    assert passes == []
    assert kept(tmp_path) == []


def assert_zero(edit: Edit, rows: int) -> None:
    if isinstance(edit.values, RowValues):
        prompt = torch.arange(rows)
        assert not edit.values.at(prompt, torch.zeros_like(prompt), edit.units).any()


@pytest.mark.parametrize("spot", SPOTS)
def test_constants_from_outside(tmp_path: Path, models: dict[str, LoadedModel], spot: Spot) -> None:
    model, hand = models["gpt2"], hand_of("gpt2", models)
    seen = activations(hand, PROMPTS, spot[:2])
    whole = seen[0].mean(0)
    right = {(i, 0): whole.expand_as(x) for i, x in enumerate(seen)}
    values = Optimal(PROMPTS, {Site(*spot[:2]): whole})
    check(hand, model, values, spot, right, {key: 2 * x for key, x in right.items()})
    assert "fitted" in values.reference


def test_constants_along_directions(models: dict[str, LoadedModel]) -> None:
    model, hand = models["llama"], hand_of("llama", models)
    merged = direction(1, model.anatomy.d_model)
    constant, basis = torch.ones(model.anatomy.d_model), merged.basis
    assert basis is not None
    values = Optimal(PROMPTS, {Site("resid_post", 0): constant})
    members = buckets()[0]
    plain = hand.logits(
        [PROMPTS.prompts[i].clean_tokens for i in members],
        {("resid_post", 0): lambda x: x + (constant - x) @ basis.T @ basis},
    )
    assert float((plain - run(model, values, [merged], members)).abs().max()) < TOLERANCE
