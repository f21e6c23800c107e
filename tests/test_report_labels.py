"""Tokens and titles are shown so that nothing is invisible and nothing acts."""

import pytest

from mechinterp_cli.report.labels import show_text, show_token


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Mary", "·Mary"),
        ("\n\n", "⏎⏎"),
        ("\t", "⇥"),
        ("", "∅"),
        ("$x^2$", "$x^2$"),
        ("中文", "中文"),
        ("[/INST]", "[/INST]"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u200b", "\\u200b"),
        ("\u202eabc", "\\u202eabc"),
        ("\ud800", "\\ud800"),
        ("\u2028", "\\u2028"),
        ("\u0301", "◌\u0301"),
        ("a" * 30, "a" * 14 + "…"),
    ],
)
def test_tokens(token: str, shown: str) -> None:
    assert show_token(token) == shown


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" Mary", "_Mary"), ("\n", "\\n"), ("中", "\\u4e2d"), ("é", "\\xe9"), ("🙂", "\\U0001f642"), ("", "(empty)")],
)
def test_plain_tokens_are_ascii(token: str, shown: str) -> None:
    assert show_token(token, plain=True) == shown
    assert shown.isascii()


def test_titles_keep_their_spaces_and_lose_their_line_breaks() -> None:
    assert show_text("resid_pre\n\x1b]0;title\x07 on 64 prompts") == "resid_pre⏎\\x1b]0;title\\x07 on 64 prompts"


def test_signs_of_titles_have_ascii_of_their_own_and_tokens_keep_their_codes() -> None:
    assert show_text("2 × 3, ± margin, a→b, −1 … 1", plain=True) == "2 x 3, +- margin, a->b, -1 ... 1"
    assert show_token("×", plain=True) == "\\xd7"
