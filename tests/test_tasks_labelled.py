"""Labelled tasks: what is labelled, how evenly, and where a label's tokens stand."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError
from sklearn.model_selection import GroupKFold
from transformers import PreTrainedTokenizerBase

from mechinterp_cli.config.base import TaskOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.metrics import check_prompts, find_metric
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.tasks.build import build, drop
from mechinterp_cli.tasks.labelled import label_rows, labelled, labels_of
from mechinterp_cli.tasks.library.agreement import NOUNS
from mechinterp_cli.tasks.library.capitals import FACTS
from mechinterp_cli.tasks.library.sentiment import WORDS
from mechinterp_cli.tasks.library.truth import ANIMALS, NUMBERS
from mechinterp_cli.tasks.prompts import Prompt, PromptSet, Word
from mechinterp_cli.tasks.registry import tasks_with_labels
from mechinterp_cli.tasks.rows import content_hash, describe, prompt_rows
from tests.models_fixtures import smollm2, toy
from tests.task_tokenizers import byte_level, metaspace, symbols

__all__ = ["smollm2", "toy"]

PLAIN: dict[str, dict[str, Any]] = {
    "truth": {"question": False},
    "number": {},
    "sentiment": {"question": False},
    "position": {},
    "induction_labels": {},
}
"""Options under which every tokenizer of English can say the task's answers."""
OF_CLASSES = ("truth", "number", "sentiment", "induction_labels")
CAPITALS = {fact.country: fact.capital for fact in FACTS}


def make(task: str, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> PromptSet:
    limits = {key: options.pop(key) for key in ("max_length", "vocab_size") if key in options}
    chosen = TaskOptions.registry[task].model_validate(PLAIN[task] | options)
    return build(chosen, tokenizer or byte_level(), **limits)


def error(task: str, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        make(task, tokenizer, **options)
    return str(caught.value)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens)))


