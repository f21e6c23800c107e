"""Path blocks of `patch`, from the YAML file to the tables: numbers against two passes with hooks, and bad input."""

from pathlib import Path as FilePath
from typing import Any

import pytest
import torch

from mechinterp_cli.cli.main import main
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine.circuit_graph import Source, Target
from mechinterp_cli.engine.path_patching import Path
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.run import dry_run
from mechinterp_cli.models.load import load_model
from tests.experiments import INDUCTION, Run, config_of, run_patch
from tests.oracle import Oracle
from tests.path_plain import logits_with

LOGITS = Target("logits", 2)
RECEIVED = (Target("k", 1, 1), Target("q", 1, 3), Target("k", 1, 3), Target("v", 1, 3))
SITE = {"kind": "resid_pre", "layers": [1], "positions": "all"}
BLOCKS: list[dict[str, Any]] = [
    {"path": {"senders": "heads", "receivers": ["logits"]}},
    SITE,
    {"path": {"senders": ["0.1", ["a0.h2", "a0.h3"], "m0"], "receivers": ["1.1.k", "a1.h3"], "rest": "mlps"}},
    {"path": {"senders": ["embed"], "receivers": ["mlp1"], "rest": "free"}},
]


def expected() -> list[Path]:
    """The paths of `BLOCKS`, in the order of their trials."""
    heads = [Path((Source("head", layer, head),), (LOGITS,)) for layer in (0, 1) for head in range(4)]
    senders = [(Source("head", 0, 1),), (Source("head", 0, 2), Source("head", 0, 3)), (Source("mlp", 0),)]
    listed = [Path(some, RECEIVED, "mlps") for some in senders]
    return [*heads, *listed, Path((Source("embed"),), (Target("mlp", 1),), "free")]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle("llama", load_model(ModelOptions(id="toy-induction", attn_implementation="eager")).model)


@pytest.mark.parametrize(
    ("direction", "base", "source"), [("noise", "clean", "corrupt"), ("denoise", "corrupt", "clean")]
)
def test_values_are_those_of_two_passes_with_hooks(
    tmp_path: FilePath, oracle: Oracle, direction: str, base: str, source: str
) -> None:
    run = run_patch(tmp_path, {"direction": direction, "sites": BLOCKS}, metrics=["logit_diff"])
    values: Any = run.values("logit_diff")
    paths = expected()
    assert len(values) == 1 + len(paths)
    right, wrong = run.answers(), run.answers("wrong_answer_ids")
    prompts = torch.arange(len(right))
    into, sent = run.tokens(base), run.tokens(source)
    for trial, path in enumerate(paths, start=1):
        logits = logits_with(oracle, into, sent, path)[:, -1]
        want = logits[prompts, right] - logits[prompts, wrong]
        got = torch.tensor(values.loc[trial].tolist(), dtype=torch.float64)
        torch.testing.assert_close(got, want.double(), rtol=0, atol=1e-4, msg=path.name)
    moved = values.loc[1:].to_numpy(dtype=float) - run.baseline(base, "logit_diff").numpy()
    assert abs(moved).max() > 1


def test_tables_name_the_paths(tmp_path: FilePath) -> None:
    run = run_patch(tmp_path, {"direction": "noise", "sites": BLOCKS}, metrics=["logit_diff"])
    trials: Any = run.table("trials")
    rows = trials[trials["site"] == "path"]
    assert rows["set"].iloc[0] == "a0.h0->logits" and rows["source"].unique().tolist() == ["corrupt"]
    pair = trials[trials["trial"] == 10]
    assert pair["edit"].tolist() == [0, 1] and pair["head"].tolist() == [2, 3]
    assert pair["set"].tolist() == ["a0.h2+a0.h3->1.1.k+a1.h3"] * 2 and pair["op"].iloc[0] == "path, mlps"
    summary: Any = run.table("summary").drop_duplicates("trial").set_index("trial")
    assert summary.loc[6, ["label", "layer", "head", "block"]].tolist() == ["path a1.h1->logits", 1, 1, 0]
    assert summary.loc[9, "label"] == "path a0.h1->1.1.k+a1.h3, mlps follow"
    assert summary.loc[12, "label"] == "path embed->mlp1, all follow" and summary["layer"].isna()[12]
    assert main(["verify", str(run.path), "--quiet"]) == 0


