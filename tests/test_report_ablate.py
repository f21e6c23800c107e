"""The view of an ablation says what its tables say, at any width, whatever sets and tokens are called."""

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from mechinterp_cli.report.picture import Drawing
from mechinterp_cli.report.rows import having, without
from mechinterp_cli.report.trials import members_text
from mechinterp_cli.report.view import View, tables_needed, view_of
from tests.ablate_frames import Fake, frame, records

HOSTILE = ("<script>alert(1)</script>", "[/INST]", "\x1b[31mred", "w" * 300, "\u202e", "[bold]\n", "")
STEPS = tuple((f"step-{step}", step * 1000) for step in (0, 10, 100))
GROUPS = ("aligned", "conflicting")
SAID = (" and then the store", " and and", " and then the store", "", "\x1b[31m[bold]\n")
EVERY = [
    Fake(),
    Fake(design="cumulative", length=20, draws=199),
    Fake(design="keep", length=20),
    Fake(design="set", groups=GROUPS),
    Fake(design="pairs"),
    Fake(layers=1, continuations=SAID),
    Fake(metrics=("logit_diff",), normalised=True, positions=3, values=("resample",), layers=2, heads=2),
    Fake(checkpoints=STEPS),
]


REALS = {
    "effect", "ci_low", "ci_high", "random_effect", "random_low", "random_high", "difference", "p", "baseline",
    "full", "empty", "alone", "without", "faithfulness", "completeness", "faithfulness_low", "interaction",
    "effect_a", "effect_b", "joint", "value",
}  # fmt: skip


def view(fake: Fake, *lacking: str, **instead: pd.DataFrame) -> View:
    tables = {**fake.tables(), **instead}
    return view_of(fake.manifest, {name: rows for name, rows in tables.items() if name not in lacking})


def text(shown: View, width: int = 100, *, plain: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=not plain, markup=False, emoji=False, highlight=False)
    for part in shown.draw(width, plain):
        console.print(part)
    return file.getvalue()


def cells(shown: str, first: str) -> list[str]:
    """The cells of the table row that begins so."""
    row = next(line for line in shown.splitlines() if line.startswith("|") and line.strip("| ").startswith(first))
    return [cell.strip() for cell in row.strip("|").split("|")]


def specs(shown: View) -> dict[str, dict[str, Any]]:
    """The Vega-Lite specification of every picture."""
    found = {}
    for name, picture in shown.pictures:
        assert isinstance(picture, Drawing)
        found[name] = picture.spec()
    return found


def names(shown: View) -> list[str]:
    return [name for name, _ in shown.pictures]


def data(spec: Mapping[str, Any], *columns: str) -> list[dict[str, Any]]:
    """All rows of data that have these columns."""
    return [row for rows in spec["datasets"].values() for row in rows if set(columns) <= set(row)]


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


def title_of(spec: Mapping[str, Any]) -> str:
    return " ".join([*spec["title"]["text"], *spec["title"]["subtitle"]])


@pytest.mark.parametrize(
    ("fake", "expected"),
    [
        (Fake(), ["00-head-zero-loss", "00-head-mean-loss"]),
        (Fake(design="cumulative", length=9), ["curve-loss", "curve-kl", "positions"]),
        (Fake(design="keep"), ["circuits"]),
        (Fake(design="set", length=9), ["positions"]),
        (Fake(design="pairs"), ["interactions"]),
        (Fake(values=("zero",), groups=GROUPS), ["00-head-zero-loss", "contrasts"]),
        (Fake(design="cumulative", metrics=("kl",), checkpoints=STEPS), ["curve-kl", "training"]),
    ],
)
def test_every_design_has_its_pictures(fake: Fake, expected: list[str]) -> None:
    assert names(view(fake)) == expected


def test_tables_that_a_run_may_lack_leave_out_their_parts() -> None:
    assert set(tables_needed("ablate")) == {"summary", "prompts", "baselines", "curve", "circuits", "interactions",
                                            "contrasts", "positions", "words"}  # fmt: skip
    fake = Fake(design="keep", groups=GROUPS, length=9, continuations=SAID[:2])
    whole, bare = view(fake), view(fake, "baselines", "circuits", "contrasts", "positions", "words")
    assert names(whole) == ["circuits", "contrasts", "positions"]
    assert names(bare) == []
    for words in ("faithfulness", "differ between", "prompt 0:", "2.100 unedited"):
        assert words in text(whole)
        assert words not in text(bare)
    assert "strongest ablations" in text(bare)


@pytest.mark.parametrize("fake", EVERY)
def test_every_picture_is_png_and_svg(fake: Fake) -> None:
    for _, picture in view(fake).pictures:
        assert picture.png()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.svg().startswith(b"<svg")


