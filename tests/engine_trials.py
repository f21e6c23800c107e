"""Trials for the engine's tests: every operation at every site of an anatomy, and what makes them comparable."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.tiny import tiny_tokens
from mechinterp_cli.engine.edits import OPS, Bucket, Edit, Op, Site, Trial
from mechinterp_cli.engine.execute import executor_named
from mechinterp_cli.engine.wavefront import Settings, Values
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.kinds import HEAD_KINDS, KEY_KINDS

PROMPTS, LENGTH = 3, 16
"""Three windows long, so that a window that is forgotten shows."""

POSITIONS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((0,), (0,), (0,)),
    ((LENGTH - 1,), (LENGTH - 1,), (LENGTH - 1,)),
    ((7,), (2,), (11,)),
    ((1, 6, 7), (6,), (13, 14)),
    (tuple(range(LENGTH)),) * 3,
    ((3, 9), (), (5,)),
)
"""Early, late, other ones in every prompt, several at once, all, none in one prompt."""

LINEAR_OPS: tuple[Op, ...] = ("project", "affine", "swap")


def logits_measure(logits: Tensor, _prompt: Tensor, _read: Tensor) -> Tensor:
    """The logits themselves: nothing that an edit changes is averaged away."""
    return logits


def two_streams(vocab_size: int = 97, prompts: int = PROMPTS, length: int = LENGTH) -> Bucket:
    """Random prompts, read at every position: an edit that is too early or too late shows."""
    clean = tiny_tokens(batch=prompts, length=length, seed=1) % vocab_size
    corrupt = tiny_tokens(batch=prompts, length=length, seed=2) % vocab_size
    return Bucket.of({"clean": clean, "corrupt": corrupt}, torch.arange(length).expand(prompts, -1))


def feature_shape(anatomy: Anatomy, site: Site, length: int = LENGTH) -> tuple[int, ...]:
    """Features per token at a site."""
    layer = anatomy.layers[site.layer]
    units = layer.features(site.kind, anatomy.d_model)
    if site.kind in KEY_KINDS:
        return units, length
    if site.kind in HEAD_KINDS:
        assert layer.heads is not None
        return units, layer.heads.d_head if site.kind in ("q", "k") else layer.heads.d_value
    return (units,)


def ops_of(kind: str) -> tuple[Op, ...]:
    """Operations that make sense at a kind of site."""
    if kind in KEY_KINDS:
        return tuple(op for op in OPS if op not in LINEAR_OPS and (op != "mask" or kind == "scores"))
    return tuple(op for op in OPS if op != "mask")


def edit_of(anatomy: Anatomy, site: Site, op: Op, variant: int, seed: int = 0) -> Edit:
    """An edit with seeded numbers.

    `variant` picks the positions (`variant` modulo 6) and, by its other digits, units or all, keys or all,
    the source's own prompt or another one, values that differ by prompt and position or not.
    """
    generator = torch.Generator().manual_seed(1000 * seed + variant)
    shape = feature_shape(anatomy, site)
    positions = POSITIONS[variant % len(POSITIONS)]
    if site.kind in ("q", *KEY_KINDS) and positions == POSITIONS[0]:
        positions = POSITIONS[1]  # the first token has one key, whose share is 1 whatever its score
    units = tuple(sorted({0, shape[0] - 1})) if variant % 2 else None
    if units is not None:
        shape = (len(units), *shape[1:])
    keys = None
    if site.kind in KEY_KINDS and (op == "mask" or variant % 3):
        ends = (max(chosen, default=2) for chosen in positions)  # keys just before are inside every window
        keys = tuple(((max(end, 1) - 1,), (max(end, 2) - 2, max(end, 2) - 1))[variant % 2] for end in ends)
        shape = (shape[0], 1)  # the same for each key
    values, offset = numbers(op, shape, variant, generator)
    reads = op in ("replace", "swap")
    return Edit(
        site,
        op,
        positions,
        units=units,
        keys=keys,
        source=("clean", "corrupt")[variant % 5 == 4] if reads else None,
        source_prompts=(1, 2, 0) if reads and variant % 5 in (3, 4) else None,
        values=values,
        offset=offset,
    )


def numbers(
    op: Op, shape: tuple[int, ...], variant: int, generator: torch.Generator
) -> tuple[Tensor | None, Tensor | None]:
    """Values and offset of an edit on features of this shape."""
    size = int(torch.Size(shape).numel())
    if op in ("constant", "add"):
        axes = (PROMPTS if variant % 2 else 1, LENGTH if variant % 4 < 2 else 1)
        return torch.randn(*axes, *shape, generator=generator), None
    if op in ("project", "swap"):
        basis = torch.linalg.qr(torch.randn(size, min(2, size), generator=generator))[0].T
        return basis.contiguous(), None
    if op == "affine":
        matrix = torch.randn(size, size, generator=generator) / size**0.5
        return matrix, torch.randn(size, generator=generator) if variant % 2 else None
    return (torch.tensor(0.5), None) if op == "scale" else (None, None)


def sweep(anatomy: Anatomy, *, full: bool = False) -> list[Trial]:
    """Every operation at every site: in each layer (`full`), or in one layer each with every site in all layers."""
    trials: list[Trial] = []
    for row, kind in enumerate(anatomy.sites):
        layers = [layer.index for layer in anatomy.layers if kind in layer.sites]
        for column, op in enumerate(ops_of(kind)):
            for layer in layers if full else [layers[(row + column) % len(layers)]]:
                trials.append(_trial(anatomy, Site(kind, layer), op, len(trials)))
    return trials


def _trial(anatomy: Anatomy, site: Site, op: Op, index: int) -> Trial:
    prompts = (0, 2) if index % 7 == 6 else tuple(range(PROMPTS))
    return Trial(index, "corrupt", (edit_of(anatomy, site, op, index),), prompts)


def run(
    name: str, model: nn.Module, anatomy: Anatomy, bucket: Bucket, trials: Sequence[Trial], rows_per_call: int = 256
) -> Values:
    """Logits of the trials by one executor."""
    executor = executor_named(name, model, anatomy, Settings(rows_per_call=rows_per_call))
    return executor.run(bucket, trials, logits_measure)


def deviation(got: Values, want: Values) -> float:
    """Largest difference of trials and streams, as a share of the logits' scale; NaN must meet NaN."""
    assert torch.equal(got.trials.isnan(), want.trials.isnan())
    assert got.streams.keys() == want.streams.keys()
    scale = max(float(x.abs().max()) for x in want.streams.values())
    pairs = [(got.trials.nan_to_num(), want.trials.nan_to_num())]
    pairs += [(got.streams[name], want.streams[name]) for name in want.streams]
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0) / scale
