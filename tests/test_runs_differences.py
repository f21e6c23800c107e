"""A number that moved is found and named, and nothing else is."""

import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

import mechinterp_cli.methods.attribute.columns
import mechinterp_cli.methods.circuit.columns  # noqa: F401  the tables' columns are registered there
from mechinterp_cli.runs.differences import TOLERANCES, Tolerance, table_differences
from mechinterp_cli.runs.schema import (
    inferred_columns,
    reals,
    register_columns,
    table_keys,
    table_schema,
    validate,
)

FINE = Tolerance(1e-6, 1e-3)
ROWS: list[dict[str, Any]] = [
    {"trial": t, "prompt": p, "metric": "kl", "status": "ok", "value": 10.0 * t + p, "label": f"z {t}", "layer": t}
    for t in range(3)
    for p in range(4)
]


def results(rows: list[dict[str, Any]]) -> pa.Table:
    return validate("results", rows)


def changed(place: int, **cells: Any) -> pa.Table:
    return results([row | cells if i == place else row for i, row in enumerate(ROWS)])


def test_equal_tables_do_not_differ() -> None:
    assert table_differences("results", results(ROWS), results(ROWS), FINE) == []
    assert table_differences("results", results(ROWS), results(ROWS[::-1]), FINE) == []


def test_a_moved_number_is_named_with_its_row() -> None:
    (found,) = table_differences("results", results(ROWS), changed(6, value=12.5), FINE)
    assert str(found) == "results: trial 1, (z 1), prompt 2, metric kl: value was 12 and is 12.5"
    assert found.size == 0.5


@pytest.mark.parametrize(("moved", "counts"), [(12.011, 0), (12.013, 1), (11.989, 0), (11.98, 1)])
def test_the_tolerance_is_absolute_plus_relative(moved: float, counts: int) -> None:
    assert len(table_differences("results", results(ROWS), changed(6, value=moved), FINE)) == counts


@pytest.mark.parametrize("one", [1.0, math.nan, None, math.inf])
@pytest.mark.parametrize("two", [1.0, math.nan, None, math.inf])
def test_nan_null_and_infinity_are_each_their_own(one: float | None, two: float | None) -> None:
    same = one is two or one == two
    found = table_differences("results", changed(0, value=one), changed(0, value=two), FINE)
    assert [d.size for d in found] == ([] if same else [math.inf])


@pytest.mark.parametrize(("column", "cell"), [("status", "nan"), ("layer", 7), ("layer", None), ("label", "é")])
def test_words_and_whole_numbers_must_be_the_same(column: str, cell: Any) -> None:
    (found,) = table_differences("results", results(ROWS), changed(3, **{column: cell}), FINE)
    assert (found.column, found.size) == (column, math.inf)


def test_rows_that_one_table_lacks_are_found_from_both_sides() -> None:
    (lost,) = table_differences("results", results(ROWS), results(ROWS[1:]), FINE)
    assert str(lost) == "results: trial 0, (z 0), prompt 0, metric kl: row was there and is missing"
    (new,) = table_differences("results", results(ROWS[1:]), results(ROWS), FINE)
    assert str(new).endswith("row was missing and is there")


def test_the_largest_comes_first() -> None:
    rows = [row | {"value": row["value"] + row["prompt"]} for row in ROWS]
    sizes = [d.size for d in table_differences("results", results(ROWS), results(rows), FINE)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 9


def summary(**cells: Any) -> pa.Table:
    row = {"trial": 0, "metric": "kl", "group": "all", "aggregate": "mean", "n": 3, "n_dropped": 0, "p": 0.05}
    return validate("summary", [row | {"verdict": "yes", "effect": 1.0, "ci_low": 0.5} | cells])


@pytest.mark.parametrize("cells", [{"p": 0.07}, {"verdict": "no"}, {"ci_low": 0.4}, {"ci_low": None}])
def test_statistics_of_the_same_numbers_must_be_the_same(cells: dict[str, Any]) -> None:
    found = table_differences("summary", summary(), summary(**cells), FINE)
    assert [d.column for d in found] == list(cells)
    moved = {"effect": 1 + 1e-9, **cells}
    assert table_differences("summary", summary(), summary(**moved), FINE) == []
    noise = {"effect": 1e-8}
    assert table_differences("summary", summary(**noise), summary(**noise, **cells), FINE) == []
    far = {"effect": 1.1, **cells}
    assert [d.column for d in table_differences("summary", summary(), summary(**far), FINE)] == ["effect"]


def verification(**cells: Any) -> pa.Table:
    row = {"estimator": "atp", "metric": "kl", "site": "q", "part": "random", "nodes": 8, "rows": 4}
    return validate("verification", [row | {"pearson": 0.9, "spearman": 0.8} | cells], "attribute")


def members(**cells: Any) -> pa.Table:
    row = {"score": "eap", "rank": "signed", "edge": 1, "source": "embed", "target": "a0.h1.q", "input": "q"}
    return validate("members", [row | {"size": 0.1} | cells], "circuit")


def edges(**cells: Any) -> pa.Table:
    row = {"score": "eap", "metric": "kl", "edge": 1, "source": "embed", "target": "a0.h1.q", "input": "q"}
    return validate("edges", [row | {"signed": 5, "absolute": 6} | cells], "circuit")


@pytest.mark.parametrize(
    ("table", "make", "measured", "cells"),
    [
        ("verification", verification, "mean_difference", {"pearson": 0.7}),
        ("verification", verification, "mean_difference", {"spearman": 0.7}),
        ("edges", edges, "value", {"signed": 4}),
        ("edges", edges, "value", {"absolute": 7}),
        ("members", members, "value", {"size": 0.2}),
    ],
)
def test_the_order_of_next_to_nothing_may_change_and_that_of_other_numbers_may_not(
    table: str, make: Callable[..., pa.Table], measured: str, cells: dict[str, Any]
) -> None:
    """On another processor the last bits are others, and they alone order numbers that are all rounding."""
    noise = table_differences(table, make(**{measured: 1e-8}), make(**{measured: 2e-8}, **cells), FINE)
    numbers = table_differences(table, make(**{measured: 0.5}), make(**{measured: 0.5}, **cells), FINE)
    assert (noise, [found.column for found in numbers]) == ([], list(cells))


def test_lists_of_tokens_are_compared() -> None:
    def prompts(ids: list[int]) -> pa.Table:
        row = {"prompt": 0, "stream": "clean", "text": "a", "token_ids": ids, "tokens": ["a"] * len(ids)}
        return validate("prompts", [row])

    assert table_differences("prompts", prompts([1, 2]), prompts([1, 2]), FINE) == []
    (found,) = table_differences("prompts", prompts([1, 2]), prompts([1, 3]), FINE)
    assert (found.column, found.recorded, found.repeated) == ("token_ids", [1, 2], [1, 3])


def test_every_key_is_a_column() -> None:
    common = ("trials", "prompts", "baselines", "results", "summary")
    assert all(table_keys(name) and set(table_keys(name)) <= set(table_schema(name).names) for name in common)
    assert TOLERANCES["float64"].atol < TOLERANCES["float32"].atol < TOLERANCES["bfloat16"].atol


def test_only_columns_that_are_there_can_be_inferred() -> None:
    with pytest.raises(ValueError, match="invented: lacks rho"):
        register_columns("patch", "invented", reals("value"), inferred=("rho",))
    assert inferred_columns("verification") == {"pearson", "spearman"}
    assert inferred_columns("results") == frozenset()
