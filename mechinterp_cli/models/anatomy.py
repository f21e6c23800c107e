"""The anatomy of a decoder, found from its module tree and proved by arithmetic, never by its name.

One small forward pass is recorded. Which modules are the decoder layers follows from each one's output
being the next one's input; what attention and MLP add to the residual stream follows from
`resid_pre + attn_out + mlp_out = resid_post` holding for their outputs (times a constant, where the model
has a residual multiplier); and so on. A site for which the arithmetic does not hold is not declared, and
the reason is kept for whoever asks for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.models.kinds import SITE_KINDS
from mechinterp_cli.models.precision import in_float32
from mechinterp_cli.models.record import LayerRecord, find_layers, record
from mechinterp_cli.models.residual import Addition, Heads, find_additions, find_down, find_heads, find_mid
from mechinterp_cli.models.walk import Walker

PROBE_PROMPTS = 2
PROBE_LENGTH = 12


@dataclass(frozen=True)
class LayerAnatomy:
    """One decoder layer: where its sites are, by qualified module name."""

    index: int
    module: str
    attention: str | None
    """The module that calls the attention function, or holds the output projection."""
    heads: Heads | None
    by_interface: bool
    """Whether attention goes through transformers' attention interface."""
    known_softmax: bool
    """Whether scaling, soft-cap, sinks and mask are all that the layer's attention does."""
    attn_out: Addition | None
    mlp_out: Addition | None
    mid: str | None
    """The module that reads the residual stream between attention and MLP."""
    down: str | None
    """The MLP's down projection; its input is `neuron`."""
    d_mlp: int
    z: str | None
    """The output projection, where z is read at its input because attention bypasses the interface."""
    missing: Mapping[str, str]
    """Site kind to the reason why this layer does not have it."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Kinds of site that this layer has."""
        return tuple(kind for kind in SITE_KINDS if kind not in self.missing)

    def features(self, kind: str, d_model: int) -> int:
        """How many units (heads or features) a site of this kind has."""
        if kind == "neuron":
            return self.d_mlp
        if kind in ("q", "k", "v", "z", "scores", "pattern"):
            assert self.heads is not None
            return self.heads.key_value if kind in ("k", "v") else self.heads.query
        return d_model


@dataclass(frozen=True)
class Anatomy:
    """A decoder as the engine sees it."""

    layers: tuple[LayerAnatomy, ...]
    d_model: int
    vocab_size: int
    max_length: int | None
    """Longest prompt that the model takes, where the config says."""
    tuple_sizes: tuple[int, ...]
    """What each layer's forward returns: 0 a tensor, n a tuple of n with the hidden state first."""
    chained: bool
    """Whether each layer's output is the next layer's input, so that layers can be run one by one."""
    causal: bool
    """Whether a later token leaves every earlier logit as it was."""
    embeds_alone: bool
    """Whether what enters layer 0 at a position depends on that position and its token alone."""
    attn_implementation: str

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def sites(self) -> tuple[str, ...]:
        """Kinds of site that at least one layer has."""
        return tuple(kind for kind in SITE_KINDS if any(kind not in layer.missing for layer in self.layers))

    def walker(self, model: nn.Module) -> Walker:
        """The model's own code around its layers."""
        return Walker(model, [model.get_submodule(layer.module) for layer in self.layers], self.tuple_sizes)


def find_anatomy(model: nn.Module, overrides: Mapping[str, str] | None = None) -> Anatomy:
    """The anatomy of a causal language model.

    Args:
        model: A transformers causal LM in evaluation mode.
        overrides: `layers`: the qualified name of the list of decoder layers, where the search errs.

    Raises:
        UserError: No stack of decoder layers was found, or an override names no module.
    """
    generator = torch.Generator().manual_seed(0)
    config = text_config(model)
    limit = max_length(config)
    tokens = probe_tokens(config.vocab_size, min(PROBE_LENGTH, limit or PROBE_LENGTH), generator).to(device_of(model))
    with torch.no_grad(), in_float32(model):
        names, chained = find_layers(model, tokens, (overrides or {}).get("layers"))
        recording = record(model, names, tokens)
    mixed = any(layer.interface_calls for layer in recording.layers)
    return Anatomy(
        layers=tuple(describe(layer, config, mixed=mixed) for layer in recording.layers),
        d_model=recording.layers[0].pre.shape[-1],
        vocab_size=recording.logits.shape[-1],
        max_length=limit,
        tuple_sizes=tuple(layer.tuple_size for layer in recording.layers),
        chained=chained,
        causal=recording.causal,
        embeds_alone=recording.embeds_alone,
        attn_implementation=str(getattr(config, "_attn_implementation", "") or ""),
    )


def text_config(model: nn.Module) -> Any:
    """The part of the model's config that describes its decoder."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def max_length(config: Any) -> int | None:
    """The longest prompt that the config allows, if it says so."""
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def device_of(model: nn.Module) -> torch.device:
    """Where the model expects its tokens."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def probe_tokens(vocab_size: int, length: int, generator: torch.Generator) -> Tensor:
    """Seeded random prompts [prompts, length]; the lowest ids, where special tokens tend to be, are left out."""
    low = min(5, vocab_size - 1)
    return torch.randint(low, min(vocab_size, 1000), (PROBE_PROMPTS, length), generator=generator)


def describe(layer: LayerRecord, config: Any, *, mixed: bool = False) -> LayerAnatomy:
    """The anatomy of one recorded layer.

    Args:
        layer: The recorded layer.
        config: The decoder's config.
        mixed: Whether some layer of the model goes through the attention interface.
    """
    missing: dict[str, str] = {} if layer.index == 0 else {"embed": "embed is what enters layer 0"}
    attn_out, mlp_out = find_additions(layer, missing)
    mid = find_mid(layer, attn_out, missing)
    down, d_mlp = find_down(layer, mlp_out, missing)
    z, heads = find_heads(layer, config, missing, mixed=mixed)
    return LayerAnatomy(
        index=layer.index,
        module=layer.name,
        attention=layer.attention,
        heads=heads,
        by_interface=layer.interface_calls == 1,
        known_softmax=layer.known_softmax,
        attn_out=attn_out,
        mlp_out=mlp_out,
        mid=mid,
        down=down,
        d_mlp=d_mlp,
        z=z,
        missing=missing,
    )
