"""The report page in a real browser: it opens, asks for nothing, is worked from the keyboard, shows text as text."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mechinterp_cli.cli.registry import register_all
from mechinterp_cli.report.page.build import page_of_runs
from tests.page_runs import ATTACK, ablation_run, attacking_run, reference

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

sync_api = pytest.importorskip("playwright.sync_api", reason="the development packages are not installed (playwright)")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
RUNS = ("patch-induction-toy", "heads-toy", "attribute-toy", "ablate", "probe-toy", "circuit-planted")
"""A run of every kind."""
LATER = RUNS[3:]


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@dataclass
class Pages:
    """Pages by name, each made when it is first asked for."""

    folder: Path

    def file(self, name: str) -> Path:
        """The page's file."""
        path = self.folder / f"{name}.html"
        if not path.exists():
            path.write_bytes(page_of_runs(self._runs(name)))
        return path

    def _runs(self, name: str) -> list[Path]:
        if name == "several":
            return [reference(RUNS[0]), attacking_run(self.folder / "beside"), reference("heads-toy")]
        kind, _, run = name.rpartition(" ")
        path = self._run(run)
        if kind == "two of":
            return [path, attacking_run(self.folder / "second", path)]
        return [attacking_run(self.folder, path)] if kind == "attack" else [path]

    def _run(self, name: str) -> Path:
        """A run's directory; that of `ablate` is run once."""
        if name == "ablate":
            return next((self.folder / "runs").glob("*-ablate-*"), None) or ablation_run(self.folder)
        return reference(name)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    register_all()  # a method says which of its tables is compared
    return Pages(tmp_path_factory.mktemp("pages"))


class Opened:
    """A page that is open, errors and warnings that it wrote to the console, and what it asked for."""

    def __init__(self, page: "Page", file: Path) -> None:
        page.set_default_timeout(15_000)
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(file.as_uri())
        self.file = file

    def _hear(self, message: "ConsoleMessage") -> None:
        if message.type in ("error", "warning"):
            self.said.append(message.text)

    def draw_all(self) -> None:
        """Scroll through, so that every chart is drawn."""
        for chart in self.page.query_selector_all("figure .chart"):
            chart.scroll_into_view_if_needed()
        self.page.wait_for_function("() => !document.querySelector('figure .chart:not([data-drawn])')")

    def check_quiet(self) -> None:
        """There was no error and no warning, and nothing but the file itself was asked for."""
        assert self.said == []
        assert self.asked == [self.file.as_uri()]


@pytest.fixture
def opened(browser: "Browser", pages: Pages, request: pytest.FixtureRequest) -> Iterator[Opened]:
    name, width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    yield Opened(page, pages.file(name))
    page.close()


def on(*pages: tuple[str, int, str]) -> pytest.MarkDecorator:
    """Run a test on (page, width, colours)."""
    return pytest.mark.parametrize("opened", pages, indirect=True, ids=["-".join(map(str, page)) for page in pages])


@on(*[(name, 1280, "light") for name in (*RUNS, "several")], *[(name, 400, "dark") for name in RUNS])
def test_every_page_opens_draws_all_and_asks_for_nothing(opened: Opened) -> None:
    opened.draw_all()
    page = opened.page
    assert page.locator("figure svg, figure canvas").count() >= 1
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "the page itself is never scrolled sideways"
    opened.check_quiet()


@on((f"attack {RUNS[0]}", 1280, "light"))
def test_markup_in_texts_is_shown_and_never_runs(opened: Opened) -> None:
    opened.draw_all()
    page = opened.page
    shown = ATTACK.replace(" ", "·")
    assert page.locator(".tokens span").first.inner_text() == shown
    assert page.locator("ul.warnings li").inner_text() == ATTACK
    assert page.locator("h1").inner_text() == ATTACK
    assert page.locator("pre").last.inner_text() == f"# {ATTACK}\n"
    assert page.title() == ATTACK
    assert page.locator("img").count() == 0
    opened.check_quiet()


