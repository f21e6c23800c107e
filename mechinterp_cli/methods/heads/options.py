"""The `heads:` section."""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field

from mechinterp_cli.config.base import BaseConfig, MethodOptions
from mechinterp_cli.config.types import Count, Index, Number, Seed, unique

Ablation = Literal["zero", "mean"]
AttentionScoreName = Literal["previous_token", "duplicate_token", "induction", "prefix_matching", "first_token"]
WeightScoreName = Literal[
    "copying", "copying_eigenvalues", "successor", "q_composition", "k_composition", "v_composition"
]
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
