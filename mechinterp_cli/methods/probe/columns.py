"""The tables of `probe`, beside the common ones."""

from mechinterp_cli.runs.schema import Standing, indices, reals, register_columns, register_standing, texts

_CAUSAL_PLACE = [
    *texts("probe", "site", required=True),
    *indices("layer", required=True),
    *indices("head", "kv_head", "position"),
    *texts("span", "template"),
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
        *texts("intervention", required=True),
        *reals("strength"),
        *texts("stream", "direction", "metric", "group", "status", required=True),
        *indices("rank", required=True),
        *reals("removed", "spread", "baseline", "effect", "ci_low", "ci_high"),
        *indices("n", required=True),
        *indices("clusters", "draws"),
        *reals("random_effect", "random_low", "random_high", "difference", "difference_low", "difference_high"),
        *reals("p", "p_adjusted"),
        # Of the effects' magnitudes: prompts of two labels may be moved in opposite ways.
        *reals("size", "random_size", "size_difference", "size_low", "size_high", "size_p", "size_p_adjusted"),
        *reals("control_effect", "control_difference", "control_low", "control_high", "margin"),
        *texts("family", "verdict"),
    ],
    keys=(*_CAUSAL_KEYS, "group"),
)
# One row per probed site, place, intervention and group of prompts: can it be read, and is it used?
register_columns(
    "probe",
    "causal_verdicts",
    [
        *_CAUSAL_PLACE,
        *texts("intervention", required=True),
        *reals("strength"),
        *texts("stream", "metric", "group", required=True),
        *reals("score", "score_p", "chance"),
        *texts("readable"),
        *reals("effect", "difference", "difference_low", "difference_high", "p_adjusted"),
        *reals("size", "size_difference", "size_low", "size_high", "size_p_adjusted", "margin"),
        *texts("used"),
    ],
    keys=(*(key for key in _CAUSAL_KEYS if key != "direction"), "group"),
)
# The effect on every prompt, but of random directions.
register_columns(
    "probe",
    "causal_prompts",
    [
        *_CAUSAL_PLACE,
        *texts("intervention", required=True),
        *reals("strength"),
        *texts("stream", "direction", "metric", required=True),
        *indices("prompt", required=True),
        *texts("cluster"),
        *reals("value", "effect"),
    ],
    keys=(*_CAUSAL_KEYS, "prompt"),
)
# What probes in later layers read while a site is erased.
register_columns(
    "probe",
    "causal_downstream",
    [
        *texts("probe", "erased_site", required=True),
        *indices("erased_layer", required=True),
        *indices("erased_head"),
        *texts("site", required=True),
        *indices("layer", required=True),
        *reals("score_before", "score_after", "chance"),
    ],
    keys=("probe", "erased_site", "erased_layer", "erased_head", "site", "layer"),
)
_PLACE = [
    *texts("label", "site"),
    *indices("layer", "head", "kv_head", "position"),
    *texts("span", "template"),
    *texts("view", required=True),
]
_PLACE_KEYS = ("site", "layer", "head", "kv_head", "view")
# One row per place, probe and kind of labels over all held-out samples; then by fold, in training and in test.
# Baselines that know no site (majority, bag) have none.
register_columns(
    "probe",
    "probes",
    [
        *_PLACE,
        *texts("probe"),
        *texts("target", "split", "measure", required=True),
        *texts("baseline"),
        *indices("fold"),
        *reals("penalty"),
        *indices("n_train"),
        *indices("n", required=True),
        *reals("score", "ci_low", "ci_high", "selectivity"),
        # Of permuted labels; `statistic` is the score that draws are compared with.
        *reals("p", "p_adjusted", "statistic"),
        *indices("unconverged"),
    ],
    keys=(*_PLACE_KEYS, "probe", "target", "baseline", "split", "fold"),
)
# What the probe of the other folds says of each sample; `probability` is that of the sample's own class.
register_columns(
    "probe",
    "predictions",
    [
        *_PLACE,
        *texts("probe", required=True),
        *indices("prompt", required=True),
        *indices("word"),
        *indices("fold", required=True),
        *texts("class", "predicted_class"),
        *reals("target", "predicted", "probability"),
    ],
    keys=(*_PLACE_KEYS, "probe", "prompt", "word"),
)
# Scores of held-out samples by how many samples a fold's probe is fitted on, with the penalty that it chose of all.
register_columns(
    "probe",
    "learning",
    [
        *_PLACE,
        *texts("probe", "measure", required=True),
        *indices("n_train", "n", required=True),
        *reals("score", "ci_low", "ci_high"),
    ],
    keys=(*_PLACE_KEYS, "probe", "n_train"),
)
# Online code length of the labels, in bits.
register_columns("probe", "code", [*_PLACE, *reals("bits", "uniform", "compression")], keys=_PLACE_KEYS)
# What every text or word is labelled with.
register_columns(
    "probe",
    "labels",
    [
        *indices("prompt", required=True),
        *indices("word"),
        *texts("positions", "word_type", "class"),
        *reals("target"),
        *texts("group", "factor"),
    ],
    keys=("prompt", "word"),
)
# Of the best places: how far each sample lies from the boundary of the probe that was not fitted on it, above 0 on the
# side of the second class, in standard deviations of the projections of the samples that the probe was fitted on.
register_columns(
    "probe",
    "projections",
    [
        *_PLACE,
        *texts("probe", required=True),
        *indices("prompt", required=True),
        *indices("word"),
        *texts("class", required=True),
        *reals("projection"),
    ],
    keys=(*_PLACE_KEYS, "probe", "prompt", "word"),
)

# What of two runs is compared: rows of `probes` over all folds, of the model's own activations and the labels.
_WHOLE = {"target": "label", "split": "test", "baseline": None, "fold": None}
register_standing("probe", Standing("probes", metric="probe", site="", label="{label}", value="score", only=_WHOLE))