def test_cells_of_a_map_are_the_effects_of_its_value() -> None:
    fake = Fake()
    found = specs(view(fake))
    for name, factor in (("zero", 1.0), ("mean", 0.8)):
        spec = found[f"00-head-{name}-loss"]
        at = {(row["layer"], row["column"]): row["value"] for row in data(spec, "layer", "column")}
        assert len(at) == 12
        assert at[2, "0"] == pytest.approx(factor * fake.strength("2.0"))
        assert title_of(spec).startswith(f"heads, {name} ablation, repeats, single toy-induction, loss")


def test_effects_are_normalised_where_there_is_something_to_normalise_by() -> None:
    fake = Fake(metrics=("logit_diff",), normalised=True, values=("zero",))
    spec = specs(view(fake))["00-head-zero-logit_diff"]
    at = {(row["layer"], row["column"]): row["value"] for row in data(spec, "layer", "column")}
    assert at[2, "0"] == pytest.approx(fake.strength("2.0") / 4)
    assert "normalised effect on logit_diff" in text(view(fake))
    assert "normalised" not in text(view(Fake()))
    assert cells(text(view(fake)), "1")[2] == f"{fake.strength('2.0') / 4:.3f}"


def test_units_that_share_a_cell_are_said() -> None:
    fake = Fake(values=("zero",))
    rows = [{**row, "head": None, "label": f"{row['label']}+{row['label']}"} for row in records(fake.summary_table())]
    shared = specs(view(fake, summary=frame("summary", rows)))["00-head-zero-loss"]
    assert "strongest that it holds" in title_of(shared)
    assert "strongest that it holds" not in title_of(specs(view(fake))["00-head-zero-loss"])


def test_maps_of_edges_say_where_they_lead() -> None:
    fake = Fake(values=("zero",))
    manifest = fake.manifest
    manifest.config["ablate"]["units"] = [{"kind": "edge", "keys": ["subject", 3]}]
    found = specs(view_of(manifest, fake.tables()))
    assert title_of(found["00-edge-zero-loss"]).startswith("attention edges to subject, 3, zero ablation")


def test_only_the_first_metric_is_told_and_drawn_but_for_rankings() -> None:
    fake = Fake(design="keep", metrics=("kl", "loss"), groups=GROUPS)
    assert {row["metric"] for row in view(fake).headline()} == {"kl"}
    assert "loss" not in text(view(fake))
    other = Fake(metrics=("top1", "loss"))
    summary = other.summary_table()
    assert "effect on loss" in text(view(other, summary=summary[summary["metric"] == "loss"]))


def test_a_token_stands_beside_a_unit_at_a_position() -> None:
    fake = Fake(positions=4, values=("zero",), layers=2, heads=2)
    shown = view(fake)
    label = str(shown.headline()[0]["label"]).removesuffix(", zero")
    token = ("_the", "_Mary", "\\n", "_John")[int(label.split("@")[1])]
    assert cells(text(shown), "1")[1] == f"{label} {token}"


def test_random_rankings_and_joint_effects_are_not_among_the_strongest() -> None:
    for design in ("cumulative", "pairs", "keep"):
        shown = view(Fake(design=design))
        told = [row for row in shown.headline() if row["table"] == "summary"]
        assert {row["design"] for row in told} <= {"single", "set", "keep"}
        assert "random 1" not in text(shown)
        assert "everything" not in text(shown).replace("with everything ablated", "")
    assert any(row["table"] == "summary" for row in view(Fake(design="pairs")).headline())


def test_curves_of_one_metric_stand_side_by_side_on_one_scale() -> None:
    found = specs(view(Fake(design="cumulative")))
    spec = found["curve-loss"]
    assert [panel["title"] for panel in spec["concat"]] == ["zero ablation", "mean ablation"]
    assert spec["columns"] == 2
    zero, mean = (panel["layer"][-1]["encoding"]["y"]["scale"]["domain"] for panel in spec["concat"])
    assert zero == mean
    lines = {(row["name"], row["x"], round(row["y"], 3)) for row in data(spec, "name", "x", "y")}
    assert ("strongest heads", 2.0, 1.8) in lines
    assert ("random heads", 8.0, 0.24) in lines
    bands = [row for row in data(spec, "high") if row["name"].startswith("random") and row["x"] == 4]
    assert (bands[0]["y"], bands[0]["high"]) == pytest.approx((-0.08, 0.44))
    assert "kl (nats)" in found["curve-kl"]["concat"][0]["layer"][-1]["encoding"]["y"]["title"]


