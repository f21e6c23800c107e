"""Attribution to tokens: against autograd and plain passes on embeddings; exact, complete or refused where it must."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from benchmarks.tiny import tiny_model
from mechinterp_cli.cli.main import main
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import ExitCode, UserError
from mechinterp_cli.methods.attribute import columns
from mechinterp_cli.methods.attribute.input_rows import Attributed, Whole, span_rows
from mechinterp_cli.methods.attribute.inputs import ATTENTION, check_inputs, input_plan, input_tables
from mechinterp_cli.methods.attribute.options import AttributeOptions, InputOptions
from mechinterp_cli.methods.bench import Bench, Tally
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.methods.measure import build_prompts, clean_logits, needs_clean_logits
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.checkpoints import Moment
from mechinterp_cli.models.load import load_model
from mechinterp_cli.models.loaded import LoadedModel, ModelSource
from mechinterp_cli.runs.outcome import SilentProgress
from mechinterp_cli.runs.recorder import record
from mechinterp_cli.runs.schema import validate
from mechinterp_cli.runs.tables import to_frame
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from tests.attribution_cases import in_float64, linear_model
from tests.experiments import config_of, run_method
from tests.families import build
from tests.models_fixtures import planted, smollm2, toy
from tests.test_engine_rollout import by_hand as rollout_by_hand
from tests.test_reproduce import tamper

__all__ = ["columns", "planted", "smollm2", "toy"]

METRICS = ("logit_diff", "logprob")
BASELINES = ("zero", "mean", "corrupt")
LENGTHS = (9, 7, 9, 9, 7)
CHANGED = (2, 3, 6)
"""Positions at which a prompt's twin differs."""
ALL = ("gradient_x_input", "integrated_gradients", "occlusion")


def prompt_of(number: int, length: int, generator: torch.Generator) -> Prompt:
    tokens = torch.randint(5, 60, (length,), generator=generator)
    corrupt = tokens.clone()
    corrupt[list(CHANGED)] = 5 + (tokens[list(CHANGED)] - 5 + 1 + number) % 55
    answer, wrong = (int(token) for token in torch.randperm(55, generator=generator)[:2] + 5)
    return Prompt(
        clean="clean",
        clean_tokens=tuple(tokens.tolist()),
        answer=(answer,),
        answer_text="a",
        corrupt="corrupt",
        corrupt_tokens=tuple(corrupt.tolist()),
        wrong_answer=(wrong,),
        wrong_answer_text="b",
        spans={"pair": (2, 3), "end": (length - 1,)} | ({"late": (6,)} if length > 7 else {}),
        group=f"group-{number % 2}",
        template=f"length-{length}",
        cluster=f"cluster-{number}",
    )


def prompt_set(lengths: Sequence[int] = LENGTHS) -> PromptSet:
    generator = torch.Generator().manual_seed(0)
    return PromptSet("made", tuple(prompt_of(i, length, generator) for i, length in enumerate(lengths)))


PROMPTS = prompt_set()


def loaded_model(model: Any, like: LoadedModel) -> LoadedModel:
    source = ModelSource(id="tiny", path="folder", revision=None)
    return LoadedModel(model, like.tokenizer, find_anatomy(model), source)


def setting_of(
    folder: Path,
    model: LoadedModel,
    section: dict[str, Any],
    prompts: PromptSet = PROMPTS,
    *,
    compute: bool = True,
    **sections: Any,
) -> Setting:
    loaded = config_of(folder, {"inputs": section}, method="attribute", **{"metrics": list(METRICS), **sections})
    moment = Moment(None, None, loaded.config.model)
    return Setting(loaded, model, moment, prompts, SilentProgress(), compute)


def options_of(setting: Setting) -> InputOptions:
    method = setting.loaded.config.method
    assert isinstance(method, AttributeOptions)
    assert method.inputs is not None
    return method.inputs


@dataclass(frozen=True)
class Done:
    """What was computed."""

    tables: dict[str, pd.DataFrame]
    facts: dict[str, Any]
    warnings: list[str]

    def values(self, estimator: str, metric: str, column: str = "value") -> list[Tensor]:
        """By prompt, [positions]."""
        rows = self.tables["inputs"]
        rows = rows[(rows["estimator"] == estimator) & (rows["metric"] == metric)].sort_values(["prompt", "position"])
        assert len(rows)
        return [torch.tensor(own[column].tolist(), dtype=torch.float64) for _, own in rows.groupby("prompt")]

    def flat(self, estimator: str, metric: str) -> Tensor:
        return torch.cat(self.values(estimator, metric))


