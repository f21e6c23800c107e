import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from benchmarks import ablate_heads, attribution, narrow_head, patch_sweep, probe_activations, sweep_prompts
from benchmarks.patch_sweep import Hooks, Options, main, parsed, worst
from benchmarks.sweep_cases import CASES, Sweep, make_sweep
from benchmarks.sweep_clock import PeakMemory, Stopwatch
from benchmarks.sweep_engine import Engine
from benchmarks.sweep_prompts import Pairs, ioi_pairs
from benchmarks.sweep_work import Sgemm, Sizes, linear_maps, stream_flops, trial_flops
from benchmarks.tiny import tiny_model
from mechinterp_cli.engine.plan import cost
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy

LAYERS, HEADS, LENGTH = 3, 4, 14


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word and each mark."""
    names = [name for couple in sweep_prompts.COUPLES + sweep_prompts.SHOT_COUPLES for name in couple]
    text = [sweep_prompts.TEMPLATE, sweep_prompts.SHOT, *names, *sweep_prompts.MORE_NAMES]
    text += [*sweep_prompts.SHOT_PLACES, *sweep_prompts.SHOT_THINGS]
    words = sorted(set(re.findall(r"\w+|[,.]", " ".join(text))))
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    untyped: Any = PreTrainedTokenizerFast
    result: PreTrainedTokenizerFast = untyped(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    return result


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", layers=LAYERS, overrides={"vocab_size": 128})


@pytest.fixture(scope="module")
def anatomy(model: Any) -> Anatomy:
    return find_anatomy(model)


@pytest.fixture(scope="module")
def folder(model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def sweep(case: str, tokenizer: PreTrainedTokenizerFast, anatomy: Anatomy, n: int = 4, prefix: int = 0) -> Sweep:
    pairs = ioi_pairs(tokenizer, n, CASES[case].differ, prefix)
    return make_sweep(CASES[case], pairs, anatomy, range(LAYERS))


def test_a_small_run_writes_its_tables_and_its_values_are_equal(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "r.json", tmp_path / "r.md"
    arguments = ["--model", folder, "--quick", "--prefixes", "0", "40", "--json", str(out), "--markdown", str(page)]
    assert main(arguments) == 0
    report = json.loads(out.read_text())
    cases = {case["key"]: case for case in report["cases"]}
    assert {k: (c["trials"], c["written"]["computed"], c["whole"]["computed"]) for k, c in cases.items()} == {
        "a": (42, 11, 42),
        "b": (42, 28, 42),
        "c": (12, 12, 12),
    }
    for case in cases.values():
        assert case["executor"] == "packed"
        assert case["hooks_checked"] == 4
        assert 0 < case["written"]["deviation"] <= case["tolerance"] == 1e-4
        assert case["written"]["flops"] < case["whole"]["flops"]
    assert [p["prefix"] for p in report["prefixes"]] == [0, 40]
    assert all(0 < p["deviation"] <= 1e-4 for p in report["prefixes"])
    assert capsys.readouterr().out.strip() == page.read_text().strip()
    rows = [line for line in page.read_text().splitlines() if line.startswith("| (")]
    assert [row[2:5] for row in rows] == ["(a)", "(a)", "(b)", "(b)", "(c)", "(c)"]
    widths = {line.count("|") for line in page.read_text().split("##")[0].splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_full_has_plain_hooks_compute_every_trial(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    assert main(["--model", folder, "--quick", "--full", "--rounds", "2", "--cases", "a", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["cases"][0]["hooks_checked"] == LAYERS * LENGTH


@pytest.mark.parametrize(("wrong", "code"), [(0.0, 0), (0.01, 1)])
def test_one_wrong_value_in_one_trial_ends_with_1(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: float, code: int
) -> None:
    right = Engine.values

    def values(engine: Engine, swept: Sweep, *, skip: bool) -> torch.Tensor:
        found = right(engine, swept, skip=skip)
        found[5, 0, 0] += wrong if skip else 0.0
        return found

    monkeypatch.setattr(Engine, "values", values)
    assert main(["--model", folder, "--quick", "--cases", "a"]) == code
    assert ("not those of plain hooks" in capsys.readouterr().err) == bool(code)


def test_a_missing_model_is_told_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "./no/such/folder"]) == 2
    assert "no/such/folder" in capsys.readouterr().err


def test_nan_is_never_equal() -> None:
    values = torch.zeros(2, 2)
    assert worst(values, values, 1.0) == 0.0
    assert worst(values, torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), 1.0) == torch.inf


@pytest.mark.parametrize(("differ", "first"), [("late", 9), ("early", 1)])
def test_pairs_differ_where_the_case_says(tokenizer: PreTrainedTokenizerFast, differ: Any, first: int) -> None:
    pairs = ioi_pairs(tokenizer, 64, differ)
    assert pairs.clean.shape == pairs.corrupt.shape == (64, LENGTH)
    assert pairs.first_difference == (first,) * 64
    assert len({tuple(row) for row in pairs.clean.tolist()}) == 64
    assert bool((pairs.answers[:, 0] == pairs.clean[:, 1]).all())
    assert bool((pairs.answers[:, 1] == pairs.clean[:, 9]).all())


def test_a_prefix_is_the_same_for_all_and_leaves_the_prompts_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    bare, behind = (ioi_pairs(tokenizer, 8, "late", prefix) for prefix in (0, 50))
    assert behind.length == LENGTH + 50
    assert len({tuple(row) for row in torch.cat([behind.clean, behind.corrupt])[:, :50].tolist()}) == 1
    assert torch.equal(behind.clean[:, 50:], bare.clean)
    assert behind.first_difference == (59,) * 8


def test_names_of_two_tokens_are_refused(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_prompts, "COUPLES", (("Mary", "John"), ("Anna Mary", "Peter")))
    assert ioi_pairs(tokenizer, 2, "late").size == 2
    with pytest.raises(UserError, match="'When Anna Mary' has 3 tokens, 'When Mary' has 2"):
        ioi_pairs(tokenizer, 4, "late")


def test_more_couples_than_there_are_and_odd_numbers_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for n in (3, 5000):
        with pytest.raises(UserError, match=f"--pairs: {n} is odd or more"):
            ioi_pairs(tokenizer, n, "late")


def test_skipping_leaves_the_positions_from_the_first_difference_on(
    tokenizer: PreTrainedTokenizerFast, anatomy: Anatomy
) -> None:
    late, heads = sweep("a", tokenizer, anatomy), sweep("c", tokenizer, anatomy)
    assert [t.start(0) for t in late.work(skip=True).trials] == [9] + list(range(9, LENGTH)) * (LAYERS - 1)
    assert [t.start(0) for t in late.work(skip=False).trials] == list(range(LENGTH)) * LAYERS
    assert {t.edits[0].positions[0] for t in heads.work(skip=True).trials} == {tuple(range(9, LENGTH))}
    assert {t.edits[0].positions[0] for t in heads.work(skip=False).trials} == {tuple(range(LENGTH))}
    mixed = Pairs(late.pairs.clean, late.pairs.corrupt.clone(), late.pairs.answers, 0)
    mixed.corrupt[1] = ioi_pairs(tokenizer, 4, "early").corrupt[1]
    trials = Sweep(late.case, mixed, late.patches).work(skip=True).trials
    assert [t.prompts for t in trials[:3]] == [(1,), (1,), (0, 2, 3)]
    assert [t.prompts for t in trials[3:16]] == [(1,)] * 8 + [(0, 1, 2, 3)] * 5


@pytest.mark.parametrize("case", ["a", "c"])
def test_hooks_have_effects_and_leave_the_model_as_it_was(
    case: str, model: Any, tokenizer: PreTrainedTokenizerFast, anatomy: Anatomy
) -> None:
    swept = sweep(case, tokenizer, anatomy)
    with torch.no_grad():
        before = model(swept.pairs.corrupt).logits
        hooks = Hooks(model, swept)
        values = hooks.values(swept.patches, last=True)
        assert torch.equal(model(swept.pairs.corrupt).logits, before)
    base = before[:, -1].gather(1, swept.pairs.answers).double()
    effects = (values - base).abs().amax((1, 2)) / hooks.scale
    # before the first difference, and what enters layer 0 where the tokens are the same
    trivial = [case == "a" and (p.unit < 9 or (p.layer == 0 and p.unit > 9)) for p in swept.patches]
    assert all((effect < 1e-6) == t for effect, t in zip(effects.tolist(), trivial, strict=True))
    assert worst(hooks.values(swept.patches, last=False), values, hooks.scale) < 1e-6


def test_hooks_on_everything_before_the_first_layer_give_the_clean_prompts(
    model: Any, tokenizer: PreTrainedTokenizerFast, anatomy: Anatomy
) -> None:
    swept = sweep("a", tokenizer, anatomy)
    hooks = Hooks(model, swept)
    for position in range(LENGTH):  # one after the other, each kept
        hooks.corrupt = hooks.corrupt.clone()
        hooks.corrupt[:, position] = hooks.clean[:, position]
    clean = hooks.values(swept.patches[:1], last=True)[0]
    with torch.no_grad():
        wanted = model(swept.pairs.clean).logits[:, -1].gather(1, swept.pairs.answers).double()
    assert worst(clean, wanted, hooks.scale) < 1e-6


def test_models_of_another_shape_are_refused(tokenizer: PreTrainedTokenizerFast, anatomy: Anatomy) -> None:
    with pytest.raises(UserError, match="self_attn.o_proj"):
        Hooks(tiny_model("gpt2", overrides={"vocab_size": 128}), sweep("a", tokenizer, anatomy))


def test_flops_are_those_that_torch_counts(model: Any, tokenizer: PreTrainedTokenizerFast, anatomy: Anatomy) -> None:
    pairs = ioi_pairs(tokenizer, 4, "late")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pairs.clean)
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    own = stream_flops(Sizes.of(model, anatomy), pairs.size, LENGTH, streams=1)
    # the model unembeds every position here, the count one of each prompt
    assert own.linear + LENGTH * own.unembedding == sum(
        n for op, n in counted.items() if op.endswith((".mm", ".addmm"))
    )
    queries = LAYERS * pairs.size * anatomy.d_model
    assert own.attention == 4 * queries * sum(p + 1 for p in range(LENGTH))


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_flops_agree_with_the_plan(case: str, model: Any, tokenizer: PreTrainedTokenizerFast, anatomy: Anatomy) -> None:
    swept, sizes = sweep(case, tokenizer, anatomy), Sizes.of(model, anatomy)
    shares = []
    for skip in (True, False):
        work = swept.work(skip=skip)
        own = trial_flops(sizes, work.trials, LENGTH) + stream_flops(sizes, swept.pairs.size, LENGTH)
        shares.append(cost(model, anatomy, work, "packed").flops / own.total)
    # the plan counts every key for every query and does not unembed the streams
    assert all(0.9 < share < 1.1 for share in shares)
    with_hooks = cost(model, anatomy, swept.work(skip=False), "hooks").flops
    assert not 0.9 < with_hooks / own.total < 1.1


def test_sgemm_multiplies_by_the_models_own_weights(model: Any, anatomy: Anatomy) -> None:
    sgemm = Sgemm(model, anatomy, 10, LAYERS)
    sgemm.run()
    weights = [m.weight for layer in range(LAYERS) for m in linear_maps(model, anatomy, layer)]
    assert len(sgemm.weights) == 7 * LAYERS
    assert sgemm.flops == 2 * 10 * sum(w.numel() for w in weights)
    torch.testing.assert_close(sgemm.outputs[32], sgemm.inputs[weights[-1].shape[1]] @ weights[-1].T)


def test_full_shares_out_every_trial_once_and_a_sample_is_seeded() -> None:
    whole = Options(rounds=3, sample=None, rows_per_call=8, stride=1, sgemm_layers=1)
    shares = whole.shares(10)
    assert len(shares) == 3
    assert sorted(i for share in shares for i in share) == list(range(10))
    some = Options(rounds=2, sample=3, rows_per_call=8, stride=1, sgemm_layers=1)
    assert some.shares(100) == some.shares(100)
    assert len({i for share in some.shares(100) for i in share}) == 6
    assert [len(share) for share in some.shares(2)] == [2, 2]


def test_peak_memory_sees_what_is_freed_before_the_end() -> None:
    some, none = PeakMemory(torch.device("cpu")), PeakMemory(torch.device("cpu"))
    with none.watch():
        pass
    with some.watch():
        torch.ones(2**26).sum().item()
    assert none.above < 2**26 < 2**27 < some.above < some.absolute


def test_the_stopwatch_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 6.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr("benchmarks.sweep_clock.time.perf_counter", lambda: next(ticks))
    watch = Stopwatch(torch.device("cpu"))
    assert [watch.time("x", lambda: "done", per=2) for _ in range(3)] == ["done"] * 3
    assert watch.best == {"x": 1.0}


def test_large_means_three_prefixes_and_what_is_said_goes_first() -> None:
    assert parsed(["--large"]).prefixes == [0, 128, 512]
    assert parsed(["--large", "--prefixes"]).prefixes == []
    assert parsed([]).prefixes == []
    assert (parsed(["--quick"]).pairs, parsed(["--quick", "--pairs", "6"]).pairs) == (2, 6)
    assert patch_sweep.LARGE_PAIRS == 64


# --- all heads, ablated one by one


def test_ablating_every_head_gives_the_values_of_plain_hooks(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    assert ablate_heads.main(["--model", folder, "--prompts", "4", "--rounds", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["heads"] == found["checked"] == LAYERS * HEADS
    assert (found["prompts"], found["rounds"]) == (4, 2)
    assert found["executor"] == "packed"
    assert set(found["differences"]) == {"logit_diff", "kl"}
    assert all(difference <= ablate_heads.TOLERANCE for difference in found["differences"].values())
    assert found["largest"]["kl"] > 100 * found["differences"]["kl"]
    assert found["ratio"] == pytest.approx(found["hooks_seconds"] / found["engine_seconds"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert len({row.count("|") for row in rows}) == 1


def test_a_sample_of_heads_is_what_hooks_compute(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    arguments = ["--model", folder, "--prompts", "2", "--rounds", "2", "--sample", "3", "--json", str(out)]
    assert ablate_heads.main(arguments) == 0
    assert json.loads(out.read_text())["checked"] == 6


@pytest.mark.parametrize(("metric", "wrong"), [(0, 0.0), (0, 0.001), (1, 0.001), (1, float("nan"))])
def test_one_wrong_value_of_one_head_ends_with_1(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], metric: int, wrong: float
) -> None:
    right, code = ablate_heads.Engine.values, int(wrong != 0)

    def values(engine: ablate_heads.Engine) -> torch.Tensor:
        found = right(engine)
        found[7, 1, metric] += wrong
        return found

    monkeypatch.setattr(ablate_heads.Engine, "values", values)
    assert ablate_heads.main(["--model", folder, "--prompts", "2", "--rounds", "1"]) == code
    assert ("not those of plain hooks" in capsys.readouterr().err) == bool(code)


def test_ablating_a_head_by_hooks_is_as_if_its_output_weights_were_zero(
    model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = ioi_pairs(tokenizer, 2, "late")
    hooks = ablate_heads.Hooks(model, pairs)
    weight = model.model.layers[1].self_attn.o_proj.weight
    size = model.config.head_dim
    with torch.no_grad():
        before = model(pairs.clean).logits[:, -1]
        values = hooks.values([(1, 2)])[0]
        assert torch.equal(model(pairs.clean).logits[:, -1], before)
        kept = weight.clone()
        weight[:, 2 * size : 3 * size] = 0
        try:
            wanted = model(pairs.clean).logits[:, -1]
        finally:
            weight.copy_(kept)
    logits = wanted.gather(1, pairs.answers)
    torch.testing.assert_close(values[:, 0], (logits[:, 0] - logits[:, 1]).double(), atol=1e-5, rtol=0)
    clean, after = before.double().log_softmax(-1), wanted.double().log_softmax(-1)
    torch.testing.assert_close(values[:, 1], (clean.exp() * (clean - after)).sum(-1), atol=1e-5, rtol=0)
    assert bool((values[:, 1] > 1e-5).all())


def test_a_model_of_another_shape_is_refused_by_the_hooks_of_ablation(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="self_attn.o_proj"):
        ablate_heads.Hooks(tiny_model("gpt2", overrides={"vocab_size": 128}), ioi_pairs(tokenizer, 2, "late"))


def test_estimates_of_every_node_are_those_of_plain_hooks(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    assert attribution.main(["--model", folder, "--prompts", "4", "--rounds", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["prompts"], found["rounds"]) == (4, 2)
    assert found["difference"] <= attribution.TOLERANCE
    assert found["ratio"] == pytest.approx(found["ours_seconds"] / found["forward_seconds"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize("wrong", [0.0, 0.1, float("nan")])
def test_one_wrong_estimate_ends_with_1(folder: str, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    right = attribution.Ours.values

    def values(ours: attribution.Ours) -> attribution.Estimates:
        found = right(ours)
        site = next(site for site in found if site.kind == "neuron")
        found[site][0, 3, 1] += wrong * found[site].abs().max()
        return found

    monkeypatch.setattr(attribution.Ours, "values", values)
    assert attribution.main(["--model", folder, "--prompts", "2", "--rounds", "1"]) == int(wrong != 0)


def test_plain_hooks_see_something_everywhere_and_leave_no_hook(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = ioi_pairs(tokenizer, 2, "early")
    found = attribution.Hooks(model, pairs).values()
    assert {site.kind for site in found} == set(attribution.KINDS)
    assert all(float(values.abs().max()) > 0 for values in found.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_of_another_shape_is_refused_by_the_hooks_of_attribution(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="mlp.down_proj"):
        attribution.Hooks(tiny_model("gpt2", overrides={"vocab_size": 128}), ioi_pairs(tokenizer, 2, "early"))


def test_a_small_capture_of_activations_writes_its_row_and_is_equal(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    arguments = ["--model", folder, "--sentences", "40", "--rounds", "2", "--json", str(out)]
    assert probe_activations.main(arguments) == 0
    found = json.loads(out.read_text())
    assert (found["sentences"], found["layers"], found["rounds"]) == (40, LAYERS, 2)
    assert found["difference"] <= probe_activations.TOLERANCE
    assert found["ratio"] == pytest.approx(found["ours_seconds"] / found["bare_seconds"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(set(map(len, (text.split() for text in probe_activations.sentences(40))))) > 4


@pytest.mark.parametrize("wrong", [0.0, 0.1, float("nan")])
def test_one_wrong_activation_ends_with_1(folder: str, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    right = probe_activations.Capture.ours

    def ours(capture: probe_activations.Capture) -> torch.Tensor:
        found = right(capture)
        found[1, 5, 3] += wrong * found[1].abs().max()
        return found

    monkeypatch.setattr(probe_activations.Capture, "ours", ours)
    assert probe_activations.main(["--model", folder, "--sentences", "8", "--rounds", "1"]) == int(wrong != 0)


# --- the answers' columns of the head


@pytest.mark.parametrize("wrong", [0.0, 0.001, float("nan")])
def test_a_small_run_with_the_answers_columns_alone_is_equal_and_one_wrong_value_ends_with_1(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: float
) -> None:
    right = narrow_head.Engine.values

    def values(engine: narrow_head.Engine, *, narrow: bool) -> torch.Tensor:
        found = right(engine, narrow=narrow)
        found[-1, -1] += wrong * narrow
        return found

    monkeypatch.setattr(narrow_head.Engine, "values", values)
    assert narrow_head.main(["--model", folder, "--pairs", "2", "--rounds", "1"]) == int(wrong != 0)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 + len(narrow_head.SWEEPS)
    assert {len(row) for row in rows} == {len(narrow_head.HEAD)}
    assert [int(row[2]) for row in rows[2:]] == [2, 2, 2]


def test_more_answers_than_are_worth_it_keep_the_head_whole(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert narrow_head.main(["--model", folder, "--pairs", "64", "--rounds", "1"]) == 4
    assert "all logits are computed" in capsys.readouterr().err
