"""What is read from the logits at the answer position, one number per item.

A metric is a function of a `Readout` and stands in `METRICS` by its own name; adding one is adding a decorated
function here. All logits are raised to float32 at least, all sums over the vocabulary are taken in float64, and the
results are float64 (float32 on devices that have no float64). Float64 logits are worked in float64 throughout.

An answer may be a set of tokens: its logit is then the log-sum-exp of the set's logits, its probability their sum.
A row of logits that holds a NaN anywhere gives NaN in every metric.

Unless a metric says otherwise it may look at every token's logit. Where all metrics of a run look at answers and wrong
answers alone, these tokens' logits are all that has to be computed (`Measurer.tokens`, `Measurer.on_columns`).
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_cli.errors import UserError
from mechinterp_cli.metric_names import no_metric
from mechinterp_cli.tasks.prompts import Prompt
from mechinterp_cli.tasks.registry import tasks_with_answers
from mechinterp_cli.token_sets import TokenSets

ROWS_PER_CHUNK = 64
"""Rows of a whole vocabulary measured at once: temporaries stay near 13 MB each at 49,152 tokens."""
WIDTH_OF_CHUNK = 8192
"""Of some tokens' logits so many times more rows are measured at once as these tokens fit into this many."""


@dataclass(frozen=True)
class Reference:
    """The clean stream at the answer position, of every prompt."""

    logits: Float[Tensor, "prompts vocab"]
    probabilities: Float[Tensor, "prompts vocab"]
    log_partition: Float[Tensor, " prompts"]

    @classmethod
    def of(cls, logits: Float[Tensor, "prompts vocab"]) -> "Reference":
        """Takes the softmax of the clean logits once."""
        logits = at_least_float32(logits)
        partition = log_partition(logits)
        return cls(logits, (logits - partition.to(logits.dtype)[:, None]).exp_(), partition)

    def expected_drop(
        self, logits: Float[Tensor, "items vocab"], prompt_index: Int[Tensor, " items"]
    ) -> Float[Tensor, " items"]:
        """Σ_vocab p_clean (clean logit − logit), per item.

        Differences first: near the reference they are small, and so is what rounding leaves.
        """
        own, weights = self.logits.to(logits.dtype), self.probabilities.to(logits.dtype)
        if logits.device.type == "cpu":
            # Row by row nothing is copied: four times as fast as gathering the items' references.
            pairs = zip(prompt_index.tolist(), logits, strict=True)
            drop = torch.stack([torch.dot(weights[i], own[i] - row) for i, row in pairs])
        else:
            drop = torch.linalg.vecdot(weights[prompt_index], own[prompt_index] - logits)
        odd = ~drop.isfinite()
        if bool(odd.any()):
            # A token that the clean stream forbids (minus infinity) weighs nothing: 0 · ∞ is 0 here.
            at = prompt_index[odd]
            differences = (own[at] - logits[odd]).masked_fill(weights[at] == 0, 0)
            drop[odd] = (weights[at] * differences).sum(-1)
        return _to_sum_dtype(drop)


@dataclass(frozen=True)
class Targets:
    """What the items of one chunk are measured against."""

    prompt_index: Int[Tensor, " items"]
    answer: TokenSets
    wrong: TokenSets
    reference: Reference | None = None
    """For `kl`."""


@dataclass(frozen=True)
class Readout:
    """Logits of a chunk of items, with what several metrics need of them computed once."""

    logits: Float[Tensor, "items vocab"]
    """Float32 or float64."""
    targets: Targets

    @cached_property
    def poison(self) -> Float[Tensor, " items"]:
        """NaN where the item's logits hold a NaN, else 0 (a maximum passes NaN on)."""
        top = self.logits.amax(-1)
        return _to_sum_dtype(torch.where(top.isnan(), top, 0))

    @cached_property
    def log_partition(self) -> Float[Tensor, " items"]:
        """Log-sum-exp of all logits."""
        return log_partition(self.logits)

    @cached_property
    def answer(self) -> Float[Tensor, " items"]:
        """Log-sum-exp of the answer set's logits."""
        return _set_logit(self.targets.answer, self.logits)

    @cached_property
    def wrong(self) -> Float[Tensor, " items"]:
        """Log-sum-exp of the wrong answer set's logits."""
        return _set_logit(self.targets.wrong, self.logits)


