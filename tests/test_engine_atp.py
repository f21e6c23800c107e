"""AtP and integrated gradients: against differences, against exact patching where that is linear, and their sums."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechinterp_cli.engine.atp import Batching, Estimates, Inquiry, atp, batching_within, stream, zeros
from mechinterp_cli.engine.capture import group_means
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import EMBED, Pass, graph_bytes
from mechinterp_cli.engine.instrument import kinds_by_layer, read_sites, visiting
from mechinterp_cli.engine.integrated import conductance, ig_inputs
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.models.kinds import HEAD_KINDS, KEY_KINDS, NEURON_KINDS
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.walk import forward
from tests.attribution_cases import LENGTH, PROMPTS, Case, build, in_float64, linear_model, two_metrics
from tests.models_fixtures import smollm2, toy
from tests.test_engine_gradients import EIGHT

__all__ = ["smollm2", "toy"]

STEP = 1e-5
Estimator = Callable[[Inquiry], Estimates]
ESTIMATORS: dict[str, Estimator] = {
    "atp": atp,
    "ig_inputs": lambda asked: ig_inputs(asked, 4),
    "conductance": lambda asked: conductance(asked, 4),
}


def node_shape(case: Case, site: Site) -> tuple[int, ...]:
    """Metrics, prompts, positions and units of a site's estimates."""
    layer = case.anatomy.layers[site.layer]
    per_token: tuple[int, ...] = ()
    if site.kind in HEAD_KINDS + KEY_KINDS + NEURON_KINDS:
        per_token = (layer.features(site.kind, case.anatomy.d_model),)
    return (2, len(case.base), LENGTH, *per_token, *((LENGTH,) if site.kind in KEY_KINDS else ()))


def read_both(case: Case, sites: set[Site]) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """Activations of the base and of the source."""

    def read(tokens: Tensor) -> dict[Site, Tensor]:
        return read_sites(case.model, case.anatomy, sites, lambda: forward(case.model, tokens))

    return read(case.base), read(case.source)


def stepped(case: Case, site: Site, node: tuple[int, ...], change: Tensor, step: float) -> Tensor:
    """The metrics when one node of every prompt moves a little towards the source."""

    at: Any = (slice(None), *node)

    def visit(_site: Site, activation: Tensor) -> Tensor:
        moved = activation.clone()
        moved[at] += step * change[at]
        return moved

    with torch.no_grad(), visiting(case.model, case.anatomy, kinds_by_layer({site}), visit):
        logits = forward(case.model, case.base)[torch.arange(len(case.base)), list(case.read)]
    return two_metrics(logits, torch.arange(len(case.base)))


@pytest.mark.parametrize("family", EIGHT)
def test_atp_is_the_derivative_towards_the_source_node_by_node(family: str) -> None:
    case = Case.of(build(family))
    generator = torch.Generator().manual_seed(0)
    with in_float64(case.model):
        found = atp(case.ask())
        assert found.by_site.keys() == case.sites
        base, source = read_both(case, set(case.sites))
        for site in sorted(case.sites):
            values = found.by_site[site]
            assert values.shape == node_shape(case, site)
            change = (source[site] - base[site]).nan_to_num()
            for _ in range(2):
                node = tuple(int(torch.randint(size, (), generator=generator)) for size in values.shape[2:])
                if site.kind in KEY_KINDS:
                    node = (7, node[1], 4 + node[2] % 4)  # inside every window
                at: Any = (slice(None), slice(None), *node)
                slope = (stepped(case, site, node, change, STEP) - stepped(case, site, node, change, -STEP)) / (
                    2 * STEP
                )
                scale = max(float(slope.abs().max()), 1e-3 * float(values.abs().max()))
                assert (values[at].T - slope).abs().max() <= 1e-5 * scale, (site, node)


def test_no_estimate_is_zero_for_want_of_a_gradient() -> None:
    """The twin of the test above: random nodes there may be out of the answer's sight."""
    case = Case.of(build("llama"))
    assert all(values.abs().amax((1, 2)).min() > 0 for values in atp(case.ask()).by_site.values())


