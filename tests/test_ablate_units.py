"""Units of `ablate`: what a block of the config stands for, how it is named, and what is refused."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.methods.ablate.expand import expand, find, names, overlapping
from mechinterp_cli.methods.ablate.options import AblateOptions, RankingRun
from mechinterp_cli.methods.ablate.ranking import Ranking, explain, load_ranking
from mechinterp_cli.methods.ablate.units import Part, Unit, merge
from mechinterp_cli.methods.directions import orthonormal, read_directions
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.load import load_model
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.schema import validate
from mechinterp_cli.runs.tables import write_parquet
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from tests.experiments import Run, config_of, run_method
from tests.families import build

LENGTH = 8
Block = dict[str, Any]


@cache
def anatomy_of(family: str) -> Anatomy:
    """Of a tiny model with three layers."""
    return find_anatomy(build(family))


def prompt(spans: Mapping[str, tuple[int, ...]], *, length: int = LENGTH, template: str = "t") -> Prompt:
    return Prompt(
        clean="x", clean_tokens=tuple(range(length)), answer=(1,), answer_text="a", spans=spans, template=template
    )


EARLY = prompt({"S": (1, 2), "S2": (4,), "end": (LENGTH - 1,)})
LATE = prompt({"S": (3, 4), "S2": (5,), "end": (LENGTH - 1,)})
PROMPTS = PromptSet("given", (EARLY, LATE))


@pytest.fixture
def units_of(tmp_path: Path) -> Callable[..., list[Unit]]:
    """Expands blocks as a config file gives them."""

    def expanded(
        *blocks: Block, family: str = "llama", prompts: PromptSet = PROMPTS, anatomy: Anatomy | None = None
    ) -> list[Unit]:
        loaded = config_of(tmp_path, {"units": list(blocks), "values": ["zero"]}, method="ablate")
        options = loaded.config.method
        assert isinstance(options, AblateOptions)
        return expand(loaded, anatomy or anatomy_of(family), prompts, options.units)

    return expanded


Units = Callable[..., list[Unit]]


def said(error: pytest.ExceptionInfo[UserError]) -> str:
    """Cause and remedy, without the file's folder."""
    return f"{error.value.cause.split('experiment.yaml:')[-1]} | {error.value.remedy}"


# What a unit is


def test_heads_are_z_of_one_query_head(units_of: Units) -> None:
    units = units_of({"kind": "head"})
    assert [unit.name for unit in units] == [f"{layer}.{head}" for layer in range(3) for head in range(4)]
    assert [unit.index for unit in units] == list(range(12))
    assert units[6].parts == (Part("z", 1, (2,)),)
    assert (units[6].kind, units[6].layer, units[6].number) == ("head", 1, 2)
    assert units[6].place.positions == (tuple(range(LENGTH)),) * 2


def test_key_value_heads_are_all_query_heads_that_share_them(units_of: Units) -> None:
    heads = anatomy_of("llama").layers[0].heads
    assert heads is not None
    assert (heads.query, heads.key_value) == (4, 2)
    units = units_of({"kind": "kv_head", "layers": [1]})
    assert {unit.name: unit.parts for unit in units} == {
        "kv1.0": (Part("z", 1, (0, 1)),),
        "kv1.1": (Part("z", 1, (2, 3)),),
    }
    assert [unit.number for unit in units] == [0, 1]
    own = units_of({"kind": "kv_head", "layers": [1]}, family="gpt2")
    assert [unit.parts[0].units for unit in own] == [(0,), (1,), (2,), (3,)]


def test_groups_are_joined_and_all_is_one_unit(units_of: Units) -> None:
    units = units_of(
        {"kind": "head", "layers": [2], "heads": [[3, 1, 3], 0]},
        {"kind": "kv_head", "layers": [2], "heads": [[0, 1]]},
        {"kind": "head", "layers": [0], "heads": "all"},
        {"kind": "neuron", "layers": [1], "neurons": [5, [6, 7]]},
        {"kind": "neuron", "layers": [0]},
    )
    assert {unit.name: (unit.number, unit.parts[0].units) for unit in units} == {
        "2.3+2.1": (None, (1, 3)),
        "2.0": (0, (0,)),
        "kv2.0+kv2.1": (None, (0, 1, 2, 3)),
        "0.all": (None, None),
        "neuron1.5": (5, (5,)),
        "neuron1.6+neuron1.7": (None, (6, 7)),
        "neuron0.all": (None, None),
    }
    each = units_of({"kind": "neuron", "layers": [0], "neurons": "each"})
    assert len(each) == anatomy_of("llama").layers[0].d_mlp


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_blocks_and_layers_also_where_blocks_are_parallel(units_of: Units, family: str) -> None:
    units = units_of({"kind": "attention"}, {"kind": "mlp", "layers": [2, 0]}, {"kind": "layer"}, family=family)
    parts = {unit.name: unit.parts for unit in units}
    assert list(parts) == ["attention0", "attention1", "attention2", "mlp2", "mlp0", "layer0", "layer1", "layer2"]
    assert parts["attention1"] == (Part("attn_out", 1),)
    assert parts["mlp0"] == (Part("mlp_out", 0),)
    assert parts["layer1"] == (Part("attn_out", 1), Part("mlp_out", 1))


