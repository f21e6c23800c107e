"""Tiny random models of every architecture in transformers' causal-LM mapping, made from configs alone.

One generic set of sizes builds most of them; what an architecture needs beside it stands as data in
`benchmarks.tiny_configs`. The weights are drawn so that a wrong computation shows: logits of order one,
attention that is not uniform, norms that are not the identity, biases and sinks that are not zero.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from benchmarks.tiny_configs import GENERIC, LAYERS, MIXED_WITH_FULL_ATTENTION, OVERRIDES, UNBUILDABLE

__all__ = ["UNBUILDABLE", "entries", "tiny_config", "tiny_model", "tiny_tokens"]

_FIRST_FREE_TOKEN = 90
_ORDINARY_TOKENS = (5, 90)
_GAIN = 1.4


def entries() -> list[str]:
    """Return the model type of every entry of transformers' causal-LM mapping, in its order."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_tokens(*, batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Draw token ids that no tiny config treats specially.

    Args:
        batch: Number of prompts.
        length: Tokens per prompt.
        seed: Of the generator.

    Returns:
        Ids of shape [batch, length].
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(*_ORDINARY_TOKENS, (batch, length), generator=generator)


def tiny_config(model_type: str, *, layers: int = 3, overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Return a tiny config of an architecture: width 32, 4 heads, 97 tokens.

    Args:
        model_type: An entry of the causal-LM mapping.
        layers: Number of decoder layers, where the architecture does not need a number of its own.
        overrides: Config values that go before the generic ones and the architecture's own.

    Returns:
        The config, of the class that the mapping names.
    """
    given = _merged(OVERRIDES.get(model_type, {}), overrides or {})
    return _build_config(CONFIG_MAPPING[model_type], layers, given)


def tiny_model(
    model_type: str,
    *,
    seed: int = 0,
    layers: int = 3,
    overrides: Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build a tiny random model of an architecture, in float32, in evaluation mode and without gradients.

    Args:
        model_type: An entry of the causal-LM mapping.
        seed: Of the weights.
        layers: Number of decoder layers.
        overrides: Config values that go before the generic ones and the architecture's own.
        attn_implementation: Passed on to transformers; its own choice when None.

    Returns:
        The model, on the CPU.

    Raises:
        KeyError: If the model type is no entry of the mapping.
        ValueError: If the entry is one of `UNBUILDABLE`.
    """
    if model_type in UNBUILDABLE:
        raise ValueError(f"{model_type} has no tiny model: {UNBUILDABLE[model_type]}")
    config = tiny_config(model_type, layers=layers, overrides=overrides)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class._from_config(
            _causal_part(config, model_class), dtype=torch.float32, **options
        )
        _randomise(model, torch.Generator().manual_seed(seed))
    model.train(False).requires_grad_(False)
    return model


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings, the second before the first."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _build_config(config_class: type[PreTrainedConfig], layers: int, given: Mapping[str, Any]) -> PreTrainedConfig:
    """Build a config and its parts, with a full-attention layer among layers that would all be of another kind."""
    values = _generic_values(config_class, layers)
    parts = _parts(config_class)
    for name, part in parts.items():
        values[name] = _build_config(part, layers, given.get(name) or {})
    values.update({name: value for name, value in given.items() if name not in parts})
    config = config_class(**values)
    if "layer_types" in given or "layer_types" not in _field_names(config_class):
        return config
    kinds = config.layer_types or []
    if len(kinds) > 1 and len(set(kinds)) == 1 and kinds[0] in MIXED_WITH_FULL_ATTENTION:
        config = config_class(**{**values, "layer_types": _mixed(kinds)})
    return config


def _generic_values(config_class: type[PreTrainedConfig], layers: int) -> dict[str, Any]:
    """Return the generic values of the fields that a config class has."""
    names = _field_names(config_class)
    values = {name: layers if GENERIC[name] is LAYERS else GENERIC[name] for name in names if name in GENERIC}
    free = _FIRST_FREE_TOKEN
    for name in names:
        if name not in values and name.endswith(("_token_id", "_token_index")):
            values[name] = free
            free = min(free + 1, GENERIC["vocab_size"] - 1)
    if "kv_lora_rank" in names:  # latent attention expands its keys to every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values


def _field_names(config_class: type[PreTrainedConfig]) -> list[str]:
    """Return the names of a config class's fields."""
    return [field.name for field in dataclasses.fields(config_class)]


def _parts(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """Return the classes of a composite config's parts by field name."""
    parts = {}
    for name, default in config_class.sub_configs_defaults.items():
        part: Any = getattr(default, "config_class", default)
        parts[name] = CONFIG_MAPPING[default.model_type] if part is AutoConfig else part
    return parts


def _causal_part(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """Return the part of a config that the causal language model is made from; most often all of it."""
    parts = (getattr(config, name) for name in _parts(type(config)))
    return next((part for part in parts if type(part) is model_class.config_class), config)


def _mixed(kinds: list[str]) -> list[str]:
    """Put one full-attention layer among layers that are all of another kind."""
    middle = len(kinds) // 2
    return [*kinds[:middle], "full_attention", *kinds[middle + 1 :]]


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Redraw the weights in place, keeping the meaning of those that are not matrices."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                _redraw(module, name, parameter.data, generator)
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("_bias") or name == "layer_scalar":
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)


def _redraw(module: nn.Module, name: str, data: torch.Tensor, generator: torch.Generator) -> None:
    """Redraw one parameter in place."""
    noise = torch.randn(data.shape, generator=generator)
    if isinstance(module, nn.Embedding):
        data.copy_(0.3 * noise)
    elif isinstance(module, nn.Linear) and name == "weight":
        data.copy_(_GAIN / math.sqrt(data.shape[1]) * noise)
    elif isinstance(module, Conv1D) and name == "weight":
        data.copy_(_GAIN / math.sqrt(data.shape[0]) * noise)
    elif data.ndim < 2 or name == "A_log":
        data += (0.5 if "sink" in name else 0.1) * noise
    elif not _informative(data):
        data.copy_(_GAIN / math.sqrt(data[0].numel() ** (1 / max(data.ndim - 1, 1))) * noise)


def _informative(data: torch.Tensor) -> bool:
    """Whether an array of weights already varies enough for an error in it to show."""
    return bool(data.isfinite().all()) and 0.1 < float(data.std()) < 10