def exact(case: Case, site: Site, units: int | None) -> Tensor:
    """Effects of patching each node of a site, [metrics, prompts, positions(, units)]."""
    places = [(position, unit) for position in range(LENGTH) for unit in (range(units) if units else [None])]
    effects = case.patched([case.patch(site, position, unit) for position, unit in places])
    shaped = effects.permute(1, 2, 0)
    return torch.unflatten(shaped, -1, (LENGTH, units)) if units else shaped


NODES = {
    "embed": None,
    "resid_pre": None,
    "resid_mid": None,
    "resid_post": None,
    "attn_out": None,
    "mlp_out": None,
    "z": 4,
    "v": 4,
    "neuron": 3,
}


def first(values: Tensor, units: int | None) -> Tensor:
    return values if units is None else values[..., :units]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_on_a_linear_model_every_estimate_is_the_exact_effect(estimator: str) -> None:
    case = Case.of(linear_model())
    with in_float64(case.model):
        sites = [Site(kind, layer) for kind in NODES for layer in ((0,) if kind == "embed" else (0, 1))]
        difference_alone = replace(case.ask(frozenset(sites)), metric=difference_only)
        found = ESTIMATORS[estimator](difference_alone)
        for site in sites:
            want = exact(case, site, NODES[site.kind])[:1]
            got = first(found.by_site[site], NODES[site.kind])
            assert want.abs().max() > 1e-3, site
            assert (got - want).abs().max() < 1e-6 * want.abs().max(), site


def difference_only(logits: Tensor, prompts: Tensor) -> Tensor:
    return two_metrics(logits, prompts)[:, :1]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_on_a_model_that_is_not_linear_no_estimate_is_exact(estimator: str) -> None:
    case = Case.of(build("gpt2"))
    site = Site("mlp_out", 0)
    found, want = ESTIMATORS[estimator](case.ask(frozenset({site}))).by_site[site], exact(case, site, None)
    assert (found - want).abs().max() > 0.05 * want.abs().max()


def total(found: Estimates, site: Site) -> Tensor:
    return found.by_site[site].flatten(2).sum(-1)


def incompleteness(found: Estimates, site: Site) -> float:
    """Largest error of the sum over a site, in parts of the largest change of the metrics."""
    assert found.end is not None
    change = found.end - found.base
    return float((total(found, site) - change).abs().max() / change.abs().max())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "granite", "qwen3", "falcon", "bloom", "mamba"])
def test_sums_are_the_whole_change_at_32_steps(family: str) -> None:
    case = Case.of(build(family), changed=(4,))
    cuts = frozenset(site for site in case.sites if site.kind in ("resid_pre", "resid_mid", "resid_post"))
    sites = cuts | {EMBED}
    inputs, conducted = ig_inputs(case.ask(sites), 32), conductance(case.ask(sites), 32)
    assert incompleteness(inputs, EMBED) <= 0.01
    assert all(incompleteness(conducted, site) <= 0.01 for site in sites)
    assert incompleteness(inputs, Site("resid_post", 1)) > 0.01, "ig_inputs is not complete above the embedding"
    for found in (inputs, conducted):
        assert found.end is not None
        assert torch.allclose(found.base, atp(case.ask(sites)).base, atol=1e-5)
        ends = atp(Case(case.model, case.anatomy, case.source, case.base, case.read).ask(sites)).base
        assert torch.allclose(found.end, ends, atol=1e-5)


def test_the_sums_error_falls_with_the_square_of_the_steps() -> None:
    case = Case.of(build("llama"), changed=(4,))
    with in_float64(case.model):
        cut = Site("resid_post", 0)
        errors = [incompleteness(conductance(case.ask(frozenset({cut})), steps), cut) for steps in (64, 256)]
    assert errors[1] < errors[0] / 10


