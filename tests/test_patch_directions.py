"""`patch` along directions of a file: against plain hooks, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechinterp_cli.errors import UserError
from tests.experiments import Run, run_patch
from tests.probe_folder import USED, planted_folder, planted_task
from tests.probe_hooks import Model, swapped

TOLERANCE = 1e-4
D = 32
Patch = Callable[..., Run]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture
def patch(folder: Path, tmp_path: Path) -> Patch:
    """A run with one block, whose directions are in a file."""

    def run(tensors: dict[str, Tensor], block: dict[str, Any], **section: Any) -> Run:
        path = tmp_path / "d.safetensors"
        save_file(tensors, path)
        whole = {"sites": [{"kind": "resid_post", "positions": "last", "directions": str(path), **block}], **section}
        task = planted_task(tmp_path / "prompts.csv", USED, count=16)
        return run_patch(tmp_path, whole, task=task, model={"id": str(folder)})

    return run


def drawn(rank: int, seed: int) -> Tensor:
    """Rows of any length, at any angle."""
    return 3 * torch.randn(rank, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_only_what_lies_along_the_directions_is_put_in_place(patch: Patch, folder: Path, direction: str) -> None:
    rows = {0: drawn(2, 0), 1: drawn(1, 1)}
    run = patch({f"resid_post.{layer}": x for layer, x in rows.items()}, {}, direction=direction)
    hand, effects = Model(folder, run), run.values("logit_diff", "effect")
    for layer, own in rows.items():
        onto = torch.linalg.pinv(own) @ own
        clean, twin = hand.seen(layer, hand.clean), hand.seen(layer, hand.corrupt)
        other = twin if direction == "noise" else clean
        wanted = hand.effect(layer, swapped(onto, other), corrupt=direction == "denoise")
        found = torch.tensor(effects.loc[layer].to_numpy(dtype=float)).float()
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
        assert float(found.abs().max()) > 0.1
    assert run.table("trials")[["op", "layer"]].to_numpy().tolist() == [["swap", 0], ["swap", 1]]


def test_along_all_directions_it_is_the_whole_activation(patch: Patch, tmp_path: Path) -> None:
    along = patch({"resid_post.1": torch.eye(D)}, {}, direction="noise")
    assert along.table("trials")["layer"].tolist() == [1]
    whole = patch({"resid_post.1": torch.eye(D)}, {"layers": [1], "directions": None}, direction="noise")
    assert whole.table("trials")["op"].tolist() == ["replace"]
    first, second = (torch.tensor(run.values("logit_diff", "effect").to_numpy(dtype=float)) for run in (along, whole))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert float(first.mean()) < -5


def test_the_used_coordinate_carries_what_the_whole_activation_does(patch: Patch) -> None:
    for coordinate, carried in ((USED, True), (0, False)):
        run = patch({"resid_post.1": torch.eye(D)[[coordinate]]}, {}, direction="noise")
        size = float(run.values("logit_diff", "effect").to_numpy(dtype=float).mean())
        assert size < -5 if carried else abs(size) < 0.5


@pytest.mark.parametrize(
    ("tensors", "block", "section", "text"),
    [
        (
            {"resid_post.1": torch.ones(D)},
            {"layers": [0]},
            {},
            "patch.sites[0].layers[0]: 0: the file has no direction",
        ),
        ({"resid_post.1": torch.ones(D)}, {"layers": {"window": 2}}, {}, "directions have no window"),
        ({"resid_post.1": torch.ones(D)}, {"kind": "z"}, {}, "patch.sites[0].directions: z is no residual stream"),
        ({"resid_post.1": torch.ones(D)}, {"kind": "mlp_out"}, {}, "the file has no direction of mlp_out"),
        ({"resid_post.1": torch.ones(D)}, {}, {"source": "mean"}, "and source is mean"),
        ({"resid_post.1": torch.ones(D + 1)}, {}, {}, f"of shape [{D + 1}]"),
        ({"z.1.0": torch.ones(16)}, {}, {}, "no direction of the residual stream"),
        ({"resid_post.1": torch.ones(D)}, {"directions": "none.safetensors"}, {}, "does not exist"),
    ],
)
def test_what_cannot_be_is_refused_with_the_key(
    patch: Patch, tensors: dict[str, Tensor], block: dict[str, Any], section: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError) as caught:
        patch(tensors, block, **{"direction": "noise", **section})
    assert text in caught.value.cause
    assert "patch.sites[0]" in caught.value.cause
    assert caught.value.remedy
