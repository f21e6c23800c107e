"""What a person is shown of a run, made from its tables alone: so a run looks the same the day after.

Which tables are read and what is made of them is chosen by the run's subcommand.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from mechinterp_cli.errors import UserError
from mechinterp_cli.report.ablate import ablate_view
from mechinterp_cli.report.attribute import TABLES as ATTRIBUTE_TABLES
from mechinterp_cli.report.attribute import attribute_view
from mechinterp_cli.report.circuit import TABLES as CIRCUIT_TABLES
from mechinterp_cli.report.circuit import circuit_view
from mechinterp_cli.report.heads import heads_view
from mechinterp_cli.report.patch import patch_view
from mechinterp_cli.report.probe import TABLES as PROBE_TABLES
from mechinterp_cli.report.probe import probe_view
from mechinterp_cli.report.shapes import Picture
from mechinterp_cli.runs.directory import find_run
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.outcome import RunOutcome
from mechinterp_cli.runs.reading import read_manifest
from mechinterp_cli.runs.tables import read_parquet, to_frame
from mechinterp_cli.text import counted


class View(Protocol):
    """What is shown of a run."""

    @property
    def pictures(self) -> Sequence[tuple[str, Picture]]:
        """(file name without ending, picture), in order."""

    @property
    def pages(self) -> Sequence[tuple[str, str]]:
        """(file name without ending, HTML), in order; mostly none."""

    def draw(self, width: int, plain: bool) -> Iterator[Any]:
        """What rich prints, for a terminal of so many columns; plain is ASCII without colour."""

    def headline(self) -> list[dict[str, Any]]:
        """The result in a few rows of plain data, all with the same keys."""

    def answer(self) -> str:
        """The result in a sentence or two, with its interval in brackets."""

    def tables(self, count: int) -> Sequence[tuple[str, Sequence[Mapping[str, Any]]]]:
        """(title, rows of plain data with the same keys) of what the page lists, so many of the strongest each."""


@dataclass(frozen=True)
class ViewSource:
    """Where the view of a subcommand's runs comes from."""

    build: Callable[[Manifest, Mapping[str, pd.DataFrame]], View]
    """Makes it of the manifest and the tables that there are."""
    needs: tuple[str, ...]
    """Tables without which there is nothing to show."""
    uses: tuple[str, ...] = ()
    """Tables that a run may not have."""


_ABLATE = ("baselines", "curve", "circuits", "interactions", "contrasts", "positions", "words")
VIEWS: Mapping[str, ViewSource] = {
    "patch": ViewSource(patch_view, needs=("summary", "prompts")),
    "heads": ViewSource(heads_view, needs=("scores",), uses=("patterns", "prompts", "causal", "summary", "baselines")),
    "ablate": ViewSource(ablate_view, needs=("summary", "prompts"), uses=_ABLATE),
    "attribute": ViewSource(attribute_view, needs=("prompts",), uses=ATTRIBUTE_TABLES),
    "circuit": ViewSource(circuit_view, needs=("faithfulness",), uses=CIRCUIT_TABLES),
    "probe": ViewSource(probe_view, needs=("probes",), uses=PROBE_TABLES),
}
"""By subcommand."""


def tables_needed(subcommand: str) -> tuple[str, ...]:
    """Names of the tables that a view reads, those that a run may lack too.

    Raises:
        UserError: There is no such view.
    """
    source = _source(subcommand)
    return (*source.needs, *source.uses)


def view_of(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> View:
    """The view of a run.

    Args:
        manifest: The run's.
        tables: Its tables by name, those of `tables_needed` that there are.

    Raises:
        UserError: There is no view of such runs.
    """
    return _source(manifest.subcommand).build(manifest, tables)


def _source(subcommand: str) -> ViewSource:
    if subcommand not in VIEWS:
        raise UserError(f"{subcommand}: no view of such runs; there are {', '.join(VIEWS)}", "Update mechinterp.")
    return VIEWS[subcommand]


def read_outcome(path: Path) -> RunOutcome:
    """A run's view again, from its directory.

    Raises:
        UserError: It is no run directory, or the run never came to what is shown.
        RunError: A table is damaged.
    """
    manifest, view, _ = read_view(path)
    return outcome(path, manifest, view)


def read_view(path: Path) -> tuple[Manifest, View, dict[str, pd.DataFrame]]:
    """A run's manifest and view, and the tables that the view is made from.

    Raises:
        UserError: It is no run directory, or the run never came to what is shown.
        RunError: A table is damaged.
    """
    manifest = read_manifest(find_run(path))
    lacking = [name for name in _source(manifest.subcommand).needs if not _file(path, name).exists()]
    if lacking:
        remedy = f"Go on with it: mechinterp resume {path}" if manifest.status != "complete" else "Run it again."
        raise UserError(f"{path}: the run is {manifest.status} and has no {lacking[0]} to show", remedy)
    there = [name for name in tables_needed(manifest.subcommand) if _file(path, name).exists()]
    tables = {name: to_frame(read_parquet(_file(path, name))) for name in there}
    return manifest, view_of(manifest, tables), tables


def _file(path: Path, table: str) -> Path:
    return path / f"{table}.parquet"


def outcome(path: Path, manifest: Manifest, view: View) -> RunOutcome:
    """What the command line tells of a run."""
    unfinished = [] if manifest.status in ("complete", "running") else [f"this run is {manifest.status}"]
    notes = [*unfinished, *proof_notes(manifest.engine), *manifest.warnings]
    return RunOutcome(path, view.headline(), view.draw, tuple(notes))


def proof_notes(engine: Mapping[str, Any]) -> list[str]:
    """What the run proved, a line each: the worst deviation of all jobs and checkpoints, and that of patched edges.

    Args:
        engine: The manifest's.
    """
    parts = engine.get("parts") or [engine]
    return [*_executors_proof(parts), *_edges_proof(parts)]


def _executors_proof(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    proofs = [part["proof"] for part in parts if part.get("proof")]
    if not proofs:
        return
    worst = max(proofs, key=lambda proof: float(proof["deviation"]))
    names = " and ".join(sorted({proof["executor"] for proof in proofs}))
    among = f", the worst of {len(proofs)} proofs" if len(proofs) > 1 else ""
    yield (
        f"proved: executor {names} agrees with plain hooks to {worst['deviation']:.1e} of the logits' "
        f"scale ({worst['tolerance']:.0e} allowed) on {counted(worst['trials'], 'trial')} of "
        f"{counted(worst['length'], 'token')}{among}"
    )


def _edges_proof(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    proofs = [float(found) for part in parts for found in (part.get("edges_proved") or {}).values()]
    sums = [float(part["residual_sum"]) for part in parts if part.get("residual_sum") is not None]
    if proofs and sums:
        yield (
            f"proved: what all parts write adds up to the residual stream to {max(sums):.1e} of its largest element; "
            "with every edge kept, and with every edge patched, logits are the model's own to "
            f"{max(proofs):.1e} of their scale"
        )
