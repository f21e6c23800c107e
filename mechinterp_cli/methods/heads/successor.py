"""Successor heads (Gould et al. 2312.09230): does a head that attends to an item put forward the next one?"""

import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.methods.heads.weights import Circuits, HeadScores, after_first_mlp, embedded
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.tasks.tokenise import Encoder, UnknownWordError

_WORDS = {
    "numbers": "one two three four five six seven eight nine ten eleven twelve",
    "digits": " ".join(string.digits),
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November December",
    "letters": " ".join(string.ascii_uppercase),
}
SERIES: dict[str, tuple[str, ...]] = {name: tuple(words.split()) for name, words in _WORDS.items()}
"""Series by name, each in order; none is a circle: nobody is asked what follows the last item."""
FEWEST = 4
"""A series with fewer single tokens than this is left out."""


@dataclass(frozen=True)
class Series:
    """A series as a model's tokenizer has it.

    `tokens` are the items that are one token, in order. `pairs` are (place of an item, place of its successor)
    among them, for items whose successor is one token too.
    """

    name: str
    tokens: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]


def find_series(encoder: Encoder) -> tuple[Series, ...]:
    """The series that a tokenizer has at least four single tokens of, and a pair among them."""
    found = (_series(name, items, encoder) for name, items in SERIES.items())
    return tuple(series for series in found if len(series.tokens) >= FEWEST and series.pairs)


def _series(name: str, items: Sequence[str], encoder: Encoder) -> Series:
    """The items within a sentence, or, where that leaves more of them, at the start of a text (digits)."""
    spaced = [encoder.word(item) for item in items]
    bare = [alone[0] if len(alone := _alone(encoder, item)) == 1 else None for item in items]
    ids = spaced if _different(spaced) >= _different(bare) else bare
    places: dict[int, int] = {}
    for place, token in enumerate(ids):
        if token is not None and token not in ids[:place]:
            places[place] = len(places)
    tokens = tuple(token for place in places if (token := ids[place]) is not None)
    return Series(name, tokens, tuple((places[p], places[p + 1]) for p in places if p + 1 in places))


def _different(ids: Sequence[int | None]) -> int:
    return len({token for token in ids if token is not None})


def _alone(encoder: Encoder, item: str) -> tuple[int, ...]:
    """Token ids of an item by itself; none where the tokenizer or the model does not know it."""
    try:
        ids = encoder.ids(item)
    except UnknownWordError:
        return ()
    rows = len(encoder.tokenizer) if encoder.vocab_size is None else encoder.vocab_size
    return ids if all(i != encoder.tokenizer.unk_token_id and i < rows for i in ids) else ()


def successor(logits: Float[Tensor, "items items"], pairs: Sequence[tuple[int, int]]) -> Float[Tensor, " pairs"]:
    """For each item of a series, 1 if its successor has the highest logit among the series' items, else 0.

    A head's score is the mean over the items of all series. A tie at the top is shared evenly, so that a head that
    writes nothing is at chance. In [0, 1]; for a random choice 1 / size of the item's series, averaged over the
    items in closed form.

    Args:
        logits: What attending to an item (first axis) adds to the logit of each item (second).
        pairs: (Item, its successor).
    """
    items, next_ones = (torch.tensor(column, device=logits.device) for column in zip(*pairs, strict=True))
    rows = logits[items]
    top = rows == rows.amax(-1, keepdim=True)
    return top.gather(1, next_ones[:, None])[:, 0].float() / top.sum(-1)


@torch.no_grad()
def successor_scores(circuits: Circuits, layers: Sequence[int]) -> HeadScores:
    """`successor` of every head of some layers.

    The attended token's residual stream is what leaves layer 0 when its attention adds nothing (embedding and first
    MLP, where Gould et al. find the items' order); for the heads of layer 0, and in a model whose only layer it is,
    the embedding.
    """
    series = find_series(circuits.encoder)
    if not series:
        reason = f"this tokenizer has no series with {FEWEST} single tokens ({', '.join(SERIES)})"
        return HeadScores("successor", circuits.blank(), None, dict.fromkeys(layers, reason))
    missing = circuits.missing(layers)
    if without := circuits.model.anatomy.layers[0].missing.get("attn_out"):
        missing |= {layer: f"layer 0: {without}" for layer in layers if layer}
    values = circuits.blank()
    scored = [layer for layer in layers if layer not in missing]
    sources = [_Source.of(circuits, one, deep=any(scored)) for one in series if scored]
    for layer in scored:
        mean = torch.cat([source.hits(circuits, layer) for source in sources]).double().mean(0)
        values[layer, : len(mean)] = mean
    return HeadScores("successor", values, chance(series), missing)


def chance(series: Sequence[Series]) -> float:
    """Mean over all items asked of 1 / the size of their series."""
    return sum(len(s.pairs) / len(s.tokens) for s in series) / sum(len(s.pairs) for s in series)


@dataclass(frozen=True, eq=False)
class _Source:
    """A series, the residual streams that stand for its tokens, and the way back to their logits."""

    series: Series
    project: Float[Tensor, "items d_model"]
    first: Float[Tensor, "items d_model"]
    """For the heads of layer 0."""
    later: Float[Tensor, "items d_model"]
    """For all others."""

    @classmethod
    def of(cls, circuits: Circuits, series: Series, *, deep: bool) -> "_Source":
        """The streams of a series; those for later layers are made only if there is one to score (`deep`)."""
        tokens = torch.tensor(series.tokens, device=device_of(circuits.model.model))
        first = embedded(circuits, tokens)
        return cls(series, circuits.project(tokens), first, after_first_mlp(circuits, tokens) if deep else first)

    def hits(self, circuits: Circuits, layer: int) -> Float[Tensor, "pairs heads"]:
        """Of each item of the series, whether a head puts forward its successor."""
        read = circuits.read(layer, self.later if layer else self.first)
        write = circuits.write(layer, self.project)
        heads = [successor(read[:, h] @ write[h], self.series.pairs) for h in range(read.shape[1])]
        return torch.stack(heads, dim=1).cpu()
