"""Draws of labels as they might have been were there nothing to read: which sample's label every sample has.

Folds stay as they are, so labels are exchanged within folds only: every fold keeps its classes in every draw, as the
splitter gave them to the labels themselves. What depends on each other moves together.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from mechinterp_cli.methods.probe.folds import Folds

Integers = npt.NDArray[np.int64]


def exchanges(
    targets: Sequence[float], texts: Sequence[int], groups: Sequence[str], folds: Folds, *, draws: int, seed: int
) -> Integers:
    """[draws, n]: the sample whose label a sample has.

    A text whose words have several labels keeps their order: they are shifted around, which is exact wherever any
    order of them would be, and leaves alone that neighbours are alike. A text of one label exchanges it, as a whole,
    with others of its group; a group of one label with other such groups of its fold.

    Args:
        targets: [n] classes or numbers.
        texts: [n] the text that a sample is of, or is a word of; all of a text stand together.
        groups: [n]; a group stands in one fold.
        folds: Of the scores.
        draws: How many.
        seed: Of the draws.
    """
    values, fold = np.asarray(targets), folds.test.double().argmax(0).tolist()
    strata: dict[Hashable, list[Integers]] = {}
    turned = []
    for group, members in _by(groups, np.arange(len(values))).items():
        if _alike(values[members]):
            strata.setdefault(("fold", fold[members[0]]), []).append(members)
            continue
        for own in _by([texts[i] for i in members], members).values():
            if _alike(values[own]):
                strata.setdefault(("group", group), []).append(own)
            else:
                turned.append(own)
    rng = np.random.default_rng(seed)
    out = np.tile(np.arange(len(values)), (draws, 1))
    for row in out:
        for own in turned:
            row[own] = np.roll(own, int(rng.integers(len(own))))
        for units in strata.values():
            moved = rng.permutation([unit[0] for unit in units])
            row[np.concatenate(units)] = np.repeat(moved, [len(unit) for unit in units])
    return out


def _by(keys: Sequence[Hashable], members: Integers) -> dict[Hashable, Integers]:
    found: dict[Hashable, list[int]] = {}
    for key, member in zip(keys, members.tolist(), strict=True):
        found.setdefault(key, []).append(member)
    return {key: np.array(own) for key, own in found.items()}


def _alike(values: npt.NDArray[np.float64]) -> bool:
    return bool((values == values[0]).all())