def done(setting: Setting, recorded: Sequence[dict[str, Any]] = ()) -> Done:
    """What `attribute` does with the section `inputs`."""
    options, loaded = options_of(setting), setting.loaded
    check_inputs(options, setting)
    logits = clean_logits(setting.model, setting.prompts) if needs_clean_logits(loaded) else None
    with record(loaded, loaded.path.parent / "runs") as run:
        bench = Bench(
            run, setting.model, loaded.config.engine, setting.moment, 0, 1, setting.progress, Tally(), recorded
        )
        found = input_tables(options, setting, bench, logits)
        tables = {name: to_frame(validate(name, rows, "attribute")) for name, rows in found.items()}
        return Done(tables, bench.facts.get("inputs", {}), list(run.manifest.warnings))


# --- by hand: what enters layer 0 goes in through `inputs_embeds`, one prompt at a time


@dataclass(frozen=True)
class Hand:
    """A model as a function of what enters its layer 0."""

    model: Any
    family: str

    def entering(self, tokens: Sequence[int]) -> Tensor:
        embed: Tensor = self.model.get_input_embeddings()(torch.tensor([list(tokens)]))
        return (embed * self._scale + self._positions(embed.shape[1])).detach()

    @property
    def _scale(self) -> float:
        return float(self.model.config.embedding_multiplier) if self.family == "granite" else 1.0

    def _positions(self, length: int) -> Tensor:
        if self.family != "gpt2":
            return torch.zeros(())
        found: Tensor = self.model.transformer.wpe(torch.arange(length))
        return found

    def metrics(self, entering: Tensor, prompt: Prompt) -> Tensor:
        """[metrics] at the last position."""
        embeds = (entering - self._positions(entering.shape[1])) / self._scale
        logits = self.model(inputs_embeds=embeds, use_cache=False).logits[0, -1].double()
        answer, wrong = logits[prompt.answer[0]], logits[prompt.wrong_answer[0]]
        return torch.stack([answer - wrong, answer - logits.logsumexp(0)])

    def baseline(self, name: str, prompts: PromptSet, prompt: Prompt) -> Tensor:
        """[1, positions, d_model]."""
        here = self.entering(prompt.clean_tokens)
        if name == "zero":
            return torch.zeros_like(here)
        if name == "corrupt":
            return self.entering(prompt.corrupt_tokens or ())
        every = torch.cat([self.entering(other.clean_tokens)[0].double() for other in prompts.prompts])
        return every.mean(0).to(here).expand_as(here)

    def gradients(self, name: str, prompts: PromptSet, prompt: Prompt) -> Tensor:
        """Gradient × (input − baseline), [metrics, positions]."""
        entering = self.entering(prompt.clean_tokens).requires_grad_()
        change = (entering - self.baseline(name, prompts, prompt)).detach()
        rows = []
        with torch.enable_grad():
            for value in self.metrics(entering, prompt):
                (gradient,) = torch.autograd.grad(value, entering, retain_graph=True)
                rows.append((gradient * change).sum(-1)[0])
        return torch.stack(rows)

    @torch.no_grad()
    def occlusion(self, name: str, prompts: PromptSet, prompt: Prompt) -> Tensor:
        """M(clean) − M(occluded), [metrics, positions]."""
        entering, baseline = self.entering(prompt.clean_tokens), self.baseline(name, prompts, prompt)
        clean, columns = self.metrics(entering, prompt), []
        for position in range(prompt.length):
            occluded = entering.clone()
            occluded[:, position] = baseline[:, position]
            columns.append(clean - self.metrics(occluded, prompt))
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def difference(self, name: str, prompts: PromptSet, prompt: Prompt) -> Tensor:
        """M(input) − M(baseline), [metrics]."""
        baseline = self.baseline(name, prompts, prompt)
        return self.metrics(self.entering(prompt.clean_tokens), prompt) - self.metrics(baseline, prompt)


FAMILIES = ("llama", "gpt2", "granite")
"""Plain; learned positions in what enters layer 0; an embedding that is scaled before it."""
Models = Callable[[str], LoadedModel]