def said(prompt: Prompt, span: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    return decode(tokenizer or byte_level(), [prompt.clean_tokens[i] for i in prompt.spans[span]]).strip()


def is_true(statement: str) -> bool:
    """What the world says of a statement, found from the words alone."""
    words = statement.removesuffix(".").replace(" not ", " ").split()
    negated = " not " in statement
    if words[1] == "capital":
        country, capital = " ".join(words).removeprefix("The capital of ").split(" is ")
        return (CAPITALS[country] == capital) != negated
    if words[1] == "number":
        rank = {word: place for place, word in enumerate(NUMBERS.split())}
        first, relation, second = rank[words[2]], words[4], rank[words[-1]]
    else:
        rank = {word: place for place, row in enumerate(ANIMALS) for word in row.split()}
        first, relation, second = rank[words[1]], words[3], rank[words[-1]]
    return (first > second if relation == "larger" else first < second) != negated


@pytest.mark.parametrize("task", PLAIN)
def test_prompts_are_different_labelled_and_seeded(task: str) -> None:
    prompts = make(task, n=40).prompts
    assert len(prompts) == len({p.clean_tokens for p in prompts}) == 40
    assert all(labels_of(p) and p.cluster and p.template for p in prompts)
    assert all(p.spans["end"] == (p.length - 1,) and p.spans["target"] for p in prompts)
    assert prompts == make(task, n=40).prompts
    assert {p.clean for p in prompts} != {p.clean for p in make(task, n=40, seed=1).prompts}
    assert task in tasks_with_labels()


@pytest.mark.parametrize("task", OF_CLASSES)
@pytest.mark.parametrize("n", [2, 7, 40, 41])
def test_classes_are_balanced(task: str, n: int) -> None:
    counts = Counter(labels_of(p)[0] for p in make(task, n=n).prompts)
    if task == "induction_labels":
        counts = Counter(label for p in make(task, n=n).prompts for label in labels_of(p))
    assert len(counts) == 2
    allowed = 0 if task == "induction_labels" else n % 2
    assert max(counts.values()) - min(counts.values()) == allowed


@pytest.mark.parametrize("negations", ["none", "both", "only"])
def test_statements_are_as_true_as_they_are_labelled(negations: str) -> None:
    prompts = make("truth", n=200, negations=negations).prompts
    assert all((p.label == "true") == is_true(p.clean) for p in prompts)
    assert {p.template.split("-")[0] for p in prompts} == {"capitals", "numbers", "animals"}
    assert all((p.group == "negated") == (" not " in p.clean) for p in prompts)
    groups = {"none": {"affirmative"}, "only": {"negated"}, "both": {"affirmative", "negated"}}
    assert {p.group for p in prompts} == groups[negations]


def test_a_negation_flips_the_truth() -> None:
    labels = {p.clean: p.label for p in make("truth", n=400).prompts}
    negated = [text for text in labels if " not " in text]
    assert len(negated) == 200
    for text in negated:
        assert {labels[text], labels[text.replace(" not ", " ")]} == {"true", "false"}


def test_all_that_is_said_of_a_fact_is_one_group_and_as_often_true_as_false() -> None:
    facts: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in make("truth", n=400).prompts:
        facts[prompt.cluster].append(prompt)
    assert len(facts) == 100
    for name, prompts in facts.items():
        assert Counter((p.label, p.group) for p in prompts) == {
            (label, group): 1 for label in ("true", "false") for group in ("affirmative", "negated")
        }
        parts = {said(p, span) for p in prompts for span in ("subject", "object")}
        assert set(name.split("-")) <= parts or name in parts


def test_no_word_tells_the_truth() -> None:
    prompts = make("truth", n=400).prompts
    for word in {word for p in prompts for word in p.clean.split()}:
        counts = Counter(p.label for p in prompts if word in p.clean.split())
        # A fact has every word as often in what is true as in what is false, once negations are counted.
        assert counts["true"] == counts["false"], word


def test_the_question_asks_for_the_label(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    chosen = TaskOptions.registry["truth"].model_validate({"n": 12})
    for prompt in build(chosen, tokenizer).prompts:
        assert prompt.clean.endswith(". This statement is")
        assert prompt.answer_text == f" {prompt.label}"
        assert prompt.wrong_answer_text == {" true": " false", " false": " true"}[prompt.answer_text]
        assert tokenizer.decode([prompt.clean_tokens[i] for i in prompt.spans["statement"]]) == prompt.clean[:-18]
        assert tokenizer.decode([prompt.clean_tokens[i] for i in prompt.spans["target"]]) == "."
        assert prompt.spans["target"] == prompt.spans["statement"][-1:]
    plain = make("truth", tokenizer, n=12).prompts
    assert all(p.answer == () and p.spans["target"] == p.spans["end"] for p in plain)


def test_topics_without_facts_enough_say_how_many_there_are() -> None:
    n = 4 * len(FACTS)
    assert len(make("truth", n=n, topics=["capitals"]).prompts) == n
    assert error("truth", n=n + 1, topics=["capitals"]) == (
        f"task truth: topic capitals has {len(FACTS)} facts, and {len(FACTS) + 1} are needed for {n + 1} statements\n"
        "Lower task.n, or use more topics (task.topics)."
    )


def test_every_word_after_the_subject_has_its_number() -> None:
    number = {form: label for noun in NOUNS for form, label in zip(noun, ("singular", "plural"), strict=True)}
    for prompt in make("number", n=80).prompts:
        subject = said(prompt, "target")
        words = prompt.clean.split(f"The {subject} ")[1].split()
        assert [word.type for word in prompt.words] == [word.casefold() for word in words]
        assert {word.label for word in prompt.words} == {number[subject]}
        spoken = [
            decode(byte_level(), [prompt.clean_tokens[i] for i in word.positions]).strip() for word in prompt.words
        ]
        assert spoken == words
        assert (number[said(prompt, "distractor")] == number[subject]) == (prompt.group == "aligned")
        assert prompt.answer_text == {"singular": " is| was| has", "plural": " are| were| have"}[number[subject]]


def test_the_nearest_noun_does_not_tell_the_subjects_number() -> None:
    prompts = make("number", n=80).prompts
    counts = Counter((p.words[0].label, said(p, "distractor").endswith("s")) for p in prompts)
    assert set(counts.values()) == {20}
    for distractor in ("aligned", "conflicting"):
        assert {p.group for p in make("number", n=8, distractor=distractor).prompts} == {distractor}


def test_both_numbers_of_a_noun_are_one_group() -> None:
    labels = defaultdict(set)
    for prompt in make("number", n=200).prompts:
        labels[prompt.cluster].add(prompt.words[0].label)
        assert said(prompt, "target").startswith(prompt.cluster)
    assert set(map(frozenset, labels.values())) == {frozenset({"singular", "plural"})}


def test_a_word_carries_one_sentiment_and_is_a_group() -> None:
    prompts = make("sentiment", n=200).prompts
    labels = {word: label for kind in WORDS.values() for label, words in kind.items() for word in words.split()}
    assert len(labels) == 48
    for prompt in prompts:
        assert prompt.cluster == said(prompt, "target")
        assert prompt.label == labels[prompt.cluster]
        assert prompt.cluster in {
            w for kind, by in WORDS.items() if kind == prompt.group for w in by[prompt.label].split()
        }
        assert said(prompt, "review") == prompt.clean
    counts = Counter(p.cluster for p in prompts)
    assert len(counts) == 48 and max(counts.values()) - min(counts.values()) == 1
    assert {p.group for p in make("sentiment", n=20, words="verbs").prompts} == {"verbs"}


def test_so_many_reviews_as_there_are_can_be_had() -> None:
    assert len({p.clean for p in make("sentiment", n=960, words="verbs").prompts}) == 960
    assert error("sentiment", n=961, words="verbs") == (
        "task sentiment: there are 960 different reviews, and 961 are asked for\n"
        "Lower task.n, or set task.words to both."
    )


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(bos=True), symbols()], ids=["words", "bos", "symbols"])
@pytest.mark.parametrize(("repeated", "stretches"), [(2, 1), (16, 3), (16, 8), (9, 4)])
def test_a_token_is_labelled_by_whether_the_next_one_is_a_repeat(
    tokenizer: PreTrainedTokenizerBase, repeated: int, stretches: int
) -> None:
    prompts = make("induction_labels", tokenizer, n=12, repeated=repeated, stretches=stretches)
    start = int(prompts.add_bos)
    for prompt in prompts.prompts:
        tokens = prompt.clean_tokens[start:]
        assert len(tokens) == 2 * repeated + 1
        expected = ["repeat" if tokens[i + 1] in tokens[: i + 1] else "new" for i in range(2 * repeated)]
        assert [word.label for word in prompt.words] == expected
        assert Counter(expected) == {"repeat": repeated, "new": repeated}
        assert [word.positions for word in prompt.words] == [(start + i,) for i in range(2 * repeated)]
        assert sum(a != b for a, b in zip(expected, expected[1:], strict=False)) == 2 * stretches - 1
        # What comes again follows what it followed before, but at the seams.
        pairs = set(zip(tokens, tokens[1:], strict=False))
        assert len(pairs) <= 2 * repeated - (repeated - stretches)


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(bos=True), symbols()], ids=["words", "bos", "symbols"])
def test_positions_are_labelled_with_themselves(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = make("position", tokenizer, length=9, n=20)
    for prompt in prompts.prompts:
        assert [word.label for word in prompt.words] == [float(word.positions[0]) for word in prompt.words]
        assert prompt.spans["target"] == tuple(range(int(prompts.add_bos), prompt.length))
        assert prompt.length == 9 + int(prompts.add_bos)
    first = Counter(p.words[0].type for p in make("position", symbols(4), length=9, n=400).prompts)
    # 100 are expected of each of the four symbols; the standard deviation is 8.7.
    assert all(abs(count - 100) < 40 for count in first.values()) and len(first) == 4


def test_random_tokens_work_with_the_toy(toy: LoadedModel) -> None:
    for task in ("position", "induction_labels"):
        prompts = make(task, toy.tokenizer, max_length=toy.anatomy.max_length, vocab_size=toy.embedding_rows)
        for prompt in prompts.prompts:
            assert [toy.tokenizer.decode([prompt.clean_tokens[w.positions[0]]]) for w in prompt.words] == [
                w.type for w in prompt.words
            ]
    assert error("truth", toy.tokenizer) == (
        "task truth: this tokenizer does not know the words of 'The capital of France is Paris.'\n"
        "Use a task of random tokens (induction_labels, position), or another model."
    )


@pytest.mark.parametrize("task", ["truth", "number", "sentiment"])
def test_tasks_of_english_say_what_a_tokenizer_lacks(task: str) -> None:
    for tokenizer in (metaspace(), symbols(), symbols(unknown=False)):
        assert error(task, tokenizer).startswith(f"task {task}: this tokenizer does not know the words of ")


def test_random_tokens_that_do_not_fit() -> None:
    assert make("position", length=20, max_length=20)
    assert error("position", length=20, max_length=19) == (
        "task.length: prompts of 20 tokens are longer than the model's context of 19\nLower task.length."
    )
    assert error("induction_labels", byte_level(bos=True), max_length=33).startswith(
        "task.repeated: prompts of 34 tokens are longer"
    )
    assert error("induction_labels", symbols(16)) == (
        "task.repeated: a prompt needs 17 different tokens and this tokenizer has 16 ordinary ones\n"
        "Lower task.repeated."
    )
    assert make("induction_labels", symbols(17))
    assert error("induction_labels", stretches=9) == (
        "task.stretches: 16 repeated tokens are too few for 9 stretches\nChoose 1 to 8, or raise task.repeated."
    )
    chat = byte_level(bos=True, chat=True)
    assert error("position", chat, chat_template=True).startswith("task.chat_template: random tokens are no message")
    assert error("induction_labels", symbols(3), repeated=2, stretches=1, n=50) == (
        "task induction_labels: only 12 different prompts were found, and 50 are asked for\n"
        "Lower task.n, or raise task.repeated."
    )


@pytest.mark.parametrize(
    ("task", "change"),
    [("truth", {"topics": []}), ("truth", {"topics": ["numbers", "numbers"]}), ("truth", {"topics": ["dogs"]})]
    + [("truth", {"question": 1}), ("truth", {"negations": "some"}), ("number", {"distractor": "none"})]
    + [("sentiment", {"words": "nouns"}), ("position", {"length": 1}), ("induction_labels", {"repeated": 1})]
    + [("induction_labels", {"stretches": 0}), ("position", {"keep": "correct"}), ("sentiment", {"n": None})],
)  # fmt: skip
def test_bad_options_are_refused(task: str, change: dict[str, object]) -> None:
    assert TaskOptions.registry[task].model_validate({})
    with pytest.raises(ValidationError):
        TaskOptions.registry[task].model_validate(change)


@pytest.mark.parametrize("task", PLAIN)
@pytest.mark.parametrize("bos", [False, True])
def test_spans_and_words_point_to_their_characters(task: str, bos: bool, smollm2: LoadedModel) -> None:
    for tokenizer in (smollm2.tokenizer, byte_level(bos=bos)):
        prompts = make(task, tokenizer, n=12, **({"add_bos": True} if bos else {}))
        start = int(prompts.add_bos)
        assert start == int(bos)
        for prompt in prompts.prompts:
            assert decode(tokenizer, prompt.clean_tokens[start:]) == prompt.clean
            for word in prompt.words:
                text = decode(tokenizer, [prompt.clean_tokens[i] for i in word.positions])
                assert text.strip().casefold() == word.type.strip().casefold()
            spans = {name: said(prompt, name, tokenizer) for name in prompt.spans}
            if task == "truth":
                assert prompt.clean.endswith(f" {spans['object']}.") and spans["target"] == "."
                assert f" {spans['subject']} is " in prompt.clean
                assert spans["statement"] == prompt.clean
            if task == "number":
                assert prompt.clean.startswith(f"The {spans['target']} ")
                assert prompt.clean.endswith(f" {spans['distractor']}")
            if task == "sentiment":
                assert (spans["target"], spans["review"]) == (prompt.cluster, prompt.clean)
                assert f" {spans['thing']}" in prompt.clean


@pytest.mark.parametrize("task", ["truth", "number", "sentiment"])
def test_spans_and_words_stand_within_a_chat(task: str, smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    plain, chat = (make(task, tokenizer, n=4, chat_template=wrapped).prompts for wrapped in (False, True))
    for bare, wrapped in zip(plain, chat, strict=True):
        shift = wrapped.spans["target"][0] - bare.spans["target"][0]
        assert shift > 3
        for name in set(bare.spans) - {"end"}:
            assert said(wrapped, name, tokenizer) == said(bare, name, tokenizer)
        assert [w.type for w in wrapped.words] == [w.type for w in bare.words]
        assert [tuple(i - shift for i in w.positions) for w in wrapped.words] == [w.positions for w in bare.words]


@pytest.mark.parametrize("task", OF_CLASSES)
def test_grouped_folds_have_both_classes_and_share_no_group(task: str) -> None:
    examples = labelled(make(task, n=100))
    targets, groups = examples.targets, examples.groups
    for train, test in GroupKFold(5).split(targets, targets, groups):
        sides = [{groups[i] for i in side} for side in (train, test)]
        assert not sides[0] & sides[1]
        assert all({targets[i] for i in side} == {0, 1} for side in (train, test))


def test_examples_are_the_prompts_with_numbered_classes() -> None:
    prompts = make("truth", n=20)
    examples = labelled(prompts)
    assert (examples.classes, examples.per_word, examples.task) == (("false", "true"), False, "truth")
    for prompt, example in zip(prompts.prompts, examples.examples, strict=True):
        assert example.targets == (example.target,) == (int(prompt.label == "true"),)
        assert (example.text, example.tokens, example.spans) == (prompt.clean, prompt.clean_tokens, prompt.spans)
        assert (example.group, example.factor, example.template) == (prompt.cluster, prompt.group, prompt.template)
    assert examples.groups == tuple(p.cluster for p in prompts.prompts)
    assert examples.word_types == ()
    assert len(examples.targets) == 20


def test_labelled_words_have_a_type_a_target_and_the_group_of_their_text() -> None:
    prompts = make("number", n=20)
    examples = labelled(prompts)
    words = [(p, w) for p in prompts.prompts for w in p.words]
    assert (examples.classes, examples.per_word) == (("plural", "singular"), True)
    assert examples.targets == tuple(int(w.label == "singular") for _, w in words)
    assert examples.word_types == tuple(w.type for _, w in words)
    assert examples.groups == tuple(p.cluster for p, _ in words)
    assert all(example.target is None for example in examples.examples)
    assert len(set(examples.word_types)) < len(words) / 3


def test_numbers_stay_numbers() -> None:
    examples = labelled(make("position", length=5, n=4))
    assert (examples.classes, examples.targets) == (None, (0.0, 1.0, 2.0, 3.0, 4.0) * 4)
    assert all(isinstance(target, float) for target in examples.targets)


def test_rows_of_labels_say_all_of_them() -> None:
    examples = labelled(make("number", n=6))
    rows = label_rows(examples)
    assert [row["target"] for row in rows] == list(examples.targets)
    assert [examples.classes[row["target"]] for row in rows if examples.classes] == [row["class"] for row in rows]
    for row in rows:
        word = examples.examples[row["prompt"]].words[row["word"]]
        assert (row["positions"], row["word_type"]) == (list(word.positions), word.type)
    (row, *_) = label_rows(labelled(make("sentiment", n=6)))
    assert (row["prompt"], row["word"], row["positions"], row["word_type"]) == (0, None, None, None)
    assert (row["class"], row["target"], row["factor"] in WORDS) == ("positive", 1, True)
    assert {row["class"] for row in label_rows(labelled(make("position", n=2)))} == {None}


def test_prompts_without_labels_are_refused() -> None:
    prompts = build(TaskOptions.registry["ioi"].model_validate({"n": 2}), byte_level())
    with pytest.raises(UserError) as caught:
        labelled(prompts)
    assert str(caught.value) == (
        "task 'ioi' has no labels: prompt 0 has none\n"
        "Use a task with labels: induction_labels, labelled, number, position, sentiment, truth."
    )


def test_one_class_that_is_left_is_refused() -> None:
    prompts = make("truth", n=8)
    false = [i for i, p in enumerate(prompts.prompts) if p.label == "false"]
    assert labelled(drop(prompts, false[1:], "x")).targets.count(0) == 1
    with pytest.raises(UserError) as caught:
        labelled(drop(prompts, false, "x"))
    assert str(caught.value) == ("task truth: every label is 'true'\nA probe needs two different labels at least.")


def test_labels_count_in_the_hash_and_stand_in_the_description() -> None:
    prompts = make("truth", n=2)
    first, second = prompts.prompts
    flipped = replace(prompts, prompts=(replace(first, label="false"), second))
    bare = replace(prompts, prompts=tuple(replace(p, label=None) for p in prompts.prompts))
    assert len({content_hash(prompts), content_hash(flipped), content_hash(bare)}) == 3
    assert "labels: true" in describe(first, byte_level()).lines()
    assert not [line for line in describe(bare.prompts[0], byte_level()).lines() if "label" in line]
    worded = replace(bare, prompts=(replace(first, label=None, words=(Word((1,), "capital", 2.0),)), second))
    assert content_hash(worded) != content_hash(bare)
    assert "labels: 'capital' at [1]: 2.0" in describe(worded.prompts[0], byte_level()).lines()
    assert [row["text"] for row in prompt_rows(prompts, byte_level())] == [first.clean, second.clean]


@pytest.mark.parametrize("task", ["position", "truth"])
def test_what_needs_answers_says_so(task: str) -> None:
    prompts = make(task, n=4)
    check_prompts([find_metric("kl")], prompts.prompts, prompts.task)
    with pytest.raises(UserError) as caught:
        check_prompts([find_metric("logit_diff")], prompts.prompts, prompts.task)
    assert caught.value.cause == f"metrics: logit_diff needs an answer, and prompt 0 of task {task!r} has none"


def test_the_number_of_a_subject_is_what_the_verb_needs() -> None:
    prompts = make("number", n=4)
    check_prompts([find_metric("logit_diff")], prompts.prompts, prompts.task)
    labels = {p.clean: p.words[0].label for p in make("number", n=400).prompts}
    for prompt in prompts.prompts:
        assert len(prompt.answer) == len(prompt.wrong_answer) == 3
        assert prompt.corrupt is not None and prompt.corrupt_tokens is not None
        assert {labels[prompt.clean], labels[prompt.corrupt]} == {"singular", "plural"}
        pairs = enumerate(zip(prompt.clean_tokens, prompt.corrupt_tokens, strict=True))
        assert tuple(i for i, (a, b) in pairs if a != b) == prompt.spans["target"]
