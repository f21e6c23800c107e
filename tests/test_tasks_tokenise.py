import pytest

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from mechinterp_cli.tasks.spans import find_text, resolve_span, span_positions, tokens_of
from mechinterp_cli.tasks.tokenise import Encoder
from tests.task_tokenizers import byte_level, decode, metaspace, symbols, wrap

SENTENCE = "When Mary and John went to the store"


def test_prefix_is_what_the_tokenizer_says_unless_told() -> None:
    with_bos, without = byte_level(bos=True), byte_level()
    assert Encoder.of(with_bos).encode(SENTENCE).tokens == tuple(with_bos(SENTENCE)["input_ids"])
    assert Encoder.of(without).encode(SENTENCE).tokens == tuple(without(SENTENCE)["input_ids"])
    assert Encoder.of(with_bos, add_bos=False).encode(SENTENCE).tokens == tuple(without(SENTENCE)["input_ids"])
    assert Encoder.of(without, add_bos=True).encode(SENTENCE).tokens == tuple(with_bos(SENTENCE)["input_ids"])


def test_beginning_token_is_put_once() -> None:
    encoder = Encoder.of(byte_level(bos=True))
    assert encoder.encode("<s>" + SENTENCE).tokens == encoder.encode(SENTENCE).tokens
    with pytest.raises(UserError, match=r"prompt: begins with <s> twice\nWrite it once"):
        encoder.encode("<s><s>" + SENTENCE)


def test_beginning_token_needs_a_tokenizer_that_has_one() -> None:
    with pytest.raises(UserError, match="task.add_bos: this model's tokenizer has no beginning-of-sequence token"):
        Encoder.of(symbols(), add_bos=True)


def test_chat_template_wraps_the_prompt_and_brings_its_own_beginning() -> None:
    tokenizer = byte_level(bos=True, chat=True)
    encoded = Encoder.of(tokenizer, chat_template=True).encode(SENTENCE)
    assert encoded.tokens.count(tokenizer.bos_token_id) == 1
    assert decode(tokenizer, encoded.tokens) == f"<s>[user] {SENTENCE}\n[assistant]\n"
    positions = tokens_of(encoded, find_text(SENTENCE, "John", "x"), "x")
    assert tokenizer.decode([encoded.tokens[i] for i in positions]) == " John"


def test_chat_template_needs_one() -> None:
    with pytest.raises(UserError, match="task.chat_template: this model's tokenizer has no chat template"):
        Encoder.of(byte_level(), chat_template=True)


def test_chat_template_that_changes_the_text_is_refused() -> None:
    tokenizer = byte_level(bos=True, chat=True)
    shouting = wrap(
        tokenizer.backend_tokenizer,
        bos_token="<s>",
        chat_template="{{ messages[0]['content'] | upper }}",
    )
    with pytest.raises(UserError, match="the chat template changes the prompt's text"):
        Encoder.of(shouting, chat_template=True).encode(SENTENCE)
    refusing = wrap(tokenizer.backend_tokenizer, bos_token="<s>", chat_template="{{ raise_exception('no users') }}")
    with pytest.raises(UserError, match="the chat template refuses it: no users"):
        Encoder.of(refusing, chat_template=True).encode(SENTENCE)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "here: the prompt is empty"),
        ("a\ud800b", "here: character 1 is half of a surrogate pair"),
        ("k1 banana", "here: 'k1 banana' has a word that the tokenizer does not know"),
        (" ", "here: ' ' gives no token"),
    ],
)
@pytest.mark.parametrize("unknown", [True, False])
def test_text_that_cannot_be_tokenised_is_refused(text: str, cause: str, unknown: bool) -> None:
    encoder = Encoder.of(symbols(unknown=unknown))
    assert encoder.encode("k1 k2").tokens == (1, 2)
    with pytest.raises(UserError) as caught:
        encoder.encode(text, "here")
    assert caught.value.cause.startswith(cause)


def test_prompt_longer_than_the_context_is_refused() -> None:
    encoder = Encoder.of(byte_level(), max_length=8)
    assert len(encoder.encode(SENTENCE).tokens) == 8
    with pytest.raises(UserError, match="p: 9 tokens are more than the model's context of 8\nShorten the prompt."):
        encoder.encode(SENTENCE + ",", "p")


def test_token_that_the_model_lacks_is_refused() -> None:
    assert Encoder.of(symbols(), vocab_size=10).encode("k9").tokens == (9,)
    with pytest.raises(UserError, match="token id 10 is outside the model's embedding of 10 rows\nThe token"):
        Encoder.of(symbols(), vocab_size=10).encode("k10")


