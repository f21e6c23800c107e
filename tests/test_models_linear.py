"""The linear maps against weights taken from the modules by name, and what is not of that kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.tiny import tiny_tokens
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.interface import AttentionCall, intercepted
from mechinterp_cli.models.linear import LayerMaps, LinearMaps, Unembedding, linear_maps
from mechinterp_cli.models.scaled import fit
from mechinterp_cli.models.trials import Trials
from tests.families import FAMILIES, build

LAYER, D_MODEL, HEADS, D_HEAD = 1, 32, 4, 8


@dataclass(frozen=True)
class Plain:
    """One layer's maps, by name: rows are features, columns the residual stream."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    """[heads · d_value, d_model]"""


def centred(gain: Tensor) -> Tensor:
    """LayerNorm without its scale: subtract the mean, then multiply."""
    return gain[:, None] * (torch.eye(D_MODEL) - 1 / D_MODEL)


def llama_like(model: Any, gain: Tensor, *, before: bool = True) -> Plain:
    attention = model.model.layers[LAYER].self_attn
    norm = torch.diag(gain) if before else torch.eye(D_MODEL)
    q, k, v = (getattr(attention, f"{name}_proj").weight @ norm for name in "qkv")
    return Plain(q, k, v, attention.o_proj.weight.T)


def plain_llama(model: Any) -> Plain:
    return llama_like(model, model.model.layers[LAYER].input_layernorm.weight)


def plain_granite(model: Any) -> Plain:
    plain = plain_llama(model)
    return Plain(plain.query, plain.key, plain.value, plain.output * model.config.residual_multiplier)


def plain_gemma2(model: Any) -> Plain:
    layer = model.model.layers[LAYER]
    plain = llama_like(model, 1 + layer.input_layernorm.weight)
    return Plain(plain.query, plain.key, plain.value, plain.output * (1 + layer.post_attention_layernorm.weight))


def plain_olmo2(model: Any) -> Plain:
    layer = model.model.layers[LAYER]
    plain = llama_like(model, torch.ones(D_MODEL), before=False)
    q, k = layer.self_attn.q_norm.weight[:, None], layer.self_attn.k_norm.weight[:, None]
    return Plain(plain.query * q, plain.key * k, plain.value, plain.output * layer.post_attention_layernorm.weight)


def plain_qwen3(model: Any) -> Plain:
    layer = model.model.layers[LAYER]
    plain = plain_llama(model)
    q, k = (getattr(layer.self_attn, f"{name}_norm").weight for name in "qk")
    return Plain(plain.query * q.repeat(HEADS)[:, None], plain.key * k.repeat(2)[:, None], plain.value, plain.output)


def plain_gpt2(model: Any) -> Plain:
    layer = model.transformer.h[LAYER]
    q, k, v = (part.T @ centred(layer.ln_1.weight) for part in layer.attn.c_attn.weight.split(D_MODEL, dim=1))
    return Plain(q, k, v, layer.attn.c_proj.weight)


def plain_neox(model: Any) -> Plain:
    layer = model.gpt_neox.layers[LAYER]
    fused = layer.attention.query_key_value.weight.view(HEADS, 3, D_HEAD, D_MODEL) @ centred(
        layer.input_layernorm.weight
    )
    q, k, v = (fused[:, i].reshape(D_MODEL, D_MODEL) for i in range(3))
    return Plain(q, k, v, layer.attention.dense.weight.T)


PLAIN: dict[str, Callable[[Any], Plain]] = {
    "llama": plain_llama,
    "granite": plain_granite,
    "gemma2": plain_gemma2,
    "olmo2": plain_olmo2,
    "qwen3": plain_qwen3,
    "gpt2": plain_gpt2,
    "gpt_neox": plain_neox,
}
PER_HEAD_NORM = {"qwen3"}
POST_NORM = {"gemma2", "olmo2"}


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).double().sum() / (a.double().norm() * b.double().norm()))


def found(name: str, layer: int = LAYER) -> tuple[nn.Module, LayerMaps]:
    model = build(name)
    with linear_maps(model, find_anatomy(model)) as maps:
        return model, maps.layer(layer)


def unembedding_of(maps: LinearMaps) -> Unembedding:
    unembedding = maps.unembedding()
    assert isinstance(unembedding, Unembedding)
    return unembedding


