"""Attribution to the prompt's tokens: how much each of them matters for a metric at the answer position.

All estimators but rollout compare a token with its absence, the `baseline` b for its embedding e at layer 0, and are
positive where the token raises the metric M:

- `gradient_x_input`: (e − b) · ∂M/∂e at the prompt, to first order what the token's absence would take away; with
  `baseline: zero` this is gradient × input proper.
- `integrated_gradients` (1703.01365): (e − b) · ∫ ∂M/∂e along the straight line from all baselines to all embeddings;
  the tokens sum to M(prompt) − M(baseline).
- `occlusion`: M(prompt) − M(the prompt with b in place of e), exact, one token at a time.
- `rollout`: see `engine.rollout`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp_cli.config.schema import memory_bytes
from mechinterp_cli.engine.atp import Batching, Estimates, Inquiry, atp, batching_within
from mechinterp_cli.engine.edits import Bucket, Trial
from mechinterp_cli.engine.entering import acts_through_embed
from mechinterp_cli.engine.gradients import EMBED
from mechinterp_cli.engine.integrated import ig_inputs
from mechinterp_cli.engine.patterns import BUDGET, check_layers
from mechinterp_cli.engine.plan import Work, free_memory, layer_parameters
from mechinterp_cli.engine.rollout import rollout
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods.attribute.baselines import CORRUPT, Absent
from mechinterp_cli.methods.attribute.input_rows import Attributed, Floats, Whole, by_prompt, input_columns, span_rows
from mechinterp_cli.methods.attribute.options import InputEstimator, InputOptions
from mechinterp_cli.methods.bench import Bench, settings_of
from mechinterp_cli.methods.dry_run import cost_of
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.methods.job import Job
from mechinterp_cli.metrics import METRICS, Measurer, find_metric
from mechinterp_cli.models.anatomy import device_of

GRADIENTS = ("gradient_x_input", "integrated_gradients")
ATTENTION = "attention"
"""What rollout attributes, in place of a metric."""
_PATH = ("attribute", "inputs")


def check_inputs(options: InputOptions, setting: Setting) -> None:
    """Refuse what the model, the prompts or the metrics do not allow.

    Two short passes are made where `setting.compute` allows it, to see whether tokens act through their embeddings
    at layer 0 alone.

    Raises:
        UserError: Names the key, why, and what is possible.
    """
    for place, name in enumerate(options.estimators):
        path = (*_PATH, "estimators", place)
        if name in GRADIENTS:
            _check_metrics(setting, path, name)
        if name == "rollout":
            _check_patterns(setting, path)
    against = [place for place, name in enumerate(options.estimators) if name != "rollout"]
    if against:
        _check_baseline(options, setting)
        _check_embeddings(options, setting, against[0])


def _check_metrics(setting: Setting, path: tuple[str | int, ...], name: InputEstimator) -> None:
    """Refuse gradients that do not exist, or are 0 whatever the model does."""
    sloped = ", ".join(sorted(other for other, known in METRICS.items() if known.differentiable))
    for metric in map(find_metric, setting.loaded.config.metrics):
        if not metric.differentiable:
            problem = f"{name} needs a gradient, and {metric.name} is a count without one"
            remedy = f"Use occlusion, which measures it exactly, or choose metrics from {sloped}."
            raise setting.loaded.error(path, problem, remedy)
        if metric.needs_reference and name == "gradient_x_input":
            problem = (
                f"{name} of {metric.name} is 0 for every token, whatever the model does: {metric.name} is smallest at "
                "the clean prompt itself, and has no slope there"
            )
            remedy = f"Use integrated_gradients or occlusion, or leave {metric.name} out of metrics."
            raise setting.loaded.error(path, problem, remedy)


def _check_patterns(setting: Setting, path: tuple[str | int, ...]) -> None:
    try:
        check_layers(setting.model.anatomy, range(setting.model.anatomy.n_layers))
    except UserError as error:
        problem = f"rollout goes through every layer's attention, and {error.cause}"
        raise setting.loaded.error(path, problem, f"Leave rollout out. {error.remedy}") from error


def _check_baseline(options: InputOptions, setting: Setting) -> None:
    lacking = [at for at, prompt in enumerate(setting.prompts.prompts) if prompt.corrupt_tokens is None]
    if options.baseline == CORRUPT and lacking:
        problem = f"prompt {lacking[0]} has no corrupted twin"
        remedy = "Give every prompt a `corrupt`, or use baseline: mean or zero."
        raise setting.loaded.error((*_PATH, "baseline"), problem, remedy)


def _check_embeddings(options: InputOptions, setting: Setting, place: int) -> None:
    """Refuse models whose tokens act on more than their own place in what enters layer 0."""
    model, anatomy = setting.model.model, setting.model.anatomy
    first = torch.tensor([setting.prompts.prompts[0].clean_tokens])
    name = options.estimators[place]
    if not anatomy.embeds_alone:
        problem = f"{name} replaces a token's embedding at layer 0, and this model mixes tokens before that layer"
    elif setting.compute and not acts_through_embed(model, anatomy, first):
        problem = (
            f"{name} replaces a token's embedding at layer 0, and this model hands tokens to its layers in another way "
            "too (embeddings of each layer's own), where the token would stay"
        )
    else:
        return
    patterns = all("pattern" not in layer.missing for layer in anatomy.layers)
    alone = "Use estimators: [rollout], or another model." if patterns else "Use another model."
    raise setting.loaded.error((*_PATH, "estimators", place), problem, alone)


def input_tables(options: InputOptions, setting: Setting, bench: Bench, logits: Tensor | None) -> dict[str, Any]:
    """Every estimator on every prompt.

    Args:
        options: The section, checked.
        setting: Config, model and prompts.
        bench: Proves, plans and saves occlusion; is told the rest.
        logits: Clean logits [prompts, vocab], where a metric needs them.

    Returns:
        `inputs`, and where there is something in them `input_completeness` and `input_spans`.

    Raises:
        UserError: Nothing can be differentiated at `embed`.
        ProofError: The engine, or a layer's attention pattern, does not give the model's own numbers.
        RunError: NaN, or not enough memory.
    """
    run = _Run(options, setting, bench, logits)
    found = [run.attributed(name) for name in options.estimators]
    bench.stage("tokens: working out statistics")
    tables: dict[str, Any] = {"inputs": input_columns(found, setting.prompts, setting.model)}
    tables["input_completeness"] = [row for whole in run.wholes for row in whole.rows(setting.prompts)]
    tables["input_spans"] = span_rows(found, setting.prompts, setting.loaded.config.stats)
    return {name: rows for name, rows in tables.items() if len(rows)}


def input_plan(options: InputOptions, setting: Setting) -> dict[str, Any]:
    """Tokens, passes and rows; what occlusion costs. Nothing is computed.

    A backward pass counts as one pass: weights get no gradients.
    """
    model, metrics, names = setting.model, len(setting.loaded.config.metrics), options.estimators
    tokens = sum(prompt.length for prompt in setting.prompts.prompts)
    each = {"gradient_x_input": 1 + metrics, "integrated_gradients": 1 + (1 + metrics) * options.steps, "rollout": 1}
    passes = {str(name): each[name] for name in names if name in each}
    flops = 2 * layer_parameters(model.model, model.anatomy) * model.anatomy.n_layers * tokens * sum(passes.values())
    rows = tokens * sum(1 if name == "rollout" else metrics for name in names)
    plan: dict[str, Any] = {"tokens": tokens, "passes": passes, "flops": flops, "result_rows": rows}
    if "occlusion" in names:
        plan["occlusion"] = cost_of(setting.loaded.config.engine, model, occlusion(options, setting, None).job)
    return plan


@dataclass(frozen=True, eq=False)
class Occlusion:
    """Every token in turn is replaced by the baseline; trial i is the token at position i.

    Args:
        job: For the engine.
        absent: By bucket, [prompts, positions]: where the embedding is the baseline already, and nothing is computed.
    """

    job: Job
    absent: Sequence[Tensor]

    def values(self, trials: Floats, clean: Floats) -> list[Floats]:
        """By prompt, M(clean) − M(occluded) [metrics, positions].

        Args:
            trials: [positions, prompts, metrics]; what was not computed is not looked at.
            clean: [prompts, metrics].
        """
        found: dict[int, Floats] = {}
        for members, absent in zip(self.job.members, self.absent, strict=True):
            for row, at in enumerate(members):
                effects = clean[at] - trials[: absent.shape[1], at]
                found[at] = np.where(absent[row].numpy()[:, None], 0.0, effects).T
        return [found[at] for at in range(self.job.prompts)]


def occlusion(
    options: InputOptions, setting: Setting, logits: Tensor | None, absent: Absent | None = None
) -> Occlusion:
    """The trials of occlusion.

    Args:
        options: The section.
        setting: Config, model and prompts.
        logits: Clean logits [prompts, vocab], where a metric needs them.
        absent: The baseline, where it is known already.
    """
    prompts, model, names = setting.prompts, setting.model, setting.loaded.config.metrics
    absent = absent or Absent.of(options.baseline, setting)
    if logits is None and any(find_metric(name).needs_reference for name in names):
        logits = torch.zeros(len(prompts.prompts), model.anatomy.vocab_size)  # for a plan
    metrics = measuring.Metrics.of(names, prompts, logits, model)
    members = measuring.split_members(prompts)
    masks = [absent.absent(bucket) for bucket in members]
    job = Job(
        trials=max(prompt.length for prompt in prompts.prompts),
        prompts=len(prompts.prompts),
        members=members,
        works=tuple(
            Work(Bucket.of(absent.streams(bucket)), _trials(absent, mask))
            for bucket, mask in zip(members, masks, strict=True)
        ),
        measures=tuple(metrics.on(bucket) for bucket in members),
        metrics=names,
        name="occlusion",
    )
    return Occlusion(job, masks)


def _trials(absent: Absent, mask: Tensor) -> tuple[Trial, ...]:
    """One trial per position of a bucket, on the prompts whose embedding is not the baseline already."""
    trials = []
    for position in range(mask.shape[1]):
        computed = tuple((~mask[:, position]).nonzero()[:, 0].tolist())
        if computed:
            positions = tuple(() if there else (position,) for there in mask[:, position].tolist())
            trials.append(Trial(position, "clean", (absent.edit(positions),), computed))
    return tuple(trials)


@dataclass(eq=False)
class _Run:
    """All estimators of a run; what integrated gradients should sum to is kept in `wholes`."""

    options: InputOptions
    setting: Setting
    bench: Bench
    logits: Tensor | None
    wholes: list[Whole] = field(default_factory=list)
    _facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def _members(self) -> list[tuple[int, ...]]:
        return measuring.split_members(self.setting.prompts)

    @cached_property
    def _absent(self) -> Absent:
        return Absent.of(self.options.baseline, self.setting)

    @property
    def _metrics(self) -> tuple[str, ...]:
        return self.setting.loaded.config.metrics

    @property
    def _budget(self) -> int:
        free = free_memory(device_of(self.setting.model.model))
        return memory_bytes(self.setting.loaded.config.engine.max_memory, free)

    def attributed(self, name: InputEstimator) -> Attributed:
        self.bench.stage(f"tokens: {name}")
        match name:
            case "gradient_x_input":
                return self._found(name, self._joined(self._gradients(atp, 1)[0]))
            case "integrated_gradients":
                return self._integrated(name)
            case "occlusion":
                return self._found(name, self._occluded())
            case "rollout":
                return Attributed(name, None, None, (ATTENTION,), self._rolled_out())

    def _found(self, name: InputEstimator, values: Sequence[Floats], steps: int | None = None) -> Attributed:
        return Attributed(name, steps, self.options.baseline, self._metrics, values)

    def _note(self, facts: Mapping[str, Any]) -> None:
        self._facts |= facts
        self.bench.note({"inputs": dict(self._facts)})

    # --- gradients

    def _gradients(
        self, estimator: Callable[[Inquiry], Estimates], steps: int
    ) -> tuple[dict[int, Floats], list[Estimates]]:
        """By prompt what the tokens' presence adds, and the estimates of each bucket, of their absence."""
        total, done = len(self.setting.prompts.prompts) * steps, 0

        def tick(items: int) -> None:
            nonlocal done
            done += items
            self.bench.progress.advance(min(done, total), total)

        values: dict[int, Floats] = {}
        estimates = []
        for members in self._members:
            found = estimator(self._asked(members, self._batching, tick))
            # The estimators say what the baseline in the token's place would do; 0 − x, so that 0 stays 0.
            values |= zip(members, by_prompt(0 - found.by_site[EMBED]), strict=True)
            estimates.append(found)
        return values, estimates

    def _joined(self, values: Mapping[int, Floats]) -> list[Floats]:
        return [values[at] for at in range(len(self.setting.prompts.prompts))]

    def _integrated(self, name: InputEstimator) -> Attributed:
        steps, count = self.options.steps, len(self.setting.prompts.prompts)
        values, estimates = self._gradients(partial(ig_inputs, steps=steps), steps)
        inputs, baselines = (np.empty((len(self._metrics), count)) for _ in range(2))
        for members, part in zip(self._members, estimates, strict=True):
            assert part.end is not None
            inputs[:, list(members)], baselines[:, list(members)] = part.base.numpy(), part.end.numpy()
        found = self._found(name, self._joined(values), steps)
        whole = Whole(found, inputs, baselines, self.setting.loaded.config.stats)
        self.wholes.append(whole)
        self._note({"completeness": whole.facts()})
        half = next(self.setting.model.model.parameters()).element_size() < 4
        for warning in whole.warnings(half=half):
            self.bench.warn(warning)
        return found

    def _asked(
        self, members: Sequence[int], batching: Batching, tick: Callable[[int], None] = lambda _items: None
    ) -> Inquiry:
        tokens, index = self._absent.streams(members)["clean"], torch.tensor(members)
        model, measurer = self.setting.model, self._measurer

        def metric(logits: Tensor, prompts: Tensor) -> Tensor:
            return measurer.differentiable(logits, index.to(prompts.device)[prompts])

        return Inquiry(
            model.model,
            model.anatomy,
            tokens,
            torch.full((len(tokens),), tokens.shape[1] - 1),
            metric,
            self._absent.sources(members),
            frozenset({EMBED}),
            batching,
            check_finite=self.setting.loaded.config.engine.on_nan == "error",
            tick=tick,
        )

    @cached_property
    def _measurer(self) -> Measurer:
        return measuring.Metrics.of(self._metrics, self.setting.prompts, self.logits, self.setting.model).measurer

    @cached_property
    def _batching(self) -> Batching:
        """How many tokens a pass takes: as planned before, else what memory allows the longest prompt; noted."""
        recorded: dict[str, Any] | None = self.bench.recorded_facts.get("inputs", {}).get("batching")
        if recorded is None:
            model, engine = self.setting.model, self.setting.loaded.config.engine
            fit = batching_within(self._asked(self._members[-1], Batching()), max(1, self._budget // 2))
            most = settings_of(engine, model).rows_per_call
            recorded = {"tokens": min(fit.tokens, most), "checkpointing": fit.checkpointing}
        self._note({"batching": recorded})
        return Batching(**recorded)

    # --- the engine, and attention

    def _occluded(self) -> list[Floats]:
        asked = occlusion(self.options, self.setting, self.logits, self._absent)
        swept = self.bench.sweep(asked.job)
        return asked.values(swept.values[:, :, 0], swept.streams["clean"][:, 0])

    def _rolled_out(self) -> list[Floats]:
        model, layers = self.setting.model, self.setting.model.anatomy.n_layers
        total, before, deviation, tolerance = layers * len(self.setting.prompts.prompts), 0, 0.0, 0.0
        values: dict[int, Floats] = {}
        for members in self._members:
            tokens = torch.tensor([self.setting.prompts.prompts[at].clean_tokens for at in members])
            read = torch.full((len(tokens),), tokens.shape[1] - 1)

            def tick(done: int, before: int = before) -> None:
                self.bench.progress.advance(before + done, total)

            budget = min(BUDGET, self._budget)
            shares, proof = rollout(model.model, model.anatomy, tokens, read, budget=budget, tick=tick)
            before += layers * len(members)
            values |= zip(members, by_prompt(shares[None]), strict=True)
            deviation, tolerance = max(deviation, proof.deviation), max(tolerance, proof.tolerance)
        self._note({"rollout": {"deviation": deviation, "tolerance": tolerance}})
        return self._joined(values)
