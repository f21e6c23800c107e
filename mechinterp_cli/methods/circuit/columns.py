"""The tables of `circuit`, beside the common ones.

A row of `summary` is a node under a score: its effect is the sum of what is estimated of the edges that leave it, which
is what `patch` measures on that node.
"""

import pyarrow as pa

from mechinterp_cli.runs.schema import column, register_columns

_TEXT, _INDEX, _REAL = pa.string(), pa.int32(), pa.float64()


def _texts(*names: str) -> list[pa.Field]:
    return [column(name, _TEXT) for name in names]


def _required(*names: str) -> list[pa.Field]:
    return [column(name, _TEXT, required=True) for name in names]


def _counts(*names: str) -> list[pa.Field]:
    return [column(name, _INDEX) for name in names]


def _reals(*names: str) -> list[pa.Field]:
    return [column(name, _REAL) for name in names]


_EDGE = [
    column("edge", _INDEX, required=True),
    *_required("source", "target"),
    *_counts("source_layer", "source_head", "target_layer", "target_head", "target_kv_head"),
    *_texts("input", "span"),  # q, k or v of a head; the span of positions, where edges are told apart by it
]
_INTERVAL = [*_reals("ci_low", "ci_high"), column("ci_method", _TEXT)]
# Of which circuit: by which score (or `given`, `reference`) and ranking, how large.
_CIRCUIT = [*_required("score"), column("rank", _TEXT), *_reals("size", "threshold")]

register_columns(
    "circuit", "summary", [*_counts("kv_head"), *_required("estimator"), *_counts("steps"), *_reals("estimate")]
)
# Every edge under every score: sparse, never a matrix. Higher is more helpful.
register_columns(
    "circuit",
    "edges",
    [*_required("score", "metric"), *_EDGE, *_reals("value"), *_INTERVAL, *_counts("signed", "absolute", "n")],
    keys=("score", "metric", "edge"),
)
# The circuits: an edge is in those of its `size` and all larger ones (circuits of a ranking lie in each other).
register_columns(
    "circuit", "members", [*_CIRCUIT, *_EDGE, *_reals("value")], keys=("score", "rank", "threshold", "edge")
)
# How much of the behaviour each circuit has.
register_columns(
    "circuit",
    "faithfulness",
    [
        *_CIRCUIT,
        *_counts("asked", "kept", "nodes"),
        *_required("metric"),
        *_reals("value", "full", "empty", "faithfulness"),
        *_INTERVAL,
        *_reals("random_mean", "random_low", "random_high"),
        *_counts("draws", "n", "clusters"),
    ],
    keys=("score", "rank", "size", "threshold", "metric"),
)
# Each prompt's value under each circuit, from which intervals are made.
register_columns(
    "circuit",
    "evaluations",
    [
        *_CIRCUIT,
        *_counts("draw"),
        column("prompt", _INDEX, required=True),
        *_texts("cluster", "group"),
        *_required("metric"),
        *_reals("value"),
    ],
    keys=("score", "rank", "size", "threshold", "draw", "prompt", "metric"),
)
# CPR, CMD and the overlap with the reference: `measure` says which.
register_columns(
    "circuit",
    "quality",
    [
        *_required("score"),
        column("rank", _TEXT),
        *_reals("size", "threshold"),
        *_required("metric", "measure"),
        column("level", _TEXT),  # what is compared: edges or nodes
        *_reals("value"),
        *_INTERVAL,
        *_reals("random_mean", "random_low", "random_high"),
    ],
    keys=("score", "rank", "size", "threshold", "metric", "measure", "level"),
)
# Tests of one circuit.
register_columns(
    "circuit",
    "tests",
    [
        *_CIRCUIT,
        *_required("metric", "test"),
        *_reals("statistic", "low", "high", "margin", "p"),
        *_counts("n", "of"),
        *_required("verdict"),
    ],
    keys=("score", "metric", "test"),
)
# Its edges, each taken out alone.
register_columns(
    "circuit",
    "minimality",
    [
        *_CIRCUIT,
        *_required("metric"),
        *_EDGE,
        *_reals("value", "without", "effect"),
        *_INTERVAL,
        *_reals("share", "p", "p_adjusted"),
        *_required("verdict"),
    ],
    keys=("score", "metric", "edge"),
)
# Random parts of it, taken out of it and out of the model.
register_columns(
    "circuit",
    "completeness",
    [
        *_CIRCUIT,
        *_required("metric"),
        *_counts("draw", "removed"),
        *_reals("circuit_without", "model_without", "difference"),
        *_INTERVAL,
        *_required("verdict"),
    ],
    keys=("score", "metric", "draw"),
)
# The ranking over training prompts drawn again.
register_columns(
    "circuit",
    "stability",
    [
        *_required("score", "rank", "metric", "measure"),
        *_reals("size", "mean", "low", "high"),
        *_counts("draws", "n", "clusters"),
    ],
    keys=("score", "rank", "metric", "measure"),
)
