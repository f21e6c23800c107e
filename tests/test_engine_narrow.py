"""Some tokens' logits alone are the columns of the whole, stand only where proved, and leave no trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.tiny import tiny_model
from mechinterp_cli.cli.main import main
from mechinterp_cli.engine import wavefront
from mechinterp_cli.engine.execute import executor_named
from mechinterp_cli.engine.narrow import Head, prove_head, whole_reason
from mechinterp_cli.engine.plan import Plan, Work, cost
from mechinterp_cli.engine.proof import Proof, prove
from mechinterp_cli.engine.wavefront import Settings, Values
from mechinterp_cli.methods.job import Job, SetMeasure
from mechinterp_cli.methods.measure import Metrics
from mechinterp_cli.metrics import METRICS, Measurer
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.head import narrow_head, whole_head_reason
from mechinterp_cli.models.walk import forward
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.tasks.prompts import Prompt
from tests.engine_trials import deviation, logits_measure, sweep, two_streams
from tests.experiments import run_patch
from tests.families import FAMILIES, build

TOKENS = (0, 3, 17, 18, 60, 96)
EXACT = 1e-6
"""Rounding in float32, as a share of the logits' scale: a product of another shape."""
SITES = [{"kind": "resid_pre", "layers": "all", "positions": "each"}]


def model_of(name: str) -> PreTrainedModel:
    """A family's tiny model; `tied`: a llama whose embedding is its head's weight."""
    return tiny_model("llama", layers=3, overrides={"tie_word_embeddings": True}) if name == "tied" else build(name)


def is_tied(model: PreTrainedModel) -> bool:
    return head_of(model).weight is model.get_input_embeddings().weight


def head_of(model: nn.Module) -> nn.Linear:
    head = model.get_submodule("lm_head" if hasattr(model, "lm_head") else "embed_out")
    assert isinstance(head, nn.Linear)
    return head


def run(model: nn.Module, anatomy: Anatomy, executor: str, tokens: tuple[int, ...] | None, **given: Any) -> Values:
    worker = executor_named(executor, model, anatomy, Settings(rows_per_call=256, tokens=tokens))
    return worker.run(two_streams(), sweep(anatomy)[::3], given.get("measure", logits_measure))


def columns(values: Values) -> Values:
    """The tokens' columns of whole logits."""
    chosen = list(TOKENS)
    return Values(values.trials[..., chosen], {name: x[..., chosen] for name, x in values.streams.items()})


@contextmanager
def widths(model: nn.Module) -> Iterator[set[int]]:
    """How many logits the head computes of each row, over all its calls."""
    seen: set[int] = set()
    handle = head_of(model).register_forward_hook(lambda _m, _a, out: seen.add(out.shape[-1]))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "gpt_neox", "gemma2", "granite", "cohere", "phi", "mixtral"])
@pytest.mark.parametrize("executor", ["packed", "resume"])
def test_some_tokens_logits_are_the_columns_of_the_whole(name: str, executor: str) -> None:
    model = model_of(name)
    anatomy = find_anatomy(model)
    whole = run(model, anatomy, executor, None)
    with widths(model) as seen:
        narrow = run(model, anatomy, executor, TOKENS)
    assert seen == {len(TOKENS)}, "no row of the whole vocabulary was computed"
    assert deviation(narrow, columns(whole)) <= EXACT
    moved = (whole.trials - whole.streams["corrupt"])[..., list(TOKENS)].nan_to_num().abs().amax((1, 2, 3))
    assert (moved > 0).double().mean() > 0.9, "the trials change these logits, so that wrong ones would show"


def test_the_families_have_what_is_special_about_heads() -> None:
    assert [is_tied(model_of(name)) for name in ("tied", "gpt2", "gemma2", "llama")] == [True, True, True, False]
    assert head_of(build("phi")).bias is not None
    assert FAMILIES["gemma2"].overrides["final_logit_softcapping"] == 3.0
    assert build("granite").config.logits_scaling != 1
    assert build("cohere").config.logit_scale != 1


@pytest.mark.parametrize("name", ["bloom", "mamba", "deepseek_v32"])
def test_layer_resume_of_other_stacks(name: str) -> None:
    model = build(name)
    anatomy = find_anatomy(model)
    with widths(model) as seen:
        narrow = run(model, anatomy, "resume", TOKENS)
    assert seen == {len(TOKENS)}
    assert deviation(narrow, columns(run(model, anatomy, "resume", None))) <= EXACT


