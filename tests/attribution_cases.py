"""Models in double precision, models that are linear, and patching by hand: what estimates are held against."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from benchmarks.tiny import tiny_model, tiny_tokens
from mechinterp_cli.engine.atp import Batching, Inquiry, stream
from mechinterp_cli.engine.edits import Bucket, Edit, Site, Trial
from mechinterp_cli.engine.hooks import PlainHooks
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from tests.families import build

PROMPTS, LENGTH = 3, 12
READ = (LENGTH - 1, LENGTH - 3, LENGTH - 1)
"""Not all at the end."""


class _Wide(TorchFunctionMode):
    """Models raise half precision to float32 here and there; what is in float64 would be narrowed by that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """The whole model in float64, its inner roundings included."""
    model.double()
    if isinstance(model, PreTrainedModel) and hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # no other one takes float64
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def two_metrics(logits: Tensor, prompts: Tensor) -> Tensor:
    """A logit difference and a log-probability, of tokens that differ by prompt."""
    at = prompts[:, None].to(logits.device)
    answer, wrong = logits.gather(1, 3 + at)[:, 0], logits.gather(1, 40 + at)[:, 0]
    return torch.stack([answer - wrong, answer - logits.logsumexp(-1)], dim=-1)


@dataclass(frozen=True, eq=False)
class Case:
    """A model and two streams of prompts, the first patched into and the second patched from."""

    model: Any
    anatomy: Anatomy
    base: Tensor
    source: Tensor
    read: tuple[int, ...] = READ

    @classmethod
    def of(cls, model: Any, *, changed: tuple[int, ...] | None = None, prompts: int = PROMPTS) -> "Case":
        """Random prompts; the streams differ at some positions, or everywhere."""
        base, other = (tiny_tokens(batch=prompts, length=LENGTH, seed=seed) for seed in (1, 2))
        source = other if changed is None else base.clone()
        if changed is not None:
            source[:, list(changed)] = other[:, list(changed)]
        return cls(model, find_anatomy(model), base, source, (READ * prompts)[:prompts])

    @property
    def sites(self) -> frozenset[Site]:
        """All that the model has."""
        return frozenset(Site(kind, layer.index) for layer in self.anatomy.layers for kind in layer.sites)

    def ask(self, sites: frozenset[Site] | None = None, **others: Any) -> Inquiry:
        """An inquiry about some sites, or all."""
        asked: dict[str, Any] = {
            "sources": stream(self.model, self.anatomy, self.source),
            "metric": two_metrics,
            "batching": Batching(),
            **others,
        }
        return Inquiry(
            self.model,
            self.anatomy,
            self.base,
            torch.tensor(self.read),
            sites=self.sites if sites is None else sites,
            **asked,
        )

    @cached_property
    def _bucket(self) -> Bucket:
        return Bucket.of({"base": self.base, "source": self.source}, torch.tensor(self.read)[:, None])

    def patched(self, edits: list[Edit], metric: Callable[[Tensor, Tensor], Tensor] = two_metrics) -> Tensor:
        """Exact effects M(patched) − M(base) of trials of one edit each, [trials, metrics, prompts]."""
        everyone = tuple(range(len(self.base)))
        trials = [Trial(i, "base", (edit,), everyone) for i, edit in enumerate(edits)]
        executor = PlainHooks(self.model, self.anatomy)
        values = executor.run(self._bucket, trials, lambda logits, prompt, _read: metric(logits, prompt))
        return (values.trials - values.streams["base"])[:, :, 0].transpose(1, 2)

    def patch(self, site: Site, position: int, unit: int | None = None, key: int | None = None) -> Edit:
        """The edit of one node: the source's activation in place of the base's."""
        everyone = len(self.base)
        return Edit(
            site,
            "replace",
            ((position,),) * everyone,
            units=None if unit is None else (unit,),
            keys=None if key is None else ((key,),) * everyone,
            source="source",
        )


def linear_model(*, layers: int = 2, attention: float = 0.0, seed: int = 0) -> Any:
    """GPT-2 without norms and activation functions.

    Args:
        layers: How many.
        attention: What query and key weights are multiplied with: at 0 attention is uniform, and the logits are an
            affine function of every activation.
        seed: Of the weights.
    """
    model: Any = tiny_model("gpt2", layers=layers, seed=seed, attn_implementation="eager")
    model.transformer.ln_f = nn.Identity()
    for block in model.transformer.h:
        block.ln_1 = block.ln_2 = nn.Identity()
        block.mlp.act = nn.Identity()
        width = block.attn.split_size
        block.attn.c_attn.weight.data[:, : 2 * width] *= attention
        block.attn.c_attn.bias.data[: 2 * width] *= attention
    return model


__all__ = ["LENGTH", "PROMPTS", "READ", "Case", "build", "in_float64", "linear_model", "two_metrics"]