def test_the_curves_table_has_what_was_measured() -> None:
    shown = text(view(Fake(design="cumulative", draws=199)), 120)
    assert "zero ablation: effect on loss (nats per token), 2.000 unedited" in shown
    assert "heads, strongest first: 2.0 1.1 1.3" in shown
    assert cells(shown, "2") == ["2", "1.800", "[1.440, 2.070]", "0.060", "[-0.040, 0.220]", "0.0050", "yes"]
    assert "without 2.0 (zero) loss changes by +1.200 [0.960, 1.380], without as many random heads by" in shown
    assert "no verdict below 199" in text(view(Fake(design="cumulative", draws=20)), 300)


def test_units_of_several_kinds_are_units() -> None:
    fake = Fake(design="cumulative")
    manifest = fake.manifest
    manifest.config["ablate"]["units"].append({"kind": "mlp"})
    assert "units, strongest first" in text(view_of(manifest, fake.tables()))


def test_sets_have_faithfulness_and_completeness() -> None:
    fake = Fake(design="keep")
    shown = text(view(fake), 100)
    assert "sets, zero ablation: loss (nats per token): 2.000 unedited, 7.000 with everything ablated" in shown
    table = shown[shown.index("sets, zero ablation") :]
    assert cells(table, "circuit") == [
        "circuit",
        "2",
        "2.400",
        "3.500",
        "0.920 [0.85, 0.97]",
        "0.300 [0.20, 0.40]",
        "32",
    ]
    spec = specs(view(fake))["circuits"]
    dots = {(row["name"], row["series"]): row["value"] for row in data(spec, "name", "series") if "high" not in row}
    assert dots["circuit", "faithfulness"] == pytest.approx(0.92)
    assert dots["other", "faithfulness"] == pytest.approx(0.22)
    bars = {(row["name"], row["series"]): (row["value"], row["high"]) for row in data(spec, "series", "high")}
    assert bars["circuit", "faithfulness"] == pytest.approx((0.85, 0.97))


def test_shares_that_are_not_defined_are_said_and_not_drawn() -> None:
    fake = Fake(design="keep", values=("zero",))
    rows = [{**row, "faithfulness": None, "completeness": math.nan} for row in records(fake.circuits_table())]
    shown = view(fake, circuits=frame("circuits", rows))
    assert text(shown).count("undefined") == 4
    assert [row for row in data(specs(shown)["circuits"], "series") if "high" not in row] == []


def test_interactions_have_names_on_both_axes() -> None:
    spec = specs(view(Fake(design="pairs")))["interactions"]
    assert [panel["title"] for panel in spec["concat"]] == ["zero ablation", "mean ablation"]
    first = spec["concat"][0]
    own = {part["data"]["name"] for part in (first, *first["layer"]) if "data" in part}
    rows = [row for name in own for row in spec["datasets"][name] if {"layer", "column"} <= set(row)]
    zero = {(row["layer"], row["column"]): row["value"] for row in rows}
    assert zero["1.1", "2.0"] == zero["2.0", "1.1"] == pytest.approx(-1.3)
    assert zero["1.1", "0.3"] == pytest.approx(0.05)
    assert zero.get(("1.1", "1.1")) is None
    encoding = spec["concat"][0]["layer"][0]["encoding"]
    assert encoding["y"]["scale"]["domain"] == encoding["x"]["scale"]["domain"] == ["1.1", "2.0", "0.3"]
    colours = encoding["color"]["scale"]["domain"]
    assert colours[0] == -colours[-1] == pytest.approx(-1.3)


def test_interactions_are_listed_by_magnitude() -> None:
    shown = text(view(Fake(design="pairs", values=("zero",))), 120)
    table = shown[shown.index("strongest of 3 interactions") :]
    assert [cells(table, str(i))[1:3] for i in (1, 2, 3)] == [["1.1", "2.0"], ["2.0", "0.3"], ["1.1", "0.3"]]
    assert cells(table, "1")[-3:] == ["-1.300", "[-1.400, -1.200]", "32"]
    nothing = [{**row, "interaction": None} for row in records(Fake(design="pairs").interactions_table())]
    shown_none = view(Fake(design="pairs"), interactions=frame("interactions", nothing))
    assert "no interaction on loss (nats per token) is defined" in text(shown_none)
    assert dict(shown_none.pictures)["interactions"].png()


