"""The view of an attribution says what its tables say: estimates, exact effects beside them, how far to trust them."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.cells import cell_len

from mechinterp_cli.report import estimates as estimating
from mechinterp_cli.report.trust import FEW, NO, ORDERED, UNKNOWN, YES, verdict
from mechinterp_cli.report.view import tables_needed
from tests.attribute_frames import WORDS, Fake, frame, records
from tests.attribute_shown import HOSTILE, cells, data, names, specs, strings, text, title_of, unbroken, view

SMALL = Fake(layers=2, heads=2, tokens=WORDS[:4])
LENS = Fake(blocks=(), lens=("resid_post", "embed"))
TOKENS = Fake(blocks=(), inputs=("gradient_x_input", "integrated_gradients", "occlusion", "rollout"))
DIRECT = Fake(blocks=(), direct=True, direct_neurons=3, sources=True)
WHOLE = replace(
    SMALL,
    blocks=("resid_pre",),
    metrics=("logit_diff",),
    estimators=("atp", "atp_star"),
    lens=("resid_post",),
    lens_positions=(0, 3),
    direct=True,
    sources=True,
    direct_neurons=2,
    inputs=TOKENS.inputs,
    subsets=3,
)
STEPS = (("step-0", 0), ("step-10", 1000))


@pytest.mark.parametrize(
    ("fake", "expected"),
    [
        (
            Fake(blocks=("z",), estimators=("atp", "relp")),
            ["00-z-atp-logit_diff", "00-z-relp-logit_diff", "verified-logit_diff"],
        ),
        (Fake(blocks=("z",), estimators=("atp",), random=0), ["00-z-atp-logit_diff"]),
        (LENS, ["lens-resid_post", "lens"]),
        (TOKENS, ["tokens-logit_diff", "spans-logit_diff"]),
        (DIRECT, ["direct-heads", "direct"]),
    ],
)
def test_every_part_has_its_pictures_and_no_others(fake: Fake, expected: list[str]) -> None:
    shown = view(fake)
    assert names(shown) == expected
    assert [name for name, _ in shown.pages] == ["tokens"] * bool(fake.inputs)
    assert text(shown)


def test_only_prompts_are_needed() -> None:
    assert set(tables_needed("attribute")) == {
        "prompts", "summary", "verification", "missed", "subsets", "direct", "components", "sources", "lens", "inputs",
        "input_spans", "input_completeness",
    }  # fmt: skip
    bare = view(WHOLE, *(set(tables_needed("attribute")) - {"prompts"}))
    assert (names(bare), list(bare.pages), bare.headline(), text(bare).strip()) == ([], [], [], "")


def test_maps_hold_the_estimates_and_name_the_estimator() -> None:
    fake = Fake(blocks=("resid_pre", "z"), estimators=("atp", "ig_inputs"))
    found = specs(view(fake))
    node = next(node for node in fake.nodes() if (node["layer"], node["position"]) == (1, 9))
    for estimator, called in (("atp", "AtP"), ("ig_inputs", "integrated gradients (inputs), 32 steps")):
        spec = found[f"00-resid_pre-{estimator}-logit_diff"]
        cell = next(row for row in data(spec, "column", "state") if (row["layer"], row["column"][:2]) == (1, "9 "))
        assert cell["value"] == pytest.approx(fake.estimate(estimator, node))
        assert f"estimated by {called}" in title_of(spec)
        assert "0: no effect, 1: fully restored." in title_of(spec)


def test_sizes_without_sign_have_a_scale_without_red_and_say_so() -> None:
    maps = dict(view(Fake(blocks=("z", "q"), estimators=("atp", "atp_star"))).maps)
    sized = maps["00-z-atp_star-logit_diff"]
    assert (sized.colours.low, sized.colours.middle) == (0.0, 0.0)
    assert "have no sign" in sized.caption
    for other in ("00-z-atp-logit_diff", "01-q-atp_star-logit_diff"):
        assert maps[other].colours.low == -maps[other].colours.high
        assert "no sign" not in maps[other].caption


def test_of_many_neurons_each_cell_is_the_strongest_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(blocks=("neuron",), estimators=("atp",), neurons=9, layers=2, tokens=WORDS[:4])
    apart = view(fake).maps[0][1]
    assert "neurons" not in apart.caption
    assert len(apart.panels) == 4
    monkeypatch.setattr(estimating, "MAX_NEURONS", 8)
    folded = view(fake).maps[0][1]
    assert "Each cell is the strongest of 9 neurons." in folded.caption
    (panel,) = folded.panels
    assert panel.values.shape == (2, 4)
    for layer in range(2):
        for position in range(4):
            here = [node for node in fake.nodes() if (node["layer"], node["position"]) == (layer, position)]
            strongest = max((fake.estimate("atp", node) for node in here), key=abs)
            assert panel.values[layer, position] == pytest.approx(strongest)


def test_the_strongest_stand_beside_their_exact_effects() -> None:
    fake = Fake(blocks=("resid_pre",), estimators=("atp",))
    shown = text(view(fake), 140)
    strongest = max(fake.nodes(), key=lambda node: abs(fake.estimate("atp", node)))
    row = cells(shown, "1")
    assert row[1] == "resid_pre, layer 1, position 9 _John"
    assert row[2:4] == [f"{fake.estimate('atp', strongest):.3f}", f"{fake.exact(strongest):.3f}"]
    assert row[-1] == "top, random"
    assert "exact" not in text(view(replace(fake, random=0)))


def test_without_normalisation_effects_are_in_the_metrics_unit() -> None:
    fake = Fake(blocks=("resid_pre",), estimators=("atp",), normalised=False)
    strongest = max(fake.nodes(), key=lambda node: abs(fake.estimate("atp", node)))
    row = cells(text(view(fake), 140), "1")
    assert row[2:4] == [f"{4 * fake.estimate('atp', strongest):.3f}", f"{4 * fake.exact(strongest):.3f}"]
    assert "effect on logit_diff" in text(view(fake), 140)


def judged(**values: Any) -> dict[str, Any]:
    return {"rows": 50, "pearson": 0.95, "spearman": 0.9, "sign_agreement": 0.99, **values}


@pytest.mark.parametrize(
    ("row", "with_sign", "expected"),
    [
        (judged(), True, YES),
        (judged(sign_agreement=None), True, YES),
        (judged(sign_agreement=0.5), True, NO),
        (judged(sign_agreement=0.5), False, YES),
        (judged(pearson=0.6), True, ORDERED),
        (judged(pearson=0.6, spearman=0.3), True, NO),
        (judged(pearson=-0.95, spearman=-0.9), True, NO),
        (judged(pearson=None, spearman=None), True, UNKNOWN),
        (judged(rows=9), True, FEW),
        (judged(rows=10), True, YES),
    ],
)
def test_what_agreement_says_of_trust(row: dict[str, Any], with_sign: bool, expected: str) -> None:
    assert verdict(row, with_sign=with_sign) == expected


def test_trust_is_told_by_kind_of_site_and_in_words() -> None:
    shown = text(view(Fake(estimators=("atp",))), 160)
    assert cells(shown, "resid_pre")[:6] == ["resid_pre", "yes", "30 of 400", "0.97", "0.92", "95 %"]
    assert cells(shown, "z")[1] == "no"
    assert cells(shown, "z")[-3:] == ["5", "60 %", "37 of 370 (10.0 %)"]
    words = unbroken(shown)
    assert "trust yes (resid_pre): estimates are in proportion to exact effects." in words
    assert "trust no (z): estimates do not follow exact effects: check what you use." in words
    assert "On the 30 random nodes estimates are 0.030 off on average (normalised effect)." in words
    assert "Of the 5 strongest estimates 60 % have an exact effect of 0.05 or more." in words
    assert "at most 37 of 370 (10.0 %) have an exact effect of 0.05 or more, 95 % sure." in words


def test_correlations_that_are_not_defined_say_why() -> None:
    fake = Fake(estimators=("atp",), reason="correlation: all of b are equal")
    words = unbroken(text(view(fake), 160))
    assert "all, resid_pre, z: correlation: all of b are equal." in words
    assert "trust unknown" in words
    assert "trust yes" not in words
    panel = specs(view(fake))["verified-logit_diff"]["concat"][0]
    assert panel["title"]["subtitle"].startswith("no Pearson: correlation: all of b are equal")


def test_sizes_without_sign_are_not_compared_by_sign() -> None:
    shown = text(view(Fake(blocks=("z", "q"), estimators=("atp", "atp_star"))), 160)
    plain_atp, star = (part for part in shown.split("can estimates by ")[1:])
    assert cells(plain_atp, "z")[5] == "95 %"
    assert cells(star, "z")[5] == "-"
    assert cells(star, "all")[5] == "-"
    assert cells(star, "q")[5] == "95 %"
    assert "sizes without sign" in unbroken(star)
    assert "sizes without sign" not in unbroken(plain_atp)


def test_without_verification_nothing_is_said_of_trust() -> None:
    assert "trust" not in text(view(Fake(random=0)))
    assert "trust" in text(view(Fake()))
    assert "at most" not in text(view(Fake(), "missed"))


def test_points_are_the_verified_nodes_and_drawn_ones_are_filled() -> None:
    fake = Fake(blocks=("resid_pre", "z"), estimators=("atp",))
    spec = specs(view(fake))["verified-logit_diff"]
    verified = [row for row in records(fake.summary_table()) if row["part"] and row["metric"] == "logit_diff"]
    for layer in spec["concat"][0]["layer"][1:]:
        drawn = layer["data"]["name"].startswith("random")
        assert layer["mark"]["filled"] is drawn
        rows = spec["datasets"][layer["data"]["name"]]
        expected = [row for row in verified if ("random" in row["part"]) is drawn]
        assert len(rows) > 3
        assert {(row["site"], row["estimate"], row["exact"]) for row in rows} == {
            (row["site"], row["normalized"], row["exact_normalized"]) for row in expected
        }
    assert all(row["estimate"] == row["exact"] for row in spec["datasets"]["diagonal 0"])
    assert spec["concat"][0]["title"]["subtitle"] == "Pearson 0.80 on 30 random nodes"
    axes = spec["concat"][0]["layer"][1]["encoding"]
    assert axes["x"]["scale"]["domain"] == axes["y"]["scale"]["domain"]


def test_points_of_sizes_are_sizes() -> None:
    fake = Fake(blocks=("z",), estimators=("atp", "atp_star"))
    spec = specs(view(fake))["verified-logit_diff"]
    signed = spec["datasets"]["random 0"]
    sizes = spec["datasets"]["random 1"]
    assert any(row["exact"] < 0 for row in signed)
    assert all(row["exact"] >= 0 for row in sizes)
    assert {abs(row["exact"]) for row in signed} == {row["exact"] for row in sizes}
    assert "AtP*: GradDrop gives sizes without sign" in title_of(spec)


def test_subsets_are_told_beside_the_sums_of_their_estimates() -> None:
    words = unbroken(text(view(Fake(estimators=("atp",), subsets=4))))
    assert "AtP: 4 random subsets of 40 nodes" in words
    assert "sums of estimates are 0.050 off on average; the largest exact effect is 0.350." in words
    assert "subsets" not in text(view(Fake(estimators=("atp",))))


def test_headline_rows_have_the_same_keys_and_are_plain_data() -> None:
    rows = view(WHOLE).headline()
    assert {row["table"] for row in rows} == {"summary", "verification", "direct", "lens", "inputs"}
    assert len({tuple(row) for row in rows}) == 1
    assert not any(isinstance(value, float) and math.isnan(value) for row in rows for value in row.values())
    json.dumps(rows)
    trust = [row for row in rows if row["table"] == "verification"]
    assert {row["upper_count"] for row in trust if row["part"] == "random"} == {37}
    assert {row["upper_count"] for row in trust if row["part"] == "top"} == {None}


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("tokens", [WORDS[:4], HOSTILE])
def test_every_width_holds_and_nothing_acts(width: int, plain: bool, tokens: tuple[str, ...]) -> None:
    fake = replace(WHOLE, tokens=tokens, lens_positions=tuple(range(len(tokens))))
    shown = text(view(fake), width, plain=plain)
    seen = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert max(cell_len(line) for line in seen.splitlines()) <= width
    assert "\x1b" not in seen
    assert not set("\u202e\r\t") & set(seen)
    if plain:
        assert shown.isascii()
        assert "\x1b" not in shown
    else:
        assert "\x1b[38;2;0;0;0;48;2;" in shown


def test_markup_in_tokens_is_shown_as_it_is() -> None:
    shown = text(view(replace(TOKENS, tokens=HOSTILE)), 200, plain=False)
    for token in ("[/INST]", "[red]x[/red]", "\\x1b[31mred", "[bold]⏎", "\\u202e", "∅"):
        assert token in shown


def test_pictures_of_hostile_tokens_hold_no_control_character_and_are_drawn() -> None:
    shown = view(replace(WHOLE, tokens=HOSTILE, lens_positions=tuple(range(len(HOSTILE)))))
    for name, spec in specs(shown).items():
        assert not any(set("\x1b\n\u202e") & set(words) for words in strings(spec)), name
    # Words stand in the cells of one, on the axes of the other.
    for name, picture in [
        one for one in shown.pictures if one[0] in ("lens-resid_post", "00-resid_pre-atp-logit_diff")
    ]:
        svg = picture.svg().decode()
        assert "<script" not in svg, name
        assert "<img" not in svg, name


def test_every_picture_can_be_drawn() -> None:
    shown = view(WHOLE)
    assert len(shown.pictures) == 9
    for name, picture in shown.pictures:
        assert picture.png()[:4] == b"\x89PNG", name


def emptied(fake: Fake) -> dict[str, pd.DataFrame]:
    return {name: rows if name == "prompts" else rows.head(0) for name, rows in fake.tables().items()}


def test_tables_without_rows_show_nothing() -> None:
    shown = view(WHOLE, **emptied(WHOLE))
    assert (names(shown), shown.headline(), text(shown).strip()) == ([], [], "")


def without_numbers(table: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The table with null in every column of real numbers that may be null."""
    kept = records(rows)
    reals = {"value", "effect", "normalized", "estimate", "exact", "exact_normalized", "ci_low", "ci_high", "pearson",
             "spearman", "sign_agreement", "mean_difference", "above", "probability", "answer_probability", "kl",
             "answer_rank", "mean", "relative_error"}  # fmt: skip
    return frame(table, [{name: None if name in reals else value for name, value in row.items()} for row in kept])


