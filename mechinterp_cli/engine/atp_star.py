"""AtP* (2403.00745): attribution patching where attention saturates, and where effects cancel.

Q-fix and K-fix put the real change of the attention pattern in place of its first-order change: the softmax is
computed again with the source's query, or with one key's logit replaced, and the change of the probabilities is
multiplied by ∂M/∂pattern. GradDrop finds nodes whose ways to the metric cancel: for each layer in turn its attention
and its MLP are left out of the backward pass, and the sizes of the estimates are averaged.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mechinterp_cli.engine.atp import Estimates, Inquiry, Tally, contribution, difference
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import Graph, Pass, check_sites, graph
from mechinterp_cli.engine.softmax_fix import Attention, noting
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy

STREAM_KINDS = ("embed", "resid_pre", "resid_mid", "resid_post")
"""Nodes between layers and sublayers: no layer's omission cuts them off."""
FIXED_KINDS = ("q", "k")


def atp_star(asked: Inquiry, *, drop_attention: bool = False) -> Estimates:
    """Q-fix for `q`, K-fix for `k`, GradDrop for all other nodes.

    Estimates of `q` and `k` have a sign, as those of `atp`. GradDrop's are sizes: 1/(L − 1) Σ_ℓ |estimate without layer
    ℓ| for nodes inside layers, whose own layer's omission gives 0, and the mean over all L layers for residual streams.
    It costs L backward passes per metric.

    Args:
        asked: What is asked.
        drop_attention: Whether `q` and `k` get GradDrop too, as the paper has it; then they are sizes as well.

    Raises:
        UserError: A layer lacks a site or what these methods need, or nothing can be differentiated there.
        RunError: An estimate is not finite.
    """
    check_sites(asked.anatomy, asked.sites)
    fixed = frozenset(site for site in asked.sites if site.kind in FIXED_KINDS)
    signed = frozenset() if drop_attention else fixed
    rounds = _rounds(asked.anatomy, signed, asked.sites - signed)
    watched = (asked.sites - fixed).union(_patterns(asked.anatomy, fixed), *(some.silenced for some in rounds))

    def answer(prompts: Pass) -> Estimates:
        attention: dict[int, Attention] = {}
        nodes = _Nodes(asked.sites, asked.sources(prompts.prompts, asked.sites), attention)
        inside = partial(noting, asked.model, asked.anatomy, {site.layer for site in fixed}, attention)
        with graph(
            asked.model,
            asked.anatomy,
            prompts,
            asked.metric,
            watched,
            inside=inside,
            checkpointing=asked.batching.checkpointing,
        ) as found:
            estimates = _summed(found, rounds, nodes).estimates(found.values.detach())
        asked.tick(len(prompts.tokens))
        return estimates

    return asked.answered(answer)


@dataclass(frozen=True)
class _Round:
    """One backward pass per metric.

    Args:
        silenced: What is left out of it.
        nodes: Whose estimates are taken from it.
        weights: Node to what its size is multiplied with; None: the estimates themselves, with their signs.
    """

    silenced: frozenset[Site]
    nodes: frozenset[Site]
    weights: Mapping[Site, float] | None


def check_layers(anatomy: Anatomy, sites: Collection[Site]) -> None:
    """Refuse nodes for which layers lack what these methods need.

    Raises:
        UserError: Names the layer, and why.
    """
    fixed = frozenset(site for site in sites if site.kind in FIXED_KINDS)
    _patterns(anatomy, fixed)
    _rounds(anatomy, fixed, frozenset(sites) - fixed)


def _rounds(anatomy: Anatomy, signed: frozenset[Site], dropped: frozenset[Site]) -> list[_Round]:
    """The backward passes: a whole one for signed estimates, then one without each layer.

    Layers below all nodes have no say in their gradients: one whole pass stands for all of these.
    """
    rounds = [_Round(frozenset(), signed, None)] if signed else []
    if not dropped:
        return rounds
    share = {site: 1.0 / _layers_that_count(anatomy, site) for site in dropped}
    lowest = min(site.layer for site in dropped)
    if lowest > 0:
        rounds.append(_Round(frozenset(), dropped, {site: lowest * part for site, part in share.items()}))
    rounds.extend(_Round(_added_by(anatomy, layer), dropped, share) for layer in range(lowest, anatomy.n_layers))
    return rounds


def _layers_that_count(anatomy: Anatomy, site: Site) -> int:
    """How many layers can be left out without cutting the node off.

    Raises:
        UserError: None.
    """
    count = anatomy.n_layers - (site.kind not in STREAM_KINDS)
    if not count:
        raise UserError(
            f"atp_star: GradDrop at {site.kind} leaves out other layers, and this model has one layer",
            "Use atp.",
        )
    return count


def _added_by(anatomy: Anatomy, layer: int) -> frozenset[Site]:
    """What a layer adds to the residual stream.

    Raises:
        UserError: It is not known.
    """
    for kind in ("attn_out", "mlp_out"):
        reason = anatomy.layers[layer].missing.get(kind)
        if reason is not None:
            others = ", or sites q and k alone" if any("pattern" in one.sites for one in anatomy.layers) else ""
            raise UserError(
                f"atp_star: GradDrop leaves out what layer {layer} adds, and it has no {kind}: {reason}",
                f"Use atp{others}.",
            )
    return frozenset({Site("attn_out", layer), Site("mlp_out", layer)})


def _patterns(anatomy: Anatomy, fixed: Collection[Site]) -> frozenset[Site]:
    """The patterns that queries and keys act through.

    Raises:
        UserError: A layer has none.
    """
    for site in sorted(fixed):
        reason = anatomy.layers[site.layer].missing.get("pattern")
        if reason is not None:
            raise UserError(
                f"atp_star: layer {site.layer} has no pattern, which {site.kind} needs: {reason}",
                "Use atp, or other sites.",
            )
    return frozenset(Site("pattern", site.layer) for site in fixed)


@dataclass(frozen=True, eq=False)
class _Nodes:
    """Estimates of nodes from gradients of one batch of prompts."""

    sites: frozenset[Site]
    source: Mapping[Site, Tensor]
    attention: Mapping[int, Attention]

    def estimates(
        self, site: Site, activation: Tensor, gradient: Tensor, wanted: Collection[Site]
    ) -> Iterator[tuple[Site, Tensor]]:
        """Of the wanted nodes, those that can be told from the gradient at a site."""
        if site in wanted:
            yield site, contribution(site, difference(site, self.source[site], activation), gradient)
        if site.kind != "pattern":
            return
        query, key = (Site(kind, site.layer) for kind in FIXED_KINDS)
        if query in wanted:
            yield query, self.attention[site.layer].query_effects(self.source[query], gradient)
        if key in wanted:
            yield key, self.attention[site.layer].key_effects(self.source[key], gradient)


def _summed(found: Graph, rounds: Sequence[_Round], nodes: _Nodes) -> Tally:
    tally = Tally()
    last = (found.metrics - 1, len(rounds) - 1)
    for metric in range(found.metrics):
        for number, some in enumerate(rounds):

            def use(site: Site, metric: int, activation: Tensor, gradient: Tensor, some: _Round = some) -> None:
                for node, values in nodes.estimates(site, activation, gradient, some.nodes):
                    tally.add(node, metric, values if some.weights is None else values.abs() * some.weights[node])

            found.backward(metric, use, silenced=some.silenced, last=(metric, number) == last)
    return tally