def test_a_window_is_one_unit_per_centre_with_all_its_layers(units_of: Units) -> None:
    units = units_of(
        {"kind": "layer", "layers": {"window": 2}},
        {"kind": "head", "layers": {"window": 3}, "heads": [1]},
        {"kind": "layer", "layers": [1]},
    )
    found = {unit.name: sorted({part.layer for part in unit.parts}) for unit in units}
    assert found == {
        "layer0w2": [0], "layer1w2": [0, 1], "layer2w2": [1, 2],
        "0w3.1": [0, 1], "1w3.1": [0, 1, 2], "2w3.1": [1, 2],
        "layer1": [1],
    }  # fmt: skip
    assert [unit.layer for unit in units[:3]] == [0, 1, 2]
    assert len(units[1].parts) == 4


def test_edges_are_scores_with_a_query_and_keys(units_of: Units) -> None:
    units = units_of(
        {"kind": "edge", "layers": [1], "positions": ["end"], "keys": ["S", "S2"]},
        {"kind": "edge", "layers": {"window": 3}, "heads": [2], "positions": "last", "keys": ["S"]},
    )
    assert [unit.name for unit in units] == ["edge1", "edge0w3.2", "edge1w3.2", "edge2w3.2"]
    assert units[0].parts == (Part("scores", 1),)
    assert units[0].place.positions == ((7,), (7,))
    assert units[0].keys is not None
    assert units[0].keys.positions == ((1, 2, 4), (3, 4, 5))
    assert units[2].parts == tuple(Part("scores", layer, (2,)) for layer in range(3))
    # one object for a block's keys, so that its heads become one edit
    each = units_of({"kind": "edge", "layers": [1], "heads": "each", "positions": "last", "keys": ["S"]})
    (merged,) = merge(each)
    assert merged.part.units == (0, 1, 2, 3)


def test_edges_of_each_position_are_those_that_exist(units_of: Units) -> None:
    block = {"kind": "edge", "layers": [0], "positions": "each", "keys": ["S"]}
    units = units_of(block)
    assert [unit.place.position for unit in units] == [1, 2, 3, 4, 5, 6, 7]
    # the later span begins at 3: before it, that prompt has no such edge
    assert [unit.place.positions for unit in units[:3]] == [((1,), None), ((2,), None), ((3,), (3,))]
    assert units[0].name == "edge0@1<S"
    everything = units_of({**block, "keys": "all"})
    assert len(everything) == LENGTH
    assert everything[0].keys is None


@pytest.mark.parametrize(
    ("positions", "keys", "problem"),
    [
        (["S"], ["S2"], "positions[0]: the edge from S to S2 looks forward in time: in prompt 0 key 4 comes after the"),
        (["end", 4], ["S2"], "positions[1]: the edge from 4 to S2 looks forward in time: in prompt 1 key 5 comes"),
        (["S2-1"], ["S", "end"], "positions[0]: the edge from S2-1 to S+end looks forward in time: in prompt 0 key 7"),
    ],
)
def test_an_edge_that_looks_forward_is_refused(units_of: Units, positions: Any, keys: Any, problem: str) -> None:
    with pytest.raises(UserError) as error:
        units_of({"kind": "edge", "positions": positions, "keys": keys})
    assert problem in said(error)
    assert "`positions` are the tokens that look" in said(error)
    backward = units_of({"kind": "edge", "layers": [1], "positions": ["end"], "keys": keys})
    assert len(backward) == 1


def test_where_nothing_is_causal_nothing_looks_forward(units_of: Units) -> None:
    both_ways = replace(anatomy_of("llama"), causal=False)
    block = {"kind": "edge", "layers": [1], "positions": ["S"], "keys": ["end"]}
    assert [unit.name for unit in units_of(block, anatomy=both_ways)] == ["edge1"]
    each = units_of({**block, "positions": "each"}, anatomy=both_ways)
    assert len(each) == LENGTH


# Names


def test_names_carry_the_place_where_there_are_several(units_of: Units) -> None:
    units = units_of({"kind": "head", "layers": [1], "heads": [0, 1], "positions": ["S2", 3, ["S", "end"]]})
    assert [unit.name for unit in units] == ["1.0@S2", "1.0@3", "1.0@S+end", "1.1@S2", "1.1@3", "1.1@S+end"]
    units = units_of({"kind": "mlp"}, {"kind": "mlp", "layers": [1], "positions": ["S2"]})
    assert [unit.name for unit in units] == ["mlp0", "mlp1@all", "mlp2", "mlp1@S2"]
    units = units_of(
        {"kind": "edge", "layers": [1], "positions": ["end", "S2"], "keys": ["S"]},
        {"kind": "edge", "layers": [1], "positions": ["end"], "keys": "all"},
    )
    assert [unit.name for unit in units] == ["edge1@end<S", "edge1@S2<S", "edge1@end<all"]


def test_positions_of_several_templates_have_different_names(units_of: Units) -> None:
    prompts = PromptSet("given", (prompt({}, length=2), prompt({}, length=2, template="u")))
    units = units_of({"kind": "mlp", "layers": [0], "positions": "each"}, prompts=prompts)
    assert [unit.name for unit in units] == ["mlp0@0/t", "mlp0@1/t", "mlp0@0/u", "mlp0@1/u"]
    assert units[0].place.positions == ((0,), None)


