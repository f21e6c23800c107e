"""What enters layer 0, read alone; and whether tokens act on the layers through it alone."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp_cli.engine.atp import stream
from mechinterp_cli.engine.gradients import EMBED, Pass, observed
from mechinterp_cli.engine.proof import FLOAT32_TOLERANCE
from mechinterp_cli.models.anatomy import Anatomy


def entering(
    model: nn.Module, anatomy: Anatomy, tokens: Int[Tensor, "prompts positions"]
) -> Float[Tensor, "prompts positions d_model"]:
    """What enters layer 0; the pass ends after that layer.

    Args:
        model: The model.
        anatomy: Its anatomy.
        tokens: Ids of one length.
    """
    return stream(model, anatomy, tokens)(torch.arange(len(tokens)), {EMBED})[EMBED]


def acts_through_embed(model: nn.Module, anatomy: Anatomy, tokens: Int[Tensor, "prompts positions"]) -> bool:
    """Whether the embeddings of other tokens, put at layer 0 in place of these, give the other tokens' logits.

    Where a model hands tokens to its layers in another way too (embeddings of each layer's own), they do not, and an
    embedding that is replaced does not take the token away.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        tokens: Ids to try it on; the other tokens are the same ones, moved on by a place.
    """
    others = tokens.roll(1, dims=1)
    read, prompts = torch.full((len(tokens),), tokens.shape[1] - 1), torch.arange(len(tokens))
    embed = entering(model, anatomy, others)
    got, _ = observed(model, anatomy, Pass(tokens, read, prompts, embed), _logits, ())
    want, _ = observed(model, anatomy, Pass(others, read, prompts), _logits, ())
    return bool((got - want).abs().max() <= FLOAT32_TOLERANCE * want.abs().max())


def _logits(logits: Tensor, _prompts: Tensor) -> Tensor:
    return logits.float()
