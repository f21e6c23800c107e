"""Which units matter most, from the tables of an earlier run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.config.problems import nearest
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.ablate.options import RankingRun, UnitKind
from mechinterp_cli.methods.ablate.units import Unit
from mechinterp_cli.methods.binder import KeyPath
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.reading import is_run, read_run
from mechinterp_cli.runs.sides import REMEDIES, main_rows
from mechinterp_cli.runs.tables import read_parquet, to_frame

PATH: KeyPath = ("ablate", "cumulative", "ranking")
_PATCH_KINDS: Mapping[str, UnitKind] = {"z": "head", "neuron": "neuron", "attn_out": "attention", "mlp_out": "mlp"}
"""Which units the sites of `patch` are."""
_NUMBER: Mapping[str, str | None] = {
    "head": "head",
    "kv_head": "kv_head",
    "neuron": "neuron",
    "attention": None,
    "mlp": None,
    "layer": None,
}
"""Units that a ranking can name, and the column that tells those of one layer apart."""
_Key = tuple[str, int, int | None]
_Place = tuple[int | None, str | None, str | None]


@dataclass(frozen=True)
class Ranking:
    """Units by what an earlier run found of them.

    Args:
        units: Indices of units, highest value first (of equal values the first unit first).
        values: Their values.
        column: Which column of which table: `scores.value of induction`, `summary.normalized of logit_diff`.
        model: The model of that run, as its config named it.
        missing: Units that the run says nothing of; they are left out.
        unused: Rows of the run that are no unit of this experiment.
    """

    units: tuple[int, ...]
    values: tuple[float, ...]
    column: str
    model: str
    missing: int
    unused: int


@dataclass(frozen=True)
class _Request:
    """What is asked for, and where the config says so."""

    loaded: LoadedConfig
    options: RankingRun
    path: KeyPath

    def error(self, key: str, problem: str, remedy: str) -> UserError:
        return self.loaded.error((*self.path, key), problem, remedy)


@dataclass(frozen=True, eq=False)
class _Source:
    """The run's rows, each with what it is of.

    Args:
        rows: Rows with a finite value.
        values: Those values.
        column: Where they stand, in words.
    """

    rows: pd.DataFrame
    values: list[float]
    column: str


def load_ranking(
    loaded: LoadedConfig, options: RankingRun, units: Sequence[Unit], anatomy: Anatomy, path: KeyPath = PATH
) -> Ranking:
    """Read a ranking of units from a `heads`, `patch` or `ablate` run.

    Units and rows belong together by kind, layer and number: query heads of `scores` or of site `z`, neurons, attention
    and MLP blocks; of an `ablate` run key/value heads and layers, too. Trials of windows, of groups and of several
    units say nothing of one. Where the run tried a unit at several places, the row of the unit's own place counts.

    Args:
        loaded: The config, for errors with file and line.
        options: The run, and what of it.
        units: What can be ablated.
        anatomy: The model.
        path: Where `options` stand.

    Raises:
        UserError: There is no such run, it is unfinished, of another model or method, lacks the score, metric or
            column, or ranks none of the units.
        RunError: A file of the run is damaged.
    """
    request = _Request(loaded, options, path)
    manifest = _read_manifest(request)
    _check_model(request, manifest, anatomy)
    if manifest.subcommand == "heads":
        source = _scores(request, manifest)
    elif manifest.subcommand in ("patch", "ablate"):
        source = _summary(request, manifest)
    else:
        problem = f"{options.run} is a run of {manifest.subcommand}, which ranks no units"
        raise request.error("run", problem, "Give a run of heads, patch or ablate.")
    found = _by_unit(source)
    ranked = [(unit.index, value) for unit in units if (value := _value(request, unit, found)) is not None]
    if not ranked:
        have = sorted({key[0] for key in found})
        problem = f"{options.run} ranks none of the units: it has {', '.join(have) or 'no single units'}"
        raise request.error("run", problem, "Name units of that kind in ablate.units, or give another run.")
    ranked.sort(key=lambda pair: -abs(pair[1]) if options.absolute else -pair[1])
    used = {_key(unit) for unit in units}
    return Ranking(
        units=tuple(index for index, _ in ranked),
        values=tuple(value for _, value in ranked),
        column=source.column,
        model=str(manifest.model.get("id")),
        missing=len(units) - len(ranked),
        unused=sum(len(places) for key, places in found.items() if key not in used),
    )


def _read_manifest(request: _Request) -> Manifest:
    folder = Path(request.options.run)
    if not is_run(folder):
        remedy = "`mechinterp runs` lists those of a folder."
        raise request.error("run", f"{request.options.run}: not a run directory", remedy)
    manifest, condition = read_run(folder)
    if condition != "complete":
        problem = f"{request.options.run}: the run is {condition}; only a complete run ranks"
        raise request.error("run", problem, REMEDIES[condition])
    return manifest


def _check_model(request: _Request, manifest: Manifest, anatomy: Anatomy) -> None:
    """Refuse a run of a model of another shape: its heads are not these."""
    then = manifest.model.get("anatomy") or {}
    heads, first = anatomy.layers[0].heads, then.get("first_layer") or {}
    old = first.get("heads") or {}
    facts = [
        ("layers", then.get("layers"), anatomy.n_layers),
        ("d_model", then.get("d_model"), anatomy.d_model),
        ("heads", old.get("query"), heads.query if heads else None),
        ("key/value heads", old.get("key_value"), heads.key_value if heads else None),
        ("neurons", first.get("d_mlp"), anatomy.layers[0].d_mlp),
    ]
    differing = [f"{name} {before}, here {now}" for name, before, now in facts if before != now]
    if differing:
        problem = f"{request.options.run} is of another model ({manifest.model.get('id')}): {'; '.join(differing)}"
        raise request.error("run", problem, "Give a run of this model.")


def _table(request: _Request, manifest: Manifest, name: str) -> pd.DataFrame:
    if f"{name}.parquet" not in manifest.outputs:
        problem = f"{request.options.run}: the run has no {name}.parquet"
        raise request.error("run", problem, "Run it again with `output.formats: auto`.")
    frame = to_frame(read_parquet(Path(request.options.run) / f"{name}.parquet"))
    checkpoints = frame["checkpoint"].dropna().unique().tolist() if "checkpoint" in frame else []
    if len(checkpoints) > 1:
        problem = f"{request.options.run} is of several checkpoints: {', '.join(map(str, checkpoints))}"
        raise request.error("run", problem, "Give a run of one.")
    return frame


def _scores(request: _Request, manifest: Manifest) -> _Source:
    """The rows of one score of a `heads` run."""
    if request.options.metric is not None:
        problem = "a run of heads is ranked by a score, not by a metric"
        raise request.error("metric", problem, "Use `score:`.")
    frame = _table(request, manifest, "scores")
    score = _chosen(request, "score", list(dict.fromkeys(frame["score"].tolist())))
    rows = frame[frame["score"] == score]
    return _finite(request, rows.assign(kind="head"), "value", f"scores.{{}} of {score}")


def _summary(request: _Request, manifest: Manifest) -> _Source:
    """The rows of single units and one metric of a `patch` or `ablate` run."""
    if request.options.score is not None:
        problem = f"a run of {manifest.subcommand} is ranked by a metric, not by a score"
        raise request.error("score", problem, "Use `metric:`.")
    rows = main_rows(_table(request, manifest, "summary"))
    metric = _chosen(request, "metric", list(dict.fromkeys(rows["metric"].tolist())))
    rows = rows[rows["metric"] == metric]
    of = metric
    if manifest.subcommand == "ablate":
        rows = rows[rows["design"] == "single"]
        values = list(dict.fromkeys(rows["ablation"].tolist()))
        rows, of = rows[rows["ablation"].isin(values[:1])], f"{metric}, {''.join(map(str, values[:1]))}"
    kinds = rows["site"].map(lambda site: _PATCH_KINDS.get(site) if manifest.subcommand == "patch" else site)
    layers = _table(request, manifest, "trials").groupby("trial")["layer"].agg(["min", "max"])
    ends = layers.reindex(rows["trial"]).to_numpy(dtype=np.float64, na_value=np.nan)
    # A window stands under its centre.
    single = (ends == rows[["layer"]].to_numpy(dtype=np.float64, na_value=np.nan)).all(1)
    rows = rows.assign(kind=kinds)[single]
    default = "normalized" if rows["normalized"].notna().any() else "effect"
    return _finite(request, rows, default, f"summary.{{}} of {of}")


def _chosen(request: _Request, field: str, known: list[str]) -> str:
    """The score or metric that is asked for; the only score or the first metric where none is."""
    wanted: str | None = getattr(request.options, field)
    if wanted is None and known and (field == "metric" or len(known) == 1):
        return known[0]
    if wanted is None or wanted not in known:
        problem = (
            f"{request.options.run} has no {field} {wanted!r}" if wanted else f"which {field} of {request.options.run}?"
        )
        listed = f"It has {', '.join(known)}."
        remedy = f"{nearest(wanted, known)} {listed}".strip() if wanted else listed
        raise request.error(field, problem, remedy)
    return wanted


def _finite(request: _Request, rows: pd.DataFrame, default: str, words: str) -> _Source:
    """Rows whose value is known."""
    column = request.options.column or default
    numeric = [str(name) for name in rows.columns if pd.api.types.is_float_dtype(rows[name])]
    if column not in numeric:
        remedy = f"{nearest(column, numeric)} It has {', '.join(numeric)}.".strip()
        raise request.error("column", f"{column!r} is no column of numbers of that table", remedy)
    values = rows[column].to_numpy(dtype=np.float64, na_value=np.nan)
    known = np.isfinite(values)
    return _Source(rows[known], values[known].tolist(), words.format(column))


def _by_unit(source: _Source) -> dict[_Key, dict[_Place, float]]:
    """Values by unit and place; of a place that stands there twice (two blocks) the first."""
    found: dict[_Key, dict[_Place, float]] = {}
    for row, value in zip(source.rows.to_dict("records"), source.values, strict=True):
        kind = _known(row, "kind")
        if kind not in _NUMBER or _known(row, "layer") is None:
            continue
        column = _NUMBER[kind]
        number = None if column is None else _known(row, column)
        if column is not None and number is None:
            continue
        place = (_known(row, "position"), _known(row, "span"), _known(row, "template"))
        found.setdefault((kind, _known(row, "layer"), number), {}).setdefault(place, value)
    return found


def _known(row: Mapping[Any, Any], column: str) -> Any:
    value = row.get(column)
    return None if value is None or pd.isna(value) else value


def _key(unit: Unit) -> _Key | None:
    """What a unit is; None for groups, windows, directions and edges, which no run ranks."""
    windowed = len({part.layer for part in unit.parts}) > 1
    if windowed or unit.kind not in _NUMBER or (_NUMBER[unit.kind] is not None and unit.number is None):
        return None
    return unit.kind, unit.layer, unit.number


def _value(request: _Request, unit: Unit, found: Mapping[_Key, Mapping[_Place, float]]) -> float | None:
    """What the run says of a unit.

    Raises:
        UserError: Several things, each of another place, and none of the unit's.
    """
    key = _key(unit)
    places = found.get(key) if key is not None else None
    if not places:
        return None
    own = (unit.place.position, unit.place.span, unit.place.template)
    if own in places:
        return places[own]
    if len(places) == 1:
        return next(iter(places.values()))
    problem = f"the run has {unit.name} at {len(places)} places, and none is the unit's own"
    raise request.error("run", problem, "Give a run with `positions: all`, or units of the same positions.")


def explain(ranking: Ranking) -> str | None:
    """A warning about what a ranking leaves out, or puts last though it is largest; None where there is nothing."""
    told = []
    if ranking.missing:
        told.append(f"leaves out {ranking.missing} units that the earlier run says nothing of")
    if abs(ranking.values[-1]) > abs(ranking.values[0]):
        told.append(f"puts its largest value ({ranking.values[-1]:.3g}) last; `absolute: true` ranks by magnitude")
    return f"the ranking ({ranking.column}) {' and '.join(told)}" if told else None