@pytest.fixture(scope="session")
def models(toy: LoadedModel) -> Models:
    known = {"toy": toy} | {family: loaded_model(build(family), toy) for family in (*FAMILIES, "mamba", "gptj")}
    return known.__getitem__


def assert_close(got: Done, estimator: str, want: Callable[[Prompt], Tensor], tolerance: float) -> None:
    """Every prompt's and metric's values, beside the largest of the metric."""
    for metric, name in enumerate(METRICS):
        wanted = [want(prompt)[metric] for prompt in PROMPTS.prompts]
        scale = max(float(values.abs().max()) for values in wanted)
        assert scale > 1e-2
        for own, values in zip(got.values(estimator, name), wanted, strict=True):
            assert own.shape == values.shape
            assert float((own - values).abs().max()) <= tolerance * max(scale, 1.0), (name, own, values)


CASES = [
    ("toy", "mean"),
    ("mamba", "corrupt"),
    ("gptj", "mean"),
    *((family, baseline) for family in FAMILIES for baseline in BASELINES),
]


@pytest.mark.parametrize(("family", "baseline"), CASES)
def test_values_are_those_of_autograd_and_of_plain_passes(
    family: str, baseline: str, models: Models, tmp_path: Path
) -> None:
    section = {"estimators": ["gradient_x_input", "occlusion"], "baseline": baseline}
    got = done(setting_of(tmp_path, models(family), section))
    hand = Hand(models(family).model, family)
    assert_close(got, "gradient_x_input", lambda prompt: hand.gradients(baseline, PROMPTS, prompt), 1e-5)
    assert_close(got, "occlusion", lambda prompt: hand.occlusion(baseline, PROMPTS, prompt), 1e-4)
    rows = got.tables["inputs"]
    assert set(rows["baseline"]) == {baseline}
    assert rows["steps"].isna().all()


STEPS = {
    ("toy", "mean"): 32,
    ("toy", "corrupt"): 32,
    ("gpt2", "mean"): 32,
    ("gpt2", "corrupt"): 32,
    ("llama", "corrupt"): 32,
    ("llama", "mean"): 128,
    ("granite", "corrupt"): 128,
    ("granite", "mean"): 128,
}
"""More where the mean of random embeddings is next to nothing, and a norm makes the metric jump."""


@pytest.mark.parametrize(("family", "baseline"), STEPS)
def test_integrated_gradients_sum_to_the_difference(family: str, baseline: str, models: Models, tmp_path: Path) -> None:
    steps = STEPS[family, baseline]
    section = {"estimators": ["integrated_gradients"], "baseline": baseline, "steps": steps}
    got = done(setting_of(tmp_path, models(family), section))
    hand = Hand(models(family).model, family)
    rows = got.tables["input_completeness"].set_index(["metric", "prompt"])
    for metric, name in enumerate(METRICS):
        for at, values in enumerate(got.values("integrated_gradients", name)):
            want = float(hand.difference(baseline, PROMPTS, PROMPTS.prompts[at])[metric])
            row: Any = rows.loc[(name, at)]
            assert abs(float(values.sum()) - want) <= 0.01 * max(abs(want), 0.1), (name, at)
            assert float(row["difference"]) == pytest.approx(want, abs=1e-4)
            assert float(row["input"]) - float(row["baseline_value"]) == pytest.approx(want, abs=1e-4)
            assert float(row["sum"]) == pytest.approx(float(values.sum()), abs=1e-9)
            assert float(row["error"]) == pytest.approx(float(values.sum()) - want, abs=1e-4)
    assert set(got.facts["completeness"]) == set(METRICS)
    assert max(got.facts["completeness"].values()) <= 0.01
    assert not got.warnings
    assert set(got.tables["inputs"]["steps"]) == {steps}


def test_the_error_of_few_steps_is_reported_and_warned_of(toy: LoadedModel, tmp_path: Path) -> None:
    section = {"estimators": ["integrated_gradients"], "steps": 4, "baseline": "mean"}
    few = done(setting_of(tmp_path, toy, section, metrics=["logit_diff"]))
    assert few.facts["completeness"]["logit_diff"] > 0.05
    (warning,) = few.warnings
    assert warning.startswith("integrated_gradients, logit_diff: on ")
    assert "of 5 prompts the tokens' sum misses M(input) - M(baseline) by more than 1% of it (prompt " in warning
    remedy = "; raise attribute.inputs.steps (now 4), or use baseline: corrupt, whose line is shorter"
    assert warning.endswith(remedy)
    errors = few.tables["input_completeness"]["relative_error"].abs()
    assert float(errors.max()) > 0.05