@pytest.mark.parametrize(
    "blocks",
    [
        [{"kind": "head", "layers": [1, 1]}],
        [{"kind": "head", "layers": [1], "heads": [0, 0]}],
        [{"kind": "mlp", "positions": ["end"]}, {"kind": "mlp", "positions": "last"}],
    ],
)
def test_the_same_unit_twice_is_refused(units_of: Units, blocks: Sequence[Block]) -> None:
    with pytest.raises(UserError, match=r"is there already \(ablate\.units\[0\]\)"):
        units_of(*blocks)


def test_a_name_is_found_or_the_nearest_is_said(units_of: Units, tmp_path: Path) -> None:
    units = names(units_of({"kind": "attention"}, {"kind": "mlp", "positions": ["S", "S2"]}))
    loaded = config_of(tmp_path, {"units": [{"kind": "mlp"}], "sets": {"a": ["mlp1", "mlp2"]}}, method="ablate")
    path = ("ablate", "sets", "a", 1)
    assert find(units, "mlp1@S2", loaded, path).parts == (Part("mlp_out", 1),)
    with pytest.raises(UserError) as error:
        find(units, "atention1", loaded, path)
    assert "ablate.sets.a[1]: 'atention1' is not among the units: attention0, attention1" in said(error)
    assert "Did you mean 'attention1'?" in said(error)
    with pytest.raises(UserError) as error:
        find(units, "mlp2", loaded, path)
    assert error.value.remedy == "Say where: mlp2@S, mlp2@S2."
    with pytest.raises(UserError) as error:
        find(units, "9.9", loaded, path)
    assert error.value.remedy == "Add it to ablate.units, or name another."


# What is refused


@pytest.mark.parametrize(
    ("family", "block", "problem"),
    [
        ("llama", {"kind": "head", "layers": [0, 3]}, "units[0].layers[1]: 3 is outside 0..2"),
        ("llama", {"kind": "head", "heads": [0, [1, 4]]}, "units[0].heads[1]: 4 is outside 0..3"),
        (
            "llama",
            {"kind": "kv_head", "heads": [2]},
            "units[0].heads[0]: 2 is outside 0..1 | toy-induction has 2 key/v",
        ),
        ("llama", {"kind": "edge", "heads": [4], "keys": "all"}, "units[0].heads[0]: 4 is outside 0..3"),
        ("llama", {"kind": "neuron", "neurons": [9999]}, "units[0].neurons[0]: 9999 is outside"),
        ("llama", {"kind": "mlp", "positions": ["S2", "S3"]}, "units[0].positions[1]: span 'S3' of task 'given' does"),
        ("llama", {"kind": "mlp", "positions": [8]}, "units[0].positions[0]: 8 is outside 0..7"),
        ("llama", {"kind": "edge", "keys": ["S3"]}, "units[0].keys: span 'S3'"),
        ("llama", {"kind": "edge"}, "units[0]: an edge needs keys"),
        ("llama", {"kind": "mlp", "heads": "each"}, "units[0].heads: mlp has no heads | Leave out heads for mlp."),
        ("llama", {"kind": "head", "neurons": [1]}, "units[0].neurons: head has no neurons"),
        ("llama", {"kind": "head", "keys": ["S"]}, "units[0].keys: head has no keys"),
        ("llama", {"kind": "layer", "file": "x"}, "units[0].file: layer has no file"),
        ("llama", {"kind": "direction"}, "units[0]: a direction needs a file"),
        ("mixtral", {"kind": "neuron"}, "units[0].kind: neuron: the MLP has no single down projection (mixture of ex"),
        ("deepseek_v3", {"kind": "neuron", "layers": [0, 1]}, "units[0].layers[1]: 1: the MLP has no single down proj"),
        ("mamba", {"kind": "layer"}, "units[0].kind: layer: "),
        ("mamba", {"kind": "head"}, "units[0].kind: head: "),
        ("gptj", {"kind": "edge", "keys": "all"}, "units[0].kind: edge: this layer's attention does not go through"),
        ("falcon", {"kind": "kv_head"}, "units[0].kind: kv_head: this layer's attention does not go through"),
    ],
)
def test_what_a_model_does_not_have_is_refused_by_key(units_of: Units, family: str, block: Block, problem: str) -> None:
    with pytest.raises(UserError) as error:
        units_of(block, family=family)
    assert f"ablate.{problem}" in said(error)
    assert error.value.remedy


def test_what_some_layers_lack_is_left_out_of_all_and_of_windows(units_of: Units) -> None:
    assert [unit.name for unit in units_of({"kind": "neuron"}, family="deepseek_v3")] == ["neuron0.all"]
    windows = units_of({"kind": "neuron", "layers": {"window": 3}}, family="deepseek_v3")
    assert [[part.layer for part in unit.parts] for unit in windows] == [[0], [0]]


# Directions


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    """Writes directions into a file."""

    def write(tensors: Mapping[str, Tensor], name: str = "found") -> str:
        save_file(dict(tensors), tmp_path / f"{name}.safetensors")
        return str(tmp_path / f"{name}.safetensors")

    return write


File = Callable[..., str]
D = 32


