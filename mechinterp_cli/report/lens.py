"""The logit lens: what the model would say at every layer, and how that nears what it says at the end."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Group

from mechinterp_cli.report.behind import Behind
from mechinterp_cli.report.cells import counted_between, figure, interval, missing, number, text
from mechinterp_cli.report.grid import ColourScale
from mechinterp_cli.report.labels import show_token
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.series import curve_of
from mechinterp_cli.report.shapes import CurvePanel, Curves
from mechinterp_cli.report.tables import Column, line, text_table
from mechinterp_cli.report.wordgrid import WordGrid, WordPanel, terminal_words

WIDTH = 330
EMBED, BELOW = "embed", -1
_SHARE = ColourScale(low=0.0, middle=0.0, high=1.0)
_COLUMNS = {
    "layer": Column(),
    "p(answer)": Column(2),
    "rank": Column(2),
    "KL": Column(2),
    "n": Column(4),
}
_MEANS = ("answer_probability", "kl")


def _likeliest(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per prompt, site, layer and position: of the likeliest token."""
    ordered = rows.sort_values("rank", kind="stable")
    return ordered.drop_duplicates(["prompt", "site", "layer", "position"])


def lens_grids(rows: pd.DataFrame, tokens: Mapping[int, Sequence[str]], about: Sequence[str]) -> Iterator[WordGrid]:
    """What the first prompt's streams say: a grid per kind of site, each above what the embedding says.

    Args:
        rows: The table `lens`, of one checkpoint.
        tokens: Decoded tokens by prompt.
        about: What stands in the subtitle.
    """
    if rows.empty:
        return
    prompt = min(int(prompt) for prompt in rows["prompt"])
    for site in _streams(rows):
        there = having(rows, prompt=prompt, site=(site, EMBED))
        if having(there, site=site).empty:
            continue
        positions = sorted({int(position) for position in there["position"]})
        panel = (
            _by_position(_likeliest(there), tokens.get(prompt, ()))
            if len(positions) > 1
            else _by_rank(there, positions[0], tokens.get(prompt, ()))
        )
        yield WordGrid(
            title=f"Logit lens on {site}, prompt {prompt}",
            lines=tuple(filter(None, (", ".join(filter(None, about)), _caption(len(positions) > 1)))),
            quantity="probability",
            scale=_SHARE,
            panels=(panel,),
            cut="positions" if len(positions) > 1 else "ranks",
        )


def _streams(rows: pd.DataFrame) -> list[str]:
    """Kinds of sites that have layers; the embedding where there is nothing else."""
    return [site for site in distinct(rows, "site") if site != EMBED] or [EMBED]


def _level(row: Row) -> int:
    """The layer; the embedding is below them."""
    return BELOW if text(row["site"]) == EMBED else int(number(row["layer"]))


def _name(level: int) -> str:
    return EMBED if level == BELOW else str(level)


def _caption(by_position: bool) -> str:
    said = "the likeliest next token" if by_position else "the likeliest next tokens, the first on the left"
    return f"Every cell: {said} after the final norm and head on that stream, and its probability in percent."


def _by_position(rows: pd.DataFrame, tokens: Sequence[str]) -> WordPanel:
    """Layers × positions."""
    positions = sorted({int(position) for position in rows["position"]})
    labels = [_label(at, tokens) for at in positions]
    cells = {(_level(row), positions.index(int(row["position"]))): row for row in records(rows)}
    return _panel(cells, labels, "position and its token")


def _by_rank(rows: pd.DataFrame, position: int, tokens: Sequence[str]) -> WordPanel:
    """Layers × ranks, at the one position that there is."""
    ranks = sorted({int(rank) for rank in rows["rank"]})
    labels = [str(place) for place in range(1, len(ranks) + 1)]
    cells = {(_level(row), ranks.index(int(row["rank"]))): row for row in records(rows)}
    return _panel(cells, labels, f"rank of the next token after position {_label(position, tokens)}")


def _label(position: int, tokens: Sequence[str]) -> str:
    known = 0 <= position < len(tokens)
    return f"{position} {show_token(tokens[position])}" if known else str(position)


def _panel(cells: Mapping[tuple[int, int], Row], labels: Sequence[str], title: str) -> WordPanel:
    """A panel of rows by (level, column); the last layer at the top, as the network is."""
    levels = sorted({level for level, _ in cells}, reverse=True)
    found = [[cells.get((level, place)) for place in range(len(labels))] for level in levels]
    return WordPanel(
        title="",
        row_title="layer",
        rows=tuple(map(_name, levels)),
        column_title=title,
        columns=tuple(labels),
        words=tuple(tuple("" if row is None else text(row["token"]) for row in line) for line in found),
        values=np.array([[np.nan if row is None else number(row["probability"]) for row in line] for line in found]),
        numbers=tuple(tuple("" if row is None else _percent(row["probability"]) for row in line) for line in found),
    )


def _percent(value: object) -> str:
    return "?" if missing(value) or not np.isfinite(number(value)) else f"{100 * number(value):.0f}"


