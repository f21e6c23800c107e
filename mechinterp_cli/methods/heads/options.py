"""The `heads:` section, and its tables."""

from typing import Annotated, ClassVar, Literal, get_args

import pyarrow as pa
from pydantic import AfterValidator, Field

from mechinterp_cli.config.base import BaseConfig, MethodOptions
from mechinterp_cli.config.types import Count, Index, Number, Seed, unique
from mechinterp_cli.methods.heads.attention import AttentionScoreName
from mechinterp_cli.methods.heads.weights import WeightScoreName
from mechinterp_cli.runs.schema import Standing, column, register_columns, register_standing

Ablation = Literal["zero", "mean"]
ScoreName = Literal[AttentionScoreName, WeightScoreName, Literal["direct_effect"]]
ATTENTION: tuple[str, ...] = get_args(AttentionScoreName)
COMPOSITIONS = ("q_composition", "k_composition", "v_composition")
METRICS = ("repeated_loss", "loss_gap", "first_loss")
"""Mean cross-entropy, nats per token, of predictions that repeat an earlier pair of tokens (`repeated_loss`) and of
tokens that have not occurred (`first_loss`); `loss_gap` is the first minus the second, so in-context learning makes it
negative."""

Scores = Annotated[tuple[ScoreName, ...], Field(min_length=1), AfterValidator(unique)]


class CausalOptions(BaseConfig):
    """Proof by intervention: are the heads with the highest scores needed for what the model gains from repetition?"""

    scores: Scores = ("induction",)
    """The heads with the highest of each of these scores are ablated."""
    k: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(unique)] = (1, 2, 4, 8)
    """So many heads at once; each of as many as the largest is ablated alone, too."""
    values: Annotated[tuple[Ablation, ...], Field(min_length=1), AfterValidator(unique)] = ("zero", "mean")
    """What stands in place of a head's output: zero, or its mean over all tokens of the prompts that were scored. Heads
    are ablated alone with the first of these."""
    random: Count = 20
    """Sets of as many other heads of the same layers, drawn at random: 20 give a band, 199 and more a verdict."""
    prompts: Count = 8
    """So many of the task's prompts, the last ones, are kept for this and left out of the scores."""
    margin: Annotated[Number, Field(gt=0)] = 0.05
    """The smallest change of a loss that matters, in nats."""
    checkpoints: Literal["last", "all"] = "last"
    """With several checkpoints: which of them are ablated."""


class HeadsOptions(MethodOptions):
    """The `heads:` section: which heads look back, copy, and complete repeated patterns."""

    method_name: ClassVar[str] = "heads"
    own_metrics: ClassVar[tuple[str, ...]] = METRICS
    scores: Scores | None = None
    """What is measured of every head; null: all scores of attention that the task's prompts allow, and copying."""
    layers: Literal["all"] | Annotated[tuple[Index, ...], Field(min_length=1), AfterValidator(unique)] = "all"
    """Whose heads; `all` leaves out layers that have no attention pattern (another kind of layer), and says so."""
    tokens: Annotated[int, Field(strict=True, ge=2)] = 1000
    """Ordinary tokens, a seeded sample, that stand for the vocabulary in copying and its eigenvalues."""
    show: Index = 4
    """So many of the strongest heads of each score of attention, and of direct_effect, are drawn, on the shortest
    prompt; 0 draws none."""
    seed: Seed = 0
    """Of the sample of tokens and of the random heads."""
    causal: CausalOptions | None = None
    """Ablate the strongest heads, beside random ones."""


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
