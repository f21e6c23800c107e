"""What a head attends to, as one number per prompt: the detectors that read attention patterns.

Every score is a mean over queries of the attention that each query gives to certain keys. A detector names
those (query, key) cells; `Cells` adds the pattern up over them, and gives in closed form what attention that
is uniform over the visible keys would score (query i sees i + 1 keys).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_cli.methods.heads.options import AttentionScoreName

GATHERED = 2**20
"""Numbers that are taken out of a pattern at once."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """The prompts of one length that a pattern was computed on.

    Args:
        tokens: Ids [prompts, positions].
        spans: For each prompt its spans: `induction` reads `first` and `second`, the positions of a block's
            first and second copy in order.
        skip: How many tokens the tokenizer put before every prompt.
    """

    tokens: Int[Tensor, "prompts positions"]
    spans: Sequence[Mapping[str, Sequence[int]]] = field(default=())
    skip: int = 0


@dataclass(frozen=True, eq=False)
class Cells:
    """The (query, key) cells whose attention is added up, of all prompts together, and how many queries each has.

    Args:
        prompt: Prompt of each cell, from 0; `query` and `key` are its positions.
        query: See there.
        key: See there.
        queries: Number of different queries of each prompt [prompts]; a query without cells does not count.
    """

    prompt: Int[Tensor, " cells"]
    query: Int[Tensor, " cells"]
    key: Int[Tensor, " cells"]
    queries: Int[Tensor, " prompts"]

    @classmethod
    def of(cls, prompts: int, positions: int, prompt: Tensor, query: Tensor, key: Tensor) -> "Cells":
        """Cells of `prompts` prompts of `positions` tokens."""
        used = torch.zeros(prompts, positions, dtype=torch.bool)
        used[prompt, query] = True
        return cls(prompt, query, key, used.sum(1))

    def mean(self, pattern: Float[Tensor, "prompts heads queries keys"], prompts: slice | None = None) -> Tensor:
        """Scores [prompts, heads], float64 on the CPU: attention to the cells, added up, per query that counts.

        Args:
            pattern: Of all prompts, or of those that `prompts` names.
            prompts: Which prompts the pattern is of, where it is not all.

        Returns:
            The means; NaN for a prompt without cells.
        """
        lo, hi, _ = (prompts or slice(None)).indices(len(self.queries))
        # cells are sorted by prompt: those of a range of prompts are neighbours
        first, last = torch.searchsorted(self.prompt, torch.tensor([lo, hi])).tolist()
        total = torch.zeros(hi - lo, pattern.shape[1], dtype=torch.float64)
        step = max(1, GATHERED // pattern.shape[1])
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            prompt = self.prompt[part] - lo
            where = (x.to(pattern.device) for x in (prompt, self.query[part], self.key[part]))
            at_prompt, at_query, at_key = where
            total.index_add_(0, prompt, pattern[at_prompt, :, at_query, at_key].cpu().double())
        return self._per_query(total, self.queries[lo:hi, None])

    def chance(self) -> Float[Tensor, " prompts"]:
        """What attention uniform over the visible keys scores: the mean of cells ÷ (query + 1), float64."""
        total = torch.zeros(len(self.queries), dtype=torch.float64)
        total.index_add_(0, self.prompt, 1.0 / (self.query.double() + 1.0))
        return self._per_query(total, self.queries)

    @staticmethod
    def _per_query(total: Tensor, queries: Tensor) -> Tensor:
        return torch.where(queries > 0, total / queries.clamp(min=1), torch.nan)


def previous_token(sequences: Sequences) -> Cells:
    """Attention to the token before: mean over queries i of pattern[i, i − 1].

    Queries: all from 1 on that the tokenizer did not put there itself. Range [0, 1]. Chance: the mean of
    1 / (i + 1). Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et
    al. 2022 (2209.11895), previous-token heads.
    """
    prompts, positions = sequences.tokens.shape
    queries = torch.arange(positions)[max(1, sequences.skip) :]
    return _same_for_all(prompts, positions, queries, queries - 1)


def first_token(sequences: Sequences) -> Cells:
    """Attention to the first token, where heads with nothing to do look: mean over queries i ≥ 1 of pattern[i, 0].

    Range [0, 1]. Chance: the mean of 1 / (i + 1). Source: Xiao et al. 2023 (2309.17453), attention sinks.
    """
    prompts, positions = sequences.tokens.shape
    queries = torch.arange(1, positions)
    return _same_for_all(prompts, positions, queries, torch.zeros_like(queries))


def duplicate_token(sequences: Sequences) -> Cells:
    """Attention to earlier occurrences of the query's own token, summed, meaned over queries that have any.

    Range [0, 1]. Chance: the mean of (earlier occurrences) / (i + 1). Tokens that the tokenizer put first are
    neither queries nor keys. Source: Wang et al. 2022 (2211.00593), duplicate-token heads.
    """
    return _joined(sequences, [_repeats(tokens, sequences.skip) for tokens in sequences.tokens.cpu()])


def prefix_matching(sequences: Sequences) -> Cells:
    """Attention to what followed earlier occurrences of the query's token, summed, meaned over queries that have any.

    A key is j + 1 with j < i, t_j = t_i and j + 1 < i: the query itself is no key. On repeated random tokens the
    queries are those of repeats 2, 3, … Range [0, 1]. Chance: the mean of (such keys) / (i + 1). Tokens that the
    tokenizer put first are neither queries nor earlier occurrences. Source: Olsson et al. 2022 (2209.11895),
    prefix matching score.
    """
    found = [_repeats(tokens, sequences.skip) for tokens in sequences.tokens.cpu()]
    return _joined(sequences, [(query[key + 1 < query], key[key + 1 < query] + 1) for query, key in found])


def induction(sequences: Sequences) -> Cells:
    """The induction stripe: mean over the second copy of a repeated block of the attention to what came next.

    With a block of S tokens that is pattern[i, i − (S − 1)]: from the k-th token of the second copy to the token
    after the k-th token of the first (`spans`: `first`, `second`). Range [0, 1]. Chance: the mean of 1 / (i + 1).
    NaN for a prompt without these spans. Source: Olsson et al. 2022 (2209.11895); the stripe as in
    TransformerLens' induction score.
    """
    pairs = []
    for prompt in range(len(sequences.tokens)):
        spans = sequences.spans[prompt] if sequences.spans else {}
        second, first = (torch.tensor(list(spans.get(name, ())), dtype=torch.long) for name in ("second", "first"))
        pairs.append((second, first + 1))
    return _joined(sequences, pairs)


def _same_for_all(prompts: int, positions: int, query: Tensor, key: Tensor) -> Cells:
    prompt = torch.arange(prompts).repeat_interleave(len(query))
    return Cells.of(prompts, positions, prompt, query.repeat(prompts), key.repeat(prompts))


def _joined(sequences: Sequences, pairs: Sequence[tuple[Tensor, Tensor]]) -> Cells:
    """Cells from each prompt's queries and keys."""
    prompts, positions = sequences.tokens.shape
    prompt = torch.arange(prompts).repeat_interleave(torch.tensor([len(query) for query, _ in pairs], dtype=torch.long))
    query, key = (torch.cat([pair[i] for pair in pairs]) if pairs else prompt for i in (0, 1))
    return Cells.of(prompts, positions, prompt, query, key)


