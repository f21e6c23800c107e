"""The tables of `attribute`, beside the common ones.

A trial is a node under an estimator. `effect` and `normalized` are the estimate, as `patch` has the exact one, so that
whatever reads a summary reads these; `estimate` is `effect` by its name, `exact` what was measured where it was.
"""

import pyarrow as pa

from mechinterp_cli.runs.schema import column, register_columns

_TEXT, _INDEX, _REAL = pa.string(), pa.int32(), pa.float64()


def _reals(*names: str) -> list[pa.Field]:
    return [column(name, _REAL) for name in names]


def _counts(*names: str) -> list[pa.Field]:
    return [column(name, _INDEX, required=True) for name in names]


_ESTIMATOR = [column("estimator", _TEXT, required=True), column("steps", _INDEX)]
_WHERE = [column("kv_head", _INDEX), column("template", _TEXT)]

register_columns("attribute", "trials", [*_ESTIMATOR, column("template", _TEXT)])
register_columns("attribute", "results", [*_WHERE, *_ESTIMATOR, *_reals("estimate", "exact", "exact_normalized")])
register_columns(
    "attribute",
    "summary",
    [
        *_WHERE,
        column("block", _INDEX),
        *_ESTIMATOR,
        *_reals("estimate", "exact", "exact_normalized"),
        column("part", _TEXT),  # top, random, or both: why it was verified
    ],
)
# How far estimates are to be trusted: beside exact effects, by kind of site and for all.
register_columns(
    "attribute",
    "verification",
    [
        *_ESTIMATOR,
        *(column(name, _TEXT, required=True) for name in ("metric", "site", "part")),
        *_counts("nodes", "rows"),
        *_reals("pearson", "spearman", "sign_agreement", "mean_difference", "above", "threshold"),
        column("sign_rows", _INDEX),
        column("reason", _TEXT),
    ],
    keys=("estimator", "metric", "site", "part"),
)
# Effects that matter and whose estimates say that they do not: upper bounds, by size of the estimate.
register_columns(
    "attribute",
    "missed",
    [
        *_ESTIMATOR,
        *(column(name, _TEXT, required=True) for name in ("metric", "site", "stratum")),
        *_reals("low", "high"),
        *_counts("nodes", "rows", "missed", "upper_count"),
        *_reals("upper_fraction", "threshold", "level"),
    ],
    keys=("estimator", "metric", "site", "stratum"),
)
# Random subsets patched together, beside the sum of their estimates.
register_columns(
    "attribute",
    "subsets",
    [*_ESTIMATOR, column("metric", _TEXT, required=True), *_counts("subset", "size"), *_reals("estimate", "exact")],
    keys=("estimator", "metric", "subset"),
)
# Direct logit attribution.
register_columns(
    "attribute",
    "direct",
    [
        *_counts("prompt"),
        column("cluster", _TEXT),
        column("group", _TEXT),
        column("component", _TEXT, required=True),
        *(column(name, _INDEX) for name in ("layer", "head", "neuron", "source_position")),
        column("source_token", _TEXT),
        *_reals("value"),
    ],
    keys=("prompt", "component", "layer", "head", "neuron", "source_position"),
)
# Logit lens.
register_columns(
    "attribute",
    "lens",
    [
        *_counts("prompt"),
        column("site", _TEXT, required=True),
        *_counts("layer", "position", "rank", "token_id"),
        column("token", _TEXT),
        *_reals("probability", "answer_probability", "kl"),
        column("answer_rank", _INDEX),
    ],
    keys=("prompt", "site", "layer", "position", "rank"),
)
# Attribution to the prompt's tokens.
register_columns(
    "attribute",
    "inputs",
    [
        *_counts("prompt"),
        column("estimator", _TEXT, required=True),
        column("steps", _INDEX),
        column("metric", _TEXT, required=True),
        *_counts("position"),
        column("token", _TEXT, required=True),
        *_reals("value"),
    ],
    keys=("prompt", "estimator", "metric", "position"),
)
