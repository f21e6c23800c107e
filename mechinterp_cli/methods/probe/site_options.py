"""The `sites:` of the `probe:` section: where a probe reads."""

from typing import Annotated, Literal

from pydantic import Field

from mechinterp_cli.config.base import BaseConfig
from mechinterp_cli.config.types import Index
from mechinterp_cli.methods.places import Spot

ProbeKind = Literal[
    "embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "neuron"
]
Pool = Literal["last", "mean"]


class ProbeSites(BaseConfig):
    """A family of probes: one kind of site over layers, heads and positions."""

    kind: ProbeKind = "resid_post"
    """Where activations are read: resid_post, z, mlp_out, …; `scores` and `pattern` have no vector per token."""
    layers: Literal["all"] | Annotated[tuple[Index, ...], Field(min_length=1)] = "all"
    """`all` (a probe for each layer), or a list of layers."""
    heads: Literal["each", "all"] | Annotated[tuple[Index, ...], Field(min_length=1)] | None = None
    """For q, k, v, z: `each` (a probe for each head), `all` (one for a layer's heads side by side), or a list of heads.
    `k` and `v` count key/value heads. Default: each."""
    positions: Literal["last", "mean", "each", "word"] | Annotated[tuple[Spot, ...], Field(min_length=1)] | None = None
    """`last` token; `mean` of all tokens but an added beginning-of-sequence token; `each` position; `word` (every
    labelled word); or a list of positions and span names, a probe for each. Default: word where words are labelled,
    else last."""
    pool: Pool = "last"
    """What stands for a span or a word of several tokens: its last token, or the mean of all."""
