"""The view of probes says what their tables say, at any width, whatever is read, used or lacking."""

import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from mechinterp_cli.report.picture import Drawing
from mechinterp_cli.report.probe_verdicts import verdict_sentences
from mechinterp_cli.report.view import View, tables_needed, view_of
from tests.probe_frames import USED, Fake, frame

HOSTILE = ("<script>alert(1)</script>", "[/INST]", "\x1b[31mred", "w" * 300, "\u202e", "[bold]\n", "")
STEPS = tuple((f"step-{step}", step * 1000) for step in (0, 10, 100))
CLASSES = ("false", "true")
MANY = ("logistic", "mass_mean", "mass_mean_whitened", "lda", "mlp")
DONE = ("erase", "leace", "steer", "swap")
EVERY = [
    Fake(code=True, projected=True, learning=(8, 16, 48)),
    Fake(probes=MANY, spans=("subject", "end"), code=True),
    Fake(positions=4, templates=("t", "u")),
    Fake(layers=4, heads=3, interventions=("erase",)),
    Fake(interventions=DONE, erased=(0, 3)),
    Fake(interventions=("erase", "steer"), groups=("affirmative", "negated")),
    Fake(layers=1, baselines=(), control=False),
    Fake(checkpoints=STEPS, interventions=("erase",), draws=20),
    Fake(classes=(), probes=("ridge",)),
]


def view(fake: Fake, *lacking: str, **instead: pd.DataFrame) -> View:
    tables = {**fake.tables(), **instead}
    return view_of(fake.manifest, {name: rows for name, rows in tables.items() if name not in lacking})


def text(shown: View, width: int = 100, *, plain: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=not plain, markup=False, emoji=False, highlight=False)
    for part in shown.draw(width, plain):
        console.print(part)
    return file.getvalue()


def spec_of(shown: View, name: str) -> dict[str, Any]:
    """The Vega-Lite specification of a picture."""
    picture = dict(shown.pictures)[name]
    assert isinstance(picture, Drawing)
    return picture.spec()


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


