"""Numbers and gaps as words."""

import math

import pandas as pd
import pytest

from mechinterp_cli.report.cells import figure, interval, missing, number, probability, text


@pytest.mark.parametrize("gap", [None, pd.NA, math.nan])
def test_gaps_are_empty(gap: object) -> None:
    assert missing(gap)
    assert math.isnan(number(gap))
    assert (text(gap), figure(gap), interval(gap, 1.0), interval(0.0, gap), probability(gap)) == ("",) * 5
    assert not missing(0.0)
    assert (number(0), text(0), interval(0, 1, 1)) == (0.0, "0", "[0.0, 1.0]")


@pytest.mark.parametrize(
    ("value", "plain", "signed"),
    [(-1e-9, "0.000", "+0.000"), (-0.0006, "-0.001", "-0.001"), (2, "2.000", "+2.000"), (math.inf, "inf", "+inf")],
)
def test_what_rounds_to_zero_has_no_minus(value: float, plain: str, signed: str) -> None:
    assert (figure(value), figure(value, sign=True)) == (plain, signed)


def test_probabilities() -> None:
    assert (probability(0.005), probability(1e-7)) == ("0.0050", "1e-07")
