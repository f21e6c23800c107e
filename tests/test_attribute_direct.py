"""Direct logit attribution: against hooks by hand, parts that sum to their whole, and what is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.methods.attribute.direct import check_direct
from mechinterp_cli.methods.beside import estimate
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.planted import INDUCTION_HEAD
from mechinterp_cli.tasks.prompts import Prompt
from tests.attribute_plain import BY_HAND, Key, parts_by_hand
from tests.attribute_tables import Told, options_of, prompt, prompts_of, setting_of, tiny, told
from tests.models_fixtures import planted, smollm2, toy

__all__ = ["planted", "smollm2", "toy"]

PROMPTS = [prompt(9, 0), prompt(6, 1, answers=3), prompt(9, 2), prompt(6, 3)]
EVERYTHING = {"neurons": True, "top": "all", "sources": True}
WHERE = ["layer", "head", "neuron", "source_position"]


def direct(folder: Path, model: LoadedModel, section: dict[str, Any], prompts: Sequence[Prompt] = PROMPTS) -> Told:
    return told(folder, model, prompts, {"direct": section})


def by_key(rows: pd.DataFrame, number: int) -> dict[Key, float]:
    """One prompt's rows by component and place."""
    own = rows[rows["prompt"] == number]
    places = own[WHERE].astype(object).where(own[WHERE].notna(), None)
    found: dict[Key, float] = {}
    for component, place, value in zip(own["component"], places.itertuples(index=False), own["value"], strict=True):
        layer, head, neuron, source = place
        assert (component, layer, head, neuron, source) not in found, "a row has one name"
        found[component, layer, head, neuron, source] = float(value)
    return found


