"""`mechinterp compare`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mechinterp_cli.cli.completion import complete_run
from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.options import Json, Quiet

A = Annotated[
    Path, typer.Argument(metavar="A", help="A run directory.", show_default=False, autocompletion=complete_run)
]
B = Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False, autocompletion=complete_run)]
Metric = Annotated[list[str] | None, typer.Option("--metric", metavar="NAME", help="This metric only. Repeatable.")]
Column = Annotated[
    Literal["value", "effect", "normalized"] | None,
    typer.Option("--column", help="What is compared; normalized where both runs have it, else effect, or value."),
]
Top = Annotated[int, typer.Option("--top", min=1, metavar="K", help="Overlap of the K largest magnitudes.")]
Floor = Annotated[
    float | None,
    typer.Option("--floor", min=0, metavar="X", help="Signs count beyond it; stats.smallest_effect for normalized."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Write joined rows, agreement and a scatter plot there.")
]
FailAbove = Annotated[
    float | None, typer.Option("--fail-above", min=0, metavar="X", help="Exit 3 when a |difference| is above X.")
]


def compare(
    a: A,
    b: B,
    metric: Metric = None,
    column: Column = None,
    top: Top = 10,
    floor: Floor = None,
    out: Out = None,
    fail_above: FailAbove = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare two runs, row by row, for each metric and kind of site.

    Trials are joined by place and metric; all prompts and the main aggregate count. Of heads and probe runs the scores
    are compared. An attribute run beside a patch run: each estimator's estimates beside the exact effects (their sizes,
    where estimates have no sign). With checkpoints each is compared with the one of the same name. Rows that are 0
    in both because causality says so (trivial) are counted apart, and in no mean, correlation, overlap or share.
    What is not defined (a correlation of two rows) is empty and explained.

    The table goes to stdout; what differs in the runs' conditions and the five worst rows go to stderr.

    Example: mechinterp compare runs/A runs/B --metric logit_diff --out comparison --fail-above 0.05
    """
    from mechinterp_cli.cli.registry import register_all
    from mechinterp_cli.runs import compare as runs
    from mechinterp_cli.runs.sides import differing, read_side

    console = Console.choose(quiet=quiet, as_json=as_json)
    register_all()  # a method says which of its tables is compared
    sides = read_side(a), read_side(b)
    for change in differing(*sides):
        console.say(f"not the same (A -> B): {change}")
    found = runs.compare(*sides, runs.CompareOptions(tuple(metric or ()), column, top, floor))
    _tell(console, found)
    if out is not None:
        from mechinterp_cli.report.scatter import build_scatter, render_png

        runs.save(found, out, render_png(build_scatter(found)))
    if fail_above is not None:
        found.check(fail_above)


_RANKS = {
    **{name: 0 for name in ("checkpoint", "estimator", "ablation", "metric", "site", "max_diff")},
    **{name: at for at, name in enumerate(("pearson", "mean_diff", "same_sign", "common", "spearman"), start=1)},
    **{name: 6 for name in ("only_a", "only_b", "no_number")},
    **{name: at for at, name in enumerate(("max_at", "trivial"), start=7)},
}
"""What a narrow window shows first: what is compared, and how far it agrees."""


def _tell(console: Console, found: Any) -> None:
    rows = found.agreement
    console.listing(rows if console.as_json else [_short(row) for row in rows], _RANKS)
    for reason in dict.fromkeys(row["undefined"] for row in rows if row["undefined"]):
        places = [_place(row) for row in rows if row["undefined"] == reason]
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        console.say(f"undefined for {'; '.join(places[:3])}{more}: {reason}")
    worst = found.worst()
    console.say("the rows that differ most:" if worst else "no row differs")
    console.table(worst, {"where": 0, "difference": 0, "metric": 1, "a": 2, "b": 2, "column": 3})


def _place(row: dict[str, Any]) -> str:
    return ", ".join(
        str(row[name]) for name in ("checkpoint", "estimator", "ablation", "metric", "site") if name in row
    )


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """What fits a terminal."""
    narrow = {"mean_difference": "mean_diff", "max_difference": "max_diff", "sign_agreement": "same_sign"}
    left_out = ("undefined", "top", "compared")
    return {
        f"top_{row['top']}" if name == "top_overlap" else narrow.get(name, name): value
        for name, value in row.items()
        if name not in left_out
    }
