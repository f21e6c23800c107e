"""The benchmark of circuits: its hand-written scores are the engine's, and a difference is said."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import circuit, circuit_scores
from benchmarks.circuit_scores import ByHand, ours
from benchmarks.sweep_prompts import ioi_pairs
from mechinterp_cli.engine.wiring import wired
from mechinterp_cli.models.anatomy import find_anatomy
from tests.families import build
from tests.test_benchmarks import folder, model, tokenizer

__all__ = ["folder", "model", "tokenizer"]


def test_it_scores_and_says_what_it_cost(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    arguments = ["--model", folder, "--device", "cpu", "--prompts", "2", "--steps", "2", "--rounds", "1"]
    assert circuit.main([*arguments, "--scores-only", "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["evaluation"] is None
    scores = found["scores"]
    assert scores["tokens"] == 15
    assert 0 < scores["difference"] <= 1e-5
    assert scores["targets_by_query_head"] - scores["targets"] == 2 * 3 * 2
    assert "2 of 15 tokens" in capsys.readouterr().out


def test_other_numbers_end_with_1(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_scores, "_through", lambda _norm, _x, gradient: gradient)
    arguments = ["--model", folder, "--device", "cpu", "--prompts", "2", "--steps", "1", "--rounds", "1"]
    assert circuit.main([*arguments, "--scores-only"]) == 1


def test_models_of_another_shape_are_refused(folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = build("gpt2")
    other.save_pretrained(tmp_path)
    for file in Path(folder).glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert circuit.main(["--model", str(tmp_path), "--device", "cpu", "--scores-only"]) == 2
    assert "written for models shaped like Llama" in capsys.readouterr().err


def test_the_hand_written_version_has_the_signs_of_the_engine(model: object, tokenizer: object) -> None:
    pairs = ioi_pairs(tokenizer, 2, "late", 1)  # type: ignore[arg-type]  # fixtures
    wiring = wired(model, find_anatomy(model))  # type: ignore[arg-type]
    by_hand = ByHand(model, wiring.graph, pairs).values(3)
    found = torch.from_numpy(ours(wiring, pairs, 3).by_prompt)
    assert torch.allclose(found, by_hand, atol=1e-5 * float(by_hand.abs().max()))
