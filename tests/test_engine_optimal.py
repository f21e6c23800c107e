"""Optimal constants: known optima, gradients, what is left behind, and what an executor makes of the result."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from benchmarks.tiny import tiny_tokens
from mechinterp_cli.engine.capture import stream_means, token_losses
from mechinterp_cli.engine.constants import Constants, constant_edits
from mechinterp_cli.engine.edits import Bucket, Edit, Site, Trial
from mechinterp_cli.engine.instrument import read_sites
from mechinterp_cli.engine.losses import Batch, kl_to_clean, next_token_loss
from mechinterp_cli.engine.optimal import ConstantFitter, Fitted, batch_size, fit_constants, fit_flops
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.walk import forward
from tests.engine_trials import run
from tests.families import build
from tests.models_fixtures import smollm2, toy
from tests.test_engine_cleanup import Stop, assert_untouched, hooks_on, native

__all__ = ["smollm2", "toy"]

LENGTH = 9
SPOTS = ((0, 3, 8), (4,), (8,), (2, 5), (7, 8), (1,))
"""Positions that are edited, prompt by prompt."""


def bucket_of(tokens: Tensor, *, everywhere: bool = True) -> Bucket:
    read = torch.arange(tokens.shape[1]).expand(len(tokens), -1) if everywhere else None
    return Bucket.of({"clean": tokens}, read)


def two_buckets(*, everywhere: bool = True) -> list[Bucket]:
    lengths = (LENGTH, LENGTH + 3)
    return [bucket_of(tiny_tokens(batch=6, length=n, seed=n), everywhere=everywhere) for n in lengths]


def edit(site: Site, units: tuple[int, ...] | None = None, spots: Sequence[Sequence[int]] = SPOTS) -> Edit:
    return Edit(site, "constant", tuple(map(tuple, spots)), units=units)


def means(model: nn.Module, anatomy: Anatomy, buckets: Sequence[Bucket], *sites: Site) -> dict[Site, Tensor]:
    return stream_means(model, anatomy, set(sites), [bucket.tokens["clean"] for bucket in buckets])


def squared_error(logits: Tensor, batch: Batch) -> Tensor:
    return ((logits - batch.clean) ** 2).sum((1, 2))


@pytest.fixture(scope="module")
def llama() -> tuple[PreTrainedModel, Anatomy]:
    model = build("llama")
    return model, find_anatomy(model)


@pytest.fixture(scope="module")
def linear() -> tuple[PreTrainedModel, Anatomy]:
    """Logits are linear in what the last layer writes."""
    model: Any = build("llama")
    model.model.norm = nn.Identity()
    return model, find_anatomy(model)


@pytest.mark.parametrize(
    ("site", "units"), [(Site("resid_post", 2), None), (Site("mlp_out", 2), None), (Site("neuron", 2), (5,))]
)
def test_where_logits_are_linear_the_least_squares_constant_is_the_mean(
    linear: tuple[PreTrainedModel, Anatomy], site: Site, units: tuple[int, ...] | None
) -> None:
    model, anatomy = linear
    buckets = two_buckets()
    tokens = [bucket.tokens["clean"] for bucket in buckets]
    seen = [read_sites(model, anatomy, {site}, partial(forward, model, ids))[site] for ids in tokens]
    rows = torch.stack([x[i, j] for x in seen for i, chosen in enumerate(SPOTS) for j in chosen])
    mean = rows.mean(0)
    start = {site: mean + rows.std(0)}
    fitted = fit_constants(
        model, anatomy, buckets, [[edit(site, units)]] * 2, start, squared_error, steps=400, rate=0.1, seed=0
    )
    at: Any = slice(None) if units is None else list(units)
    scale = rows.std(0)[at].max()
    assert (fitted.constants[site][at] - mean[at]).abs().max() < 0.02 * scale
    assert (start[site][at] - mean[at]).abs().max() > 0.2 * scale, "the start would have passed"
    assert fitted.improved
    if units is not None:
        others = [i for i in range(len(mean)) if i not in units]
        assert torch.equal(fitted.constants[site][others], start[site][others])


TRIALS: dict[str, list[tuple[Site, tuple[int, ...] | None]]] = {
    "a head": [(Site("z", 1), (2,))],
    "an MLP": [(Site("mlp_out", 0), None)],
    "a neuron": [(Site("neuron", 1), (7,))],
    "a set": [(Site("z", 0), (0, 3)), (Site("resid_mid", 1), None), (Site("mlp_out", 2), None), (Site("v", 2), (1,))],
}


@pytest.mark.parametrize("loss", [kl_to_clean, next_token_loss])
@pytest.mark.parametrize("name", TRIALS)
def test_the_optimum_is_no_worse_than_mean_and_zero(
    llama: tuple[PreTrainedModel, Anatomy], name: str, loss: Any
) -> None:
    model, anatomy = llama
    buckets = two_buckets()
    edits = [[edit(site, units) for site, units in TRIALS[name]]] * 2
    start = means(model, anatomy, buckets, *(site for site, _ in TRIALS[name]))
    fitter = ConstantFitter(model, anatomy, buckets, loss)
    fitted = fitter.fit(edits, start, steps=25, rate=0.1, seed=0)
    assert fitted.after < fitted.start
    assert fitted.after <= fitted.zero
    assert fitted.prompts == 12
    zeros = {site: torch.zeros_like(x) for site, x in start.items()}
    for constants, value in ((start, fitted.start), (zeros, fitted.zero), (fitted.constants, fitted.after)):
        assert float(fitter.mean_loss(edits, constants)) == pytest.approx(value, rel=1e-5)


def test_on_the_toy_model_the_optimum_beats_the_mean_which_mostly_beats_zero(
    toy: LoadedModel,
) -> None:
    half = torch.randint(1, 30, (8, 10), generator=torch.Generator().manual_seed(0))
    buckets = [bucket_of(torch.cat([half, half], 1))]
    everywhere = [range(20)] * 8
    for site, units in ((Site("z", 0), None), (Site("z", 1), (0,)), (Site("mlp_out", 0), None)):
        start = means(toy.model, toy.anatomy, buckets, site)
        fitted = fit_constants(
            toy.model,
            toy.anatomy,
            buckets,
            [[edit(site, units, everywhere)]],
            start,
            kl_to_clean,
            steps=40,
            rate=0.1,
            seed=0,
        )
        assert fitted.after < min(fitted.start, fitted.zero), site
        assert fitted.start < fitted.zero or site == Site("z", 1), site


def directions(count: int) -> Tensor:
    """Orthonormal rows [count, d_model]."""
    rows = torch.randn(32, count, generator=torch.Generator().manual_seed(count))
    basis: Tensor = torch.linalg.qr(rows)[0].T
    return basis.contiguous()


def projected(site: Site, basis: Tensor) -> Edit:
    return replace(edit(site), op="project", values=basis)


def test_a_constant_in_place_of_directions_is_put_along_them_alone(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    site, buckets, basis = Site("resid_post", 1), two_buckets(), directions(2)
    start = means(model, anatomy, buckets, site)
    fitter = ConstantFitter(model, anatomy, buckets, kl_to_clean)
    fitted = fitter.fit([[projected(site, basis)]] * 2, start, steps=25, rate=0.1, seed=0)
    moved = fitted.constants[site] - start[site]
    across = moved - moved @ basis.T @ basis
    # What stands across the directions is never put, so no gradient moves it.
    losses = []
    for constant in (fitted.constants[site], start[site], fitted.constants[site] + 10 * across, basis.sum(0) * 0):
        losses.append(float(fitter.mean_loss([[projected(site, basis)]] * 2, {site: constant})))
        by_hand = loss_along(model, buckets, site, basis, constant)
        assert losses[-1] == pytest.approx(by_hand, rel=1e-4)
    assert losses[:2] == pytest.approx([fitted.after, fitted.start], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
    assert losses[3] == pytest.approx(fitted.zero, rel=1e-5)
    assert fitted.after < min(fitted.start, fitted.zero)
    # A positive control: the whole constant is another ablation.
    whole = float(fitter.mean_loss([[edit(site)]] * 2, {site: fitted.constants[site]}))
    assert whole > 2 * fitted.after


@torch.no_grad()
def forward_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return forward(model, tokens)


def loss_along(model: nn.Module, buckets: Sequence[Bucket], site: Site, basis: Tensor, constant: Tensor) -> float:
    """The mean divergence with a component put at the spots by a hook on the layer."""
    layers: Any = model.get_submodule("model.layers")
    losses: list[float] = []
    for bucket in buckets:
        tokens = bucket.tokens["clean"]
        clean = forward_logits(model, tokens).double().log_softmax(-1)

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for prompt, spots in enumerate(SPOTS):
                for at in spots:
                    hidden[prompt, at] += (constant - hidden[prompt, at]) @ basis.T @ basis
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = layers[site.layer].register_forward_hook(hook)
        edited = forward_logits(model, tokens).double().log_softmax(-1)
        handle.remove()
        losses += (clean.exp() * (clean - edited)).sum(-1).mean(1).tolist()
    return sum(losses) / len(losses)


def test_directions_that_span_everything_are_fitted_as_the_whole_site(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    site, buckets = Site("resid_post", 1), two_buckets()
    start = means(model, anatomy, buckets, site)
    every = [
        fit_constants(model, anatomy, buckets, [[one]] * 2, start, kl_to_clean, steps=8, rate=0.1, seed=0)
        for one in (projected(site, torch.eye(32)), edit(site))
    ]
    assert every[0].after == pytest.approx(every[1].after, rel=1e-4)
    torch.testing.assert_close(every[0].constants[site], every[1].constants[site], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("layer", "steps"), [(0, 4), (0, 16), (2, 16)])
@pytest.mark.parametrize("count", [6, 34])
def test_what_a_fit_costs_is_known_before(layer: int, steps: int, count: int) -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    buckets = [bucket_of(tiny_tokens(batch=count, length=30, seed=1))]
    assert (batch_size(buckets[0], anatomy) < count) == (count == 34)
    site = Site("z", layer)
    start = means(model, anatomy, buckets, site)
    fitter = ConstantFitter(model, anatomy, buckets, kl_to_clean)
    edits = [[edit(site, (1,), [range(30)] * count)]]
    with FlopCounterMode(display=False) as counter:
        fitter.fit(edits, start, steps=steps, rate=0.1, seed=0)
    assert fit_flops(model, anatomy, buckets, layer, steps) == pytest.approx(counter.get_total_flops(), rel=0.3)


@pytest.mark.parametrize("executor", ["packed", "hooks"])
def test_executors_find_the_loss_that_the_fit_says(llama: tuple[PreTrainedModel, Anatomy], executor: str) -> None:
    model, anatomy = llama
    buckets = two_buckets()[:1]
    edits = [edit(site, units) for site, units in TRIALS["a set"]]
    start = means(model, anatomy, buckets, *(e.site for e in edits))
    fitted = fit_constants(model, anatomy, buckets, [edits], start, kl_to_clean, steps=10, rate=0.1, seed=0)
    for constants, value in ((start, fitted.start), (fitted.constants, fitted.after)):
        trial = Trial(0, "clean", constant_edits(edits, constants), tuple(range(6)))
        values = run(executor, model, anatomy, buckets[0], [trial])
        log_p, log_clean = (torch.log_softmax(x, -1) for x in (values.trials[0], values.streams["clean"]))
        assert float((log_clean.exp() * (log_clean - log_p)).sum(-1).mean()) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi", "gpt_oss", "granite", "bloom", "mamba"])
def test_gradients_are_those_of_finite_differences(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every kind of site in double precision, with a part below edited too: nothing on the way detaches."""
    model = build(family).double()
    model.config._experts_implementation = "eager"  # the default one has no double precision
    anatomy = find_anatomy(model)
    # norms and softmaxes raise what they get to single precision by these names, and would lower ours
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    buckets = [bucket_of(tiny_tokens(batch=2, length=7, seed=3))]
    below = Site("resid_pre", 0)
    fitter = ConstantFitter(model, anatomy, buckets, kl_to_clean)
    kinds = [kind for kind in anatomy.layers[1].sites if kind not in ("scores", "pattern")]
    assert kinds
    for kind in kinds:
        site = Site(kind, 1)
        start = {x: y.double() for x, y in means(model, anatomy, buckets, site, below).items()}
        edits = [[edit(site, None, [(2, 5), (6,)]), edit(below, None, [(1,), (3,)])]]
        generator = torch.Generator().manual_seed(0)
        direction = {x: torch.randn(y.shape, generator=generator, dtype=y.dtype) for x, y in start.items()}
        with torch.enable_grad():
            leaves = {x: y.clone().requires_grad_() for x, y in start.items()}
            gradients = torch.autograd.grad(fitter.mean_loss(edits, leaves), list(leaves.values()))
        for x, gradient in zip(leaves, gradients, strict=True):
            size = 1e-5
            ends = [{**start, x: start[x] + sign * size * direction[x]} for sign in (1, -1)]
            high, low = (float(fitter.mean_loss(edits, end)) for end in ends)
            slope = float((gradient * direction[x]).sum())
            assert slope == pytest.approx((high - low) / (2 * size), rel=1e-4, abs=1e-9), (family, x)
            assert slope != 0, (family, x)


