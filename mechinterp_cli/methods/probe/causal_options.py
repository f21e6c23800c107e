"""The `causal:` part of the `probe:` section: does the model use what the probe reads?"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mechinterp_cli.config.base import BaseConfig
from mechinterp_cli.config.types import Count, Flag, Number, Seed, unique
from mechinterp_cli.methods.beside import FEWEST_DRAWS
from mechinterp_cli.methods.places import Positions
from mechinterp_cli.methods.probe.interventions import Intervention

Strengths = Annotated[tuple[Number, ...], Field(min_length=1)]
Stream = Literal["clean", "corrupt"]


class CausalOptions(BaseConfig):
    """Interventions on what a probe found, beside random directions, on prompts that no probe was fitted on."""

    interventions: Annotated[tuple[Intervention, ...], Field(min_length=1), AfterValidator(unique)] = ("erase", "steer")
    """`erase` puts the component along the probe's directions at its mean, `leace` erases what any linear probe reads,
    `steer` moves along the first direction, `swap` puts in the component of the paired prompt."""
    positions: Positions = "last"
    """Where, as in `patch`: `last`, `all` together, `each`, or a list of positions and spans."""
    strengths: Strengths = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)
    """How far to steer, in standard deviations of the projections of the activations that the probe was fitted on.
    Where a metric is about each prompt's own answer, look at groups of prompts: over both labels effects cancel."""
    random_strengths: Literal["all"] | Strengths | None = None
    """At which strengths random directions are steered along, too: `all`, or some of `strengths`; by default the one
    that is largest. Each costs as much as erasing does."""
    into: Annotated[tuple[Stream, ...], Field(min_length=1), AfterValidator(unique)] = ("clean",)
    """Into which prompt `swap` puts the other one's component: `clean`, `corrupt`, or both."""
    random: Count = FEWEST_DRAWS
    """Random subspaces of the same rank and removed variance, beside each intervention: 199 and more give a p-value and
    a verdict, fewer a band."""
    orthogonal: Flag = False
    """Whether random subspaces are orthogonal to the probe's. By default they share what little two random
    directions of this variance share; orthogonal ones may find too little variance elsewhere, and no verdict is given
    then."""
    margin: Annotated[Number, Field(gt=0)] = 0.1
    """The smallest difference from random directions that matters, in the unit of the first metric."""
    seed: Seed = 0
    """Of the random directions; all layers share the draws."""

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
