"""Random sets to set beside a chosen one: as many of each layer, none of the chosen among them."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from mechinterp_cli.tasks.draw import Draw

Item = TypeVar("Item")
Group = TypeVar("Group", bound=Hashable)

FEW_SETS = 5
"""With fewer different sets than this a band says little."""


def matched_sets(
    wanted: Mapping[Group, int], others: Mapping[Group, Sequence[Item]], *, draws: int, seed: int
) -> list[tuple[Item, ...]]:
    """Draw sets that have as many items of each group as are wanted.

    Args:
        wanted: Group (a layer) to how many.
        others: Group to what may be drawn.
        draws: How many sets.
        seed: Of the draws.

    Returns:
        The sets, groups in the order of `wanted`; none where a group has too few.
    """
    if any(len(others[group]) < count for group, count in wanted.items()):
        return []
    draw = Draw(seed)
    return [
        tuple(item for group, count in wanted.items() for item in sorted(draw.sample(others[group], count)))  # type: ignore[type-var]  # indices and heads have an order
        for _ in range(draws)
    ]


def too_few(what: str, sets: Sequence[object]) -> str | None:
    """What a reader must know of random sets where there is hardly any choice.

    Args:
        what: What they stand beside (`the top 4 by induction`).
        sets: The sets.
    """
    different = len(set(sets))
    if not sets:
        return f"no random set beside {what}: a layer has too few others"
    if different < min(len(sets), FEW_SETS):
        return f"only {different} different random {'set' if different == 1 else 'sets'} beside {what}"
    return None
