"""Patching along directions of a file: the rest of the activation stays as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.engine.edits import Edit, Site, Trial
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.binder import KeyPath
from mechinterp_cli.methods.directions import joined, read_directions
from mechinterp_cli.methods.patch.options import PatchBlock, PatchOptions
from mechinterp_cli.methods.places import LayerWindow
from mechinterp_cli.methods.specs import TrialSpec
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.kinds import RESIDUAL_KINDS

Subspaces = Mapping[int, Mapping[Site, Tensor]]
"""By the number of a block, orthonormal rows [directions, d_model] of each of its sites."""


def read_subspaces(loaded: LoadedConfig, options: PatchOptions, anatomy: Anatomy) -> Subspaces:
    """The directions of every block that names a file.

    Args:
        loaded: The config.
        options: The section.
        anatomy: The model.

    Raises:
        UserError: A file that cannot be read, or has no direction of the block's kind or layers; a block that is not of
            the residual stream; or a source that is no prompt. Names the key.
    """
    found: dict[int, Mapping[Site, Tensor]] = {}
    for number, block in enumerate(options.sites):
        if isinstance(block, PatchBlock) and block.directions is not None:
            found[number] = _of_block(loaded, options, block, ("patch", "sites", number), anatomy)
    return found


def _of_block(
    loaded: LoadedConfig, options: PatchOptions, block: PatchBlock, path: KeyPath, anatomy: Anatomy
) -> Mapping[Site, Tensor]:
    key = (*path, "directions")
    if block.kind not in RESIDUAL_KINDS:
        raise loaded.error(key, f"{block.kind} is no residual stream", f"Use {', '.join(RESIDUAL_KINDS)}.")
    if options.source not in ("pair", "other"):
        problem = f"what is put along directions comes from a prompt, and source is {options.source}"
        raise loaded.error(key, problem, "Use source: pair or other.")
    assert block.directions is not None
    try:
        read = read_directions(block.directions, anatomy)
    except UserError as error:
        raise loaded.error(key, error.cause, error.remedy) from error
    layers = sorted({one.layer for one in read if one.site == block.kind})
    if not layers:
        names = ", ".join(one.name for one in read)
        raise loaded.error(key, f"the file has no direction of {block.kind}", f"It holds {names}.")
    _check_layers(loaded, block, layers, path)
    return {
        Site(block.kind, layer): joined([one.basis for one in read if (one.site, one.layer) == (block.kind, layer)])
        for layer in layers
    }


def _check_layers(loaded: LoadedConfig, block: PatchBlock, layers: Sequence[int], path: KeyPath) -> None:
    remedy = f"Layers with directions: {', '.join(map(str, layers))}."
    if isinstance(block.layers, LayerWindow):
        raise loaded.error((*path, "layers"), "directions have no window: they are of one layer each", remedy)
    if block.layers != "all":
        for place, layer in enumerate(block.layers):
            if layer not in layers:
                problem = f"{layer}: the file has no direction of this layer"
                raise loaded.error((*path, "layers", place), problem, remedy)


def of_the_file(options: PatchOptions, found: Subspaces) -> PatchOptions:
    """The section, with `layers: all` of blocks with directions as the layers of their files."""
    blocks = list(options.sites)
    for number, bases in found.items():
        block = blocks[number]
        if isinstance(block, PatchBlock) and block.layers == "all":
            blocks[number] = block.model_copy(update={"layers": tuple(site.layer for site in bases)})
    return options.model_copy(update={"sites": tuple(blocks)})


def along(trials: Sequence[Trial], specs: Sequence[TrialSpec], found: Subspaces) -> tuple[Trial, ...]:
    """The trials, where their blocks have directions only along them.

    Args:
        trials: That put whole activations in place; a trial's `index` is its spec's.
        specs: What they are.
        found: The directions.
    """
    return tuple(
        replace(trial, edits=tuple(_swap(edit, found[block]) for edit in trial.edits))
        if (block := specs[trial.index].block) in found
        else trial
        for trial in trials
    )


def _swap(edit: Edit, bases: Mapping[Site, Tensor]) -> Edit:
    return replace(edit, op="swap", values=bases[edit.site])