def test_next_to_zero_more_steps_do_not_help_and_the_warning_says_so(models: Models, tmp_path: Path) -> None:
    section = {"estimators": ["integrated_gradients"], "steps": 256, "baseline": "zero"}
    got = done(setting_of(tmp_path, models("llama"), section, metrics=["logit_diff"]))
    assert got.facts["completeness"]["logit_diff"] > 0.1
    (warning,) = got.warnings
    assert warning.endswith("which more steps hardly follow: use baseline: corrupt or mean")


def test_differences_that_are_too_small_to_divide_by_have_no_relative_error(tmp_path: Path, toy: LoadedModel) -> None:
    stats = setting_of(tmp_path, toy, {}).loaded.config.stats
    prompts = prompt_set((7, 7))
    found = Attributed("integrated_gradients", 8, "corrupt", ("logit_diff",), [np.full((1, 7), 0.1), np.zeros((1, 7))])
    whole = Whole(found, np.array([[0.5, 0.5]]), np.array([[-0.5, 0.5 - 1e-4]]), stats)
    first, second = whole.rows(prompts)
    assert first["relative_error"] == pytest.approx(-0.3)
    assert second["relative_error"] is None
    (warning,) = whole.warnings(half=True)
    assert "on 1 of 2 prompts" in warning
    assert "(prompt 0: 30.0%)" in warning
    assert warning.endswith("raise attribute.inputs.steps (now 8), or use model.dtype: float32")


@contextmanager
def linear(toy: LoadedModel) -> Iterator[LoadedModel]:
    model = linear_model()
    with in_float64(model):
        yield loaded_model(model, toy)


@pytest.mark.parametrize("baseline", BASELINES)
def test_on_a_linear_model_all_estimators_are_the_exact_effect(baseline: str, toy: LoadedModel, tmp_path: Path) -> None:
    with linear(toy) as model:
        section = {"estimators": list(ALL), "baseline": baseline, "steps": 3}
        got = done(setting_of(tmp_path, model, section, metrics=["logit_diff"]))
    want = got.flat("occlusion", "logit_diff")
    scale = float(want.abs().max())
    assert scale > 1e-2
    for estimator in ALL[:2]:
        assert (got.flat(estimator, "logit_diff") - want).abs().max() <= 1e-6 * scale, estimator
    assert got.facts["completeness"]["logit_diff"] <= 1e-6


def test_on_another_model_estimates_differ_from_the_exact_effect(models: Models, tmp_path: Path) -> None:
    got = done(setting_of(tmp_path, models("llama"), {"estimators": list(ALL)}, metrics=["logit_diff"]))
    want = got.flat("occlusion", "logit_diff")
    for estimator in ALL[:2]:
        assert (got.flat(estimator, "logit_diff") - want).abs().max() > 0.05 * want.abs().max(), estimator


def test_tokens_whose_embedding_is_the_baseline_count_nothing(models: Models, tmp_path: Path) -> None:
    got = done(setting_of(tmp_path, models("llama"), {"estimators": list(ALL), "baseline": "corrupt"}))
    for estimator in ALL:
        for name in METRICS:
            for values in got.values(estimator, name):
                same = [at for at in range(len(values)) if at not in CHANGED]
                assert values[same].tolist() == [0.0] * len(same)
                assert not torch.signbit(values[same]).any()
                assert values[list(CHANGED)].abs().min() > 0


def test_a_token_without_an_embedding_counts_nothing_beside_zero(toy: LoadedModel, tmp_path: Path) -> None:
    model: Any = build("llama")
    token = PROMPTS.prompts[0].clean_tokens[4]
    model.get_input_embeddings().weight.data[token] = 0
    got = done(setting_of(tmp_path, loaded_model(model, toy), {"estimators": list(ALL), "baseline": "zero"}))
    for estimator in ALL:
        values = got.values(estimator, "logit_diff")[0]
        assert values[4] == 0
        assert values[3].abs() > 1e-3