def test_directions_are_orthonormal_rows_of_the_same_span(units_of: Units, file: File) -> None:
    rows = torch.randn(3, D, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1.0], [1e6]])
    one = torch.randn(D, generator=torch.Generator().manual_seed(1)) * 1e-25
    path = file({"resid_post.2": rows, "attn_out.0": one})
    units = units_of({"kind": "direction", "file": path, "positions": ["S", "S2"]})
    assert [unit.name for unit in units] == ["attn_out.0@S", "attn_out.0@S2", "resid_post.2@S", "resid_post.2@S2"]
    assert units[2].parts == (Part("resid_post", 2),)
    assert (units[2].layer, units[2].number) == (2, None)
    basis = units[2].basis
    assert basis is not None
    assert basis is units[3].basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), atol=1e-6, rtol=0)
    unit_rows = torch.nn.functional.normalize(rows.double(), dim=1).float()
    torch.testing.assert_close(unit_rows @ basis.T @ basis, unit_rows, atol=1e-6, rtol=0)
    for sign in (1, -1):
        torch.testing.assert_close(orthonormal(sign * rows)[0], sign * unit_rows[0], atol=1e-6, rtol=0)
    single = units[0].basis
    assert single is not None
    torch.testing.assert_close(single[0], (one * 1e25) / (one * 1e25).norm(), atol=1e-6, rtol=0)


def test_directions_in_half_precision_are_taken(file: File) -> None:
    rows = torch.randn(4, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    (found,) = read_directions(file({"resid_post.1": rows}), anatomy_of("llama"))
    assert found.basis.dtype == torch.float32
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(4), atol=1e-6, rtol=0)


def test_layers_choose_among_the_file(units_of: Units, file: File) -> None:
    path = file({"resid_post.2": torch.ones(D), "resid_pre.1": torch.ones(D)})
    assert [u.name for u in units_of({"kind": "direction", "file": path, "layers": [2]})] == ["resid_post.2"]
    with pytest.raises(UserError) as error:
        units_of({"kind": "direction", "file": path, "layers": [2, 0]})
    assert "units[0].layers[1]: 0: the file has no direction of this layer | It holds resid_pre.1, resi" in said(error)
    with pytest.raises(UserError, match="a direction has no window"):
        units_of({"kind": "direction", "file": path, "layers": {"window": 2}})


def test_a_file_of_probes_has_views_and_heads_too(units_of: Units, file: File) -> None:
    tensors = {"resid_post.2@span S": torch.ones(D), "resid_post.2@last": torch.eye(D)[:2], "z.1.0": torch.ones(8)}
    units = units_of({"kind": "direction", "file": file(tensors), "layers": [2]})
    assert [unit.name for unit in units] == ["resid_post.2@last", "resid_post.2@span S"]


def test_two_files_give_two_names(units_of: Units, file: File) -> None:
    a, b = file({"resid_post.2": torch.ones(D)}, "a"), file({"resid_post.2": torch.ones(D)}, "b")
    units = units_of({"kind": "direction", "file": a}, {"kind": "direction", "file": b})
    assert [unit.name for unit in units] == ["a:resid_post.2", "b:resid_post.2"]


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"resid_post.3": torch.ones(D)}, "resid_post.3: layer 3 is outside 0..2"),
        ({"resid_post.1": torch.ones(2, D + 1)}, f"of shape [2, {D + 1}], not [directions, {D}] or [{D}]"),
        ({"resid_post.1": torch.ones(1, 2, D)}, f"of shape [1, 2, {D}], not"),
        ({"resid_post.1": torch.ones(0, D)}, f"of shape [0, {D}], not"),
        ({"z.1": torch.ones(D)}, "holds z.1, and no direction of the residual stream | Tensors are named SITE.LAYER"),
        ({"resid_post.1.0": torch.ones(D)}, "'resid_post.1.0' names no site; the file holds resid_post.1.0"),
        ({"probe": torch.ones(D), "x": torch.ones(D)}, "'probe' names no site; the file holds probe, x"),
        ({"resid_post.01": torch.ones(D)}, "'resid_post.01' names no site"),
        ({"embed.1": torch.ones(D)}, "embed.1: embed is what enters layer 0"),
        ({"resid_post.1": torch.stack([torch.ones(D), torch.zeros(D)])}, "resid_post.1: row 1 is zero"),
        ({"resid_post.1": torch.tensor([[1.0] * D, [2.0] * D])}, "resid_post.1: its 2 rows span 1 dimensions only"),
        ({"resid_post.1": torch.full((D,), torch.nan)}, "resid_post.1 holds something other than finite real numbers"),
        ({"resid_post.1": torch.ones(D, dtype=torch.int64)}, "something other than finite real numbers"),
        ({}, "holds no tensor"),
    ],
)
def test_bad_directions_are_refused(units_of: Units, file: File, tensors: Mapping[str, Tensor], problem: str) -> None:
    with pytest.raises(UserError) as error:
        units_of({"kind": "direction", "file": file(tensors)})
    assert "ablate.units[0].file: " in said(error)
    assert problem in said(error)
    assert error.value.remedy


