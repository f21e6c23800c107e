"""Greedy continuations: the model's own without edits, a loop of hooks written by hand with them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.tiny import tiny_tokens
from mechinterp_cli.engine.edits import Bucket, Edit, Op, Site
from mechinterp_cli.engine.generate import Continuation, edits_at, end_tokens, greedy
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.record import hooked
from tests.families import build
from tests.models_fixtures import smollm2, toy
from tests.test_engine_cleanup import assert_untouched, hooks_on, native

__all__ = ["smollm2", "toy"]

PROMPTS, LENGTH, N = 3, 6, 7
EVERY = (tuple(range(LENGTH)),) * PROMPTS
SOME = ((1, 4), (5,), ())


@pytest.fixture(scope="module")
def llama() -> tuple[PreTrainedModel, Anatomy]:
    model = build("llama")
    return model, find_anatomy(model)


def prompts(seed: int = 1) -> Tensor:
    return tiny_tokens(batch=PROMPTS, length=LENGTH, seed=seed)


def bucket() -> Bucket:
    return Bucket.of({"clean": prompts(), "corrupt": prompts(2)})


def own(model: Any, tokens: Tensor, n: int, **others: Any) -> Tensor:
    """What `model.generate` adds to the prompts."""
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        said: Tensor = model.generate(tokens, attention_mask=mask, max_new_tokens=n, do_sample=False, **others)
    return said[:, tokens.shape[1] :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss", "bloom", "mamba"])
def test_without_edits_it_is_the_models_own_greedy_generation(family: str) -> None:
    model = build(family)
    anatomy = find_anatomy(model)
    before, hooks = native(model), hooks_on(model)
    tokens = bucket().tokens["clean"]
    said = greedy(model, anatomy, bucket(), [], N, ends=())
    assert torch.equal(said.ids, own(model, tokens, N, eos_token_id=None, pad_token_id=0))
    assert said.lengths == (N,) * PROMPTS
    assert_untouched(model, before, hooks)


def test_the_toy_model_goes_on_with_what_it_has_seen(toy: LoadedModel) -> None:
    half = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(i))[:12] + 1 for i in range(4)])
    text = Bucket.of({"clean": torch.cat([half, half[:, :3]], 1)})
    said = greedy(toy.model, toy.anatomy, text, [], 8)
    assert torch.equal(said.ids, half[:, 3:11])
    cut = Edit(Site("attn_out", 1), "zero", (tuple(range(15)),) * 4)
    assert not torch.equal(greedy(toy.model, toy.anatomy, text, [cut], 8).ids, half[:, 3:11])


def by_hand(
    model: nn.Module, module: str, n: int, change: Callable[[Tensor], Tensor], *, inputs: bool = False
) -> Tensor:
    """Whole passes with one hook: on a module's output, or on its input."""

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def before(_module: nn.Module, args: Any) -> Any:
        return (change(args[0]), *args[1:])

    part = model.get_submodule(module)
    handle = part.register_forward_pre_hook(before) if inputs else part.register_forward_hook(after)
    tokens = prompts()
    with hooked([handle]), torch.no_grad():
        for _ in range(n):
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[:, LENGTH:]


def assert_said(model: nn.Module, anatomy: Anatomy, edits: Sequence[Edit], want: Tensor) -> None:
    """The edits give what is wanted, and they matter."""
    assert torch.equal(greedy(model, anatomy, bucket(), edits, N, ends=()).ids, want)
    assert not torch.equal(greedy(model, anatomy, bucket(), [], N, ends=()).ids, want)