def test_groups_have_dots_with_their_own_intervals_and_a_difference() -> None:
    fake = Fake(groups=GROUPS, values=("zero",), top=2)
    spec = specs(view(fake))["contrasts"]
    effect = fake.strength("2.0")
    bars = {(row["name"], row["series"]): (row["value"], row["high"]) for row in data(spec, "series", "high")}
    assert bars["2.0", "aligned"] == pytest.approx((effect - 0.5, effect), abs=1e-6)
    assert bars["2.0", "difference"] == pytest.approx((-0.8, -0.41))
    assert {name for name, _ in bars} == {"2.0", "1.1"}
    assert "10 more are in the table" in title_of(spec)
    # The interval of another number is not drawn.
    moved = [{**row, "effect_a": row["effect_a"] + 0.1} for row in records(fake.contrasts_table())]
    other = specs(view(fake, contrasts=frame("contrasts", moved)))["contrasts"]
    assert {row["series"] for row in data(other, "series", "high")} == {"conflicting", "difference"}


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (
            "yes",
            "does the effect of 2.0 differ between aligned and conflicting? yes: difference -0.600 [-0.800, -0.410]",
        ),
        ("no", "does the effect of 2.0 differ between aligned and conflicting? no within 0.2: difference -0.600 [-0.8"),
        ("inconclusive", "and conflicting? inconclusive: difference -0.600 [-0.800, -0.410]"),
    ],
)
def test_the_verdict_is_a_sentence(verdict: str, expected: str) -> None:
    fake = Fake(groups=GROUPS, values=("zero",), verdict=verdict, margin=0.2)
    assert expected in text(view(fake), 200)


def test_the_strongest_of_every_block_and_every_set_has_its_sentence() -> None:
    def asked(fake: Fake, **instead: pd.DataFrame) -> list[str]:
        lines = text(view(fake, **instead), 200).splitlines()
        return [line.split(" differ")[0].removeprefix("does the effect of ") for line in lines if "? yes" in line]

    fake = Fake(groups=GROUPS)
    assert asked(fake) == ["2.0 (zero)", "2.0 (mean)"]
    blocks = [{**row, "block": row["layer"]} for row in records(fake.summary_table())]
    found = asked(fake, summary=frame("summary", blocks))
    assert {"2.0 (zero)", "2.0 (mean)", "1.1 (zero)", "1.1 (mean)"} < set(found)
    assert len(found) == 5
    assert asked(Fake(groups=GROUPS, design="set", values=("zero",))) == ["circuit", "other"]


def test_trials_are_called_the_same_in_every_table() -> None:
    fake = Fake(design="set", groups=GROUPS, length=4, values=("zero",), continuations=SAID[:2])
    shown = view(fake)
    assert "circuit: 1.1" not in text(shown, 200)
    found = specs(shown)
    assert {row["name"] for row in data(found["contrasts"], "name")} == {"circuit", "other"}
    assert {row["name"] for row in data(found["positions"], "name")} == {"unedited", "circuit", "other"}
    bare = text(view(fake, summary=fake.summary_table().head(0)), 200)
    assert "circuit: 1.1+2.0 " in bare
    assert ", zero" not in bare


def test_groups_without_a_defined_effect() -> None:
    fake = Fake(groups=GROUPS, values=("zero",))
    empty = [{**row, "effect_a": None, "effect_b": math.nan} for row in records(fake.contrasts_table())]
    shown = view(fake, contrasts=frame("contrasts", empty))
    assert "none is defined" in text(shown)
    assert "contrasts" not in names(shown)
    half = [{**row, "difference": None, "ci_low": None, "verdict": None} for row in records(fake.contrasts_table())]
    shown = view(fake, contrasts=frame("contrasts", half))
    assert "? no verdict: the difference is not defined" in text(shown, 200)
    assert dict(shown.pictures)["contrasts"].png()


def test_every_two_groups_have_a_picture() -> None:
    fake = Fake(groups=GROUPS, values=("zero",))
    more = [{**row, "group_b": "third"} for row in records(fake.contrasts_table())]
    both = pd.concat([fake.contrasts_table(), frame("contrasts", more)], ignore_index=True)
    assert names(view(fake, contrasts=both))[1:] == ["contrasts-1", "contrasts-2"]


def test_loss_and_its_change_by_position_beside_the_unedited_model() -> None:
    fake = Fake(design="set", length=20, values=("zero",))
    spec = specs(view(fake))["positions"]
    value, change = ([row for row in data(spec, "name", "x") if "high" not in row][i::1] for i in (0, 0))
    assert {row["name"] for row in value} == {"unedited", "circuit", "other"} == {row["name"] for row in change}
    assert len(spec["concat"]) == 2
    tops = [panel["layer"][-1]["encoding"] for panel in spec["concat"]]
    assert [top["y"]["title"] for top in tops] == ["loss (nats per token)", "change of loss (nats per token)"]
    assert tops[0]["color"]["scale"] == tops[1]["color"]["scale"]
    assert tops[1]["x"]["scale"].get("type", "linear") == "linear"
    ((y, high),) = {
        (row["y"], row["high"]) for row in data(spec, "high") if row["x"] == 19 and row["name"] == "circuit"
    }
    assert (y, high) == (pytest.approx(0.3), pytest.approx(0.7))
    first = {row["y"] for row in data(spec, "name", "x") if row["name"] == "unedited"}
    assert first == {0.4, 4.1}


