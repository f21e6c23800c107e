"""The tables of `attribute`, beside the common ones.

A trial is a node under an estimator. `effect` and `normalized` are the estimate, as `patch` has the exact one, so that
whatever reads a summary reads these; `estimate` is `effect` by its name, `exact` what was measured where it was.
"""

import pyarrow as pa

from mechinterp_cli.runs.schema import column, indices, reals, register_columns

_TEXT, _INDEX = pa.string(), pa.int32()

_ESTIMATOR = [column("estimator", _TEXT, required=True), column("steps", _INDEX)]
_WHERE = [column("kv_head", _INDEX), column("template", _TEXT)]

register_columns("attribute", "trials", [*_ESTIMATOR, column("template", _TEXT)])
register_columns("attribute", "results", [*_WHERE, *_ESTIMATOR, *reals("estimate", "exact", "exact_normalized")])
register_columns(
    "attribute",
    "summary",
    [
        *_WHERE,
        column("block", _INDEX),
        *_ESTIMATOR,
        *reals("estimate", "exact", "exact_normalized"),
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
        *indices("nodes", "rows", required=True),
        *reals("pearson", "spearman", "sign_agreement", "mean_difference", "above", "threshold"),
        column("sign_rows", _INDEX),
        column("reason", _TEXT),
    ],
    keys=("estimator", "metric", "site", "part"),
    inferred=("pearson", "spearman"),
)
# Effects that matter and whose estimates say that they do not: upper bounds, by size of the estimate.
register_columns(
    "attribute",
    "missed",
    [
        *_ESTIMATOR,
        *(column(name, _TEXT, required=True) for name in ("metric", "site", "stratum")),
        *reals("low", "high"),
        *indices("nodes", "rows", "missed", "upper_count", required=True),
        *reals("upper_fraction", "threshold", "level"),
    ],
    keys=("estimator", "metric", "site", "stratum"),
)
# Random subsets patched together, beside the sum of their estimates.
register_columns(
    "attribute",
    "subsets",
    [
        *_ESTIMATOR,
        column("metric", _TEXT, required=True),
        *indices("subset", "size", required=True),
        *reals("estimate", "exact"),
    ],
    keys=("estimator", "metric", "subset"),
)
# Direct logit attribution: rows of one `part_of` sum to the component of that name.
_COMPONENT = [column("component", _TEXT, required=True), column("part_of", _TEXT)]
register_columns(
    "attribute",
    "direct",
    [
        *indices("prompt", required=True),
        column("cluster", _TEXT),
        column("group", _TEXT),
        *_COMPONENT,
        *(column(name, _INDEX) for name in ("layer", "head", "neuron", "source_position")),
        *(column(name, _TEXT) for name in ("source_token", "source_span")),
        *reals("value"),
    ],
    keys=("prompt", "component", "layer", "head", "neuron", "source_position"),
)
_MEAN = [*reals("value"), *indices("n", "clusters", required=True), *reals("ci_low", "ci_high")]
_MEAN.append(column("ci_method", _TEXT, required=True))
# Its means over prompts, of all and of each group.
register_columns(
    "attribute",
    "components",
    [
        column("group", _TEXT, required=True),
        *_COMPONENT,
        *(column(name, _INDEX) for name in ("layer", "head", "neuron")),
        *_MEAN,
    ],
    keys=("group", "component", "layer", "head", "neuron"),
)
# Means of heads' parts by the span that a head attends to.
register_columns(
    "attribute",
    "sources",
    [
        column("group", _TEXT, required=True),
        *indices("layer", "head", required=True),
        column("source_span", _TEXT, required=True),
        *_MEAN,
    ],
    keys=("group", "layer", "head", "source_span"),
)
# Logit lens: a row per token that is likeliest; what is said of the answer is the same in each.
register_columns(
    "attribute",
    "lens",
    [
        *indices("prompt", required=True),
        column("site", _TEXT, required=True),
        *indices("layer", "position", required=True),
        column("span", _TEXT),
        *indices("rank", "token_id", required=True),
        column("token", _TEXT),
        *reals("probability", "answer_probability"),
        column("answer_rank", _INDEX),
        *reals("kl"),
    ],
    keys=("prompt", "site", "layer", "position", "rank"),
)
# Attribution to the prompt's tokens.
_TOKENS = [
    column("estimator", _TEXT, required=True),
    column("steps", _INDEX),
    column("baseline", _TEXT),  # what an absent token is; null for rollout
    column("metric", _TEXT, required=True),  # `attention` for rollout, which knows no metric
]
register_columns(
    "attribute",
    "inputs",
    [
        *indices("prompt", required=True),
        *(column(name, _TEXT) for name in ("cluster", "group", "template")),
        *_TOKENS,
        *indices("position", required=True),
        column("token", _TEXT, required=True),
        *reals("value", "share"),
    ],
    keys=("prompt", "estimator", "metric", "position"),
)
# Sums of integrated gradients over a prompt's tokens, beside the difference that they should be.
register_columns(
    "attribute",
    "input_completeness",
    [
        *indices("prompt", required=True),
        *(column(name, _TEXT) for name in ("cluster", "group")),
        *_TOKENS,
        *reals("input", "baseline_value", "difference", "sum", "error", "relative_error"),
    ],
    keys=("prompt", "estimator", "metric"),
)
# Means over prompts, of spans and positions.
register_columns(
    "attribute",
    "input_spans",
    [
        *_TOKENS,
        column("template", _TEXT),
        column("span", _TEXT),
        column("position", _INDEX),
        *reals("mean", "ci_low", "ci_high"),
        *indices("n", "clusters", required=True),
    ],
    keys=("estimator", "metric", "template", "span", "position"),
)