def test_numbers_depend_neither_on_memory_nor_on_company(models: Models, tmp_path: Path) -> None:
    section = {"estimators": list(ALL[:2]), "baseline": "zero", "steps": 3}
    whole = done(setting_of(tmp_path, models("llama"), section))
    assert whole.facts["batching"] == {"tokens": 1024, "checkpointing": False}
    few = done(setting_of(tmp_path, models("llama"), section, engine={"max_memory": "250KB"}))
    assert 9 <= few.facts["batching"]["tokens"] < 5 * 9
    assert not few.facts["batching"]["checkpointing"]
    least = done(setting_of(tmp_path, models("llama"), section, engine={"max_memory": 1000}))
    assert least.facts["batching"] == {"tokens": 9, "checkpointing": True}
    for estimator in ALL[:2]:
        want = whole.flat(estimator, "logit_diff")
        for other in (few, least):
            assert (other.flat(estimator, "logit_diff") - want).abs().max() <= 1e-5
    for at, prompt in enumerate(PROMPTS.prompts):
        setting = setting_of(
            tmp_path, models("llama"), section | {"estimators": list(ALL)}, PromptSet("one", (prompt,))
        )
        alone = done(setting)
        for estimator in ALL[:2]:
            difference = alone.flat(estimator, "logit_diff") - whole.values(estimator, "logit_diff")[at]
            assert difference.abs().max() <= 1e-5


def test_what_was_planned_is_used_again(models: Models, tmp_path: Path) -> None:
    recorded = [{"checkpoint": None, "job": None, "inputs": {"batching": {"tokens": 11, "checkpointing": True}}}]
    got = done(setting_of(tmp_path, models("llama"), {"estimators": ["gradient_x_input"]}), recorded)
    assert got.facts["batching"] == {"tokens": 11, "checkpointing": True}


def test_rollout_is_the_share_of_attention_and_knows_no_metric(models: Models, tmp_path: Path) -> None:
    got = done(setting_of(tmp_path, models("llama"), {"estimators": ["rollout"]}))
    rows = got.tables["inputs"]
    assert set(rows["metric"]) == {ATTENTION} == {"attention"}
    assert rows["baseline"].isna().all()
    eager = build("llama", attn_implementation="eager")
    for prompt, values in zip(PROMPTS.prompts, got.values("rollout", ATTENTION), strict=True):
        want = rollout_by_hand(eager, torch.tensor([prompt.clean_tokens]), torch.tensor([prompt.length - 1]))[0]
        assert (values - want).abs().max() <= 1e-5
        assert float(values.sum()) == pytest.approx(1, abs=1e-5)
    assert got.facts["rollout"]["deviation"] <= got.facts["rollout"]["tolerance"]
    assert "input_completeness" not in got.tables


def planted_setting(folder: Path, planted: LoadedModel, baseline: str) -> Setting:
    setting = setting_of(folder, planted, {"estimators": list(ALL), "baseline": baseline}, metrics=["logit_diff"])
    return replace(setting, prompts=build_prompts(setting.loaded.config.task, planted))


def test_the_planted_circuit_needs_both_matched_tokens_and_the_copied_one(planted: LoadedModel, tmp_path: Path) -> None:
    setting = planted_setting(tmp_path, planted, "mean")
    got = done(setting)
    for at, prompt in enumerate(setting.prompts.prompts):
        first = prompt.clean_tokens.index(prompt.clean_tokens[-1])
        needed = [first, first + 1, prompt.length - 1]
        assert prompt.clean_tokens[first + 1] == prompt.answer[0]
        occluded = got.values("occlusion", "logit_diff")[at]
        assert occluded[needed].min() > 9
        assert occluded.abs().sort().values[: -len(needed)].max() < 0.1
        for estimator in ALL[:2]:
            assert int(got.values(estimator, "logit_diff")[at].argmax()) == first + 1


def test_saturated_attention_hides_the_matched_token_from_the_gradient_alone(
    planted: LoadedModel, tmp_path: Path
) -> None:
    setting = planted_setting(tmp_path, planted, "corrupt")
    got = done(setting)
    for at, prompt in enumerate(setting.prompts.prompts):
        first = prompt.clean_tokens.index(prompt.clean_tokens[-1])
        gradient, integrated, exact = (float(got.values(name, "logit_diff")[at][first]) for name in ALL)
        assert exact > 11
        assert integrated == pytest.approx(exact, rel=0.02)
        assert abs(gradient) < 0.1


