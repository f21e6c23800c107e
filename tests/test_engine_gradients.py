"""Gradients at every kind of site: against differences of the model itself, and what is left behind."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import EMBED, Graph, Pass, differentiated, graph, graph_bytes, observed
from mechinterp_cli.engine.instrument import kinds_by_layer, visiting
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.kinds import KEY_KINDS
from tests.attribution_cases import LENGTH, Case, build, in_float64, two_metrics
from tests.families import FAMILIES
from tests.test_engine_cleanup import Stop, assert_untouched, hooks_on, native

EIGHT = ("llama", "gpt2", "gpt_neox", "gemma2", "granite", "qwen3", "mixtral", "falcon")
STEP = 1e-5


def all_prompts(case: Case) -> Pass:
    return Pass(case.base, torch.tensor(case.read), torch.arange(len(case.base)))


def gradients(case: Case, sites: set[Site] | None = None, **others: Any) -> dict[tuple[Site, int], Tensor]:
    """Every site's gradient of every metric."""
    found: dict[tuple[Site, int], Tensor] = {}

    def use(site: Site, metric: int, activation: Tensor, gradient: Tensor) -> None:
        assert activation.shape == gradient.shape
        found[site, metric] = gradient.clone()

    differentiated(case.model, case.anatomy, all_prompts(case), two_metrics, sites or case.sites, use, **others)
    return found


def moved(case: Case, site: Site, direction: Tensor, step: float) -> Tensor:
    """The metrics with a step along a direction added at a site, by an ordinary pass."""

    def visit(_site: Site, activation: Tensor) -> Tensor:
        return activation + step * direction

    with torch.no_grad(), visiting(case.model, case.anatomy, kinds_by_layer({site}), visit):
        return two_metrics(all_prompts(case).logits(case.model), torch.arange(len(case.base)))


def seen_keys(shape: torch.Size) -> Tensor:
    """Queries × keys that are neither in the future nor outside any window of the test's models."""
    ahead = torch.arange(shape[1])[:, None] - torch.arange(shape[-1])
    return ((ahead >= 0) & (ahead < 4))[None, :, None]


@pytest.mark.parametrize("family", [*EIGHT, "gptj", "gpt_oss", "deepseek_v3", "mamba", "olmo2", "phi3"])
def test_gradients_are_those_of_central_differences_at_every_site(family: str) -> None:
    case = Case.of(build(family))
    generator = torch.Generator().manual_seed(0)
    with in_float64(case.model):
        found = gradients(case)
        assert {site for site, _ in found} == case.sites
        for site in sorted(case.sites):
            direction = torch.randn(found[site, 0].shape, generator=generator)
            if site.kind in KEY_KINDS:
                direction = direction * seen_keys(direction.shape)
            slope = (moved(case, site, direction, STEP) - moved(case, site, direction, -STEP)) / (2 * STEP)
            for metric in range(2):
                told = (found[site, metric] * direction).flatten(1).sum(1)
                assert told.dtype == torch.float64
                scale = slope[:, metric].abs().max()
                assert scale > 1e-4, site
                assert (told - slope[:, metric]).abs().max() < 1e-5 * scale, (site, metric)


def test_the_families_above_have_every_kind_of_site_and_every_way_around_attention() -> None:
    assert not FAMILIES["llama"].lacks
    assert "q" in FAMILIES["falcon"].lacks
    assert "neuron" in FAMILIES["mixtral"].lacks
    assert FAMILIES["mamba"].executor == "resume"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_computing_layers_again_changes_nothing(family: str) -> None:
    case = Case.of(build(family))
    kept, again = gradients(case), gradients(case, checkpointing=True)
    assert kept.keys() == again.keys()
    for at, gradient in kept.items():
        assert torch.allclose(again[at], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), at


def held_by(case: Case, **others: Any) -> int:
    """Bytes that a graph saves, weights apart."""
    held: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in case.model.parameters()}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with saving, graph(case.model, case.anatomy, all_prompts(case), two_metrics, {EMBED}, **others):
        pass
    return sum(size for at, size in held.items() if at not in weights)


def test_checkpointing_keeps_less() -> None:
    case = Case.of(build("llama"))
    assert held_by(case, checkpointing=True) < 0.2 * held_by(case)


