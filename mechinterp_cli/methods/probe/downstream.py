"""Does what was erased come back? Later activations under the erasing edit, and what probes there read of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.under_edits import activations_under
from mechinterp_cli.methods.measure import split_members
from mechinterp_cli.methods.probe.causal_options import Intervention
from mechinterp_cli.methods.probe.interventions import PROBE, Changes, ProbedSite
from mechinterp_cli.methods.specs import Place
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.tasks.prompts import PromptSet

Score = Callable[[Site, Float[Tensor, "samples features"]], float]
"""What a fitted probe's score is at a site on some activations, of the prompts in their order."""


@dataclass(frozen=True, eq=False)
class Captured:
    """Activations of later sites, with and without an erasure.

    Args:
        before: Site to [samples, features], prompt by prompt, position by position.
        after: The same under the edit.
    """

    before: Mapping[Site, Tensor]
    after: Mapping[Site, Tensor]


def captured_under(
    model: LoadedModel,
    prompts: PromptSet,
    erased: ProbedSite,
    place: Place,
    later: Iterable[Site],
    *,
    intervention: Intervention = "erase",
    read: Place | None = None,
) -> Captured:
    """Activations of some sites while a probe's subspace is erased, and while it is not.

    Args:
        model: The model.
        prompts: The prompts.
        erased: Where it is erased, and what.
        place: At which positions.
        later: The sites that are read, whole (all heads).
        intervention: `erase` or `leace`.
        read: Positions that are read; those that are erased where None.
    """
    sites = set(later)
    change = Changes(erased).of(intervention, PROBE)
    rows: tuple[dict[int, dict[Site, Tensor]], dict[int, dict[Site, Tensor]]] = ({}, {})
    for members in split_members(prompts):
        tokens = torch.tensor([prompts.prompts[i].clean_tokens for i in members])
        edits = erased.edits(change, tuple(place.positions[i] or () for i in members))
        for found, done in zip(rows, ((), edits), strict=True):
            seen = activations_under(model.model, model.anatomy, tokens, done, sites)
            for row, i in enumerate(members):
                at = list((read or place).positions[i] or ())
                found[i] = {site: x[row, at].flatten(1) for site, x in seen.items()}
    before, after = (_joined(found, sites) for found in rows)
    return Captured(before, after)


def _joined(rows: Mapping[int, Mapping[Site, Tensor]], sites: Iterable[Site]) -> dict[Site, Tensor]:
    return {site: torch.cat([rows[i][site] for i in sorted(rows)]) for site in sites}


def downstream_rows(
    erased: ProbedSite, captured: Captured, score: Score, chance: Mapping[Site, float] | None = None
) -> list[dict[str, Any]]:
    """One row per later site: what its probe reads before and after the erasure.

    Args:
        erased: Where it is erased.
        captured: From `captured_under`.
        score: Of the probe that was fitted at a site on unedited activations of other prompts.
        chance: What a score is held against, by site.
    """
    rows = []
    for site in _in_order(captured.before):
        scores = {"score_before": score(site, captured.before[site]), "score_after": score(site, captured.after[site])}
        where = {
            "probe": erased.name,
            "erased_site": erased.kind,
            "erased_layer": erased.layer,
            "erased_head": erased.unit,
        }
        rows.append(where | {"site": site.kind, "layer": site.layer, **scores, "chance": (chance or {}).get(site)})
    return rows


def _in_order(sites: Iterable[Site]) -> Sequence[Site]:
    return sorted(sites, key=lambda site: (site.layer, site.kind))
