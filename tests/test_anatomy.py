"""The anatomy: what is found where, that it is true, and that what cannot be proved is not declared."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.tiny import tiny_model, tiny_tokens
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import read_sites
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.kinds import SITE_KINDS
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.residual import Addition, Heads
from mechinterp_cli.models.walk import forward
from tests.families import FAMILIES, build
from tests.models_fixtures import planted, toy
from tests.oracle import NAMES

__all__ = ["planted", "toy"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_said_to_be_added_is_what_is_added(name: str) -> None:
    model = build(name)
    anatomy = find_anatomy(model)
    sites = {Site(kind, layer.index) for layer in anatomy.layers for kind in layer.sites}
    seen = read_sites(model, anatomy, sites, lambda: forward(model, tiny_tokens()))
    summed = 0
    for layer in anatomy.layers:
        value = {kind: seen[Site(kind, layer.index)] for kind in layer.sites}
        added: list[Tensor] = [value[kind] for kind in ("attn_out", "mlp_out") if kind in value]
        if added:
            summed += 1
            assert torch.allclose(value["resid_pre"] + sum(added), value["resid_post"], rtol=1e-4, atol=1e-5)
        if "resid_mid" in value:
            assert torch.allclose(value["resid_pre"] + value["attn_out"], value["resid_mid"], rtol=1e-4, atol=1e-5)
        if layer.index:
            assert torch.equal(value["resid_pre"], seen[Site("resid_post", layer.index - 1)])
    assert summed == (0 if name == "mamba" else len(anatomy.layers))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "pattern" not in family.lacks])
def test_each_tokens_pattern_sums_to_one_and_what_it_weighs_is_z(name: str) -> None:
    model = build(name)
    anatomy = find_anatomy(model)
    layers = [layer for layer in anatomy.layers if "pattern" in layer.sites]
    sites = {Site(kind, layer.index) for layer in layers for kind in ("pattern", "v", "z", "scores")}
    seen = read_sites(model, anatomy, sites, lambda: forward(model, tiny_tokens()))
    for layer in layers:
        pattern, v, z = (seen[Site(kind, layer.index)] for kind in ("pattern", "v", "z"))
        total = pattern.sum(-1)
        assert (total < 1).all() if name == "gpt_oss" else torch.allclose(total, torch.ones_like(total), atol=1e-5)
        assert pattern.transpose(1, 2).triu(1).abs().max() == 0, "no token attends to a later one"
        v = v.repeat_interleave(z.shape[2] // v.shape[2], 2)
        assert torch.allclose(torch.einsum("bqhk,bkhd->bqhd", pattern, v), z, rtol=1e-4, atol=1e-5)


def test_a_llama_in_full() -> None:
    anatomy = find_anatomy(build("llama"))
    layer = anatomy.layers[1]
    assert (anatomy.n_layers, anatomy.d_model, anatomy.vocab_size, anatomy.max_length) == (3, 32, 97, 128)
    assert anatomy.chained
    assert anatomy.causal
    assert layer.module == "model.layers.1"
    assert layer.attention == "model.layers.1.self_attn"
    assert layer.heads == Heads(query=4, key_value=2, d_head=8, d_value=8)
    assert layer.attn_out == Addition("model.layers.1.self_attn", 1.0)
    assert layer.mlp_out == Addition("model.layers.1.mlp", 1.0)
    assert layer.mid == "model.layers.1.post_attention_layernorm"
    assert (layer.down, layer.d_mlp) == ("model.layers.1.mlp.down_proj", 64)
    assert [layer.features(kind, 32) for kind in ("q", "z", "k", "v", "scores", "neuron", "resid_mid")] == [
        *(4, 4, 2, 2, 4, 64, 32)
    ]
    assert set(layer.missing) == {"embed"}
    assert set(anatomy.sites) == set(SITE_KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_those_that_a_person_would_name(name: str) -> None:
    names = NAMES[name]
    for layer in find_anatomy(build(name)).layers:
        assert layer.module == f"{names.layers}.{layer.index}"
        assert layer.attn_out == Addition(f"{layer.module}.{names.attn_out}", names.scale)
        assert layer.mlp_out is not None
        assert layer.mlp_out.scale == names.scale
        assert layer.down == (f"{layer.module}.{names.down}" if names.down else None)


def test_deepseeks_values_are_narrower_than_its_keys() -> None:
    heads = find_anatomy(build("deepseek_v3")).layers[0].heads
    assert heads is not None
    assert heads.d_value < heads.d_head


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("gptj", "q", "does not go through transformers' attention interface"),
        ("phi", "resid_mid", "attention and MLP read the same stream"),
        ("mixtral", "neuron", "mixture of experts"),
        ("mamba", "attn_out", "does not hold in this layer"),
        ("llama", "embed", "what enters layer 0"),
    ],
)
def test_a_site_that_a_layer_lacks_comes_with_the_reason(name: str, kind: str, reason: str) -> None:
    layer = find_anatomy(build(name)).layers[-1]
    assert kind not in layer.sites
    assert reason in layer.missing[kind]


def test_heads_of_another_mixer_are_not_cut_by_the_softmax_layers_head_count() -> None:
    layers = find_anatomy(build("qwen3_next")).layers
    assert [("z" in layer.sites, layer.by_interface) for layer in layers] == [
        (False, False),
        (True, True),
        (False, False),
    ]
    assert "another kind of layer" in layers[0].missing["z"]


class Halved(nn.Module):
    """A block whose output is halved by the layer: additivity with a constant that no config names."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Scale what the layer gives."""
        return self.inner(*args, **kwargs) * self.factor


