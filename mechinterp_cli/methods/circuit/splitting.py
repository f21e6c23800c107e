"""Training and evaluation prompts: whole clusters, and no prompt in both."""

from collections.abc import Sequence
from dataclasses import dataclass

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.methods.circuit.options import SplitOptions
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.prompts import PromptSet

FEW = 20
"""Fewer prompts on a side are warned of."""


@dataclass(frozen=True)
class Split:
    """Which prompts are used for what, by index.

    Args:
        train: Scores are of these.
        evaluate: Circuits are evaluated on these.
        warnings: What a reader must know.
    """

    train: tuple[int, ...]
    evaluate: tuple[int, ...]
    warnings: tuple[str, ...] = ()


def split(loaded: LoadedConfig, options: SplitOptions | None, prompts: PromptSet) -> Split:
    """Draw the training prompts.

    Where all prompts are of one cluster, prompts are drawn, and a warning says so.

    Args:
        loaded: The config, for errors with file and line.
        options: The share and the seed; None: all prompts are on both sides.
        prompts: The prompts.

    Raises:
        UserError: There are too few prompts, or one text is on both sides; names the key.
    """
    everything = tuple(range(len(prompts.prompts)))
    if options is None:
        told = "circuit: the prompts that circuits are found on are those that they are evaluated on (split: null)"
        return Split(everything, everything, (told, *_few(everything, everything)))
    clusters = [prompts.prompts[i].cluster for i in everything]
    warnings = []
    if len(set(clusters)) == 1 and len(clusters) > 1:
        clusters = [str(i) for i in everything]
        warnings.append("circuit: all prompts are of one cluster, which training and evaluation prompts share")
    names = sorted(set(clusters), key=clusters.index)
    if len(names) < 2:
        problem = f"{len(everything)} prompt cannot be split into training and evaluation"
        raise loaded.error(("circuit", "split"), problem, "Raise task.n, or set split: null.")
    train = _drawn(names, clusters, options)
    evaluate = tuple(i for i in everything if i not in set(train))
    _check_disjoint(loaded, prompts, train, evaluate)
    return Split(train, evaluate, (*warnings, *_few(train, evaluate)))


def _drawn(names: Sequence[str], clusters: Sequence[str], options: SplitOptions) -> tuple[int, ...]:
    """Clusters in a random order, as many as come nearest to the share of the prompts; one at least on either side."""
    order = Draw(options.seed).shuffled(names)
    wanted, counts, total = options.train * len(clusters), [], 0
    for name in order[:-1]:
        total += clusters.count(name)
        counts.append(total)
    nearest = min(range(len(counts)), key=lambda at: abs(counts[at] - wanted))
    chosen = set(order[: nearest + 1])
    return tuple(i for i, name in enumerate(clusters) if name in chosen)


def _check_disjoint(loaded: LoadedConfig, prompts: PromptSet, train: Sequence[int], evaluate: Sequence[int]) -> None:
    known = {prompts.prompts[i].clean_tokens for i in train}
    both = [i for i in evaluate if prompts.prompts[i].clean_tokens in known]
    if both:
        problem = f"prompt {both[0]} ({prompts.prompts[both[0]].clean!r}) is in training and evaluation"
        remedy = "Leave repeated prompts out, or give them one cluster."
        raise loaded.error(("circuit", "split"), problem, remedy)


def _few(train: Sequence[int], evaluate: Sequence[int]) -> list[str]:
    sides = (("training", train), ("evaluation", evaluate))
    return [
        f"circuit: {len(side)} {name} prompts are fewer than {FEW}; intervals are rough"
        for name, side in sides
        if len(side) < FEW
    ]
