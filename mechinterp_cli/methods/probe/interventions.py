"""What is done to a subspace inside the model: erased, moved along, or swapped between two prompts.

With B the orthonormal rows of a subspace and μ the mean of the activations that it was fitted on:

- *erase*: x → x − BᵀB (x − μ), the component is put at its mean (engine: `project`, then `add` of BᵀBμ);
- *leace*: x → μ + P (x − μ) with the oblique P of LEACE (Belrose et al. 2306.03819; engine: `affine`);
- *steer*: x → x + strength · spread · u, u of length 1, spread the standard deviation of u·x over the activations
  that the probe was fitted on, so strengths are in units of the natural spread;
- *swap*: x → x + BᵀB (x' − x), x' the same place of the paired prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine.edits import Edit, Op, Site
from mechinterp_cli.methods.probe.causal_options import Intervention
from mechinterp_cli.methods.probe.random_directions import Cloud, RandomSubspaces, matched_subspaces

PROBE = "probe"
"""What the probe's own subspace is called in tables, beside `random` and the names of control labels."""
ORTHONORMAL = 1e-4
"""How far from the identity B Bᵀ may be."""

Positions = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Subspace:
    """A subspace of a site's activations.

    Args:
        name: `probe`, or what its labels are called.
        basis: Orthonormal rows [rank, features], float32.
        centre: The mean's component in it, [features].
        toward: The direction that is steered along, of length 1, in it [features].
        spread: Standard deviation of the fitting activations along `toward`.
        removed: Share of their variance that erasing it removes.
    """

    name: str
    basis: Float[Tensor, "rank features"]
    centre: Float[Tensor, " features"]
    toward: Float[Tensor, " features"]
    spread: float
    removed: float

    @classmethod
    def of(
        cls, name: str, basis: Float[Tensor, "rank features"], cloud: Cloud, toward: Tensor | None = None
    ) -> "Subspace":
        """A subspace beside the activations that it was fitted on.

        Args:
            name: Its name.
            basis: Orthonormal rows.
            cloud: Mean and covariance of the activations.
            toward: The direction that is steered along; the first row where None.

        Raises:
            ValueError: The rows are not orthonormal, or not of as many features.
        """
        rows = basis.double()
        if rows.ndim != 2 or rows.shape[1] != len(cloud.mean):
            raise ValueError(f"basis {tuple(basis.shape)} is not of {len(cloud.mean)} features")
        if float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max()) > ORTHONORMAL:
            raise ValueError("the rows of the basis are not orthonormal")
        along = rows[0] if toward is None else torch.nn.functional.normalize(toward.double(), dim=0)
        return cls(
            name=name,
            basis=rows.float().contiguous(),
            centre=_within(cloud.mean, rows).float(),
            toward=along.float(),
            spread=cloud.variance(along[None]) ** 0.5,
            removed=cloud.removed(rows),
        )

    @property
    def rank(self) -> int:
        """How many dimensions it has."""
        return len(self.basis)


@dataclass(frozen=True, eq=False)
class AffineMap:
    """x → centre + matrix (x − centre): LEACE, or any other erasure that is no orthogonal projection.

    Args:
        matrix: P, [features, features].
        centre: The mean of the activations, [features].
    """

    matrix: Float[Tensor, "features features"]
    centre: Float[Tensor, " features"]

    @cached_property
    def offset(self) -> Float[Tensor, " features"]:
        """What is added in x → P x + b."""
        wide = self.centre.double()
        return (wide - self.matrix.double() @ wide).float()

    @cached_property
    def rank(self) -> int:
        """Dimensions of what is taken away."""
        change = torch.eye(len(self.matrix), dtype=torch.float64) - self.matrix.double()
        sizes = torch.linalg.svdvals(change)
        return max(1, int((sizes > 1e-4 * sizes[0].clamp(min=1e-9)).sum()))


