"""The `causal:` part of the `probe:` section: does the model use what the probe reads?"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mechinterp_cli.config.base import BaseConfig
from mechinterp_cli.config.schema import FEWEST_DRAWS
from mechinterp_cli.config.types import Count, Flag, Fraction, Index, Number, Seed, unique
from mechinterp_cli.methods.places import Positions

Strengths = Annotated[tuple[Number, ...], Field(min_length=1)]
Intervention = Literal["erase", "leace", "steer", "swap"]
Stream = Literal["clean", "corrupt"]
LinearProbe = Literal["logistic", "mass_mean", "mass_mean_whitened", "lda", "ridge"]
"""Probes that have directions."""


class CausalOptions(BaseConfig):
    """Interventions on what a probe found, beside random directions, on prompts that no direction was fitted on."""

    probe: LinearProbe | None = None
    """Whose directions, of the section's `probes`; null: the first linear one's."""
    hold_out: Fraction = 0.5
    """Share of the clusters of prompts (facts, nouns, groups) that no direction is fitted on: its prompts are measured.
    Scores are of cross-validation over all prompts, as without `causal`."""
    measure: Count = 16
    """How many of these prompts are measured at most, of as many clusters as there are; cost grows with it."""
    interventions: Annotated[tuple[Intervention, ...], Field(min_length=1), AfterValidator(unique)] = ("erase", "steer")
    """`erase` puts the component along the probe's directions at its mean, `leace` erases what any linear probe reads,
    `steer` moves along the first direction, `swap` puts in the component of the paired prompt."""
    positions: Positions | None = None
    """Where, as in `patch`: `last`, `all` together, `each`, or a list of positions and spans; null: where the probe
    reads, and of labelled words at the last token."""
    strengths: Strengths = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)
    """How far to steer, in standard deviations of the projections of the activations that the probe was fitted on.
    Where a metric is about each prompt's own answer, look at groups of prompts: over both labels effects cancel."""
    random_strengths: Literal["all"] | tuple[Number, ...] | None = None
    """At which strengths random directions are steered along, too: `all`, some of `strengths`, or none (`[]`: steering
    gets no verdict then); by default the one that is largest. Each costs as much as erasing does."""
    into: Annotated[tuple[Stream, ...], Field(min_length=1), AfterValidator(unique)] = ("clean",)
    """Into which prompt `swap` puts the other one's component: `clean`, `corrupt`, or both."""
    random: Count = FEWEST_DRAWS
    """Random subspaces of the same rank and removed variance, beside each intervention: 199 and more give a p-value and
    a verdict, fewer a band."""
    orthogonal: Flag = False
    """Whether random subspaces are orthogonal to the probe's. By default they share what little two random
    directions of this variance share; orthogonal ones may find too little variance elsewhere, and no verdict is given
    then."""
    controls: Index = 3
    """Directions of control labels beside the probe's, fitted in the same way: labels exchanged between texts, within
    groups that have several; of labelled words one drawn for each word type. 0: none."""
    downstream: Literal["all"] | tuple[Index, ...] | None = None
    """Layers under whose erasure the probes of all later layers are read, on the prompts held out: `all`, a list
    (empty: none); null: five layers, evenly spread."""
    margin: Annotated[Number, Field(gt=0)] = 0.1
    """The smallest difference from random directions that matters, in the unit of the first metric."""
    score_margin: Annotated[Number, Field(gt=0)] = 0.05
    """The smallest difference of a score from its best baseline that matters, for "readable"."""
    seed: Seed = 0
    """Of the random directions (all layers share the draws), of control labels, and of the prompts held out."""

    @model_validator(mode="after")
    def _check_strengths(self) -> "CausalOptions":
        unknown = set(self.steered_at_random) - set(self.strengths)
        if unknown:
            raise ValueError(f"random_strengths: {sorted(unknown)} are not among strengths {list(self.strengths)}")
        return self

    @property
    def steered_at_random(self) -> tuple[float, ...]:
        """The strengths that have random directions beside them; 0 changes nothing and needs none."""
        if self.random_strengths is None:
            return (max(self.strengths, key=lambda strength: (abs(strength), strength)),)
        chosen = self.strengths if self.random_strengths == "all" else self.random_strengths
        return tuple(strength for strength in chosen if strength)
