"""How strongly a head reads what an earlier head writes, from their weights (Elhage et al. 2021)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_cli.methods.heads.weights import Circuits, HeadScores
from mechinterp_cli.models.linear import LayerMaps

CompositionName = Literal["q_composition", "k_composition", "v_composition"]
COMPOSITIONS: tuple[CompositionName, ...] = ("q_composition", "k_composition", "v_composition")


@dataclass(frozen=True, eq=False)
class Compositions:
    """One kind of composition between every head and every earlier head.

    With W_QK = W_Qᵀ W_K and W_OV = W_O W_V of the later head 2 and the earlier head 1, each with the norm before
    (and after) it folded in and rotary embeddings at distance 0:

    - `q_composition` = ‖W_QK2ᵀ W_OV1‖ / (‖W_QK2‖ ‖W_OV1‖)
    - `k_composition` = ‖W_QK2 W_OV1‖ / (‖W_QK2‖ ‖W_OV1‖)
    - `v_composition` = ‖W_OV2 W_OV1‖ / (‖W_OV2‖ ‖W_OV1‖)

    in Frobenius norms. In [0, 1]; the root mean square for randomly turned matrices is 1 / √d_model.
    """

    score: CompositionName
    values: Float[Tensor, "layers heads layers heads"]
    """Later layer and head, then earlier ones; float64 on the CPU, NaN where there is no such pair."""
    chance: float
    reasons: Mapping[int, str]
    """Layer to the reason why its heads, as the later ones, have no such score."""
    unread: Mapping[int, str]
    """Layer to the reason why its heads, as the earlier ones, have no such score."""

    def strongest(self) -> tuple[HeadScores, Int[Tensor, "layers heads"], Int[Tensor, "layers heads"]]:
        """Each head's strongest composition, and the earlier layer and head it is with (−1 where there is none)."""
        layers, heads = self.values.shape[:2]
        flat = self.values.flatten(2)
        best, place = flat.nan_to_num(nan=-1.0).max(-1)
        none = best < 0
        scores = HeadScores(self.score, torch.where(none, torch.nan, best), self.chance, self.reasons)
        return scores, (place // heads).masked_fill(none, -1), (place % heads).masked_fill(none, -1)


@torch.no_grad()
def compositions(circuits: Circuits, score: CompositionName, layers: Sequence[int]) -> Compositions:
    """One kind of composition of the heads of some layers with all heads of all layers before them.

    No d_model × d_model matrix is made: ‖Aᵀ X B‖ = ‖R_A X R_Bᵀ‖ with R the triangular factors of Aᵀ and Bᵀ.
    """
    maps, n_heads = circuits.maps, circuits.n_heads
    n = circuits.model.anatomy.n_layers
    values = torch.full((n, n_heads, n, n_heads), torch.nan, dtype=torch.float64)
    earlier = {index: ov_factor(maps.layer(index)) for index in range(max(layers, default=0))}
    reasons: dict[int, str] = {}
    for later in layers:
        left = reading_factor(maps.layer(later), score)
        if isinstance(left, str):
            reasons[later] = left
            continue
        for index, right in earlier.items():
            if index < later and not isinstance(right, str):
                pairs = _norms(left, right)
                values[later, : pairs.shape[0], index, : pairs.shape[1]] = pairs.double().cpu()
    unread = {index: right for index, right in earlier.items() if isinstance(right, str)}
    return Compositions(score, values, circuits.model.anatomy.d_model**-0.5, reasons, unread)


def ov_factor(maps: LayerMaps) -> Float[Tensor, "heads rank d_model"] | str:
    """F with ‖Y W_OV‖ = ‖Y Fᵀ‖ for any Y, of norm 1; or the reason why there is none."""
    writes, value = maps.writes, maps.value
    if writes is None or value is None:
        return maps.missing.get("output") or maps.missing["value"]
    return _unit(_triangle(_per_head(value, writes)) @ writes)


def reading_factor(maps: LayerMaps, score: CompositionName) -> Float[Tensor, "heads rank d_model"] | str:
    """F with ‖C X‖ = ‖F X‖ for any X, C being the later head's circuit, of norm 1; or the reason for none."""
    outer, inner = _circuit(maps, score)
    if outer is None or inner is None:
        needed = ("output", "value") if score == "v_composition" else ("query", "key")
        return next(maps.missing[name] for name in needed if name in maps.missing)
    if score == "q_composition":
        return _unit(_triangle(_per_head(outer, inner)) @ inner)
    return _unit(_triangle(outer) @ _per_head(inner, outer))


def _circuit(maps: LayerMaps, score: CompositionName) -> tuple[Tensor | None, Tensor | None]:
    """The circuit's two maps; the stream that the earlier head writes to enters the second."""
    if score == "q_composition":
        return maps.key, maps.query
    if score == "k_composition":
        return maps.query, maps.key
    return maps.writes, maps.value


def _per_head(grouped: Tensor, heads: Tensor) -> Tensor:
    """Maps of key/value heads, repeated to one per query head."""
    return grouped.repeat_interleave(heads.shape[0] // grouped.shape[0], 0)


def _triangle(maps: Float[Tensor, "heads d d_model"]) -> Float[Tensor, "heads rank d"]:
    """R with RᵀR = the maps' Gram matrix."""
    triangle: Tensor = torch.linalg.qr(maps.transpose(1, 2), mode="r").R
    return triangle


def _unit(factors: Float[Tensor, "heads rank d_model"]) -> Float[Tensor, "heads rank d_model"]:
    """Factors of norm 1; a head of zeros becomes NaN, and so do its compositions."""
    sizes: Tensor = torch.linalg.vector_norm(factors, dim=(1, 2), keepdim=True)
    return factors / sizes


def _norms(left: Float[Tensor, "h r d_model"], right: Float[Tensor, "g s d_model"]) -> Float[Tensor, "h g"]:
    """‖left_h right_gᵀ‖ for every pair."""
    products = (left.flatten(0, 1) @ right.flatten(0, 1).T).square_()
    by_right = torch.unflatten(products, 1, right.shape[:2]).sum(-1)
    return torch.unflatten(by_right, 0, left.shape[:2]).sum(1).sqrt()
