"""The one place where text becomes tokens: prompts, answers, words.

The beginning-of-sequence token is put here and nowhere else, exactly once. The tokenizer's own special
tokens are never asked for, so that no token comes after a prompt's last one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mechinterp_cli.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Range = tuple[int, int]
_CARRIER = "The"
"""What a word is tried after: some tokenizers treat the start of a text differently."""
_QUOTED = 200
"""So many characters of a prompt are quoted in an error."""


class UnknownWordError(UserError):
    """A text has a word that the tokenizer does not know, and no token that stands for unknown words."""


class NoTokenError(UserError):
    """A text of which the tokenizer leaves nothing."""


@dataclass(frozen=True)
class Encoded:
    """A tokenised prompt.

    `text` is what was tokenised, chat template included. `tokens` begins with `n_prefix` tokens that were put
    before it. `offsets` gives for each token the characters it covers in the prompt as it was given; a token that
    is not part of it (prefix, chat template) covers the empty range (0, 0).
    """

    text: str
    tokens: tuple[int, ...]
    offsets: tuple[Range, ...]
    n_prefix: int

    @property
    def body(self) -> tuple[int, ...]:
        """The tokens of `text` alone."""
        return self.tokens[self.n_prefix :]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the run's choices: what goes before a prompt, and what the model can take.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        prefix: Token ids put before every prompt (one, or none, or what the tokenizer itself puts there).
        chat_template: Whether prompts are wrapped in the tokenizer's chat template.
        max_length: The model's context in tokens; None: unknown.
        vocab_size: Rows of the model's embedding; None: unknown.
    """

    tokenizer: "PreTrainedTokenizerBase"
    prefix: tuple[int, ...] = ()
    chat_template: bool = False
    max_length: int | None = None
    vocab_size: int | None = None

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        add_bos: bool | None = None,
        chat_template: bool | None = None,
        max_length: int | None = None,
        vocab_size: int | None = None,
    ) -> "Encoder":
        """Resolve `add_bos` and `chat_template` for a tokenizer.

        Args:
            tokenizer: A Hugging Face tokenizer.
            add_bos: True, False, or None for what the tokenizer does by itself.
            chat_template: True to wrap prompts; False or None not to.
            max_length: The model's context in tokens.
            vocab_size: Rows of the model's embedding.

        Raises:
            UserError: The tokenizer lacks the token or the template that is asked for.
        """
        if chat_template and not tokenizer.chat_template:
            raise UserError("task.chat_template: this model's tokenizer has no chat template", "Leave the key out.")
        prefix = _prefix(tokenizer, add_bos)
        return cls(tokenizer, prefix, bool(chat_template), max_length, vocab_size)

    def encode(self, text: str, where: str = "prompt", *, first: int | None = None) -> Encoded:
        """Tokenise one prompt and check that the model can take it.

        Args:
            text: The prompt as the user gave it.
            where: What to call it in an error, such as `task.prompts[3].clean`.
            first: Keep only so many of its tokens, not counting what is put before them; None: all.

        Raises:
            UserError: Empty, not encodable, with unknown words, too long, or with tokens the model does not have.
        """
        check_text(text, where)
        rendered, start = self._render(text, where)
        try:
            ids, offsets = self.ids_and_offsets(rendered)
        except UnknownWordError as error:
            raise UserError(f"{where}: {error.cause}", error.remedy) from None
        ids, offsets = ids[:first], offsets[:first]
        self._check_known(ids, rendered, where)
        prefix = self._missing_prefix(ids, where)
        clipped = tuple(_clip(a - start, b - start, len(text)) for a, b in offsets)
        encoded = Encoded(rendered, prefix + ids, ((0, 0),) * len(prefix) + clipped, len(prefix))
        self.check(encoded.tokens, where)
        return encoded

    def answer(self, prompt: Encoded, text: str) -> tuple[int, ...]:
        """Token ids of an answer as it continues a prompt.

        Tokenised together with the prompt where that leaves the prompt's own tokens as they are (so that
        tokenizers that treat the start of a text differently are right), and alone where it does not.
        """
        return self._continuation(prompt.text, prompt.body, text)

    def word(self, word: str) -> int | None:
        """The token id of a word within a sentence (after a space), or None where that is not one known token."""
        ids = self.word_ids(word)
        return ids[0] if len(ids) == 1 else None

    def word_ids(self, word: str) -> tuple[int, ...]:
        """The token ids of words within a sentence; none where the tokenizer or the model lacks one of them."""
        try:
            ids = self._continuation(_CARRIER, self.ids(_CARRIER), " " + word)
        except UnknownWordError:
            return ()
        unknown = self.tokenizer.unk_token_id
        rows = len(self.tokenizer) if self.vocab_size is None else self.vocab_size
        return ids if all(i != unknown and i < rows for i in ids) else ()

    def reply(self, word: str) -> str:
        """A word as an answer's text: after a space, but at the start of a chat reply."""
        return word if self.chat_template else " " + word

    def single(self, word: str) -> bool:
        """Whether a word is one token within a sentence, and as an answer."""
        return self.word(word) is not None and (not self.chat_template or len(self.ids(word)) == 1)

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text alone, with nothing put around it."""
        return tuple(_call(self.tokenizer, text, add_special_tokens=False)["input_ids"])

    def ids_and_offsets(self, text: str) -> tuple[tuple[int, ...], tuple[Range, ...]]:
        """Token ids of a text alone and the characters that each covers.

        Raises:
            UserError: The tokenizer cannot tell which characters a token covers.
        """
        if self.tokenizer.is_fast:
            coded = _call(self.tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
            return tuple(coded["input_ids"]), tuple((a, b) for a, b in coded["offset_mapping"])
        ids = self.ids(text)
        return ids, self._decoded_offsets(ids, text)

    def text_of(self, ids: tuple[int, ...]) -> str:
        """The text of token ids, special tokens included, nothing tidied."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def strings(self, ids: tuple[int, ...]) -> list[str]:
        """Each token as text; a piece of a character, which has none of its own, as the tokenizer writes it."""
        return [self._string(i) for i in ids]

    def check(self, ids: tuple[int, ...], where: str) -> None:
        """Check that the model can take these tokens.

        Raises:
            UserError: More tokens than its context, or an id that its embedding does not have.
        """
        if self.max_length is not None and len(ids) > self.max_length:
            cause = f"{where}: {len(ids)} tokens are more than the model's context of {self.max_length}"
            raise UserError(cause, "Shorten the prompt.")
        if self.vocab_size is not None and max(ids) >= self.vocab_size:
            cause = f"{where}: token id {max(ids)} is outside the model's embedding of {self.vocab_size} rows"
            raise UserError(cause, "The tokenizer belongs to another model; give model and tokenizer together.")

    def _continuation(self, text: str, body: tuple[int, ...], answer: str) -> tuple[int, ...]:
        try:
            joined = self.ids(text + answer)
        except UnknownWordError:  # a word made of the prompt's last one and the answer
            joined = ()
        fits = len(joined) > len(body) and joined[: len(body)] == body
        return joined[len(body) :] if fits else self.ids(answer)

    def _render(self, text: str, where: str) -> tuple[str, int]:
        """The text that is tokenised, and where in it the prompt begins."""
        if not self.chat_template:
            return text, 0
        rendered = _chat(self.tokenizer, text, where)
        lead = len(text) - len(text.lstrip())
        found = rendered.rfind(text.strip())
        if found < 0:
            raise UserError(f"{where}: the chat template changes the prompt's text", "Set task.chat_template to false.")
        return rendered, found - lead

    def _missing_prefix(self, ids: tuple[int, ...], where: str) -> tuple[int, ...]:
        """What is still to be put before a text that may begin with the token already (a chat template's does)."""
        n = len(self.prefix)
        if n and ids[: 2 * n] == self.prefix * 2:
            token = self.tokenizer.bos_token
            raise UserError(f"{where}: begins with {token} twice", "Write it once, or not at all.")
        return () if ids[:n] == self.prefix else self.prefix

    def _check_known(self, ids: tuple[int, ...], text: str, where: str) -> None:
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids and str(self.tokenizer.unk_token) not in text:
            cause = f"{where}: {_quoted(text)} has a word that the tokenizer does not know"
            raise UserError(cause, "Use words it knows.")
        if not ids:
            raise NoTokenError(f"{where}: {_quoted(text)} gives no token with this tokenizer", "Use words it knows.")

    def _decoded_offsets(self, ids: tuple[int, ...], text: str) -> tuple[Range, ...]:
        ends = [len(self.text_of(ids[: i + 1])) for i in range(len(ids))]
        if self.text_of(ids) != text:
            cause = f"this tokenizer ({type(self.tokenizer).__name__}) cannot tell which characters a token covers"
            raise UserError(cause, "Use a fast tokenizer of the same model (tokenizer.json).")
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def _string(self, token: int) -> str:
        text = self.text_of((token,))
        return text if text and "\ufffd" not in text else str(self.tokenizer.convert_ids_to_tokens(token))


