"""Greedy continuations with and without ablations, side by side."""

from collections.abc import Iterator, Sequence

import pandas as pd
from rich.cells import cell_len
from rich.console import Group

from mechinterp_cli.report.cells import missing, number, text
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.rows import Row, having, records
from mechinterp_cli.report.tables import Column, line, text_table
from mechinterp_cli.report.trials import Trials, key_of

MAX_TRIALS = 6
"""Ablations shown of every prompt."""
MAX_PROMPTS = 8
NONE = "(nothing)"
_COLUMNS = {name: Column(left=True, broken=True) for name in ("ablated", "with the ablation", "without")}


def word_tables(
    rows: pd.DataFrame, prompts: pd.DataFrame, trials: Trials, *, width: int, plain: bool
) -> Iterator[Group]:
    """A table per prompt: how it goes on under every ablation, and without any.

    Args:
        rows: The words table, of one checkpoint.
        prompts: The prompts.
        trials: Tells which trials come first.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    if rows.empty:
        return
    numbers = sorted({int(number(prompt)) for prompt in rows["prompt"]})
    order = {key_of(row): place for place, row in enumerate(trials.leading(len(trials.rows)))}
    for prompt in numbers[:MAX_PROMPTS]:
        found = records(having(rows, prompt=prompt))
        unedited = next((row for row in found if missing(row["trial"])), None)
        edited = [row for row in found if not missing(row["trial"])]
        edited.sort(key=lambda row: order.get(key_of(row), len(order)))
        cells = list(_cells(edited[:MAX_TRIALS], unedited, trials))
        heading = (f"prompt {prompt}: {_end(prompts, prompt, width - 12 - len(str(prompt)), plain)}",)
        yield text_table(cells, _COLUMNS, lines=heading, width=width, plain=plain)
        if len(edited) > MAX_TRIALS:
            yield Group(line(f"{MAX_TRIALS} of {len(edited)} ablations; the table `words` has all", plain, "dim"))
    if len(numbers) > MAX_PROMPTS:
        yield Group(line(f"{MAX_PROMPTS} of {len(numbers)} prompts; the table `words` has all", plain, "dim"))


def _cells(edited: Sequence[Row], unedited: Row | None, trials: Trials) -> Iterator[dict[str, str]]:
    """A row per ablation; what the unedited model says stands beside the first."""
    without = "" if unedited is None else text(unedited["text"]) or NONE
    several = len({text(row["ablation"]) for row in edited}) > 1
    for at, row in enumerate(edited):
        same = unedited is not None and list(row["token_ids"]) == list(unedited["token_ids"])
        words = "the same" if same else text(row["text"]) or NONE
        yield {
            "ablated": trials.called(row, several=several),
            "with the ablation": words,
            "without": without if at == 0 else "",
        }
    if not edited:
        yield {"ablated": "", "with the ablation": "", "without": without}


def _end(prompts: pd.DataFrame, prompt: int, room: int, plain: bool) -> str:
    """How a prompt ends: what fits on a line."""
    there = having(prompts, prompt=prompt, stream="clean")
    if there.empty:
        return ""
    shown, kept = show_text(text(there["text"].iloc[0]), plain=plain), ""
    while shown and cell_len(shown[-1] + kept) <= max(20, room - 4):
        shown, kept = shown[:-1], shown[-1] + kept
    return (f"...{kept}" if shown else kept).strip()
