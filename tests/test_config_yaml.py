import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp_cli.config.yaml_reader import MAX_BYTES, MAX_DEPTH, decode, parse, read_scalar
from mechinterp_cli.config.yaml_writer import dump
from mechinterp_cli.errors import UserError


def read(text: str) -> Any:
    return parse(text, "c.yaml").value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in ("no", "NO", "off", "on", "yes", "y", "010", "0123456", "12:30", "1_000", "0x1f")],
        *[(word, word) for word in ("2024-01-01", "1.2.3", "e5", "1e", "0o17", "=", "${HOME}", "${oc.env:HOME}")],
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("12", 12), ("-3", -3), ("+4", 4), ("0", 0),
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-1.5e+2", -150.0),
        (".inf", math.inf), ("-.INF", -math.inf),
        ('"true"', "true"), ("'12'", "12"), ('" Paris"', " Paris"), ("'null'", "null"), ('""', ""),
    ],
)  # fmt: skip
def test_value_is_what_a_researcher_means(text: str, value: Any) -> None:
    found = read(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_nan_is_read_and_endless_integers_are_not() -> None:
    assert math.isnan(read_scalar(".nan"))
    assert isinstance(read_scalar("9" * 5000), str)


def test_block_text_is_text() -> None:
    assert read("a: |\n  12\n")["a"] == "12\n"


def test_keys_are_text_as_written() -> None:
    assert read("on: 1\n12: 2\nnull: 3\n") == {"on": 1, "12": 2, "null": 3}


def test_origins_give_the_line_of_each_key_and_item() -> None:
    document = parse("a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n", "c.yaml")
    assert document.value == {"a": 1, "b": ["x", {"c": 2, "d": 3}]}
    assert document.origins[("a",)] == "c.yaml:1"
    assert document.origins[("b", 1)] == "c.yaml:4"
    assert document.origins[("b", 1, "d")] == "c.yaml:5"


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("a: 1\nb: 2\na: 3\n", "c.yaml:3: the key 'a' stands twice (first at c.yaml:1)"),
        ("x: {a: 1, a: 2}\n", "c.yaml:1: the key 'a' stands twice"),
        ("x:\n  - {b: 1, 'b': 2}\n", "c.yaml:2: the key 'b' stands twice"),
        (BOMB, "c.yaml:1: anchors and aliases are not allowed (&a)"),
        ("a: &x [*x]\n", "c.yaml:1: anchors and aliases are not allowed (&x)"),
        ("a: 1\nb: *a\n", "c.yaml:2: "),
        ("a: 1\n<<: {b: 2}\n", "c.yaml:2: merge keys (<<) are not allowed"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", "c.yaml:2: tags are not allowed"),
        ("a: !own 1\n", "c.yaml:1: tags are not allowed (!own)"),
        ("a: 1\n---\nb: 2\n", "c.yaml:2: a second document starts here"),
        ("a: 1\n\tb: 2\n", "c.yaml:2: not valid YAML"),
        ("a: [1\nb: 2\n", "c.yaml:2: not valid YAML"),
        ("a: 1\nb: x\0y\n", "c.yaml:2: the character U+0000"),
        ("a: 1\nb: x\x1b[31m\n", "c.yaml:2: the character U+001B"),
        ("? [a]\n: 1\n", "c.yaml:1: a key must be plain text"),
        ("[" * 3000, "c.yaml:1: nested deeper"),
        ("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "c.yaml:1: nested deeper"),
        ("a: b: c\n", "c.yaml:1: not valid YAML"),
    ],
)
def test_refused_with_its_line(text: str, cause: str) -> None:
    with pytest.raises(UserError) as caught:
        read(text)
    assert caught.value.cause.startswith(cause)
    assert caught.value.remedy


def test_nesting_that_is_deep_but_allowed() -> None:
    assert read("a: " + "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2))


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (b"a: 1\nb: caf\xe9\n", "c.yaml:2: byte 0xe9 is not UTF-8"),
        ("a: 1".encode("utf-16"), "c.yaml:1: byte 0xff is not UTF-8"),
        (b"\xed\xa0\x80", "c.yaml:1: byte 0xed is not UTF-8"),
        (b"#" * (MAX_BYTES + 1), "c.yaml: 1,000,001 bytes are more than"),
    ],
)
def test_bytes_that_are_no_config(source: bytes, cause: str) -> None:
    with pytest.raises(UserError) as caught:
        decode(source, "c.yaml")
    assert caught.value.cause.startswith(cause)


def test_byte_order_mark_and_windows_line_ends_are_taken() -> None:
    assert read(decode(b"\xef\xbb\xbfa: 1\r\nb: x\r\n", "c.yaml")) == {"a": 1, "b": "x"}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_empty_document_is_nothing(text: str) -> None:
    assert read(text) is None


def test_a_million_items_end_in_a_clean_answer() -> None:
    assert len(read("a: [" + "1," * 300_000 + "]")["a"]) == 300_000


WORDS = st.sampled_from(
    ["no", "1e-3", "010", "12:30", "null", "~", "", " x", "x ", "a: b", "- a", "#", "1_0", ".nan", "0x1", "<<", "="]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | WORDS
KEYS = st.text() | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), VALUES))
def test_what_is_dumped_is_read_back(value: dict[str, Any]) -> None:
    again = read(dump(value))
    assert again == value
    assert repr(again) == repr(value)
