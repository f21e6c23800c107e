"""The direct effect of each head on a task's answer (direct logit attribution; name movers, Wang et al. 2211.00593)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import kinds_by_layer, visiting
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.heads.weights import Circuits
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.linear import Unembedding
from mechinterp_cli.models.walk import forward
from mechinterp_cli.tasks.prompts import Prompt

ADDITIVE = 1e-4
"""The parts must add up to the logit difference within this part of the largest sum of the parts' sizes."""
TOKENS_PER_PASS = 8192


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """What each part of the model adds to the logit difference of each prompt at its last position.

    The logit difference is the mean logit of the answer set minus the mean logit of the wrong set, before
    soft-capping (for single tokens the metric `logit_diff`; for sets that takes a log-sum-exp instead). A part is
    what a component adds to the residual stream, through the final norm with its scale frozen at the prompt's own
    (and through the norm after attention, where there is one, frozen likewise), times the unembedding's difference.
    Nats, float64, on the CPU; chance has no closed form. heads + attention + mlp + embedding + constant = total.
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
    reasons: Mapping[int, str] = field(default_factory=dict)


@torch.no_grad()
def direct_effects(circuits: Circuits, prompts: Sequence[Prompt]) -> DirectEffects | str:
    """The direct effects of all components on prompts with an answer and a wrong answer.

    Args:
        circuits: The model's circuits.
        prompts: In the order of the result's first axis; their clean streams are used.

    Returns:
        The effects, or the reason why this model has none.

    Raises:
        UserError: A prompt has no answer or no wrong answer.
    """
    _check(prompts)
    unembedding = circuits.unembedding
    if isinstance(unembedding, str):
        return unembedding
    found: dict[str, Tensor] = {}
    for members in _batches(prompts):
        batch = _Batch.of(circuits, unembedding, [prompts[i] for i in members])
        for name, values in batch.parts().items():
            whole = found.setdefault(name, torch.empty(len(prompts), *values.shape[1:], dtype=torch.float64))
            whole[members] = values.double().cpu()
    return _summed(found, {i: r for i in range(circuits.model.anatomy.n_layers) if (r := _reason(circuits, i))})


def _summed(found: Mapping[str, Tensor], reasons: Mapping[int, str]) -> DirectEffects | str:
    """The parts as a result, if they add up."""
    added = [values.nan_to_num().reshape(len(values), -1) for name, values in found.items() if name != "total"]
    everything = torch.cat(added, dim=1)
    deviation = float((everything.sum(1) - found["total"]).abs().max() / everything.abs().sum(1).max())
    if not deviation <= ADDITIVE:
        return "what the layers add does not add up to the last residual stream in this model"
    return DirectEffects(**found, deviation=deviation, reasons=reasons)


def _check(prompts: Sequence[Prompt]) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt.answer or not prompt.wrong_answer:
            lacking = "wrong answer" if prompt.answer else "answer"
            raise UserError(
                f"heads.scores: direct_effect needs an answer and a wrong answer, and prompt {index} has no {lacking}",
                "Use a task whose prompts have both, or leave direct_effect out.",
            )


def _reason(circuits: Circuits, index: int) -> str | None:
    return circuits.maps.layer(index).missing.get("output")


def _batches(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Indices of prompts of one length, at most so many tokens together."""
    batches: list[list[int]] = []
    for length in sorted({prompt.length for prompt in prompts}):
        members = [i for i, prompt in enumerate(prompts) if prompt.length == length]
        step = max(1, TOKENS_PER_PASS // length)
        batches += [members[i : i + step] for i in range(0, len(members), step)]
    return batches


@dataclass(frozen=True, eq=False)
class _Batch:
    """Prompts of one length: their activations at the last position and the direction that is asked for."""

    circuits: Circuits
    seen: Mapping[Site, Tensor]
    """Activations [prompts, …] at the last position."""
    direction: Float[Tensor, "prompts d_model"]
    """What one unit along each feature adds to the logit difference, the norm's scale included."""
    constant: Float[Tensor, " prompts"]

    @classmethod
    def of(cls, circuits: Circuits, unembedding: Unembedding, prompts: Sequence[Prompt]) -> "_Batch":
        """Run the prompts once."""
        model = circuits.model
        tokens = torch.tensor([prompt.clean_tokens for prompt in prompts], device=device_of(model.model))
        seen = _last_activations(circuits, tokens)
        scale = unembedding.scale(seen[_last(circuits)])
        differences = [_difference(unembedding, prompt, tokens.device) for prompt in prompts]
        direction = torch.stack([direction for direction, _ in differences]) / scale[:, None]
        return cls(circuits, seen, direction, torch.stack([constant for _, constant in differences]))

    def parts(self) -> dict[str, Tensor]:
        """By name of `DirectEffects`, [prompts, …]."""
        layers = range(self.circuits.model.anatomy.n_layers)
        by_layer = [self._attention(layer) for layer in layers]
        return {
            "heads": torch.stack([heads for heads, _ in by_layer], dim=1),
            "attention": torch.stack([rest for _, rest in by_layer], dim=1),
            "mlp": torch.stack([self._along(Site("mlp_out", layer)) for layer in layers], dim=1),
            "embedding": self._along(Site("embed", 0)),
            "constant": self.constant,
            "total": self._along(_last(self.circuits)) + self.constant,
        }

    def _along(self, site: Site) -> Float[Tensor, " prompts"]:
        """A site's part; 0 where the layer has no such site."""
        if site not in self.seen:
            return torch.zeros_like(self.constant)
        return (self.seen[site].float() * self.direction).sum(-1)

    def _attention(self, layer: int) -> tuple[Float[Tensor, "prompts heads"], Float[Tensor, " prompts"]]:
        """Each head's part, and what attention adds beside them."""
        maps = self.circuits.maps.layer(layer)
        blank = self.direction.new_full((len(self.direction), self.circuits.n_heads), torch.nan)
        whole = self._along(Site("attn_out", layer))
        if maps.output is None or maps.writes is None:
            return blank, whole
        z, added = self.seen[Site("z", layer)].float(), self.seen[Site("attn_out", layer)].float()
        scale = maps.output.scale(z.flatten(1), added[:, None])
        heads = torch.einsum("nhv,hvd,nd->nh", z, maps.writes, self.direction) / scale
        blank[:, : heads.shape[1]] = heads
        return blank, self.direction @ maps.output.offset[0]


def _last(circuits: Circuits) -> Site:
    return Site("resid_post", circuits.model.anatomy.n_layers - 1)


def _difference(unembedding: Unembedding, prompt: Prompt, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean unembedding of the answers minus that of the wrong answers, and the same of their constants."""
    right, wrong = (torch.tensor(ids, device=device) for ids in (prompt.answer, prompt.wrong_answer))
    rows = unembedding.project(right).mean(0) - unembedding.project(wrong).mean(0)
    return rows, unembedding.constant(right).mean() - unembedding.constant(wrong).mean()


def _last_activations(circuits: Circuits, tokens: Int[Tensor, "prompts positions"]) -> dict[Site, Tensor]:
    """Everything that is added to the residual stream, and z, at the last position."""
    model = circuits.model
    kinds = ("attn_out", "mlp_out", "z")
    sites = {Site(kind, layer.index) for layer in model.anatomy.layers for kind in kinds if kind in layer.sites}
    seen: dict[Site, Tensor] = {}

    def visit(site: Site, activation: Tensor) -> None:
        seen[site] = activation[:, -1].detach().float().clone()

    wanted = kinds_by_layer(sites | {Site("embed", 0), _last(circuits)})
    with visiting(model.model, model.anatomy, wanted, visit):
        forward(model.model, tokens, last_only=True)
    return seen
