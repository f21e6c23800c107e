"""The `patch:` section."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from mechinterp_cli.config.base import BaseConfig
from mechinterp_cli.config.types import Count, Number, Seed, Text
from mechinterp_cli.methods.interchange_options import InterchangeOptions
from mechinterp_cli.methods.places import SiteBlock

NameGroup = Annotated[tuple[Text, ...], Field(min_length=1)]
Rest = Literal["frozen", "mlps", "heads", "free"]


class TracingOptions(BaseConfig):
    """Causal tracing: the corrupted run is the clean prompt with noise on a span's embeddings."""

    span: Text
    """The span that is corrupted: the subject."""
    scale: Annotated[Number, Field(gt=0)] = 3.0
    """Noise in standard deviations of the span tokens' embeddings over the data set (σ = scale × that)."""
    draws: Count = 10
    """Noisy copies of each prompt; all trials of a prompt share them."""
    seed: Seed = 0
    """Seed of the noise."""


class PatchBlock(SiteBlock):
    """A family of trials: one kind of site over layers, heads or neurons, and positions."""

    directions: Text | None = None
    """For the residual stream: a .safetensors file of tensors [directions, d_model] named `SITE.LAYER`, such as
    `directions.safetensors` of a `probe` run. Only what lies along them is put there: x + BᵀB (x' − x), B their
    orthonormal rows. `layers: all` is then all layers of the file."""


class PathOptions(BaseConfig):
    """Path patching (Wang et al. 2211.00593): senders act on the answer through receivers alone."""

    senders: Literal["heads", "mlps"] | Annotated[tuple[Text | NameGroup, ...], Field(min_length=1)]
    """Whose outputs are the source stream's: `heads` or `mlps` (each of them a trial), or a list of names, whose inner
    lists send together: `a9.h6` (head 6 of layer 9), `m3` (the MLP of layer 3), `embed`."""
    receivers: NameGroup = ("logits",)
    """Who gets what they send, all together: `logits`, `m3`, `a9.h6.q` (a query), `a9.h2.k` and `a9.h2.v` (counted by
    key/value heads), `a9.h6` (all three inputs of a head)."""
    rest: Rest = "frozen"
    """What lies between the two: `frozen` to the base run (direct paths alone), or free to follow the senders: `mlps`
    (paths through MLPs too, heads frozen, as in the paper), `heads`, or `free` (both)."""


class PathBlock(BaseConfig):
    """A family of trials: paths from each sender to the receivers."""

    path: PathOptions
    """From whom to whom."""


def _kind_of_block(block: Any) -> str:
    """Which of the two kinds a block is meant to be."""
    return "paths" if isinstance(block, PathBlock) or (isinstance(block, dict) and "path" in block) else "places"


Block = Annotated[
    Annotated[PatchBlock, Tag("places")] | Annotated[PathBlock, Tag("paths")], Discriminator(_kind_of_block)
]
"""Activations at one kind of site, or paths."""


class PatchOptions(InterchangeOptions):
    """The `patch:` section."""

    method_name: ClassVar[str] = "patch"
    tracing: TracingOptions | None = None
    """Causal tracing instead of a corrupted prompt."""
    sites: Annotated[tuple[Block, ...], Field(min_length=1)]
    """Blocks of trials: activations at a kind of site, or a `path` from senders to receivers."""
