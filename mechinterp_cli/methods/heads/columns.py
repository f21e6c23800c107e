"""The tables of `heads`, beside the common ones."""

import pyarrow as pa

from mechinterp_cli.runs.schema import Standing, column, register_columns, register_standing

_HEAD = [column("layer", pa.int32(), required=True), column("head", pa.int32(), required=True)]
_SCORE = [column("score", pa.string(), required=True), *_HEAD]
_FROM = [column("from_layer", pa.int32()), column("from_head", pa.int32())]
_NUMBERS = {name: column(name, pa.float64()) for name in ("value", "chance")}
_ENDS = [column("ci_low", pa.float64()), column("ci_high", pa.float64())]
_DESIGN = [
    column("score", pa.string()),
    column("ablation", pa.string()),
    column("draw", pa.int32()),
    column("kv_head", pa.int32()),
    column("design", pa.string()),
    column("k", pa.int32()),
    column("set", pa.string()),
]


def _register() -> None:
    # One row per head x score: the mean over the scored prompts.
    register_columns(
        "heads",
        "scores",
        [*_SCORE, column("kv_head", pa.int32()), *_FROM, _NUMBERS["value"], *_ENDS, column("ci_method", pa.string()),
         column("n", pa.int32()), column("clusters", pa.int32()), _NUMBERS["chance"],
         column("status", pa.string(), required=True)],
        keys=("score", "layer", "head"),
    )  # fmt: skip
    # One row per head x score x prompt.
    register_columns(
        "heads",
        "sequences",
        [*_SCORE, column("prompt", pa.int32(), required=True), column("cluster", pa.string()),
         column("group", pa.string()), _NUMBERS["value"]],
        keys=("score", "layer", "head", "prompt"),
    )  # fmt: skip
    # One row per pair of heads x composition score.
    register_columns(
        "heads",
        "compositions",
        [*_SCORE, *_FROM, _NUMBERS["value"], _NUMBERS["chance"]],
        keys=("score", "layer", "head", "from_layer", "from_head"),
    )
    # The attention of the strongest heads on one prompt.
    register_columns(
        "heads",
        "patterns",
        [*_SCORE, *(column(name, pa.int32(), required=True) for name in ("prompt", "query", "key")),
         _NUMBERS["value"]],
        keys=("score", "layer", "head", "prompt", "query", "key"),
    )  # fmt: skip
    numbers = ("baseline", "effect", "ci_low", "ci_high", "random_effect", "random_low", "random_high")
    differences = ("difference", "difference_low", "difference_high", "p")
    # One row per score x ablation x k x metric: the strongest heads beside random ones.
    register_columns(
        "heads",
        "causal",
        [column("score", pa.string(), required=True), column("ablation", pa.string(), required=True),
         column("k", pa.int32(), required=True), column("heads", pa.string(), required=True),
         column("metric", pa.string(), required=True), *(column(name, pa.float64()) for name in numbers),
         column("n", pa.int32(), required=True), column("draws", pa.int32(), required=True),
         *(column(name, pa.float64()) for name in differences), column("verdict", pa.string())],
        keys=("score", "ablation", "k", "metric"),
    )  # fmt: skip
    register_columns("heads", "trials", [column("draw", pa.int32())])
    register_columns("heads", "results", [item for item in _DESIGN if item.name != "draw"])
    register_columns("heads", "summary", _DESIGN)
    register_standing("heads", Standing("scores", metric="score", site="head", label="head {layer}.{head}"))


_register()
