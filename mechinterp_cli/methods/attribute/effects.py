"""Effects of nodes over prompts, estimated or exact: means, normalised means, intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.beside import estimate
from mechinterp_cli.stats import Status
from mechinterp_cli.stats.observations import denominator_threshold

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scale:
    """One metric on the unedited streams.

    Args:
        base: [prompts], on the stream that is patched into.
        other: [prompts], on the one that is patched from, where effects are normalised by it.
        stats: Thresholds.
    """

    base: Floats
    other: Floats | None
    stats: StatsSection

    @property
    def denominators(self) -> Floats | None:
        """Other − base of each prompt."""
        return None if self.other is None else self.other - self.base

    @cached_property
    def threshold(self) -> float:
        """Denominators smaller than this are undefined."""
        stats = self.stats
        if self.other is None:
            return stats.denominator_absolute
        share, floor = stats.denominator_relative, stats.denominator_absolute
        return denominator_threshold(self.base, self.other, share=share, floor=floor)

    @property
    def usable_denominators(self) -> Floats | None:
        """Other − base of each prompt; NaN where it is too small to divide by."""
        below = self.denominators
        return None if below is None else np.where(np.abs(below) >= self.threshold, below, np.nan)


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of nodes on one metric, over some of the prompts.

    Args:
        effects: [nodes, prompts], 0 where a node is known to do nothing.
        status: [nodes, prompts] of `Status`: OK, TRIVIAL or ABSENT.
        scale: The metric on the streams.
        sizes: [nodes], of which nodes these are sizes: normalised, they are sizes still, whichever way the metric goes.
    """

    effects: Floats
    status: npt.NDArray[np.int8]
    scale: Scale
    sizes: npt.NDArray[np.bool_] | None = None

    @cached_property
    def present(self) -> npt.NDArray[np.bool_]:
        """[nodes, prompts]."""
        return np.asarray(self.status != Status.ABSENT)

    @cached_property
    def n(self) -> npt.NDArray[np.int64]:
        """Prompts of each node."""
        return np.asarray(self.present.sum(1))

    @cached_property
    def mean(self) -> Floats:
        """Mean effect of each node over its prompts, in the metric's unit; NaN without prompts."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(self.present, self.effects, 0.0).sum(1) / self.n)

    @cached_property
    def normalized(self) -> Floats | None:
        """Ratio of means: Σ effects / Σ (other − base) over the node's prompts; NaN where undefined."""
        totals = self._totals
        if totals is None:
            return None
        usable = np.abs(totals) >= self.scale.threshold * np.maximum(self.n, 1)
        found = np.where(self.present, self.effects, 0.0).sum(1) / np.where(usable, totals, np.nan)
        return np.asarray(np.where(self._turned, -found, found))

    @cached_property
    def _totals(self) -> Floats | None:
        """Σ (other − base) over each node's prompts."""
        below = self.scale.denominators
        return None if below is None else np.asarray(np.where(self.present, below, 0.0).sum(1))

    @cached_property
    def _turned(self) -> npt.NDArray[np.bool_]:
        """Sizes that a falling metric would make negative."""
        if self.sizes is None or self._totals is None:
            return np.zeros(len(self.effects), dtype=np.bool_)
        return np.asarray(self.sizes & (self._totals < 0))

    @cached_property
    def best(self) -> Floats:
        """Normalised where something normalises, else the mean."""
        return self.mean if self.normalized is None else self.normalized

    def strongest(self, count: int) -> npt.NDArray[np.bool_]:
        """Which nodes are among those with the largest `best`."""
        chosen = np.zeros(len(self.best), dtype=np.bool_)
        chosen[np.argsort(-np.nan_to_num(np.abs(self.best)), kind="stable")[:count]] = True
        return chosen

    def intervals(self, clusters: Sequence[str], wanted: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Ends of each node's interval of `best` over prompts; NaN where there is none.

        Args:
            clusters: Of the prompts; resampled together.
            wanted: Which nodes get one.
        """
        low, high = np.full(len(self.effects), np.nan), np.full(len(self.effects), np.nan)
        below, names = self.scale.denominators, np.asarray(clusters, dtype=object)
        for alike, prompts in self._alike():
            rows = alike[wanted[alike]]
            chosen = None if below is None else below[prompts]
            found = estimate(self.effects[np.ix_(rows, prompts)], chosen, names[prompts].tolist(), self.scale.stats)
            low[rows], high[rows] = found.low, found.high
        low, high = np.where(self._turned, -high, low), np.where(self._turned, -low, high)
        return np.where(np.isfinite(self.best), low, np.nan), np.where(np.isfinite(self.best), high, np.nan)

    def _alike(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Nodes that are there on the same prompts, and those prompts."""
        bits = np.packbits(self.present, axis=1)
        _, first, pattern = np.unique(bits, axis=0, return_index=True, return_inverse=True)
        for number, node in enumerate(first.tolist()):
            prompts = np.flatnonzero(self.present[node])
            if len(prompts):
                yield np.flatnonzero(pattern.reshape(-1) == number), prompts
