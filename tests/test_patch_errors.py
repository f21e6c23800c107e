"""Bad input from the command line to the message: what is wrong and where, what to do; and nothing is left behind."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import LlamaForCausalLM

from mechinterp_cli.cli.main import main
from mechinterp_cli.runs.manifest import Manifest
from tests.models_files import tiny_llama, write_folder
from tests.test_models_load import cut_weights, drop_weights, poison, to_pickle

TOY = Path(__file__).parent.parent / "configs" / "patch-induction-toy.yaml"

GENERATED = """\
name: bad
model: {id: toy-induction}
task:
  name: induction
  n: 4
  block: 6
  prefix: 2
patch:
  direction: denoise
  sites:
    - kind: resid_pre
      layers: [0, 1]
      positions: all
    - kind: z
      layers: all
      positions: all
metrics: [logit_diff]
output: {figures: []}
"""

INLINE = """\
name: bad
model: {id: toy-induction}
task:
  keep: all
  prompts:
    - {clean: k1 k2 k3 k4 k1 k2, corrupt: k1 k9 k3 k4 k1 k2, answer: k3, wrong_answer: k4}
    - {clean: k5 k6 k7 k8 k5 k6, corrupt: k5 k9 k7 k8 k5 k6, answer: k7, wrong_answer: k8}
patch:
  direction: noise
  source: pair
  sites: [{kind: resid_pre, positions: all}]
output: {figures: []}
"""

FILE = INLINE[: INLINE.index("  keep")] + "  file: prompts.csv\n" + INLINE[INLINE.index("patch:") :]
ROWS = "clean,corrupt,answer,wrong_answer\nk1 k2 k3 k4 k1 k2,k1 k9 k3 k4 k1 k2,k3,k4\n"
MODEL = GENERATED.replace("toy-induction", "model")
TRACING = "  tracing: {span: matched, draws: 2}\n  direction: denoise\n"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own, so that paths in messages are short and `runs` begins empty."""
    monkeypatch.chdir(tmp_path)


def patch(config: str | bytes, *arguments: str) -> int:
    """Run `mechinterp patch` on a config that is written first."""
    Path("c.yaml").write_bytes(config.encode() if isinstance(config, str) else config)
    return main(["patch", "c.yaml", *arguments])


