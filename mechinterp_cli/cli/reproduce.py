"""`mechinterp reproduce`."""

from typing import Annotated, Any

import typer

from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.options import Json, Out, Overrides, Quiet
from mechinterp_cli.cli.resume import Run

Exact = Annotated[bool, typer.Option("--exact", help="Demand the same bytes in every table and picture.")]
Atol = Annotated[float | None, typer.Option("--atol", min=0, help="Absolute tolerance; float32: 1e-4, bfloat16: 0.5.")]
Rtol = Annotated[float | None, typer.Option("--rtol", min=0, help="Relative tolerance; float32: 1e-3, bfloat16: 0.05.")]
WORST = 10


def reproduce(
    run: Run,
    set_: Overrides = None,
    out: Out = None,
    exact: Exact = False,
    atol: Atol = None,
    rtol: Rtol = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run an experiment again and compare every table.

    Ends with 3 when a number moved by more than atol + rtol × its size. --set makes it a study of one change:
    --set model.dtype=bfloat16.

    Example: mechinterp reproduce runs/2026-01-31T120000Z-patch-ioi-0a1b2c --out runs
    """
    from mechinterp_cli.cli.registry import register_all
    from mechinterp_cli.runs.directory import find_run

    find_run(run)  # a path that is none is told before torch is imported
    register_all()
    from mechinterp_cli.errors import DifferenceError
    from mechinterp_cli.methods import reproduce as method

    console = Console.choose(quiet=quiet, as_json=as_json)
    manifest, loaded = method.recorded_experiment(run, set_ or ())
    with console.progress() as progress:
        found = method.reproduce(run, manifest, loaded, out=out, progress=progress, atol=atol, rtol=rtol)
    _tell(console, found, exact)
    console.result(found.path, _as_data(found))
    if found.differences:
        worst = found.differences[0]
        count = f"{len(found.differences)} {'cell' if len(found.differences) == 1 else 'cells'}"
        raise DifferenceError(f"{run}: {count} moved; the furthest: {worst}", f"The repeated run is {found.path}.")
    if found.damaged:
        raise DifferenceError(
            f"{run}: changed since it was recorded: {', '.join(found.damaged)}", "Put the files back."
        )
    if exact and found.other_bytes:
        raise DifferenceError(
            f"{run}: other bytes in {', '.join(found.other_bytes)}", f"The repeated run is {found.path}."
        )


def _tell(console: Console, found: Any, exact: bool) -> None:
    for change in found.surroundings:
        console.say(f"not as recorded: {change}")
    for name in found.damaged:
        console.say(f"{name}: changed since it was recorded")
    for difference in found.differences[:WORST]:
        console.say(str(difference))
    if len(found.differences) > WORST:
        console.say(f"and {len(found.differences) - WORST} more")
    if not found.differences and not found.damaged and not (exact and found.other_bytes):
        same = "same bytes" if not found.other_bytes else f"other bytes in {', '.join(found.other_bytes)}"
        within = f"atol {found.tolerance.atol:g}, rtol {found.tolerance.rtol:g}"
        console.say(f"reproduced: no number moved beyond {within}; {same}")


def _as_data(found: Any) -> dict[str, Any]:
    return {
        "not_as_recorded": list(found.surroundings),
        "damaged": list(found.damaged),
        "moved": len(found.differences),
        "worst": [vars(difference) for difference in found.differences[:WORST]],
        "other_bytes": list(found.other_bytes),
    }
