"""How much each token of a prompt counts: tokens coloured by it, in the terminal and as pictures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from rich.cells import cell_len
from rich.console import Group
from rich.text import Text

from mechinterp_cli.report.cells import figure, number, text
from mechinterp_cli.report.grid import ColourScale
from mechinterp_cli.report.labels import show_token
from mechinterp_cli.report.rows import distinct, having, records
from mechinterp_cli.report.tables import line
from mechinterp_cli.report.terminal import shade
from mechinterp_cli.report.wordgrid import ROOM, WordGrid, WordPanel, cell_pixels

MAX_PROMPTS = 3
"""Prompts that are shown; the page of tokens has more."""
PER_LINE = 16
"""Tokens beside each other in a picture at most, fewer where they are long."""
MAX_LINES = 6
"""Lines of one prompt in a picture."""
NAMES = {
    "gradient_x_input": "gradient x input",
    "integrated_gradients": "integrated gradients",
    "occlusion": "occlusion (exact)",
    "rollout": "attention rollout",
}
BASELINES = {"zero": "zeros", "mean": "the mean embedding", "corrupt": "the corrupted prompt's"}
SHARES = ("rollout",)
"""Estimators that are parts of 1 and know nothing of the answer: no metric is their unit."""


@dataclass(frozen=True)
class TokenLine:
    """What one estimator says of one prompt's tokens."""

    prompt: int
    estimator: str
    metric: str
    baseline: str
    """What an absent token is; empty where there is no such thing."""
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    """NaN where there is no number."""

    @cached_property
    def largest(self) -> float:
        """The largest magnitude; 1 where all is 0."""
        found = [abs(value) for value in self.values if np.isfinite(value)]
        return max(found, default=0.0) or 1.0

    @property
    def shares(self) -> list[float]:
        """Parts of the prompt's largest magnitude, −1 to 1."""
        return [value / self.largest if np.isfinite(value) else np.nan for value in self.values]

    @property
    def numbers(self) -> list[str]:
        """The values as text."""
        return [short(value) for value in self.values]


def short(value: float) -> str:
    """A number of few letters: two decimals, or none where it is large."""
    if not np.isfinite(value):
        return "?"
    if abs(value) < 100:
        return figure(value, 2)
    return f"{value:.0f}" if abs(value) < 10_000 else f"{value:.1e}"


def token_lines(rows: pd.DataFrame, prompts: Sequence[int] | None = None) -> list[TokenLine]:
    """What every estimator says, by prompt, metric, estimator.

    Args:
        rows: The table `inputs`, of one checkpoint.
        prompts: Which prompts; all where None.
    """
    if rows.empty:
        return []
    chosen = rows if prompts is None else having(rows, prompt=tuple(prompts))
    order = {name: at for at, name in enumerate(distinct(rows, "estimator"))}
    metrics = {name: at for at, name in enumerate(distinct(rows, "metric"))}
    found: dict[tuple[int, str, str], list[Mapping[str, object]]] = {}
    for row in records(chosen.sort_values("position", kind="stable")):
        found.setdefault((int(number(row["prompt"])), text(row["metric"]), text(row["estimator"])), []).append(row)
    made = [_line(prompt, metric, name, part) for (prompt, metric, name), part in found.items()]
    return sorted(made, key=lambda one: (one.prompt, metrics[one.metric], order[one.estimator]))


def _line(prompt: int, metric: str, estimator: str, rows: Sequence[Mapping[str, object]]) -> TokenLine:
    tokens, values = tuple(text(row["token"]) for row in rows), tuple(number(row["value"]) for row in rows)
    return TokenLine(prompt, estimator, metric, text(rows[0].get("baseline")), tokens, values)


def first_prompts(rows: pd.DataFrame, count: int = MAX_PROMPTS) -> list[int]:
    """Numbers of the first prompts that a table has.

    Args:
        rows: With a column `prompt`.
        count: How many.
    """
    return sorted({int(prompt) for prompt in rows["prompt"]})[:count] if len(rows) else []


def unit_of(estimator: str, metric: str) -> str:
    """What the values of an estimator are."""
    return "share of attention" if estimator in SHARES else f"part in {metric}"


def terminal_tokens(rows: pd.DataFrame, metric: str, *, width: int, plain: bool) -> Iterator[Group]:
    """The first prompts' tokens, coloured by what each estimator says.

    Args:
        rows: The table `inputs`, of one checkpoint.
        metric: Which metric; rollout, which has none, is shown too.
        width: Columns of the terminal.
        plain: ASCII only, no colour: numbers stand below the tokens.
    """
    prompts = first_prompts(rows)
    for prompt in prompts:
        lines = _of_metric(token_lines(rows, [prompt]), metric)
        heading = f"tokens of prompt {prompt}: what each counts for {metric}"
        parts: list[Text] = [line(heading, plain, "bold")]
        if absent := in_place(lines):
            parts.append(line(absent, plain, "dim"))
        for one in lines:
            ends = f"full colour: {short(one.largest)} either way, {unit_of(one.estimator, metric)}"
            parts.append(line(f"{NAMES.get(one.estimator, one.estimator)} ({ends})", plain, "dim"))
            parts += _numbered(one, width) if plain else _flowing(one, width)
        yield Group(*parts)
    there = len({int(prompt) for prompt in rows["prompt"]}) if len(rows) else 0
    if there > len(prompts):
        yield Group(line(f"{len(prompts)} of {there} prompts; figures/tokens.html has more", plain, "dim"))


