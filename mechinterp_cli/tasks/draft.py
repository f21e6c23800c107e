"""From a prompt as text to a prompt as tokens, with every check that a single prompt can be put to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.options import CommonOptions
from mechinterp_cli.tasks.prompts import Prompt
from mechinterp_cli.tasks.spans import all_spans, span_positions
from mechinterp_cli.tasks.tokenise import Encoded, Encoder, Range, UnknownWordError

Answers = tuple[str | int, ...]
"""Texts, or token ids where a file gives those."""


@dataclass(frozen=True)
class Draft:
    """A prompt before it is tokenised."""

    where: str
    """What an error calls it, such as `prompts.csv line 7`."""
    clean: str
    answer: Answers
    corrupt: str | None = None
    wrong_answer: Answers = ()
    spans: Mapping[str, Range] = field(default_factory=dict)
    """Span name to characters of `clean`."""
    neighbours: tuple[str, ...] = ()
    """Spans named from others, such as `S1+1`."""
    group: str = ""
    template: str = ""
    """Empty where unknown: the prompt's length then stands in, since positions cannot mean the same across lengths."""
    cluster: str = ""


def finish(draft: Draft, encoder: Encoder, options: CommonOptions) -> Prompt:
    """Tokenise a draft and check it.

    Args:
        draft: The prompt as text.
        encoder: The tokenizer and the model's limits.
        options: What the user asked for; `answer_tokens` is used.

    Raises:
        UserError: Clean and corrupt differ in length, an answer is not one token, answer and wrong answer are the
            same, a span is not in the prompt, or the prompt does not suit the model.
    """
    clean = encoder.encode(draft.clean, f"{draft.where}: clean")
    corrupt = None if draft.corrupt is None else encoder.encode(draft.corrupt, f"{draft.where}: corrupt")
    if corrupt is not None:
        _check_lengths(clean, corrupt, encoder, draft.where)
    answer = _answer_ids(draft.answer, clean, encoder, options, f"{draft.where}: answer")
    wrong = _answer_ids(draft.wrong_answer, clean, encoder, options, f"{draft.where}: wrong_answer")
    if not answer:
        raise UserError(f"{draft.where}: there is no answer", "Give the text that should come next.")
    _check_different(draft, answer, wrong, encoder)
    prompt = Prompt(
        clean=draft.clean,
        clean_tokens=clean.tokens,
        answer=answer,
        answer_text=_shown(draft.answer, encoder),
        corrupt=draft.corrupt,
        corrupt_tokens=None if corrupt is None else corrupt.tokens,
        wrong_answer=wrong,
        wrong_answer_text=_shown(draft.wrong_answer, encoder),
        spans=all_spans(clean, draft.spans, draft.where),
        group=draft.group,
        template=draft.template or f"length-{len(clean.tokens)}",
        cluster=draft.cluster,
    )
    near = {name: span_positions(prompt, name) for name in draft.neighbours}
    return replace(prompt, spans={**prompt.spans, **near})


def unasked(draft: Draft, encoded: Encoded) -> Prompt:
    """Make a prompt of a draft that asks nothing; its answers and its corrupt prompt are not looked at.

    Args:
        draft: The prompt as text.
        encoded: Its clean text, tokenised.

    Raises:
        UserError: A span is not in the prompt.
    """
    return Prompt(
        clean=draft.clean,
        clean_tokens=encoded.tokens,
        answer=(),
        answer_text="",
        spans=all_spans(encoded, draft.spans, draft.where),
        group=draft.group,
        template=draft.template or f"length-{len(encoded.tokens)}",
        cluster=draft.cluster,
    )


def by_lengths(prompt: Prompt, label: str, spans: Iterable[str]) -> Prompt:
    """The prompt with a template that says how many tokens its spans have, since longer ones shift what follows.

    Args:
        prompt: A prompt with these spans.
        label: What the template is called.
        spans: Spans whose words differ from prompt to prompt.
    """
    return replace(prompt, template="-".join([label, *(str(len(prompt.spans[name])) for name in spans)]))


def _check_lengths(clean: Encoded, corrupt: Encoded, encoder: Encoder, where: str) -> None:
    if len(clean.tokens) == len(corrupt.tokens):
        return
    pairs = enumerate(zip(clean.tokens, corrupt.tokens, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(clean.tokens), len(corrupt.tokens)))
    left, right = (encoder.strings(e.tokens[at : at + 4]) for e in (clean, corrupt))
    cause = (
        f"{where}: clean has {len(clean.tokens)} tokens and corrupt has {len(corrupt.tokens)};"
        f" they part at token {at}: {left} and {right}"
    )
    raise UserError(cause, "Replace words by words of as many tokens.")


def _answer_ids(
    answers: Answers, prompt: Encoded, encoder: Encoder, options: CommonOptions, where: str
) -> tuple[int, ...]:
    ids = [_answer_id(answer, prompt, encoder, options, where) for answer in answers]
    return tuple(dict.fromkeys(ids))


def _answer_id(answer: str | int, prompt: Encoded, encoder: Encoder, options: CommonOptions, where: str) -> int:
    if isinstance(answer, int):
        return _checked_id(answer, encoder, where)
    if not answer:
        raise UserError(f"{where} is empty", "Give the text that should come next.")
    try:
        ids = encoder.answer(prompt, answer)
    except UnknownWordError:
        ids = ()
    encoder.check(ids or (0,), f"{where} {answer!r}")
    if not ids or encoder.tokenizer.unk_token_id in ids:
        raise UserError(f"{where} {answer!r} is unknown to the tokenizer", "Use a word it knows.")
    if len(ids) > 1 and options.answer_tokens == "single":
        raise _several_tokens(answer, ids, prompt, encoder, where)
    return ids[0]


def _checked_id(token: int, encoder: Encoder, where: str) -> int:
    size = len(encoder.tokenizer)
    if not 0 <= token < size:
        raise UserError(f"{where}: token id {token} is outside the tokenizer's 0..{size - 1}", "Give a token it has.")
    encoder.check((token,), where)
    return token


def _several_tokens(answer: str, ids: tuple[int, ...], prompt: Encoded, encoder: Encoder, where: str) -> UserError:
    pieces = ", ".join(repr(piece) for piece in encoder.strings(ids))
    spaced = " " + answer
    if not answer.startswith(" ") and len(encoder.answer(prompt, spaced)) == 1:
        remedy = f"{spaced!r}, with the space before it, is one token: write it so, in quotes."
    else:
        remedy = "Choose an answer of one token, or set task.answer_tokens to first."
    return UserError(f"{where} {answer!r} is {len(ids)} tokens: {pieces}", remedy)


def _check_different(draft: Draft, answer: tuple[int, ...], wrong: tuple[int, ...], encoder: Encoder) -> None:
    same_text = sorted({str(a) for a in draft.answer} & {str(w) for w in draft.wrong_answer})
    if same_text:
        cause = f"{draft.where}: {same_text[0]!r} is both answer and wrong_answer"
        raise UserError(cause, "Give two different answers.")
    shared = tuple(sorted(set(answer) & set(wrong)))
    if shared:
        texts = " and wrong_answer ".join(repr(_shown(a, encoder)) for a in (draft.answer, draft.wrong_answer))
        token = encoder.strings(shared)[0]
        cause = f"{draft.where}: answer {texts} begin with the same token {token!r}"
        raise UserError(cause, "Give answers that differ in their first token.")


def _shown(answers: Answers, encoder: Encoder) -> str:
    """A set of answers in one line."""
    return "|".join(encoder.strings((a,))[0] if isinstance(a, int) else a for a in answers)
