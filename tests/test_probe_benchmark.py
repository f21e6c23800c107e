import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import probe_solver
from mechinterp_cli.methods.probe.logistic import Logistic

SMALL = ["--sites", "2", "--n", "60", "--d", "12", "--folds", "2", "--rounds", "1"]


def test_a_small_run_prints_both_loops_and_writes_all_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "solver.json"
    assert probe_solver.main([*SMALL, "--classes", "3", "--json", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["shape"] == [2, 60, 12, 2, 8, 3]
    assert found["unconverged"] == 0
    assert [row["loop"] for row in found["rows"]] == ["default", "converged", "default"]
    assert all(row["solved"] == 32 and row["highest"] <= 1e-8 for row in found["rows"])
    assert found["rows"][1]["coefficients"] <= 1e-3
    assert found["rows"][2]["max_steps"] < found["most_steps"]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 5
    assert len({row.count("|") for row in rows}) == 1


def test_a_sample_of_the_loop_is_scaled_up() -> None:
    data = probe_solver.make_data(3, 60, 12, 2, 2, 0.5)
    result = probe_solver.measure(data, 1, 2, 1e-4)
    assert [row.solved for row in result.rows] == [16, 16, 16]
    assert result.equal_or_lower


@pytest.mark.parametrize("wrong", [0.0, 0.05, float("nan")])
def test_one_objective_that_is_higher_ends_with_1(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    right = probe_solver.by_solver

    def solve(data: probe_solver.Data, tolerance: float, max_steps: int = 2000) -> Logistic:
        found = right(data, tolerance, max_steps)
        weights = found.weights.clone()
        weights[1, 1, 0] += wrong * weights[1, 1, 0].abs().max()
        return replace(found, weights=weights)

    monkeypatch.setattr(probe_solver, "by_solver", solve)
    assert probe_solver.main(SMALL) == int(wrong != 0)


def test_the_objective_is_that_of_the_solver() -> None:
    data = probe_solver.make_data(1, 60, 12, 2, 3, 0.5)
    found = probe_solver.by_solver(data, 1e-6)
    raw = found.weights[0, 1, 4]
    shift = found.intercepts[0, 1, 4] + raw @ data.x[0][data.train[1]].mean(0)
    value = probe_solver.objective(data, (0, 1, 4), found.coefficients[0, 1, 4].numpy(), shift.numpy())
    assert value == pytest.approx(float(found.objective[0, 1, 4]), rel=1e-9)
    assert torch.isfinite(found.objective).all()
