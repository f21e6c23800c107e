"""The columns of `patch`, beside the common ones."""

import pyarrow as pa

from mechinterp_cli.runs.schema import column, register_columns

register_columns("patch", "trials", [column("template", pa.string())])
_WHERE = [column("kv_head", pa.int32()), column("template", pa.string())]
register_columns("patch", "results", _WHERE)
register_columns("patch", "summary", [*_WHERE, column("block", pa.int32())])
