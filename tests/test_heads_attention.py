"""Detectors against loops written from their definitions, patterns made by hand, and the model planted by hand."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechinterp_cli.engine.patterns import attention_patterns
from mechinterp_cli.methods.heads import attention
from mechinterp_cli.methods.heads.attention import ATTENTION_SCORES, Sequences
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.planted import INDUCTION_HEAD, PREVIOUS_TOKEN_HEAD
from mechinterp_cli.token_metrics import first_positions, repeated_positions
from tests.models_fixtures import planted, toy
from tests.test_engine_patterns import Meter

__all__ = ["planted", "toy"]

NAMES = ["previous_token", "duplicate_token", "induction", "prefix_matching", "first_token"]


def cells_of(name: str, tokens: list[int], spans: Mapping[str, Sequence[int]], skip: int, i: int) -> list[int]:
    """The keys that count for query i, from the definitions."""
    earlier = [j for j in range(skip, i) if tokens[j] == tokens[i]] if i >= skip else []
    return {
        "previous_token": [i - 1] if i >= max(1, skip) else [],
        "first_token": [0] if i >= 1 else [],
        "duplicate_token": earlier,
        "prefix_matching": [j + 1 for j in earlier if j + 1 != i],
        "induction": [f + 1 for f, s in zip(spans.get("first", ()), spans.get("second", ()), strict=True) if s == i],
    }[name]


def by_loops(name: str, pattern: Tensor, sequences: Sequences) -> np.ndarray:
    out = np.full(pattern.shape[:2], math.nan)
    for p, tokens in enumerate(sequences.tokens.tolist()):
        spans = sequences.spans[p] if sequences.spans else {}
        keys = {i: cells_of(name, tokens, spans, sequences.skip, i) for i in range(len(tokens))}
        keys = {i: found for i, found in keys.items() if found}
        for h in range(pattern.shape[1]):
            if keys:
                per_query = [sum(float(pattern[p, h, i, j]) for j in found) for i, found in keys.items()]
                out[p, h] = sum(per_query) / len(per_query)
    return out


def causal_pattern(prompts: int, heads: int, length: int, seed: int = 0) -> Tensor:
    scores = 3 * torch.randn(prompts, heads, length, length, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)


def uniform_pattern(length: int) -> Tensor:
    visible = torch.ones(length, length, dtype=torch.float64).tril()
    return (visible / visible.sum(-1, keepdim=True))[None, None]


def spans_of(block: int, skip: int, length: int) -> dict[str, tuple[int, ...]]:
    if skip + 2 * block > length:
        return {}
    return {
        "first": tuple(range(skip, skip + block)),
        "second": tuple(range(skip + block, skip + 2 * block)),
        "end": (length - 1,),
    }


@st.composite
def sequences_of(draw: st.DrawFn) -> Sequences:
    prompts, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    token = st.integers(0, draw(st.sampled_from([0, 1, 3, 30])))
    tokens = [[draw(token) for _ in range(length)] for _ in range(prompts)]
    skip = draw(st.integers(0, 2))
    spans = [spans_of(draw(st.integers(1, 5)), skip, length) for _ in range(prompts)]
    return Sequences(torch.tensor(tokens), spans if draw(st.booleans()) else (), skip)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=150)
@given(sequences=sequences_of(), seed=st.integers(0, 99))
def test_a_detector_is_its_definition(name: str, sequences: Sequences, seed: int) -> None:
    prompts, length = sequences.tokens.shape
    score, pattern = ATTENTION_SCORES[name], causal_pattern(prompts, 2, length, seed)
    got = score(pattern, sequences)
    assert got.shape == (prompts, 2)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), by_loops(name, pattern, sequences), rtol=0, atol=1e-12)
    known = got[~got.isnan()]
    assert bool(((known >= score.low) & (known <= score.high + 1e-6)).all())


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=50)
@given(sequences=sequences_of())
def test_chance_is_what_uniform_attention_scores(name: str, sequences: Sequences) -> None:
    prompts, length = sequences.tokens.shape
    score = ATTENTION_SCORES[name]
    uniform = score(uniform_pattern(length).expand(prompts, 1, -1, -1), sequences)[:, 0]
    torch.testing.assert_close(score.chance(sequences), uniform, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(sequences=sequences_of(), gathered=st.sampled_from([1, 7, 1000]), step=st.integers(1, 3))
def test_scores_do_not_depend_on_how_a_pattern_is_cut(
    name: str, sequences: Sequences, gathered: int, step: int
) -> None:
    prompts, length = sequences.tokens.shape
    pattern, cells = causal_pattern(prompts, 3, length), ATTENTION_SCORES[name].cells(sequences)
    want = cells.mean(pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "GATHERED", gathered)
        parts = [slice(lo, min(lo + step, prompts)) for lo in range(0, prompts, step)]
        got = torch.cat([cells.mean(pattern[part], part) for part in parts])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12, equal_nan=True)


BLOCK = 5
REPEATED = Sequences(
    torch.tensor([[9, *[1, 2, 3, 4, 5] * 3], [9, *[5, 7, 1, 8, 2] * 3]]), [spans_of(BLOCK, 1, 16)] * 2, skip=1
)


def attending(target: dict[int, int], length: int = 16) -> Tensor:
    """A pattern in which query i attends to `target[i]` alone, and to the first token where nothing is said."""
    pattern = torch.zeros(2, 1, length, length)
    for i in range(length):
        pattern[:, :, i, target.get(i, 0)] = 1.0
    return pattern


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        (attending({i: i - 1 for i in range(1, 16)}), {"previous_token": 1.0, "first_token": 1 / 15}),
        (attending({}), {"previous_token": 1 / 15, "first_token": 1.0}),
        (
            attending({i: i - 4 for i in range(6, 16)}),
            {"induction": 1.0, "prefix_matching": 1.0, "first_token": 5 / 15},
        ),
        # queries of the third repeat attend into the first: still what followed the same token
        (
            attending({i: i - 9 for i in range(11, 16)}),
            {"prefix_matching": 0.5, "previous_token": 1 / 15, "first_token": 10 / 15},
        ),
        (attending({i: i - 5 for i in range(6, 16)}), {"duplicate_token": 1.0, "first_token": 5 / 15}),
        (attending({i: i - 5 for i in range(6, 11)}), {"duplicate_token": 0.5, "first_token": 10 / 15}),
        (attending({i: i for i in range(16)}), {}),
    ],
)
def test_patterns_made_by_hand_score_what_one_reads_off_them(pattern: Tensor, want: dict[str, float]) -> None:
    sure = {**dict.fromkeys(NAMES, 0.0), **want}
    if "previous_token" not in want and pattern[0, 0, 1, 0] == 1:
        sure["previous_token"] = 1 / 15  # query 1 attends to the first token, which is the one before
    for name, value in sure.items():
        got = ATTENTION_SCORES[name](pattern, REPEATED)
        torch.testing.assert_close(got, torch.full((2, 1), value, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_closed_forms_of_chance() -> None:
    score = {name: float(found.chance(REPEATED)[0]) for name, found in ATTENTION_SCORES.items()}
    one_key = {i: 1 / (i + 1) for i in range(16)}
    assert score["previous_token"] == pytest.approx(sum(one_key[i] for i in range(1, 16)) / 15)
    assert score["first_token"] == score["previous_token"]
    assert score["induction"] == pytest.approx(sum(one_key[i] for i in range(6, 11)) / 5)
    twice = sum(one_key[i] for i in range(6, 11)) + 2 * sum(one_key[i] for i in range(11, 16))
    assert score["duplicate_token"] == score["prefix_matching"] == pytest.approx(twice / 10)


def test_the_token_itself_is_not_what_followed_it() -> None:
    same = Sequences(torch.tensor([[4, 4, 4]]))
    cells = ATTENTION_SCORES["prefix_matching"].cells(same)
    assert list(zip(cells.query.tolist(), cells.key.tolist(), strict=True)) == [(2, 1)]
    assert cells.queries.tolist() == [1]  # query 1 has an earlier occurrence, but only itself after it


def test_a_prompt_where_nothing_counts_is_nan_and_others_are_not() -> None:
    sequences = Sequences(torch.tensor([[1, 2, 3, 4], [1, 2, 1, 2]]), [{}, spans_of(2, 0, 4)])
    for name in ("duplicate_token", "prefix_matching", "induction"):
        got = ATTENTION_SCORES[name](uniform_pattern(4).expand(2, 3, -1, -1), sequences)
        assert got.isnan().tolist() == [[True] * 3, [False] * 3]
        assert ATTENTION_SCORES[name].chance(sequences).isnan().tolist() == [True, False]


def test_a_token_that_the_tokenizer_put_first_is_not_an_occurrence() -> None:
    tokens = torch.tensor([[7, 1, 7, 1]])
    pattern = attending({1: 0, 2: 0, 3: 1}, length=4)[:1]
    assert float(ATTENTION_SCORES["duplicate_token"](pattern, Sequences(tokens, skip=1))) == 1.0
    assert float(ATTENTION_SCORES["duplicate_token"](pattern, Sequences(tokens))) == 1.0
    elsewhere = attending({1: 0, 2: 0, 3: 3}, length=4)[:1]
    assert float(ATTENTION_SCORES["duplicate_token"](elsewhere, Sequences(tokens, skip=1))) == 0.0
    assert float(ATTENTION_SCORES["duplicate_token"](elsewhere, Sequences(tokens))) == 0.5


def test_a_pattern_is_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    length = 128
    pattern = uniform_pattern(length).float().expand(4, 8, -1, -1).contiguous()
    sequences = Sequences(torch.zeros(4, length, dtype=torch.long))  # every earlier token is an occurrence
    monkeypatch.setattr(attention, "GATHERED", 2**15)
    cells = ATTENTION_SCORES["duplicate_token"].cells(sequences)
    assert len(cells.query) * 8 > pattern.numel() // 3
    with Meter() as meter:
        cells.mean(pattern)
    assert meter.largest <= 8 * 2**15
    monkeypatch.setattr(attention, "GATHERED", 2**30)
    with Meter() as meter:
        cells.mean(pattern)
    assert meter.largest >= 8 * pattern.numel() // 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_float64_whatever_the_pattern_is(dtype: torch.dtype) -> None:
    pattern = causal_pattern(2, 3, 16).to(dtype)
    for score in ATTENTION_SCORES.values():
        got = score(pattern, REPEATED)
        assert got.dtype == torch.float64
        np.testing.assert_allclose(got.numpy(), by_loops(score.name, pattern, REPEATED), rtol=0, atol=1e-12)


def test_the_registry_says_what_each_score_is() -> None:
    assert list(ATTENTION_SCORES) == NAMES
    assert [name for name, score in ATTENTION_SCORES.items() if score.needs_spans] == ["induction"]
    for name, score in ATTENTION_SCORES.items():
        assert (score.name, score.low, score.high) == (name, 0.0, 1.0)
        assert score.meaning
        assert "\n" not in score.meaning
        documented = score.cells.__doc__ or ""
        assert all(word in documented for word in ("Range [0, 1]", "Chance", "Source"))


def scored(loaded: LoadedModel, sequences: Sequences) -> dict[str, Tensor]:
    """Scores [prompts, layers, heads] of a model."""
    cells = {name: score.cells(sequences) for name, score in ATTENTION_SCORES.items()}
    layers = range(loaded.anatomy.n_layers)
    out = {name: torch.full((len(sequences.tokens), len(layers), 4), torch.nan).double() for name in cells}

    def visit(layer: int, pattern: Tensor, prompts: slice, heads: slice) -> None:
        for name, found in cells.items():
            out[name][prompts, layer, heads] = found.mean(pattern, prompts)

    attention_patterns(loaded.model, loaded.anatomy, sequences.tokens, list(layers), visit)
    return out


def repeated_blocks(prompts: int, block: int, repeats: int, vocabulary: int) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.stack([torch.randperm(vocabulary, generator=generator)[:block] for _ in range(prompts)])
    return Sequences(blocks.repeat(1, repeats), [spans_of(block, 0, block * repeats)] * prompts)


def planted_pattern(head: tuple[int, int], tokens: list[int]) -> Tensor:
    """What the planted head attends to by its construction, [queries, keys]."""
    length = len(tokens)
    ideal = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        same = [j for j in range(i + 1) if tokens[j] == tokens[i]]
        noted = [j for j in range(1, i + 1) if tokens[j - 1] == tokens[i]]
        keys = {
            (0, 0): [0],
            (0, 1): [max(0, i - 1)],
            (0, 2): [i],
            (0, 3): same,
            (1, 0): list(range(i + 1)),
            (1, 1): same,
            (1, 2): noted or list(range(1, i + 1)) or [0],
            (1, 3): [0],
        }[head]
        ideal[i, keys] = 1 / len(keys)
    return ideal


@pytest.mark.parametrize(("block", "repeats"), [(20, 2), (10, 4), (40, 2)])
def test_the_planted_heads_stand_out_and_all_others_are_at_their_closed_form(
    planted: LoadedModel, block: int, repeats: int
) -> None:
    sequences = repeated_blocks(6, block, repeats, planted.anatomy.vocab_size)
    got = scored(planted, sequences)
    assert float(got["previous_token"][:, *PREVIOUS_TOKEN_HEAD].min()) > 0.95
    assert float(got["induction"][:, *INDUCTION_HEAD].min()) > 0.95
    for layer in range(2):
        for head in range(4):
            ideal = torch.stack([planted_pattern((layer, head), tokens) for tokens in sequences.tokens.tolist()])
            for name, score in ATTENTION_SCORES.items():
                want = score(ideal[:, None], sequences)[:, 0]
                torch.testing.assert_close(got[name][:, layer, head], want, rtol=0, atol=0.01, msg=f"{layer} {name}")
            if (layer, head) != PREVIOUS_TOKEN_HEAD:
                assert float(got["previous_token"][:, layer, head].max()) < 0.5
            if (layer, head) != INDUCTION_HEAD:
                assert float(got["induction"][:, layer, head].max()) < 0.5
    for name, score in ATTENTION_SCORES.items():  # head (1, 0) attends uniformly
        torch.testing.assert_close(got[name][:, 1, 0], score.chance(sequences), rtol=0, atol=1e-3)


def test_the_toys_heads_are_found(toy: LoadedModel) -> None:
    sequences = repeated_blocks(4, 20, 2, toy.anatomy.vocab_size)
    got = {name: values.mean(0) for name, values in scored(toy, sequences).items()}
    assert float(got["induction"][1].max()) > 0.8 > 0.2 > float(got["induction"][0].max())
    assert float(got["previous_token"][0].max()) > 0.6


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 10**6]), min_size=6, max_size=6), min_size=1, max_size=3))
def test_repeated_and_first_predictions_are_their_definitions(rows: list[list[int]]) -> None:
    tokens = torch.tensor(rows)
    repeated, first = repeated_positions(tokens), first_positions(tokens)
    assert repeated.dtype == first.dtype == torch.bool
    assert repeated.shape == first.shape == (len(rows), 5)
    for p, row in enumerate(rows):
        for i in range(5):
            pairs = [(row[j], row[j + 1]) for j in range(i)]
            assert bool(repeated[p, i]) == ((row[i], row[i + 1]) in pairs)
            assert bool(first[p, i]) == (row[i + 1] not in row[: i + 1])
    assert not bool((repeated & first).any())


def test_in_a_repeated_block_predictions_are_first_then_repeated() -> None:
    tokens = repeated_blocks(2, 4, 2, 9).tokens
    assert first_positions(tokens)[0].tolist() == [True] * 3 + [False] * 4
    assert repeated_positions(tokens)[0].tolist() == [False] * 4 + [True] * 3


def test_one_token_predicts_nothing() -> None:
    assert repeated_positions(torch.tensor([[3]])).shape == first_positions(torch.tensor([[3]])).shape == (1, 0)
