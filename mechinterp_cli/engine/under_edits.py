"""Activations while edits are made: what is left of them in later layers."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.capture import TOKENS_PER_PASS
from mechinterp_cli.engine.early import forward_until
from mechinterp_cli.engine.edits import Edit, RowValues, Site, edited
from mechinterp_cli.engine.hooks import all_rows
from mechinterp_cli.engine.instrument import kinds_by_layer, visiting
from mechinterp_cli.models.anatomy import Anatomy


@torch.no_grad()
def activations_under(
    model: nn.Module, anatomy: Anatomy, tokens: Tensor, edits: Sequence[Edit], sites: set[Site]
) -> dict[Site, Tensor]:
    """Activations [prompts, positions, *features] of some sites under edits, float32 on the CPU.

    A site that is edited is read after its edits. The pass ends after the last layer that is edited or read.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        tokens: Ids [prompts, positions] of one length.
        edits: What is done, in order; none that reads another stream.
        sites: Where activations are read.
    """
    assert all(edit.reads is None for edit in edits)
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    wanted = kinds_by_layer(sites | {edit.site for edit in edits})
    last = model.get_submodule(anatomy.layers[max(wanted)].module)
    step = max(1, TOKENS_PER_PASS // tokens.shape[1])
    for start in range(0, len(tokens), step):
        prompts = range(start, min(len(tokens), start + step))
        visitor = _Editor([_of(edit, prompts) for edit in edits], seen)
        with visiting(model, anatomy, wanted, visitor):
            forward_until(model, tokens[prompts.start : prompts.stop], last, lambda _output: True)
    return {site: torch.cat(parts) for site, parts in seen.items()}


class _Editor:
    """A visitor that makes edits and then keeps what is wanted."""

    def __init__(self, edits: Sequence[Edit], seen: dict[Site, list[Tensor]]) -> None:
        self.edits = edits
        self.seen = seen

    def __call__(self, site: Site, activation: Tensor) -> Tensor:
        flat = activation.reshape(-1, *activation.shape[2:]).clone()
        for edit in (edit for edit in self.edits if edit.site == site):
            edited(flat, edit, all_rows(edit, activation.shape[1], flat.device), {})
        new = flat.view(activation.shape)
        if site in self.seen:
            self.seen[site].append(new.detach().float().cpu().clone())
        return new


def _of(edit: Edit, prompts: range) -> Edit:
    """An edit on some of its prompts, those of one pass."""
    if len(prompts) == len(edit.positions):
        return edit
    part = slice(prompts.start, prompts.stop)
    keys = None if edit.keys is None else edit.keys[part]
    values = edit.values
    if edit.op in ("constant", "add") and isinstance(values, Tensor) and values.shape[0] > 1:
        values = values[part]
    elif isinstance(values, RowValues):
        values = values.of(prompts)
    return replace(edit, positions=edit.positions[part], keys=keys, values=values)
