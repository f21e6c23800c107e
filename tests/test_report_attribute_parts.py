"""Lens, direct attribution and tokens are shown as their tables have them; the page of tokens is inert."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from mechinterp_cli.report import token_page as paging
from mechinterp_cli.report.lens import by_layer
from mechinterp_cli.report.picture import ink_on
from mechinterp_cli.report.rows import having
from mechinterp_cli.report.token_page import token_page
from mechinterp_cli.report.tokens import MAX_LINES, PER_LINE, short, token_lines
from tests.attribute_frames import WORDS, Fake, frame, records
from tests.attribute_shown import HOSTILE, cells, coloured, data, names, specs, text, title_of, unbroken, view

LENS = Fake(blocks=(), lens=("resid_post",))
TOKENS = Fake(blocks=(), inputs=("gradient_x_input", "integrated_gradients", "occlusion", "rollout"))
DIRECT = Fake(blocks=(), direct=True)


def test_every_cell_of_the_lens_is_the_likeliest_token_of_the_first_prompt() -> None:
    spec = specs(view(LENS))["lens-resid_post"]
    found = {(row["row"], row["column"]): row for row in spec["datasets"]["cells 0"]}
    assert len(found) == 9
    for row in records(having(LENS.lens_table(), prompt=0, rank=0)):
        cell = found[str(row["layer"]), f"{row['position']} {WORDS[row['position']].replace(' ', '·')}"]
        assert cell["word"] == row["token"].replace(" ", "·")
        assert cell["value"] == pytest.approx(row["probability"])
        assert cell["number"] == f"{100 * row['probability']:.0f}"
    assert spec["concat"][0]["layer"][0]["encoding"]["y"]["scale"]["domain"] == ["2", "1", "0"]


def test_letters_stay_readable_on_their_colour() -> None:
    spec = specs(view(replace(LENS, layers=9)))["lens-resid_post"]
    rows = spec["datasets"]["cells 0"]
    assert all(row["ink"] == ink_on(row["value"]) for row in rows)  # from 0 to 1 the scale is that of shares


def test_a_narrow_terminal_keeps_the_last_positions_and_says_so() -> None:
    fake = replace(LENS, lens_positions=range(14))
    narrow, wide = text(view(fake), 60), text(view(fake), 200)
    assert "positions; the picture has more" in narrow
    assert "positions; the picture has more" not in wide
    for shown in (narrow, wide):
        assert "13 _to" in shown
        assert re.search(r"^2 +", shown, re.M)
    assert "0 _When" in wide
    assert "0 _When" not in narrow


def test_colours_stand_for_probabilities_and_plain_terminals_get_numbers() -> None:
    shown = view(LENS)
    assert "_Mary 75" in text(shown, 100)
    seen = coloured(shown, 100)
    assert "·Mary " in seen
    assert "·Mary 75" not in seen
    # White to the blue of the picture: 0.75 and 0.25 of the way.
    assert "48;2;88;140;193m" in seen
    assert "48;2;200;217;234m" in seen


def test_at_one_position_the_columns_are_ranks() -> None:
    shown = view(replace(LENS, lens_positions=(13,)))
    spec = specs(shown)["lens-resid_post"]
    top = [row for row in spec["datasets"]["cells 0"] if row["row"] == "2"]
    assert [row["column"] for row in top] == ["1", "2", "3"]
    assert [row["value"] for row in top] == [0.75, 0.375, 0.1875]
    assert spec["concat"][0]["layer"][0]["encoding"]["x"]["title"].endswith("position 13 ·to")


def test_means_by_layer_are_those_of_each_prompts_last_position() -> None:
    rows = records(LENS.lens_table())
    # Prompt 1 ends earlier than the others.
    kept = frame("lens", [row for row in rows if row["prompt"] != 1 or row["position"] < 13])
    moved = frame("lens", [{**row, "kl": row["position"] + row["layer"]} for row in records(kept)])
    found = {row["layer"]: row for row in records(by_layer(moved))}
    for layer in range(3):
        assert found[layer]["kl"] == pytest.approx((13 + 5 + 13) / 3 + layer)
        values = [(layer + 1) / 4 / (1 + prompt) for prompt in range(3)]
        assert found[layer]["answer_probability"] == pytest.approx(np.mean(values))
        assert found[layer]["answer_probability_low"] == pytest.approx(np.quantile(values, 0.25))
        assert found[layer]["answer_rank"] == 10 * (2 - layer)
        assert found[layer]["n"] == 3


def test_the_lens_by_layer_is_a_table_and_curves() -> None:
    shown = view(LENS)
    assert cells(text(shown, 100), "2") == ["2", f"{(0.75 + 0.375 + 0.25) / 3:.3f}", "0", "1.000", "3"]
    spec = specs(shown)["lens"]
    assert len(spec["concat"]) == 2
    points = [row for row in data(spec, "name", "x", "y") if "high" not in row]
    assert {(row["x"], round(row["y"], 6)) for row in points} >= {(2.0, round(1.375 / 3, 6)), (2.0, 1.0)}
    assert "means over 3 prompts" in title_of(spec)


def test_the_embedding_stands_below_the_layers_and_is_no_curve() -> None:
    shown = view(replace(LENS, lens=("embed", "resid_post")))
    assert names(shown) == ["lens-resid_post", "lens"]
    spec = specs(shown)["lens-resid_post"]
    assert spec["concat"][0]["layer"][0]["encoding"]["y"]["scale"]["domain"] == ["2", "1", "0", "embed"]
    assert cells(text(shown), "embed")[1:3] == [f"{(0.25 + 0.125 + 0.25 / 3) / 3:.3f}", "20"]
    curves = specs(shown)["lens"]
    assert {row["name"] for row in data(curves, "name", "x", "y")} == {"resid_post"}
    assert "What the embedding itself says is not drawn." in title_of(curves)
    assert "not drawn" not in title_of(specs(view(LENS))["lens"])
    assert names(view(replace(LENS, lens=("embed",)))) == ["lens-embed", "lens"]


def test_without_answers_the_lens_tells_of_divergence_alone() -> None:
    shown = view(replace(LENS, answers=False))
    assert len(specs(shown)["lens"]["concat"]) == 1
    assert "p(answer)" not in text(shown)
    assert "p(answer)" in text(view(LENS))


def test_the_map_of_heads_holds_direct_parts() -> None:
    spec = specs(view(DIRECT))["direct-heads"]
    found = {(row["layer"], row["column"]): row["value"] for row in data(spec, "layer", "column")}
    heads = [row for row in DIRECT.parts() if row["component"] == "head"]
    assert len(heads) == 12
    assert found == {(row["layer"], str(row["head"])): pytest.approx(row["value"]) for row in heads}
    assert "0: it does not move the logit difference" in title_of(spec)


def test_the_largest_parts_come_first_with_bars_to_their_side() -> None:
    shown = text(view(DIRECT), 100)
    ordered = sorted((row for row in DIRECT.parts() if row["part_of"]), key=lambda row: -abs(row["value"]))
    listed = [line.split("|")[1].strip() for line in shown.splitlines() if re.match(r"\| (head|mlp|embedding)", line)]
    assert listed[0] == "head 1.2"
    assert len(listed) == 12
    for name, row in zip(listed, ordered, strict=False):
        places = [str(row[place]) for place in ("layer", "head") if place in row]
        assert name == " ".join(filter(None, (row["component"], ".".join(places))))
    assert "|             |############ |" in next(line for line in shown.splitlines() if "head 1.2" in line)
    lowest = min(ordered[:12], key=lambda row: row["value"])
    bar = next(line for line in shown.splitlines() if f"| mlp {lowest['layer']} " in line or "#|  " in line)
    assert re.search(r"#\| {13}\|", bar)
    total = sum(row["value"] for row in ordered)
    assert f"parts of the mean logit difference, {total:.2f} [{total - 0.2:.2f}, {total + 0.2:.2f}]" in shown


def test_neurons_stand_apart_from_the_mlps_that_they_are_part_of() -> None:
    shown = view(replace(DIRECT, direct_neurons=3))
    panels = specs(shown)["direct"]["concat"]
    assert [panel["title"] for panel in panels] == ["embedding, MLPs and the rest, by layer", "heads", "neurons"]
    assert len(specs(view(DIRECT))["direct"]["concat"]) == 2
    assert "largest neurons, which are parts of their MLP's" in text(shown)
    assert "neuron" not in text(view(DIRECT))


def test_parts_of_heads_are_told_by_span_and_token() -> None:
    fake = replace(DIRECT, sources=True)
    shown = text(view(fake), 120)
    assert "| head 1.2  | position 1 _Mary " in shown
    strongest = max(records(fake.sources_table()), key=lambda row: abs(row["value"]))
    name = f"head {strongest['layer']}.{strongest['head']}"
    row = next(line for line in shown.splitlines() if name in line and strongest["source_span"] in line)
    assert f"{strongest['value']:+.3f}" in row
    assert "carried from" not in text(view(DIRECT), 120)


def test_strips_hold_every_token_its_value_and_its_share() -> None:
    spec = specs(view(TOKENS))["tokens-logit_diff"]
    assert len(spec["concat"]) == 3
    for panel in range(3):
        assert len(spec["datasets"][f"cells {panel}"]) == 4 * len(WORDS)
        for row in spec["datasets"][f"cells {panel}"]:
            name = {"gradient x input": "gradient_x_input", "integrated gradients": "integrated_gradients",
                    "occlusion (exact)": "occlusion", "attention rollout": "rollout"}[row["row"]]  # fmt: skip
            values = [TOKENS.counts(panel, name, at) for at in range(len(WORDS))]
            at = int(row["column"])
            assert row["word"] == WORDS[at].replace(" ", "·")
            assert row["value"] == pytest.approx(values[at] / max(map(abs, values)))
            assert float(row["number"]) == pytest.approx(values[at], abs=0.0051)
    assert "0 is white" in title_of(spec)
    assert "In place of a token: the mean embedding" in title_of(spec)


@pytest.mark.parametrize(("letters", "across"), [(1, PER_LINE), (20, 13)])
def test_long_prompts_are_broken_into_lines_that_have_room(letters: int, across: int) -> None:
    tokens = tuple(f" w{i}-{'x' * letters}" for i in range(across + 3))
    spec = specs(view(replace(TOKENS, tokens=tokens, prompts=1)))["tokens-logit_diff"]
    titles = [panel["title"] for panel in spec["concat"]]
    assert titles == [
        f"prompt 0, tokens 0 to {across - 1} of {across + 3}",
        f"prompt 0, tokens {across} to {across + 2} of {across + 3}",
    ]
    rows = [row for panel in (0, 1) for row in spec["datasets"][f"cells {panel}"] if row["row"][0] == "o"]
    assert [row["column"] for row in rows] == [str(i) for i in range(across + 3)]
    assert [row["word"].split("-")[0] for row in rows] == [f"·w{i}" for i in range(across + 3)]
    assert "The first" not in title_of(spec)


def test_tokens_that_have_no_room_in_the_picture_are_counted() -> None:
    tokens = tuple(f" w{i}" for i in range(MAX_LINES * PER_LINE + 1))
    spec = specs(view(replace(TOKENS, inputs=("occlusion",), tokens=tokens, prompts=1)))["tokens-logit_diff"]
    assert len(spec["concat"]) == MAX_LINES
    assert f"The first {MAX_LINES * PER_LINE} tokens of each." in title_of(spec)


def test_plain_terminals_get_the_number_below_each_token() -> None:
    lines = text(view(replace(TOKENS, prompts=1)), 200).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("occlusion (exact) (full colour"))
    words, numbers = lines[at + 1].split(), lines[at + 2].split()
    assert words == [word.replace(" ", "_") for word in WORDS]
    assert numbers == [f"{TOKENS.counts(0, 'occlusion', i) + 0.0:.2f}".replace("-0.00", "0.00") for i in range(14)]
    starts = [lines[at + 1].index(word) + len(word) for word in (words[0], words[3])]
    assert all(lines[at + 2][end - 1] != " " and lines[at + 2][end] == " " for end in starts)


def test_coloured_terminals_get_tokens_in_the_two_colours() -> None:
    shown = coloured(view(replace(TOKENS, prompts=1)), 200)
    assert "48;2;33;102;172m·John" in shown
    red = re.search(r"48;2;(\d+);(\d+);(\d+)m·John", shown.split("·store")[0])
    assert red is not None
    assert int(red[1]) > int(red[2]) + 50


def test_prompts_that_are_left_out_are_counted() -> None:
    assert "3 of 5 prompts; figures/tokens.html has more" in text(view(replace(TOKENS, prompts=5)))
    assert "figures/tokens.html" not in text(view(TOKENS))
    assert "Prompts 0, 1, 2 of 5." in title_of(specs(view(replace(TOKENS, prompts=5)))["tokens-logit_diff"])


def test_rollout_alone_is_shown_too() -> None:
    fake = replace(TOKENS, inputs=("rollout",), prompts=1)
    shown = view(fake)
    assert names(shown) == ["tokens-attention", "spans-attention"]
    assert "share of attention" in text(shown)
    assert {row["estimator"] for row in shown.headline()} == {"rollout"}


def test_spans_and_completeness_are_told() -> None:
    shown = text(view(TOKENS), 120)
    assert cells(shown, "occlusion (exact)")[1:4] == ["IO", "-1.400", "[-1.600, -1.200]"]
    said = "miss M(input) - M(baseline) by 0.4 % of it at the median prompt and 0.6 % at most, of 3 prompts"
    assert said in unbroken(shown)
    spec = specs(view(TOKENS))["spans-logit_diff"]
    assert {(row["name"], row["series"]) for row in data(spec, "name", "series", "value")} == {
        (span, name)
        for span in ("IO", "S2")
        for name in ("gradient x input", "integrated gradients", "occlusion (exact)", "attention rollout")
    }
    assert "sums over tokens miss" not in text(view(TOKENS, "input_completeness"))


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[tuple[str, str]] = []
        """(text, title) of every coloured word."""
        self._title: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = {name: value or "" for name, value in attrs}
        self.attributes += list(found.items())
        self._title = found.get("title", "") if tag == "span" else None
        if tag == "span":
            self.words.append(("", self._title or ""))

    def handle_data(self, data: str) -> None:
        if self._title is not None:
            self.words[-1] = (self.words[-1][0] + data, self._title)

    def handle_endtag(self, tag: str) -> None:
        self._title = None if tag == "span" else self._title


def page_of(fake: Fake) -> str:
    ((name, page),) = view(fake).pages
    assert name == "tokens"
    return page


def test_the_page_holds_every_prompts_tokens_of_every_estimator_and_metric() -> None:
    found = Page(page_of(replace(TOKENS, prompts=5)))
    words = [(word, title) for word, title in found.words if title]
    assert len(words) == 5 * (3 * 2 + 1) * len(WORDS)
    assert [word for word, _ in words[: len(WORDS)]] == [word.replace(" ", "·") for word in WORDS]
    said = [float(title.split(": ")[1]) for _, title in words[: len(WORDS)]]
    assert said == pytest.approx([TOKENS.counts(0, "gradient_x_input", at) for at in range(len(WORDS))], rel=1e-3)
    assert page_of(TOKENS).count("<h2>") == 3


@pytest.mark.parametrize("tokens", [WORDS, HOSTILE])
def test_the_page_cannot_act_and_asks_for_nothing(tokens: tuple[str, ...]) -> None:
    fake = replace(TOKENS, tokens=tokens, prompts=2, metrics=("logit_diff", "</style><script>"))
    page = page_of(fake)
    found = Page(page)
    assert found.tags == {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "wbr", "section",
                          "dl", "dt", "dd"}  # fmt: skip
    assert {name for name, _ in found.attributes} == {"lang", "charset", "http-equiv", "content", "name", "class",
                                                      "style", "title"}  # fmt: skip
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    assert "url(" not in page
    assert "@import" not in page
    assert "//" not in page
    assert not {character for character in page if ord(character) < 32} - {"\n"}
    assert not set("\u202e\x7f") & set(page)
    assert all(re.fullmatch(r"--share:\d\.\d\d", value) for name, value in found.attributes if name == "style")


def test_hostile_tokens_are_shown_as_text() -> None:
    words = [word for word, title in Page(page_of(replace(TOKENS, tokens=HOSTILE, prompts=1))).words if title]
    for token in ("</script><script>alert(1)</script>", "<img·src=x·onerror=alert(1)>", "&lt;", "'·onmouseover='x",
                  "\\x1b[31mred", "[bold]⏎", "\\u202e", "∅", "w" * 200 + "…"):  # fmt: skip
        assert token in words


def test_colours_of_the_page_are_shares_by_sign() -> None:
    page = page_of(replace(TOKENS, prompts=1, inputs=("occlusion",), metrics=("logit_diff",)))
    largest = re.search(r'<span class="(\S+)[^>]*--share:1\.00" title="position 9:', page)
    lowered = re.search(r'<span class="(\S+)" style="--share:0\.(\d\d)" title="position 3:', page)
    assert largest is not None and largest[1] == "above"
    assert lowered is not None and lowered[1] == "below"
    assert "prefers-color-scheme: dark" in page


def test_values_that_are_no_numbers_have_no_colour() -> None:
    rows = [{**row, "value": None if row["position"] == 3 else row["value"]} for row in records(TOKENS.inputs_table())]
    page = token_page(frame("inputs", rows), ("toy",))
    assert '<span class="none" title="position 3: no number">' in page
    assert '<span class="none"' not in page_of(TOKENS)


def test_a_page_that_would_be_too_large_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = page_of(replace(TOKENS, prompts=4))
    monkeypatch.setattr(paging, "MAX_TOKENS", 2 * 7 * len(WORDS))
    cut = page_of(replace(TOKENS, prompts=4))
    assert (whole.count("<h2>"), cut.count("<h2>")) == (4, 2)
    assert "The first 2 of 4 prompts" in cut
    assert "The first" not in whole


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-0.001, "0.00"), (1.234, "1.23"), (-99.5, "-99.50"), (123.4, "123"), (-2.5e6, "-2.5e+06"), (math.nan, "?")],
)
def test_numbers_of_tokens_are_short(value: float, shown: str) -> None:
    assert short(value) == shown


def test_lines_of_tokens_come_by_prompt_metric_and_estimator() -> None:
    lines = token_lines(TOKENS.inputs_table())
    assert [(one.prompt, one.metric, one.estimator) for one in lines[:7]] == [
        (0, metric, name) for metric in ("logit_diff", "prob") for name in TOKENS.inputs[:3]
    ] + [(0, "attention", "rollout")]
    assert [one.prompt for one in lines] == sorted(one.prompt for one in lines)
