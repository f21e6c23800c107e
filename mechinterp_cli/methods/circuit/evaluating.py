"""Evaluating circuits by real interventions, in pieces that are saved as they end."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_cli.engine.edge_patching import Pairs
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.circuit.checks import REST
from mechinterp_cli.methods.circuit.choose import Bools
from mechinterp_cli.methods.circuit.engines import Parts, Patching, patching
from mechinterp_cli.methods.circuit.saving import Saving
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.tasks.prompts import PromptSet

Floats = npt.NDArray[np.float64]

PIECE = 32
"""Circuits that are saved together."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Evaluation prompts of one length.

    Args:
        members: Which prompts, by index in the set.
        rows: Where they stand among the evaluation prompts.
    """

    members: tuple[int, ...]
    rows: tuple[int, ...]


def buckets(prompts: PromptSet, chosen: Sequence[int]) -> list[Bucket]:
    """Some of the prompts by exact length, shortest first."""
    place = {index: row for row, index in enumerate(chosen)}
    found = []
    for members in measuring.split_members(prompts):
        own = tuple(i for i in members if i in place)
        if own:
            found.append(Bucket(own, tuple(place[i] for i in own)))
    return found


def pairs_of(
    prompts: PromptSet, members: Sequence[int], spans: Sequence[str], *, base: Literal["clean", "corrupt"] = "clean"
) -> Pairs:
    """Clean prompts and their corrupted twins, of one length.

    Args:
        prompts: The set; every prompt is corrupted.
        members: Which.
        spans: Of the graph.
        base: The stream that is run; edges that are taken away carry the other one.
    """
    chosen = [prompts.prompts[i] for i in members]
    clean = torch.tensor([prompt.clean_tokens for prompt in chosen])
    corrupt = torch.tensor([prompt.corrupt_tokens or prompt.clean_tokens for prompt in chosen])
    own, other = (clean, corrupt) if base == "clean" else (corrupt, clean)
    return replace(Pairs.of(own, other), span_of=span_index(prompts, members, spans))


def span_index(
    prompts: PromptSet, members: Sequence[int], spans: Sequence[str]
) -> Int[Tensor, "prompts positions"] | None:
    """The span of every position of prompts of one length; None where there is one span.

    Args:
        prompts: The set.
        members: Which.
        spans: Of the graph: positions, or names of which the last is all that is in no other.
    """
    if len(spans) == 1:
        return None
    length = prompts.prompts[members[0]].length
    if spans[-1] != REST:
        return torch.arange(length).expand(len(members), -1)
    found = torch.full((len(members), length), len(spans) - 1)
    for row, index in enumerate(members):
        for number, name in enumerate(spans[:-1]):
            found[row, list(prompts.prompts[index].spans[name])] = number
    return found


class Evaluator:
    """Runs circuits on the evaluation prompts; each different circuit once.

    Args:
        setting: Config, model, prompts.
        parts: The model as a graph.
        chosen: The evaluation prompts.
        metrics: What is measured.
        bench: Keeps what is finished.
    """

    def __init__(
        self, setting: Setting, parts: Parts, chosen: Sequence[int], metrics: measuring.Metrics, bench: Bench
    ) -> None:
        self.setting, self.parts, self.metrics, self.bench = setting, parts, metrics, bench
        self.count = len(chosen)
        self.buckets = buckets(setting.prompts, chosen)
        self._known: dict[bytes, Floats] = {}
        self._engines: dict[int, Patching] = {}

    def __call__(self, name: str, masks: Sequence[Bools]) -> Floats:
        """[circuits, prompts, metrics].

        Args:
            name: What these circuits are, for the names of what is saved.
            masks: [edges] each: what is kept.
        """
        keys = [np.packbits(mask).tobytes() for mask in masks]
        fresh = {key: mask for key, mask in zip(keys, masks, strict=True) if key not in self._known}
        todo = list(fresh.items())
        for piece in range(0, len(todo), PIECE):
            part = todo[piece : piece + PIECE]
            values = self._piece(f"{name}-{piece // PIECE:03d}", [mask for _, mask in part], piece, len(todo))
            self._known.update(zip((key for key, _ in part), values, strict=True))
        return (
            np.stack([self._known[key] for key in keys]) if keys else np.zeros((0, self.count, len(self.metrics.names)))
        )

    def _piece(self, name: str, masks: Sequence[Bools], before: int, total: int) -> Floats:
        """One piece, as it was saved or computed now."""
        shape = (len(masks), self.count, len(self.metrics.names))
        digest = hashlib.sha256(b"".join(np.packbits(mask).tobytes() for mask in masks)).hexdigest()
        saving = Saving(self.bench, name, {"circuits": digest, "shape": json.dumps(shape)})
        saved = saving.read()
        if saved is not None:
            return saved.reshape(shape)
        values = np.empty(shape)
        for number, bucket in enumerate(self.buckets):

            def tick(done: int, number: int = number) -> None:
                self.bench.progress.advance(before + (number * len(masks) + done) // len(self.buckets), total)

            found = self._engine(number).run(masks, self.metrics.on(bucket.members), tick)
            values[:, list(bucket.rows)] = found.numpy()
        saving.write(values)
        return values

    def _engine(self, number: int) -> Patching:
        """The engine of a bucket, which proves itself as it is made; one at a time stays in memory."""
        if number not in self._engines:
            self._engines.clear()
            bucket, spans = self.buckets[number], self.parts.graph.spans
            pairs = pairs_of(self.setting.prompts, bucket.members, spans)
            try:
                engine = patching(self.parts, pairs)
            except UserError as error:
                raise self.setting.loaded.error(("model",), error.cause, error.remedy) from error
            proofs = self.bench.facts.get("edges_proved", {})
            self.bench.note({"edges_proved": {**proofs, str(pairs.own.shape[1]): engine.deviation}})
            self._engines[number] = engine
        return self._engines[number]
