"""Circuits of neurons as they are shown: boxes, counts, which size is drawn, and words."""

import math

import pandas as pd
import pytest

from mechinterp_cli.report.circuit_words import EDGES, NEURONS, Drawn
from mechinterp_cli.report.neuron_drawing import drawing
from mechinterp_cli.report.neuron_graph import NeuronPicture, neuron_picture, strongest

PNG = b"\x89PNG\r\n\x1a\n"
ITEMS = {"a0.h1": 0.5, "a2.h0": -2.0, "m0.n7": 0.25, "m0.n120": 0.5, "m2.n3": -1.0}


def items(values: dict[str, float], size: float = 0.1) -> pd.DataFrame:
    return pd.DataFrame({"source": list(values), "value": list(values.values()), "size": size})


def picture(values: dict[str, float]) -> NeuronPicture:
    found = neuron_picture(items(values), title="A circuit", lines=("task", ""), heads=4)
    assert found is not None
    return found


def test_an_mlp_is_one_box_with_the_number_and_the_sum_of_its_neurons() -> None:
    boxes = {box.name: box for box in picture(ITEMS).boxes}
    assert set(boxes) == {"0.1", "2.0", "MLP 0", "MLP 2", "embed", "logits"}
    assert (boxes["MLP 0"].count, boxes["MLP 0"].score) == (2, 0.75)
    assert (boxes["MLP 2"].count, boxes["0.1"].count) == (1, 0)
    assert math.isnan(boxes["embed"].score)


def test_layers_stand_above_each_other_and_mlps_beside_the_heads() -> None:
    shape = picture(ITEMS)
    boxes = {box.name: box for box in shape.boxes}
    assert shape.rows == ("", "layer 0", "layer 2", "")
    assert boxes["0.1"].y == boxes["MLP 0"].y < boxes["2.0"].y < boxes["logits"].y
    assert [boxes[name].x for name in ("0.1", "2.0", "MLP 0", "MLP 2")] == [1, 0, 4, 4]


def test_a_circuit_without_scores_is_drawn_too_and_nothing_is_not() -> None:
    shape = picture(dict.fromkeys(ITEMS, float("nan")))
    assert strongest(shape) == 1
    assert drawing(shape).png().startswith(PNG)
    assert neuron_picture(items({}), title="", lines=(), heads=4) is None


def test_outlines_tell_sign_and_size() -> None:
    spec = drawing(picture(ITEMS)).spec()
    rows = {row["name"]: row for data in spec["datasets"].values() for row in data if "sign" in row}
    assert rows["2.0"]["sign"] == rows["MLP 2"]["sign"] == "hurts"
    assert rows["2.0"]["_width"] > rows["MLP 2"]["_width"] > rows["0.1"]["_width"]
    assert rows["embed"]["sign"] == ""
    words = {row["text"] for data in spec["datasets"].values() for row in data if "text" in row}
    assert {"2 neurons", "1 neuron", "MLP 0", "layer 2"} <= words


@pytest.mark.parametrize(("tested", "size"), [([], 0.2), ([0.1], 0.1), ([0.7], 0.2)])
def test_the_smallest_circuit_that_has_enough_is_drawn_unless_one_is_tested(tested: list[float], size: float) -> None:
    drawn = Drawn(NEURONS, ("task",), "logit_diff", 8, 4, 1)
    members = pd.concat([items({"a0.h1": 1.0}, 0.1), items({"m0.n1": 0.5}, 0.2), items({"m1.n1": 0.2}, 1.0)])
    faithful = pd.DataFrame({"size": [0.1, 0.2, 1.0], "faithfulness": [0.5, 0.93, 1.0]})
    assert drawn.size(members, tested, faithful) == size
    none = faithful.assign(faithfulness=0.1)
    assert drawn.size(members, [], none) == 1.0


def test_neurons_have_words_of_their_own() -> None:
    row = {"source": "m3.n17", "target": "all"}
    assert NEURONS.named(row) == "m3.n17"
    assert EDGES.named({"source": "a0.h1", "target": "m3"}) == "a0.h1->m3"
    assert (NEURONS.counted(1), NEURONS.counted(1200)) == ("1 head or neuron", "1,200 heads and neurons")
    shape = Drawn(NEURONS, ("task",), "logit_diff", 8, 4, 1).picture(items(ITEMS), "eap", "all")
    assert isinstance(shape, NeuronPicture)
    assert shape.lines[0] == "task, all, 5 heads and neurons"
    assert "its neurons' sum, on logit_diff, mean of 8 prompts" in shape.lines[1]