MetricFunction = Callable[[Readout], Tensor]


@dataclass(frozen=True)
class Metric:
    """A metric and what has to be known to bind, normalise and label it."""

    name: str
    function: MetricFunction
    label: str
    """For axes and captions, with the unit where there is one."""
    needs_answer: bool = True
    """Every prompt must have an answer."""
    needs_wrong: bool = False
    """Every prompt must have a wrong answer."""
    needs_reference: bool = False
    """The clean stream's logits must be given."""
    higher_is_better: bool = True
    """Whether more of it means that the model holds the correct answer more firmly."""
    ratio_of_means_only: bool = False
    """Single prompts' denominators are often 0, so the mean of ratios is refused."""
    differentiable: bool = True
    """Whether it has a gradient; a count has none."""
    whole_vocabulary: bool = True
    """Whether it looks at other tokens' logits than those of answers and wrong answers."""


METRICS: dict[str, Metric] = {}


def _metric(label: str, **facts: bool) -> Callable[[MetricFunction], MetricFunction]:
    """Registers a function under its own name; `facts` are fields of `Metric`."""

    def register(function: MetricFunction) -> MetricFunction:
        METRICS[function.__name__] = Metric(function.__name__, function, label, **facts)
        return function

    return register


@_metric("logit difference", needs_wrong=True, whole_vocabulary=False)
def logit_diff(readout: Readout) -> Float[Tensor, " items"]:
    """Log-sum-exp of the answer's logits minus that of the wrong answer's (log odds, in nats).

    Normalised: `(patched − base) / (source − base)`; denoising has base = corrupt and source = clean, noising the
    other way about, so 0 is no effect and 1 is fully restored (or fully broken).
    """
    return readout.answer - readout.wrong


@_metric("probability")
def prob(readout: Readout) -> Float[Tensor, " items"]:
    """Probability of the answer: the sum over its tokens, in [0, 1].

    Normalised as `logit_diff`. It hides components that push the answer down where its probability is near 0
    (Zhang & Nanda 2309.16042).
    """
    return logprob(readout).exp()


@_metric("probability difference", needs_wrong=True)
def prob_diff(readout: Readout) -> Float[Tensor, " items"]:
    """Probability of the answer minus that of the wrong answer, in [−1, 1]. Normalised as `logit_diff`."""
    return prob(readout) - (readout.wrong - readout.log_partition).exp()


@_metric("log-probability (nats)")
def logprob(readout: Readout) -> Float[Tensor, " items"]:
    """Natural logarithm of the answer's probability, at most 0. Normalised as `logit_diff`."""
    return readout.answer - readout.log_partition


@_metric("rank (0 is the top)", higher_is_better=False, ratio_of_means_only=True, differentiable=False)
def rank(readout: Readout) -> Float[Tensor, " items"]:
    """Number of tokens whose logit is strictly higher than the answer's best; 0 is the top.

    Normalised as `logit_diff`, by the ratio of means only: most prompts' clean and corrupt ranks are equal.
    """
    return _to_sum_dtype((readout.logits > _best_answer(readout)).sum(-1))


@_metric("KL to clean (nats)", needs_answer=False, needs_reference=True, higher_is_better=False)
def kl(readout: Readout) -> Float[Tensor, " items"]:
    """Σ_vocab p_clean (log p_clean − log p), in nats: a sum over the vocabulary, never a mean.

    The reference is the clean stream in both directions. Normalised as `logit_diff`: KL of the clean stream is 0, so
    denoising gives `1 − KL / KL_corrupt` and noising `KL / KL_corrupt`.

    Raises:
        ValueError: The targets hold no reference.
    """
    reference, index = readout.targets.reference, readout.targets.prompt_index
    if reference is None:
        raise ValueError("kl needs the clean stream's logits")
    return reference.expected_drop(readout.logits, index) + readout.log_partition - reference.log_partition[index]


