"""Random sets to set beside a chosen one: as many of each layer, none of the chosen among them."""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from mechinterp_cli.tasks.draw import Draw

Item = TypeVar("Item")
Group = TypeVar("Group", bound=Hashable)

FEW_SETS = 20
"""With fewer sets than this a band says little, and a p-value cannot be below 0.05."""


def matched_sets(
    wanted: Mapping[Group, int], others: Mapping[Group, Sequence[Item]], *, draws: int, seed: int
) -> list[tuple[Item, ...]]:
    """Draw sets that have as many items of each group as are wanted; all there are, once, where they are no more.

    Args:
        wanted: Group (a layer) to how many.
        others: Group to what may be drawn, in order.
        draws: How many sets at most.
        seed: Of the draws.

    Returns:
        The sets, groups in the order of `wanted`; none where a group has too few.
    """
    if any(len(others[group]) < count for group, count in wanted.items()):
        return []
    if math.prod(math.comb(len(others[group]), count) for group, count in wanted.items()) <= draws:
        choices = [itertools.combinations(others[group], count) for group, count in wanted.items()]
        return [tuple(itertools.chain.from_iterable(chosen)) for chosen in itertools.product(*choices)]
    draw = Draw(seed)
    places = {group: range(len(others[group])) for group in wanted}
    return [
        tuple(others[group][i] for group, count in wanted.items() for i in sorted(draw.sample(places[group], count)))
        for _ in range(draws)
    ]


def too_few(what: str, sets: Sequence[object], draws: int) -> str | None:
    """What a reader must know of random sets where there is hardly any choice.

    Args:
        what: What they stand beside (`the top 4 by induction`).
        sets: The sets.
        draws: How many were asked for.
    """
    if not sets:
        return f"no random set beside {what}: a layer has too few others"
    if len(sets) < min(draws, FEW_SETS):
        return f"only {len(sets)} random {'set' if len(sets) == 1 else 'sets'} beside {what}: there are no more"
    return None
