"""What a probe's score is to be set beside: baselines, intervals, permuted and control labels, leaks."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mechinterp_cli.config.schema import StatsOptions
from mechinterp_cli.methods.beside import Estimates, Floats, estimate
from mechinterp_cli.methods.probe.folds import Folds

Integers = npt.NDArray[np.int64]


def majority_score(labels: Sequence[int], folds: Folds) -> float:
    """Accuracy of always saying the commonest class of a fold's training samples; of equal ones the smallest.

    Args:
        labels: [n].
        folds: As the probe has them.
    """
    classes = np.asarray(labels)
    right = 0
    for train in folds.train.numpy():
        right += int((classes[~train] == np.bincount(classes[train]).argmax()).sum())
    return right / len(classes)


def accuracy_interval(correct: Tensor, clusters: Sequence[str], stats: StatsOptions) -> Estimates:
    """Accuracies and their bootstrap intervals (BCa); samples of a cluster are resampled together.

    Not studentised: a draw in which all predictions are right has no standard error. Where every sample is right, or
    wrong, so is every draw, and the interval is a point that says nothing.

    Args:
        correct: [rows, n], 1 where a held-out prediction is right.
        clusters: [n].
        stats: How many draws, of which seed, at which level.
    """
    values: Floats = correct.double().cpu().numpy()
    return estimate(values, None, clusters, stats, method="bca")


def permuted_labels(
    labels: Sequence[int] | Integers, groups: Sequence[str] | None, *, draws: int, seed: int
) -> Integers:
    """Labels as they might have been were there nothing to read, [draws, n].

    Within a group that has several labels they are permuted; groups that have one label each exchange it as a whole.

    Args:
        labels: [n].
        groups: [n]; each sample on its own where None.
        draws: How many.
        seed: Of the draws.
    """
    classes = np.asarray(labels, dtype=np.int64)
    rng = np.random.default_rng(seed)
    names = np.arange(len(classes)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(names == name) for name in range(int(names.max()) + 1)]
    whole = [part for part in members if len(set(classes[part].tolist())) == 1]
    mixed = [part for part in members if len(set(classes[part].tolist())) > 1]
    out = np.tile(classes, (draws, 1))
    sizes = [len(part) for part in whole]
    for row in out:
        if whole:
            moved = rng.permutation(np.array([classes[part[0]] for part in whole]))
            row[np.concatenate(whole)] = np.repeat(moved, sizes)
        for part in mixed:
            row[part] = rng.permutation(classes[part])
    return out


def permutation_p(observed: float, drawn: Sequence[float] | Floats) -> float:
    """(1 + draws at least as good) / (1 + draws); scores are better the higher.

    Args:
        observed: Score with the labels as they are.
        drawn: Scores with permuted ones, the penalty chosen anew for each.
    """
    # equal accuracies are equal, whatever rounding makes of sums
    return (1 + int((np.asarray(drawn) >= observed - 1e-12).sum())) / (1 + len(drawn))


def control_labels(types: Sequence[Hashable], labels: Sequence[int], *, seed: int) -> Integers:
    """Labels that depend on the word type alone (Hewitt & Liang 2019), [n].

    Each type's is drawn once, from the shares that labels have over the samples; types are taken in the order in which
    they first occur.

    Args:
        types: [n] word types.
        labels: [n] classes.
        seed: Of the draws.
    """
    names = list(dict.fromkeys(types))
    drawn = np.random.default_rng(seed).choice(np.asarray(labels, dtype=np.int64), size=len(names))
    own = dict(zip(names, drawn.tolist(), strict=True))
    return np.array([own[one] for one in types], dtype=np.int64)


def selectivity(accuracy: float, control: float) -> float:
    """Accuracy less that of a probe of the control labels, trained and tested alike."""
    return accuracy - control


def learning_sizes(n: int, classes: int, *, smallest: int = 8) -> tuple[int, ...]:
    """How many training samples a learning curve has: doubling up to all of them.

    Args:
        n: Training samples there are.
        classes: How many; the smallest size has room for two of each.
        smallest: At least so many.
    """
    sizes, size = [], max(smallest, 2 * classes)
    while size < n:
        sizes.append(size)
        size *= 2
    return (*sizes, n)


def learning_masks(train: Tensor, labels: Sequence[int], sizes: Sequence[int], *, seed: int) -> Tensor:
    """Training masks of each size, [sizes, n]; a larger one holds every smaller one, and classes keep their shares.

    Args:
        train: [n] mask of the training samples.
        labels: [n] classes.
        sizes: Growing, at most the number of training samples.
        seed: Of the order in which samples come.
    """
    rng = np.random.default_rng(seed)
    classes = np.asarray(labels)
    members = np.flatnonzero(train.cpu().numpy())
    # the k-th of m samples of a class comes at (k + ½) / m: classes keep their shares at every size
    when = np.empty(len(members))
    for one in np.unique(classes[members]):
        own = np.flatnonzero(classes[members] == one)
        when[rng.permutation(own)] = (np.arange(len(own)) + 0.5) / len(own)
    order = members[np.lexsort((rng.permutation(len(members)), when))]
    out = torch.zeros(len(sizes), len(classes), dtype=torch.bool)
    for row, size in enumerate(sizes):
        out[row, torch.as_tensor(order[:size])] = True
    return out


def crossing(keys: Sequence[Hashable], folds: Folds) -> Mapping[Hashable, tuple[int, ...]]:
    """Keys (texts, groups) that are both trained on and tested in some fold, with their samples' indices.

    Args:
        keys: [n].
        folds: The split.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        members[key].append(index)
    train = folds.train.numpy()
    return {
        key: tuple(own)
        for key, own in members.items()
        if len(own) > 1 and bool((train[:, own].any(1) & ~train[:, own].all(1)).any())
    }


def leak_warnings(texts: Sequence[str], groups: Sequence[str] | None, folds: Folds) -> list[str]:
    """What a reader must know of a split: texts, or groups, on both sides of it.

    Texts that differ in capitals and blanks alone are one.

    Args:
        texts: [n].
        groups: [n], where the data have them.
        folds: The split.
    """
    out = []
    alike = [" ".join(text.casefold().split()) for text in texts]
    for what, names, keys in (("text", texts, alike), ("group", groups, groups)):
        found = crossing(keys, folds) if keys is not None else {}
        if names is not None and found:
            own = next(iter(found.values()))
            count = Counter(len(indices) for indices in found.values()).total()
            out.append(
                f"{count} {what}{'' if count == 1 else 's'} on both sides of the split, as {names[own[0]]!r}"
                f" (samples {', '.join(map(str, own[:4]))}{', …' if len(own) > 4 else ''}): scores are too high"
            )
    return out
