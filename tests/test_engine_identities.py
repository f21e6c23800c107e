"""What must hold of any executor: identities, prompts that do not depend on each other, noise, several reads."""

import pytest
import torch
from transformers import PreTrainedModel

from mechinterp_cli.engine.edits import Bucket, Edit, Site, Trial
from mechinterp_cli.engine.execute import EXECUTORS, executor_named
from mechinterp_cli.engine.wavefront import Settings, Values
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from tests.engine_trials import LENGTH, PROMPTS, deviation, edit_of, run, sweep, two_streams
from tests.families import WINDOW, build

EVERY = tuple(range(PROMPTS))
ALL = (tuple(range(LENGTH)),) * PROMPTS
AT = ((1, 7), (2,), (11, 15))
EXACT = 5e-6
"""Rounding in float32, as a share of the logits' scale."""

pytestmark = pytest.mark.parametrize("executor", EXECUTORS)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Anatomy]:
    model = build(request.param)
    return model, find_anatomy(model)


def scale_of(values: Values) -> float:
    return max(float(x.abs().max()) for x in values.streams.values())


def every_site(anatomy: Anatomy) -> list[Site]:
    return [Site(kind, layer.index) for layer in anatomy.layers for kind in layer.sites]


def test_identity_edits_leave_the_stream_as_it_was(family: tuple[PreTrainedModel, Anatomy], executor: str) -> None:
    model, anatomy = family
    sites = every_site(anatomy)
    trials = [Trial(i, "corrupt", (Edit(s, "replace", AT, source="corrupt"),), EVERY) for i, s in enumerate(sites)]
    other = [Trial(0, "corrupt", (Edit(sites[0], "replace", AT, source="clean"),), EVERY)]
    values = run(executor, model, anatomy, two_streams(), trials + other)
    difference = (values.trials - values.streams["corrupt"]).abs().amax((1, 2, 3)) / scale_of(values)
    assert difference[:-1].max() <= EXACT
    assert difference[-1] > 0.01


@pytest.mark.parametrize("site", [Site("embed", 0), Site("resid_pre", 0), Site("resid_pre", 1), Site("resid_post", 2)])
def test_replacing_everything_gives_the_other_stream(
    family: tuple[PreTrainedModel, Anatomy], executor: str, site: Site
) -> None:
    model, anatomy = family
    trials = [Trial(0, "corrupt", (Edit(site, "replace", ALL, source="clean"),), EVERY)]
    part = [Trial(1, "corrupt", (Edit(site, "replace", AT, source="clean"),), EVERY)]
    values = run(executor, model, anatomy, two_streams(), trials + part)
    difference = (values.trials - values.streams["clean"]).abs().amax((1, 2, 3)) / scale_of(values)
    assert difference[0] <= EXACT
    assert difference[1] > 0.01


def test_prompts_that_a_trial_leaves_out_are_nan_and_prompts_that_it_does_not_touch_are_the_stream(
    family: tuple[PreTrainedModel, Anatomy], executor: str
) -> None:
    model, anatomy = family
    edit = Edit(Site("resid_pre", 1), "zero", ((3,), (), (5, 9)))
    nothing = Trial(1, "corrupt", (), (0, 1))
    values = run(executor, model, anatomy, two_streams(), [Trial(0, "corrupt", (edit,), (0, 1)), nothing])
    stream = values.streams["corrupt"]
    assert values.trials.isnan().flatten(2).all(-1).tolist() == [[False, False, True], [False, False, True]]
    assert not torch.equal(values.trials[0, 0], stream[0])
    assert (values.trials[0, 1] - stream[1]).abs().max() <= EXACT * scale_of(values)
    assert (values.trials[1, :2] - stream[:2]).abs().max() <= EXACT * scale_of(values)


def test_logits_before_the_first_edited_position_are_the_streams(
    family: tuple[PreTrainedModel, Anatomy], executor: str
) -> None:
    model, anatomy = family
    edit = Edit(Site("resid_pre", 0), "zero", ((5,), (9,), (15,)))
    values = run(executor, model, anatomy, two_streams(), [Trial(0, "corrupt", (edit,), EVERY)])
    for prompt, start in enumerate((5, 9, 15)):
        change = (values.trials[0, prompt] - values.streams["corrupt"][prompt]).abs().amax(-1) / scale_of(values)
        assert change[:start].max() <= EXACT
        assert change[start] > 0.01


def test_each_prompt_alone_and_in_any_order_gives_the_same(
    family: tuple[PreTrainedModel, Anatomy], executor: str
) -> None:
    model, anatomy = family
    sites = [s for s in every_site(anatomy) if s.layer == 1]
    together = run(executor, model, anatomy, two_streams(), per_prompt_trials(anatomy, sites, EVERY))
    for order in ((2,), (0,), (2, 0, 1), (1, 1)):
        bucket = Bucket.of(
            {name: tokens[list(order)] for name, tokens in two_streams().tokens.items()},
            torch.arange(LENGTH).expand(len(order), -1),
        )
        some = run(executor, model, anatomy, bucket, per_prompt_trials(anatomy, sites, order))
        difference = (some.trials - together.trials[:, list(order)]).abs().max() / scale_of(together)
        assert difference <= 2e-4


