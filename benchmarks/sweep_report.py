"""What the patching benchmark measured, as Markdown and JSON."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from mechinterp_cli.models.loaded import LoadedModel


@dataclass(frozen=True)
class EngineResult:
    """One way of running the engine on a case.

    Args:
        computed: Trials that were computed.
        seconds: Best of the rounds, for the whole sweep.
        flops: Work left, this benchmark's own count.
        plan_flops: The same by the engine's own plan.
        peak_bytes: Memory in use beyond that before the sweep.
        peak_total: All memory in use at the peak: resident, or allocated on the device.
        deviation: Largest |difference| from plain hooks, share of the logits' scale.
    """

    computed: int
    seconds: float
    flops: float
    plan_flops: float
    peak_bytes: int
    peak_total: int
    deviation: float

    @property
    def rate(self) -> float:
        """FLOP/s on the work left."""
        return self.flops / self.seconds


@dataclass(frozen=True)
class CaseResult:
    """One case: engine with trivial trials written and with every trial computed, plain hooks, matrix products.

    Args:
        key: Letter of the case.
        title: What is swept.
        pairs: Prompts.
        tokens: Tokens of each.
        trials: Trials of the sweep.
        executor: That proved itself.
        hooks_checked: Trials that plain hooks computed; their seconds are scaled from these.
        hooks_last_seconds: The whole sweep by plain hooks, logits of the last position only.
        hooks_full_seconds: The same with all positions' logits.
        written: The engine, trivial trials written.
        whole: The engine, every trial computed.
        sgemm: FLOP/s of matrix products of the model's own shapes.
        tolerance: Allowed deviation, share of the logits' scale.
        target: Ratio to plain hooks with last logits to be reached.
    """

    key: str
    title: str
    pairs: int
    tokens: int
    trials: int
    executor: str
    hooks_checked: int
    hooks_last_seconds: float
    hooks_full_seconds: float
    written: EngineResult
    whole: EngineResult
    sgemm: float
    tolerance: float
    target: float

    @property
    def ratio(self) -> float:
        """How many times faster than plain hooks with last logits, trivial trials written."""
        return self.hooks_last_seconds / self.written.seconds

    @property
    def equal(self) -> bool:
        """Whether the engine's values are those of the hooks."""
        return max(self.written.deviation, self.whole.deviation) <= self.tolerance


@dataclass(frozen=True)
class PrefixResult:
    """Case (a), every trial computed, behind a few-shot prefix that all prompts share.

    Args:
        prefix: Tokens of the prefix.
        pairs: Prompts.
        trials: Trials.
        seconds: Engine, all trials and the unedited passes.
        streams_seconds: The unedited passes alone.
        hooks_seconds: Plain hooks with last logits, scaled from a few trials.
        flops: Of the trials, without the unedited passes.
        attention_flops: Attention's part of these.
        deviation: Largest |difference| from plain hooks, share of the logits' scale.
        tolerance: Allowed deviation.
    """

    prefix: int
    pairs: int
    trials: int
    seconds: float
    streams_seconds: float
    hooks_seconds: float
    flops: float
    attention_flops: float
    deviation: float
    tolerance: float

    @property
    def per_trial(self) -> float:
        """Seconds that a trial takes beyond the unedited passes."""
        return (self.seconds - self.streams_seconds) / self.trials

    @property
    def equal(self) -> bool:
        """Whether the engine's values are those of the hooks."""
        return self.deviation <= self.tolerance


@dataclass(frozen=True)
class Report:
    """Everything that was measured."""

    facts: dict[str, str]
    cases: tuple[CaseResult, ...]
    prefixes: tuple[PrefixResult, ...]

    @property
    def equal(self) -> bool:
        """Whether all values are those of the hooks."""
        return all(case.equal for case in self.cases) and all(prefix.equal for prefix in self.prefixes)


