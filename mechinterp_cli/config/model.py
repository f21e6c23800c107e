"""The `model:` section: which model, from where, and how it is loaded."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from mechinterp_cli.config.base import BaseConfig
from mechinterp_cli.config.types import Flag, Text, unique

Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]


class ModelOptions(BaseConfig):
    """Which model an experiment runs on."""

    id: Text
    """Tried in this order: a name from `mechinterp models`, a local folder, a .gguf file, a Hugging Face id."""
    revision: Text | None = None
    """Branch, tag or commit of a Hugging Face id; a checkpoint (`step600`) of toy-induction."""
    checkpoints: Literal["all"] | Annotated[tuple[Text, ...], Field(min_length=1), AfterValidator(unique)] | None = None
    """Run on each of these moments of its training: revisions, folders, or folders within `id`; `all` of those that
    toy-induction or a local folder has. Every table says in a column `checkpoint` which one a row is of."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of weights and activations; what the file holds is converted."""
    device: Device = "auto"
    """`cpu`, `cuda`, `cuda:N`, `mps`, or `auto`: the first CUDA device, else the CPU."""
    attn_implementation: Literal["eager", "sdpa"] | None = None
    """How attention is computed; null leaves the choice to the model."""
    allow_pickle: Flag = False
    """Accept weights in pickle files (.bin, .pt, .pth), which only PyTorch's restricted unpickler reads."""
    trust_remote_code: Flag = False
    """Run Python code that comes with the model; a Hugging Face id then needs a 40-digit commit as its revision."""
    anatomy: dict[str, Text] | None = None
    """For a model whose decoder layers are not found by themselves: `layers: model.decoder.layers`."""
