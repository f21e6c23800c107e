"""What a trial edits, in the words of the config: where, which units, at which positions; no bucket is known yet."""

from collections.abc import Sequence
from dataclasses import dataclass

from mechinterp_cli.models.kinds import HEAD_KINDS, KEY_KINDS, NEURON_KINDS


@dataclass(frozen=True)
class Place:
    """Positions of a trial in every prompt; None where the trial does not apply to the prompt."""

    positions: tuple[tuple[int, ...] | None, ...]
    position: int | None = None
    span: str | None = None
    template: str | None = None

    @property
    def words(self) -> str:
        """Where it is, for labels: `, end, position 13`."""
        named = "" if self.span is None else f", {self.span}"
        return named if self.position is None else f"{named}, position {self.position}"


@dataclass(frozen=True)
class TrialSpec:
    """One trial before it is brought to a bucket."""

    index: int
    block: int
    kind: str
    layer: int
    """The layer it is reported under: the centre of a window."""
    layers: tuple[int, ...]
    units: tuple[int, ...] | None
    place: Place
    keys: Place | None

    @property
    def unit(self) -> int | None:
        """The head or neuron, where it is a single one."""
        return self.units[0] if self.units is not None and len(self.units) == 1 else None

    @property
    def head(self) -> int | None:
        """The head it is reported under (a key/value head for `k` and `v`)."""
        return self.unit if self.kind in HEAD_KINDS + KEY_KINDS else None

    @property
    def by_kv_head(self) -> bool:
        """Whether its heads are key/value heads."""
        return self.kind in ("k", "v")

    @property
    def neuron(self) -> int | None:
        """The neuron it is reported under."""
        return self.unit if self.kind in NEURON_KINDS else None

    @property
    def enters_first_layer(self) -> bool:
        """Whether it edits nothing but what enters layer 0."""
        return self.kind in ("embed", "resid_pre") and self.layers == (0,)

    @property
    def family(self) -> str:
        """Trials of one site block are corrected together."""
        return f"{self.kind} block {self.block}"

    def columns(self) -> dict[str, int | str | None]:
        """Where it acts, for tables."""
        return {
            "label": self.label,
            "site": self.kind,
            "layer": self.layer,
            "head": None if self.by_kv_head else self.head,
            "kv_head": self.head if self.by_kv_head else None,
            "neuron": self.neuron,
            "position": self.place.position,
            "span": self.place.span,
            "template": self.place.template,
            "block": self.block,
        }

    @property
    def label(self) -> str:
        """The trial in words: `z, layer 9, head 4, position 13`."""
        return "".join(
            (_layer_words(self.kind, self.layer, self.layers), _unit_words(self.kind, self.units), self.place.words)
        )


def _layer_words(kind: str, layer: int, layers: Sequence[int]) -> str:
    several = f"layers {layers[0]} to {layers[-1]}"
    return f"{kind}, {several if len(layers) > 1 else f'layer {layer}'}"


def _unit_words(kind: str, units: tuple[int, ...] | None) -> str:
    if units is None:
        return ""
    noun = "neuron" if kind in NEURON_KINDS else "head"
    return f", {noun}{'s' if len(units) > 1 else ''} {'+'.join(map(str, units))}"


@dataclass(frozen=True)
class Grid:
    """The trials of one block in one layer (or window of layers): every unit at every place, units outside."""

    block: int
    kind: str
    layer: int
    """The layer it is reported under."""
    layers: tuple[int, ...]
    units: tuple[tuple[int, ...] | None, ...]
    places: tuple[Place, ...]
    keys: Place | None

    def __len__(self) -> int:
        """How many trials there are."""
        return len(self.units) * len(self.places)

    def spec(self, at: int, index: int) -> TrialSpec:
        """One of the trials.

        Args:
            at: Its place in the grid.
            index: Its number in the run.
        """
        unit, place = divmod(at, len(self.places))
        return TrialSpec(
            index, self.block, self.kind, self.layer, self.layers, self.units[unit], self.places[place], self.keys
        )

    def labels(self) -> list[str]:
        """Every trial in words, as `TrialSpec.label` has it."""
        layer = _layer_words(self.kind, self.layer, self.layers)
        heads = [layer + _unit_words(self.kind, units) for units in self.units]
        places = [place.words for place in self.places]
        return [head + place for head in heads for place in places]
