"""Passes that begin at a layer: below the first edit nothing changes, so nothing there is computed again.

Unlike the executors these passes keep gradients: what is edited above can be differentiated with respect to the
values that were put there. Every layer, the final norm and the head run by the model's own code.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.early import forward_until
from mechinterp_cli.engine.edits import Bucket
from mechinterp_cli.engine.instrument import Visitor, Wanted, visiting
from mechinterp_cli.models.anatomy import Anatomy, device_of
from mechinterp_cli.models.record import hooked
from mechinterp_cli.models.walk import LayerCall, first_tensor, forward, stubs

TOLERANCE = 1e-4
"""Of the logits' scale, float32: how well a pass from a saved hidden state must give the whole pass's logits."""
TOKENS_PER_CAPTURE = 8192


class Tail:
    """Edited and unedited passes over one stream of some buckets, from a layer on.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        buckets: The prompts; their `noise` is not looked at.
        stream: Which of the buckets' streams.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, buckets: Sequence[Bucket], stream: str) -> None:
        self.model = model
        self.anatomy = anatomy
        self.device = device_of(model)
        self.tokens = [bucket.tokens[stream].to(self.device) for bucket in buckets]
        self.read = [bucket.read.to(self.device) for bucket in buckets]
        self.layer = 0
        self._layers = [model.get_submodule(layer.module) for layer in anatomy.layers]
        self._entering: list[Tensor] = []
        self._whole: set[int] = set()

    def enter(self, layer: int) -> None:
        """Let the passes to come begin at this layer, or at layer 0 where that does not give the model's own logits.

        The hidden states of one layer are kept at a time, so ask for layers in order.
        """
        if not self.anatomy.chained or layer in self._whole:
            layer = 0
        if layer == self.layer:
            return
        self.layer = 0
        self._entering = [self._hidden(tokens, self._layers[layer - 1]) for tokens in self.tokens] if layer else []
        native = [self._first_logits(bucket) for bucket in range(len(self.tokens) if layer else 0)]
        self.layer = layer
        if not all(self._agrees(bucket, logits) for bucket, logits in enumerate(native)):
            self._whole.add(layer)
            self.layer, self._entering = 0, []

    def _hidden(self, tokens: Tensor, module: nn.Module) -> Tensor:
        """What leaves a layer, [prompts, positions, d_model]."""
        seen: list[Tensor] = []

        def keep(output: Any) -> bool:
            seen.append(first_tensor(output))
            return True

        for part in torch.split(tokens, max(1, TOKENS_PER_CAPTURE // tokens.shape[1])):
            forward_until(self.model, part, module, keep)
        return torch.cat(seen)

    @torch.no_grad()
    def _first_logits(self, bucket: int) -> Tensor:
        return self.logits(bucket, torch.zeros(1, dtype=torch.long, device=self.device))

    def _agrees(self, bucket: int, native: Tensor) -> bool:
        """Whether the first prompt's logits are those of a whole pass."""
        tolerance = max(TOLERANCE, 3 * torch.finfo(native.dtype).eps)
        finite = torch.where(native.isfinite(), native, 0)
        difference = (torch.where(native.isfinite(), self._first_logits(bucket), 0) - finite).abs().max()
        return bool(difference <= tolerance * finite.abs().max())

    def logits(
        self, bucket: int, prompts: Tensor, wanted: Wanted | None = None, visit: Visitor = lambda *_: None
    ) -> Tensor:
        """Logits [prompts, reads, vocab] of some prompts of a bucket, with gradients where the caller has them on.

        Args:
            bucket: Which bucket.
            prompts: Indices of the prompts, [n].
            wanted: Sites that are visited; none lies below the layer that was entered.
            visit: The visitor.
        """
        tokens, read = self.tokens[bucket][prompts], self.read[bucket][prompts]
        last_only = read.shape[1] == 1 and bool((read == tokens.shape[1] - 1).all())
        with (
            stubs(self._layers[: self.layer], self._resume(bucket, prompts)),
            visiting(self.model, self.anatomy, wanted or {}, visit),
            contiguous_head(self.model),
        ):
            logits = forward(self.model, tokens, last_only=last_only)
        return logits if last_only else logits[torch.arange(len(tokens), device=self.device)[:, None], read]

    def _resume(self, bucket: int, prompts: Tensor) -> Callable[[int, LayerCall], Any]:
        """Stands in for the layers below: each gives out what enters the first layer that is computed."""

        def replacement(index: int, _call: LayerCall) -> Any:
            hidden, size = self._entering[bucket][prompts], self.anatomy.tuple_sizes[index]
            return hidden if size == 0 else (hidden, *(None,) * (size - 1))

        return replacement


def contiguous_head(model: nn.Module) -> AbstractContextManager[None]:
    """The head on contiguous states: PyTorch multiplies a slice of them prompt by prompt, tens of times slower."""
    find = getattr(model, "get_output_embeddings", lambda: None)
    head: nn.Module | None = find()
    if head is None:
        return nullcontext()

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)

    return hooked([head.register_forward_pre_hook(hook)])
