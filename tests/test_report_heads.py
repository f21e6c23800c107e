"""The view of a run over heads says what its tables say, at any width, whatever the tokens are."""

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import altair as alt
import pandas as pd
import pytest
from rich.console import Console

from mechinterp_cli.report.grid import ColourScale
from mechinterp_cli.report.picture import COLOURS, Drawing
from mechinterp_cli.report.scores import LOOKS, look_of, score_map, strongest_heads
from mechinterp_cli.report.view import View, tables_needed, view_of
from tests.heads_frames import WORDS, Fake, records, table

HOSTILE = ("<script>alert(1)</script>", "[/INST]", "\x1b[31m", "w" * 300, "[bold]", "\u202e", "$a$", "")
STEPS = tuple((f"step-{step}", step * 1000) for step in (0, 10, 100, 1000, 3000))


def view(fake: Fake, *without: str, **instead: pd.DataFrame) -> View:
    tables = {**fake.tables(), **instead}
    return view_of(fake.manifest, {name: rows for name, rows in tables.items() if name not in without})


def text(shown: View, width: int = 100, *, plain: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=not plain, markup=False, emoji=False, highlight=False)
    for part in shown.draw(width, plain):
        console.print(part)
    return file.getvalue()


def specs(shown: View) -> dict[str, dict[str, Any]]:
    """The Vega-Lite specification of every picture."""
    found = {}
    for name, picture in shown.pictures:
        assert isinstance(picture, Drawing)
        found[name] = picture.spec()
    return found


def rows_of(spec: Mapping[str, Any], panel: int, layer: int | None = None) -> list[dict[str, Any]]:
    """The data of one mark."""
    inner = spec["concat"][panel]
    marks = [spec, inner] + ([] if layer is None else [inner["layer"][layer]])
    # Data that all layers or panels share is hoisted to what holds them.
    name = next(mark["data"]["name"] for mark in reversed(marks) if "data" in mark)
    rows: list[dict[str, Any]] = spec["datasets"][name]
    return rows


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def test_there_is_a_map_per_score_attention_and_the_proof() -> None:
    assert [name for name, _ in view(Fake()).pictures] == [
        "scores-previous_token",
        "scores-induction",
        "scores-first_token",
        "attention-induction",
        "causal",
    ]
    assert [name for name, _ in view(Fake(checkpoints=STEPS)).pictures][-1] == "training"


def test_tables_that_a_run_may_lack_leave_out_their_pictures() -> None:
    assert set(tables_needed("heads")) == {"scores", "patterns", "prompts", "causal", "summary", "baselines"}
    bare = view(Fake(), "patterns", "prompts", "causal", "summary", "baselines")
    assert {name.split("-")[0] for name, _ in bare.pictures} == {"scores"}
    assert "ablation" not in text(bare)
    assert "ablation" in text(view(Fake()))
    assert {row["ablation"] for row in bare.headline()} == {None}


def test_every_picture_is_png_and_svg() -> None:
    for _, picture in view(Fake(checkpoints=STEPS[:2], scores=("induction",))).pictures:
        assert picture.png()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.svg().startswith(b"<svg")


def test_cells_of_a_map_are_the_heads_scores() -> None:
    fake = Fake(layers=3, heads=4)
    spec = specs(view(fake))["scores-induction"]
    cells = {(cell["layer"], cell["column"]): cell["value"] for cell in rows_of(spec, 0, 0)}
    assert len(cells) == 12
    assert cells[2, "0"] == pytest.approx(fake.strength("induction", 2, 0, 1.0))
    assert "Chance (uniform attention over the visible keys): 0.031." in " ".join(spec["title"]["subtitle"])


def test_scores_from_0_to_1_go_from_white_to_blue_and_others_about_their_middle() -> None:
    found = specs(view(Fake(scores=("induction", "copying", "copying_eigenvalues", "k_composition", "direct_effect"))))
    scales = {
        name: spec["concat"][0]["layer"][0]["encoding"]["color"] for name, spec in found.items() if "scores" in name
    }
    domain = {name.removeprefix("scores-"): look["scale"]["domain"] for name, look in scales.items()}
    assert domain["induction"] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert scales["scores-induction"]["scale"]["range"] == list(COLOURS[3:])
    assert scales["scores-induction"]["legend"]["title"] == "induction"
    assert (domain["copying"][0], domain["copying"][3], domain["copying"][-1]) == (0.0, 0.5, 1.0)
    assert domain["copying_eigenvalues"][0] == -1.0
    assert domain["k_composition"][0] == 0.0
    assert 0 < domain["k_composition"][-1] < 0.1
    assert domain["direct_effect"][0] == -domain["direct_effect"][-1]