def panels(spec: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A picture's panels by title, whose lines are joined."""

    def title(panel: Mapping[str, Any]) -> str:
        given = panel["title"]
        return given if isinstance(given, str) else " ".join(given["text"])

    return {title(panel): panel for panel in spec["concat"]}


PLACES = {"name", "x", "y", "high", "from", "to", "share", "none"}
"""Columns that say where a mark stands; others are for tooltips."""


def rows_of(spec: Mapping[str, Any], panel: Mapping[str, Any], *columns: str) -> list[dict[str, Any]]:
    """A panel's rows of data whose marks have these places and no others, without what is for tooltips."""
    found: dict[str, dict[str, Any]] = {}
    for layer in panel["layer"]:
        for row in spec["datasets"][layer["data"]["name"]]:
            if set(row) & PLACES == set(columns):
                shown = {name: row[name] for name in columns}
                found[json.dumps(shown, sort_keys=True)] = shown
    return list(found.values())


def points(spec: Mapping[str, Any], title: str) -> dict[str, dict[float, float]]:
    """Of a panel's curves, by name, y by x."""
    found: dict[str, dict[float, float]] = {}
    for row in rows_of(spec, panels(spec)[title], "name", "x", "y"):
        found.setdefault(row["name"], {})[row["x"]] = row["y"]
    return found


def cells(shown: str, *first: str) -> list[str]:
    """The cells of the first table row that begins so."""
    for line in shown.splitlines():
        found = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and found[: len(first)] == list(first):
            return found
    raise AssertionError(f"no row {first} in\n{shown}")


@pytest.mark.parametrize(
    ("fake", "expected"),
    [
        (Fake(), ["scores-resid_post"]),
        (Fake(code=True, projected=True), ["scores-resid_post", "code", "projections"]),
        (Fake(learning=(8, 16)), ["scores-resid_post", "learning"]),
        (Fake(positions=4), ["scores-resid_post", "map-resid_post"]),
        (Fake(heads=2), ["scores-z", "map-z"]),
        (
            Fake(interventions=("erase", "steer"), erased=(0,)),
            ["scores-resid_post", "causal-resid_post", "steering-resid_post", "downstream"],
        ),
        (Fake(interventions=("erase",)), ["scores-resid_post", "causal-resid_post"]),
    ],
)
def test_every_table_has_its_picture(fake: Fake, expected: list[str]) -> None:
    assert [name for name, _ in view(fake).pictures] == expected


def test_tables_that_a_run_may_lack_leave_out_their_parts() -> None:
    fake = Fake(code=True, projected=True, interventions=("erase",), erased=(1,))
    assert set(fake.tables()) <= set(tables_needed("probe"))
    bare = view(fake, *(name for name in fake.tables() if name != "probes"))
    assert [name for name, _ in bare.pictures] == ["scores-resid_post"]
    assert "used" in text(view(fake))
    assert "used" not in text(bare)
    assert {row["table"] for row in bare.headline()} == {"probes"}


@pytest.mark.slow
@pytest.mark.parametrize("fake", EVERY)
def test_every_picture_is_png_and_svg(fake: Fake) -> None:
    for _, picture in view(fake).pictures:
        assert picture.png()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.svg().startswith(b"<svg")


def test_scores_have_their_bands_and_flat_baselines() -> None:
    fake = Fake()
    spec = spec_of(view(fake), "scores-resid_post")
    found = points(spec, "last")
    assert found["logistic"] == {
        layer: fake.score({"layer": layer, "head": None, "position": None, "span": "end"}, "logistic")
        for layer in range(6)
    }
    band = rows_of(spec, panels(spec)["last"], "name", "x", "y", "high")
    assert {(row["name"], round(row["high"] - row["y"], 6)) for row in band} == {("logistic", 0.09)}
    flat = {row["name"]: row["y"] for row in rows_of(spec, panels(spec)["last"], "name", "y")}
    assert flat == {"majority class": 0.5, "bag of tokens": 0.47}
    assert set(found) == {"logistic", "control labels", "random weights"}
    assert points(spec, "last, selectivity")["logistic"][5] == pytest.approx(0.95 - 0.52)
    domain = panels(spec)["last"]["layer"][-1]["encoding"]["y"]["scale"]["domain"]
    assert 0.3 < domain[0] < 0.45
    assert 0.99 < domain[1] < 1.1


def test_many_probes_have_no_bands_and_all_of_them_a_selectivity() -> None:
    spec = spec_of(view(Fake(probes=MANY)), "scores-resid_post")
    assert rows_of(spec, panels(spec)["last"], "name", "x", "y", "high") == []
    assert "Bands" not in " ".join(spec["title"]["subtitle"])
    assert set(points(spec, "last, selectivity")) == set(MANY)
    assert "Bands: 95 %" in " ".join(spec_of(view(Fake()), "scores-resid_post")["title"]["subtitle"])


def test_of_many_views_the_best_are_drawn_and_all_are_in_the_map() -> None:
    shown = view(Fake(positions=6))
    spec = spec_of(shown, "scores-resid_post")
    assert [title for title in panels(spec) if "selectivity" not in title] == [f"position {at}" for at in range(4)]
    assert "The 4 of 6 views" in " ".join(spec["title"]["subtitle"])
    spec = spec_of(shown, "map-resid_post")
    values = spec["datasets"][spec["concat"][0]["layer"][0]["data"]["name"]]
    assert len(values) == 6 * 6
    columns = [row["column"] for row in values[:6]]
    assert columns[:3] == ["0 ·the", "1 ·Mary", "2 ⏎"]


def test_maps_print_what_they_colour_about_chance() -> None:
    fake = Fake(heads=3)
    spec = spec_of(view(fake), "map-z")
    (panel,) = spec["concat"]
    rects, words = panel["layer"][0], panel["layer"][-1]
    assert rects["encoding"]["color"]["scale"]["domain"][3] == 0.5
    coloured, printed = (
        {(row["layer"], row["column"]): row["value"] for row in spec["datasets"][layer["data"]["name"]]}
        for layer in (rects, words)
    )
    assert words["mark"]["type"] == "text"
    assert coloured == printed
    assert printed[5, "1"] == pytest.approx(0.95 - 0.04)


def test_positions_of_templates_never_share_a_panel() -> None:
    spec = spec_of(view(Fake(positions=3, templates=("t", "u"))), "map-resid_post")
    assert list(panels(spec)) == ["logistic, t", "logistic, u"]


def test_numbers_below_the_mean_are_drawn_at_a_floor() -> None:
    fake = Fake(classes=(), probes=("ridge",))
    rows = fake.probes_table()
    low = rows.assign(score=rows["score"].where(rows["layer"] != 0, -30.0))
    spec = spec_of(view(fake, probes=low), "scores-resid_post")
    assert points(spec, "last")["ridge"][0] == -0.5
    assert "R² below -0.5 is drawn there" in " ".join(spec["title"]["subtitle"])
    assert "R² of the best probes" in text(view(fake), plain=False)


def test_code_is_drawn_beside_the_uniform_one() -> None:
    spec = spec_of(view(Fake(code=True)), "code")
    assert points(spec, "code length")["resid_post"][2] == 70
    assert points(spec, "compression")["resid_post"][2] == pytest.approx(64 / 70)
    for title, level in (("code length", 64), ("compression", 1)):
        assert rows_of(spec, panels(spec)[title], "name", "y") == [{"name": "uniform code", "y": level}]


def test_learning_curves_are_of_the_best_place_of_every_probe() -> None:
    sizes = (8, 16, 32, 48)
    spec = spec_of(view(Fake(learning=sizes, probes=("logistic", "lda"))), "learning")
    found = points(spec, "resid_post")
    assert set(found) == {"logistic, layer 5, last", "lda, layer 5, last"}
    assert found["logistic, layer 5, last"] == {size: pytest.approx(0.5 + 0.45 * size / 48) for size in sizes}
    assert rows_of(spec, panels(spec)["resid_post"], "name", "y") == [{"name": "majority class", "y": 0.5}]
    alone = points(spec_of(view(Fake(learning=sizes)), "learning"), "resid_post")
    assert set(alone) == {"layer 0, last", "layer 5, last"}


def test_shares_of_a_histogram_add_up_and_those_on_the_right_are_the_classs() -> None:
    fake = Fake(projected=True)
    spec = spec_of(view(fake), "projections")
    (title,) = panels(spec)
    assert title == "resid_post, layer 5, last, logistic: accuracy 0.95"
    bars = rows_of(spec, panels(spec)[title], "name", "from", "to", "share")
    assert 0.0 in {row["from"] for row in bars}
    table = fake.projections_table()
    best = table[table["layer"] == 5]
    for name in CLASSES:
        own = [row for row in bars if row["name"] == name]
        assert sum(row["share"] for row in own) == pytest.approx(1)
        right = sum(row["share"] for row in own if row["from"] >= -1e-9)
        assert right == pytest.approx(float((best[best["class"] == name]["projection"] >= 0).mean()))
    assert "32 false, 32 true" in " ".join(spec["title"]["subtitle"])


def test_effects_stand_beside_random_ones_the_margin_and_their_verdicts() -> None:
    fake = Fake(interventions=("erase", "steer"))
    spec = spec_of(view(fake), "causal-resid_post")
    assert list(panels(spec)) == ["erase", "steer +4"]
    for title, strength in (("erase", None), ("steer +4", 4)):
        found = points(spec, title)
        assert found["probe's subspace"] == {layer: fake.effect(layer, strength, "all") for layer in range(6)}
        assert set(found["random subspaces"].values()) == {0.01}
        assert found["used"] == {USED: fake.effect(USED, strength, "all")}
        assert set(found["not used, within the margin"]) == {0, 1, 2}
        assert set(found["inconclusive"]) == {4, 5}
        flat = rows_of(spec, panels(spec)[title], "name", "y")
        assert sorted(row["y"] for row in flat if row["name"] == "± margin") == [-0.1, 0.1]
    subtitle = " ".join(spec["title"]["subtitle"])
    assert "16 prompts, 199 random subspaces" in subtitle
    assert "Margin 0.1" in subtitle


def test_what_cancels_over_prompts_is_drawn_by_group_and_as_magnitude() -> None:
    fake = Fake(interventions=("erase", "steer"), groups=("affirmative", "negated"))
    shown = view(fake)
    spec = spec_of(shown, "causal-resid_post")
    assert list(panels(spec))[:3] == ["erase, affirmative", "erase, negated", "erase, magnitude"]
    kinds = {title: {layer["mark"]["type"] for layer in panel["layer"]} for title, panel in panels(spec).items()}
    assert "area" in kinds["erase, affirmative"]
    assert "area" not in kinds["erase, magnitude"], "no table has the magnitude's own interval"
    domains = {
        json.dumps(panels(spec)[f"erase, {group}"]["layer"][-1]["encoding"]["y"]["scale"]["domain"])
        for group in fake.groups
    }
    assert len(domains) == 1
    steered = points(spec_of(shown, "steering-resid_post"), f"layer {USED}")
    assert steered["probe's direction, affirmative"][4] == 2.0
    assert steered["probe's direction, negated"][4] == -2.0
    assert "probe's direction" not in steered


def test_steering_is_drawn_against_strength_beside_random_and_control_directions() -> None:
    fake = Fake(layers=9, interventions=("steer",))
    spec = spec_of(view(fake), "steering-resid_post")
    assert f"layer {USED}" in panels(spec)
    assert len(panels(spec)) == 6
    assert "The 6 of 9 places" in " ".join(spec["title"]["subtitle"])
    found = points(spec, f"layer {USED}")
    assert found["probe's direction"] == {strength: 0.5 * strength for strength in (-4, -2, 2, 4)}
    assert found["random directions"] == {4: 0.01}
    assert found["control labels' direction"] == {4: 0.03}


def test_classes_that_are_moved_apart_are_drawn_apart() -> None:
    fake = Fake(interventions=("steer",), labelled=True)
    found = points(spec_of(view(fake), "steering-resid_post"), f"layer {USED}")
    assert found["probe's direction, true"][4] == pytest.approx(2.0)
    assert found["probe's direction, false"][4] == pytest.approx(-2.0)
    assert "probe's direction" not in found
    together = points(spec_of(view(fake, "labels"), "steering-resid_post"), f"layer {USED}")
    assert "probe's direction" in together


def test_downstream_scores_are_those_before_and_after() -> None:
    spec = spec_of(view(Fake(interventions=("erase",), erased=(0, 3))), "downstream")
    assert list(panels(spec)) == ["erased at resid_post 0", "erased at resid_post 3"]
    found = points(spec, "erased at resid_post 3")
    assert found["before"] == {4: 0.9, 5: 0.9}
    assert found["after"] == {4: 0.6, 5: 0.7}


def test_the_best_places_are_listed_with_baselines_and_p() -> None:
    fake = Fake(top=3)
    rows = fake.probes_table()
    shown = text(view(fake, probes=rows.assign(p=0.001, p_adjusted=0.02)), 140)
    assert cells(shown, "layer 5") == [
        *("layer 5", "logistic", "0.950", "[0.900, 0.990]", "0.0200", "0.430", "0.500", "0.470", "0.550", "64")
    ]
    assert "of permuted labels, corrected over all places" in " ".join(shown.split())
    assert "layer 2 " not in shown
    assert " p " not in text(view(fake), 140).splitlines()[3]


def test_verdicts_are_told_in_a_table_and_a_sentence() -> None:
    shown = text(view(Fake(interventions=("erase",))), 160)
    used = cells(shown, str(USED), "yes")
    assert used == ["3", "yes", "0.725", "0.0100", "yes", "-0.500", "[-0.060, 0.070]", "0.500", "0.030", "0.0050"]
    assert cells(shown, "0", "inconclusive")[4] == "no, within the margin"
    assert "logistic at resid_post, erase: effect on logit_diff (logits), 1.500 unedited" in shown
    (sentence,) = verdict_sentences(Fake(interventions=("erase",)).causal_verdicts_table())
    assert sentence == (
        "logistic at resid_post: read out at layers 2 to 5, inconclusive at layers 0 and 1. "
        "erase: used at layer 3, not used (within the margin) at layers 0 to 2, inconclusive at layers 4 and 5."
    )


def test_without_a_verdict_none_is_claimed() -> None:
    shown = text(view(Fake(layers=3, interventions=("erase",), draws=20)), 120)
    assert "erase: no verdict at every layer" in shown
    rows = Fake(interventions=("erase",)).causal_verdicts_table()
    (sentence,) = verdict_sentences(rows.assign(used=rows["used"].where(rows["layer"] != USED, "inconclusive")))
    assert sentence.endswith(
        "erase: nowhere used, not used (within the margin) at layers 0 to 2, inconclusive at layers 3 to 5."
    )
    assert cells(shown, "2", "yes")[4] == "no verdict"


def test_the_headline_holds_p_and_verdicts() -> None:
    fake = Fake(interventions=("erase",), top=4)
    rows = view(fake, probes=fake.probes_table().assign(p=0.004)).headline()
    assert len({tuple(row) for row in rows}) == 1
    best, judged = ([row for row in rows if row["table"] == name] for name in ("probes", "causal_verdicts"))
    assert (len(best), len(judged)) == (4, 4)
    assert (best[0]["label"], best[0]["score"], best[0]["p"]) == ("resid_post, layer 5, last", 0.95, 0.004)
    assert (best[0]["majority"], best[0]["random_weights"], best[0]["used"]) == (0.5, 0.55, None)
    used = next(row for row in judged if row["used"] == "yes")
    assert (used["layer"], used["readable"], used["p_adjusted"], used["effect"]) == (USED, "yes", 0.005, -0.5)
    json.dumps(rows, allow_nan=False)


SHOWN = [view(fake) for fake in (EVERY[1], EVERY[3], EVERY[5])]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("plain", [True, False])
def test_no_line_is_wider_than_the_terminal(width: int, plain: bool) -> None:
    for one in SHOWN:
        shown = text(one, width, plain=plain)
        bare = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown.splitlines()]
        assert max(map(len, bare)) <= width
        assert ("\x1b[" in shown) is not plain
        assert shown.isascii() or not plain


