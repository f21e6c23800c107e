"""Proof, at every load, that an executor gives this model's own numbers.

Native logits are recorded before anything is swapped in. Every executor must give them back, and must
agree with plain hooks on a handful of trials of each kind that the plan uses, taken on the plan's longest
prompts that have them with its earliest and latest starts (a short prompt proves nothing about a sliding window).
Identity edits must give back the stream, replacing everything must give the other stream, and an edit
that must change the logits must change them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.edits import Bucket, Edit, RowValues, Site, Trial
from mechinterp_cli.engine.execute import EXECUTORS, Executor, executor_named
from mechinterp_cli.engine.gather import NotGatherable
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.engine.wavefront import Settings
from mechinterp_cli.errors import ProofError, RunError
from mechinterp_cli.models.anatomy import Anatomy, device_of
from mechinterp_cli.models.precision import in_float32
from mechinterp_cli.models.walk import forward

FLOAT32_TOLERANCE = 1e-4
"""Of the logits' scale; two implementations of SmolLM2 differ by 3e-5."""
NOISE_FACTOR = 3.0
PROOF_READS = 4
PROOF_PROMPTS = 3
EVERYTHING = (1, 3)
"""Places among the checks of the trials that replace a whole stream."""
BROKEN = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError, NotGatherable)
"""What model code raises when it is called in a way that it was not made for."""


@dataclass(frozen=True)
class Proof:
    """What was proved, for the manifest.

    Deviations are maxima over all logits that are read, as a share of the logits' scale (their largest
    magnitude on the unedited stream).
    """

    executor: str
    deviation: float
    tolerance: float
    scale: float
    """Largest |logit| of the unedited streams."""
    noise: float
    """Between two implementations of the same forward pass, share of scale, in the run's dtype."""
    run_dtype_deviation: float | None
    """The same comparison in the run's dtype, where that is not float32."""
    by_kind: dict[str, float] = field(default_factory=dict)
    """Largest deviation by `kind:op`."""
    trials: int = 0
    length: int = 0
    rejected: dict[str, str] = field(default_factory=dict)
    """Executors that were tried before, and why they were not used."""
    routing_flips: int = 0
    """Half precision with experts: trials beyond the tolerance because an expert choice flipped."""


@dataclass(frozen=True)
class Case:
    """Some prompts of a bucket and the trials that are compared on them; the checks come first."""

    bucket: Bucket
    trials: list[Trial]


def logits_measure(logits: Tensor, _prompt: Tensor, _read: Tensor) -> Tensor:
    """The logits themselves, as if each were a metric."""
    return logits