def test_every_score_has_words_and_an_unknown_one_is_drawn_by_its_values() -> None:
    assert all(look.meaning for look in LOOKS.values())
    rows = Fake(scores=("induction",)).scores_table().assign(score="new", chance=None)
    made = score_map(rows, "new", ())
    assert look_of("new").meaning == ""
    assert made.quantity == "new"
    assert made.colours == ColourScale(low=0.0, middle=0.0, high=float(rows["value"].max()))


@pytest.mark.parametrize(
    ("scale", "value", "share"),
    [((0, 0, 1), 0.25, 0.25), ((0, 0.5, 1), 0.25, -0.5), ((-2, 0, 2), 1, 0.5), ((0, 0, 1), 3, 1.0), ((0, 0, 0), 1, 0)],
)
def test_share_of_a_colour_scale(scale: tuple[float, float, float], value: float, share: float) -> None:
    low, middle, high = scale
    assert ColourScale(low=low, middle=middle, high=high).share(value) == share


def test_heads_without_a_number_are_grey_and_never_the_strongest() -> None:
    rows = Fake(layers=2, heads=2, kv_heads=2, scores=("induction",)).scores_table()
    odd = records(rows)
    for row, (status, value) in zip(odd, [("undefined", None), ("nan", math.nan), ("ok", 0.2)], strict=False):
        row |= {"status": status, "value": value}
    changed = table(odd)
    shown = view(Fake(layers=2, heads=2, kv_heads=2), scores=changed)
    cells = rows_of(specs(shown)["scores-induction"], 0, 1)
    assert [cell["state"] for cell in cells if cell["state"] != "ok"] == ["undefined", "nan"]
    assert [(row["layer"], row["head"]) for row in strongest_heads(changed, 10)][0] == (1, 0)
    assert len(strongest_heads(changed, 10)) == 2
    assert text(shown)


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_run_without_any_number_is_shown(value: float | None) -> None:
    rows = [{**row, "value": value, "status": "undefined"} for row in records(Fake().scores_table())]
    shown = view(Fake(), scores=table(rows))
    assert "?" in text(shown)
    assert all(picture.png() for name, picture in shown.pictures if name.startswith("scores"))
    empty = view(Fake(), scores=Fake().scores_table().head(0))
    assert [name for name, _ in empty.pictures] == ["attention-induction", "causal"]
    assert text(empty)


def test_scores_that_go_both_ways_are_ranked_by_magnitude_and_others_by_value() -> None:
    rows = [
        {"score": "direct_effect", "layer": 0, "head": head, "value": value} for head, value in enumerate((1.0, -3.0))
    ]
    assert [row["head"] for row in strongest_heads(table(rows), 2)] == [1, 0]
    other = [{**row, "score": "copying_eigenvalues"} for row in rows]
    assert [row["head"] for row in strongest_heads(table(other), 2)] == [0, 1]


def test_attention_pictures_are_the_pattern_below_the_diagonal() -> None:
    fake = Fake()
    spec = specs(view(fake))["attention-induction"]
    assert [panel["title"] for panel in spec["concat"]] == ["head 2.0, induction 0.90", "head 1.1, induction 0.07"]
    at = {(cell["query"], cell["key"]): cell["value"] for cell in rows_of(spec, 1, 1)}
    pattern = fake.pattern(1, 1, 12)
    assert at["3 ·John", "2 ⏎"] == pytest.approx(pattern[3, 2], abs=1e-5)
    assert len(at) == (pattern >= 0.002).sum() < 12 * 13 // 2
    white = {(row["query"], row["first"], row["last"]) for row in rows_of(spec, 1, 0)}
    assert len(white) == 12
    assert ("3 ·John", "0 ·the", "3 ·John") in white
    axis = spec["concat"][0]["layer"][1]["encoding"]["x"]
    assert axis["scale"]["domain"][:3] == ["0 ·the", "1 ·Mary", "2 ⏎"]


