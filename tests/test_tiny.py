import random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.tiny import UNBUILDABLE, entries, tiny_config, tiny_model, tiny_tokens
from benchmarks.tiny_configs import OVERRIDES
from tests.families import FAMILIES, WINDOW, build

BUILDABLE = [entry for entry in entries() if entry not in UNBUILDABLE]
SAMPLE = random.Random(0).sample(BUILDABLE, 25)
# Masks that let later tokens in by default; Reformer's hash buckets and ProphetNet's reshaped position scores do too.
NOT_CAUSAL = {"cpmant", "prophetnet", "reformer", "xlm", "xlnet"}


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=ids, use_cache=False).logits
    return output


def effect_of_token(model: PreTrainedModel, position: int) -> Tensor:
    """How far each position's logits move when one token is changed, [positions]."""
    ids = tiny_tokens()
    changed = ids.clone()
    changed[:, position] = tiny_tokens(length=1, seed=1)[:, 0]
    return (logits(model, changed) - logits(model, ids)).abs().amax((0, 2))


def check_entry(entry: str) -> None:
    model = tiny_model(entry)
    got = logits(model, tiny_tokens())
    assert got.shape == (2, 24, 97)
    assert got.isfinite().all()
    assert 0.4 < got.std() < 8
    effect = effect_of_token(model, 12)
    assert effect[-1] > 1e-3, "the last logits do not see a token in the middle"
    if entry not in NOT_CAUSAL:
        assert effect[:12].max() < 1e-4, "earlier logits see a later token"


@pytest.mark.parametrize("entry", SAMPLE)
def test_a_sample_of_the_architectures_builds_runs_and_listens(entry: str) -> None:
    check_entry(entry)


@pytest.mark.slow
@pytest.mark.parametrize("entry", BUILDABLE)
def test_every_architecture_builds_runs_and_listens(entry: str) -> None:
    check_entry(entry)


def test_nearly_every_entry_has_a_model_and_the_rest_a_reason() -> None:
    assert len(BUILDABLE) >= 180
    assert set(UNBUILDABLE) <= set(entries())
    assert set(OVERRIDES) <= set(entries())
    for entry, reason in UNBUILDABLE.items():
        with pytest.raises(ValueError, match=reason[:20]):
            tiny_model(entry)


@pytest.mark.parametrize("entry", sorted(NOT_CAUSAL))
def test_models_named_as_not_causal_are_not(entry: str) -> None:
    assert effect_of_token(tiny_model(entry), 12)[:12].max() > 1e-2


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (logits(tiny_model("gpt2", seed=seed), tiny_tokens()) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_is_trainable_dropped_out_or_trivial() -> None:
    model = tiny_model("gpt_oss")
    assert not model.training
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.dtype == torch.float32, name
        assert parameter.std() > 0.01, name


def test_overrides_and_layers_reach_nested_configs() -> None:
    config = tiny_config("gemma3", layers=2, overrides={"text_config": {"sliding_window": 4}})
    text = config.get_text_config()
    assert (text.sliding_window, text.num_hidden_layers, text.vocab_size) == (4, 2, 97)
    assert tiny_config("gemma3").get_text_config().sliding_window == 6


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_causal_has_three_layers_and_the_attention_it_says(name: str) -> None:
    family, model = FAMILIES[name], build(name)
    assert model.config.num_hidden_layers == 3
    if family.attention != "none":
        assert model.config._attn_implementation == family.attention
    effect = effect_of_token(model, 20)
    assert effect[:20].max() < 1e-5
    assert effect[20:].min() > 1e-4


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_a_window_in_every_layer_is_shorter_than_the_prompt(name: str) -> None:
    reach = 3 * (WINDOW - 1)
    effect = effect_of_token(build(name), 0)
    assert effect[: reach + 1].min() > 0
    assert effect[reach + 1 :].max() == 0
    whole = tiny_model(FAMILIES[name].model_type, overrides={"sliding_window": None})
    assert effect_of_token(whole, 0)[reach + 1 :].min() > 0


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss"])
def test_a_window_in_some_layers_changes_the_numbers(name: str) -> None:
    family, ids = FAMILIES[name], tiny_tokens()
    wide = tiny_model(family.model_type, overrides={**family.overrides, "sliding_window": 64})
    assert (logits(build(name), ids) - logits(wide, ids)).abs().max() > 1e-2


def test_soft_caps_and_sinks_change_the_numbers() -> None:
    ids = tiny_tokens()
    capped = build("gemma2")
    free = tiny_model("gemma2", overrides={**FAMILIES["gemma2"].overrides, "attn_logit_softcapping": None})
    assert (logits(capped, ids) - logits(free, ids)).abs().max() > 1e-2
    model = build("gpt_oss")
    with_sinks = logits(model, ids)
    for layer in model.model.layers:
        layer.self_attn.sinks.fill_(-1e4)
    assert (logits(model, ids) - with_sinks).abs().max() > 1e-2