def test_small_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    whole = run(model, anatomy, "packed", TOKENS)
    monkeypatch.setattr(wavefront, "CPU_LOGITS_BYTES", 4 * 3 * anatomy.d_model * 7)
    rows: list[int] = []

    def measure(logits: Tensor, prompt: Tensor, read: Tensor) -> Tensor:
        rows.append(len(logits))
        return logits_measure(logits, prompt, read)

    assert deviation(run(model, anatomy, "packed", TOKENS, measure=measure), whole) <= EXACT
    assert max(rows) == 7


# What is left behind.


def assert_untouched(model: nn.Module, parameters: dict[str, nn.Parameter], before: Tensor) -> None:
    now = dict(model.named_parameters(remove_duplicate=False))
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in now)
    assert torch.equal(forward(model, two_streams().tokens["clean"]), before)


@pytest.mark.parametrize("name", ["tied", "phi"])
def test_an_exception_inside_leaves_the_model_as_it_was(name: str) -> None:
    model = model_of(name)
    anatomy = find_anatomy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = forward(model, two_streams().tokens["clean"])

    def fail(logits: Tensor, _prompt: Tensor, _read: Tensor) -> Tensor:
        assert logits.shape[1] == len(TOKENS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, anatomy, "packed", TOKENS, measure=fail)
    assert_untouched(model, parameters, before)
    with pytest.raises(IndexError), narrow_head(model, torch.tensor([3, 97])):
        pass
    assert_untouched(model, parameters, before)


def test_the_embedding_that_is_tied_to_the_head_stays_whole() -> None:
    model = model_of("tied")
    with narrow_head(model, torch.tensor(TOKENS)):
        assert head_of(model).weight.shape[0] == len(TOKENS)
        assert next(model.get_input_embeddings().parameters()).shape[0] == 97
        assert forward(model, torch.tensor([[96, 5, 50]])).shape == (1, 3, len(TOKENS))


# The proof.


@pytest.fixture(scope="module")
def proved() -> tuple[PreTrainedModel, Anatomy, Work, Proof]:
    model = build("llama")
    anatomy = find_anatomy(model)
    work = Work(two_streams(), tuple(sweep(anatomy)[::7]))
    return model, anatomy, work, prove(model, anatomy, [work])


Proved = tuple[PreTrainedModel, Anatomy, Work, Proof]


def head(proved: Proved, tokens: tuple[int, ...] | None = TOKENS) -> Head:
    model, anatomy, work, proof = proved
    return prove_head(model, anatomy, [work], tokens, proof, Settings())


def test_the_proof_tells_how_far_the_columns_are_from_the_whole(proved: Proved) -> None:
    found = head(proved)
    assert (found.columns, found.vocabulary, found.reason) == (len(TOKENS), 97, None)
    assert found.deviation is not None
    assert found.deviation <= EXACT


