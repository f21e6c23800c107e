"""What each operation does to chosen rows, units and keys, against loops over single numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mechinterp_cli.engine.edits import OPS, Edit, Op, Rows, Site, Trial, edited, needed

PROMPTS, POSITIONS, HEADS, SIZE = 3, 5, 4, 2
AT = ((0, 3), (), (4, 1))
KEYS = ((2,), (0,), (4, 0))
Z, SCORES, RESID = Site("z", 0), Site("scores", 0), Site("resid_pre", 0)
SHAPES = {Z: (HEADS, SIZE), SCORES: (HEADS, POSITIONS), RESID: (8,)}
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


OTHER = {("clean", site): draw(PROMPTS, POSITIONS, *shape) for site, shape in SHAPES.items()}


def rows_of(edit: Edit) -> Rows:
    pairs = [(prompt, position) for prompt, chosen in enumerate(edit.positions) for position in chosen]
    prompt, position = torch.tensor(pairs).unbind(1)
    return Rows(prompt * POSITIONS + position, prompt, position)


def apply(edit: Edit, x: Tensor) -> Tensor:
    flat = x.clone().flatten(0, 1)
    edited(flat, edit, rows_of(edit), OTHER)
    return flat.view(x.shape)


def edit_of(site: Site, op: Op, units: tuple[int, ...] | None, keys: bool, by_row: bool) -> Edit:
    shape = SHAPES[site] if units is None else (len(units), *SHAPES[site][1:])
    shape = (shape[0], 1) if keys else shape
    size = int(torch.Size(shape).numel())
    values = {
        "constant": draw(*((PROMPTS, POSITIONS) if by_row else (1, 1)), *shape),
        "add": draw(*((PROMPTS, POSITIONS) if by_row else (1, 1)), *shape),
        "scale": torch.tensor(0.3),
        "project": torch.linalg.qr(draw(size, 1))[0].T,
        "swap": torch.linalg.qr(draw(size, 2))[0].T if size > 1 else torch.ones(1, 1),
        "affine": draw(size, size),
    }
    source = "clean" if op in ("replace", "swap") else None
    prompts = (2, 0, 1) if source and by_row else None
    offset = draw(size) if op == "affine" and by_row else None
    chosen = KEYS if keys else None
    return Edit(site, op, AT, units, chosen, source, prompts, values.get(op), offset)


def expected(edit: Edit, old: Tensor, prompt: int, position: int, index: tuple[Tensor, ...]) -> Tensor:
    """The edited part of one row, by the operation's definition."""
    value = edit.values
    assert value is None or isinstance(value, Tensor)
    if edit.op in ("constant", "add"):
        assert value is not None
        value = value[prompt % value.shape[0], position % value.shape[1]]
    source = old
    if edit.source is not None:
        read = prompt if edit.source_prompts is None else edit.source_prompts[prompt]
        source = OTHER[edit.source, edit.site][read, position][index]
    match edit.op:
        case "replace":
            return source
        case "zero":
            return torch.zeros_like(old)
        case "mask":
            return torch.full_like(old, -torch.inf)
    assert value is not None
    basis = value.double()
    match edit.op:
        case "constant":
            return value.expand_as(old)
        case "add":
            return old + value
        case "scale":
            return old * 0.3
        case "project":
            inside = sum(((row @ old.flatten().double()) * row for row in basis), torch.zeros(old.numel()).double())
            return (old.flatten() - inside).view(old.shape).float()
        case "swap":
            span = basis.T @ basis
            eye = torch.eye(old.numel(), dtype=torch.float64)
            return ((eye - span) @ old.flatten().double() + span @ source.flatten().double()).view(old.shape).float()
        case "affine":
            shift = torch.zeros(old.numel()) if edit.offset is None else edit.offset
            return (basis @ old.flatten().double() + shift).view(old.shape).float()
    raise AssertionError(edit.op)


CASES = [
    (site, op, units, keys, by_row)
    for site in SHAPES
    for op in OPS
    for units in (None, (1,), (3, 0))
    for keys in ((False, True) if site == SCORES else (False,))
    for by_row in (False, True)
    if not (keys and op in ("project", "swap", "affine")) and (op != "mask" or site == SCORES)
]


@pytest.mark.parametrize(("site", "op", "units", "keys", "by_row"), CASES)
def test_an_edit_changes_what_it_names_as_its_operation_says_and_nothing_else(
    site: Site, op: Op, units: tuple[int, ...] | None, keys: bool, by_row: bool
) -> None:
    edit, x = edit_of(site, op, units, keys, by_row), draw(PROMPTS, POSITIONS, *SHAPES[site])
    got, want = apply(edit, x), x.clone()
    heads = torch.arange(SHAPES[site][0]) if units is None else torch.tensor(units)
    for prompt, positions in enumerate(AT):
        index = (heads[:, None], torch.tensor(KEYS[prompt])[None]) if keys else (heads,)
        for position in positions:
            want[prompt, position][index] = expected(edit, x[prompt, position][index], prompt, position, index)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert not torch.equal(got, x)
    untouched = torch.ones(PROMPTS, POSITIONS, dtype=torch.bool)
    for prompt, positions in enumerate(AT):
        untouched[prompt, list(positions)] = False
    assert torch.equal(got[untouched], x[untouched])


def test_removing_a_direction_leaves_nothing_of_it_and_twice_is_once() -> None:
    edit, x = edit_of(RESID, "project", None, False, False), draw(PROMPTS, POSITIONS, 8)
    assert isinstance(edit.values, Tensor)
    once = apply(edit, x)
    assert (once[0, 3] @ edit.values[0]).abs() <= 1e-6
    assert (x[0, 3] @ edit.values[0]).abs() > 1e-3
    assert torch.allclose(apply(edit, once), once, atol=1e-6)


def test_swapping_a_whole_basis_is_replacing() -> None:
    x = draw(PROMPTS, POSITIONS, 8)
    swap = replace(edit_of(RESID, "swap", None, False, False), values=torch.eye(8))
    assert torch.allclose(apply(swap, x), apply(edit_of(RESID, "replace", None, False, False), x), atol=1e-6)


def test_a_trial_starts_at_its_first_edited_position_of_each_prompt() -> None:
    edits = (Edit(RESID, "zero", ((4,), (), (2, 1))), Edit(Z, "replace", ((3,), (), (4,)), source="clean"))
    trial = Trial(0, "corrupt", edits, (0, 1, 2))
    assert [trial.start(0), trial.start(2)] == [3, 1]
    assert trial.start(1) > 10**6
    assert needed([trial]) == {("clean", Z)}
