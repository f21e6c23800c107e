"""The page as one HTML file: nothing is fetched, no text of a run can act."""

import base64
import hashlib
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from mechinterp_cli.report.page.library import vega_script
from mechinterp_cli.report.page.pack import inert
from mechinterp_cli.report.picture import COLOURS

SCRIPTS = ("dom", "charts", "tables", "prompts", "page")
"""Files of the page's own script, in order."""


def document(title: str, content: dict[str, Any]) -> bytes:
    """The page.

    Args:
        title: Of the window.
        content: What it shows: `runs`, and `comparison` where there are several.

    Returns:
        HTML, whole.
    """
    scripts = (_script(vega_script()), _script(_own_script()))
    policy = (
        f"default-src 'none'; script-src {' '.join(_hash(script) for script in scripts)}; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = Template(_asset("page.html")).substitute(
        title=escape(title),
        policy=policy,
        style=_asset("page.css"),
        library=scripts[0],
        script=scripts[1],
        data=inert({**content, "colours": list(COLOURS)}),
    )
    return page.encode("utf-8", "backslashreplace")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _script(text: str) -> str:
    """A script that cannot end its element early."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


@cache
def _own_script() -> str:
    parts = "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}\n}})();'


@cache
def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
