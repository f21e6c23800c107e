"""Gradients of metrics with respect to activations, each reduced as soon as it is there and then dropped.

The graph of a pass begins at the lowest site that is asked for: weights get no gradients, and layers below keep
nothing. What is differentiated is the sum over prompts of each prompt's metric, so that a prompt's gradients do not
depend on what else is in the batch.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import Reader, kinds_by_layer, visiting
from mechinterp_cli.engine.tail import contiguous_head
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy, device_of
from mechinterp_cli.models.walk import MISSING, forward

EMBED = Site("embed", 0)

Differentiable = Callable[[Tensor, Tensor], Tensor]
"""(logits [n, vocab] where the answer is read, index of each prompt in its bucket [n]) to metrics [n, metrics]."""

Use = Callable[[Site, int, Tensor, Tensor], None]
"""Gets a site, a metric's index, and activation and gradient there, both [n, positions, *features]."""

Context = Callable[[], AbstractContextManager[None]]
"""Makes a context anew for each pass."""


@dataclass(frozen=True, eq=False)
class Pass:
    """The prompts of one forward pass.

    Args:
        tokens: Ids, all of one length.
        read: The position of each prompt whose logits are measured.
        prompts: Index of each prompt in its bucket, for the metric.
        embed: What enters layer 0 in place of the tokens' embeddings.
    """

    tokens: Int[Tensor, "n positions"]
    read: Int[Tensor, " n"]
    prompts: Int[Tensor, " n"]
    embed: Float[Tensor, "n positions d_model"] | None = None

    def logits(self, model: nn.Module) -> Float[Tensor, "n vocab"]:
        """The logits that are read, of a native pass."""
        device = device_of(model)
        last_only = bool((self.read == self.tokens.shape[1] - 1).all())
        with contiguous_head(model):
            logits = forward(model, self.tokens.to(device), last_only=last_only)
        return logits[:, -1] if last_only else logits[torch.arange(len(self.read)), self.read.to(device)]


def differentiated(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: Pass,
    metric: Differentiable,
    sites: Collection[Site],
    use: Use,
    *,
    rules: Context = nullcontext,
    checkpointing: bool = False,
) -> Float[Tensor, "n metrics"]:
    """One forward pass, and one backward pass per metric that hands every site's gradient to `use`.

    Args:
        model: The model, in evaluation mode; its weights may be frozen or not, and stay as they are.
        anatomy: Its anatomy.
        prompts: What is run.
        metric: What is differentiated.
        sites: Where.
        use: Gets the gradients, from the last site to the first.
        rules: What holds during the forward and backward passes, such as `relevance_rules`.
        checkpointing: Keep nothing inside layers, and compute them again in the backward pass.

    Returns:
        The metrics.

    Raises:
        UserError: A layer lacks a site, or nothing can be differentiated there.
    """
    with graph(model, anatomy, prompts, metric, sites, rules=rules, checkpointing=checkpointing) as found:
        for index in range(found.metrics):
            found.backward(index, use, last=index == found.metrics - 1)
        return found.values.detach()


@torch.no_grad()
def observed(
    model: nn.Module, anatomy: Anatomy, prompts: Pass, metric: Differentiable, sites: Collection[Site]
) -> tuple[Float[Tensor, "n metrics"], dict[Site, Tensor]]:
    """Metrics and activations of a pass without gradients.

    Args:
        model: The model.
        anatomy: Its anatomy.
        prompts: What is run.
        metric: What is measured.
        sites: What is read.
    """
    reader, embed = Reader(), prompts.embed

    def visit(site: Site, activation: Tensor) -> Tensor | None:
        placed = embed.to(activation) if site == EMBED and embed is not None else None
        if site in wanted:
            reader(site, activation if placed is None else placed)
        return placed

    wanted = frozenset(sites)
    visited = wanted if embed is None else wanted | {EMBED}
    with visiting(model, anatomy, kinds_by_layer(set(visited)), visit):
        values = metric(prompts.logits(model), prompts.prompts.to(device_of(model)))
    return values, reader.seen


@contextmanager
def graph(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: Pass,
    metric: Differentiable,
    sites: Collection[Site],
    *,
    rules: Context = nullcontext,
    inside: Context = nullcontext,
    checkpointing: bool = False,
) -> Iterator["Graph"]:
    """One forward pass that can be differentiated several times.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        prompts: What is run.
        metric: What is differentiated.
        sites: Where gradients are wanted.
        rules: Entered before the sites are visited, so that what it changes is computed between them, and before
            checkpointing, so that it holds where layers are computed again.
        inside: Entered after that, so that it sees what the model itself hands over.
        checkpointing: As in `differentiated`.

    Raises:
        UserError: A layer lacks a site, or an activation there has no gradient.
    """
    check_sites(anatomy, sites)
    found = Graph(sites, None if prompts.embed is None else prompts.embed.to(device_of(model)))
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_frozen(model))
        stack.callback(found.close)
        stack.enter_context(rules())
        stack.enter_context(_checkpointed(model, anatomy) if checkpointing else nullcontext())
        stack.enter_context(visiting(model, anatomy, kinds_by_layer(found.visited), found.visit))
        stack.enter_context(inside())
        found.measure(metric(prompts.logits(model), prompts.prompts.to(device_of(model))))
        yield found


