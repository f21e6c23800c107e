"""Means and spreads of activations over a set of prompts, computed once and kept by content.

A file of the cache holds one site. Its name is a hash of everything that its numbers depend on: the model's weights,
config and type, the tokens of every prompt, how they are grouped, whether positions are kept apart, and the site.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mechinterp_cli.engine.activations import feature_shape
from mechinterp_cli.engine.capture import TOKENS_PER_PASS, Moments, group_means, group_moments
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.checksum import sha256_of_tensors
from mechinterp_cli.models.fingerprint import fingerprint
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.runs.cache import activations_folder, keep, read_kept

CHECKSUM = "sha256"
"""Name of the tensor that holds the checksum of the others: safetensors has none of its own."""


@dataclass(frozen=True)
class Sample:
    """What is averaged over.

    Args:
        tokens: Ids of every prompt.
        groups: Of every prompt the group that it is averaged with, from 0 on.
        by_position: Whether each position has its own mean; the prompts of a group then have one length.
    """

    tokens: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    by_position: bool = False

    def batches(self) -> list[list[int]]:
        """Indices of the prompts of each pass: one exact length. They depend on nothing but the sample."""
        out = []
        for length in sorted({len(tokens) for tokens in self.tokens}):
            members = [i for i, tokens in enumerate(self.tokens) if len(tokens) == length]
            step = max(1, TOKENS_PER_PASS // length)
            out += [members[i : i + step] for i in range(0, len(members), step)]
        return out


@dataclass(frozen=True, eq=False)
class Average:
    """Of one site.

    Args:
        mean: [groups, positions or 1, *features]; zeros past the end of a group's prompts.
        spread: Standard deviation of each feature, as `mean`; zeros where positions are kept apart.
    """

    mean: Tensor
    spread: Tensor


def averages(model: LoadedModel, sites: set[Site], sample: Sample, *, compute: bool = True) -> dict[Site, Average]:
    """Means and spreads of activations, from the cache where an earlier run has left them.

    Args:
        model: The model.
        sites: Where; not `scores` or `pattern`.
        sample: Over what.
        compute: Without it everything is zero: for `--dry-run`.
    """
    if not compute:
        return {site: _zeros(model.anatomy, site, sample) for site in sites}
    found, missing = {}, set()
    known = fingerprint(model)
    key = None if known is None else _key(known, sample)
    for site in sorted(sites):
        kept = None if key is None else _read(key, site, _zeros(model.anatomy, site, sample))
        if kept is None:
            missing.add(site)
        else:
            found[site] = kept
    computed = _compute(model, missing, sample) if missing else {}
    if key is not None:
        for site, average in computed.items():
            _write(key, site, average)
    return found | computed


def _zeros(anatomy: Anatomy, site: Site, sample: Sample) -> Average:
    positions = max(map(len, sample.tokens)) if sample.by_position else 1
    zeros = torch.zeros(max(sample.groups) + 1, positions, *feature_shape(anatomy, site))
    return Average(zeros, zeros)


def _compute(model: LoadedModel, sites: set[Site], sample: Sample) -> dict[Site, Average]:
    """One pass over the prompts for all sites."""
    batches = sample.batches()
    tokens = [torch.tensor([sample.tokens[i] for i in batch]) for batch in batches]
    if sample.by_position:
        means = group_means(model.model, model.anatomy, sites, tokens, batches, sample.groups)
        return {site: Average(mean, torch.zeros_like(mean)) for site, mean in means.by_site.items()}
    groups = [[sample.groups[i] for i in batch] for batch in batches]
    seen = group_moments(model.model, model.anatomy, sites, tokens, groups)
    return {site: _with_position(moments) for site, moments in seen.items()}


def _with_position(moments: Moments) -> Average:
    return Average(moments.mean[:, None], moments.spread[:, None])


def _key(known: Mapping[str, Any], sample: Sample) -> str:
    """Hash of everything that the numbers depend on but the site."""
    content = {
        **known,
        "tokens": sample.tokens,
        "groups": sample.groups,
        "by_position": sample.by_position,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _name(key: str, site: Site) -> str:
    return hashlib.sha256(f"{key} {site.kind}.{site.layer}".encode()).hexdigest()


def _write(key: str, site: Site, average: Average) -> None:
    name = _name(key, site)
    tensors = {"mean": average.mean.contiguous(), "spread": average.spread.contiguous()}
    data = save(tensors | {CHECKSUM: _checksum(name, tensors)})
    keep(activations_folder() / f"{name}.safetensors", data)


def _read(key: str, site: Site, like: Average) -> Average | None:
    """What was kept of a site; None where there is nothing, or not what must be there."""
    name = _name(key, site)
    data = read_kept(activations_folder() / f"{name}.safetensors")
    if data is None:
        return None
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError):
        return None
    checksum = tensors.pop(CHECKSUM, torch.empty(0))
    if set(tensors) != {"mean", "spread"} or not torch.equal(checksum, _checksum(name, tensors)):
        return None
    found = Average(tensors["mean"], tensors["spread"])
    shapes = {found.mean.shape, found.spread.shape}
    return found if shapes == {like.mean.shape} else None


def _checksum(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Bytes of a hash of the file's name and its tensors."""
    content = f"{name} {sha256_of_tensors(tensors)}".encode()
    return torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)


def tokens_of(sequences: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Token ids as a sample holds them."""
    return tuple(tuple(map(int, tokens)) for tokens in sequences)
