"""Tasks that ask nothing: random tokens repeated, and a user's text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from mechinterp_cli.config.base import TaskOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.measure import keep_correct
from mechinterp_cli.metrics import check_prompts, find_metric
from mechinterp_cli.runs.schema import validate
from mechinterp_cli.tasks.build import build
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from mechinterp_cli.tasks.registry import tasks_with_answers
from mechinterp_cli.tasks.rows import content_hash, describe, prompt_rows
from mechinterp_cli.tasks.tokenise import Encoder
from mechinterp_cli.tasks.vocabulary import trimmed_tokens
from tests.task_tokenizers import byte_level, decode, metaspace, symbols

TOKENIZERS = {"words": byte_level(), "bos": byte_level(bos=True), "marked": metaspace(), "symbols": symbols()}


def make(task: str, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> PromptSet:
    limits = {key: options.pop(key) for key in ("max_length", "vocab_size") if key in options}
    return build(TaskOptions.registry[task].model_validate(options), tokenizer or byte_level(), **limits)


def error(task: str, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        make(task, tokenizer, **options)
    return str(caught.value)


def at(prompt: Prompt, span: str) -> list[int]:
    return [prompt.clean_tokens[i] for i in prompt.spans[span]]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize(("block", "repeats"), [(2, 2), (7, 2), (5, 4)])
def test_a_prompt_is_one_block_of_different_tokens_over_and_over(
    tokenizer: PreTrainedTokenizerFast, block: int, repeats: int
) -> None:
    prompts = make("repeats", tokenizer, block=block, repeats=repeats)
    start = 1 if tokenizer.bos_token_id is not None and prompts.add_bos else 0
    assert len({p.clean_tokens for p in prompts.prompts}) == 32
    for prompt in prompts.prompts:
        copy = prompt.clean_tokens[start : start + block]
        assert len(set(copy)) == block
        assert prompt.clean_tokens[start:] == copy * repeats
        assert prompt.clean_tokens[:start] == (tokenizer.bos_token_id,) * start
        assert at(prompt, "first") == at(prompt, "second") == list(copy)
        assert prompt.spans["first"] == tuple(range(start, start + block))
        assert prompt.spans["second"] == tuple(i + block for i in prompt.spans["first"])
        assert prompt.spans["end"] == (prompt.length - 1,)
        assert decode(tokenizer, prompt.clean_tokens[start:]) == prompt.clean


def test_the_beginning_token_is_as_asked() -> None:
    bare, led = (make("repeats", byte_level(bos=True), add_bos=bos).prompts for bos in (False, True))
    for without, with_bos in zip(bare, led, strict=True):
        assert with_bos.clean_tokens == (byte_level(bos=True).bos_token_id, *without.clean_tokens)
        assert with_bos.spans == {name: tuple(i + 1 for i in where) for name, where in without.spans.items()}


def test_prompts_are_drawn_freshly_and_by_the_seed() -> None:
    prompts = make("repeats", n=50).prompts
    assert len({p.clean_tokens[0] for p in prompts}) > 25
    assert prompts == make("repeats", n=50).prompts
    assert prompts != make("repeats", n=50, seed=1).prompts
    assert len({p.cluster for p in prompts}) == 50


def test_prompts_take_turns_over_all_combinations() -> None:
    prompts = make("repeats", block=[3, 8], repeats=[2, 4, 2], n=10).prompts
    assert [p.group for p in prompts[:5]] == ["3x2", "3x4", "8x2", "8x4", "3x2"]
    assert sorted(Counter(p.group for p in prompts).values()) == [2, 2, 3, 3]
    for prompt in prompts:
        block, repeats = map(int, prompt.group.split("x"))
        assert prompt.length == block * repeats
        assert len(prompt.spans["first"]) == block
        assert prompt.template == prompt.group
    text = error("repeats", block=[3, 8], repeats=[2, 4], n=3)
    assert text == (
        "task.n: 3 prompts are fewer than the 4 combinations of block and repeats\nSet task.n to 4 or more."
    )


def test_only_ordinary_tokens_are_drawn_and_all_of_them() -> None:
    drawn = {t for p in make("repeats", symbols(), n=64).prompts for t in p.clean_tokens}
    assert drawn == set(range(64))
    assert symbols().unk_token_id not in drawn
    tokenizer = byte_level(bos=True)
    for prompt in make("repeats", tokenizer).prompts:
        assert not set(prompt.clean_tokens[1:]) & set(tokenizer.all_special_ids)
        assert all(decode(tokenizer, [t]).strip().isalpha() for t in prompt.clean_tokens[1:])


def test_most_and_least_frequent_words_are_left_out() -> None:
    encoder = Encoder.of(byte_level())
    whole = trimmed_tokens(encoder, 0)
    part = trimmed_tokens(encoder, 0.1)
    out = int(0.1 * whole.total)
    assert out > 20
    assert list(whole.tokens) == sorted(whole.tokens)
    assert len(whole.tokens) == whole.total == part.total
    assert part.tokens == whole.tokens[out:-out]
    drawn = {t for p in make("repeats", trim=0.1, n=200).prompts for t in p.clean_tokens}
    assert drawn <= set(part.tokens)
    everything = {t for p in make("repeats", trim=0, n=200).prompts for t in p.clean_tokens}
    assert everything & set(whole.tokens[:out]) and everything & set(whole.tokens[-out:])


def test_symbols_are_not_trimmed_and_the_embedding_bounds_the_tokens() -> None:
    assert trimmed_tokens(Encoder.of(symbols()), 0.3).tokens == tuple(range(64))
    assert trimmed_tokens(Encoder.of(symbols(), vocab_size=20), 0.3).tokens == tuple(range(20))


def test_a_vocabulary_too_small_says_how_many_there_are() -> None:
    assert make("repeats", symbols(20), n=1)
    assert error("repeats", symbols(19), n=1) == (
        "task.block: 20 different tokens are needed, and this tokenizer has 19 ordinary ones\nLower task.block."
    )
    total = trimmed_tokens(Encoder.of(byte_level()), 0).total
    left = len(trimmed_tokens(Encoder.of(byte_level()), 0.3).tokens)
    assert error("repeats", trim=0.3, block=left + 1) == (
        f"task.block: {left + 1} different tokens are needed, and this tokenizer has {total} ordinary ones, "
        f"of which task.trim leaves {left}\nLower task.trim or task.block."
    )


def test_so_many_prompts_as_there_are_can_be_had() -> None:
    assert len(make("repeats", symbols(3), block=2, n=6).prompts) == 6
    assert error("repeats", symbols(3), block=2, n=7) == (
        "task.n: there are 6 different prompts of 2 x 2 tokens, and 7 are asked for\nLower task.n, or raise task.block."
    )


def test_repeats_that_are_longer_than_the_context() -> None:
    assert make("repeats", block=[5, 25], repeats=4, max_length=100)
    assert error("repeats", block=[5, 25], repeats=4, max_length=99) == (
        "task.block: 4 x 25 tokens are more than the model's context of 99\nLower task.block or task.repeats."
    )
    text = error("repeats", byte_level(bos=True), block=25, repeats=4, max_length=100)
    assert "task.block: 4 x 25 tokens and 1 put before them are more than the model's context of 100" in text


def test_repeats_are_no_message() -> None:
    text = error("repeats", byte_level(bos=True, chat=True), chat_template=True)
    assert text == "task.chat_template: repeated random tokens are no message\nLeave the key out."


@pytest.mark.parametrize(
    "change",
    [{"block": 1}, {"block": []}, {"block": [5, 1]}, {"block": "5"}, {"block": True}, {"block": 5.0}, {"repeats": 1}]
    + [{"trim": 0.4}, {"trim": -0.1}, {"trim": "0"}, {"trim": float("nan")}, {"n": None}, {"n": 0}, {"answer": "x"}],
)  # fmt: skip
def test_bad_options_of_repeats(change: dict[str, object]) -> None:
    assert TaskOptions.registry["repeats"].model_validate({"block": [2, 3], "repeats": [2], "trim": 0})
    with pytest.raises(ValidationError):
        TaskOptions.registry["repeats"].model_validate(change)


@given(size=st.integers(1, 30), data=st.data())
def test_few_are_different_items(size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, size))
    items = [f"item {i}" for i in range(size)]
    drawn = Draw(data.draw(st.integers(0, 2**32 - 1))).few(items, k)
    assert len(set(drawn)) == len(drawn) == k
    assert set(drawn) <= set(items)


def test_few_are_drawn_evenly() -> None:
    draw = Draw(0)
    counts = Counter(tuple(draw.few("abc", 2)) for _ in range(6000))
    assert len(counts) == 6
    # 1,000 are expected of each; the standard deviation is 29.
    assert all(abs(count - 1000) < 120 for count in counts.values())
    with pytest.raises(ValueError, match="4 different draws from 3"):
        draw.few("abc", 4)


SENTENCES = ("When Mary and John went to the store", "The key near the cabinets", "The capital of France is")


def test_inline_texts_are_the_prompts() -> None:
    prompts = make("text", byte_level(bos=True), texts=SENTENCES)
    assert [p.clean for p in prompts.prompts] == list(SENTENCES)
    for prompt in prompts.prompts:
        assert decode(byte_level(bos=True), prompt.clean_tokens) == "<s>" + prompt.clean
        assert dict(prompt.spans) == {"end": (prompt.length - 1,)}
        assert prompt.template == f"length-{prompt.length}"
    assert len({p.cluster for p in prompts.prompts}) == 3
    assert prompts.dropped == ()


def test_texts_of_one_token_and_repeated_texts_are_left_out_and_counted() -> None:
    prompts = make("text", byte_level(bos=True), texts=["The", SENTENCES[0], SENTENCES[1], SENTENCES[0], "The boy"])
    assert [p.clean for p in prompts.prompts] == [*SENTENCES[:2], "The boy"]
    assert [(d.text, d.reason) for d in prompts.dropped] == [
        ("The", "fewer than 2 tokens"),
        (SENTENCES[0], "the same tokens as an earlier text"),
    ]
    cut = make("text", texts=["The boy and", "The boy or", "The girl"], length=2)
    assert [p.clean for p in cut.prompts] == ["The boy", "The girl"]
    assert error("text", texts=["The"]) == "task text: every text has fewer than 2 tokens\nGive longer ones."


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(bos=True), metaspace()], ids=["words", "bos", "marked"])
@pytest.mark.parametrize("length", [2, 5, 8, 100])
def test_texts_are_cut_to_their_first_tokens(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    (whole,) = make("text", tokenizer, texts=SENTENCES[:1]).prompts
    (part,) = make("text", tokenizer, texts=SENTENCES[:1], length=length).prompts
    prefix = whole.length - 8
    assert part.clean_tokens == whole.clean_tokens[: prefix + length]
    assert part.clean == " ".join(SENTENCES[0].split()[:length])
    assert part.spans["end"] == (part.length - 1,)


def test_a_cut_text_may_be_longer_than_the_context_and_a_whole_one_not() -> None:
    assert make("text", texts=SENTENCES, max_length=8)
    assert error("text", texts=SENTENCES, max_length=7) == (
        "task.texts[0]: 8 tokens are more than the model's context of 7\n"
        "Shorten the text, or set task.length to at most 7."
    )
    tokenizer = byte_level(bos=True)
    assert "set task.length to at most 6." in error("text", tokenizer, texts=SENTENCES, max_length=7)
    assert max(p.length for p in make("text", tokenizer, texts=SENTENCES, max_length=7, length=6).prompts) == 7
    assert "8 tokens are more than" in error("text", tokenizer, texts=SENTENCES, max_length=7, length=7)


def test_text_as_a_message() -> None:
    tokenizer = byte_level(bos=True, chat=True)
    (prompt,) = make("text", tokenizer, texts=SENTENCES[:1], chat_template=True).prompts
    assert decode(tokenizer, prompt.clean_tokens) == f"<s>[user] {SENTENCES[0]}\n[assistant]\n"
    assert error("text", tokenizer, texts=SENTENCES[:1], chat_template=True, length=5) == (
        "task.length: a text that is cut short does not fit into a chat template\n"
        "Leave out task.length or task.chat_template."
    )
    assert error("text", tokenizer, texts=SENTENCES[:1], chat_template=True, max_length=9).endswith("Shorten the text.")


def test_a_sample_of_texts_keeps_their_order() -> None:
    texts = [f"The {name}" for name in ("boy", "girl", "dog", "cat", "king")]
    some = [p.clean for p in make("text", texts=texts, n=3, seed=1).prompts]
    assert some == [text for text in texts if text in some] and len(some) == 3
    assert some != [p.clean for p in make("text", texts=texts, n=3, seed=2).prompts]
    assert "task.n: 6 prompts are asked for and 5 different ones are given" in error("text", texts=texts, n=6)


def read(path: Path, data: str | bytes, **options: Any) -> Sequence[Prompt]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return make("text", path=str(path), **options).prompts


FILE = "The boy\n  and the girl\n\n \t\nThe dog near\nthe cat\n\n\n"
PIECES = {
    "line": ["The boy", "  and the girl", "The dog near", "the cat"],
    "paragraph": ["The boy\n  and the girl", "The dog near\nthe cat"],
    "file": ["The boy\n  and the girl\n\n \t\nThe dog near\nthe cat"],
}


@pytest.mark.parametrize("unit", PIECES)
@pytest.mark.parametrize("data", [FILE, "\ufeff" + FILE, FILE.replace("\n", "\r\n"), FILE.rstrip("\n"), "\n\n" + FILE])
def test_a_file_is_taken_apart(tmp_path: Path, unit: str, data: str) -> None:
    if unit == "file" and data.startswith("\n"):
        data = data.lstrip("\n")
    assert [p.clean for p in read(tmp_path / "t.txt", data, unit=unit)] == PIECES[unit]


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    text = "The\u2028 boy\x0c and\x85 the girl"
    assert [p.clean for p in read(tmp_path / "t.txt", text)] == [text]


def test_the_path_is_from_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("The boy\n")
    with pytest.raises(UserError, match="task.path: 't.txt' does not exist"):
        make("text", path="t.txt")
    monkeypatch.chdir(tmp_path)
    assert [p.clean for p in make("text", path="t.txt").prompts] == ["The boy"]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"", {}, "t.txt: has no text\nGive it at least one line."),
        (b" \n\t\r\n", {"unit": "paragraph"}, "t.txt: has no text"),
        (b"\xef\xbb\xbf\n", {"unit": "file"}, "t.txt: has no text"),
        (b"The boy\nThe g\xffrl\n", {}, "t.txt line 2: byte 13 (0xff) is not UTF-8\nSave the file as UTF-8."),
        (b"The boy\nThe g\0rl\n", {}, "t.txt line 2: holds a NUL character"),
        (b"The boy\n\nThe boy and the girl\n", {"max_length": 4}, "t.txt line 3: 5 tokens are more than"),
        (b"a b\n\n\nThe boy\nand the girl\n", {"max_length": 5, "unit": "paragraph"}, "t.txt line 4: 6 tokens are"),
        (b"The boy\nThe girl\n", {"vocab_size": 50}, "t.txt line 1: token id"),
    ],
)
def test_bad_text_files_say_where(tmp_path: Path, data: bytes, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path / "t.txt", data, **options)
    assert message in str(caught.value).replace(f"{tmp_path}/", "")


def test_texts_that_are_no_files(tmp_path: Path) -> None:
    assert "is not an ordinary file\nGive the path of a text file." in error("text", path=str(tmp_path))


def test_a_long_text_is_not_quoted_whole() -> None:
    text = error("text", symbols(unknown=False), texts=["k1 k2 banana " * 5000])
    assert "has a word that the tokenizer does not know" in text
    assert len(text) < 600
    unknown = error("text", symbols(), texts=["k1 k2 banana " * 5000])
    assert "has a word that the tokenizer does not know" in unknown
    assert len(unknown) < 600


def test_what_was_cut_off_need_not_be_known() -> None:
    (prompt,) = make("text", symbols(), texts=["k1 k2 k3 banana"], length=3).prompts
    assert prompt.clean == "k1 k2 k3"
    assert "does not know" in error("text", symbols(), texts=["k1 k2 k3 banana"], length=4)


def test_a_text_of_no_token_is_left_out() -> None:
    prompts = make("text", symbols(), texts=["k1 k2", " "])
    assert [(d.text, d.reason) for d in prompts.dropped] == [(" ", "fewer than 2 tokens")]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"texts": None}, "exactly one of `texts` (in this file) and `path` (another file)"),
        ({"path": "t.txt"}, "exactly one of `texts` (in this file) and `path` (another file)"),
        ({"unit": "file"}, "`unit` says what is one text in a file: leave it out with `texts`"),
        ({"unit": "word"}, "'line', 'paragraph' or 'file'"),
        ({"texts": []}, "at least 1 item"),
        ({"texts": [""]}, "at least 1 character"),
        ({"texts": "The boy"}, "valid tuple"),
        ({"length": 1}, "greater than or equal to 2"),
        ({"keep": "correct"}, "task text has no answers that could be correct, so only all is allowed"),
    ],
)
def test_bad_options_of_text(change: dict[str, object], cause: str) -> None:
    options = TaskOptions.registry["text"]
    assert options.model_validate({"texts": ["The boy"], "unit": "line", "keep": "all"})
    with pytest.raises(ValidationError) as caught:
        options.model_validate({"texts": ["The boy"], **change})
    assert cause in str(caught.value)


UNASKED = [("repeats", {"n": 3}), ("text", {"texts": list(SENTENCES)})]


@pytest.mark.parametrize(("task", "options"), UNASKED)
def test_where_nothing_is_asked_tables_say_so(task: str, options: dict[str, Any]) -> None:
    prompts = make(task, **options)
    rows = prompt_rows(prompts, byte_level())
    assert [(row["prompt"], row["stream"]) for row in rows] == [(i, "clean") for i in range(3)]
    for row in rows:
        assert (row["answer"], row["wrong_answer"], row["answer_ids"], row["wrong_answer_ids"]) == (None, None, [], [])
    asked = prompt_rows(make("capitals", n=3), byte_level())
    assert all(row["answer"] and row["wrong_answer"] and row["answer_ids"] for row in asked)
    table = validate("prompts", rows)
    assert table["answer"].null_count == 3
    assert table["token_ids"].to_pylist() == [list(p.clean_tokens) for p in prompts.prompts]
    assert content_hash(prompts) == content_hash(make(task, **options))
    lines = describe(prompts.prompts[0], byte_level()).lines()
    assert "answer: none   wrong answer: none" in lines
    assert not any("note" in line or "differ" in line for line in lines)


@pytest.mark.parametrize(("task", "options"), UNASKED)
def test_metrics_that_need_an_answer_are_refused(task: str, options: dict[str, Any]) -> None:
    prompts = make(task, **options)
    check_prompts([find_metric("kl")], prompts.prompts, prompts.task)
    for name in ("logit_diff", "prob", "prob_diff", "logprob", "rank", "accuracy"):
        with pytest.raises(UserError) as caught:
            check_prompts([find_metric("kl"), find_metric(name)], prompts.prompts, prompts.task)
        assert caught.value.cause == f"metrics: {name} needs an answer, and prompt 0 of task {task!r} has none"
        assert caught.value.remedy == (
            "Use kl, or a task with answers: agreement, capitals, file, greater_than, induction, ioi, number, prompts, "
            "sentiment, truth."
        )


def test_tasks_say_whether_they_have_answers() -> None:
    without = {"repeats", "text", "labelled", "induction_labels", "position"}
    assert set(TaskOptions.registry) - set(tasks_with_answers()) == without
    for task in ("ioi", "greater_than", "induction", "capitals", "agreement"):
        assert all(prompt.answer for prompt in make(task).prompts)


@pytest.mark.parametrize(("top", "key"), [(True, "patch.tracing"), (False, "task.keep")])
def test_nothing_is_kept_for_being_right_where_nothing_is_asked(top: bool, key: str) -> None:
    prompts = make("repeats", n=3)
    logits = torch.zeros(3, len(byte_level()))
    with pytest.raises(UserError) as caught:
        keep_correct(prompts, logits, top=top)
    assert caught.value.cause == f"{key}: the answer must be right, and prompts of task 'repeats' have none"
    asked = make("induction", n=3)
    for row, prompt in enumerate(asked.prompts):
        logits[row, prompt.answer[0]] = 1
    assert keep_correct(asked, logits, top=top)[0] == asked
    mixed = replace(asked, prompts=(*asked.prompts, prompts.prompts[0]))
    with pytest.raises(UserError, match=f"{key}: the answer must be right"):
        keep_correct(mixed, logits[[0, 1, 2, 0]], top=top)
