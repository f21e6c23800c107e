"""The `attribute:` section."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from mechinterp_cli.config.base import BaseConfig
from mechinterp_cli.config.types import Count, Flag, Index, Number, Seed, unique
from mechinterp_cli.methods.interchange_options import InterchangeOptions
from mechinterp_cli.methods.places import Positions, SiteBlock

EstimatorName = Literal["atp", "atp_star", "ig_inputs", "conductance", "relp"]
RuleName = Literal["norm", "activation", "gate", "attention"]
InputEstimator = Literal["gradient_x_input", "integrated_gradients", "occlusion", "rollout"]
Baseline = Literal["zero", "mean", "corrupt"]
LensKind = Literal["embed", "resid_pre", "resid_mid", "resid_post"]

STEPPED = ("ig_inputs", "conductance")
"""Estimators of several steps."""


class VerifyOptions(BaseConfig):
    """What is computed exactly, beside the estimates."""

    top: Index = 50
    """So many of the strongest estimates of each estimator."""
    random: Index = 100
    """So many nodes drawn at random, evenly over kinds of site and layers; the same for every estimator."""
    seed: Seed = 0
    """Of the draw."""
    threshold: Annotated[Number, Field(gt=0)] | None = None
    """The smallest effect of interest: normalised, or in the metric's own unit where nothing normalises. Null:
    `stats.smallest_effect`, where effects are normalised."""
    subsets: Index = 0
    """So many random subsets of the nodes that are not verified are patched together, each beside the sum of its
    estimates (the idea of the AtP* paper's diagnostic, 2403.00745): effects that estimates miss show there."""
    subset_size: Count = 8
    """How many nodes a subset has."""


class DirectOptions(BaseConfig):
    """Direct logit attribution: what every component adds to the logit difference, the final norm's scale frozen."""

    neurons: Flag = False
    """Split each MLP's part into its neurons'."""
    top: Count | Literal["all"] = 100
    """With `neurons`: so many of all layers' neurons have rows of their own, those whose parts are largest in size over
    prompts; each layer's others are summed. `all`: every neuron."""
    sources: Flag = False
    """Split each head's part by the token it attends to."""


class LensOptions(BaseConfig):
    """Logit lens: the model's own final norm and head on intermediate residual streams."""

    kinds: Annotated[tuple[LensKind, ...], Field(min_length=1), AfterValidator(unique)] = ("resid_post",)
    """Which streams."""
    layers: Literal["all"] | Annotated[tuple[Index, ...], Field(min_length=1), AfterValidator(unique)] = "all"
    """`all`, or a list; `embed` is there once, whatever they are."""
    positions: Positions = "last"
    """`each`, `all`, `last`, or positions and spans by name."""
    top: Count = 5
    """How many of the likeliest tokens are kept."""


class InputOptions(BaseConfig):
    """How much each token of the prompt matters."""

    estimators: Annotated[tuple[InputEstimator, ...], Field(min_length=1), AfterValidator(unique)] = (
        "gradient_x_input",
        "integrated_gradients",
        "occlusion",
    )
    """`gradient_x_input` ((embedding - baseline) times the gradient) and `integrated_gradients` on the embeddings,
    `occlusion` (exact: the token's embedding is replaced by the baseline), `rollout` of attention (2005.00928; knows
    nothing of the answer). Positive: the token raises the metric."""
    baseline: Baseline = "mean"
    """What an absent token is: an embedding of zeros, the mean embedding over the prompts' tokens, or the corrupted
    prompt's. Embeddings are what enters layer 0, with learned positions where the model has them."""
    steps: Count = 32
    """Of integrated gradients, midpoint rule."""


class AttributeOptions(InterchangeOptions):
    """The `attribute:` section. Each of `sites`, `direct`, `lens` and `inputs` is optional; one of them is there."""

    method_name: ClassVar[str] = "attribute"
    sites: tuple[SiteBlock, ...] = ()
    """Blocks of nodes whose patching effects are estimated, as in `patch`."""
    estimators: Annotated[tuple[EstimatorName, ...], Field(min_length=1), AfterValidator(unique)] = ("atp",)
    """How: `atp` (attribution patching), `atp_star`, `ig_inputs` and `conductance` (integrated gradients), `relp`."""
    steps: Count = 32
    """Of `ig_inputs` and `conductance`."""
    rules: Annotated[tuple[RuleName, ...], Field(min_length=1), AfterValidator(unique)] = ("norm", "activation", "gate")
    """Of `relp`: what is held fixed in the backward pass. `norm`: the norms' denominators; `activation`: the slopes of
    activation functions, f(x)/x; `gate`: products of two activations give half to each; `attention`: the attention
    probabilities, after which q, k, scores and pattern have no share."""
    verify: VerifyOptions | None = VerifyOptions()
    """Exact effects of the strongest estimates and of a random sample, by the engine; null: none."""
    direct: DirectOptions | None = None
    """Direct logit attribution."""
    lens: LensOptions | None = None
    """Logit lens."""
    inputs: InputOptions | None = None
    """Attribution to the prompt's tokens."""