def test_what_a_pass_holds_is_known() -> None:
    case = Case.of(build("llama"))
    few, all_sites = (
        graph_bytes(case.model, case.anatomy, all_prompts(case), two_metrics, sites) for sites in ({EMBED}, case.sites)
    )
    assert abs(few - held_by(case)) < 0.1 * few
    assert few < all_sites
    double = Case.of(case.model, prompts=6)
    assert graph_bytes(case.model, case.anatomy, all_prompts(double), two_metrics, {EMBED}) == pytest.approx(
        2 * few, rel=0.1
    )


def test_a_prompt_does_not_depend_on_its_batch() -> None:
    case = Case.of(build("llama"))
    whole = gradients(case)
    for prompt in range(len(case.base)):
        chosen = slice(prompt, prompt + 1)
        alone = Case(case.model, case.anatomy, case.base[chosen], case.source[chosen], case.read[chosen])
        found: dict[tuple[Site, int], Tensor] = {}

        def use(site: Site, metric: int, _activation: Tensor, gradient: Tensor, found: Any = found) -> None:
            found[site, metric] = gradient.clone()

        one = Pass(alone.base, torch.tensor(alone.read), torch.tensor([prompt]))
        differentiated(case.model, case.anatomy, one, two_metrics, case.sites, use)
        for at, gradient in found.items():
            assert torch.allclose(gradient, whole[at][chosen], rtol=1e-3, atol=1e-5 * float(whole[at].abs().max())), at


def test_given_embeddings_take_the_place_of_the_tokens() -> None:
    case = Case.of(build("gpt2"))
    own = all_prompts(case)
    other = Pass(case.source, own.read, own.prompts)
    want, seen = observed(case.model, case.anatomy, other, two_metrics, case.sites)
    placed = Pass(case.base, own.read, own.prompts, seen[EMBED])
    values, activations = observed(case.model, case.anatomy, placed, two_metrics, case.sites)
    assert torch.equal(values, want)
    assert all(torch.equal(activations[site], seen[site]) for site in case.sites)
    got = differentiated(case.model, case.anatomy, placed, two_metrics, {Site("z", 1)}, lambda *_: None)
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.equal(observed(case.model, case.anatomy, own, two_metrics, ())[0], want)


@pytest.mark.parametrize(("family", "alike"), [("llama", 0.97), ("granite", 0.97), ("falcon", 0.97), ("mixtral", 0.9)])
def test_bfloat16_runs_and_stays_near_float32(family: str, alike: float) -> None:
    """Rounding sends a few of a mixture's tokens to other experts."""
    narrow: Any = build(family)
    exact, rough = gradients(Case.of(build(family))), gradients(Case.of(narrow.to(torch.bfloat16)))
    for site in (Site("resid_post", 1), Site("z", 2)):
        a, b = exact[site, 0].flatten(), rough[site, 0].float().flatten()
        assert rough[site, 0].dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > alike


def test_silenced_sites_pass_nothing_on() -> None:
    case = Case.of(build("llama"))
    ends = {Site("attn_out", 2), Site("mlp_out", 2)}
    sites = {Site("resid_pre", 2), Site("resid_post", 2), Site("neuron", 2), *ends}
    found: dict[Site, Tensor] = {}

    def use(site: Site, _metric: int, _activation: Tensor, gradient: Tensor) -> None:
        found[site] = gradient.clone()

    with graph(case.model, case.anatomy, all_prompts(case), two_metrics, sites) as passed:
        passed.backward(0, use, silenced=ends)
        assert all(not found[site].any() for site in ends | {Site("neuron", 2)})
        assert torch.equal(found[Site("resid_pre", 2)], found[Site("resid_post", 2)])
        passed.backward(0, use, last=True)
        assert all(found[site].any() for site in ends | {Site("neuron", 2)})
        assert not torch.equal(found[Site("resid_pre", 2)], found[Site("resid_post", 2)])


def detached(_module: nn.Module, _args: Any, output: Any) -> Any:
    return output.detach()


def test_a_site_that_nothing_comes_back_to_is_refused_by_name() -> None:
    case = Case.of(build("llama"))
    case.model.model.layers[1].mlp.register_forward_hook(detached)
    with pytest.raises(UserError, match="neuron of layer 1: the metric does not depend on it") as caught:
        gradients(case, {Site("neuron", 1), Site("neuron", 2), Site("resid_pre", 0)})
    assert caught.value.remedy
    assert gradients(case, {Site("neuron", 2), Site("resid_pre", 0)})


def test_a_metric_that_is_cut_off_is_refused() -> None:
    case = Case.of(build("llama"))
    case.model.model.layers[2].register_forward_hook(detached)
    with pytest.raises(UserError, match="no gradient at resid_pre of layer 0"):
        gradients(case, {Site("resid_pre", 0)})
    assert gradients(case, {Site("resid_post", 2)})


