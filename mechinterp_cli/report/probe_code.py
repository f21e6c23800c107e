"""Code length by layer and the learning curve: how much a probe has to be told, and how many samples it needs."""

from collections.abc import Sequence

import pandas as pd

from mechinterp_cli.report.cells import number
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.series import curve_of
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves

MAX_LINES = 6
UNIFORM = "uniform code"


def code_curves(rows: pd.DataFrame, about: Sequence[str]) -> Curves | None:
    """Bits and compression by layer, a line for each kind of site and view, beside the uniform code.

    Args:
        rows: The table `code`, of one checkpoint.
        about: Task, model, samples.

    Returns:
        None where there are none.
    """
    if rows.empty:
        return None
    lines = _lines(rows)
    notes = "Online code length of the labels by logistic probes; shorter is better. Compression: uniform code / code."
    several = " Of several heads, each layer's shortest." if rows["head"].notna().any() else ""
    left = len(_named(rows)) - len(lines)
    more = f" The {len(lines)} shortest of {len(lines) + left}." if left else ""
    uniform = sorted({round(number(row["uniform"]), 6) for row in records(rows)})
    x = next(iter(lines.values()))[0]
    bits = [curve_of(name, best, own, "bits") for name, (own, best) in lines.items()]
    bits += [Curve(name=UNIFORM, x=x, y=(value,) * len(x), look="reference") for value in uniform[:1]]
    ratio = [curve_of(name, best, own, "compression") for name, (own, best) in lines.items()]
    ratio.append(Curve(name=UNIFORM, x=x, y=(1.0,) * len(x), look="reference"))
    return Curves(
        title=f"{about[0]}: code length",
        lines=(", ".join(about[1:]), notes + several + more),
        x_title="layer",
        panels=(
            CurvePanel(title="code length", y_title="bits", curves=tuple(bits)),
            CurvePanel(title="compression", y_title="times", curves=tuple(ratio)),
        ),
        across=2,
        one_legend=True,
        linear=True,
    )


def _named(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    views = distinct(rows, "view")
    found = {}
    for kind in distinct(rows, "site"):
        for view in distinct(having(rows, site=kind), "view"):
            found[kind + (f", {view}" if len(views) > 1 else "")] = having(rows, site=kind, view=view)
    return found


def _lines(rows: pd.DataFrame) -> dict[str, tuple[tuple[float, ...], list[Row]]]:
    """Name to layers, and each layer's row with the shortest code."""
    found: dict[str, tuple[tuple[float, ...], list[Row]]] = {}
    for name, part in _named(rows).items():
        best: dict[int, Row] = {}
        for row in records(part):
            layer = int(number(row["layer"]))
            if layer not in best or number(row["bits"]) < number(best[layer]["bits"]):
                best[layer] = row
        order = sorted(best)
        found[name] = tuple(float(layer) for layer in order), [best[layer] for layer in order]
    shortest = sorted(found, key=lambda name: min(number(row["bits"]) for row in found[name][1]))[:MAX_LINES]
    return {name: line for name, line in found.items() if name in shortest}
