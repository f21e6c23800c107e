"""Charts of every kind of run in a real browser: nothing is complained of, letters can be read, marks tell numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from mechinterp_cli.report.page.build import page_of_runs
from tests.page_runs import reference

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

sync_api = pytest.importorskip("playwright.sync_api", reason="the development packages are not installed (playwright)")

from tests.test_report_page_browser import CHROMIUM, FLAGS  # noqa: E402  (it needs playwright too)

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
RUNS = ("patch-induction-toy", "heads-toy", "attribute-toy", "circuit-planted", "probe-toy")
OUTSIDE = ".role-axis-label text, .role-axis-title text, .role-legend text, .role-title text, [data-figure^=graph] text"
"""Letters of charts that stand on the page itself; in graphs also those in boxes."""


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("charts")


class Shown:
    """A run's page with all charts drawn, and what was written to the console."""

    def __init__(self, browser: "Browser", folder: Path, name: str, scheme: Literal["light", "dark"]) -> None:
        file = folder / f"{name}.html"
        if not file.exists():
            file.write_bytes(page_of_runs([reference(name)]))
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(30_000)
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(file.as_uri())
        for chart in self.page.query_selector_all("figure .chart"):
            chart.scroll_into_view_if_needed()
        self.page.wait_for_function("!document.querySelector('figure .chart:not([data-drawn])')")

    def tip_at(self, figure: str, mark: str) -> list[str]:
        """What is told where one of a figure's marks is pointed at."""
        found = self.page.locator(f"[data-figure='{figure}'] .mark-{mark}.role-mark path").last
        found.scroll_into_view_if_needed()
        found.hover(force=True)
        tip = self.page.locator("#tip")
        tip.wait_for(state="visible")
        return tip.inner_text().split("\n")


@pytest.fixture
def shown(browser: "Browser", folder: Path, request: pytest.FixtureRequest) -> Iterator[Shown]:
    made = Shown(browser, folder, *request.param)
    yield made
    made.page.close()


def on(*runs: tuple[str, str]) -> pytest.MarkDecorator:
    """Run a test on (run, colours)."""
    return pytest.mark.parametrize("shown", runs, indirect=True, ids=["-".join(run) for run in runs])


@on(*[(name, scheme) for name in RUNS for scheme in ("light", "dark")])
def test_charts_are_drawn_without_a_warning_and_their_letters_can_be_read(shown: Shown) -> None:
    ratios = shown.page.evaluate(
        """(chosen) => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[0-9.]+/g).map(Number).slice(0, 3).map((v) => v / 255)
              .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const behind = (word) => {
            const box = word.getBoundingClientRect(), svg = word.closest("svg");
            const [x, y] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
            const under = [...svg.querySelectorAll(".mark-rect.role-mark path")].filter((path) => {
              const own = path.getBoundingClientRect();
              return own.left <= x && x <= own.right && own.top <= y && y <= own.bottom;
            });
            return light(under.length ? getComputedStyle(under.at(-1)).fill
              : getComputedStyle(document.body).backgroundColor);
          };
          return [...document.querySelectorAll(chosen)].filter((word) => word.textContent.trim()).map((word) => {
            const own = light(getComputedStyle(word).fill), ground = behind(word);
            return [(Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05), word.textContent];
          });
        }""",
        OUTSIDE,
    )
    assert len(ratios) > 10
    assert [words for ratio, words in ratios if ratio < 4.5] == []
    assert shown.said == []


@on(("probe-toy", "light"))
def test_points_of_curves_tell_interval_adjusted_p_and_n(shown: Shown) -> None:
    told = shown.tip_at("scores-resid_post", "symbol")
    assert {"layer", "accuracy", "n"} <= set(told)
    bars = shown.tip_at("projections", "rect")
    assert {"share of the class", "n"} <= set(bars)
    assert shown.said == []


@on(("circuit-planted", "dark"))
def test_dots_and_edges_tell_what_is_behind_them(shown: Shown) -> None:
    assert {"interval", "adjusted p", "faithfulness that is lost"} <= set(
        shown.tip_at("minimality-logit_diff", "symbol")
    )
    edge = shown.tip_at("graph-exact", "line")
    assert {"from", "to", "score"} <= set(edge)
    assert not {"x", "y", "_x", "_y", "width"} & set(edge)
    figure = shown.page.locator("[data-figure='graph-exact']")
    figure.locator("summary").click()
    heads = figure.locator("table").first.locator("th").all_inner_texts()
    assert heads == ["from", "to", "score", "sign"]
    assert figure.locator("table").first.locator("tbody tr").count() == 5
    assert shown.said == []


@on(("heads-toy", "light"))
def test_the_p_of_one_test_is_not_called_adjusted(shown: Shown) -> None:
    told = shown.tip_at("causal", "symbol")
    assert "adjusted p" not in told
    assert {"draws", "middle 95 %"} & set(told) or {"interval", "n"} <= set(told)
    assert shown.said == []


@on(("attribute-toy", "light"))
def test_points_of_a_scatter_tell_which_node_they_are(shown: Shown) -> None:
    told = shown.tip_at("verified-logit_diff", "symbol")
    assert {"where", "estimated normalised effect", "exact normalised effect", "interval", "n"} <= set(told)
    assert shown.said == []
