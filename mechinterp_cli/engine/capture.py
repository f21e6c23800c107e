"""Passes over unedited streams before a sweep: logits, means and spreads of activations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.early import forward_until
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import kinds_by_layer, read_sites, visiting
from mechinterp_cli.models.anatomy import Anatomy, device_of
from mechinterp_cli.models.walk import first_tensor, forward

TOKENS_PER_PASS = 8192
LOSS_LOGITS_BYTES = 32 * 2**20
"""Logits that are held at once while losses are taken."""
UNEMBED_TOLERANCE = 1e-4
"""Of the logits' scale, float32: how well the last hidden state alone must give the model's own logits."""


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


@torch.no_grad()
def token_losses(model: nn.Module, anatomy: Anatomy, tokens: Tensor) -> Tensor:
    """Cross-entropy of every next token, [prompts, positions − 1], nats, float64 on the CPU.

    The logits of all positions are never held at once: the last layer's hidden states go through the model's own
    norm and head chunk by chunk. Where that does not give the model's own logits (tried on the first prompt),
    because the model looks back at earlier layers after the last one, whole passes are made instead.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        tokens: Ids [prompts, positions] of one length.
    """
    if tokens.shape[1] < 2 or not len(tokens):
        return torch.zeros(len(tokens), max(0, tokens.shape[1] - 1), dtype=torch.float64)
    if not last_hidden_suffices(model, anatomy, tokens[:1]):
        step = max(1, LOSS_LOGITS_BYTES // (tokens.shape[1] * anatomy.vocab_size * 4))
        logits = ((forward(model, part.to(device_of(model))), part) for part in torch.split(tokens, step))
        return torch.cat([_losses(seen[:, :-1].flatten(0, 1), part) for seen, part in logits])
    step = max(1, TOKENS_PER_PASS // tokens.shape[1])
    return torch.cat([_chunked_losses(model, anatomy, part) for part in torch.split(tokens, step)])


def _chunked_losses(model: nn.Module, anatomy: Anatomy, tokens: Tensor) -> Tensor:
    """Losses from the last hidden states, a few rows of logits at a time."""
    hidden = last_hidden(model, anatomy, tokens)[:, :-1].flatten(0, 1)
    rows = max(1, LOSS_LOGITS_BYTES // (anatomy.vocab_size * 4))
    walker, following = anatomy.walker(model), tokens[:, 1:].flatten()
    parts = zip(torch.split(hidden, rows), torch.split(following, rows), strict=True)
    losses = [_cross_entropy(walker.unembed(states), wanted) for states, wanted in parts]
    return torch.cat(losses).view(len(tokens), -1)


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    return _cross_entropy(logits, tokens[:, 1:].flatten()).view(len(tokens), -1)


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    losses = torch.nn.functional.cross_entropy(logits.float(), wanted.to(logits.device), reduction="none")
    return losses.cpu().double()


@torch.no_grad()
def last_hidden_suffices(model: nn.Module, anatomy: Anatomy, tokens: Tensor) -> bool:
    """Whether what leaves the last layer, through the model's norm and head, gives the model's own logits.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        tokens: Ids [prompts, positions] that it is tried on, at the last position.
    """
    native = forward(model, tokens.to(device_of(model)), last_only=True)[:, -1].float()
    own = anatomy.walker(model).unembed(last_hidden(model, anatomy, tokens)[:, -1]).float()
    eps = torch.finfo(next(model.parameters()).dtype).eps
    return bool((own - native).abs().max() <= max(UNEMBED_TOLERANCE, 3 * eps) * native.abs().max())


def last_hidden(model: nn.Module, anatomy: Anatomy, tokens: Tensor) -> Tensor:
    """What leaves the last layer, [prompts, positions, d_model]; the pass ends there."""
    seen: list[Tensor] = []

    def keep(output: Any) -> bool:
        seen.append(first_tensor(output))
        return True

    forward_until(model, tokens, model.get_submodule(anatomy.layers[-1].module), keep)
    return seen[0]


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


def stream_means(model: nn.Module, anatomy: Anatomy, sites: set[Site], tokens: Sequence[Tensor]) -> dict[Site, Tensor]:
    """Mean activation [*features] of each site over all prompts and positions, summed in float64.

    Args:
        model: The model.
        anatomy: Its anatomy.
        sites: Where.
        tokens: By bucket, ids [prompts, positions].
    """
    passes = [part for batch in tokens for part in torch.split(batch, max(1, TOKENS_PER_PASS // batch.shape[1]))]
    found = group_moments(model, anatomy, sites, passes, [[0] * len(part) for part in passes])
    return {site: moments.mean[0] for site, moments in found.items()}


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and standard deviation of a site's activations over all positions, by group of prompts.

    Args:
        mean: [groups, *features].
        spread: Of each feature over prompts and positions of the group (divided by their number), as `mean`.
    """

    mean: Tensor
    spread: Tensor


@torch.no_grad()
def group_moments(
    model: nn.Module,
    anatomy: Anatomy,
    sites: set[Site],
    tokens: Sequence[Tensor],
    groups: Sequence[Sequence[int]],
) -> dict[Site, Moments]:
    """Moments over all positions of the prompts of each group, in float64.

    Args:
        model: The model.
        anatomy: Its anatomy.
        sites: Where; not `scores` or `pattern`.
        tokens: By batch, ids [prompts, positions]; a batch is one pass.
        groups: By batch, the group of each prompt; no group up to the largest is empty.
    """
    found: dict[Site, _Sums] = {}
    size = 1 + max(group for batch in groups for group in batch)
    for batch, group_of in zip(tokens, groups, strict=True):
        chosen = torch.tensor(group_of)

        def visit(site: Site, activation: Tensor, group: Tensor = chosen) -> None:
            seen = activation.detach().double()
            if site not in found:
                found[site] = _Sums.at(seen, size)
            found[site].add(seen, group.to(seen.device))

        with visiting(model, anatomy, kinds_by_layer(sites), visit):
            forward(model, batch.to(device_of(model)), last_only=True)
    return {site: sums.moments() for site, sums in found.items()}


@dataclass(frozen=True, eq=False)
class _Sums:
    """Running sums by group of the distances from one point and of their squares."""

    point: Tensor
    total: Tensor
    squares: Tensor
    count: Tensor

    @classmethod
    def at(cls, seen: Tensor, groups: int) -> "_Sums":
        # Squares of numbers far from zero would leave no digits for their variance: distances from a mean have them.
        zeros = seen.new_zeros(groups, *seen.shape[2:])
        return cls(seen.mean((0, 1)), zeros, zeros.clone(), seen.new_zeros(groups))

    def add(self, seen: Tensor, group: Tensor) -> None:
        away = seen - self.point
        self.total.index_add_(0, group, away.sum(1))
        self.squares.index_add_(0, group, away.square().sum(1))
        self.count.index_add_(0, group, self.count.new_full((len(seen),), seen.shape[1]))

    def moments(self) -> Moments:
        count = self.count.view(-1, *[1] * (self.total.ndim - 1))
        mean = self.total / count
        spread = (self.squares / count - mean.square()).clamp(min=0).sqrt()
        return Moments((mean + self.point).float().cpu(), spread.float().cpu())
