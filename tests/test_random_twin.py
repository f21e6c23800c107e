"""The random twin is the model's architecture with weights that only the seed decides."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mechinterp_cli.models.fingerprint import fingerprint
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.random_twin import random_twin
from mechinterp_cli.models.walk import forward
from tests.ablate_hooks import tiny
from tests.models_fixtures import toy

__all__ = ["toy"]

FAMILIES = ["gpt2", "llama", "gemma2", "mamba"]
TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


def state(loaded: LoadedModel) -> dict[str, Tensor]:
    return dict(loaded.model.state_dict())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_twin_has_the_models_shape_and_none_of_its_weights(name: str, toy: LoadedModel) -> None:
    loaded = tiny(name, toy)
    before = {key: weight.clone() for key, weight in state(loaded).items()}
    twin = random_twin(loaded, 0)
    assert type(twin.model) is type(loaded.model)
    assert {k: (w.shape, w.dtype) for k, w in state(twin).items()} == {k: (w.shape, w.dtype) for k, w in before.items()}
    matrices = [key for key, weight in before.items() if weight.ndim == 2 and "A_log" not in key]
    assert any("emb" in key or "wte" in key for key in matrices)
    assert not any(torch.equal(state(twin)[key], before[key]) for key in matrices)
    assert all(torch.equal(weight, before[key]) for key, weight in state(loaded).items())
    assert not twin.model.training
    assert not any(weight.requires_grad for weight in twin.model.parameters())
    assert twin.model.config.to_dict() == loaded.model.config.to_dict()
    assert twin.model.config is not loaded.model.config
    assert forward(twin.model, TOKENS).isfinite().all()


def test_the_seed_alone_decides_the_weights(toy: LoadedModel) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (random_twin(toy, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)  # torch's own numbers go on as if nothing had been drawn
    assert torch.equal(forward(first.model, TOKENS), forward(again.model, TOKENS))
    assert not torch.allclose(forward(first.model, TOKENS), forward(other.model, TOKENS))


def test_the_twin_computes_in_the_models_type_with_its_attention(toy: LoadedModel) -> None:
    half: Any = tiny("llama", toy)
    half.model.to(torch.bfloat16)
    assert {weight.dtype for weight in random_twin(half, 0).model.parameters()} == {torch.bfloat16}
    assert toy.anatomy.attn_implementation == "eager"
    assert random_twin(toy, 0).model.config._attn_implementation == "eager"


def test_twins_and_the_model_are_told_apart_by_their_fingerprints(toy: LoadedModel) -> None:
    prints = [fingerprint(model) for model in (toy, random_twin(toy, 0), random_twin(toy, 1))]
    assert all(found is not None for found in prints)
    assert len({str(found) for found in prints}) == 3
    assert fingerprint(random_twin(toy, 1)) == prints[2]
    twin = random_twin(toy, 3).source
    assert (twin.id, twin.path, twin.revision) == ("toy-induction (random weights, seed 3)", "random", None)
