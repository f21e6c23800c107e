"""Bad input to `heads`, from the command line to the message: what is wrong and where, and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from mechinterp_cli.cli.main import main
from mechinterp_cli.models.quiet import quiet
from tests.families import build
from tests.models_files import tiny_llama, write_folder
from tests.refusing import changed, check_refused

GOOD = """\
name: bad
model: {id: toy-induction}
task: {name: repeats, n: 8, block: 6, repeats: 2}
heads:
  scores: [induction, copying]
  layers: [0, 1]
  causal:
    scores: [induction]
    k: [1]
    random: 3
    prompts: 3
output: {figures: []}
"""
NO_REPEATS = "task: {name: induction, n: 4, block: 6, prefix: 2}"
REPEATS = "task: {name: repeats, n: 8, block: 6, repeats: 2}"
ABLATIONS = GOOD[GOOD.index("  causal:") : GOOD.index("output:")]
KEYS = "`mechinterp schema` prints every key"
Refused = Callable[..., None]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own, so that paths in messages are short and `runs` begins empty."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a config and checks how it ends."""

    def check(config: str, cause: str, remedy: str, *arguments: str, command: str = "heads") -> None:
        check_refused(capfd, command, config, cause, remedy, *arguments)

    return check


def test_the_config_that_the_cases_damage_is_good(capfd: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(GOOD)
    assert main(["heads", "c.yaml", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert [str(path) for path in Path("runs").iterdir()] == [out.removesuffix("\n")]


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        pytest.param(
            (REPEATS, NO_REPEATS),
            "c.yaml:5: heads.scores[0]: induction needs a block of tokens and its repetition, task induction has none",
            "Use the task repeats, or the score prefix_matching.",
            id="induction without repeats",
        ),
        pytest.param(
            (REPEATS, NO_REPEATS, "  scores: [induction, copying]\n", "  scores: [copying]\n"),
            "c.yaml:8: heads.causal.scores[0]: induction needs a block of tokens and its repetition",
            "Use the task repeats",
            id="induction without repeats is to be proved",
        ),
        pytest.param(
            ("    scores: [induction]", "    scores: [copying, prefix_matching]"),
            "c.yaml:8: heads.causal.scores[1]: prefix_matching is not among heads.scores",
            "Add it there, or choose from induction, copying.",
            id="proof of a score that is not asked for",
        ),
        pytest.param(
            ("[0, 1]", "[0, 2]"),
            "c.yaml:6: heads.layers[1]: 2 is outside 0..1",
            "toy-induction has 2 layers, counted from 0.",
            id="layer out of range",
        ),
        pytest.param(("[0, 1]", "[1, 1]"), "listed twice: 1", KEYS, id="layer twice"),
        pytest.param(
            ("[0, 1]", "[-1]"), "c.yaml:6: heads.layers[0]: -1 is not valid; allowed: at least 0", KEYS, id="layer -1"
        ),
        pytest.param(
            ("prompts: 3", "prompts: 9"),
            "c.yaml:11: heads.causal.prompts: 9 prompts are asked for, and 8 of 8 have both a repeated pair of tokens "
            "and tokens that occur for the first time",
            "Lower it, raise task.n, or use the task repeats.",
            id="too few prompts",
        ),
        pytest.param(
            ("prompts: 3", "prompts: 8"),
            "c.yaml:11: heads.causal.prompts: all 8 prompts would be kept for ablations, and none left to be scored",
            "Lower it, or raise task.n.",
            id="all prompts are kept",
        ),
        pytest.param(
            ("block: 6", "block: 33"),
            "c.yaml:3: task.block: 2 x 33 tokens are more than the model's context of 64",
            "Lower task.block or task.repeats.",
            id="longer than the context",
        ),
        pytest.param(
            ("block: 6", "block: 65", "toy-", "planted-"),
            "c.yaml:3: task.block: 65 different tokens are needed, and this tokenizer has 64 ordinary ones",
            "Lower task.block.",
            id="vocabulary too small",
        ),
        pytest.param(
            ("[induction, copying]", "[induction, direct_effect]"),
            "c.yaml:5: heads.scores[1]: direct_effect needs prompts with an answer and a wrong answer, task repeats",
            "Use a task such as ioi, or leave the score out.",
            id="direct effect without answers",
        ),
        pytest.param(
            ("repeats: 2}", "repeats: 2, keep: correct}"),
            "c.yaml:3: task.keep: 'correct' is not valid; task repeats has no answers that could be correct",
            KEYS,
            id="keep correct",
        ),
        pytest.param(
            ("output:", "metrics: [logit_diff]\noutput:"),
            'c.yaml:12: metrics: ["logit_diff"] is not valid; heads measures repeated_loss, loss_gap, first_loss, '
            "and nothing else can be chosen",
            "Leave the key out.",
            id="metrics",
        ),
        pytest.param(
            ("k: [1]", "k: []"), "c.yaml:9: heads.causal.k: [] is not valid; allowed: at least 1 item", KEYS, id="no k"
        ),
        pytest.param(
            ("k: [1]", "k: [0]"), "c.yaml:9: heads.causal.k[0]: 0 is not valid; allowed: at least 1", KEYS, id="k 0"
        ),
        pytest.param(
            ("k: [1]", "k: [2, 1, 2]"),
            "c.yaml:9: heads.causal.k: [2, 1, 2] is not valid; listed twice: 2",
            KEYS,
            id="k twice",
        ),
        pytest.param(
            ("k: [1]", "k: 2"),
            "c.yaml:9: heads.causal.k: 2 is not valid; allowed: a list",
            "Write it as a list: [2].",
            id="k is no list",
        ),
        pytest.param(
            ("[induction, copying]", "[inductoin, copying]"),
            "c.yaml:5: heads.scores[0]: 'inductoin' is not valid; allowed: previous_token, duplicate_token, induction",
            "Did you mean 'induction'?",
            id="unknown score",
        ),
        pytest.param(
            ("[induction, copying]", "[copying, copying]"),
            'c.yaml:5: heads.scores: ["copying", "copying"] is not valid; listed twice: copying',
            KEYS,
            id="score twice",
        ),
        pytest.param(
            ("  scores: [induction, copying]", "  score: [induction]"),
            "c.yaml:5: heads.score: unknown key",
            "Did you mean 'scores'?",
            id="unknown key",
        ),
        pytest.param(
            ("random: 3", "values: [median]"),
            "c.yaml:10: heads.causal.values[0]: 'median' is not valid; allowed: zero or mean",
            "Did you mean 'mean'?",
            id="unknown ablation",
        ),
        pytest.param(
            ("random: 3", "margin: 0"),
            "c.yaml:10: heads.causal.margin: 0 is not valid; allowed: more than 0",
            KEYS,
            id="no margin",
        ),
        pytest.param(
            ("random: 3", "random: 0"),
            "c.yaml:10: heads.causal.random: 0 is not valid; allowed: at least 1",
            KEYS,
            id="no random heads",
        ),
        pytest.param(
            (REPEATS, "task: {name: text, texts: [k1 k2 k1 k2, k3 k4 k5]}", "[induction, copying]", "[copying]")
            + ("    scores: [induction]", "    scores: [copying]"),
            "c.yaml:11: heads.causal.prompts: 3 prompts are asked for, and 1 of 2 have both a repeated pair of tokens",
            "use the task repeats.",
            id="texts without repetition",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    refused: Refused, change: tuple[str, ...], cause: str, remedy: str
) -> None:
    refused(changed(GOOD, *change), cause, remedy)


def test_kept_prompts_have_no_meaning_where_there_are_answers_either(refused: Refused) -> None:
    task = NO_REPEATS.replace("}", ", keep: correct}")
    config = changed(GOOD, REPEATS, task, "[induction, copying]", "[copying]", ABLATIONS, "")
    refused(config, "c.yaml:3: task.keep: correct has no meaning for heads, which scores all prompts", "Leave the key")


def test_an_override_is_named_in_place_of_a_line(refused: Refused) -> None:
    cause = "--set heads.layers=[7]: heads.layers[0]: 7 is outside 0..1"
    refused(GOOD, cause, "toy-induction has 2 layers", "--set", "heads.layers=[7]")


def test_a_config_without_the_section_or_with_another(refused: Refused) -> None:
    nothing = GOOD[: GOOD.index("heads:")] + GOOD[GOOD.index("output:") :]
    refused(
        nothing,
        "c.yaml: no method section; one of these is needed: ablate, attribute, circuit, heads, patch, probe",
        "Add a section such as `heads:`.",
    )
    patch = nothing + "patch: {sites: [{kind: z}]}\n"
    refused(patch, "c.yaml:5: this config is for `patch`, not for `heads`", "Run: mechinterp patch c.yaml")
    refused(GOOD, "c.yaml:4: this config is for `heads`, not for `patch`", "mechinterp heads c.yaml", command="patch")


# --- models


def write_model(model: Any) -> str:
    """Save a model, and give the config that runs on it."""
    write_folder(Path("model"), model)
    return changed(GOOD, "toy-induction", "model")


def sliding(window: int | None) -> MistralForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"vocab_size": 65, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    with quiet():
        config = MistralConfig(**settings, sliding_window=window, bos_token_id=None, eos_token_id=None)
        return MistralForCausalLM(config)


def test_prompts_beyond_a_sliding_window(refused: Refused, capfd: pytest.CaptureFixture[str]) -> None:
    refused(
        write_model(sliding(8)),
        "c.yaml:3: task: a prompt of 12 tokens is longer than the 8 tokens that attention sees back (sliding window or "
        "chunk) in layers 0, 1",
        "Use prompts of at most 8 tokens.",
    )
    # Prompts that fit are taken, and so are scores that read no attention.
    assert main(["heads", "c.yaml", "--quiet", "--set", "task.block=4"]) == 0
    weights = ["--set", "heads.scores=[copying]", "--set", "heads.causal.scores=[copying]"]
    assert main(["heads", "c.yaml", "--quiet", *weights]) == 0
    assert capfd.readouterr().err == ""


def test_layers_that_see_further_than_a_window_are_offered(refused: Refused) -> None:
    config = changed(write_model(build("gemma2")), "[0, 1]", "all")
    cause = "a prompt of 12 tokens is longer than the 5 tokens that attention sees back (sliding window or chunk) in "
    refused(config, cause + "layers 0, 2", "Use prompts of at most 5 tokens, or take layers that see further (1).")


def test_a_model_without_heads(refused: Refused) -> None:
    config = changed(write_model(build("mamba")), "[0, 1]", "all")
    refused(config, "c.yaml:4: heads: no layer has an attention pattern: this layer's attention ", "Use another model.")
    refused(
        changed(config, "[induction, copying]", "[copying]", "    scores: [induction]", "    scores: [copying]"),
        "c.yaml:4: heads: no layer has an attention pattern: ",
        "Use another model.",
    )


def test_heads_whose_attention_cannot_be_read_have_scores_of_weights(
    refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_model(build("gptj"))
    remedy = "Use another model, or scores of weights alone: scores: [copying]."
    refused(config, "c.yaml:4: heads: no layer has an attention pattern: ", remedy)
    weights = ["--set", "heads.scores=[copying]", "--set", "heads.causal.scores=[copying]"]
    assert main(["heads", "c.yaml", "--quiet", *weights]) == 0
    assert capfd.readouterr().err == ""


def test_direct_effects_of_heads_whose_attention_cannot_be_read_are_scored_and_not_drawn(
    refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    del refused  # makes the folder that the model is written to
    Path("c.yaml").write_text(write_model(build("gptj")))
    asked = ["heads.scores=[direct_effect]", "heads.causal=null", "task={name: induction, n: 4, block: 6}"]
    assert main(["heads", "c.yaml", "--quiet", *[part for one in asked for part in ("--set", one)]]) == 0
    run = Path(capfd.readouterr().out.strip())
    assert (run / "scores.parquet").exists()
    assert not (run / "patterns.parquet").exists()


def test_a_layer_of_another_kind_is_named(refused: Refused) -> None:
    config = changed(write_model(build("qwen3_next")), "[0, 1]", "[1, 2]")
    refused(config, "c.yaml:6: heads.layers[1]: layer 2 has no attention pattern: ", "Layers that have one: 1.")


def test_nan_in_the_weights_is_found(capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    Path("c.yaml").write_text(write_model(model))
    assert main(["heads", "c.yaml"]) != 0
    err = capfd.readouterr().err
    assert "error: " in err
    assert "Traceback" not in err
    assert "NaN" in err