def test_of_many_trials_the_sets_the_top_and_the_strongest_are_drawn() -> None:
    def drawn(fake: Fake) -> set[str]:
        return {row["name"] for row in data(specs(view(fake))["positions"], "name", "x")} - {"unedited"}

    single = Fake(length=6, values=("zero",))
    assert len(drawn(single)) == 6
    assert {"2.0", "1.1"} <= drawn(single)
    assert "6 of 12 ablations." in title_of(specs(view(single))["positions"])
    assert drawn(Fake(design="cumulative", length=6, values=("zero",), ks=(1, 2))) >= {"top 1", "top 2"}
    assert drawn(Fake(design="set", length=6)) == {"circuit (zero)", "other (zero)", "circuit (mean)", "other (mean)"}


def test_the_unedited_model_is_drawn_once_however_many_values_there_are() -> None:
    spec = specs(view(Fake(design="set", length=6)))["positions"]
    panel = spec["concat"][0]
    marks = [part["data"]["name"] for part in (panel, *panel["layer"]) if "data" in part]
    drawn = [row for row in spec["datasets"][marks[-1]] if row.get("name") == "unedited"]
    assert [row["x"] for row in drawn] == [1, 2, 3, 4, 5]


def test_long_texts_are_drawn_in_stretches() -> None:
    fake = Fake(length=1001, values=("zero",), layers=1, heads=1)
    spec = specs(view(fake))["positions"]
    assert "mean over 4 positions" in title_of(spec)
    assert len([row for row in data(spec, "name", "x") if row["name"] == "unedited"]) == 250
    short = specs(view(replace(fake, length=250)))["positions"]
    assert "mean over" not in title_of(short)


def test_texts_of_several_lengths_have_a_picture_each() -> None:
    fake = Fake(length=5, values=("zero",))
    other = [{**row, "template": "<script>"} for row in records(fake.positions_table())]
    both = pd.concat([fake.positions_table(), frame("positions", other)], ignore_index=True)
    shown = view(fake, positions=both)
    assert names(shown)[1:] == ["positions-1", "positions-2"]
    assert "Template <script>, 2 of 2." in title_of(specs(shown)["positions-2"])


def test_continuations_stand_side_by_side() -> None:
    shown = text(view(Fake(layers=1, continuations=SAID)), 120)
    assert "prompt 0: the Mary\\n Johning, caf\\xe9s \\u4e2d went<|im_start|> store gave" in shown
    table = shown[shown.index("prompt 0:") :]
    found = [cells(table, label)[1:] for label in ("0.0", "0.1", "0.2", "0.3")]
    assert sorted(row[0] for row in found) == sorted(["and and", "the same", "(nothing)", "\\x1b[31m[bold]\\n"])
    assert sum("and then the store" in line for line in table.splitlines()) == 1


def test_long_continuations_and_prompts_are_wrapped() -> None:
    fake = Fake(layers=1, tokens=("word ",) * 90, continuations=(" and" * 80, "x" * 400))
    for width in (60, 80, 200):
        shown = text(view(fake), width)
        assert max(map(len, shown.splitlines())) <= width
        table = shown[shown.index("prompt 0:") :]
        assert table.count("and") == 80
        assert table.count("x") >= 400
        heading = table.splitlines()[0]
        assert heading.startswith("prompt 0: ...")
        assert heading.endswith("word")


def test_of_many_continuations_the_first_are_shown() -> None:
    shown = text(view(Fake(continuations=[" a", *(f" b{i}" for i in range(9))])))
    assert "6 of 9 ablations; the table `words` has all" in shown
    alone = text(view(Fake(continuations=[" lonely"])))
    assert "lonely" in alone


def test_along_training_the_last_checkpoint_is_told_and_the_strongest_are_followed() -> None:
    fake = Fake(checkpoints=STEPS)
    shown = view(fake)
    assert names(shown)[-1] == "training"
    found = specs(shown)
    at = {(row["layer"], row["column"]): row["value"] for row in data(found["00-head-zero-loss"], "layer", "column")}
    assert at[2, "0"] == pytest.approx(fake.strength("2.0"))
    assert "checkpoint step-100, the last of 3" in title_of(found["00-head-zero-loss"])
    line = {(row["name"], row["x"]): row["y"] for row in data(found["training"], "name", "x") if "high" not in row}
    assert line["2.0", 10_000.0] == pytest.approx(fake.strength("2.0") * 2 / 3)
    assert "checkpoint" not in title_of(found["training"]).replace("The strongest at the last checkpoint.", "")
    assert [row["label"] for row in shown.headline()][:2] == ["2.0, zero", "2.0, mean"]
    keep = view(Fake(design="keep", checkpoints=STEPS))
    assert text(keep).count("| other   |    1 |") == 2


