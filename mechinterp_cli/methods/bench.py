"""The bench: how an experiment gets its trials computed, proved, planned and saved."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mechinterp_cli.config.schema import EngineOptions, memory_bytes
from mechinterp_cli.engine.execute import Executor, executor_named
from mechinterp_cli.engine.narrow import Head, prove_head, whole_reason
from mechinterp_cli.engine.plan import CPU_ROWS_PER_CALL, GPU_ROWS_PER_CALL, Plan, free_memory, make_plan
from mechinterp_cli.engine.proof import Proof, prove
from mechinterp_cli.engine.wavefront import Settings
from mechinterp_cli.methods.job import Job, Swept
from mechinterp_cli.methods.sweep import sweep
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.checkpoints import Moment
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.runs.outcome import Progress
from mechinterp_cli.runs.recorder import RunRecorder

Recorded = Sequence[dict[str, Any]]
"""`engine.parts` of an earlier manifest."""


@dataclass(eq=False)
class Tally:
    """Units of the jobs that are finished, over all models of a run."""

    units: int = 0


@dataclass(eq=False)
class Bench:
    """Computes the jobs of one model of a run.

    Args:
        run: Keeps units, plans, proofs and warnings.
        model: The model.
        engine: The `engine:` section.
        moment: Which of the run's models it is.
        part: Its number.
        parts: How many there are.
        progress: Where to tell.
        tally: Shared by the benches of a run.
        recorded: What an earlier run of the same experiment had planned.
    """

    run: RunRecorder
    model: LoadedModel
    engine: EngineOptions
    moment: Moment
    part: int
    parts: int
    progress: Progress
    tally: Tally
    recorded: Recorded = field(default_factory=list)

    def stage(self, text: str) -> None:
        """Say what is being done."""
        self.progress.stage(f"{self.moment.heading}{text}")

    def warn(self, text: str) -> None:
        """Put a warning into the log and the manifest."""
        self.run.warn(f"{self.moment.heading}{text}")

    def note(self, facts: dict[str, Any]) -> None:
        """Put something else that was proved or decided of this model into the manifest."""
        self._put(self._key, {**self._key, **self.facts, **facts})

    @property
    def _key(self) -> dict[str, Any]:
        """Where `note` puts things."""
        return {"checkpoint": self.moment.name, "job": None}

    @property
    def facts(self) -> dict[str, Any]:
        """What was noted of this model."""
        return next((part for part in self._noted if _is(part, self._key)), {})

    @property
    def recorded_facts(self) -> dict[str, Any]:
        """What an earlier run, or a process before this one, had noted of this model."""
        return next((part for part in self.recorded if _is(part, self._key)), {})

    def unit_key(self, name: str) -> str:
        """The key of a unit of work that is no job's: lower-case letters, digits and `-`."""
        return self._prefix(self.part) + name

    @property
    def _noted(self) -> list[dict[str, Any]]:
        """`engine.parts` of the manifest."""
        parts: list[dict[str, Any]] = self.run.manifest.engine.setdefault("parts", [])
        return parts

    def _put(self, key: dict[str, Any], part: dict[str, Any]) -> None:
        """Put a part into the manifest, in place of what a process before this one noted under its key."""
        places = [place for place, other in enumerate(self._noted) if _is(other, key)]
        place = places[0] if places else len(self._noted)
        self._noted[place : place + 1] = [part]

    def sweep(self, job: Job) -> Swept:
        """Prove an executor on the job, plan it, and compute what is not saved yet.

        Raises:
            ProofError: No executor gives this model's own numbers.
            RunError: NaN, no memory for a single trial, a file that cannot be written, or the run is another's by now.
        """
        plan, executor, record = self._proved(job)
        job = job.planned(plan)
        prefix = self._prefix(self.part) + (f"{job.name}-" if job.name else "")
        self.stage("sweeping")
        report = self._reporter()
        swept = sweep(self.run, job, plan, executor, prefix=prefix, report=report, tick=self._ticker(plan))
        self.tally.units += max(len(plan.units), len(swept.halved))
        if swept.halved:
            record["halved"] = [asdict(unit) for unit in swept.halved]
            self.warn("memory ran out and units were halved; the units that ran are in the manifest")
        return swept.values

    def _prefix(self, part: int) -> str:
        """What the units of a model's jobs begin with."""
        return f"{part:03d}-" if self.parts > 1 else ""

    def _reporter(self) -> Callable[[int, int], None]:
        """Says on disk how far the run is; of jobs to come only those of the models that are left are known."""
        later = tuple(self._prefix(part) for part in range(self.part + 1, self.parts))
        ahead = sum(unit.startswith(later) for unit in self.run.units.finished())

        def report(done: int, units: int) -> None:
            left = max(ahead, (self.parts - self.part - 1) * units)
            self.run.units_done(self.tally.units + done + ahead, self.tally.units + units + left)

        return report

    def _ticker(self, plan: Plan) -> Callable[[int, int], None]:
        layers = self.model.anatomy.n_layers
        total = max(1, len(plan.units)) * layers

        def tick(unit: int, layer: int) -> None:
            self.progress.advance(min(total, unit * layers + layer + 1), total)

        return tick

    def _proved(self, job: Job) -> tuple[Plan, Executor, dict[str, Any]]:
        """The plan and the executor that proved itself; both are put into the manifest."""
        key = {"checkpoint": self.moment.name, "job": job.name}
        usable = recorded_plan(self.recorded, key, job)
        settings = settings_of(self.engine, self.model)
        self.stage("proving the engine on this model")
        proof = prove(
            self.model.model,
            self.model.anatomy,
            job.works,
            executor=self.engine.executor if usable is None else usable.executor,
            settings=settings,
            per_kind=self.engine.proof_trials,
        )
        head = self._head(job, proof, usable, settings)
        plan = replace(usable or plan_of(self.engine, self.model, job, proof.executor), columns=head.columns)
        proved = {"proof": asdict(proof), "head": asdict(head)}
        record: dict[str, Any] = {**key, **proved, "plan": plan.to_json(), "halved": []}
        self._put(key, record)
        self.run.save()
        for warning in _proof_warnings(self.model.source.dtype, proof):
            self.warn(warning)
        tokens = None if plan.columns is None else job.tokens
        settings = replace(settings, rows_per_call=plan.rows_per_call, tokens=tokens)
        return plan, executor_named(proof.executor, self.model.model, self.model.anatomy, settings), record

    def _head(self, job: Job, proof: Proof, recorded: Plan | None, settings: Settings) -> Head:
        """Whether some tokens' logits are computed alone: a recorded plan is not made narrower than it was."""
        model, anatomy = self.model.model, self.model.anatomy
        if recorded is not None and recorded.columns is None:
            reason = whole_reason(model, anatomy, job.tokens, proof.executor)
            return Head(None, anatomy.vocab_size, reason=reason or "the recorded plan computes all logits")
        return prove_head(model, anatomy, job.works, job.tokens, proof, settings)


