"""The plan: which trials are executed together, fixed before anything runs.

Chunks and units decide the shapes of matrix products and so the last bits of a result. They are therefore
data: made once, written into the manifest, used again when a run is resumed or reproduced.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from mechinterp_cli.engine.edits import Bucket, Trial
from mechinterp_cli.engine.groups import admission
from mechinterp_cli.engine.wavefront import logits_chunk
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy, device_of

CPU_ROWS_PER_CALL = 1024
GPU_ROWS_PER_CALL = 16384
ROWS_PER_UNIT = 2**15
"""A unit is saved when it ends: some twenty seconds of work on two cores for a model of 135 M parameters."""


@dataclass(frozen=True, eq=False)
class Work:
    """The trials of one bucket."""

    bucket: Bucket
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Unit:
    """Trials (by their place in their bucket's list) that are executed and saved together.

    A bucket without trials has one unit without any, so that its streams are measured.
    """

    bucket: int
    trials: tuple[int, ...]

    @property
    def key(self) -> str:
        """A name that tells this unit from every other, also from its halves."""
        content = ",".join(map(str, self.trials)).encode()
        return f"{self.bucket:04d}-{hashlib.sha256(content).hexdigest()[:16]}"

    def halves(self) -> tuple["Unit", "Unit"]:
        """Two units of half the trials each."""
        middle = len(self.trials) // 2
        return Unit(self.bucket, self.trials[:middle]), Unit(self.bucket, self.trials[middle:])


@dataclass(frozen=True)
class Cost:
    """What a plan will take."""

    trials: int
    rows: int
    row_layers: int
    items: int
    flops: float
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        """What both take one after the other: sums, and the larger of the bytes."""
        return Cost(
            self.trials + other.trials,
            self.rows + other.rows,
            self.row_layers + other.row_layers,
            self.items + other.items,
            self.flops + other.flops,
            max(self.bytes, other.bytes),
        )


@dataclass(frozen=True)
class Plan:
    """Executor, sizes and units of a run, and of how many tokens the logits are computed: None for all."""

    executor: str
    rows_per_call: int
    units: tuple[Unit, ...]
    columns: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The plan as the manifest holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan that a manifest holds."""
        units = tuple(Unit(int(unit["bucket"]), tuple(map(int, unit["trials"]))) for unit in data["units"])
        columns = data.get("columns")  # plans of older runs compute all logits
        return cls(str(data["executor"]), int(data["rows_per_call"]), units, None if columns is None else int(columns))

    def fits(self, works: Sequence[Work]) -> bool:
        """Whether its units hold every trial of every bucket once."""
        found: list[list[int]] = [[] for _ in works]
        for unit in self.units:
            if not 0 <= unit.bucket < len(works):
                return False
            found[unit.bucket] += unit.trials
        planned = {unit.bucket for unit in self.units}
        return planned == set(range(len(works))) and all(
            sorted(slots) == list(range(len(work.trials))) for slots, work in zip(found, works, strict=True)
        )


def layer_parameters(model: nn.Module, anatomy: Anatomy) -> float:
    """Mean number of weights of a layer that multiply each row (experts count as if all were used)."""
    layers = [model.get_submodule(layer.module) for layer in anatomy.layers]
    return sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim >= 2) / len(layers)


def trial_rows(trial: Trial, length: int, *, packed: bool) -> int:
    """Rows of one trial over its prompts, at most: prompts that begin alike share some (`sharing`)."""
    if not packed:
        return length * len(trial.prompts)
    return sum(max(0, length - trial.start(prompt)) for prompt in trial.prompts)


