"""Constants in place of activations, such that gradients come back to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mechinterp_cli.engine.edits import Edit, Site
from mechinterp_cli.engine.instrument import Visitor, kinds_by_layer
from mechinterp_cli.engine.losses import Batch
from mechinterp_cli.engine.tail import Tail
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.kinds import KEY_KINDS

SMALLEST_SCALE = 1e-3
"""Of the scale of a site's edited features: what a feature that never varies is moved by."""

Constants = Mapping[Site, Tensor]
"""Site to what stands there, [*features]: heads × d_head, d_mlp or d_model."""


def constant_edits(edits: Sequence[Edit], constants: Constants) -> tuple[Edit, ...]:
    """The edits that put the constants where `edits` are; only their site, units and positions count."""

    def values(edit: Edit) -> Tensor:
        chosen = constants[edit.site]
        return (chosen if edit.units is None else chosen[list(edit.units)])[None, None]

    return tuple(
        replace(edit, op="constant", source=None, source_prompts=None, values=values(edit), offset=None)
        for edit in edits
    )


@dataclass(frozen=True, eq=False)
class Problem:
    """A trial's edits as the fit needs them: what is edited where, and the constants it starts from."""

    edits: Sequence[Mapping[Site, Sequence[tuple[Edit, Tensor | None]]]]
    """By bucket and site, edits and the indices of their units."""
    start: dict[Site, Tensor]

    @classmethod
    def of(
        cls, edits: Sequence[Sequence[Edit]], start: Constants, device: torch.device, dtype: torch.dtype
    ) -> "Problem":
        """Prepare the edits of one trial, by bucket.

        Raises:
            UserError: A site has no features that prompts of any length share (`scores`, `pattern`).
        """
        sites = sorted({edit.site for some in edits for edit in some})
        for site in (s for s in sites if s.kind in KEY_KINDS):
            raise UserError(
                f"optimal: {site.kind} has one feature per key, so no constant fits prompts of any length",
                "Use another value there, or ablate the head itself.",
            )

        def prepared(edit: Edit) -> tuple[Edit, Tensor | None]:
            return edit, None if edit.units is None else torch.tensor(edit.units, device=device)

        by_site = [{site: [prepared(e) for e in some if e.site == site] for site in sites} for some in edits]
        return cls(by_site, {site: start[site].to(device, dtype) for site in sites})

    @property
    def wanted(self) -> dict[int, frozenset[str]]:
        """Layer to the kinds of site that are edited there."""
        return kinds_by_layer(set(self.start))

    @property
    def names(self) -> str:
        """The sites, for messages."""
        return ", ".join(f"{site.kind} of layer {site.layer}" for site in self.start)

    def touched(self, bucket: int) -> list[int]:
        """Prompts of a bucket that some edit touches."""
        positions = [edit.positions for some in self.edits[bucket].values() for edit, _ in some]
        return [prompt for prompt, chosen in enumerate(zip(*positions, strict=True)) if any(chosen)]

    def zeros(self) -> dict[Site, Tensor]:
        """The start with zeros in the units that are edited."""
        zeros = {site: x.clone() for site, x in self.start.items()}
        for by_site in self.edits:
            for site, some in by_site.items():
                for _, units in some:
                    zeros[site][slice(None) if units is None else units] = 0
        return zeros

    def visitor(self, constants: Constants, batch: Batch) -> Visitor:
        """Puts the constants; nothing is changed in place, so that gradients come back to them."""

        def visit(site: Site, activation: Tensor) -> Tensor:
            for edit, units in self.edits[batch.bucket][site]:
                old = activation if units is None else activation.index_select(2, units)
                new = constants[site] if units is None else constants[site].index_select(0, units)
                where = _tokens(edit, batch, old.ndim)
                put = torch.where(where, _put(new.to(old.dtype), old, edit), old)
                activation = put if units is None else activation.index_copy(2, units, put)
            return activation

        return visit

    def scales(self, tail: Tail, batches: Sequence[Batch]) -> dict[Site, Tensor]:
        """By how much one unit of the fit moves each feature: its root-mean-square distance from the start."""
        squares = {site: torch.zeros_like(x) for site, x in self.start.items()}
        counts = {site: torch.zeros(len(x), *[1] * (x.ndim - 1)).to(x) for site, x in self.start.items()}

        def note(batch: Batch) -> Visitor:
            def visit(site: Site, activation: Tensor) -> None:
                square = (activation.to(self.start[site]) - self.start[site]) ** 2
                for edit, units in self.edits[batch.bucket][site]:
                    where = _tokens(edit, batch, square.ndim)
                    every = slice(None) if units is None else units
                    squares[site][every] += torch.where(where, square, 0).sum((0, 1))[every]
                    counts[site][every] += where.sum()

            return visit

        with torch.no_grad():
            for batch in batches:
                tail.logits(batch.bucket, batch.prompts, self.wanted, note(batch))
        return {site: _floored(squares[site], counts[site], self.start[site]) for site in self.start}


def _put(new: Tensor, old: Tensor, edit: Edit) -> Tensor:
    """The constant; of directions that are projected out only its component along them."""
    if edit.op != "project":
        return new
    assert isinstance(edit.values, Tensor)
    basis = edit.values.to(old)
    return old + ((new - old) @ basis.T) @ basis


def _tokens(edit: Edit, batch: Batch, dimensions: int) -> Tensor:
    """Which tokens of a batch are edited, [n, positions, 1, …]."""
    where = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    for row, prompt in enumerate(batch.prompts.tolist()):
        where[row, list(edit.positions[prompt])] = True
    return where.to(batch.tokens.device).view(*where.shape, *[1] * (dimensions - 2))


def _floored(squares: Tensor, counts: Tensor, start: Tensor) -> Tensor:
    """Root mean squares; a feature that never varies still gets a small scale."""
    scale = (squares / counts.clamp(min=1)).sqrt()
    edited = (counts > 0).expand_as(scale)
    typical = scale[edited].square().mean().sqrt() if bool(edited.any()) else scale.new_zeros(())
    if float(typical) == 0.0:
        typical = start.abs().max().clamp(min=SMALLEST_SCALE) / SMALLEST_SCALE
    return scale.clamp(min=float(typical) * SMALLEST_SCALE)
