import itertools
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from mechinterp_cli.config.base import TaskOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.build import build
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.fill import one_length
from mechinterp_cli.tasks.library.capitals import FACTS
from mechinterp_cli.tasks.library.ioi import TEMPLATES
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from tests.task_tokenizers import byte_level, decode, metaspace, symbols

ROOT = Path(__file__).parents[1]
GENERATED = ("ioi", "greater_than", "induction", "capitals", "agreement")


def make(task: str, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> PromptSet:
    return build(TaskOptions.registry[task].model_validate(options), tokenizer or byte_level())


def error(task: str, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        make(task, tokenizer, **options)
    return str(caught.value)


def words(prompt: Prompt, span: str, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    return decode(tokenizer or byte_level(), [prompt.clean_tokens[i] for i in prompt.spans[span]]).strip()


def differing(prompt: Prompt) -> list[int]:
    assert prompt.corrupt_tokens is not None
    return [i for i, (a, b) in enumerate(zip(prompt.clean_tokens, prompt.corrupt_tokens, strict=True)) if a != b]


@pytest.mark.parametrize("task", GENERATED)
def test_prompts_are_different_paired_and_seeded(task: str) -> None:
    prompts = make(task).prompts
    assert len(prompts) == len({p.clean for p in prompts}) == 32
    assert all(p.corrupt != p.clean and p.corrupt_tokens is not None and p.wrong_answer for p in prompts)
    assert all(p.spans["end"] == (p.length - 1,) for p in prompts)
    assert all(p.cluster and p.template and len(p.cluster) < 20 for p in prompts)
    assert prompts == make(task).prompts
    assert prompts != make(task, seed=1).prompts


@pytest.mark.parametrize("task", GENERATED)
def test_positions_mean_one_thing_within_a_template(task: str) -> None:
    options: dict[str, Any] = {"templates": "all"} if task in ("ioi", "capitals") else {}
    by_template: dict[str, set[tuple[object, ...]]] = {}
    for prompt in make(task, n=60, **options).prompts:
        shape = (prompt.length, tuple(sorted(prompt.spans.items())))
        by_template.setdefault(prompt.template, set()).add(shape)
    assert all(len(shapes) == 1 for shapes in by_template.values())


@pytest.mark.parametrize("task", GENERATED)
def test_texts_are_the_tokens(task: str) -> None:
    tokenizer = byte_level(bos=True)
    for prompt in make(task, tokenizer).prompts:
        assert decode(tokenizer, prompt.clean_tokens) == "<s>" + prompt.clean
        assert prompt.clean_tokens[0] == tokenizer.bos_token_id
    assert make(task, tokenizer).add_bos
    assert not make(task).add_bos


@pytest.mark.parametrize("task", GENERATED)
def test_beginning_token_shifts_every_span_by_one(task: str) -> None:
    bare = make(task, byte_level(bos=True), add_bos=False).prompts
    for without, with_bos in zip(bare, make(task, byte_level(bos=True)).prompts, strict=True):
        shifted = {name: tuple(i + 1 for i in at) for name, at in without.spans.items()}
        assert dict(with_bos.spans) == shifted


def test_same_prompts_whatever_the_hash_seed() -> None:
    script = (
        "from mechinterp_cli.tasks.rows import content_hash\n"
        "from tests.test_tasks_library import GENERATED, make\n"
        "print([content_hash(make(task)) for task in GENERATED])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_tasks_are_known_without_loading_torch() -> None:
    script = (
        "import sys, mechinterp_cli.tasks.build\n"
        "from mechinterp_cli.config.base import TaskOptions\n"
        "print('torch' in sys.modules or 'transformers' in sys.modules, *sorted(TaskOptions.registry))"
    )
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    others = ["file", "prompts", "repeats", "text"]
    labelled = ["induction_labels", "labelled", "number", "position", "sentiment", "truth"]
    assert output.split() == ["False", *sorted([*GENERATED, *others, *labelled])]


def test_every_option_is_described() -> None:
    for name, options in TaskOptions.registry.items():
        properties = options.model_json_schema()["properties"]
        assert all(p.get("description") for p in properties.values()), name


@pytest.mark.parametrize("task", GENERATED)
@pytest.mark.parametrize("change", [{"n": None}, {"n": 0}, {"n": "8"}, {"seed": 1.0}, {"chat_template": 1}, {"m": 1}])
def test_bad_options_are_refused(task: str, change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TaskOptions.registry[task].model_validate(change)


def test_ioi_sentence_is_wang_et_als() -> None:
    tokenizer = byte_level()
    for prompt in make("ioi", fillers="fixed").prompts:
        io, subject = words(prompt, "IO"), words(prompt, "S1")
        assert prompt.clean == f"When {io} and {subject} went to the store, {subject} gave a drink to"
        assert prompt.corrupt == f"When {io} and {subject} went to the store, {io} gave a drink to"
        assert (prompt.answer_text, prompt.wrong_answer_text) == (f" {io}", f" {subject}")
        assert prompt.answer == (prompt.clean_tokens[prompt.spans["IO"][0]],)
        assert differing(prompt) == list(prompt.spans["S2"])
        assert tokenizer.decode(prompt.clean_tokens[prompt.spans["S2+1"][0]]) == " gave"
        assert tokenizer.decode(prompt.clean_tokens[prompt.spans["S1+1"][0]]) == " went"


def test_ioi_orders_and_templates_are_balanced_clusters() -> None:
    prompts = make("ioi", templates="all", order="both", n=48).prompts
    assert set(Counter(p.cluster for p in prompts).values()) == {3}
    assert len({p.cluster for p in prompts}) == 2 * len(TEMPLATES) >= 12
    for prompt in prompts:
        first = "IO" if prompt.template.endswith("ABBA") else "S1"
        assert prompt.spans[first] == min(prompt.spans["IO"], prompt.spans["S1"])
        assert words(prompt, "S1") == words(prompt, "S2") != words(prompt, "IO")


@pytest.mark.parametrize(
    ("corruption", "changed"), [("swap_subject", 1), ("third_name", 1), ("random_names", 3)]
)  # fmt: skip
def test_ioi_corruptions(corruption: str, changed: int) -> None:
    for prompt in make("ioi", corruption=corruption).prompts:
        assert prompt.corrupt_tokens is not None
        at = [prompt.spans[name][0] for name in ("IO", "S1", "S2")]
        assert differing(prompt) == sorted(at[-changed:] if changed == 1 else at)
        names = {prompt.clean_tokens[at[0]], prompt.clean_tokens[at[1]]}
        new = {prompt.corrupt_tokens[i] for i in at}
        assert {"swap_subject": new == names, "third_name": len(new) == 3, "random_names": len(new | names) == 5}[
            corruption
        ]


def test_ioi_own_template() -> None:
    own = "So {A} met {B} and then {S} smiled at"
    prompts = make("ioi", templates=[1, own], n=4).prompts
    assert [p.template for p in prompts] == ["1-ABBA", "own-0-ABBA"] * 2
    assert prompts[1].clean.startswith("So ")
    for bad in ("{A} and {B} met", "{A} {B} {S} {C}", "{S} {A} {B}", "{A} {B} {S"):
        assert "task.templates: " in error("ioi", templates=[bad])


def test_ioi_template_that_does_not_exist_lists_those_that_do() -> None:
    text = error("ioi", templates=[8])
    assert "task.templates: 8 is outside 0..7" in text
    assert f"0: {TEMPLATES[0]}" in text
    assert "task.templates: -1 is outside" in error("ioi", templates=-1)


def test_ioi_too_few_different_prompts() -> None:
    text = error("ioi", templates=["{A} and {B}, {S} to"], n=1_000_000)
    assert "different prompts with this tokenizer, and 1000000 are asked for" in text
    assert "Lower task.n" in text


@pytest.mark.parametrize("unknown", [True, False])
def test_tasks_of_words_need_a_tokenizer_with_words(unknown: bool) -> None:
    tokenizer = symbols(unknown=unknown)
    assert "no usable names: this tokenizer has 0 of its 112 names" in error("ioi", tokenizer)
    assert "this tokenizer has 0 usable nouns" in error("greater_than", tokenizer)
    assert "has none of the 98 capitals as a single token" in error("capitals", tokenizer)
    assert "task agreement: no verb is a single token" in error("agreement", tokenizer)


def test_ioi_works_where_a_texts_start_is_marked_like_a_space() -> None:
    prompt = make("ioi", metaspace()).prompts[0]
    assert prompt.answer == (prompt.clean_tokens[prompt.spans["IO"][0]],)


def test_ioi_in_a_chat_answers_without_a_space() -> None:
    tokenizer = byte_level(bos=True, chat=True)
    (prompt,) = make("ioi", tokenizer, chat_template=True, n=1).prompts
    assert decode(tokenizer, prompt.answer) == prompt.answer_text == words(prompt, "IO", tokenizer)
    assert decode(tokenizer, prompt.clean_tokens) == f"<s>[user] {prompt.clean}\n[assistant]\n"


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_greater_than_sets_hold_years_that_are_all_later_or_all_not(digits: int) -> None:
    tokenizer = byte_level(digits)
    for prompt in make("greater_than", tokenizer).prompts:
        start = int(words(prompt, "start", tokenizer))
        shown = prompt.clean.rsplit("year", 1)[1].strip()
        begun = {sign: [shown + decode(tokenizer, [t]) for t in ids] for sign, ids in _sets(prompt).items()}
        assert all(int(text.ljust(4, "0")) > start for text in begun["right"])
        assert all(int(text.ljust(4, "9")) <= start for text in begun["wrong"])
        assert all(text.isdigit() and text[:2] == str(start)[:2] for texts in begun.values() for text in texts)
        # With four digits to a group some years are one token and the rest are split in several ways.
        complete = {1: 9, 2: 100, 3: 9, 4: 2}[digits]
        assert len(prompt.answer) + len(prompt.wrong_answer) >= complete


def _sets(prompt: Prompt) -> dict[str, tuple[int, ...]]:
    return {"right": prompt.answer, "wrong": prompt.wrong_answer}


def test_greater_than_with_whole_years() -> None:
    tokenizer = metaspace()
    for prompt in make("greater_than", tokenizer).prompts:
        start = int(words(prompt, "start", tokenizer))
        assert prompt.clean.endswith("to the year")
        assert {int(decode(tokenizer, [t])) for t in prompt.answer} == set(range(start + 1, start // 100 * 100 + 100))


def test_greater_than_corruption_starts_in_the_year_one() -> None:
    for prompt in make("greater_than").prompts:
        assert prompt.corrupt is not None
        year = words(prompt, "start")
        assert prompt.corrupt == prompt.clean.replace(year, year[:2] + "01")
        assert set(differing(prompt)) <= set(prompt.spans["YY"]) <= set(prompt.spans["start"])


def test_greater_than_centuries() -> None:
    prompts = make("greater_than", centuries=[18, 18]).prompts
    assert {words(p, "start")[:2] for p in prompts} == {"18"}
    with pytest.raises(ValidationError):
        TaskOptions.registry["greater_than"].model_validate({"centuries": [1800]})
    assert "goes on with a year" in error("greater_than", byte_level(bos=True, chat=True), chat_template=True)


@pytest.mark.parametrize("tokenizer", [byte_level(), symbols(), metaspace()], ids=["words", "symbols", "marked"])
@pytest.mark.parametrize("corruption", ["matched", "copied"])
def test_induction_changes_one_token_and_asks_for_the_one_that_followed(
    tokenizer: PreTrainedTokenizerFast, corruption: str
) -> None:
    for prompt in make("induction", tokenizer, corruption=corruption).prompts:
        tokens, corrupt = prompt.clean_tokens, prompt.corrupt_tokens
        assert corrupt is not None
        (matched,), (copied,), (end,) = (prompt.spans[name] for name in ("matched", "copied", "end"))
        assert tokens[matched] == tokens[end]
        assert copied == matched + 1
        assert prompt.answer == (tokens[copied],)
        assert differing(prompt) == [prompt.spans[corruption][0]]
        assert tokens.count(tokens[end]) == 2
        if corruption == "copied":
            assert prompt.wrong_answer == (corrupt[copied],)
            assert corrupt[copied] not in tokens
        else:
            assert prompt.wrong_answer[0] in set(tokens) & set(corrupt)
            assert prompt.wrong_answer != prompt.answer
            assert corrupt.count(tokens[end]) == 1


def test_templates_whose_lengths_differ_are_refused() -> None:
    prompts = [Prompt(text, tokens, (1,), "x", template="a") for text, tokens in (("x y", (1, 2)), ("xy", (3,)))]
    assert one_length([replace(prompts[0], template="b"), prompts[1]])
    with pytest.raises(UserError, match="template a: 'x y' has 2 tokens and 'xy' has 1"):
        one_length(prompts)


def test_induction_lengths() -> None:
    prompt = make("induction", prefix=3, block=5, seen=2, n=1).prompts[0]
    assert prompt.length == 3 + 5 + 2
    assert prompt.spans["matched"] == (4,)
    assert prompt.clean_tokens[3:5] == prompt.clean_tokens[8:]
    assert make("induction", prefix=0, block=2, n=1).prompts[0].length == 3
    assert "task.seen: 5 is not below task.block (5)" in error("induction", block=5, seen=5)


def test_induction_draws_ordinary_tokens_only() -> None:
    tokenizer = symbols()
    drawn = {t for p in make("induction", tokenizer, n=64).prompts for t in p.clean_tokens}
    assert drawn == set(range(64))
    for prompt in make("induction").prompts:
        assert all(decode(byte_level(), [t]).strip().isalpha() for t in prompt.clean_tokens)


def test_induction_needs_enough_tokens() -> None:
    assert make("induction", symbols(17), n=1)
    text = error("induction", symbols(16))
    assert "a prompt needs 17 different tokens and this tokenizer has 16 ordinary ones" in text
    few = error("induction", symbols(3), prefix=0, block=2, n=50)
    assert "only 6 different prompts were found, and 50 are asked for" in few


def test_capitals_answers_are_facts_and_corrupt_countries_as_long() -> None:
    capital_of = {fact.country: fact.capital for fact in FACTS}
    assert len(capital_of) == len(FACTS)
    for prompt in make("capitals", n=40, templates="all").prompts:
        assert prompt.corrupt is not None
        country = words(prompt, "subject")
        assert prompt.answer_text == f" {capital_of[country]}"
        assert prompt.cluster == country
        assert set(differing(prompt)) <= set(prompt.spans["subject"])
        others = [c for c in capital_of if prompt.clean.replace(country, c) == prompt.corrupt]
        assert [f" {capital_of[c]}" for c in others] == [prompt.wrong_answer_text]


def test_capitals_of_several_tokens_on_request() -> None:
    tokenizer = byte_level()
    several = make("capitals", answer_tokens="first", n=90).prompts
    assert any(" " in p.answer_text.strip() for p in several)
    assert any(len(p.spans["subject"]) > 1 for p in several)
    for prompt in several:
        assert prompt.answer == (tokenizer(prompt.answer_text)["input_ids"][0],)
    assert "different prompts with this tokenizer, and 99 are asked for" in error("capitals", n=99)
    assert "it needs {subject} once" in error("capitals", templates=["The capital is"])


def test_agreement_groups_and_numbers() -> None:
    prompts = make("agreement", n=40).prompts
    assert Counter(p.group for p in prompts) == {"aligned": 20, "conflicting": 20}
    for prompt in prompts:
        plural = {span: words(prompt, span).endswith("s") for span in ("subject", "attractor")}
        assert (prompt.group == "aligned") == (plural["subject"] == plural["attractor"])
        assert prompt.answer_text == (" are" if plural["subject"] else " is")
        assert {prompt.answer_text, prompt.wrong_answer_text} == {" is", " are"}
        assert differing(prompt) == list(prompt.spans["subject"])
        assert words(prompt, "subject").rstrip("s") != words(prompt, "attractor").rstrip("s")


def test_agreement_twins_differ_in_the_number_of_the_nearest_noun_alone() -> None:
    prompts = make("agreement", n=41).prompts
    for aligned, conflicting in zip(prompts[0:40:2], prompts[1:40:2], strict=True):
        assert (aligned.group, conflicting.group) == ("aligned", "conflicting")
        assert aligned.cluster == conflicting.cluster
        differ = [
            i for i, (a, b) in enumerate(zip(aligned.clean_tokens, conflicting.clean_tokens, strict=True)) if a != b
        ]
        assert differ == list(aligned.spans["attractor"])
    assert len({p.clean_tokens for p in prompts}) == 41


def test_agreement_may_end_in_a_word_that_is_neither_noun() -> None:
    for with_word, without in zip(make("agreement", adverb=True).prompts, make("agreement").prompts, strict=True):
        assert with_word.clean == without.clean + " now"
        assert max(with_word.spans["attractor"]) == with_word.length - 2
        assert max(without.spans["attractor"]) == without.length - 1


def test_agreement_options() -> None:
    plain = make("agreement", attractor="none", verbs="all").prompts
    assert all("attractor" not in p.spans and len(p.answer) == len(p.wrong_answer) == 3 for p in plain)
    assert {p.group for p in make("agreement", attractor="conflicting").prompts} == {"conflicting"}


def test_draws_are_what_they_were() -> None:
    # Fixed numbers on purpose: a change here changes the prompts of every recorded run.
    assert Draw(0).shuffled(range(8)) == [0, 3, 4, 7, 1, 2, 5, 6]
    assert [Draw(seed).below(1000) for seed in (7, 8)] == [323, 226]


@pytest.mark.parametrize(("space", "k"), [(1, 1), (50, 50), (10**6, 10**3), (150_000, 149_999)])
def test_distinct_draws(space: int, k: int) -> None:
    drawn = Draw(3).distinct(space, k)
    assert len(set(drawn)) == len(drawn) == k
    assert 0 <= min(drawn) <= max(drawn) < space


def test_draws_are_even() -> None:
    draw = Draw(1)
    counts = Counter(tuple(draw.distinct(4, 2)) for _ in range(12_000))
    assert set(counts) == set(itertools.permutations(range(4), 2))
    # Each of 12 outcomes is binomial with mean 1000 and standard deviation 30.
    assert all(abs(count - 1000) < 150 for count in counts.values())
    with pytest.raises(ValueError, match="5 different draws from 4"):
        draw.distinct(4, 5)
