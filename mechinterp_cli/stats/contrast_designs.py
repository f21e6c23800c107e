"""How two groups of prompts are compared: by pairs within clusters, or cluster against cluster."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mechinterp_cli.stats.observations import Floats
from mechinterp_cli.stats.resampling import Integers, Units, choose_units

Booleans = npt.NDArray[np.bool_]

LEAST_SHARED = 0.5
"""Share of each group's prompts that clusters of both groups must hold for a paired contrast."""


@dataclass(frozen=True)
class Design:
    """The prompts that a contrast uses, and which of them hang together."""

    prompts: Integers
    """`[used]`: indices of the prompts."""
    first: Booleans
    """`[used]`: those of the first group."""
    cluster: Integers
    """`[used]`, counted from 0."""
    paired: bool
    units: Units
    """What is resampled for the interval."""
    warnings: tuple[str, ...]

    @property
    def by_cluster(self) -> bool:
        """Whole clusters are paired: one difference each."""
        return self.paired and not self.units.conditional

    @property
    def sides(self) -> tuple[Booleans, Booleans]:
        """Prompts of the first group and of the second."""
        return self.first, ~self.first

    @property
    def clusters(self) -> tuple[int, int]:
        """Clusters of the first group and of the second."""
        first, second = (len(np.unique(self.cluster[side])) for side in self.sides)
        return first, second

    @property
    def weights(self) -> Floats:
        """`[used]`: of each prompt in its group's mean, which is the mean over clusters of their means."""
        weights = np.zeros(len(self.prompts))
        for side, clusters in zip(self.sides, self.clusters, strict=True):
            weights[side] = 1 / (clusters * np.bincount(self.cluster[side])[self.cluster[side]])
        return weights

    def cells(self) -> Iterator[Integers]:
        """Prompts of one cluster and group, cluster by cluster, the first group before the second."""
        for i in range(int(self.cluster.max()) + 1):
            for side in self.sides:
                yield np.flatnonzero(side & (self.cluster == i))


def choose_design(
    groups: npt.NDArray[np.object_], clusters: npt.NDArray[np.generic], names: tuple[str, str], min_clusters: int
) -> Design:
    """Pair by cluster where clusters of both groups hold at least half of each group's prompts.

    Args:
        groups: `[prompts]`
        clusters: `[prompts]`
        names: The first group and the second; each has at least two prompts.
        min_clusters: Fewer clusters than this are not resampled as wholes, where their prompts can be.
    """
    prompts = np.concatenate([np.flatnonzero(groups == name) for name in names])
    first = np.asarray(groups[prompts] == names[0], dtype=np.bool_)
    cluster = np.unique(clusters[prompts], return_inverse=True)[1].astype(np.int64)
    both = np.intersect1d(cluster[first], cluster[~first])
    shared = np.isin(cluster, both)
    if min(shared[first].mean(), shared[~first].mean()) >= LEAST_SHARED:
        inner = np.unique(cluster[shared], return_inverse=True)[1].astype(np.int64)
        paired = _paired(prompts[shared], first[shared], inner, int((~shared).sum()), min_clusters)
        if paired.units.count > 1:
            return paired
    return _unpaired(prompts, first, cluster, names, len(both), min_clusters)


def _paired(prompts: Integers, first: Booleans, cluster: Integers, left_out: int, min_clusters: int) -> Design:
    count = int(cluster.max()) + 1
    units = Units(cluster, (np.arange(count),), conditional=False, clusters=count)
    design = Design(prompts, first, cluster, True, units, ())
    cells = tuple(design.cells())
    if count < min_clusters and min(map(len, cells)) > 1:
        units = Units(np.arange(len(prompts)), cells, conditional=True, clusters=count)
    return Design(prompts, first, cluster, True, units, tuple(_paired_warnings(units, left_out, min_clusters)))


def _paired_warnings(units: Units, left_out: int, min_clusters: int) -> Iterator[str]:
    if left_out:
        said = "prompt is left out: its cluster has" if left_out == 1 else "prompts are left out: their clusters have"
        yield f"{left_out} {said} no prompt of the other group"
    if units.clusters < min_clusters:
        rough = "intervals and p-values are conditional on them" if units.conditional else "intervals are rough"
        has = "cluster has" if units.clusters == 1 else "clusters have"
        yield f"{units.clusters} {has} prompts of both groups, fewer than {min_clusters}; {rough}"


def _unpaired(
    prompts: Integers, first: Booleans, cluster: Integers, names: tuple[str, str], shared: int, min_clusters: int
) -> Design:
    parts = [choose_units(cluster[side], min_clusters=min_clusters) for side in (first, ~first)]
    warnings = []
    if shared:
        has = "cluster has" if shared == 1 else "clusters have"
        warnings.append(f"{shared} {has} prompts of both groups, too few to pair by; taken as independent")
    for name, part in zip(names, parts, strict=True):
        if part.clusters < min_clusters and part.clusters < len(part.of_prompt):
            has = "cluster is" if part.clusters == 1 else "clusters are"
            rough = f"{part.clusters} {has} fewer than {min_clusters}; intervals are conditional on them"
            warnings.append(f"group {name}: {rough}")
    return Design(prompts, first, cluster, False, _joined(*parts), tuple(warnings))


def _joined(first: Units, second: Units) -> Units:
    return Units(
        np.concatenate([first.of_prompt, second.of_prompt + first.count]),
        (*first.strata, *(stratum + first.count for stratum in second.strata)),
        conditional=first.conditional or second.conditional,
        clusters=first.clusters + second.clusters,
    )
