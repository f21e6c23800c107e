"""The output head for some tokens alone: all else after the last layer is the model's own code as ever.

Where a few tokens' logits are all that is asked for, the rest of the vocabulary is work for nothing: in SmolLM2 a row
meets 3.5 million weights in each layer, and 28 million in the head. The head's weight (and bias) is changed for its
rows of these tokens, by reference: an embedding that is tied to it keeps the whole, and the model's own code around the
head (norm, scaling, soft-cap) runs on logits [..., tokens].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn


def whole_head_reason(model: nn.Module, vocab_size: int) -> str | None:
    """Why the model's head cannot be narrowed, known without trying; None where it can be tried.

    Args:
        model: The model.
        vocab_size: How many logits it gives.
    """
    head = _head(model)
    if type(head) is not nn.Linear:
        return f"the output head is no plain linear map but {type(head).__name__}"
    if "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks:
        return "the output head carries hooks"
    if type(head.weight) is not nn.Parameter or head.weight.device.type == "meta":
        return "the output head's weight is offloaded or quantised"
    if head.weight.shape[0] != vocab_size:
        return f"the output head has {head.weight.shape[0]} rows for {vocab_size} logits"
    return None


@contextmanager
def narrow_head(model: nn.Module, tokens: Int[Tensor, " tokens"] | None) -> Iterator[None]:
    """Let the model give the logits of some tokens alone, in their order; undone at the end.

    Args:
        model: A model for which `whole_head_reason` has none.
        tokens: Ids, on the head's device; None leaves the head whole.
    """
    head = None if tokens is None else _head(model)
    kept = {} if head is None else dict(head.named_parameters(recurse=False))
    try:
        for name, parameter in kept.items():
            setattr(head, name, nn.Parameter(parameter.detach()[tokens], requires_grad=False))
        yield
    finally:
        for name, parameter in kept.items():
            setattr(head, name, parameter)


def _head(model: nn.Module) -> nn.Module | None:
    find: Any = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = find() if find is not None else None
    return head