def test_one_unit_is_shown() -> None:
    fake = Fake(layers=1, heads=1, values=("zero",), length=3, groups=GROUPS, continuations=(" a", " b"))
    shown = view(fake)
    assert cells(text(shown), "1")[1] == "0.0"
    assert names(shown) == ["00-head-zero-loss", "contrasts", "positions"]
    assert all(picture.png() for _, picture in shown.pictures)


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("design", ["single", "keep", "cumulative", "pairs"])
def test_a_run_without_any_number_is_shown(design: str, value: float | None) -> None:
    fake = Fake(design=design, values=("zero",), groups=GROUPS, length=4)
    numbers = {name: value for name in ("effect", "normalized", "ci_low", "ci_high")}
    rows = [{**row, **numbers, "status": "undefined"} for row in records(fake.summary_table())]
    emptied = ("curve", "circuits", "interactions", "positions")
    blank = {
        name: [{**row, **{key: value for key in row if key in REALS}} for row in records(table)]
        for name, table in fake.tables().items()
        if name in emptied
    }
    shown = view(fake, summary=frame("summary", rows), **{name: frame(name, made) for name, made in blank.items()})
    assert "nan" not in text(shown).lower()
    json.dumps(shown.headline(), allow_nan=False)
    assert all(picture.png() for _, picture in shown.pictures)


@pytest.mark.parametrize("fake", EVERY)
def test_empty_tables_are_nothing_to_show(fake: Fake) -> None:
    rows = {name: table.head(0) for name, table in fake.tables().items() if name != "prompts"}
    shown = view(fake, **rows)
    assert names(shown) == []
    assert shown.headline() == []
    assert text(shown) == ""


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("fake", EVERY)
def test_tables_fit_the_terminal(width: int, fake: Fake) -> None:
    lines = text(view(fake), width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line.endswith(("|", "+")) for line in lines if line[:1] in "|+" and line)
    assert text(view(fake), width).isascii()


@pytest.mark.parametrize("fake", EVERY)
def test_colour_is_for_terminals_alone(fake: Fake) -> None:
    shown = view(fake)
    assert "\x1b[1m" in text(shown, plain=False)
    assert "\x1b" not in text(shown)


@pytest.mark.parametrize("design", ["single", "set", "keep", "pairs"])
def test_names_and_tokens_cannot_act(design: str) -> None:
    fake = Fake(
        design=design, tokens=HOSTILE, sets=dict.fromkeys(HOSTILE[:-1], ("1.1",)), groups=HOSTILE[:2], length=4,
        continuations=HOSTILE[:4], positions=3 if design == "single" else 0, values=("zero",),
        display={"title": "\x1b[31m<script>"},
    )  # fmt: skip
    if design == "pairs":
        rows = [{**row, "a": HOSTILE[i % 6], "b": HOSTILE[(i + 1) % 6]}
                for i, row in enumerate(records(fake.interactions_table()))]  # fmt: skip
        shown = view(fake, interactions=frame("interactions", rows))
    else:
        shown = view(fake)
    for plain in (True, False):
        seen = text(shown, 120, plain=plain)
        assert "\x1b[31m" not in seen
        assert "\u202e" not in seen
        assert "\\x1b[31m" in seen
    for _, picture in shown.pictures:
        assert isinstance(picture, Drawing)
        assert not any("\x1b" in found or "\u202e" in found for found in strings(picture.spec()))
        svg = picture.svg().decode()
        assert "<script" not in svg


def test_the_headline_is_plain_data_with_the_same_keys_in_every_row() -> None:
    for fake in EVERY:
        rows = view(fake).headline()
        assert len({tuple(row) for row in rows}) == 1
        json.dumps(rows, allow_nan=False)
    found = view(replace(EVERY[1], values=("zero",))).headline()
    assert [(row["table"], row["k"], row["units"]) for row in found][:2] == [
        ("curve", 1, "2.0"),
        ("curve", 2, "2.0+1.1"),
    ]
    tables = [row["table"] for row in view(Fake(design="pairs", groups=GROUPS, top=2, values=("zero",))).headline()]
    assert tables == ["summary"] * 2 + ["interactions"] * 2 + ["contrasts"] * 2
    sets = [row for row in view(Fake(design="keep")).headline() if row["table"] == "circuits"]
    assert (sets[0]["set"], sets[0]["faithfulness"], sets[0]["size"]) == ("circuit", pytest.approx(0.92), 2)