def test_a_site_that_the_model_lacks_has_no_direction(units_of: Units, file: File) -> None:
    with pytest.raises(UserError, match=r"resid_mid\.1: "):
        units_of({"kind": "direction", "file": file({"resid_mid.1": torch.ones(D)})}, family="gpt_neox")


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("x.pt", b"", "is no .safetensors file"),
        ("x.safetensors", None, "does not exist"),
        ("x.safetensors", b"\x80\x00", "cannot be read"),
        ("x.safetensors", b"\xff" * 64, "cannot be read"),
    ],
)
def test_a_bad_file_of_directions_is_refused(
    units_of: Units, tmp_path: Path, name: str, data: bytes | None, problem: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        units_of({"kind": "direction", "file": str(tmp_path / name)})
    assert problem in said(error)
    assert error.value.remedy


def test_more_directions_than_dimensions_are_dependent() -> None:
    assert orthonormal(torch.eye(D)).shape == (D, D)
    with pytest.raises(UserError, match="its 33 rows span 32 dimensions only"):
        orthonormal(torch.cat([torch.eye(D), torch.ones(1, D)]))


# Overlaps


def edge(layer: int, positions: Any, keys: Any, **more: Any) -> Block:
    return {"kind": "edge", "layers": [layer], "positions": positions, "keys": keys, **more}


@pytest.mark.parametrize(
    ("a", "b", "clash"),
    [
        ({"kind": "head", "heads": [1]}, {"kind": "kv_head", "heads": [0]}, True),
        ({"kind": "head", "heads": [2]}, {"kind": "kv_head", "heads": [0]}, False),
        ({"kind": "head", "heads": [1]}, {"kind": "head", "heads": [[1, 2]]}, True),
        ({"kind": "head", "heads": [1]}, {"kind": "head", "heads": [[2, 3]]}, False),
        ({"kind": "head", "heads": "all"}, {"kind": "head", "heads": [3]}, True),
        ({"kind": "layer"}, {"kind": "mlp"}, True),
        ({"kind": "attention"}, {"kind": "mlp"}, False),
        ({"kind": "attention"}, {"kind": "head", "heads": [1]}, True),
        ({"kind": "attention"}, {"kind": "head", "heads": [1], "layers": [2]}, False),
        ({"kind": "attention"}, {"kind": "head", "heads": [1], "layers": {"window": 3}}, True),
        ({"kind": "mlp"}, {"kind": "neuron", "neurons": [3]}, True),
        ({"kind": "attention"}, {"kind": "neuron", "neurons": [3]}, False),
        ({"kind": "mlp", "positions": ["S"]}, {"kind": "mlp", "positions": ["S2"]}, True),
        ({"kind": "mlp", "positions": ["end"]}, {"kind": "mlp", "positions": ["S2"]}, False),
        ({"kind": "mlp", "positions": ["end"]}, {"kind": "mlp"}, True),
        ({"kind": "mlp", "positions": ["S2"]}, {"kind": "neuron", "positions": [5]}, True),
        ({"kind": "mlp", "positions": ["S2"]}, {"kind": "neuron", "positions": [6]}, False),
        ({"kind": "head", "heads": [2]}, edge(1, ["end"], ["S"]), True),
        ({"kind": "head", "heads": [2], "positions": ["S"]}, edge(1, ["end"], ["S"]), False),
        ({"kind": "head", "heads": [2]}, edge(1, ["end"], ["S"], heads=[1]), False),
        ({"kind": "attention"}, edge(1, ["end"], ["S"], heads=[1]), True),
        (edge(1, ["end"], ["S"]), edge(1, ["end"], [2, "S2"], heads=[0]), True),
        (edge(1, ["end"], [1]), edge(1, ["end"], ["S2"]), False),
        (edge(1, ["end"], ["S"]), edge(1, ["S2"], ["S"]), False),
        (edge(1, ["end"], "all"), edge(1, ["end"], ["S"]), True),
        (edge(1, ["end"], ["S"]), edge(2, ["end"], ["S"]), False),
    ],
)
def test_overlaps(units_of: Units, a: Block, b: Block, clash: bool) -> None:
    # S and S2 meet in the second prompt alone, at position 5.
    spans = {"S": (1, 2), "S2": (4,), "end": (7,)}, {"S": (3, 5), "S2": (5,), "end": (7,)}
    prompts = PromptSet("given", tuple(prompt(span) for span in spans))
    first, *others = units_of(*({"layers": [1], **block} for block in (a, b)), prompts=prompts)
    other = others[0] if len(others) == 1 else next(unit for unit in others if unit.layer == 1)
    for pair in ([first, other], [other, first]):
        found = overlapping(pair)
        assert (found is not None) == clash
        assert found is None or list(found) == pair


def test_positions_of_different_prompts_are_different_places(units_of: Units) -> None:
    prompts = PromptSet("given", (prompt({"a": (1,), "b": (2,)}), prompt({"a": (2,), "b": (1,)})))
    units = units_of({"kind": "mlp", "layers": [1], "positions": ["a", "b"]}, prompts=prompts)
    assert overlapping(units) is None


def test_directions_overlap_with_edits_of_their_own_site(units_of: Units, file: File) -> None:
    path = file({"attn_out.1": torch.eye(D)[:2], "resid_post.1": torch.ones(D)})
    blocks = [{"kind": "direction", "file": path}, {"kind": "head", "layers": [1]}, {"kind": "attention"}]
    *directions, _, _, _, head, _, attention, _ = units_of(*blocks)
    assert (head.name, attention.name) == ("1.3", "attention1")
    assert overlapping([*directions, head]) is None
    assert overlapping([*directions, attention]) == (directions[1], attention)
    assert {unit.name for unit in directions} == {"attn_out.1", "resid_post.1"}
    assert overlapping([directions[0], directions[0]]) is not None


def both(units_of: Units, file: File, rows: Tensor, others: Tensor, **where: Any) -> list[Unit]:
    """Directions of one site from two files."""
    paths = [file({"resid_post.1": tensor}, name) for tensor, name in ((rows, "a"), (others, "b"))]
    blocks = [{"kind": "direction", "file": path} for path in paths]
    blocks[1] |= where
    return units_of(*blocks)


def projection(rows: Tensor) -> Tensor:
    """Onto the span of any rows, by the pseudo-inverse."""
    onto: Tensor = torch.linalg.pinv(rows.double()) @ rows.double()
    return onto


def test_directions_of_one_site_are_taken_out_as_one_span(units_of: Units, file: File) -> None:
    every = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    rows, others = every[:2], every[2:]
    units = both(units_of, file, rows, others)
    assert overlapping(units) is None
    for order in (units, units[::-1]):
        (merged,) = merge(order)
        assert merged.basis is not None
        assert merged.basis.shape == (5, D)
        torch.testing.assert_close(merged.basis @ merged.basis.T, torch.eye(5), atol=1e-6, rtol=0)
        found = projection(merged.basis)
        torch.testing.assert_close(found, projection(torch.cat([rows, others])), atol=1e-5, rtol=0)
    # A positive control: one after the other leaves something of the span.
    first, second = (projection(x) for x in (rows, others))
    eye = torch.eye(D).double()
    assert ((eye - first) @ (eye - second) @ projection(rows)).norm() > 0.1
    assert merge(units)[0].basis is merge(list(units))[0].basis
    assert merge(units[:1])[0].basis is units[0].basis


@pytest.mark.parametrize(("shift", "rank"), [(0.0, 1), (1e-6, 1), (1e-2, 2)])
def test_what_two_directions_share_counts_once(units_of: Units, file: File, shift: float, rank: int) -> None:
    row = torch.ones(1, D)
    other = row + shift * torch.eye(D)[:1] * D**0.5
    (merged,) = merge(both(units_of, file, row, other))
    assert merged.basis is not None
    assert merged.basis.shape == (rank, D)
    torch.testing.assert_close(row @ merged.basis.T @ merged.basis, row, atol=1e-5, rtol=0)


def test_directions_that_meet_in_part_are_one_span_there_and_their_own_elsewhere(units_of: Units, file: File) -> None:
    spans = {"S": (1, 2), "S2": (2, 3)}, {"S": (4,), "S2": (6,)}
    prompts = PromptSet("given", tuple(prompt(span) for span in spans))
    paths = [file({"resid_post.1": torch.eye(D)[i]}, name) for i, name in enumerate("ab")]
    places = (["S"], ["S2"])
    blocks = [{"kind": "direction", "file": path, "positions": at} for path, at in zip(paths, places, strict=True)]
    units = units_of(*blocks, prompts=prompts)
    found = {
        (i, at): projection(one.basis).diagonal().round().nonzero().flatten().tolist()
        for one in merge(units)
        for i, chosen in enumerate(one.place.positions)
        for at in chosen or ()
        if one.basis is not None
    }
    assert found == {(0, 1): [0], (0, 2): [0, 1], (0, 3): [1], (1, 4): [0], (1, 6): [1]}
    assert sum(len(at or ()) for one in merge(units) for at in one.place.positions) == len(found)
    assert {one.place.span for one in merge(units)} == {"S without S2", "S and S2", "S2 without S"}


def test_the_first_pair_of_many_is_found(units_of: Units) -> None:
    units = units_of({"kind": "neuron", "neurons": "each"}, {"kind": "head"}, {"kind": "layer", "layers": [2]})
    assert overlapping(units[:-1]) is None
    found = overlapping(units)
    assert found is not None
    assert found[1].name == "layer2"
    assert overlapping([]) is None


# Rankings of earlier runs


@pytest.fixture(scope="module")
def heads_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("heads")
    return run_method(folder, "heads", {"scores": ["induction", "previous_token"]})


@pytest.fixture(scope="module")
def patch_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    sites = [
        {"kind": "z", "layers": "all", "positions": "all"},
        {"kind": "z", "layers": [0], "heads": [[0, 1]], "positions": "all"},
        {"kind": "mlp_out", "layers": "all", "positions": ["copied", "end"]},
        {"kind": "attn_out", "layers": {"window": 2}, "positions": "all"},
        {"kind": "resid_post", "layers": "all", "positions": "all"},
    ]
    return run_method(tmp_path_factory.mktemp("patch"), "patch", {"sites": sites}, metrics=["logit_diff", "prob"])


@cache
def toy() -> Anatomy:
    return load_model(ModelOptions(id="toy-induction", device="cpu")).anatomy


@pytest.fixture
def rank(tmp_path: Path, units_of: Units) -> Callable[..., tuple[Ranking, list[Unit]]]:
    """Ranks the units of blocks by a run."""

    def ranked(
        folder: Path, *blocks: Block, anatomy: Anatomy | None = None, prompts: PromptSet = PROMPTS, **options: Any
    ) -> tuple[Ranking, list[Unit]]:
        units = units_of(*blocks, anatomy=anatomy or toy(), prompts=prompts)
        wanted = {"run": str(folder), **options}
        section = {"units": list(blocks), "design": "cumulative", "cumulative": {"ranking": wanted}}
        loaded = config_of(tmp_path, section, method="ablate")
        return load_ranking(loaded, RankingRun(**wanted), units, anatomy or toy()), units

    return ranked


Rank = Callable[..., tuple[Ranking, list[Unit]]]
HEADS = {"kind": "head"}


def test_heads_by_a_score(rank: Rank, heads_run: Run) -> None:
    ranking, units = rank(heads_run.path, HEADS, {"kind": "mlp"}, score="induction")
    rows = heads_run.table("scores")
    rows = rows[rows["score"] == "induction"].sort_values("value", ascending=False)
    names = [f"{layer}.{head}" for layer, head in zip(rows["layer"], rows["head"], strict=True)]
    assert [units[index].name for index in ranking.units] == names
    assert list(ranking.values) == rows["value"].tolist()
    assert (ranking.missing, ranking.unused) == (2, 0)
    assert (ranking.column, ranking.model) == ("scores.value of induction", "toy-induction")
    assert explain(ranking) == (
        "the ranking (scores.value of induction) leaves out 2 units that the earlier run says nothing of"
    )
    ranking, units = rank(heads_run.path, {"kind": "head", "layers": [1], "heads": [3, [0, 1]]}, score="induction")
    assert [units[index].name for index in ranking.units] == ["1.3"]
    assert (ranking.missing, ranking.unused) == (1, 7)


def test_another_column_of_the_scores(rank: Rank, heads_run: Run) -> None:
    ranking, _ = rank(heads_run.path, HEADS, score="induction", column="ci_low")
    rows = heads_run.table("scores")
    lows = rows[rows["score"] == "induction"]["ci_low"]
    assert list(ranking.values) == sorted(lows, reverse=True)


def test_units_by_the_effects_of_a_patch_run(rank: Rank, patch_run: Run) -> None:
    rows = patch_run.table("summary")
    rows = rows[(rows["metric"] == "logit_diff") & (rows["aggregate"] == "ratio_of_means") & (rows["group"] == "all")]
    heads = rows[(rows["site"] == "z") & rows["head"].notna()].sort_values("normalized", ascending=False)
    names = [f"{layer}.{head}" for layer, head in zip(heads["layer"], heads["head"], strict=True)]
    ranking, units = rank(patch_run.path, HEADS)
    assert [units[index].name for index in ranking.units] == names
    assert (ranking.column, ranking.missing) == ("summary.normalized of logit_diff", 0)
    by_size, units = rank(patch_run.path, HEADS, metric="prob", column="effect", absolute=True)
    sizes = [abs(value) for value in by_size.values]
    assert sizes == sorted(sizes, reverse=True)
    assert by_size.column == "summary.effect of prob"
    assert by_size.values != ranking.values


def test_a_row_of_the_units_own_place_counts(rank: Rank, patch_run: Run) -> None:
    rows = patch_run.table("summary")
    rows = rows[(rows["metric"] == "logit_diff") & (rows["aggregate"] == "ratio_of_means") & (rows["group"] == "all")]
    rows = rows[rows["site"] == "mlp_out"]
    prompts = PromptSet("given", (prompt({"copied": (1,), "end": (7,)}),))
    ranking, units = rank(patch_run.path, {"kind": "mlp", "positions": ["copied", "end"]}, prompts=prompts)
    found = {units[index].name: value for index, value in zip(ranking.units, ranking.values, strict=True)}
    assert found == {
        f"mlp{layer}@{span}": value
        for layer, span, value in zip(rows["layer"], rows["span"], rows["normalized"], strict=True)
    }
    with pytest.raises(UserError) as error:
        rank(patch_run.path, {"kind": "mlp"})
    assert "ranking.run: the run has mlp0 at 2 places, and none is the unit's own" in said(error)


def test_windows_and_groups_rank_nothing(rank: Rank, patch_run: Run) -> None:
    # window 2 of a model of 2 layers: of centre 0 layer 0 alone, of centre 1 both
    ranking, units = rank(patch_run.path, {"kind": "attention"})
    assert [units[index].name for index in ranking.units] == ["attention0"]
    assert ranking.missing == 1
    with pytest.raises(UserError) as error:
        rank(patch_run.path, {"kind": "head", "heads": [[0, 1]], "layers": [0]})
    assert "ranks none of the units: it has attention, head, mlp" in said(error)
    with pytest.raises(UserError, match="ranks none of the units"):
        rank(patch_run.path, {"kind": "layer"})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "ranking.score: which score of "),
        ({"score": "inductoin"}, "has no score 'inductoin' | Did you mean 'induction'? It has "),
        ({"metric": "loss"}, "ranking.metric: a run of heads is ranked by a score, not by a metric"),
        ({"score": "induction", "column": "effect"}, "ranking.column: 'effect' is no column of numbers of that table"),
    ],
)
def test_what_a_heads_run_does_not_have(rank: Rank, heads_run: Run, options: Mapping[str, str], problem: str) -> None:
    with pytest.raises(UserError) as error:
        rank(heads_run.path, HEADS, **options)
    assert problem in said(error)
    assert error.value.remedy


