"""Writing YAML that `yaml_reader` reads back to the same values."""

import re
from typing import Any

import yaml

from mechinterp_cli.config.yaml_reader import FLOAT, INTEGER, SPECIAL_FLOAT

_LINE_BREAKS = "\r\n\x85\u2028\u2029"


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or this project's reader would take for something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Line breaks are folded by readers unless they are escaped.
    style = '"' if any(mark in text for mark in _LINE_BREAKS) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"^(?:{INTEGER.pattern})$"), list("-+0123456789"))
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^(?:{FLOAT.pattern}|{SPECIAL_FLOAT.pattern})$"), list("-+.0123456789")
)


def dump(value: Any) -> str:
    """Write a value as YAML.

    Args:
        value: Dicts with text keys, lists, text, integers, floats, booleans and None.

    Returns:
        The document, ending in a newline, keys in the order given.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flow(value: Any) -> str:
    """Write a value on one line, as it stands behind its key: `[a, b]`, `{kind: z, layers: all}`.

    Args:
        value: As for `dump`.
    """
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1e9, default_flow_style=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