@pytest.mark.parametrize("length", [2, 12, 60, 200])
def test_attention_labels_have_room(length: int) -> None:
    tokens = (WORDS * 20)[:length]
    spec = specs(view(Fake(tokens=tokens, drawn=((2, 0),))))["attention-induction"]
    panel = spec["concat"][0]
    panel |= panel["layer"][1]
    axis = panel["encoding"]["x"]["axis"]
    drawn = min(length, 128)
    assert len(panel["encoding"]["x"]["scale"]["domain"]) == drawn
    assert panel["width"] / drawn * (drawn / len(axis["values"])) >= axis["labelFontSize"]
    assert panel["width"] < 700
    assert ("The last 128 of 200 tokens" in " ".join(spec["title"]["subtitle"])) is (length == 200)


def test_keys_that_cannot_be_seen_are_neither_white_nor_coloured() -> None:
    rows = [row for row in records(Fake().patterns_table()) if row["query"] - row["key"] not in (1, 5, 6)]
    spec = specs(view(Fake(), patterns=table(rows)))["attention-induction"]
    runs = [(row["first"], row["last"]) for row in rows_of(spec, 0, 0) if row["query"] == "9 <|im_start|>"]
    assert runs == [("0 ·the", "2 ⏎"), ("5 ,", "7 ·中"), ("9 <|im_start|>", "9 <|im_start|>")]


def test_attention_without_the_prompt_has_numbers_for_labels() -> None:
    spec = specs(view(Fake(), "prompts"))["attention-induction"]
    assert spec["concat"][0]["layer"][1]["encoding"]["y"]["scale"]["domain"][:2] == ["0 ?", "1 ?"]


def test_the_proof_stands_beside_random_heads() -> None:
    fake = Fake(causal=("induction", "previous_token"))
    spec = specs(view(fake))["causal"]
    assert [panel["title"] for panel in spec["concat"]] == [
        "induction, zero ablation",
        "induction, mean ablation",
        "previous_token, zero ablation",
        "previous_token, mean ablation",
    ]
    assert spec["columns"] == 2
    layers = spec["concat"][0]["layer"]
    area = next(layer for layer in layers if layer["mark"]["type"] == "area")
    band = {(row["name"], row["x"]): (row["y"], row["high"]) for row in spec["datasets"][area["data"]["name"]]}
    assert band["strongest heads", 2.0] == pytest.approx((1.8 * 0.8, 1.8 * 1.15))
    assert band["random heads", 4.0] == pytest.approx((-0.08, 0.44))
    zero, mean, *_ = (panel["layer"][-1]["encoding"]["y"]["scale"]["domain"] for panel in spec["concat"])
    assert zero == mean
    assert zero[0] < -0.08
    assert zero[1] > 2.39 * 1.15


def test_one_k_is_a_bar() -> None:
    spec = specs(view(Fake(ks=(2,))))["causal"]
    kinds = [layer["mark"]["type"] for layer in spec["concat"][0]["layer"]]
    assert "area" not in kinds
    assert kinds.count("rule") == 2


