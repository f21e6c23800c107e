"""A config file that explains itself: every key that there is, with what the schema says of it.

Keys that are given stand there; all others are commented out, at their defaults. What is prose begins with `# `, a key
that is commented out with `#` alone, so that taking the `#` away leaves it where it belongs.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mechinterp_cli.config.jsonschema import branches
from mechinterp_cli.config.yaml_writer import flow

WIDTH = 110
"""Lines of prose are no longer."""
_BESIDE = 24
"""Columns that a key and its value take before a short comment."""
_STEP = "  "
Schema = Mapping[str, Any]


def commented(
    schema: Schema, values: Mapping[str, Any], *, left_out: Sequence[str] = (), notes: Mapping[str, str] | None = None
) -> str:
    """Write a config with a comment on every key.

    Args:
        schema: What `experiment_schema` gives.
        values: The keys that are set: plain data in the layout of the YAML file, with one method's section.
        left_out: Keys at the top that are not mentioned.
        notes: What is said of keys at the top beside what the schema says.

    Returns:
        YAML that loads to `values`, ending in a newline. Sections at the top have a blank line between them.
    """
    document = dict(schema)
    top = document["properties"]
    methods = [entry["required"][0] for entry in document["oneOf"]]
    given = [key for key in values if key in methods]
    order = [key for key in top if key not in (*methods, *left_out)]
    at = order.index("task") + 1
    writer = _Writer(document)
    parts = []
    for key in (*order[:at], *given, *order[at:]):
        required = key in document["required"] or key in given
        said = " ".join(filter(None, (top[key].get("description"), (notes or {}).get(key))))
        told = {**top[key], "description": said} if said else top[key]
        parts.append("\n".join(writer.key(key, told, values, "", off=False, required=required)))
    return "\n\n".join(parts) + "\n"


class _Writer:
    """Writes keys and sections of one schema."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def key(
        self, key: str, schema: Schema, values: Mapping[str, Any], indent: str, *, off: bool, required: bool
    ) -> Iterator[str]:
        """The lines of one key, those of its section included.

        Args:
            key: Its name.
            schema: What the section's schema says of it.
            values: The section's values.
            indent: Blanks before it.
            off: Whether the whole section is commented out.
            required: Whether the section needs it.
        """
        there = key in values and not off
        mark = indent if there else f"{indent}#"
        value = values[key] if there else schema.get("default")
        told = self._told(schema, shown=value, required=required and not there)
        section = self._section(schema, values.get(key) if there else None)
        if section is not None and (not there or isinstance(value, dict)):
            yield from _prose(told, indent)
            yield f"{mark}{key}:"
            yield from self.section(
                section, value if isinstance(value, dict) and there else {}, indent + _STEP, off=not there
            )
        elif there and isinstance(value, list) and value and isinstance(value[0], dict):
            yield from _prose(told, indent)
            yield f"{mark}{key}:"
            yield from self._items(schema, value, indent + _STEP)
        else:
            written = f"{mark}{key}:" if required and not there else f"{mark}{key}: {flow(value)}"
            yield from _with_comment(written, told, indent)

    def section(self, section: Schema, values: Mapping[str, Any], indent: str, *, off: bool) -> Iterator[str]:
        """The lines of all keys of a section."""
        needed = section.get("required", ())
        for key, schema in section.get("properties", {}).items():
            yield from self.key(key, schema, values, indent, off=off, required=key in needed)

    def _items(self, schema: Schema, items: Sequence[Mapping[str, Any]], indent: str) -> Iterator[str]:
        """A list of sections: the first with all its keys, the others in a line each."""
        kinds = branches(self.document, schema["items"], items[0])
        section = next(kind for kind in kinds if items[0].keys() <= kind.get("properties", {}).keys())
        lines = list(self.section(section, items[0], indent + _STEP, off=False))
        # A comment may stand before the dash, a key may not.
        first = next(at for at, line in enumerate(lines) if not line.lstrip().startswith("#"))
        lines[first] = f"{indent}- {lines[first].lstrip()}"
        yield from lines
        for item in items[1:]:
            yield f"{indent}- {flow(item)}"

    def _section(self, schema: Schema, value: Any) -> Schema | None:
        """The section that a key holds; None where it holds something else too."""
        found = [branch for branch in branches(self.document, schema, value) if branch.get("type") != "null"]
        sections = [branch for branch in found if "properties" in branch]
        return sections[0] if len(sections) == 1 and (len(found) == 1 or isinstance(value, dict)) else None

    def _told(self, schema: Schema, *, shown: Any, required: bool) -> str:
        """What a key is for, and what it can be."""
        told = schema.get("description") or self._described(schema)
        told = " ".join(told.split())
        listed = " ".join(_choices(schema, told, shown))
        off = "Default: null." if shown is None and self._section(schema, None) is not None and not required else ""
        return " ".join(filter(None, (told, listed, off, "Required." if required else "")))

    def _described(self, schema: Schema) -> str:
        found = branches(self.document, schema, None)
        return str(found[0].get("description", "")) if found else ""


def _choices(schema: Schema, told: str, shown: Any) -> Iterator[str]:
    """The texts that a key, or an item of its list, may be, where what is told does not name them all."""
    whole = _parts(schema)
    items = [inner for part in whole if isinstance(part.get("items"), dict) for inner in _parts(part["items"])]
    for lead, parts in (("One of", whole), ("A list of", items)):
        names = [*dict.fromkeys(flow(name) for part in parts for name in _texts(part))]
        if len(names) > 1 and any(f"`{name}`" not in told and name != flow(shown) for name in names):
            yield f"{lead} {', '.join(names)}."


def _parts(schema: Schema) -> list[Schema]:
    return [schema, *schema.get("anyOf", ())]


def _texts(schema: Schema) -> Iterator[str]:
    yield from schema.get("enum", ())
    if isinstance(schema.get("const"), str):
        yield schema["const"]


def _with_comment(written: str, told: str, indent: str) -> Iterator[str]:
    """A key and its comment, on one line where both fit."""
    beside = f"{written.ljust(len(indent) + _BESIDE)}  # {told}"
    if told and len(beside) <= WIDTH:
        yield beside
    else:
        yield from _prose(told, indent)
        yield written


def _prose(told: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(told, WIDTH - len(indent) - 2, break_on_hyphens=False, break_long_words=False):
        yield f"{indent}# {line}"
