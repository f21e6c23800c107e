"""Attention rollout (Abnar & Zuidema 2005.00928): which tokens attention could have brought to a position.

With W the mean of a layer's patterns over heads, each layer mixes positions by A = (W + I) / rows' sums, which is
½ W + ½ I where the rows of W sum to 1 (with attention sinks they sum to less); the rollout is A_last · … · A_0.
It looks at attention alone: values, MLPs and what the model answers have no part in it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp_cli.engine.patterns import BUDGET, PatternProof, attention_patterns
from mechinterp_cli.engine.softmax_fix import widened
from mechinterp_cli.models.anatomy import Anatomy


def rollout(
    model: nn.Module,
    anatomy: Anatomy,
    tokens: Int[Tensor, "prompts positions"],
    read: Int[Tensor, " prompts"],
    *,
    budget: int = BUDGET,
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[Float[Tensor, "prompts positions"], PatternProof]:
    """The share of each token in a position, over all layers.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        tokens: Ids of one length.
        read: The position of each prompt that is asked about.
        budget: Bytes for a layer's patterns; beside them stand three matrices [positions, positions] of each prompt of
            a pass.
        tick: Called with the number of (prompt, layer) pairs that are done.

    Returns:
        Shares, float32 on the CPU, that sum to 1 for each prompt; and how well the patterns explain the model's own
        attention.

    Raises:
        UserError: A layer has no softmax attention that can be seen; says which and why.
        RunError: One head's pattern is beyond the budget, or a layer gives NaN or infinity.
        ProofError: A pattern does not give the model's own z.
    """
    layers = range(anatomy.n_layers)
    flow = _Flow([_heads(anatomy, layer) for layer in layers], read, torch.zeros(tokens.shape))
    proof = attention_patterns(model, anatomy, tokens, layers, flow.visit, budget=budget, tick=tick)
    return flow.shares, proof


def _heads(anatomy: Anatomy, layer: int) -> int:
    heads = anatomy.layers[layer].heads
    return 0 if heads is None else heads.query


@dataclass(eq=False)
class _Flow:
    """The product of the layers so far; they are shown from the first to the last, some heads at a time."""

    heads: list[int]
    read: Tensor
    shares: Tensor
    _summed: Tensor = field(default_factory=lambda: torch.empty(0))
    _carried: Tensor = field(default_factory=lambda: torch.empty(0))

    def visit(self, layer: int, pattern: Float[Tensor, "b h q k"], prompts: slice, heads: slice) -> None:
        """Visitor of the patterns."""
        own = widened(pattern).sum(1)
        self._summed = own if heads.start == 0 else self._summed.add_(own)
        if heads.stop < self.heads[layer]:
            return
        mixing = self._summed.div_(self.heads[layer])
        mixing.diagonal(dim1=-2, dim2=-1).add_(1)
        mixing.div_(mixing.sum(-1, keepdim=True))
        self._carried = mixing if layer == 0 else mixing @ self._carried
        if layer == len(self.heads) - 1:
            rows = torch.arange(len(mixing), device=mixing.device)
            self.shares[prompts] = self._carried[rows, self.read[prompts].to(mixing.device)].float().cpu()