def test_the_causal_table_has_what_was_measured() -> None:
    shown = text(view(Fake(draws=20)), 120)
    assert "induction, zero ablation: effect on repeated_loss (nats per token), 1.073 unedited" in shown
    row = next(line for line in shown.splitlines() if line.startswith("| 2 |"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "2",
        "1.800",
        "[1.440, 2.070]",
        "0.060",
        "[-0.040, 0.220]",
        "2.250",
    ]
    proved = text(view(Fake(draws=199)), 120)
    assert "verdict" in proved
    assert "0.0050" in proved
    assert "verdict" not in shown.replace("no verdict below 199", "")


def test_a_sentence_names_the_heads_that_matter() -> None:
    def sentence(shown: View) -> str:
        return " ".join(text(shown, 200).split("\n\n")[-1].split()).rsplit("+ ", 1)[-1]

    assert sentence(view(Fake(draws=20))).startswith(
        "induction: 2.0 and 2.1 matter alone (repeated_loss +1.000, +0.500); without 2.0+2.1+1.3+2.3+0.1+0.2+1.0+1.2 "
        "(zero) repeated_loss changes by +2.391 [1.913, 2.749], without as many random heads by +0.240 [-0.160, 0.880] "
        "(20 random sets: no verdict below 199 draws)"
    )
    assert "without 2.0 (zero)" in sentence(view(Fake(draws=199)))
    assert "(199 random sets: yes, p = 0.0050)" in sentence(view(Fake(draws=199)))
    none = Fake().summary_table().assign(verdict="inconclusive")
    assert "no head alone is shown to matter" in sentence(view(Fake(), summary=none))
    assert "alone" not in sentence(view(Fake(), "summary"))


def test_heads_ablated_alone_are_those_of_the_score() -> None:
    summary = pd.concat([Fake().summary_table()] * 2, ignore_index=True)
    half = len(summary) // 2
    summary["score"] = ["induction"] * half + ["previous_token"] * half
    summary.loc[: half - 1, "verdict"] = "no"
    shown = text(view(Fake(causal=("induction", "previous_token")), summary=summary), 300)
    assert "induction: no head alone is shown to matter" in shown
    assert "previous_token: 2.0 and 2.1 matter" in shown


def test_an_effect_that_is_not_defined_is_said() -> None:
    rows = [{**row, "effect": None, "ci_low": None, "draws": 0} for row in records(Fake().causal_table())]
    shown = view(Fake(), causal=table([{**row, "random_effect": None} for row in rows]))
    assert "no effect is defined" in text(shown)
    assert "undefined" in text(shown)
    assert dict(shown.pictures)["causal"].png()


def test_only_the_first_metric_of_the_config_is_drawn() -> None:
    other = Fake().causal_table().query("metric == 'repeated_loss'").assign(metric="first_loss", effect=99.0)
    shown = view(Fake(), causal=pd.concat([other, Fake().causal_table()], ignore_index=True))
    assert {row["metric"] for row in shown.headline() if row["ablation"]} == {"repeated_loss"}
    assert "99.0" not in text(shown)
    drawn = rows_of(specs(shown)["causal"], 0, -1)
    assert max(row["y"] for row in drawn) == pytest.approx(2.4 * (1 - 0.5**8))


def test_the_gap_stands_last_and_gives_way_first() -> None:
    def header(shown: View, width: int) -> list[str]:
        row = next(line for line in text(shown, width).splitlines() if line.startswith("| k |"))
        return [cell.strip() for cell in row.strip("|").split("|")]

    proved = view(Fake(draws=199))
    names = ["k", "effect", "interval", "random", "random band", "p", "verdict", "loss_gap"]
    found = {width: header(proved, width) for width in range(40, 121, 5)}
    assert found[120] == names
    assert found[80] == names[:-1]
    assert all(shown == names for shown in found.values() if "loss_gap" in shown)
    # A run whose first metric is the gap has it once, and one without it has no such column.
    for metric, there in (("loss_gap", 1), ("repeated_loss", 0)):
        rows = Fake().causal_table().query(f"metric == '{metric}'")
        shown = view(Fake(), causal=rows)
        assert {row["metric"] for row in shown.headline() if row["ablation"]} == {metric}
        assert "loss_gap" not in header(shown, 200)
        assert text(shown, 200).count("effect on loss_gap") == 2 * there


def test_an_effect_on_the_gap_that_is_not_defined_is_said() -> None:
    rows = [{**row, "effect": None if row["metric"] == "loss_gap" else 2.0} for row in records(Fake().causal_table())]
    lines = text(view(Fake(), causal=table(rows)), 200).splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| 2 | ")]
    assert len(found) == 2
    assert all(row[-1] == "undefined" and row[1] == "2.000" for row in found)


@pytest.mark.parametrize(("effect", "matters"), [(0.3, True), (-0.3, False)])
@pytest.mark.parametrize("metric", ["repeated_loss", "loss_gap", "first_loss", "loss"])
def test_a_head_matters_where_its_ablation_raises_the_loss(metric: str, effect: float, matters: bool) -> None:
    fake = Fake(draws=199)
    causal = fake.causal_table().query("metric == 'repeated_loss'").assign(metric=metric)
    summary = fake.summary_table().query("metric == 'repeated_loss'").assign(metric=metric)
    summary.loc[summary["verdict"] == "yes", "effect"] = [effect, -0.7]
    shown = " ".join(text(view(fake, causal=causal, summary=summary), 200).split())
    assert (f"2.0 matters alone ({metric} +0.300); without 2.0" in shown) is matters
    assert ("no head alone is shown to matter; without 2.0" in shown) is not matters


def test_of_other_metrics_either_direction_matters() -> None:
    fake = Fake(draws=199)
    causal = fake.causal_table().query("metric == 'repeated_loss'").assign(metric="logit_diff")
    summary = fake.summary_table().query("metric == 'repeated_loss'").assign(metric="logit_diff")
    summary.loc[summary["verdict"] == "yes", "effect"] = [0.2, -0.7]
    shown = " ".join(text(view(fake, causal=causal, summary=summary), 200).split())
    assert "2.1 and 2.0 matter alone (logit_diff -0.700, +0.200)" in shown


def test_few_random_sets_are_told_as_such() -> None:
    rows = [{**row, "draws": 1, "p": 0.5, "verdict": "inconclusive"} for row in records(Fake().causal_table())]
    shown = " ".join(text(view(Fake(), causal=table(rows)), 200).split())
    assert "(1 random set: inconclusive, p = 0.5000)" in shown
    assert "199" not in shown


def test_along_training_the_last_checkpoint_is_mapped_and_the_loss_shares_the_axis() -> None:
    fake = Fake(checkpoints=STEPS)
    shown = view(fake)
    found = specs(shown)
    cells = {(cell["layer"], cell["column"]): cell["value"] for cell in rows_of(found["scores-induction"], 0, 0)}
    at_last = fake.scores_table().query(
        "checkpoint == 'step-3000' and score == 'induction' and layer == 2 and head == 0"
    )
    assert cells[2, "0"] == pytest.approx(float(at_last["value"].iloc[0]))
    assert "checkpoint step-3000, the last of 5" in " ".join(found["scores-induction"]["title"]["subtitle"])
    training = found["training"]
    assert [panel["title"] for panel in training["concat"]][::3] == ["induction", "in-context loss"]
    scales = {json.dumps(panel["layer"][-1]["encoding"]["x"]["scale"]) for panel in training["concat"]}
    assert len(scales) == 1
    scale = training["concat"][0]["layer"][-1]["encoding"]["x"]["scale"]
    assert (scale["type"], scale["constant"], scale["domain"][0]) == ("symlog", 10_000, 0)
    line = {(row["name"], row["x"]): row["y"] for row in rows_of(training, 0, -1)}
    assert line["head 2.0", 0.0] < 0.2 < line["head 2.0", 3_000_000.0]
    losses = {row["name"] for row in rows_of(training, 3, -1)}
    assert losses == {"repeated_loss", "first_loss"}


def test_along_training_without_any_number() -> None:
    fake = Fake(checkpoints=STEPS[:2])
    rows = table([{**row, "value": None, "status": "undefined"} for row in records(fake.scores_table())])
    assert "training" not in specs(view(fake, "baselines", scores=rows))
    losses = specs(view(fake, scores=rows))["training"]
    assert [panel["title"] for panel in losses["concat"]] == ["in-context loss"]
    assert text(view(fake, scores=rows))


def test_checkpoints_are_ordered_by_tokens_where_they_are_known() -> None:
    forward, backward = view(Fake(checkpoints=STEPS)), Fake(checkpoints=STEPS).tables()
    backward = {name: rows.iloc[::-1].reset_index(drop=True) for name, rows in backward.items()}
    assert "the last of 5" in text(view_of(Fake().manifest, backward))
    assert "checkpoint step-3000" in text(view_of(Fake().manifest, backward)).replace("\n", " ")
    assert "checkpoint step-3000" in text(forward).replace("\n", " ")


def test_checkpoints_without_tokens_stand_by_name() -> None:
    named = tuple((f"main-{i}", None) for i in "abc")
    training = specs(view(Fake(checkpoints=named)))["training"]
    x = training["concat"][-1]["layer"][-1]["encoding"]["x"]
    assert x["scale"]["domain"] == ["main-a", "main-b", "main-c"]
    assert x["title"] == "checkpoint"


def test_prompts_without_a_checkpoint_hold_for_all() -> None:
    fake = Fake(checkpoints=STEPS)
    prompts = fake.prompts_table().assign(checkpoint=pd.Series([None], dtype="string[pyarrow]"))
    spec = specs(view(fake, prompts=prompts))["attention-induction"]
    assert spec["concat"][0]["layer"][1]["encoding"]["y"]["scale"]["domain"][1] == "1 ·Mary"


def test_the_checkpoint_table_has_the_best_head_and_the_loss() -> None:
    lines = text(view(Fake(checkpoints=STEPS)), 120).splitlines()
    row = next(line for line in lines if line.startswith("| step-3000 "))
    assert "3,000,000" in row
    assert "(2.0)" in row
    assert "(1.1)" in row
    assert "4.210" in row
    assert not any("along training" in line for line in text(view(Fake()), 120).splitlines())


def test_one_head_of_one_layer() -> None:
    one = view(Fake(layers=1, heads=1, kv_heads=1, drawn=((0, 0),), ks=(1,), tokens=WORDS[:1]))
    assert all(picture.png() for _, picture in one.pictures)
    assert text(one, 60)


def test_key_value_heads_are_named_where_heads_share_them() -> None:
    assert "| kv |" in text(view(Fake(heads=4, kv_heads=2)), 120)
    assert "| kv |" not in text(view(Fake()), 120)


def test_compositions_name_the_earlier_head() -> None:
    assert "from" in text(view(Fake(scores=("k_composition",))), 120)
    assert "2.3 from 1.2" in text(view(Fake(scores=("k_composition",), layers=3)), 120)


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("fake", [Fake(draws=199), Fake(layers=9, heads=9, kv_heads=3, scores=tuple(LOOKS))])
def test_tables_fit_the_terminal_unbroken(width: int, fake: Fake) -> None:
    shown = view(replace(fake, checkpoints=(("step0", 0), ("step1", 10**12))))
    file = io.StringIO()
    for part in shown.draw(width, True):
        Console(file=file, width=10_000, markup=False, emoji=False, highlight=False).print(part)
    lines = [line for line in file.getvalue().splitlines() if line[:1] in "|+"]
    assert len(lines) > 20
    assert max(map(len, lines)) <= width
    assert text(shown, width).isascii()


def test_long_names_are_broken_and_nothing_else() -> None:
    long = view(Fake(checkpoints=(("a" * 90, 1), ("b", 10**12))))
    lines = text(long, 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum(line.count("a") for line in lines if line.startswith("| a")) >= 90
    assert max(map(len, text(long, 60, plain=False).splitlines())) > 60  # Colour codes take no room.


def test_colour_is_for_terminals_alone() -> None:
    shown = view(Fake())
    assert "\x1b[" in text(shown, plain=False)
    assert "\x1b" not in text(shown)


def test_tokens_and_names_cannot_act() -> None:
    fake = Fake(tokens=HOSTILE, checkpoints=(("\x1b[31mred", 0), ("<script>[/bold]", 5)))
    shown = view(fake)
    for plain in (True, False):
        seen = text(shown, 200, plain=plain)
        assert "\x1b[31m" not in seen
        assert "<script>[/bold]" in seen
    for name, picture in shown.pictures:
        svg = picture.svg().decode()
        assert "<script" not in svg
        assert "\x1b" not in svg
        assert isinstance(picture, Drawing)
        assert not any("\x1b" in found or "\u202e" in found for found in strings(picture.spec()))
        assert picture.png(), name
    labels = specs(shown)["attention-induction"]["concat"][0]["layer"][1]["encoding"]["x"]["scale"]["domain"]
    assert len(set(labels)) == len(HOSTILE)
    assert max(map(len, labels)) <= 20


def test_the_headline_is_plain_data_with_the_same_keys_in_every_row() -> None:
    rows = view(Fake(draws=199, top=2)).headline()
    assert len({tuple(row) for row in rows}) == 1
    heads = [(row["score"], row["layer"], row["head"]) for row in rows if row["ablation"] is None]
    assert heads[:3] == [("previous_token", 1, 1), ("previous_token", 0, 1), ("induction", 2, 0)]
    assert len(heads) == 6
    proofs = [row for row in rows if row["ablation"] is not None]
    assert len(proofs) == 8
    assert (proofs[0]["heads"], proofs[0]["verdict"], proofs[0]["p"]) == ("2.0", "yes", 0.005)
    json.dumps(rows, allow_nan=False)


def test_charts_are_valid() -> None:
    for _, picture in view(Fake(checkpoints=STEPS)).pictures:
        assert isinstance(picture, Drawing)
        assert isinstance(picture.chart(), alt.ConcatChart)
