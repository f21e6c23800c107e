"""The random-weights twin of a model: the same architecture, freshly initialised, as a baseline for what was learnt."""

import copy
import hashlib
from dataclasses import replace
from typing import Any

import torch

from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.loaded import LoadedModel


def random_twin(loaded: LoadedModel, seed: int) -> LoadedModel:
    """A model of the same config whose weights, embeddings too, are those its class begins its training with.

    Sites are where they are in the model: the anatomy is the same. Nothing is read from disk or network, and torch's
    own random numbers go on as if nothing had been drawn.

    Args:
        loaded: The model.
        seed: Of the weights; they are drawn on the CPU, so that every device has the same.

    Returns:
        The twin on the model's device and in its type, with the model's tokenizer; `source.path` is `random`, and
        `source.weight_files` holds a hash of what the weights follow from (the seed) in place of a file's.
    """
    config = copy.deepcopy(loaded.model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the weights that are drawn are whole
    model_class: Any = type(loaded.model)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model = model_class._from_config(
            config,
            dtype=loaded.model.dtype,
            attn_implementation=loaded.anatomy.attn_implementation or None,
        )
    model = model.train(False).requires_grad_(False).to(device_of(loaded.model))
    return replace(loaded, model=model, source=replace(loaded.source, **_origin(loaded.source.id, seed)))


def _origin(model_id: str, seed: int) -> dict[str, Any]:
    name = f"random weights, seed {seed}"
    return {
        "id": f"{model_id} ({name})",
        "path": "random",
        "revision": None,
        "weight_files": {name: hashlib.sha256(name.encode()).hexdigest()},
        "quantization": None,
    }