def test_an_edit_over_all_positions_reaches_the_generated_ones(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    edit = Edit(Site("mlp_out", 0), "zero", EVERY)
    assert_said(model, anatomy, [edit], by_hand(model, "model.layers.0.mlp", N, torch.zeros_like))


def test_a_head_is_ablated_at_generated_positions_too(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    value = torch.full((1, 1, 1, 8), 3.0)

    def change(x: Tensor) -> Tensor:
        return torch.cat([x[..., :8], torch.full_like(x[..., 8:16], 3.0), x[..., 16:]], -1)

    want = by_hand(model, "model.layers.1.self_attn.o_proj", N, change, inputs=True)
    assert_said(model, anatomy, [Edit(Site("z", 1), "constant", EVERY, units=(1,), values=value)], want)


def test_an_edit_at_chosen_positions_stays_where_it_is(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama

    def change(x: Tensor) -> Tensor:
        new = x.clone()
        for prompt, positions in enumerate(SOME):
            new[prompt, list(positions)] *= -4
        return new

    edit = Edit(Site("resid_post", 1), "scale", SOME, values=torch.tensor(-4.0))
    assert_said(model, anatomy, [edit], by_hand(model, "model.layers.1", N, change))


def test_values_by_position_leave_generated_tokens_alone(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    values = torch.randn(PROMPTS, LENGTH, 32, generator=torch.Generator().manual_seed(0)) * 3

    def put(x: Tensor) -> Tensor:
        return torch.cat([values, x[:, LENGTH:]], 1)

    def add(x: Tensor) -> Tensor:
        return torch.cat([x[:, :LENGTH] + values, x[:, LENGTH:]], 1)

    site = Site("mlp_out", 1)
    cases: dict[Op, Callable[[Tensor], Tensor]] = {"constant": put, "add": add}
    for op, change in cases.items():
        edit = Edit(site, op, EVERY, values=values)
        assert_said(model, anatomy, [edit], by_hand(model, "model.layers.1.mlp", N, change))


def test_values_of_one_position_go_on_prompt_by_prompt(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    values = torch.randn(PROMPTS, 1, 32, generator=torch.Generator().manual_seed(0)) * 3
    want = by_hand(model, "model.layers.1.mlp", N, lambda x: values.expand_as(x))
    assert_said(model, anatomy, [Edit(Site("mlp_out", 1), "constant", EVERY, values=values)], want)


@pytest.mark.parametrize("order", [None, (2, 0, 1)])
def test_another_streams_activations_stand_at_the_prompts_positions_alone(
    llama: tuple[PreTrainedModel, Anatomy], order: tuple[int, ...] | None
) -> None:
    model, anatomy = llama
    seen: list[Tensor] = []
    layer = model.get_submodule("model.layers.0")
    with hooked([layer.register_forward_hook(lambda _m, _a, out: seen.append(out))]), torch.no_grad():
        model(input_ids=prompts(2))
    source = seen[0] if order is None else seen[0][list(order)]
    want = by_hand(model, "model.layers.0", N, lambda x: torch.cat([source, x[:, LENGTH:]], 1))
    edit = Edit(Site("resid_post", 0), "replace", EVERY, source="corrupt", source_prompts=order)
    assert_said(model, anatomy, [edit], want)


def test_a_knocked_out_key_stays_unseen_by_generated_tokens(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    """Where nothing ever attends to the first token it does not matter which token that is."""
    model, anatomy = llama
    late = (tuple(range(1, LENGTH)),) * PROMPTS
    first = ((0,),) * PROMPTS
    texts = [prompts(), prompts()]
    texts[1][:, 0] = (texts[1][:, 0] + 7) % 80 + 5
    said = []
    for positions in (EVERY, late):
        edits = [Edit(Site("scores", layer), "mask", positions, keys=first) for layer in range(3)]
        said.append([greedy(model, anatomy, Bucket.of({"clean": x}), edits, N, ends=()).ids for x in texts])
    everywhere, on_the_prompt = said
    assert torch.equal(everywhere[0], everywhere[1])
    assert not torch.equal(on_the_prompt[0], on_the_prompt[1])


def test_noise_on_a_stream_stays_on_the_prompt(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    noise = torch.randn(PROMPTS, LENGTH, 32, generator=torch.Generator().manual_seed(0))
    noised = Bucket.of({"clean": prompts(), "noised": prompts()}, noise={"noised": noise})
    edit = Edit(Site("embed", 0), "add", EVERY, values=noise)
    want = greedy(model, anatomy, bucket(), [edit], N, ends=()).ids
    assert torch.equal(greedy(model, anatomy, noised, [], N, stream="noised", ends=()).ids, want)
    assert not torch.equal(greedy(model, anatomy, noised, [], N, ends=()).ids, want)
    read = Edit(Site("resid_pre", 1), "replace", EVERY, source="noised")
    added = by_hand(model, "model.embed_tokens", N, lambda x: torch.cat([x[:, :LENGTH] + noise, x[:, LENGTH:]], 1))
    assert torch.equal(want, added)
    assert torch.equal(greedy(model, anatomy, noised, [read], 1, ends=()).ids, want[:, :1])


def test_a_prompt_stops_at_its_end_token_and_the_others_go_on(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    free = greedy(model, anatomy, bucket(), [], N, ends=()).ids
    end = int(free[0, 2])
    want = [row[: row.index(end) + 1] if end in row else row for row in free.tolist()]
    said = greedy(model, anatomy, bucket(), [], N, ends=(end, 10_000))
    assert [said.of(i) for i in range(PROMPTS)] == want
    assert said.lengths == tuple(map(len, want))
    assert len(want[0]) <= 3 < max(map(len, want)), "some prompt must end and some other must not"
    assert said.ids.shape == (PROMPTS, N)
    for row, length in zip(said.ids.tolist(), said.lengths, strict=True):
        assert set(row[length:]) <= {end}
    padded = own(model, prompts(), N, eos_token_id=end, pad_token_id=end)
    assert torch.equal(said.ids[:, : padded.shape[1]], padded)


def test_when_all_have_ended_nothing_more_is_computed(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    calls: list[int] = []
    with hooked([model.register_forward_hook(lambda *_: calls.append(1))]):
        said = greedy(model, anatomy, bucket(), [], N, ends=range(97))
    assert len(calls) == 1
    assert said.lengths == (1,) * PROMPTS
    assert said.ids.shape == (PROMPTS, N)


def test_end_tokens_come_from_the_generation_config_then_the_config() -> None:
    model: Any = build("llama")
    model.generation_config.eos_token_id = [5, 6]
    assert end_tokens(model) == (5, 6)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = 7
    assert end_tokens(model) == (7,)
    model.config.eos_token_id = None
    assert end_tokens(model) == ()


def test_each_prompt_alone_says_the_same(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    together = greedy(model, anatomy, bucket(), [], N, ends=())
    alone = [greedy(model, anatomy, Bucket.of({"clean": x[None]}), [], N, ends=()).ids for x in prompts()]
    assert torch.equal(torch.cat(alone), together.ids)


def test_which_edits_grow() -> None:
    site = Site("mlp_out", 0)
    mixed = (tuple(range(LENGTH)), (2,), ())
    (grown,) = edits_at([Edit(site, "zero", mixed)], LENGTH, LENGTH + 2)
    assert grown.positions == (tuple(range(LENGTH + 2)), (2,), ())
    for stays in (
        Edit(site, "replace", mixed, source="clean"),
        Edit(site, "swap", mixed, source="clean"),
        Edit(site, "constant", mixed, values=torch.zeros(1, LENGTH, 32)),
    ):
        assert edits_at([stays], LENGTH, LENGTH + 2) == (stays,)


def test_no_tokens_are_none(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    said = greedy(*llama, bucket(), [], 0)
    assert said.ids.shape == (PROMPTS, 0)
    assert said.lengths == (0,) * PROMPTS


def test_texts_too_long_for_the_model_and_nan_are_refused(toy: LoadedModel) -> None:
    def say(n: int, edits: Sequence[Edit] = ()) -> Continuation:
        text = Bucket.of({"clean": torch.ones(1, 60, dtype=torch.long)})
        return greedy(toy.model, toy.anatomy, text, edits, n, ends=())

    assert say(5).lengths == (5,)
    with pytest.raises(UserError, match="6 tokens after a prompt of 60 are more than the model takes"):
        say(6)
    poison = Edit(Site("mlp_out", 0), "constant", ((59,),), values=torch.full((1, 1, 64), torch.nan))
    with pytest.raises(RunError, match="hold NaN"):
        say(2, [poison])


@pytest.mark.slow
def test_the_real_model_says_what_transformers_has_it_say(smollm2: LoadedModel) -> None:
    for text in ("When Mary and John went to the store, John gave a drink to", "The capital of France is"):
        tokens = smollm2.tokenizer(text, return_tensors="pt").input_ids
        said = greedy(smollm2.model, smollm2.anatomy, Bucket.of({"clean": tokens}), [], 15)
        want = own(smollm2.model, tokens, 15)[0].tolist()
        assert said.of(0) == want[: said.lengths[0]]