def test_tables_without_a_number_do_not_break_anything() -> None:
    tables = {name: rows if name == "prompts" else without_numbers(name, rows) for name, rows in WHOLE.tables().items()}
    shown = view(WHOLE, **tables)
    assert "trust unknown" in unbroken(text(shown, 200))
    for name, picture in [one for one in shown.pictures if not one[0].startswith(("direct", "spans"))]:
        assert picture.png()[:4] == b"\x89PNG", name
    assert shown.pages
    json.dumps(shown.headline())


@pytest.mark.parametrize("fake", [replace(WHOLE, layers=1, prompts=1), replace(WHOLE, tokens=WORDS[:1], layers=1,
                                                                               lens_positions=(0,))])  # fmt: skip
def test_one_layer_one_prompt_one_token(fake: Fake) -> None:
    shown = view(fake)
    assert text(shown, 60)
    assert set(specs(shown)) == set(names(shown))


def test_maps_that_the_terminal_leaves_out_are_counted() -> None:
    fake = replace(SMALL, blocks=("resid_pre", "z"), estimators=("atp", "relp", "ig_inputs", "conductance"))
    assert "the first 6 of 8 maps; the pictures have all" in text(view(fake))
    assert "maps" not in text(view(replace(fake, estimators=("atp", "relp", "ig_inputs"))))


def test_of_checkpoints_the_last_is_shown_and_the_strongest_are_followed() -> None:
    fake = replace(WHOLE, checkpoints=STEPS)
    shown = view(fake)
    assert "training" in names(shown)
    assert "training" not in names(view(WHOLE))
    assert "checkpoint step-10, the last of 2" in shown.maps[0][1].subtitle
    once = view(WHOLE)
    assert len(shown.headline()) == len(once.headline())
    assert np.array_equal(shown.maps[0][1].panels[0].values, once.maps[0][1].panels[0].values)
    assert len(shown.lens) == len(once.lens)


def test_the_answer_says_how_many_nodes_were_drawn_of_how_many() -> None:
    fake = Fake()
    words = view(fake).answer()
    assert f"Over {fake.random} of 400 nodes, drawn at random, Pearson with exact effects is " in words
