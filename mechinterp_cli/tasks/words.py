"""Words of a text and the tokens that each is made of; texts of random tokens, where each token is a word."""

import re
from collections.abc import Iterable
from dataclasses import replace

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.prompts import Label, Prompt, Word
from mechinterp_cli.tasks.spans import END, tokens_of
from mechinterp_cli.tasks.tokenise import Encoded, Encoder, Range

_EDGES = re.compile(r"^\W+|\W+$")


def word_ranges(text: str) -> tuple[Range, ...]:
    """Start and end (exclusive) of every word; words are what blanks separate."""
    return tuple(match.span() for match in re.finditer(r"\S+", text))


def word_type(word: str) -> str:
    """A word in small letters without the marks around it; a word of marks alone is its own type."""
    bare = _EDGES.sub("", word)
    return (bare or word).casefold()


def labelled_words(text: str, encoded: Encoded, labels: Iterable[tuple[Range, Label]], where: str) -> tuple[Word, ...]:
    """Words with their tokens and types.

    A token that covers parts of two words is one of both.

    Args:
        text: The prompt as it was given.
        encoded: The same, tokenised.
        labels: The words' characters and labels.
        where: What to call the prompt in an error.

    Raises:
        UserError: A word has no token of its own.
    """
    return tuple(
        Word(tokens_of(encoded, (start, end), f"{where} word {text[start:end]!r}"), word_type(text[start:end]), label)
        for (start, end), label in labels
    )


def label_after(prompt: Prompt, encoded: Encoded, characters: int, label: Label) -> Prompt:
    """The prompt with one label at every word that begins at a character or later.

    Args:
        prompt: The prompt.
        encoded: Its text, tokenised.
        characters: Where the first labelled word may begin.
        label: Of every word.

    Raises:
        UserError: A word has no token of its own.
    """
    labels = [(span, label) for span in word_ranges(prompt.clean) if span[0] >= characters]
    return replace(prompt, words=labelled_words(prompt.clean, encoded, labels, repr(prompt.clean)))


def label_tokens(encoder: Encoder, tokens: tuple[int, ...], labels: Iterable[tuple[int, Label]]) -> tuple[Word, ...]:
    """Tokens as labelled words of their own, for texts that have no words.

    Args:
        encoder: The tokenizer.
        tokens: All tokens of the prompt.
        labels: Positions and their labels.
    """
    strings = encoder.strings(tokens)
    return tuple(Word((position,), strings[position], label) for position, label in labels)


def token_prompt(encoder: Encoder, body: tuple[int, ...], words: tuple[Word, ...], cluster: str) -> Prompt:
    """A prompt of random tokens with labelled ones among them; nothing is asked.

    Args:
        encoder: The tokenizer.
        body: The tokens, without what the tokenizer puts before them.
        words: The labelled tokens, which become the span `target`.
        cluster: The prompt's cluster.

    Raises:
        UserError: The model does not have these tokens.
    """
    tokens = encoder.prefix + body
    encoder.check(tokens, cluster)
    return Prompt(
        clean=encoder.text_of(body),
        clean_tokens=tokens,
        answer=(),
        answer_text="",
        spans={"target": tuple(i for word in words for i in word.positions), END: (len(tokens) - 1,)},
        template=f"length-{len(tokens)}",
        cluster=cluster,
        words=words,
    )


def check_random_tokens(encoder: Encoder, length: int, key: str) -> None:
    """Check that a prompt of so many random tokens can be given to the model.

    Args:
        encoder: The tokenizer and the model's limits.
        length: Tokens, without what the tokenizer puts before them.
        key: The option that is at fault where they are too many.

    Raises:
        UserError: Prompts are wrapped in a chat template, or the context is too short.
    """
    if encoder.chat_template:
        raise UserError("task.chat_template: random tokens are no message", "Leave the key out.")
    whole = len(encoder.prefix) + length
    if encoder.max_length is not None and whole > encoder.max_length:
        cause = f"{key}: prompts of {whole} tokens are longer than the model's context of {encoder.max_length}"
        raise UserError(cause, f"Lower {key}.")


def check_words_known(encoder: Encoder, task: str, sample: str) -> None:
    """Check that a tokenizer is one of English text.

    Args:
        encoder: The tokenizer.
        task: The task that needs it.
        sample: A text of the task's.

    Raises:
        UserError: It has no tokens for the sample.
    """
    if not encoder.word_ids(sample):
        cause = f"task {task}: this tokenizer does not know the words of {sample!r}"
        raise UserError(cause, "Use a task of random tokens (induction_labels, position), or another model.")
