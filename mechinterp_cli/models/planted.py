"""`planted-induction`: an attention model whose circuit is known because its weights were set by hand.

A stock GPT-2 of 2 layers × 4 heads. Head (0, 1) attends to the previous token and writes which symbol
stood there; head (1, 2) looks for its own symbol among those notes and copies the symbol that the note
belongs to. That is induction: `A B … A` is continued with `B`. The unembedding reads nothing but what
head (1, 2) wrote. Every other head attends somewhere and carries the attended symbol in its `z`, but
its output projection is zero, and so are the MLPs' down projections: their effect is exactly 0.

The residual stream is a list of channels (`_Layout`), every vector in it has mean zero, and a large
constant pair of channels dominates its norm. So LayerNorm is, but for a few parts in a thousand, the
identity, and one head's effect hardly depends on what is done to another.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GPT2Config

from mechinterp_cli.models.symbols import VOCABULARY

LAYERS, HEADS, D_HEAD, NEURONS = 2, 4, 72, 32
PREVIOUS_TOKEN_HEAD = (0, 1)
"""(layer, head) of the head that attends to the token before."""
INDUCTION_HEAD = (1, 2)
"""(layer, head) of the head that attends to what followed the same symbol."""
EDGES = ("embed->a0.h1.v", "a0.h1->a1.h2.k", "embed->a1.h2.q", "embed->a1.h2.v", "a1.h2->logits")
"""The circuit as edges: every way by which a token, rather than a position, reaches the logits.

Read off the weights: `embed` writes `token` channels, which the values of all heads read (head 0.1 writes what it finds
to `previous`), and which query and value of head 1.2 read; `previous` is written by head 0.1 and read by the key of
head 1.2 alone; `output` is written by head 1.2 and read by the unembedding alone. Other heads and the MLPs write
nothing, so that no edge from them carries anything. Edges from `embed` into query and key of head 0.1, and into the key
of head 1.2, carry positions, which are the same in every prompt; LayerNorm mixes nothing in, as all tokens have one
norm.
"""
POSITIONS = 256
"""Longest prompt."""

_D_MODEL = HEADS * D_HEAD
_CONSTANT = 16.0
_SHARPNESS = 16.0
"""How far, in nats, a head's own target stands above every other key."""
_LOGIT = 12.0
"""Logit of a symbol that the induction head attends to fully."""
_FREQUENCIES = tuple(range(10, 70, 3))
"""Turns per `POSITIONS` tokens. With these, cosines at a wrong distance sum to 8.5 of 20 less than at the right one."""
_POSITION_GAP = 8.5


class _Layout:
    """Which channels of the residual stream hold what."""

    token = range(0, VOCABULARY)
    token_balance = VOCABULARY
    previous = range(VOCABULARY + 1, 2 * VOCABULARY + 1)
    previous_balance = 2 * VOCABULARY + 1
    output = range(2 * VOCABULARY + 2, 3 * VOCABULARY + 2)
    output_balance = 3 * VOCABULARY + 2
    first = 3 * VOCABULARY + 3
    """+1 at position 0 and −1 elsewhere; the next channel is its negative."""
    constant = first + 2
    position = range(constant + 2, constant + 2 + 2 * len(_FREQUENCIES))
    """Cosine and sine by turns; as many channels after it hold their negatives."""


def planted_config() -> GPT2Config:
    """The architecture of the planted model."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=_D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=NEURONS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def planted_state() -> dict[str, Tensor]:
    """The weights of the planted model, float32, by GPT-2's parameter names."""
    state = {"transformer.wte.weight": _symbols(), "transformer.wpe.weight": _positions()}
    for layer in range(LAYERS):
        state |= {f"transformer.h.{layer}.{name}": tensor for name, tensor in _layer(layer).items()}
    state |= _norm("transformer.ln_f", written=2)
    state["lm_head.weight"] = torch.zeros(VOCABULARY, _D_MODEL)
    state["lm_head.weight"][range(VOCABULARY), _Layout.output] = _LOGIT
    return state


def _symbols() -> Float[Tensor, "symbol d_model"]:
    table = torch.zeros(VOCABULARY, _D_MODEL)
    table[range(VOCABULARY), _Layout.token] = 1.0
    table[:, _Layout.token_balance] = -1.0
    return table


def _positions() -> Float[Tensor, "position d_model"]:
    table = torch.zeros(POSITIONS, _D_MODEL)
    angles = torch.outer(torch.arange(POSITIONS, dtype=torch.float64), _angular_frequencies())
    waves = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1).float()
    table[:, _Layout.position] = waves
    table[:, [channel + len(_Layout.position) for channel in _Layout.position]] = -waves
    is_first = torch.where(torch.arange(POSITIONS) == 0, 1.0, -1.0)
    table[:, _Layout.first], table[:, _Layout.first + 1] = is_first, -is_first
    table[:, _Layout.constant], table[:, _Layout.constant + 1] = _CONSTANT, -_CONSTANT
    return table