def by_layer(rows: pd.DataFrame) -> pd.DataFrame:
    """What the lens says of the answer at every layer, over prompts, at the last position that each prompt has.

    Args:
        rows: The table `lens`, of one checkpoint.

    Returns:
        Columns `site, layer, n`, and of `answer_probability` and `kl` the mean and the quartiles (`_low`, `_high`), of
        `answer_rank` the median; NaN where no prompt has a number.
    """
    chosen = _likeliest(rows)
    numeric = {name: [number(value) for value in chosen[name]] for name in (*_MEANS, "answer_rank")}
    keys: dict[str, list[Any]] = {"site": chosen["site"].astype(str).tolist()}
    keys |= {name: chosen[name].astype(int).tolist() for name in ("prompt", "layer", "position")}
    frame = pd.DataFrame({**keys, **numeric})
    last = frame[frame["position"] == frame.groupby(["prompt", "site"])["position"].transform("max")]
    parts = last.groupby(["site", "layer"], sort=False)
    found = {"n": parts["prompt"].nunique(), "answer_rank": parts["answer_rank"].median()}
    for name in _MEANS:
        found |= {name: parts[name].mean(), f"{name}_low": parts[name].quantile(0.25)}
        found[f"{name}_high"] = parts[name].quantile(0.75)
    return pd.DataFrame(found).reset_index().sort_values("layer", kind="stable")


def lens_tables(
    rows: pd.DataFrame, tokens: Mapping[int, Sequence[str]], about: Sequence[str], *, width: int, plain: bool
) -> Iterator[Group]:
    """The first prompt's grid of the first kind of site, and what all prompts say by layer.

    Args:
        rows: The table `lens`, of one checkpoint.
        tokens: Decoded tokens by prompt.
        about: What stands below the title.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    if rows.empty:
        return
    grids = list(lens_grids(rows, tokens, about))
    yield terminal_words(grids[0], width=width, plain=plain)
    first = _streams(rows)[0]
    if len(grids) > 1:
        yield Group(line(f"{first}, the first of {len(grids)} kinds of sites; the pictures have all", plain, "dim"))
    cells = [
        {
            "layer": _name(_level(row)),
            "p(answer)": figure(row["answer_probability"]),
            "rank": f"{number(row['answer_rank']):g}" if not missing(row["answer_rank"]) else "",
            "KL": figure(row["kl"]),
            "n": str(int(number(row["n"]))),
        }
        for row in sorted(records(having(by_layer(rows), site=(first, EMBED))), key=_level, reverse=True)
    ]
    notes = {
        "p(answer)": "mean over prompts of the answer's probability",
        "rank": "median over prompts of how many tokens are likelier than the answer",
        "KL": "mean KL divergence from the lens to the model's output, nats",
    }
    heading = (f"logit lens on {first} by layer, at the last position that it has of every prompt",)
    yield text_table(cells, _COLUMNS, lines=heading, width=width, plain=plain, notes=notes)


def lens_curves(rows: pd.DataFrame, about: Sequence[str]) -> Curves | None:
    """The answer's probability and the KL divergence by layer, a line per kind of site.

    Args:
        rows: The table `lens`, of one checkpoint.
        about: What stands in the subtitle.

    Returns:
        None where there is no number.
    """
    if rows.empty:
        return None
    everything = by_layer(rows)
    # What the embedding says is far off, and would press the lines together.
    means = having(everything, site=tuple(_streams(rows)))
    titles = {"answer_probability": "probability of the answer", "kl": "KL to the output (nats)"}
    panels = [_curve_panel(means, name, title) for name, title in titles.items() if means[name].notna().any()]
    if not panels:
        return None
    n = counted_between(means["n"], "prompt")
    caption = f"Lines: means over {n}, at the last position of each; bands: the middle half of the prompts."
    caption += " What the embedding itself says is not drawn." if len(means) < len(everything) else ""
    return Curves(
        title="Logit lens by layer",
        lines=tuple(filter(None, (", ".join(filter(None, about)), caption))),
        x_title="layer",
        panels=tuple(panels),
        across=2,
        one_legend=len(panels) == 1 or _same_curves(panels),
        width=WIDTH,
        linear=True,
    )


def _same_curves(panels: Sequence[CurvePanel]) -> bool:
    return len({tuple(curve.name for curve in panel.curves) for panel in panels}) == 1


def _curve_panel(means: pd.DataFrame, name: str, title: str) -> CurvePanel:
    curves = []
    for site in distinct(means, "site"):
        part = having(means, site=site)
        part = part[part[name].notna()]
        if len(part):
            ends = (f"{name}_low", f"{name}_high")
            curves.append(curve_of(site, records(part), "layer", name, ends=ends, told=partial(_behind, ends)))
    return CurvePanel(title="", y_title=title, curves=tuple(curves))


def _behind(ends: tuple[str, str], row: Row) -> Behind:
    """The middle half of the prompts is no interval of the mean."""
    low, high = ends
    return {"middle half": interval(row[low], row[high]), "n": text(row["n"])}
