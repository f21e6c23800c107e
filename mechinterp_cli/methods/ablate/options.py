"""The `ablate:` section, and its tables."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny

from mechinterp_cli.config.base import BaseConfig, MethodOptions, TaskOptions
from mechinterp_cli.config.schema import choose_task
from mechinterp_cli.config.types import Count, Index, Number, Seed, Text, unique
from mechinterp_cli.methods.places import LayerWindow, Positions, Spot, Units

UnitKind = Literal["head", "kv_head", "neuron", "attention", "mlp", "layer", "direction", "edge"]
ValueName = Literal["zero", "mean", "resample", "noise", "mean_of_prompt", "project", "optimal"]
Design = Literal["single", "cumulative", "set", "keep", "pairs"]
Stream = Literal["clean", "corrupt"]
Spots = Literal["all"] | Annotated[tuple[Spot, ...], Field(min_length=1)]


class UnitBlock(BaseConfig):
    """A family of units: what is ablated, one at a time or in sets."""

    kind: UnitKind
    """`head` (a query head's output z), `kv_head` (all query heads that share a key/value head), `neuron`, `attention`
    and `mlp` (what the block adds to the residual stream), `layer` (both), `direction` (of the residual stream, from a
    file), `edge` (attention from query tokens to key tokens)."""
    layers: Literal["all"] | Annotated[tuple[Index, ...], Field(min_length=1)] | LayerWindow = "all"
    """`all` (one unit per layer), a list (one for each), or `{window: 10}` (several layers as one unit)."""
    heads: Units | None = None
    """For head, kv_head and edge: `each`, `all` together, or a list whose inner lists are ablated together.
    Default: each; for edge: all together."""
    neurons: Units | None = None
    """For neuron: as `heads`. Default: all together."""
    positions: Positions = "all"
    """`all` together, `each`, `last`, or a list of positions and span names; for edge: the query tokens."""
    keys: Spots | None = None
    """For edge: the key tokens (positions or spans) that are no longer seen."""
    file: Text | None = None
    """For direction: a .safetensors file of tensors [directions, d_model] named `SITE.LAYER` (`resid_post.12`), such as
    `directions.safetensors` of a `probe` run."""


class MeanOptions(BaseConfig):
    """Which mean stands in place of an activation."""

    per: Literal["position", "all"] = "all"
    """`position`: the mean at each position, of prompts of one template and length; `all`: over all positions."""
    stream: Stream = "clean"
    """Of which prompts: the task's own or their corrupted twins."""
    by: Literal["template", "all"] = "all"
    """One mean for each template, or one for all; with `per: position` always by template."""
    reference: Annotated[SerializeAsAny[TaskOptions], BeforeValidator(choose_task)] | None = None
    """Another task whose prompts the mean is taken over; null: the experiment's own."""


class ResampleOptions(BaseConfig):
    """Activations of other prompts."""

    draws: Count = 5
    """Other prompts that are tried for each prompt; the spread over them is in the tables."""
    seed: Seed = 0
    """Of the choice."""
    stream: Stream = "clean"
    """From which prompts."""


class NoiseOptions(BaseConfig):
    """Gaussian noise that is added."""

    scale: Annotated[Number, Field(gt=0)] = 1.0
    """In standard deviations of each feature over the data set."""
    draws: Count = 5
    """Draws for each prompt."""
    seed: Seed = 0
    """Of the noise."""


class OptimalOptions(BaseConfig):
    """The constant that minimises the loss of the ablated model (Li & Janson, 2409.09951), by gradient descent."""

    steps: Count = 100
    """Steps of Adam."""
    rate: Annotated[Number, Field(gt=0)] = 0.1
    """Its learning rate, in standard deviations of the activation."""
    share: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.5
    """Share of the prompts that it is fitted on; the others are measured, and only they."""
    seed: Seed = 0
    """Of the choice of these prompts."""


class RankingRun(BaseConfig):
    """A ranking from the table of an earlier run."""

    run: Text
    """The run directory."""
    score: Text | None = None
    """Of a `heads` run: which score."""
    metric: Text | None = None
    """Of a `patch` or `ablate` run: which metric; null: its first."""
    column: Text | None = None
    """Null: `value` of scores, else `normalized` where there is one, else `effect`."""
    absolute: bool = False
    """Rank by magnitude."""


class CumulativeOptions(BaseConfig):
    """Remove the top k of a ranking, for k on a grid, beside random rankings."""

    ranking: RankingRun | Annotated[tuple[Text, ...], Field(min_length=1)]
    """Names of units, most important first, or a table of an earlier run."""
    k: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(unique)] = (1, 2, 4, 8, 16)
    """How many are removed."""
    random: Count = 20
    """Random rankings, of as many units of the same layers: 20 give a band, 199 and more a verdict."""
    seed: Seed = 0
    """Of the random rankings."""


class AblateOptions(MethodOptions):
    """The `ablate:` section."""

    method_name: ClassVar[str] = "ablate"

    @classmethod
    def default_metrics(cls, task: type[TaskOptions] | None) -> tuple[str, ...]:
        """Of a task's answers, or of whole texts where nothing is asked."""
        return ("logit_diff",) if getattr(task, "has_answers", True) else ("loss", "kl", "top1")

    units: Annotated[tuple[UnitBlock, ...], Field(min_length=1)]
    """What can be taken away."""
    values: Annotated[tuple[ValueName, ...], Field(min_length=1), AfterValidator(unique)] = ("mean",)
    """What stands in its place; each in turn."""
    mean: MeanOptions = MeanOptions()
    """For `mean`."""
    resample: ResampleOptions = ResampleOptions()
    """For `resample`."""
    noise: NoiseOptions = NoiseOptions()
    """For `noise`."""
    optimal: OptimalOptions = OptimalOptions()
    """For `optimal`."""
    design: Design = "single"
    """`single`: each unit alone; `cumulative`: the top k of a ranking; `set`: each named set; `keep`: everything but
    each named set; `pairs`: two units alone and together."""
    cumulative: CumulativeOptions | None = None
    """For `cumulative`."""
    sets: dict[Text, Annotated[tuple[Text, ...], Field(min_length=1)]] | None = None
    """For `set` and `keep`: name to names of units (`5.1` is head 1 of layer 5; `kv5.0`, `neuron5.17`, `attention5`,
    `mlp5`, `layer5`)."""
    pairs: tuple[tuple[Text, Text], ...] | None = None
    """For `pairs`: pairs of units' names."""
    margin: Annotated[Number, Field(gt=0)] = 0.05
    """The smallest effect that matters, in the metric's own unit, where nothing normalises."""
    generate: Annotated[int, Field(strict=True, ge=0, le=200)] = 0
    """Show greedy continuations of so many tokens with and without each ablation, for the first prompts."""
    generate_prompts: Count = 3
    """For how many prompts."""