def machine_facts(loaded: LoadedModel, rows_per_call: int, note: str) -> dict[str, str]:
    """What a reader needs to know of machine, model and libraries."""
    device = loaded.model.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {platform.machine()}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": f"{Path(loaded.source.id).name}, {loaded.source.dtype}, {loaded.source.attn_implementation}",
        "rows per call": str(rows_per_call),
        **({"note": note} if note else {}),
    }


def to_json(report: Report) -> str:
    """All numbers, SI units."""
    return json.dumps(asdict(report), indent=2) + "\n"


def markdown(report: Report) -> str:
    """Facts and tables."""
    parts = ["# Patching sweeps: engine against plain hooks", "; ".join(f"{k} {v}" for k, v in report.facts.items())]
    if report.cases:
        parts += [_table(_CASE_HEAD, [row for case in report.cases for row in _case_rows(case)]), _notes(report.cases)]
    if report.prefixes:
        parts += ["## Behind a shared few-shot prefix", _table(_PREFIX_HEAD, _prefix_rows(report.prefixes))]
    return "\n\n".join(parts) + "\n"


_CASE_HEAD = (
    "case", "pairs", "trivial trials", "computed", "engine s", "hooks last s", "×", "hooks full s", "×",
    "GFLOP", "GFLOP/s", "of sgemm", "peak MiB over base", "peak MiB", "max difference",
)  # fmt: skip


def _case_rows(case: CaseResult) -> list[list[str]]:
    return [_case_row(case, "written", case.written), _case_row(case, "computed", case.whole)]


def _case_row(case: CaseResult, name: str, engine: EngineResult) -> list[str]:
    return [
        f"({case.key}) {case.title}",
        str(case.pairs),
        name,
        f"{engine.computed} of {case.trials}",
        f"{engine.seconds:.2f}",
        f"{case.hooks_last_seconds:.1f}",
        f"**{case.hooks_last_seconds / engine.seconds:.1f}**",
        f"{case.hooks_full_seconds:.1f}",
        f"{case.hooks_full_seconds / engine.seconds:.1f}",
        f"{engine.flops / 1e9:.0f}",
        f"{engine.rate / 1e9:.0f}",
        f"{engine.rate / case.sgemm:.0%}",
        f"{engine.peak_bytes / 2**20:.0f}",
        f"{engine.peak_total / 2**20:.0f}",
        f"{engine.deviation:.1e}",
    ]


def _notes(cases: Sequence[CaseResult]) -> str:
    return "\n".join(f"- ({case.key}), {case.pairs} pairs of {case.tokens} tokens: {_note(case)}" for case in cases)


def _note(case: CaseResult) -> str:
    counts = [engine.plan_flops / engine.flops for engine in (case.written, case.whole)]
    return "; ".join(
        (
            f"executor {case.executor}",
            f"to reach with trivial trials written: {case.target:g} × hooks last (here {case.ratio:.1f})",
            f"plain hooks computed {case.hooks_checked} of {case.trials} trials",
            f"sgemm {case.sgemm / 1e9:.0f} GFLOP/s",
            f"the plan counts {counts[0]:.3f} and {counts[1]:.3f} of these GFLOP",
            f"allowed difference {case.tolerance:.0e}",
        )
    )


_PREFIX_HEAD = (
    "prefix", "pairs", "trials", "engine s", "of it streams s", "ms per trial", "× shortest", "by FLOPs",
    "attention's share of FLOPs", "hooks last s", "×", "max difference",
)  # fmt: skip


def _prefix_rows(results: Sequence[PrefixResult]) -> list[list[str]]:
    shortest = min(results, key=lambda result: result.prefix)
    return [
        [
            str(r.prefix),
            str(r.pairs),
            str(r.trials),
            f"{r.seconds:.2f}",
            f"{r.streams_seconds:.2f}",
            f"{1e3 * r.per_trial:.2f}",
            f"{r.per_trial / shortest.per_trial:.2f}",
            f"{r.flops / shortest.flops:.2f}",
            f"{r.attention_flops / r.flops:.1%}",
            f"{r.hooks_seconds:.1f}",
            f"{r.hooks_seconds / r.seconds:.1f}",
            f"{r.deviation:.1e}",
        ]
        for r in results
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
