"""The report page carries the tables' numbers, asks for nothing, and no text of a run can act in it."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechinterp_cli.cli.main import main
from mechinterp_cli.report.coarse import MAX_CELLS, coarse
from mechinterp_cli.report.grid import Heatmap, HeatmapSpec, build_heatmap
from mechinterp_cli.report.page import library
from mechinterp_cli.report.page.build import page_of_runs
from mechinterp_cli.report.page.content import MAX_ROWS, PageSource, run_content
from mechinterp_cli.report.page.document import document
from mechinterp_cli.report.page.pack import inert, packed, row_count
from mechinterp_cli.report.patch import patch_view
from mechinterp_cli.report.rows import records
from mechinterp_cli.report.view import read_view, view_of
from mechinterp_cli.runs.manifest import Manifest
from tests.ablate_frames import Fake
from tests.page_runs import ATTACK, attacking_run, data_of, reference

PATCH = reference("patch-induction-toy")


@pytest.fixture(scope="module")
def page() -> bytes:
    return page_of_runs([PATCH])


@pytest.fixture(scope="module")
def told(page: bytes) -> dict[str, Any]:
    run: dict[str, Any] = data_of(page)["runs"][0]
    return run


def scripts_of(page: bytes) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", page.decode(), re.DOTALL)


def test_the_page_asks_for_nothing_and_allows_only_its_own_scripts(page: bytes) -> None:
    text = page.decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts_of(page)]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in hashes]
    assert len(hashes) == 2
    markup = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", text, flags=re.DOTALL)
    assert re.findall(r"\b(?:src|href|action)=\"([^\"]*)\"", markup) == ["#main"]


def test_no_text_of_a_run_is_markup(tmp_path: Path) -> None:
    page = page_of_runs([attacking_run(tmp_path)])
    data = re.search(r'id="data">(.*?)</script>', page.decode(), re.DOTALL)
    assert data is not None
    assert "<" not in data[1]
    assert "onerror" in data[1]
    assert len(re.findall(r"</?script", page.decode().split("</style>")[1])) == 6
    (run,) = data_of(page)["runs"]
    assert run["warnings"] == [ATTACK]
    assert run["prompts"]["prompts"][0]["streams"][0]["tokens"][0] == ATTACK.replace(" ", "·")
    title = re.search("<title>(.*?)</title>", page.decode())
    assert title is not None
    assert "<" not in title[1]


def test_figures_hold_every_number_of_the_summary(told: dict[str, Any]) -> None:
    summary = pd.read_parquet(PATCH / "summary.parquet")
    rows = summary[(summary["metric"] == "logit_diff") & (summary["aggregate"] == "ratio_of_means")]
    (figure,) = [figure for figure in told["figures"] if figure["name"].startswith("01-z")]
    (data,) = figure["data"].values()
    cells = pd.DataFrame(dict(zip(data["fields"], data["columns"], strict=True)))
    cells = cells.assign(head=cells["column"].astype(int))
    both = rows[rows["site"] == "z"].merge(cells, on=["layer", "head"])
    assert len(both) == len(cells) == 8
    np.testing.assert_allclose(both["value_y"], both["normalized"], rtol=1e-5)
    assert both["interval"].tolist() == [
        f"[{low:.3f}, {high:.3f}]" for low, high in zip(both["ci_low"], both["ci_high"], strict=True)
    ]
    assert (both["n_y"].astype(int) == both["n_x"]).all()


def test_the_answer_is_the_row_with_the_largest_effect(told: dict[str, Any]) -> None:
    summary = pd.read_parquet(PATCH / "summary.parquet")
    rows = summary[(summary["metric"] == "logit_diff") & (summary["aggregate"] == "ratio_of_means")]
    best = records(rows.iloc[[int(rows["normalized"].abs().argmax())]])[0]
    assert f"{best['normalized']:+.3f} [{best['ci_low']:.3f}, {best['ci_high']:.3f}]" in told["answer"]
    assert f"layer {int(best['layer'])}, position {int(best['position'])}" in told["answer"]
    assert f"The strongest of {len(rows)} trials" in told["answer"]
    assert told["interval"] == "In brackets: the 95 % interval."
    (table,) = told["tables"]
    effects = [row[table["columns"].index("normalised effect")] for row in table["rows"]]
    assert effects == sorted(effects, key=lambda effect: -abs(effect))
    assert effects[0] == pytest.approx(best["normalized"], rel=1e-5)


def test_a_prompts_own_map_holds_its_effects(told: dict[str, Any]) -> None:
    results = pd.read_parquet(PATCH / "results.parquet")
    rows = results[(results["metric"] == "logit_diff") & (results["prompt"] == 3) & (results["site"] == "resid_pre")]
    found = next(one for one in told["prompts"]["maps"] if one["title"] == "resid_pre")
    places = zip(rows["layer"].astype(str), rows["position"].astype(int), strict=True)
    wanted = dict(zip(places, rows["effect"], strict=True))
    cells = {(found["rows"][row], found["columns"][column]): at for at, (row, column) in enumerate(found["cells"])}
    assert cells.keys() == wanted.keys()
    for place, at in cells.items():
        assert found["values"]["3"][at] == pytest.approx(wanted[place], rel=1e-5, abs=1e-12)


def test_prompts_stand_beside_each_other_with_their_answers(told: dict[str, Any]) -> None:
    prompts = pd.read_parquet(PATCH / "prompts.parquet")
    assert len(told["prompts"]["prompts"]) == prompts["prompt"].nunique()
    first = told["prompts"]["prompts"][0]
    assert [stream["name"] for stream in first["streams"]] == ["clean", "corrupt"]
    for stream in first["streams"]:
        (row,) = prompts[(prompts["prompt"] == 0) & (prompts["stream"] == stream["name"])].to_dict("records")
        assert stream["tokens"] == list(row["tokens"])
        assert (stream["answer"], stream["wrong"]) == (row["answer"], row["wrong_answer"])


def test_how_to_repeat_it_proof_warnings_and_config_are_told(told: dict[str, Any]) -> None:
    manifest = Manifest.read(PATCH)
    assert told["repeat"][0][1].startswith("mechinterp patch configs/patch-induction-toy.yaml")
    assert told["config"] == (PATCH / "config.yaml").read_text()
    assert told["warnings"] == manifest.warnings
    assert "agrees with plain hooks" in told["proof"][0]
    assert dict(told["surroundings"])["config sha256"] == manifest.config_sha256


def test_the_picture_of_the_page_is_a_pdf_too() -> None:
    _, view, _ = read_view(PATCH)
    _, picture = view.pictures[0]
    assert picture.drawn_as("pdf").startswith(b"%PDF-1.7")
    assert picture.drawn_as("svg").startswith(b"<svg")


@pytest.mark.parametrize("name", ["heads-toy", "attribute-toy"])
def test_other_methods_have_pages_of_the_same_form(name: str) -> None:
    page = page_of_runs([reference(name)])
    (run,) = data_of(page)["runs"]
    assert re.search(r"\d\.\d+ \[-?\d\.\d+, -?\d\.\d+\]", run["answer"])
    assert run["tables"]
    assert run["prompts"]["maps"]
    assert all("spec" in figure for figure in run["figures"])
    assert len(page) < 5e6


def test_the_command_makes_the_same_page_every_time_and_prints_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], page: bytes
) -> None:
    path = tmp_path / "run"
    shutil.copytree(PATCH, path)
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out == f"{path / 'report.html'}\n"
    assert (path / "report.html").read_bytes() == page
    assert main(["report", str(path), "-o", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_bytes() == page


def test_a_page_that_the_manifest_has_the_hash_of_is_not_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], page: bytes
) -> None:
    path = tmp_path / "run"
    shutil.copytree(PATCH, path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["outputs"]["report.html"] = {"sha256": "0" * 64, "bytes": 3, "rows": None}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "report.html").write_text("old")
    assert main(["report", str(path)]) == 2
    assert "the run's manifest has the hash of this file" in capsys.readouterr().err
    assert (path / "report.html").read_text() == "old"
    (path / "report.html").write_bytes(page)
    assert main(["report", str(path)]) == 0


def test_several_runs_need_a_file_and_are_compared_with_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(PATCH), str(PATCH), str(reference("heads-toy"))]
    assert main(["report", *paths]) == 2
    assert "fix: Give one: --output FILE." in capsys.readouterr().err
    assert main(["report", *paths, "--output", str(tmp_path / "all.html")]) == 0
    data = data_of((tmp_path / "all.html").read_bytes())
    assert len(data["runs"]) == 3
    same, other = data["comparison"]["pairs"]
    agreement = dict(zip(same["tables"][0]["columns"], zip(*same["tables"][0]["rows"], strict=True), strict=True))
    assert set(agreement["largest difference"]) == {0}
    assert same["changes"] == []
    assert other["reason"].startswith("Not compared: ")


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "this is no run directory" in capsys.readouterr().err


def test_a_run_without_its_config_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    shutil.copytree(PATCH, path)
    (path / "config.yaml").unlink()
    assert main(["report", str(path)]) == 1
    assert "config.yaml: cannot be read" in capsys.readouterr().err
    assert not (path / "report.html").exists()


def test_data_are_inert_and_rows_come_back_from_columns() -> None:
    assert json.loads(inert({"a": "</script>\u2028"})) == {"a": "</script>\u2028"}
    assert "<" not in inert("</script>")
    assert inert("\u2028").isascii()
    spec: dict[str, Any] = {
        "layer": [{"data": {"values": [{"x": 1, "y": float("nan")}, {"x": 2, "z": "b"}]}, "mark": "bar"}]
    }
    spec |= {"datasets": {"named": [{"q": 0.123456789}]}}
    assert row_count(spec) == 3
    found = packed(spec)
    assert found["spec"] == {"layer": [{"data": {"name": "rows 1"}, "mark": "bar"}]}
    assert found["data"]["rows 1"] == {"fields": ["x", "y", "z"], "columns": [[1, 2], [None, None], [None, "b"]]}
    assert found["data"]["named"]["columns"] == [[0.123457]]


def test_the_library_is_kept_by_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "scripts_folder", lambda: tmp_path)
    monkeypatch.setattr(library, "_bundled", lambda: "window.vegaEmbed = 1")
    assert library.vega_script() == "window.vegaEmbed = 1"
    monkeypatch.setattr(library, "_bundled", lambda: pytest.fail("it is kept"))
    assert library.vega_script() == "window.vegaEmbed = 1"


def neurons(count: int, layers: int) -> pd.DataFrame:
    """Summary rows of every neuron."""
    random = np.random.default_rng(0).normal(size=(layers, count))
    random[layers - 1, count - 2] = 50.0
    layer, neuron = np.divmod(np.arange(layers * count), count)
    effects = random.reshape(-1)
    return pd.DataFrame(
        {
            "trial": np.arange(layers * count), "label": [f"neuron {at}" for at in range(layers * count)],
            "site": "neuron", "layer": layer, "neuron": neuron, "metric": "logit_diff", "group": "all",
            "aggregate": "ratio_of_means", "value": effects, "effect": effects, "normalized": effects, "n": 8,
            "ci_low": effects - 1, "ci_high": effects + 1, "p_adjusted": 0.5, "status": "ok", "verdict": "no",
            "block": 0,
        }
    )  # fmt: skip


def test_too_many_cells_are_joined_and_the_strongest_stays() -> None:
    whole = build_heatmap(neurons(50_000, 1), HeatmapSpec(title="neurons"))
    joined = coarse(whole)
    (panel,) = joined.panels
    assert panel.values.size <= MAX_CELLS
    assert "Columns are bins of 25; each cell is the strongest neuron of its bin." in joined.caption
    assert panel.values[0, -1] == 50.0
    assert panel.details[0, len(panel.columns) - 1]["strongest"] == "49998"
    assert panel.columns[-1] == "49975 – 49999"
    wanted = np.abs(whole.panels[0].values).reshape(-1, 25).max(axis=1)
    np.testing.assert_array_equal(np.abs(panel.values[0]), wanted)
    assert joined.colours == whole.colours


def test_a_small_map_stays_as_it_is() -> None:
    small: Heatmap = build_heatmap(neurons(20, 2), HeatmapSpec(title="neurons"))
    assert coarse(small) is small


@pytest.mark.slow
def test_a_run_of_200000_trials_has_a_page(tmp_path: Path) -> None:
    summary = neurons(20_000, 10)
    manifest = Manifest.read(PATCH)
    prompts = pd.read_parquet(PATCH / "prompts.parquet")
    results = pd.concat([summary.assign(prompt=prompt, draw=None) for prompt in range(2)], ignore_index=True)
    tables = {"summary": summary, "prompts": prompts, "results": results}
    view = patch_view(manifest, tables)
    content = run_content(PageSource(manifest, view, tables, "name: many\n"), view.pictures)
    page = document("many", {"runs": [content]})
    assert len(page) < 5e6
    (figure,) = content["figures"]
    assert figure["rows"] <= MAX_ROWS
    assert "bins of" in " ".join(figure["spec"]["title"]["subtitle"])
    assert "The strongest of 200,000 trials" in content["answer"]
    assert "Single prompts have no map: 200,000 trials are too many" in content["prompts"]["note"]


@pytest.mark.parametrize(
    ("design", "title"),
    [
        ("single", "Strongest ablations"),
        ("cumulative", "Top of the ranking beside random ones"),
        ("keep", "Sets"),
        ("pairs", "Strongest interactions of pairs"),
    ],
)
def test_every_design_of_ablation_has_its_table_and_answer(design: str, title: str) -> None:
    fake = Fake(design=design, values=("zero",), metrics=("loss",))
    tables = fake.tables()
    shown = view_of(fake.manifest, tables)
    content = run_content(PageSource(fake.manifest, shown, tables, ""), shown.pictures)
    assert title in [table["title"] for table in content["tables"]]
    assert re.search(r"[+-]?\d\.\d+", content["answer"])
    for table in content["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    document(content["title"], {"runs": [content]})


def test_a_circuits_page_tells_its_answer_in_words_with_the_tables_numbers_and_its_proof() -> None:
    (run,) = data_of(page_of_runs([reference("circuit-planted")]))["runs"]
    quality = pd.read_parquet(reference("circuit-planted") / "quality.parquet")
    for measure, rank in (("cpr", "signed"), ("cmd", "absolute")):
        rows = quality[(quality["measure"] == measure) & (quality["rank"] == rank)]
        (row,) = rows[rows["score"] == "eap_ig_inputs"].to_dict("records")
        number = f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        (sentence,) = re.findall(rf"[^.]*{re.escape(number)}[^.]*{measure.upper()}[^.]*\.", run["answer"])
        assert "eap_ig_inputs" in sentence
    assert "it does the task as well as the whole model (equivalence): yes" in run["answer"]
    assert "The circuit reference (5 edges) keeps 1.000 [1.000, 1.000] of logit_diff." in run["answer"]
    (proof,) = run["proof"]
    assert "with every edge kept, and with every edge patched, logits are the model's own to 7.9e-08" in proof


def test_of_sets_the_answer_is_what_each_alone_has() -> None:
    fake = Fake(design="keep", values=("zero",))
    answer = view_of(fake.manifest, fake.tables()).answer()
    rows = fake.tables()["circuits"]
    row = rows.iloc[0]
    assert f'The set "{row["set"]}" alone has {row["faithfulness"]:.3f} [' in answer


def test_of_pairs_the_answer_is_the_one_whose_effects_add_up_least() -> None:
    fake = Fake(design="pairs", values=("zero",))
    rows = fake.tables()["interactions"]
    rows = rows[rows["metric"] == fake.metrics[0]]
    row = rows.iloc[int(rows["interaction"].abs().argmax())]
    answer = view_of(fake.manifest, fake.tables()).answer()
    assert f"Of {len(rows)} pairs, the effects of {row['a']} and {row['b']} add up least (zero ablation)" in answer
    assert f"differs by {row['interaction']:+.3f} [" in answer
