"""What a run of circuits found, in sentences that need no knowledge of the measures' names."""

from collections.abc import Iterator, Sequence

from mechinterp_cli.report.cells import figure, interval, missing, text
from mechinterp_cli.report.circuit_curves import circuit_name
from mechinterp_cli.report.rows import Row

AREAS = {
    "cpr": "Circuits of the highest {score} scores keep {value} of {metric}, the mean over their sizes (CPR, 1 is as "
    "much as the whole model{beside}).",
    "cmd": "Circuits of the largest {score} scores of either sign are {value} away from the whole model, the mean over "
    "their sizes (CMD, 0 is best{beside}).",
}
"""By measure; the areas below the curve of faithfulness, and between it and 1, are means over the share of edges."""
TESTS = {
    "equivalence": "it does the task as well as the whole model",
    "independence": "nothing of the task is left without it",
    "minimality": "it needs every part that it has",
}
ANSWERS = {"yes": "yes", "no": "no", "inconclusive": "not decided"}


def circuit_answer(areas: Sequence[Row], given: Sequence[tuple[Row, str]], tests: Sequence[Row]) -> Iterator[str]:
    """The sentences.

    Args:
        areas: Rows of `quality` of the first score, CPR of the signed ranking and CMD of the absolute one.
        given: Rows of `faithfulness` of circuits that come of no ranking, each with its size in words.
        tests: Rows of `tests`.
    """
    yield from map(_area, sorted(areas, key=lambda row: list(AREAS).index(text(row["measure"]))))
    for row, size in given:
        kept = _with_interval(row, "faithfulness")
        yield f"The circuit {circuit_name(row)} ({size}) keeps {kept} of {text(row['metric'])}."
    if tests:
        verdicts = [
            f"{TESTS.get(text(row['test']), text(row['test']))} ({text(row['test'])}): {ANSWERS[text(row['verdict'])]}"
            for row in tests
        ]
        yield f"Of the circuit {circuit_name(tests[0])}, {'; '.join(verdicts)}."


def _area(row: Row) -> str:
    random = row.get("random_mean")
    beside = "" if missing(random) else f"; of random rankings {figure(random)}"
    value = _with_interval(row, "value")
    return AREAS[text(row["measure"])].format(
        score=text(row["score"]), metric=text(row["metric"]), value=value, beside=beside
    )


def _with_interval(row: Row, name: str) -> str:
    """A number with its interval, or that it is undefined."""
    return " ".join(filter(None, (figure(row[name]) or "an undefined share", interval(row["ci_low"], row["ci_high"]))))
