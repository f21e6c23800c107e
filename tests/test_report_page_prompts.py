"""Maps of single prompts of `probe` and `circuit` hold what the tables hold of that prompt."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechinterp_cli.report.page.build import read_tables
from mechinterp_cli.report.page.circuitmaps import circuit_maps
from mechinterp_cli.report.page.probemaps import probe_maps
from mechinterp_cli.report.page.promptmaps import PromptMap
from mechinterp_cli.report.page.prompts import prompt_content
from mechinterp_cli.runs.manifest import Manifest
from tests.page_runs import reference
from tests.probe_frames import frame

PROBE, CIRCUIT = reference("probe-toy"), reference("circuit-planted")


def content_of(run: str) -> dict[str, Any]:
    path = reference(run)
    content = prompt_content(Manifest.read(path), read_tables(path, {}))
    assert content is not None
    return content


def predictions(**columns: Any) -> pd.DataFrame:
    """Predictions on two prompts in two layers: right but for layer 0 of prompt 1."""
    rows = [
        {
            "site": "resid_post", "layer": layer, "view": "last", "span": "end", "probe": "logistic", "prompt": prompt,
            "fold": 0, "class": "yes", "predicted_class": "no" if (layer, prompt) == (0, 1) else "yes", "target": 1.0,
            "predicted": 1.0, "probability": 0.25 if (layer, prompt) == (0, 1) else 0.875,
        }
        for layer in range(2)
        for prompt in range(2)
    ]  # fmt: skip
    return frame("predictions", [{**row, **columns} for row in rows])


def one_map(rows: pd.DataFrame) -> PromptMap:
    (found,) = probe_maps({"predictions": rows})
    return found


@pytest.mark.parametrize("probe", ["logistic", "mass_mean"])
def test_a_probes_map_holds_what_it_says_of_the_prompt_in_every_layer(probe: str) -> None:
    content = content_of("probe-toy")
    rows = pd.read_parquet(PROBE / "predictions.parquet")
    shown = next(one for one in content["maps"] if one["title"] == f"resid_post, {probe}")
    labels = pd.read_parquet(PROBE / "labels.parquet").set_index("prompt")["class"]
    assert len(content["prompts"]) == len(labels) == 64
    for prompt in content["prompts"]:
        at, own = str(prompt["prompt"]), rows[(rows["prompt"] == prompt["prompt"]) & (rows["probe"] == probe)]
        own = own.sort_values("layer").reset_index()
        assert [shown["rows"][row] for row, _ in shown["cells"]] == own["layer"].astype(str).tolist()
        assert [shown["columns"][column] for _, column in shown["cells"]] == ["end", "end"]
        right = own["predicted_class"] == own["class"]
        known = own["probability"].notna().all()
        np.testing.assert_allclose(shown["values"][at], own["probability"] if known else right, rtol=1e-5)
        assert shown["wrong"][at] == own.index[~right].tolist()
        for name, column in (("probe says", "predicted_class"), ("truth", "class")):
            assert [shown["words"][name][word] for word in shown["told"][at][name]] == own[column].tolist()
        assert shown["about"][at].startswith(f"{right.sum()} of 2 answers on this prompt are right")
        assert prompt["streams"][0]["label"] == labels[prompt["prompt"]]
        assert prompt["spans"]["end"] == [7]


def test_wrong_answers_are_marked() -> None:
    found = one_map(predictions())
    assert found.scale == (0.0, 0.5, 1.0)
    assert found.quantity == "probability of the true class"
    np.testing.assert_array_equal(found.values[1], [0.25, 0.875])
    assert found.wrong[1].tolist() == [True, False]
    assert not found.wrong[0].any()


def test_without_probabilities_a_cell_says_right_or_wrong() -> None:
    found = one_map(predictions(probability=None))
    assert found.quantity == "1 right, 0 wrong"
    np.testing.assert_array_equal(found.values[1], [0.0, 1.0])


def test_of_numbers_a_cell_is_the_error() -> None:
    rows = predictions(probability=None, predicted_class=None, predicted=2.5, **{"class": None})
    found = one_map(rows)
    assert found.quantity == "predicted minus true"
    assert found.scale is None
    np.testing.assert_array_equal(found.values[0], [1.5, 1.5])
    assert found.told[0] == {"probe says": [2.5, 2.5], "truth": [1.0, 1.0]}
    assert not found.wrong
    assert not found.about


def test_heads_are_columns_and_every_view_has_its_map() -> None:
    rows = pd.concat(
        [predictions(site="z", head=head, view=view) for view in ("last", "span first") for head in (2, 0)]
    )
    maps = list(probe_maps({"predictions": rows}))
    assert [one.title for one in maps] == ["z, last", "z, span first"]
    assert all(one.columns == ["0", "2"] and len(one.cells) == 4 for one in maps)


def test_positions_are_numbers_by_which_tokens_are_coloured() -> None:
    rows = pd.concat([predictions(view=f"position {at}", position=at, span=None) for at in (3, 1)])
    assert one_map(rows).columns == [1, 3]


def test_labelled_words_stand_where_their_tokens_are() -> None:
    rows = pd.concat([predictions(word=word, view="word", span=None) for word in (0, 1)])
    labels = [
        {"prompt": 0, "word": 0, "positions": json.dumps([1, 2]), "class": "yes", "target": 1.0},
        {"prompt": 0, "word": 1, "positions": json.dumps([4]), "class": "no", "target": 0.0},
    ]
    prompts = frame("prompts", [
        {"prompt": 0, "stream": "clean", "text": "abcde", "tokens": list("abcde"), "token_ids": list(range(5))}
    ])  # fmt: skip
    tables = {"predictions": rows, "labels": frame("labels", labels), "prompts": prompts}
    content = prompt_content(Manifest.read(PROBE), tables)
    assert content is not None
    assert content["maps"][0]["columns"] == ["word 0", "word 1"]
    assert len(content["maps"][0]["values"]["0"]) == 4
    (prompt,) = content["prompts"]
    assert prompt["spans"] == {"word 0": [1, 2], "word 1": [4]}
    assert prompt["streams"][0]["label"] == "yes, no"


def test_a_circuits_map_holds_the_share_that_each_keeps_of_the_prompt() -> None:
    content = content_of("circuit-planted")
    table, baselines = (pd.read_parquet(CIRCUIT / f"{name}.parquet") for name in ("evaluations", "baselines"))
    ends = baselines.pivot(index="prompt", columns="stream", values="value")
    assert [one["title"] for one in content["maps"]] == [
        "kept, logit_diff, signed scores",
        "kept, logit_diff, absolute scores",
    ]
    for shown, rank in zip(content["maps"], ("signed", "absolute"), strict=True):
        rows = table[table["rank"].isna() | (table["rank"] == rank)]
        assert {int(prompt) for prompt in shown["values"]} == set(rows["prompt"])
        for row in rows.to_dict("records"):
            size, above = row["size"], row["threshold"]
            column = f"{size:g}" if size == size else f"above {above:g}" if above == above else "as given"
            at = shown["cells"].index([shown["rows"].index(row["score"]), shown["columns"].index(column)])
            full, empty = ends.loc[row["prompt"], ["clean", "corrupt"]]
            share = shown["values"][str(row["prompt"])][at]
            assert share == pytest.approx((row["value"] - empty) / (full - empty), rel=1e-5, abs=1e-9)
            assert shown["told"][str(row["prompt"])]["logit_diff"][at] == pytest.approx(row["value"], rel=1e-5)
        values = [value for values in shown["values"].values() for value in values if value is not None]
        assert len(rows) == len(values)
        largest = min(3.0, max(1.0, *map(abs, values)))
        assert shown["scale"] == pytest.approx([-largest, 0.0, largest], rel=1e-5)


def test_shares_weighted_by_what_there_is_to_keep_are_the_faithfulness() -> None:
    manifest, tables = Manifest.read(CIRCUIT), read_tables(CIRCUIT, {})
    faithfulness = pd.read_parquet(CIRCUIT / "faithfulness.parquet")
    ends = tables["baselines"].pivot(index="prompt", columns="stream", values="value")
    (found,) = (one for one in circuit_maps(manifest, tables) if "signed" in one.title)
    apart = (ends["clean"] - ends["corrupt"]).loc[list(found.values)].to_numpy(dtype=float)
    kept = apart @ np.array(list(found.values.values())) / apart.sum()
    for row in faithfulness[faithfulness["rank"] == "signed"].to_dict("records"):
        at = found.cells.index((found.rows.index(row["score"]), found.columns.index(f"{row['size']:g}")))
        assert kept[at] == pytest.approx(row["faithfulness"], abs=1e-9)


def test_where_nothing_lies_between_the_ends_there_is_no_share() -> None:
    manifest, tables = Manifest.read(CIRCUIT), read_tables(CIRCUIT, {})
    prompt = int(tables["evaluations"]["prompt"].iloc[0])
    baselines = tables["baselines"]
    same = baselines.assign(value=baselines["value"].where(baselines["prompt"] != prompt, 2.0))
    found = next(circuit_maps(manifest, {**tables, "baselines": same}))
    assert np.isnan(found.values[prompt]).all()
    assert "too near to each other for a share" in found.about[prompt]


def test_other_methods_runs_have_no_such_maps() -> None:
    tables = read_tables(reference("patch-induction-toy"), {})
    assert not list(probe_maps(tables))
    assert not list(circuit_maps(Manifest.read(reference("patch-induction-toy")), tables))


def test_probes_colour_the_tokens_that_they_read_alone() -> None:
    assert one_map(predictions()).stream == "clean"
    tables = read_tables(CIRCUIT, {})
    assert {one.stream for one in circuit_maps(Manifest.read(CIRCUIT), tables)} == {""}