def test_paths_alone_and_pairs_that_do_not_differ(tmp_path: FilePath, capsys: pytest.CaptureFixture[str]) -> None:
    same = {"clean": "k1 k2 k3 k4 k1 k2", "corrupt": "k1 k2 k3 k4 k1 k2", "answer": "k3", "wrong_answer": "k4"}
    other = same | {"corrupt": "k1 k9 k3 k4 k1 k2"}
    section = {"direction": "noise", "sites": [{"path": {"senders": "mlps"}}]}
    run = run_patch(tmp_path, section, task={"keep": "all", "prompts": [same, other]}, metrics=["logit_diff"])
    results: Any = run.table("results")
    assert results.groupby("prompt")["status"].unique().map(list).tolist() == [["trivial"], ["ok"]]
    assert results["effect"].astype(float)[results["prompt"] == 0].abs().max() == 0
    assert main(["show", str(run.path)]) == 0
    assert "path m1->logits" in capsys.readouterr().err


def test_a_dry_run_counts_them(tmp_path: FilePath) -> None:
    plan = dry_run(config_of(tmp_path, {"direction": "noise", "sites": BLOCKS}))
    assert plan["paths"] == 12 and plan["result_rows"] == 13 * INDUCTION["n"]  # type: ignore[operator]


def failing(tmp_path: FilePath, path: dict[str, Any], section: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(UserError) as error:
        given: Run = run_patch(tmp_path, {"direction": "noise", "sites": [SITE, {"path": path}], **section}, **sections)
        assert given is None
    return str(error.value)


@pytest.mark.parametrize(
    ("path", "section", "words"),
    [
        ({"senders": ["a1.h0"], "receivers": ["a0.h1.q"]}, {}, "senders[0]: a1.h0->a0.h1.q is no edge"),
        ({"senders": ["a0.h9"]}, {}, "senders[0]: a0.h9 is not in this model's graph"),
        ({"senders": ["a0.h0"], "receivers": ["a1.h0.z"]}, {}, "receivers[0]: 'a1.h0.z' is nothing that reads"),
        ({"senders": ["a0.h0"], "receivers": ["a1.h7"]}, {}, "receivers[0]: a1.h7 is not in this model's graph"),
        ({"senders": ["nobody"]}, {}, "senders[0]: 'nobody' is nothing that writes"),
        ({"senders": ["a0.h0"], "receivers": ["logits", "m1"]}, {}, "senders[0]: logits are where every path ends"),
        ({"senders": "heads", "receivers": ["a0.h0.q"]}, {}, "senders: no sender writes before a0.h0.q"),
        ({"senders": ["a0.h0"]}, {"source": "zero"}, "sites[1].path: paths carry what the paired prompt has there"),
        (
            {"senders": ["a0.h0"], "rest": "still"},
            {},
            "rest: 'still' is not valid; allowed: frozen, mlps, heads or free",
        ),
        ({"senders": [9.6]}, {}, "senders[0]: 9.6 is not valid; allowed: text"),
        ({"sender": ["a0.h0"]}, {}, "sites[1].path.sender: unknown key"),
    ],
)
def test_what_is_no_path_names_the_key(
    tmp_path: FilePath, path: dict[str, Any], section: dict[str, Any], words: str
) -> None:
    assert words in failing(tmp_path, path, section)


def test_half_precision_and_a_block_of_neither_kind_are_refused(tmp_path: FilePath) -> None:
    model = {"id": "toy-induction", "dtype": "bfloat16"}
    assert "paths are patched in float32" in failing(tmp_path, {"senders": ["a0.h0"]}, {}, model=model)
    with pytest.raises(UserError, match=r"sites\[0\].kind: is missing"):
        config_of(tmp_path, {"sites": [{"layers": [0]}]})
    with pytest.raises(UserError, match=r"sites\[0\].kind: unknown key"):
        config_of(tmp_path, {"sites": [{"kind": "z", "path": {"senders": "heads"}}]})