def test_one_step_of_conductance_is_the_middles_gradient_times_the_whole_change() -> None:
    case = Case.of(build("gpt2"))
    site = Site("z", 1)
    base, source = read_both(case, {EMBED, site})
    middle = (base[EMBED] + source[EMBED]) / 2
    seen: list[Tensor] = []

    def visit(at: Site, activation: Tensor) -> Tensor:
        if at == EMBED:
            return middle
        seen.append(activation.detach().requires_grad_())
        return seen[0]

    with visiting(case.model, case.anatomy, kinds_by_layer({EMBED, site}), visit):
        logits = forward(case.model, case.base)[torch.arange(PROMPTS), list(case.read)]
    value = two_metrics(logits, torch.arange(PROMPTS))[:, 0].sum()
    gradient = torch.autograd.grad(value, seen)[0]
    want = (gradient * (source[site] - base[site])).sum(-1)
    for one in (conductance, ig_inputs):
        assert torch.allclose(one(case.ask(frozenset({site})), 1).by_site[site][0], want, atol=1e-5)
    assert not torch.allclose(atp(case.ask(frozenset({site}))).by_site[site][0], want, atol=1e-3)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_line_has_a_step(steps: int) -> None:
    case = Case.of(build("gpt2"))
    for one in (conductance, ig_inputs):
        with pytest.raises(ValueError, match="at least one"):
            one(case.ask(frozenset({EMBED})), steps)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "batching", [Batching(1), Batching(2 * LENGTH), Batching(10**6), Batching(1, checkpointing=True)]
)
def test_estimates_do_not_depend_on_batches(estimator: str, batching: Batching) -> None:
    case = Case.of(build("gpt2"))
    whole = ESTIMATORS[estimator](case.ask())
    parts = ESTIMATORS[estimator](case.ask(batching=batching))
    assert torch.allclose(parts.base, whole.base, atol=1e-5)
    for site, values in whole.by_site.items():
        assert torch.allclose(parts.by_site[site], values, rtol=1e-3, atol=1e-5 * float(values.abs().max())), site


