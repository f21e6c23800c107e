"""From pydantic's errors to lines a person can act on: file, line, key path, value, what is allowed, the fix."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mechinterp_cli.config.jsonschema import allowed_keys
from mechinterp_cli.config.yaml_reader import KeyPath
from mechinterp_cli.errors import UserError

_MAX_VALUE = 60
_MAX_LISTED = 20
_BOOLEAN_WORDS = frozenset({"yes", "no", "on", "off", "y", "n"})


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config."""

    path: KeyPath
    message: str
    """What is wrong, without file and key path."""
    remedy: str = ""
    meant: KeyPath | None = None
    """For an unknown key: the key that it was probably meant to be."""


def key_text(path: KeyPath) -> str:
    """Write a key path as users do: `patch.sites[1].layers`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


def value_text(value: Any) -> str:
    """Write a value on one line, short, with control characters escaped."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, str):
        text = repr(value)
    else:
        text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 3] + "..."


def nearest(word: str, known: Sequence[str]) -> str:
    """Give a sentence naming the nearest known word, or an empty one where none is near."""
    close = _closest(word, known)
    return f"Did you mean {close!r}?" if close else ""


def _closest(word: str, known: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return close[0] if close else None


def describe(
    problems: Sequence[Problem], origins: Mapping[KeyPath, str], name: str, default_remedy: str = ""
) -> UserError:
    """Join problems into one error, in the order of the file.

    Args:
        problems: What is wrong; at least one.
        origins: Where each key stands.
        name: The file, for keys that stand nowhere.
        default_remedy: The fix where no problem has one of its own.

    Returns:
        The error: one line of cause for each problem, and the remedy of the first that has one.
    """
    order = {path: place for place, path in enumerate(origins)}
    ranked = sorted(problems, key=lambda problem: order.get(_known_part(problem.path, origins), 0))
    lines = [f"{origin_of(p.path, origins, name)}: {_with_key(p)}" for p in ranked[:_MAX_LISTED]]
    if len(ranked) > _MAX_LISTED:
        lines.append(f"{name}: and {len(ranked) - _MAX_LISTED} more")
    several = len(ranked) > 1
    remedies = [f"{key_text(p.path)}: {p.remedy}" if several else p.remedy for p in ranked if p.remedy]
    return UserError("\n".join(lines), remedies[0] if remedies else default_remedy)


def _with_key(problem: Problem) -> str:
    key = key_text(problem.path)
    return f"{key}: {problem.message}" if key else problem.message


def _known_part(path: KeyPath, origins: Mapping[KeyPath, str]) -> KeyPath:
    while path and path not in origins:
        path = path[:-1]
    return path


def origin_of(path: KeyPath, origins: Mapping[KeyPath, str], name: str) -> str:
    """Say where a key stands, or the innermost section above it that does; the file where none does."""
    known = _known_part(path, origins)
    return origins[known] if known else name


def problems_of(
    error: ValidationError, data: Any, renamed: Mapping[str, str], schema: Callable[[], dict[str, Any]]
) -> list[Problem]:
    """Turn pydantic's errors into problems.

    Args:
        error: What validation raised.
        data: The document as the file has it.
        renamed: Top-level fields of the model that stand under another key in the file.
        schema: Gives the JSON Schema; called only where a key is unknown.

    Returns:
        One problem for each place; the branches of a union are joined into one.
    """
    found: dict[KeyPath, list[dict[str, Any]]] = {}
    unions: set[KeyPath] = set()
    for item in error.errors(include_url=False):
        path, union = _locate(item, data, renamed)
        found.setdefault(path, []).append(dict(item))
        if union is not None:
            unions.add(union)
    deeper = {
        union for union in unions if any(len(path) > len(union) and path[: len(union)] == union for path in found)
    }
    # A branch of a union that got further than its outermost type is the one that was meant.
    problems = [_problem(path, items, data, schema) for path, items in found.items() if path not in deeper]
    # A missing key that stands there misspelt, and a list that is too short because an item is wrong, are not news.
    echoes = {problem.meant for problem in problems if problem.meant} | _short_through_an_error(found)
    return [problem for problem in problems if problem.path not in echoes]


def _short_through_an_error(found: Mapping[KeyPath, list[dict[str, Any]]]) -> set[KeyPath]:
    """Lists that pydantic calls too short because it does not count their wrong items."""
    short = {path for path, items in found.items() if all(item["type"] == "too_short" for item in items)}
    return {path for path in short if any(len(other) > len(path) and other[: len(path)] == path for other in found)}


def _locate(item: Any, data: Any, renamed: Mapping[str, str]) -> tuple[KeyPath, KeyPath | None]:
    """Drop the names of union branches from an error's location.

    Returns:
        The path within `data`, and the path of the innermost union on the way, if there is one.
    """
    path: list[str | int] = []
    union: KeyPath | None = None
    location = (renamed.get(item["loc"][0], item["loc"][0]), *item["loc"][1:]) if item["loc"] else ()
    for place, step in enumerate(location):
        if _holds(data, step):
            data = data[step]
            path.append(step)
        elif place == len(location) - 1 and isinstance(data, dict) and item["type"] in ("missing", "choice"):
            path.append(step)
        else:
            union = tuple(path)
    return tuple(path), union


def _holds(data: Any, step: str | int) -> bool:
    if isinstance(data, list):
        return isinstance(step, int) and step < len(data)
    return isinstance(data, dict) and step in data


def _problem(path: KeyPath, items: list[dict[str, Any]], data: Any, schema: Callable[[], dict[str, Any]]) -> Problem:
    first = items[0]
    if first["type"] == "extra_forbidden":
        # Where a section may be of several kinds, a key of another kind is known, and still not allowed beside these.
        known = [key for key in allowed_keys(schema(), data, path[:-1]) if key != path[-1]]
        close = _closest(str(path[-1]), known)
        remedy = f"Did you mean {close!r}?" if close else f"Remove it; allowed here: {', '.join(known)}."
        return Problem(path, "unknown key", remedy, meant=(*path[:-1], close) if close else None)
    if isinstance(first["input"], list):  # a list that is one and was refused was not meant as another branch's word
        items = [item for item in items if item["type"] == "value_error"] or items
    wanted = " or ".join(dict.fromkeys(_allowed(item) for item in items))
    if first["type"] == "missing" or (first["type"] == "choice" and first["input"] is None):
        return Problem(path, "is missing" + (f"; {wanted}" if wanted.startswith("allowed") else ""))
    prefix = "" if wanted.startswith("allowed") or _is_sentence(items) else "allowed: "
    return Problem(path, f"{value_text(first['input'])} is not valid; {prefix}{wanted}", _remedy(items))


def _is_sentence(items: list[dict[str, Any]]) -> bool:
    return all(item["type"] in ("value_error", "choice") for item in items)


_PLAIN = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
    "missing": "",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _allowed(item: dict[str, Any]) -> str:
    """Say what one error's place takes."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"{word} {context[key]}"
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        bound = context.get("min_length", context.get("max_length"))
        word, unit = (
            ("at least" if "min_length" in context else "at most"),
            ("character" if "string" in kind else "item"),
        )
        return f"{word} {bound} {unit}{'' if bound == 1 else 's'}"
    if kind in ("literal_error", "enum", "literal"):
        return str(context["expected"]).replace("'", "")
    if kind == "string_pattern_mismatch":
        return f"text that matches {context['pattern']}"
    if kind == "union_tag_invalid":
        return str(context["expected_tags"]).replace("'", "")
    return str(item["msg"]).removeprefix("Value error, ")


def _remedy(items: list[dict[str, Any]]) -> str:
    if remedy := items[0].get("ctx", {}).get("remedy"):
        return str(remedy)
    value = items[0]["input"]
    kinds = {item["type"] for item in items}
    if "bool_type" in kinds and isinstance(value, str) and value.lower() in _BOOLEAN_WORDS:
        return "Write `true` or `false`; yes, no, on and off are text here."
    if "string_type" in kinds and not isinstance(value, str | dict | list | None):
        return "Put quotes around it; without them it is read as a number or a truth value."
    if "tuple_type" in kinds and isinstance(value, str | int | float):
        near = nearest(value, _choices(items)) if isinstance(value, str) else ""
        return near or f"Write it as a list: [{value}]."
    if isinstance(value, str):
        if kinds & {"int_type", "float_type", "bool_type"} and value != value.strip("0123456789.-+e"):
            return "Write it without quotes." if not kinds & {"literal_error", "string_type"} else ""
        return nearest(value, _choices(items))
    return ""


def _choices(items: list[dict[str, Any]]) -> list[str]:
    texts = [_allowed(item).removeprefix("allowed: ") for item in items if item["type"] in ("literal_error", "choice")]
    return [word.strip() for text in texts for word in text.replace(" or ", ", ").split(",")]
