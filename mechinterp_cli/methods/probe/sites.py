"""Where a probe reads: from site blocks of the config to sites, heads and views, checked before any forward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mechinterp_cli.engine.activations import View
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.methods.binder import Binder, KeyPath
from mechinterp_cli.methods.probe.site_options import Pool, ProbeSites
from mechinterp_cli.methods.specs import Place
from mechinterp_cli.models.kinds import HEAD_KINDS
from mechinterp_cli.tasks.prompts import PromptSet

TURNED = ("q", "k")
"""Taken after rotary embedding, which turns them by their position."""


@dataclass(frozen=True)
class Reading:
    """What one probe reads.

    Args:
        block: Number of the site block.
        site: Where.
        head: Which head, a key/value head for `k` and `v`; None for the whole site.
        view: At which tokens, of which examples.
        examples: Of every row of the view its example: a text, or a labelled word among all labelled words.
        position: The position, where it is one of all texts.
        span: The span, where it is one.
        template: The template that the position belongs to, where there are several.
    """

    block: int
    site: Site
    head: int | None
    view: View
    examples: tuple[int, ...]
    position: int | None = None
    span: str | None = None
    template: str | None = None

    @property
    def label(self) -> str:
        """In words: `z, layer 9, head 4, span target`."""
        head = "" if self.head is None else f", head {self.head}"
        return f"{self.site.kind}, layer {self.site.layer}{head}, {self.view.name}"


@dataclass(frozen=True)
class _At:
    """A view and what a reading says of it."""

    view: View
    examples: tuple[int, ...]
    position: int | None = None
    span: str | None = None
    template: str | None = None


def readings(binder: Binder, blocks: Sequence[ProbeSites]) -> tuple[Reading, ...]:
    """Every reading of the blocks, in the order block, layer, head, positions.

    Args:
        binder: Of the config, the model and the prompts; all of these have a label, or all have labelled words.
        blocks: The `sites` of the binder's section.

    Raises:
        UserError: A layer, head, position or span that is not there, or that does not fit the labels; or something that
            an earlier block reads already. Names the key.
    """
    out: dict[tuple[Site, int | None, str], Reading] = {}
    for number, block in enumerate(blocks):
        path: KeyPath = (binder.section, "sites", number)
        for reading in _of_block(binder, number, block, path):
            key = (reading.site, reading.head, reading.view.name)
            if key in out:
                earlier = f"{binder.section}.sites[{out[key].block}]"
                remedy = "Ask for everything once."
                raise binder.loaded.error(path, f"{reading.label} is read by {earlier} already", remedy)
            out[key] = reading
    return tuple(out.values())


def _of_block(binder: Binder, number: int, block: ProbeSites, path: KeyPath) -> Iterator[Reading]:
    places = list(_views(binder, block, path))
    _check_turned(binder, block, [at.view for at in places], path)
    for layer, _ in binder.layers((block.kind,), block.layers, path, block.kind):
        for head in _heads(binder, block, layer, path):
            for at in places:
                site = Site(block.kind, layer)
                yield Reading(number, site, head, at.view, at.examples, at.position, at.span, at.template)


def _heads(binder: Binder, block: ProbeSites, layer: int, path: KeyPath) -> Iterator[int | None]:
    if block.kind not in HEAD_KINDS:
        if block.heads is not None:
            problem, remedy = f"{block.kind} has no heads", f"Leave out heads for {block.kind}."
            raise binder.loaded.error((*path, "heads"), problem, remedy)
        yield None
        return
    for units in binder.units(block.kind, block.heads or "each", (layer,), path):
        yield None if units is None else units[0]


def _check_turned(binder: Binder, block: ProbeSites, views: Sequence[View], path: KeyPath) -> None:
    """Averages of what is turned by its position mean nothing."""
    if block.kind in TURNED and any(len(at) > 1 for view in views for at in view.positions):
        problem = f"{block.kind} is turned by its position where a model has rotary embeddings: it is not averaged"
        key = "positions" if block.positions == "mean" else "pool"
        raise binder.loaded.error((*path, key), problem, "Use `last`, one position, or `pool: last`.")


def _views(binder: Binder, block: ProbeSites, path: KeyPath) -> Iterator[_At]:
    prompts, path = binder.prompts, (*path, "positions")
    per_word = bool(prompts.prompts[0].words)
    positions = block.positions or ("word" if per_word else "last")
    if (positions == "word") != per_word:
        problem = "the labels stand at words" if per_word else "the texts have one label each, and no labelled words"
        raise binder.loaded.error(path, problem, f"Use positions: {'word' if per_word else 'last'}.")
    if positions == "word":
        yield _words(prompts, block.pool)
    elif positions == "mean":
        yield _texts("mean", [_all_but_bos(prompts, p.length) for p in prompts.prompts])
    elif positions in ("last", "each"):
        for place in binder.places(positions, path[:-1]):
            yield _placed(place, block.pool)
    else:
        for number, spot in enumerate(positions):
            yield _placed(binder.together([spot], (*path, number)), block.pool)


def _all_but_bos(prompts: PromptSet, length: int) -> tuple[int, ...]:
    """A beginning-of-sequence token is the same everywhere: in a mean it tells the length of the text."""
    return tuple(range(1 if prompts.add_bos and length > 1 else 0, length))


def _pooled(positions: tuple[int, ...], pool: Pool) -> tuple[int, ...]:
    return positions if pool == "mean" else positions[-1:]


def _words(prompts: PromptSet, pool: Pool) -> _At:
    """Every labelled word of every text, in turn."""
    words = [(number, word) for number, prompt in enumerate(prompts.prompts) for word in prompt.words]
    at = tuple(_pooled(word.positions, pool) for _, word in words)
    view = View("word" if pool == "last" else "mean of word", tuple(number for number, _ in words), at)
    return _At(view, tuple(range(len(words))))


def _texts(name: str, positions: Sequence[tuple[int, ...]]) -> _At:
    everyone = tuple(range(len(positions)))
    return _At(View(name, everyone, tuple(positions)), everyone)


def _placed(place: Place, pool: Pool) -> _At:
    """One place of every text, or of every text of a template."""
    kept = tuple((number, at) for number, at in enumerate(place.positions) if at is not None)
    examples = tuple(number for number, _ in kept)
    view = View(_name(place, pool), examples, tuple(_pooled(at, pool) for _, at in kept))
    return _At(view, examples, place.position, place.span, place.template)


def _name(place: Place, pool: Pool) -> str:
    if place.position is not None:
        return f"position {place.position}" + (f" of {place.template}" if place.template else "")
    if place.span == "end":
        return "last"
    return f"span {place.span}" if pool == "last" else f"mean of {place.span}"


def asked_of(found: Sequence[Reading]) -> dict[Site, list[View]]:
    """Which views are asked for at each site, each once."""
    asked: dict[Site, dict[str, View]] = {}
    for reading in found:
        asked.setdefault(reading.site, {})[reading.view.name] = reading.view
    return {site: list(views.values()) for site, views in asked.items()}
