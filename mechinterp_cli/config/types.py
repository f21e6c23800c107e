"""Field types that take what was meant and nothing else.

pydantic's ordinary `int` accepts `"3"`, `3.0` and `true`; these do not.
"""

import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

Count = Annotated[int, Field(strict=True, ge=1)]
"""A whole number from 1 on."""
Index = Annotated[int, Field(strict=True, ge=0)]
"""A whole number from 0 on."""
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
"""A seed: 0 up to 4294967295, what every generator in use takes."""
Flag = Annotated[bool, Field(strict=True)]
"""`true` or `false`."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number."""
Fraction = Annotated[float, Field(strict=True, gt=0, lt=1)]
"""A number strictly between 0 and 1."""
Text = Annotated[str, Field(strict=True, min_length=1)]
"""Text of at least one character."""

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_MAX_NAME = 80


def check_slug(name: str) -> str:
    """Accept a name that is safe as part of a folder's name on every system.

    Args:
        name: The run's name as the config gives it.

    Returns:
        The same name.

    Raises:
        ValueError: It is empty, too long, reserved, or holds something other than letters, digits, `.`, `_`, `-`.
    """
    if len(name) > _MAX_NAME:
        raise ValueError(f"a name has at most {_MAX_NAME} characters, this one has {len(name)}")
    if not _SLUG.fullmatch(name):
        raise ValueError("allowed: letters, digits, '.', '_' and '-', the first a letter or a digit")
    if ".." in name or name.endswith("."):
        raise ValueError("a name may not hold '..' or end with '.'")
    if _RESERVED.fullmatch(name):
        raise ValueError("this name is reserved by some operating systems")
    return name


Slug = Annotated[str, Field(strict=True), AfterValidator(check_slug)]
"""A name that may become part of a folder's name."""


Listed = TypeVar("Listed", str, int)


def unique(names: tuple[Listed, ...]) -> tuple[Listed, ...]:
    """Accept a list of names or numbers none of which stands there twice.

    Raises:
        ValueError: Names those that do.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"listed twice: {', '.join(map(str, twice))}")
    return names
