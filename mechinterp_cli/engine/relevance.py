"""Rules of relevance propagation for gradients: AtP under them is RelP (2508.21258).

A rule changes what the backward pass gives and leaves every forward value as the model itself computes it:

- `norm` (LN): the denominator of LayerNorm, RMSNorm and their kin is a constant; centring and weights stay.
- `activation` (Identity): an activation function f passes on (f(x) − f(0)) / x, its secant from 0, in place of f'(x):
  f(x) / x where f(0) = 0, as for GELU and SiLU; f(0), as of a sigmoid, counts as a bias. At x = 0 it is the limit,
  the mean of both sides where they differ.
- `gate` (Half): of a product of two activations, feature by feature, each gets half the gradient. A factor that is one
  number for a whole vector, such as a router's weight or a norm's scale, is none of these: it has no features.
- `attention` (AH): attention probabilities are constants.

With all four, in a network without biases and routers, activation · gradient summed over a cut is the logit.

The rules hold in the decoder's layers, and `norm` in the rest of the model too, for its final norm. A soft-cap of the
logits and the metric keep their gradients, as do soft-caps of attention scores and the softmax of routers.
Nothing here knows an architecture: operations are met where PyTorch is called, activation functions also as modules
without weights, and attention at the interface. The authors' demonstration on GPT-2 small has `norm`, `activation` and
`gate`, and not `attention`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.activations import ACT2CLS

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.linearised import NORMS, frozen_norm, is_elementwise, secant
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy, LayerAnatomy
from mechinterp_cli.models.interface import AttentionCall, intercepted
from mechinterp_cli.models.walk import MISSING

Rule = Literal["norm", "activation", "gate", "attention"]

ATTENTION_KINDS = ("q", "k", "scores", "pattern")
"""Kinds of site that reach the metric through attention probabilities alone."""


def check_rules(rules: Collection[str], sites: Collection[Site]) -> None:
    """Refuse sites whose gradient the rules make zero.

    Args:
        rules: Names of rules.
        sites: Where estimates are wanted.

    Raises:
        UserError: Attention probabilities are constants, and a site acts through them alone.
    """
    kinds = {site.kind for site in sites}
    void = [kind for kind in ATTENTION_KINDS if kind in kinds]
    if "attention" in rules and void:
        raise UserError(
            f"the rule attention makes attention probabilities constants, so relp gives 0 at {', '.join(void)}",
            "Leave attention out of attribute.rules, or these sites out of attribute.sites.",
        )


@contextmanager
def relevance_rules(model: nn.Module, anatomy: Anatomy, rules: Collection[str]) -> Iterator[None]:
    """Gradients follow the rules, in forward passes inside and in layers that their backward passes compute again.

    Enter it before anything that computes layers again (checkpointing), and before sites are visited.

    Args:
        model: The model, in evaluation mode and with frozen weights.
        anatomy: Its anatomy.
        rules: Names of rules.

    Raises:
        UserError: The model's norms and activation functions are replaced by fused kernels; or, in a forward pass, a
            layer under `gate` or `attention` mixes positions by something else than softmax attention.
    """
    if getattr(model, "use_kernels", False):
        raise UserError(
            "this model runs on fused kernels, and relevance rules cannot reach into those",
            "Load it without use_kernels, or take another estimator than relp.",
        )
    chosen = frozenset(rules)
    mode = _Rules()
    with ExitStack() as stack:
        stack.enter_context(intercepted(model, partial(_attend, mode, "attention" in chosen)))
        if "norm" in chosen:
            stack.enter_context(_forward_within(model, partial(mode.within, frozenset({"norm"}))))
        for layer in anatomy.layers:
            module = model.get_submodule(layer.module)
            stack.enter_context(_forward_within(module, partial(_layer, mode, layer, chosen)))
            if layer.attention and not layer.by_interface:
                stack.enter_context(_forward_within(model.get_submodule(layer.attention), mode.attending))
            if "activation" in chosen:
                for name, inner in module.named_modules(prefix=layer.module):
                    if name != layer.module and _may_be_activation(inner):
                        stack.enter_context(_replaced_forward(inner, partial(_activation_module, inner)))
        yield


def _attend(mode: "_Rules", constant: bool, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """An attention call, with constant probabilities or not."""
    mode.patterns += 1
    q, k = (call.q.detach(), call.k.detach()) if constant else (call.q, call.k)
    return call.native(q, k, call.v, call.mask)


@contextmanager
def _layer(mode: "_Rules", layer: LayerAnatomy, rules: frozenset[str]) -> Iterator[None]:
    """One layer's forward pass under the rules."""
    before = mode.patterns
    with mode.within(rules):
        yield
    void = " and ".join(rule for rule in ("gate", "attention") if rule in rules)
    if void and not layer.by_interface and mode.patterns == before:
        raise UserError(
            f"layer {layer.index} mixes positions without softmax attention: relp's {void} says nothing of that",
            f"Leave {void} out of attribute.rules, or take another estimator than relp.",
        )


