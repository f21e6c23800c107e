"""YAML as a researcher means it: plain values, the line of each, and nothing that surprises.

The reader takes a deliberate subset of YAML 1.2. What a plain (unquoted) value becomes:

| written | read as |
|---|---|
| `true`, `false` (also `True`, `TRUE`) | boolean |
| `12`, `-3` | integer |
| `0.5`, `1e-3`, `.5`, `.inf`, `.nan` | float |
| `null`, `~`, nothing | null |
| `no`, `off`, `on`, `yes`, `010`, `0x1f`, `1_000`, `12:30`, `2024-01-01`, anything else | text, as it stands |

Quoted values are always text. Refused, each with its line: duplicate keys, anchors, aliases, merge keys, tags,
several documents, keys that are not text, control characters, files that are not UTF-8, larger than 1 MB, or nested
deeper than 40 levels. Nothing is expanded: `${HOME}` is five characters and a name.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from mechinterp_cli.errors import UserError

MAX_BYTES = 1_000_000
MAX_DEPTH = 40

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?)")
SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_MAX_DIGITS = 400
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """What a YAML text says, and where it says it."""

    value: Any
    """Dicts, lists, text, integers, floats, booleans and None."""
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """Where each key or list item stands (`configs/x.yaml:12`), by its path from the top."""


def read_scalar(text: str) -> Any:
    """Give the value of an unquoted scalar.

    Args:
        text: The scalar as written, without surrounding blanks.

    Returns:
        None, a boolean, an integer, a float or the text itself.
    """
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if INTEGER.fullmatch(text):
        return int(text) if len(text) <= _MAX_DIGITS else text
    if FLOAT.fullmatch(text):
        return float(text)
    if SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def decode(source: bytes, name: str) -> str:
    """Decode a file's bytes as UTF-8, with or without a byte-order mark.

    Args:
        source: The bytes as they are on disk.
        name: What to call the file in errors.

    Raises:
        UserError: It is too large, or not UTF-8 text.
    """
    if len(source) > MAX_BYTES:
        raise UserError(
            f"{name}: {len(source):,} bytes are more than the {MAX_BYTES:,} that a config may have",
            "Put long lists of prompts into a CSV or JSONL file and name it under `task.file`.",
        )
    try:
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}:{line}: byte 0x{source[error.start]:02x} is not UTF-8", "Save the file as UTF-8 text."
        ) from error
    return text


def parse(text: str, name: str, *, numbered: bool = True) -> Document:
    """Read one YAML document.

    Args:
        text: The document.
        name: What to call it in errors: the file as the user named it.
        numbered: Whether origins carry line numbers; off for values given on the command line.

    Returns:
        The value and the origin of each of its parts; the value is None for an empty document.

    Raises:
        UserError: It is not YAML, or uses something that this reader refuses.
    """
    builder = _Builder(name, numbered)
    try:
        return Document(builder.build(yaml.parse(text, Loader=_LOADER)), builder.origins)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = builder.origin(mark.line) if mark else name
        raise UserError(
            f"{where}: not valid YAML: {error.problem or error.context}",
            "Check indentation (spaces, no tabs), colons and quotes near that line.",
        ) from error
    except yaml.reader.ReaderError as error:
        raise UserError(
            f"{builder.origin(text.count(chr(10), 0, error.position))}: "
            f"the character U+{_code_point(error.character):04X} is not allowed in YAML",
            'Write it escaped inside double quotes, for example "\\u0007".',
        ) from error


def _code_point(character: Any) -> int:
    if isinstance(character, int):
        return character
    return ord(character) if isinstance(character, str) else int(character[0])


class _Builder:
    """Turns parser events into values, noting where each stands."""

    def __init__(self, name: str, numbered: bool) -> None:
        self.name = name
        self.numbered = numbered
        self.origins: dict[KeyPath, str] = {}

    def origin(self, line: int) -> str:
        return f"{self.name}:{line + 1}" if self.numbered else self.name

    def build(self, events: Iterator[Any]) -> Any:
        value, seen = None, False
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if seen:
                    raise self._refuse(event, "a second document starts here", "Keep one experiment per file.")
                seen = True
                value = self._node(next(events), events, ())
        return value

    def _refuse(self, event: Any, what: str, remedy: str) -> UserError:
        return UserError(f"{self.origin(event.start_mark.line)}: {what}", remedy)

    def _check(self, event: Any, path: KeyPath) -> None:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise self._refuse(
                event, f"anchors and aliases are not allowed ({sign}{event.anchor})", "Write the value out in full."
            )
        if event.tag is not None:
            raise self._refuse(
                event, f"tags are not allowed ({event.tag})", "Remove the tag; quote the value where it must be text."
            )
        if len(path) > MAX_DEPTH:
            raise self._refuse(event, f"nested deeper than {MAX_DEPTH} levels", "Check the brackets and indentation.")

    def _node(self, event: Any, events: Iterator[Any], path: KeyPath) -> Any:
        self._check(event, path)
        self.origins.setdefault(path, self.origin(event.start_mark.line))
        if isinstance(event, yaml.ScalarEvent):
            return read_scalar(event.value) if event.implicit[0] else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(events, path)
        return self._mapping(events, path)

    def _sequence(self, events: Iterator[Any], path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(self._node(event, events, (*path, len(items))))
        return items

    def _mapping(self, events: Iterator[Any], path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self._key(event, path, mapping)
            self.origins[(*path, key)] = self.origin(event.start_mark.line)
            mapping[key] = self._node(next(events), events, (*path, key))
        return mapping

    def _key(self, event: Any, path: KeyPath, mapping: dict[str, Any]) -> str:
        self._check(event, path)
        if not isinstance(event, yaml.ScalarEvent):
            raise self._refuse(event, "a key must be plain text, not a list or a mapping", "Check the brackets.")
        if event.value == "<<" and event.implicit[0]:
            raise self._refuse(event, "merge keys (<<) are not allowed", "Write the keys out in full.")
        if event.value in mapping:
            first = self.origins[(*path, event.value)]
            raise self._refuse(event, f"the key {event.value!r} stands twice (first at {first})", "Remove one of them.")
        return str(event.value)
