"""Passes over unedited streams before a sweep: logits, means and spreads of activations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import kinds_by_layer, read_sites, visiting
from mechinterp_cli.models.anatomy import Anatomy, device_of
from mechinterp_cli.models.walk import forward

TOKENS_PER_PASS = 8192


@torch.no_grad()
def last_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [prompts, vocab] at the last position, on the CPU in float32.

    Args:
        model: The model.
        tokens: Ids [prompts, positions] of one length.
    """
    step = max(1, TOKENS_PER_PASS // tokens.shape[1])
    parts = [
        forward(model, part.to(device_of(model)), last_only=True)[:, -1].float().cpu()
        for part in torch.split(tokens, step)
    ]
    return torch.cat(parts)


@torch.no_grad()
def embeddings(model: nn.Module, anatomy: Anatomy, tokens: Tensor) -> Tensor:
    """What enters layer 0, [prompts, positions, d_model]."""
    site = Site("embed", 0)
    return read_sites(model, anatomy, {site}, lambda: forward(model, tokens.to(device_of(model)), last_only=True))[site]


@dataclass(frozen=True, eq=False)
class Means:
    """Mean activations of a stream by site, separately for each group of prompts.

    Args:
        by_site: Site to means [groups, positions, *features]; positions past a group's length hold zeros.
        group_of: Prompt index to its group.
    """

    by_site: Mapping[Site, Tensor]
    group_of: Sequence[int]

    def at(self, site: Site, members: Sequence[int]) -> Tensor:
        """Means [prompts or 1, positions, *features] for some prompts of the set."""
        groups = [self.group_of[i] for i in members]
        return self.by_site[site][groups[:1] if len(set(groups)) == 1 else groups]


@torch.no_grad()
def group_means(
    model: nn.Module,
    anatomy: Anatomy,
    sites: set[Site],
    tokens: Sequence[Tensor],
    members: Sequence[Sequence[int]],
    group_of: Sequence[int],
) -> Means:
    """Means over the prompts of each group, position by position, in float64.

    Args:
        model: The model.
        anatomy: Its anatomy.
        sites: Where.
        tokens: By bucket, ids [prompts, positions].
        members: By bucket, the index of each prompt in the set.
        group_of: For every prompt of the set its group; a group's prompts have one length.
    """
    groups = max(group_of) + 1
    longest = max(batch.shape[1] for batch in tokens)
    sums: dict[Site, Tensor] = {}
    for batch, indices in zip(tokens, members, strict=True):
        group = torch.tensor([group_of[i] for i in indices])

        def visit(site: Site, activation: Tensor, group: Tensor = group) -> None:
            seen = activation.detach().double().cpu()
            if site.kind in ("scores", "pattern"):
                seen = torch.nn.functional.pad(seen, (0, longest - seen.shape[-1]))
            if site not in sums:
                sums[site] = torch.zeros(groups, longest, *seen.shape[2:], dtype=torch.float64)
            sums[site][:, : seen.shape[1]].index_add_(0, group, seen)

        with visiting(model, anatomy, kinds_by_layer(sites), visit):
            forward(model, batch.to(device_of(model)), last_only=True)
    counts = torch.bincount(torch.tensor(list(group_of)), minlength=groups).double()
    return Means(
        {site: (total / counts.view(-1, *[1] * (total.ndim - 1))).float() for site, total in sums.items()}, group_of
    )
