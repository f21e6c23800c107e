"""Trials on which an architecture is proved: every kind of site that it declares, in every layer, early and late."""

from collections.abc import Iterator

import torch

from benchmarks.tiny import tiny_tokens
from mechinterp_cli.engine.edits import Bucket, Edit, Op, Site, Trial
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.kinds import HEAD_KINDS, KEY_KINDS, NEURON_KINDS

PROMPTS = 3
LENGTH = 24
"""Longer than any window of the tiny models, also than three layers of the widest one see together."""


def proof_work(anatomy: Anatomy) -> Work:
    """Two streams of random prompts and the trials on them.

    Args:
        anatomy: Of a tiny model.
    """
    clean, corrupt = (tiny_tokens(batch=PROMPTS, length=LENGTH, seed=seed) for seed in (1, 2))
    every = tuple(range(PROMPTS))
    trials = (Trial(index, "corrupt", edits, every) for index, edits in enumerate(_all_edits(anatomy)))
    return Work(Bucket.of({"clean": clean, "corrupt": corrupt}), tuple(trials))


def _all_edits(anatomy: Anatomy) -> Iterator[tuple[Edit, ...]]:
    for layer in anatomy.layers:
        for kind in layer.sites:
            for position in (1, LENGTH // 2, LENGTH - 1):
                yield from ((edit,) for edit in _edits(Site(kind, layer.index), position))
    first, last = Site("resid_pre", 0), Site("resid_post", anatomy.n_layers - 1)
    yield _edit(first, "replace", 3, 8), _edit(last, "scale", 20, LENGTH - 1)


def _edits(site: Site, position: int) -> Iterator[Edit]:
    """One edit that reads the other stream, and one that changes a single unit."""
    yield _edit(site, "replace", position)
    if site.kind in KEY_KINDS:
        op: Op = "mask" if site.kind == "scores" else "zero"
        yield _edit(site, op, position, units=(0,), keys=((position - 1,),) * PROMPTS)
    elif site.kind in HEAD_KINDS + NEURON_KINDS:
        yield _edit(site, "zero", position, units=(0,))
    else:
        yield _edit(site, "scale", position)


def _edit(
    site: Site,
    op: Op,
    *positions: int,
    units: tuple[int, ...] | None = None,
    keys: tuple[tuple[int, ...], ...] | None = None,
) -> Edit:
    source = "clean" if op == "replace" else None
    values = torch.tensor(0.5) if op == "scale" else None
    return Edit(site, op, (positions,) * PROMPTS, units=units, keys=keys, source=source, values=values)
