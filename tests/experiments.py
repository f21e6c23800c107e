"""Running an experiment from a mapping, and reading its run directory as a stranger would."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import Tensor

from mechinterp_cli.cli.registry import register_all
from mechinterp_cli.config.loader import LoadedConfig, load_config
from mechinterp_cli.methods.run import run_experiment
from mechinterp_cli.runs.outcome import RunOutcome, SilentProgress

INDUCTION = {"name": "induction", "n": 4, "block": 6, "prefix": 2}
REPEATS = {"name": "repeats", "n": 8, "block": 6, "repeats": 2}
QUICK = {"bootstrap": 100, "flips": 99}


@dataclass(frozen=True)
class Run:
    """A finished run directory."""

    path: Path
    outcome: RunOutcome

    def table(self, name: str) -> pd.DataFrame:
        """One table, null as None-like values of pandas' Arrow types."""
        return pd.read_parquet(self.path / f"{name}.parquet", dtype_backend="pyarrow")

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as plain data."""
        manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        return manifest

    def tokens(self, stream: str) -> Tensor:
        """Token ids [prompts, positions] of a stream whose prompts have one length."""
        rows = self.table("prompts")
        return torch.tensor(rows[rows["stream"] == stream]["token_ids"].map(list).tolist())

    def answers(self, name: str = "answer_ids") -> Tensor:
        """The first answer token [prompts] of every prompt."""
        rows = self.table("prompts")
        return torch.tensor([int(ids[0]) for ids in rows[rows["stream"] == "clean"][name]])

    def values(self, metric: str, column: str = "value") -> pd.DataFrame:
        """One column of the results, a row per trial, a column per prompt."""
        rows = self.table("results")
        return rows[rows["metric"] == metric].pivot(index="trial", columns="prompt", values=column)

    def baseline(self, stream: str, metric: str) -> Tensor:
        """A metric [prompts] of an unedited stream."""
        rows = self.table("baselines")
        chosen = rows[(rows["stream"] == stream) & (rows["metric"] == metric)]
        return torch.tensor(chosen.sort_values("prompt")["value"].tolist(), dtype=torch.float64)


def config_of(folder: Path, section: dict[str, Any], *, method: str = "patch", **sections: Any) -> LoadedConfig:
    """A config file for a subcommand with this section and these others, loaded."""
    register_all()
    task = REPEATS if method == "heads" else INDUCTION
    whole = {"name": "test", "model": {"id": "toy-induction"}, "task": task, "stats": QUICK, method: section}
    whole |= {"output": {"figures": []}} | sections
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(whole))
    return load_config(path, method=method)


def run_method(folder: Path, method: str, section: dict[str, Any], **sections: Any) -> Run:
    """Run a subcommand's experiment and give its run directory."""
    loaded = config_of(folder, section, method=method, **sections)
    outcome = run_experiment(loaded, out=folder / "runs", progress=SilentProgress())
    return Run(outcome.path, outcome)


def run_patch(folder: Path, section: dict[str, Any], **sections: Any) -> Run:
    """Run `patch` and give its run directory."""
    return run_method(folder, "patch", section, **sections)
