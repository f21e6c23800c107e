"""Direct effects: what each part of a model adds to a prompt's logit difference (direct logit attribution).

Elhage et al. 2021; Wang et al. 2211.00593 for heads. The final norm's scale is frozen at the prompt's own, and so are
those of norms after attention and MLP; then the logit difference is a sum, and the sum is checked.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import kinds_by_layer, visiting
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.linear import LinearMaps, Unembedding
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.walk import forward
from mechinterp_cli.tasks.prompts import Prompt

ADDITIVE = 1e-4
"""The parts must add up to the logit difference within this part of the largest sum of the parts' sizes."""
TOKENS_PER_PASS = 8192
_ADDED = ("attn_out", "mlp_out", "z")


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """What each part of the model adds to the logit difference of each prompt at its last position.

    The logit difference is the mean logit of the answer set minus the mean logit of the wrong set, before
    soft-capping (for single tokens the metric `logit_diff`; for sets that takes a log-sum-exp instead). A part is
    what a component adds to the residual stream, through the final norm with its scale frozen at the prompt's own
    (and through the norm after attention, where there is one, frozen likewise), times the unembedding's difference,
    the logits' multiplier included. Nats, float64, on the CPU; computed in float32; chance has no closed form.
    heads + attention + mlp + embedding + constant = total.
    """

    heads: Float[Tensor, "prompts layers heads"]
    """NaN where a layer's heads cannot be told apart (see `reasons`)."""
    attention: Float[Tensor, "prompts layers"]
    """What attention adds that no head does: biases; all of it where `heads` is NaN."""
    mlp: Float[Tensor, "prompts layers"]
    embedding: Float[Tensor, " prompts"]
    constant: Float[Tensor, " prompts"]
    """The final norm's and the head's bias."""
    total: Float[Tensor, " prompts"]
    """The logit difference itself, from the whole of the last residual stream."""
    deviation: float
    """Largest difference between total and sum, in parts of the largest sum of the parts' sizes."""
    native: float
    """Largest difference of the answers' logits from the model's own on these prompts, in parts of the largest."""
    reasons: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Paths:
    """The ways from a model's parts to its logits, each proved: what effects are followed along."""

    model: LoadedModel
    maps: LinearMaps
    unembedding: Unembedding

    @property
    def last(self) -> Site:
        """What the final norm reads."""
        return Site("resid_post", self.model.anatomy.n_layers - 1)

    @property
    def n_heads(self) -> int:
        """Query heads of the layer that has most."""
        return max((layer.heads.query for layer in self.model.anatomy.layers if layer.heads), default=0)

    def along(self, prompts: Sequence[Prompt]) -> tuple[Float[Tensor, "prompts d_model"], Float[Tensor, " prompts"]]:
        """What one unit of each feature adds to each logit difference, the norm's scale apart, and its constant part.

        Args:
            prompts: With answers and wrong answers.
        """
        found = [self._difference(prompt) for prompt in prompts]
        return torch.stack([direction for direction, _ in found]), torch.stack([constant for _, constant in found])

    def _difference(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        device = device_of(self.model.model)
        right, wrong = (torch.tensor(ids, device=device) for ids in (prompt.answer, prompt.wrong_answer))
        rows = self.unembedding.project(right).mean(0) - self.unembedding.project(wrong).mean(0)
        return rows, self.unembedding.constant(right).mean() - self.unembedding.constant(wrong).mean()


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of one length: their activations at the last position and the direction that is asked for."""

    paths: Paths
    prompts: Sequence[Prompt]
    tokens: Int[Tensor, "prompts positions"]
    seen: Mapping[Site, Tensor]
    """Activations [prompts, …] at the last position, float32."""
    logits: Float[Tensor, "prompts vocab"]
    """The model's own, at the last position."""
    scale: Float[Tensor, " prompts"]
    """The final norm's."""
    direction: Float[Tensor, "prompts d_model"]
    """What one unit along each feature adds to the logit difference, the norm's scale included."""
    constant: Float[Tensor, " prompts"]

    @classmethod
    def of(cls, paths: Paths, prompts: Sequence[Prompt], kinds: Sequence[str] = ()) -> "Batch":
        """Run the prompts once.

        Args:
            paths: Of the model.
            prompts: Of one length.
            kinds: Sites to be seen beside those that a sum of parts needs.
        """
        tokens = torch.tensor([prompt.clean_tokens for prompt in prompts], device=device_of(paths.model.model))
        seen, logits = _last_activations(paths, tokens, (*_ADDED, *kinds))
        scale = paths.unembedding.scale(seen[paths.last])
        direction, constant = paths.along(prompts)
        return cls(paths, prompts, tokens, seen, logits, scale, direction / scale[:, None], constant)

    def parts(self) -> dict[str, Tensor]:
        """By name of `DirectEffects`, [prompts, …]."""
        layers = range(self.paths.model.anatomy.n_layers)
        by_layer = [self._attention(layer) for layer in layers]
        return {
            "heads": torch.stack([heads for heads, _ in by_layer], dim=1),
            "attention": torch.stack([rest for _, rest in by_layer], dim=1),
            "mlp": torch.stack([self.part(Site("mlp_out", layer)) for layer in layers], dim=1),
            "embedding": self.part(Site("embed", 0)),
            "constant": self.constant,
            "total": self.part(self.paths.last) + self.constant,
        }

    def part(self, site: Site) -> Float[Tensor, " prompts"]:
        """What stands at a site adds; 0 where the layer has no such site."""
        if site not in self.seen:
            return torch.zeros_like(self.constant)
        return (self.seen[site] * self.direction).sum(-1)

    def head_directions(self, layer: int) -> Float[Tensor, "prompts heads d_value"] | None:
        """What one unit of each head's z adds to the logit difference; None where heads cannot be told apart."""
        output, heads = self.paths.maps.output(layer), self.paths.model.anatomy.layers[layer].heads
        if isinstance(output, str) or heads is None:
            return None
        writes = torch.unflatten(output.matrix[0], 0, (heads.query, heads.d_value))
        z, added = self.seen[Site("z", layer)], self.seen[Site("attn_out", layer)]
        scale = output.scale(z.flatten(1), added[:, None])
        return torch.einsum("hvd,nd->nhv", writes, self.direction) / scale[..., None]

    def _attention(self, layer: int) -> tuple[Float[Tensor, "prompts heads"], Float[Tensor, " prompts"]]:
        """Each head's part, and what attention adds beside them."""
        blank = self.direction.new_full((len(self.direction), self.paths.n_heads), torch.nan)
        output, directions = self.paths.maps.output(layer), self.head_directions(layer)
        if isinstance(output, str) or directions is None:
            return blank, self.part(Site("attn_out", layer))
        heads = (self.seen[Site("z", layer)] * directions).sum(-1)
        blank[:, : heads.shape[1]] = heads
        return blank, self.direction @ output.offset[0]

    def deviation(self) -> float:
        """How far the answers' logits of the whole last stream are from the model's own, in parts of the largest."""
        cap, largest = self.paths.unembedding.softcap, self.logits.abs().max()
        ids = [torch.tensor([*one.answer, *one.wrong_answer], device=self.tokens.device) for one in self.prompts]
        worst = self.logits.new_zeros(())
        for row, tokens in enumerate(ids):
            hidden = self.seen[self.paths.last][row] / self.scale[row]
            told = self.paths.unembedding.project(tokens) @ hidden + self.paths.unembedding.constant(tokens)
            told = told if cap is None else torch.tanh(told / cap) * cap
            worst = torch.maximum(worst, (told - self.logits[row, tokens]).abs().max())
        return float(worst / largest)


class Split(Protocol):
    """Takes parts of some parts apart, batch by batch."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Sites that it wants to see at the last position."""

    def prompts_per_pass(self, length: int) -> int:
        """Prompts of so many tokens that it can take at once."""

    def take(self, batch: Batch, members: Sequence[int]) -> None:
        """Take a batch apart.

        Args:
            batch: Prompts of one length that were run.
            members: Which of the prompts they are.
        """


@torch.no_grad()
def direct_effects(
    paths: Paths,
    prompts: Sequence[Prompt],
    splits: Sequence[Split] = (),
    tick: Callable[[int], None] = lambda done: None,
) -> DirectEffects | str:
    """The direct effects of all components on prompts with an answer and a wrong answer.

    Args:
        paths: Of the model.
        prompts: In the order of the result's first axis; their clean streams are used.
        splits: What is taken apart further.
        tick: Called with the number of prompts that are done.

    Returns:
        The effects, or the reason why this model has none.
    """
    found: dict[str, Tensor] = {}
    kinds = [kind for split in splits for kind in split.kinds]
    native, done = 0.0, 0
    for members in _batches(prompts, splits):
        batch = Batch.of(paths, [prompts[i] for i in members], kinds)
        native = max(native, batch.deviation())
        for name, values in batch.parts().items():
            whole = found.setdefault(name, torch.empty(len(prompts), *values.shape[1:], dtype=torch.float64))
            whole[members] = values.cpu().double()
        for split in splits:
            split.take(batch, members)
        done += len(members)
        tick(done)
    if not bool(found["total"].isfinite().all()):
        return "this model gives NaN or infinity on these prompts"
    if not native <= ADDITIVE:
        return "this model's logits on these prompts are not its output head's product times one number"
    outputs = {layer: paths.maps.output(layer) for layer in range(paths.model.anatomy.n_layers)}
    return _summed(found, native, {layer: why for layer, why in outputs.items() if isinstance(why, str)})


def _summed(found: Mapping[str, Tensor], native: float, reasons: Mapping[int, str]) -> DirectEffects | str:
    """The parts as a result, if they add up."""
    added = [values.nan_to_num().reshape(len(values), -1) for name, values in found.items() if name != "total"]
    everything = torch.cat(added, dim=1)
    deviation = float((everything.sum(1) - found["total"]).abs().max() / everything.abs().sum(1).max())
    if not deviation <= ADDITIVE:
        return "what the layers add does not add up to the last residual stream in this model"
    return DirectEffects(**found, deviation=deviation, native=native, reasons=reasons)


def _batches(prompts: Sequence[Prompt], splits: Sequence[Split]) -> Iterator[list[int]]:
    """Indices of prompts of one length, no more than can be taken together."""
    for length in sorted({prompt.length for prompt in prompts}):
        members = [i for i, prompt in enumerate(prompts) if prompt.length == length]
        step = max(1, min([TOKENS_PER_PASS // length, *(split.prompts_per_pass(length) for split in splits)]))
        yield from (members[i : i + step] for i in range(0, len(members), step))


def _last_activations(
    paths: Paths, tokens: Int[Tensor, "prompts positions"], kinds: Sequence[str]
) -> tuple[dict[Site, Tensor], Float[Tensor, "prompts vocab"]]:
    """Everything that is added to the residual stream, and what else is wanted, at the last position; logits."""
    model = paths.model
    sites = {Site(kind, layer.index) for layer in model.anatomy.layers for kind in kinds if kind in layer.sites}
    seen: dict[Site, Tensor] = {}

    def visit(site: Site, activation: Tensor) -> None:
        seen[site] = activation[:, -1].detach().float().clone()

    wanted = kinds_by_layer(sites | {Site("embed", 0), paths.last})
    with visiting(model.model, model.anatomy, wanted, visit):
        logits = forward(model.model, tokens, last_only=True)
    return seen, logits[:, -1].float()
