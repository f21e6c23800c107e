"""Where in the network a trial acts, in the words of the config."""

from typing import Annotated, Literal

from pydantic import Field

from mechinterp_cli.config.base import BaseConfig
from mechinterp_cli.config.types import Count, Index, Text

Kind = Literal[
    "embed",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "q",
    "k",
    "v",
    "z",
    "scores",
    "pattern",
    "neuron",
]
Spot = Index | Text
UnitGroup = Annotated[tuple[Index, ...], Field(min_length=1)]
SpotGroup = Annotated[tuple[Spot, ...], Field(min_length=1)]
Units = Literal["each", "all"] | Annotated[tuple[Index | UnitGroup, ...], Field(min_length=1)]
Positions = Literal["each", "all", "last"] | Annotated[tuple[Spot | SpotGroup, ...], Field(min_length=1)]


class LayerWindow(BaseConfig):
    """Windows of layers, one centred at every layer: [max(0, l − w/2), min(L, l + w/2))."""

    window: Count
    """Layers in a window; causal tracing uses 10 for attention and MLP outputs."""


class SiteBlock(BaseConfig):
    """A family of trials: one kind of site over layers, heads or neurons, and positions."""

    kind: Kind
    """Where activations are taken: resid_pre, z, mlp_out, … (the README lists them)."""
    layers: Literal["all"] | Annotated[tuple[Index, ...], Field(min_length=1)] | LayerWindow = "all"
    """`all` (one trial per layer), a list (one trial for each), or `{window: 10}`."""
    heads: Units | None = None
    """For q, k, v, z, scores, pattern: `each`, `all` together, or a list whose inner lists are edited together.
    `k` and `v` count key/value heads. Default: each."""
    neurons: Units | None = None
    """For neuron: as `heads`. Default: all together."""
    positions: Positions = "each"
    """`each`, `all` together, `last`, or a list of positions and span names whose inner lists are edited together."""
    keys: Literal["all"] | Annotated[tuple[Spot, ...], Field(min_length=1)] = "all"
    """For scores and pattern: the key positions or spans that are edited."""