def fit_again(model: nn.Module, anatomy: Anatomy, seed: int, tokens: int = 24, **others: Any) -> Fitted:
    buckets = two_buckets(everywhere=False)
    sites = [Site("z", 2), Site("mlp_out", 2)]
    spots = [range(LENGTH)] * 6
    fitter = ConstantFitter(model, anatomy, buckets, kl_to_clean, tokens_per_batch=tokens)
    start = means(model, anatomy, buckets, *sites)
    edits = [[edit(sites[0], (1,), spots), edit(sites[1], None, spots)]] * 2
    return fitter.fit(edits, start, steps=12, rate=0.1, seed=seed, **others)


def same(a: Constants, b: Constants) -> bool:
    return all(torch.equal(a[site], b[site]) for site in a)


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order(
    llama: tuple[PreTrainedModel, Anatomy],
) -> None:
    first, again, other = (fit_again(*llama, seed) for seed in (0, 0, 1))
    assert first.curve == again.curve
    assert same(first.constants, again.constants)
    assert first.after == again.after
    assert other.curve != first.curve
    assert not same(first.constants, other.constants)


def test_every_epoch_has_each_prompt_once_in_another_order(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    seen: list[tuple[int, list[int]]] = []

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        if logits.requires_grad:
            seen.append((batch.bucket, batch.prompts.tolist()))
        return kl_to_clean(logits, batch)

    buckets = two_buckets(everywhere=False)
    site = Site("z", 2)
    spots = [(1,), (), (2,), (3,), (4,), (5,)]
    fitter = ConstantFitter(*llama, buckets, loss, tokens_per_batch=24)
    fitter.fit([[edit(site, (1,), spots)]] * 2, means(*llama, buckets, site), steps=12, rate=0.1, seed=0)
    epochs = [seen[0:6], seen[6:12]]
    wanted = sorted((bucket, prompt) for bucket in (0, 1) for prompt in (0, 2, 3, 4, 5))
    for epoch in epochs:
        assert sorted((bucket, prompt) for bucket, prompts in epoch for prompt in prompts) == wanted
    assert epochs[0] != epochs[1]


def test_mini_batches_come_close_to_the_optimum_of_whole_passes(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    small, whole = fit_again(*llama, 0), fit_again(*llama, 0, tokens=10_000)
    gain = whole.start - whole.after
    assert gain > 0
    assert small.start == pytest.approx(whole.start, rel=1e-5)
    assert small.start - small.after > 0.5 * gain


def test_layers_below_the_first_edit_are_not_computed_again(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    calls: list[int] = []
    handles = [
        model.get_submodule(f"model.layers.{i}.mlp").register_forward_hook(lambda *_, i=i: calls.append(i))
        for i in range(3)
    ]
    ticks: list[int] = []
    counted: list[tuple[int, int]] = []

    def tick(step: int) -> None:
        ticks.append(step)
        counted.append((calls.count(0), calls.count(2)))

    fitted = fit_again(model, anatomy, 0, tick=tick)
    for handle in handles:
        handle.remove()
    assert fitted.layer == 2
    assert ticks == list(range(12))
    assert counted[-1][0] == counted[0][0]
    assert counted[-1][1] >= counted[0][1] + 11


def test_where_a_pass_cannot_begin_in_the_middle_whole_passes_are_made(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    """A hook of the user's on a layer that stays out would change what stands in for its output."""
    model, anatomy = build("llama"), llama[1]
    want = fit_again(model, anatomy, 0)
    handle = model.get_submodule("model.layers.1").register_forward_hook(lambda _m, _a, out: out * 1.5)
    hooked = fit_again(model, anatomy, 0)
    handle.remove()
    folded = build("llama")
    folded.get_submodule("model.layers.2").register_forward_pre_hook(lambda _m, args: (args[0] * 1.5, *args[1:]))
    same_model = fit_again(folded, anatomy, 0)
    assert (want.layer, hooked.layer, same_model.layer) == (2, 0, 2)
    assert hooked.start == pytest.approx(same_model.start, rel=1e-4)
    assert hooked.after == pytest.approx(same_model.after, rel=1e-3)
    assert hooked.start != pytest.approx(want.start, rel=1e-2)


def test_weights_get_no_gradients_and_stay_as_they_were() -> None:
    model = build("llama").requires_grad_(True)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    with torch.no_grad():  # as callers compute everything else
        fitted = fit_again(model, find_anatomy(model), 0)
        assert not torch.is_grad_enabled()
    assert fitted.improved
    assert not any(x.requires_grad for x in fitted.constants.values())
    for name, x in model.named_parameters():
        assert x.grad is None, name
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("where", ["loss", "tick", "layer"])
def test_a_fit_that_fails_leaves_the_model_as_it_was(where: str) -> None:
    model = build("llama")
    before, anatomy = native(model), find_anatomy(model)
    hooks = hooks_on(model)
    buckets = two_buckets()
    site = Site("z", 1)
    start = means(model, anatomy, buckets, site)

    def fail(*_: Any) -> None:
        raise Stop

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        if where == "loss" and logits.requires_grad:
            raise Stop
        if where == "layer" and not handles:
            handles.append(model.get_submodule("model.layers.2.mlp").register_forward_hook(fail))
        return kl_to_clean(logits, batch)

    handles: list[Any] = []
    tick = fail if where == "tick" else lambda _: None
    with pytest.raises(Stop):
        fit_constants(model, anatomy, buckets, [[edit(site)]] * 2, start, loss, steps=3, rate=0.1, seed=0, tick=tick)
    for handle in handles:
        handle.remove()
    assert_untouched(model, before, hooks)


def test_a_rate_that_throws_the_constants_away_gives_the_start_back(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    buckets = two_buckets()
    site = Site("resid_pre", 1)
    start = means(model, anatomy, buckets, site)
    fitted = fit_constants(model, anatomy, buckets, [[edit(site)]] * 2, start, kl_to_clean, steps=1, rate=1e6, seed=0)
    assert fitted.after == min(fitted.start, fitted.zero)
    assert torch.equal(fitted.constants[site], start[site] * (fitted.start <= fitted.zero))


def test_a_loss_of_nan_on_the_way_is_not_taken(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    calls: list[int] = []

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        calls.append(1)
        return kl_to_clean(logits, batch) * (float("nan") if len(calls) in (5, 6, 7) else 1)

    buckets = two_buckets()[:1]
    site = Site("mlp_out", 1)
    fitted = fit_constants(
        *llama, buckets, [[edit(site)]], means(*llama, buckets, site), loss, steps=6, rate=0.1, seed=0
    )
    assert any(x != x for x in fitted.curve)
    assert fitted.after < fitted.start
    assert fitted.constants[site].isfinite().all()


def test_half_precision_is_fitted_in_single(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model = build("llama").bfloat16()
    buckets = two_buckets()
    site = Site("mlp_out", 1)
    start = means(model, llama[1], buckets, site)
    fitted = fit_constants(model, llama[1], buckets, [[edit(site)]] * 2, start, kl_to_clean, steps=20, rate=0.1, seed=0)
    assert fitted.improved
    assert fitted.constants[site].dtype == torch.float32


def test_ready_losses_are_those_of_the_definitions(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    (bucket, _) = two_buckets()
    fitter = ConstantFitter(model, anatomy, [bucket], kl_to_clean)
    batch = fitter.batch(0, torch.tensor([4, 1]))
    logits = forward(model, bucket.tokens["clean"][[4, 1]])
    assert torch.allclose(batch.clean, logits, atol=1e-5)
    losses = token_losses(model, anatomy, bucket.tokens["clean"])[[4, 1]].mean(1)
    assert torch.allclose(next_token_loss(logits, batch).double(), losses, atol=1e-5)
    assert kl_to_clean(logits, batch).abs().max() < 1e-6
    other = logits.flip(0)
    p, q = logits.double().softmax(-1), other.double().softmax(-1)
    assert torch.allclose(kl_to_clean(other, batch).double(), (p * (p / q).log()).sum(-1).mean(-1), rtol=1e-4)


def test_a_token_that_the_model_forbids_weighs_nothing_in_kl(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    (bucket, _) = two_buckets(everywhere=False)
    logits = torch.tensor([[[0.0, 1.0, -torch.inf]]], requires_grad=True)
    clean = torch.tensor([[[1.0, 0.0, -torch.inf]]])
    batch = Batch(0, torch.tensor([0]), bucket.tokens["clean"][:1], bucket.read[:1], lambda: clean)
    value = kl_to_clean(logits, batch)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    short = kl_to_clean(logits.detach()[..., :2], replace_clean(batch, clean[..., :2]))
    assert value.item() == pytest.approx(short.item())
    assert gradient[..., :2].isfinite().all()


def replace_clean(batch: Batch, clean: Tensor) -> Batch:
    return Batch(batch.bucket, batch.prompts, batch.tokens, batch.read, lambda: clean)


def test_unedited_logits_are_the_same_kept_or_not(
    llama: tuple[PreTrainedModel, Anatomy], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = fit_again(*llama, 0)
    monkeypatch.setattr("mechinterp_cli.engine.optimal.CLEAN_BYTES", 0)
    anew = fit_again(*llama, 0)
    assert anew.after == pytest.approx(kept.after, rel=1e-3)


def test_bad_input_is_refused(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    buckets = two_buckets()

    def fit(site: Site, spots: Sequence[Sequence[int]], loss: Any = kl_to_clean) -> Fitted:
        start = means(*llama, buckets, site)
        return fit_constants(*llama, buckets, [[edit(site, None, spots)]] * 2, start, loss, steps=2, rate=0.1, seed=0)

    assert fit(Site("z", 1), SPOTS).prompts == 12
    with pytest.raises(UserError, match="no prompt that is fitted on has a token where z of layer 1 is edited"):
        fit(Site("z", 1), [()] * 6)
    with pytest.raises(UserError, match="pattern has one feature per key"):
        fit_constants(*llama, buckets, [[edit(Site("pattern", 1))]] * 2, {}, kl_to_clean, steps=2, rate=0.1, seed=0)
    with pytest.raises(RunError, match="the loss is nan"):
        fit(Site("z", 1), SPOTS, lambda logits, _: logits.sum((1, 2)) * float("nan"))
    with pytest.raises(RunError, match="no gradient comes back"):
        fit(Site("z", 1), SPOTS, lambda logits, _: logits.detach().sum((1, 2)))


@pytest.mark.slow
def test_a_head_of_the_real_model_is_fitted(smollm2: LoadedModel) -> None:
    texts = ["When Mary and John went to the store, John gave a drink to", "The capital of France is"]
    ids = [smollm2.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    buckets = [bucket_of(tokens, everywhere=False) for tokens in ids]
    site = Site("z", 20)
    start = means(smollm2.model, smollm2.anatomy, buckets, site)
    edits = [[edit(site, (1,), [range(tokens.shape[1])])] for tokens in ids]
    fitted = fit_constants(
        smollm2.model, smollm2.anatomy, buckets, edits, start, kl_to_clean, steps=10, rate=0.1, seed=0
    )
    assert fitted.layer == 20
    assert fitted.after < fitted.start
