"""Scores from weights against plain matrices taken by name, at chance for random ones, exact for planted ones."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.direct_effects import DirectEffects
from mechinterp_cli.methods.heads.composition import COMPOSITIONS, CompositionName, compositions
from mechinterp_cli.methods.heads.direct import direct_effects
from mechinterp_cli.methods.heads.successor import Series, chance, find_series, successor, successor_scores
from mechinterp_cli.methods.heads.weights import circuits, copying, copying_eigenvalues, copying_scores, sample_tokens
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.loaded import LoadedModel, ModelSource
from mechinterp_cli.models.planted import INDUCTION_HEAD, PREVIOUS_TOKEN_HEAD
from mechinterp_cli.tasks.prompts import Prompt
from mechinterp_cli.tasks.tokenise import Encoder
from tests.families import build
from tests.models_fixtures import planted, smollm2, toy
from tests.task_tokenizers import symbols, wrap

__all__ = ["planted", "smollm2", "toy"]

LAYER, D_MODEL, HEADS, D_HEAD = 2, 32, 4, 8
TOKENS = torch.arange(8, 60)


def loaded(name: str, tokenizer: Any = None, **others: Any) -> LoadedModel:
    model = build(name, **others)
    return LoadedModel(model, tokenizer or symbols(), find_anatomy(model), ModelSource(name, "zoo", None))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Copying


def test_copying_counts_the_pairs_that_a_token_wins_on_its_own_logit() -> None:
    assert copying(torch.eye(5)) == 1
    assert copying(-torch.eye(5)) == 0
    assert copying(torch.zeros(5, 5)) == 0.5
    assert copying(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [3.0, 1.0, 1.0]])) == pytest.approx(3.5 / 6)
    assert copying(torch.ones(1, 1)) != copying(torch.ones(1, 1))  # one token: undefined


def test_eigenvalues_are_those_of_the_whole_token_to_token_matrix() -> None:
    read, write = random(40, 3, 6, seed=0), random(3, 6, 40, seed=1)
    ours = copying_eigenvalues(read, write)
    for head in range(3):
        values = torch.linalg.eigvals((read[:, head] @ write[head]).double())
        assert float(ours[head]) == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-5)


def test_eigenvalues_tell_copying_from_its_opposite_and_zeros_have_none() -> None:
    read = random(40, 2, 6, seed=0)
    same = read.transpose(0, 1).transpose(1, 2)
    assert copying_eigenvalues(read, same).tolist() == pytest.approx([1, 1])
    assert copying_eigenvalues(read, -same).tolist() == pytest.approx([-1, -1])
    assert copying_eigenvalues(read, torch.zeros_like(same)).isnan().all()


def test_random_weights_are_at_chance() -> None:
    shares, eigenvalues = [], []
    for seed in range(200):
        read, write = random(64, 1, 8, seed=2 * seed), random(1, 8, 64, seed=2 * seed + 1)
        shares.append(copying(read[:, 0] @ write[0]))
        eigenvalues.append(float(copying_eigenvalues(read, write)))
    assert sum(shares) / 200 == pytest.approx(0.5, abs=0.02)
    assert sum(eigenvalues) / 200 == pytest.approx(0.0, abs=0.05)


def plain_llama_circuit(model: Any, streams: Tensor, tokens: Tensor) -> Tensor:
    """M by head, [heads, tokens, tokens]."""
    layer = model.model.layers[LAYER]
    v = layer.self_attn.v_proj(layer.input_layernorm(streams)).view(-1, 2, D_HEAD).repeat_interleave(2, 1)
    write = layer.self_attn.o_proj.weight.T.view(HEADS, D_HEAD, D_MODEL)
    unembed = model.lm_head.weight[tokens] * model.model.norm.weight
    return torch.stack([v[:, h] @ write[h] @ unembed.T for h in range(HEADS)])


def plain_gpt2_circuit(model: Any, streams: Tensor, tokens: Tensor, *, bias: bool = True) -> Tensor:
    layer = model.transformer.h[LAYER]
    weight, offset = layer.attn.c_attn.weight[:, 2 * D_MODEL :], layer.attn.c_attn.bias[2 * D_MODEL :]
    read = layer.ln_1(streams) @ weight + offset - (0 if bias else layer.ln_1.bias @ weight + offset)
    write = layer.attn.c_proj.weight.view(HEADS, D_HEAD, D_MODEL)
    unembed = model.lm_head.weight[tokens] * model.transformer.ln_f.weight
    unembed = unembed - unembed.mean(1, keepdim=True)
    return torch.stack([read.view(-1, HEADS, D_HEAD)[:, h] @ write[h] @ unembed.T for h in range(HEADS)])


def test_copying_of_a_grouped_query_model_is_that_of_its_weights() -> None:
    model = loaded("llama")
    inner: Any = model.model
    with circuits(model) as found:
        shares, eigenvalues = copying_scores(found, [0, LAYER], TOKENS)
    plain = plain_llama_circuit(inner, inner.model.embed_tokens.weight[TOKENS], TOKENS)
    assert shares.values[LAYER].tolist() == pytest.approx([copying(m) for m in plain], abs=1e-3)
    values = [torch.linalg.eigvals(m.double()) for m in plain]
    assert eigenvalues.values[LAYER].tolist() == pytest.approx(
        [float(v.real.sum() / v.abs().sum()) for v in values], abs=1e-4
    )
    assert shares.values[1].isnan().all(), "a layer that was not asked for"
    assert (shares.chance, eigenvalues.chance) == (0.5, 0.0)


def test_copying_of_gpt2_has_positions_and_biases_and_its_eigenvalues_no_biases() -> None:
    model = loaded("gpt2")
    inner: Any = model.model
    with circuits(model) as found:
        shares, eigenvalues = copying_scores(found, [LAYER], TOKENS)
    streams = inner.transformer.wte.weight[TOKENS] + inner.transformer.wpe.weight[1]
    plain = plain_gpt2_circuit(inner, streams, TOKENS)
    assert shares.values[LAYER].tolist() == pytest.approx([copying(m) for m in plain], abs=1e-3)
    values = [torch.linalg.eigvals(m.double()) for m in plain_gpt2_circuit(inner, streams, TOKENS, bias=False)]
    assert eigenvalues.values[LAYER].tolist() == pytest.approx(
        [float(v.real.sum() / v.abs().sum()) for v in values], abs=1e-4
    )


def test_the_planted_induction_head_copies_and_the_others_write_nothing(planted: LoadedModel) -> None:
    with circuits(planted) as found:
        shares, eigenvalues = copying_scores(found, [0, 1], sample_tokens(found, 1000, 0))
    for layer in range(2):
        for head in range(4):
            is_planted = (layer, head) == INDUCTION_HEAD
            assert float(shares.values[layer, head]) == (1.0 if is_planted else 0.5)
            assert bool(eigenvalues.values[layer, head].isnan()) != is_planted
    assert float(eigenvalues.values[INDUCTION_HEAD]) == pytest.approx(1, abs=1e-4)


def test_the_sample_is_seeded_and_of_ordinary_tokens(toy: LoadedModel) -> None:
    with circuits(toy) as found:
        some = [sample_tokens(found, 20, seed).tolist() for seed in (0, 0, 1)]
        everything = sample_tokens(found, 1000, 0).tolist()
    assert some[0] == some[1] != some[2]
    assert len(set(some[0])) == 20
    assert everything == list(range(64)), "all symbols, the unknown token left out"


def test_layers_without_an_ov_circuit_have_no_score_and_say_why() -> None:
    model = loaded("qwen3_next")
    with circuits(model) as found:
        shares, _ = copying_scores(found, range(3), TOKENS)
        pairs = compositions(found, "v_composition", range(3))
    assert shares.values.isnan().all()
    assert set(shares.reasons) == {0, 1, 2}
    assert "not linear in z" in shares.reasons[1]
    assert pairs.values.isnan().all()
    assert set(pairs.reasons) == {0, 1, 2}
    assert set(pairs.unread) == {0, 1}


def test_a_model_whose_logits_are_no_product_has_no_copying() -> None:
    model = loaded("llama")
    inner: Any = model.model
    inner.lm_head.register_forward_hook(lambda _m, _a, out: out + 0.3 * out**2)
    with circuits(model) as found:
        shares, _ = copying_scores(found, [0], TOKENS)
        assert "output head" in shares.reasons[0]
        assert isinstance(direct_effects(found, [prompt(5, 1)]), str)


# Composition


def plain_circuits(name: str, model: Any, layer: int) -> tuple[list[Tensor], list[Tensor]]:
    """W_QK (query stream first) and W_OV (what is written first) of every head, [d_model, d_model] each."""
    if name == "llama":
        block = model.model.layers[layer]
        norm = torch.diag(block.input_layernorm.weight)
        q, k, v = (getattr(block.self_attn, f"{part}_proj").weight @ norm for part in "qkv")
        o = block.self_attn.o_proj.weight
    else:
        block = model.transformer.h[layer]
        norm = block.ln_1.weight[:, None] * (torch.eye(D_MODEL) - 1 / D_MODEL)
        q, k, v = (part.T @ norm for part in block.attn.c_attn.weight.split(D_MODEL, dim=1))
        o = block.attn.c_proj.weight.T
    group = len(q) // len(k)
    q, k, v = (x.view(-1, D_HEAD, D_MODEL) for x in (q, k, v))
    heads = range(len(q))
    qk = [q[h].T @ k[h // group] for h in heads]
    return qk, [o[:, h * D_HEAD : (h + 1) * D_HEAD] @ v[h // group] for h in heads]


def ratio(product: Tensor, a: Tensor, b: Tensor) -> float:
    return float(product.norm() / (a.norm() * b.norm()))


@pytest.mark.parametrize("score", COMPOSITIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_composition_is_the_ratio_of_frobenius_norms(name: str, score: CompositionName) -> None:
    model = loaded(name)
    with circuits(model) as found:
        ours = compositions(found, score, range(3))
    plain = [plain_circuits(name, model.model, layer) for layer in range(3)]
    for later in range(3):
        for earlier in range(3):
            for h2 in range(HEADS):
                for h1 in range(HEADS):
                    qk, ov, first = plain[later][0][h2], plain[later][1][h2], plain[earlier][1][h1]
                    left = {"q_composition": qk.T, "k_composition": qk, "v_composition": ov}[score]
                    value = float(ours.values[later, h2, earlier, h1])
                    if earlier >= later:
                        assert value != value
                    else:
                        assert value == pytest.approx(ratio(left @ first, left, first), rel=1e-4)
    strongest, layer, head = ours.strongest()
    assert strongest.values[0].isnan().all()
    assert (layer[0] == -1).all()
    row = ours.values[2, 1]
    assert float(strongest.values[2, 1]) == float(row.nan_to_num(-1).max())
    assert float(row[layer[2, 1], head[2, 1]]) == float(strongest.values[2, 1])


def test_only_the_planted_pair_composes_and_only_by_its_keys(planted: LoadedModel) -> None:
    pair = (*INDUCTION_HEAD, *PREVIOUS_TOKEN_HEAD)
    with circuits(planted) as found:
        by_score = {score: compositions(found, score, [0, 1]) for score in COMPOSITIONS}
    keys = by_score["k_composition"]
    assert float(keys.values[pair]) > 1.5 * keys.chance
    for score, result in by_score.items():
        others = result.values.clone()
        if score == "k_composition":
            others[pair] = torch.nan
        assert others.nan_to_num().max() < 1e-6, score
    # Heads that write nothing compose with nobody, in no defined way.
    assert keys.values[1, 2, 0, [0, 2, 3]].isnan().all()


def test_compositions_of_random_heads_are_at_chance() -> None:
    values = []
    for seed in range(8):
        model = loaded("llama", seed=seed)
        with circuits(model) as found:
            values += [compositions(found, score, range(3)).values for score in COMPOSITIONS]
    seen = torch.stack(values)
    level = float(seen[~seen.isnan()].square().mean().sqrt())
    assert level == pytest.approx(D_MODEL**-0.5, rel=0.03)


# Successor


def test_successor_counts_items_whose_next_one_is_on_top() -> None:
    pairs = [(0, 1), (1, 2), (2, 3)]
    step = torch.eye(4).roll(1, 1)
    assert successor(step, pairs).tolist() == [1, 1, 1]
    assert successor(torch.eye(4), pairs).tolist() == [0, 0, 0]
    assert successor(torch.zeros(4, 4), pairs).tolist() == [0.25, 0.25, 0.25]
    assert chance(
        [Series("a", (1, 2, 3, 4), ((0, 1),)), Series("b", (1, 2, 3, 4, 5), ((0, 1), (1, 2)))]
    ) == pytest.approx((0.25 + 0.2 + 0.2) / 3)


def word_tokenizer(words: list[str]) -> Any:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "<unk>"])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(tokenizer, unk_token="<unk>")


DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def test_series_are_of_single_tokens_and_short_ones_are_left_out() -> None:
    days = [day for day in DAYS if day != "Wednesday"]
    found = find_series(Encoder.of(word_tokenizer([*days, "one", "two", "three", "A", "C", "E", "G"])))
    assert [series.name for series in found] == ["days"]  # too few numbers; letters without a neighbour
    assert found[0].tokens == (0, 1, 2, 3, 4, 5)
    assert found[0].pairs == ((0, 1), (2, 3), (3, 4), (4, 5)), "nobody is asked what follows a missing item"


def test_successor_of_a_model_reads_the_stream_after_its_first_mlp() -> None:
    model = loaded("llama", word_tokenizer([*(f"x{i}" for i in range(10)), *DAYS]))
    inner: Any = model.model
    with circuits(model) as found:
        ours = successor_scores(found, range(3))
    tokens = torch.arange(10, 17)
    embedded = inner.model.embed_tokens.weight[tokens]
    first = inner.model.layers[0]
    later = embedded + first.mlp(first.post_attention_layernorm(embedded))
    plain = plain_llama_circuit(inner, later, tokens)
    wanted = [float((m[:-1].argmax(1) == torch.arange(1, 7)).double().mean()) for m in plain]
    assert ours.values[LAYER].tolist() == pytest.approx(wanted)
    other = plain_llama_circuit(inner, embedded, tokens)
    assert [m.argmax(1).tolist() for m in other] != [m.argmax(1).tolist() for m in plain], "the MLP matters here"
    assert ours.chance == pytest.approx(1 / 7)


def test_a_tokenizer_without_series_has_no_successor_score(toy: LoadedModel) -> None:
    with circuits(toy) as found:
        scores = successor_scores(found, [0, 1])
    assert scores.values.isnan().all()
    assert scores.chance is None
    assert "no series with 4 single tokens" in scores.reasons[0]


# Direct effect


def prompt(length: int, seed: int, answers: int = 1) -> Prompt:
    ids = torch.randint(5, 60, (length + answers + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    answer = tuple(ids[length : length + answers])
    return Prompt("", tuple(ids[:length]), answer, "", wrong_answer=(ids[-1] + 1,))


PROMPTS = [prompt(9, 0), prompt(6, 1, answers=3), prompt(9, 2), prompt(6, 3)]


def native_difference(model: nn.Module, one: Prompt, cap: float | None) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([one.clean_tokens])).logits[0, -1].double()
    logits = logits if cap is None else torch.atanh(logits / cap) * cap
    return float(logits[list(one.answer)].mean() - logits[list(one.wrong_answer)].mean())


def effects_of(model: LoadedModel) -> DirectEffects:
    with circuits(model) as found:
        effects = direct_effects(found, PROMPTS)
    assert isinstance(effects, DirectEffects)
    return effects


FAMILIES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "gemma2",
    "granite",
    "olmo2",
    "qwen3",
    "cohere",
    "phi",
    "opt",
    "gptj",
    "gpt_oss",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_parts_together_are_the_logit_difference(name: str) -> None:
    model = loaded(name)
    effects = effects_of(model)
    parts = [
        effects.heads.sum((1, 2)),
        effects.attention.sum(1),
        effects.mlp.sum(1),
        effects.embedding,
        effects.constant,
    ]
    cap = getattr(model.model.config, "final_logit_softcapping", None)
    native = [native_difference(model.model, one, cap) for one in PROMPTS]
    assert sum(parts).tolist() == pytest.approx(native, abs=1e-4)  # type: ignore[union-attr]  # five tensors
    assert effects.total.tolist() == pytest.approx(native, abs=1e-4)
    assert effects.heads.abs().min() > 1e-6
    assert effects.deviation < 1e-5
    assert not effects.reasons


def test_parts_of_the_toy_add_up(toy: LoadedModel) -> None:
    effects = effects_of(toy)
    everything = effects.heads.sum((1, 2)) + effects.attention.sum(1) + effects.mlp.sum(1) + effects.embedding
    assert everything.tolist() == pytest.approx([native_difference(toy.model, one, None) for one in PROMPTS], abs=1e-4)


def test_a_heads_part_is_its_z_through_the_weights() -> None:
    model = loaded("llama")
    inner: Any = model.model
    effects = effects_of(model)
    seen: dict[str, Tensor] = {}
    layer = inner.model.layers[LAYER]
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.update(z=args[0][0, -1])),
        layer.register_forward_hook(lambda _m, _a, out: seen.update(last=out[0, -1])),
    ]
    one = PROMPTS[1]
    with torch.no_grad():
        inner(input_ids=torch.tensor([one.clean_tokens]))
    for handle in handles:
        handle.remove()
    scale = (seen["last"].square().mean() + inner.model.norm.variance_epsilon).sqrt()
    rows = inner.lm_head.weight[list(one.answer)].mean(0) - inner.lm_head.weight[list(one.wrong_answer)].mean(0)
    written = seen["z"].view(HEADS, 1, D_HEAD) @ layer.self_attn.o_proj.weight.T.view(HEADS, D_HEAD, D_MODEL)
    wanted = written[:, 0] @ (rows * inner.model.norm.weight) / scale
    assert effects.heads[1, LAYER].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_layers_whose_heads_cannot_be_told_apart_are_counted_whole() -> None:
    model = loaded("qwen3_next")
    effects = effects_of(model)
    assert effects.heads.isnan().all()
    assert set(effects.reasons) == {0, 1, 2}
    parts = effects.attention.sum(1) + effects.mlp.sum(1) + effects.embedding + effects.constant
    assert parts.tolist() == pytest.approx([native_difference(model.model, one, None) for one in PROMPTS], abs=1e-4)


def test_the_planted_induction_head_is_the_whole_answer(planted: LoadedModel) -> None:
    tokens = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:8].tolist()
    one = Prompt("", (*tokens, *tokens[:4]), (tokens[4],), "", wrong_answer=(tokens[6],))
    with circuits(planted) as found:
        effects = direct_effects(found, [one])
    assert isinstance(effects, DirectEffects)
    rest = effects.heads.clone()
    rest[0][INDUCTION_HEAD] = 0
    assert float(effects.heads[0][INDUCTION_HEAD]) == pytest.approx(float(effects.total[0]), rel=1e-4)
    assert float(effects.total[0]) > 8
    assert rest.abs().max() < 1e-4


def test_prompts_without_a_wrong_answer_are_refused(toy: LoadedModel) -> None:
    with circuits(toy) as found, pytest.raises(UserError, match="prompt 1 has no wrong answer"):
        direct_effects(found, [PROMPTS[0], Prompt("", (1, 2), (3,), "")])


@pytest.mark.slow
def test_smollm2_has_heads_that_copy_and_parts_that_add_up(smollm2: LoadedModel) -> None:
    with circuits(smollm2) as found:
        shares, eigenvalues = copying_scores(found, range(30), sample_tokens(found, 300, 0))
        effects = direct_effects(found, PROMPTS)
    assert int((shares.values > 0.95).sum()) >= 5
    assert float(eigenvalues.values[shares.values > 0.95].mean()) > 0.8
    assert isinstance(effects, DirectEffects)
    assert effects.deviation < 1e-4