def _is(part: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(part.get(name) == value for name, value in key.items())


def recorded_plan(parts: Recorded, key: dict[str, Any], job: Job) -> Plan | None:
    """The plan that an earlier run had for the job, where it holds the job's trials."""
    plans = [Plan.from_json(part["plan"]) for part in parts if _is(part, key)]
    return next((plan for plan in plans if plan.fits(job.works)), None)


def settings_of(engine: EngineOptions, model: LoadedModel) -> Settings:
    """Sizes of the executors."""
    on_gpu = device_of(model.model).type != "cpu"
    rows = engine.rows_per_call or (GPU_ROWS_PER_CALL if on_gpu else CPU_ROWS_PER_CALL)
    return Settings(rows_per_call=rows, check_finite=engine.on_nan == "error")


def plan_of(engine: EngineOptions, model: LoadedModel, job: Job, executor: str) -> Plan:
    """A job's plan for an executor, within the budget of memory."""
    budget = memory_bytes(engine.max_memory, free_memory(device_of(model.model)))
    rows = settings_of(engine, model).rows_per_call
    return make_plan(model.model, model.anatomy, job.works, executor=executor, rows_per_call=rows, budget=budget)


def _proof_warnings(dtype: str, proof: Proof) -> list[str]:
    """What the proof found that a reader of the numbers must know."""
    warnings = []
    if proof.run_dtype_deviation is not None:
        noise = f"{proof.noise * proof.scale:.2g}"
        warnings.append(f"{dtype} moves logits by {noise} between implementations: smaller effects on logits are noise")
    if proof.routing_flips:
        warnings.append(
            f"rounding to {dtype} sent tokens to other experts on {proof.routing_flips} of {proof.trials} proof "
            "trials; in float32 they agree"
        )
    return warnings + [f"executor {name} was not used: {reason}" for name, reason in proof.rejected.items()]
