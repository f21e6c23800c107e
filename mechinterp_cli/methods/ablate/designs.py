"""Which units are ablated together, and in which order."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.methods.ablate.expand import find, names
from mechinterp_cli.methods.ablate.options import AblateOptions, CumulativeOptions
from mechinterp_cli.methods.ablate.overlap import overlapping
from mechinterp_cli.methods.ablate.units import Ablation, Unit
from mechinterp_cli.methods.matched import matched_sets, too_few

Path = tuple[str | int, ...]


@dataclass(eq=False)
class Layout:
    """The trials of an experiment, and what a reader must know of them.

    Args:
        loaded: The config, for errors.
        options: The section.
        units: What can be ablated.
    """

    loaded: LoadedConfig
    options: AblateOptions
    units: Sequence[Unit]
    trials: list[Ablation] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(
        self,
        design: str,
        units: Sequence[int],
        *,
        k: int | None = None,
        ranking: int | None = None,
        set: str | None = None,
    ) -> None:
        """One more trial."""
        self.trials.append(Ablation(len(self.trials), design, tuple(units), k, ranking, set))

    def named(self, text: str, path: Path) -> int:
        """The unit of that name."""
        return find(names(self.units), text, self.loaded, path).index

    def together(self, units: Sequence[int], path: Path) -> tuple[int, ...]:
        """Units that may be ablated together.

        Raises:
            UserError: Two of them edit the same thing, or one stands there twice.
        """
        if len(set(units)) < len(units):
            twice = next(unit for unit in units if list(units).count(unit) > 1)
            raise self.loaded.error(path, f"{self.units[twice].name} stands there twice", "Name it once.")
        clash = overlapping([self.units[unit] for unit in units])
        if clash is not None:
            a, b = clash
            problem = f"{a.name} and {b.name} overlap: one is part of the other, or they edit the same features"
            raise self.loaded.error(path, problem, "Keep one of the two.")
        return tuple(units)


def lay_out(loaded: LoadedConfig, options: AblateOptions, units: Sequence[Unit], ranking: Sequence[int]) -> Layout:
    """All trials of a design.

    Args:
        loaded: The config, for errors.
        options: The section.
        units: What can be ablated.
        ranking: For `cumulative`: indices of units, most important first.

    Raises:
        UserError: The design lacks its section, or has one that it does not use; an unknown unit; units that overlap; a
            grid beyond the number of units.
    """
    layout = Layout(loaded, options, units)
    _check_sections(layout)
    if options.design == "single":
        for unit in units:
            layout.add("single", (unit.index,))
    elif options.design == "cumulative":
        assert options.cumulative is not None
        _cumulative(layout, options.cumulative, ranking)
    elif options.design == "pairs":
        _pairs(layout)
    else:
        _sets(layout)
    return layout


_SECTIONS = {"cumulative": ("cumulative",), "set": ("sets",), "keep": ("sets",), "pairs": ("pairs",)}


def _check_sections(layout: Layout) -> None:
    options = layout.options
    needed = _SECTIONS.get(options.design, ())
    for name in ("cumulative", "sets", "pairs"):
        given = getattr(options, name)
        if name in needed and not given:
            problem = f"design {options.design} needs `ablate.{name}`"
            raise layout.loaded.error(("ablate", "design"), problem, f"Add `{name}:` to the section.")
        if name not in needed and given is not None:
            problem = f"design {options.design} does not use `{name}`"
            raise layout.loaded.error(("ablate", name), problem, "Take it out, or choose another design.")


def _cumulative(layout: Layout, options: CumulativeOptions, ranking: Sequence[int]) -> None:
    """The top k together, for every k, and as many others of the same layers and kinds."""
    path: Path = ("ablate", "cumulative", "k")
    for place, k in enumerate(options.k):
        if k > len(ranking):
            problem = f"{k} is more than the {len(ranking)} units that are ranked"
            raise layout.loaded.error((*path, place), problem, f"Choose 1 to {len(ranking)}.")
    grid = sorted(options.k)
    layout.together(ranking[: grid[-1]], ("ablate", "cumulative", "ranking"))
    for k in grid:
        chosen = ranking[:k]
        layout.add("cumulative", chosen, k=k)
        drawn = _random(layout.units, chosen, options)
        if (told := too_few(f"the top {k}", drawn, options.random)) is not None:
            layout.warnings.append(told)
        for number, others in enumerate(drawn):
            layout.add("cumulative", others, k=k, ranking=number)


def _random(units: Sequence[Unit], chosen: Sequence[int], options: CumulativeOptions) -> list[tuple[int, ...]]:
    """Sets of as many other units of the same blocks and layers."""
    groups = [(unit.block, unit.layer) for unit in units]
    wanted = {group: sum(groups[i] == group for i in chosen) for group in sorted({groups[i] for i in chosen})}
    taken = set(chosen)
    others = {group: [u.index for u in units if groups[u.index] == group and u.index not in taken] for group in wanted}
    return matched_sets(wanted, others, draws=options.random, seed=options.seed * 1_000_003 + len(chosen))


def _pairs(layout: Layout) -> None:
    """Every unit of a pair alone, and every pair together."""
    pairs = []
    for place, (a, b) in enumerate(layout.options.pairs or ()):
        path: Path = ("ablate", "pairs", place)
        pairs.append(layout.together([layout.named(a, path), layout.named(b, path)], path))
    for unit in dict.fromkeys(unit for pair in pairs for unit in pair):
        layout.add("single", (unit,))
    for pair in dict.fromkeys(pairs):
        layout.add("pairs", pair, set="+".join(layout.units[unit].name for unit in pair))


def _sets(layout: Layout) -> None:
    """Every set removed; for `keep` also everything but the set, and everything."""
    sets: dict[str, tuple[int, ...]] = {}
    for name, texts in (layout.options.sets or {}).items():
        path: Path = ("ablate", "sets", name)
        found = [layout.named(text, (*path, place)) for place, text in enumerate(texts)]
        sets[name] = layout.together(found, path)
    everything: tuple[int, ...] = ()
    if layout.options.design == "keep":
        everything = layout.together([unit.index for unit in layout.units], ("ablate", "units"))
        layout.add("everything", everything)
    for name, members in sets.items():
        layout.add("set", members, set=name)
        if everything:
            layout.add("keep", [unit for unit in everything if unit not in set(members)], set=name)
