"""The `probe:` section."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from mechinterp_cli.config.base import MethodOptions
from mechinterp_cli.config.types import Flag, Number, Seed, unique
from mechinterp_cli.methods.probe.causal_options import CausalOptions
from mechinterp_cli.methods.probe.site_options import ProbeSites

ProbeName = Literal["logistic", "mass_mean", "mass_mean_whitened", "lda", "mlp", "ridge"]
CacheUse = Literal["auto", "always", "never"]
Baseline = Literal["majority", "bag", "embedding", "random_weights"]
Penalty = Annotated[Number, Field(gt=0)]
Draws = Annotated[int, Field(strict=True, ge=0)]
FoldCount = Annotated[int, Field(strict=True, ge=2)]

OF_NUMBERS = ("ridge",)
"""Probes of numbers; all others are of classes."""


class ProbeOptions(MethodOptions):
    """The `probe:` section: what can be read out of activations, beside what could be had without the model."""

    method_name: ClassVar[str] = "probe"
    sites: Annotated[tuple[ProbeSites, ...], Field(min_length=1)] = (ProbeSites(),)
    """Where: a probe for each layer, head and position of each block."""
    probes: Annotated[tuple[ProbeName, ...], Field(min_length=1), AfterValidator(unique)] | None = None
    """`logistic` (L2), `mass_mean` (with `_whitened`: through the inverse covariance), `lda`, `mlp` (one hidden layer);
    of numbers `ridge`. Default: logistic, or ridge where labels are numbers."""
    penalties: Annotated[tuple[Penalty, ...], Field(min_length=1), AfterValidator(unique)] = (
        *(1e-4, 1e-3, 1e-2, 0.1),
        *(1.0, 10.0, 100.0, 1000.0),
    )
    """scikit-learn's C of logistic probes, 1 / alpha of ridge: the smallest is the strongest. Chosen by inner folds."""
    folds: FoldCount = 5
    """Of scores. Texts of one group, such as a fact, never stand on both sides."""
    inner_folds: FoldCount = 3
    """Of each fold's training samples, for the choice of the penalty."""
    baselines: tuple[Baseline, ...] = ("majority", "bag", "embedding", "random_weights")
    """`majority` class (the mean, of numbers), `bag` of the tokens up to where the probe reads, the `embedding` of the
    tokens that it reads, and the same model with `random_weights`."""
    control: Flag = True
    """Where words are labelled: also probe labels drawn once per word type (Hewitt & Liang 2019); accuracy less theirs
    is the selectivity."""
    permutations: Draws = 199
    """How often labels are permuted for the p-value beside a score, and for what is scored by chance; 0: none."""
    learning_curve: Flag = False
    """Also score probes of fewer training samples, doubling from 8 up to all: the table `learning`."""
    predictions: Flag = True
    """Keep what every probe says of every held-out sample: the table `predictions`."""
    code_length: Flag = False
    """Online code length of the labels in bits (Voita & Titov 2020), by logistic probes."""
    causal: CausalOptions | None = None
    """Does the model use what a linear probe reads? Its directions are erased, steered along or swapped in the
    model, beside random ones, on prompts that they were not fitted on; measured by `metrics`. Null: not asked."""
    seed: Seed = 0
    """Of folds, control labels, permutations, the random weights, and the order in which code length takes samples."""
    cache: CacheUse = "auto"
    """Activations in files that later runs use again: `auto` where memory does not hold them, `always`, `never`."""
