"""The tables of `ablate`, beside the common ones."""

import pyarrow as pa

from mechinterp_cli.runs.schema import column, register_columns

_TEXT, _INDEX = pa.string(), pa.int32()


def _texts(*names: str) -> list[pa.Field]:
    return [column(name, _TEXT) for name in names]


def _required(*names: str) -> list[pa.Field]:
    return [column(name, _TEXT, required=True) for name in names]


def _counts(*names: str) -> list[pa.Field]:
    return [column(name, _INDEX, required=True) for name in names]


def _reals(*names: str) -> list[pa.Field]:
    return [column(name, pa.float64()) for name in names]


_OWN = [
    column("kv_head", _INDEX),
    *_texts("template", "ablation", "design"),
    column("k", _INDEX),
    column("set", _TEXT),
    column("ranking", _INDEX),
]

register_columns(
    "ablate",
    "trials",
    [
        *_texts("template", "ablation"),
        column("ranking", _INDEX),
        # Of `optimal`: what was made small, on the prompts that are fitted on.
        *_reals("fit_mean", "fit_zero", "fit_loss"),
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
        *_required("ablation", "metric"),
        *_counts("k", "n", "draws"),
        *_texts("units"),
        *_reals("baseline", "effect", "ci_low", "ci_high", "random_effect", "random_low", "random_high"),
        *_reals("difference", "difference_low", "difference_high", "p"),
        *_texts("verdict"),
    ],
    keys=("ablation", "k", "metric"),
)
# Keep: how much of the behaviour a set alone has, and how much is left without it.
register_columns(
    "ablate",
    "circuits",
    [
        *_required("ablation", "set", "metric"),
        *_counts("size", "n"),
        *_reals("full", "empty", "alone", "without"),
        *_reals("faithfulness", "faithfulness_low", "faithfulness_high"),
        *_reals("completeness", "completeness_low", "completeness_high"),
    ],
    keys=("ablation", "set", "metric"),
)
# Pairs: joint effect minus the sum of the single effects.
register_columns(
    "ablate",
    "interactions",
    [
        *_required("ablation", "a", "b", "metric"),
        *_counts("n"),
        *_reals("effect_a", "effect_b", "joint", "interaction", "ci_low", "ci_high"),
    ],
    keys=("ablation", "a", "b", "metric"),
)
# Two groups of prompts: is the effect another in one than in the other?
register_columns(
    "ablate",
    "contrasts",
    [
        column("trial", pa.int64(), required=True),
        *_required("ablation", "metric", "group_a", "group_b"),
        *_counts("n_a", "n_b"),
        *_texts("label"),
        *_reals("effect_a", "effect_b", "difference", "ci_low", "ci_high", "p", "p_adjusted"),
        *_texts("verdict"),
    ],
    keys=("ablation", "trial", "metric", "group_a", "group_b"),
)
# Tasks of whole texts: what is measured, position by position; trial is null for the unedited model.
register_columns(
    "ablate",
    "positions",
    [
        column("trial", pa.int64()),
        *_texts("ablation", "label", "template"),
        *_required("metric"),
        *_counts("position", "n"),
        *_reals("value", "effect", "ci_low", "ci_high"),
    ],
    keys=("ablation", "trial", "metric", "template", "position"),
)
# Greedy continuations; trial is null for the unedited model.
register_columns(
    "ablate",
    "words",
    [
        *_counts("prompt"),
        column("trial", pa.int64()),
        *_texts("ablation"),
        *_required("label", "text"),
        column("token_ids", pa.list_(_INDEX), required=True),
    ],
    keys=("prompt", "ablation", "trial"),
)
