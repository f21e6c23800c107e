"""`probe` on one model: activations in one pass, probes of all of them, and what their scores are set beside."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from mechinterp_cli.config.schema import memory_bytes
from mechinterp_cli.engine.activations import Asked, feature_shape
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.plan import free_memory
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.binder import Binder
from mechinterp_cli.methods.experiment import Experiment, Setting, Tables, prepares
from mechinterp_cli.methods.probe.activations import Activations, Keeping, Source, activations
from mechinterp_cli.methods.probe.chance import with_chance
from mechinterp_cli.methods.probe.exchange import Integers
from mechinterp_cli.methods.probe.fitting import Fitting, save_directions, usual_penalties
from mechinterp_cli.methods.probe.follow import FollowUp
from mechinterp_cli.methods.probe.follow_checks import follow_up, with_directions, with_name
from mechinterp_cli.methods.probe.honesty import leak_warnings
from mechinterp_cli.methods.probe.learning import learning_rows
from mechinterp_cli.methods.probe.options import OF_NUMBERS, ProbeName, ProbeOptions
from mechinterp_cli.methods.probe.predictions import prediction_table
from mechinterp_cli.methods.probe.projections import projection_rows
from mechinterp_cli.methods.probe.readable import Scores
from mechinterp_cli.methods.probe.readout import Readout, Row, bags, control_problem
from mechinterp_cli.methods.probe.scoring import Problem
from mechinterp_cli.methods.probe.side_by_side import side_by_side
from mechinterp_cli.methods.probe.sites import Reading, asked_of, readings
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.random_twin import random_twin
from mechinterp_cli.tasks.labelled import LabelledSet, label_rows, labelled

MEMORY_SHARE = 0.5
"""Of the budget, for activations; the rest is for fitting."""
EMBEDDING = Site("embed", 0)
Result = TypeVar("Result")


class ProbeExperiment(Experiment):
    """A probing experiment: everything is checked, nothing is computed.

    Args:
        setting: Config, model, prompts.
        options: The section.
        examples: The prompts as labelled examples.
        readouts: Every place with its labels and folds.
        names: The probes.
        follow: The causal follow-up, where one is asked for.
    """

    def __init__(
        self,
        setting: Setting,
        options: ProbeOptions,
        examples: LabelledSet,
        readouts: Sequence[Readout],
        names: Sequence[ProbeName],
        follow: FollowUp | None = None,
    ) -> None:
        super().__init__(setting)
        self.options = options
        self.examples = examples
        self.readouts = readouts
        self.names = names
        self.follow = follow

    def seeds(self) -> dict[str, int]:
        """Of folds, control labels, random weights; of everything that the follow-up draws."""
        causal = self.options.causal
        return {"probe": self.options.seed} | ({"probe.causal": causal.seed} if causal else {})

    def display(self) -> dict[str, str]:
        """The task, and what scores are."""
        what = "R²" if self.examples.classes is None else "Accuracy"
        return {"title": f"probes, {self.prompts.task}", "scale": f"{what} on samples that a probe was not fitted on."}

    def facts(self) -> dict[str, Any]:
        """How many samples there are, of which classes, and which prompts the follow-up measures."""
        facts = {"samples": len(self.examples.targets), "classes": self.examples.classes}
        return facts | ({"causal": self.follow.split.facts()} if self.follow else {})

    def compute(self, bench: Bench) -> Tables:
        """Read, fit, set beside."""
        for warning in self._leaks():
            bench.warn(warning)
        bench.stage("reading activations")
        found = self._activations(self.model, bench)
        bench.stage("fitting probes")
        rows: list[Row] = []
        codes: list[Row] = []
        curve: list[Row] = []
        for scores, code, learning in self._each(lambda readout: self._read(readout, found), bench):
            rows += scores
            codes += code
            curve += learning
        rows = with_chance(rows) + self._baselines(found, bench)
        labels = list(map(_plain, label_rows(self.examples)))
        tables: dict[str, Any] = {"probes": rows, "labels": labels}
        bench.stage("projections of held-out samples")
        along = projection_rows(self.readouts, rows, labels, lambda reading: self._x(found, reading), self._place)
        tables |= {"projections": along} if along else {}
        self._warn_unconverged(bench, rows)
        tables |= {name: kept for name, kept in (("code", codes), ("learning", curve)) if kept}
        if self.options.predictions:
            tables["predictions"] = prediction_table(self.readouts, labels, self.examples.classes, self._place)
        return tables | self._followed(found, rows, bench)

    def _read(self, readout: Readout, found: Activations) -> tuple[list[Row], list[Row], list[Row]]:
        """Scores, code length and learning curve at one place; none of what is not asked for."""
        place, x = self._place(readout.reading), self._x(found, readout.reading)
        scores = readout.rows(self.names, x, self._draws[readout.reading.examples])
        code = [readout.code(x)] if self.options.code_length else []
        learning = learning_rows(readout, x) if self.options.learning_curve else []
        each = ([place | row for row in rows] for rows in (scores, code, learning))
        return next(each), next(each), next(each)

    def _followed(self, found: Activations, rows: Sequence[Row], bench: Bench) -> dict[str, Any]:
        """Save the directions of a linear probe, and try them in the model where that is asked."""
        name, follow = with_name(self.names, self.options.causal), self.follow
        if name is None:
            return {}
        bench.stage("fitting directions")
        fitting = Fitting(
            name,
            self.examples,
            frozenset(range(len(self.prompts.prompts)) if follow is None else follow.split.fitted),
            usual_penalties(rows, name),
            controls=0 if follow is None else follow.options.controls,
            seed=0 if follow is None else follow.options.seed,
        )
        fitted = []
        for readout in with_directions(self.readouts):
            one = fitting.at(readout, self._x(found, readout.reading))
            if one is None:
                bench.warn(f"{readout.reading.label}: no direction, as there is nothing to tell apart")
            else:
                fitted.append(one)
        save_directions(bench, fitted)
        if follow is None or not fitted:
            return {}
        return follow.tables(fitted, Scores(rows, self.readouts, name, self.names[0]).of, bench)

    def _activations(self, model: LoadedModel, bench: Bench) -> Activations:
        engine = self.loaded.config.engine
        budget = memory_bytes(engine.max_memory, free_memory(device_of(self.model.model)))
        source = Source(
            model,
            tuple(prompt.clean_tokens for prompt in self.prompts.prompts),
            self._asked(model),
            finite=engine.on_nan == "error",
            tick=bench.progress.advance,
        )
        return activations(source, Keeping(self.options.cache, int(MEMORY_SHARE * budget)), say=bench.warn)

    def _asked(self, model: LoadedModel) -> Asked:
        """All places, and the embedding at all views where it stands beside them."""
        asked = asked_of([readout.reading for readout in self.readouts])
        if model is self.model and "embedding" in self.options.baselines:
            views = {readout.reading.view.name: readout.reading.view for readout in self.readouts}
            asked[EMBEDDING] = list(views.values())
        return asked

    def _x(self, found: Activations, reading: Reading) -> Tensor:
        return found.at(reading.site, reading.head, reading.view.name)

    def _baselines(self, activations: Activations, bench: Bench) -> list[Row]:
        """Majority, tokens and their embedding once for each view, random weights at every place."""
        asked, name, rows = self.options.baselines, self.names[0], list[Row]()
        for readout in {readout.reading.view.name: readout for readout in self.readouts}.values():
            place = {"view": readout.reading.view.name, "label": readout.reading.view.name}
            if "majority" in asked:
                rows.append(place | readout.majority())
            if "bag" in asked:
                rows.append(place | readout.beside(name, "bag", bags(list(self._before(readout.reading)))))
            if "embedding" in asked:
                x = activations.at(EMBEDDING, None, readout.reading.view.name)
                rows.append(place | readout.beside(name, "embedding", x))
        if "random_weights" in asked:
            bench.stage("the same model with random weights")
            found = self._activations(random_twin(self.model, self.options.seed), bench)
            rows += self._each(lambda readout: self._twin(readout, name, found), bench)
        return rows

    def _twin(self, readout: Readout, name: ProbeName, found: Activations) -> Row:
        row = readout.beside(name, "random_weights", self._x(found, readout.reading))
        return self._place(readout.reading) | row

    def _each(self, work: Callable[[Readout], Result], bench: Bench) -> Iterator[Result]:
        """What work gives at every place; on a CPU several places at once."""
        on_gpu = device_of(self.model.model).type != "cpu"
        results = map(work, self.readouts) if on_gpu else side_by_side(work, self.readouts)
        for number, result in enumerate(results, start=1):
            bench.progress.advance(number, len(self.readouts))
            yield result

    def _before(self, reading: Reading) -> Iterator[tuple[int, ...]]:
        """Of every sample the tokens up to where the probe reads."""
        for prompt, positions in zip(reading.view.prompts, reading.view.positions, strict=True):
            yield self.prompts.prompts[prompt].clean_tokens[: max(positions) + 1]

    def _place(self, reading: Reading) -> Row:
        shared = reading.site.kind in ("k", "v")
        return {
            "label": reading.label,
            "site": reading.site.kind,
            "layer": reading.site.layer,
            "head": None if shared else reading.head,
            "kv_head": reading.head if shared else None,
            "position": reading.position,
            "span": reading.span,
            "template": reading.template,
            "view": reading.view.name,
        }

    def _leaks(self) -> list[str]:
        """Texts or groups on both sides of a split."""
        found: dict[str, None] = {}
        for readout in self._by_samples:
            texts = [self.prompts.prompts[i].clean for i in readout.reading.view.prompts]
            found |= dict.fromkeys(leak_warnings(texts, readout.problem.groups, readout.problem.nested.outer))
        return list(found)

    @cached_property
    def _draws(self) -> Mapping[tuple[int, ...], Integers]:
        """Permuted labels, the same at all places that read the same samples."""
        return {readout.reading.examples: readout.draws() for readout in self._by_samples}

    @cached_property
    def _by_samples(self) -> Sequence[Readout]:
        """One readout for each choice of samples."""
        return list({readout.reading.examples: readout for readout in self.readouts}.values())

    def _warn_unconverged(self, bench: Bench, rows: Sequence[Row]) -> None:
        if count := sum(row.get("unconverged") or 0 for row in rows):
            bench.warn(f"{count} fits stopped before their optimum: leave out the weakest penalties")

    def plan(self) -> dict[str, Any]:
        """Probes, samples and the bytes of their activations."""
        anatomy = self.model.anatomy
        features = [feature_shape(anatomy, readout.reading.site) for readout in self.readouts]
        numbers = sum(len(r.reading.view) * f[-1] for r, f in zip(self.readouts, features, strict=True))
        return {
            "probes": len(self.readouts) * len(self.names),
            "samples": len(self.examples.targets),
            "activation_bytes": 4 * numbers,
        } | ({"causal": self.follow.plan()} if self.follow else {})


@prepares(ProbeOptions)
def prepare(options: ProbeOptions, setting: Setting) -> ProbeExperiment:
    """Check labels, places and folds before any forward pass.

    Raises:
        UserError: A task without labels, a place that is not there, a probe that does not fit the labels, or samples
            that cannot be split; names the key.
    """
    loaded = setting.loaded
    try:
        examples = labelled(setting.prompts)
    except UserError as error:
        raise loaded.error(("task",), error.cause, error.remedy) from error
    names = _names(options, setting, examples)
    binder = Binder(loaded, "probe", setting.model.anatomy, setting.prompts)
    found = readings(binder, options.sites)
    problems: dict[tuple[int, ...], tuple[Problem, Problem | None]] = {}
    readouts = []
    for reading in found:
        if reading.examples not in problems:
            problems[reading.examples] = _problems(options, setting, examples, reading)
        problem, control = problems[reading.examples]
        readouts.append(Readout(reading, problem, control, options, loaded.config.stats))
    follow = None if options.causal is None else follow_up(setting, options.causal, names, readouts)
    return ProbeExperiment(setting, options, examples, readouts, names, follow)


def _names(options: ProbeOptions, setting: Setting, examples: LabelledSet) -> tuple[ProbeName, ...]:
    numbers = examples.classes is None
    names: tuple[ProbeName, ...] = options.probes or (("ridge",) if numbers else ("logistic",))
    for place, name in enumerate(names):
        if (name in OF_NUMBERS) != numbers:
            what = "numbers" if numbers else "classes"
            remedy = "Use ridge." if numbers else "Use logistic, mass_mean, lda or mlp."
            raise setting.loaded.error(("probe", "probes", place), f"{name}: labels are {what}", remedy)
    if options.code_length and numbers:
        problem = "code length is of classes, and labels are numbers"
        raise setting.loaded.error(("probe", "code_length"), problem, "Leave it out.")
    return names


def _problems(
    options: ProbeOptions, setting: Setting, examples: LabelledSet, reading: Reading
) -> tuple[Problem, Problem | None]:
    """Labels and folds of a reading's samples, and their control labels where words are labelled."""
    targets, groups, types = examples.targets, examples.groups, examples.word_types
    classes = None if examples.classes is None else len(examples.classes)
    own = reading.examples
    try:
        problem = Problem.of([targets[i] for i in own], classes, [groups[i] for i in own], options)
    except UserError as error:
        key = "inner_folds" if "inner_folds" in error.cause else "folds"
        cause = _named(error.cause.split(": ", 1)[-1], examples.classes)
        raise setting.loaded.error(("probe", key), cause, error.remedy) from error
    if not options.control or not types or classes is None:
        return problem, None
    return problem, control_problem(problem, [types[i] for i in own], options)


def _named(cause: str, classes: Sequence[str] | None) -> str:
    """Classes by their names where a message has their numbers."""
    if classes is None:
        return cause
    return re.sub(r"\bclass (\d+)", lambda found: f"class {classes[int(found[1])]!r}", cause)


def _plain(row: Row) -> Row:
    """A label's row with its positions as JSON, which a CSV file can hold too."""
    return row | {"positions": None if row["positions"] is None else json.dumps(row["positions"])}
