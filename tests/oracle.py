"""A second opinion on what a site is: hooks and an attention written out by hand, family by family.

Nothing of the engine or of the anatomy is used here. Module names are data, windows, soft-caps, sinks and
scalings are taken from each family's config, and attention is a full matrix.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import build

Change = Callable[[Tensor], Tensor]
"""From [prompts, positions, *features] to the same."""
Place = tuple[str, int]
"""Kind of site and layer."""


@dataclass(frozen=True)
class Names:
    """Where a family keeps its parts; module names are relative to a layer."""

    layers: str
    attn_out: str
    """The module whose output attention adds to the residual stream."""
    mlp_out: str
    o_proj: str
    down: str | None
    parallel: bool = False
    scale: float = 1.0
    """What attention and MLP outputs are multiplied with before they are added."""
    scaling: float | None = None
    """Of the scores; 1/√d_head when None."""


LLAMA = Names("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj")
NAMES: dict[str, Names] = {
    "gpt2": Names("transformer.h", "attn", "mlp", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": Names("gpt_neox.layers", "attention", "mlp", "attention.dense", "mlp.dense_4h_to_h", parallel=True),
    "opt": Names("model.decoder.layers", "self_attn", "fc2", "self_attn.out_proj", "fc2", scaling=1.0),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA,
    "gemma2": Names(
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
    "olmo2": Names(
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
    "phi": Names("model.layers", "self_attn", "mlp", "self_attn.dense", "mlp.fc2", parallel=True),
    "granite": Names("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj", scale=0.4, scaling=0.5),
    "gpt_oss": Names("model.layers", "self_attn", "mlp", "self_attn.o_proj", None),
}
"""The families that have an oracle."""


class Oracle:
    """A model with every site in reach.

    Args:
        family: A key of `NAMES`.
        model: A model of that family, with eager attention; a tiny random one where None.
    """

    def __init__(self, family: str, model: Any = None) -> None:
        self.names = NAMES[family]
        self.model: Any = build(family, attn_implementation="eager") if model is None else model
        self.config: Any = self.model.config
        self.layers: Any = self.model.get_submodule(self.names.layers)
        self._changes: Mapping[Place, Change] = {}
        self._seen: dict[Place, Tensor] = {}
        self._pre: dict[int, Tensor] = {}

    def run(self, tokens: Tensor, changes: Mapping[Place, Change] | None = None) -> tuple[Tensor, dict[Place, Tensor]]:
        """Logits, and the activation of every site as it was before its change."""
        self._changes, self._seen = changes or {}, {}
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(self._attention())
            for index, layer in enumerate(self.layers):
                stack.enter_context(self._hooks(index, layer))
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits, self._seen

    def _visit(self, kind: str, layer: int, x: Tensor) -> Tensor:
        self._seen[kind, layer] = x.clone()
        change = self._changes.get((kind, layer))
        return x if change is None else change(x.clone())

    @contextmanager
    def _hooks(self, index: int, layer: nn.Module) -> Iterator[None]:
        names, part = self.names, layer.get_submodule
        handles = [
            layer.register_forward_pre_hook(self._before(index), with_kwargs=True),
            layer.register_forward_hook(self._after("resid_post", index)),
            part(names.attn_out).register_forward_hook(self._after("attn_out", index)),
            part(names.mlp_out).register_forward_hook(self._after("mlp_out", index)),
            part(names.o_proj).register_forward_pre_hook(self._input("z", index)),
        ]
        if names.down is not None:
            handles.append(part(names.down).register_forward_pre_hook(self._input("neuron", index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, index: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                hidden = self._visit("embed", 0, hidden)
            hidden = self._visit("resid_pre", index, hidden)
            self._pre[index] = hidden
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _after(self, kind: str, index: int) -> Callable[..., Any]:
        """A module's output; `resid_mid` is changed by way of what attention adds to `resid_pre`."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            out = output[0] if isinstance(output, tuple) else output
            pre = self._pre[index]
            scale = 1.0 if kind == "resid_post" else self.names.scale
            new = self._visit(kind, index, out.reshape(pre.shape) * scale)
            if kind == "attn_out" and not self.names.parallel:
                new = self._visit("resid_mid", index, pre + new) - pre
            new = (new / scale).reshape(out.shape)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    def _input(self, kind: str, index: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any) -> Any:
            x = args[0].reshape(*self._pre[index].shape[:2], -1)
            heads = (self.config.num_attention_heads, -1) if kind == "z" else (-1,)
            return (self._visit(kind, index, x.reshape(*x.shape[:2], *heads)).reshape(args[0].shape), *args[1:])

        return hook

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """The family's own eager attention function gives way to the one below."""
        module: Any = sys.modules[type(self.model).__module__]
        kept = module.eager_attention_forward
        module.eager_attention_forward = self._attend
        try:
            yield
        finally:
            module.eager_attention_forward = kept

    def _attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor, **_: Any) -> tuple[Tensor, None]:
        layer = int(module.layer_idx)
        q, k, v = (
            self._visit(kind, layer, x.transpose(1, 2)).transpose(1, 2) for kind, x in (("q", q), ("k", k), ("v", v))
        )
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self._scaling(q.shape[-1])
        cap = getattr(self.config, "attn_logit_softcapping", None)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~self._visible(layer, q.shape[2]), -torch.inf)
        scores = self._visit("scores", layer, scores.transpose(1, 2)).transpose(1, 2)
        pattern = self._visit("pattern", layer, self._softmax(module, scores).transpose(1, 2)).transpose(1, 2)
        return torch.einsum("bhij,bhjd->bihd", pattern, v).contiguous(), None

    def _scaling(self, d_head: int) -> float:
        if self.names.scaling is not None:
            return self.names.scaling
        size = float(getattr(self.config, "query_pre_attn_scalar", None) or d_head)
        return 1.0 / math.sqrt(size)

    def _visible(self, layer: int, length: int) -> Tensor:
        """Which keys each query sees, [queries, keys]."""
        distance = torch.arange(length)[:, None] - torch.arange(length)
        window = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None) or ["sliding_attention"] * len(self.layers)
        if not window or types[layer] != "sliding_attention":
            window = length
        return (distance >= 0) & (distance < window)

    @staticmethod
    def _softmax(module: Any, scores: Tensor) -> Tensor:
        """A sink takes part in the sum and in nothing else."""
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        if hasattr(module, "sinks"):
            total = total + torch.exp(module.sinks.view(1, -1, 1, 1) - top)
        return weights / total
