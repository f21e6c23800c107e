import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.build import build, drop
from mechinterp_cli.tasks.library.file import FileOptions
from mechinterp_cli.tasks.library.inline import PromptsOptions
from mechinterp_cli.tasks.prompts import PromptSet
from tests.task_tokenizers import byte_level, decode, symbols

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
ROW = {"clean": CLEAN, "corrupt": CORRUPT, "answer": " Mary", "wrong_answer": " John"}


def inline(*rows: dict[str, Any], **options: Any) -> PromptSet:
    limits = {key: options.pop(key) for key in ("max_length", "vocab_size") if key in options}
    return build(PromptsOptions.model_validate({"prompts": rows, **options}), byte_level(), **limits)


def message(*rows: dict[str, Any], **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        inline(*rows, **options)
    return str(caught.value)


def test_inline_prompt_as_tokens() -> None:
    spans = {"place": "store", "IO": [5, 9]}
    prompt = inline({**ROW, "spans": spans, "group": "g", "cluster": "c"}).prompts[0]
    tokenizer = byte_level()
    assert decode(tokenizer, prompt.clean_tokens) == CLEAN
    assert prompt.corrupt_tokens is not None
    assert decode(tokenizer, prompt.corrupt_tokens) == CORRUPT
    assert [decode(tokenizer, a) for a in (prompt.answer, prompt.wrong_answer)] == [" Mary", " John"]
    assert dict(prompt.spans) == {"place": (7,), "IO": (1,), "end": (13,)}
    assert (prompt.group, prompt.cluster) == ("g", "c")


def test_answer_sets_keep_each_token_once() -> None:
    prompt = inline({**ROW, "answer": [" Mary", " Tom", " Mary"]}).prompts[0]
    assert len(prompt.answer) == 2
    assert prompt.answer_text == " Mary| Tom| Mary"


def test_corruption_and_wrong_answer_are_optional() -> None:
    prompt = inline({"clean": CLEAN, "answer": " Mary"}).prompts[0]
    assert (prompt.corrupt, prompt.corrupt_tokens, prompt.wrong_answer) == (None, None, ())


def test_unequal_lengths_say_which_prompt_and_where() -> None:
    text = message(ROW, {**ROW, "corrupt": CORRUPT + " the"})
    assert "task.prompts[1]: clean has 14 tokens and corrupt has 15; they part at token 9" in text
    assert "[' John', ' gave', ' a', ' drink'] and [' Mary', ' gave', ' a', ' drink']" in text


def test_answer_of_several_tokens_shows_them() -> None:
    text = message({**ROW, "answer": " Mary John"})
    assert "task.prompts[0]: answer ' Mary John' is 2 tokens: ' Mary', ' John'" in text
    assert "set task.answer_tokens to first" in text
    first = inline({**ROW, "answer": " Mary John"}, answer_tokens="first").prompts[0]
    assert first.answer == inline(ROW).prompts[0].answer


def test_answer_without_its_space_suggests_it() -> None:
    text = message({**ROW, "answer": "Khartoum"})
    assert "answer 'Khartoum' is" in text
    assert "' Khartoum', with the space before it, is one token: write it so, in quotes." in text


def test_answer_that_is_also_wrong_is_refused() -> None:
    assert "task.prompts[0]: ' Mary' is both answer and wrong_answer" in message({**ROW, "wrong_answer": " Mary"})
    sets = {"answer": [" Tom", " Mary"], "wrong_answer": [" Mary", " John"]}
    assert "' Mary' is both answer and wrong_answer" in message({**ROW, **sets})


def test_answers_with_the_same_first_token_are_refused() -> None:
    text = message({**ROW, "wrong_answer": " Mary John"}, answer_tokens="first")
    assert "answer ' Mary' and wrong_answer ' Mary John' begin with the same token ' Mary'" in text


@pytest.mark.parametrize("tokenizer", [symbols(), symbols(unknown=False)])
def test_unknown_answer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"task.prompts\[0\]: answer 'banana' is unknown to the tokenizer"):
        build(PromptsOptions.model_validate({"prompts": [{"clean": "k1", "answer": "banana"}]}), tokenizer)


def test_limits_of_the_model() -> None:
    assert inline(ROW, max_length=14)
    assert "task.prompts[0]: clean: 14 tokens are more than the model's context of 13" in message(ROW, max_length=13)
    assert "outside the model's embedding of 50 rows" in message(ROW, vocab_size=50)
    assert "token id 999999 is outside the tokenizer's" in message({**ROW, "answer": 999999})
    assert "task.prompts[0]: clean: the prompt is empty" in message({**ROW, "clean": ""})