def test_rows_are_chosen_whatever_is_null() -> None:
    designs = [("set", None), (None, 3), ("keep", 0)]
    common = {"metric": "loss", "aggregate": "mean", "n": 1, "n_dropped": 0}
    records_of = [{"trial": i, "design": one, "ranking": ranking} for i, (one, ranking) in enumerate(designs)]
    rows = frame("summary", [{**common, **row} for row in records_of])
    assert having(rows, design="set")["trial"].tolist() == [0]
    assert having(rows, design=("set", "keep"))["trial"].tolist() == [0, 2]
    assert having(rows, unknown="set").empty
    assert without(rows, "ranking")["trial"].tolist() == [0]
    assert without(rows, "unknown")["trial"].tolist() == [0, 1, 2]


def without_support(fake: Fake, p: float) -> View:
    """The view where every corrected p is this."""
    weak = {
        name: frame(name, [{**row, "p_adjusted": p} for row in records(fake.tables()[name])])
        for name in ("summary", "contrasts")
    }
    return view(fake, **weak)


def test_a_verdict_that_the_corrected_p_does_not_bear_out_says_so() -> None:
    fake = Fake(groups=GROUPS, values=("zero",), margin=0.2)
    strong, weak = text(without_support(fake, 0.003), 200), text(without_support(fake, 0.23), 200)
    head, groups = (shown.split("effects in aligned")[0] for shown in (strong, weak))
    assert cells(head, "1")[-1] == "yes"
    assert cells(groups, "1")[-1] == "yes (alone)"
    asked = "does the effect of 2.0 differ between aligned and conflicting?"
    numbers = "difference -0.600 [-0.800, -0.410]"
    assert f"{asked} yes: {numbers}; p = 0.0030, corrected over all 12 trials" in strong
    assert f"{asked} yes for this trial alone: {numbers}; p = 0.2300, corrected over all 12 trials" in weak
    no = text(without_support(replace(fake, verdict="no"), 0.23), 200)
    assert f"{asked} no within 0.2: {numbers}; p = 0.2300" in no
    assert cells(no[no.index("effects in aligned") :], "1")[-1] == "no"


def test_below_a_table_stands_what_its_verdicts_are_read_off() -> None:
    def below(fake: Fake, width: int = 200) -> str:
        manifest = fake.manifest
        manifest.config["stats"] = {"ci": 0.9, "smallest_effect": 0.03}
        return " ".join(text(view_of(manifest, fake.tables()), width).split())

    own = "verdict: one trial's own, its 90 % interval against the margin of"
    shown = below(Fake(groups=GROUPS, values=("zero",), margin=0.2))
    assert shown.count(f"{own} 0.2, not corrected") == 2
    assert "interval: 90 %; p adj.: against 0, corrected over the trials of a design, value and block" in shown
    assert "corrected over all 12 trials" in shown
    shares = below(Fake(metrics=("logit_diff",), normalised=True, values=("zero",)))
    assert f"{own} 0.03, not corrected" in shares
    assert "verdict" not in below(Fake(values=("zero",)), 36)


@pytest.mark.parametrize("width", range(50, 140, 5))
def test_effects_of_two_groups_stand_beside_each_other_or_not_at_all(width: int) -> None:
    shown = text(view(Fake(groups=("aligned", "conflicting prompts"), values=("zero",))), width)
    heading = next(line for line in shown.splitlines() if "difference |" in line)
    assert ("in aligned |" in heading) == ("in conflicting prompts |" in heading)
    assert ("in aligned |" in heading) == (width >= 75)


def test_all_but_a_set_is_not_called_the_set() -> None:
    fake = Fake(design="keep", values=("zero",), length=4, continuations=SAID[:3])
    shown = text(view(fake), 200)
    told = shown[: shown.index("sets, zero ablation")]
    for name, effect in (("the set circuit", 1.5), ("all but circuit", 0.4)):
        row = next(line for line in told.splitlines() if f"| {name} " in line)
        assert f"{effect:.3f}" in row
    drawn = {row["name"] for row in data(specs(view(fake))["positions"], "name", "x")}
    assert {"all but circuit", "the set circuit"} <= drawn
    assert "the set" not in text(view(Fake(design="set", values=("zero",))), 200)