def test_tokens_shares_and_prompts_stand_in_the_table(models: Models, tmp_path: Path) -> None:
    got = done(setting_of(tmp_path, models("toy"), {"estimators": ["occlusion", "rollout"]}))
    rows = got.tables["inputs"]
    assert len(rows) == sum(LENGTHS) * 3
    tokenizer: Any = models("toy").tokenizer
    for row in rows[["prompt", "position", "token", "group", "cluster", "template"]].to_dict("records"):
        prompt = PROMPTS.prompts[row["prompt"]]
        assert row["token"] == tokenizer.decode([prompt.clean_tokens[row["position"]]])
        assert (row["group"], row["cluster"], row["template"]) == (prompt.group, prompt.cluster, prompt.template)
    keys = ["prompt", "estimator", "metric"]
    assert not rows.duplicated([*keys, "position"]).any()
    sums = rows.assign(size=rows["share"].abs()).groupby(keys)["size"].sum()
    assert np.allclose(sums, 1)
    assert (np.sign(rows["share"]) == np.sign(rows["value"])).all()


def test_means_are_those_of_spans_and_of_positions_of_one_template(models: Models, tmp_path: Path) -> None:
    got = done(setting_of(tmp_path, models("llama"), {"estimators": ["occlusion"]}))
    values = got.values("occlusion", "logprob")
    rows = got.tables["input_spans"]
    rows = rows[rows["metric"] == "logprob"]
    by_template: dict[str, Sequence[int]] = {"length-9": [0, 2, 3], "length-7": [1, 4]}
    wanted: dict[tuple[str | None, str | None, int | None], list[float]] = {}
    for template, members in by_template.items():
        for position in range(LENGTHS[members[0]]):
            wanted[template, None, position] = [float(values[i][position]) for i in members]
    for name, members in ((None, range(5)), *by_template.items()):
        for span in ("pair", "end", *(["late"] if name == "length-9" else [])):
            wanted[name, span, None] = [float(values[i][list(PROMPTS.prompts[i].spans[span])].sum()) for i in members]
    assert len(rows) == len(wanted)
    for row in rows.astype(object).where(rows.notna(), None).to_dict("records"):
        numbers = wanted.pop((row["template"], row["span"], row["position"]))
        assert row["mean"] == pytest.approx(np.mean(numbers))
        assert (row["n"], row["clusters"]) == (len(numbers), len(numbers))
        assert (row["ci_low"] is None) == (row["ci_high"] is None)
        if row["ci_low"] is not None:
            assert row["ci_low"] <= row["mean"] <= row["ci_high"]
    assert not wanted
    assert rows.loc[rows["template"].isna(), "ci_low"].notna().all()


def test_a_template_with_one_prompt_has_no_means_and_nan_stays_out_of_them(tmp_path: Path, toy: LoadedModel) -> None:
    stats = setting_of(tmp_path, toy, {}).loaded.config.stats
    prompts = prompt_set((7, 9, 9, 9))
    values = [np.full((1, prompt.length), float(at)) for at, prompt in enumerate(prompts.prompts)]
    values[3][0, 1] = np.nan
    rows = span_rows([Attributed("occlusion", None, "zero", ("logit_diff",), values)], prompts, stats)
    assert {row["template"] for row in rows} == {"length-9", None}
    assert {row["n"] for row in rows if row["template"] == "length-9" and row["span"] is None} == {2}
    assert {row["mean"] for row in rows if row["template"] == "length-9" and row["span"] is None} == {1.5}


def test_kl_falls_where_a_token_holds_the_output(models: Models, tmp_path: Path) -> None:
    section = {"estimators": ["integrated_gradients", "occlusion"]}
    got = done(setting_of(tmp_path, models("llama"), section, metrics=["kl"]))
    assert got.flat("occlusion", "kl").max() <= 1e-6
    assert got.flat("occlusion", "kl").min() < -1e-2
    rows = got.tables["input_completeness"]
    assert rows["input"].abs().max() <= 1e-6
    assert (rows["difference"] < -1e-2).all()
    assert (rows["relative_error"].abs() <= 0.01).all()