def test_what_a_patch_run_does_not_have(rank: Rank, patch_run: Run) -> None:
    with pytest.raises(UserError) as error:
        rank(patch_run.path, HEADS, metric="kl")
    assert "has no metric 'kl' | It has logit_diff, prob." in said(error)
    with pytest.raises(UserError, match="ranked by a metric, not by a score"):
        rank(patch_run.path, HEADS, score="induction")


def test_a_run_of_another_model_is_refused(rank: Rank, heads_run: Run) -> None:
    with pytest.raises(UserError) as error:
        rank(heads_run.path, HEADS, anatomy=anatomy_of("llama"), score="induction")
    assert "is of another model (toy-induction): layers 2, here 3; d_model 64, here 32; " in said(error)
    assert error.value.exit_code == 2


def ablate_run(folder: Path, rows: Sequence[Mapping[str, Any]], **manifest: Any) -> Path:
    """A run directory as `ablate` leaves it, with these rows of the summary; each is a trial of one layer."""
    folder.mkdir()
    common = {"group": "all", "aggregate": "mean", "n": 4, "n_dropped": 0, "metric": "loss", "design": "single"}
    common |= {"ablation": "zero"}
    summary = [common | {"trial": i} | dict(row) for i, row in enumerate(rows)]
    trials = [{"trial": i, "edit": 0, "op": "zero", "site": "z", "layer": row["layer"]} for i, row in enumerate(rows)]
    outputs = {
        f"{name}.parquet": write_parquet(validate(name, table, "ablate"), folder / f"{name}.parquet")
        for name, table in (("summary", summary), ("trials", trials))
    }
    heads = toy().layers[0].heads
    assert heads is not None
    first = {"heads": {"query": heads.query, "key_value": heads.key_value}, "d_mlp": toy().layers[0].d_mlp}
    model = {"id": "m", "anatomy": {"layers": toy().n_layers, "d_model": toy().d_model, "first_layer": first}}
    what = {"subcommand": "ablate", "status": "complete", "model": model} | manifest
    Manifest(name="r", config={}, config_sha256="", outputs=outputs, **what).write(folder)
    return folder


