"""The table of architectures as Markdown."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mechinterp_cli.models.kinds import SITE_KINDS

EXECUTORS = ("packed", "resume", "hooks")
"""Executors in the order in which they are tried."""

NONE = "none"
"""Stands for the executor where none proved itself."""


@dataclass(frozen=True)
class Examination:
    """What was found about one entry of the causal-LM mapping.

    Args:
        entry: Its model type.
        layers: Number of decoder layers of the tiny model.
        softmax: Layers whose attention goes through transformers' attention interface.
        sites: Kinds of site that at least one layer has.
        executor: One of `EXECUTORS`, or `NONE`.
        deviation: Largest deviation that the proof found, as a fraction of the logits' scale.
        reason: Why no executor, or no faster one, was taken.
        seconds: How long building and proving took.
    """

    entry: str
    layers: int = 0
    softmax: tuple[int, ...] = ()
    sites: tuple[str, ...] = ()
    executor: str = NONE
    deviation: float | None = None
    reason: str = ""
    seconds: float = 0.0


def markdown(rows: Sequence[Examination], version: str) -> str:
    """The whole page.

    Args:
        rows: One per entry, in the order of the page.
        version: Of transformers.
    """
    head = [
        "# Architectures",
        "",
        f"Every entry of the causal-LM mapping of transformers {version}, as a tiny random model (float32, CPU), and",
        "the fastest executor that proved itself on it against plain hooks.",
        "Written by `python -m benchmarks.architectures --out docs/architectures.md`.",
        "",
        _totals(rows),
        "",
        "- **softmax**: the layers whose attention goes through transformers' attention interface.",
        "- **not declared**: kinds of site that no layer of the model has.",
        "- **deviation**: the largest one found by the proof, as a fraction of the logits' scale.",
        "",
        "| entry | layers | softmax | not declared | executor | deviation | why no faster one |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(_line, rows), "", "## By cause", "", *_by_cause(rows), ""])


def _totals(rows: Sequence[Examination]) -> str:
    counts = {name: sum(row.executor == name for row in rows) for name in (*EXECUTORS, NONE)}
    runs = len(rows) - counts[NONE]
    parts = ", ".join(f"{counts[name]} {name}" for name in EXECUTORS)
    return f"**{runs} of {len(rows)} entries run: {parts}; {counts[NONE]} do not.**"


def _line(row: Examination) -> str:
    softmax = "all" if row.layers and len(row.softmax) == row.layers else " ".join(map(str, row.softmax)) or "-"
    absent = " ".join(f"`{kind}`" for kind in SITE_KINDS if kind not in row.sites) if row.layers else "-"
    deviation = "-" if row.deviation is None else f"{row.deviation:.0e}"
    cells = (f"`{row.entry}`", str(row.layers or "-"), softmax, absent or "none", row.executor, deviation, row.reason)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _by_cause(rows: Sequence[Examination]) -> list[str]:
    """One line per executor and kind of reason, the most common first."""
    causes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.reason:
            causes[row.executor, kind_of_reason(row.reason)].append(f"`{row.entry}`")
    ordered = sorted(causes.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"- **{executor}** ({len(found)}), {reason}: {', '.join(found)}" for (executor, reason), found in ordered]


def kind_of_reason(reason: str) -> str:
    """A reason without its measurements and sizes, so that like reasons are equal."""
    reason = re.sub(r"(?<=: )[^;]*? deviates by [^,]+, \S+ are allowed", "deviates", reason)
    return re.sub(r"\b\d+(\.\d+)?(e[-+]\d+)?\b", "N", reason)
