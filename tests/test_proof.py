"""The proof accepts what is right and refuses what is wrong, and says why."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.tiny import tiny_model
from mechinterp_cli.engine import execute, hooks, packed_attention, proof, wavefront
from mechinterp_cli.engine.edits import Bucket, Edit, Site, Trial, edited
from mechinterp_cli.engine.gather import RowIndex, packed_call
from mechinterp_cli.engine.packed_attention import Segment, merged_attention
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.engine.proof import Proof, crop, prove, sample, touched_prompts
from mechinterp_cli.errors import ExitCode, ProofError
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.precision import in_float32
from mechinterp_cli.models.walk import LayerCall, Walker
from tests.engine_trials import LENGTH, PROMPTS, edit_of, two_streams
from tests.families import FAMILIES, WINDOW, build

EVERY = tuple(range(PROMPTS))


def work_of(anatomy: Anatomy, length: int = LENGTH, kinds: Sequence[str] = ("resid_pre", "z")) -> Work:
    """Replacement of each kind in every layer, early and late."""
    trials = [
        Trial(0, "corrupt", (Edit(Site(kind, layer.index), "replace", ((p,),) * PROMPTS, source="clean"),), EVERY)
        for kind in kinds
        for layer in anatomy.layers
        if kind in layer.sites
        for p in (0, length // 2, length - 1)
    ]
    return Work(two_streams(length=length), tuple(replace(t, index=i) for i, t in enumerate(trials)))


def proved(model: nn.Module, length: int = LENGTH, executor: str = "auto", **options: Any) -> Proof:
    anatomy = find_anatomy(model)
    return prove(model, anatomy, [work_of(anatomy, length, **options)], executor=executor)


# Faults: each breaks one thing that a packed executor has to get right.


def ignore_the_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Segment, "mask", lambda *_: None)


def ignore_sinks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packed_attention, "_sinks", lambda *_: None)


def scale_scores_wrongly(patch: pytest.MonkeyPatch) -> None:
    def wrong(call: Any, *rest: Any) -> Tensor:
        return merged_attention(replace(call, q=call.q * 1.01), *rest)

    patch.setattr(wavefront, "merged_attention", wrong)


def shift_the_prefix_by_one(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Segment, x: Tensor) -> Tensor:
        return x[self.prompts].roll(1, dims=2)[:, :, : self.start]

    patch.setattr(Segment, "prefix", wrong)


def gather_the_next_position(patch: pytest.MonkeyPatch) -> None:
    def wrong(call: LayerCall, roles: Any, rows: RowIndex) -> LayerCall:
        return packed_call(call, roles, replace(rows, position=(rows.position + 1) % rows.length))

    patch.setattr(wavefront, "packed_call", wrong)


def gather_another_prompt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Segment, "prefix", lambda self, x: x[self.prompts.flip(0), :, : self.start])


def forget_the_softcap(patch: pytest.MonkeyPatch) -> None:
    def wrong(call: Any, *rest: Any) -> Tensor:
        return merged_attention(replace(call, keywords={**call.keywords, "softcap": None}), *rest)

    patch.setattr(wavefront, "merged_attention", wrong)


def forget_the_edits_of_one_kind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(wavefront, "edited", lambda f, e, *rest: None if e.site.kind == "z" else edited(f, e, *rest))


PACKED_FAULTS: list[tuple[str, Callable[[pytest.MonkeyPatch], None], str]] = [
    ("mistral", ignore_the_mask, "deviates"),
    ("gemma2", ignore_the_mask, "deviates"),
    ("gpt_oss", ignore_sinks, "deviates"),
    ("llama", scale_scores_wrongly, "deviates"),
    ("llama", shift_the_prefix_by_one, "deviates"),
    ("llama", gather_the_next_position, "deviates"),
    ("llama", gather_another_prompt, "deviates"),
    ("gemma2", forget_the_softcap, "deviates"),
]


@pytest.mark.parametrize(("name", "fault", "reason"), PACKED_FAULTS)
def test_a_wrong_packed_executor_is_refused_and_the_next_one_used(
    name: str, fault: Callable[[pytest.MonkeyPatch], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    assert proved(model).executor == "packed"
    fault(monkeypatch)
    found = proved(model)
    assert found.executor == "resume"
    assert found.deviation <= found.tolerance
    assert list(found.rejected) == ["packed"]
    assert reason in found.rejected["packed"]
    with pytest.raises(ProofError, match=f"packed: .*{reason}") as error:
        proved(model, executor="packed")
    assert error.value.exit_code == ExitCode.UNPROVED


def test_a_kind_whose_edits_are_not_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_the_edits_of_one_kind(monkeypatch)
    found = proved(build("llama"))
    assert found.executor == "hooks"
    assert all("z:replace deviates" in reason for reason in found.rejected.values())


def test_an_unembedding_without_the_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Walker, "unembed", lambda self, hidden: self.model.lm_head(hidden))
    found = proved(build("llama"))
    assert found.executor == "hooks"
    assert set(found.rejected) == {"packed", "resume"}


def test_hooks_that_edit_nothing_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (wavefront, hooks):
        monkeypatch.setattr(module, "edited", lambda *_: None)
    with pytest.raises(ProofError, match="hooks: zeroing the last layer's output changes nothing") as error:
        proved(build("llama"))
    assert set(error.value.cause.split()) >= {"(packed:", "resume:", "hooks:"}


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError, IndexError, KeyError])
def test_a_model_that_breaks_when_packed_goes_to_the_next_executor(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Tensor:
        raise error("shape is not 4")

    monkeypatch.setattr(wavefront, "merged_attention", broken)
    found = proved(build("llama"))
    assert found.executor == "resume"
    assert found.rejected["packed"].startswith(f"{error.__name__}: ")


def test_an_interrupt_is_no_reason_to_try_the_next_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(wavefront, "merged_attention", interrupted)
    with pytest.raises(KeyboardInterrupt):
        proved(build("llama"))


def test_prompts_inside_the_window_prove_nothing_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_the_mask(monkeypatch)
    model = build("mistral")
    assert proved(model, length=WINDOW - 1).executor == "packed"
    assert proved(model, length=WINDOW + 4).executor == "resume"


def test_the_longest_prompts_of_the_plan_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_the_mask(monkeypatch)
    model = build("mistral")
    anatomy = find_anatomy(model)
    works = [work_of(anatomy, length) for length in (WINDOW - 1, WINDOW + 4, WINDOW - 2)]
    found = prove(model, anatomy, works)
    assert (found.executor, found.length) == ("resume", WINDOW + 4)


def test_a_kind_that_only_shorter_prompts_have_is_proved_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    works = [work_of(anatomy, LENGTH, kinds=("resid_pre",)), work_of(anatomy, LENGTH - 2, kinds=("resid_pre", "z"))]
    found = prove(model, anatomy, works)
    assert (found.executor, found.length) == ("packed", LENGTH)
    assert {"resid_pre:replace", "z:replace"} <= found.by_kind.keys()
    forget_the_edits_of_one_kind(monkeypatch)
    refused = prove(model, anatomy, works)
    assert refused.executor == "hooks"
    assert all("z:replace deviates" in reason for reason in refused.rejected.values())


def not_causal_llama() -> PreTrainedModel:
    model: Any = build("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    bidirectional: PreTrainedModel = model
    return bidirectional


@pytest.mark.parametrize("model", [not_causal_llama, lambda: tiny_model("bert", overrides={"is_decoder": False})])
def test_a_model_that_looks_ahead_is_never_packed(model: Callable[[], PreTrainedModel]) -> None:
    found = proved(model())
    assert found.executor == "resume"
    assert found.rejected == {"packed": "the model is not causal: a later token changes earlier logits"}


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v32", "gptj", "bloom", "mamba"])
def test_models_with_tricks_get_the_executor_that_is_right_for_them(name: str) -> None:
    found = proved(build(name))
    assert found.executor == FAMILIES[name].executor
    assert found.deviation <= 1e-5


def test_layers_that_are_given_more_than_the_stream_are_not_refused_for_it() -> None:
    assert proved(tiny_model("gemma4_text")).deviation <= 1e-5


def test_layers_that_look_back_past_the_stream_are_refused() -> None:
    with pytest.raises(ProofError, match="hooks: everything replaced deviates"):
        proved(tiny_model("inkling2_text"))


def test_the_proof_says_what_was_proved() -> None:
    model = build("llama")
    found = proved(model, kinds=("resid_pre", "z", "pattern"))
    assert {"resid_pre:replace", "z:replace", "pattern:replace"} <= set(found.by_kind)
    assert found.deviation == pytest.approx(max(found.by_kind.values()), abs=1e-5)
    assert found.length == LENGTH
    assert found.rejected == {}
    assert found.run_dtype_deviation is None
    assert 0 < found.noise < 1e-5
    with torch.no_grad():
        bucket = two_streams()
        logits = model(input_ids=bucket.tokens["clean"]).logits
    # A few of the positions that are read, the first and the last among them.
    reads = bucket.read[:, [round(i * (bucket.read.shape[1] - 1) / 3) for i in range(4)]]
    seen = logits[torch.arange(bucket.size)[:, None], reads]
    assert found.scale == pytest.approx(float(seen.abs().max()))


def half(name: str) -> nn.Module:
    model: nn.Module = build(name)
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_half_precision_is_proved_twice_and_left_as_it_was(name: str) -> None:
    model = half(name)
    before = {n: (p.data_ptr(), p.dtype, p.clone()) for n, p in [*model.named_parameters(), *model.named_buffers()]}
    found = proved(model)
    assert found.executor == "packed"
    assert found.deviation <= found.tolerance == 1e-4
    assert found.run_dtype_deviation is not None
    assert found.run_dtype_deviation <= 3 * found.noise or found.routing_flips
    assert found.noise > 1e-4
    for n, p in [*model.named_parameters(), *model.named_buffers()]:
        pointer, dtype, value = before[n]
        assert (p.data_ptr(), p.dtype) == (pointer, dtype)
        assert torch.equal(p, value)


def test_a_fault_in_half_precision_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: Any, *rest: Any) -> Tensor:
        z = merged_attention(call, *rest)
        return z * 2 if z.dtype == torch.bfloat16 else z

    model = half("llama")
    monkeypatch.setattr(wavefront, "merged_attention", wrong)
    found = proved(model)
    assert found.executor == "resume"
    assert "torch.bfloat16" in found.rejected["packed"]


def test_weights_come_back_narrow_when_the_wide_pass_fails() -> None:
    model = half("llama")
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), in_float32(model) as wide:
        assert wide
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        raise KeyboardInterrupt
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_nan_in_a_layer_is_named() -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    model.get_parameter(anatomy.layers[1].module + ".mlp.down_proj.weight")[0, 0] = torch.nan
    with pytest.raises(ProofError, match="layer 1 gives NaN or infinity"):
        prove(model, anatomy, [work_of(anatomy)])


def test_a_plan_whose_trials_are_all_trivial_is_proved_on_the_checks_alone() -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    assert prove(model, anatomy, [Work(two_streams(), ())]).executor == "packed"


def test_the_model_is_as_it_was_after_the_proof() -> None:
    model = build("gpt_oss")
    tokens = two_streams().tokens["clean"]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        proved(model)
        assert torch.equal(model(input_ids=tokens).logits, before)
    assert model.config._attn_implementation == FAMILIES["gpt_oss"].attention


def test_of_every_kind_and_operation_the_earliest_and_the_latest_are_sampled() -> None:
    anatomy = find_anatomy(build("llama"))
    trials = list(work_of(anatomy).trials)
    trials += [Trial(99, "corrupt", (edit_of(anatomy, Site("q", 2), "zero", 1),), EVERY)]
    chosen = sample(trials, 2)
    for kind in ("resid_pre", "z"):
        mine = [t.edits[0] for t in chosen if t.edits[0].site.kind == kind]
        assert {e.positions[0][0] for e in mine} >= {0, LENGTH - 1}
        assert {e.site.layer for e in mine} >= {0, 2}
        assert len(mine) <= 4
    assert trials[-1] in chosen


def test_a_trial_is_proved_on_a_prompt_that_it_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    bucket = Bucket.of(
        {"clean": two_streams(prompts=9).tokens["clean"], "corrupt": two_streams(prompts=9).tokens["corrupt"]}
    )
    positions = tuple((4,) if prompt == 7 else () for prompt in range(9))
    trial = Trial(0, "corrupt", (Edit(Site("z", 1), "replace", positions, source="clean"),), (7,))
    forget_the_edits_of_one_kind(monkeypatch)
    assert prove(model, anatomy, [Work(bucket, (trial,))]).executor == "hooks"


def test_a_trial_on_some_prompts_reads_its_own_values_and_sources() -> None:
    values = torch.arange(5.0).view(5, 1, 1)
    edit = Edit(
        Site("resid_pre", 0), "add", ((0,), (1,), (2,), (3,), (4,)), keys=((5,), (6,), (7,), (8,), (9,)), values=values
    )
    swapped = replace(edit, op="replace", values=None, source="clean", source_prompts=(3, 0, 1, 1, 4))
    assert touched_prompts([Trial(0, "corrupt", (replace(edit, positions=((), (), (), (3,), ())),), (3,))], 5) == [
        0,
        1,
        3,
    ]
    got = crop(Trial(0, "corrupt", (edit, swapped), (1, 3)), [1, 3], 8)
    assert (got.index, got.prompts) == (8, (0, 1))
    assert [e.positions for e in got.edits] == [((1,), (3,))] * 2
    assert got.edits[0].keys == ((6,), (8,))
    assert isinstance(got.edits[0].values, Tensor)
    assert got.edits[0].values.flatten().tolist() == [1.0, 3.0]
    assert got.edits[1].source_prompts == (0, 0)


def test_an_unknown_implementation_is_left_alone() -> None:
    model: Any = build("mamba")
    with proof.other_implementation(model) as swapped:
        assert not swapped
    model = build("llama")
    with proof.other_implementation(model) as swapped:
        assert swapped
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    assert execute.EXECUTORS == ("packed", "resume", "hooks")


def test_an_implementation_that_breaks_the_model_is_no_reason_to_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("llama")
    real = proof.native_logits

    def forward(model: Any, *rest: Any) -> Tensor:
        if model.config._attn_implementation != "sdpa":
            raise RuntimeError("not with this implementation")
        return real(model, *rest)

    monkeypatch.setattr(proof, "native_logits", forward)
    assert proved(model).executor == "packed"
    assert model.config._attn_implementation == "sdpa"