ROWS = [
    {"site": "head", "layer": 0, "head": 1, "effect": 0.5},
    {"site": "head", "layer": 1, "head": 2, "effect": -2.0},
    {"site": "kv_head", "layer": 1, "kv_head": 1, "effect": 3.0},
    {"site": "layer", "layer": 1, "effect": 1.0},
    {"site": "head", "layer": 0, "head": 3, "effect": None},
    {"site": "head", "layer": 1, "head": 0, "effect": float("nan")},
    {"site": "head", "layer": 0, "head": 0, "effect": 9.0, "ablation": "mean"},
    {"site": "head", "layer": 0, "head": 2, "effect": 9.0, "design": "pairs"},
    {"site": "head", "layer": 1, "head": 3, "effect": 9.0, "group": "a"},
]


def test_units_of_an_ablate_run(rank: Rank, tmp_path: Path) -> None:
    folder = ablate_run(tmp_path / "run", ROWS)
    ranking, units = rank(folder, HEADS, {"kind": "kv_head", "layers": [1]}, {"kind": "layer"})
    found = {units[index].name: value for index, value in zip(ranking.units, ranking.values, strict=True)}
    assert found == {"kv1.1": 3.0, "layer1": 1.0, "0.1": 0.5, "1.2": -2.0}
    assert list(found) == ["kv1.1", "layer1", "0.1", "1.2"]
    assert ranking.column == "summary.effect of loss, zero"
    only_heads, _ = rank(
        folder, {"kind": "head", "layers": [1], "heads": [2]}, {"kind": "head", "layers": [0], "heads": [1]}
    )
    warning = explain(only_heads) or ""
    assert "puts its largest value (-2) last; `absolute: true` ranks by magnitude" in warning
    by_size, _ = rank(folder, {"kind": "layer", "layers": [1]}, absolute=True)
    assert explain(by_size) is None
    ranking, units = rank(folder, HEADS, absolute=True)
    assert [units[index].name for index in ranking.units] == ["1.2", "0.1"]
    assert (ranking.values, ranking.unused) == ((-2.0, 0.5), 2)


