"""From a YAML file and `--set` overrides to a checked experiment, with file and line in every error."""

import contextlib
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mechinterp_cli.config.base import MethodOptions
from mechinterp_cli.config.jsonschema import experiment_schema
from mechinterp_cli.config.problems import Problem, describe, key_text, nearest, origin_of, problems_of
from mechinterp_cli.config.schema import ExperimentConfig
from mechinterp_cli.config.yaml_reader import MAX_BYTES, Document, KeyPath, decode, parse
from mechinterp_cli.config.yaml_writer import dump
from mechinterp_cli.errors import UserError
from mechinterp_cli.metric_names import check_metric_names

_STEP = re.compile(r"\.?([^.\[\]]+)|\[([0-9]+)\]")
_LEADING_KEY = re.compile(r"[a-z_]+(?:\.[a-z_]+|\[[0-9]+\])*(?=:? )")
_GENERAL_REMEDY = "`mechinterp schema` prints every key, its type and its default."


@dataclass(frozen=True)
class LoadedConfig:
    """A checked experiment, and where each part of it was written."""

    config: ExperimentConfig
    path: Path
    """The file, as the user named it."""
    source: bytes
    """The file as given, byte for byte."""
    overrides: tuple[str, ...] = ()
    """`--set` arguments, in order."""
    origins: dict[KeyPath, str] = field(default_factory=dict, repr=False)
    """Where each key stands: `configs/x.yaml:12` or `--set model.dtype=bfloat16`."""

    def error(self, path: KeyPath, problem: str, remedy: str = "") -> UserError:
        """Build the error for something that only the model or the task can tell is wrong.

        Args:
            path: Path of the key in the YAML file (`("patch", "sites", 1, "layers")`).
            problem: What is wrong (`48 is outside 0..29`).
            remedy: What to do about it.

        Returns:
            The error, to be raised, with file, line and key path in front.
        """
        return describe([Problem(path, problem, remedy)], self.origins, str(self.path))

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Put file and line in front of an error whose cause begins with a key of this config.

        Models, tasks and metrics know which key is at fault (`model.id: ...`), and not where it was written.
        """
        try:
            yield
        except UserError as error:
            match = _LEADING_KEY.match(error.cause)
            path = _override_path(match[0]) if match else ()
            if path and _is_in(self.config.resolved(), path):
                error.cause = f"{origin_of(path, self.origins, str(self.path))}: {error.cause}"
            raise

    def resolved_yaml(self) -> str:
        """Write the config with every default as YAML that loads to the same config."""
        return dump(self.config.resolved())


def load_config(path: Path, overrides: Sequence[str] = (), *, method: str | None = None) -> LoadedConfig:
    """Read and check a config file.

    Tasks and methods must have been imported before: importing them registers their options.

    Args:
        path: The YAML file.
        overrides: `key.path=value` texts; values follow the rules of the file (see `yaml_reader`).
        method: The subcommand that is being run; None takes whichever section the file has.

    Returns:
        The experiment, with the file's bytes and the origin of every key.

    Raises:
        UserError: The file cannot be read, is not such YAML, or does not describe an experiment.
    """
    source = read_source(path)
    document = parse(decode(source, str(path)), str(path))
    if not isinstance(document.value, dict):
        found = "is empty" if document.value is None else "has no keys at the top"
        raise UserError(f"{path}: the file {found}", f"`mechinterp init {method or 'KIND'}` writes one to start from.")
    for override in overrides:
        apply_override(document, override)
    section = _method_section(document, str(path), method)
    config = _validate(document, section, str(path))
    loaded = LoadedConfig(config, path, source, tuple(overrides), document.origins)
    with loaded.located():
        check_metric_names(config.metrics)
    return loaded


def read_source(path: Path) -> bytes:
    """Read a config file's bytes, at most one more than a config may have.

    Raises:
        UserError: It is missing, not an ordinary file, or not readable.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "not an ordinary file"
            raise UserError(f"{path}: this is {kind}", "Give the path of a YAML file.")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path}: cannot be read: {reason}", "Give the path of a YAML file; `mechinterp init KIND` writes one."
        ) from error