def cost(model: nn.Module, anatomy: Anatomy, work: Work, executor: str, columns: int | None = None) -> Cost:
    """Rows, FLOPs (two per weight and row, attention, unembedding) and bytes of one bucket's trials.

    Args:
        model: The model.
        anatomy: Its anatomy.
        work: Prompts and trials.
        executor: `packed`, `resume` or `hooks`.
        columns: Of how many tokens the logits are computed; None for all.
    """
    bucket, packed = work.bucket, executor == "packed"
    per_row = 2 * layer_parameters(model, anatomy)
    heads = next((layer.heads for layer in anatomy.layers if layer.heads), None)
    per_row += 4 * bucket.length * heads.query * heads.d_head if heads else 0
    rows = row_layers = items = 0
    for trial in work.trials:
        n, first = trial_rows(trial, bucket.length, packed=packed), admission(trial)
        if executor == "hooks":  # whole passes over all prompts
            n, first = bucket.size * bucket.length, 0
        rows, row_layers = rows + n, row_layers + n * max(0, anatomy.n_layers - first)
        items += len(trial.prompts)
    streams = len(bucket.tokens) * bucket.size * bucket.length * anatomy.n_layers
    unembed = 2.0 * (columns or anatomy.vocab_size) * anatomy.d_model * items * bucket.read.shape[1]
    flops = per_row * (row_layers + streams) + unembed
    return Cost(len(work.trials), rows, row_layers, items, flops, rows * anatomy.d_model * itemsize(model))


def itemsize(model: nn.Module) -> int:
    """Bytes of one activation."""
    return next(model.parameters()).element_size()


def fixed_bytes(model: nn.Module, anatomy: Anatomy, work: Work, rows_per_call: int) -> int:
    """Bytes that a unit takes whatever its number of trials: streams, one call's temporaries, logits."""
    bucket = work.bucket
    unembedded = bucket.size * bucket.read.shape[1] * max(1, len(work.trials))
    logits = min(unembedded, logits_chunk(device_of(model), anatomy.vocab_size)) * anatomy.vocab_size * 4
    d, size = anatomy.d_model, itemsize(model)
    heads = next((layer.heads for layer in anatomy.layers if layer.heads), None)
    attention = heads.query * (heads.d_head * 3 + 3 * bucket.length) if heads else 3 * d
    d_mlp = max([layer.d_mlp for layer in anatomy.layers] + [4 * d])
    streams = len(bucket.tokens) * bucket.size * bucket.length * (6 * d + attention) * size
    return streams + rows_per_call * (4 * d + 3 * d_mlp + attention) * max(size, 4) + 3 * logits


def free_memory(device: torch.device) -> int:
    """Bytes free on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def make_plan(
    model: nn.Module, anatomy: Anatomy, works: Sequence[Work], *, executor: str, rows_per_call: int, budget: int
) -> Plan:
    """Cut every bucket's trials into units that fit the budget.

    Args:
        model: The model.
        anatomy: Its anatomy.
        works: Trials by bucket.
        executor: `packed`, `resume` or `hooks`.
        rows_per_call: Rows that a layer is called on at once.
        budget: Bytes that a unit may take.

    Raises:
        UserError: Not even one trial fits the budget.
    """
    units: list[Unit] = []
    for index, work in enumerate(works):
        left = budget - fixed_bytes(model, anatomy, work, rows_per_call)
        per_row = 3 * anatomy.d_model * itemsize(model)
        most = min(ROWS_PER_UNIT, left // per_row)
        current: list[int] = []
        rows = 0
        order = sorted(range(len(work.trials)), key=lambda i: _admission(work.trials[i]))
        for slot in order:
            n = trial_rows(work.trials[slot], work.bucket.length, packed=executor == "packed")
            if n * per_row > left:
                raise UserError(
                    f"engine.max_memory: one trial on {work.bucket.size} prompts of {work.bucket.length} tokens needs "
                    f"{(budget - left + n * per_row) / 2**20:.1f} MiB, {budget / 2**20:.1f} MiB are allowed",
                    "Raise engine.max_memory or lower task.n.",
                )
            if current and rows + n > most:
                units.append(Unit(index, tuple(current)))
                current, rows = [], 0
            current.append(slot)
            rows += n
        if current or not work.trials:
            units.append(Unit(index, tuple(current)))
    return Plan(executor, rows_per_call, tuple(units))


def _admission(trial: Trial) -> tuple[int, int]:
    return admission(trial), trial.index
