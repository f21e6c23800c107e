"""Relevance rules: forward values stay, gradients are those of a model whose frozen parts are written out by hand."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, get_args

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import NewGELUActivation, QuickGELUActivation

from benchmarks.tiny import tiny_model
from mechinterp_cli.engine.atp import Batching, Estimates, atp, stream
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import EMBED, differentiated
from mechinterp_cli.engine.linearised import is_elementwise, secant
from mechinterp_cli.engine.relevance import ATTENTION_KINDS, Rule, check_rules, relevance_rules
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.walk import forward
from tests.attribution_cases import LENGTH, Case, build, in_float64, two_metrics
from tests.models_fixtures import smollm2, toy
from tests.test_engine_cleanup import Stop, assert_untouched, hooks_on, native
from tests.test_engine_gradients import all_prompts, gradients, held_by

__all__ = ["smollm2", "toy"]

RULES: tuple[str, ...] = get_args(Rule)
PUBLISHED = ("norm", "activation", "gate")
STEP = 1e-5

GATED = ("llama", "gemma", "gemma2", "gemma3", "qwen3", "granite", "olmo2", "phi3", "mixtral", "deepseek_v3", "gpt_oss")
UNGATED = ("gpt2", "gpt_neox", "phi", "opt", "gptj", "bloom", "falcon")
"""GPT-J, Bloom and Falcon compute attention themselves."""


def ruled(case: Case, *rules: str) -> Callable[[], Any]:
    return partial(relevance_rules, case.model, case.anatomy, rules or RULES)


def stream_sites(case: Case) -> set[Site]:
    return {EMBED, *(Site("resid_post", layer.index) for layer in case.anatomy.layers)}


def deviation(a: dict[tuple[Site, int], Tensor], b: dict[tuple[Site, int], Tensor]) -> float:
    """The largest difference of two sets of gradients, in units of each gradient's largest entry."""
    assert a.keys() == b.keys()
    return max(float((a[at] - b[at]).abs().max() / b[at].abs().max()) for at in a)


# ------------------------------------------------------------------ forward values


@pytest.mark.parametrize("family", [*GATED, *UNGATED, "mamba", "qwen3_next"])
def test_no_forward_value_changes_by_a_bit(family: str) -> None:
    case = Case.of(build(family))
    rules = RULES if family in GATED + UNGATED else ("norm", "activation")
    seen: list[tuple[dict[Site, Tensor], Tensor]] = []
    for context in (ruled(case, "none of them"), ruled(case, *rules)):
        activations: dict[Site, Tensor] = {}

        def use(site: Site, _metric: int, x: Tensor, _gradient: Tensor, kept: Any = activations) -> None:
            kept[site] = x.clone()

        sites = case.sites - {Site(kind, i) for kind in ("q", "k", "scores", "pattern") for i in range(3)}
        values = differentiated(case.model, case.anatomy, all_prompts(case), two_metrics, sites, use, rules=context)
        seen.append((activations, values))
    (plain, plain_values), (under, values) = seen
    assert torch.equal(values, plain_values)
    assert all(torch.equal(under[site], x) for site, x in plain.items())


def test_bfloat16_keeps_its_values_and_stays_near_float32() -> None:
    narrow: Any = build("llama")
    exact, rough = Case.of(build("llama")), Case.of(narrow.to(torch.bfloat16))
    with torch.no_grad():
        want = forward(rough.model, rough.base)
    with torch.enable_grad(), ruled(rough)():
        rough.model.model.embed_tokens.weight.requires_grad_()
        got = forward(rough.model, rough.base)
        rough.model.model.embed_tokens.weight.requires_grad_(False)
    assert got.requires_grad
    assert torch.equal(got, want)
    a, b = (gradients(case, {EMBED}, rules=ruled(case))[EMBED, 0].float() for case in (exact, rough))
    assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.97


# ------------------------------------------------------------------ gradients, against a model written by hand


