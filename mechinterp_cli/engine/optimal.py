"""Optimal ablation: the constant that hurts least in place of an activation (Li & Janson, 2409.09951).

For a set A of parts it is a* = argmin_a E over prompts [ loss(model with A held at a) ], one vector per site and unit,
shared over positions and prompts, and fitted jointly for all parts of the set. What remains of the loss is due to the
information that the parts carried, not to a value that the rest of the model has never seen.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.constants import Constants, Problem
from mechinterp_cli.engine.edits import Bucket, Edit
from mechinterp_cli.engine.losses import Batch, Loss
from mechinterp_cli.engine.plan import layer_parameters
from mechinterp_cli.engine.tail import Tail
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.models.anatomy import Anatomy

TOKENS_PER_BATCH = 512
"""Tokens of a mini-batch: their activations in all layers are held until the gradient is taken."""
LOGITS_BYTES = 2**27
"""Logits of a mini-batch, at most."""
CLEAN_BYTES = 2**29
"""Unedited logits that are kept; beyond that they are computed again for each mini-batch."""
EVALUATIONS = 10
"""How often the loss of all prompts is taken on the way, where they do not fit one mini-batch."""
ADAM_EPS = 1e-12
"""Losses of single neurons have gradients near 1e-8, which Adam's usual constant would swallow."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """The constants of one trial, and what they are worth on the prompts they were fitted on.

    Args:
        constants: Site to [*features], on the CPU; units that the trial does not edit are the start's.
        start: Mean loss over prompts with the start in place.
        zero: The same with zeros in place.
        after: The same with the constants: never above the lower of the two.
        curve: Loss of each step's mini-batch.
        prompts: How many prompts it was fitted on.
        layer: The first layer that was computed in each step.
    """

    constants: Constants
    start: float
    zero: float
    after: float
    curve: tuple[float, ...]
    prompts: int
    layer: int

    @property
    def improved(self) -> bool:
        """Whether the constants are better than the start."""
        return self.after < self.start


def fit_constants(
    model: nn.Module,
    anatomy: Anatomy,
    buckets: Sequence[Bucket],
    edits: Sequence[Sequence[Edit]],
    start: Constants,
    loss: Loss,
    *,
    steps: int,
    rate: float,
    seed: int,
    tick: Callable[[int], None] = lambda step: None,
) -> Fitted:
    """The constants of one trial; see `ConstantFitter`, which is faster for several."""
    return ConstantFitter(model, anatomy, buckets, loss).fit(edits, start, steps=steps, rate=rate, seed=seed, tick=tick)


def batch_size(bucket: Bucket, anatomy: Anatomy, tokens_per_batch: int = TOKENS_PER_BATCH) -> int:
    """Prompts of a bucket in a mini-batch."""
    by_logits = LOGITS_BYTES // (bucket.read.shape[1] * anatomy.vocab_size * 4)
    return max(1, min(tokens_per_batch // bucket.length, by_logits))


def fit_flops(model: nn.Module, anatomy: Anatomy, buckets: Sequence[Bucket], layer: int, steps: int) -> float:
    """What one fit takes, about: a pass back costs as much as one forward, since weights get no gradients.

    Args:
        model: The model.
        anatomy: Its anatomy.
        buckets: The prompts that are fitted on.
        layer: The first edited layer.
        steps: Steps of Adam.
    """
    batches = sum(-(-bucket.size // batch_size(bucket, anatomy)) for bucket in buckets)
    per_row = 2 * layer_parameters(model, anatomy) * (anatomy.n_layers - layer if anatomy.chained else anatomy.n_layers)
    unembedding = 2 * anatomy.vocab_size * anatomy.d_model
    once = sum(b.size * (b.length * per_row + b.read.shape[1] * unembedding) for b in buckets)
    evaluations = 5 if batches == 1 else 4 + min(steps, EVALUATIONS)
    return once * (evaluations + 2 * steps / batches)


class ConstantFitter:
    """Fits the constants of trials over the same prompts, one trial after the other.

    Shared between trials are the unedited logits, and the hidden states that enter the first edited layer: a step
    computes the layers from there on (so give trials in order of their first layer). Weights get no gradients.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        buckets: The prompts that are fitted on, and where their logits are read.
        loss: What is made small, the mean over prompts.
        stream: The stream of the buckets that is edited.
        tokens_per_batch: Size of a mini-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        buckets: Sequence[Bucket],
        loss: Loss,
        *,
        stream: str = "clean",
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> None:
        self.tail = Tail(model, anatomy, buckets, stream)
        self.loss = loss
        self._sizes = [batch_size(bucket, anatomy, tokens_per_batch) for bucket in buckets]
        self._keep = 4 * anatomy.vocab_size * sum(bucket.read.numel() for bucket in buckets) <= CLEAN_BYTES
        self._clean: dict[int, Tensor] = {}
        weights = next(model.parameters()).dtype
        self._dtype = weights if weights == torch.float64 else torch.float32

    def fit(
        self,
        edits: Sequence[Sequence[Edit]],
        start: Constants,
        *,
        steps: int,
        rate: float,
        seed: int,
        tick: Callable[[int], None] = lambda step: None,
    ) -> Fitted:
        """Fit one trial's constants by Adam, from the better of `start` and zero.

        The rate falls to zero along half a cosine, so constants move by `steps × rate / 2` scales at most.

        Args:
            edits: By bucket, the trial's edits; only site, units and positions count, and of `project` the
                directions, along which alone the constant is put. Edits of one site share its constants.
            start: Site to [*features], the mean over a data set as a rule.
            steps: Steps of Adam.
            rate: First learning rate, in root-mean-square distances of each feature from the start, over the edited
                tokens (the standard deviation, where the start is their mean).
            seed: Of the order of the prompts.
            tick: Called after each step.

        Raises:
            UserError: No prompt is edited, or a site has no constant features (`scores`, `pattern`).
            RunError: The loss at the start is not finite, or no gradient comes back to the edited sites.
        """
        problem, batches = self._problem(edits, start)
        course = _Course(self, problem, batches)
        course.descend(steps, rate, seed, tick)
        return course.fitted(self.tail.layer)

    def mean_loss(self, edits: Sequence[Sequence[Edit]], constants: Constants) -> Tensor:
        """The mean loss over the edited prompts with these constants in place, differentiable in them.

        Args:
            edits: By bucket, the trial's edits.
            constants: Site to [*features].

        Raises:
            UserError: As `fit`.
        """
        problem, batches = self._problem(edits, constants)
        losses = [self.losses(problem, problem.start, batch) for batch in batches]
        return torch.cat(losses).mean()

    def _problem(self, edits: Sequence[Sequence[Edit]], constants: Constants) -> tuple[Problem, list[Batch]]:
        """A trial as the fit needs it, and the mini-batches of the prompts that it touches."""
        problem = Problem.of(edits, constants, self.tail.device, self._dtype)
        batches = [b for bucket in range(len(edits)) for b in self._batches(bucket, problem.touched(bucket))]
        if not batches:
            raise UserError(
                f"optimal: no prompt that is fitted on has a token where {problem.names or 'anything'} is edited",
                "Give the task more prompts, or raise the share of prompts that the constant is fitted on.",
            )
        self.tail.enter(min(site.layer for site in problem.start))
        return problem, batches

    def _batches(self, bucket: int, prompts: Sequence[int]) -> Iterator[Batch]:
        """Mini-batches of some prompts of a bucket."""
        chosen = torch.tensor(prompts, dtype=torch.long, device=self.tail.device)
        for part in torch.split(chosen, self._sizes[bucket]) if len(chosen) else ():
            yield self.batch(bucket, part)

    def batch(self, bucket: int, prompts: Tensor) -> Batch:
        """Some prompts of a bucket as a loss gets them."""
        tokens, read = self.tail.tokens[bucket][prompts], self.tail.read[bucket][prompts]
        return Batch(bucket, prompts, tokens, read, lambda: self._unedited(bucket, prompts))

    @torch.no_grad()
    def _unedited(self, bucket: int, prompts: Tensor) -> Tensor:
        if not self._keep:
            return self.tail.logits(bucket, prompts)
        if bucket not in self._clean:
            every = torch.arange(len(self.tail.tokens[bucket]), device=self.tail.device)
            parts = torch.split(every, self._sizes[bucket])
            self._clean[bucket] = torch.cat([self.tail.logits(bucket, part) for part in parts])
        return self._clean[bucket][prompts]

    def losses(self, problem: Problem, constants: Constants, batch: Batch) -> Tensor:
        """Losses [n] of a batch with the constants in place."""
        visit = problem.visitor(constants, batch)
        return self.loss(self.tail.logits(batch.bucket, batch.prompts, problem.wanted, visit), batch)