def _angular_frequencies() -> Float[Tensor, " frequency"]:
    """Radians per token, float64."""
    return torch.tensor(_FREQUENCIES, dtype=torch.float64) * (2 * math.pi / POSITIONS)


def _norm(name: str, *, written: int) -> dict[str, Tensor]:
    """A LayerNorm that gives back its input after `written` one-symbol notes have been added to the stream."""
    squared_norm = 2 * _CONSTANT**2 + 2 * len(_FREQUENCIES) + 2 + 2 * (1 + written)
    scale = math.sqrt(squared_norm / _D_MODEL + 1e-5)
    return {f"{name}.weight": torch.full((_D_MODEL,), scale), f"{name}.bias": torch.zeros(_D_MODEL)}


class _Projections:
    """The attention weights of one layer, filled head by head; `[d_model, d_model]` each, input first."""

    def __init__(self) -> None:
        self.query, self.key, self.value, self.output = (torch.zeros(_D_MODEL, _D_MODEL) for _ in range(4))
        self.query_bias = torch.zeros(_D_MODEL)

    def match(self, head: int, keys: range) -> None:
        """Attend where the channels `keys` hold the query's own symbol."""
        columns = _columns(head, VOCABULARY)
        self.query[_Layout.token, columns] = _SHARPNESS * math.sqrt(D_HEAD)
        self.key[keys, columns] = 1.0

    def favour_first(self, head: int, *, by: float) -> None:
        """Raise position 0's score by `by` nats over all others; negative: lower it."""
        column = head * D_HEAD + D_HEAD - 1
        self.query_bias[column] = by / 2 * math.sqrt(D_HEAD)
        self.key[_Layout.first, column] = 1.0

    def look_back(self, head: int, distance: int) -> None:
        """Attend to the token `distance` before, by turning the query's waves back by as much."""
        columns = _columns(head, len(_Layout.position))
        self.key[_Layout.position, columns] = 1.0
        sharpness = _SHARPNESS / _POSITION_GAP * math.sqrt(D_HEAD)
        for index, angle in enumerate((_angular_frequencies() * distance).tolist()):
            cosine, sine = _Layout.position[2 * index], _Layout.position[2 * index + 1]
            to_cosine, to_sine = columns[2 * index], columns[2 * index + 1]
            self.query[cosine, to_cosine] = self.query[sine, to_sine] = sharpness * math.cos(angle)
            self.query[sine, to_cosine] = sharpness * math.sin(angle)
            self.query[cosine, to_sine] = -sharpness * math.sin(angle)

    def read_symbol(self, head: int) -> None:
        """Carry the attended symbol in `z`."""
        self.value[_Layout.token, _columns(head, VOCABULARY)] = 1.0

    def write_symbol(self, head: int, channels: range, balance: int) -> None:
        """Write the carried symbol to the residual stream."""
        columns = _columns(head, VOCABULARY)
        self.output[columns, channels] = 1.0
        self.output[columns, balance] = -1.0


def _columns(head: int, width: int) -> range:
    return range(head * D_HEAD, head * D_HEAD + width)


def _attention(layer: int) -> _Projections:
    projections = _Projections()
    for head in range(HEADS):
        projections.read_symbol(head)
    if layer == 0:
        projections.favour_first(0, by=_SHARPNESS)
        projections.look_back(1, distance=1)
        projections.write_symbol(1, _Layout.previous, _Layout.previous_balance)
        projections.look_back(2, distance=0)
        projections.match(3, _Layout.token)
    else:  # head 0 keeps zero scores: uniform attention
        projections.match(1, _Layout.token)
        projections.match(2, _Layout.previous)
        # Position 0 has no token before it and notes itself: without this it would match its own symbol.
        projections.favour_first(2, by=-2 * _SHARPNESS)
        projections.write_symbol(2, _Layout.output, _Layout.output_balance)
        projections.favour_first(3, by=_SHARPNESS)
    return projections


def _layer(layer: int) -> dict[str, Tensor]:
    heads = _attention(layer)
    generator = torch.Generator().manual_seed(layer)
    return {
        **_norm("ln_1", written=layer),
        "attn.c_attn.weight": torch.cat([heads.query, heads.key, heads.value], dim=1),
        "attn.c_attn.bias": torch.cat([heads.query_bias, torch.zeros(2 * _D_MODEL)]),
        "attn.c_proj.weight": heads.output,
        "attn.c_proj.bias": torch.zeros(_D_MODEL),
        **_norm("ln_2", written=layer + 1),
        # The neurons fire, so that there is something to patch, but write nothing.
        "mlp.c_fc.weight": torch.randn(_D_MODEL, NEURONS, generator=generator) / math.sqrt(_D_MODEL),
        "mlp.c_fc.bias": torch.zeros(NEURONS),
        "mlp.c_proj.weight": torch.zeros(NEURONS, _D_MODEL),
        "mlp.c_proj.bias": torch.zeros(_D_MODEL),
    }
