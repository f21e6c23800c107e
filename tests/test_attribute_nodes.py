"""Nodes laid out as arrays: the same nodes as `patch` has trials, and sums over just what each of them edits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.methods.attribute.nodes import Nodes
from mechinterp_cli.methods.attribute.options import AttributeOptions
from mechinterp_cli.methods.binder import Binder
from mechinterp_cli.methods.interchange import bind
from mechinterp_cli.methods.measure import build_prompts, split_members
from mechinterp_cli.methods.specs import TrialSpec
from mechinterp_cli.models.loaded import LoadedModel
from tests.experiments import config_of
from tests.models_fixtures import toy

__all__ = ["toy"]

BLOCKS: list[dict[str, Any]] = [
    {"kind": "resid_post", "layers": "all", "positions": "each"},
    {"kind": "z", "layers": "all", "heads": "each", "positions": [0, "end", ["matched", "copied"]]},
    {"kind": "z", "layers": [1], "heads": [[0, 2], 3], "positions": "last"},
    {"kind": "v", "layers": [0], "heads": "each", "positions": "all"},
    {"kind": "q", "layers": [0], "heads": "all", "positions": "each"},
    {"kind": "scores", "layers": [0], "heads": "each", "positions": ["end"], "keys": ["matched", "copied"]},
    {"kind": "pattern", "layers": "all", "heads": [1], "positions": "each"},
]
METRICS = 2


@pytest.fixture(scope="module", params=["denoise", "noise"])
def nodes(request: pytest.FixtureRequest, toy: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    section = {"sites": BLOCKS, "direction": request.param}
    folder: Path = tmp_path_factory.mktemp("nodes")
    loaded = config_of(folder, section, method="attribute")
    options = loaded.config.method
    assert isinstance(options, AttributeOptions)
    prompts = build_prompts(loaded.config.task, toy)
    bound = bind(loaded, options, toy.anatomy, prompts)
    return Nodes(tuple(Binder(loaded, "attribute", toy.anatomy, prompts).grids(options.sites)), bound)


def shape_of(site: Site, toy: LoadedModel, prompts: int, length: int) -> tuple[int, ...]:
    """Of estimates at a site, as the engine gives them."""
    heads = toy.anatomy.layers[site.layer].heads
    assert heads is not None
    units: dict[str, tuple[int, ...]] = {
        "resid_post": (),
        "v": (heads.key_value,),
        "scores": (heads.query, length),
        "pattern": (heads.query, length),
    }
    return (METRICS, prompts, length, *units.get(site.kind, (heads.query,)))


def by_hand(nodes: Nodes, spec: TrialSpec, found: Tensor, prompt: int, row: int) -> Tensor:
    """[metrics]: the sum over positions, units and keys of one node, one number after the other."""
    total = torch.zeros(METRICS, dtype=torch.float64)
    for position in nodes.bound.positions(spec, prompt) or ():
        at = found[:, row, position]
        if spec.kind in ("scores", "pattern") and spec.keys is not None:
            at = at[..., list(spec.keys.positions[prompt] or ())]
        if spec.units is not None:
            at = at[:, list(spec.units)]
        total += at.double().flatten(1).sum(1) if at.ndim > 1 else at.double()
    return total


def test_every_node_gets_the_sum_of_what_it_edits(nodes: Nodes, toy: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    members = split_members(nodes.bound.prompts)[0]
    length = nodes.bound.prompts.prompts[members[0]].length
    found = {site: torch.randn(shape_of(site, toy, len(members), length), generator=generator) for site in nodes.sites}
    gathered = np.full((METRICS, len(nodes), len(members)), np.nan)
    for where, values in nodes.gather(found, members):
        gathered[:, where] = values
    for node in range(len(nodes)):
        spec = nodes.spec(node, node)
        here = found[Site(spec.kind, spec.layer)]
        wanted = torch.stack([by_hand(nodes, spec, here, i, row) for row, i in enumerate(members)], dim=1)
        assert np.abs(gathered[:, node] - wanted.numpy()).max() <= 1e-6
    assert np.abs(gathered).max() > 1


def test_nodes_are_the_trials_that_patch_would_have(nodes: Nodes) -> None:
    specs = [nodes.spec(node, node) for node in range(len(nodes))]
    assert [spec.kind for spec in specs] == nodes.kinds.tolist()
    assert [spec.layer for spec in specs] == nodes.layers.tolist()
    assert [label for grid, _ in nodes.blocks() for label in grid.labels()] == [spec.label for spec in specs]
    assert len({(spec.label, spec.block, spec.keys) for spec in specs}) == len(nodes)


def test_what_is_known_to_do_nothing_is_what_patch_says_of_the_trials(nodes: Nodes) -> None:
    specs = [nodes.spec(node, node) for node in range(len(nodes))]
    assert np.array_equal(nodes.status(), nodes.bound.status(specs))