@pytest.mark.parametrize(
    ("span", "part"),
    [
        ("shop", "task.prompts[0]: span 'place': 'shop' occurs 0 times"),
        ("John", "occurs 2 times"),
        ([3, 3], "characters 3 to 3 are not within 0 to 58"),
        ([0, 59], "characters 0 to 59 are not within 0 to 58"),
    ],
)
def test_span_that_is_not_in_the_prompt_is_refused(span: object, part: str) -> None:
    assert part in message({**ROW, "spans": {"place": span}})


def test_end_is_no_name_for_a_span() -> None:
    assert "span 'end' is always the last token" in message({**ROW, "spans": {"end": "store"}})


@pytest.mark.parametrize(
    "change",
    [{"answer": True}, {"answer": []}, {"answer": ""}, {"clean": 3}, {"spans": {"a": [1.0, 2.0]}}, {"answr": " Mary"}]
    + [{"spans": {"a": [-1, 2]}}],
)  # fmt: skip
def test_values_of_the_wrong_type_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PromptsOptions.model_validate({"prompts": [{**ROW, **change}]})


@pytest.mark.parametrize(
    "options",
    [{"n": "3"}, {"n": True}, {"n": 0}, {"n": 2.0}, {"seed": -1}, {"add_bos": "yes"}, {"keep": "right"}, {"nn": 3}],
)
def test_options_of_the_wrong_type_are_refused(options: dict[str, object]) -> None:
    assert PromptsOptions.model_validate({"prompts": [ROW], "n": 1, "seed": 0, "add_bos": True})
    with pytest.raises(ValidationError):
        PromptsOptions.model_validate({"prompts": [ROW], **options})


def test_labels_are_classes_or_numbers() -> None:
    named = inline({**ROW, "label": "yes"}, {**ROW, "label": "no"})
    assert [prompt.label for prompt in named.prompts] == ["yes", "no"]
    assert inline({**ROW, "label": 2}).prompts[0].label == 2.0
    assert inline(ROW).prompts[0].label is None
    text = message({**ROW, "label": "yes"}, {**ROW, "label": 1})
    assert "task.prompts[0]: label 'yes' is a class, and 1.0 of task.prompts[1] is a number" in text


def test_repeated_prompts_are_left_out_and_counted() -> None:
    prompts = inline(ROW, {**ROW, "answer": " Tom"}, ROW)
    assert len(prompts.prompts) == 2
    assert [d.reason for d in prompts.dropped] == ["task.prompts[2] repeats task.prompts[0]"]


def test_a_sample_keeps_the_given_order() -> None:
    rows = [{"clean": f"The {name}", "answer": " is"} for name in ("boy", "girl", "dog", "cat", "king")]
    everything = [prompt.clean for prompt in inline(*rows).prompts]
    some = [prompt.clean for prompt in inline(*rows, n=3, seed=1).prompts]
    assert some == [text for text in everything if text in some]
    assert len(some) == 3
    assert some != [prompt.clean for prompt in inline(*rows, n=3, seed=2).prompts]
    assert "task.n: 6 prompts are asked for and 5 different ones are given" in message(*rows, n=6)


def test_dropping_keeps_the_rest_and_the_reason() -> None:
    rows = [{"clean": f"The {name}", "answer": " is"} for name in ("boy", "girl", "dog")]
    prompts = inline(*rows)
    less = drop(prompts, [1], "wrong")
    assert [p.clean for p in less.prompts] == ["The boy", "The dog"]
    assert [(d.text, d.reason) for d in less.dropped] == [("The girl", "wrong")]
    assert len(prompts.prompts) == 3
    with pytest.raises(IndexError):
        drop(prompts, [3], "wrong")


def read(path: Path, data: str | bytes, **options: Any) -> PromptSet:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return build(FileOptions.model_validate({"file": str(path), **options}), byte_level())


