"""Values to tidy tables: trials, results, baselines, summary."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.specs import TrialSpec
from mechinterp_cli.metrics import METRICS
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.stats import Observations, StatsOptions, Status, observe, summarise
from mechinterp_cli.tasks.prompts import PromptSet

Floats = npt.NDArray[np.float64]


class Spec(Protocol):
    """What tables need to know of a trial."""

    @property
    def index(self) -> int:
        """Its number, from 0."""

    @property
    def family(self) -> str:
        """Trials of one family have their p-values corrected together."""

    def columns(self) -> dict[str, Any]:
        """Where it acts: `label`, `site`, ... and `block`."""


@dataclass(eq=False)
class Sweep:
    """Everything that a sweep measured.

    Args:
        prompts: The prompts.
        specs: The trials.
        metrics: Names along the last axis.
        values: [trials, prompts, draws, metrics]; NaN where nothing was computed.
        status: [trials, prompts] of `Status`: OK, TRIVIAL or ABSENT.
        streams: Stream name to [prompts, draws, metrics].
        base: The stream that is edited.
        other: The stream that normalises, if there is one.
        drawn: Whether the draws axis means anything.
    """

    prompts: PromptSet
    specs: Sequence[Spec]
    metrics: tuple[str, ...]
    values: Floats
    status: npt.NDArray[np.int8]
    streams: dict[str, Floats]
    base: str
    other: str | None
    drawn: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def clusters(self) -> list[str]:
        """Each prompt's cluster."""
        return [prompt.cluster for prompt in self.prompts.prompts]

    @property
    def groups(self) -> list[str]:
        """Each prompt's group."""
        return [prompt.group for prompt in self.prompts.prompts]

    def observe(self, metric: int, stats: StatsSection, draw: int | None = None) -> Observations:
        """Effects of one metric, of one draw or of the mean over draws."""

        def pick(x: Floats) -> Floats:
            chosen = x[..., metric]
            return chosen.mean(-1) if draw is None else chosen[..., draw]

        return observe(
            pick(self.values),
            self.status,
            pick(self.streams[self.base]),
            None if self.other is None else pick(self.streams[self.other]),
            share=stats.denominator_relative,
            floor=stats.denominator_absolute,
        )


def trial_rows(specs: Sequence[TrialSpec], anatomy: Anatomy, *, op: str, source: str | None) -> list[dict[str, Any]]:
    """One row per trial × edit."""
    rows = []
    for spec in specs:
        for edit, layer in enumerate(spec.layers):
            row = {"trial": spec.index, "edit": edit, "op": op, "site": spec.kind, "layer": layer, "source": source}
            row |= unit_columns(spec, layer, anatomy)
            row |= {"position": spec.place.position, "span": spec.place.span, "template": spec.place.template}
            row |= {"key_position": spec.keys and spec.keys.position, "key_span": spec.keys and spec.keys.span}
            row["set"] = None if spec.units is None or len(spec.units) == 1 else "+".join(map(str, spec.units))
            rows.append(row)
    return rows


def unit_columns(spec: TrialSpec, layer: int, anatomy: Anatomy) -> dict[str, int | None]:
    """Head and kv_head: for query heads the key/value head that they share, too."""
    heads = anatomy.layers[layer].heads
    if spec.head is None or heads is None:
        return {"head": None, "kv_head": None, "neuron": spec.neuron}
    if spec.by_kv_head:
        return {"head": None, "kv_head": spec.head, "neuron": None}
    return {"head": spec.head, "kv_head": heads.shared_by(spec.head), "neuron": None}


_INTEGERS = ("edit", "layer", "head", "kv_head", "neuron", "position", "key_position", "k", "ranking", "block")


def site_frame(specs: Sequence[Spec]) -> pd.DataFrame:
    """What a table needs to be read alone: where each trial acts, a row each, `trial` first."""
    return typed_frame([{"trial": spec.index, **spec.columns()} for spec in specs])