def test_a_layer_that_scales_its_output_declares_nothing_that_is_added() -> None:
    model: Any = build("llama")
    model.model.layers[1] = Halved(model.model.layers[1], 0.9)
    layers = find_anatomy(model).layers
    assert {"attn_out", "mlp_out", "resid_mid", "neuron"} <= set(layers[1].missing)
    assert {"resid_pre", "resid_post", "q", "z"} <= set(layers[1].sites)
    assert "attn_out" in layers[0].sites


def test_a_model_whose_layers_are_not_chained_is_told_apart() -> None:
    model: Any = build("llama")
    assert find_anatomy(model).chained
    model.model.layers[2].register_forward_pre_hook(lambda _m, args: (args[0] * 2, *args[1:]))
    assert not find_anatomy(model).chained


def test_looking_ahead_is_found_out() -> None:
    model: Any = build("llama")
    assert find_anatomy(model).causal
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    assert not find_anatomy(model).causal


def test_the_list_of_layers_can_be_named() -> None:
    model = build("llama")
    assert find_anatomy(model, {"layers": "model.layers"}).n_layers == 3
    with pytest.raises(
        UserError, match=re.escape("model.anatomy.layers: 'model.blocks' is not a list of modules")
    ) as error:
        find_anatomy(model, {"layers": "model.blocks"})
    assert "model.layers" in error.value.remedy


def test_a_model_without_a_stack_of_layers_is_refused_with_the_remedy() -> None:
    model: Any = build("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="no stack of decoder layers") as error:
        find_anatomy(model)
    assert "model.anatomy.layers" in error.value.remedy


def test_finding_the_anatomy_leaves_the_model_and_the_generator_alone() -> None:
    model, state = build("gemma2"), torch.get_rng_state()
    with torch.no_grad():
        before = model(input_ids=tiny_tokens()).logits
        find_anatomy(model)
        assert torch.equal(model(input_ids=tiny_tokens()).logits, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_and_float32_have_the_same_anatomy() -> None:
    narrow: nn.Module = build("gemma2")
    assert find_anatomy(narrow.to(torch.bfloat16)) == find_anatomy(build("gemma2"))


@pytest.mark.parametrize("model_type", ["granitemoe", "openai-gpt"])
def test_models_that_pass_their_keywords_on_or_return_lists_are_read(model_type: str) -> None:
    model: PreTrainedModel = tiny_model(model_type)
    anatomy = find_anatomy(model)
    assert {"resid_pre", "resid_post"} <= set(anatomy.sites)
    assert anatomy.chained


def test_a_stack_that_does_not_reach_the_logits_is_not_the_decoder() -> None:
    model: Any = build("llama")
    aside: Any = build("llama", seed=1).model.layers
    model.aside = nn.ModuleList([*aside, *build("llama", seed=2).model.layers])  # larger than the decoder

    def run_aside(_module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        for layer in model.aside:
            hidden = layer(hidden, position_embeddings=kwargs["position_embeddings"])

    model.model.layers[0].register_forward_pre_hook(run_aside, with_kwargs=True)
    assert find_anatomy(model).layers[0].module == "model.layers.0"
    assert find_anatomy(model, {"layers": "aside"}).n_layers == 6


def test_the_zoos_models_have_every_site_that_their_families_have(toy: LoadedModel, planted: LoadedModel) -> None:
    assert set(toy.anatomy.sites) == set(SITE_KINDS)
    assert set(planted.anatomy.sites) >= set(SITE_KINDS) - {"neuron", "mlp_out"}
