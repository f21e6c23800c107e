"""Pictures and tables of circuits, from frames made by hand."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechinterp_cli.report.circuit_curves import RANDOM, circuit_name, edge_dots, faithfulness_curves
from mechinterp_cli.report.circuit_drawing import BOX, BOX_HEIGHT, THICK, chart
from mechinterp_cli.report.circuit_graph import MAX_EDGES, GraphPicture, graph_picture

PLANTED = [
    ("embed", "a0.h1.v", "v", 3.0),
    ("a0.h1", "a1.h2.k", "k", 2.0),
    ("embed", "a1.h2.q", "q", 1.0),
    ("embed", "a1.h2.v", "v", 2.5),
    ("m0", "logits", None, -1.0),
    ("a1.h2", "logits", None, 4.0),
]


def edges(rows: Sequence[tuple[str, str, str | None, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["source", "target", "input", "value"])


def picture(rows: Sequence[tuple[str, str, str | None, float]], heads: int = 4, grouped: int = 1) -> GraphPicture:
    found = graph_picture(edges(rows), title="A circuit", lines=("task",), heads=heads, grouped=grouped)
    assert found is not None
    return found


def lines_of(shape: GraphPicture) -> pd.DataFrame:
    """The points of the drawing's lines."""
    spec = chart(shape).to_dict()
    data: dict[str, Any] = spec["concat"][0]["layer"][0]["data"]
    return pd.DataFrame(data["values"] if "values" in data else spec["datasets"][data["name"]])


def test_nodes_stand_by_layer_between_embedding_and_logits() -> None:
    shape = picture(PLANTED)
    at = {node.name: (node.x, node.y) for node in shape.nodes}
    assert set(at) == {"embed", "0.1", "1.2", "MLP 0", "logits"}
    assert [name for name, _ in sorted(at.items(), key=lambda item: item[1][1])] == [
        "embed",
        "0.1",
        "MLP 0",
        "1.2",
        "logits",
    ]
    assert at["0.1"][0] == 1
    assert at["1.2"][0] == 2
    assert at["MLP 0"][0] == 4  # beside the heads
    assert shape.rows == ("", "layer 0", "layer 0", "layer 1", "")


def test_edges_end_at_the_input_that_they_lead_into() -> None:
    ends = {(edge.input, edge.end[1]): edge.end[0] for edge in picture(PLANTED).edges if edge.end[1] == 3}
    assert ends["q", 3] < ends["k", 3] < ends["v", 3]
    assert ends["k", 3] == 2


def test_a_shared_key_is_drawn_between_the_heads_that_read_it() -> None:
    shape = picture([("embed", "a0.h1.k", "k", 1.0), ("a0.h3", "logits", None, 1.0)], heads=6, grouped=3)
    assert {node.name for node in shape.nodes} == {"embed", "0.3", "0.4", "0.5", "logits"}
    (edge,) = (edge for edge in shape.edges if edge.input == "k")
    assert edge.end[0] == 4


def test_width_is_size_and_colour_is_sign() -> None:
    lines = lines_of(picture(PLANTED))
    by_edge = lines.groupby("_edge").agg(width=("_width", "first"), sign=("sign", "first"))
    shape = picture(PLANTED)
    for number, edge in enumerate(shape.edges):
        assert by_edge.loc[number, "sign"] == ("helps" if edge.score >= 0 else "hurts")
    order = np.argsort([abs(edge.score) for edge in shape.edges])
    widths = by_edge["width"].to_numpy()[order]
    assert (np.diff(widths) >= 0).all()
    assert widths[-1] == THICK


def test_lines_pass_no_box_that_they_do_not_end_at() -> None:
    shape = picture(PLANTED)
    lines = lines_of(shape)
    for number, edge in enumerate(shape.edges):
        points = lines[lines["_edge"] == number][["_x", "_y"]].to_numpy()[1:-1]
        for node in shape.nodes:
            if (node.x, node.y) == edge.start or node.y == edge.end[1]:
                continue
            inside = (np.abs(points - (node.x, node.y)) < (BOX, BOX_HEIGHT)).all(1)
            assert not inside.any(), (edge, node)


def test_many_edges_are_cut_to_the_strongest_and_the_picture_says_so() -> None:
    rows = [(f"a0.h{i % 8}", f"a{1 + i // 8}.h{i % 8}.v", "v", float(i)) for i in range(MAX_EDGES + 20)]
    shape = picture(rows, heads=8)
    assert len(shape.edges) == MAX_EDGES
    assert min(edge.score for edge in shape.edges) == 20
    assert f"The strongest {MAX_EDGES} of {MAX_EDGES + 20} edges." in shape.lines
    assert graph_picture(edges([]), title="", lines=(), heads=1, grouped=1) is None


def curve_rows() -> pd.DataFrame:
    rows = [
        {
            "score": score, "rank": rank, "size": size, "threshold": None, "metric": "logit_diff", "kept": 5,
            "faithfulness": size, "ci_low": size - 0.1, "ci_high": size + 0.1, "n": 16, "clusters": 4,
            "random_mean": size / 2, "random_low": 0.0, "random_high": size, "draws": 3,
        }
        for score, rank, size in itertools.product(("eap", "exact"), ("signed", "absolute"), (0.1, 1.0))
    ]  # fmt: skip
    given = {"score": "given", "metric": "logit_diff", "kept": 7, "faithfulness": 0.5, "n": 16, "clusters": 4}
    return pd.DataFrame([*rows, given])


def test_curves_of_each_ranking_stand_beside_random_ones() -> None:
    shape = faithfulness_curves(curve_rows(), ("task", "model"))
    assert shape is not None
    assert [panel.title for panel in shape.panels] == ["ranked by signed score", "ranked by absolute score"]
    for panel in shape.panels:
        assert [curve.name for curve in panel.curves] == ["eap", "exact", RANDOM]
        assert panel.curves[0].y == (0.1, 1.0)
        assert panel.curves[0].low == pytest.approx((0.0, 0.9))
        assert panel.curves[-1].high == (0.1, 1.0)
    assert "given: 0.500 with 7 edges" in shape.lines[-1]
    assert faithfulness_curves(curve_rows().tail(1), ()) is None


def test_edges_that_were_taken_out_are_told_largest_first() -> None:
    rows = pd.DataFrame(
        {
            "score": "eap", "size": 0.1, "metric": "logit_diff", "source": ["embed", "m0"], "target": ["m0", "logits"],
            "effect": [0.1, -0.4], "ci_low": [0.0, -0.5], "ci_high": [0.2, -0.3], "verdict": ["inconclusive", "yes"],
        }
    )  # fmt: skip
    shape = edge_dots(rows, ("task",), "Bars: 95 % intervals.")
    assert shape is not None
    (panel,) = shape.panels
    assert [(dot.name, dot.series) for dot in panel.dots] == [("m0->logits", "needed"), ("embed->m0", "inconclusive")]
    assert edge_dots(rows.head(0), (), "") is None


def test_circuits_have_names() -> None:
    assert circuit_name({"score": "eap", "size": 0.01, "threshold": None}) == "eap, 0.01"
    assert circuit_name({"score": "acdc", "size": None, "threshold": 0.5}) == "acdc, above 0.5"
    assert circuit_name({"score": "given"}) == "given"
