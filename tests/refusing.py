"""Configs that are refused: from the command line to the message."""

from pathlib import Path

import pytest

from mechinterp_cli.cli.main import main


def changed(text: str, *pairs: str) -> str:
    """A config with parts of it (old, new, old, new, …) replaced, each of which stands in it once."""
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def check_refused(
    capfd: pytest.CaptureFixture[str], command: str, config: str, cause: str, remedy: str, *arguments: str
) -> None:
    """Run a config here and check how it ends: one line of cause, one of remedy, exit 2, no run directory."""
    Path("c.yaml").write_text(config)
    capfd.readouterr()
    assert main([command, "c.yaml", *arguments]) == 2
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert [line.split(": ")[0] for line in lines if line.startswith(("error:", "fix:"))] == ["error", "fix"]
    assert lines[-2].startswith("error: ")
    assert cause in lines[-2]
    assert remedy in lines[-1]
    assert "Traceback" not in err
    assert out == ""
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