def test_equal_values_keep_the_order_of_the_units(rank: Rank, tmp_path: Path) -> None:
    rows = [{"site": "head", "layer": 1, "head": head, "effect": 1.0} for head in (3, 1, 0, 2)]
    ranking, units = rank(ablate_run(tmp_path / "run", rows), HEADS)
    assert [units[index].name for index in ranking.units] == ["1.0", "1.1", "1.2", "1.3"]


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        ({"status": "interrupted"}, "the run is interrupted; only a complete run ranks | `mechinterp resume` finishes"),
        ({"status": "running"}, "the run is crashed; only a complete run ranks"),
        ({"subcommand": "probe"}, "is a run of probe, which ranks no units"),
        ({"model": {"id": "m"}}, "is of another model (m): layers None, here 2"),
    ],
)
def test_runs_that_rank_nothing(rank: Rank, tmp_path: Path, manifest: Mapping[str, Any], problem: str) -> None:
    folder = ablate_run(tmp_path / "run", ROWS, **manifest)
    with pytest.raises(UserError) as error:
        rank(folder, HEADS)
    assert "ablate.cumulative.ranking.run: " in said(error)
    assert problem in said(error)


def test_folders_that_are_no_run_and_damaged_ones(rank: Rank, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        rank(tmp_path, HEADS)
    folder = ablate_run(tmp_path / "run", ROWS)
    (folder / "summary.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="missing or damaged"):
        rank(folder, HEADS)
    data = json.loads((folder / "manifest.json").read_text())
    data["outputs"] = {}
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="the run has no summary.parquet"):
        rank(folder, HEADS)


def test_a_run_of_several_checkpoints_is_refused(rank: Rank, tmp_path: Path) -> None:
    rows = [dict(row) | {"checkpoint": name} for row in ROWS[:1] for name in ("step0", "step9")]
    with pytest.raises(UserError, match="is of several checkpoints: step0, step9"):
        rank(ablate_run(tmp_path / "run", rows), HEADS)
    ranking, _ = rank(ablate_run(tmp_path / "one", rows[:1]), HEADS)
    assert ranking.values == (0.5,)