def _repeats(tokens: Int[Tensor, " positions"], skip: int) -> tuple[Tensor, Tensor]:
    """All (i, j) with j < i, the same token at both, and neither among the first `skip`."""
    own = tokens[skip:]
    query, key = (own[:, None] == own[None, :]).tril(-1).nonzero().unbind(1)
    return query + skip, key + skip


@dataclass(frozen=True)
class AttentionScore:
    """A detector and what its numbers mean."""

    name: AttentionScoreName
    cells: Callable[[Sequences], Cells]
    """Which cells of a pattern count; made once per batch of prompts."""
    meaning: str
    """In one line, for tables and pictures."""
    needs_spans: bool = False
    """Whether it reads the spans `first` and `second`, which the prompts of `repeats` have."""
    low: float = 0.0
    high: float = 1.0

    def __call__(self, pattern: Float[Tensor, "prompts heads queries keys"], sequences: Sequences) -> Tensor:
        """Scores [prompts, heads] of one pattern, float64; NaN for a prompt where no position counts."""
        return self.cells(sequences).mean(pattern)

    def chance(self, sequences: Sequences) -> Float[Tensor, " prompts"]:
        """What attention that is uniform over the visible keys scores on each prompt."""
        return self.cells(sequences).chance()


_ALL = (
    AttentionScore("previous_token", previous_token, "attention to the token before"),
    AttentionScore("duplicate_token", duplicate_token, "attention to earlier occurrences of the same token"),
    AttentionScore(
        "induction", induction, "in a repeated block, attention to the token that came next", needs_spans=True
    ),
    AttentionScore("prefix_matching", prefix_matching, "attention to what followed earlier occurrences of the token"),
    AttentionScore("first_token", first_token, "attention to the first token"),
)

ATTENTION_SCORES: Mapping[str, AttentionScore] = {score.name: score for score in _ALL}
"""The detectors by name, in the order in which they are shown."""