class _Course:
    """The descent for one problem: the steps, and the best constants so far by the loss of all prompts."""

    def __init__(self, fitter: ConstantFitter, problem: Problem, batches: Sequence[Batch]) -> None:
        self.fitter = fitter
        self.problem = problem
        self.batches = batches
        self.prompts = sum(len(batch.prompts) for batch in batches)
        self.curve: list[float] = []
        self.best: Constants = problem.start
        self.start = self.least = self._evaluate(problem.start)
        if not math.isfinite(self.start):
            raise RunError(
                f"optimal: with the mean in place of {problem.names} the loss is {self.start}",
                "Try model.dtype: float32, or another value.",
            )
        zeros = problem.zeros()
        self.zero = self._evaluate(zeros)
        self._offer(zeros, self.zero)

    def _evaluate(self, constants: Constants) -> float:
        """Mean loss over all prompts."""
        with torch.no_grad():
            total = sum(float(self._losses(constants, batch).double().sum()) for batch in self.batches)
        return total / self.prompts

    def _losses(self, constants: Constants, batch: Batch) -> Tensor:
        return self.fitter.losses(self.problem, constants, batch)

    def _offer(self, constants: Constants, loss: float) -> None:
        """Keep constants that are better than all before; a loss of NaN is not."""
        if loss < self.least:
            self.best, self.least = {site: x.detach().clone() for site, x in constants.items()}, loss

    def descend(self, steps: int, rate: float, seed: int, tick: Callable[[int], None]) -> None:
        """Adam on the constants, in units of each feature's scale."""
        base, scales = self.best, self.problem.scales(self.fitter.tail, self.batches)
        moved = {site: torch.zeros_like(x, requires_grad=True) for site, x in base.items()}
        adam = torch.optim.Adam(moved.values(), lr=rate, eps=ADAM_EPS)
        whole = len(self.batches) == 1
        for step, batch in zip(range(steps), self._order(seed), strict=False):
            adam.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            with torch.enable_grad():
                constants = {site: base[site] + moved[site] * scales[site] for site in base}
                loss = self._losses(constants, batch).sum() * (len(self.batches) / self.prompts)
            self.curve.append(float(loss.detach()))
            if whole:
                self._offer(constants, self.curve[-1])
            self._step(adam, loss, list(moved.values()))
            if step == steps - 1 or (not whole and (step + 1) % max(1, steps // EVALUATIONS) == 0):
                constants = {site: base[site] + moved[site].detach() * scales[site] for site in base}
                self._offer(constants, self._evaluate(constants))
            tick(step)

    def _step(self, adam: torch.optim.Optimizer, loss: Tensor, moved: list[Tensor]) -> None:
        """One step; gradients are taken for the constants alone, so weights get none."""
        if not loss.requires_grad:
            raise RunError(
                f"optimal: no gradient comes back from the loss to {self.problem.names}",
                "This model or its quantisation cannot be differentiated; use another value.",
            )
        for x, gradient in zip(moved, torch.autograd.grad(loss, moved, allow_unused=True), strict=True):
            x.grad = torch.zeros_like(x) if gradient is None else gradient
        adam.step()

    def _order(self, seed: int) -> Iterator[Batch]:
        """Mini-batches without end: every epoch has each prompt once, in another order."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            epoch = [batch for batch in self._shuffled(generator)] if len(self.batches) > 1 else list(self.batches)
            for index in torch.randperm(len(epoch), generator=generator).tolist():
                yield epoch[index]

    def _shuffled(self, generator: torch.Generator) -> Iterator[Batch]:
        """The same number of batches of the same sizes, with each bucket's prompts dealt anew."""
        for bucket in sorted({batch.bucket for batch in self.batches}):
            sizes = [len(batch.prompts) for batch in self.batches if batch.bucket == bucket]
            prompts = torch.cat([batch.prompts for batch in self.batches if batch.bucket == bucket])
            order = torch.randperm(len(prompts), generator=generator).to(prompts.device)
            yield from (self.fitter.batch(bucket, part) for part in torch.split(prompts[order], sizes))

    def fitted(self, layer: int) -> Fitted:
        """The best constants, evaluated once more."""
        constants, after = self.best, self._evaluate(self.best)
        if not after <= self.start:
            constants, after = self.problem.start, self.start
        on_cpu = {site: x.cpu() for site, x in constants.items()}
        return Fitted(on_cpu, self.start, self.zero, after, tuple(self.curve), self.prompts, layer)
