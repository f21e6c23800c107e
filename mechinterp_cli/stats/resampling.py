"""Which prompts are drawn together: clusters where there are enough of them, prompts within clusters where not."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mechinterp_cli.stats.observations import Floats

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """What is resampled or sign-flipped as a whole."""

    of_prompt: Integers
    """`[prompts]`: index of each prompt's unit."""
    strata: tuple[Integers, ...]
    """Units that are drawn among each other; one stratum unless conditional."""
    conditional: bool
    """Prompts are drawn within clusters: the interval is conditional on these templates."""
    clusters: int

    @property
    def count(self) -> int:
        """Number of units."""
        return sum(len(stratum) for stratum in self.strata)

    def sums(self, values: Floats) -> Floats:
        """`[trials, prompts]` to `[trials, units]`."""
        membership = np.zeros((len(self.of_prompt), self.count))
        membership[np.arange(len(self.of_prompt)), self.of_prompt] = 1.0
        return values @ membership


def choose_units(clusters: npt.NDArray[np.generic], *, min_clusters: int = 10) -> Units:
    """Clusters as units, or prompts within clusters where there are fewer than `min_clusters`.

    Clusters of one prompt cannot be resampled within: they are pooled into one stratum, and a lone one joins the
    smallest other cluster. Where every prompt is its own cluster, prompts are simply drawn.

    Args:
        clusters: `[prompts]`, a label each.
        min_clusters: Fewer than this are too few to be drawn themselves.
    """
    names, of_prompt = np.unique(clusters, return_inverse=True)
    of_prompt = of_prompt.astype(np.int64)
    if len(names) >= min_clusters or len(names) == len(clusters):
        return Units(of_prompt, (np.arange(len(names)),), conditional=False, clusters=len(names))
    strata = _strata([np.flatnonzero(of_prompt == i) for i in range(len(names))])
    return Units(np.arange(len(clusters)), strata, conditional=True, clusters=len(names))


def _strata(members: list[Integers]) -> tuple[Integers, ...]:
    single = [units for units in members if len(units) == 1]
    several = sorted((units for units in members if len(units) > 1), key=len)
    if len(single) > 1:
        several.append(np.concatenate(single))
    elif single:
        several[0] = np.concatenate([several[0], single[0]])
    return tuple(several)


def draw_weights(units: Units, *, draws: int, seed: int) -> Floats:
    """How often each unit is in each bootstrap draw: `[draws, units]`, stratum sizes kept."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((draws, units.count))
    for stratum in units.strata:
        size = len(stratum)
        weights[:, stratum] = rng.multinomial(size, np.full(size, 1 / size), size=draws)
    return weights