def read_error(path: Path, data: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        read(path, data)
    return str(caught.value).replace(str(path), path.name)


CSV = f'clean,corrupt,answer,wrong_answer,span_place,group\n"{CLEAN}","{CORRUPT}", Mary, John,store,\n'


@pytest.mark.parametrize("data", [CSV, "\ufeff" + CSV, CSV.replace("\n", "\r\n"), CSV + "\n\n"])
def test_csv(tmp_path: Path, data: str) -> None:
    expected = inline({**ROW, "spans": {"place": "store"}}).prompts
    assert read(tmp_path / "p.csv", data).prompts == expected


def test_empty_cells_are_left_out(tmp_path: Path) -> None:
    data = "clean,corrupt,answer,wrong_answer,span_x\nThe boy,, is,,\n"
    (prompt,) = read(tmp_path / "p.csv", data).prompts
    assert (prompt.corrupt, prompt.wrong_answer, set(prompt.spans)) == (None, (), {"end"})


def test_jsonl_and_json(tmp_path: Path) -> None:
    row = {**ROW, "spans": {"place": "store"}}
    expected = inline(row).prompts
    assert read(tmp_path / "p.jsonl", json.dumps(row) + "\r\n\n").prompts == expected
    assert read(tmp_path / "p.json", json.dumps([row])).prompts == expected
    assert read(tmp_path / "q.json", json.dumps({"prompts": [row]})).prompts == expected
    separator = json.dumps({**ROW, "clean": "The\u2028 boy", "corrupt": None}, ensure_ascii=False)
    assert read(tmp_path / "r.jsonl", separator).prompts[0].clean == "The\u2028 boy"


def test_eap_ig_columns(tmp_path: Path) -> None:
    (expected,) = inline(ROW).prompts
    header = ",clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n"
    line = f'7,"{CLEAN}","{CORRUPT}","other",{expected.answer[0]},{expected.wrong_answer[0]}\n'
    (prompt,) = read(tmp_path / "p.csv", header + line).prompts
    assert prompt == expected
    lists = f'7,"{CLEAN}","{CORRUPT}","other","[5, 7]","[6]"\n'
    (prompt,) = read(tmp_path / "p.csv", header + lists).prompts
    assert (prompt.answer, prompt.wrong_answer) == ((5, 7), (6,))
    assert "p.csv line 2: correct_idx 'Mary' is no token id" in read_error(
        tmp_path / "p.csv", header + '7,"a","b",,Mary,3\n'
    )


def test_auto_circuit_keys(tmp_path: Path) -> None:
    prompt = {"clean": CLEAN, "corrupt": CORRUPT, "answers": [" Mary"], "wrong_answers": [" John"]}
    data = json.dumps({"word_idxs": {"IO": 2}, "prompts": [prompt]})
    assert read(tmp_path / "p.json", data).prompts == inline(ROW).prompts


HEAD = "clean,answer\n"


@pytest.mark.parametrize(
    ("name", "data", "cause"),
    [
        ("p.csv", "", "p.csv: has no prompts"),
        ("p.csv", HEAD, "p.csv: has no prompts"),
        ("p.json", "", "p.json: has no prompts"),
        ("p.csv", "clean,reply\nThe boy, is\n", "p.csv line 2: column 'answer' is missing; there are clean, reply"),
        ("p.csv", "clean,answer,gruop\nThe boy, is,a\n", "column 'gruop' is unknown\nDid you mean 'group'?"),
        ("p.csv", "clean,clean\n", "p.csv line 1: column 'clean' stands twice"),
        ("p.csv", HEAD + "The boy, is\nWhen a, b, is\n", "p.csv line 3: has 3 cells and the header has 2"),
        ("p.csv", HEAD + '"The\nboy", is\nx\n', "p.csv line 4: has 1 cells"),
        ("p.csv", HEAD + '"The\nboy", is,x\n', "p.csv line 2: has 3 cells"),
        ("p.csv", HEAD + '"The boy, is\n', "p.csv line 2: unexpected end of data"),
        ("p.csv", HEAD.encode() + b"The b\xffy, is\n", "p.csv line 2: byte 18 (0xff) is not UTF-8"),
        ("p.csv", HEAD + "The \0boy, is\n", "p.csv line 2: holds a NUL character"),
        ("p.csv", HEAD + "The boy,\n", "p.csv line 2: answer: "),
        ("p.csv", HEAD + ", is\n", "p.csv line 2: clean: the prompt is empty"),
        ("p.csv", "clean,answer,span_x\nThe boy, is,girl\n", "p.csv line 2: span 'x': 'girl' occurs 0 times"),
        ("p.jsonl", '{"clean": "The boy", "answer": " is"}\n{"clean"\n', "p.jsonl line 2: is not JSON at column 9"),
        ("p.jsonl", '{"clean": "a", "clean": "b", "answer": " is"}', "key 'clean' stands twice"),
        ("p.jsonl", "[1]", "p.jsonl line 1: is no object"),
        ("p.jsonl", '{"clean": 3, "answer": " is"}', "p.jsonl line 1: clean: "),
        ("p.jsonl", '{"clean": "\\ud800", "answer": " is"}', "half of a surrogate pair"),
        ("p.jsonl", "[" * 100_000, "p.jsonl line 1: is not JSON that can be read"),
        ("p.json", '{"rows": []}', "p.json: is no list of prompts"),
        ("p.json", "[\n{]\n", "p.json: is not JSON at line 2 column 2"),
        ("p.txt", "x", "is no .csv, .jsonl or .json file"),
    ],
)
def test_bad_files_say_where(tmp_path: Path, name: str, data: str | bytes, cause: str) -> None:
    assert cause in read_error(tmp_path / name, data)


def test_files_that_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "f.csv"
    folder.mkdir()
    for path, state in ((folder, "is not an ordinary file"), (tmp_path / "no.csv", "does not exist")):
        with pytest.raises(UserError, match=state):
            build(FileOptions(file=str(path)), byte_level())