def test_integers_are_refused() -> None:
    site = Site("mlp_out", 1)
    with pytest.raises(UserError, match="mlp_out of layer 1: integers have none"):
        Graph({site}, None).visit(site, torch.ones(1, 2, 3, dtype=torch.int8))


@pytest.mark.parametrize(("family", "site"), [("falcon", Site("q", 1)), ("mixtral", Site("neuron", 0))])
def test_a_site_that_the_model_lacks_is_refused_with_the_reason(family: str, site: Site) -> None:
    case = Case.of(build(family))
    with pytest.raises(UserError, match=f"layer {site.layer} has no {site.kind}: ") as caught:
        gradients(case, {site})
    assert "resid_post" in caught.value.remedy


def raise_in_metric(_model: Any) -> dict[str, Any]:
    def metric(_logits: Tensor, _prompts: Tensor) -> Tensor:
        raise Stop

    return {"metric": metric}


def raise_in_use(_model: Any) -> dict[str, Any]:
    def use(*_: Any) -> None:
        raise Stop

    return {"use": use}


def raise_in_layer(model: Any) -> dict[str, Any]:
    def hook(*_: Any) -> None:
        raise Stop

    return {"handle": model.model.layers[2].register_forward_hook(hook)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fault", [None, raise_in_metric, raise_in_use, raise_in_layer])
def test_the_model_is_left_as_it_was(fault: Callable[[Any], dict[str, Any]] | None, checkpointing: bool) -> None:
    case = Case.of(build("llama"))
    model = case.model
    for number, weight in enumerate(model.parameters()):
        weight.requires_grad_(number % 2 == 0)
    wanted = [weight.requires_grad for weight in model.parameters()]
    assert any(wanted)
    assert not all(wanted)
    before, hooks = native(model), hooks_on(model)
    given: dict[str, Any] = {"metric": two_metrics, "use": lambda *_: None, **(fault(model) if fault else {})}
    run = partial(
        differentiated,
        model,
        case.anatomy,
        all_prompts(case),
        given["metric"],
        case.sites,
        given["use"],
        checkpointing=checkpointing,
    )
    if fault is None:
        assert not run().requires_grad
    else:
        with pytest.raises(Stop):
            run()
    if "handle" in given:
        given["handle"].remove()
    assert_untouched(model, before, hooks)
    assert [weight.requires_grad for weight in model.parameters()] == wanted
    assert all(weight.grad is None for weight in model.parameters())
    assert not torch.is_inference_mode_enabled()


def test_weights_that_want_gradients_change_nothing() -> None:
    case = Case.of(build("llama"))
    frozen = gradients(case)
    case.model.requires_grad_(True)
    assert all(torch.equal(gradient, frozen[at]) for at, gradient in gradients(case).items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_may_be_kept_elsewhere(checkpointing: bool) -> None:
    case = Case.of(build("llama"))
    here = gradients(case)
    cpu_offload(case.model, torch.device("cpu"))
    assert all(weight.device.type == "meta" for weight in case.model.parameters())
    there = gradients(case, checkpointing=checkpointing)
    assert all(torch.allclose(there[at], gradient, atol=1e-6) for at, gradient in here.items())
    assert all(weight.device.type == "meta" for weight in case.model.parameters())


def test_nothing_of_a_pass_lives_on() -> None:
    case = Case.of(build("llama"))
    seen: list[weakref.ref[Tensor]] = []

    def use(_site: Site, _metric: int, activation: Tensor, gradient: Tensor) -> None:
        seen.extend(map(weakref.ref, (activation, gradient)))

    gc.collect()
    gc.disable()
    try:
        differentiated(case.model, case.anatomy, all_prompts(case), two_metrics, case.sites, use)
        assert len(seen) == 4 * len(case.sites)
        assert [x for x in seen if x() is not None] == []
    finally:
        gc.enable()


def test_only_prompts_that_end_where_they_are_read_need_no_other_logits() -> None:
    case = Case.of(build("llama"))
    own = all_prompts(case)
    at_end = Pass(own.tokens, torch.full((len(own.tokens),), LENGTH - 1), own.prompts)
    with torch.no_grad():
        whole = case.model(input_ids=case.base, use_cache=False).logits
        assert torch.allclose(at_end.logits(case.model), whole[:, -1], atol=1e-5)
        assert torch.equal(own.logits(case.model), whole[torch.arange(len(case.base)), list(case.read)])
