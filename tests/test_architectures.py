import os
import time
from pathlib import Path

import pytest

from benchmarks.architecture_table import Examination, markdown
from benchmarks.architectures import essence, main
from benchmarks.isolation import Failure, Isolated
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.kinds import SITE_KINDS


def work(task: str) -> str:
    """What a process of its own is given to do."""
    if task == "crash":
        os._exit(3)
    if task == "hang":
        time.sleep(600)
    return task.upper()


@pytest.mark.slow
def test_a_crash_and_a_hang_do_not_end_the_others() -> None:
    assert Isolated(work, timeout=120)("warm") == "WARM"  # the first call pays for the imports
    results = dict(Isolated(work, timeout=5).over(["one", "crash", "hang", "two"], jobs=2))
    assert results["one"] == "ONE"
    assert results["two"] == "TWO"
    assert results["crash"] == Failure("its process ended with code 3")
    assert results["hang"] == Failure("took longer than 5 s")


@pytest.mark.slow
def test_the_table_has_a_proved_and_an_unproved_entry(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    main(["--only", "llama", "gemma3n", "--out", str(out)])
    lines = {line.split("`")[1]: line for line in out.read_text().splitlines() if line.startswith("| `")}
    assert "| packed |" in lines["llama"]
    assert "| none |" in lines["gemma3n"]
    assert "timm" in lines["gemma3n"]


def test_totals_cells_and_causes() -> None:
    rows = [
        Examination("a", 3, (0, 1, 2), ("embed", "resid_pre"), "packed", 2e-7),
        Examination("b", 3, (1,), ("embed",), "resume", 1e-6, "a | b"),
        Examination("c", reason="packed: z:zero deviates by 1.4e+00 of the logits' scale, 1e-04 are allowed"),
        Examination("d", reason="packed: stream clean deviates by 2e-01 of the logits' scale, 1e-04 are allowed"),
    ]
    page = markdown(rows, "5.0")
    assert "**2 of 4 entries run: 1 packed, 1 resume, 0 hooks; 2 do not.**" in page
    assert "| `b` | 3 | 1 | " in page
    assert "a \\| b |" in page
    assert "- **none** (2), packed: deviates: `c`, `d`" in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {8}


def test_an_error_becomes_one_line() -> None:
    assert essence(UserError("cause", "remedy")) == "cause"
    with pytest.raises(IndexError) as caught:
        tuple(SITE_KINDS)[99]
    assert essence(caught.value).startswith("IndexError: tuple index out of range (test_architectures.py:")