def graph_bytes(
    model: nn.Module, anatomy: Anatomy, prompts: Pass, metric: Differentiable, sites: Collection[Site]
) -> int:
    """Bytes that a pass without checkpointing holds until its backward pass, weights and buffers apart.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        prompts: What is run.
        metric: What is differentiated.
        sites: Where gradients are wanted; their activations are counted.
    """
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def hold(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    saving = torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x)
    with saving, graph(model, anatomy, prompts, metric, sites) as found:
        for activation in found.activations.values():
            hold(activation)
    return sum(held.values())


class Graph:
    """What `graph` gives: metrics, and backward passes from them.

    Args:
        sites: Where gradients are wanted.
        embed: What enters layer 0, or None for the model's own.

    Attributes:
        values: The metrics, [n, metrics].
        activations: What the pass had at the sites.
    """

    def __init__(self, sites: Collection[Site], embed: Tensor | None) -> None:
        self.sites = frozenset(sites)
        self.values: Tensor = torch.empty(0, 0)
        self._embed = embed
        self._recording = True
        self._starts: list[Tensor] = []
        self.activations: dict[Site, Tensor] = {}
        self._hand_on: Callable[[Site, Tensor], Tensor | None] = lambda _site, _gradient: None

    @property
    def visited(self) -> set[Site]:
        """Where the pass is met."""
        return {*self.sites} if self._embed is None else {EMBED, *self.sites}

    @property
    def metrics(self) -> int:
        """How many there are."""
        return self.values.shape[1]

    def visit(self, site: Site, activation: Tensor) -> Tensor:
        """Visitor of the pass."""
        if site == EMBED and self._embed is not None:
            activation = self._embed.to(activation.dtype)
        return self._watched(site, activation) if site in self.sites else activation

    def _watched(self, site: Site, activation: Tensor) -> Tensor:
        """A copy that takes the activation's place: later code may change that in place, but not what is kept."""
        if not activation.is_floating_point():
            raise no_gradient({site}, "integers have none")
        start = activation
        if not activation.requires_grad:
            start = activation.detach().requires_grad_()
        watched: Any = start.clone()
        if self._recording:  # a layer that is computed again, by checkpointing, is not
            self._starts.extend([start] if start.is_leaf else [])
            self.activations[site] = start.detach()
            watched.register_hook(partial(self._arrived, site))
        return cast(Tensor, watched)

    def _arrived(self, site: Site, gradient: Tensor) -> Tensor | None:
        return self._hand_on(site, gradient)

    def measure(self, values: Tensor) -> None:
        """End of the forward pass.

        Raises:
            UserError: The metrics do not depend on any site in a way that can be differentiated.
        """
        self._recording = False
        if not values.requires_grad:
            raise no_gradient(self.sites, "the metric does not depend on them in a way that can be differentiated")
        self.values = values

    def backward(self, metric: int, use: Use, *, silenced: Collection[Site] = frozenset(), last: bool = False) -> None:
        """One backward pass.

        Args:
            metric: Which metric.
            use: Gets each site's gradient.
            silenced: Sites whose gradient is set to zero, there and in all that it would reach through them.
            last: Whether the graph may be freed.

        Raises:
            UserError: No gradient came to a site.
        """
        waiting = set(self.sites)

        def hand_on(site: Site, gradient: Tensor) -> Tensor | None:
            waiting.discard(site)
            silent = site in silenced
            gradient = torch.zeros_like(gradient) if silent else gradient
            use(site, metric, self.activations[site], gradient)
            return gradient if silent else None

        self._hand_on = hand_on
        total = self.values[:, metric].sum()
        torch.autograd.grad(total, self._starts, retain_graph=not last, allow_unused=True)
        if waiting:
            raise no_gradient(waiting, "the metric does not depend on it in a way that can be differentiated")

    def close(self) -> None:
        """Let go of the pass: its graph holds hooks that hold this object, which must not hold the graph."""
        self._starts, self.activations = [], {}
        self.values = self.values.detach()
        self._hand_on = lambda _site, _gradient: None


def check_sites(anatomy: Anatomy, sites: Collection[Site]) -> None:
    """Refuse sites that a layer does not have.

    Raises:
        UserError: Names the first, and why.
    """
    for site in sorted(sites):
        reason = anatomy.layers[site.layer].missing.get(site.kind)
        if reason is not None:
            raise UserError(
                f"layer {site.layer} has no {site.kind}: {reason}",
                f"It has {', '.join(anatomy.layers[site.layer].sites)}.",
            )


def no_gradient(sites: Collection[Site], reason: str) -> UserError:
    """What is said of sites that cannot be differentiated at."""
    names = ", ".join(f"{site.kind} of layer {site.layer}" for site in sorted(sites)[:3])
    more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
    return UserError(
        f"there is no gradient at {names}{more}: {reason}",
        "Leave these sites out, or measure their effects exactly with patch.",
    )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Weights take no part in the graph; afterwards they are as they were."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


@contextmanager
def _checkpointed(model: nn.Module, anatomy: Anatomy) -> Iterator[None]:
    """Every layer keeps its input alone; what stood in the instance (accelerate's hooks) is put back."""
    layers = [model.get_submodule(layer.module) for layer in anatomy.layers]
    kept = [layer.__dict__.get("forward", MISSING) for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
        with set_checkpoint_early_stop(False):  # hooks that move weights want each layer to come to its end
            yield
    finally:
        for layer, own in zip(layers, kept, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not MISSING:
                layer.__dict__["forward"] = own
