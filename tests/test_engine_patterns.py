"""Attention patterns are those that the model uses, layer by layer within a budget, and the model is left as it was."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.tiny import tiny_model, tiny_tokens
from mechinterp_cli.engine import capture
from mechinterp_cli.engine.capture import last_hidden, token_losses
from mechinterp_cli.engine.patterns import PatternProof, attention_patterns, check_reach, reach
from mechinterp_cli.errors import ExitCode, ProofError, RunError, UserError
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.interface import SoftmaxRule
from mechinterp_cli.models.loaded import LoadedModel
from tests.families import WINDOW, build
from tests.models_fixtures import planted, smollm2, toy
from tests.test_engine_cleanup import Stop, assert_untouched, hooks_on, native

__all__ = ["planted", "smollm2", "toy"]

LENGTH = 24
TOKENS = tiny_tokens(batch=3, length=LENGTH)
TOLERANCE = 1e-5

WITH_PATTERNS = [
    "gpt2",
    "gpt_neox",
    "opt",
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt_oss",
    "granite",
    "deepseek_v3",
    "deepseek_v32",
]
"""Windows, soft-caps, sinks, grouped queries, parallel blocks, a scale of its own, narrow values, sparse masks."""


def patterns(
    model: nn.Module, anatomy: Anatomy, tokens: Tensor, layers: list[int], **options: Any
) -> tuple[dict[int, Tensor], PatternProof]:
    """All patterns at once, [prompts, heads, queries, keys] by layer, and the proof."""
    seen: dict[int, Tensor] = {}

    def visit(layer: int, pattern: Tensor, prompts: slice, heads: slice) -> None:
        found = anatomy.layers[layer].heads
        assert found is not None
        whole = seen.setdefault(
            layer, torch.full((len(tokens), found.query, *pattern.shape[2:]), torch.nan, dtype=pattern.dtype)
        )
        assert bool(whole[prompts, heads].isnan().all()), "shown twice"
        whole[prompts, heads] = pattern

    proof = attention_patterns(model, anatomy, tokens, layers, visit, **options)
    return seen, proof


@torch.no_grad()
def plain(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """What transformers itself gives out as attention, layer by layer; the model must be eager."""
    attentions = model(input_ids=tokens, output_attentions=True, use_cache=False).attentions
    return [attention[..., : tokens.shape[1]] for attention in attentions]


def assert_plain(model: nn.Module, eager: nn.Module, tokens: Tensor) -> None:
    anatomy = find_anatomy(model)
    got, proof = patterns(model, anatomy, tokens, list(range(anatomy.n_layers)))
    want = plain(eager, tokens)
    assert len(want) == len(got) == anatomy.n_layers
    for layer, pattern in got.items():
        assert float((pattern - want[layer]).abs().max()) <= TOLERANCE
    assert sorted(proof.by_layer) == list(range(anatomy.n_layers))
    assert proof.deviation == max(proof.by_layer.values()) <= TOLERANCE
    assert proof.tolerance == 1e-4


@pytest.mark.parametrize("name", WITH_PATTERNS)
def test_patterns_are_those_that_transformers_gives_out(name: str) -> None:
    assert_plain(build(name), build(name, attn_implementation="eager"), TOKENS)


@pytest.mark.parametrize("name", ["toy", "planted"])
def test_patterns_of_the_shipped_models_are_those_that_transformers_gives_out(
    name: str, request: pytest.FixtureRequest
) -> None:
    loaded: LoadedModel = request.getfixturevalue(name)
    assert loaded.anatomy.attn_implementation == "eager"
    assert_plain(loaded.model, loaded.model, tiny_tokens(batch=3, length=60) % loaded.anatomy.vocab_size)


@pytest.mark.slow
def test_patterns_of_the_real_model_are_those_that_transformers_gives_out(smollm2: LoadedModel) -> None:
    tokens = tiny_tokens(batch=2, length=40).repeat(1, 2) * 500
    got, proof = patterns(smollm2.model, smollm2.anatomy, tokens, [0, 7, 18, 29])
    assert smollm2.anatomy.attn_implementation == "sdpa"
    smollm2.model.set_attn_implementation("eager")
    try:
        want = plain(smollm2.model, tokens)
    finally:
        smollm2.model.set_attn_implementation("sdpa")
    assert max(float((got[layer] - want[layer]).abs().max()) for layer in got) <= TOLERANCE
    assert proof.deviation <= 1e-5


@pytest.mark.parametrize(
    ("name", "forget", "layer"),
    [
        ("gemma2", {"softcap": None}, 0),
        ("gpt_oss", {"sinks": None}, 0),
        ("granite", {"scaling": 1.0}, 0),
        ("llama", {"scaling": 0.36}, 0),  # 2 % off
    ],
)
def test_a_pattern_that_is_not_the_models_own_is_never_shown(
    name: str, forget: dict[str, Any], layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    anatomy, before, shown = find_anatomy(model), native(model), []
    true_rule = SoftmaxRule.of
    monkeypatch.setattr(SoftmaxRule, "of", lambda call: SoftmaxRule(**{**vars(true_rule(call)), **forget}))
    with pytest.raises(ProofError, match=rf"^layer {layer}: the attention pattern gives z wrong by .* of its scale"):
        attention_patterns(model, anatomy, TOKENS, [0, 1, 2], lambda *seen: shown.append(seen))
    assert shown == []
    assert_untouched(model, before)


def test_a_window_that_is_forgotten_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma2")
    anatomy = find_anatomy(model)
    monkeypatch.setattr(
        "mechinterp_cli.engine.probabilities.mask_rows",
        lambda _mask, _rows, q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None, None],
    )
    with pytest.raises(ProofError, match=r"^layer 0: "):
        attention_patterns(model, anatomy, TOKENS, [0, 1, 2], lambda *_: None)
    attention_patterns(model, anatomy, TOKENS, [1], lambda *_: None)  # has no window: the check is of layer 0 alone
    attention_patterns(model, anatomy, TOKENS[:, :WINDOW], [0, 1, 2], lambda *_: None)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_proved_within_its_rounding(dtype: torch.dtype, implementation: str) -> None:
    model: Any = build("llama", attn_implementation=implementation)
    model.to(dtype)
    got, proof = patterns(model, find_anatomy(model), TOKENS, [0, 1, 2])
    assert 0.0 < proof.tolerance < 0.2
    assert proof.deviation <= (0.0 if implementation == "eager" else 3 * torch.finfo(dtype).eps)
    want = patterns(model.float(), find_anatomy(model), TOKENS, [0, 1, 2])[0]
    assert max(float((got[i].float() - want[i]).abs().max()) for i in got) < 20 * torch.finfo(dtype).eps


def test_half_precision_does_not_let_a_wrong_rule_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("gemma2")
    model.to(torch.bfloat16)
    anatomy, true_rule = find_anatomy(model), SoftmaxRule.of
    attention_patterns(model, anatomy, TOKENS, [0], lambda *_: None)
    monkeypatch.setattr(SoftmaxRule, "of", lambda call: SoftmaxRule(true_rule(call).scaling))
    with pytest.raises(ProofError, match=r"^layer 0: "):
        attention_patterns(model, anatomy, TOKENS, [0], lambda *_: None)


def head_bytes(length: int) -> int:
    """The least budget: one head's pattern, and as much to make it."""
    return 2 * 4 * length * length