@pytest.mark.parametrize("shift", [1, 2])
def test_columns_in_another_order_are_refused(proved: Proved, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def wrong(model: nn.Module, tokens: Tensor | None) -> Iterator[None]:
        with narrow_head(model, None if tokens is None else tokens.roll(shift)):
            yield

    monkeypatch.setattr(wavefront, "narrow_head", wrong)
    found = head(proved)
    assert found.columns is None
    assert found.deviation is not None
    assert found.deviation > 0.01
    assert "deviate by" in str(found.reason)


def test_a_deviation_just_beyond_the_tolerance_is_refused(proved: Proved) -> None:
    model, anatomy, work, proof = proved
    at = head(proved).deviation
    assert at is not None
    assert head((model, anatomy, work, replace(proof, tolerance=at))).columns == len(TOKENS)
    assert at == 0 or head((model, anatomy, work, replace(proof, tolerance=at / 2))).columns is None


def treat_logits(model: nn.Module, treat: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the model do something to its logits after the head."""
    own = type(model).forward

    @wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = own(self, *args, **kwargs)
        out.logits = treat(out.logits)
        return out

    monkeypatch.setattr(type(model), "forward", forward)


def test_a_model_that_scales_tokens_after_the_head_keeps_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, factors = build("llama"), torch.linspace(0.5, 1.5, 97)
    treat_logits(model, lambda logits: logits * factors[: logits.shape[-1]], monkeypatch)
    anatomy = find_anatomy(model)
    work = Work(two_streams(), tuple(sweep(anatomy)[::7]))
    found = prove_head(model, anatomy, [work], TOKENS, prove(model, anatomy, [work]), Settings())
    assert found.columns is None
    assert "deviate by" in str(found.reason)


@pytest.mark.parametrize(
    ("treat", "reason"),
    [
        (lambda logits: logits + 0 * logits[..., torch.tensor([96])], "IndexError"),
        (lambda logits: logits.nan_to_num() + (torch.nan if logits.shape[-1] != 97 else 0), "not finite"),
        (lambda logits: torch.nn.functional.pad(logits, (0, 97 - logits.shape[-1])), "not that of the logits"),
    ],
)
def test_models_that_need_all_logits_keep_their_head_whole(
    proved: Proved, treat: Callable[[Tensor], Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    treat_logits(proved[0], treat, monkeypatch)
    found = head(proved)
    assert found.columns is None
    assert reason in str(found.reason)


def test_what_the_measures_ask_for_decides(proved: Proved) -> None:
    model, anatomy, _, proof = proved
    assert head(proved, None).reason == "a metric looks at the whole vocabulary"
    assert head(proved, tuple(range(25))).reason == "25 of 97 tokens are looked at"
    assert head(proved, tuple(range(24))).columns == 24
    assert head(proved, (3, 97)).reason == "an answer is outside the model's vocabulary"
    assert whole_reason(model, anatomy, TOKENS, "hooks") == "plain hooks make whole passes"
    assert head((*proved[:3], replace(proof, executor="hooks"))).columns is None


def test_heads_that_are_no_plain_linear_map_stay_whole() -> None:
    model = build("llama")
    plain = head_of(model)
    assert whole_head_reason(model, 97) is None

    class Quantised(nn.Linear):
        """Stands for a quantised map."""

    other = Quantised(plain.in_features, plain.out_features, bias=False)
    model.lm_head = other
    assert whole_head_reason(model, 97) == "the output head is no plain linear map but Quantised"
    model.lm_head = plain
    plain.__dict__["forward"] = plain.forward
    assert whole_head_reason(model, 97) == "the output head carries hooks"
    del plain.__dict__["forward"]
    handle = plain.register_forward_hook(lambda *_: None)
    assert whole_head_reason(model, 97) == "the output head carries hooks"
    handle.remove()
    assert whole_head_reason(model, 96) == "the output head has 97 rows for 96 logits"
    assert "NoneType" in str(whole_head_reason(nn.Identity(), 97))
    assert whole_head_reason(model, 97) is None


# What metrics look at.


def prompts() -> list[Prompt]:
    sets = [((5,), (7, 9)), ((0, 60), (3,)), ((96,), (0,))]
    return [Prompt("", (1, 2), answer, "", wrong_answer=wrong) for answer, wrong in sets]


def test_the_logit_difference_of_columns_is_that_of_the_whole() -> None:
    logits = torch.randn(200, 97, generator=torch.Generator().manual_seed(0)) * 5
    logits[4, 60] = torch.nan
    index = torch.arange(200) % 3
    measurer = Measurer(["logit_diff"], prompts())
    tokens = measurer.tokens(torch.arange(3))
    assert tokens is not None
    assert tokens.tolist() == [0, 3, 5, 7, 9, 60, 96]
    whole, narrow = measurer(logits, index), measurer.on_columns(tokens)(logits[:, tokens], index)
    assert torch.equal(whole.nan_to_num(99), narrow.nan_to_num(99))
    assert whole.isnan().flatten().nonzero().tolist() == [[4]]


def test_a_token_that_is_not_among_the_columns_is_an_error_and_no_other_token() -> None:
    measurer = Measurer(["logit_diff"], prompts())
    some = measurer.tokens(torch.tensor([0]))
    assert some is not None
    assert some.tolist() == [5, 7, 9]
    narrow = measurer.on_columns(some)
    assert narrow(torch.randn(1, 3), torch.tensor([0])).isfinite().all()
    with pytest.raises(RuntimeError, match="index"):
        narrow(torch.randn(1, 3), torch.tensor([1]))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_only_metrics_that_say_so_do_without_the_other_tokens(name: str) -> None:
    logits = torch.randn(3, 97, generator=torch.Generator().manual_seed(1))
    others = logits.clone()
    chosen = [0, 3, 5, 7, 9, 60, 96]
    mask = torch.ones(97, dtype=torch.bool)
    mask[chosen] = False
    others[:, mask] += 20.0
    measurer, index = Measurer([name], prompts(), logits), torch.arange(3)
    moved = not torch.equal(measurer(logits, index), measurer(others, index))
    if METRICS[name].whole_vocabulary:
        assert measurer.tokens(index) is None
        assert Measurer(["logit_diff", name], prompts(), logits).tokens(index) is None
        assert moved or name == "accuracy", "a metric that needs them all moves with them"
    else:
        assert not moved
        assert measurer.tokens(index) is not None


def job(names: list[str]) -> Job:
    measurer = Measurer(names, prompts(), torch.zeros(3, 97))
    measures = tuple(Metrics(tuple(names), measurer).on(members) for members in ([0, 0, 2], [1]))
    return Job(0, 3, ((0, 2), (1,)), (), measures, tuple(names))


def test_a_job_looks_at_the_tokens_of_all_its_prompts_or_at_all() -> None:
    assert job(["logit_diff"]).tokens == (0, 3, 5, 7, 9, 60, 96)
    assert job(["logit_diff", "prob"]).tokens is None
    losses = replace(job(["logit_diff"]), measures=(*job(["logit_diff"]).measures, logits_measure))
    assert losses.tokens is None, "what is no measure of answers may look at any token"


def test_a_job_measures_what_its_plan_computes() -> None:
    whole = job(["logit_diff"])
    logits, prompt = torch.randn(4, 97), torch.tensor([0, 1, 2, 0])
    tokens = list(whole.tokens or ())
    assert whole.planned(Plan("packed", 64, ())) is whole
    (measure, _), (narrow, _) = whole.measures, whole.planned(Plan("packed", 64, (), len(tokens))).measures
    assert isinstance(narrow, SetMeasure)
    assert torch.equal(narrow(logits[:, tokens], prompt, prompt), measure(logits, prompt, prompt))


def test_fewer_columns_are_less_work(proved: Proved) -> None:
    model, anatomy, work, _ = proved
    whole, narrow = cost(model, anatomy, work, "packed"), cost(model, anatomy, work, "packed", len(TOKENS))
    saved = 2 * (97 - len(TOKENS)) * anatomy.d_model * whole.items * work.bucket.read.shape[1]
    assert whole.flops - narrow.flops == saved


# Runs.


def part_of(run: Path) -> dict[str, Any]:
    (part,) = Manifest.read(run).engine["parts"]
    return dict(part)


def reproduced(path: Path, out: Path) -> Path:
    assert main(["reproduce", str(path), "--out", str(out), "-q"]) == 0
    return next(out.iterdir())


def test_a_run_computes_the_answers_columns_and_is_repeated_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = run_patch(tmp_path, {"sites": SITES}, metrics=["logit_diff"])
    part, rows = part_of(first.path), first.table("prompts")
    rows = rows[rows["stream"] == "clean"]
    tokens = {int(i) for name in ("answer_ids", "wrong_answer_ids") for ids in rows[name] for i in ids}
    assert part["plan"]["columns"] == part["head"]["columns"] == len(tokens)
    assert part["head"]["deviation"] <= EXACT
    again = reproduced(first.path, tmp_path / "again")
    assert part_of(again)["plan"] == part["plan"]
    assert (again / "results.parquet").read_bytes() == (first.path / "results.parquet").read_bytes()


def test_metrics_of_the_whole_vocabulary_and_plans_of_older_runs_compute_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    both = run_patch(tmp_path, {"sites": SITES}, metrics=["logit_diff", "prob"])
    assert part_of(both.path)["head"] == asdict(
        Head(None, part_of(both.path)["head"]["vocabulary"], reason="a metric looks at the whole vocabulary")
    )
    some = run_patch(tmp_path, {"sites": SITES}, metrics=["logit_diff"])
    manifest = Manifest.read(some.path)
    assert manifest.engine["parts"][0]["plan"].pop("columns") is not None
    del manifest.engine["parts"][0]["head"]
    manifest.write(some.path)
    again = part_of(reproduced(some.path, tmp_path / "again"))
    assert again["plan"]["columns"] is None
    assert again["head"]["reason"] == "the recorded plan computes all logits"