@dataclass
class Frozen:
    """Numbers that the rules hold fast: noted in a first pass, and given back in later ones."""

    rules: Collection[str]
    kept: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, rule: str, name: str, value: Tensor) -> Tensor:
        return self.kept.setdefault(name, value) if rule in self.rules else value

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """The product, or where gates are halved the mean of the two products with either factor held fast."""
        if "gate" not in self.rules:
            return a * b
        return (a * self.keep("gate", name + "b", b) + self.keep("gate", name + "a", a) * b) / 2


def causal_softmax(scores: Tensor) -> Tensor:
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def rotated(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(LENGTH)[:, None] * theta ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat(turned, -1)


def plain_llama(model: Any, x: Tensor, frozen: Frozen, start: int) -> Any:
    """Logits of a Llama from what enters a layer."""
    config = model.config

    def norm(x: Tensor, module: Any, name: str) -> Any:
        scale = (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) ** -0.5
        return x * frozen.keep("norm", name, scale) * module.weight

    def heads(x: Tensor, weight: Tensor, count: int) -> Tensor:
        return (x @ weight.T).view(*x.shape[:2], count, -1).transpose(1, 2)

    for i, layer in enumerate(model.model.layers[start:]):
        n, at = norm(x, layer.input_layernorm, f"{i} first"), layer.self_attn
        count, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
        q = rotated(heads(n, at.q_proj.weight, count), 10000.0)
        k = rotated(heads(n, at.k_proj.weight, count // groups), 10000.0).repeat_interleave(groups, 1)
        v = heads(n, at.v_proj.weight, count // groups).repeat_interleave(groups, 1)
        pattern = causal_softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)
        z = frozen.keep("attention", f"{i} pattern", pattern) @ v
        x = x + z.transpose(1, 2).flatten(2) @ at.o_proj.weight.T
        n, mlp = norm(x, layer.post_attention_layernorm, f"{i} second"), layer.mlp
        gate = n @ mlp.gate_proj.weight.T
        gate = gate * frozen.keep("activation", f"{i} silu", gate.sigmoid())
        x = x + frozen.product(f"{i} product", gate, n @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T
    return norm(x, model.model.norm, "last") @ model.lm_head.weight.T


def plain_gpt2(model: Any, x: Tensor, frozen: Frozen, start: int) -> Any:
    """Logits of a GPT-2 from what enters a layer."""

    def norm(x: Tensor, module: Any, name: str) -> Any:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
        return centred / frozen.keep("norm", name, deviation) * module.weight + module.bias

    for i, block in enumerate(model.transformer.h[start:]):
        n = norm(x, block.ln_1, f"{i} first") @ block.attn.c_attn.weight + block.attn.c_attn.bias
        q, k, v = (part.unflatten(-1, (model.config.n_head, -1)).transpose(1, 2) for part in n.chunk(3, -1))
        pattern = causal_softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)
        z = frozen.keep("attention", f"{i} pattern", pattern) @ v
        x = x + z.transpose(1, 2).flatten(2) @ block.attn.c_proj.weight + block.attn.c_proj.bias
        inner = norm(x, block.ln_2, f"{i} second") @ block.mlp.c_fc.weight + block.mlp.c_fc.bias
        ratio = F.gelu(inner, approximate="tanh") / inner
        x = x + inner * frozen.keep("activation", f"{i} gelu", ratio) @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
    return norm(x, model.transformer.ln_f, "last") @ model.lm_head.weight.T


def slope(case: Case, plain: Any, entering: Tensor, direction: Tensor, layer: int, rules: Collection[str]) -> Tensor:
    """How the metrics change along a direction at resid_pre of a layer, by central differences of the plain model."""
    frozen, at = Frozen(rules), torch.arange(len(case.base))

    def metrics(x: Tensor) -> Tensor:
        return two_metrics(plain(case.model, x, frozen, layer)[at, list(case.read)], at)

    assert torch.allclose(metrics(entering), two_metrics(all_prompts(case).logits(case.model), at), rtol=1e-6)
    return (metrics(entering + STEP * direction) - metrics(entering - STEP * direction)) / (2 * STEP)


SUBSETS = [chosen for size in range(5) for chosen in combinations(RULES, size)]


@pytest.mark.parametrize("rules", SUBSETS, ids=["+".join(rules) or "none" for rules in SUBSETS])
@pytest.mark.parametrize(("family", "plain"), [("llama", plain_llama), ("gpt2", plain_gpt2)])
def test_gradients_are_those_of_a_plain_model_with_frozen_parts(
    family: str, plain: Any, rules: tuple[str, ...]
) -> None:
    case = Case.of(build(family))
    sites = {Site("resid_pre", 0), Site("resid_pre", 2)}
    entering: dict[Site, Tensor] = {}
    found: dict[tuple[Site, int], Tensor] = {}

    def use(site: Site, metric: int, x: Tensor, gradient: Tensor) -> None:
        entering[site], found[site, metric] = x, gradient

    with in_float64(case.model), torch.no_grad():
        context = ruled(case, *rules) if rules else ruled(case, "none of them")
        differentiated(case.model, case.anatomy, all_prompts(case), two_metrics, sites, use, rules=context)
        for site in sites:
            direction = torch.randn(entering[site].shape, generator=torch.Generator().manual_seed(0))
            want = slope(case, plain, entering[site], direction, site.layer, rules)
            for metric in range(2):
                told = (found[site, metric] * direction).flatten(1).sum(1)
                assert want[:, metric].abs().max() > 1e-3
                assert (told - want[:, metric]).abs().max() < 1e-5 * want[:, metric].abs().max(), (site, metric)


@pytest.mark.parametrize("family", [*GATED, *UNGATED])
def test_each_rule_acts_where_it_must(family: str) -> None:
    case = Case.of(build(family))
    plain = gradients(case, {EMBED})
    idle = {"gate"} if family in UNGATED else set()
    idle |= {"activation"} if family == "opt" else set()  # ReLU is linear along rays
    for rule in RULES:
        change = deviation(gradients(case, {EMBED}, rules=ruled(case, rule)), plain)
        assert change == 0 if rule in idle else change > 0.05, rule


# ------------------------------------------------------------------ conservation


def without_biases(model: Any) -> Any:
    for name, weight in model.named_parameters():
        if "bias" in name:
            weight.data.zero_()
    return model


def logit_diff(logits: Tensor, prompts: Tensor) -> Tensor:
    return two_metrics(logits, prompts)[:, :1]


def relevance(case: Case, *rules: str) -> tuple[dict[Site, Tensor], Tensor]:
    """Activation · gradient, summed over every token and feature of a site, and the logit differences."""
    sums: dict[Site, Tensor] = {}

    def use(site: Site, _metric: int, x: Tensor, gradient: Tensor) -> None:
        sums[site] = (x.double() * gradient.double()).flatten(1).sum(1)

    context = ruled(case, *rules)
    sites = stream_sites(case)
    values = differentiated(case.model, case.anatomy, all_prompts(case), logit_diff, sites, use, rules=context)
    return sums, values[:, 0].double()


def lost(case: Case, *rules: str) -> float:
    """The largest part of a logit difference that the sum over a cut lacks or has too much."""
    sums, values = relevance(case, *rules)
    assert values.abs().min() > 0.01
    return max(float((total / values - 1).abs().max()) for total in sums.values())


LINEAR_HEADS = [family for family in GATED + UNGATED if family not in ("gemma2", "mixtral", "deepseek_v3", "gpt_oss")]


@pytest.mark.parametrize("family", LINEAR_HEADS)
def test_relevance_is_conserved_across_every_cut(family: str) -> None:
    case = Case.of(without_biases(build(family)))
    assert lost(case) < 1e-4
    for rule in set(RULES) - ({"gate"} if family in UNGATED else set()):
        if (family, rule) != ("opt", "activation"):
            assert lost(case, *(set(RULES) - {rule})) > 1e-2, rule


def test_a_soft_cap_of_the_logits_keeps_its_gradient() -> None:
    capped: Any = build("gemma2")
    uncapped: Any = build("gemma2")
    uncapped.config.final_logit_softcapping = None
    assert lost(Case.of(uncapped)) < 1e-4
    assert lost(Case.of(capped)) > 1e-2
    sums, _ = relevance(Case.of(capped))
    sums_before, _ = relevance(Case.of(uncapped))
    logits = Case.of(uncapped)
    z = all_prompts(logits).logits(uncapped)
    at = torch.arange(len(z))[:, None]
    chosen = torch.cat([z.gather(1, 3 + at), z.gather(1, 40 + at)], 1)
    slopes = 1 - torch.tanh(chosen / 3.0) ** 2
    want = slopes[:, 0] * chosen[:, 0] - slopes[:, 1] * chosen[:, 1]
    assert sums.keys() == sums_before.keys()
    assert all(torch.allclose(total, want.double(), rtol=1e-4) for total in sums.values())


def constant_router(_module: nn.Module, _args: Any, output: Any) -> Any:
    return tuple(x.detach() for x in output) if isinstance(output, tuple) else output.detach()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_relevance_is_conserved_through_experts(implementation: str) -> None:
    model: Any = build("mixtral")
    model.set_experts_implementation(implementation)
    case = Case.of(model)
    assert lost(case) > 1e-2  # a router's weights keep their own gradient
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(constant_router)
    assert lost(case) < 1e-4
    assert lost(case, "norm", "attention", "gate") > 1e-2
    assert lost(case, "norm", "attention", "activation") > 1e-2


def prompts_of(loaded: LoadedModel, ids: Tensor) -> Case:
    return Case(loaded.model, loaded.anatomy, ids, ids.flip(0), (ids.shape[1] - 1,) * len(ids))


def test_relevance_is_conserved_in_the_toy(toy: LoadedModel) -> None:
    biased = [name for name, x in toy.model.named_parameters() if "bias" in name and bool(x.abs().max() > 0)]
    assert biased == []
    ids = torch.randint(5, toy.anatomy.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    assert lost(prompts_of(toy, ids)) < 1e-4


def test_relevance_is_conserved_in_smollm2(smollm2: LoadedModel) -> None:
    texts = ["When Mary and John went to the store, John gave a drink to", "The capital of France is the old city of"]
    for text in texts:
        ids = torch.tensor([smollm2.tokenizer(text)["input_ids"]])
        case = prompts_of(smollm2, ids)
        assert lost(case) < 1e-4
        assert lost(case, *PUBLISHED) > 1e-2


# ------------------------------------------------------------------ activation functions


class Written(nn.Module):
    """Activation functions that are written out, as fused experts and older models do it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # so that it is no module without weights
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "silu":
            return x * torch.sigmoid(x)
        if self.kind == "quick_gelu":
            return torch.sigmoid(1.702 * x) * x
        return 0.5 * x * (1.0 + torch.tanh(0.79788456 * (x + 0.044715 * torch.pow(x, 3))))


WRITTEN: dict[str, nn.Module] = {"silu": nn.SiLU(), "quick_gelu": QuickGELUActivation(), "gelu": NewGELUActivation()}


@pytest.mark.parametrize("rules", [("activation",), ("activation", "gate"), ("gate",)])
@pytest.mark.parametrize("kind", sorted(WRITTEN))
def test_activation_functions_are_known_when_they_are_written_out(kind: str, rules: tuple[str, ...]) -> None:
    found = []
    for act in (Written(kind), WRITTEN[kind]):
        model: Any = build("llama")
        for layer in model.model.layers:
            layer.mlp.act_fn = act
        model.requires_grad_(False)
        case = Case.of(model)
        found.append(gradients(case, {EMBED}, rules=ruled(case, *rules)))
    assert deviation(*found) < 1e-4
    assert deviation(found[0], gradients(case, {EMBED})) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "at_zero"),
    [(F.silu, 0.5), (F.gelu, 0.5), (F.relu, 0.5), (torch.tanh, 1.0), (torch.sigmoid, 0.25), (F.softplus, 0.5)],
)
def test_a_secant_goes_through_zero_and_has_a_limit_there(function: Any, at_zero: float, dtype: torch.dtype) -> None:
    x = torch.tensor([[-2.0, -0.5, -1e-6, 0.0, 1e-20, 1e-4, 0.25, 3.0]], dtype=dtype, requires_grad=True)
    value = secant(function, x)
    assert torch.equal(value, function(x.detach()))
    slope = torch.autograd.grad(value.sum(), x)[0].double()
    wide = x.detach().double()
    exact = (function(wide) - function(torch.zeros(1).double())) / wide
    far = wide.abs() > 0.01
    # the function's own float32 value at −2 is a small difference of large terms
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    assert torch.allclose(slope[far], exact[far], rtol=tolerance)
    near = torch.where((function is F.relu) & (wide != 0), (wide > 0).double(), at_zero)
    assert torch.allclose(slope[~far], near[~far], rtol=1e-2 if dtype == torch.bfloat16 else 1e-3)


def test_what_is_an_activation_function_is_tried() -> None:
    x = torch.randn(2, 5, 12)
    for act in (nn.GELU(), nn.Sigmoid(), lambda x: x.relu().square()):
        assert is_elementwise(act, x)
    for other in (nn.Identity(), nn.Dropout().eval(), nn.Softmax(-1), nn.RMSNorm(12), lambda x: x.cumsum(1)):
        assert not is_elementwise(other, x)


# ------------------------------------------------------------------ norms


class Norm(nn.Module):
    """A norm with its weight, written in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 12))
        self.bias = nn.Parameter(torch.linspace(-1, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        return WAYS[self.way](x, self.weight, self.bias)


EPS = 0.1
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rsqrt": lambda x, w, b: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    "centred at zero": lambda x, w, b: (1 + (w - 1)) * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)),
    "root": lambda x, w, b: w * x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS),
    "power": lambda x, w, b: w * (x * (x.pow(2).mean(-1, keepdim=True) + EPS) ** -0.5),
    "in float32": lambda x, w, b: w * (x.float() * (x.float().pow(2).mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype),
    "one call": lambda x, w, b: F.rms_norm(x, (12,), w, EPS),
    "centred": lambda x, w, b: F.layer_norm(x, (12,), w, b, EPS),
    "two groups": lambda x, w, b: F.group_norm(x.transpose(1, 2), 2, w, b, EPS).transpose(1, 2),
    "length": lambda x, w, b: w * F.normalize(x, dim=-1),
    "length by hand": lambda x, w, b: w * (x / x.norm(dim=-1, keepdim=True)),
}


def frozen_way(way: str, x: Tensor, at: Tensor, norm: Any) -> Any:
    """The same norms with denominators taken at another point."""
    if way == "two groups":
        parts = at.transpose(1, 2).reshape(len(at), 2, -1), x.transpose(1, 2).reshape(len(x), 2, -1)
        scale = (parts[0].var(-1, unbiased=False, keepdim=True) + EPS).rsqrt()
        normed = (parts[1] - parts[1].mean(-1, keepdim=True)) * scale
        return normed.reshape(len(x), 12, -1).transpose(1, 2) * norm.weight + norm.bias
    if way == "centred":
        scale = (at.var(-1, unbiased=False, keepdim=True) + EPS).rsqrt()
        return (x - x.mean(-1, keepdim=True)) * scale * norm.weight + norm.bias
    if way.startswith("length"):
        return x / at.norm(dim=-1, keepdim=True) * norm.weight
    return x * (at.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * norm.weight


@pytest.mark.parametrize("way", sorted(WAYS))
def test_norms_have_constant_denominators_however_they_are_written(way: str) -> None:
    model: Any = build("llama")
    case = Case.of(model)
    norm = Norm(way).requires_grad_(False)
    layer = model.model.layers[0]
    layer.probe = norm
    layer.forward = norm.forward  # the layer is nothing but the norm, and the rules hold in layers
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))

    def slope(rules: tuple[str, ...]) -> Tensor:
        with ruled(case, *rules)():
            value: Tensor = layer(x)
        assert torch.equal(value, norm(x))
        return torch.autograd.grad((value * weights).sum(), x)[0]

    want = torch.autograd.grad((frozen_way(way, x, x.detach(), norm) * weights).sum(), x)[0]
    own = torch.autograd.grad((norm(x) * weights).sum(), x)[0]
    assert torch.allclose(slope(("norm",)), want, atol=1e-6)
    assert torch.allclose(slope(("gate", "activation")), own, atol=1e-6)
    assert (own - want).abs().max() > 0.05


# ------------------------------------------------------------------ other things that layers compute


def layer_slope(compute: Callable[[Tensor], Tensor], x: Tensor, *rules: str) -> Tensor:
    """The gradient of a weighed sum of what a layer gives that computes this and nothing else."""
    model: Any = build("llama")
    layer = model.model.layers[0]
    layer.forward = compute
    x = x.clone().requires_grad_()
    with relevance_rules(model, Case.of(build("llama")).anatomy, rules):
        value: Tensor = layer(x)
    assert torch.equal(value, compute(x.detach()))
    weights = torch.linspace(-1, 2, value.numel()).view(value.shape)
    return torch.autograd.grad((value * weights).sum(), x)[0] / weights


X = torch.linspace(-2, 3, 24).view(1, 2, 12)


def test_a_gate_of_attention_outputs_is_halved_and_its_sigmoid_is_a_secant() -> None:
    def gated(x: Tensor) -> Tensor:
        return (2 * x.flip(-1).flip(-1)) * torch.sigmoid((x.flip(-1) + 1.0).flip(-1) * 1.0)

    logit = X + 1
    secant_slope = (logit.sigmoid() - 0.5) / logit
    full = 2 * logit.sigmoid() + 2 * X * logit.sigmoid() * (1 - logit.sigmoid())
    assert torch.allclose(layer_slope(gated, X, "norm"), full, atol=1e-5)
    assert torch.allclose(layer_slope(gated, X, "gate"), full / 2, atol=1e-5)
    both = logit.sigmoid() + X * secant_slope
    assert torch.allclose(layer_slope(gated, X, "gate", "activation"), both, atol=1e-5)


def test_constants_and_single_numbers_are_no_gates() -> None:
    angles = torch.linspace(0, 1, 12)
    rotary = layer_slope(lambda x: x * angles.cos() + x.roll(1, -1).roll(-1, -1) * angles.sin(), X, "gate")
    assert torch.allclose(rotary, (angles.cos() + angles.sin()).expand_as(X), atol=1e-6)
    routed = partial(layer_slope, lambda x: x.flip(-1).flip(-1) * x.sum(-1, keepdim=True), X)
    assert torch.equal(routed("gate"), routed("norm"))


def test_activation_functions_may_work_in_place_and_exponents_may_be_tensors() -> None:
    x = X.roll(3, -1)
    assert torch.allclose(layer_slope(lambda x: F.silu(1 * x, inplace=True), x, "activation"), x.sigmoid(), atol=1e-5)
    model: Any = build("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.SiLU(inplace=True)
    case = Case.of(model)
    plain = Case.of(build("llama"))
    assert deviation(gradients(case, {EMBED}, rules=ruled(case)), gradients(plain, {EMBED}, rules=ruled(plain))) < 1e-5
    cubed = layer_slope(lambda x: x ** torch.full((1,), 3.0), x, *RULES[:2])
    assert torch.allclose(cubed, 3 * x**2, atol=1e-4)


# ------------------------------------------------------------------ sites, checkpointing, and what is left behind


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "falcon", "bloom", "gpt_oss"])
@pytest.mark.parametrize("rules", [PUBLISHED, RULES], ids="+".join)
def test_sites_and_checkpointing_change_nothing(family: str, rules: tuple[str, ...]) -> None:
    case = Case.of(build(family))
    sites = {site for site in case.sites if "attention" not in rules or site.kind not in ATTENTION_KINDS}
    alone = gradients(case, {EMBED}, rules=ruled(case, *rules))
    every = gradients(case, sites, rules=ruled(case, *rules))
    again = gradients(case, sites, rules=ruled(case, *rules), checkpointing=True)
    assert deviation({at: every[at] for at in alone}, alone) < 1e-4
    assert deviation(again, every) < 1e-4
    assert deviation(alone, gradients(case, {EMBED})) > 0.05


def test_checkpointing_still_keeps_less() -> None:
    case = Case.of(build("llama"))
    assert held_by(case, rules=ruled(case), checkpointing=True) < 0.2 * held_by(case, rules=ruled(case))


def test_the_metric_is_not_touched() -> None:
    case = Case.of(build("llama"))

    def gated(logits: Tensor, _prompts: Tensor) -> Tensor:
        return (torch.sigmoid(logits[:, :1]) * logits[:, 1:2]) * torch.rsqrt(logits[:, 2:3].square() + 1)

    found: list[Tensor] = []
    logits = all_prompts(case).logits(case.model).requires_grad_()
    own = torch.autograd.grad(gated(logits, logits).sum(), logits)[0]

    def spied(logits: Any, prompts: Tensor) -> Tensor:
        logits.register_hook(found.append)
        return gated(logits, prompts)

    differentiated(case.model, case.anatomy, all_prompts(case), spied, {EMBED}, lambda *_: None, rules=ruled(case))
    assert torch.allclose(found[0], own, atol=1e-6)


def test_relp_is_the_difference_times_the_ruled_gradient() -> None:
    case = Case.of(build("llama"))
    sites = frozenset({Site("resid_pre", 1), Site("z", 1), Site("neuron", 0)})
    told = atp(case.ask(sites), rules=ruled(case))
    by_hand = gradients(case, set(sites), rules=ruled(case))
    sources = case.ask(sites).sources(torch.arange(len(case.base)), sites)
    bases = stream(case.model, case.anatomy, case.base)(torch.arange(len(case.base)), sites)
    for site in sites:
        product = (sources[site] - bases[site]) * by_hand[site, 0]
        want = product if site.kind == "neuron" else product.sum(-1)
        assert torch.allclose(told.by_site[site][0], want, atol=1e-5)
    assert not torch.allclose(told.by_site[Site("z", 1)], atp(case.ask(sites)).by_site[Site("z", 1)], rtol=0.05)


def test_how_prompts_are_shared_out_changes_nothing() -> None:
    case = Case.of(build("mixtral"))
    sites = frozenset({EMBED, Site("mlp_out", 1)})
    whole = atp(case.ask(sites), rules=ruled(case))
    for batching in (Batching(LENGTH), Batching(LENGTH, checkpointing=True)):
        parts: Estimates = atp(case.ask(sites, batching=batching), rules=ruled(case))
        for site, values in whole.by_site.items():
            assert torch.allclose(parts.by_site[site], values, rtol=1e-3, atol=1e-5 * float(values.abs().max()))


def fail_in_layer(model: Any) -> Any:
    def hook(*_: Any) -> None:
        raise Stop

    return model.model.layers[1].mlp.act_fn.register_forward_hook(hook)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, checkpointing: bool) -> None:
    case = Case.of(build("llama"))
    before, hooks = native(case.model), hooks_on(case.model)
    handle = fail_in_layer(case.model) if fails else None

    def run() -> dict[tuple[Site, int], Tensor]:
        return gradients(case, {EMBED}, rules=ruled(case), checkpointing=checkpointing)

    if handle is None:
        assert run()
    else:
        with pytest.raises(Stop):
            run()
        handle.remove()
    assert_untouched(case.model, before, hooks)
    x = torch.ones(1, requires_grad=True)
    assert torch.autograd.grad(torch.sigmoid(x), x)[0] == pytest.approx(0.1966, abs=1e-4)