@on((RUNS[0], 1280, "light"))
def test_a_cell_that_is_pointed_at_tells_its_numbers(opened: Opened) -> None:
    opened.draw_all()
    page = opened.page
    cells = page.locator("[data-figure^='01-z'] .mark-rect.role-mark path")
    cells.last.scroll_into_view_if_needed()
    cells.last.hover()
    tip = page.locator("#tip")
    tip.wait_for(state="visible")
    told = tip.inner_text()
    for name in ("head", "layer", "normalised effect", "interval", "adjusted p", "n"):
        assert name in told.split("\n")
    page.mouse.move(0, 0)
    tip.wait_for(state="hidden")


@on((RUNS[0], 1280, "light"))
def test_the_prompt_browser_shows_the_prompt_that_is_chosen(opened: Opened) -> None:
    page = opened.page
    first = page.locator("[data-stream='clean'] .tokens").inner_text()
    assert page.locator("[data-stream='corrupt'] .tokens").inner_text() != first
    assert page.locator("[data-stream='clean'] .tokens .above").count() > 0
    page.get_by_label("Prompt", exact=True).select_option(index=2)
    second = page.locator("[data-stream='clean'] .tokens").inner_text()
    assert second != first
    page.locator(".prompts .chart").scroll_into_view_if_needed()
    token = page.locator("[data-stream='clean'] .tokens span").first.inner_text()
    drawn = "label => [...document.querySelectorAll('.prompts svg .role-axis-label text')]"
    page.wait_for_function(f"{drawn}.some((text) => text.textContent === label)", arg=f"0 {token}")
    page.get_by_role("button", name="Previous").click()
    page.get_by_role("button", name="Previous").click()
    assert page.locator("[data-stream='clean'] .tokens").inner_text() == first
    assert page.get_by_role("button", name="Previous").is_disabled()
    page.get_by_label("Effects of").select_option(label="z (block 1)")
    page.wait_for_function("() => document.querySelector('.prompts svg .role-axis-title').textContent === 'head'")
    opened.check_quiet()


MAPS = {
    "ablate": ("head, mean", ("layer", "head", "effect on repeated_loss (nats per token)")),
    "probe-toy": ("resid_post, mass_mean", ("layer", "read at", "probe says", "truth")),
    "circuit-planted": ("kept, logit_diff, absolute scores", ("score", "share kept", "logit_diff")),
}
"""Of every kind a map of single prompts, and what its cells tell."""


@on(*[(name, 1280, "light") for name in LATER])
def test_prompts_of_every_kind_have_maps_whose_cells_tell_their_numbers(opened: Opened) -> None:
    page = opened.page
    title, names = MAPS[opened.file.stem]
    page.locator(".prompts .chart").scroll_into_view_if_needed()
    page.get_by_label("Effects of").select_option(label=title)
    page.wait_for_function(
        "title => document.querySelector('.prompts [role=img]')?.ariaLabel.startsWith(title)", arg=title
    )
    tokens = page.locator("[data-stream='clean'] .tokens").inner_text()
    page.get_by_role("button", name="Next").click()
    assert page.locator("[data-stream='clean'] .tokens").inner_text() != tokens
    number = page.get_by_label("Prompt", exact=True).evaluate("pick => pick.selectedOptions[0].text.split(':')[0]")
    page.wait_for_function(
        "end => document.querySelector('.prompts [role=img]').ariaLabel.endsWith(end)", arg=f"prompt {number}"
    )
    cell = page.locator(".prompts .mark-rect.role-mark path").last
    cell.scroll_into_view_if_needed()
    cell.hover()
    page.locator("#tip").wait_for(state="visible")
    told = page.locator("#tip").inner_text().split("\n")
    assert [name for name in names if name not in told] == []
    opened.check_quiet()


@on(*[(name, 1280, "light") for name in LATER])
def test_figures_of_every_kind_tell_what_is_pointed_at(opened: Opened) -> None:
    page = opened.page
    opened.draw_all()
    mark = page.locator("figure .role-mark.mark-symbol path, figure .role-mark.mark-rect path").last
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    page.locator("#tip").wait_for(state="visible")
    assert len(page.locator("#tip").inner_text().split("\n")) >= 4