@pytest.mark.parametrize("heads", [1, 3, 4, 9, 100])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v32"])
def test_a_small_budget_cuts_prompts_heads_and_queries_and_changes_no_number(name: str, heads: int) -> None:
    model = build(name)
    anatomy = find_anatomy(model)
    want, whole = patterns(model, anatomy, TOKENS, [0, 2])
    done: list[int] = []
    got, proof = patterns(model, anatomy, TOKENS, [2, 0], budget=heads * head_bytes(LENGTH), tick=done.append)
    assert list(got) == [0, 2]
    for layer in got:
        assert float((got[layer] - want[layer]).abs().max()) <= 1e-6
    assert proof.by_layer == pytest.approx(whole.by_layer, abs=1e-6)
    chunk = max(1, heads // 4)
    assert done == [n for lo in range(0, 3, chunk) for n in (2 * lo + min(chunk, 3 - lo), 2 * min(lo + chunk, 3))]


def test_a_budget_that_does_not_hold_one_head_is_refused_with_what_is_needed() -> None:
    model = build("llama")
    tokens = tiny_tokens(batch=1, length=512)
    with pytest.raises(RunError) as caught:
        attention_patterns(model, find_anatomy(model), tokens, [0], lambda *_: None, budget=head_bytes(512) - 1)
    assert "one head on 512 tokens needs 2.0 MiB" in caught.value.cause
    attention_patterns(model, find_anatomy(model), tokens, [0], lambda *_: None, budget=head_bytes(512))


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives no types for modes
    """The largest tensor that is made, and the most bytes that are alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.largest = self.peak = self.now = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), func._schema.name)
        return out

    def _note(self, storage: torch.UntypedStorage, name: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.largest = max(self.largest, size)
        if key not in self._storages:
            self._storages[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._storages.pop(key, 0)


@contextmanager
def metered() -> Iterator[Meter]:
    with Meter() as meter:
        yield meter


def test_memory_stays_within_the_budget_on_a_long_sequence() -> None:
    model = tiny_model("llama", overrides={"max_position_embeddings": 1024})
    anatomy, tokens = find_anatomy(model), tiny_tokens(batch=3, length=1024)
    budget = 3 * head_bytes(1024)  # 24 MiB: three of four heads of one prompt
    shapes: list[tuple[int, ...]] = []
    with torch.no_grad(), metered() as bare:
        model(input_ids=tokens[:1], use_cache=False, logits_to_keep=1)
    with metered() as meter:
        attention_patterns(
            model, anatomy, tokens, [0, 1, 2], lambda _l, p, *_: shapes.append(tuple(p.shape)), budget=budget
        )
    assert shapes == [(1, 3, 1024, 1024), (1, 1, 1024, 1024)] * 9
    assert meter.largest <= budget // 2
    assert meter.peak <= budget
    with metered() as free:
        attention_patterns(model, anatomy, tokens, [0], lambda *_: None, budget=100 * budget)
    assert free.largest > 3 * budget // 2, "the measure would not see a pattern of all prompts"
    assert free.peak > 3 * budget
    assert bare.largest < budget // 8


def test_no_pattern_outlives_its_visit() -> None:
    model = build("llama")
    alive: list[weakref.ref[Tensor]] = []

    def visit(_layer: int, pattern: Tensor, _prompts: slice, _heads: slice) -> None:
        assert [ref for ref in alive if ref() is not None] == []
        alive.append(weakref.ref(pattern))

    attention_patterns(model, find_anatomy(model), TOKENS, [0, 1, 2], visit, budget=3 * head_bytes(LENGTH))
    assert len(alive) == 3 * 3 * 2
    assert alive[-1]() is None


def test_nothing_of_a_stopped_pass_stays_in_memory() -> None:
    model, seen = build("llama"), []
    handle = model.model.layers[1].register_forward_pre_hook(lambda _m, args: seen.append(weakref.ref(args[0])))
    attention_patterns(model, find_anatomy(model), TOKENS, [1], lambda *_: None)
    handle.remove()
    assert seen[-1]() is None


def counted(model: nn.Module, names: list[str]) -> tuple[dict[str, int], list[Any]]:
    calls = dict.fromkeys(names, 0)

    def hook(_module: nn.Module, _args: Any, _output: Any, name: str) -> None:
        calls[name] += 1

    return calls, [model.get_submodule(n).register_forward_hook(partial(hook, name=n)) for n in names]


@pytest.mark.parametrize("wanted", [[0], [1], [0, 1], [2, 0]])
def test_the_pass_ends_after_the_attention_of_the_last_layer_asked_for(wanted: list[int]) -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")] + ["lm_head"]
    calls, _ = counted(model, names)
    assert sorted(patterns(model, anatomy, TOKENS, wanted)[0]) == sorted(wanted)
    last = max(wanted)
    assert calls == {
        **{f"model.layers.{i}.self_attn": int(i <= last) for i in range(3)},
        **{f"model.layers.{i}.mlp": int(i < last) for i in range(3)},
        "lm_head": 0,
    }


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_what_reaches_later_layers_is_the_models_own_to_the_bit(name: str) -> None:
    model = build(name)
    anatomy, seen = find_anatomy(model), []
    handle = model.model.layers[2].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    patterns(model, anatomy, TOKENS, [0, 1, 2])
    handle.remove()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


def test_a_layer_without_softmax_attention_is_refused_with_its_reason() -> None:
    model = build("qwen3_next")
    anatomy = find_anatomy(model)
    with pytest.raises(UserError) as caught:
        attention_patterns(model, anatomy, TOKENS, [0, 1], lambda *_: None)
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.cause.startswith("layer 0 has no attention pattern: this layer's attention does not go through")
    assert caught.value.remedy == "Layers of this model that have one: 1."
    got = patterns(model, anatomy, TOKENS, [1])[0]
    assert float((got[1] - plain(build("qwen3_next", attn_implementation="eager"), TOKENS)[0]).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_a_model_without_any_pattern_is_refused(name: str) -> None:
    model = build(name)
    anatomy = find_anatomy(model)
    for look in (partial(attention_patterns, visit=lambda *_: None), reach, check_reach):
        with pytest.raises(UserError, match=r"^layers 0, 2 have no attention pattern: .*\n.*one: none\.$"):
            look(model, anatomy, TOKENS, [2, 0])


def test_no_layers_or_no_prompts_are_no_work() -> None:
    model = build("llama")
    assert patterns(model, find_anatomy(model), TOKENS, []) == ({}, PatternProof())
    assert patterns(model, find_anatomy(model), TOKENS[:0], [1]) == ({}, PatternProof())


def test_a_layer_that_gives_nan_is_named() -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    model.model.layers[1].self_attn.v_proj.weight.data[3, 3] = torch.nan
    patterns(model, anatomy, TOKENS, [0])
    with pytest.raises(RunError, match=r"^layer 1 gives NaN or infinity in its attention"):
        patterns(model, anatomy, TOKENS, [0, 1])


def raise_in_visit(_model: nn.Module, error: BaseException) -> Callable[..., None]:
    def visit(layer: int, *_: Any) -> None:
        if layer == 1:
            raise error

    return visit


def raise_in_layer(model: nn.Module, error: BaseException) -> Callable[..., None]:
    handles: list[Any] = []

    def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
        handles[0].remove()
        raise error

    handles.append(model.get_submodule("model.layers.1.self_attn").register_forward_hook(hook))
    return lambda *_: None


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), RuntimeError("of someone else")])
@pytest.mark.parametrize("fault", [raise_in_visit, raise_in_layer])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_an_exception_of_others_passes_through_and_leaves_the_model_as_it_was(
    name: str, fault: Callable[[nn.Module, BaseException], Callable[..., None]], error: BaseException
) -> None:
    model = build(name)
    before, anatomy = native(model), find_anatomy(model)
    visit = fault(model, error)
    with pytest.raises(type(error)) as caught:
        attention_patterns(model, anatomy, TOKENS, [0, 1, 2], visit)
    assert caught.value is error
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_a_model_is_left_as_it_was(name: str) -> None:
    model = build(name)
    hooks, before, anatomy = hooks_on(model), native(model), find_anatomy(model)
    patterns(model, anatomy, TOKENS, [1])
    reach(model, anatomy, TOKENS, [1])
    token_losses(model, anatomy, TOKENS)
    assert_untouched(model, before, hooks)


def test_a_visitor_may_look_at_a_model_itself() -> None:
    model, other = build("llama"), build("gemma2")
    anatomy, inner = find_anatomy(model), find_anatomy(other)
    want, want_other = patterns(model, anatomy, TOKENS, [0, 1])[0], patterns(other, inner, TOKENS, [1])[0]

    def visit(layer: int, pattern: Tensor, _prompts: slice, _heads: slice) -> None:
        assert torch.equal(pattern, want[layer])
        assert torch.equal(patterns(other, inner, TOKENS, [1])[0][1], want_other[1])

    attention_patterns(model, anatomy, TOKENS, [0, 1], visit)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_an_offloaded_model_gives_the_same_patterns_and_its_weights_leave_again(name: str) -> None:
    model = build(name)
    want = patterns(model, find_anatomy(model), TOKENS, [0, 1])[0]
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)
    anatomy = find_anatomy(model)
    away = {n for n, p in model.named_parameters() if p.device.type == "meta"}
    assert away
    got = patterns(model, anatomy, TOKENS, [0, 1])[0]
    assert all(torch.equal(got[i], want[i]) for i in (0, 1))
    assert {n for n, p in model.named_parameters() if p.device.type == "meta"} == away
    assert hooks_on(model) == 0


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("llama", {0: LENGTH, 1: LENGTH, 2: LENGTH}),
        ("mistral", {0: WINDOW, 1: WINDOW, 2: WINDOW}),
        ("gemma2", {0: WINDOW, 1: LENGTH, 2: WINDOW}),
        ("gpt_oss", {0: WINDOW, 1: LENGTH, 2: WINDOW}),
        ("deepseek_v32", {0: LENGTH, 1: LENGTH, 2: LENGTH}),
    ],
)
@pytest.mark.parametrize("implementation", [None, "eager"])
def test_reach_is_the_window_of_each_layer(name: str, want: dict[int, int], implementation: str | None) -> None:
    model = build(name, attn_implementation=implementation)
    anatomy = find_anatomy(model)
    assert reach(model, anatomy, TOKENS, [0, 1, 2]) == want
    assert reach(model, anatomy, TOKENS, [2]) == {2: want[2]}
    assert reach(model, anatomy, TOKENS[:, :3], [0, 1, 2]) == dict.fromkeys(range(3), 3)
    assert reach(model, anatomy, TOKENS, []) == {}


def test_reach_is_the_length_of_a_chunk() -> None:
    model = tiny_model("llama4_text", overrides={"attention_chunk_size": 7, "no_rope_layers": [1, 0, 1]})
    found = reach(model, find_anatomy(model), TOKENS, [0, 1, 2])
    assert found == {0: 7, 1: LENGTH, 2: 7}


def test_prompts_longer_than_a_window_are_refused_with_layer_and_window() -> None:
    model = build("gemma2")
    anatomy = find_anatomy(model)
    with pytest.raises(UserError) as caught:
        check_reach(model, anatomy, TOKENS, [0, 1, 2])
    assert str(caught.value) == (
        "a prompt of 24 tokens is longer than the 5 tokens that attention sees back "
        "(sliding window or chunk) in layers 0, 2\n"
        "Use prompts of at most 5 tokens, or take layers that see further (1)."
    )
    check_reach(model, anatomy, TOKENS, [1])
    check_reach(model, anatomy, TOKENS[:, :WINDOW], [0, 1, 2])


@torch.no_grad()
def plain_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[:, :-1].double()
    return -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "cohere", "granite", "bloom", "mamba"])
@pytest.mark.parametrize("limit", [97 * 4, 97 * 4 * 10, 2**25])
def test_losses_are_those_of_the_models_logits_however_they_are_cut(
    name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    hooks, before = hooks_on(model), native(model)
    monkeypatch.setattr(capture, "LOSS_LOGITS_BYTES", limit)
    got = token_losses(model, find_anatomy(model), TOKENS)
    assert got.shape == (3, LENGTH - 1)
    assert got.dtype == torch.float64
    assert float((got - plain_losses(model, TOKENS)).abs().max()) <= 1e-5
    assert_untouched(model, before, hooks)


def test_losses_are_taken_a_few_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", overrides={"vocab_size": 5000})
    anatomy, tokens = find_anatomy(model), tiny_tokens(batch=4, length=50)
    limit = 5000 * 4 * 40  # more than the weights of the head
    monkeypatch.setattr(capture, "LOSS_LOGITS_BYTES", limit)
    with metered() as meter:
        token_losses(model, anatomy, tokens)
    assert meter.largest <= limit
    with metered() as free:
        plain_losses(model, tokens)
    assert free.largest >= 4 * 49 * 5000 * 4


def test_losses_of_a_model_that_looks_back_after_its_last_layer_are_right_too() -> None:
    model = build("llama")
    early: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda _m, _a, out: early.append(out))
    anatomy = find_anatomy(model)
    want = plain_losses(model, TOKENS)
    model.model.norm.register_forward_pre_hook(lambda _m, args: (args[0] + early[-1],))
    looking_back = plain_losses(model, TOKENS)
    assert float((looking_back - want).abs().max()) > 0.1
    assert float((token_losses(model, anatomy, TOKENS) - looking_back).abs().max()) <= 1e-5


def test_the_last_hidden_state_is_what_leaves_the_last_layer() -> None:
    model, seen = build("llama"), []
    anatomy = find_anatomy(model)
    handle = model.model.layers[2].register_forward_hook(lambda _m, _a, out: seen.append(out))
    hidden = last_hidden(model, anatomy, TOKENS)
    handle.remove()
    assert torch.equal(hidden, seen[-1])


def test_one_token_has_no_losses() -> None:
    model = build("llama")
    assert token_losses(model, find_anatomy(model), TOKENS[:, :1]).shape == (3, 0)