@pytest.mark.parametrize("name", PLAIN)
def test_what_q_k_and_v_read_is_the_weights_with_the_norms_folded_in(name: str) -> None:
    model, maps = found(name)
    plain = PLAIN[name](model)
    for kind in ("query", "key", "value"):
        ours, weights = getattr(maps, kind), getattr(plain, kind)
        assert ours.shape == (len(weights) // D_HEAD, D_HEAD, D_MODEL)
        heads = weights.view_as(ours)
        # A norm within each head leaves each head a scale of its own.
        pairs = list(zip(ours, heads, strict=True)) if name in PER_HEAD_NORM and kind != "value" else [(ours, heads)]
        assert all(cosine(a, b) > 1 - 1e-6 for a, b in pairs), kind
        assert cosine(ours, heads.flip(0)) < 0.9  # the wrong heads would show


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_head_writes_is_the_output_projection_and_what_comes_after_it(name: str) -> None:
    model, maps = found(name)
    plain = PLAIN[name](model)
    assert maps.writes is not None
    ours = maps.writes.flatten(0, 1)
    if name in POST_NORM:
        assert cosine(ours, plain.output) > 1 - 1e-6
    else:
        assert torch.allclose(ours, plain.output, rtol=1e-4, atol=1e-5)
    assert cosine(ours, plain.output.roll(D_HEAD, 0)) < 0.9


def attention_calls(model: nn.Module, tokens: Tensor) -> list[AttentionCall]:
    seen: list[AttentionCall] = []

    def note(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        seen.append(call)
        return call.native(call.q, call.k, call.v, call.mask)

    with torch.no_grad(), intercepted(model, note):
        model(input_ids=tokens)
    return seen


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "gemma2", "granite", "olmo2", "qwen3", "qwen2", "gpt_oss"]
)
def test_values_are_the_models_own_wherever_a_token_stands(name: str) -> None:
    model: Any = build(name)
    tokens = tiny_tokens()
    native = attention_calls(model, tokens)
    with torch.no_grad():
        streams = model(input_ids=tokens, output_hidden_states=True).hidden_states
    with linear_maps(model, find_anatomy(model)) as maps:
        for layer, call in enumerate(native):
            ours = maps.values(layer, streams[layer].flatten(0, 1))
            v = call.v.transpose(1, 2).flatten(0, 1)
            assert torch.allclose(ours, v, rtol=1e-4, atol=1e-5), layer


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "deepseek_v32"])
def test_a_whole_stream_through_the_unembedding_gives_the_native_logits(name: str) -> None:
    model: Any = build(name)
    tokens = tiny_tokens(seed=5)
    streams: list[Tensor] = []
    anatomy = find_anatomy(model)
    last = model.get_submodule(anatomy.layers[-1].module)
    handle = last.register_forward_hook(lambda _m, _a, out: streams.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.flatten(0, 1)
    handle.remove()
    with linear_maps(model, anatomy) as maps:
        unembedding = unembedding_of(maps)
        ids, hidden = torch.arange(20, 60), streams[0].flatten(0, 1)
        ours = unembedding.through(hidden, hidden, ids) + unembedding.constant(ids)
        half = unembedding.through(hidden / 2, hidden, ids)  # the scale is the whole stream's
        assert torch.allclose(2 * half, ours - unembedding.constant(ids), rtol=1e-4, atol=1e-5)
    if unembedding.softcap is not None:
        assert (logits.abs() < unembedding.softcap).all()
        ours = unembedding.softcap * torch.tanh(ours / unembedding.softcap)
    assert torch.allclose(ours, logits[:, ids], rtol=1e-4, atol=1e-4)


def test_multipliers_and_caps_are_found() -> None:
    for name, multiplier, cap in (("granite", 1 / 0.7, None), ("gemma2", 1.0, 3.0), ("llama", 1.0, None)):
        model = build(name)
        with linear_maps(model, find_anatomy(model)) as maps:
            unembedding = unembedding_of(maps)
        assert unembedding.multiplier == pytest.approx(multiplier, rel=1e-6)
        assert unembedding.softcap == cap


def test_a_head_that_is_more_than_a_product_has_no_unembedding() -> None:
    model: Any = build("llama")
    model.lm_head.register_forward_hook(lambda _m, _a, out: out + 0.3 * out**2)
    with linear_maps(model, find_anatomy(model)) as maps:
        assert maps.unembedding() == "this model's logits are not its output head's product times one number"


def test_a_norm_that_is_none_has_no_unembedding() -> None:
    model: Any = build("llama")
    model.model.norm.register_forward_hook(lambda _m, _a, out: torch.tanh(out))
    with linear_maps(model, find_anatomy(model)) as maps:
        assert maps.unembedding() == "what stands between the last layer and the head is no norm or linear map"


def test_layers_without_maps_say_why() -> None:
    _, gated = found("qwen3_next")
    assert gated.writes is None
    assert gated.missing == {"output": "what attention adds is not linear in z, its norm's scale apart"}
    _, linear_attention = found("qwen3_next", 0)
    assert "another kind of layer" in linear_attention.missing["value"]
    _, mamba = found("mamba")
    assert set(mamba.missing) == {"query", "key", "value", "output"}
    _, bypass = found("gptj")
    assert set(bypass.missing) == {"query", "key"}
    assert "attention interface" in bypass.missing["query"]


def test_a_layer_that_bypasses_the_interface_has_its_ov_circuit() -> None:
    model, maps = found("gptj")
    layer: Any = model.get_submodule(f"transformer.h.{LAYER}")
    assert maps.value is not None
    assert maps.writes is not None
    assert cosine(maps.value.flatten(0, 1), layer.attn.v_proj.weight @ centred(layer.ln_1.weight)) > 1 - 1e-6
    assert torch.allclose(maps.writes.flatten(0, 1), layer.attn.out_proj.weight.T, rtol=1e-4, atol=1e-5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MATRIX, BIAS = random(6, 4, seed=1), random(4, seed=2)


@pytest.mark.parametrize(
    ("function", "is_map"),
    [
        (lambda x: x @ MATRIX + BIAS, True),
        (lambda x: nn.functional.layer_norm(x, (6,)) @ MATRIX + BIAS, True),
        (lambda x: nn.functional.rms_norm(x @ MATRIX, (4,)) + BIAS, True),
        (lambda x: torch.zeros(len(x), 4), True),
        (lambda x: torch.tanh(x @ MATRIX), False),
        (lambda x: x @ MATRIX + 1e-3 * x[:, :4] ** 2, False),
        (lambda x: -nn.functional.rms_norm(x.abs(), (6,)) @ MATRIX, False),
    ],
    ids=["linear", "norm before", "norm after", "zero", "tanh", "a little square", "absolute"],
)
def test_only_maps_that_are_linear_but_for_one_scale_are_fitted(
    function: Callable[[Tensor], Tensor], is_map: bool
) -> None:
    x = random(20, 6, seed=3)
    fitted = fit(lambda rows: function(rows)[:, None], x, function(x)[:, None])
    assert (fitted is not None) == is_map
    if fitted is not None:
        y = function(x)[:, None]
        again = fitted.direction(x) / fitted.scale(x, y)[..., None] + fitted.offset
        assert torch.allclose(again, y, rtol=1e-4, atol=1e-5)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_narrow_model_is_given_back_as_it_was_and_no_hook_stays() -> None:
    model = build("llama").to(torch.bfloat16)  # type: ignore[arg-type]  # annotated for a device
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with linear_maps(model, find_anatomy(model)) as maps:
        unembedding_of(maps)
        assert not maps.layer(0).missing
        with pytest.raises(RuntimeError):
            maps.values(0, torch.zeros(2, D_MODEL + 1))
    assert hooks(model) == 0
    assert all("forward" not in layer.__dict__ for layer in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_calls_cost_no_logits() -> None:
    model: Any = build("llama")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: seen.append(out.shape[0] * out.shape[1]))
    Trials(model, find_anatomy(model)).calls(torch.zeros(50, 2, dtype=torch.long))
    assert seen[-1] == 1


def test_values_that_depend_on_more_than_the_stream_are_refused() -> None:
    model: Any = build("llama")

    def mix_positions(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + 0.1 * output.cumsum(1)

    model.model.layers[LAYER].self_attn.v_proj.register_forward_hook(mix_positions)
    with linear_maps(model, find_anatomy(model)) as maps:
        layer = maps.layer(LAYER)
        assert "depends on more than the token's residual stream" in layer.missing["values"]
        assert set(layer.missing) == {"query", "key", "value", "values"}
        assert not maps.layer(0).missing
