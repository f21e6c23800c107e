"""The JSON Schema of `manifest.json`, made from the dataclass that writes it."""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

from pydantic import TypeAdapter

from mechinterp_cli.runs.atomic import FileInfo
from mechinterp_cli.runs.manifest import SCHEMA_VERSION, Manifest

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def manifest_schema() -> dict[str, Any]:
    """Build the schema of the manifests that this version writes.

    Returns:
        JSON Schema (draft 2020-12). Every key is always written; keys that later versions add are allowed.
    """
    schema = TypeAdapter(Manifest).json_schema()
    _describe(schema, Manifest)
    _describe(schema["$defs"][FileInfo.__name__], FileInfo)
    schema["properties"]["schema_version"] |= {"const": SCHEMA_VERSION}
    return {"$schema": _DIALECT, **schema, "title": "mechinterp manifest"}


def _describe(schema: dict[str, Any], record: type) -> None:
    """Say of every property what it means; defaults are the writer's affair."""
    meanings = attribute_docstrings(record)
    for name, definition in schema["properties"].items():
        definition.pop("default", None)
        if name in meanings:
            definition["description"] = meanings[name]
    schema["required"] = [item.name for item in dataclasses.fields(record)]


def attribute_docstrings(record: type) -> dict[str, str]:
    """Read what stands in quotes below each attribute of a class.

    Args:
        record: A class whose source is at hand; without it nothing is found.

    Returns:
        Attribute name to its text, on one line.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(record)))
    except OSError:
        return {}
    (definition,) = tree.body
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    return {
        above.target.id: " ".join(inspect.cleandoc(below.value.value).split())
        for above, below in zip(body, body[1:], strict=False)
        if isinstance(above, ast.AnnAssign)
        and isinstance(above.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
