"""Direct logit attribution: what every component adds to the logit difference itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rich.console import Group

from mechinterp_cli.report.cells import figure, interval, missing, number, text
from mechinterp_cli.report.grid import Heatmap, build_panel
from mechinterp_cli.report.labels import show_token
from mechinterp_cli.report.rows import Row, having, records
from mechinterp_cli.report.series import dot_of
from mechinterp_cli.report.shapes import Dot, DotPanel, Dots
from mechinterp_cli.report.tables import Column, text_table
from mechinterp_cli.report.terminal import terminal_heatmap
from mechinterp_cli.text import counted

MAX_DOTS = 20
MAX_SOURCES = 8
BAR = 12
"""Characters of the longest bar to either side."""
UNIT = "part of the logit difference (nats)"
MEANING = (
    "What each component writes into the last position's residual stream, through the final norm with its scale "
    "frozen, onto the unembedding of answer minus wrong answer. 0: it does not move the logit difference itself."
)
_COLUMNS = {
    "component": Column(left=True),
    "from": Column(left=True, broken=True),
    "part": Column(),
    "bar": Column(2, left=True),
    "interval": Column(1),
    "n": Column(3),
}


@dataclass(frozen=True, eq=False)
class Parts:
    """The components' parts, means over prompts.

    Args:
        means: Of all prompts: `component, part_of, layer, head, neuron, value, ci_low, ci_high, n`.
        by_span: Of all prompts, parts of heads: `layer, head, source_span, value, ci_low, ci_high, n`.
        by_token: Of single prompts: parts of heads by the token that they attend to.
    """

    means: pd.DataFrame
    by_span: pd.DataFrame
    by_token: pd.DataFrame

    def of(self, whole: str) -> list[Row]:
        """The parts that sum to `total` or `mlp`; those with a number, the largest magnitude first."""
        return _largest(records(having(self.means, part_of=whole)))

    @property
    def spans(self) -> list[Row]:
        """The parts of heads by span, the largest magnitude first."""
        return _largest([{**row, "component": "head"} for row in records(self.by_span)])

    @property
    def total(self) -> str:
        """The mean logit difference and its interval, in words; empty where it is not known."""
        rows = records(having(self.means, component="total")) if len(self.means) else []
        if not rows or missing(rows[0]["value"]):
            return ""
        ends = interval(rows[0]["ci_low"], rows[0]["ci_high"], 2)
        return f"{figure(rows[0]['value'], 2)} {ends}".strip()

    @property
    def prompts(self) -> int:
        """How many prompts."""
        return max((int(number(count)) for count in self.means["n"]), default=0) if len(self.means) else 0


def _largest(rows: Sequence[Row]) -> list[Row]:
    known = [row for row in rows if np.isfinite(number(row["value"]))]
    return sorted(known, key=lambda row: -abs(number(row["value"])))


def parts_of(direct: pd.DataFrame, components: pd.DataFrame, sources: pd.DataFrame) -> Parts:
    """The parts that a run has.

    Args:
        direct: Of single prompts, of one checkpoint; may be empty.
        components: Means over prompts with intervals; may be empty.
        sources: The same of heads by span; may be empty.
    """
    means, spans = (having(rows, group="all") if len(rows) else rows for rows in (components, sources))
    return Parts(
        means,
        spans,
        having(direct, component="source") if len(direct) else direct,
    )


def part_name(row: Mapping[str, object]) -> str:
    """A component in words: `head 8.2`, `mlp 11`, `neuron 3.141`, `embed`."""
    parts = [f"{int(number(row[name]))}" for name in ("layer", "head", "neuron") if not missing(row.get(name))]
    return " ".join(filter(None, (text(row["component"]).replace("_", " "), ".".join(parts))))


def direct_tables(parts: Parts, about: Sequence[str], *, count: int, width: int, plain: bool) -> Iterator[Group]:
    """The map of heads, the largest parts as bars, and what heads bring from which token.

    Args:
        parts: The parts.
        about: What stands below titles.
        count: How many of the largest.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    if parts.means.empty:
        return
    heads = head_map(parts, about)
    if heads is not None:
        yield terminal_heatmap(heads, width=width, plain=plain)
    # A run has at least a handful of components, so the list is longer than that of trials.
    sums = f"parts of the mean logit difference, {parts.total}" if parts.total else UNIT
    for heading, rows, most in (
        (f"direct logit attribution, largest components: {sums}", parts.of("total"), max(count, 12)),
        ("largest neurons, which are parts of their MLP's", _neurons(parts), count),
        ("largest parts of heads, by the span that they are carried from", parts.spans, count),
    ):
        if rows:
            yield _bars(rows, most, heading, width=width, plain=plain)
    yield from _sources_table(parts, width=width, plain=plain)


def _neurons(parts: Parts) -> list[Row]:
    return [row for row in parts.of("mlp") if not missing(row["neuron"])]