def test_prompts_are_shared_out_by_memory() -> None:
    case = Case.of(build("llama"))
    asked = case.ask()
    first = Pass(case.base[:1], torch.tensor(case.read[:1]), torch.tensor([0]))
    one = graph_bytes(case.model, case.anatomy, first, two_metrics, case.sites)
    assert batching_within(asked, one) == Batching(LENGTH)
    assert batching_within(asked, one * 5 // 2) == Batching(2 * LENGTH)
    assert batching_within(asked, one - 1) == Batching(LENGTH, checkpointing=True)
    assert [len(prompts.prompts) for prompts in case.ask(batching=Batching(2 * LENGTH)).passes()] == [2, 1]


def test_estimates_do_not_depend_on_company_or_order() -> None:
    case = Case.of(build("llama"))
    order = [2, 0]
    few = Case(case.model, case.anatomy, case.base[order], case.source[order], tuple(case.read[i] for i in order))
    asked = few.ask(metric=lambda logits, prompts: two_metrics(logits, torch.tensor(order)[prompts]))
    whole, part = atp(case.ask()), atp(asked)
    for site, values in whole.by_site.items():
        got = part.by_site[site]
        assert torch.allclose(got, values[:, order], rtol=1e-3, atol=1e-5 * float(values.abs().max())), site


def test_zero_and_mean_are_sources_too() -> None:
    case = Case.of(build("llama"))
    longer = torch.cat([case.source, case.source[:, :3]], dim=1)
    sites = case.sites
    found = atp(case.ask(sites, sources=zeros))
    means = group_means(
        case.model, case.anatomy, set(sites), [case.source, longer], [[0, 1, 2], [3, 4, 5]], [0] * 3 + [1] * 3
    )
    averaged = atp(case.ask(sites, sources=lambda prompts, at: {s: means.at(s, prompts.tolist()) for s in at}))
    base, other = read_both(case, set(sites))
    for site in (Site("neuron", 1), Site("pattern", 2)):
        gradient = -found.by_site[site] / base[site]
        want = gradient * (other[site].mean(0) - base[site])
        real = base[site].abs().expand_as(want) > 1e-4
        assert torch.allclose(averaged.by_site[site][real], want[real], rtol=1e-2, atol=1e-5)
    assert all(bool(values.isfinite().all()) for values in (*found.by_site.values(), *averaged.by_site.values()))


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_hidden_scores_have_no_effect_and_others_have(family: str) -> None:
    """One masks with minus infinity, the other with the least number that there is."""
    case = Case.of(build(family))
    for sources in (zeros, stream(case.model, case.anatomy, case.source)):
        values = atp(case.ask(frozenset({Site("scores", 0)}), sources=sources)).by_site[Site("scores", 0)]
        ahead = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        hidden = ((ahead < 0) | (ahead >= 5))[:, None].expand(values.shape)
        assert not values[hidden].any()
        assert values[~hidden].any()


def test_numbers_that_are_not_finite_stop_the_run_unless_asked_for() -> None:
    case = Case.of(build("llama"))

    def spoil(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output * torch.nan

    handle = case.model.model.layers[1].mlp.register_forward_hook(spoil)
    sites = frozenset({Site("z", 0)})
    with pytest.raises(RunError, match="layer 0 .* at z that is NaN"):
        atp(case.ask(sites))
    assert bool(atp(case.ask(sites, check_finite=False)).by_site[Site("z", 0)].isnan().any())
    handle.remove()
    assert atp(case.ask(sites))


def test_a_site_that_a_layer_lacks_is_refused() -> None:
    case = Case.of(build("gptj"))
    for estimator in ESTIMATORS.values():
        with pytest.raises(UserError, match="layer 0 has no pattern"):
            estimator(case.ask(frozenset({Site("pattern", 0)})))


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_bfloat16_products_are_summed_in_float32(family: str) -> None:
    wide, narrow = Case.of(build(family)), Case.of(build(family))
    narrow.model.to(torch.bfloat16)
    site = Site("resid_post", 1)
    got, want = (atp(case.ask(frozenset({site}))).by_site[site] for case in (narrow, wide))
    assert got.dtype == torch.float32
    assert not torch.equal(got, got.bfloat16().float())
    assert torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1] > 0.97


def test_sums_are_the_whole_change_on_the_trained_toy(toy: LoadedModel) -> None:
    words = torch.randint(5, 60, (4, 10), generator=torch.Generator().manual_seed(0))
    base = torch.cat([words, words], dim=1)
    source = base.clone()
    source[:, 3] = 4

    def metric(logits: Tensor, _prompts: Tensor) -> Tensor:
        return logits[:, :1] - logits[:, 1:2]

    sources = stream(toy.model, toy.anatomy, source)
    sites = frozenset({EMBED, Site("resid_post", 0)})
    asked = Inquiry(toy.model, toy.anatomy, base, torch.full((4,), 19), metric, sources, sites)
    assert incompleteness(ig_inputs(asked, 32), EMBED) <= 0.01
    assert incompleteness(conductance(asked, 32), Site("resid_post", 0)) <= 0.01


@pytest.mark.slow
def test_sums_are_the_whole_change_on_a_real_model(smollm2: LoadedModel) -> None:
    tokenizer: Any = smollm2.tokenizer
    text = "When Mary and John went to the store, {} gave a drink to"
    base, source = (torch.tensor([tokenizer.encode(text.format(name))]) for name in ("John", "Mary"))
    answer, wrong = (tokenizer.encode(name)[0] for name in (" Mary", " John"))

    def metric(logits: Tensor, _prompts: Tensor) -> Tensor:
        return logits[:, [answer]] - logits[:, [wrong]]

    sites = frozenset({EMBED, Site("resid_post", 9), Site("resid_post", 19)})
    sources = stream(smollm2.model, smollm2.anatomy, source)
    read = torch.tensor([base.shape[1] - 1])
    asked = Inquiry(smollm2.model, smollm2.anatomy, base, read, metric, sources, sites)
    assert incompleteness(ig_inputs(asked, 32), EMBED) <= 0.01
    assert all(incompleteness(conductance(asked, 32), site) <= 0.01 for site in sites)