@_metric("accuracy", ratio_of_means_only=True, differentiable=False)
def accuracy(readout: Readout) -> Float[Tensor, " items"]:
    """1 where the answer beats the wrong answer strictly (`logit_diff` > 0), else 0; a tie is 0.

    A prompt without a wrong answer is measured against the whole vocabulary: 1 where the answer's best token is
    strictly above every token outside the answer. Normalised as `logit_diff`, by the ratio of means only.
    """
    has_wrong = readout.targets.wrong.mask.any(-1)
    beats_wrong = readout.answer > readout.wrong
    if bool(has_wrong.all()):
        return _to_sum_dtype(beats_wrong)
    others = readout.logits.scatter(1, readout.targets.answer.ids, -torch.inf)
    # Padding of the answer set points at token 0, which must stay unless it is an answer itself.
    zero_is_answer = ((readout.targets.answer.ids == 0) & readout.targets.answer.mask).any(-1)
    others[:, 0] = torch.where(zero_is_answer, -torch.inf, readout.logits[:, 0])
    beats_all = _best_answer(readout)[:, 0] > others.amax(-1)
    return _to_sum_dtype(torch.where(has_wrong, beats_wrong, beats_all))


def log_partition(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Log-sum-exp over the vocabulary, summed in float64 (1e-8 for float32 logits, where a float32 sum has 1e-6)."""
    top = logits.amax(-1, keepdim=True)
    # A row whose maximum is infinite has no partition but itself; subtracting it would hide minus infinity as NaN.
    shift = top.masked_fill(top.isinf(), 0)
    total = (logits - shift).exp_().sum(-1, dtype=_sum_dtype(logits))
    return total.log() + _to_sum_dtype(shift[:, 0])


class Measurer:
    """Several metrics of any number of items in one pass.

    Args:
        names: Metrics, in the order of the columns.
        prompts: Every prompt of the set; items refer to them by index.
        reference_logits: `[prompts, vocab]`, the clean stream at the answer position; needed by `kl`.
        device: Where the logits will be.

    Raises:
        UserError: A metric is unknown, or a prompt lacks the answer or the wrong answer that it needs.
        ValueError: `kl` without reference logits.
    """

    def __init__(
        self,
        names: Sequence[str],
        prompts: Sequence[Prompt],
        reference_logits: Float[Tensor, "prompts vocab"] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Checks the prompts and pads their answer sets, once."""
        self.metrics = tuple(find_metric(name) for name in names)
        check_prompts(self.metrics, prompts)
        if reference_logits is None and any(metric.needs_reference for metric in self.metrics):
            raise ValueError("kl needs the clean stream's logits")
        self.device = device = torch.device(device)
        self._answer = TokenSets.of([prompt.answer for prompt in prompts], device)
        self._wrong = TokenSets.of([prompt.wrong_answer for prompt in prompts], device)
        self._reference = None if reference_logits is None else Reference.of(reference_logits.detach().to(device))
        self._largest_id = max((token for p in prompts for token in (*p.answer, *p.wrong_answer)), default=0)
        self._rows = ROWS_PER_CHUNK

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns that a call gives."""
        return tuple(metric.name for metric in self.metrics)

    def tokens(self, prompts: Int[Tensor, " prompts"]) -> Int[Tensor, " tokens"] | None:
        """Ids whose logits are all that is looked at on some prompts, in order; None where it may be any."""
        if any(metric.whole_vocabulary for metric in self.metrics):
            return None
        tokens: Tensor = torch.unique(torch.cat([sets.at(prompts).tokens() for sets in (self._answer, self._wrong)]))
        return tokens

    def on_columns(self, tokens: Int[Tensor, " tokens"]) -> "Measurer":
        """The same metrics of logits [items, tokens] that hold these tokens alone: ids in order, on the device.

        Only prompts whose `tokens` are among them may be measured.
        """
        narrow = copy(self)
        narrow._answer, narrow._wrong = self._answer.among(tokens), self._wrong.among(tokens)
        narrow._largest_id, narrow._reference = 0, None
        narrow._rows = ROWS_PER_CHUNK * max(1, WIDTH_OF_CHUNK // len(tokens))
        return narrow

    @torch.no_grad()
    def __call__(
        self, logits: Float[Tensor, "items vocab"], prompt_index: Int[Tensor, " items"]
    ) -> Float[Tensor, "items metrics"]:
        """Measures the items.

        Args:
            logits: At the answer position, of any floating type.
            prompt_index: Which prompt each item belongs to.

        Returns:
            Float64 (float32 where the device has none), on the device of the logits.

        Raises:
            UserError: An answer's token id is outside the logits' vocabulary.
        """
        return self._measured(logits, prompt_index)

    def differentiable(
        self, logits: Float[Tensor, "items vocab"], prompt_index: Int[Tensor, " items"]
    ) -> Float[Tensor, "items metrics"]:
        """The same numbers with their gradients; refuses metrics that have none (`Metric.differentiable`)."""
        for metric in (metric for metric in self.metrics if not metric.differentiable):
            others = ", ".join(sorted(name for name, other in METRICS.items() if other.differentiable))
            raise UserError(f"metrics: {metric.name} is a count and has no gradient", f"Choose from {others}.")
        return self._measured(logits, prompt_index)

    def _measured(self, logits: Tensor, prompt_index: Tensor) -> Tensor:
        if self._largest_id >= logits.shape[1]:
            raise UserError(
                f"answer token id {self._largest_id} is outside the model's vocabulary of {logits.shape[1]} tokens",
                "Use the tokenizer that belongs to the model.",
            )
        chunks = [self._columns(chunk) for chunk in self._readouts(logits, prompt_index)]
        empty = logits.new_empty((0, len(self.metrics)), dtype=_sum_dtype(logits))
        return torch.cat(chunks) if chunks else empty

    def _readouts(self, logits: Tensor, prompt_index: Tensor) -> Iterator[Readout]:
        for start in range(0, len(logits), self._rows):
            index = prompt_index[start : start + self._rows]
            targets = Targets(index, self._answer.at(index), self._wrong.at(index), self._reference)
            yield Readout(at_least_float32(logits[start : start + self._rows]), targets)

    def _columns(self, readout: Readout) -> Tensor:
        return torch.stack([metric.function(readout) + readout.poison for metric in self.metrics], dim=-1)


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        UserError: There is none.
    """
    if name not in METRICS:
        raise no_metric(name)
    return METRICS[name]


def check_prompts(metrics: Sequence[Metric], prompts: Sequence[Prompt], task: str = "") -> None:
    """Refuses metrics that the prompts cannot serve; to be called before any forward pass.

    Args:
        metrics: What is to be measured.
        prompts: The prompts.
        task: Their task's name, for the message.

    Raises:
        UserError: A prompt lacks the answer or the wrong answer that a metric needs.
    """
    of = f" of task {task!r}" if task else ""
    answer = next((metric.name for metric in metrics if metric.needs_answer), None)
    wrong = next((metric.name for metric in metrics if metric.needs_wrong), None)
    for index, prompt in enumerate(prompts):
        if answer is not None and not prompt.answer:
            free = " or ".join(sorted(name for name, metric in METRICS.items() if not metric.needs_answer))
            remedy = f"Use {free}, or a task with answers: {', '.join(tasks_with_answers())}."
            raise UserError(f"metrics: {answer} needs an answer, and prompt {index}{of} has none", remedy)
        if wrong is not None and not prompt.wrong_answer:
            remedy = "Give every prompt a `wrong_answer`, or use prob, logprob, rank, accuracy or kl."
            raise UserError(f"metrics: {wrong} needs a wrong answer, and prompt {index}{of} has none", remedy)


def _best_answer(readout: Readout) -> Tensor:
    return readout.targets.answer.gather(readout.logits).amax(-1, keepdim=True)


def _set_logit(tokens: TokenSets, logits: Tensor) -> Tensor:
    return _to_sum_dtype(tokens.gather(logits)).logsumexp(-1)


def at_least_float32(values: Tensor) -> Tensor:
    """Logits in float32, or float64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


def _to_sum_dtype(values: Tensor) -> Tensor:
    return values.to(_sum_dtype(values))