def test_half_precision_gives_nearly_the_same(tmp_path: Path) -> None:
    def of(dtype: str) -> Done:
        model = load_model(ModelOptions(id="toy-induction", device="cpu", dtype=dtype))
        return done(setting_of(tmp_path, model, {"estimators": list(ALL)}, metrics=["logit_diff"]))

    half, single = of("bfloat16"), of("float32")
    for estimator in ALL:
        pair = torch.stack([run.flat(estimator, "logit_diff") for run in (half, single)])
        assert torch.corrcoef(pair)[0, 1] > 0.98, estimator
        assert not torch.equal(*pair)


# --- what is refused


def refused(folder: Path, model: LoadedModel, section: dict[str, Any], **others: Any) -> UserError:
    setting = setting_of(folder, model, section, **others)
    with pytest.raises(UserError) as caught:
        check_inputs(options_of(setting), setting)
    assert str(folder) in caught.value.cause
    return caught.value


def test_gradient_x_input_of_kl_is_refused_with_the_reason(toy: LoadedModel, tmp_path: Path) -> None:
    error = refused(tmp_path, toy, {"estimators": ["occlusion", "gradient_x_input"]}, metrics=["logit_diff", "kl"])
    assert "attribute.inputs.estimators[1]: gradient_x_input of kl is 0 for every token" in error.cause
    assert "has no slope there" in error.cause
    assert error.remedy == "Use integrated_gradients or occlusion, or leave kl out of metrics."


@pytest.mark.parametrize("metric", ["rank", "accuracy"])
@pytest.mark.parametrize("estimator", ALL[:2])
def test_gradients_of_counts_are_refused(estimator: str, metric: str, toy: LoadedModel, tmp_path: Path) -> None:
    error = refused(tmp_path, toy, {"estimators": [estimator]}, metrics=[metric])
    words = f"attribute.inputs.estimators[0]: {estimator} needs a gradient, and {metric} is a count without one"
    assert words in error.cause
    sloped = "kl, logit_diff, logprob, prob, prob_diff"
    assert error.remedy == f"Use occlusion, which measures it exactly, or choose metrics from {sloped}."


def test_occlusion_of_counts_is_allowed(models: Models, tmp_path: Path) -> None:
    got = done(setting_of(tmp_path, models("llama"), {"estimators": ["occlusion"]}, metrics=["rank"]))
    assert got.flat("occlusion", "rank").abs().max() >= 1


def test_a_corrupt_baseline_without_twins_is_refused(toy: LoadedModel, tmp_path: Path) -> None:
    lacking = replace(PROMPTS.prompts[2], corrupt=None, corrupt_tokens=None)
    prompts = PromptSet("made", (*PROMPTS.prompts[:2], lacking))
    error = refused(tmp_path, toy, {"baseline": "corrupt"}, prompts=prompts)
    assert "attribute.inputs.baseline: prompt 2 has no corrupted twin" in error.cause
    assert error.remedy == "Give every prompt a `corrupt`, or use baseline: mean or zero."
    for section in ({"baseline": "mean"}, {"baseline": "corrupt", "estimators": ["rollout"]}):
        setting = setting_of(tmp_path, toy, section, prompts)
        check_inputs(options_of(setting), setting)


@pytest.mark.parametrize(("family", "without"), [("mamba", "layers 0, 1, 2 have"), ("qwen3_next", "layers 0, 2 have")])
def test_rollout_without_patterns_is_refused(family: str, without: str, toy: LoadedModel, tmp_path: Path) -> None:
    model = loaded_model(build(family), toy)
    error = refused(tmp_path, model, {"estimators": ["occlusion", "rollout"]})
    assert "attribute.inputs.estimators[1]: rollout goes through every layer's attention" in error.cause
    assert f"and {without} no attention pattern: " in error.cause
    assert error.remedy.startswith("Leave rollout out. Layers of this model that have one: ")
    setting = setting_of(tmp_path, model, {"estimators": ["occlusion"]})
    check_inputs(options_of(setting), setting)


def test_models_with_embeddings_of_each_layers_own_are_refused(toy: LoadedModel, tmp_path: Path) -> None:
    model = loaded_model(tiny_model("gemma4_text"), toy)
    assert model.anatomy.embeds_alone
    error = refused(tmp_path, model, {"estimators": ["rollout", "occlusion"]})
    assert "attribute.inputs.estimators[1]: occlusion replaces a token's embedding at layer 0" in error.cause
    assert "hands tokens to its layers in another way too" in error.cause
    assert error.remedy == "Use estimators: [rollout], or another model."
    assert done(setting_of(tmp_path, model, {"estimators": ["rollout"]})).tables["inputs"]["value"].notna().all()


