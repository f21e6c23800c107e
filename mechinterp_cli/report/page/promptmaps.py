"""Maps of single prompts: what every trial, score or token did on that prompt alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import missing, number, text
from mechinterp_cli.report.checkpoints import checkpoints_of
from mechinterp_cli.report.grid import COLUMN_TITLES
from mechinterp_cli.report.labels import show_text, show_token
from mechinterp_cli.report.rows import chosen_metric, distinct, having, records
from mechinterp_cli.report.tokens import NAMES
from mechinterp_cli.report.tokens import unit_of as unit_of_tokens
from mechinterp_cli.runs.manifest import Manifest

MAX_SETS = 200
"""Sets of units that have a map; more cannot be read."""
PLACES = ("neuron", "head", "kv_head", "span", "position")
"""What the columns of a map may be, the finest first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptMap:
    """The same cells on every prompt."""

    title: str
    quantity: str
    """What the values are, with their unit."""
    axis: str
    """What the columns are."""
    side: str
    """What the rows are."""
    rows: Sequence[str]
    """The last is drawn on top."""
    columns: Sequence[int | str]
    """A number is a position of the prompt's tokens, a text a span of the prompt or a name."""
    cells: Sequence[tuple[int, int]]
    """(row, column) of every value."""
    values: Mapping[int, npt.NDArray[np.float64]]
    """By prompt, `[cells]`; NaN where the prompt has no such cell."""
    signed: bool = True
    """Whether 0 is the middle of the colours; else it is their end."""
    scale: tuple[float, float, float] | None = None
    """Low, middle and high of the colours, as far from each other; None: as far as the prompt's own values go."""
    told: Mapping[int, Mapping[str, Sequence[object]]] = field(default_factory=dict)
    """By prompt what else is told of each cell: by name, `[cells]`."""
    wrong: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    """By prompt which cells are marked as wrong, `[cells]`."""
    about: Mapping[int, str] = field(default_factory=dict)
    """By prompt a sentence about all cells."""
    stream: str = ""
    """The only stream whose tokens the values are of; empty: they are of all."""
    absent: str = ""
    """What is said of a prompt that has no cell."""