def native_difference(model: Any, one: Prompt) -> float:
    """The mean logit of the answers less that of the wrong ones, before any cap."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([one.clean_tokens])).logits[0, -1].double()
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else torch.atanh(logits / cap) * cap
    return float(logits[list(one.answer)].mean() - logits[list(one.wrong_answer)].mean())


def sums(rows: pd.DataFrame, part_of: str, *places: str) -> pd.Series:
    """What the rows of one `part_of` sum to, by prompt and place."""
    chosen = rows[(rows["part_of"] == part_of).fillna(False)]
    return chosen.groupby(["prompt", *places])["value"].sum()


def wholes(rows: pd.DataFrame, component: str, *places: str) -> pd.Series:
    return rows[rows["component"] == component].set_index(["prompt", *places])["value"]


def assert_sums(rows: pd.DataFrame, part_of: str, *places: str, atol: float = 1e-4) -> None:
    """Every whole that is split is the sum of its parts."""
    found = sums(rows, part_of, *places)
    wanted = wholes(rows, part_of, *places).loc[found.index]
    assert len(found)
    np.testing.assert_allclose(found.to_numpy(float), wanted.to_numpy(float), rtol=0, atol=atol)


@pytest.mark.parametrize("name", BY_HAND)
def test_every_part_is_the_one_by_hand(name: str, tmp_path: Path) -> None:
    model = tiny(name, attn_implementation="eager")
    rows = direct(tmp_path, model, EVERYTHING).tables["direct"]
    for number, one in enumerate(PROMPTS):
        wanted, found = parts_by_hand(BY_HAND[name](model.model), one), by_key(rows, number)
        left_out = set(wanted) - set(found)
        assert set(found) <= set(wanted)
        assert {key[0] for key in left_out} <= {"constant", "attention_bias", "mlp_bias"}
        assert all(wanted[key] == 0 for key in left_out), "a bias that the model does not have"
        for key, value in found.items():
            assert value == pytest.approx(wanted[key], abs=2e-5), key
        sizes = {component: max(abs(v) for key, v in found.items() if key[0] == component) for component, *_ in found}
        assert min(sizes.values()) > 1e-3, "what is compared is not nothing"
    biased = name in ("gpt2", "gpt_neox")
    assert biased == (not left_out)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2", "granite", "olmo2", "phi", "opt", "cohere", "qwen3"])
def test_parts_sum_to_the_models_own_logit_difference(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    found = direct(tmp_path, model, {"neurons": True, "top": 7, "sources": True})
    rows, facts = found.tables["direct"], found.notes["direct"]
    native = [native_difference(model.model, one) for one in PROMPTS]
    np.testing.assert_allclose(wholes(rows, "total").to_numpy(float), native, rtol=0, atol=1e-4)
    np.testing.assert_allclose(sums(rows, "total").to_numpy(float), native, rtol=0, atol=1e-4)
    assert_sums(rows, "mlp", "layer")
    assert_sums(rows, "head", "layer", "head")
    assert rows[rows["component"] == "neuron"].groupby("prompt").size().tolist() == [7] * 4
    for key in ("deviation", "logits_deviation", "neurons_deviation", "sources_deviation"):
        assert 0 < facts[key] < 1e-5 < facts["tolerance"] == 1e-4


def test_parts_of_the_toy_sum(toy: LoadedModel, tmp_path: Path) -> None:
    rows = direct(tmp_path, toy, EVERYTHING).tables["direct"]
    native = [native_difference(toy.model, one) for one in PROMPTS]
    np.testing.assert_allclose(sums(rows, "total").to_numpy(float), native, rtol=0, atol=1e-4)
    assert_sums(rows, "head", "layer", "head")


@pytest.mark.slow
def test_parts_of_smollm2_sum(smollm2: LoadedModel, tmp_path: Path) -> None:
    found = direct(tmp_path, smollm2, {"neurons": True, "sources": True})
    rows, facts = found.tables["direct"], found.notes["direct"]
    native = np.array([native_difference(smollm2.model, one) for one in PROMPTS])
    size = rows[(rows["part_of"] == "total").fillna(False)].groupby("prompt")["value"].apply(lambda x: x.abs().sum())
    assert (np.abs(sums(rows, "total").to_numpy(float) - native) <= 1e-4 * size.to_numpy(float)).all()
    assert_sums(rows, "mlp", "layer", atol=1e-3)
    assert_sums(rows, "head", "layer", "head", atol=1e-3)
    assert max(facts[key] for key in facts if key.endswith("deviation")) < 1e-4
    assert rows[rows["component"] == "head"].groupby("prompt").size().tolist() == [270] * 4


def test_a_soft_cap_is_said_and_the_sum_is_before_it(tmp_path: Path) -> None:
    found = direct(tmp_path, tiny("gemma2"), {})
    assert found.notes["direct"]["softcap"] == 3.0
    said = "caps its logits softly at 3; parts are of the linear part and sum to the logit difference before the cap"
    assert any(said in text for text in found.warnings)
    other = direct(tmp_path, tiny("llama"), {})
    assert other.notes["direct"]["softcap"] is None
    assert not any("softly" in text for text in other.warnings)


def test_sets_of_answers_are_said_to_be_means(tmp_path: Path) -> None:
    said = "a difference of mean logits"
    assert any(said in text for text in direct(tmp_path, tiny("llama"), {}).warnings)
    assert not any(said in text for text in direct(tmp_path, tiny("llama"), {}, [PROMPTS[0]]).warnings)


def test_the_planted_heads_part_comes_from_the_token_it_copies(planted: LoadedModel, tmp_path: Path) -> None:
    tokens = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:8].tolist()
    spans = {"copied": (4,), "end": (11,)}
    one = Prompt("", (*tokens, *tokens[:4]), (tokens[4],), "", wrong_answer=(tokens[6],), spans=spans)
    found = direct(tmp_path, planted, {"sources": True}, [one])
    rows, by_span = found.tables["direct"], found.tables["sources"]
    layer, head = INDUCTION_HEAD
    is_planted = (by_span["layer"] == layer) & (by_span["head"] == head)
    own = by_span[is_planted].set_index("source_span")["value"]
    total = float(wholes(rows, "total").iloc[0])
    assert total > 8
    assert float(own["copied"]) == pytest.approx(total, rel=1e-3)
    assert abs(float(own["end"])) < 1e-3
    assert by_span[~is_planted]["value"].abs().max() < 1e-4
    split = rows[(rows["component"] == "source") & (rows["layer"] == layer) & (rows["head"] == head)]
    strongest = split.sort_values("value").iloc[-1]
    assert (strongest["source_position"], strongest["source_span"]) == (4, "copied")
    assert strongest["source_token"] == planted.tokenizer.decode([tokens[4]])


def test_neurons_of_their_own_are_the_strongest_of_all_layers(tmp_path: Path) -> None:
    model = tiny("gpt2")
    every = direct(tmp_path, model, EVERYTHING).tables["direct"]
    some = direct(tmp_path, model, {"neurons": True, "top": 5}).tables["direct"]
    sizes = every[every["component"] == "neuron"].groupby(["layer", "neuron"])["value"].apply(lambda x: x.abs().mean())
    wanted = set(sizes.sort_values().index[-5:])
    own = some[some["component"] == "neuron"]
    assert set(zip(own["layer"], own["neuron"], strict=True)) == wanted
    assert_sums(some, "mlp", "layer")
    assert not (every["component"] == "other_neurons").any()
    assert (some[some["component"] == "other_neurons"].groupby("prompt").size() == 3).all()


def grouped() -> list[Prompt]:
    return [prompt(7, i, group="ab"[i % 2], cluster=f"c{i % 12}") for i in range(24)]


def test_components_are_means_over_prompts_with_intervals_by_group(tmp_path: Path) -> None:
    prompts = grouped()
    found = direct(tmp_path, tiny("llama"), {"sources": True}, prompts)
    rows, means = found.tables["direct"], found.tables["components"]
    stats = setting_of(tmp_path, tiny("llama"), prompts_of(*prompts), {"direct": {}}).loaded.config.stats
    heads = rows[rows["component"] == "head"]
    for group, size in (("all", 24), ("a", 12), ("b", 12)):
        own = heads if group == "all" else heads[heads["group"] == group]
        table = own.pivot(index=["layer", "head"], columns="prompt", values="value")
        clusters = [prompts[int(i)].cluster for i in table.columns]
        wanted = estimate(table.to_numpy(float), None, clusters, stats)
        shown = means[(means["group"] == group) & (means["component"] == "head")].set_index(["layer", "head"])
        assert shown.index.tolist() == table.index.tolist()
        np.testing.assert_allclose(shown["value"].to_numpy(float), table.mean(axis=1).to_numpy(float), atol=1e-12)
        np.testing.assert_allclose(shown["ci_low"].to_numpy(float), wanted.low, atol=1e-12)
        np.testing.assert_allclose(shown["ci_high"].to_numpy(float), wanted.high, atol=1e-12)
        assert (shown["ci_low"] < shown["value"]).all()
        assert set(shown["n"]) == {size}
        assert set(shown["clusters"]) == {len(set(clusters))}
    assert set(rows["cluster"]) == {one.cluster for one in prompts}


def test_means_by_span_sum_to_the_heads_mean_and_count_every_token_once(tmp_path: Path) -> None:
    found = direct(tmp_path, tiny("llama"), {"sources": True}, grouped())
    rows, by_span, means = (found.tables[name] for name in ("direct", "sources", "components"))
    assert set(by_span["source_span"]) == {"(no span)", "end", "first", "first, pair", "pair"}
    heads = means[(means["component"] == "head")].set_index(["group", "layer", "head"])["value"]
    summed = by_span.groupby(["group", "layer", "head"])["value"].sum()
    np.testing.assert_allclose(summed.to_numpy(float), heads.loc[summed.index].to_numpy(float), atol=1e-5)
    split = rows[rows["component"] == "source"]
    per_prompt = split.groupby(["prompt", "layer", "head", "source_span"])["value"].sum().reset_index()
    wanted = per_prompt.groupby(["layer", "head", "source_span"])["value"].mean()
    shown = by_span[by_span["group"] == "all"].set_index(["layer", "head", "source_span"])["value"]
    np.testing.assert_allclose(shown.loc[wanted.index].to_numpy(float), wanted.to_numpy(float), atol=1e-9)


def test_a_prompts_parts_do_not_depend_on_the_others(tmp_path: Path) -> None:
    model = tiny("gpt_neox")
    together = direct(tmp_path, model, EVERYTHING).tables["direct"]
    for number, one in enumerate(PROMPTS):
        alone = by_key(direct(tmp_path, model, EVERYTHING, [one]).tables["direct"], 0)
        assert alone == pytest.approx(by_key(together, number), abs=1e-5)


def test_half_precision_weights_are_followed_in_float32(tmp_path: Path) -> None:
    model = tiny("llama")
    inner: Any = model.model
    inner.to(torch.bfloat16)
    found = direct(tmp_path, model, EVERYTHING)
    assert next(inner.parameters()).dtype == torch.bfloat16, "given back as they were"
    assert max(found.notes["direct"][key] for key in ("deviation", "logits_deviation")) < 1e-5
    native = [native_difference(inner.float(), one) for one in PROMPTS]
    np.testing.assert_allclose(wholes(found.tables["direct"], "total").to_numpy(float), native, rtol=0, atol=1e-4)


def test_layers_of_experts_are_whole_where_others_are_split(tmp_path: Path) -> None:
    found = direct(tmp_path, tiny("deepseek_v3"), {"neurons": True, "top": "all"})
    rows = found.tables["direct"]
    assert set(rows[rows["component"] == "neuron"]["layer"]) == {0}
    assert set(rows[rows["component"] == "mlp"]["layer"]) == {0, 1, 2}
    assert_sums(rows, "mlp", "layer")
    said = "direct: neurons are not told apart in layers 1, 2: the MLP has no single down projection"
    assert any(text.startswith(said) for text in found.warnings)


def test_neurons_behind_something_that_is_no_norm_are_whole(tmp_path: Path) -> None:
    model = tiny("gemma2")
    inner: Any = model.model
    inner.model.layers[1].post_feedforward_layernorm.register_forward_hook(lambda _m, _a, out: out + 0.1 * out**2)
    found = direct(tmp_path, model, EVERYTHING)
    rows = found.tables["direct"]
    assert set(rows[rows["component"] == "neuron"]["layer"]) == {0, 2}
    assert_sums(rows, "mlp", "layer")
    said = "direct: neurons are not told apart in layer 1: what stands between the down projection and the residual"
    assert any(text.startswith(said) for text in found.warnings)
    native = [native_difference(model.model, one) for one in PROMPTS]
    np.testing.assert_allclose(sums(rows, "total").to_numpy(float), native, rtol=0, atol=1e-4)


def test_attention_that_is_not_linear_in_z_is_whole(tmp_path: Path) -> None:
    model = tiny("qwen3_next")
    found = direct(tmp_path, model, {"sources": True})
    rows = found.tables["direct"]
    assert set(rows[rows["component"] == "attention"]["layer"]) == {0, 1, 2}
    assert not rows["component"].isin(["head", "source"]).any()
    assert "sources" not in found.tables
    native = [native_difference(model.model, one) for one in PROMPTS]
    np.testing.assert_allclose(sums(rows, "total").to_numpy(float), native, rtol=0, atol=1e-4)
    assert any("heads are not split by token in layer 1: what attention adds" in text for text in found.warnings)


# What is refused


def refusal(folder: Path, model: LoadedModel, section: dict[str, Any], prompts: Sequence[Prompt] = PROMPTS) -> str:
    setting = setting_of(folder, model, prompts_of(*prompts), {"direct": section})
    options = options_of(setting).direct
    assert options is not None
    with pytest.raises(UserError) as caught:
        check_direct(options, setting)
    return str(caught.value)


def test_neurons_of_a_mixture_of_experts_are_refused_with_what_is_possible(tmp_path: Path) -> None:
    text = refusal(tmp_path, tiny("mixtral"), {"neurons": True})
    assert "experiment.yaml:" in text
    assert "attribute.direct.neurons: no layer's MLP can be split: the MLP has no single down projection" in text
    assert "Leave neurons out: each MLP's part as a whole is there without it." in text
    rows = direct(tmp_path, tiny("mixtral"), {}).tables["direct"]
    assert (rows["component"] == "mlp").any()


def test_prompts_without_answers_are_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, tiny("llama"), {}, [PROMPTS[0], prompt(6, 1, wrong=False)])
    assert "attribute.direct: a logit difference needs an answer and a wrong answer" in text
    assert "prompt 1 of task 'made' has no wrong answer" in text
    assert "ioi" in text
    text = refusal(tmp_path, tiny("llama"), {}, [Prompt("", (5, 6), (), "")])
    assert "prompt 0 of task 'made' has no answer" in text


def test_sources_of_attention_that_nobody_can_see_are_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, tiny("gptj"), {"sources": True})
    assert "attribute.direct.sources: no layer's heads can be split by token: this layer's attention does not" in text
    assert "Leave sources out" in text


def test_a_model_whose_layers_are_no_sums_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, tiny("mamba"), {})
    assert "attribute.direct: layer 0 is no sum of parts: resid_pre + attn_out + mlp_out = resid_post does not" in text


def test_logits_that_are_no_product_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    inner: Any = model.model
    inner.lm_head.register_forward_hook(lambda _m, _a, out: out + 0.3 * out**2)
    with pytest.raises(UserError, match="attribute.direct: this model's logits are not its output head's product"):
        direct(tmp_path, model, {})


def long_only(model: Any) -> dict[str, bool]:
    """Whether the model is on one of the longer prompts, which no proof at load sees."""
    state = {"long": False}
    model.model.embed_tokens.register_forward_hook(lambda _m, args, _o: state.update(long=args[0].shape[1] == 9))
    return state


def test_parts_that_do_not_sum_stop_the_run(tmp_path: Path) -> None:
    model = tiny("llama")
    inner: Any = model.model
    state = long_only(inner)
    inner.model.layers[1].register_forward_hook(lambda _m, _a, out: out + 0.1 if state["long"] else None)
    assert direct(tmp_path, model, {}, PROMPTS[1:2]).notes["direct"]["deviation"] < 1e-5
    with pytest.raises(RunError, match=r"attribute.direct: what the layers add does not add up"):
        direct(tmp_path, model, {})


def test_logits_that_are_not_the_models_own_stop_the_run(tmp_path: Path) -> None:
    model = tiny("llama")
    inner: Any = model.model
    state = long_only(inner)
    inner.lm_head.register_forward_hook(lambda _m, _a, out: out + 0.1 * out**2 if state["long"] else None)
    assert direct(tmp_path, model, {}, PROMPTS[1:2]).notes["direct"]["logits_deviation"] < 1e-5
    with pytest.raises(RunError, match=r"attribute.direct: this model's logits on these prompts are not"):
        direct(tmp_path, model, {})


def test_neurons_that_do_not_sum_stop_the_run(tmp_path: Path) -> None:
    model = tiny("llama")
    inner: Any = model.model
    inner.model.layers[2].mlp.down_proj.register_forward_hook(lambda _m, _a, out: out + 0.1 * out**2)
    with pytest.raises(RunError, match=r"attribute.direct.neurons: the parts do not sum to their whole"):
        direct(tmp_path, model, {"neurons": True})


def test_a_model_that_gives_nan_stops_the_run(tmp_path: Path) -> None:
    model = tiny("llama")
    inner: Any = model.model
    state = long_only(inner)
    inner.model.layers[1].register_forward_hook(lambda _m, _a, out: out * torch.nan if state["long"] else None)
    with pytest.raises(RunError, match=r"attribute.direct: this model gives NaN or infinity"):
        direct(tmp_path, model, {})
