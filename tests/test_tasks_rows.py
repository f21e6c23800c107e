import json
from dataclasses import replace

import pytest

from mechinterp_cli.config.base import TaskOptions
from mechinterp_cli.tasks.build import build
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from mechinterp_cli.tasks.rows import content_hash, describe, prompt_rows
from tests.task_tokenizers import byte_level


def ioi(**options: object) -> PromptSet:
    return build(TaskOptions.registry["ioi"].model_validate({"n": 3, **options}), byte_level())


def test_rows_are_enough_to_build_the_prompts_again() -> None:
    prompts = ioi()
    rows = prompt_rows(prompts, byte_level())
    assert [(row["prompt"], row["stream"]) for row in rows] == [
        (i, stream) for i in range(3) for stream in ("clean", "corrupt")
    ]
    for row in rows:
        prompt = prompts.prompts[row["prompt"]]
        tokens = prompt.clean_tokens if row["stream"] == "clean" else prompt.corrupt_tokens
        assert tuple(row["token_ids"]) == tokens
        assert "".join(row["tokens"]) == row["text"]
        assert json.loads(row["spans"]) == {name: list(at) for name, at in prompt.spans.items()}
        assert (row["answer_ids"], row["wrong_answer_ids"]) == ([*prompt.answer], [*prompt.wrong_answer])
        assert (row["answer"], row["template"], row["cluster"]) == (prompt.answer_text, "0-ABBA", "0-ABBA")


def test_prompt_without_corruption_has_one_row() -> None:
    prompt = Prompt("The", tuple(byte_level()("The")["input_ids"]), (5,), "x")
    assert [row["stream"] for row in prompt_rows(PromptSet("prompts", (prompt,)), byte_level())] == ["clean"]


@pytest.mark.parametrize("text", ["NA null nan None", '"\r\n\t', ", = + - @", "</script> [/INST]", "🙂"])
def test_tokens_as_text_lose_nothing_that_is_text(text: str) -> None:
    ids = tuple(byte_level()(text)["input_ids"])
    (row,) = prompt_rows(PromptSet("prompts", (Prompt(text, ids, (5,), "x"),)), byte_level())
    assert row["token_ids"] == list(ids)
    assert all("\ufffd" not in token and token for token in row["tokens"])
    if text != "🙂":
        assert "".join(row["tokens"]) == text


def test_hash_follows_the_content() -> None:
    prompts = ioi()
    first, *rest = prompts.prompts
    assert content_hash(prompts) == content_hash(ioi())
    reordered = replace(first, spans=dict(reversed(list(first.spans.items()))))
    assert content_hash(replace(prompts, prompts=(reordered, *rest))) == content_hash(prompts)
    changed = [
        replace(prompts, prompts=(*rest, first)),
        replace(prompts, prompts=(replace(first, answer=(1,)), *rest)),
        replace(prompts, prompts=(replace(first, corrupt_tokens=first.clean_tokens), *rest)),
        replace(prompts, prompts=(replace(first, spans={**first.spans, "x": (1,)}), *rest)),
        replace(prompts, prompts=(replace(first, cluster="x"), *rest)),
        replace(prompts, add_bos=True),
        replace(prompts, task="x"),
    ]
    assert len({content_hash(prompts), *map(content_hash, changed)}) == 1 + len(changed)


def test_description_shows_tokens_answers_and_the_difference() -> None:
    prompt = ioi(fillers="fixed").prompts[0]
    shown = describe(prompt, byte_level())
    assert "".join(shown.streams["clean"]) == prompt.clean
    assert shown.differ == prompt.spans["S2"]
    assert shown.answer == (prompt.answer_text,)
    lines = shown.lines()
    assert lines[0].startswith("clean (14 tokens): 'When' ' ")
    assert "clean and corrupt differ at [9]" in lines
    assert shown.notes == ()


def test_description_notes_what_looks_unintended() -> None:
    row = {"clean": "The boy and the", "corrupt": "The boy and the", "answer": "a"}
    prompt = build(TaskOptions.registry["prompts"].model_validate({"prompts": [row]}), byte_level()).prompts[0]
    notes = describe(prompt, byte_level()).notes
    assert "the answer 'a' has no space before it, and ' a' is a token too" in notes
    assert "clean and corrupt are the same" in notes