def changed(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


Refused = Callable[..., None]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a config and checks how it ends: one line of cause, one of remedy, exit 2, no run directory."""

    def check(config: str | bytes, cause: str, remedy: str, *arguments: str) -> None:
        assert patch(config, *arguments) == 2
        out, err = capfd.readouterr()
        lines = err.splitlines()
        assert [line.split(": ")[0] for line in lines if line.startswith(("error:", "fix:"))] == ["error", "fix"]
        assert cause in lines[-2]
        assert lines[-2].startswith("error: ")
        assert remedy in lines[-1]
        assert "Traceback" not in err
        assert out == ""
        assert not Path("runs").exists() or not list(Path("runs").iterdir())

    return check


@pytest.mark.parametrize("config", [GENERATED, INLINE, FILE, changed(INLINE, "  direction: noise\n", "")])
def test_the_configs_that_the_cases_damage_are_good(config: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("prompts.csv").write_text(ROWS)
    assert patch(config, "--quiet", "--set", "stats.bootstrap=100") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert [str(path) for path in Path("runs").iterdir()] == [out.removesuffix("\n")]


@pytest.mark.parametrize(
    ("old", "new", "cause", "remedy"),
    [
        pytest.param("  prefix: 2", "  prefx: 2", "c.yaml:7: task.prefx: unknown key", "'prefix'?", id="unknown key"),
        pytest.param(
            "      layers: [0, 1]",
            "      layer: [0, 1]",
            "c.yaml:12: patch.sites[0].layer: unknown key",
            "Did you mean 'layers'?",
            id="unknown key of a site",
        ),
        pytest.param(
            "  n: 4",
            "  n: 4\n  n: 5",
            "c.yaml:6: the key 'n' stands twice (first at c.yaml:5)",
            "Remove one of them.",
            id="duplicate key",
        ),
        pytest.param(
            "  n: 4",
            '  n: "4"',
            "c.yaml:5: task.n: '4' is not valid; allowed: a whole number",
            "Write it without quotes.",
            id="wrong type",
        ),
        pytest.param(
            "[0, 1]",
            "1",
            "c.yaml:12: patch.sites[0].layers: 1 is not valid; allowed: all or a list or a mapping",
            "Write it as a list: [1].",
            id="wrong type of layers",
        ),
        pytest.param(
            "[0, 1]",
            "al",
            "c.yaml:12: patch.sites[0].layers: 'al' is not valid; allowed: all or a list or a mapping",
            "Did you mean 'all'?",
            id="misspelt value",
        ),
        pytest.param(
            "kind: z",
            "kind: z\n      heads: [[]]",
            "c.yaml:15: patch.sites[1].heads[0]: [] is not valid; allowed: a whole number or at least 1 item",
            "mechinterp schema",
            id="group of no heads",
        ),
        pytest.param(
            "bad",
            "../bad",
            "c.yaml:1: name: '../bad' is not valid; allowed: letters, digits",
            "mechinterp schema",
            id="run name with a path",
        ),
        pytest.param(
            "[0, 1]",
            "[0, 2]",
            "c.yaml:12: patch.sites[0].layers[1]: 2 is outside 0..1",
            "toy-induction has 2 layers, counted from 0.",
            id="layer",
        ),
        pytest.param(
            "[0, 1]",
            "[0, -1]",
            "c.yaml:12: patch.sites[0].layers[1]: -1 is not valid; allowed: at least 0",
            "mechinterp schema",
            id="layer below 0",
        ),
        pytest.param(
            "kind: z",
            "kind: z\n      heads: [0, [1, 4]]",
            "c.yaml:15: patch.sites[1].heads[1]: 4 is outside 0..3",
            "toy-induction has 4 heads in layer 0, counted from 0.",
            id="head",
        ),
        pytest.param(
            "kind: z",
            "kind: neuron\n      neurons: [128]",
            "c.yaml:15: patch.sites[1].neurons[0]: 128 is outside 0..127",
            "toy-induction has 128 neurons in layer 0, counted from 0.",
            id="neuron",
        ),
        pytest.param(
            "      positions: all\n    - ",
            "      positions: [0, 11]\n    - ",
            "c.yaml:13: patch.sites[0].positions[1]: 11 is outside 0..10",
            "The shortest prompt has 11 tokens, counted from 0.",
            id="position",
        ),
        pytest.param(
            "kind: z",
            "kind: pattern\n      keys: [11]",
            "c.yaml:15: patch.sites[1].keys: 11 is outside 0..10",
            "The shortest prompt has 11 tokens",
            id="key position",
        ),
        pytest.param(
            "      positions: all\n    - ",
            "      positions: [end, S2]\n    - ",
            "c.yaml:13: patch.sites[0].positions[1]: span 'S2' of task 'induction' does not exist; "
            "there are copied, end, matched",
            "A neighbour is written",
            id="span",
        ),
        pytest.param(
            "  direction: denoise",
            "  tracing: {span: subject}",
            "c.yaml:9: patch.tracing.span: span 'subject' of task 'induction' does not exist; there are copied, end",
            "A neighbour is written",
            id="span of tracing",
        ),
        pytest.param(
            "  direction: denoise",
            "  direction: noise\n  tracing: {span: matched}",
            "c.yaml:10: patch.tracing: causal tracing restores clean activations: direction denoise, source pair",
            "Leave out direction and source.",
            id="tracing with direction noise",
        ),
        pytest.param(
            "  direction: denoise",
            "  source: mean\n  tracing: {span: matched}",
            "c.yaml:10: patch.tracing: causal tracing restores clean activations",
            "Leave out direction and source.",
            id="tracing with another source",
        ),
        pytest.param(
            "kind: resid_pre",
            "kind: resid_pre\n      heads: each",
            "c.yaml:12: patch.sites[0].heads: resid_pre has no heads",
            "Leave out heads for resid_pre.",
            id="heads of a kind that has none",
        ),
        pytest.param(
            "kind: z",
            "kind: z\n      neurons: [0]",
            "c.yaml:15: patch.sites[1].neurons: z has no neurons",
            "Leave out neurons for z.",
            id="neurons of a kind that has none",
        ),
        pytest.param(
            "kind: z",
            "kind: z\n      keys: [end]",
            "c.yaml:15: patch.sites[1].keys: z has no keys",
            "Leave out keys, or use scores or pattern.",
            id="keys of a kind that has none",
        ),
        pytest.param(
            "[logit_diff]",
            "[prob, logit_dif]",
            "c.yaml:17: metrics: 'logit_dif' is not a metric",
            "logit_diff",
            id="unknown metric",
        ),
        pytest.param(
            "bad\nmodel: {id: toy-induction}",
            "&a [lol, lol]\nmodel: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nmore: [*b, *b, *b, *b, *b, *b, *b, *b]",
            "c.yaml:1: anchors and aliases are not allowed (&a)",
            "Write the value out in full.",
            id="alias bomb",
        ),
    ],
)
def test_bad_config(refused: Refused, old: str, new: str, cause: str, remedy: str) -> None:
    refused(changed(GENERATED, old, new), cause, remedy)


def test_what_set_asks_for_is_named_as_such(refused: Refused) -> None:
    override = "patch.sites[0].layers=[7]"
    cause = f"error: --set {override}: patch.sites[0].layers[0]: 7 is outside 0..1"
    refused(GENERATED, cause, "toy-induction has 2 layers", "--set", override)
    cause = "error: c.yaml:3: task induction: a prompt needs 73 different tokens and this tokenizer has 64 ordinary"
    refused(GENERATED, cause, "Lower task.block or task.prefix.", "--set", "task.block=70")


@pytest.mark.parametrize(
    ("config", "cause", "remedy"),
    [
        (b"", "error: c.yaml: the file is empty", "`mechinterp init patch` writes one to start from."),
        (GENERATED.encode() + b"# \xff\n", "error: c.yaml:19: byte 0xff is not UTF-8", "Save the file as UTF-8 text."),
    ],
    ids=["empty", "not UTF-8"],
)
def test_config_file_that_cannot_be_read(refused: Refused, config: bytes, cause: str, remedy: str) -> None:
    refused(config, cause, remedy)


@pytest.mark.parametrize(
    ("old", "new", "cause", "remedy"),
    [
        pytest.param(
            "k5 k9 k7 k8 k5 k6",
            "k5 k9 k7 k8 k5 k6 k1",
            "error: c.yaml:7: task.prompts[1]: clean has 6 tokens and corrupt has 7; they part at token 1: ['k6', ",
            "Replace words by words of as many tokens.",
            id="unequal lengths",
        ),
        pytest.param(
            "answer: k7",
            "answer: k7 k8",
            "error: c.yaml:7: task.prompts[1]: answer 'k7 k8' is 2 tokens: 'k7', 'k8'",
            "Choose an answer of one token, or set task.answer_tokens to first.",
            id="answer of two tokens",
        ),
        pytest.param(
            "wrong_answer: k8",
            "wrong_answer: k7",
            "error: c.yaml:7: task.prompts[1]: 'k7' is both answer and wrong_answer",
            "Give two different answers.",
            id="same answers",
        ),
        pytest.param(
            "corrupt: k5 k9 k7 k8 k5 k6, ",
            "",
            "error: c.yaml:8: patch: prompt 1 has no corrupted twin",
            "Give every prompt a `corrupt`, or use direction: noise with source: other, mean or zero.",
            id="source pair without corrupt",
        ),
        pytest.param(
            "  keep: all\n",
            "  n: 1\n",
            "error: c.yaml:10: patch.source: other needs two prompts of each template and length",
            "Raise task.n, or use another source.",
            id="source other of a single prompt",
        ),
        pytest.param(
            ", wrong_answer: k8",
            "",
            "error: c.yaml: metrics: logit_diff needs a wrong answer, and prompt 1 of task 'prompts' has none",
            "Give every prompt a `wrong_answer`",
            id="no wrong answer",
        ),
    ],
)
def test_bad_prompts(refused: Refused, old: str, new: str, cause: str, remedy: str) -> None:
    config = changed(INLINE, old, new)
    refused(changed(config, "source: pair", "source: other") if "n: 1" in new else config, cause, remedy)


def test_keeping_what_is_right_where_nothing_is(refused: Refused) -> None:
    config = changed(INLINE, "keep: all", "keep: correct")
    for right, wrong in (("k3", "k4"), ("k7", "k8")):
        config = changed(config, f"answer: {right}, wrong_answer: {wrong}", f"answer: {wrong}, wrong_answer: {right}")
    refused(config, "error: c.yaml:4: task.keep: the model gets none of the 2 prompts right", "Use keep: all")


def test_tracing_where_no_answer_is_the_first_choice(refused: Refused) -> None:
    config = changed(GENERATED, "  direction: denoise\n", TRACING)
    override = "model.revision=step0"
    cause = "error: c.yaml:9: patch.tracing: the answer is the model's first choice on none of the 4 prompts"
    refused(config, cause, "Use other prompts, or another model.", "--set", override)


@pytest.mark.parametrize(
    ("data", "cause", "remedy"),
    [
        (b"", "error: prompts.csv: has no prompts", "Give it at least one row."),
        (
            ROWS.replace(",answer", ",reply").encode(),
            "error: prompts.csv line 2: column 'answer' is missing; there are clean, corrupt, reply, wrong_answer",
            "Name it so in the first row.",
        ),
        (
            ROWS.encode() + b"k1 \xff,k1,k2,k3\n",
            "error: prompts.csv line 3: byte 79 (0xff) is not UTF-8",
            "Save the file as UTF-8.",
        ),
        (
            (ROWS + "k1 k2,k1 k2 k3,k4,k5\n").encode(),
            "error: prompts.csv line 3: clean has 2 tokens and corrupt has 3",
            "Replace words by words of as many tokens.",
        ),
        (None, "error: c.yaml:4: task.file: 'prompts.csv' does not exist", "Give the path of a .csv"),
    ],
    ids=["empty", "missing column", "not UTF-8", "unequal lengths", "missing"],
)
def test_bad_prompt_file(refused: Refused, data: bytes | None, cause: str, remedy: str) -> None:
    if data is not None:
        Path("prompts.csv").write_bytes(data)
    refused(FILE, cause, remedy)


def test_a_prompt_file_that_is_called_like_a_section_is_no_key(refused: Refused) -> None:
    Path("task.csv").write_text("")
    refused(changed(FILE, "prompts.csv", "task.csv"), "error: task.csv: has no prompts", "Give it at least one row.")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder: two query heads and one key/value head."""
    config = tiny_llama().config
    config.num_key_value_heads = 1
    return write_folder(tmp_path_factory.mktemp("models") / "whole", LlamaForCausalLM(config))


@pytest.mark.parametrize(
    ("damage", "cause", "remedy"),
    [
        (drop_weights, "c.yaml:2: model.id: model has a config.json but no weights", "Put model.safetensors"),
        (
            cut_weights,
            "c.yaml:2: model.id: model/model.safetensors is damaged or cut short (5000 bytes)",
            "Copy or download the file again.",
        ),
        (
            to_pickle,
            "c.yaml:2: model.id: model has its weights only as pickle (pytorch_model.bin), which can hold code",
            "Convert them to model.safetensors, or set model.allow_pickle: true",
        ),
        (
            poison,
            "c.yaml:2: model.id: model: model.layers.1.mlp.down_proj.weight (layer 1) holds 2 NaN or infinite values",
            "The file is damaged: download it again.",
        ),
    ],
    ids=["no weights", "corrupt safetensors", "pickle", "NaN"],
)
def test_bad_model_folder(
    refused: Refused, whole: Path, damage: Callable[[Path], None], cause: str, remedy: str
) -> None:
    shutil.copytree(whole, "model")
    damage(Path("model"))
    refused(MODEL, f"error: {cause}", remedy)


@pytest.mark.parametrize(
    ("kind", "cause", "remedy"),
    [
        ("q", None, ""),
        ("k", "c.yaml:15: patch.sites[1].heads[0]: 1 is outside 0..0", "model has 1 key/value heads in layer 0"),
        ("v", "c.yaml:15: patch.sites[1].heads[0]: 1 is outside 0..0", "model has 1 key/value heads in layer 0"),
    ],
)
def test_heads_of_a_grouped_model(refused: Refused, whole: Path, kind: str, cause: str | None, remedy: str) -> None:
    shutil.copytree(whole, "model")
    config = changed(MODEL, "kind: z", f"kind: {kind}\n      heads: [1]")
    if cause is None:
        assert patch(config, "--dry-run") == 0
    else:
        refused(config, cause, remedy)


@pytest.mark.parametrize(("offline", "why"), [(True, "HF_HUB_OFFLINE is set"), (False, "the hub cannot be reached")])
def test_unknown_model(refused: Refused, monkeypatch: pytest.MonkeyPatch, offline: bool, why: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "hub")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    config = changed(GENERATED, "toy-induction", "no-such-org/no-such-model")
    cause = (
        "error: c.yaml:2: model.id: 'no-such-org/no-such-model' is not a name from `mechinterp models`, a local folder "
        f"or a .gguf file, it is not in the local Hugging Face cache, and {why}"
    )
    refused(config, cause, "Correct the id. Names that need no download: see `mechinterp models`.")


def test_model_that_was_not_fetched(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHINTERP_CACHE", "cache")
    config = changed(GENERATED, "toy-induction", "smollm2-135m-instruct")
    cause = "error: c.yaml:2: model.id: smollm2-135m-instruct is not at hand (looked in cache/models)"
    refused(config, cause, "fix: Run: mechinterp models fetch smollm2-135m-instruct")


@pytest.mark.parametrize("arguments", [("--out", "taken"), ("--set", "output.dir=taken")])
def test_output_folder_that_is_a_file(refused: Refused, arguments: tuple[str, str]) -> None:
    Path("taken").write_text("mine")
    refused(GENERATED, "error: taken: the output folder is a file", "Choose another folder with --out", *arguments)
    refused(
        GENERATED,
        "error: taken/below: the output folder is not writable: Not a directory",
        "Choose another folder with --out, or `output.dir` in the config.",
        *(argument.replace("taken", "taken/below") for argument in arguments),
    )
    assert Path("taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("full", "status", "names", "also"),
    [
        ("results.parquet", "failed", "results.parquet", ""),
        ("", "running", "results.parquet", "the manifest could not be written either: "),
    ],
    ids=["for one file", "from then on"],
)
def test_full_disk(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, full: str, status: str, names: str, also: str
) -> None:
    real, seen = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        seen.append(target.name)
        if names in seen and full in target.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    assert patch(GENERATED) == 1
    out, err = capfd.readouterr()
    (run,) = Path("runs").iterdir()
    lines = [line for line in err.splitlines() if line.startswith(("error:", "fix:"))]
    assert lines[0] == f"error: {run / names}: cannot be written: No space left on device"
    assert lines[-1] == "fix: Free space there, or choose another folder with --out."
    assert also in lines[-2]
    assert len(lines) == (3 if also else 2)
    assert (out, "Traceback" in err) == ("", False)
    manifest = Manifest.read(run)
    assert manifest.status == status
    assert status == "running" or f"{run / names}: cannot be written" in str(manifest.error)
    assert not list(run.rglob("*.tmp"))
    assert not (run / names).exists()
    assert (run / "prompts.parquet").exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A child process takes Ctrl-C, also where whoever started the suite ignores it (a background job)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_the_middle_of_a_run() -> None:
    command = [sys.executable, "-m", "mechinterp_cli", "patch", str(TOY), "--set", "task.n=4000", "--out", "runs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(Path("runs").glob("*/manifest.json")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    (run,) = Path("runs").iterdir()
    assert process.returncode == 130
    manifest = Manifest.read(run)
    assert (manifest.status, manifest.error) == ("interrupted", "stopped by Ctrl-C")
    assert out == ""
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith(("error", "fix"))] == [
        "error: stopped by Ctrl-C",
        "fix: A run that had begun says `interrupted` in its manifest; `mechinterp resume RUN` goes on.",
    ]
    assert not (run / "summary.parquet").exists()
