"""A page of prompts whose tokens are coloured by what they count: one file, no script, nothing that it asks for.

Tokens are text of models and data sets, which may be anything. All of it is escaped, and the page's own policy allows
neither scripts nor requests, whatever a token says.
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby

import pandas as pd

from mechinterp_cli.report.labels import EMPTY, show_text, show_token
from mechinterp_cli.report.tokens import NAMES, TokenLine, first_prompts, in_place, short, token_lines, unit_of

MAX_TOKENS = 200_000
"""Coloured tokens of a page; browsers are slow with more. Prompts beyond are left to the table, and a line says so."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
LONGEST = 200
STRONG = 0.8
"""From this share of the full colour on, white letters read better than black ones."""
_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1b1b; --faint: #5c5c5c; --line: #d5d5d5;
  --above: 33, 102, 172; --below: 178, 24, 43; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #eceef1; --faint: #a2a9b3; --line: #3a3f47;
  --above: 56, 125, 200; --below: 200, 60, 60; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto;
  max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
h1, h2, p { overflow-wrap: anywhere; }
p { color: var(--faint); margin: .2rem 0; }
section { border-top: 1px solid var(--line); }
dl { margin: 0; } dt { color: var(--faint); font-size: .85rem; margin-top: .5rem; } dd { margin: 0; line-height: 2; }
dd span, .key span { background: rgba(var(--colour), var(--share)); border-radius: 3px; padding: .15em .1em;
  margin: 0 1px; font-family: ui-monospace, monospace; font-size: .9rem; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
.key span { padding: .15em .5em; color: var(--ink); }
.above { --colour: var(--above); } .below { --colour: var(--below); }
.key .strong, .strong { color: #ffffff; }
.none { --colour: 128, 128, 128; --share: 0; text-decoration: underline dotted; }
"""


def token_page(rows: pd.DataFrame, about: Sequence[str]) -> str:
    """The page.

    Args:
        rows: The table `inputs`, of one checkpoint.
        about: Task, model: the title and what stands below it.

    Returns:
        HTML, whole; nothing in it but text and colours.
    """
    prompts = first_prompts(rows, len(rows))
    shown = _that_fit(rows, prompts)
    cut = f"<p>The first {len(shown)} of {len(prompts)} prompts; the table <code>inputs</code> has all.</p>\n"
    title, *below = [_safe(words) for words in about if words] or ["tokens"]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>What each token counts: {title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>What each token counts: {title}</h1>\n<p>{', '.join(below)}</p>\n{_key()}"
        f"{cut if len(shown) < len(prompts) else ''}{''.join(_sections(token_lines(rows, shown)))}</body>\n</html>\n"
    )


def _that_fit(rows: pd.DataFrame, prompts: Sequence[int]) -> list[int]:
    """The first prompts, as long as the page does not grow too large; one at least."""
    counts = rows["prompt"].value_counts()
    shown: list[int] = []
    total = 0
    for prompt in prompts:
        total += int(counts[prompt])
        if shown and total > MAX_TOKENS:
            break
        shown.append(prompt)
    return shown


def _key() -> str:
    steps = "".join(_span(f"{share:+.1f}", share, "") for share in (-1.0, -0.5, 0.0, 0.5, 1.0))
    return (
        f'<p class="key">{steps}</p>\n<p>Colours are parts of the largest magnitude of each line; blue raises the '
        "metric, red lowers it. Point at a token for its number.</p>\n"
    )


def _sections(lines: Iterable[TokenLine]) -> Iterator[str]:
    for prompt, of_prompt in groupby(lines, key=lambda one: one.prompt):
        yield f"<section>\n<h2>Prompt {prompt}</h2>\n<dl>\n"
        for one in of_prompt:
            about = (NAMES.get(one.estimator, one.estimator), unit_of(one.estimator, one.metric), in_place([one]))
            words = _safe(", ".join(filter(None, about)))
            yield f"<dt>{words}; full colour: {short(one.largest)}</dt>\n<dd>{''.join(_spans(one))}</dd>\n"
        yield "</dl>\n</section>\n"


def _spans(one: TokenLine) -> Iterator[str]:
    for at, (token, value, share) in enumerate(zip(one.tokens, one.values, one.shares, strict=True)):
        known = f"{value:.4g}" if share == share else "no number"
        yield _span(show_token(token, longest=LONGEST), share, f"position {at}: {known}")


def _span(word: str, share: float, tip: str) -> str:
    """A word on its colour; what breaks lines in the token is followed by a break."""
    kind = "none" if share != share else "above" if share >= 0 else "below"
    kind += " strong" if abs(share) > STRONG else ""
    style = "" if share != share else f' style="--share:{abs(share):.2f}"'
    title = f' title="{_safe(tip)}"' if tip else ""
    return f'<span class="{kind}"{style}{title}>{_safe(word) or EMPTY}</span><wbr>'


def _safe(words: str) -> str:
    """Text that cannot act: what is not seen is written as its code, what is markup is escaped."""
    return escape(show_text(words), quote=True)
