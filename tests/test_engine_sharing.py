"""Prompts that begin alike share rows, only rows that are read go through the end of the last layer: same values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from mechinterp_cli.engine.early import ending_in_attention
from mechinterp_cli.engine.edits import Bucket, Edit, Op, Rows, RowValues, Site, Trial
from mechinterp_cli.engine.groups import only_rows
from mechinterp_cli.engine.sharing import Sharing
from mechinterp_cli.methods.ablate.rows import Drawn, Held, Table
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.kinds import KEY_KINDS
from mechinterp_cli.models.walk import Walker, forward
from tests.engine_trials import LENGTH, PROMPTS, deviation, run, sweep, two_streams
from tests.families import FAMILIES, build

TOLERANCE = 1e-4
PACKED = [name for name, family in FAMILIES.items() if family.executor == "packed"]
EVERY = (tuple(range(LENGTH)),) * PROMPTS
ALIKE, THIRD = 9, 4
"""Tokens that the first two prompts, and all three, have in common."""


def alike(read: Tensor | None = None) -> Bucket:
    """The first two prompts begin with the same nine tokens, the third with four of them, in both streams."""
    tokens = {name: ids.clone() for name, ids in two_streams().tokens.items()}
    for ids in tokens.values():
        ids[1, :ALIKE] = ids[0, :ALIKE]
        ids[2, :THIRD] = ids[0, :THIRD]
        ids[2, THIRD] = (ids[0, THIRD] + 1) % 90
        ids[1, ALIKE] = (ids[0, ALIKE] + 1) % 90
    return Bucket.of(tokens, read)


READS: dict[str, Tensor | None] = {
    "last": None,
    "two": torch.tensor([[15, 3], [14, 8], [2, 11]]),
    "every": torch.arange(LENGTH).expand(PROMPTS, -1),
}


def everywhere(trial: Trial) -> Trial:
    """The same edits at all positions, except that keys stay as they are."""
    edits = tuple(e if e.site.kind in KEY_KINDS else replace(e, positions=EVERY) for e in trial.edits)
    return replace(trial, edits=edits)


@contextmanager
def rows_by_layer() -> Iterator[dict[int, list[int]]]:
    """Rows of every packed call by layer."""
    seen: dict[int, list[int]] = {}
    native = Walker.run

    def note(self: Walker, index: int, call: Any, hidden: Tensor) -> Tensor:
        if hidden.shape[0] == 1:
            seen.setdefault(index, []).append(hidden.shape[1])
        return native(self, index, call, hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walker, "run", note)
        yield seen


UNLIKE = ("gpt2", "gpt_neox", "llama", "gemma2", "gpt_oss", "deepseek_v3")
"""Learned positions; a parallel block; grouped queries; windows and soft-caps; sinks and experts; latent attention."""


@pytest.mark.parametrize(
    ("name", "read"),
    [pytest.param(name, "two", marks=() if name in UNLIKE else pytest.mark.slow) for name in PACKED]
    + [(n, r) for n in ("llama", "gpt_oss") for r in ("last", "every")],
)
def test_values_are_those_of_plain_hooks(name: str, read: str) -> None:
    model = build(name)
    anatomy, bucket = find_anatomy(model), alike(READS[read])
    trials = [change(trial) for trial in sweep(anatomy) for change in (lambda t: t, everywhere)]
    want = run("hooks", model, anatomy, bucket, trials)
    assert deviation(run("packed", model, anatomy, bucket, trials), want) <= TOLERANCE
    assert float((want.trials - want.streams["corrupt"]).abs().nan_to_num().max()) > 100 * TOLERANCE


def zero_heads(anatomy: Anatomy) -> list[Trial]:
    return [
        Trial(i, "corrupt", (Edit(Site("z", layer.index), "zero", EVERY, units=(0,)),), (0, 1, 2))
        for i, layer in enumerate(anatomy.layers)
    ]


def test_shared_rows_are_computed_once_and_unread_ones_not_to_the_end() -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    distinct = PROMPTS * LENGTH - ALIKE - THIRD
    for bucket, rows, last in (
        (alike(), distinct, [3 * distinct, 3 * PROMPTS]),
        (two_streams(), PROMPTS * LENGTH, [3 * PROMPTS * LENGTH]),  # read everywhere, and nothing in common
    ):
        with rows_by_layer() as seen:
            run("packed", model, anatomy, bucket, zero_heads(anatomy))
        assert seen == {0: [rows], 1: [2 * rows], 2: last}


def rows(edit: Edit, bucket: Bucket | None = None, prompts: tuple[int, ...] = (0, 1, 2), start: int = 0) -> int:
    """Rows of a trial."""
    found = Sharing(bucket or alike()).rows(Trial(0, "corrupt", (edit,), prompts), prompts, start)
    return len(prompts) * (LENGTH - start) if found is None else max(found) + 1


WHOLE = PROMPTS * LENGTH
SHARED = WHOLE - ALIKE - THIRD
BOTH = WHOLE - ALIKE
Z = Site("z", 1)


def edit(op: Op = "zero", **how: Any) -> Edit:
    return Edit(Z, op, how.pop("positions", EVERY), **how)


def constant(prompts: int) -> Tensor:
    return torch.zeros(prompts, 1, 4, 8)


def drawn() -> RowValues:
    return Drawn((1, 1, 1), LENGTH, torch.ones(4, 8), Held(10**6))


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (edit(), SHARED),
        (edit("scale", values=torch.tensor(0.5)), SHARED),
        (edit("constant", values=constant(1)), SHARED),
        (edit("constant", values=constant(3)), WHOLE),
        (edit("constant", values=Table(constant(2), (1, 1, 0))), BOTH),
        (edit("add", values=drawn()), WHOLE),
        (edit("replace", source="clean"), SHARED),
        (edit("replace", source="clean", source_prompts=(1, 2, 0)), WHOLE),
        (edit("replace", source="clean", source_prompts=(2, 2, 0)), BOTH),
        (Edit(Site("pattern", 1), "zero", EVERY), WHOLE),
        # up to where the first two prompts are edited at different positions
        (edit(positions=((0, 1, 3), (0, 1, 4), (0, 1, 3))), WHOLE - THIRD - 3),
        # what differs between the prompts stands behind what they have in common
        (edit("constant", positions=((12,), (13,), (14,)), values=constant(3)), SHARED),
    ],
)
def test_rows_are_shared_as_far_as_tokens_and_edits_are_the_same(change: Edit, left: int) -> None:
    assert rows(change) == left


def test_rows_begin_at_the_start_and_what_stands_before_must_be_the_same() -> None:
    late = edit(positions=((6,), (6,), (6,)))
    assert rows(late, start=6) == PROMPTS * (LENGTH - 6) - (ALIKE - 6)
    assert rows(late, prompts=(0, 2), start=6) == 2 * (LENGTH - 6)
    other = alike()
    other.tokens["corrupt"][1, 0] += 1
    assert rows(late, other, start=6) == PROMPTS * (LENGTH - 6)


def test_a_source_that_differs_shares_nothing_and_so_does_noise() -> None:
    bucket = alike()
    bucket.tokens["clean"][:, 0] = torch.arange(PROMPTS)
    assert rows(edit("replace", source="clean"), bucket) == WHOLE
    assert rows(edit(), bucket) == SHARED
    noisy = Bucket.of(alike().tokens, noise={"corrupt": torch.zeros(PROMPTS, LENGTH, 32)})
    assert rows(edit(), noisy) == WHOLE


def test_a_single_token_in_common_among_many_is_not_worth_it() -> None:
    bucket = alike()
    bucket.tokens["corrupt"][:, 1] = torch.arange(PROMPTS)
    assert rows(edit(), bucket) == SHARED + (ALIKE - 1) + (THIRD - 1) == WHOLE - 2
    bucket.tokens["corrupt"][2, 0] = 96
    assert rows(edit(), bucket) == WHOLE


def test_edits_of_rows_that_are_left_out_are_left_out() -> None:
    old = Rows(torch.tensor([4, 1, 3]), torch.tensor([0, 1, 2]), torch.tensor([7, 8, 9]))
    [(_, new)] = only_rows({Z: [(edit(), old)]}, torch.tensor([1, 2, 4]), 6)[Z]
    assert [x.tolist() for x in (new.index, new.prompt, new.position)] == [[2, 0], [0, 1], [7, 8]]


def test_weights_that_are_kept_elsewhere_go_back_there() -> None:
    model = build("llama")
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)
    anatomy = find_anatomy(model)
    trials = [everywhere(trial) for trial in sweep(anatomy)[::3]]
    places = {name: p.device.type for name, p in model.named_parameters()}
    assert "meta" in places.values()
    plain = build("llama")
    want = run("hooks", plain, find_anatomy(plain), alike(), trials)
    assert deviation(run("packed", model, anatomy, alike(), trials), want) <= 1e-5
    assert {name: p.device.type for name, p in model.named_parameters()} == places


def broken_edit(layer: int) -> Trial:
    values = torch.zeros(1, 1, 33, 33)  # does not fit
    return Trial(0, "corrupt", (Edit(Site("z", layer), "constant", EVERY, values=values),), (0, 1, 2))


def broken_mlp(layer: int) -> Trial:
    return Trial(0, "corrupt", (Edit(Site("mlp_out", layer), "constant", EVERY, values=torch.zeros(1, 1, 33)),), (0,))


@pytest.mark.parametrize("broken", [broken_edit, broken_mlp])
def test_an_edit_that_fails_in_the_last_layer_leaves_the_model_as_it_was(broken: Callable[[int], Trial]) -> None:
    model = build("llama")
    anatomy, tokens = find_anatomy(model), alike().tokens["clean"]
    with torch.no_grad():
        before = forward(model, tokens)
        with pytest.raises(RuntimeError):
            run("packed", model, anatomy, alike(), [broken(2)])
        assert torch.equal(forward(model, tokens), before)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0


def test_a_stop_that_is_not_its_own_passes_through() -> None:
    def attend(_call: Any) -> tuple[Tensor, None]:
        return torch.zeros(1), None

    call: Any = nn.Identity()
    passed: list[str] = []
    with ending_in_attention(attend) as outer:
        with ending_in_attention(attend) as inner:
            outer.handler(call)
        passed.append("the inner one")
    assert passed == []
    assert outer.z.shape == (1,)
    with pytest.raises(AssertionError, match="attention was not called"):
        _ = inner.z