def prove(
    model: nn.Module,
    anatomy: Anatomy,
    works: Sequence[Work],
    *,
    executor: str = "auto",
    settings: Settings | None = None,
    per_kind: int = 3,
) -> Proof:
    """Find the first executor that proves itself on this plan.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        works: The plan's trials by bucket.
        executor: `auto`, or the only one to try.
        settings: Sizes.
        per_kind: Trials of each kind and operation that are compared.

    Raises:
        ProofError: None could; says what each one's failure was.
    """
    settings = settings or Settings()
    cases = cases_of(works, anatomy, per_kind)
    rejected: dict[str, str] = {}
    with torch.no_grad():
        noise, scale = implementation_noise(model, cases[0].bucket)
        for name in EXECUTORS if executor == "auto" else (executor,):
            reason = unfit(name, anatomy)
            if reason is None:
                outcome = _try(name, model, anatomy, cases, settings, noise)
                if isinstance(outcome, Proof):
                    return replace(outcome, noise=noise, scale=scale, rejected=rejected)
                reason = outcome
            rejected[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
    raise ProofError(
        f"no executor could prove itself on this model ({reasons})",
        "Nothing was computed. Set engine.executor to try one alone, or leave out the site kinds named above.",
    )


def unfit(name: str, anatomy: Anatomy) -> str | None:
    """Why an executor cannot be right for this anatomy, known without trying."""
    if name == "hooks":
        return None
    if not anatomy.chained:
        return "a layer's output is not the next layer's input"
    if name == "packed" and not anatomy.causal:
        return "the model is not causal: a later token changes earlier logits"
    if name == "packed" and not all(layer.by_interface for layer in anatomy.layers):
        return "attention bypasses transformers' attention interface in some layer"
    return None


def cases_of(works: Sequence[Work], anatomy: Anatomy, per_kind: int) -> list[Case]:
    """The longest prompts that have trials; then the longest of those that have a kind of trial not seen so far."""
    seen: set[str] = set()
    cases: list[Case] = []
    for work in sorted(works, key=lambda w: (bool(w.trials), w.bucket.length), reverse=True):
        unseen = [trial for trial in work.trials if kinds_of(trial) not in seen]
        if cases and not unseen:
            continue
        seen |= {kinds_of(trial) for trial in unseen}
        samples = sample(unseen, per_kind)
        prompts = touched_prompts(samples, work.bucket.size)
        bucket = pick(work.bucket, prompts)
        cropped = [crop(trial, prompts, i) for i, trial in enumerate(samples)]
        cases.append(Case(bucket, checks(bucket, anatomy) + cropped))
    return cases


def touched_prompts(trials: Sequence[Trial], size: int) -> list[int]:
    """A few prompts, among them one for every trial that the trial edits: without it nothing would be proved."""
    chosen: set[int] = set()
    for trial in trials:
        touched = [p for p in range(size) if any(edit.positions[p] for edit in trial.edits)]
        if touched and not chosen & set(touched):
            chosen.add(touched[0])
    others = (prompt for prompt in range(size) if prompt not in chosen)
    return sorted(chosen | set(islice(others, max(0, PROOF_PROMPTS - len(chosen)))))


def pick(bucket: Bucket, prompts: list[int]) -> Bucket:
    """Some prompts of a bucket, read at a few of the positions that it is read at, the first and the last among them.

    All logits of all positions of a trial would not fit into memory.
    """
    reads = bucket.read.shape[1]
    few = sorted({round(i * (reads - 1) / (PROOF_READS - 1)) for i in range(PROOF_READS)})
    return Bucket(
        {name: tokens[prompts] for name, tokens in bucket.tokens.items()},
        bucket.read[prompts][:, few],
        {name: noise[prompts] for name, noise in bucket.noise.items()},
    )


def crop(trial: Trial, prompts: list[int], index: int) -> Trial:
    """A trial on some prompts only; sources outside them are folded back inside."""
    return Trial(
        index, trial.stream, tuple(_cropped(edit, prompts) for edit in trial.edits), tuple(range(len(prompts)))
    )


def _cropped(edit: Edit, prompts: list[int]) -> Edit:
    sources, values = edit.source_prompts, edit.values
    if edit.op in ("constant", "add") and values is not None and values.shape[0] > 1:
        values = values.of(prompts) if isinstance(values, RowValues) else values[prompts]
    place = {prompt: i for i, prompt in enumerate(prompts)}
    return replace(
        edit,
        positions=tuple(edit.positions[p] for p in prompts),
        keys=None if edit.keys is None else tuple(edit.keys[p] for p in prompts),
        source_prompts=None
        if sources is None
        else tuple(place.get(sources[p], sources[p] % len(prompts)) for p in prompts),
        values=values,
    )


def sample(trials: Sequence[Trial], per_kind: int) -> list[Trial]:
    """Of each kind and operation the earliest, the latest and some between, by layer and start."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(kinds_of(trial), []).append(trial)
    chosen: list[Trial] = []
    for members in groups.values():
        ordered = sorted(members, key=lambda t: (min(e.site.layer for e in t.edits), _first(t), t.index))
        steps = min(per_kind, len(ordered))
        picks = {round(i * (len(ordered) - 1) / max(1, steps - 1)) for i in range(steps)}
        early = min(range(len(ordered)), key=lambda i: _first(ordered[i]))
        late = max(range(len(ordered)), key=lambda i: _first(ordered[i]))
        chosen.extend(ordered[i] for i in sorted(picks | {early, late}))
    return chosen


def _first(trial: Trial) -> int:
    return min((p for edit in trial.edits for positions in edit.positions for p in positions), default=0)


def kinds_of(trial: Trial) -> str:
    """`kind:op` of a trial's edits."""
    return "+".join(sorted({f"{edit.site.kind}:{edit.op}" for edit in trial.edits}))


def checks(bucket: Bucket, anatomy: Anatomy) -> list[Trial]:
    """Identity at a middle layer, everything replaced after the last and before the first, and one that must show.

    One of the two must give the other stream. Which one is the model's affair: some hand their layers more than the
    stream, so that before the first is not everything, and some look back at earlier layers after the last.
    """
    names = list(bucket.tokens)
    base, other = names[-1], names[0]
    every = tuple(range(bucket.size))
    all_positions = (tuple(range(bucket.length)),) * bucket.size
    some = ((bucket.length // 2,),) * bucket.size
    middle = Site("resid_pre", anatomy.n_layers // 2)
    first, last = Site("resid_pre", 0), Site("resid_post", anatomy.n_layers - 1)
    return [
        Trial(0, base, (Edit(middle, "replace", some, source=base),), every),
        Trial(1, base, (Edit(last, "replace", all_positions, source=other),), every),
        Trial(2, base, (Edit(last, "zero", all_positions),), every),
        Trial(3, base, (Edit(first, "replace", all_positions, source=other),), every),
    ]


def _try(
    name: str,
    model: nn.Module,
    anatomy: Anatomy,
    cases: Sequence[Case],
    settings: Settings,
    noise: float,
) -> Proof | str:
    """The proof of one executor, or why it failed."""
    settings = replace(settings, rows_per_call=max(settings.rows_per_call, 64))
    executor = executor_named(name, model, anatomy, settings)
    oracle = executor_named("hooks", model, anatomy, settings)
    dtype = next(model.parameters()).dtype
    try:
        with in_float32(model) as wide:
            found = _compare_all(executor, oracle, model, cases)
            tolerance = FLOAT32_TOLERANCE if wide else NOISE_FACTOR * noise
            if isinstance(found, str):
                return found
            if found.worst > tolerance:
                return f"{found.where} deviates by {found.worst:.1e} of the logits' scale, {tolerance:.0e} are allowed"
        narrow, flips = None, 0
        if wide and dtype != torch.float32:
            half = _compare_all(executor, oracle, model, cases)
            if isinstance(half, str):
                return half
            narrow, limit = half.worst, NOISE_FACTOR * noise
            flips = sum(d > limit for d in half.by_trial) if has_experts(anatomy) else 0
            if narrow > limit and not flips:
                return f"{half.where} deviates by {narrow:.1e} of the logits' scale in {dtype}, {limit:.1e} are allowed"
    except RunError as error:
        return error.cause
    except BROKEN as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return Proof(
        name,
        found.worst,
        tolerance,
        0.0,
        noise,
        narrow,
        found.by_kind,
        len(found.by_trial),
        cases[0].bucket.length,
        {},
        flips,
    )


@dataclass(frozen=True)
class _Comparison:
    worst: float
    where: str
    by_kind: dict[str, float]
    by_trial: list[float]


def _compare_all(executor: Executor, oracle: Executor, model: nn.Module, cases: Sequence[Case]) -> _Comparison | str:
    """Largest deviations over all cases, or what broke in the first that broke."""
    found: list[_Comparison] = []
    for case in cases:
        one = _compare(executor, oracle, model, case)
        if isinstance(one, str):
            return one
        found.append(one)
    worst = max(found, key=lambda c: c.worst)
    by_kind: dict[str, float] = {}
    for kind, deviation in (item for one in found for item in one.by_kind.items()):
        by_kind[kind] = max(by_kind.get(kind, 0.0), deviation)
    return _Comparison(worst.worst, worst.where, by_kind, [d for one in found for d in one.by_trial])


def _compare(executor: Executor, oracle: Executor, model: nn.Module, case: Case) -> _Comparison | str:
    """Largest deviations of an executor from the native logits and from plain hooks."""
    bucket, trials = case.bucket, case.trials
    native = {name: native_logits(model, bucket, name) for name in bucket.tokens if name not in bucket.noise}
    got = executor.run(bucket, trials, logits_measure)
    want = got if executor is oracle else oracle.run(bucket, trials, logits_measure)
    scale = max(float(x.abs().max()) for x in want.streams.values()) or 1.0
    deviations = {f"stream {n}": float((got.streams[n] - x).abs().max()) / scale for n, x in native.items()}
    deviations |= {f"hooks' stream {n}": float((want.streams[n] - x).abs().max()) / scale for n, x in native.items()}
    by_trial = ((got.trials - want.trials).abs().amax((1, 2, 3)) / scale).tolist()
    by_kind: dict[str, float] = {}
    for trial, deviation in zip(trials, by_trial, strict=True):
        by_kind[kinds_of(trial)] = max(by_kind.get(kinds_of(trial), 0.0), deviation)
    names = list(bucket.tokens)
    deviations["identity edit"] = float((got.trials[0] - got.streams[names[-1]]).abs().max()) / scale
    deviations["everything replaced"] = min(
        float((got.trials[i] - got.streams[names[0]]).abs().max()) / scale for i in EVERYTHING
    )
    if float((got.trials[2] - got.streams[names[-1]]).abs().max()) == 0.0:
        return "zeroing the last layer's output changes nothing"
    if any(d != d for d in [*deviations.values(), *by_trial]):
        return "NaN in the logits"
    merged = {**deviations, **by_kind}
    where = max(merged, key=lambda key: merged[key])
    return _Comparison(merged[where], where, by_kind, by_trial)


def native_logits(model: nn.Module, bucket: Bucket, stream: str) -> Tensor:
    """Logits [prompts, reads, vocab] of the model as it came."""
    logits = forward(model, bucket.tokens[stream].to(device_of(model)))
    return logits[torch.arange(bucket.size)[:, None], bucket.read].double().cpu()


def implementation_noise(model: nn.Module, bucket: Bucket) -> tuple[float, float]:
    """How far two implementations of the same pass differ (share of scale), and the scale itself.

    Eager against sdpa attention where the model has both, a batch against its prompts one by one, and a
    half-precision model against itself in float32.
    """
    name = next(iter(bucket.tokens))
    native = native_logits(model, bucket, name)
    scale = float(native.abs().max()) or 1.0
    alone = torch.cat([native_logits(model, _one(bucket, i), name) for i in range(bucket.size)])
    noise = float((alone - native).abs().max())
    with suppress(*BROKEN), other_implementation(model) as swapped:
        if swapped:
            noise = max(noise, float((native_logits(model, bucket, name) - native).abs().max()))
    if next(model.parameters()).dtype != torch.float32:
        with in_float32(model):
            noise = max(noise, float((native_logits(model, bucket, name) - native).abs().max()))
    return noise / scale, scale


def _one(bucket: Bucket, index: int) -> Bucket:
    return Bucket({n: t[index : index + 1] for n, t in bucket.tokens.items()}, bucket.read[index : index + 1], {})


@contextmanager
def other_implementation(model: Any) -> Iterator[bool]:
    """The model with eager attention for sdpa or the other way round; yields whether it could be."""
    now = str(getattr(model.config, "_attn_implementation", ""))
    other = {"sdpa": "eager", "eager": "sdpa"}.get(now)
    if other is None or not getattr(model, "_supports_sdpa", False):
        yield False
        return
    try:
        model.set_attn_implementation(other)
        swapped = True
    except BROKEN:
        swapped = False
    try:
        yield swapped
    finally:
        model.set_attn_implementation(now)


def has_experts(anatomy: Anatomy) -> bool:
    """Whether some layer's MLP is a mixture of experts."""
    return any("mixture of experts" in layer.missing.get("neuron", "") for layer in anatomy.layers)
