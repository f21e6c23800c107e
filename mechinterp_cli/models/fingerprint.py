"""Everything that a loaded model's activations follow from, beside the tokens."""

from importlib.metadata import version
from typing import Any

from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.loaded import LoadedModel


def fingerprint(model: LoadedModel) -> dict[str, Any] | None:
    """Weights, config, type, attention and device of a model, and the packages that compute, as plain data.

    None where nobody knows what the weights are, so that nothing may be kept under their name.
    """
    source = model.source
    if not source.weight_files:
        return None
    return {
        "weights": sorted(source.weight_files.items()),
        "config": {key: value for key, value in model.model.config.to_dict().items() if key != "_name_or_path"},
        "revision": source.revision,
        "dtype": source.dtype,
        "attention": source.attn_implementation,
        "device": device_of(model.model).type,
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