def in_place(lines: Sequence[TokenLine]) -> str:
    """What stands in place of a token that is taken away, where estimators do such a thing.

    Args:
        lines: Of one prompt.
    """
    baselines = dict.fromkeys(one.baseline for one in lines if one.baseline)
    named = ", ".join(BASELINES.get(name, name) for name in baselines)
    return f"in place of a token: {named}" if baselines else ""


def _of_metric(lines: Sequence[TokenLine], metric: str) -> list[TokenLine]:
    """The lines of one metric; a rollout, of which every metric may have a copy, once."""
    rollouts = [one for one in lines if one.estimator in SHARES and one.metric != metric]
    chosen = [one for one in lines if one.metric == metric]
    known = {one.estimator for one in chosen}
    return [*chosen, *[one for one in rollouts[:1] if one.estimator not in known]]


def _flowing(one: TokenLine, width: int) -> Iterator[Text]:
    """Tokens one after the other, coloured."""
    row = Text()
    for token, share in zip(one.tokens, one.shares, strict=True):
        shown = show_token(token)
        if row.cell_len and row.cell_len + cell_len(shown) > width:
            yield row
            row = Text()
        row.append(shown, style=shade(share) if np.isfinite(share) else "dim")
    yield row


def _numbered(one: TokenLine, width: int) -> Iterator[Text]:
    """Tokens in ASCII, each above its number."""
    above, below = "", ""
    for token, value in zip(one.tokens, one.numbers, strict=True):
        shown = show_token(token, plain=True)
        cells = max(len(shown), len(value)) + 1
        if above and len(above) + cells > width:
            yield from (Text(above), Text(below))
            above, below = "", ""
        above, below = above + shown.rjust(cells), below + value.rjust(cells)
    yield from (Text(above), Text(below))


def token_strip(rows: pd.DataFrame, metric: str, about: Sequence[str]) -> WordGrid | None:
    """The first prompts' tokens as a picture: a row per estimator.

    Args:
        rows: The table `inputs`, of one checkpoint.
        metric: Which metric.
        about: What stands in the subtitle.

    Returns:
        None where there is no token.
    """
    prompts = first_prompts(rows)
    lines = [_of_metric(token_lines(rows, [prompt]), metric) for prompt in prompts]
    across = _across([one for part in lines for one in part])
    panels = [panel for part in lines for panel in _panels(part, across)]
    if not panels:
        return None
    there = len({int(prompt) for prompt in rows["prompt"]})
    longest = max(len(one.tokens) for part in lines for one in part)
    of = f"Prompts {', '.join(map(str, prompts))} of {there}." if there > len(prompts) else ""
    of += f" The first {MAX_LINES * across} tokens of each." if longest > MAX_LINES * across else ""
    meaning = (
        f"Numbers: each token's part in {metric}, in its own unit; of attention rollout, shares of attention. "
        "Colours: parts of the row's largest magnitude, so rows of different estimators can be compared; 0 is white."
    )
    absent = in_place(token_lines(rows, prompts[:1]))
    return WordGrid(
        title=f"What each token counts for {metric}",
        lines=tuple(filter(None, (", ".join(filter(None, about)), f"{meaning} {of}".strip(), absent.capitalize()))),
        quantity="share of largest",
        scale=ColourScale(low=-1.0, middle=0.0, high=1.0),
        panels=tuple(panels),
        cut="tokens",
    )


def _across(lines: Sequence[TokenLine]) -> int:
    """How many tokens have room beside each other."""
    words, numbers = [word for one in lines for word in one.tokens], [word for one in lines for word in one.numbers]
    return min(PER_LINE, int(ROOM // cell_pixels(words, numbers)))


def _panels(lines: Sequence[TokenLine], across: int) -> Iterator[WordPanel]:
    """A prompt, broken into lines of so many tokens."""
    length = max((len(one.tokens) for one in lines), default=0)
    starts = range(0, length, across)
    for start in starts[:MAX_LINES]:
        end = min(start + across, length)
        cut = f", tokens {start} to {end - 1} of {length}" if length > across else ""
        yield WordPanel(
            title=f"prompt {lines[0].prompt}{cut}",
            row_title="",
            rows=tuple(NAMES.get(one.estimator, one.estimator) for one in lines),
            column_title="",
            columns=tuple(str(at) for at in range(start, end)),
            words=tuple(_padded(one.tokens[start:end], end - start) for one in lines),
            values=np.array([_gaps(one.shares[start:end], end - start) for one in lines]),
            numbers=tuple(_padded(one.numbers[start:end], end - start) for one in lines),
        )


def _padded(words: Sequence[str], count: int) -> tuple[str, ...]:
    return (*words, *[""] * (count - len(words)))


def _gaps(values: Sequence[float], count: int) -> list[float]:
    return [*values, *[np.nan] * (count - len(values))]
