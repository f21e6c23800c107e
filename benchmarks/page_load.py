"""How long a report page of many rows takes to load in Chromium.

`python -m benchmarks.page_load [--rows N] [--loads N] [--page FILE]` makes two pages: of a run with that many results
(`results`: a thousand trials on as many prompts as it takes, shown prompt by prompt) and of one with that many trials
(`cells`: heat maps of 20,000 cells each); or it takes a page that is there. It opens each several times, each time in a
new tab of one browser, and prints what a load takes until the answer is seen, until all that is in the window is drawn,
and until the page rests: on the clock, and of the page's own processor time, which other work on the machine disturbs
less. The best load stands beside the median.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from mechinterp_cli.report.page.content import PageSource, run_content
from mechinterp_cli.report.page.document import document
from mechinterp_cli.report.patch import patch_view
from mechinterp_cli.runs.manifest import Manifest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

REFERENCE = Path(__file__).resolve().parents[1] / "runs" / "reference" / "patch-induction-toy"
LAYERS = 20
TRIALS = 1_000
"""Of every prompt."""
CELLS = 20_000
"""Of every heat map: the most that a page draws one by one."""
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
SEEN = """[...document.querySelectorAll('.chart')].filter((chart) => {
  const box = chart.getBoundingClientRect();
  return box.height && box.top < innerHeight && box.bottom > 0;
})"""
DRAWN = f"() => document.querySelector('.answer') && {SEEN}.every((chart) => chart.dataset.drawn)"
WHEN = f"Math.max(0, ...{SEEN}.map((chart) => Number(chart.dataset.drawn)))"
SETTLED = "new Promise((done) => setTimeout(() => requestIdleCallback(done), 500))"
CLOCKED = """() => new Promise((done) => {
  const [times] = performance.getEntriesByType('navigation');
  const [paint] = performance.getEntriesByName('first-contentful-paint');
  done({answer: paint ? paint.startTime : NaN, loaded: times.loadEventEnd});
})"""
NAMES = {
    "answer": "answer seen, clock", "drawn": "window drawn, clock", "busy": "window drawn, processor",
    "ProcessTime": "at rest, processor",
}  # fmt: skip


def many_results(rows: int) -> bytes:
    """The page of a run with so many results: a thousand trials on as many prompts as it takes.

    Args:
        rows: Trials times prompts.
    """
    count = max(1, rows // TRIALS)
    effects = np.random.default_rng(0).normal(size=(count, TRIALS))
    summary = _summary(effects.mean(0), "z", 0, count)
    results = summary[["trial", "metric"]].merge(pd.DataFrame({"prompt": range(count)}), how="cross")
    results = results.assign(effect=effects.T.reshape(-1), draw=None)
    return _page({"summary": summary, "results": results, "prompts": _prompts(count)})


def many_cells(rows: int) -> bytes:
    """The page of a run with so many trials: heat maps, all as large as a page draws them.

    Args:
        rows: Trials.
    """
    draw = np.random.default_rng(0)
    blocks = [
        _summary(draw.normal(size=CELLS), kind, at, 8)
        for at, kind in enumerate(f"part {at}" for at in range(max(1, rows // CELLS)))
    ]
    summary = pd.concat(blocks, ignore_index=True)
    return _page({"summary": summary.assign(trial=np.arange(len(summary))), "prompts": _prompts(8)})


def _summary(effects: npt.NDArray[np.float64], kind: str, block: int, count: int) -> pd.DataFrame:
    """Rows of heads of `LAYERS` layers."""
    layer, head = np.divmod(np.arange(len(effects)), len(effects) // LAYERS)
    labels = [f"{kind}, layer {at}, head {own}" for at, own in zip(layer, head, strict=True)]
    place = {"trial": np.arange(len(effects)), "label": labels, "site": kind, "layer": layer, "head": head}
    return pd.DataFrame(place).assign(
        metric="logit_diff", block=block, group="all", aggregate="ratio_of_means", value=effects, effect=effects,
        normalized=effects, n=count, ci_low=effects - 0.1, ci_high=effects + 0.1, p_adjusted=0.5, status="ok",
        verdict="no",
    )  # fmt: skip


def _page(tables: dict[str, pd.DataFrame]) -> bytes:
    manifest = Manifest.read(REFERENCE)
    view = patch_view(manifest, tables)
    source = PageSource(manifest, view, tables, "name: many\n")
    return document("many", {"runs": [run_content(source, view.pictures)]})


CASES: Mapping[str, Callable[[int], bytes]] = {"results": many_results, "cells": many_cells}


def _prompts(count: int) -> pd.DataFrame:
    """The reference run's prompts over and over."""
    known = pd.read_parquet(REFERENCE / "prompts.parquet")
    each = known["prompt"].nunique()
    copies = [known.assign(prompt=known["prompt"] + at * each) for at in range(-(-count // each))]
    whole = pd.concat(copies, ignore_index=True)
    return whole[whole["prompt"] < count]


def load(browser: "Browser", file: Path) -> dict[str, float]:
    """Open the page once: milliseconds on the clock, and what the browser counts of it, in milliseconds too."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    before = _counted(session.send("Performance.getMetrics"))
    page.goto(file.as_uri())
    page.wait_for_function(DRAWN)
    drawn = float(page.evaluate(WHEN))
    busy = _counted(session.send("Performance.getMetrics"))
    page.evaluate(SETTLED)
    rested = _counted(session.send("Performance.getMetrics"))
    clocked: dict[str, float] = page.evaluate(CLOCKED)
    page.close()
    found = {"busy": busy["ProcessTime"], "ProcessTime": rested["ProcessTime"]}
    return {name: 1000 * (value - before["ProcessTime"]) for name, value in found.items()} | clocked | {"drawn": drawn}


def _counted(found: Mapping[str, Sequence[Mapping[str, object]]]) -> dict[str, float]:
    return {str(one["name"]): float(str(one["value"])) for one in found["metrics"]}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; exit code as the command line's."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--loads", type=int, default=9)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args(arguments)
    chromium = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if chromium is None:
        print("there is no Chromium on this machine", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        files = [options.page.resolve()] if options.page else list(_made(Path(folder), options.rows))
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for file in files:
            _tell(file, [load(browser, file) for _ in range(options.loads)])
        browser.close()
    return 0


def _made(folder: Path, rows: int) -> Iterator[Path]:
    for name, make in CASES.items():
        file = folder / f"{name}.html"
        file.write_bytes(make(rows))
        yield file


def _tell(file: Path, loads: Sequence[Mapping[str, float]]) -> None:
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB, {len(loads)} loads; milliseconds, best and median")
    for name in NAMES:
        values = [one[name] for one in loads]
        print(f"  {NAMES[name]:24} {min(values):7.0f} {statistics.median(values):7.0f}")


if __name__ == "__main__":
    sys.exit(main())
