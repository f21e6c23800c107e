"""A prompt set as rows for a table, as a hash for the manifest, and as lines for a person."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from mechinterp_cli.tasks.tokenise import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_rows(prompts: PromptSet, tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, Any]]:
    """One row per prompt and stream: enough to compute every number again without the task.

    Args:
        prompts: The prompt set.
        tokenizer: The tokenizer it was built with.

    Returns:
        Rows with `prompt` (index), `stream` (`clean`, `corrupt`), `text`, `token_ids`, `tokens` (as text; the ids
        are what counts), `spans` (JSON: name to positions), `answer`, `answer_ids`, `wrong_answer`,
        `wrong_answer_ids`, `group`, `cluster`, `template`. Where nothing is asked, `answer` and `wrong_answer` are
        None and their ids are empty.
    """
    encoder = Encoder(tokenizer)
    return [
        _row(index, stream, text, ids, prompt, encoder)
        for index, prompt in enumerate(prompts.prompts)
        for stream, text, ids in _streams(prompt)
    ]


def content_hash(prompts: PromptSet) -> str:
    """The sha256 of everything that a model is given and asked, in hexadecimal.

    Prompts that were left out do not count, nor does the order in which a prompt's spans are named.
    """
    content = {
        "task": prompts.task,
        "add_bos": prompts.add_bos,
        "chat_template": prompts.chat_template,
        "prompts": [_content(prompt) for prompt in prompts.prompts],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Description:
    """One prompt as it was tokenised, for a person to check before anything runs."""

    streams: dict[str, tuple[str, ...]]
    """Stream to its tokens as text."""
    answer: tuple[str, ...]
    wrong_answer: tuple[str, ...]
    spans: dict[str, tuple[int, ...]]
    differ: tuple[int, ...]
    """Positions at which clean and corrupt differ."""
    notes: tuple[str, ...]
    """What looks unintended."""
    labels: tuple[str, ...] = ()
    """The text's one, or words and their labels."""

    def lines(self) -> list[str]:
        """The description as lines of plain text; tokens are written as Python would, so that spaces show."""
        return [
            *(f"{stream} ({len(tokens)} tokens): {_joined(tokens)}" for stream, tokens in self.streams.items()),
            f"answer: {_joined(self.answer) or 'none'}   wrong answer: {_joined(self.wrong_answer) or 'none'}",
            "spans: " + ", ".join(f"{name}={list(at)}" for name, at in self.spans.items()),
            *([f"clean and corrupt differ at {list(self.differ)}"] if "corrupt" in self.streams else []),
            *(["labels: " + ", ".join(self.labels)] if self.labels else []),
            *(f"note: {note}" for note in self.notes),
        ]


def describe(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> Description:
    """What was made of one prompt, for `--dry-run`.

    Args:
        prompt: The prompt.
        tokenizer: The tokenizer it was built with.
    """
    encoder = Encoder(tokenizer)
    pairs = zip(prompt.clean_tokens, prompt.corrupt_tokens or prompt.clean_tokens, strict=True)
    return Description(
        streams={stream: tuple(encoder.strings(ids)) for stream, _, ids in _streams(prompt)},
        answer=tuple(encoder.strings(prompt.answer)),
        wrong_answer=tuple(encoder.strings(prompt.wrong_answer)),
        spans={name: tuple(prompt.spans[name]) for name in sorted(prompt.spans)},
        differ=tuple(i for i, (a, b) in enumerate(pairs) if a != b),
        notes=tuple(_notes(prompt, encoder)),
        labels=tuple(_shown_labels(prompt)),
    )


def _streams(prompt: Prompt) -> list[tuple[str, str, tuple[int, ...]]]:
    streams = [("clean", prompt.clean, prompt.clean_tokens)]
    if prompt.corrupt is not None and prompt.corrupt_tokens is not None:
        streams.append(("corrupt", prompt.corrupt, prompt.corrupt_tokens))
    return streams


def _row(index: int, stream: str, text: str, ids: tuple[int, ...], prompt: Prompt, encoder: Encoder) -> dict[str, Any]:
    return {
        "prompt": index,
        "stream": stream,
        "text": text,
        "token_ids": list(ids),
        "tokens": encoder.strings(ids),
        "spans": json.dumps(_spans(prompt), sort_keys=True),
        "answer": prompt.answer_text if prompt.answer else None,
        "answer_ids": list(prompt.answer),
        "wrong_answer": prompt.wrong_answer_text if prompt.answer else None,
        "wrong_answer_ids": list(prompt.wrong_answer),
        "group": prompt.group,
        "cluster": prompt.cluster,
        "template": prompt.template,
    }


def _spans(prompt: Prompt) -> dict[str, list[int]]:
    return {name: list(positions) for name, positions in prompt.spans.items()}


def _content(prompt: Prompt) -> dict[str, Any]:
    streams = {stream: [text, list(ids)] for stream, text, ids in _streams(prompt)}
    return {
        "streams": streams,
        "answer": sorted(prompt.answer),
        "wrong_answer": sorted(prompt.wrong_answer),
        "spans": _spans(prompt),
        "group": prompt.group,
        "cluster": prompt.cluster,
        "template": prompt.template,
        **_labels(prompt),
    }


def _labels(prompt: Prompt) -> dict[str, Any]:
    """Nothing for a prompt without labels, so that its hash is what it was before there were any."""
    sentence = {} if prompt.label is None else {"label": prompt.label}
    words = [[list(word.positions), word.type, word.label] for word in prompt.words]
    return {**sentence, **({"words": words} if words else {})}


def _shown_labels(prompt: Prompt) -> list[str]:
    if prompt.words:
        return [f"{word.type!r} at {list(word.positions)}: {word.label}" for word in prompt.words]
    return [] if prompt.label is None else [str(prompt.label)]


def _notes(prompt: Prompt, encoder: Encoder) -> list[str]:
    answer = prompt.answer_text
    notes = []
    if answer[:1].isalpha() and not prompt.clean[-1:].isspace() and encoder.word(answer) not in (None, *prompt.answer):
        notes.append(f"the answer {answer!r} has no space before it, and {' ' + answer!r} is a token too")
    if prompt.corrupt_tokens == prompt.clean_tokens:
        notes.append("clean and corrupt are the same")
    return notes


def _joined(tokens: tuple[str, ...]) -> str:
    return " ".join(repr(token) for token in tokens)
