"""Whether bits repeat is set, put back, and written down."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mechinterp_cli.engine.determinism import determinism_state, deterministic
from mechinterp_cli.engine.wavefront import Wavefront
from tests.experiments import run_patch

SITES = {"sites": [{"kind": "resid_pre", "positions": "last"}]}


def settings() -> tuple[Any, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
    )


def put() -> None:
    """Something for which PyTorch has no deterministic algorithm."""
    torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))


def test_settings_hold_inside_and_are_put_back() -> None:
    before = settings()
    with pytest.raises(ZeroDivisionError), deterministic(True):
        assert settings() == (True, True, "highest", False)
        state = determinism_state(True)
        assert (state["wanted"], state["deterministic_algorithms"], state["cudnn_tf32"]) == (True, True, False)
        assert state["cublas_workspace"]
        raise ZeroDivisionError
    assert settings() == before
    with deterministic(False):
        assert settings() == before
        assert determinism_state(False)["deterministic_algorithms"] is False
        put()


def test_the_manifest_says_which_it_was(tmp_path: Path) -> None:
    yes, no = (run_patch(tmp_path, SITES, deterministic=wanted).manifest for wanted in (True, False))
    assert (yes["determinism"]["wanted"], yes["determinism"]["deterministic_algorithms"]) == (True, True)
    assert (no["determinism"]["wanted"], no["determinism"]["deterministic_algorithms"]) == (False, False)
    words = "deterministic: false: a repetition may differ in the last bits even on the same machine"
    assert (words in no["warnings"], words in yes["warnings"]) == (True, False)


@pytest.mark.filterwarnings("always")
def test_a_kernel_that_does_not_repeat_its_bits_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Wavefront.run

    def run(self: Wavefront, *rest: Any) -> Any:
        put()
        return real(self, *rest)

    monkeypatch.setattr(Wavefront, "run", run)
    found = run_patch(tmp_path, SITES).manifest["warnings"]
    assert any("put_" in warning and "deterministic" in warning for warning in found)
