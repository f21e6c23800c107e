"""Q-fix, K-fix and GradDrop: against softmax rows computed anew, exact patching, and backward passes by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mechinterp_cli.engine.atp import Batching, atp, stream, zeros
from mechinterp_cli.engine.atp_star import STREAM_KINDS, atp_star
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import Pass, differentiated
from mechinterp_cli.engine.instrument import kinds_by_layer, visiting
from mechinterp_cli.engine.softmax_fix import one_logit
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.walk import forward
from tests.attribution_cases import LENGTH, Case, build, in_float64, linear_model, two_metrics
from tests.families import FAMILIES
from tests.oracle import NAMES, Oracle
from tests.test_engine_cleanup import Stop, assert_untouched, native

SHARP = 30.0
"""Weights of queries and keys times this: nearly all rows of attention hold one key with probability 1."""


def sites_of(case: Case, *kinds: str) -> frozenset[Site]:
    return frozenset(site for site in case.sites if site.kind in kinds)


def difference_only(logits: Tensor, prompts: Tensor) -> Tensor:
    return two_metrics(logits, prompts)[:, :1]


def saturated() -> Case:
    return Case.of(linear_model(layers=1, attention=SHARP))


@pytest.mark.parametrize("kind", ["q", "k"])
def test_where_attention_is_saturated_atp_misses_what_the_fixes_find(kind: str) -> None:
    case, site = saturated(), Site(kind, 0)
    with in_float64(case.model):
        asked = case.ask(frozenset({site}), metric=difference_only)
        nodes = [(position, head) for position in range(LENGTH) for head in range(4)]
        exact = case.patched([case.patch(site, *node) for node in nodes], difference_only)
        want = torch.unflatten(exact.permute(1, 2, 0), -1, (LENGTH, 4))
        plain, fixed = atp(asked).by_site[site], atp_star(asked).by_site[site]
    largest = want.abs() > 0.5 * want.abs().max()
    assert largest.sum() >= 3
    assert (fixed - want).abs().max() < 1e-6 * want.abs().max()
    assert plain[largest].abs().max() < 0.01 * want[largest].abs().min()


@pytest.mark.parametrize("kind", ["q", "k"])
def test_where_little_changes_the_fixes_are_atp(kind: str) -> None:
    case, site = Case.of(build("llama")), Site(kind, 1)
    with in_float64(case.model):
        sources = stream(case.model, case.anatomy, case.source)

        def nearby(prompts: Tensor, sites: Any) -> dict[Site, Tensor]:
            base = stream(case.model, case.anatomy, case.base)(prompts, sites)
            other = sources(prompts, sites)
            return {at: base[at] + 1e-5 * (other[at] - base[at]) for at in sites}

        asked = case.ask(frozenset({site}), sources=nearby)
        plain, fixed = atp(asked).by_site[site], atp_star(asked).by_site[site]
        assert (fixed - plain).abs().max() < 1e-3 * plain.abs().max()
        far = case.ask(frozenset({site}))
        assert (atp_star(far).by_site[site] - atp(far).by_site[site]).abs().max() > 0.1 * plain.abs().max() * 1e5


def pattern_gradients(case: Case, layer: int) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}

    def use(_site: Site, metric: int, _activation: Tensor, gradient: Tensor) -> None:
        found[metric] = gradient.clone()

    prompts = Pass(case.base, torch.tensor(case.read), torch.arange(len(case.base)))
    differentiated(case.model, case.anatomy, prompts, two_metrics, {Site("pattern", layer)}, use)
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt_neox", "granite", "opt"])
def test_fixes_are_attention_computed_anew_for_every_node(family: str) -> None:
    """Grouped queries, windows, a soft-cap, sinks, scalings of their own: the oracle writes them out by itself."""
    oracle = Oracle(family)
    case = Case.of(build(family, attn_implementation="eager"))
    found = atp_star(case.ask(sites_of(case, "q", "k")))
    _, base = oracle.run(case.base)
    _, source = oracle.run(case.source)
    for layer in (0, 2):
        gradient = pattern_gradients(case, layer)
        for kind in ("q", "k"):
            got = found.by_site[Site(kind, layer)]
            want = torch.zeros_like(got)
            for position in range(LENGTH):
                for head in range(got.shape[-1]):

                    def put(
                        x: Tensor, node: Any = (slice(None), position, head), new: Any = source[kind, layer]
                    ) -> Tensor:
                        x[node] = new[node]
                        return x

                    _, seen = oracle.run(case.base, {(kind, layer): put})
                    change = seen["pattern", layer] - base["pattern", layer]
                    for metric in range(2):
                        want[metric, :, position, head] = (change * gradient[metric]).sum((1, 2, 3))
            assert want.abs().max() > 1e-3
            assert (got - want).abs().max() < 1e-4 * want.abs().max(), (kind, layer)


def test_the_families_above_have_every_kind_of_softmax() -> None:
    assert {"llama", "mistral", "gemma2", "gpt_oss"} <= NAMES.keys()
    configs: dict[str, Any] = {name: build(name).config for name in ("llama", "mistral", "gemma2")}
    assert configs["llama"].num_key_value_heads < configs["llama"].num_attention_heads
    assert configs["mistral"].sliding_window < LENGTH
    assert configs["gemma2"].attn_logit_softcapping
    assert "sinks" in FAMILIES["gpt_oss"].note


def softmax_by_hand(logits: list[float], sink: float | None) -> list[float]:
    top = max(logits + ([] if sink is None else [sink]))
    weights = [math.exp(x - top) for x in logits]
    total = sum(weights) + (0.0 if sink is None else math.exp(sink - top))
    return [weight / total for weight in weights]


@pytest.mark.parametrize("sink", [None, 1.5, 60.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0, 150.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_logit_after_the_other_is_replaced(spread: float, sink: float | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    old, new, gradient = (torch.randn(1, 2, 5, 6, generator=generator, dtype=dtype) for _ in range(3))
    old, new = spread * old, spread * new
    masked = torch.ones(5, 6, dtype=torch.bool).tril() == 0
    old, new = old.masked_fill(masked, -torch.inf), new.masked_fill(masked, -torch.inf)
    sinks = None if sink is None else torch.full((2,), sink, dtype=dtype)
    got = one_logit(old, new, gradient, sinks)
    want = torch.zeros(got.shape, dtype=torch.float64)
    for head in range(2):
        for query in range(5):
            row, others = old[0, head, query].tolist(), new[0, head, query].tolist()
            weights = gradient[0, head, query].tolist()
            before = softmax_by_hand(row, sink)
            for key in range(query + 1):
                after = softmax_by_hand([*row[:key], others[key], *row[key + 1 :]], sink)
                moved = zip(weights, after, before, strict=True)
                want[0, head, query, key] = math.fsum(g * (a - b) for g, a, b in moved)
    exact = 1e-5 if dtype == torch.float32 else 1e-12
    assert got.dtype == dtype
    assert (got - want).abs().max() <= exact * max(float(want.abs().max()), 1e-2)
    assert want[0, :, 1:].any() or sink == 60.0


def test_a_key_that_held_everything_gives_way_to_the_others() -> None:
    """Its probability is 1 to the last digit, and those of the others cannot be told from 0."""
    old = torch.tensor([[[[90.0, 1.0, 1.0]]]])
    new = torch.tensor([[[[-90.0, 1.0, 1.0]]]])
    assert torch.softmax(old, -1)[..., 0] == 1
    gradient = torch.tensor([[[[1.0, 3.0, 7.0]]]])
    assert torch.allclose(one_logit(old, new, gradient)[..., 0], torch.tensor(4.0))


def dropped_by_hand(case: Case, sites: frozenset[Site], layer: int | None) -> dict[Site, Tensor]:
    """Estimates with a layer's attention and MLP detached, of the first metric."""
    cut = {} if layer is None else {layer: frozenset({"attn_out", "mlp_out"})}
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, activation: Tensor) -> Tensor:
        if not activation.requires_grad:
            activation = activation.requires_grad_()
        copy = activation.clone()
        if not copy.requires_grad:
            raise AssertionError(site)
        copy.retain_grad()
        seen[site] = copy
        return copy

    source = stream(case.model, case.anatomy, case.source)(torch.arange(len(case.base)), sites)
    with (
        torch.enable_grad(),
        visiting(case.model, case.anatomy, kinds_by_layer(set(sites)), keep),
        visiting(case.model, case.anatomy, cut, lambda _site, activation: activation.detach()),
    ):
        logits = forward(case.model, case.base)[torch.arange(len(case.base)), list(case.read)]
    total: Any = two_metrics(logits, torch.arange(len(case.base)))[:, 0].sum()
    total.backward()
    found = {}
    for site, activation in seen.items():
        gradient = torch.zeros_like(activation) if activation.grad is None else activation.grad
        product = (source[site] - activation.detach()) * gradient
        found[site] = product if site.kind == "neuron" else product.sum(-1)
    return found


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "gpt_neox"])
def test_graddrop_is_the_mean_of_as_many_backward_passes_as_layers(family: str) -> None:
    case = Case.of(build(family))
    sites = sites_of(case, "embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "v", "neuron")
    found = atp_star(case.ask(sites)).by_site
    parts = [dropped_by_hand(case, sites, layer) for layer in range(3)]
    for site in sites:
        share = 3 if site.kind in STREAM_KINDS else 2
        want = torch.stack([part[site].abs() for part in parts]).sum(0) / share
        assert torch.allclose(found[site][0], want, rtol=1e-3, atol=1e-5 * float(want.max())), site
        if site.kind not in STREAM_KINDS:
            assert not parts[site.layer][site].any(), "its own layer's omission cuts it off"
    plain = atp(case.ask(sites)).by_site
    assert all((values >= 0).all() for values in found.values())
    assert any((values[0] - plain[site][0].abs()).abs().max() > 0.1 * values.max() for site, values in found.items())


def test_layers_below_all_nodes_are_not_left_out_one_by_one_for_nothing() -> None:
    case = Case.of(build("llama"))
    high = frozenset({Site("z", 2), Site("resid_pre", 2)})
    alone, among = atp_star(case.ask(high)).by_site, atp_star(case.ask(sites_of(case, "z", "resid_pre"))).by_site
    for site in high:
        assert torch.allclose(alone[site], among[site], rtol=1e-3, atol=1e-6)


def test_a_node_whose_ways_cancel_is_found() -> None:
    """Layer 1 takes away what the node gave, in one way or another: AtP gives 0, GradDrop does not."""
    model = linear_model(layers=2)
    with torch.no_grad():
        first, second = model.transformer.h
        for block in (first, second):
            block.attn.c_proj.weight.zero_()
        width = model.config.n_embd
        second.mlp.c_fc.weight.zero_()
        second.mlp.c_fc.weight[:, :width] = torch.eye(width)
        second.mlp.c_proj.weight.zero_()
        second.mlp.c_proj.weight[:width] = -torch.eye(width)
    case, site = Case.of(model), Site("mlp_out", 0)
    asked = case.ask(frozenset({site}), metric=difference_only)
    plain, dropped = atp(asked).by_site[site], atp_star(asked).by_site[site]
    assert dropped.max() > 0.1
    assert plain.abs().max() < 1e-5 * dropped.max()


def test_graddrop_of_queries_and_keys_is_made_of_fixed_estimates() -> None:
    case = Case.of(build("llama"))
    sites = sites_of(case, "q", "k")
    fixed, sizes = atp_star(case.ask(sites)).by_site, atp_star(case.ask(sites), drop_attention=True).by_site
    for site in sites:
        assert (fixed[site] < 0).any()
        assert (sizes[site] >= 0).all()
    top = Site("q", 2)  # of the last layer nothing but its own omission changes the gradient
    assert torch.allclose(sizes[top], fixed[top].abs(), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(sizes[Site("q", 0)], fixed[Site("q", 0)].abs(), rtol=1e-1, atol=1e-6)


@pytest.mark.parametrize("batching", [Batching(1), Batching(10**6), Batching(1, checkpointing=True)])
def test_estimates_do_not_depend_on_batches(batching: Batching) -> None:
    case = Case.of(build("gemma2"))
    whole, parts = atp_star(case.ask()), atp_star(case.ask(batching=batching))
    assert whole.by_site.keys() == case.sites
    for site, values in whole.by_site.items():
        assert values.shape == atp(case.ask(frozenset({site}))).by_site[site].shape
        assert torch.allclose(parts.by_site[site], values, rtol=1e-3, atol=1e-5 * float(values.abs().max())), site


def test_zero_is_a_source_too() -> None:
    """A query of zeros attends to all keys that it sees alike."""
    case, site = saturated(), Site("q", 0)
    got = atp_star(case.ask(frozenset({site}), sources=zeros)).by_site[site]
    sources = lambda _prompts, sites: {at: torch.zeros(1, LENGTH, 4, 8) for at in sites}  # noqa: E731
    assert torch.equal(got, atp_star(case.ask(frozenset({site}), sources=sources)).by_site[site])
    gradient = pattern_gradients(case, 0)
    seen = torch.ones(LENGTH, LENGTH).tril()
    uniform = (seen / seen.sum(1, keepdim=True))[None, :, None]
    base: list[Tensor] = []
    wanted = kinds_by_layer({Site("pattern", 0)})
    with torch.no_grad(), visiting(case.model, case.anatomy, wanted, lambda _site, x: base.append(x)):
        forward(case.model, case.base)
    assert torch.allclose(got[0], ((uniform - base[0]) * gradient[0]).sum(-1), atol=1e-4)


def test_bfloat16_is_raised_before_the_softmax() -> None:
    wide, narrow = Case.of(build("llama")), Case.of(build("llama"))
    narrow.model.to(torch.bfloat16)
    for site in (Site("q", 1), Site("k", 1)):
        got, want = (atp_star(case.ask(frozenset({site}))).by_site[site] for case in (narrow, wide))
        assert got.dtype == torch.float32
        assert torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1] > 0.97


@pytest.mark.parametrize(
    ("family", "sites", "text"),
    [
        ("gptj", {Site("q", 0)}, "layer 0 has no q"),
        ("mamba", {Site("resid_pre", 0)}, "GradDrop leaves out what layer 0 adds, and it has no attn_out"),
        ("qwen3_next", {Site("z", 0)}, "layer 0 has no z"),
    ],
)
def test_what_a_model_cannot_do_is_refused_with_the_reason(family: str, sites: set[Site], text: str) -> None:
    case = Case.of(build(family))
    with pytest.raises(UserError, match=text) as caught:
        atp_star(case.ask(frozenset(sites)))
    assert caught.value.remedy


def test_one_layer_has_no_others() -> None:
    case = saturated()
    with pytest.raises(UserError, match="this model has one layer"):
        atp_star(case.ask(frozenset({Site("z", 0)})))
    assert atp_star(case.ask(frozenset({Site("q", 0), Site("resid_pre", 0)})))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_left_as_it_was(checkpointing: bool) -> None:
    case = Case.of(build("llama"))
    before = native(case.model)
    batching = Batching(checkpointing=checkpointing)
    assert atp_star(case.ask(batching=batching))
    assert_untouched(case.model, before)

    def metric(_logits: Tensor, _prompts: Tensor) -> Tensor:
        raise Stop

    with pytest.raises(Stop):
        atp_star(case.ask(metric=metric, batching=batching))
    assert_untouched(case.model, before)