@contextmanager
def _forward_within(module: nn.Module, context: Callable[[], Any]) -> Iterator[None]:
    """The module's forward runs inside a context of its own."""

    def make(native: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with context():
                return native(*args, **kwargs)

        return forward

    with _replaced_forward(module, make):
        yield


@contextmanager
def _replaced_forward(module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Another forward, made from the module's own; what stood in the instance is put back."""
    kept = module.__dict__.get("forward", MISSING)
    module.__dict__["forward"] = wraps(module.forward)(make(module.forward))
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if kept is not MISSING:
            module.__dict__["forward"] = kept


# ------------------------------------------------------------------ activation functions


def _may_be_activation(module: nn.Module) -> bool:
    """Activation functions by class, and modules that hold nothing: those are tried when they are called.

    Those that work in place call PyTorch, and are met there.
    """
    holds = (*module.children(), *module.parameters(), *module.buffers())
    return not getattr(module, "inplace", False) and (isinstance(module, _ACTIVATION_CLASSES) or not holds)


def _activation_classes() -> Iterator[type[nn.Module]]:
    entries: Iterable[Any] = ACT2CLS.values()
    for entry in entries:
        yield entry[0] if isinstance(entry, tuple) else entry


_ACTIVATION_CLASSES = tuple(_activation_classes())


def _activation_module(module: nn.Module, native: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module that is linearised as a whole if it is an activation function."""
    found: list[bool] = [True] if isinstance(module, _ACTIVATION_CLASSES) else []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not _has_gradient(args[0]):
            return native(*args, **kwargs)
        if not found:
            found.append(is_elementwise(native, args[0]))
        return secant(native, args[0]) if found[0] else native(args[0])

    return forward


_RECIPROCALS: frozenset[Any] = frozenset({torch.rsqrt, Tensor.rsqrt})
_LENGTHS: frozenset[Any] = frozenset(
    {torch.sqrt, Tensor.sqrt, torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm}
)
"""Denominators of norms where the last axis of what they give is 1."""

_POWERS: frozenset[Any] = frozenset({torch.pow, Tensor.pow, Tensor.__pow__})
"""The same, of exponents ±½."""

# ------------------------------------------------------------------ what is met in a layer

_ACTIVATIONS: frozenset[Any] = frozenset(
    {F.silu, F.gelu, F.relu, torch.relu, Tensor.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.mish}
    | {torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.tanh, Tensor.tanh, F.tanh, F.softplus, F.logsigmoid}
    | {F.hardswish, F.hardsigmoid, F.hardtanh, F.softsign, F.prelu, torch.special.expit}
)
_TANH: frozenset[Any] = frozenset({torch.tanh, Tensor.tanh, F.tanh})
_PRODUCTS: frozenset[Any] = frozenset({torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.mul_})
_SCALINGS: frozenset[Any] = _PRODUCTS | {
    Tensor.div,
    torch.div,
    torch.true_divide,
    Tensor.float,
    Tensor.to,
    Tensor.type_as,
}
_POINTWISE: frozenset[Any] = (
    _ACTIVATIONS | _SCALINGS | {torch.add, Tensor.add, torch.pow, Tensor.pow, torch.erf, Tensor.erf}
)
_SOFTMAX: frozenset[Any] = frozenset({F.softmax, torch.softmax, Tensor.softmax})


def _tensor_keys() -> MutableMapping[Tensor, tuple[Tensor, bool]]:
    keys: Any = WeakTensorKeyDictionary
    made: MutableMapping[Tensor, tuple[Tensor, bool]] = keys()
    return made


class _Rules(TorchFunctionMode):
    """Meets every call of PyTorch while it is entered, by `within`.

    Attributes:
        patterns: How many attention patterns were met.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patterns = 0
        self._rules: frozenset[str] = frozenset()
        self._attending = False
        self._roots: MutableMapping[Tensor, tuple[Tensor, bool]] = _tensor_keys()

    @contextmanager
    def within(self, rules: frozenset[str]) -> Iterator[None]:
        """Some rules hold; the ones of an outer context come back after it."""
        outer, self._rules = self._rules, rules
        try:
            with nullcontext() if outer else self:
                yield
        finally:
            self._rules = outer
            self._roots.clear()

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Every softmax is an attention pattern."""
        self._attending = True
        try:
            yield
        finally:
            self._attending = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer one call."""
        kwargs = dict(kwargs or {})
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        if func is F.scaled_dot_product_attention:
            return self._attention(func, *args, **kwargs)
        if func in _SOFTMAX:
            return self._softmax(func(*args, **kwargs))
        if torch.is_grad_enabled() and any(map(_has_gradient, args)):
            return self._answer(func, args, kwargs)
        return func(*args, **kwargs)

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call on a tensor with a gradient, as the rules have it."""
        if "norm" in self._rules:
            if func in NORMS:
                return frozen_norm(func, args, kwargs)
            if _is_denominator(func, args):
                return _constant_scale(func, func(*args, **kwargs))
        if "activation" in self._rules and func in _ACTIVATIONS and not _is_soft_cap(func, args[0]):
            kwargs.pop("inplace", None)
            return self._noted(func, args, secant(lambda x: func(x, *args[1:], **kwargs), args[0]))
        if func in _PRODUCTS and len(args) == 2 and all(map(_has_gradient, args)):
            return self._product(func, *args)
        result = func(*args, **kwargs)
        return self._noted(func, args, result) if func in _POINTWISE else result

    def _attention(self, func: Any, q: Tensor, k: Tensor, *rest: Any, **kwargs: Any) -> Any:
        self.patterns += 1
        if "attention" in self._rules:
            q, k = q.detach(), k.detach()
        return func(q, k, *rest, **kwargs)

    def _softmax(self, probabilities: Tensor) -> Tensor:
        """Attention patterns are what an attention module makes, or have four axes; a router's weights have fewer."""
        if probabilities.ndim != 4 and not self._attending:
            return probabilities
        self.patterns += 1
        return probabilities.detach() if "attention" in self._rules else probabilities

    def _root(self, x: Tensor) -> tuple[Tensor, bool]:
        """The tensor that x is a function of, element by element, and whether x is a multiple of it."""
        return self._roots.get(x, (x, True))

    def _noted(self, func: Any, args: Any, result: Tensor) -> Tensor:
        """Note the root of a function of one tensor, so that activation functions are known that are written out."""
        roots = [self._root(x) for x in args if _has_gradient(x)]
        if all(root is roots[0][0] for root, _ in roots) and result.shape == roots[0][0].shape:
            linear = len(roots) == 1 and roots[0][1] and func in _SCALINGS
            self._roots[result] = (roots[0][0], linear)
        return result

    def _product(self, func: Any, a: Tensor, b: Tensor) -> Tensor:
        (root_a, linear_a), (root_b, linear_b) = self._root(a), self._root(b)
        if root_a is root_b:
            if "activation" in self._rules and linear_a != linear_b:  # x · g(x), such as a SiLU that is written out
                a, b = (a, b.detach()) if linear_a else (a.detach(), b)
            return self._noted(func, (root_a, root_a), func(a, b))
        product: Any = func(a, b)
        one_number = (a.shape[-1:] == (1,)) != (b.shape[-1:] == (1,))
        if "gate" in self._rules and not one_number:
            product.register_hook(_half)
        return cast(Tensor, product)


def _half(gradient: Tensor) -> Tensor:
    return gradient / 2


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _is_soft_cap(func: Any, x: Tensor) -> bool:
    """A tanh of [prompts, heads, queries, keys] caps attention scores."""
    return func in _TANH and x.ndim == 4


def _is_denominator(func: Any, args: Any) -> bool:
    root = func in _POWERS and isinstance(args[-1], float) and abs(args[-1]) == 0.5
    return root or func in _RECIPROCALS or func in _LENGTHS


def _constant_scale(func: Any, scale: Tensor) -> Tensor:
    """A norm's denominator without its gradient; other roots, that give a number per feature, keep theirs."""
    return scale.detach() if func in _RECIPROCALS or scale.shape[-1:] == (1,) else scale
