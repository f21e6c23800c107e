"""The sweeps that are timed, and their trials as the engine takes them."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.sweep_prompts import Differ, Pairs
from mechinterp_cli.engine.edits import Bucket, Edit, Site, Trial
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.models.anatomy import Anatomy


@dataclass(frozen=True)
class Case:
    """One sweep."""

    key: str
    kind: str
    """`resid_pre` (layers × positions) or `z` (layers × heads, all positions at once)."""
    differ: Differ
    target: float
    """How many times faster than plain hooks with last logits the engine is to be."""


CASES = {
    "a": Case("a", "resid_pre", "late", 22.0),
    "b": Case("b", "resid_pre", "early", 4.0),
    "c": Case("c", "z", "late", 5.0),
}


@dataclass(frozen=True)
class Patch:
    """One trial of a sweep: a position of the residual stream, or a head at all positions."""

    layer: int
    unit: int


@dataclass(frozen=True, eq=False)
class Sweep:
    """A case on its prompts.

    Args:
        case: Which.
        pairs: Clean and corrupt prompts; clean activations are put into the corrupt ones.
        patches: The trials.
    """

    case: Case
    pairs: Pairs
    patches: tuple[Patch, ...]

    @property
    def bucket(self) -> Bucket:
        """The prompts as the engine takes them."""
        return Bucket.of({"clean": self.pairs.clean, "corrupt": self.pairs.corrupt})

    def work(self, *, skip: bool) -> Work:
        """The trials that the engine computes; `skip` leaves out what is known to be as in the corrupt prompt.

        That is every position before the first difference, and at the first layer's input every position whose token
        is the same.
        """
        trials = (self.trial(index, skip=skip) for index in range(len(self.patches)))
        return Work(self.bucket, tuple(trial for trial in trials if trial.prompts))

    def trial(self, index: int, *, skip: bool) -> Trial:
        """One trial, from the first edited position on that matters, on the prompts on which one does."""
        patch, pairs = self.patches[index], self.pairs
        heads = self.case.kind == "z"
        asked = range(pairs.prefix, pairs.length) if heads else (patch.unit,)
        positions = (tuple(asked),) * pairs.size
        if skip and patch.layer == 0 and not heads:
            positions = tuple(
                tuple(p for p in asked if differs[p]) for differs in (pairs.clean != pairs.corrupt).tolist()
            )
        elif skip:
            positions = tuple(tuple(p for p in asked if p >= start) for start in pairs.first_difference)
        units = (patch.unit,) if heads else None
        edit = Edit(Site(self.case.kind, patch.layer), "replace", positions, units=units, source="clean")
        return Trial(index, "corrupt", (edit,), tuple(i for i, chosen in enumerate(positions) if chosen))


def make_sweep(case: Case, pairs: Pairs, anatomy: Anatomy, layers: Sequence[int]) -> Sweep:
    """Every layer given × every position behind the prefix, or × every head."""
    heads = anatomy.layers[0].heads
    assert heads is not None
    units = range(heads.query) if case.kind == "z" else range(pairs.prefix, pairs.length)
    return Sweep(case, pairs, tuple(Patch(layer, unit) for layer in layers for unit in units))