def apply_override(document: Document, override: str) -> None:
    """Change one value of a document in place, as `--set key.path=value` asks.

    Args:
        document: The parsed file; its value is a mapping.
        override: `patch.direction=noise`, `patch.sites[0].layers=[0, 1]`. Sections on the way are made where missing.

    Raises:
        UserError: The text has no `=`, or its path leads nowhere; the `--set` is named.
    """
    origin = f"--set {override}"
    key, separator, text = override.partition("=")
    path = _override_path(key.strip())
    if not separator or not path:
        raise UserError(f"{origin}: not of the form key=value", "For example: --set patch.direction=noise")
    value = parse(text.strip(), origin, numbered=False)
    parent = _walk(document.value, path[:-1], origin)
    last = path[-1]
    if not _has_place(parent, last):
        raise _leads_nowhere(origin, path[:-1], last, parent)
    parent[last] = value.value
    for stale in [known for known in document.origins if known[: len(path)] == path]:
        del document.origins[stale]
    for depth in range(1, len(path) + 1):
        document.origins.setdefault(path[:depth], origin)
    document.origins.update({(*path, *below): origin for below in value.origins})


def _override_path(key: str) -> KeyPath:
    steps: list[str | int] = []
    place = 0
    while place < len(key):
        match = _STEP.match(key, place)
        if match is None or (match[1] is not None and (key[place] == ".") != (place > 0)):
            return ()
        steps.append(match[1] if match[1] is not None else int(match[2]))
        place = match.end()
    return tuple(steps)


def _has_place(parent: Any, step: str | int) -> bool:
    """Whether something can be put there: any key of a mapping, an existing place of a list."""
    if isinstance(parent, list):
        return isinstance(step, int) and step < len(parent)
    return isinstance(parent, dict) and isinstance(step, str)


def _is_in(value: Any, path: KeyPath) -> bool:
    """Whether a path leads somewhere; a file that is called like a section (`patch.yaml`) is no key."""
    try:
        for step in path:
            value = value[step]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _walk(value: Any, path: KeyPath, origin: str) -> Any:
    """Go down to a section, making mappings on the way where nothing stands."""
    for place, step in enumerate(path):
        if not _has_place(value, step):
            raise _leads_nowhere(origin, path[:place], step, value)
        if isinstance(value, dict) and value.get(step) is None:
            value[step] = {}
        value = value[step]
    return value


def _leads_nowhere(origin: str, path: KeyPath, step: str | int, value: Any) -> UserError:
    here = key_text(path) or "the config"
    if isinstance(value, list):
        return UserError(
            f"{origin}: {here} is a list of {len(value)}; {step!r} is not one of its places",
            f"Use {here}[0] to {here}[{len(value) - 1}]." if value else f"Set {here} as a whole.",
        )
    return UserError(f"{origin}: {here} has no place {step!r}: it is no section", f"Set {here} as a whole.")


def _method_section(document: Document, name: str, method: str | None) -> str:
    """Find the one method section of a document."""
    known = sorted(MethodOptions.registry)
    present = [str(key) for key in document.value if key in MethodOptions.registry]
    if not present:
        unknown = [key for key in document.value if key not in ExperimentConfig.model_fields]
        hints = [hint for key in unknown if (hint := nearest(key, known))]
        raise UserError(
            f"{name}: no method section; one of these is needed: {', '.join(known)}",
            hints[0] if hints else f"Add a section such as `{method or next(iter(known), 'patch')}:`.",
        )
    if len(present) > 1:
        places = ", ".join(f"{key} ({document.origins[(key,)]})" for key in present)
        raise UserError(f"{name}: more than one method section: {places}", "Keep one; one file is one experiment.")
    if method is not None and present[0] != method:
        raise UserError(
            f"{document.origins[(present[0],)]}: this config is for `{present[0]}`, not for `{method}`",
            f"Run: mechinterp {present[0]} {name}",
        )
    return present[0]


def _validate(document: Document, section: str, name: str) -> ExperimentConfig:
    raw = document.value
    data = {key: value for key, value in raw.items() if key not in (section, "method")}
    problems: list[Problem] = []
    if "method" in raw:
        problems.append(Problem(("method",), "unknown key", f"The method's section is `{section}:`."))
    try:
        config = ExperimentConfig.model_validate({**data, "method": {section: raw[section]}})
    except ValidationError as error:
        problems += problems_of(error, raw, {"method": section}, experiment_schema)
    if problems:
        raise describe(problems, document.origins, name, _GENERAL_REMEDY)
    return config