def check_text(text: str, where: str) -> None:
    """Check that a text can be tokenised at all.

    Raises:
        UserError: It is empty, or holds half of a surrogate pair.
    """
    if not text:
        raise UserError(f"{where}: the prompt is empty", "Give it some text, or take it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        cause = f"{where}: character {error.start} is half of a surrogate pair, which is no text"
        raise UserError(cause, "Write the character itself, in UTF-8.") from None


def _quoted(text: str) -> str:
    """A text in quotes; of a long one the beginning."""
    return repr(text) if len(text) <= _QUOTED else f"{text[:_QUOTED]!r}..."


def _prefix(tokenizer: "PreTrainedTokenizerBase", add_bos: bool | None) -> tuple[int, ...]:
    if add_bos is None:
        return _own_prefix(tokenizer)
    if not add_bos:
        return ()
    if tokenizer.bos_token_id is None:
        cause = "task.add_bos: this model's tokenizer has no beginning-of-sequence token"
        raise UserError(cause, "Leave the key out.")
    return (int(tokenizer.bos_token_id),)


def _own_prefix(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """What the tokenizer itself puts before a text."""
    try:
        full = tuple(_call(tokenizer, "a")["input_ids"])
        plain = tuple(_call(tokenizer, "a", add_special_tokens=False)["input_ids"])
    except UnknownWordError:
        full, plain = tuple(tokenizer("")["input_ids"]), ()
    if not plain:
        return full[:1] if full and full[0] == tokenizer.bos_token_id else ()
    starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[: next(starts, 0)]


def _call(tokenizer: "PreTrainedTokenizerBase", text: str, **options: bool) -> "BatchEncoding":
    try:
        coded: BatchEncoding = tokenizer(text, **options)
    except Exception as error:
        # The tokenizers library raises the bare class, and nothing narrower, for a word it has no token for.
        if type(error) is not Exception:
            raise
        cause = f"{_quoted(text)} has a word that the tokenizer does not know ({error})"
        raise UnknownWordError(cause, "Use words it knows.") from None
    return coded


def _chat(tokenizer: "PreTrainedTokenizerBase", text: str, where: str) -> str:
    from jinja2 import TemplateError  # needed with chat templates alone, which cannot be used without it

    messages = [{"role": "user", "content": text}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise UserError(f"{where}: the chat template refuses it: {error}", "Set task.chat_template to false.") from None


def _clip(start: int, end: int, length: int) -> Range:
    low, high = max(start, 0), min(end, length)
    return (low, high) if low < high else (0, 0)
