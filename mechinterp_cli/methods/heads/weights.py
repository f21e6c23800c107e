"""What a head would do, read off the model's weights: does it copy, does it go on to the next, on whom does it build?

No prompts are needed. A head's OV circuit takes what stands in the residual stream at an attended token to
what the head adds to the residual stream, and on through the unembedding to logits. Norms are folded in with
their scales frozen: a scale is one positive number per token, which changes none of these scores but the
eigenvalues, where each sampled token keeps its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_cli.engine.instrument import visiting
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.interface import repeat_heads
from mechinterp_cli.models.linear import LinearMaps, Unembedding, linear_maps
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.tokenise import Encoder
from mechinterp_cli.tasks.vocabulary import ordinary_tokens

SOURCE_POSITION = 1
"""Where a token stands whose embedding is read: position 0 is special to many models."""
ROUNDING = 1e-6
"""Cosine of two directions that cannot be told from orthogonal in float32."""


@dataclass(frozen=True, eq=False)
class HeadScores:
    """One score for every head of a model."""

    score: str
    values: Float[Tensor, "layers heads"]
    """Float64 on the CPU; NaN where the score is undefined (see `reasons`) or was not asked for."""
    chance: float | None
    """Expected value for random weights, in closed form."""
    reasons: Mapping[int, str] = field(default_factory=dict)
    """Layer to the reason why its heads have no such score."""


@dataclass(frozen=True, eq=False)
class Circuits:
    """What the scores of one model share: its linear maps and the way to its logits."""

    model: LoadedModel
    maps: LinearMaps
    unembedding: Unembedding | str

    @property
    def n_heads(self) -> int:
        """Query heads of the layer that has most."""
        return max((layer.heads.query for layer in self.model.anatomy.layers if layer.heads), default=0)

    @property
    def encoder(self) -> Encoder:
        """The tokenizer, with the model's limits."""
        return Encoder.of(self.model.tokenizer, add_bos=False, vocab_size=self.model.anatomy.vocab_size)

    def blank(self) -> Float[Tensor, "layers heads"]:
        """A table of scores with nothing in it."""
        return torch.full((self.model.anatomy.n_layers, self.n_heads), torch.nan, dtype=torch.float64)

    def missing(self, layers: Sequence[int]) -> dict[int, str]:
        """Layers that have no OV circuit to the logits, and why."""
        if isinstance(self.unembedding, str):
            return dict.fromkeys(layers, self.unembedding)
        missing = {index: self.maps.layer(index).missing for index in layers}
        kinds = ("output", "values")
        return {index: of[kind] for index, of in missing.items() for kind in kinds if kind in of}

    def read(self, layer: int, streams: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens heads d_value"]:
        """Each query head's z when it attends to nothing but a token whose residual stream is `streams`."""
        heads = self.model.anatomy.layers[layer].heads
        assert heads is not None
        return repeat_heads(self.maps.values(layer, streams), heads.query)

    def project(self, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d_model"]:
        """What one unit of each feature of the residual stream adds to tokens' logits, the norm's scale left out."""
        assert not isinstance(self.unembedding, str)
        return self.unembedding.project(tokens)

    def write(self, layer: int, project: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "heads d_value tokens"]:
        """What one unit of each head's z adds to the logits of the tokens of `project`, norms' scales left out.

        What is no more than rounding of two orthogonal directions is 0.
        """
        writes = self.maps.layer(layer).writes
        assert writes is not None
        logits = writes @ project.T
        rounding = ROUNDING * writes.norm(dim=-1)[..., None] * project.norm(dim=-1)
        return logits.masked_fill_(logits.abs() <= rounding, 0.0)


@contextmanager
def circuits(model: LoadedModel) -> Iterator[Circuits]:
    """A model's circuits; inside, its weights are in float32."""
    with linear_maps(model.model, model.anatomy) as maps:
        yield Circuits(model, maps, maps.unembedding())


def sample_tokens(circuits: Circuits, n: int, seed: int) -> Int[Tensor, " tokens"]:
    """A seeded sample of ordinary tokens, at most `n`, in rising order, on the model's device."""
    ordinary = ordinary_tokens(circuits.encoder, Draw(seed))
    drawn = Draw(seed).sample(ordinary, min(n, len(ordinary)))
    return torch.tensor(sorted(drawn), dtype=torch.long, device=device_of(circuits.model.model))


def embedded(circuits: Circuits, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d_model"]:
    """What enters layer 0 for each token, at position 1 after the same token."""
    calls = circuits.maps.trials.calls(_twice(tokens))
    return calls[0].hidden[:, SOURCE_POSITION].float()


@torch.no_grad()
def after_first_mlp(circuits: Circuits, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d_model"]:
    """What leaves layer 0 for each token, at position 1 after the same token, when its attention adds nothing."""
    trials, model = circuits.maps.trials, circuits.model
    call = trials.calls(_twice(tokens))[0]
    nothing = {0: frozenset({"attn_out"})}
    with visiting(model.model, model.anatomy, nothing, lambda _site, x: torch.zeros_like(x), layer_ends=False):
        return trials.walker.run(0, call, call.hidden)[:, SOURCE_POSITION].float()


def _twice(tokens: Int[Tensor, " tokens"]) -> Int[Tensor, "tokens two"]:
    return tokens[:, None].expand(-1, SOURCE_POSITION + 1)


def copying(logits: Float[Tensor, "tokens tokens"]) -> float:
    """Share of pairs in which attending to a token raises its own logit more than the other token's.

    score = mean over t ≠ u of [M_tt > M_tu], a tie counting one half, where M_tu is what the head's OV circuit
    adds to the logit of u when it attends to a token whose residual stream is the embedding of t (the model's
    own v, biases included). In [0, 1]; 1/2 for random weights and for a head that writes nothing. NaN below two
    tokens. The idea is Elhage et al. 2021 ("copying heads"), per token as in Wang et al. 2211.00593, section 3.3.

    Args:
        logits: M, the attended token first.
    """
    n = logits.shape[0]
    if n < 2:
        return float("nan")
    own = logits.diagonal()[:, None]
    above, equal = int((own > logits).sum()), int((own == logits).sum()) - n
    return (above + equal / 2) / (n * (n - 1))


def copying_eigenvalues(
    read: Float[Tensor, "tokens heads d_value"], write: Float[Tensor, "heads d_value tokens"]
) -> Float[Tensor, " heads"]:
    """Whether the OV circuit's eigenvalues are positive: Σ Re λ / Σ |λ| (Elhage et al. 2021).

    λ are the eigenvalues of the circuit from tokens to tokens, restricted to those sampled; of the m × m matrix
    `read @ write` none but those of the d_value × d_value matrix `write @ read` differ from zero. In [−1, 1]; 0 for
    random weights; NaN for a circuit of zeros.

    Args:
        read: z by attended token, without the part that all tokens share (biases).
        write: What one unit of z adds to the tokens' logits.
    """
    small = (write @ read.transpose(0, 1)).cpu().double()
    values: Tensor = torch.linalg.eigvals(small / small.abs().amax((1, 2), keepdim=True).clamp(min=1e-300))
    total = values.abs().sum(-1)
    return torch.where(total > 0, values.real.sum(-1) / total, torch.nan)


@torch.no_grad()
def copying_scores(
    circuits: Circuits, layers: Sequence[int], tokens: Int[Tensor, " tokens"]
) -> tuple[HeadScores, HeadScores]:
    """`copying` and `copying_eigenvalues` of every head of some layers.

    Args:
        circuits: The model's circuits.
        layers: Which layers.
        tokens: The tokens that stand for the vocabulary, all different.
    """
    missing = circuits.missing(layers)
    shares, eigenvalues = circuits.blank(), circuits.blank()
    scored = [layer for layer in layers if layer not in missing]
    if scored:
        streams, project = embedded(circuits, tokens), circuits.project(tokens)
    for layer in scored:
        read, write = circuits.read(layer, streams), circuits.write(layer, project)
        n = read.shape[1]
        shares[layer, :n] = torch.tensor([copying(read[:, h] @ write[h]) for h in range(n)], dtype=torch.float64)
        shared = circuits.read(layer, torch.zeros_like(streams[:1]))
        eigenvalues[layer, :n] = copying_eigenvalues(read - shared, write)
    return (
        HeadScores("copying", shares, 0.5, missing),
        HeadScores("copying_eigenvalues", eigenvalues, 0.0, missing),
    )