def per_prompt_trials(anatomy: Anatomy, sites: list[Site], order: tuple[int, ...]) -> list[Trial]:
    """Edits that depend on nothing but the prompt itself."""
    positions = tuple(AT[i] for i in order)
    edits = [Edit(site, op, positions, source="clean") for site in sites for op in ("replace", "zero")]
    return [Trial(i, "corrupt", (edit,), tuple(range(len(order)))) for i, edit in enumerate(edits)]


@pytest.mark.parametrize("rows", [1, 7, 64, 100_000])
def test_rows_per_call_do_not_matter(family: tuple[PreTrainedModel, Anatomy], executor: str, rows: int) -> None:
    model, anatomy = family
    trials = sweep(anatomy)[::5]
    values = run(executor, model, anatomy, two_streams(), trials, rows)
    assert deviation(values, run(executor, model, anatomy, two_streams(), trials, 300)) <= 1e-5


def test_noise_at_embed_is_what_adding_it_by_hand_gives(family: tuple[PreTrainedModel, Anatomy], executor: str) -> None:
    model, anatomy = family
    tokens = two_streams().tokens
    noise = torch.zeros(PROMPTS, LENGTH, anatomy.d_model)
    noise[:, 2:5] = torch.randn(PROMPTS, 3, anatomy.d_model, generator=torch.Generator().manual_seed(0))
    noised = Bucket.of({"clean": tokens["clean"], "noised": tokens["clean"]}, noise={"noised": noise})
    by_hand = Edit(Site("embed", 0), "add", ALL, values=noise)
    restore = Edit(Site("resid_pre", 1), "replace", AT, source="clean")
    trials = [Trial(0, "clean", (by_hand,), EVERY), Trial(1, "noised", (restore,), EVERY)]
    trials.append(Trial(2, "clean", (by_hand, restore), EVERY))
    values = run(executor, model, anatomy, noised, trials)
    change = (values.streams["noised"] - values.streams["clean"]).abs().max()
    assert change > 0.01 * scale_of(values)
    assert (values.trials[0] - values.streams["noised"]).abs().max() <= EXACT * scale_of(values)
    assert (values.trials[1] - values.trials[2]).abs().max() <= EXACT * scale_of(values)
    assert (values.trials[1] - values.streams["noised"]).abs().max() > 1e-3 * scale_of(values)


def test_what_is_read_is_indexed_by_prompt_and_read(family: tuple[PreTrainedModel, Anatomy], executor: str) -> None:
    model, anatomy = family
    trials = [Trial(0, "corrupt", (edit_of(anatomy, Site("resid_pre", 1), "scale", 0),), EVERY)]
    everywhere = run(executor, model, anatomy, two_streams(), trials)
    read = torch.tensor([[3, 15], [0, 0], [9, 4]])
    values = run(executor, model, anatomy, Bucket.of(two_streams().tokens, read), trials)
    picked = everywhere.trials[:, torch.arange(PROMPTS)[:, None], read]
    assert (values.trials - picked).abs().max() <= EXACT * scale_of(everywhere)
    last = run(executor, model, anatomy, Bucket.of(two_streams().tokens), trials)
    assert (last.trials - everywhere.trials[:, :, -1:]).abs().max() <= EXACT * scale_of(everywhere)


def test_the_measure_gets_each_rows_own_prompt_and_read(family: tuple[PreTrainedModel, Anatomy], executor: str) -> None:
    model, anatomy = family

    def measure(logits: torch.Tensor, prompt: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        return torch.stack([prompt, read, logits.isfinite().all(-1)], -1)

    trials = [Trial(0, "corrupt", (Edit(Site("resid_pre", 1), "zero", ((3,), (), (5, 9))),), EVERY)]
    values = executor_named(executor, model, anatomy, Settings()).run(two_streams(), trials, measure)
    want = [[[float(prompt), float(read), 1.0] for read in range(LENGTH)] for prompt in range(PROMPTS)]
    assert values.trials[0].tolist() == want
    assert values.streams["clean"].tolist() == want


@pytest.mark.parametrize("length", [1, 2, 3, WINDOW - 1, WINDOW, WINDOW + 1])
def test_short_prompts_and_prompts_of_the_windows_very_length_are_exact(executor: str, length: int) -> None:
    model = build("mistral")
    anatomy, bucket = find_anatomy(model), two_streams(length=length)
    at = ((0,), (length - 1,), ())
    sites = [s for s in every_site(anatomy) if s.layer == 1]
    trials = [Trial(i, "corrupt", (Edit(s, "replace", at, source="clean"),), EVERY) for i, s in enumerate(sites)]
    values = run(executor, model, anatomy, bucket, trials)
    assert deviation(values, run("hooks", model, anatomy, bucket, trials)) <= 1e-5


def test_no_trials_give_the_streams(family: tuple[PreTrainedModel, Anatomy], executor: str) -> None:
    model, anatomy = family
    values = run(executor, model, anatomy, two_streams(), [])
    assert values.trials.shape == (0, PROMPTS, LENGTH, 97)
    with torch.no_grad():
        native = model(input_ids=two_streams().tokens["clean"]).logits
    assert (values.streams["clean"] - native).abs().max() <= EXACT * scale_of(values)
