"""How much arithmetic a sweep is, and how fast this machine multiplies matrices of the model's own shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.edits import Trial
from mechinterp_cli.models.anatomy import Anatomy, device_of


@dataclass(frozen=True)
class Flops:
    """FLOPs, two for each multiplication with its addition."""

    linear: float = 0.0
    attention: float = 0.0
    unembedding: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        """The sum, part by part."""
        return Flops(self.linear + other.linear, self.attention + other.attention, self.unembedding + other.unembedding)

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.unembedding


@dataclass(frozen=True)
class Sizes:
    """What the count needs to know of a model: every layer alike, attention over heads × d_head."""

    layers: int
    layer_weights: int
    """Weights of a layer's linear maps; each multiplies every row once."""
    attention_width: int
    """Query heads × d_head."""
    unembedding_weights: int

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy) -> "Sizes":
        """Counted from the first layer's `nn.Linear` modules."""
        heads = anatomy.layers[0].heads
        assert heads is not None
        weights = sum(module.weight.numel() for module in linear_maps(model, anatomy, 0))
        return cls(anatomy.n_layers, weights, heads.query * heads.d_head, anatomy.vocab_size * anatomy.d_model)

    def rows(self, start: int, length: int, layers: int) -> Flops:
        """One prompt's positions `start` to `length` through so many layers and one row of logits.

        A query at position p attends to p + 1 keys, once for the scores and once for the values; what a
        kernel computes beyond the diagonal is not counted.
        """
        keys = (length * (length + 1) - start * (start + 1)) / 2
        return Flops(
            2.0 * self.layer_weights * (length - start) * layers,
            4.0 * self.attention_width * keys * layers,
            2.0 * self.unembedding_weights,
        )


def linear_maps(model: nn.Module, anatomy: Anatomy, layer: int) -> list[nn.Linear]:
    """The linear maps of a layer."""
    return [m for m in model.get_submodule(anatomy.layers[layer].module).modules() if isinstance(m, nn.Linear)]


def trial_flops(sizes: Sizes, trials: Sequence[Trial], length: int) -> Flops:
    """What is left of trials of one edit: rows from the first edited position, layers from the edited one."""
    total = Flops()
    for trial in trials:
        layers = sizes.layers - trial.edits[0].site.layer
        for prompt in trial.prompts:
            total += sizes.rows(trial.start(prompt), length, layers)
    return total


def stream_flops(sizes: Sizes, prompts: int, length: int, streams: int = 2) -> Flops:
    """The unedited passes over all prompts, each computed once."""
    one = sizes.rows(0, length, sizes.layers)
    n = prompts * streams
    return Flops(one.linear * n, one.attention * n, one.unembedding * n)


class Sgemm:
    """Matrix products [rows, in] × [in, out] with the model's own layer weights and nothing else.

    Weights of different layers take turns, as in the engine, so that caches hold no more of them than
    there; outputs are allocated beforehand, so that nothing but the product is timed.

    Args:
        model: The model.
        anatomy: Its anatomy.
        rows: Rows of every product.
        layers: How many layers one pass goes through.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, rows: int, layers: int) -> None:
        maps = [m for layer in range(min(layers, anatomy.n_layers)) for m in linear_maps(model, anatomy, layer)]
        self.weights: list[Tensor] = [m.weight.detach().T for m in maps]
        kind: dict[str, Any] = {"device": device_of(model), "dtype": self.weights[0].dtype}
        self.inputs = {n: torch.randn(rows, n, **kind) for n in {w.shape[0] for w in self.weights}}
        self.outputs = {n: torch.empty(rows, n, **kind) for n in {w.shape[1] for w in self.weights}}
        self.flops = 2.0 * rows * sum(w.numel() for w in self.weights)

    def run(self) -> None:
        """One pass over the layers."""
        for weight in self.weights:
            torch.mm(self.inputs[weight.shape[0]], weight, out=self.outputs[weight.shape[1]])
