"""Recording one run: its directory, its tables, and a manifest that says how it ended."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.errors import RunError
from mechinterp_cli.runs import environment
from mechinterp_cli.runs.atomic import FileInfo, file_info, write_bytes
from mechinterp_cli.runs.directory import RunDirectory, check_writable
from mechinterp_cli.runs.lock import Lock, hold
from mechinterp_cli.runs.log import PACKAGE, logging_to
from mechinterp_cli.runs.manifest import Manifest, Status, utc_now
from mechinterp_cli.runs.schema import TableData, validate
from mechinterp_cli.runs.signals import Terminated, stop_requests
from mechinterp_cli.runs.store import UnitStore
from mechinterp_cli.runs.tables import AUTO_CSV_ROWS, Formats, chosen_formats, write_csv, write_parquet

_LOG = logging.getLogger(PACKAGE)


@dataclass
class RunRecorder:
    """What a method's runner writes a run with; `record` makes it."""

    directory: RunDirectory
    manifest: Manifest
    lock: Lock
    """That nobody else works on the run."""
    formats: Formats = "auto"
    """Formats of the tables that are written in more than one."""
    _earlier: float = 0.0
    """Seconds that processes before this one took."""
    _started: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @property
    def units(self) -> UnitStore:
        """Where finished work units are kept until the run is complete."""
        return UnitStore(self.path / "units")

    def warn(self, text: str) -> None:
        """Put a warning into the log and the manifest."""
        _LOG.warning("%s", text)

    def keep_warning(self, text: str) -> None:
        """Put a warning into the manifest, once."""
        if text not in self.manifest.warnings:
            self.manifest.warnings.append(text)

    def units_done(self, done: int, total: int) -> None:
        """Say on disk how far the run is.

        Args:
            done: Finished work units.
            total: All work units.

        Raises:
            RunError: Another process has taken the run over.
        """
        self.manifest.units_done, self.manifest.units_total = done, total
        self.lock.check()
        self.save()

    def save(self) -> None:
        """Write the manifest as it stands; call it after filling in what was found out (model, plan, proof)."""
        self.manifest.heartbeat = utc_now()
        self.manifest.write(self.path)

    def write_table(self, table: str, data: TableData, *, formats: Formats = ("parquet",)) -> pa.Table:
        """Check a table against its schema and write it.

        Args:
            table: `trials`, `results`, ... (see `runs.schema`).
            data: The rows, in any form `runs.schema.validate` takes.
            formats: `parquet`, `csv` or both; `auto` leaves CSV out of huge tables, and warns.

        Returns:
            The table as written.

        Raises:
            RunError: It does not fit its schema, or cannot be written.
        """
        checked = validate(table, data, self.manifest.subcommand)
        writers = {"parquet": write_parquet, "csv": write_csv}
        chosen = chosen_formats(formats, checked.num_rows)
        if formats == "auto" and "csv" not in chosen:
            ask = "`output.formats: [parquet, csv]` writes one"
            self.warn(f"{table}: no CSV of {checked.num_rows:,} rows (more than {AUTO_CSV_ROWS:,}); {ask}")
        for form in chosen:
            self._note(f"{table}.{form}", writers[form](checked, self.path / f"{table}.{form}"))
        return checked

    def write_file(self, name: str, data: bytes) -> Path:
        """Write a picture, a page or any other file.

        Args:
            name: Its path within the run directory (`figures/resid_pre.png`).
            data: Its bytes.

        Returns:
            Where it stands.

        Raises:
            RunError: It cannot be written.
        """
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path.parent}: cannot be made: {error.strerror or error}", "Check the folder.") from error
        self._note(name, write_bytes(path, data))
        return path

    def _note(self, name: str, info: FileInfo) -> None:
        self.manifest.outputs[name] = info

    def finish(self, status: Status, error: str | None = None) -> None:
        """Write how the run ended."""
        manifest = self.manifest
        manifest.status, manifest.error = status, error
        manifest.finished = utc_now()
        manifest.duration_seconds = round(self._earlier + time.monotonic() - self._started, 3)
        manifest.peak_memory_bytes = environment.peak_memory_bytes()
        log = self.path / "log.jsonl"
        if log.exists():
            self._note(log.name, file_info(log))
        self.save()


