"""Files of labelled texts: what is read, what is left out, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.build import build
from mechinterp_cli.tasks.labelled import LabelledSet, labelled
from mechinterp_cli.tasks.library.labelled import LabelledOptions
from mechinterp_cli.tasks.prompts import PromptSet
from mechinterp_cli.tasks.words import word_ranges, word_type
from tests.experiments import run_method, run_patch
from tests.task_tokenizers import byte_level, decode, metaspace, symbols

REVIEWS = 'text,label\n"The film was great, really",good\nThe food was cold,bad\nI liked it,good\nI left early,bad\n'
TAGGED = ("The boy near the cars", "n n p p p"), ("The keys beside the door", "p p s s s")


def make(path: Path, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> PromptSet:
    limits = {key: options.pop(key) for key in ("max_length", "vocab_size") if key in options}
    chosen = LabelledOptions.model_validate({"path": str(path), **options})
    return build(chosen, tokenizer or byte_level(), **limits)


def read(path: Path, **options: Any) -> LabelledSet:
    return labelled(make(path, **options))


def error(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        make(path, **options)
    return str(caught.value).replace(f"{path.parent}/", "")


def csv(folder: Path, text: str) -> Path:
    path = folder / "texts.csv"
    path.write_bytes(text.encode())
    return path


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def two(folder: Path, **row: Any) -> Path:
    """A good row with a target, then one that is changed."""
    first = {"text": "The boy left", "label": "a", "target": "boy"}
    return jsonl(folder, first, {"text": "The girl stayed", "label": "b"} | row)


def test_rows_are_texts_with_classes(tmp_path: Path) -> None:
    prompts = make(csv(tmp_path, REVIEWS), add_bos=True, tokenizer=byte_level(bos=True))
    examples = labelled(prompts)
    assert (examples.classes, examples.targets, examples.per_word) == (("bad", "good"), (1, 0, 1, 0), False)
    assert [e.text for e in examples.examples][:2] == ["The film was great, really", "The food was cold"]
    for prompt in prompts.prompts:
        assert decode(byte_level(bos=True), prompt.clean_tokens) == "<s>" + prompt.clean
        assert dict(prompt.spans) == {"end": (prompt.length - 1,)}
        assert (prompt.answer, prompt.corrupt) == ((), None)
    assert len(set(examples.groups)) == 4


@pytest.mark.parametrize("change", [("\n", "\r\n"), ("text,label", "\ufefftext,label")])
def test_byte_order_marks_and_line_endings_change_nothing(tmp_path: Path, change: tuple[str, str]) -> None:
    plain = make(csv(tmp_path, REVIEWS)).prompts
    assert make(csv(tmp_path, REVIEWS.replace(*change))).prompts == plain


@pytest.mark.parametrize(
    ("labels", "kind", "classes", "targets"),
    [
        ([0, 1, 1, 0], None, ("0", "1"), (0, 1, 1, 0)),
        (["0", "1", "1", "0"], None, ("0", "1"), (0, 1, 1, 0)),
        ([True, False, True, True], None, ("false", "true"), (1, 0, 1, 1)),
        ([10, 9, 9, 10], None, ("9", "10"), (1, 0, 0, 1)),
        ([10, 9, 9, 10], "numbers", None, (10.0, 9.0, 9.0, 10.0)),
        ([0.5, 1, 2, 3], None, None, (0.5, 1.0, 2.0, 3.0)),
        (["0.5", "1e2", "-3", "4"], None, None, (0.5, 100.0, -3.0, 4.0)),
        ([0.5, 1, 1.0, 0.5], "classes", ("0.5", "1"), (0, 1, 1, 0)),
        (["a", "1", "1", "a"], None, ("1", "a"), (1, 0, 0, 1)),
        ([" good ", "bad", "good", "bad"], None, ("bad", "good"), (1, 0, 1, 0)),
    ],
)
def test_what_is_a_class_and_what_a_number(
    tmp_path: Path, labels: list[Any], kind: str | None, classes: object, targets: object
) -> None:
    path = jsonl(tmp_path, *({"text": f"text {i}", "label": label} for i, label in enumerate(labels)))
    examples = read(path, labels=kind)
    assert (examples.classes, examples.targets) == (classes, targets)


def test_more_than_ten_whole_numbers_are_numbers(tmp_path: Path) -> None:
    def count(n: int) -> LabelledSet:
        return read(jsonl(tmp_path, *({"text": f"text {i}", "label": i % n} for i in range(2 * n))))

    assert count(11).classes is None
    classes = count(10).classes
    assert classes == tuple(map(str, range(10)))


@pytest.mark.parametrize(
    "cells",
    [{"target": "4:7"}, {"target": [4, 7]}, {"target": "boy"}, {"target_start": 4, "target_end": 7}]
    + [{"target_start": "4", "target_end": "7"}, {"target": "", "target_start": 4, "target_end": 7}],
)  # fmt: skip
def test_targets_are_characters_or_a_part_of_the_text(tmp_path: Path, cells: dict[str, Any]) -> None:
    path = jsonl(tmp_path, {"text": "The boy left", "label": "a"} | cells, {"text": "The old boy stayed", "label": "b"})
    first, second = make(path).prompts
    assert decode(byte_level(), [first.clean_tokens[i] for i in first.spans["target"]]) == " boy"
    assert "target" not in second.spans


def test_marks_are_taken_out_of_the_text(tmp_path: Path) -> None:
    path = csv(tmp_path, "text,label\nThe [[old boy]] left,a\nThe girl [[stayed]],b\n")
    prompts = make(path, marks=["[[", "]]"]).prompts
    assert [p.clean for p in prompts] == ["The old boy left", "The girl stayed"]
    spans = [decode(byte_level(), [p.clean_tokens[i] for i in p.spans["target"]]).strip() for p in prompts]
    assert spans == ["old boy", "stayed"]
    stars = csv(tmp_path, "text,label\nThe *boy* left,a\nThe girl *stayed*,b\n")
    assert [p.clean for p in make(stars, marks=["*", "*"]).prompts] == ["The boy left", "The girl stayed"]
    bad = csv(tmp_path, "text,label\nThe [[boy]] left,a\nThe girl stayed,b\n")
    assert error(bad, marks=["[[", "]]"]) == (
        "texts.csv line 3: 'The girl stayed' has not one target between '[[' and ']]'\n"
        "Put task.marks around one part of every text."
    )
    for text in ("The [[boy]] [[left]]", "The ]]boy[[ left", "The [[]] left", "The [[boy left", "The [[a [[b]] c"):
        row = csv(tmp_path, f"text,label\n{text},a\n[[x]],b\n")
        assert "line 2" in error(row, marks=["[[", "]]"])
    both = two(tmp_path)
    assert "line 1: the target is given by task.marks and by a column" in error(both, marks=["[", "]"])


def test_groups_are_kept(tmp_path: Path) -> None:
    path = csv(tmp_path, "text,label,group\na b,x,g1\nc d,y,g1\ne f,x,\ng h,y,\n")
    groups = read(path).groups
    assert groups[:2] == ("g1", "g1") and len(set(groups)) == 3


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(bos=True)], ids=["words", "bos"])
def test_labels_of_words_stand_at_all_their_tokens(
    tmp_path: Path, kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    # The test's tokenizer splits words that are not in its corpus into pieces.
    text = "The hippopotamus, near  the Quartz-like cars!"
    labels = ["d", "n", "p", "d", "a", "n"]
    path = (
        jsonl(tmp_path, {"text": text, "labels": labels})
        if kind == "jsonl"
        else csv(tmp_path, f'text,labels\n"{text}",{" ".join(labels)}\n')
    )
    prompts = make(path, tokenizer=tokenizer)
    (prompt,) = prompts.prompts
    spoken = [decode(tokenizer, [prompt.clean_tokens[i] for i in word.positions]).strip() for word in prompt.words]
    assert spoken == text.split()
    assert len(prompt.words[1].positions) > 2
    assert [word.label for word in prompt.words] == labels
    assert [word.type for word in prompt.words] == ["the", "hippopotamus", "near", "the", "quartz-like", "cars"]
    places = [i for word in prompt.words for i in word.positions]
    assert places == sorted(set(places))
    examples = labelled(prompts)
    assert examples.classes is not None
    assert [examples.classes[int(target)] for target in examples.targets] == labels
    assert examples.per_word


def test_words_of_other_tokenizers(tmp_path: Path) -> None:
    marked = make(jsonl(tmp_path, {"text": "to the store, and", "labels": ["a", "b", "c", "d"]}), metaspace())
    (prompt,) = marked.prompts
    pieces = [decode(metaspace(), [prompt.clean_tokens[i] for i in word.positions]).strip() for word in prompt.words]
    assert pieces == ["to", "the", "store,", "and"]
    signs = make(jsonl(tmp_path, {"text": "k1 k2 k1", "labels": [0.5, 1, 2]}), symbols())
    assert [(w.positions, w.type, w.label) for w in signs.prompts[0].words] == [
        ((0,), "k1", 0.5),
        ((1,), "k2", 1.0),
        ((2,), "k1", 2.0),
    ]


@pytest.mark.parametrize(
    ("word", "kind"),
    [("Cars!", "cars"), ("“Cars”", "cars"), ("don't", "don't"), ("--", "--"), ("ÉTÉ", "été"), ("3.5", "3.5")],
)
def test_word_types(word: str, kind: str) -> None:
    assert word_type(word) == kind


def test_words_are_what_blanks_separate() -> None:
    text = " a\tbc\n d\u00a0e "
    assert [text[start:end] for start, end in word_ranges(text)] == ["a", "bc", "d", "e"] == text.split()


def test_repeated_rows_are_left_out_and_other_labels_are_told(tmp_path: Path) -> None:
    path = csv(tmp_path, "text,label\na b,x\nc d,y\na b,x\na b,y\na b,y\n")
    prompts = make(path)
    name = str(path)
    assert [(p.clean, p.label) for p in prompts.prompts] == [("a b", "x"), ("c d", "y"), ("a b", "y")]
    assert [d.reason for d in prompts.dropped] == [
        f"{name} line 4 repeats {name} line 2",
        f"{name} line 6 repeats {name} line 5",
    ]
    assert prompts.warnings == (f"{name} line 5 has the text of {name} line 2 and another label: 'y' and 'x'",)
    # They must not stand on both sides of a split.
    groups = labelled(prompts).groups
    assert groups[0] == groups[2] != groups[1]
    assert make(csv(tmp_path, REVIEWS)).warnings == ()


def test_one_text_with_two_targets_is_two_texts(tmp_path: Path) -> None:
    rows = [{"text": "a boy and a girl", "label": label, "target": label} for label in ("boy", "girl")]
    prompts = make(jsonl(tmp_path, *rows))
    assert (len(prompts.prompts), prompts.dropped, prompts.warnings) == (2, (), ())
    assert len(set(labelled(prompts).groups)) == 1


def test_only_some_contradictions_are_told_one_by_one(tmp_path: Path) -> None:
    rows = "".join(f"text {i},{label}\n" for label in "xy" for i in range(8))
    warnings = make(csv(tmp_path, "text,label\n" + rows)).warnings
    assert len(warnings) == 6
    assert warnings[-1] == "3 more rows have another label than an earlier row of their text"


def test_warnings_are_shown_by_a_run(tmp_path: Path) -> None:
    path = csv(tmp_path, "text,label\nk1 k2 k3,x\nk4 k5 k6,y\nk1 k2 k3,y\n")
    section = {"units": [{"kind": "head"}], "values": ["zero"]}
    run = run_method(tmp_path, "ablate", section, task={"name": "labelled", "path": str(path)}, metrics=["loss"])
    assert f"{path} line 4 has the text of {path} line 2 and another label: 'y' and 'x'" in run.manifest["warnings"]
    assert run.table("prompts")["text"].tolist() == ["k1 k2 k3", "k4 k5 k6", "k1 k2 k3"]
    with pytest.raises(UserError, match="logit_diff needs an answer, and prompt 0 of task 'labelled' has none"):
        run_patch(tmp_path, {"sites": [{"kind": "z", "layers": "all"}]}, task={"name": "labelled", "path": str(path)})
    with pytest.raises(UserError, match="'logit_diff' is not a metric of whole texts"):
        run_method(tmp_path, "ablate", section, task={"name": "labelled", "path": str(path)}, metrics=["logit_diff"])


def test_texts_are_cut_and_words_that_are_cut_lose_their_label(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"text": text, "labels": labels} for text, labels in TAGGED))
    prompts = make(path, length=3).prompts
    assert [p.clean for p in prompts] == ["The boy near", "The keys beside"]
    assert [[w.label for w in p.words] for p in prompts] == [["n", "n", "p"], ["p", "p", "s"]]
    whole = make(path).prompts
    assert [p.words[:3] for p in whole] == [p.words for p in prompts]
    split = jsonl(
        tmp_path, {"text": "a hippopotamus left", "labels": ["a", "b", "c"]}, {"text": "a boy", "labels": "x y"}
    )
    (first, _) = make(split, length=3).prompts
    assert first.clean != "a hippopotamus left"
    assert [w.label for w in first.words] == ["a"]
    none = jsonl(tmp_path, {"text": "hippopotamus", "labels": ["x"]}, {"text": "The boy", "labels": "x y"})
    cut = make(none, length=2)
    assert [d.reason.split(": ")[1] for d in cut.dropped] == ["task.length leaves no whole word"]


def test_a_target_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    rows = {"text": "The boy near the cars", "label": "a", "target": "cars"}, {"text": "The keys", "label": "b"}
    path = jsonl(tmp_path, *rows)
    assert make(path, length=5).prompts[0].spans["target"] == (4,)
    assert error(path, length=4) == (
        "texts.jsonl line 1: target 'cars' (characters 17 to 21) is cut off: the text is kept up to character 16\n"
        "Raise task.length, or shorten the text."
    )
    pieces = jsonl(tmp_path, {"text": "a hippopotamus", "label": "a", "target": "2:14"}, {"text": "a", "label": "b"})
    assert "is cut off" in error(pieces, length=2)


def test_a_text_that_is_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    rows = {"text": "The boy near the cars", "label": "a", "target": "cars"}, {"text": "The keys", "label": "b"}
    path = jsonl(tmp_path, *rows)
    assert make(path, max_length=5)
    assert error(path, max_length=4) == (
        "texts.jsonl line 1: 5 tokens are more than the model's context of 4; its target, which ends at token 4, "
        "would be cut off\nShorten the text, or set task.length to at most 4."
    )
    near = jsonl(tmp_path, {**rows[0], "target": "boy"}, rows[1])
    assert "its target, which ends at token 1, would not" in error(near, max_length=4)
    assert make(near, max_length=4, length=4)
    bare = jsonl(tmp_path, {"text": rows[0]["text"], "label": "a"}, rows[1])
    assert error(bare, max_length=4) == (
        "texts.jsonl line 1: 5 tokens are more than the model's context of 4\n"
        "Shorten the text, or set task.length to at most 4."
    )


def test_a_sample_is_seeded_and_in_order(tmp_path: Path) -> None:
    path = csv(tmp_path, "text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(40)))
    texts = [[p.clean for p in make(path, n=12, seed=seed).prompts] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    order = [f"text {i}" for i in range(40)]
    assert texts[0] == [text for text in order if text in texts[0]]
    assert error(path, n=41).startswith("task.n: 41 prompts are asked for and 40 different ones are given")
    rare = csv(tmp_path, "text,label\n" + "".join(f"text {i},{int(i == 0)}\n" for i in range(40)))
    assert error(rare, n=2).startswith("texts.csv: as sampled: every label is '0'")


LINE = "texts.jsonl line 2: "


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": ""}, "the label is empty\nGive one, or take the row out."),
        ({"label": "  "}, "the label is empty\nGive one, or take the row out."),
        ({"label": None}, "the label is empty\nGive one, or take the row out."),
        ({"label": float("nan")}, "label nan is not a number\nGive one, or take the row out."),
        ({"label": "NaN"}, "label 'NaN' is not a number\nGive one, or take the row out."),
        ({"label": ["b"]}, "label ['b'] is no text and no number\nGive the name of a class, or a number."),
        ({"text": ""}, "text '' is empty\nGive it some text."),
        ({"text": None}, "text None is empty\nGive it some text."),
        ({"text": 3}, "text 3 is no text\nGive it some text."),
        ({"group": [1]}, "group [1] is no text\nGive its name, or leave it out."),
        (
            {"target": "boy"},
            "target: 'boy' occurs 0 times in 'The girl stayed'\n"
            "Give a text that occurs once, or the characters as [start, end].",
        ),
        (
            {"target": "e"},
            "target: 'e' occurs 2 times in 'The girl stayed'\n"
            "Give a text that occurs once, or the characters as [start, end].",
        ),
        (
            {"target": "4:99"},
            "target: characters 4 to 99 are not within 0 to 15 of 'The girl stayed'\n"
            "Give start and end, with the end after the last character.",
        ),
        (
            {"target": [5, 5]},
            "target: characters 5 to 5 are not within 0 to 15 of 'The girl stayed'\n"
            "Give start and end, with the end after the last character.",
        ),
        ({"target": [5]}, "target: 5 is no start and end\nGive two whole numbers."),
        ({"target": [1.5, 3]}, "target: 1.5 to 3 is no start and end\nGive two whole numbers."),
        ({"target": [-1, 3]}, "target: -1 to 3 is no start and end\nGive two whole numbers."),
        ({"target_start": 4}, "target: 4 to nothing is no start and end\nGive two whole numbers."),
        ({"target": 4}, 'target 4 is no text\nGive "start:end", or a text that occurs once.'),
        (
            {"target": "girl", "target_start": 4, "target_end": 8},
            "the target is given twice\nGive target, or target_start and target_end.",
        ),
        ({"lable": "b"}, "column 'lable' is unknown\nDid you mean 'label'?"),
        (
            {"year": 3},
            "column 'year' is unknown\n"
            "Known are text, label, labels, group, target, target_start, target_end; remove it.",
        ),
        ({"labels": ["a"]}, "has columns 'label' and 'labels'\nA text has a label, or its words have."),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    assert make(two(tmp_path))
    assert error(two(tmp_path, **row)) == LINE + message


def test_a_target_of_blanks_has_no_token(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"text": "k1 k2", "label": label, "target": "2:3"} for label in "ab"))
    assert error(path, tokenizer=symbols()) == (
        "texts.jsonl line 1 span target: characters 2 to 3 belong to no token\n"
        "A span needs at least one character of the prompt that is not blank."
    )


NEEDED = "A row needs text, and label (or labels, one for each word)."
MIXED = "has 'labels', and texts.jsonl line 1 has 'label'\nLabel the text, or its words, in every row."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "b"}, "column 'label' is missing; there are text\n" + NEEDED),
        ({"label": "b"}, "column 'text' is missing; there are label\n" + NEEDED),
        ({"text": "b c", "labels": "x y"}, MIXED),
    ],
)  # fmt: skip
def test_a_missing_column_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    assert error(jsonl(tmp_path, {"text": "a", "label": "a"}, row)) == LINE + message


@pytest.mark.parametrize(
    ("cells", "n"),
    [(["a", "b"], 2), ([], 0), ("a b c d e", 5), (["a b", "c"], 2)],
    ids=["few", "none", "many", "joined"],
)
def test_labels_that_do_not_match_the_words_are_refused(tmp_path: Path, cells: object, n: int) -> None:
    path = jsonl(tmp_path, {"text": "a b c", "labels": "x y x"}, {"text": "The girl stayed home", "labels": cells})
    assert error(path) == (
        f"{LINE}{n} labels for 4 words: The | girl | stayed | home\n"
        "Words are what blanks separate; give one label for each."
    )


def test_labels_of_words_must_be_a_list(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a b", "labels": "x y"}, {"text": "a", "labels": 3})
    assert error(path) == f'{LINE}labels 3 are no list\nWrite ["a", "b"], or "a b" with blanks between.'
    path = jsonl(tmp_path, {"text": "a b", "labels": ["x", None]})
    assert "line 1: the label is empty" in error(path)


def test_numbers_must_be_numbers_where_they_are_asked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a", "label": 1}, {"text": "b", "label": "two"})
    assert (
        error(path, labels="numbers") == f"{LINE}label 'two' is no number\nCorrect it, or set task.labels to classes."
    )
    assert read(path, labels="classes").classes == ("1", "two")
    path = jsonl(tmp_path, {"text": "a", "label": 1.5}, {"text": "b", "label": float("inf")})
    assert error(path) == f"{LINE}label inf is not finite\nGive a finite number, or take the row out."


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    path = csv(tmp_path, "text,label\na,x\nb,x\n")
    assert error(path) == "texts.csv: every label is 'x'\nA probe needs two different labels at least."
    words = jsonl(tmp_path, {"text": "a b", "labels": "x x"}, {"text": "c", "labels": "x"})
    assert error(words) == "texts.jsonl: every label is 'x'\nA probe needs two different labels at least."
    assert error(csv(tmp_path, "text,label\na,0.5\nb,0.5\n")).startswith("texts.csv: every label is 0.5")


def test_a_label_column_that_is_the_text_is_refused(tmp_path: Path) -> None:
    path = csv(tmp_path, "text,label\na film,a film\na book ,a book\n")
    assert error(path) == "texts.csv line 2: the label is the text itself, in every row\nGive labels of their own."
    path = csv(tmp_path, "text,label\na film,film\na book,book\na play,play\n")
    assert error(path) == (
        "texts.csv: its 3 rows have 3 different labels, such as 'film'\n"
        "Is the column the label? Classes must occur more than once."
    )
    assert make(csv(tmp_path, "text,label\na film,film\na book,book\nthe film,film\n"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("text,label\na,x,y\nb,z\n", "texts.csv line 2: has 3 cells and the header has 2"),
        ("text,label\na\n", "texts.csv line 2: has 1 cells and the header has 2"),
        ("text,text\na,b\n", "texts.csv line 1: column 'text' stands twice"),
        ('text,label\n"a,x\n', "texts.csv line 2: "),
        ("text,label\n", "texts.csv: has no prompts"),
        ("", "texts.csv: has no prompts"),
        ("text,label\na\0,x\n", "texts.csv line 2: holds a NUL character"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, content: str, part: str) -> None:
    assert error(csv(tmp_path, content)).startswith(part)


def test_files_that_cannot_be_read_name_their_key(tmp_path: Path) -> None:
    assert error(tmp_path / "none.csv").startswith("task.path: 'none.csv' does not exist")
    (tmp_path / "texts.txt").write_text("a")
    assert error(tmp_path / "texts.txt").startswith("task.path: 'texts.txt' is no .csv, .jsonl or .json file")


@pytest.mark.parametrize(
    "change",
    [{"path": ""}, {"labels": "text"}, {"marks": ["["]}, {"marks": ["", "]"]}, {"length": 0}, {"n": 0}]
    + [{"keep": "correct"}, {"length": 5, "chat_template": True}],
)  # fmt: skip
def test_bad_options_are_refused(change: dict[str, object]) -> None:
    assert LabelledOptions.model_validate({"path": "x.csv", "marks": ["[", "]"], "length": 5})
    with pytest.raises(ValidationError):
        LabelledOptions.model_validate({"path": "x.csv"} | change)
