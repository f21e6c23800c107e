"""Finished runs for tests of the report page: the committed ones, and copies whose texts try to act."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tests.experiments import run_method

REFERENCE = Path(__file__).resolve().parents[1] / "runs" / "reference"
ATTACK = "</script><script>document.title='acted'</script></style><img src=x onerror=\"document.title='acted'\">"


def reference(name: str) -> Path:
    """A committed run: `patch-induction-toy`, `heads-toy`, `attribute-toy`, `probe-toy`, `circuit-planted`."""
    return REFERENCE / name


def ablation_run(folder: Path) -> Path:
    """A run of `ablate`, of which none is committed: every head alone."""
    units = [{"kind": "head", "layers": "all", "heads": "each"}]
    task = {"name": "repeats", "n": 4, "block": 6, "repeats": 2}
    section = {"design": "single", "units": units, "values": ["mean", "zero"]}
    return run_method(folder, "ablate", section, task=task, metrics=["repeated_loss"]).path


def attacking_run(folder: Path, source: Path = REFERENCE / "patch-induction-toy") -> Path:
    """A run whose prompts, answers, classes, title, warnings and config are markup that would act.

    Args:
        folder: Where to put the copy.
        source: The run; that of patch where none is given.
    """
    path = folder / f"attack-{source.name}"
    shutil.copytree(source, path)
    table = pq.read_table(path / "prompts.parquet")
    tokens = pa.array(
        [[ATTACK, *words[1:]] for words in table["tokens"].to_pylist()], table.schema.field("tokens").type
    )
    table = table.set_column(table.column_names.index("tokens"), table.schema.field("tokens"), tokens)
    pq.write_table(_begun(table, ("text", "answer")), path / "prompts.parquet", write_page_checksum=True)
    for name in ("labels", "predictions"):
        if (path / f"{name}.parquet").exists():
            changed = _begun(pq.read_table(path / f"{name}.parquet"), ("class", "predicted_class"))
            pq.write_table(changed, path / f"{name}.parquet", write_page_checksum=True)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["display"]["title"] = ATTACK
    manifest["warnings"] = [ATTACK]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "config.yaml").write_text(f"# {ATTACK}\n")
    return path


def _begun(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """The table whose texts in these columns begin with the markup."""
    for name in set(names) & set(table.column_names):
        changed = pc.binary_join_element_wise(pa.scalar(ATTACK), table[name], "")
        table = table.set_column(table.column_names.index(name), table.schema.field(name), changed)
    return table


def data_of(page: bytes) -> dict[str, Any]:
    """What a page carries as data."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.decode(), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data
