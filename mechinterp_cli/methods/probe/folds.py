"""Splits into training and test samples, by scikit-learn's splitters: stratified by class, whole groups, nested."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from torch import Tensor

from mechinterp_cli.errors import UserError

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Folds:
    """Every sample is tested in exactly one fold and trained on in the others.

    Args:
        train: [folds, n] bool.
    """

    train: Tensor

    @property
    def test(self) -> Tensor:
        """[folds, n] bool."""
        return ~self.train


@dataclass(frozen=True)
class Nested:
    """Folds, and folds of each fold's training samples, of which the penalty is chosen.

    Args:
        outer: What scores are from.
        train: [folds, inner, n] bool, subsets of `outer.train`.
        test: [folds, inner, n] bool: the rest of `outer.train`; never a test sample of the outer fold.
    """

    outer: Folds
    train: Tensor
    test: Tensor


def class_folds(
    labels: Sequence[int] | Integers,
    folds: int,
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    where: str = "probe.folds",
) -> Folds:
    """Folds with each class's share in them as even as can be, and no group on both sides.

    Args:
        labels: [n] classes.
        folds: At least 2.
        groups: [n]; samples of one group stay together.
        seed: Of the order.
        where: Key path that errors name.

    Raises:
        UserError: One class only, fewer samples (or groups) than folds, or a class missing where it is trained on.
    """
    classes = np.asarray(labels)
    _check_numbers(len(classes), folds, groups, where)
    _check_classes(classes, folds, groups, where)
    if groups is None:
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(classes, classes)
    else:
        splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(
            classes, classes, np.asarray(groups)
        )
    found = _masks(splits, len(classes))
    _check_folds(found, classes, where)
    return found


def number_folds(
    n: int, folds: int, *, groups: Sequence[str] | None = None, seed: int = 0, where: str = "probe.folds"
) -> Folds:
    """Folds of samples whose target is a number; no group on both sides.

    Args:
        n: Samples.
        folds: At least 2.
        groups: [n].
        seed: Of the order.
        where: Key path that errors name.

    Raises:
        UserError: Fewer samples (or groups) than folds.
    """
    _check_numbers(n, folds, groups, where)
    index = np.arange(n)
    if groups is None:
        return _masks(KFold(folds, shuffle=True, random_state=seed).split(index), n)
    splitter = GroupKFold(folds, shuffle=True, random_state=seed)
    return _masks(splitter.split(index, groups=np.asarray(groups)), n)


def nested_class_folds(
    labels: Sequence[int] | Integers,
    folds: int,
    inner: int,
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    where: str = "probe",
) -> Nested:
    """`class_folds`, and again of each one's training samples.

    Args:
        labels: [n] classes.
        folds: Of scores.
        inner: Of the choice of the penalty.
        groups: [n].
        seed: Of both.
        where: Key path of the section.
    """
    classes = np.asarray(labels)
    outer = class_folds(classes, folds, groups=groups, seed=seed, where=f"{where}.folds")
    parts = []
    for members in _members(outer):
        own = None if groups is None else [groups[i] for i in members]
        parts.append(class_folds(classes[members], inner, groups=own, seed=seed, where=f"{where}.inner_folds"))
    return _nest(outer, parts)


def nested_number_folds(
    n: int, folds: int, inner: int, *, groups: Sequence[str] | None = None, seed: int = 0, where: str = "probe"
) -> Nested:
    """`number_folds`, and again of each one's training samples.

    Args:
        n: Samples.
        folds: Of scores.
        inner: Of the choice of the penalty.
        groups: [n].
        seed: Of both.
        where: Key path of the section.
    """
    outer = number_folds(n, folds, groups=groups, seed=seed, where=f"{where}.folds")
    parts = []
    for members in _members(outer):
        own = None if groups is None else [groups[i] for i in members]
        parts.append(number_folds(len(members), inner, groups=own, seed=seed, where=f"{where}.inner_folds"))
    return _nest(outer, parts)


def _members(outer: Folds) -> list[Integers]:
    return [np.flatnonzero(mask) for mask in outer.train.numpy()]


def _nest(outer: Folds, parts: Sequence[Folds]) -> Nested:
    shape = (len(parts), len(parts[0].train), outer.train.shape[1])
    train, test = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for fold, (members, part) in enumerate(zip(_members(outer), parts, strict=True)):
        train[fold][:, members] = part.train
        test[fold][:, members] = part.test
    return Nested(outer, train, test)


def _masks(splits: Iterator[tuple[Integers, Integers]], n: int) -> Folds:
    rows = []
    for train, _ in splits:
        row = torch.zeros(n, dtype=torch.bool)
        row[torch.as_tensor(train)] = True
        rows.append(row)
    return Folds(torch.stack(rows))


def _check_numbers(n: int, folds: int, groups: Sequence[str] | None, where: str) -> None:
    if n < folds:
        raise UserError(
            f"{where}: {folds} folds of {n} samples; every fold needs one to test",
            f"Give at most {n} folds, or more samples.",
        )
    names = n if groups is None else len(set(groups))
    if names < folds:
        raise UserError(
            f"{where}: {folds} folds of {names} {'group' if names == 1 else 'groups'}; a group is never split",
            f"Give at most {names} folds, or leave `group` out."
            if names > 1
            else "Give more groups, or leave `group` out.",
        )


def _check_classes(classes: Integers, folds: int, groups: Sequence[str] | None, where: str) -> None:
    counts = Counter(classes.tolist())
    if len(counts) == 1:
        raise UserError(
            f"{where}: all {len(classes)} samples have class {next(iter(counts))}; there is nothing to tell apart",
            "Give samples of at least two classes.",
        )
    rare, count = min(counts.items(), key=lambda item: (item[1], item[0]))
    own = set() if groups is None else {groups[i] for i, label in enumerate(classes.tolist()) if label == rare}
    if len(own) == 1:
        raise UserError(
            f"{where}: class {rare} occurs in group {own.pop()!r} only: it is never both trained on and tested",
            "Give samples of this class in at least two groups, or leave the class out.",
        )
    if count < folds:
        raise UserError(
            f"{where}: class {rare} has {count} {'sample' if count == 1 else 'samples'}, fewer than the {folds} folds",
            f"Give at most {count} folds, or more samples of this class."
            if count > 1
            else "Give more samples of this class, or leave it out.",
        )


def _check_folds(folds: Folds, classes: Integers, where: str) -> None:
    wanted = set(classes.tolist())
    for number, train in enumerate(folds.train.numpy()):
        missing = wanted - set(classes[train].tolist())
        if missing:
            raise UserError(
                f"{where}: class {min(missing)} is missing from the training samples of fold {number}",
                "Its groups all fell into one fold: give fewer folds, another seed, or more groups with this class.",
            )
