"""Direct attribution by hand: hooks on modules named here, and the weights of those modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.tasks.prompts import Prompt

Key = tuple[str, int | None, int | None, int | None, int | None]
"""component, layer, head, neuron, source position."""


@dataclass(frozen=True)
class Block:
    """The modules of one layer."""

    value: nn.Module
    """What makes v."""
    out: nn.Module
    """From z to the stream."""
    down: nn.Module
    after_attention: nn.Module | None = None
    after_mlp: nn.Module | None = None
    """Norms of what is added."""


@dataclass(frozen=True)
class Plain:
    """A model by its modules' names."""

    model: Any
    blocks: list[Block]
    layers: list[nn.Module]
    norm: Any
    head: nn.Module
    gain: Tensor
    centred: bool = False
    fused: str = ""
    """How v stands in the output of `value`: `last` third, or `heads` by heads."""
    residual: float = 1.0
    logits: float = 1.0


def llama_like(model: Any, **others: Any) -> Plain:
    layers = list(model.model.layers)
    blocks = [Block(layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.down_proj) for layer in layers]
    given = {"blocks": blocks, "gain": model.model.norm.weight, **others}
    return Plain(model=model, layers=layers, norm=model.model.norm, head=model.lm_head, **given)


def gemma2(model: Any) -> Plain:
    blocks = [
        Block(
            layer.self_attn.v_proj,
            layer.self_attn.o_proj,
            layer.mlp.down_proj,
            layer.post_attention_layernorm,
            layer.post_feedforward_layernorm,
        )
        for layer in model.model.layers
    ]
    return llama_like(model, blocks=blocks, gain=1 + model.model.norm.weight)


def granite(model: Any) -> Plain:
    config = model.config
    return llama_like(model, residual=config.residual_multiplier, logits=1 / config.logits_scaling)


def gpt2(model: Any) -> Plain:
    layers, norm = list(model.transformer.h), model.transformer.ln_f
    blocks = [Block(layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_proj) for layer in layers]
    return Plain(model, blocks, layers, norm, model.lm_head, norm.weight, centred=True, fused="last")


def gpt_neox(model: Any) -> Plain:
    inner = model.gpt_neox
    blocks = [
        Block(layer.attention.query_key_value, layer.attention.dense, layer.mlp.dense_4h_to_h) for layer in inner.layers
    ]
    norm = inner.final_layer_norm
    return Plain(model, blocks, list(inner.layers), norm, model.lm_head, norm.weight, centred=True, fused="heads")


BY_HAND = {"llama": llama_like, "gemma2": gemma2, "granite": granite, "gpt2": gpt2, "gpt_neox": gpt_neox}


def matrix(module: Any) -> Tensor:
    """A linear map as [in, out]."""
    return module.weight.T if isinstance(module, nn.Linear) else module.weight


def bias_of(module: Any) -> Tensor:
    bias = getattr(module, "bias", None)
    return torch.zeros(matrix(module).shape[1]) if bias is None else bias


@dataclass(frozen=True)
class Seen:
    """What hooks saw of one prompt: first inputs and outputs [positions, features] by module."""

    inputs: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor]
    patterns: tuple[Tensor, ...]
    """By layer, [heads, queries, keys]."""


@torch.no_grad()
def watch(plain: Plain, prompt: Prompt) -> Seen:
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        inputs[id(module)] = given[0].double()
        outputs[id(module)] = (output if isinstance(output, Tensor) else output[0])[0].double()

    blocks = [getattr(block, name) for block in plain.blocks for name in Block.__dataclass_fields__]
    modules = [module for module in [*blocks, *plain.layers] if module is not None]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    result = plain.model(input_ids=torch.tensor([prompt.clean_tokens]), output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return Seen(inputs, outputs, tuple(pattern[0].double() for pattern in result.attentions))


def rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def final_direction(plain: Plain, prompt: Prompt, last: Tensor) -> tuple[Tensor, float]:
    """What a unit of each feature adds to the logit difference, and what nothing in the stream changes."""
    weight = matrix(plain.head).T.double() * plain.logits
    difference = weight[list(prompt.answer)].mean(0) - weight[list(prompt.wrong_answer)].mean(0)
    along = difference * plain.gain.double()
    eps = getattr(plain.norm, "variance_epsilon", None) or plain.norm.eps
    centred = last - last.mean() if plain.centred else last
    along = along - along.mean() if plain.centred else along
    offset = getattr(plain.norm, "bias", None)
    return along / rms(centred, eps), 0.0 if offset is None else float(offset.double() @ difference)


def through(norm: Any, direction: Tensor, y: Tensor) -> Tensor:
    """A direction behind a norm with its scale frozen at `y`, as a direction before it."""
    return direction if norm is None else direction * (1 + norm.weight.double()) / rms(y, norm.eps)


def values_of(plain: Plain, seen: Seen, block: Block, heads: int) -> Tensor:
    """v of every query head, [positions, heads, d_head]."""
    raw = seen.outputs[id(block.value)]
    if plain.fused == "last":
        raw = raw[:, -raw.shape[1] // 3 :]
    if plain.fused == "heads":
        return raw.view(len(raw), heads, -1).chunk(3, dim=-1)[2]
    d_head = seen.inputs[id(block.out)].shape[1] // heads
    return raw.view(len(raw), -1, d_head).repeat_interleave(heads * d_head // raw.shape[1], dim=1)


def parts_by_hand(plain: Plain, prompt: Prompt) -> dict[Key, float]:
    """Every part of one prompt's logit difference, float64 from float32 activations."""
    seen, heads = watch(plain, prompt), plain.model.config.num_attention_heads
    last = seen.outputs[id(plain.layers[-1])][-1]
    direction, constant = final_direction(plain, prompt, last)
    found: dict[Key, float] = {("total", None, None, None, None): float(direction @ last) + constant}
    entering = seen.inputs[id(plain.layers[0])][-1]
    found["embedding", None, None, None, None] = float(direction @ entering)
    found["constant", None, None, None, None] = constant
    for layer, block in enumerate(plain.blocks):
        scaled = direction * plain.residual
        before = through(block.after_attention, scaled, seen.outputs[id(block.out)][-1])
        along = (matrix(block.out).double() @ before).view(heads, -1)
        z, v = seen.inputs[id(block.out)][-1].view(heads, -1), values_of(plain, seen, block, heads)
        found["attention_bias", layer, None, None, None] = float(bias_of(block.out).double() @ before)
        for head in range(heads):
            found["head", layer, head, None, None] = float(z[head] @ along[head])
            for key in range(prompt.length):
                weight = seen.patterns[layer][head, -1, key]
                found["source", layer, head, None, key] = float(weight * v[key, head] @ along[head])
        y, n = seen.outputs[id(block.down)][-1], seen.inputs[id(block.down)][-1]
        before = through(block.after_mlp, scaled, y)
        parts = n * (matrix(block.down).double() @ before)
        found["mlp_bias", layer, None, None, None] = float(bias_of(block.down).double() @ before)
        found["mlp", layer, None, None, None] = float(y @ before)
        found |= {("neuron", layer, None, i, None): value for i, value in enumerate(parts.tolist())}
    return found
