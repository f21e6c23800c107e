"""Loading: what is loaded is what the files hold, and every fault says what it is and what to do."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.load import check_finite, find_device, load_model
from mechinterp_cli.models.loaded import LoadedModel
from tests.models_files import tiny_llama, write_folder, write_gguf
from tests.models_fixtures import options, refused, smollm2

__all__ = ["smollm2"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of a whole model folder, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_folder_gives_the_model_that_was_saved(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(options(whole))
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, tiny_llama()(tokens).logits)
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert capsys.readouterr() == ("", "")


def test_the_source_says_what_was_loaded(whole: Path) -> None:
    from hashlib import sha256

    source = load_model(options(whole, attn_implementation="eager")).source
    digest = sha256((whole / "model.safetensors").read_bytes()).hexdigest()
    assert source.weight_files == {"model.safetensors": digest}
    assert (source.path, source.dtype, source.device, source.attn_implementation) == (
        "folder",
        "float32",
        "cpu",
        "eager",
    )
    assert (source.allow_pickle, source.trust_remote_code, source.revision) == (False, False, None)


def test_the_tokenizer_hash_follows_the_tokenizer(folder: Path) -> None:
    before = load_model(options(folder)).source.tokenizer_sha256
    assert load_model(options(folder)).source.tokenizer_sha256 == before
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"k5"', '"five"'), encoding="utf-8")
    assert load_model(options(folder)).source.tokenizer_sha256 != before


def test_dtype_converts_the_weights_and_leaves_rotary_frequencies(whole: Path) -> None:
    for model_id in (str(whole), "toy-induction"):
        model = load_model(options(model_id, dtype="bfloat16")).model
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert {
            name: b.dtype for name, b in model.named_buffers() if "inv_freq" in name and b.dtype != torch.float32
        } == {}


@pytest.mark.parametrize("name", ["toy-induction", "planted-induction"])
def test_bundled_models_need_neither_network_nor_cache(
    name: str, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "nothing"))
    loaded = load_model(options(name))
    assert loaded.source.path == "zoo"
    assert loaded.source.weight_files
    assert not (tmp_path / "nothing").exists()


def test_a_checkpoint_is_chosen_by_revision() -> None:
    first, last = load_model(options("toy-induction", revision="step0")), load_model(options("toy-induction"))
    assert (first.source.revision, last.source.revision) == ("step0", "step1500")
    assert first.source.weight_files != last.source.weight_files


def test_a_zoo_name_wins_over_a_folder_of_that_name(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "toy-induction")
    shutil.copytree(whole, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert load_model(options("toy-induction")).source.path == "zoo"
    assert load_model(options("org/name")).source.path == "folder"


def test_a_hub_id_is_served_from_the_cache(whole: Path, hub_cache: Path) -> None:
    repository = hub_cache / "models--org--name"
    shutil.copytree(whole, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    source = load_model(options("org/name")).source
    assert (source.path, source.revision, list(source.weight_files)) == ("hub", COMMIT, ["model.safetensors"])
    error = refused(options("org/name", revision="other"))
    assert "HF_HUB_OFFLINE is set" in error.cause


def test_a_hub_model_without_safetensors_names_the_choice(whole: Path, hub_cache: Path) -> None:
    snapshot = hub_cache / "models--org--name" / "snapshots" / COMMIT
    shutil.copytree(whole, snapshot)
    to_pickle(snapshot)
    error = refused(options("org/name", revision=COMMIT))
    assert error.cause.startswith("model.id: org/name has no safetensors weights in ")
    assert error.remedy.startswith("Set model.allow_pickle: true if it has pickle weights")
    loaded = load_model(options("org/name", revision=COMMIT, allow_pickle=True))
    assert list(loaded.source.weight_files) == ["pytorch_model.bin"]


def test_unknown_id_says_what_was_tried(hub_cache: Path) -> None:
    error = refused(options("no-such-org/no-such-model"))
    assert error.cause == (
        "model.id: 'no-such-org/no-such-model' is not a name from `mechinterp models`, a local folder or a .gguf "
        "file, it is not in the local Hugging Face cache, and HF_HUB_OFFLINE is set"
    )
    assert "mechinterp models" in error.remedy
    assert error.__cause__ is not None


def test_unreachable_hub_is_called_that(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached" in refused(options("no-such-org/no-such-model")).cause


def test_a_name_the_hub_cannot_have(hub_cache: Path) -> None:
    assert "Hugging Face has no model of that name" in refused(options("not a name")).cause


@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such-folder", "a/b/c", "no-such-file.gguf"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(path: str) -> None:
    assert refused(options(path)).cause == f"model.id: there is no folder and no .gguf file {path}"


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def empty_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def scribble_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def lose_parameter(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))


def lose_shard(folder: Path) -> None:
    drop_weights(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_index(folder: Path) -> None:
    drop_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def poison(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "no_such_model", "auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_x.py").write_text(f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n")


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    drop_weights(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_config, "has no config.json\nGive a folder as transformers' save_pretrained writes it."),
        (break_config, "config.json is not valid JSON: "),
        (empty_config, "config.json does not say its model_type"),
        (unknown_architecture, "transformers cannot read the model in "),
        (drop_weights, "has a config.json but no weights\nPut model.safetensors (or its shards) there."),
        (cut_weights, "model.safetensors is damaged or cut short (5000 bytes): "),
        (scribble_weights, "model.safetensors is damaged or cut short (64 bytes): "),
        (lose_parameter, "lack 1 of the model's parameters, first model.layers.1.mlp.down_proj.weight; they would be"),
        (other_shape, "transformers cannot read the model in "),
        (lose_shard, "lacks model-00001-of-00002.safetensors, one of 2 files that model.safetensors.index.json names"),
        (break_index, "model.safetensors.index.json cannot be read: "),
        (drop_tokenizer, "has no tokenizer (none of tokenizer.json, "),
        (break_tokenizer, "the tokenizer in "),
        (
            poison,
            "model.layers.1.mlp.down_proj.weight (layer 1) holds 2 NaN or infinite values of 2048, read as float32",
        ),
        (
            own_code,
            "brings its own Python code (modeling_x.Model), which is not run unless asked for\nRead the code in",
        ),
        (
            to_pickle,
            "has its weights only as pickle (pytorch_model.bin), which can hold code\nConvert them to model.saf",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_folders(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    error = refused(options(folder))
    assert message in str(error)
    assert str(folder) in str(error)
    assert not (folder / "ran").exists()


def test_pickle_is_read_when_asked_for(folder: Path) -> None:
    to_pickle(folder)
    source = load_model(options(folder, allow_pickle=True)).source
    assert (list(source.weight_files), source.allow_pickle) == (["pytorch_model.bin"], True)


def test_a_pickle_with_code_in_it_never_runs(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "ran",)  # what a pickle may call when it is read

    drop_weights(folder)
    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    assert "a pickle file in" in refused(options(folder, allow_pickle=True)).cause
    assert not (folder / "ran").exists()


def test_own_code_runs_only_when_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((folder / "config.json").read_text())
    places = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own_llama", "auto_map": places}))
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert "(modeling_own.OwnModel), which is not run unless asked for" in refused(options(folder)).cause
    assert not (tmp_path / "modules").exists()
    loaded = load_model(options(folder, trust_remote_code=True))
    assert type(loaded.model).__name__ == "OwnModel"
    assert loaded.source.trust_remote_code


def test_overflow_in_half_precision_is_named() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    check_finite(model, options("x"))
    half = tiny_llama()
    half.load_state_dict(model.state_dict())
    for weight in half.parameters():
        weight.data = weight.data.to(torch.float16)
    with pytest.raises(UserError, match=r"lm_head\.weight holds 1 NaN .*read as float16\n.*model\.dtype: float32"):
        check_finite(half, options("x", dtype="float16"))


def test_remote_code_from_the_hub_needs_a_commit(hub_cache: Path) -> None:
    error = refused(options("org/name", trust_remote_code=True, revision="main"))
    assert error.cause.startswith("model.revision: 'main' is not a 40-digit commit")
    assert "cache" in refused(options("org/name", trust_remote_code=True, revision=COMMIT)).cause


@pytest.mark.parametrize("name", ["planted-induction", "folder", "gguf"])
def test_a_revision_where_there_are_none(name: str, whole: Path, tmp_path: Path) -> None:
    model_id = {"folder": str(whole), "gguf": str(write_gguf(tmp_path / "a.gguf"))}.get(name, name)
    error = refused(options(model_id, revision="main"))
    assert error.cause.startswith("model.revision: 'main' is given, but ")


def test_not_fetched_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path))
    error = refused(options("smollm2-135m-instruct"))
    assert error.cause == f"model.id: smollm2-135m-instruct is not at hand (looked in {tmp_path / 'models'})"
    assert error.remedy == "Run: mechinterp models fetch smollm2-135m-instruct"


def test_devices() -> None:
    assert find_device("cpu").type == "cpu"
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(
        UserError, match=r"model\.device: cuda:99 is not there .*sees \d+ CUDA devices\)\nSet model\.dev"
    ):
        find_device("cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a CUDA device where there is none")
def test_cuda_is_not_replaced_by_the_cpu_in_silence(whole: Path) -> None:
    assert "sees 0 CUDA devices" in refused(options(whole, device="cuda")).cause


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": "int8"}, {"device": "gpu"}, {"device": "cuda:x"}, {"allow_pickle": "yes"}, {"id": ""}, {"revison": "x"}],
)
def test_options_refuse_what_they_do_not_know(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ModelOptions.model_validate({"id": "x", **wrong})
    ModelOptions.model_validate({"id": "x"})


def test_every_option_is_described() -> None:
    assert all(field.description for field in ModelOptions.model_fields.values())


@pytest.mark.slow
def test_the_real_model_knows_the_indirect_object(smollm2: LoadedModel) -> None:
    text = "When Mary and John went to the store, John gave a drink to"
    with torch.no_grad():
        logits = smollm2.model(**smollm2.tokenizer(text, return_tensors="pt")).logits[0, -1]
    (mary,) = smollm2.tokenizer(" Mary").input_ids
    assert logits.softmax(-1)[mary] == pytest.approx(0.92, abs=0.02)
