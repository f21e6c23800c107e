"""Finished runs for tests of the report page: the committed ones, and copies whose texts try to act."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

REFERENCE = Path(__file__).resolve().parents[1] / "runs" / "reference"
ATTACK = "</script><script>document.title='acted'</script></style><img src=x onerror=\"document.title='acted'\">"


def reference(name: str) -> Path:
    """A committed run: `patch-induction-toy`, `heads-toy`, `attribute-toy`."""
    return REFERENCE / name


def attacking_run(folder: Path) -> Path:
    """The patch run, whose prompts, answers, title, warnings and config are markup that would act."""
    path = folder / "attack"
    shutil.copytree(reference("patch-induction-toy"), path)
    table = pq.read_table(path / "prompts.parquet")
    tokens = pa.array(
        [[ATTACK, *words[1:]] for words in table["tokens"].to_pylist()], table.schema.field("tokens").type
    )
    table = table.set_column(table.column_names.index("tokens"), table.schema.field("tokens"), tokens)
    for name in ("text", "answer"):
        changed = pc.binary_join_element_wise(table[name], pa.scalar(ATTACK), "")
        table = table.set_column(table.column_names.index(name), table.schema.field(name), changed)
    pq.write_table(table, path / "prompts.parquet", write_page_checksum=True)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["display"]["title"] = ATTACK
    manifest["warnings"] = [ATTACK]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "config.yaml").write_text(f"# {ATTACK}\n")
    return path


def data_of(page: bytes) -> dict[str, Any]:
    """What a page carries as data."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.decode(), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data
