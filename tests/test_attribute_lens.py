"""The logit lens: against the model's own norm and head by hand, the whole at the last layer, and what is refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.methods.attribute import lens
from mechinterp_cli.methods.attribute.lens import check_lens
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.walk import Walker
from mechinterp_cli.tasks.prompts import Prompt
from tests.attribute_tables import Told, options_of, prompt, prompts_of, setting_of, tiny, told
from tests.models_fixtures import planted, smollm2, toy

__all__ = ["planted", "smollm2", "toy"]

PROMPTS = [prompt(9, 0), prompt(6, 1, answers=3), prompt(9, 2), prompt(6, 3, wrong=False)]
WHERE = ["prompt", "site", "layer", "position"]
EVERYWHERE = {"kinds": ["embed", "resid_pre", "resid_mid", "resid_post"], "positions": "all", "top": 4}


def read(folder: Path, model: LoadedModel, section: dict[str, Any], prompts: Sequence[Prompt] = PROMPTS) -> Told:
    return told(folder, model, prompts, {"lens": section})


def table(folder: Path, model: LoadedModel, section: dict[str, Any], prompts: Sequence[Prompt] = PROMPTS) -> Any:
    return read(folder, model, section, prompts).tables["lens"]


@dataclass(frozen=True)
class ByHand:
    """How to take the lens by the names of a model's modules."""

    norm: str
    layers: str
    before_mlp: str
    """What reads the stream between attention and MLP."""
    scale: float = 1.0
    cap: float | None = None


BY_HAND = {
    "llama": ByHand("model.norm", "model.layers", "post_attention_layernorm"),
    "gpt2": ByHand("transformer.ln_f", "transformer.h", "ln_2"),
    "gemma2": ByHand("model.norm", "model.layers", "pre_feedforward_layernorm", cap=3.0),
    "granite": ByHand("model.norm", "model.layers", "post_attention_layernorm", scale=1 / 0.7),
}