@dataclass(frozen=True)
class Change:
    """One edit of a trial, but for its positions."""

    op: Op
    values: Tensor
    offset: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ProbedSite:
    """A place in the model with everything that is tried there.

    Args:
        kind: Of site.
        layer: Its layer.
        unit: The head, or None for the whole activation.
        mean: Of the activations that the probe was fitted on.
        probe: The probe's subspace.
        controls: Subspaces of control labels.
        leace: LEACE's map for the probe's labels.
        leace_removed: Share of the variance that it moves.
        random: `erase` (for `swap` too), `leace`, `steer`: the random subspaces that stand beside each.
        name: Which probe it is; probes of one name over layers are judged together.
        heads: How many heads the whole activation has, where it has heads.
    """

    kind: str
    layer: int
    unit: int | None
    mean: Float[Tensor, " features"]
    probe: Subspace
    controls: tuple[Subspace, ...] = ()
    leace: AffineMap | None = None
    leace_removed: float = 0.0
    random: Mapping[str, RandomSubspaces] = field(default_factory=dict)
    name: str = PROBE
    heads: int | None = None

    @property
    def site(self) -> Site:
        """For the engine."""
        return Site(self.kind, self.layer)

    @property
    def units(self) -> tuple[int, ...] | None:
        """For the engine."""
        return None if self.unit is None else (self.unit,)

    def subspace(self, name: str) -> Subspace:
        """The probe's, or that of some control labels."""
        return next(own for own in (self.probe, *self.controls) if own.name == name)

    def random_for(self, intervention: Intervention) -> RandomSubspaces:
        """The random subspaces beside an intervention."""
        return self.random["erase" if intervention == "swap" else intervention]

    def rank(self, intervention: Intervention, name: str) -> int:
        """Dimensions of what an intervention touches."""
        if intervention == "leace" and self.leace is not None:
            return self.leace.rank
        return 1 if intervention == "steer" else self.subspace(name).rank

    def removed(self, intervention: Intervention, name: str) -> float:
        """Share of the variance of the fitting activations that lies in what an intervention touches."""
        return self.leace_removed if intervention == "leace" else self.subspace(name).removed

    def edits(self, changes: Sequence[Change], positions: Positions, source: str | None = None) -> tuple[Edit, ...]:
        """Changes as edits at some positions of a bucket's prompts.

        Args:
            changes: In their order.
            positions: Of every prompt.
            source: The stream that `swap` reads.
        """
        return tuple(self._edit(change, positions, source) for change in changes)

    def _edit(self, change: Change, positions: Positions, source: str | None) -> Edit:
        reads = source if change.op == "swap" else None
        return Edit(
            self.site, change.op, positions, self.units, source=reads, values=change.values, offset=change.offset
        )


def probed_site(
    kind: str,
    layer: int,
    basis: Float[Tensor, "rank features"],
    activations: Float[Tensor, "samples features"],
    *,
    draws: int,
    seed: int = 0,
    unit: int | None = None,
    toward: Tensor | None = None,
    controls: Mapping[str, Float[Tensor, "rank features"]] | None = None,
    leace: AffineMap | None = None,
    orthogonal: bool = False,
    name: str = PROBE,
    heads: int | None = None,
) -> ProbedSite:
    """A probed site with its random subspaces, from the activations that the probe was fitted on.

    Args:
        kind: Of site.
        layer: Its layer.
        basis: The probe's subspace, orthonormal rows.
        activations: Those that it was fitted on.
        draws: Random subspaces beside each intervention.
        seed: Of them; the same for all layers, so that draw i of one belongs to draw i of the others.
        unit: The head, where the site has heads.
        toward: The direction that is steered along; the basis' first row where None.
        controls: Subspaces of control labels, by name.
        leace: LEACE's map.
        orthogonal: Whether random subspaces are orthogonal to the probe's. They then cannot share what it has of the
            strongest directions, and may not find as much variance elsewhere.
        name: Which probe it is.
        heads: How many heads lie side by side, where all of them are one activation.

    Raises:
        ValueError: Rows that are not orthonormal, or of another number of features.
    """
    cloud = Cloud.of(activations)
    probe = Subspace.of(PROBE, basis, cloud, toward)
    own = tuple(Subspace.of(name, rows, cloud) for name, rows in (controls or {}).items())
    apart = probe.basis if orthogonal else None

    def drawn(wanted: float, rank: int) -> RandomSubspaces:
        return matched_subspaces(cloud, wanted, rank, draws=draws, seed=seed, apart_from=apart)

    random = {"erase": drawn(probe.removed, probe.rank)}
    random["steer"] = random["erase"] if probe.rank == 1 else drawn(cloud.removed(probe.toward[None]), 1)
    moved = 0.0
    if leace is not None:
        moved = cloud.moved(leace.matrix)
        random["leace"] = drawn(moved, leace.rank)
    return ProbedSite(kind, layer, unit, cloud.mean.float(), probe, own, leace, moved, random, name, heads)


