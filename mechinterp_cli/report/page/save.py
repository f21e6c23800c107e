"""Writing the page of finished runs."""

from collections.abc import Sequence
from pathlib import Path

from mechinterp_cli.errors import UserError
from mechinterp_cli.report.page.build import FILE_NAME, page_of_runs
from mechinterp_cli.runs.atomic import write_bytes
from mechinterp_cli.runs.directory import check_writable, find_run
from mechinterp_cli.runs.reading import read_manifest

_ELSEWHERE = "Give another file: --output FILE."


def save_page(paths: Sequence[Path], output: Path | None) -> Path:
    """Make the page of some runs and write it.

    Args:
        paths: Run directories.
        output: The file; `report.html` of the one run where None.

    Returns:
        The file.

    Raises:
        UserError: One is no run or has nothing to show, the file is not given where it must be, or it would no more be
            what a complete run's manifest says.
        RunError: A table is damaged, or the file cannot be written.
    """
    for path in paths:
        find_run(path)
    if output is None and len(paths) > 1:
        raise UserError("several runs: no file is given for the page", "Give one: --output FILE.")
    file = paths[0] / FILE_NAME if output is None else output
    if file.is_dir():
        raise UserError(f"{file}: this is a folder", _ELSEWHERE)
    page = page_of_runs(paths)
    _refuse_recorded(paths, file, page)
    check_writable(file.parent)
    write_bytes(file, page)
    return file


def _refuse_recorded(paths: Sequence[Path], file: Path, page: bytes) -> None:
    """Refuse to change a file that a run's manifest has the hash of."""
    for path in paths:
        try:
            name = file.resolve().relative_to(path.resolve()).as_posix()
        except ValueError:
            continue
        known = read_manifest(path).outputs.get(name)
        if known is not None and (not file.is_file() or file.read_bytes() != page):
            raise UserError(
                f"{file}: the run's manifest has the hash of this file, and the page is no more the same "
                "(another version made it, or the file was changed)",
                _ELSEWHERE,
            )
