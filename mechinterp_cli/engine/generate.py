"""Greedy continuations with and without edits: one whole forward pass per token, by plain hooks.

Which edits reach generated tokens: those that are made at every position of a prompt go on at every token after it
(an ablation of a head everywhere stays one); an edit at chosen positions stays where it is, and so do the keys of a
knock-out. Values that differ by position (a mean per position, noise per token) and activations of another stream are
known for the prompt's positions alone: there, generated tokens are left as they are. A prompt of a single token
counts as edited everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mechinterp_cli.engine.edits import STREAM_OPS, Bucket, Edit, Site, Trial, needed
from mechinterp_cli.engine.hooks import PlainHooks
from mechinterp_cli.engine.instrument import read_sites, visiting
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.walk import forward


@dataclass(frozen=True, eq=False)
class Continuation:
    """What a model says after some prompts.

    Args:
        ids: Token ids [prompts, n], on the CPU; after its end a prompt has its end token again.
        lengths: For every prompt how many of them it said, the end token included.
    """

    ids: Int[Tensor, "prompts n"]
    lengths: tuple[int, ...]

    def of(self, prompt: int) -> list[int]:
        """Ids that one prompt was continued with."""
        ids: list[int] = self.ids[prompt, : self.lengths[prompt]].tolist()
        return ids


def end_tokens(model: nn.Module) -> tuple[int, ...]:
    """Ids that end a text, as the model's generation config or its config says; none where neither does."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found: Any = getattr(config, "eos_token_id", None)
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    return ()


def edits_at(edits: Sequence[Edit], prompt_length: int, length: int) -> tuple[Edit, ...]:
    """The edits of a prompt of `prompt_length` tokens once it has grown to `length` tokens."""
    return tuple(_grown(edit, prompt_length, length) for edit in edits)


def _grown(edit: Edit, prompt_length: int, length: int) -> Edit:
    by_position = edit.op in ("constant", "add") and edit.values is not None and edit.values.shape[1] > 1
    if edit.op in STREAM_OPS or by_position:
        return edit
    everywhere = set(range(prompt_length))
    grown = tuple(range(length))
    return replace(edit, positions=tuple(grown if set(p) == everywhere else p for p in edit.positions))


@torch.no_grad()
def greedy(
    model: nn.Module,
    anatomy: Anatomy,
    bucket: Bucket,
    edits: Sequence[Edit],
    n: int,
    *,
    stream: str = "clean",
    ends: Sequence[int] | None = None,
) -> Continuation:
    """Continue every prompt of a bucket with the likeliest token, `n` times or up to an end token.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        bucket: Prompts of one length; `read` is not looked at.
        edits: Edits of one trial on this bucket; see the module's text for which reach the generated tokens.
        n: How many tokens.
        stream: Which of the bucket's streams is continued.
        ends: Ids that end a text; the model's own where None.

    Raises:
        UserError: The text would grow longer than the model takes.
        RunError: The logits hold NaN.
    """
    _check_length(anatomy, bucket.length, n)
    hooks = PlainHooks(model, anatomy)
    stop = torch.tensor(end_tokens(model) if ends is None else tuple(ends), dtype=torch.long)
    tokens = bucket.tokens[stream].cpu()
    activations = _sources(hooks, bucket, stream, edits)
    done = torch.zeros(bucket.size, dtype=torch.bool)
    lengths = torch.zeros(bucket.size, dtype=torch.long)
    for _ in range(n):
        chosen = _next(hooks, _longer(bucket, stream, tokens), edits, bucket.length, activations)
        chosen = torch.where(done, tokens[:, -1], chosen)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        lengths += ~done
        done |= torch.isin(chosen, stop)
        if bool(done.all()):
            break
    said = tokens[:, bucket.length :]
    missing = n - said.shape[1]
    return Continuation(torch.cat([said, tokens[:, -1:].expand(-1, missing)], 1), tuple(lengths.tolist()))


def _check_length(anatomy: Anatomy, length: int, n: int) -> None:
    longest = length + n - 1  # the last token is never read
    if anatomy.max_length is not None and longest > anatomy.max_length:
        raise UserError(
            f"generate: {n} tokens after a prompt of {length} are more than the model takes ({anatomy.max_length})",
            f"Generate {max(0, anatomy.max_length - length + 1)} tokens at most, or shorten the prompts.",
        )


def _longer(bucket: Bucket, stream: str, tokens: Tensor) -> Bucket:
    """The bucket with longer texts in one stream; what is added at `embed` stays on the prompt."""
    noise = bucket.noise.get(stream)
    padding = (0, 0, 0, tokens.shape[1] - bucket.length)
    padded = {} if noise is None else {stream: nn.functional.pad(noise, padding)}
    return Bucket.of({stream: tokens}, noise=padded)


def _next(
    hooks: PlainHooks, bucket: Bucket, edits: Sequence[Edit], prompt_length: int, activations: dict[Any, Tensor]
) -> Tensor:
    """The likeliest next token of every prompt, [prompts], on the CPU."""
    (stream,) = bucket.tokens
    trial = Trial(0, stream, edits_at(edits, prompt_length, bucket.length), tuple(range(bucket.size)))
    logits = hooks.logits(bucket, trial, activations)[:, -1].float()
    if bool(logits.isnan().any()):
        raise RunError(
            f"generate: the logits after {bucket.length} tokens hold NaN",
            "Try model.dtype: float32, or do not generate.",
        )
    return logits.argmax(-1).cpu()


def _sources(hooks: PlainHooks, bucket: Bucket, stream: str, edits: Sequence[Edit]) -> dict[tuple[str, Site], Tensor]:
    """Activations of the prompts that edits read, by stream and site."""
    reads = needed([Trial(0, stream, tuple(edits), ())])
    found: dict[tuple[str, Site], Tensor] = {}
    for name in sorted({name for name, _ in reads}):
        tokens, noise = bucket.tokens[name].to(hooks.device), bucket.noise.get(name)
        wanted = {site for other, site in reads if other == name}

        def run(tokens: Tensor = tokens) -> Tensor:
            return forward(hooks.model, tokens, last_only=True)

        with visiting(hooks.model, hooks.anatomy, *_adding(noise)):
            seen = read_sites(hooks.model, hooks.anatomy, wanted, run)
        found.update({(name, site): x for site, x in seen.items()})
    return found


def _adding(noise: Tensor | None) -> tuple[dict[int, frozenset[str]], Any]:
    """What is visited, and by whom, to add a stream's noise at `embed`."""
    if noise is None:
        return {}, lambda *_: None
    return {0: frozenset({"embed"})}, lambda _site, activation: activation + noise.to(activation)
