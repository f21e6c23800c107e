"""Taking direct effects apart: an MLP's into its neurons', a head's by the token that it attends to."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import kinds_by_layer, visiting
from mechinterp_cli.engine.patterns import BUDGET, WORKING_COPIES
from mechinterp_cli.methods.direct_effects import TOKENS_PER_PASS, Batch
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.interface import repeat_heads
from mechinterp_cli.models.neurons import Down
from mechinterp_cli.models.walk import forward

Floats = npt.NDArray[np.float64]


@dataclass(eq=False)
class Neurons:
    """Each MLP's part as its neurons' and its biases'. Held: one float32 per prompt and neuron.

    Args:
        anatomy: Of the model.
        prompts: How many there will be.
    """

    anatomy: Anatomy
    prompts: int
    by_layer: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    """[prompts, neurons]."""
    sums: dict[int, Floats] = field(default_factory=dict)
    """Of all neurons of a layer, [prompts], summed in float64."""
    bias: dict[int, Floats] = field(default_factory=dict)
    """What the down projection's bias and that of a norm after it add, [prompts]."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Layers whose neurons cannot be told apart, and why."""
    deviation: float = 0.0
    """Largest difference between an MLP's part and the sum, in parts of the sum of the parts' sizes."""
    _ways: dict[int, Down | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Note the layers that have no neurons."""
        self.reasons = {x.index: x.missing["neuron"] for x in self.anatomy.layers if "neuron" in x.missing}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Sites that it wants to see."""
        return ("neuron",)

    def prompts_per_pass(self, length: int) -> int:
        """No fewer than others take."""
        return max(1, TOKENS_PER_PASS // length)

    def take(self, batch: Batch, members: Sequence[int]) -> None:
        """Take a batch's MLPs apart."""
        for layer in (layer for layer in self.anatomy.layers if layer.index not in self.reasons):
            neurons, added = (batch.seen[Site(kind, layer.index)] for kind in ("neuron", "mlp_out"))
            if layer.index not in self._ways:
                self._ways[layer.index] = Down.of(batch.paths.model.model, layer, neurons, added)
            way = self._ways[layer.index]
            if isinstance(way, str):
                self.reasons[layer.index] = way
                continue
            parts, bias = way.parts(neurons, added, batch.direction)
            self._check(parts, bias, batch.part(Site("mlp_out", layer.index)))
            self._keep(layer.index, members, parts, bias)

    def _check(self, parts: Tensor, bias: Tensor, whole: Tensor) -> None:
        size = parts.abs().sum(1) + bias.abs()
        off = (parts.sum(1) + bias - whole).abs() / size.clamp(min=torch.finfo(size.dtype).tiny)
        self.deviation = max(self.deviation, float(off.max()))

    def _keep(self, layer: int, members: Sequence[int], parts: Tensor, bias: Tensor) -> None:
        if layer not in self.by_layer:
            self.by_layer[layer] = np.empty((self.prompts, parts.shape[1]), dtype=np.float32)
            self.sums[layer], self.bias[layer] = np.empty(self.prompts), np.empty(self.prompts)
        at = list(members)
        self.by_layer[layer][at] = parts.float().cpu().numpy()
        self.sums[layer][at] = parts.cpu().double().sum(1).numpy()
        self.bias[layer][at] = bias.cpu().double().numpy()

    def strongest(self, top: int | None) -> dict[int, list[int]]:
        """The neurons with the largest mean size of their parts over prompts, by layer; all of them where None."""
        sizes = {layer: np.abs(values).mean(0, dtype=np.float64) for layer, values in self.by_layer.items()}
        if top is None:
            return {layer: list(range(len(own))) for layer, own in sizes.items()}
        layers = np.repeat(list(sizes), [len(own) for own in sizes.values()])
        index = np.concatenate([np.arange(len(own)) for own in sizes.values()])
        chosen = np.argsort(-np.concatenate(list(sizes.values())), kind="stable")[:top]
        return {layer: sorted(index[chosen][layers[chosen] == layer].tolist()) for layer in sizes}


@dataclass(eq=False)
class Sources:
    """Each head's part by the token that it attends to, in a pass of its own with attention in the open.

    The part of head h by token j is pattern[h, last, j] · v[j] through the output projection; a head's parts sum to
    its whole, which comes from a pass with the model's own attention.

    Args:
        anatomy: Of the model.
    """

    anatomy: Anatomy
    by_prompt: dict[int, dict[int, Floats]] = field(default_factory=dict)
    """Prompt, then layer, to [heads, positions]."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Layers whose heads' parts cannot be told by token, and why."""
    deviation: float = 0.0
    """Largest difference between a head's part and the sum, in parts of the layer's largest head."""

    def __post_init__(self) -> None:
        """Note the layers that have no patterns."""
        self.reasons = {x.index: x.missing["pattern"] for x in self.anatomy.layers if "pattern" in x.missing}

    @property
    def kinds(self) -> tuple[str, ...]:
        """None: what it needs is not at the last position."""
        return ()

    def prompts_per_pass(self, length: int) -> int:
        """As many as a layer's patterns may take memory for."""
        heads = max((layer.heads.query for layer in self.anatomy.layers if layer.heads), default=1)
        return max(1, BUDGET // (WORKING_COPIES * 4 * heads * length**2))

    def take(self, batch: Batch, members: Sequence[int]) -> None:
        """Take a batch's heads apart."""
        directions = self._directions(batch)
        if not directions:
            return
        values: dict[int, Tensor] = {}

        def visit(site: Site, activation: Tensor) -> None:
            if site.kind == "v":
                values[site.layer] = activation.float()
                return
            parts = _by_token(activation[:, -1].float(), values.pop(site.layer), directions[site.layer])
            z = batch.seen[Site("z", site.layer)]
            self._check(parts, (z * directions[site.layer]).sum(-1))
            for row, prompt in enumerate(members):
                self.by_prompt.setdefault(prompt, {})[site.layer] = parts[row].cpu().double().numpy()

        wanted = kinds_by_layer({Site(kind, layer) for layer in directions for kind in ("v", "pattern")})
        model = batch.paths.model
        with visiting(model.model, model.anatomy, wanted, visit):
            forward(model.model, batch.tokens, last_only=True)

    def _directions(self, batch: Batch) -> dict[int, Float[Tensor, "prompts heads d_value"]]:
        """By layer whose heads can be told apart, what one unit of z adds."""
        found: dict[int, Tensor] = {}
        for layer in (layer.index for layer in self.anatomy.layers if layer.index not in self.reasons):
            directions, output = batch.head_directions(layer), batch.paths.maps.output(layer)
            if directions is not None:
                found[layer] = directions
            elif isinstance(output, str):
                self.reasons[layer] = output
        return found

    def _check(self, parts: Tensor, whole: Tensor) -> None:
        size = parts.abs().sum(-1).amax().clamp(min=torch.finfo(parts.dtype).tiny)
        self.deviation = max(self.deviation, float((parts.sum(-1) - whole).abs().max() / size))


def _by_token(
    pattern: Float[Tensor, "prompts heads keys"],
    v: Float[Tensor, "prompts keys kv_heads d_value"],
    directions: Float[Tensor, "prompts heads d_value"],
) -> Float[Tensor, "prompts heads keys"]:
    each = repeat_heads(v.transpose(1, 2), pattern.shape[1])
    return pattern * torch.einsum("nhkd,nhd->nhk", each, directions)
