"""From prompts to buckets and metrics: what is computed on, and what is read off the logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp_cli.config.base import TaskOptions
from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.engine.capture import embeddings, last_logits
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.methods.job import SetMeasure
from mechinterp_cli.metrics import Measurer, find_metric
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.tasks.build import build, drop
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from mechinterp_cli.tasks.registry import tasks_with_answers
from mechinterp_cli.tasks.spans import resolve_span

TOKENS_PER_BUCKET = 2**15
"""Prompts of one length are split where together they would have more tokens than this."""


def build_prompts(task: TaskOptions, model: LoadedModel) -> PromptSet:
    """A task's prompts, checked against the model's tokenizer and context.

    Raises:
        UserError: The task cannot be built.
    """
    return build(task, model.tokenizer, max_length=model.anatomy.max_length, vocab_size=model.embedding_rows)


def split_members(prompts: PromptSet, draws: int = 1) -> list[tuple[int, ...]]:
    """Indices of the prompts of each bucket: one exact length, templates together, not too many tokens."""
    buckets: list[tuple[int, ...]] = []
    for length, members in prompts.buckets().items():
        order = sorted(members, key=lambda i: (prompts.prompts[i].template, i))
        step = max(2, TOKENS_PER_BUCKET // (length * draws))
        buckets += [tuple(order[i : i + step]) for i in range(0, len(order), step)]
    return buckets


def clean_logits(model: LoadedModel, prompts: PromptSet) -> Tensor:
    """Logits [prompts, vocab] of every clean prompt at its last position."""
    out = torch.empty(len(prompts.prompts), model.anatomy.vocab_size)
    for members in split_members(prompts):
        tokens = torch.tensor([prompts.prompts[i].clean_tokens for i in members])
        out[list(members)] = last_logits(model.model, tokens)
    return out


def select(setting: Setting, *, top: bool = False) -> tuple[PromptSet, Tensor | None]:
    """The prompts that are kept, and their clean logits [prompts, vocab] where a metric needs them.

    Without forward passes all are kept and logits are zero.

    Args:
        setting: Config, model and prompts; `task.keep` says whether prompts that the model gets wrong are dropped.
        top: Drop, whatever it says, those whose answer is not the model's first choice (causal tracing).

    Raises:
        UserError: As `keep_correct`; or prompts would be dropped at every checkpoint anew.
    """
    prompts, model = setting.prompts, setting.model
    correct = top or setting.loaded.config.resolved()["task"].get("keep") == "correct"
    if correct and setting.moment.name is not None:
        key = "patch.tracing: drops" if top else "task.keep: correct drops"
        problem = f"{key} the prompts that a model gets wrong, which are others at each checkpoint"
        raise UserError(problem, "Leave out model.checkpoints, or keep all prompts.")
    if not correct and not needs_clean_logits(setting.loaded):
        return prompts, None
    if not setting.compute:
        return prompts, torch.zeros(len(prompts.prompts), model.anatomy.vocab_size)
    setting.progress.stage(f"{setting.moment.heading}running the clean prompts")
    logits = clean_logits(model, prompts)
    return keep_correct(prompts, logits, top=top) if correct else (prompts, logits)


def keep_correct(prompts: PromptSet, logits: Tensor, *, top: bool) -> tuple[PromptSet, Tensor]:
    """Drop the prompts that the model gets wrong.

    Args:
        prompts: The set.
        logits: `[prompts, vocab]`, clean.
        top: Whether the answer must be the model's first choice of all tokens (causal tracing), or only
            beat the wrong answer.

    Returns:
        The set and the logits that are left.

    Raises:
        UserError: None is left, or a prompt has no answer.
    """
    if not all(prompt.answer for prompt in prompts.prompts):
        key = "patch.tracing" if top else "task.keep"
        cause = f"{key}: the answer must be right, and prompts of task {prompts.task!r} have none"
        raise UserError(cause, f"Use a task with answers: {', '.join(tasks_with_answers())}.")
    wrong = [i for i, prompt in enumerate(prompts.prompts) if not _correct(prompt, logits[i], top=top)]
    if len(wrong) == len(prompts.prompts):
        if top:
            problem = f"patch.tracing: the answer is the model's first choice on none of the {len(wrong)} prompts"
            raise UserError(problem, "Use other prompts, or another model.")
        problem = f"task.keep: the model gets none of the {len(wrong)} prompts right"
        raise UserError(problem, "Use keep: all, or another model.")
    left = [i for i in range(len(prompts.prompts)) if i not in set(wrong)]
    reason = "the model's first token is not the answer" if top else "the model prefers the wrong answer"
    return drop(prompts, wrong, reason), logits[left]


def _correct(prompt: Prompt, logits: Tensor, *, top: bool) -> bool:
    if top or not prompt.wrong_answer:
        return int(logits.argmax()) in prompt.answer
    return bool(logits[list(prompt.answer)].logsumexp(0) > logits[list(prompt.wrong_answer)].logsumexp(0))


def embedding_spread(model: LoadedModel, prompts: PromptSet, span: str) -> float:
    """Standard deviation of a span's embeddings over all its tokens and features, where noise is added.

    ROME (2202.05262) measures one scalar over the subject tokens of the data set.
    """
    spans = resolve_span(prompts, span)
    seen = []
    for members in split_members(prompts):
        tokens = torch.tensor([prompts.prompts[i].clean_tokens for i in members])
        entering = embeddings(model.model, model.anatomy, tokens).float().cpu()
        seen += [entering[row, list(spans[i])].flatten() for row, i in enumerate(members)]
    return float(torch.cat(seen).double().std(correction=0))


@dataclass(frozen=True, eq=False)
class Metrics:
    """The run's metrics over all its prompts.

    Args:
        names: Their names, in the order of the last axis of all values.
        measurer: Computes them.
    """

    names: tuple[str, ...]
    measurer: Measurer

    @classmethod
    def of(cls, names: Sequence[str], prompts: PromptSet, logits: Tensor | None, model: LoadedModel) -> "Metrics":
        """Metrics of a prompt set; `logits` are the clean ones, needed by `kl`."""
        measurer = Measurer(names, prompts.prompts, logits, device=device_of(model.model))
        return cls(tuple(names), measurer)

    def on(self, members: Sequence[int]) -> SetMeasure:
        """The measure of a bucket whose prompts are these of the set (repeated for draws)."""
        return SetMeasure(self.measurer, torch.tensor(members))

    def of_stream(self, model: LoadedModel, tokens: Tensor, members: Sequence[int]) -> Tensor:
        """[prompts, metrics] of prompts of one length as they are, on the CPU.

        Args:
            model: The model.
            tokens: Ids [prompts, positions].
            members: Which of the set's prompts they are.
        """
        logits = last_logits(model.model, tokens).to(device_of(model.model))
        return self.measurer(logits, torch.tensor(members, device=logits.device)).cpu()


def needs_clean_logits(loaded: LoadedConfig) -> bool:
    """Whether a metric compares with the clean run's whole distribution."""
    return any(find_metric(name).needs_reference for name in loaded.config.metrics)
