"""Estimates of effects: maps of each site block, the strongest of each estimator, and these beside exact effects."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Group

from mechinterp_cli.report.behind import Behind, behind
from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import figure, interval, missing, number, text
from mechinterp_cli.report.grid import ColourScale, Heatmap, HeatmapSpec, build_heatmap
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.tables import Column, text_table
from mechinterp_cli.report.terminal import describe_place, strongest
from mechinterp_cli.runs.estimators import signed
from mechinterp_cli.text import counted

NAMES = {
    "atp": "AtP",
    "atp_star": "AtP*",
    "ig_inputs": "integrated gradients (inputs)",
    "conductance": "integrated gradients (conductance)",
    "relp": "RelP",
}
MAX_NEURONS = 256
"""A block of more neurons is drawn by layer and position: each cell is the strongest of them."""
MAX_STRONGEST = 5
"""Rows of the table of each estimator, where there are several."""
_COLUMNS = {
    "#": Column(),
    "where": Column(left=True, broken=True),
    "estimate": Column(),
    "exact": Column(1),
    "interval": Column(2),
    "n": Column(3),
    "computed as": Column(4, left=True),
}


@dataclass(frozen=True, eq=False)
class Estimates:
    """What the estimators say of one metric, over all prompts, at the last checkpoint.

    Args:
        rows: Of the summary.
        metric: Which.
        spec: What pictures say.
    """

    rows: pd.DataFrame
    metric: str
    spec: HeatmapSpec

    @cached_property
    def estimators(self) -> list[str]:
        """In the order of the table."""
        return distinct(self.rows, "estimator")

    @property
    def quantity(self) -> str:
        """`normalized`, or `effect` where there is nothing to normalise by."""
        return "effect" if self.spec.aggregate == "mean" else "normalized"

    @property
    def exact(self) -> str:
        """The column of exact effects in the same unit."""
        return "exact" if self.quantity == "effect" else "exact_normalized"

    @property
    def unit(self) -> str:
        """What the numbers are."""
        return f"effect on {unit_of(self.metric)}" if self.quantity == "effect" else "normalised effect"

    @cached_property
    def kinds(self) -> list[str]:
        """Kinds of sites."""
        return distinct(self.rows, "site")

    def of(self, estimator: str) -> pd.DataFrame:
        """The rows of one estimator."""
        return having(self.rows, estimator=estimator)

    def called(self, estimator: str) -> str:
        """An estimator's name, with its steps where it has some."""
        name, rows = NAMES.get(estimator, estimator), self.of(estimator)
        steps = [int(step) for step in rows["steps"].dropna().unique()] if "steps" in rows else []
        return f"{name}, {counted(steps[0], 'step')}" if steps else name


def estimates_of(summary: pd.DataFrame, metric: str, spec: HeatmapSpec) -> Estimates:
    """The estimates that pictures and tables are of.

    Args:
        summary: Of one checkpoint; may be empty.
        metric: Which metric.
        spec: Titles; the aggregate is chosen here.
    """
    rows = having(summary, metric=metric, group="all") if len(summary) else summary
    normalised = len(rows) and bool((rows["aggregate"] == "ratio_of_means").fillna(False).any())
    aggregate = "ratio_of_means" if normalised else "mean"
    return Estimates(
        having(rows, aggregate=aggregate) if len(rows) else rows, metric, replace(spec, aggregate=aggregate)
    )


def estimate_maps(estimates: Estimates) -> Iterator[tuple[str, Heatmap]]:
    """A map per estimator and site block.

    Yields:
        (file name without ending, picture).
    """
    rows = estimates.rows
    if rows.empty:
        return
    if "" in (estimates.spec.tokens or {}):
        rows = rows.assign(template=pd.Series(pd.NA, index=rows.index, dtype=object))
    for estimator in estimates.estimators:
        for block, part in having(rows, estimator=estimator).groupby("block", sort=True, dropna=False):
            kind = str(part["site"].iloc[0])
            at = 0 if missing(block) else int(str(block))
            yield f"{at:02d}-{kind}-{estimator}-{estimates.metric}", _map(estimates, estimator, kind, part)


