"""The linear maps of a decoder, by what its own code does to chosen inputs, each proved before it is used.

Nothing is read by name but the output head's own weight: what stands between the residual stream and q, k,
v, between z and the residual stream, and between the last hidden state and the head is tried out
(`mechinterp_cli.models.scaled`). So fused projections, transposed weights, biases, multipliers, norms of any kind
and latent projections need no code of their own. A map that fails its proof is missing, with the reason.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp_cli.models.anatomy import Anatomy, LayerAnatomy, text_config
from mechinterp_cli.models.precision import in_float32
from mechinterp_cli.models.residual import Heads
from mechinterp_cli.models.scaled import TOLERANCE, ScaledMap, fit
from mechinterp_cli.models.trials import Sample, Trials

_UNCAPPED = 0.9
"""Logits below this part of the soft-cap tell the multiplier; nearer to it too many digits are lost."""


@dataclass(frozen=True, eq=False)
class Unembedding:
    """Final norm, head and multiplier: logits = multiplier · (W (P x / s(x) + b) + head bias).

    s(x) is the norm's scale, one positive number per hidden state. Logits are those before soft-capping.
    """

    entry: ScaledMap
    """From the last hidden state to what the head is given: P, b and s."""
    head: Float[Tensor, "vocab d_head_in"]
    """W, the model's own tensor."""
    bias: Float[Tensor, " vocab"] | None
    multiplier: float
    softcap: float | None
    deviation: float
    """Largest difference from native logits in the proof, in parts of the largest logit."""
    entering: Callable[[Tensor], Tensor]
    """The model's own way from hidden states to what enters the head."""

    def scale(self, hidden: Float[Tensor, "rows d_model"]) -> Float[Tensor, " rows"]:
        """s(x) of final hidden states."""
        return self.entry.scale(hidden, self.entering(hidden)[:, None])[:, 0]

    def rows(self, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d_head_in"]:
        """The head's rows of some tokens, times the multiplier."""
        return self.head[tokens].float() * self.multiplier

    def project(self, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d_model"]:
        """W P times the multiplier: a direction d in the stream gives token t the logit `project(t) · d / s(x)`."""
        return self.rows(tokens) @ self.entry.matrix[0].T

    def constant(self, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
        """The logits' part that no hidden state changes: the norm's bias through W, and the head's bias."""
        own = self.rows(tokens) @ self.entry.offset[0]
        return own if self.bias is None else own + self.bias[tokens].float() * self.multiplier

    def through(
        self, directions: Float[Tensor, "... d_model"], hidden: Float[Tensor, "... d_model"], tokens: Int[Tensor, " t"]
    ) -> Float[Tensor, "... t"]:
        """What directions in the last residual stream add to logits, with the norm's scale frozen.

        Args:
            directions: Parts of the stream, `[..., d_model]`.
            hidden: The whole stream that sets the scale, of a shape that broadcasts against `directions`.
            tokens: Whose logits.
        """
        scale = self.scale(hidden.reshape(-1, hidden.shape[-1])).reshape(hidden.shape[:-1])
        return directions @ self.project(tokens).T / scale[..., None]


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """What one layer's attention reads and writes.

    `query`, `key` and `value` have the norms' scales left out (rotary embeddings at distance 0): their size is
    that of an average token of an ordinary text of random tokens. `output` is exact where nothing normalises
    what attention adds, and else of average size; `output.scale(z, attn_out)` is then that of real tokens.
    """

    index: int
    heads: Heads | None
    query: Float[Tensor, "heads d_head d_model"] | None
    key: Float[Tensor, "kv_heads d_head d_model"] | None
    value: Float[Tensor, "kv_heads d_value d_model"] | None
    output: ScaledMap | None
    """From all heads' z, flattened, to what attention adds to the residual stream."""
    missing: Mapping[str, str]
    """`query`, `key`, `value` or `output` to the reason why this layer has no such map; `values` where v cannot even
    be computed from the residual stream alone."""

    @property
    def writes(self) -> Float[Tensor, "heads d_value d_model"] | None:
        """What one unit of each head's z adds to the residual stream."""
        if self.output is None or self.heads is None:
            return None
        return torch.unflatten(self.output.matrix[0], 0, (self.heads.query, self.heads.d_value))


class LinearMaps:
    """The linear maps of one model; make it with `linear_maps`."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.trials = Trials(model, anatomy)
        self._config = text_config(model)
        self._sample: Sample = self.trials.sample()
        self._layers: dict[int, LayerMaps] = {}
        self._outputs: dict[int, ScaledMap | str] = {}

    def unembedding(self) -> Unembedding | str:
        """The way from the last hidden state to the logits, or the reason why it is not of the known form."""
        head: Any = self.trials.head
        x = self._sample.streams[-1].float()
        y = self.trials.entering_head(x)
        if head is None or y is None or getattr(head.weight, "ndim", 0) != 2:
            return "this model's logits do not come from one output head"
        entry = fit(self._entering, x, y.float()[:, None])
        if entry is None:
            return "what stands between the last layer and the head is no norm or linear map"
        bias = getattr(head, "bias", None)
        raw = y.float() @ head.weight.float().T + (0 if bias is None else bias.float())
        return self._proved(entry, head.weight, bias, raw)

    def _proved(self, entry: ScaledMap, weight: Tensor, bias: Tensor | None, raw: Tensor) -> Unembedding | str:
        native, cap = self._sample.logits.float(), softcap_of(self._config)
        open_, free = (native, native.isfinite()) if cap is None else uncapped(native, cap)
        known, ours = open_[free].cpu().double(), raw[free].cpu().double()
        multiplier = float(ours @ known / ours.square().sum())
        told = raw * multiplier if cap is None else torch.tanh(raw * multiplier / cap) * cap
        error = (told - native).abs().max() / native.abs().max()
        if not bool(error <= TOLERANCE):
            return "this model's logits are not its output head's product times one number"
        multiplier = float(f"{multiplier:.7g}")  # the constant of the config, without float32 noise
        return Unembedding(entry, weight, bias, multiplier, cap, float(error), lambda x: self._entering(x)[:, 0])

    def _entering(self, hidden: Tensor) -> Tensor:
        seen = self.trials.entering_head(hidden)
        assert seen is not None
        return seen.float()[:, None]

    def layer(self, index: int) -> LayerMaps:
        """The maps of one layer, found when they are first asked for."""
        if index not in self._layers:
            self._layers[index] = self._find(self.anatomy.layers[index])
        return self._layers[index]

    def output(self, index: int) -> ScaledMap | str:
        """One layer's `LayerMaps.output` without what attention reads, or the reason why there is none."""
        if index not in self._outputs:
            missing: dict[str, str] = {}
            found = self._output(self.anatomy.layers[index], missing)
            self._outputs[index] = missing["output"] if found is None else found
        return self._outputs[index]

    def values(self, index: int, hidden: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows kv_heads d_value"]:
        """The model's own v, biases and norm included, of tokens whose residual stream is `hidden`."""
        return self.trials.attention_inputs(index, hidden)[-1].float()

    def _find(self, layer: LayerAnatomy) -> LayerMaps:
        missing: dict[str, str] = {}
        read = self._reads(layer, missing)
        output = self.output(layer.index)
        if isinstance(output, str):
            missing["output"] = output
        return LayerMaps(
            layer.index,
            layer.heads,
            read.get("query"),
            read.get("key"),
            read.get("value"),
            None if isinstance(output, str) else output,
            missing,
        )

    def _reads(self, layer: LayerAnatomy, missing: dict[str, str]) -> dict[str, Tensor]:
        """The maps from the residual stream to q, k and v, as [heads, features, d_model]."""
        if layer.heads is None or "z" in layer.missing:
            reason = layer.missing.get("z", "this layer has no attention heads")
            missing.update(dict.fromkeys(("query", "key", "value"), reason))
            return {}
        names = ("query", "key", "value") if layer.by_interface else ("value",)
        if not layer.by_interface:
            missing.update(query=layer.missing["q"], key=layer.missing["k"])
        x = self._sample.streams[layer.index].float()
        memory = _Memory(lambda rows: self.trials.attention_inputs(layer.index, rows))
        if not self._as_in_a_pass(layer, memory(x)[-1]):
            reason = "what attention is given at a token depends on more than the token's residual stream"
            missing.update(dict.fromkeys((*names, "values"), reason))
            return {}
        found: dict[str, Tensor] = {}
        for place, name in enumerate(names):

            def function(rows: Tensor, place: int = place) -> Tensor:
                return memory(rows)[place].float()

            fitted = fit(function, x, function(x))
            if fitted is None:
                missing[name] = f"{name} is not linear in the residual stream, its norms' scales apart"
            else:
                found[name] = fitted.matrix.transpose(1, 2)
        return found

    def _as_in_a_pass(self, layer: LayerAnatomy, alone: Tensor) -> bool:
        """Whether v of tokens run by themselves is v of the same tokens in an ordinary pass."""
        ordinary = self._sample.v.get(layer.index)
        if ordinary is None or not layer.by_interface:
            return True
        size = float(ordinary.abs().max())
        return ordinary.shape == alone.shape and float((ordinary - alone).abs().max()) <= TOLERANCE * size

    def _output(self, layer: LayerAnatomy, missing: dict[str, str]) -> ScaledMap | None:
        """The map from z to what attention adds."""
        if layer.heads is None or layer.attn_out is None or "z" in layer.missing:
            missing["output"] = layer.missing.get(
                "z", layer.missing.get("attn_out", "this layer has no attention heads")
            )
            return None
        shape = (layer.heads.query, layer.heads.d_value)
        z = self._sample.z[layer.index].flatten(1).float()

        def function(rows: Tensor) -> Tensor:
            return self.trials.written(layer.index, torch.unflatten(rows, 1, shape)).float()[:, None]

        fitted = fit(function, z, self._sample.attn_out[layer.index].float()[:, None])
        if fitted is None:
            missing["output"] = "what attention adds is not linear in z, its norm's scale apart"
        return fitted


class _Memory:
    """A function that keeps what it gave for the inputs that are asked for again and again."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self._function = function
        self._kept: list[tuple[Tensor, tuple[Tensor, ...]]] = []

    def __call__(self, rows: Tensor) -> tuple[Tensor, ...]:
        for known, values in self._kept:
            if known.shape == rows.shape and torch.equal(known, rows):
                return values
        self._kept.append((rows, self._function(rows)))
        return self._kept[-1][1]


def softcap_of(config: Any) -> float | None:
    """The soft-cap on the logits, where the config has one."""
    for key in ("final_logit_softcapping", "logits_soft_cap"):
        value = getattr(config, key, None)
        if isinstance(value, (int, float)) and value > 0:
            return float(value)
    return None


def uncapped(logits: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Logits before soft-capping, and which of them can be told to enough digits."""
    free = logits.abs() < _UNCAPPED * cap
    return torch.atanh(torch.where(free, logits, 0.0) / cap) * cap, free


@contextmanager
def linear_maps(model: nn.Module, anatomy: Anatomy) -> Iterator[LinearMaps]:
    """The linear maps of a model; inside, its weights are in float32, and only there may the model be asked.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
    """
    with in_float32(model), torch.no_grad():
        yield LinearMaps(model, anatomy)
