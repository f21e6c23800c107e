"""Which prompts directions are fitted on, and which are measured: never the same, nor any of one cluster."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.probe.causal_options import CausalOptions
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.labelled import labels_of
from mechinterp_cli.tasks.prompts import Prompt, PromptSet


@dataclass(frozen=True)
class Split:
    """Prompts by their numbers, each in order.

    Args:
        fitted: Those that directions are fitted on.
        held: The others: whole clusters.
        measured: Those of the prompts held out that are measured.
    """

    fitted: tuple[int, ...]
    held: tuple[int, ...]
    measured: tuple[int, ...]

    def facts(self) -> dict[str, Any]:
        """For the manifest; what is in neither list is held out and not measured."""
        return {"fitted": list(self.fitted), "measured": list(self.measured)}


def hold_out(prompts: PromptSet, options: CausalOptions) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompts to fit on, and those that are held out: a share of the clusters, the same of each kind of cluster.

    Clusters are of one kind where their prompts have the same groups and classes.

    Args:
        prompts: All prompts.
        options: Share and seed.

    Raises:
        UserError: There is one cluster only.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts.prompts):
        members[prompt.cluster].append(number)
    if len(members) < 2:
        problem = f"task {prompts.task} has one cluster of prompts, which cannot be fitted on and measured"
        raise UserError(problem, "Use prompts of several clusters (facts, nouns, or the file's `group`).")
    order = _interleaved(prompts, members, options.seed)
    count = min(max(1, round(options.hold_out * len(order))), len(order) - 1)
    held = {number for cluster in order[:count] for number in members[cluster]}
    everyone = range(len(prompts.prompts))
    return tuple(i for i in everyone if i not in held), tuple(sorted(held))


def _interleaved(prompts: PromptSet, members: dict[str, list[int]], seed: int) -> list[str]:
    """Clusters in a drawn order whose every beginning has of each kind its share."""
    kinds: dict[Any, list[str]] = defaultdict(list)
    for cluster in Draw(seed).shuffled(list(members)):
        kinds[frozenset(_kind(prompts.prompts[i]) for i in members[cluster])].append(cluster)
    placed = [
        ((number + 0.5) / len(own), rank, cluster)
        for rank, own in enumerate(kinds.values())
        for number, cluster in enumerate(own)
    ]
    return [cluster for *_, cluster in sorted(placed)]


def _kind(prompt: Prompt) -> tuple[str, frozenset[str]]:
    return prompt.group, frozenset(label for label in labels_of(prompt) if isinstance(label, str))


def chosen(prompts: PromptSet, candidates: Collection[int], options: CausalOptions) -> tuple[int, ...]:
    """At most `measure` prompts, of as many clusters as can be, groups and classes as even as can be.

    Args:
        prompts: All prompts.
        candidates: Numbers of those that may be measured.
        options: How many, and the seed.
    """
    clusters: dict[str, list[int]] = defaultdict(list)
    for number in Draw(options.seed + 1).shuffled(sorted(candidates)):
        clusters[prompts.prompts[number].cluster].append(number)
    seen: Counter[Any] = Counter()
    found: list[int] = []
    while len(found) < options.measure and any(clusters.values()):
        for own in clusters.values():
            if own and len(found) < options.measure:
                best = min(own, key=lambda number: seen[_kind(prompts.prompts[number])])
                own.remove(best)
                seen[_kind(prompts.prompts[best])] += 1
                found.append(best)
    return tuple(sorted(found))


def subset(prompts: PromptSet, numbers: Sequence[int]) -> PromptSet:
    """Some of the prompts, in this order."""
    return replace(prompts, prompts=tuple(prompts.prompts[i] for i in numbers), dropped=(), warnings=())