def test_weights_may_be_kept_elsewhere() -> None:
    case = Case.of(build("llama"))
    here = gradients(case, {EMBED}, rules=ruled(case))
    cpu_offload(case.model, torch.device("cpu"))
    kept = {name: vars(module).get("forward") for name, module in case.model.named_modules()}
    for checkpointing in (False, True):
        there = gradients(case, {EMBED}, rules=ruled(case), checkpointing=checkpointing)
        assert deviation(there, here) < 1e-4
    assert kept == {name: vars(module).get("forward") for name, module in case.model.named_modules()}
    assert any(kept.values())


# ------------------------------------------------------------------ refusals


def test_sites_that_act_through_constant_attention_are_refused() -> None:
    sites = {Site("z", 0), Site("k", 2), Site("pattern", 1), Site("v", 1)}
    with pytest.raises(UserError) as caught:
        check_rules(RULES, sites)
    assert "the rule attention makes attention probabilities constants, so relp gives 0 at k, pattern" in str(
        caught.value.cause
    )
    assert caught.value.remedy == "Leave attention out of attribute.rules, or these sites out of attribute.sites."
    check_rules(PUBLISHED, sites)
    check_rules(RULES, {Site("z", 0), Site("v", 1), Site("resid_pre", 0)})


@pytest.mark.parametrize("kind", ["q", "k", "scores"])
def test_their_gradients_are_zero_indeed(kind: str) -> None:
    case = Case.of(build("llama"))
    with pytest.raises(UserError, match=f"no gradient at {kind} of layer 1"):
        gradients(case, {EMBED, Site(kind, 1)}, rules=ruled(case))
    assert gradients(case, {EMBED, Site(kind, 1)}, rules=ruled(case, *PUBLISHED))[Site(kind, 1), 0].any()


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_layers_without_softmax_attention_are_refused_by_the_rules_that_cannot_hold(family: str) -> None:
    case = Case.of(build(family))
    for rules, named in ((RULES, "gate and attention"), (("norm", "gate"), "gate"), (("attention",), "attention")):
        with pytest.raises(UserError) as caught:
            gradients(case, {EMBED}, rules=ruled(case, *rules))
        assert str(caught.value.cause) == (
            f"layer 0 mixes positions without softmax attention: relp's {named} says nothing of that"
        )
        assert caught.value.remedy == f"Leave {named} out of attribute.rules, or take another estimator than relp."
    assert deviation(gradients(case, {EMBED}, rules=ruled(case, "norm", "activation")), gradients(case, {EMBED})) > 0.05


@pytest.mark.parametrize("model_type", ["xglm", "gptj", "falcon"])
def test_attention_that_layers_compute_themselves_is_made_constant(model_type: str) -> None:
    case = Case.of(without_biases(tiny_model(model_type)))
    assert not case.anatomy.layers[0].by_interface
    assert lost(case) < 1e-4
    assert lost(case, *PUBLISHED) > 1e-2


def test_fused_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.of(build("llama"))
    monkeypatch.setattr(type(case.model), "use_kernels", True)
    with pytest.raises(UserError, match="runs on fused kernels") as caught, ruled(case)():
        pass
    assert "use_kernels" in caught.value.remedy