@pytest.mark.parametrize("text", ["naïve 🙂 שלום\u200b e\u0301", "tab\tnew\nline", "a" * 300, "[/INST] <b>"])
def test_every_character_belongs_to_a_token_and_text_survives(text: str) -> None:
    encoder = Encoder.of(byte_level())
    encoded = encoder.encode(text)
    covered = {i for start, end in encoded.offsets for i in range(start, end)}
    assert covered >= {i for i, character in enumerate(text) if not character.isspace()}
    assert encoder.text_of(encoded.tokens) == text


def test_span_of_one_character_takes_all_its_byte_tokens() -> None:
    encoder = Encoder.of(byte_level())
    encoded = encoder.encode("a 🙂 b")
    positions = tokens_of(encoded, (2, 3), "smile")
    assert len(positions) > 1
    assert encoder.text_of(tuple(encoded.tokens[i] for i in positions)).strip() == "🙂"


def test_answer_continues_the_prompt_whatever_the_tokenizer_does_at_a_texts_start() -> None:
    for tokenizer in (byte_level(), metaspace()):
        encoder = Encoder.of(tokenizer)
        prompt = encoder.encode(SENTENCE)
        assert prompt.tokens + encoder.answer(prompt, " Mary") == encoder.encode(SENTENCE + " Mary").tokens


def test_answer_that_would_melt_into_the_prompt_is_tokenised_alone() -> None:
    encoder = Encoder.of(symbols())
    assert encoder.answer(encoder.encode("k1 k2"), "k3") == (3,)
    encoder = Encoder.of(symbols(unknown=False))
    assert encoder.answer(encoder.encode("k1 k2"), "k3") == (3,)


def test_word_is_one_known_token_within_a_sentence() -> None:
    for tokenizer in (byte_level(), metaspace()):
        encoder = Encoder.of(tokenizer)
        word = encoder.word("Mary")
        assert word is not None
        assert word in encoder.encode(SENTENCE).tokens
        assert encoder.word("Zyxwvut") is None
    assert Encoder.of(symbols(unknown=False)).word("Mary") is None


def test_offsets_without_a_fast_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    fast = Encoder.of(tokenizer).encode(SENTENCE)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    slow = Encoder.of(tokenizer).encode(SENTENCE)
    span = find_text(SENTENCE, "John", "x")
    assert tokens_of(slow, span, "x") == tokens_of(fast, span, "x")


PROMPT = Prompt("a b c d", (5, 6, 7, 8), (1,), "x", spans={"S2": (1, 2), "end": (3,)})


def test_neighbours_of_a_span() -> None:
    assert span_positions(PROMPT, "S2") == (1, 2)
    assert span_positions(PROMPT, "S2+1") == (3,)
    assert span_positions(PROMPT, "S2-1") == (0,)
    assert span_positions(PROMPT, "end-1") == (2,)


@pytest.mark.parametrize("name", ["S2+2", "S2-2", "end+1"])
def test_neighbour_outside_the_prompt_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"is outside 'a b c d': position (4|-1) of 0\.\.3"):
        span_positions(PROMPT, name)


def test_span_that_does_not_exist_names_the_nearest() -> None:
    other = Prompt("a b", (5, 6), (1,), "x", spans={"end": (1,)})
    with pytest.raises(UserError) as caught:
        resolve_span(PromptSet("ioi", (PROMPT, PROMPT)), "s2")
    assert str(caught.value) == "span 's2' of task 'ioi' does not exist; there are S2, end\nDid you mean 'S2'?"
    with pytest.raises(UserError, match="span 'S2' of task 'ioi' does not exist; there are end"):
        resolve_span(PromptSet("ioi", (PROMPT, other)), "S2")
    with pytest.raises(UserError, match=r"span 'S1\+1'"):
        span_positions(PROMPT, "S1+1")
    assert resolve_span(PromptSet("ioi", (PROMPT, other)), "end-1") == ((2,), (0,))


def test_span_text_must_occur_once() -> None:
    assert find_text("a b", "b", "x") == (2, 3)
    for text, part, count in (("a b", "c", 0), ("a a", "a", 2), ("a", "", 0)):
        with pytest.raises(UserError, match=f"row 3: {part!r} occurs {count} times in {text!r}"):
            find_text(text, part, "row 3")
