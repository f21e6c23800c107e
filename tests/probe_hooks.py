"""A Llama of a folder by plain hooks, on the prompts of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.experiments import Run


class Model:
    """The model of a folder by plain hooks, on the prompts of a run."""

    def __init__(self, folder: Path, run: Run) -> None:
        self.model: Any = LlamaForCausalLM.from_pretrained(folder).train(False)
        self.clean, self.corrupt = run.tokens("clean"), run.tokens("corrupt")
        self.answer, self.wrong = run.answers(), run.answers("wrong_answer_ids")

    def seen(self, layer: int, tokens: Tensor) -> Tensor:
        """The stream after a layer at the last position; of the last layer, too, before the norm."""
        found: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            found.append(x.clone())
            return x

        self.logits(layer, keep, tokens)
        return found[0]

    def logits(self, layer: int, change: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        def hook(_module: object, _args: object, output: Any) -> Any:
            x = (output[0] if isinstance(output, tuple) else output).clone()
            x[:, -1] = change(x[:, -1])
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = self.model.model.layers[layer].register_forward_hook(hook)
        try:
            with torch.no_grad():
                logits: Tensor = self.model(tokens).logits[:, -1]
        finally:
            handle.remove()
        return logits

    def effect(self, layer: int, change: Callable[[Tensor], Tensor], *, corrupt: bool = False) -> Tensor:
        """Of the logit difference, [prompts]."""
        tokens = self.corrupt if corrupt else self.clean
        after, before = (self.logits(layer, one, tokens) for one in (change, lambda x: x))
        moved = after - before
        at = torch.arange(len(moved))
        return moved[at, self.answer] - moved[at, self.wrong]


def erased(u: Tensor, mean: Tensor) -> Callable[[Tensor], Tensor]:
    """The component along a direction of length 1 at its mean."""
    return lambda x: x - ((x - mean) @ u)[:, None] * u


def swapped(onto: Tensor, other: Tensor) -> Callable[[Tensor], Tensor]:
    """What a projection leaves of other activations instead of the own."""
    return lambda x: x + (other - x) @ onto


def moved(along: Tensor) -> Callable[[Tensor], Tensor]:
    """Something added."""
    return lambda x: x + along