@torch.no_grad()
def streams_by_hand(model: Any, way: ByHand, one: Prompt) -> dict[tuple[str, int], Tensor]:
    """Every stream of a prompt, [positions, d_model]."""
    found: dict[tuple[str, int], Tensor] = {}
    layers = model.get_submodule(way.layers)
    handles = []
    for index, layer in enumerate(layers):

        def keep(_module: Any, args: Any, index: int = index) -> None:
            found["resid_mid", index] = args[0][0].clone()

        handles.append(layer.get_submodule(way.before_mlp).register_forward_pre_hook(keep))

    def last(_module: Any, args: Any) -> None:
        found["resid_post", len(layers) - 1] = args[0][0]

    handles.append(model.get_submodule(way.norm).register_forward_pre_hook(last))
    hidden = model(input_ids=torch.tensor([one.clean_tokens]), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    found["embed", 0] = hidden[0][0]
    for index in range(len(layers)):
        found["resid_pre", index] = hidden[index][0]
        found.setdefault(("resid_post", index), hidden[index + 1][0])
    return found


@torch.no_grad()
def log_probabilities(model: Any, way: ByHand, stream: Tensor) -> Tensor:
    """[positions, vocab], float64."""
    logits = model.lm_head(model.get_submodule(way.norm)(stream)).double() * way.scale
    return (logits if way.cap is None else torch.tanh(logits / way.cap) * way.cap).log_softmax(-1)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_lens_is_the_models_norm_and_head_on_the_stream(name: str, tmp_path: Path) -> None:
    model, way = tiny(name), BY_HAND[name]
    inner: Any = model.model
    rows = table(tmp_path, model, EVERYWHERE)
    places, seen = dict(iter(rows.groupby(WHERE))), 0
    for number, one in enumerate(PROMPTS):
        with torch.no_grad():
            output = inner(input_ids=torch.tensor([one.clean_tokens])).logits[0].double().log_softmax(-1)
        for (site, layer), stream in streams_by_hand(inner, way, one).items():
            log_p = log_probabilities(inner, way, stream)
            kl = (output.exp() * (output - log_p)).sum(-1)
            for position in range(one.length):
                own = places[number, site, layer, position]
                seen += len(own)
                best = log_p[position].topk(4)
                assert own["rank"].tolist() == [0, 1, 2, 3]
                assert own["token_id"].tolist() == best.indices.tolist()
                np.testing.assert_allclose(own["probability"].to_numpy(float), best.values.exp().numpy(), atol=1e-6)
                answers = log_p[position][list(one.answer)]
                assert own["answer_probability"].tolist() == pytest.approx([float(answers.exp().sum())] * 4, abs=1e-6)
                assert set(own["answer_rank"]) == {int((log_p[position] > answers.max()).sum())}
                assert own["kl"].tolist() == pytest.approx([float(kl[position])] * 4, abs=1e-5)
    assert seen == len(rows) == 4 * 10 * sum(one.length for one in PROMPTS)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gptj", "mamba", "qwen3_next", "gpt_oss"])
def test_at_the_last_layer_the_lens_is_the_model(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    found = read(tmp_path, model, {"positions": "all", "top": 97})
    rows = found.tables["lens"]
    last = rows[rows["layer"] == model.anatomy.n_layers - 1]
    assert set(last["kl"]) == {0.0}
    assert rows[rows["layer"] == 0]["kl"].min() > 1e-3, "earlier layers are not the output"
    for number, one in enumerate(PROMPTS):
        with torch.no_grad():
            native = model.model(input_ids=torch.tensor([one.clean_tokens])).logits[0].double().softmax(-1)
        own = last[last["prompt"] == number]
        shown = own.pivot(index="position", columns="token_id", values="probability").to_numpy(float)
        np.testing.assert_allclose(shown, native.numpy(), rtol=0, atol=1e-5)
    assert 0 <= found.notes["lens"]["deviation"] < 1e-5 < found.notes["lens"]["tolerance"] == 1e-4


def test_divergence_is_never_below_rounding_and_the_answers_rank_agrees_with_the_likeliest(tmp_path: Path) -> None:
    rows = table(tmp_path, tiny("gpt_neox"), {"positions": "all", "top": 97})
    assert rows["kl"].min() > -1e-6
    for _, own in rows.groupby(WHERE):
        ids = PROMPTS[int(own["prompt"].iloc[0])].answer
        of_answer = own[own["token_id"].isin(ids)]
        assert of_answer["rank"].min() == own["answer_rank"].iloc[0]
        assert of_answer["probability"].sum() == pytest.approx(own["answer_probability"].iloc[0], abs=1e-9)
        assert own["probability"].sum() == pytest.approx(1, abs=1e-6)


def test_the_toys_answer_comes_with_the_induction_layer(toy: LoadedModel, tmp_path: Path) -> None:
    tokens = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:8].tolist()
    one = Prompt("", (*tokens, *tokens[:4]), (tokens[4],), "")
    rows = table(tmp_path, toy, {"kinds": ["embed", "resid_post"]}, [one])
    first = rows[rows["rank"] == 0].set_index(["site", "layer"])
    assert first.loc[("resid_post", 1), "token"] == toy.tokenizer.decode([tokens[4]])
    assert first.loc[("resid_post", 1), "answer_probability"] > 0.5 > first.loc[("embed", 0), "answer_probability"]
    assert first.loc[("resid_post", 1), "answer_rank"] == 0 < first.loc[("embed", 0), "answer_rank"]


def test_positions_are_those_that_are_asked_for_with_the_names_of_their_spans(tmp_path: Path) -> None:
    model = tiny("llama")
    rows = table(tmp_path, model, {"positions": ["first", ["pair", "end"]], "top": 1})
    for number, one in enumerate(PROMPTS):
        own = rows[(rows["prompt"] == number) & (rows["layer"] == 0)].set_index("position")["span"]
        assert own.to_dict() == {0: "first", 1: "first, pair+end", 2: "pair+end", one.length - 1: "pair+end"}
    last = table(tmp_path, model, {"top": 1})
    assert last["position"].tolist() == [one.length - 1 for one in PROMPTS for _ in range(3)]
    assert set(last["span"]) == {"end"}
    every, each = (table(tmp_path, model, {"positions": spots, "top": 1}) for spots in ("all", "each"))
    assert every["span"].isna().all()
    pd.testing.assert_frame_equal(every, each)


def test_layers_are_those_that_are_asked_for_and_embed_is_there_once(tmp_path: Path) -> None:
    rows = table(tmp_path, tiny("llama"), {"kinds": ["resid_post", "embed"], "layers": [2, 0], "top": 1}, PROMPTS[:1])
    assert list(zip(rows["site"], rows["layer"], strict=True)) == [("resid_post", 2), ("resid_post", 0), ("embed", 0)]


def test_more_tokens_than_there_are_is_all_of_them(tmp_path: Path) -> None:
    rows = table(tmp_path, tiny("llama"), {"top": 1000}, PROMPTS[:1])
    assert rows.groupby("layer").size().tolist() == [97] * 3


def test_prompts_without_an_answer_have_null_where_others_have_numbers(tmp_path: Path) -> None:
    without = Prompt("", PROMPTS[0].clean_tokens, (), "")
    rows = table(tmp_path, tiny("llama"), {}, [PROMPTS[0], without])
    assert rows[rows["prompt"] == 0][["answer_probability", "answer_rank"]].notna().all(axis=None)
    other = rows[rows["prompt"] == 1]
    assert other[["answer_probability", "answer_rank"]].isna().all(axis=None)
    assert other[["probability", "kl", "token_id"]].notna().all(axis=None)
    alone = table(tmp_path, tiny("llama"), {}, [without])
    assert alone["answer_rank"].isna().all()
    np.testing.assert_allclose(alone["kl"].to_numpy(float), other["kl"].to_numpy(float), atol=1e-6)


def test_how_much_is_held_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    whole = table(tmp_path, model, EVERYWHERE)
    held: list[int] = []
    unembed = Walker.unembed

    def counted(self: Walker, hidden: Tensor) -> Tensor:
        held.append(len(hidden))
        return unembed(self, hidden)

    monkeypatch.setattr(lens, "logits_chunk", lambda *_: 2)
    monkeypatch.setattr(lens, "STREAM_BYTES", 1)
    monkeypatch.setattr(Walker, "unembed", counted)
    small = table(tmp_path, model, EVERYWHERE)
    assert max(held) == 2
    exact = ["prompt", "site", "layer", "position", "span", "rank", "token_id", "token", "answer_rank"]
    pd.testing.assert_frame_equal(whole[exact], small[exact])
    for name in ("probability", "answer_probability", "kl"):  # products of other shapes round otherwise: float32 logits
        np.testing.assert_allclose(small[name].to_numpy(float), whole[name].to_numpy(float), rtol=0, atol=1e-5)


def test_half_precision_is_the_models_own(tmp_path: Path) -> None:
    model = tiny("llama")
    inner: Any = model.model
    inner.to(torch.bfloat16)
    found = read(tmp_path, model, {"positions": "all"})
    rows = found.tables["lens"]
    assert set(rows[rows["layer"] == 2]["kl"]) == {0.0}
    assert found.notes["lens"]["tolerance"] == pytest.approx(3 * 2**-7)
    wide = table(tmp_path, tiny("llama"), {"positions": "all"})
    np.testing.assert_allclose(rows["kl"].to_numpy(float), wide["kl"].to_numpy(float), rtol=0, atol=0.1)


@pytest.mark.slow
def test_the_lens_on_smollm2_ends_in_its_own_prediction(smollm2: LoadedModel, tmp_path: Path) -> None:
    text = "When Mary and John went to the store, John gave a drink to"
    tokens = tuple(smollm2.tokenizer(text)["input_ids"])
    answer = tuple(smollm2.tokenizer(" Mary")["input_ids"])
    one = Prompt(text, tokens, answer, " Mary", spans={"end": (len(tokens) - 1,)})
    rows = table(tmp_path, smollm2, {"kinds": ["embed", "resid_post"], "positions": "all"}, [one])
    end = rows[(rows["position"] == len(tokens) - 1) & (rows["rank"] == 0) & (rows["site"] == "resid_post")]
    assert end["token"].iloc[-1] == " Mary"
    assert end["answer_probability"].iloc[-1] > 0.8 > end["answer_probability"].iloc[10]
    assert end["kl"].iloc[-1] == 0.0
    assert end["kl"].iloc[0] > 1


# What is refused


def refusal(folder: Path, model: LoadedModel, section: dict[str, Any], prompts: Sequence[Prompt] = PROMPTS) -> str:
    setting = setting_of(folder, model, prompts_of(*prompts), {"lens": section})
    options = options_of(setting).lens
    assert options is not None
    with pytest.raises(UserError) as caught:
        check_lens(options, setting)
    return str(caught.value)


def test_a_stream_that_the_model_lacks_is_refused_with_those_it_has(tmp_path: Path) -> None:
    text = refusal(tmp_path, tiny("gpt_neox"), {"kinds": ["resid_post", "resid_mid"]})
    assert "experiment.yaml:" in text
    assert "attribute.lens.kinds[1]: resid_mid: attention and MLP read the same stream (parallel block)" in text
    assert "Streams of this model: embed, resid_pre, resid_post." in text


def test_layers_and_positions_that_are_not_there_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    text = refusal(tmp_path, model, {"layers": [0, 3]})
    assert "attribute.lens.layers[1]: 3 is outside 0..2" in text
    assert "3 layers, counted from 0" in text
    text = refusal(tmp_path, model, {"positions": ["end", "ned"]})
    assert "attribute.lens.positions[1]: span 'ned' of task 'made' does not exist; there are end, first, pair" in text
    text = refusal(tmp_path, model, {"positions": [9]}, [PROMPTS[0], PROMPTS[2]])
    assert "attribute.lens.positions[0]: 9 is outside 0..8" in text
    assert "The shortest prompt has 9 tokens, counted from 0." in text
    assert len(table(tmp_path, model, {"layers": [2], "positions": [8]}, [PROMPTS[0]])) == 5


def test_a_model_that_looks_back_after_its_last_layer_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    inner: Any = model.model
    seen: list[Tensor] = []
    inner.model.layers[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
    handle = inner.model.norm.register_forward_pre_hook(lambda _m, args: (args[0] + seen[-1],))
    with pytest.raises(UserError) as caught:
        read(tmp_path, model, {})
    assert "attribute.lens: what leaves the last layer does not give this model's own logits (off by" in str(
        caught.value
    )
    assert "Leave lens out for this model." in str(caught.value)
    handle.remove()
    assert len(table(tmp_path, model, {}))


def test_a_stream_that_is_not_a_number_stops_the_run_unless_it_is_to_be_recorded(tmp_path: Path) -> None:
    model = tiny("llama")
    inner: Any = model.model
    inner.model.layers[1].register_forward_hook(lambda _m, _a, out: out * torch.nan)
    with pytest.raises(RunError, match="layer 1 gives NaN or infinity in resid_post"):
        read(tmp_path, model, {})
    rows = told(tmp_path, model, PROMPTS, {"lens": {}}, engine={"on_nan": "record"}).tables["lens"]
    numbers = ["probability", "answer_probability", "kl"]
    assert np.isnan(rows[rows["layer"] > 0][numbers].to_numpy(float)).all()
    assert rows[rows["layer"] > 0]["answer_rank"].isna().all()
    assert np.isfinite(rows[rows["layer"] == 0][["probability", "answer_probability"]].to_numpy(float)).all()
