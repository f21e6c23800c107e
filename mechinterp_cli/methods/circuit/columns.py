"""The tables of `circuit`, beside the common ones.

A row of `summary` is a node under a score: its effect is the sum of what is estimated of the edges that leave it, which
is what `patch` measures on that node.
"""

import pyarrow as pa

from mechinterp_cli.runs.schema import column, indices, reals, register_columns, texts

_TEXT, _INDEX = pa.string(), pa.int32()

_EDGE = [
    column("edge", _INDEX, required=True),
    *texts("source", "target", required=True),
    *indices("source_layer", "source_head", "target_layer", "target_head", "target_kv_head"),
    *texts("input", "span"),  # q, k or v of a head; the span of positions, where edges are told apart by it
]
_INTERVAL = [*reals("ci_low", "ci_high"), column("ci_method", _TEXT)]
# Of which circuit: by which score (or `given`, `reference`) and ranking, how large.
_CIRCUIT = [*texts("score", required=True), column("rank", _TEXT), *reals("size", "threshold")]

register_columns(
    "circuit",
    "summary",
    [*indices("kv_head"), *texts("estimator", required=True), *indices("steps"), *reals("estimate")],
)
# Every edge under every score: sparse, never a matrix. Higher is more helpful.
register_columns(
    "circuit",
    "edges",
    [
        *texts("score", "metric", required=True),
        *_EDGE,
        *reals("value"),
        *_INTERVAL,
        *indices("signed", "absolute", "n"),
    ],
    keys=("score", "metric", "edge"),
    inferred=("signed", "absolute"),
)
# The circuits: an edge is in those of its `size` and all larger ones (circuits of a ranking lie in each other).
register_columns(
    "circuit",
    "members",
    [*_CIRCUIT, *_EDGE, *reals("value")],
    keys=("score", "rank", "threshold", "edge"),
    inferred=("size",),
)
# How much of the behaviour each circuit has.
register_columns(
    "circuit",
    "faithfulness",
    [
        *_CIRCUIT,
        *indices("asked", "kept", "nodes"),
        *texts("metric", required=True),
        *reals("value", "full", "empty", "faithfulness"),
        *_INTERVAL,
        *reals("random_mean", "random_low", "random_high"),
        *indices("draws", "n", "clusters"),
    ],
    keys=("score", "rank", "size", "threshold", "metric"),
)
# Each prompt's value under each circuit, from which intervals are made.
register_columns(
    "circuit",
    "evaluations",
    [
        *_CIRCUIT,
        *indices("draw"),
        column("prompt", _INDEX, required=True),
        *texts("cluster", "group"),
        *texts("metric", required=True),
        *reals("value"),
    ],
    keys=("score", "rank", "size", "threshold", "draw", "prompt", "metric"),
)
# CPR, CMD and the overlap with the reference: `measure` says which.
register_columns(
    "circuit",
    "quality",
    [
        *texts("score", required=True),
        column("rank", _TEXT),
        *reals("size", "threshold"),
        *texts("metric", "measure", required=True),
        column("level", _TEXT),  # what is compared: edges or nodes
        *reals("value"),
        *_INTERVAL,
        *reals("random_mean", "random_low", "random_high"),
    ],
    keys=("score", "rank", "size", "threshold", "metric", "measure", "level"),
)
# Tests of one circuit.
register_columns(
    "circuit",
    "tests",
    [
        *_CIRCUIT,
        *texts("metric", "test", required=True),
        *reals("statistic", "low", "high", "margin", "p"),
        *indices("n", "of"),
        *texts("verdict", required=True),
    ],
    keys=("score", "metric", "test"),
)
# Its edges, each taken out alone.
register_columns(
    "circuit",
    "minimality",
    [
        *_CIRCUIT,
        *texts("metric", required=True),
        *_EDGE,
        *reals("value", "without", "effect"),
        *_INTERVAL,
        *reals("share", "p", "p_adjusted"),
        *texts("verdict", required=True),
    ],
    keys=("score", "metric", "edge"),
)
# Random parts of it, taken out of it and out of the model.
register_columns(
    "circuit",
    "completeness",
    [
        *_CIRCUIT,
        *texts("metric", required=True),
        *indices("draw", "removed"),
        *reals("circuit_without", "model_without", "difference"),
        *_INTERVAL,
        *texts("verdict", required=True),
    ],
    keys=("score", "metric", "draw"),
)
# The ranking over training prompts drawn again.
register_columns(
    "circuit",
    "stability",
    [
        *texts("score", "rank", "metric", "measure", required=True),
        *reals("size", "mean", "low", "high"),
        *indices("draws", "n", "clusters"),
    ],
    keys=("score", "rank", "metric", "measure"),
)