@contextlib.contextmanager
def record(
    loaded: LoadedConfig, out: Path | None = None, command: Sequence[str] | None = None
) -> Iterator[RunRecorder]:
    """Make a run directory, and write into its manifest how the block ended.

    The manifest says `running` from the start; `complete` when the block ends; `interrupted` on Ctrl-C, SIGTERM and
    SIGHUP; `failed`, with the error's text, on everything else. The exception always goes on to the caller.

    Args:
        loaded: The experiment.
        out: Folder that holds runs; `output.dir` of the config where not given.
        command: The command line, for the manifest; that of the process where not given.

    Yields:
        The recorder.

    Raises:
        UserError: Nothing can be written there.
        RunError: A file could not be written, or the end of the run could not.
    """
    config = loaded.config
    root = out if out is not None else Path(config.output.dir)
    check_writable(root)
    with stop_requests():
        # All that takes time comes before the directory is made: from then on, whatever stops the run is recorded.
        manifest = _first_manifest(loaded, _command() if command is None else command)
        directory = RunDirectory.create(root, config.method_name, config.name)
        with hold(directory.path) as lock:
            recorder = RunRecorder(directory, manifest, lock, config.output.formats)
            files = {"config.yaml": loaded.source, "config.resolved.yaml": loaded.resolved_yaml().encode()}
            with _recorded(recorder, files), _logged():
                yield recorder


@contextlib.contextmanager
def reopen(path: Path, lock: Lock, formats: Formats) -> Iterator[RunRecorder]:
    """Go on with a run that did not come to its end, and write into its manifest how the block ended.

    Args:
        path: The run directory.
        lock: Its lock, which the caller holds.
        formats: As `RunRecorder.formats`.

    Yields:
        The recorder.

    Raises:
        RunError: As `record`.
    """
    for left_behind in path.rglob(".*.tmp"):  # by a process that was killed while it wrote
        left_behind.unlink(missing_ok=True)
    manifest = Manifest.read(path)
    earlier = manifest.duration_seconds or 0.0
    manifest.begin_again(_command())
    recorder = RunRecorder(RunDirectory(path), manifest, lock, formats, earlier)
    with stop_requests(), _recorded(recorder, {}), _logged():
        yield recorder


def _command() -> list[str]:
    return ["mechinterp", *sys.argv[1:]]


@contextlib.contextmanager
def _recorded(recorder: RunRecorder, files: Mapping[str, bytes]) -> Iterator[None]:
    """Log, and record how the block ended; a directory with a manifest has these files."""
    with _ending_recorded(recorder):
        for name, data in files.items():
            recorder.write_file(name, data)
        recorder.save()
        with logging_to(recorder.path / "log.jsonl", recorder.keep_warning) as log:
            _LOG.info("run %s", recorder.path.name)
            yield
            if log.failure is not None:
                raise RunError(f"{log.path}: cannot be written: {log.failure.strerror}", "Free space there.")


def _first_manifest(loaded: LoadedConfig, command: Sequence[str]) -> Manifest:
    config = loaded.config
    return Manifest(
        subcommand=config.method_name,
        name=config.name,
        config=config.resolved(),
        config_sha256=config.sha256,
        command=list(command),
        overrides=list(loaded.overrides),
        versions=environment.package_versions(),
        git=environment.git_state(Path.cwd()),
        hardware=environment.hardware(),
    )


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Put what ends the block early into the log, with its traceback."""
    try:
        yield
    except BaseException as error:
        _LOG.error("the run ended early: %s", type(error).__name__, exc_info=True)
        raise


@contextlib.contextmanager
def _ending_recorded(recorder: RunRecorder) -> Iterator[None]:
    """Write the status that fits how the block ended; the log is closed by then."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as error:
        _finish_after(recorder, "interrupted", str(error) or "stopped by Ctrl-C", error)
        raise
    except BaseException as error:
        _finish_after(recorder, "failed", f"{type(error).__name__}: {error}", error)
        raise
    recorder.finish("complete")
    recorder.units.remove()


def _finish_after(recorder: RunRecorder, status: Status, text: str, error: BaseException) -> None:
    """Record a bad ending; where even that fails, the first error goes on and says so."""
    try:
        recorder.finish(status, text)
    except RunError as second:
        error.add_note(f"the manifest could not be written either: {second.cause}")