def test_tokens_labels_and_classes_cannot_act() -> None:
    fake = Fake(layers=2, positions=2, templates=HOSTILE[2:6:3], tokens=HOSTILE, projected=True, classes=HOSTILE[2:4],
                interventions=("erase",))  # fmt: skip
    shown = view(fake)
    assert "\x1b" not in text(shown)
    assert "\u202e" not in text(shown, plain=False)
    for name in ("map-resid_post", "projections"):
        found = list(strings(spec_of(shown, name)))
        assert not any(mark in one for one in found for mark in ("\x1b", "\u202e", "\n"))


def test_the_last_checkpoint_is_shown() -> None:
    fake = Fake(checkpoints=STEPS, interventions=("erase",))
    rows = fake.probes_table()
    early = rows.assign(score=rows["score"].where(rows["checkpoint"] == "step-100", 0.111))
    shown = view(fake, probes=early)
    assert "0.111" not in text(shown)
    assert "checkpoint step-100, the last of 3" in text(shown)
    assert len(points(spec_of(shown, "causal-resid_post"), "erase")["probe's subspace"]) == 6


def test_gaps_are_gaps() -> None:
    fake = Fake(interventions=("erase",))
    rows = fake.causal_effects_table()
    broken = rows.assign(effect=rows["effect"].where(rows["layer"] != 4, math.nan))
    found = points(spec_of(view(fake, causal_effects=broken), "causal-resid_post"), "erase")
    assert set(found["probe's subspace"]) == {0, 1, 2, 3, 5}
    empty = frame("causal_verdicts", [])
    assert view(fake, causal_verdicts=empty).answer().startswith("The best of 6 probes is logistic")