def _map(estimates: Estimates, estimator: str, kind: str, part: pd.DataFrame) -> Heatmap:
    spec, sized = estimates.spec, not signed(estimator, kind)
    neurons = part["neuron"].nunique()
    folded = neurons > MAX_NEURONS
    notes = [
        spec.normalization,
        f"Each cell is the strongest of {counted(neurons, 'neuron')}." if folded else "",
        "Estimates are sizes (GradDrop): they have no sign." if sized else "",
    ]
    title = f"{kind}, estimated by {estimates.called(estimator)}, {spec.title}"
    told = replace(spec, title=title, normalization=" ".join(filter(None, notes)))
    made = build_heatmap(_fold(part, estimates.quantity) if folded else part, told)
    made = replace(made, quantity=f"estimated {made.quantity}")
    return replace(made, scale=ColourScale(low=0.0, middle=0.0, high=made.limit)) if sized else made


def _fold(part: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Of all neurons at one place the strongest, as one row of no neuron."""
    sizes = pd.to_numeric(part[quantity], errors="coerce").astype("float64").abs().fillna(-1.0)
    places = [name for name in ("layer", "position", "span", "template") if name in part]
    order = np.argsort(-sizes.to_numpy(), kind="stable")
    # Few columns are sorted: there may be a million rows.
    first = ~part[places].iloc[order].duplicated().to_numpy()
    kept = part.iloc[np.sort(order[first])]
    return kept.assign(neuron=pd.Series(pd.NA, index=kept.index, dtype="Int64"))


def strongest_rows(estimates: Estimates, estimator: str, count: int) -> pd.DataFrame:
    """The rows of one estimator with the largest estimates."""
    return strongest(estimates.of(estimator), count=count, quantity=estimates.quantity)


def strongest_tables(estimates: Estimates, *, count: int, width: int, plain: bool) -> Iterator[Group]:
    """The strongest of each estimator, beside what is exact of them.

    Args:
        estimates: The estimates.
        count: How many.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    several = len(estimates.estimators) > 1
    for estimator in estimates.estimators:
        rows = records(strongest_rows(estimates, estimator, min(count, MAX_STRONGEST) if several else count))
        cells = [
            {
                "#": str(place),
                "where": describe_place(row, estimates.spec.tokens or {}, plain=plain),
                "estimate": figure(row[estimates.quantity]),
                "exact": figure(row.get(estimates.exact)),
                "interval": interval(row.get("ci_low"), row.get("ci_high")),
                "n": text(row.get("n")),
                "computed as": text(row.get("part")),
            }
            for place, row in enumerate(rows, start=1)
        ]
        if not cells:
            continue
        sizes = "; sizes without sign" if not signed(estimator, "all", estimates.kinds) else ""
        lines = (f"strongest estimates by {estimates.called(estimator)}: {estimates.unit}{sizes}",)
        notes = {"interval": "of the estimate, over prompts"}
        yield text_table(cells, _COLUMNS, lines=lines, width=width, plain=plain, notes=notes)


@dataclass(frozen=True, kw_only=True)
class EstimatePanel:
    """Verified nodes of one estimator."""

    title: str
    below: str
    """What stands below the title: how far the two agree."""
    sites: tuple[str, ...]
    """`[points]`, kinds of sites."""
    drawn: tuple[bool, ...]
    """`[points]`, whether the node was drawn at random; else it is among the strongest estimates."""
    estimate: npt.NDArray[np.float64]
    exact: npt.NDArray[np.float64]
    behind: tuple[Behind, ...] = ()
    """What stands behind each point, and where it is."""

    @property
    def domain(self) -> tuple[float, float]:
        """Both axes' range, with 0 and a margin."""
        everything = np.concatenate([self.estimate, self.exact, [0.0]])
        low, high = float(everything.min()), float(everything.max())
        margin = 0.05 * (high - low) or 1.0
        return low - margin, high + margin


@dataclass(frozen=True, kw_only=True)
class EstimateScatter:
    """One picture."""

    title: str
    lines: tuple[str, ...]
    unit: str
    kinds: tuple[str, ...]
    """Kinds of sites in the order of their colours."""
    panels: tuple[EstimatePanel, ...]


def estimate_scatter(estimates: Estimates, verification: pd.DataFrame) -> EstimateScatter | None:
    """Every verified node: what was estimated across, what is exact up.

    Args:
        estimates: The estimates.
        verification: Of the same metric.

    Returns:
        None where nothing was verified.
    """
    rows = estimates.rows
    if rows.empty or "part" not in rows or rows["part"].isna().all():
        return None
    made = [_scatter_panel(estimates, name, verification) for name in estimates.estimators]
    panels = [panel for panel in made if len(panel.sites)]
    if not panels:
        return None
    sized = [estimates.called(name) for name in estimates.estimators if not signed(name, "all", estimates.kinds)]
    lines = [
        estimates.spec.subtitle,
        "Filled: nodes drawn at random; hollow: nodes computed because an estimate of theirs is among the strongest. "
        "On the dashed line the estimate is exact; 0: no effect.",
        f"{' and '.join(sized)}: GradDrop gives sizes without sign, so |estimate| and |exact| are drawn." * bool(sized),
    ]
    kinds = tuple(dict.fromkeys(site for panel in panels for site in panel.sites))
    return EstimateScatter(
        title=f"Estimates against exact effects, {estimates.spec.title}",
        lines=tuple(filter(None, lines)),
        unit=estimates.unit,
        kinds=kinds,
        panels=tuple(panels),
    )


def _scatter_panel(estimates: Estimates, estimator: str, verification: pd.DataFrame) -> EstimatePanel:
    chosen = estimates.of(estimator)
    # A sweep of neurons has a million rows, of which a few hundred were computed exactly.
    verified = chosen[chosen["part"].notna().to_numpy(dtype=bool)]
    rows = [row for row in records(verified) if _known(row, estimates)]
    names = (estimates.quantity, estimates.exact)
    estimate, exact = (np.array([number(row[name]) for row in rows], dtype=np.float64) for name in names)
    if not signed(estimator, "all", estimates.kinds):
        estimate, exact = np.abs(estimate), np.abs(exact)
    return EstimatePanel(
        title=estimates.called(estimator),
        below=_agreement(verification, estimator),
        sites=tuple(text(row["site"]) for row in rows),
        drawn=tuple("random" in text(row["part"]) for row in rows),
        estimate=estimate,
        exact=exact,
        behind=tuple(_behind(row, estimates) for row in rows),
    )


def _behind(row: Row, estimates: Estimates) -> Behind:
    """The node, and the interval of its estimate."""
    return {"where": describe_place(row, estimates.spec.tokens or {}), **behind(row)}


def _known(row: Row, estimates: Estimates) -> bool:
    numbers = (number(row[estimates.quantity]), number(row.get(estimates.exact)))
    return all(map(np.isfinite, numbers))


def _agreement(verification: pd.DataFrame, estimator: str) -> str:
    """Pearson over all kinds of sites, or the one kind that there is."""
    rows = having(verification, estimator=estimator, part="random") if len(verification) else verification
    chosen: Mapping[str, object] | None = next(iter(records(rows)), None)
    if chosen is None:
        return ""
    count = counted(int(number(chosen["rows"])), "random node")
    if missing(chosen["pearson"]):
        return f"no Pearson: {text(chosen['reason']) or 'undefined'} ({count})"
    return f"Pearson {figure(chosen['pearson'], 2)} on {count}"