def test_what_a_set_holds_stands_beside_its_name() -> None:
    def shown(fake: Fake, width: int) -> str:
        manifest = fake.manifest
        manifest.config["ablate"]["sets"] = {name: list(units) for name, units in fake.sets.items()}
        return text(view_of(manifest, fake.tables()), width)

    many = {"circuit": ("1.1", "2.0"), "other": [f"{i}.{j}" for i in range(10) for j in range(3)]}
    for design in ("set", "keep"):
        wide = shown(Fake(design=design, values=("zero",), sets=many), 160)
        assert "1.1 2.0" in wide
        assert ("1.1 2.0" in wide.partition("sets, zero ablation")[2]) == (design == "keep")
        assert "0.0 0.1 0.2 1.0 1.1 1.2 +24 more" in wide
        assert "1.1 2.0" not in shown(Fake(design=design, values=("zero",), sets=many), 50)


@pytest.mark.parametrize(
    ("members", "expected"),
    [(["1.1"], "1.1"), (["a" * 9, "b"], "a" * 9 + " b"), (["a" * 11, "b"], "2 units"), (["a" * 40], "a" * 9 + "...")],
)
def test_members_are_shortened(members: list[str], expected: str) -> None:
    assert members_text(members, 12) == expected


def test_pairs_that_nobody_computed_are_crossed_out() -> None:
    fake = Fake(design="pairs", values=("zero",))
    rows = records(fake.interactions_table())
    spec = specs(view(fake, interactions=frame("interactions", rows[:2])))["interactions"]
    states = {(row["layer"], row["column"]): row["state"] for row in data(spec, "layer", "column", "state")}
    assert states["2.0", "0.3"] == states["0.3", "2.0"] == states["1.1", "1.1"] == "absent"
    assert states["1.1", "2.0"] == "ok"
    legend = [row["kind"] for row in data(spec, "kind") if row["state"] == "absent"]
    assert set(legend) == {"not computed"}


def test_every_k_has_its_label() -> None:
    spec = specs(view(Fake(design="cumulative", values=("zero",), ks=(1, 2, 4, 8, 12))))["curve-loss"]
    axis = spec["concat"][0]["layer"][-1]["encoding"]["x"]
    assert axis["axis"]["values"] == [1, 2, 4, 8, 12]
    assert axis["title"] == "k, heads ablated together"
    # One panel alone is as high as those side by side.
    beside = specs(view(Fake(design="cumulative")))["curve-loss"]["concat"][0]
    assert spec["concat"][0]["height"] == beside["height"]


def test_a_wide_interval_does_not_hide_the_lines() -> None:
    fake = Fake(design="set", length=9, values=("zero",))
    rows = records(fake.positions_table())

    def panels(high: float) -> tuple[list[float], str]:
        made = [{**row, "ci_high": high if row["trial"] == 0 else row["ci_high"]} for row in rows]
        spec = specs(view(fake, positions=frame("positions", made)))["positions"]
        return spec["concat"][1]["layer"][-1]["encoding"]["y"]["scale"]["domain"], title_of(spec)

    (low, high), words = panels(900.0)
    largest = max(row["effect"] for row in rows if pd.notna(row["effect"]))
    assert largest < high < 3 * largest
    assert "Intervals go on beyond the axis" in words
    assert low < 0
    assert "beyond the axis" not in panels(1.2)[1]


def test_what_compares_with_the_unedited_model_has_no_change_beside_it() -> None:
    fake = Fake(design="set", length=9, values=("zero",))
    kl = frame("positions", [{**row, "metric": "kl"} for row in records(fake.positions_table())])
    assert len(specs(view(fake, positions=kl))["positions"]["concat"]) == 1
    assert len(specs(view(fake))["positions"]["concat"]) == 2


def test_maps_name_windows_units_and_how_many_there_are() -> None:
    fake = Fake()
    manifest = fake.manifest
    manifest.config["ablate"]["units"] = [{"kind": "mlp", "layers": {"window": 10}}]
    shown = view_of(manifest, fake.tables())
    spec = specs(shown)["00-mlp-zero-loss"]
    assert "Each row is a window of 10 layers, by its centre." in title_of(spec)
    assert "window" not in title_of(specs(view(fake))["00-head-zero-loss"])
    assert "effect (nats per token)" in set(strings(spec))
    assert "the first of 2 maps" in text(shown)
    assert "maps" not in text(view(Fake(values=("zero",))))


def test_many_heads_are_told_by_their_number() -> None:
    shown = text(view(Fake(design="cumulative", values=("zero",), ks=(12,))), 300)
    assert "without the 12 strongest heads (zero) loss changes by" in shown
    assert "without 2.0+1.1+1.3" in text(view(Fake(design="cumulative", values=("zero",), ks=(3,))), 300)
