"""What tests of the report on `attribute` share: a run's view, as text, as specifications of pictures."""

import io
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pandas as pd
from rich.console import Console
from rich.segment import Segment

from mechinterp_cli.report.attribute import AttributeView
from mechinterp_cli.report.picture import Drawing
from mechinterp_cli.report.view import view_of
from tests.attribute_frames import Fake

HOSTILE = ("</script><script>alert(1)</script>", "[/INST]", "\x1b[31mred", "w" * 300, "\u202e", "[bold]\n", "",
           "中" * 9, "<img src=x onerror=alert(1)>", "{{x}}", "' onmouseover='x", "&lt;", "[red]x[/red]")  # fmt: skip


def view(fake: Fake, *lacking: str, **instead: pd.DataFrame) -> AttributeView:
    """The view of a run, without some of its tables or with others."""
    tables = {**fake.tables(), **instead}
    made = view_of(fake.manifest, {name: rows for name, rows in tables.items() if name not in lacking})
    assert isinstance(made, AttributeView)
    return made


def text(shown: AttributeView, width: int = 100, *, plain: bool = True) -> str:
    """What the terminal shows."""
    file = io.StringIO()
    colours: Literal["truecolor"] | None = None if plain else "truecolor"
    console = Console(
        file=file,
        width=width,
        force_terminal=not plain,
        color_system=colours,
        markup=False,
        emoji=False,
        highlight=False,
    )
    for part in shown.draw(width, plain):
        console.print(part)
    return file.getvalue()


def coloured(shown: AttributeView, width: int) -> str:
    """What a colour terminal shows, each ground's code before what is written on it.

    Rich's own codes are those of whichever terminal saw a style first, so they are written here from the styles.
    """
    console = Console(width=width)
    return "".join(_ground(part) for row in shown.draw(width, False) for part in console.render(row))


def _ground(part: Segment) -> str:
    colour = part.style.bgcolor if part.style is not None else None
    if colour is None:
        return part.text
    seen = colour.get_truecolor()
    return f"48;2;{seen.red};{seen.green};{seen.blue}m{part.text}"


def unbroken(shown: str) -> str:
    """Text whose lines are joined: sentences are broken wherever the terminal ends."""
    return " ".join(shown.split())


def cells(shown: str, first: str, nth: int = 0) -> list[str]:
    """The cells of a table row whose first cell is that."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] == first][nth]


def specs(shown: AttributeView) -> dict[str, dict[str, Any]]:
    """The Vega-Lite specification of every picture."""
    found = {}
    for name, picture in shown.pictures:
        assert isinstance(picture, Drawing)
        found[name] = picture.spec()
    return found


def names(shown: AttributeView) -> list[str]:
    """File names of the pictures."""
    return [name for name, _ in shown.pictures]


def data(spec: Mapping[str, Any], *columns: str) -> list[dict[str, Any]]:
    """All rows of data that have these columns."""
    return [row for rows in spec["datasets"].values() for row in rows if set(columns) <= set(row)]


def strings(value: Any) -> Iterator[str]:
    """All texts of a specification."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def title_of(spec: Mapping[str, Any]) -> str:
    """A picture's title and what stands below it."""
    return " ".join([*spec["title"]["text"], *spec["title"]["subtitle"]])
