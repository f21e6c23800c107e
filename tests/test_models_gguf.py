import os
from pathlib import Path

import pytest
import torch

from mechinterp_cli.models.load import load_model
from tests.models_files import write_gguf
from tests.models_fixtures import options, refused


def test_gguf_is_dequantised_into_ordinary_tensors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(options(write_gguf(tmp_path / "tiny.gguf")))
    assert (loaded.source.path, loaded.source.quantization) == ("gguf", "gguf, dequantised")
    assert list(loaded.source.weight_files) == ["tiny.gguf"]
    assert {type(weight) for weight in loaded.model.parameters()} == {torch.nn.Parameter}
    assert capfd.readouterr() == ("", "")
    loaded.model.save_pretrained(tmp_path / "saved")  # refused while transformers believes it quantised
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(options(tmp_path / "saved"))
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(again.model(tokens).logits, loaded.model(tokens).logits)


def test_bad_gguf(tmp_path: Path) -> None:
    (tmp_path / "not.gguf").write_bytes(b"nonsense" * 10)
    assert "is not a GGUF file (it does not begin with GGUF)" in refused(options(tmp_path / "not.gguf")).cause
    for kept in (0.01, 0.3, 0.9, 0.995):  # within the header, the tensors' list, the tensors
        cut = write_gguf(tmp_path / f"cut{kept}.gguf")
        os.truncate(cut, int(kept * cut.stat().st_size))
        error = refused(options(cut))
        assert f"{cut} cannot be read as GGUF: " in error.cause
        assert error.__cause__ is not None
