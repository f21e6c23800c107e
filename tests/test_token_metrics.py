"""Token metrics against float64 sums written from their definitions, on every executor, however the rows are cut."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from benchmarks.tiny import tiny_model, tiny_tokens
from mechinterp_cli import token_metrics
from mechinterp_cli.engine import clean as clean_module
from mechinterp_cli.engine.capture import last_hidden_suffices
from mechinterp_cli.engine.clean import CleanLogits, clean_logits_of
from mechinterp_cli.engine.edits import Bucket, Edit, Site, Trial
from mechinterp_cli.engine.execute import EXECUTORS, executor_named
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.engine.wavefront import Settings, Values
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.methods.job import Job
from mechinterp_cli.metric_names import TOKEN_METRICS
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.token_metrics import (
    TOKEN_LABELS,
    TokenMeasurer,
    both_kinds,
    first_choice_kept,
    metric_names,
    next_token_losses,
    split_name,
)
from tests.engine_trials import logits_measure
from tests.families import build
from tests.models_fixtures import toy
from tests.test_engine_cleanup import hooks_on
from tests.test_engine_patterns import metered

__all__ = ["toy"]

PROMPTS, LENGTH = 3, 12
TOLERANCE = 2e-5
Floats = npt.NDArray[np.float64]


@pytest.fixture(params=["toy", "gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """The shipped toy, learned positions, grouped queries."""
    if request.param != "toy":
        return build(request.param)
    return request.getfixturevalue("toy").model  # type: ignore[no-any-return]  # pytest gives Any


def texts(prompts: int = PROMPTS, length: int = LENGTH, seed: int = 1) -> Tensor:
    """The second half repeats the first but for its last token; so all kinds of predictions are there."""
    half = tiny_tokens(batch=prompts, length=length // 2, seed=seed) % 60
    tokens = torch.cat([half, half], 1)
    tokens[:, -1] = 61
    return tokens


def trials_on(anatomy: Anatomy, tokens: Tensor) -> tuple[Trial, ...]:
    """A head zeroed, an MLP zeroed late, noise early, and the stream as it is."""
    prompts, length = tokens.shape
    every, all_positions = tuple(range(prompts)), (tuple(range(length)),) * prompts
    noise = torch.randn(1, 1, anatomy.d_model, generator=torch.Generator().manual_seed(0))
    edits = [
        (Edit(Site("z", 1), "zero", all_positions, units=(1,)),),
        (Edit(Site("mlp_out", anatomy.n_layers - 1), "zero", ((length // 2,),) * prompts),),
        (Edit(Site("resid_pre", 1), "add", ((1,),) * prompts, values=noise),),
        (Edit(Site("resid_pre", 1), "replace", all_positions, source="clean"),),
    ]
    return tuple(Trial(index, "clean", edit, every) for index, edit in enumerate(edits))


IDENTITY = 3


@dataclass
class Measured:
    """What a measurer gave, and the float64 logits it was given."""

    trials: Tensor
    clean: Tensor
    logits: Values


def measured(
    model: nn.Module,
    tokens: Tensor,
    trials: Sequence[Trial],
    executor: str = "packed",
    names: Sequence[str] = TOKEN_METRICS,
    hold: int = clean_module.HOLD_BYTES,
    **options: Any,
) -> Measured:
    anatomy = find_anatomy(model)
    measurer = TokenMeasurer(names, tokens, CleanLogits(model, anatomy, tokens, hold=hold), **options)
    bucket = Bucket.of({"clean": tokens}, measurer.read)
    run = executor_named(executor, model, anatomy, Settings(rows_per_call=64))
    values = run.run(bucket, trials, measurer.measure)
    return Measured(
        measurer.reduce(values.trials),
        measurer.reduce(values.streams["clean"]),
        run.run(bucket, trials, logits_measure),
    )


# --- the definitions, once more


@torch.no_grad()
def float64_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.double()


def plain(logits: Tensor, clean: Tensor, tokens: Sequence[int]) -> dict[str, list[float]]:
    """Every number at every position of one prompt, from float64 logits [positions, vocab]."""
    found: dict[str, list[float]] = {"loss": [], "kl": [], "top1": []}
    for i in range(len(tokens) - 1):
        log_p, log_clean = logits[i].log_softmax(0), clean[i].log_softmax(0)
        found["loss"].append(-float(log_p[tokens[i + 1]]))
        found["kl"].append(sum(math.exp(a) * (a - b) for a, b in zip(log_clean.tolist(), log_p.tolist(), strict=True)))
        found["top1"].append(float(int(logits[i].argmax()) == int(clean[i].argmax())))
    return found


def plain_metrics(logits: Tensor, clean: Tensor, tokens: Sequence[int]) -> list[float]:
    found = plain(logits, clean, tokens)
    places = range(len(tokens) - 1)
    pairs = [(tokens[i], tokens[i + 1]) for i in places]
    repeated = [found["loss"][i] for i in places if pairs[i] in pairs[:i]]
    first = [found["loss"][i] for i in places if tokens[i + 1] not in tokens[: i + 1]]
    means = [float(np.mean(found[name])) for name in ("loss", "kl", "top1")]
    repeated_loss, first_loss = (float(np.mean(x)) if x else math.nan for x in (repeated, first))
    return [*means, repeated_loss, first_loss, repeated_loss - first_loss]


def deviation(got: Tensor, want: object) -> float:
    return float((got - torch.tensor(want, dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("hold", [0, clean_module.HOLD_BYTES])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_metric_is_what_its_definition_gives(model: nn.Module, executor: str, hold: int) -> None:
    tokens = texts()
    hooks, clean = hooks_on(model), float64_logits(model, tokens)
    found = measured(model, tokens, trials_on(find_anatomy(model), tokens), executor, hold=hold)
    rows = list(zip(clean, tokens.tolist(), strict=True))
    want = [
        [plain_metrics(logits, own, ids) for logits, (own, ids) in zip(trial, rows, strict=True)]
        for trial in found.logits.trials
    ]
    assert found.trials.shape == (4, PROMPTS, len(TOKEN_METRICS))
    assert deviation(found.trials, want) <= TOLERANCE
    assert deviation(found.clean, [plain_metrics(own, own, ids) for own, ids in rows]) <= TOLERANCE
    # The trials do something, so a metric that does not look at them would show.
    kl, top1 = found.trials[:3, :, 1], found.trials[:3, :, 2]
    assert float(kl.max()) > 1e-3
    assert float(top1.min()) < 1
    assert hooks_on(model) == hooks
    assert torch.equal(float64_logits(model, tokens), clean)


@pytest.mark.parametrize("hold", [0, clean_module.HOLD_BYTES])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_without_an_edit_nothing_diverges_and_every_first_choice_stays(
    model: nn.Module, executor: str, hold: int
) -> None:
    tokens = texts()
    trials = (trials_on(find_anatomy(model), tokens)[IDENTITY],)
    found = measured(model, tokens, trials, executor, hold=hold, per_position=True)
    names = metric_names(TOKEN_METRICS, LENGTH, per_position=True)
    for values in (found.clean, found.trials[0]):
        for place, name in enumerate(names):
            if name.startswith("kl"):
                assert float(values[:, place].abs().max()) <= 1e-5, name
            elif name.startswith("top1"):
                assert bool((values[:, place] == 1).all()), name
    assert float((found.clean - found.trials[0]).abs().max()) <= 1e-5


def test_everything_from_another_stream_or_prompt_gives_its_predictions(model: nn.Module) -> None:
    anatomy, tokens, other = find_anatomy(model), texts(), texts(seed=5)
    every, all_positions = tuple(range(PROMPTS)), (tuple(range(LENGTH)),) * PROMPTS
    last = Site("resid_post", anatomy.n_layers - 1)
    shift = (1, 2, 0)
    trials = (
        Trial(0, "clean", (Edit(last, "replace", all_positions, source="other"),), every),
        Trial(1, "clean", (Edit(last, "replace", all_positions, source="clean", source_prompts=shift),), every),
    )
    measurer = TokenMeasurer(TOKEN_METRICS, tokens, CleanLogits(model, anatomy, tokens))
    bucket = Bucket.of({"clean": tokens, "other": other}, measurer.read)
    values = executor_named("packed", model, anatomy, Settings()).run(bucket, trials, measurer.measure)
    clean, foreign = float64_logits(model, tokens), float64_logits(model, other)
    got = measurer.reduce(values.trials)
    ids = tokens.tolist()
    assert deviation(got[0], [plain_metrics(foreign[i], clean[i], ids[i]) for i in every]) <= TOLERANCE
    assert deviation(got[1], [plain_metrics(clean[shift[i]], clean[i], ids[i]) for i in every]) <= TOLERANCE
    assert float((got[0] - measurer.reduce(values.streams["other"])).abs().max()) <= TOLERANCE
    assert float(got[:, :, 1].min()) > 1e-3


# --- rows in any order, in any company


def random_rows(prompts: int = 4, length: int = 9, vocab: int = 31) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, and logits of all rows with their prompts and reads."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, vocab, (prompts, length), generator=generator)
    prompt, read = (x.flatten() for x in torch.meshgrid(torch.arange(prompts), torch.arange(length - 1), indexing="ij"))
    return tokens, torch.randn(len(prompt), vocab, generator=generator), prompt, read


def llama_measurer(tokens: Tensor, hold: int) -> tuple[nn.Module, TokenMeasurer]:
    model = build("llama")
    return model, TokenMeasurer(TOKEN_METRICS, tokens, CleanLogits(model, find_anatomy(model), tokens, hold=hold))


@pytest.mark.parametrize("hold", [0, 2**20])
@pytest.mark.parametrize("rows", [1, 5, 10**6])
def test_numbers_do_not_depend_on_how_rows_are_cut_or_ordered(
    monkeypatch: pytest.MonkeyPatch, hold: int, rows: int
) -> None:
    tokens, logits, prompt, read = random_rows(vocab=97)
    _, measurer = llama_measurer(tokens, hold)
    whole = measurer.measure(logits, prompt, read)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(token_metrics, "CPU_CHUNK_BYTES", rows * 97 * 4)
    cut = measurer.measure(logits[order], prompt[order], read[order])
    assert torch.equal(cut[:, [0, 2]], whole[order][:, [0, 2]])
    # Exponentials are taken over all rows of a chunk, and a reference that is made again is made in other batches.
    assert float((cut - whole[order]).abs().max()) <= 1e-5
    assert float((whole[1:] - whole[:-1]).abs().min(0).values[0]) > 1e-6, "rows that are all the same prove nothing"


@pytest.mark.parametrize("hold", [0, clean_module.HOLD_BYTES])
def test_a_prompt_alone_gives_the_same_metrics(hold: int) -> None:
    model, tokens = build("llama"), texts()
    anatomy = find_anatomy(model)
    together = measured(model, tokens, trials_on(anatomy, tokens), hold=hold).trials
    for place in range(PROMPTS):
        own = tokens[place : place + 1]
        alone = measured(model, own, trials_on(anatomy, own), hold=hold).trials
        assert float((alone[:, 0] - together[:, place]).abs().max()) <= TOLERANCE
    assert float((together[:, 0] - together[:, 1]).abs().max()) > 1e-3


def test_copies_for_draws_share_one_reference() -> None:
    model, tokens = build("llama"), texts()
    anatomy, copies = find_anatomy(model), texts().repeat_interleave(5, 0)
    one, five = (CleanLogits(model, anatomy, ids) for ids in (tokens, copies))
    assert one.held_bytes == five.held_bytes == PROMPTS * (LENGTH - 1) * 97 * 4
    got = measured(model, copies, trials_on(anatomy, copies)).trials
    want = measured(model, tokens, trials_on(anatomy, tokens)).trials.repeat_interleave(5, 1)
    assert float((got - want).abs().max()) <= TOLERANCE


# --- means, positions, lengths


def test_means_are_over_the_positions_that_count_and_nan_where_there_are_none() -> None:
    tokens = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5], [7, 7, 7, 7, 7]])
    measurer = TokenMeasurer(["loss_gap", "repeated_loss", "first_loss", "loss"], tokens)
    losses = torch.tensor([[1.0, 2, 4, 8], [1, 2, 4, 8], [1, 2, 4, 8]], dtype=torch.float64)
    # Repeated: 1→2 at 2 and 2→1 at 3; in the third 7→7 from its second occurrence on.
    want = [[5.0, 6.0, 1.0, 3.75], [math.nan, math.nan, 3.75, 3.75], [math.nan, 14 / 3, math.nan, 3.75]]
    got = measurer.reduce(losses[..., None])
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), equal_nan=True)
    assert [both_kinds(row) for row in tokens.tolist()] == [True, False, False]


def test_a_loss_that_is_nan_shows_only_in_the_means_it_belongs_to() -> None:
    tokens = torch.tensor([[1, 2, 1, 2, 1]])
    measurer = TokenMeasurer(["loss", "repeated_loss", "first_loss", "loss_gap"], tokens)
    got = measurer.reduce(torch.tensor([[1.0, math.nan, 4, 8]], dtype=torch.float64)[..., None])[0]
    assert got.isnan().tolist() == [True, False, False, False]
    got = measurer.reduce(torch.tensor([[1.0, 2, math.nan, 8]], dtype=torch.float64)[..., None])[0]
    assert got.isnan().tolist() == [True, True, False, True]


def test_positions_are_those_of_the_predicted_token() -> None:
    model, tokens = build("gpt2"), texts()
    names = ("top1", "loss_gap", "loss", "kl")
    found = measured(model, tokens, trials_on(find_anatomy(model), tokens), names=names, per_position=True)
    columns = metric_names(names, LENGTH, per_position=True)
    assert columns[:4] == names
    assert columns[4:] == tuple(f"{name}@{at}" for name in ("top1", "loss", "kl") for at in range(1, LENGTH))
    clean = float64_logits(model, tokens)
    for prompt, ids in enumerate(tokens.tolist()):
        want = plain(found.logits.trials[1][prompt], clean[prompt], ids)
        for place, column in enumerate(columns):
            name, position = split_name(column)
            if position is not None:
                value = float(found.trials[1, prompt, place])
                assert value == pytest.approx(want[name][position - 1], abs=TOLERANCE), column
    # Before the edited position nothing changed; at it something did.
    kl = found.trials[1][:, [columns.index(f"kl@{at}") for at in range(1, LENGTH)]]
    assert float(kl[:, : LENGTH // 2].abs().max()) <= 1e-5
    assert float(kl[:, LENGTH // 2].min()) > 1e-5


def test_buckets_of_unequal_length_give_as_many_metrics_in_one_job() -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    buckets = [texts(), texts(2, 8, seed=4)]
    measurers = [
        TokenMeasurer(("loss", "kl"), tokens, clean, longest=LENGTH, per_position=True)
        for tokens, clean in zip(buckets, clean_logits_of(model, anatomy, buckets), strict=True)
    ]
    works = tuple(
        Work(Bucket.of({"clean": tokens}, one.read), trials_on(anatomy, tokens))
        for tokens, one in zip(buckets, measurers, strict=True)
    )
    job = Job(
        trials=4,
        prompts=5,
        members=[[0, 1, 2], [3, 4]],
        works=works,
        measures=tuple(one.measure for one in measurers),
        metrics=measurers[0].metrics,
        reduces=tuple(one.reduce for one in measurers),
    )
    assert measurers[0].metrics == measurers[1].metrics
    executor = executor_named("packed", model, anatomy, Settings())
    for number, (work, measure) in enumerate(zip(works, job.measures, strict=True)):
        values = job.reduced(number, executor.run(work.bucket, work.trials, measure).trials)
        assert values.shape == (4, work.bucket.size, len(job.metrics))
        present = [split_name(name)[1] is None or int(name.split("@")[1]) < work.bucket.length for name in job.metrics]
        assert (~np.isnan(values) == np.array(present)).all()
        # The mean is over the prompt's own positions.
        places = [i for i, name in enumerate(job.metrics) if name.startswith("loss@") and present[i]]
        np.testing.assert_allclose(values[..., places].mean(-1), values[..., 0], atol=1e-12)
    assert len(job.metrics) == 2 + 2 * (LENGTH - 1)


def test_only_what_is_wanted_is_measured_and_without_kl_and_top1_no_reference_is_needed() -> None:
    tokens, logits, prompt, read = random_rows()
    assert TokenMeasurer(["first_loss"], tokens).measured == ("loss",)
    assert TokenMeasurer(["top1"], tokens).measured == ("top1",)
    assert TokenMeasurer(["kl", "loss_gap"], tokens).measured == ("loss", "kl")
    assert TokenMeasurer(["loss"], tokens).measure(logits, prompt, read).shape == (32, 1)
    for name in ("kl", "top1"):
        with pytest.raises(ValueError, match=f"{name} needs the unedited model's predictions"):
            TokenMeasurer([name], tokens).measure(logits, prompt, read)


def test_unknown_names_and_a_longest_that_is_too_short_are_refused() -> None:
    tokens = random_rows()[0]
    with pytest.raises(UserError) as caught:
        TokenMeasurer(["loss", "logit_diff"], tokens)
    assert str(caught.value) == (
        "metrics: 'logit_diff' is not a metric of whole texts\n"
        "Choose from loss, kl, top1, repeated_loss, first_loss, loss_gap."
    )
    with pytest.raises(ValueError, match="9 tokens are longer than the longest, 8"):
        TokenMeasurer(["loss"], tokens, longest=8)
    assert set(TOKEN_LABELS) == set(TOKEN_METRICS)


def test_a_prompt_of_one_token_predicts_nothing() -> None:
    model, tokens = build("llama"), torch.tensor([[5], [6]])
    measurer = TokenMeasurer(
        TOKEN_METRICS, tokens, CleanLogits(model, find_anatomy(model), tokens), longest=4, per_position=True
    )
    assert measurer.read.shape == (2, 0)
    got = measurer.reduce(torch.zeros(7, 2, 0, 3, dtype=torch.float64))
    assert got.shape == (7, 2, 6 + 3 * 3)
    assert bool(got.isnan().all())


# --- rounding, ties, half precision, what is not finite


def test_ties_within_rounding_count_as_agreement_and_no_more() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0005], [1.0, 3.0, 3.002], [3.1, 3.0, -torch.inf]])
    choice, slack = torch.ones(4, dtype=torch.long), torch.full((4,), 1e-3)
    assert first_choice_kept(logits, choice, slack).tolist() == [1, 1, 0, 0]
    assert first_choice_kept(logits, choice, torch.zeros(4)).tolist() == [1, 0, 0, 0]
    odd = torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, torch.inf, 0.0], [torch.inf, 1.0, 0.0]])
    got = first_choice_kept(odd, choice[:3], slack[:3])
    assert math.isnan(float(got[0]))
    assert got[1:].tolist() == [1, 0]


def test_slack_is_a_share_of_the_rows_own_largest_finite_logit() -> None:
    model = build("llama")
    tokens = texts()
    model.lm_head.register_forward_hook(lambda _m, _a, out: out.masked_fill(torch.arange(97) == 3, -torch.inf))
    clean = CleanLogits(model, find_anatomy(model), tokens)
    prompt, read = torch.tensor([0, 1, 2]), torch.tensor([0, 5, 10])
    choice, slack = clean.first_choice(prompt, read)
    rows = float64_logits(model, tokens)[prompt, read]
    assert choice.tolist() == rows.argmax(-1).tolist()
    want = 1e-4 * rows.abs().masked_fill(rows.isinf(), 0).amax(-1)
    torch.testing.assert_close(slack.double(), want, rtol=1e-4, atol=0)
    # What the model forbids weighs nothing in the divergence.
    measurer = TokenMeasurer(["kl", "top1", "loss"], tokens, clean)
    got = measurer.measure(rows.float(), prompt, read)
    assert float(got[:, 1].abs().max()) <= 1e-5
    assert got[:, 2].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hold", [0, 2**20])
def test_half_precision_is_measured_in_float32_and_the_stream_keeps_its_first_choices(
    dtype: torch.dtype, hold: int
) -> None:
    model, tokens = build("llama").to(dtype), texts(8, 24)  # type: ignore[arg-type]  # transformers annotates `to` as bound
    found = measured(model, tokens, trials_on(find_anatomy(model), tokens), hold=hold)
    clean = float64_logits(model, tokens)
    for place, ids in enumerate(tokens.tolist()):
        want = plain_metrics(found.logits.trials[0][place], clean[place], ids)
        assert float(found.trials[0, place, 0]) == pytest.approx(want[0], abs=TOLERANCE)
        assert float(found.trials[0, place, 1]) == pytest.approx(want[1], abs=2e-2)
    assert bool((found.clean[:, 2] == 1).all())
    assert float(found.clean[:, 1].abs().max()) < 0.1 * float(found.trials[0, :, 1].mean())
    every, at = torch.arange(8), torch.full((8,), 20)
    _, slack = CleanLogits(model, find_anatomy(model), tokens, hold=hold).first_choice(every, at)
    largest = clean[every, at].abs().amax(-1)
    torch.testing.assert_close(slack.double(), 3 * torch.finfo(dtype).eps * largest, rtol=0.02, atol=0)


def test_float64_logits_are_measured_in_float64() -> None:
    tokens, logits, prompt, read = random_rows()
    wide = logits.double() * 10
    want = -wide.log_softmax(-1).gather(1, tokens[prompt, read + 1][:, None])[:, 0]
    measurer = TokenMeasurer(["loss"], tokens)
    assert float((measurer.measure(wide, prompt, read)[:, 0] - want).abs().max()) <= 1e-12
    assert float((measurer.measure(wide.float(), prompt, read)[:, 0] - want).abs().max()) > 1e-9
    assert next_token_losses(wide.half(), tokens[prompt, read + 1]).dtype == torch.float32


def test_nan_in_a_row_is_nan_in_all_of_its_numbers_and_nowhere_else() -> None:
    tokens, logits, prompt, read = random_rows(vocab=97)
    _, measurer = llama_measurer(tokens, 0)
    logits[7, 11] = torch.nan
    got = measurer.measure(logits, prompt, read)
    assert got.isnan().all(1).nonzero().tolist() == [[7]]
    assert got.isnan().any(1).nonzero().tolist() == [[7]]


# --- where the reference comes from


def looking_back() -> tuple[nn.Module, Anatomy]:
    """A model whose norm after the last layer adds what left the first."""
    model = build("llama")
    anatomy = find_anatomy(model)
    early: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda _m, _a, out: early.append(out))
    model.model.norm.register_forward_pre_hook(lambda _m, args: (args[0] + early[-1],))
    return model, anatomy


@pytest.mark.parametrize("hold", [0, clean_module.HOLD_BYTES])
def test_a_model_that_looks_back_after_its_last_layer_is_measured_by_whole_passes(hold: int) -> None:
    model, anatomy = looking_back()
    tokens = texts()
    assert not last_hidden_suffices(model, anatomy, tokens[:1])
    measurer = TokenMeasurer(TOKEN_METRICS, tokens, CleanLogits(model, anatomy, tokens, hold=hold))
    trials = trials_on(anatomy, tokens)
    run = executor_named("hooks", model, anatomy, Settings())
    bucket = Bucket.of({"clean": tokens}, measurer.read)
    values, logits = run.run(bucket, trials, measurer.measure), run.run(bucket, trials, logits_measure)
    clean = float64_logits(model, tokens)
    rows = zip(logits.trials[0], clean, tokens.tolist(), strict=True)
    want = [plain_metrics(own, reference, ids) for own, reference, ids in rows]
    assert deviation(measurer.reduce(values.trials)[0], want) <= TOLERANCE
    stream = measurer.reduce(values.streams["clean"])
    assert float(stream[:, 1].abs().max()) <= 1e-5
    assert bool((stream[:, 2] == 1).all())


@pytest.mark.parametrize("make", [lambda: (m := build("llama"), find_anatomy(m)), looking_back])
def test_a_reference_that_comes_out_otherwise_the_second_time_stops_the_run(
    make: Callable[[], tuple[nn.Module, Anatomy]],
) -> None:
    model, anatomy = make()
    tokens, prompt, read = texts(), torch.tensor([0, 1]), torch.tensor([3, 4])
    clean = CleanLogits(model, anatomy, tokens, hold=0)
    held = CleanLogits(model, anatomy, tokens)
    same = clean.reference(prompt, read)
    assert float((same.logits - held.reference(prompt, read).logits).abs().max()) <= 1e-5
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: out * 1.01)  # type: ignore[operator]
    with pytest.raises(RunError, match=r"the unedited model's logits moved by .* when they were made again"):
        clean.reference(prompt, read)
    handle.remove()
    clean.reference(prompt, read)


# --- memory


VOCAB, LONG = 4000, 40


def big() -> tuple[nn.Module, Anatomy, Tensor]:
    model = tiny_model("llama", overrides={"vocab_size": VOCAB})
    return model, find_anatomy(model), texts(6, LONG)


def test_logits_of_all_positions_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, anatomy, tokens = big()
    limit = VOCAB * 4 * 40  # more than the weights of the head
    whole = 6 * (LONG - 1) * VOCAB * 4
    monkeypatch.setattr("mechinterp_cli.engine.wavefront.CPU_LOGITS_BYTES", limit)
    monkeypatch.setattr(token_metrics, "CPU_CHUNK_BYTES", limit)
    peaks = {}
    for hold in (whole, whole - 1):
        with metered() as meter:
            clean = CleanLogits(model, anatomy, tokens, hold=hold)
            measurer = TokenMeasurer(TOKEN_METRICS, tokens, clean)
            bucket = Bucket.of({"clean": tokens}, measurer.read)
            run = executor_named("packed", model, anatomy, Settings())
            run.run(bucket, trials_on(anatomy, tokens), measurer.measure)
        assert clean.held_bytes == (whole if hold == whole else 0)
        peaks[hold] = meter.largest
    assert peaks[whole] == whole, "the measure would not see logits that are held"
    assert peaks[whole - 1] <= limit


def test_buckets_share_what_may_be_held() -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    buckets = [texts(), texts(1, 6), texts(seed=9)]
    size = PROMPTS * (LENGTH - 1) * 97 * 4
    held = [clean.held_bytes for clean in clean_logits_of(model, anatomy, buckets, hold=size + 5 * 97 * 4)]
    assert held == [size, 5 * 97 * 4, 0]
    held = [clean.held_bytes for clean in clean_logits_of(model, anatomy, buckets, hold=size - 1)]
    assert held == [0, 5 * 97 * 4, 0]
    assert sum(clean.held_bytes for clean in clean_logits_of(model, anatomy, buckets)) == 2 * size + 5 * 97 * 4


def test_the_toy_repeats_better_than_it_predicts_what_is_new(toy: LoadedModel) -> None:
    half = tiny_tokens(batch=4, length=16, seed=2) % 60
    tokens = torch.cat([half, half], 1)
    found = measured(toy.model, tokens, (), names=("loss_gap", "repeated_loss", "first_loss"))
    assert float(found.clean[:, 0].max()) < -1
