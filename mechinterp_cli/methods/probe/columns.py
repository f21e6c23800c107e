"""The tables of `probe`, beside the common ones."""

import pyarrow as pa

from mechinterp_cli.runs.schema import column, register_columns

_TEXT, _INDEX, _REAL = pa.string(), pa.int32(), pa.float64()


def _texts(*names: str) -> list[pa.Field]:
    return [column(name, _TEXT) for name in names]


def _required(*names: str) -> list[pa.Field]:
    return [column(name, _TEXT, required=True) for name in names]


def _counts(*names: str) -> list[pa.Field]:
    return [column(name, _INDEX, required=True) for name in names]


def _indices(*names: str) -> list[pa.Field]:
    return [column(name, _INDEX) for name in names]


def _reals(*names: str) -> list[pa.Field]:
    return [column(name, _REAL) for name in names]


_CAUSAL_PLACE = [
    *_required("probe", "site"),
    *_counts("layer"),
    *_indices("head", "kv_head", "position"),
    *_texts("span", "template"),
]
_CAUSAL_KEYS = (
    *("probe", "site", "layer", "head", "kv_head", "position", "span", "template"),
    *("intervention", "strength", "stream", "direction", "metric"),
)
# One row per probed site, place, intervention, strength, named direction, metric and group of prompts: the mean effect
# over prompts, and of the probe's own directions the random ones beside it.
register_columns(
    "probe",
    "causal_effects",
    [
        *_CAUSAL_PLACE,
        *_required("intervention"),
        *_reals("strength"),
        *_required("stream", "direction", "metric", "group", "status"),
        *_counts("rank"),
        *_reals("removed", "spread", "baseline", "effect", "ci_low", "ci_high"),
        *_counts("n"),
        *_indices("clusters", "draws"),
        *_reals("random_effect", "random_low", "random_high", "difference", "difference_low", "difference_high"),
        *_reals("p", "p_adjusted"),
        # Of the effects' magnitudes: prompts of two labels may be moved in opposite ways.
        *_reals("size", "random_size", "size_difference", "size_low", "size_high", "size_p", "size_p_adjusted"),
        *_reals("control_effect", "control_difference", "control_low", "control_high", "margin"),
        *_texts("family", "verdict"),
    ],
    keys=(*_CAUSAL_KEYS, "group"),
)
# One row per probed site, place, intervention and group of prompts: can it be read, and is it used?
register_columns(
    "probe",
    "causal_verdicts",
    [
        *_CAUSAL_PLACE,
        *_required("intervention"),
        *_reals("strength"),
        *_required("stream", "metric", "group"),
        *_reals("score", "score_p", "chance"),
        *_texts("readable"),
        *_reals("effect", "difference", "difference_low", "difference_high", "p_adjusted"),
        *_reals("size", "size_difference", "size_low", "size_high", "size_p_adjusted", "margin"),
        *_texts("used"),
    ],
    keys=(*(key for key in _CAUSAL_KEYS if key != "direction"), "group"),
)
# The effect on every prompt, but of random directions.
register_columns(
    "probe",
    "causal_prompts",
    [
        *_CAUSAL_PLACE,
        *_required("intervention"),
        *_reals("strength"),
        *_required("stream", "direction", "metric"),
        *_counts("prompt"),
        *_texts("cluster"),
        *_reals("value", "effect"),
    ],
    keys=(*_CAUSAL_KEYS, "prompt"),
)
# What probes in later layers read while a site is erased.
register_columns(
    "probe",
    "causal_downstream",
    [
        *_required("probe", "erased_site"),
        *_counts("erased_layer"),
        *_indices("erased_head"),
        *_required("site"),
        *_counts("layer"),
        *_reals("score_before", "score_after", "chance"),
    ],
    keys=("probe", "erased_site", "erased_layer", "erased_head", "site", "layer"),
)
_PLACE = [
    *_texts("label", "site"),
    *_indices("layer", "head", "kv_head", "position"),
    *_texts("span", "template"),
    *_required("view"),
]
_PLACE_KEYS = ("site", "layer", "head", "kv_head", "view")
# One row per place, probe and kind of labels over all held-out samples; then by fold, in training and in test.
# Baselines that know no site (majority, bag) have none.
register_columns(
    "probe",
    "probes",
    [
        *_PLACE,
        *_texts("probe"),
        *_required("target", "split", "measure"),
        *_texts("baseline"),
        *_indices("fold"),
        *_reals("penalty"),
        *_indices("n_train"),
        *_counts("n"),
        *_reals("score", "ci_low", "ci_high", "selectivity"),
        # Of permuted labels; `statistic` is the score that draws are compared with.
        *_reals("p", "p_adjusted", "statistic"),
        *_indices("unconverged"),
    ],
    keys=(*_PLACE_KEYS, "probe", "target", "baseline", "split", "fold"),
)
# What the probe of the other folds says of each sample; `probability` is that of the sample's own class.
register_columns(
    "probe",
    "predictions",
    [
        *_PLACE,
        *_required("probe"),
        *_counts("prompt"),
        *_indices("word"),
        *_counts("fold"),
        *_texts("class", "predicted_class"),
        *_reals("target", "predicted", "probability"),
    ],
    keys=(*_PLACE_KEYS, "probe", "prompt", "word"),
)
# Scores of held-out samples by how many samples a fold's probe is fitted on, with the penalty that it chose of all.
register_columns(
    "probe",
    "learning",
    [
        *_PLACE,
        *_required("probe", "measure"),
        *_counts("n_train", "n"),
        *_reals("score", "ci_low", "ci_high"),
    ],
    keys=(*_PLACE_KEYS, "probe", "n_train"),
)
# Online code length of the labels, in bits.
register_columns("probe", "code", [*_PLACE, *_reals("bits", "uniform", "compression")], keys=_PLACE_KEYS)
# What every text or word is labelled with.
register_columns(
    "probe",
    "labels",
    [
        *_counts("prompt"),
        *_indices("word"),
        *_texts("positions", "word_type", "class"),
        *_reals("target"),
        *_texts("group", "factor"),
    ],
    keys=("prompt", "word"),
)
# Of the best places: how far each sample lies from the boundary of the probe that was not fitted on it, above 0 on the
# side of the second class, in standard deviations of the projections of the samples that the probe was fitted on.
register_columns(
    "probe",
    "projections",
    [*_PLACE, *_required("probe"), *_counts("prompt"), *_indices("word"), *_required("class"), *_reals("projection")],
    keys=(*_PLACE_KEYS, "probe", "prompt", "word"),
)
