"""The manifest: what ran, on what, how it ended, and the hash of everything it left."""

import dataclasses
import json
import math
import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import mechinterp_cli
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.runs.atomic import FileInfo, write_bytes

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
Status = Literal["running", "complete", "interrupted", "failed"]
_STATUSES = frozenset({"running", "complete", "interrupted", "failed"})


def utc_now() -> str:
    """Give the time in UTC to the millisecond, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass
class Manifest:
    """Everything needed to run an experiment again and to see what differed.

    Times are UTC; durations come from a monotonic clock. Values that JSON has no word for (NaN, infinities) are
    written as the texts `"NaN"`, `"Infinity"`, `"-Infinity"`.
    """

    subcommand: str
    """Which method: `patch`."""
    name: str
    """The run's name in the config."""
    config: dict[str, Any]
    """Resolved: every default filled in."""
    config_sha256: str
    """Hash of the resolved config; equal for equal experiments, however the file was written."""
    command: list[str] = field(default_factory=list)
    """The command line."""
    overrides: list[str] = field(default_factory=list)
    """`--set` texts, in order."""
    schema_version: int = SCHEMA_VERSION
    """Of the manifest itself."""
    mechinterp_version: str = mechinterp_cli.__version__
    """The version that began the run."""
    status: Status = "running"
    """How the run stands; `running` without a living holder of the lock means that it crashed."""
    error: str | None = None
    """Why the run failed or was interrupted."""
    started: str = field(default_factory=utc_now)
    """UTC, ISO 8601."""
    heartbeat: str = field(default_factory=utc_now)
    """When the run last gave a sign of life."""
    finished: str | None = None
    """UTC; null while it runs, and where it crashed."""
    duration_seconds: float | None = None
    """Of all processes that worked on the run together."""
    pid: int = field(default_factory=os.getpid)
    """The process that began the run."""
    host: str = field(default_factory=platform.node)
    """The machine that it began on."""
    resumed: list[dict[str, Any]] = field(default_factory=list)
    """Of every process that went on with the run: when, where, after what, with how many units done."""
    model: dict[str, Any] = field(default_factory=dict)
    """Id, revision, sha256 of weight files and tokenizer, dtype, anatomy; with several checkpoints those of the first,
    and `checkpoints`: of every one its name, the tokens it has seen and, from when it is loaded, the same."""
    task: dict[str, Any] = field(default_factory=dict)
    """Name, hash, prompt count, what was dropped, `add_bos`, `chat_template`."""
    engine: dict[str, Any] = field(default_factory=dict)
    """`parts`: of every checkpoint (null without checkpoints) and job of the engine, in the order they ran in, the
    proof with its executor, of how many tokens the logits are computed and how far these are from all of them
    (`head`), the plan, and the units that ran where memory had them halved. A part without a job holds
    what else was proved of a model: of `heads`, how far attention patterns are from the model's own (`patterns`)."""
    determinism: dict[str, Any] = field(default_factory=dict)
    """Whether only algorithms that repeat their bits were used, and the settings that decide it."""
    display: dict[str, str] = field(default_factory=dict)
    """What pictures and the terminal say of the run: `title`, and what 0 and 1 mean (`scale`)."""
    seeds: dict[str, int] = field(default_factory=dict)
    """Every seed by what it draws."""
    versions: dict[str, str] = field(default_factory=dict)
    """Python and every package that bears on the numbers."""
    git: dict[str, Any] | None = None
    """Commit and dirtiness of the folder that the run was started in; null outside a work tree."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """System, processor, cores, memory in bytes, device, threads."""
    peak_memory_bytes: int | None = None
    """Largest resident memory of the last process that worked on it."""
    units_done: int = 0
    """Work units that are saved."""
    units_total: int | None = None
    """Work units that the plan has; null before there is one."""
    outputs: dict[str, FileInfo] = field(default_factory=dict)
    """File name within the run directory to its hash, size and rows."""
    warnings: list[str] = field(default_factory=list)
    """What a reader of the numbers must know, each once."""

    def to_json(self) -> str:
        """Write as JSON text."""
        return json.dumps(json_ready(dataclasses.asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = FILE_NAME) -> "Manifest":
        """Read from JSON text.

        Args:
            text: What `to_json` wrote; keys this version does not know are left out.
            source: The file, for errors.

        Raises:
            RunError: It is cut off, or not a manifest.
            UserError: A newer version of mechinterp wrote it.
        """
        try:
            data = json.loads(text)
            version, status = data["schema_version"], data["status"]
            known = {item.name for item in dataclasses.fields(cls)}
            outputs = {name: FileInfo(**info) for name, info in data.pop("outputs", {}).items()}
            manifest = cls(**{key: value for key, value in data.items() if key in known}, outputs=outputs)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{source}: not a readable manifest: {error}", "The run crashed or was damaged.") from error
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise UserError(
                f"{source}: written by a newer mechinterp (manifest version {version}; known: {SCHEMA_VERSION})",
                "Update mechinterp.",
            )
        if status not in _STATUSES:
            raise RunError(f"{source}: unknown status {status!r}", "The manifest was changed by hand or damaged.")
        return manifest

    def begin_again(self, command: list[str]) -> None:
        """Note that another process goes on with the run: this one."""
        self.resumed.append(
            {
                "started": utc_now(),
                "after": self.status,
                "units_done": self.units_done,
                "pid": os.getpid(),
                "host": platform.node(),
                "command": command,
            }
        )
        self.status, self.error, self.finished = "running", None, None

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into a run directory, atomically.

        Raises:
            RunError: It cannot be written.
        """
        write_bytes(folder / FILE_NAME, self.to_json().encode("utf-8", "backslashreplace"))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a run directory's manifest.

        Raises:
            RunError: There is none, or it cannot be read.
        """
        path = folder / FILE_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: cannot be read: {error}", "Give the path of a run directory.") from error
        return cls.from_json(text, str(path))


def json_ready(value: Any) -> Any:
    """Turn a value into what JSON can hold: text keys, lists, and texts for NaN and infinities."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
