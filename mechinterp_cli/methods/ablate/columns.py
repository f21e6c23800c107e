"""The tables of `ablate`, beside the common ones."""

import pyarrow as pa

from mechinterp_cli.runs.schema import column, indices, reals, register_columns, texts

_TEXT, _INDEX = pa.string(), pa.int32()

_OWN = [
    column("kv_head", _INDEX),
    *texts("template", "ablation", "design"),
    column("k", _INDEX),
    column("set", _TEXT),
    column("ranking", _INDEX),
]

register_columns(
    "ablate",
    "trials",
    [
        *texts("template", "ablation"),
        column("ranking", _INDEX),
        # Of `optimal`: what was made small, on the prompts that are fitted on.
        *reals("fit_mean", "fit_zero", "fit_loss"),
        column("fit_prompts", _INDEX),
    ],
)
register_columns("ablate", "results", _OWN)
register_columns("ablate", "summary", [*_OWN, column("block", _INDEX)])
# Cumulative: the ranking's top k beside random rankings.
register_columns(
    "ablate",
    "curve",
    [
        *texts("ablation", "metric", required=True),
        *indices("k", "n", "draws", required=True),
        *texts("units"),
        *reals("baseline", "effect", "ci_low", "ci_high", "random_effect", "random_low", "random_high"),
        *reals("difference", "difference_low", "difference_high", "p"),
        *texts("verdict"),
    ],
    keys=("ablation", "k", "metric"),
)
# Keep: how much of the behaviour a set alone has, and how much is left without it.
register_columns(
    "ablate",
    "circuits",
    [
        *texts("ablation", "set", "metric", required=True),
        *indices("size", "n", required=True),
        *reals("full", "empty", "alone", "without"),
        *reals("faithfulness", "faithfulness_low", "faithfulness_high"),
        *reals("completeness", "completeness_low", "completeness_high"),
    ],
    keys=("ablation", "set", "metric"),
)
# Pairs: joint effect minus the sum of the single effects.
register_columns(
    "ablate",
    "interactions",
    [
        *texts("ablation", "a", "b", "metric", required=True),
        *indices("n", required=True),
        *reals("effect_a", "effect_b", "joint", "interaction", "ci_low", "ci_high"),
    ],
    keys=("ablation", "a", "b", "metric"),
)
# Two groups of prompts: is the effect another in one than in the other?
register_columns(
    "ablate",
    "contrasts",
    [
        column("trial", pa.int64(), required=True),
        *texts("ablation", "metric", "group_a", "group_b", required=True),
        *indices("n_a", "n_b", required=True),
        *texts("label"),
        *reals("effect_a", "effect_b", "difference", "ci_low", "ci_high", "p", "p_adjusted"),
        *texts("verdict"),
    ],
    keys=("ablation", "trial", "metric", "group_a", "group_b"),
)
# Tasks of whole texts: what is measured, position by position; trial is null for the unedited model.
register_columns(
    "ablate",
    "positions",
    [
        column("trial", pa.int64()),
        *texts("ablation", "label", "template"),
        *texts("metric", required=True),
        *indices("position", "n", required=True),
        *reals("value", "effect", "ci_low", "ci_high"),
    ],
    keys=("ablation", "trial", "metric", "template", "position"),
)
# Greedy continuations; trial is null for the unedited model.
register_columns(
    "ablate",
    "words",
    [
        *indices("prompt", required=True),
        column("trial", pa.int64()),
        *texts("ablation"),
        *texts("label", "text", required=True),
        column("token_ids", pa.list_(_INDEX), required=True),
    ],
    keys=("prompt", "ablation", "trial"),
)
