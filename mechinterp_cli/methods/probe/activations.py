"""The activations that probes read: gathered in one pass for all of them, kept on disk where memory does not hold them.

A file of the cache holds one site. Its name is a hash of everything that its numbers depend on: the model's weights,
config and type, the tokens of every prompt, the site, and which tokens stand for which example.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mechinterp_cli.engine.activations import Asked, Key, gather, row_shapes, views_by_name
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.methods.probe.options import CacheUse
from mechinterp_cli.models.fingerprint import fingerprint
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.runs import array_files
from mechinterp_cli.runs.array_files import ArrayFile
from mechinterp_cli.runs.cache import activations_folder
from mechinterp_cli.runs.reserved import NoRoomError, reserved

_VERSION = 1
"""Of what a site's numbers mean: another one makes other names."""


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of every site and view that was asked for.

    Args:
        rows: Float32 [examples, features] or [examples, heads, size]; on the CPU, some perhaps mapped from files.
        computed: Sites that were computed.
        reused: Sites that an earlier run had kept.
        folder: Where files are, if any are used.
    """

    rows: Mapping[Key, Tensor]
    computed: frozenset[Site] = frozenset()
    reused: frozenset[Site] = frozenset()
    folder: Path | None = None

    def at(self, site: Site, head: int | None, view: str) -> Tensor:
        """Float32 [examples, features] of one head, or of the whole site with its heads side by side.

        Args:
            site: Where.
            head: Which head (a key/value head for `k` and `v`); None for all.
            view: The view's name.
        """
        rows = self.rows[site, view]
        return rows.flatten(1) if head is None else rows[:, head]


@dataclass(frozen=True)
class Keeping:
    """How activations are kept.

    Args:
        use: `auto`: in files only where they are larger than the budget; `always`; `never`.
        budget: Bytes of memory that they may take.
    """

    use: CacheUse = "auto"
    budget: int = 2**30


@dataclass(frozen=True)
class Source:
    """What activations are taken of.

    Args:
        model: The model, or its random twin.
        tokens: Ids of every prompt.
        asked: Where, and of which tokens.
        finite: Whether NaN and infinity are an error when activations are computed.
        tick: As in `engine.activations.gather`.
    """

    model: LoadedModel
    tokens: tuple[tuple[int, ...], ...]
    asked: Asked
    finite: bool = True
    tick: Callable[[int, int], None] = lambda done, total: None

    @property
    def bytes(self) -> int:
        """What all of it takes."""
        shapes = row_shapes(self.model.anatomy, self.asked).values()
        return sum(array_files.BYTES * math.prod(shape) for shape in shapes)

    def at(self, sites: Iterable[Site]) -> "Source":
        """The same at some of the sites."""
        return replace(self, asked={site: self.asked[site] for site in sites})

    def gather(self, into: Mapping[Key, Tensor] | None = None) -> Mapping[Key, Tensor]:
        """One pass, into memory or into these tensors."""
        model = self.model
        return gather(
            model.model, model.anatomy, self.tokens, self.asked, into=into, finite=self.finite, tick=self.tick
        )

    def files(self) -> dict[Site, ArrayFile] | None:
        """The file of each site; None where nobody knows what the model's weights are."""
        known = fingerprint(self.model)
        if known is None:
            return None
        key = _hash({**known, "tokens": self.tokens, "finite": self.finite, "version": _VERSION})
        views = {name: _hash([view.prompts, view.positions]) for name, view in views_by_name(self.asked).items()}
        return {site: self._file(key, site, views) for site in self.asked}

    def _file(self, key: str, site: Site, hashes: Mapping[str, str]) -> ArrayFile:
        shapes = row_shapes(self.model.anatomy, {site: self.asked[site]})
        views = [[name, hashes[name]] for _, name in shapes]
        name = _hash([key, site.kind, site.layer, self.model.anatomy.layers[site.layer].module, views])
        return ArrayFile(name, {view: shape for (_, view), shape in shapes.items()})


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def activations(source: Source, keeping: Keeping, *, say: Callable[[str], None] = lambda text: None) -> Activations:
    """The activations that are asked for: from files of earlier runs, and the rest from one pass over the prompts.

    Args:
        source: What they are taken of.
        keeping: Whether files are read and written.
        say: Told of files that are not what they must be, and of those that cannot be written.

    Raises:
        RunError: NaN or infinity; or what is larger than the budget cannot be written to the cache.
    """
    large = source.bytes > keeping.budget
    files = source.files() if keeping.use == "always" or (keeping.use == "auto" and large) else None
    if files is None:
        return Activations(source.gather(), computed=frozenset(source.asked))
    kept = _kept(files, say)
    missing = source.at(site for site in source.asked if site not in kept)
    rows = {(site, name): x for site in kept for name, x in _mapped(_path(files[site]), files[site]).items()}
    if missing.asked:
        rows |= _computed(missing, files, large, say)
    return Activations(rows, frozenset(missing.asked), kept, activations_folder())


def _path(file: ArrayFile) -> Path:
    return activations_folder() / f"{file.name}.safetensors"


def _kept(files: Mapping[Site, ArrayFile], say: Callable[[str], None]) -> frozenset[Site]:
    """The sites whose files are there and whole."""
    there = {site: file for site, file in files.items() if _path(file).exists()}
    kept = frozenset(site for site, file in there.items() if file.is_intact(_path(file)))
    for site in there.keys() - kept:
        at = f"{site.kind} of layer {site.layer}"
        say(f"{_path(files[site])} is damaged, or another file under its name: {at} is computed again")
    return kept


def _computed(
    source: Source, files: Mapping[Site, ArrayFile], large: bool, say: Callable[[str], None]
) -> Mapping[Key, Tensor]:
    """Compute into files; into memory where there can be none and it fits."""
    try:
        _write(source, files)
    except NoRoomError as error:
        if large:
            raise
        say(f"{error.cause}: activations are not kept for later runs")
        return source.gather()
    return {(site, name): x for site in source.asked for name, x in _mapped(_path(files[site]), files[site]).items()}


def _write(source: Source, files: Mapping[Site, ArrayFile]) -> None:
    """One pass whose rows go straight into the files, which appear when all of it is done."""
    with ExitStack() as stack:
        made = {site: stack.enter_context(reserved(_path(files[site]), files[site].size)) for site in source.asked}
        source.gather(
            {(site, name): x for site in made for name, x in _mapped(made[site], files[site], shared=True).items()}
        )
        for site, path in made.items():
            files[site].seal(path)


def _mapped(path: Path, file: ArrayFile, *, shared: bool = False) -> dict[str, Tensor]:
    """A file's arrays, mapped and not read; what is written to them reaches the file only if it is shared."""
    total = file.size // array_files.BYTES
    flat = torch.from_file(str(path), shared=shared, size=total)[file.start // array_files.BYTES :]
    parts = torch.split(flat, [math.prod(shape) for shape in file.shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(file.shapes.items(), parts, strict=True)}
