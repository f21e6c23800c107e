"""Views by subcommand, what is told of proofs, and runs of patching along training."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from rich.console import Console

from mechinterp_cli.errors import UserError
from mechinterp_cli.report.checkpoints import Checkpoints, checkpoints_of
from mechinterp_cli.report.patch import PatchView
from mechinterp_cli.report.picture import Drawing
from mechinterp_cli.report.view import VIEWS, outcome, read_outcome, tables_needed, view_of
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.tables import write_parquet
from tests.heads_frames import Fake

CONFIG = {"metrics": ["logit_diff"], "output": {"top": 4}}


def patch_manifest() -> Manifest:
    made = Manifest("patch", "fake", CONFIG, "0", status="complete")
    made.model, made.display = {"id": "toy"}, {"title": "ioi, denoise", "scale": "0: no effect."}
    return made


def patch_tables(*checkpoints: tuple[str | None, int | None]) -> dict[str, pd.DataFrame]:
    """Six trials; trial t has effect t/10, half of it at every checkpoint but the last."""
    rows: list[dict[str, Any]] = [
        {
            "checkpoint": name, "tokens_seen": seen, "trial": trial, "block": 0, "site": "resid_pre",
            "layer": trial // 3, "head": None, "kv_head": None, "neuron": None, "span": None, "position": trial % 3,
            "template": None, "label": f"trial {trial}", "metric": "logit_diff", "group": "all",
            "aggregate": "ratio_of_means", "value": 1.0, "effect": trial / 5, "n": 8, "p_adjusted": 0.01,
            "normalized": trial / 10 * (1.0 if (name, seen) == checkpoints[-1] else 0.5), "status": "ok",
            "ci_low": trial / 10 - 0.1, "ci_high": trial / 10 + 0.1, "verdict": "yes",
        }
        for name, seen in checkpoints
        for trial in range(6)
    ]  # fmt: skip
    words = ["a", "<script>", "\x1b[31mc"]
    prompts = [{"prompt": 0, "stream": "clean", "template": "t", "tokens": words, "token_ids": [1, 2, 3]}]
    kinds = {"checkpoint": pa.string(), "tokens_seen": pa.int64(), "template": pa.string()}
    summary = {
        name: pa.array([row[name] for row in rows], kinds.get(name, pa.int32() if rows[0][name] is None else None))
        for name in rows[0]
    }
    frame = pa.table(summary).to_pandas(types_mapper=pd.ArrowDtype)
    return {"summary": frame, "prompts": pa.Table.from_pylist(prompts).to_pandas(types_mapper=pd.ArrowDtype)}


def patch_view(*checkpoints: tuple[str | None, int | None]) -> PatchView:
    made = view_of(patch_manifest(), patch_tables(*checkpoints))
    assert isinstance(made, PatchView)
    return made


def test_without_checkpoints_nothing_is_drawn_along_training() -> None:
    made = patch_view((None, None))
    assert [name for name, _ in made.pictures] == ["00-resid_pre-logit_diff"]
    assert len(made.rows) == 6
    assert "checkpoint" not in made.maps[0][1].subtitle


def test_with_checkpoints_the_last_is_mapped_and_the_strongest_are_followed() -> None:
    made = patch_view(("early", 10), ("middle", 1000), ("late", 100_000))
    assert [name for name, _ in made.pictures] == ["00-resid_pre-logit_diff", "training"]
    assert made.maps[0][1].panels[0].values.max() == pytest.approx(0.5)
    assert "checkpoint late, the last of 3" in made.maps[0][1].subtitle
    assert [row["label"] for row in made.headline()] == ["trial 5", "trial 4", "trial 3", "trial 2"]
    drawing = made.pictures[1][1]
    assert isinstance(drawing, Drawing)
    spec = drawing.spec()
    points = next(rows for rows in spec["datasets"].values() if "high" not in rows[0] and "name" in rows[0])
    line = {(row["name"], row["x"]): row["y"] for row in points}
    assert line["resid_pre, layer 1, position 2 \\x1b[31mc", 10.0] == pytest.approx(0.25)
    assert line["resid_pre, layer 1, position 2 \\x1b[31mc", 100_000.0] == pytest.approx(0.5)
    assert "<script" not in drawing.svg().decode()
    assert drawing.png()[:4] == b"\x89PNG"


def test_every_checkpoint_but_the_last_leaves_the_terminal_as_it_is() -> None:
    def drawn(view: PatchView) -> str:
        file = io.StringIO()
        for part in view.draw(100, True):
            Console(file=file, width=100, markup=False).print(part)
        return file.getvalue()

    three = drawn(patch_view(("early", 10), ("late", 1000))).replace(", checkpoint late, the last of 2", "")
    assert three == drawn(patch_view((None, None)))


def frame(names: list[str | None], seen: list[int | None]) -> pd.DataFrame:
    columns = {"checkpoint": pa.array(names, pa.string()), "tokens_seen": pa.array(seen, pa.int64())}
    made: pd.DataFrame = pa.table(columns).to_pandas(types_mapper=pd.ArrowDtype)
    return made


@pytest.mark.parametrize(
    ("names", "seen", "expected"),
    [
        (["b", "a", "b"], [2, 1, 2], Checkpoints(("a", "b"), (1.0, 2.0))),
        (["b", "a"], [2, None], Checkpoints(("b", "a"))),
        (["b", "a"], [2, 2], Checkpoints(("b", "a"))),
        ([None, None], [None, None], Checkpoints()),
        ([], [], Checkpoints()),
    ],
)
def test_order_of_checkpoints(names: list[str | None], seen: list[int | None], expected: Checkpoints) -> None:
    assert checkpoints_of(frame(names, seen)) == expected
    assert expected.several is (len(expected.names) > 1)


def test_rows_of_the_last_checkpoint_and_of_none() -> None:
    rows = frame(["a", None, "b"], [1, None, 2])
    assert Checkpoints(("a", "b")).last(rows).index.tolist() == [1, 2]
    assert Checkpoints().last(rows).index.tolist() == [0, 1, 2]
    assert checkpoints_of(pd.DataFrame({"layer": [0]})).last(rows).index.tolist() == [0, 1, 2]


def test_a_subcommand_without_a_view_is_named() -> None:
    manifest = Manifest("lens", "x", {}, "0")
    with pytest.raises(UserError, match=f"lens: no view of such runs; there are {', '.join(VIEWS)}"):
        view_of(manifest, {})
    assert tables_needed("patch") == ("summary", "prompts")


def proof(deviation: float, executor: str = "packed") -> dict[str, Any]:
    return {"executor": executor, "deviation": deviation, "tolerance": 1e-4, "trials": 12, "length": 15}


def notes(engine: dict[str, Any]) -> list[str]:
    manifest = patch_manifest()
    manifest.engine = engine
    return list(outcome(Path("run"), manifest, patch_view((None, None))).notes)


def test_the_worst_proof_is_told_in_one_line() -> None:
    parts = [{"checkpoint": name, "proof": proof(size)} for name, size in (("a", 1e-6), ("b", 3e-5), ("c", 2e-6))]
    assert notes({"parts": parts}) == [
        "proved: executor packed agrees with plain hooks to 3.0e-05 of the logits' scale (1e-04 allowed) on 12 trials "
        "of 15 tokens, the worst of 3 proofs"
    ]
    assert "the worst" not in notes({"parts": parts[:1]})[0]
    assert "executor packed and resume" in notes({"parts": [*parts, {"proof": proof(0.0, "resume")}]})[0]


@pytest.mark.parametrize("engine", [{}, {"parts": []}, {"parts": [{"checkpoint": None, "proof": None}]}])
def test_without_a_proof_there_is_no_line(engine: dict[str, Any]) -> None:
    assert notes(engine) == []


def test_runs_of_before_checkpoints_are_still_told() -> None:
    assert notes({"proof": proof(1e-6), "plan": {}})[0].startswith("proved: executor packed")


def save(folder: Path, *without: str) -> None:
    fake = Fake(layers=2, heads=2, kv_heads=2, scores=("induction",))
    fake.manifest.write(folder)
    for name, rows in fake.tables().items():
        if name not in without:
            write_parquet(pa.Table.from_pandas(rows, preserve_index=False), folder / f"{name}.parquet")


def test_a_run_over_heads_is_read_back_with_the_tables_that_it_has(tmp_path: Path) -> None:
    save(tmp_path, "patterns", "causal", "summary", "baselines")
    rows = read_outcome(tmp_path).headline_rows
    assert {row["score"] for row in rows} == {"induction"}
    assert {row["ablation"] for row in rows} == {None}
    save(tmp_path)
    assert {row["ablation"] for row in read_outcome(tmp_path).headline_rows} == {None, "zero", "mean"}


def test_a_run_over_heads_without_scores_says_so(tmp_path: Path) -> None:
    save(tmp_path, "scores")
    with pytest.raises(UserError, match="has no scores to show"):
        read_outcome(tmp_path)


def test_views_are_made_without_torch_and_without_altair() -> None:
    code = "import sys, mechinterp_cli.report.view; sys.exit(any(name in sys.modules for name in ('torch', 'altair')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