@on((RUNS[0], 1280, "light"))
def test_tables_are_sorted_by_their_heads(opened: Opened) -> None:
    table = opened.page.locator(".results table")
    head = table.get_by_role("columnheader", name="effect", exact=True)
    head.get_by_role("button").click()
    at = head.evaluate("head => head.cellIndex")
    column = table.locator(f"tbody td:nth-child({at + 1})")
    down = [float(cell) for cell in column.all_inner_texts()]
    assert head.get_attribute("aria-sort") == "descending"
    assert down == sorted(down, reverse=True)
    head.get_by_role("button").click()
    assert [float(cell) for cell in column.all_inner_texts()] == sorted(down)
    assert head.get_attribute("aria-sort") == "ascending"


@on(*[(name, 1280, "light") for name in (RUNS[0], *LATER)])
def test_everything_is_reached_and_worked_from_the_keyboard(opened: Opened) -> None:
    page = opened.page
    opened.draw_all()
    page.evaluate("scrollTo(0, 0)")
    wanted = page.locator(
        "button:visible:not(:disabled), select:visible, summary:visible, [tabindex='0']:visible"
    ).count()
    reached = []
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            "(() => { const e = document.activeElement; const all = [...document.querySelectorAll('*')];"
            "const style = getComputedStyle(e);"
            "return [all.indexOf(e), e.tagName, style.outlineStyle, parseFloat(style.outlineWidth)]; })()"
        )
        if seen[1] == "BODY" or seen in reached:
            break
        reached.append(seen)
    assert len(reached) == wanted + 1  # and the link that leads past the head
    assert all(style != "none" and size >= 2 for _, _, style, size in reached)
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.locator("figure summary").first.focus()
    page.keyboard.press("Enter")
    page.locator("figure details[open] table").first.wait_for()
    opened.check_quiet()


@on((RUNS[0], 1280, "light"), (RUNS[0], 1280, "dark"), ("circuit-planted", 1280, "dark"), ("probe-toy", 1280, "dark"))
def test_letters_stand_out_from_what_is_behind_them(opened: Opened) -> None:
    opened.draw_all()
    opened.page.wait_for_timeout(100)
    ratio = """(() => {
      const light = (colour) => {
        const [r, g, b] = colour.match(/[0-9.]+/g).map(Number).slice(0, 3).map((v) => v / 255)
          .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const behind = light(getComputedStyle(document.body).backgroundColor);
      const words = [...document.querySelectorAll("h1, h2, .faint, td, th button, figure svg .role-axis-label text")];
      return words.map((word) => {
        const style = getComputedStyle(word);
        const own = light(word.tagName === "text" ? style.fill : style.color);
        return (Math.max(own, behind) + 0.05) / (Math.min(own, behind) + 0.05);
      });
    })()"""
    ratios = opened.page.evaluate(ratio)
    assert len(ratios) > 20
    assert min(ratios) >= 4.5


@on(("several", 1280, "light"))
def test_several_runs_are_compared_and_each_is_opened(opened: Opened) -> None:
    page = opened.page
    opened.draw_all()
    assert page.locator("[data-figure='scatter'] svg").count() == 1
    assert "Not compared: " in page.locator("main").inner_text()
    page.locator("details.run > summary").nth(2).click()
    page.locator("details.run[open] .answer").wait_for()
    assert "induction score" in page.locator("details.run[open] .answer").inner_text()
    opened.draw_all()
    opened.check_quiet()


@on(*[(f"two of {name}", 1280, "dark") for name in LATER])
def test_a_run_is_compared_with_another_whose_texts_are_markup(opened: Opened) -> None:
    page = opened.page
    opened.draw_all()
    assert page.locator("[data-figure='scatter'] svg, [data-figure='scatter'] canvas").count() == 1
    assert page.locator(".compared table").first.locator("tbody tr").count() >= 1
    page.locator("details.run > summary").nth(1).click()
    page.locator("details.run[open] .answer").wait_for()
    opened.draw_all()
    other = page.locator("details.run[open]")
    assert other.locator(".tokens span").first.inner_text() == ATTACK.replace(" ", "·")
    assert other.locator("ul.warnings li").inner_text() == ATTACK
    assert other.locator("summary h2").inner_text() == f"Run 2: {ATTACK}"
    assert page.title() == "2 runs compared"
    assert page.locator("img").count() == 0
    opened.check_quiet()