def test_models_that_mix_tokens_before_layer_0_are_refused(toy: LoadedModel, tmp_path: Path) -> None:
    model = replace(toy, anatomy=replace(toy.anatomy, embeds_alone=False))
    error = refused(tmp_path, model, {"estimators": ["gradient_x_input"]}, compute=False)
    assert "gradient_x_input replaces a token's embedding at layer 0, and this model mixes tokens" in error.cause


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"steps": 0}, "attribute.inputs.steps"),
        ({"steps": -3}, "attribute.inputs.steps"),
        ({"estimators": []}, "attribute.inputs.estimators"),
        ({"estimators": ["saliency"]}, "attribute.inputs.estimators[0]"),
        ({"estimators": ["rollout", "rollout"]}, "attribute.inputs.estimators"),
        ({"baseline": "pad"}, "attribute.inputs.baseline"),
    ],
)
def test_values_outside_the_section_are_refused(
    section: dict[str, Any], words: str, toy: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        setting_of(tmp_path, toy, section)
    assert words in caught.value.cause


# --- the plan, and a real model


def test_the_plan_counts_without_a_pass(toy: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"estimators": [*ALL, "rollout"], "steps": 8}
    setting = setting_of(tmp_path, toy, section, compute=False, metrics=["logit_diff"])

    def stop(*_args: Any, **_others: Any) -> None:
        raise AssertionError("a pass was made")

    monkeypatch.setattr(type(toy.model), "forward", stop)
    check_inputs(options_of(setting), setting)
    plan = input_plan(options_of(setting), setting)
    assert plan["tokens"] == sum(LENGTHS)
    assert plan["passes"] == {"gradient_x_input": 2, "integrated_gradients": 17, "rollout": 1}
    assert plan["result_rows"] == 4 * sum(LENGTHS)
    assert plan["occlusion"]["trials"] == max(LENGTHS)
    assert plan["occlusion"]["computed"] == sum(LENGTHS)
    without = setting_of(tmp_path, toy, {"estimators": ["occlusion"]}, compute=False, metrics=["kl"])
    assert input_plan(options_of(without), without)["occlusion"]["computed"] == sum(LENGTHS)


def test_a_run_is_reproduced_and_a_changed_number_is_found(tmp_path: Path) -> None:
    section = {"inputs": {"estimators": [*ALL, "rollout"], "steps": 4}}
    run = run_method(tmp_path, "attribute", section, metrics=["logit_diff"])
    assert {"inputs", "input_spans", "input_completeness"} <= {path.stem for path in run.path.glob("*.parquet")}
    again = ["reproduce", str(run.path), "--out", str(tmp_path / "again")]
    assert main([*again, "--exact"]) == ExitCode.DONE
    tamper(run.path, "inputs", 5, "value", 0.5)
    assert main(again) == ExitCode.DIFFERS


@pytest.mark.slow
def test_on_a_real_model(smollm2: LoadedModel, tmp_path: Path) -> None:
    def of(estimators: list[str], baseline: str) -> tuple[Done, PromptSet]:
        section = {"estimators": estimators, "baseline": baseline}
        task = {"name": "ioi", "n": 3}
        setting = setting_of(tmp_path, smollm2, section, task=task, metrics=["logit_diff"])
        prompts = build_prompts(setting.loaded.config.task, smollm2)
        return done(replace(setting, prompts=prompts)), prompts

    got, prompts = of(["gradient_x_input", "occlusion", "rollout"], "mean")
    hand = Hand(smollm2.model, "llama")
    for at, prompt in enumerate(prompts.prompts):
        for estimator, want in (
            ("occlusion", hand.occlusion("mean", prompts, prompt)[0]),
            ("gradient_x_input", hand.gradients("mean", prompts, prompt)[0]),
        ):
            values = got.values(estimator, "logit_diff")[at]
            assert want.abs().max() > 1
            assert (values - want).abs().max() <= 1e-3 * want.abs().max(), estimator
        assert float(got.values("rollout", ATTENTION)[at].sum()) == pytest.approx(1, abs=1e-5)
    complete, _ = of(["integrated_gradients", "occlusion"], "corrupt")
    assert complete.facts["completeness"]["logit_diff"] <= 0.01
    assert not complete.warnings