def effect_maps(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> Iterator[PromptMap]:
    """A map per block of sites (and estimator, and ablation) of the effects in `results`.

    Args:
        manifest: The run's.
        tables: `results` and `summary`, where they are there.
    """
    results, summary = tables.get("results"), tables.get("summary")
    if results is None or summary is None or results.empty or "block" not in summary:
        return
    metric = chosen_metric(summary, manifest.config.get("metrics") or ())
    rows = checkpoints_of(summary).last(summary)
    rows = having(rows, metric=metric).drop_duplicates([name for name in ("trial", "estimator") if name in rows])
    effects = having(checkpoints_of(results).last(results), metric=metric)
    if "design" in rows:
        yield from _set_maps(rows[rows["set"].notna().to_numpy(dtype=bool)], unit_of(metric), effects)
        rows = having(rows, design="single")
    names = [name for name in ("block", "ablation", "estimator") if name in rows]
    for key, part in rows.groupby(names, sort=True, dropna=False):
        told = [text(value) for name, value in zip(names, key, strict=True) if name != "block"]
        title = ", ".join(filter(None, (text(part["site"].iloc[0]), *told)))
        own = having(effects, estimator=told[-1]) if "estimator" in names else effects
        yield _effect_map(f"{title} (block {text(key[0])})" if number(key[0]) else title, unit_of(metric), part, own)


def _effect_map(title: str, unit: str, trials: pd.DataFrame, effects: pd.DataFrame) -> PromptMap:
    """The effects of some trials; where several share a cell, the strongest on that prompt."""
    place = _place(trials)
    layers = sorted({int(layer) for layer in trials["layer"].dropna()})
    keys = [_key(value) for value in trials[place]] if place else [""] * len(trials)
    columns = [
        *sorted({key for key in keys if isinstance(key, int)}),
        *dict.fromkeys(k for k in keys if isinstance(k, str)),
    ]
    at_row, at_column = {layer: at for at, layer in enumerate(layers)}, {key: at for at, key in enumerate(columns)}
    rows = [0 if missing(layer) else at_row[int(number(layer))] for layer in trials["layer"]]
    places = [(row, at_column[key]) for row, key in zip(rows, keys, strict=True)]
    cells = sorted(set(places))
    at_cell = {cell: at for at, cell in enumerate(cells)}
    cell_of = {int(trial): at_cell[cell] for trial, cell in zip(trials["trial"], places, strict=True)}
    shown = [key if place == "position" and isinstance(key, int) else show_name(key) or "all" for key in columns]
    return PromptMap(
        title=title,
        quantity=f"effect on {unit}",
        axis=COLUMN_TITLES.get(place, ""),
        side="layer",
        rows=[str(layer) for layer in layers] or [""],
        columns=shown,
        cells=cells,
        values=by_prompt(effects, effects["trial"].map(cell_of), "effect", len(cells)),
    )


def _set_maps(trials: pd.DataFrame, unit: str, effects: pd.DataFrame) -> Iterator[PromptMap]:
    """The effects of sets that were ablated, or left alone: a row each, a column per ablation."""
    if trials.empty or len(trials) > MAX_SETS:
        return
    ablations = distinct(trials, "ablation")
    told = [
        show_text(text(row["label"]).removesuffix(f", {text(row['ablation'])}"))
        for row in records(trials[["label", "ablation"]])
    ]
    names = list(dict.fromkeys(told))
    at_row, at_column = ({name: at for at, name in enumerate(known)} for known in (names, ablations))
    places = [(at_row[name], at_column[text(own)]) for name, own in zip(told, trials["ablation"], strict=True)]
    cells = sorted(set(places))
    at_cell = {cell: at for at, cell in enumerate(cells)}
    cell_of = {int(trial): at_cell[place] for trial, place in zip(trials["trial"], places, strict=True)}
    yield PromptMap(
        title="sets",
        quantity=f"effect on {unit}",
        axis="ablation",
        side="ablated",
        rows=names,
        columns=ablations,
        cells=cells,
        values=by_prompt(effects, effects["trial"].map(cell_of), "effect", len(cells)),
    )


def show_name(name: object) -> str:
    """The name of a span, a head or a neuron."""
    return show_token(str(name), longest=60) if name != "" else ""


def _place(trials: pd.DataFrame) -> str:
    """The finest thing that varies; else whatever is given at all."""
    there = [name for name in PLACES if name in trials and trials[name].notna().any()]
    return next((name for name in there if trials[name].nunique(dropna=False) > 1), there[0] if there else "")


def _key(value: object) -> int | str:
    if isinstance(value, str):
        return value
    return "" if missing(value) else int(number(value))


def by_prompt(rows: pd.DataFrame, cells: pd.Series, column: str, count: int) -> dict[int, npt.NDArray[np.float64]]:
    """Values `[cells]` by prompt: means over draws, of several in a cell the strongest.

    Args:
        rows: With `prompt`, the column, and perhaps `draw`.
        cells: The cell of every row; null for rows that have none.
        column: Which values.
        count: How many cells there are.
    """
    frame = pd.DataFrame(
        {
            "prompt": rows["prompt"].to_numpy(dtype=np.int64),
            "cell": pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan),
            "value": rows[column].to_numpy(dtype=np.float64, na_value=np.nan),
        }
    )
    if "trial" in rows and "draw" in rows and rows["draw"].notna().any():
        means = frame.assign(trial=rows["trial"].to_numpy(dtype=np.int64)).groupby(["prompt", "trial"], sort=False)
        frame = means.agg({"prompt": "first", "cell": "first", "value": "mean"})
    frame = frame[np.isfinite(frame["cell"]) & np.isfinite(frame["value"])]
    # The strongest is written last, and stays.
    frame = frame.iloc[np.argsort(np.abs(frame["value"].to_numpy()), kind="stable")]
    prompts, at = np.unique(frame["prompt"].to_numpy(), return_inverse=True)
    values = np.full((len(prompts), count), np.nan)
    values[at, frame["cell"].to_numpy(dtype=np.int64)] = frame["value"].to_numpy()
    return {int(prompt): values[row] for row, prompt in enumerate(prompts)}


def score_maps(tables: Mapping[str, pd.DataFrame]) -> Iterator[PromptMap]:
    """A map of layers and heads per score of the table `sequences`.

    Args:
        tables: `sequences`, where it is there.
    """
    table = tables.get("sequences")
    if table is None or table.empty:
        return
    last = checkpoints_of(table).last(table)
    for score in distinct(last, "score"):
        rows = having(last, score=score)
        layers, heads = (sorted({int(value) for value in rows[name]}) for name in ("layer", "head"))
        cells = [(layer, head) for layer in range(len(layers)) for head in range(len(heads))]
        at = rows["layer"].map({v: i for i, v in enumerate(layers)}) * len(heads)
        yield PromptMap(
            title=f"{score} score",
            quantity=score,
            signed=bool((rows["value"] < 0).any()),
            axis="head",
            side="layer",
            rows=[str(layer) for layer in layers],
            columns=[str(head) for head in heads],
            cells=cells,
            values=by_prompt(rows, at + rows["head"].map({v: i for i, v in enumerate(heads)}), "value", len(cells)),
        )


def token_maps(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> Iterator[PromptMap]:
    """What each token of a prompt counts, a row per estimator: a map per unit of the table `inputs`.

    Args:
        manifest: The run's.
        tables: `inputs`, where it is there.
    """
    table = tables.get("inputs")
    if table is None or table.empty:
        return
    last = checkpoints_of(table).last(table)
    metric = chosen_metric(last, manifest.config.get("metrics") or ())
    rows = having(last, metric=metric)
    for estimator in distinct(rows, "estimator"):
        own = having(rows, estimator=estimator)
        columns = sorted({int(position) for position in own["position"]})
        at = own["position"].map({position: i for i, position in enumerate(columns)})
        name = NAMES.get(estimator, estimator)
        yield PromptMap(
            title=f"tokens, {name}",
            quantity=unit_of_tokens(estimator, metric),
            axis="token",
            side="",
            rows=[name],
            columns=columns,
            cells=[(0, at) for at in range(len(columns))],
            values=by_prompt(own, at, "value", len(columns)),
        )