def _bars(rows: Sequence[Row], most: int, heading: str, *, width: int, plain: bool) -> Group:
    """The largest parts, each with a bar."""
    shown = rows[:most]
    reach = max(abs(number(row["value"])) for row in shown) or 1.0
    cells = [
        {
            "component": part_name(row),
            "from": text(row.get("source_span")),
            "part": figure(row["value"], sign=True),
            "bar": _bar(number(row["value"]) / reach, plain),
            "interval": interval(row["ci_low"], row["ci_high"]),
            "n": text(row["n"]),
        }
        for row in shown
    ]
    left = (f"{len(shown)} of {len(rows)}; nats",) if len(shown) < len(rows) else ("nats",)
    return text_table(cells, _COLUMNS, lines=(heading, *left), width=width, plain=plain)


def _bar(share: float, plain: bool) -> str:
    """A bar to the left of its axis where it is negative, to the right where it is positive."""
    block, axis = ("#", "|") if plain else ("█", "│")
    length = round(abs(share) * BAR)
    left, right = (block * length, "") if share < 0 else ("", block * length)
    return f"{left.rjust(BAR)}{axis}{right.ljust(BAR)}"


def _sources_table(parts: Parts, *, width: int, plain: bool) -> Iterator[Group]:
    """Of the first prompt: the strongest parts of heads by the token that they come from."""
    if parts.by_token.empty:
        return
    prompt = min(int(prompt) for prompt in parts.by_token["prompt"])
    rows = [row for row in records(having(parts.by_token, prompt=prompt)) if np.isfinite(number(row["value"]))]
    rows.sort(key=lambda row: -abs(number(row["value"])))
    cells = [
        {
            "component": part_name({**row, "component": "head"}),
            "from": f"position {int(number(row['source_position']))} {show_token(text(row['source_token']))}",
            "part": figure(row["value"], sign=True),
        }
        for row in rows[:MAX_SOURCES]
    ]
    columns = {"component": Column(left=True), "from": Column(left=True), "part": Column()}
    heading = (f"prompt {prompt}: the largest parts of heads, by the token that they are carried from",)
    yield text_table(cells, columns, lines=heading, width=width, plain=plain)


def head_map(parts: Parts, about: Sequence[str]) -> Heatmap | None:
    """Layers × heads.

    Args:
        parts: The parts.
        about: What stands in the subtitle.

    Returns:
        None where no head's part is known.
    """
    heads = having(parts.means, component="head") if len(parts.means) else parts.means
    if heads.empty:
        return None
    layers = tuple(sorted({int(layer) for layer in heads["layer"].dropna()})) or (0,)
    rows = heads.assign(status="ok")
    return Heatmap(
        title="Direct logit attribution of every head",
        subtitle=", ".join(filter(None, (*about, f"mean over {counted(parts.prompts, 'prompt')}"))),
        caption=MEANING,
        quantity="part (nats)",
        panels=(build_panel(rows, title="", column="head", layers=layers, quantity="value", tokens=()),),
    )


def part_dots(parts: Parts, about: Sequence[str], level: str = "95") -> Dots | None:
    """The parts that are no single head's, from the first layer to the last; the largest heads; the largest neurons.

    Args:
        parts: The parts.
        about: What stands in the subtitle.
        level: Of intervals, in percent.

    Returns:
        None where there is no part.
    """
    rows = parts.of("total") if len(parts.means) else []
    coarse = [row for row in rows if missing(row["head"])]
    coarse.sort(key=lambda row: (not missing(row["layer"]), number(row["layer"]), text(row["component"])))
    heads = [row for row in rows if not missing(row["head"])]
    panels = [
        DotPanel(title=title, x_title=UNIT, dots=_dots(part[:most]))
        for title, part, most in (
            ("embedding, MLPs and the rest, by layer", coarse, len(coarse)),
            (_title("heads", heads), heads, MAX_DOTS),
            (_title("neurons", _neurons(parts)), _neurons(parts), MAX_DOTS),
        )
        if part
    ]
    if not panels:
        return None
    caption = f"{MEANING} Dots: means over {counted(parts.prompts, 'prompt')}; bars: {level} % intervals."
    sums = f"The mean logit difference is {parts.total}: components and heads sum to it." if parts.total else ""
    lines = (", ".join(filter(None, about)), caption, sums)
    return Dots(title="Direct logit attribution", lines=tuple(filter(None, lines)), panels=tuple(panels))


def _title(noun: str, rows: Sequence[Row]) -> str:
    return f"the {MAX_DOTS} largest of {len(rows)} {noun}" if len(rows) > MAX_DOTS else noun


def _dots(rows: Sequence[Row]) -> tuple[Dot, ...]:
    return tuple(dot_of(part_name(row), "", row, "value") for row in rows)