def blank_site(
    kind: str,
    layer: int,
    features: int,
    *,
    rank: int = 1,
    draws: int,
    unit: int | None = None,
    controls: int = 0,
    heads: int | None = None,
) -> ProbedSite:
    """A site with as many directions as there will be, none of them fitted: what a plan is made of.

    Args:
        kind: Of site.
        layer: Its layer.
        features: Of the activation, or of the head.
        rank: Of the probe's subspace and those of control labels.
        draws: Random subspaces.
        unit: The head, where the site has heads.
        controls: How many control labels there are.
        heads: How many heads lie side by side, where all of them are one activation.
    """
    basis, nothing = torch.eye(rank, features), torch.zeros(features)
    probe = Subspace(PROBE, basis, nothing, basis[0], 1.0, 0.0)
    others = tuple(Subspace(f"control {i}", basis, nothing, basis[0], 1.0, 0.0) for i in range(controls))
    leace = AffineMap(torch.eye(features), nothing)
    random = RandomSubspaces(basis.expand(draws, -1, -1), torch.zeros(draws, dtype=torch.float64), 0.0)
    alike = dict.fromkeys(("erase", "leace", "steer"), random)
    return ProbedSite(kind, layer, unit, nothing, probe, others, leace, 0.0, alike, heads=heads)


class Changes:
    """The changes of each intervention; the same objects each time, so that trials that share them are edited together.

    Args:
        site: Where.
    """

    def __init__(self, site: ProbedSite) -> None:
        self.site = site
        self._made: dict[tuple[str, float, str, int | None], tuple[Change, ...]] = {}

    def of(
        self, intervention: Intervention, name: str, *, draw: int | None = None, strength: float = 0.0
    ) -> tuple[Change, ...]:
        """What an intervention does.

        Args:
            intervention: Which.
            name: The subspace's name; of `leace` the probe's.
            draw: Of the random subspaces, instead of the named one.
            strength: Of `steer`, in units of the spread.
        """
        key = (intervention, strength, name, draw)
        if key not in self._made:
            self._made[key] = self._make(intervention, name, draw, strength)
        return self._made[key]

    def _make(self, intervention: Intervention, name: str, draw: int | None, strength: float) -> tuple[Change, ...]:
        site = self.site
        if draw is not None:
            basis = site.random_for(intervention).bases[draw]
            centre, toward = _within(site.mean.double(), basis.double()).float(), basis[0]
            spread = site.probe.spread  # a random direction of the same variance has the same spread
        else:
            own = site.subspace(name)
            basis, centre, toward, spread = own.basis, own.centre, own.toward, own.spread
        if intervention == "steer":
            return (self._add(toward * (strength * spread)),)
        if intervention == "swap":
            return (Change("swap", basis),)
        if intervention == "leace" and draw is None:
            assert site.leace is not None
            return (Change("affine", site.leace.matrix, site.leace.offset),)
        return Change("project", basis), self._add(centre)

    def _add(self, vector: Tensor) -> Change:
        """A vector of the site's unit, or of the whole activation, that is added."""
        heads = self.site.heads if self.site.unit is None else 1
        return Change("add", vector.view(1, 1, *([] if heads is None else [heads]), -1))


def _within(x: Tensor, rows: Tensor) -> Tensor:
    """The part of x [features] in the span of orthonormal rows."""
    return (rows @ x) @ rows
