"""Scores of heads: how each is called and coloured, its map of layers and heads, its strongest heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechinterp_cli.report.cells import figure, missing, number
from mechinterp_cli.report.grid import ColourScale, Heatmap, build_panel


@dataclass(frozen=True, kw_only=True)
class ScoreLook:
    """What a picture says of a score."""

    meaning: str = ""
    """What is measured, one sentence."""
    scale: ColourScale | None = None
    """Where the score has ends of its own; by the values found where None."""
    chance: str = "uniform attention over the visible keys"
    """What has the value that is given as chance."""
    both_ways: bool = False
    """Whether a head far below 0 is as remarkable as one far above."""


_SHARE = ColourScale(low=0.0, middle=0.0, high=1.0)
_RANDOM = "random weights"
_WEIGHTS = "randomly oriented weights"

LOOKS: Mapping[str, ScoreLook] = {
    "previous_token": ScoreLook(meaning="Attention to the token before.", scale=_SHARE),
    "duplicate_token": ScoreLook(meaning="Attention to earlier occurrences of the same token, summed.", scale=_SHARE),
    "induction": ScoreLook(
        meaning="Attention from the second copy of a random block to the token after the same token in the first.",
        scale=_SHARE,
    ),
    "prefix_matching": ScoreLook(
        meaning="Attention to the tokens that follow earlier occurrences of the same token, summed.", scale=_SHARE
    ),
    "first_token": ScoreLook(meaning="Attention to the first token.", scale=_SHARE),
    "copying": ScoreLook(
        meaning="Share of tokens that the head, attending to one of them, raises less than that one.",
        scale=ColourScale(low=0.0, middle=0.5, high=1.0),
        chance=_RANDOM,
    ),
    "copying_eigenvalues": ScoreLook(
        meaning="Sum of the real parts of the OV circuit's eigenvalues over the sum of their magnitudes.",
        scale=ColourScale(low=-1.0, middle=0.0, high=1.0),
        chance=_RANDOM,
    ),
    "successor": ScoreLook(
        meaning="Share of items of ordered lists whose successor the head raises most within the list.",
        scale=_SHARE,
        chance="guessing",
    ),
    "q_composition": ScoreLook(meaning="Strongest composition of the query with an earlier head.", chance=_WEIGHTS),
    "k_composition": ScoreLook(meaning="Strongest composition of the key with an earlier head.", chance=_WEIGHTS),
    "v_composition": ScoreLook(meaning="Strongest composition of the value with an earlier head.", chance=_WEIGHTS),
    "direct_effect": ScoreLook(
        meaning="The head's own part of logit(answer) - logit(wrong answer), final norm frozen.", both_ways=True
    ),
}
"""By the score's name; a score that is not here is drawn by the values found."""


def look_of(score: str) -> ScoreLook:
    """How a score is shown."""
    return LOOKS.get(score, ScoreLook())


def head_name(row: Mapping[str, object]) -> str:
    """A head as `layer.head`."""
    return f"{int(number(row['layer']))}.{int(number(row['head']))}"


def from_name(row: Mapping[str, object]) -> str:
    """The earlier head of a composition; empty where the score has none."""
    if missing(row.get("from_layer")) or missing(row.get("from_head")):
        return ""
    return f"{int(number(row['from_layer']))}.{int(number(row['from_head']))}"


def scores_in(rows: pd.DataFrame) -> list[str]:
    """Names of the scores, in the order of the table."""
    return [str(name) for name in dict.fromkeys(rows["score"].dropna())]


def of_score(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """The rows of one score."""
    return rows[(rows["score"] == score).fillna(False).astype(bool)]


def strongest_heads(rows: pd.DataFrame, count: int) -> list[dict[str, object]]:
    """The heads with the largest values of one score (magnitudes, where the score goes both ways).

    Args:
        rows: The score's rows; those without a number are left out.
        count: How many.
    """
    known = [row for row in _records(rows) if np.isfinite(number(row["value"]))]
    both_ways = bool(known) and look_of(str(known[0]["score"])).both_ways
    known.sort(key=lambda row: -(abs(number(row["value"])) if both_ways else number(row["value"])))
    return known[:count]


def _records(rows: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]


def score_map(rows: pd.DataFrame, score: str, about: Sequence[str]) -> Heatmap:
    """The map of layers and heads of one score.

    Args:
        rows: The score's rows, of one checkpoint.
        score: Its name.
        about: What stands in the subtitle: model, checkpoint, sequences.
    """
    look = look_of(score)
    layers = tuple(sorted({int(layer) for layer in rows["layer"].dropna()})) or (0,)
    panel = build_panel(rows, title="", column="head", layers=layers, quantity="value", tokens=())
    values = panel.values[panel.status == "ok"]
    return Heatmap(
        title=f"{score} score of every head",
        subtitle=", ".join(part for part in about if part),
        caption=" ".join(part for part in (look.meaning, chance_text(rows, look)) if part),
        quantity=score,
        panels=(panel,),
        scale=look.scale or _scale_of(values),
    )


def _scale_of(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> ColourScale:
    """About 0 where there are negative values, else from 0 to the largest."""
    largest = float(np.abs(values).max()) if values.size else 0.0
    low = -largest if (values < 0).any() else 0.0
    return ColourScale(low=low, middle=0.0, high=largest or 1.0)


def chance_text(rows: pd.DataFrame, look: ScoreLook) -> str:
    """What the score would be by chance, in words; empty where nobody knows."""
    known = sorted({round(number(value), 4) for value in rows["chance"]} - {np.nan})
    known = [value for value in known if np.isfinite(value)]
    if not known:
        return ""
    ends = dict.fromkeys((figure(known[0]), figure(known[-1])))
    return f"Chance ({look.chance}): {' to '.join(ends)}."
