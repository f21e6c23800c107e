"""What loading a model gives."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mechinterp_cli.models.anatomy import Anatomy


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from, for the manifest."""

    id: str
    """As the config names it."""
    path: str
    """`hub`, `folder`, `gguf` or `zoo`: how the id was resolved."""
    revision: str | None
    weight_files: dict[str, str] = field(default_factory=dict)
    """File name to sha256, of every file that holds weights."""
    tokenizer_sha256: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    attn_implementation: str = ""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    quantization: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, without gradients, with its tokenizer and its anatomy."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    anatomy: "Anatomy"
    source: ModelSource

    @property
    def embedding_rows(self) -> int:
        """How many token ids the model can take; a tokenizer may have more or fewer."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]  # unannotated
