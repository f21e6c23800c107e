"""A model is left as it was found: after a sweep, after one that failed, under offload hooks, beside other models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from mechinterp_cli.engine.edits import Edit, Site, Trial
from mechinterp_cli.engine.execute import EXECUTORS, executor_named
from mechinterp_cli.engine.wavefront import Settings
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.interface import AttentionCall, intercepted
from mechinterp_cli.models.walk import forward
from tests.engine_trials import PROMPTS, deviation, logits_measure, run, sweep, two_streams
from tests.families import build

TRUE_LOOKUP = AttentionInterface.get_interface


class Stop(Exception):
    """Raised by a test in the middle of a sweep."""


def hooks_on(model: nn.Module) -> int:
    """Everything in any hook dictionary of any module."""
    names = [name for name in vars(nn.Module()) if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs")]
    assert {"_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"} <= set(names)
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def native(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return forward(model, two_streams().tokens["clean"])


def assert_untouched(model: nn.Module, before: Tensor, hooks: int = 0) -> None:
    assert hooks_on(model) == hooks
    assert AttentionInterface.get_interface is TRUE_LOOKUP
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []
    assert torch.equal(native(model), before)


def raise_in_measure(_model: nn.Module, _anatomy: Anatomy) -> dict[str, Any]:
    def measure(_logits: Tensor, _prompt: Tensor, _read: Tensor) -> Tensor:
        raise Stop

    return {"measure": measure}


def raise_in_tick(_model: nn.Module, _anatomy: Anatomy) -> dict[str, Any]:
    def tick(count: int) -> None:
        if count == 1:
            raise KeyboardInterrupt

    return {"tick": tick}


def raise_in_layer(model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
    calls = iter(range(1000))

    def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
        if next(calls) == 3:  # in an edited pass, after the two streams
            raise Stop

    return {"handle": model.get_submodule(anatomy.layers[1].module).register_forward_hook(hook)}


def raise_in_attention(_model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
    size = anatomy.d_model + 1  # does not fit: the edit fails inside the attention call
    edit = Edit(Site("z", 1), "constant", ((3,),) * PROMPTS, values=torch.zeros(1, 1, size, size))
    return {"edit": edit}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("fault", [raise_in_measure, raise_in_tick, raise_in_layer, raise_in_attention])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_sweep_that_fails_leaves_the_model_as_it_was(
    name: str, fault: Callable[[nn.Module, Anatomy], dict[str, Any]], executor: str
) -> None:
    model = build(name)
    before, anatomy = native(model), find_anatomy(model)
    given = fault(model, anatomy)
    trials = sweep(anatomy)[:40]
    if "edit" in given:
        trials.append(Trial(99, "corrupt", (given["edit"],), (0, 1)))
    worker: Any = executor_named(executor, model, anatomy, Settings(rows_per_call=64))
    with pytest.raises((Stop, KeyboardInterrupt, RuntimeError)):
        worker.run(two_streams(), trials, given.get("measure", logits_measure), given.get("tick", lambda _: None))
    if "handle" in given:
        given["handle"].remove()
    assert_untouched(model, before)
    assert getattr(worker, "_handler", None) is None, "keys and values of the streams would stay in memory"
    assert getattr(worker, "_activations", {}) == {}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bloom", "mamba"])
def test_a_sweep_leaves_the_model_as_it_was(name: str, executor: str) -> None:
    model = build(name)
    hooks, before, anatomy = hooks_on(model), native(model), find_anatomy(model)  # Mamba comes with a hook
    assert_untouched(model, before, hooks)
    if executor != "packed" or all(layer.by_interface for layer in anatomy.layers):
        run(executor, model, anatomy, two_streams(), sweep(anatomy)[::6])
    assert_untouched(model, before, hooks)


def test_the_check_of_what_is_left_behind_sees_it() -> None:
    model = build("llama")
    before = native(model)
    model.lm_head.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(AssertionError):
        assert_untouched(model, before)


def test_users_own_hooks_stay_and_take_part() -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    model.model.layers[0].register_forward_hook(lambda _m, _a, out: out * 1.1)
    before, trials = native(model), sweep(anatomy)[::6]
    want = run("hooks", model, anatomy, two_streams(), trials)
    for executor in ("packed", "resume"):
        assert deviation(run(executor, model, anatomy, two_streams(), trials), want) <= 1e-5
    assert_untouched(model, before, hooks=1)


def test_intercepting_one_model_leaves_another_alone() -> None:
    one, other = build("llama"), build("llama", seed=1)
    logits, seen = native(other), []

    def handler(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        seen.append(call.module)
        return torch.zeros_like(call.native(call.q, call.k, call.v, call.mask)[0]), None

    with intercepted(one, handler):
        assert torch.equal(native(other), logits)
        assert seen == []
        native(one)
    assert len(seen) == 3
    assert AttentionInterface.get_interface is TRUE_LOOKUP


def test_two_models_can_be_swept_inside_each_other() -> None:
    one, other = build("llama"), build("gemma2")
    anatomies = find_anatomy(one), find_anatomy(other)
    trials = [sweep(anatomy)[::9] for anatomy in anatomies]
    want = [run("packed", m, a, two_streams(), t) for m, a, t in zip((one, other), anatomies, trials, strict=True)]

    def tick(layer: int) -> None:
        inner = run("packed", other, anatomies[1], two_streams(), trials[1])
        assert deviation(inner, want[1]) == 0.0

    outer = executor_named("packed", one, anatomies[0], Settings(rows_per_call=256))
    assert deviation(outer.run(two_streams(), trials[0], logits_measure, tick), want[0]) == 0.0


@pytest.fixture
def offloaded() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model whose weights wait on the CPU until a layer is called, and the same one without."""
    model = build("llama")
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)
    return model, build("llama")


def test_an_offloaded_model_gives_the_same_numbers_and_keeps_its_hooks(
    offloaded: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    model, plain = offloaded
    own_forward = {name: vars(m)["forward"] for name, m in model.named_modules() if "forward" in vars(m)}
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert own_forward
    before, anatomy = native(model), find_anatomy(model)
    assert torch.equal(before, native(plain))
    trials = sweep(anatomy)[::3]
    want = run("hooks", plain, find_anatomy(plain), two_streams(), trials)
    for executor in EXECUTORS:
        assert deviation(run(executor, model, anatomy, two_streams(), trials), want) <= 1e-5, executor
    assert {n: vars(m)["forward"] for n, m in model.named_modules() if "forward" in vars(m)} == own_forward
    assert torch.equal(native(model), before)
    assert hooks_on(model) == 0


def test_a_layer_with_a_forward_of_its_own_keeps_it_after_an_interrupt() -> None:
    model = build("llama")
    layer: Any = model.model.layers[1]
    calls: list[int] = []
    original = layer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    anatomy = find_anatomy(model)
    vars(layer)["forward"] = counted
    worker = executor_named("packed", model, anatomy, Settings())
    with pytest.raises(KeyboardInterrupt):
        worker.run(two_streams(), sweep(anatomy)[:9], logits_measure, raise_in_tick(model, anatomy)["tick"])
    assert calls
    assert vars(layer)["forward"] is counted