def typed_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows of numbers and texts that may be missing; `trial` never is."""
    frame = pd.DataFrame(rows)
    kinds = {name: "Int32" if name in _INTEGERS else "string[pyarrow]" for name in frame.columns if name != "trial"}
    return frame.astype(kinds)


def result_columns(
    sweep: Sweep, stats: StatsSection, trials: npt.NDArray[np.int64] | None = None
) -> dict[str, pa.Array | pa.ChunkedArray]:
    """One row per observation, by trial, prompt, metric and draw: columns for the `results` table.

    There may be hundreds of millions of rows, so no Python object is made for any of them: texts are looked up, chunk
    by chunk, in Arrow arrays of the distinct ones.

    Args:
        sweep: The values.
        stats: Thresholds.
        trials: Which trials; all where None.
    """
    chosen = np.arange(len(sweep.specs)) if trials is None else np.sort(trials)
    draws: Sequence[int | None] = range(sweep.values.shape[2]) if sweep.drawn else (None,)
    blocks = [(metric, draw) for metric in range(len(sweep.metrics)) for draw in draws]
    present = np.nonzero(sweep.status[chosen] != Status.ABSENT)
    at = (chosen[present[0]].astype(np.int32), present[1].astype(np.int32))
    trial, prompt = (np.repeat(index, len(blocks)) for index in at)
    block = np.tile(np.arange(len(blocks), dtype=np.int32), len(at[0]))
    sites = site_frame(sweep.specs).drop(columns="block")
    return {
        **{str(name): look_up(values, arrow_type(str(name)), trial) for name, values in sites.items()},
        "prompt": pa.array(prompt),
        "cluster": look_up(sweep.clusters, pa.string(), prompt),
        "group": look_up(sweep.groups, pa.string(), prompt),
        "metric": look_up([sweep.metrics[metric] for metric, _ in blocks], pa.string(), block),
        "draw": look_up([draw for _, draw in blocks], pa.int32(), block),
        **_measured(sweep, stats, at, blocks),
    }


def _measured(
    sweep: Sweep,
    stats: StatsSection,
    at: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]],
    blocks: Sequence[tuple[int, int | None]],
) -> dict[str, pa.Array | pa.ChunkedArray]:
    """The numbers of each trial and prompt in `at`, block after block: value, effect, normalized, status."""
    shape = (len(at[0]), len(blocks))
    numbers = {name: np.empty(shape) for name in ("value", "effect", "normalized")}
    status = np.empty(shape, dtype=np.int8)
    for i, (metric, draw) in enumerate(blocks):
        seen = sweep.observe(metric, stats, draw)
        status[:, i] = seen.status[at]
        for name, values in numbers.items():
            values[:, i] = getattr(seen, name)[at]
    # NaN that was computed stays NaN; a normalised value that is not defined is null.
    nothing = np.isnan(numbers["normalized"]) & (status != Status.NAN) | (sweep.other is None)
    return {
        "value": pa.array(numbers["value"].reshape(-1), from_pandas=False),
        "effect": pa.array(numbers["effect"].reshape(-1), from_pandas=False),
        "normalized": pa.array(numbers["normalized"].reshape(-1), mask=nothing.reshape(-1), from_pandas=False),
        "status": look_up([Status(i).label for i in range(len(Status))], pa.string(), status.reshape(-1)),
    }


_LOOK_UP_ROWS = 1 << 20
"""Rows of a chunk: Arrow's texts hold 2 GiB at most in one piece."""


def arrow_type(name: str) -> pa.DataType:
    """The type of a column that says where a trial acts."""
    return pa.int64() if name == "trial" else pa.int32() if name in _INTEGERS else pa.string()


def look_up(
    values: Sequence[Any] | pd.Series, kind: pa.DataType, rows: npt.NDArray[np.integer[Any]]
) -> pa.ChunkedArray:
    """`values[rows]`, null where there is none."""
    distinct = pa.array(values, kind, from_pandas=True)
    chunks = [distinct.take(pa.array(rows[i : i + _LOOK_UP_ROWS])) for i in range(0, len(rows), _LOOK_UP_ROWS)]
    return pa.chunked_array(chunks, type=kind)


def baseline_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Each prompt's metrics on the unedited streams."""
    rows = []
    for stream, values in sweep.streams.items():
        for i, prompt in enumerate(sweep.prompts.prompts):
            where = {"prompt": i, "cluster": prompt.cluster, "group": prompt.group, "stream": stream}
            for metric, name in enumerate(sweep.metrics):
                for draw in range(values.shape[1]):
                    value = float(values[i, draw, metric])
                    status = "ok" if value == value else "nan"
                    rows.append(
                        where
                        | {"metric": name, "draw": draw if sweep.drawn else None, "value": value, "status": status}
                    )
    return rows


def summary_frame(sweep: Sweep, stats: StatsSection, *, raw_margin: float | None = None) -> pd.DataFrame:
    """One row per trial × metric × group × aggregate; families are metric × site block.

    Warnings of the statistics are added to the sweep.
    """
    options = stats_options(stats, raw_margin=raw_margin)
    frames = []
    warned: dict[str, list[str]] = {}
    for metric, name in enumerate(sweep.metrics):
        base = sweep.streams[sweep.base][..., metric].mean(-1)
        other = None if sweep.other is None else sweep.streams[sweep.other][..., metric].mean(-1)
        summary = summarise(
            sweep.observe(metric, stats),
            base,
            other,
            clusters=sweep.clusters,
            families=[f"{name} {spec.family}" for spec in sweep.specs],
            groups=sweep.groups,
            ratio_of_means_only=name in METRICS and METRICS[name].ratio_of_means_only,
            options=options,
        )
        for warning in summary.warnings:
            warned.setdefault(warning, []).append(name)
        frames.append(pd.DataFrame(plain_columns(summary.columns)).assign(metric=name))
    for warning, names in warned.items():
        sweep.warnings.append(warning if len(names) == len(sweep.metrics) else f"{', '.join(names)}: {warning}")
    joined = pd.concat(frames, ignore_index=True)
    return joined.merge(site_frame(sweep.specs), on="trial", how="left", validate="many_to_one")


def plain_columns(columns: Any) -> dict[str, Any]:
    """Masked numbers as nullable pandas arrays that keep NaN and null apart."""
    plain: dict[str, Any] = {}
    for name, values in columns.items():
        if isinstance(values, np.ma.MaskedArray):
            arrow = pa.array(values.data, mask=np.ma.getmaskarray(values), from_pandas=False)
            plain[name] = pd.arrays.ArrowExtensionArray(arrow)
        else:
            plain[name] = values
    return plain


def stats_options(stats: StatsSection, *, raw_margin: float | None = None) -> StatsOptions:
    """What the statistics are told.

    Args:
        stats: The config's section.
        raw_margin: Smallest effect that matters in the metric's own unit, where nothing normalises.
    """
    return StatsOptions(
        draws=stats.bootstrap,
        level=stats.ci,
        method=stats.interval,
        flips=stats.flips,
        correction=stats.correction,
        q=stats.q,
        margin=stats.smallest_effect,
        raw_margin=raw_margin,
        seed=stats.seed,
    )
