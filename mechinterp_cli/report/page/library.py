"""Vega, Vega-Lite and Vega-Embed as one script, out of vl-convert: the page draws what the pictures draw."""

from importlib.metadata import version
from pathlib import Path

import vl_convert

from mechinterp_cli.report.picture import VERSION
from mechinterp_cli.runs.cache import keep, read_kept, scripts_folder


def vega_script() -> str:
    """The libraries' script, which makes `vegaEmbed` known to the page.

    Putting it together takes vl-convert two seconds, so it is kept beside the fetched models, by version.
    """
    kept = read_kept(_file())
    if kept is None:
        kept = _bundled().encode()
        keep(_file(), kept)
    return kept.decode()


def _bundled() -> str:
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VERSION)
    return script


def _file() -> Path:
    return scripts_folder() / f"vega-lite-{VERSION}-vl-convert-{version('vl-convert-python')}.js"
