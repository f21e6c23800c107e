"""Path patching: what senders do to the answer through chosen receivers alone, exactly.

Wang et al. 2211.00593, appendix B; Goldowsky-Dill et al. 2304.05969. First the receivers' inputs are found in a pass in
which the senders have another stream's outputs and everything between them and the receivers is either frozen to the
base or free to follow. Then the base is run with the receivers given those inputs, and everything after them follows.
The senders do not act on the answer in any other way. Nothing is linearised and no norm is frozen.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine.circuit_graph import Graph, Source, Target
from mechinterp_cli.engine.edge_passes import Asked, Base, Inputs, batches, final_states, inputs_of
from mechinterp_cli.engine.edge_patching import EdgePatching, Part
from mechinterp_cli.engine.edge_routing import Bools, Routing, Slots
from mechinterp_cli.engine.wavefront import Measure
from mechinterp_cli.errors import UserError

Rest = Literal["frozen", "mlps", "heads", "free"]
"""What lies between senders and receivers and follows the senders: nothing, MLPs, heads, or both."""

_FREE: dict[Rest, tuple[str, ...]] = {"frozen": (), "mlps": ("mlp",), "heads": ("head",), "free": ("mlp", "head")}


@dataclass(frozen=True)
class Path:
    """From whom to whom.

    Args:
        senders: Whose outputs are another stream's.
        receivers: Whose inputs follow; `logits` alone, or others.
        rest: What between the two follows, too. Receivers themselves never do: a path ends in the first one.
    """

    senders: tuple[Source, ...]
    receivers: tuple[Target, ...]
    rest: Rest = "frozen"

    @property
    def name(self) -> str:
        """`a3.h5->a7.h1.q`, several joined by `+`."""
        return "->".join("+".join(part.name for part in ends) for ends in (self.senders, self.receivers))


def check_path(graph: Graph, path: Path) -> None:
    """Refuse a path that is none.

    Args:
        graph: The model's.
        path: From whom to whom.

    Raises:
        UserError: A part is not there, a sender reaches no receiver, or the logits are one receiver among others.
    """
    if len(path.receivers) > 1 and any(target.kind == "logits" for target in path.receivers):
        raise UserError(
            "logits are where every path ends, and cannot be one receiver among others",
            "Name logits alone, or leave them out.",
        )
    for sender in path.senders:
        late: UserError | None = None
        for receiver in path.receivers:
            try:
                graph.edge(sender, receiver)
                break
            except UserError as error:
                late = error
        else:
            assert late is not None
            raise late
    for receiver in path.receivers:
        if not any(graph.source_index[sender] < graph.reads[graph.target_index[receiver]] for sender in path.senders):
            raise UserError(
                f"{receiver.name} reads before {' and '.join(sender.name for sender in path.senders)} write",
                "Receivers come after senders.",
            )


def patch_paths(
    patching: EdgePatching, paths: Sequence[Path], measure: Measure, tick: Callable[[int], None] = lambda done: None
) -> Float[Tensor, "paths prompts metrics"]:
    """Metrics of the base with each path patched; float64 on the CPU.

    Args:
        patching: The model on pairs of prompts: `own` is the base, senders send what they have in `other`.
        paths: From whom to whom.
        measure: Logits to metrics.
        tick: Called with the number of paths that are done.

    Raises:
        UserError: A path is none.
    """
    for path in paths:
        check_path(patching.graph, path)
    by_part = []
    for number, part in enumerate(patching.parts):
        found: list[Tensor] = []
        for values in _patched(part, paths, measure):
            found.append(values)
            tick((number * len(paths) + sum(map(len, found))) // len(patching.parts))
        by_part.append(torch.cat(found))
    return torch.cat(by_part, dim=1)


def _patched(part: Part, paths: Sequence[Path], measure: Measure) -> Iterator[Tensor]:
    """Metrics of some paths at a time."""
    base, slots, done = part.base("own"), part.slots, 0
    asked = (_asked(slots, _before(slots, path), path) for path in paths)
    for some in batches(base, asked, part.memory):
        chosen = paths[done : done + len(some)]
        ends = [path.receivers[0].kind == "logits" for path in chosen]
        states: dict[int, Tensor] = {}
        for end, numbers in ((end, [i for i, other in enumerate(ends) if other == end]) for end in (True, False)):
            passes = [some[i] for i in numbers]
            if passes:
                states.update(zip(numbers, final_states(base, passes) if end else _followed(base, passes), strict=True))
        yield part.measured(torch.stack([states[i] for i in range(len(some))]), measure)
        done += len(some)


def _followed(base: Base, passes: Sequence[Asked]) -> Float[Tensor, "passes prompts d_model"]:
    """Final states of the base where receivers are given what a first pass gave them, and what is after follows."""
    slots, given = base.slots, inputs_of(base, passes)
    after = [_after(slots, needs.wanted, inputs) for (_, needs), inputs in zip(passes, given, strict=True)]
    return final_states(base, after)


def _asked(slots: Slots, routing: Routing, path: Path) -> Asked:
    return routing, slots.needs(routing, [slots.graph.target_index[target] for target in path.receivers])


def _before(slots: Slots, path: Path) -> Routing:
    """The first pass: senders send the other stream's outputs, and the parts that are free follow."""
    graph, kinds = slots.graph, _FREE[path.rest]
    senders = np.array([source in path.senders for source in graph.sources])
    free = np.array([source.kind in kinds for source in graph.sources]) & ~senders & ~_receiving(slots, path)
    follows = np.array([("head" if target.kind in "qkv" else target.kind) in kinds for target in graph.targets])
    follows[[graph.target_index[target] for target in path.receivers]] = True
    live, other = (slots.allowed & follows[:, None] & sources for sources in (free, senders))
    return Routing(live[None], other[None])


def _receiving(slots: Slots, path: Path) -> Bools:
    """[sources], whether the part is one of the receivers."""
    graph = slots.graph
    found, ends = np.zeros(len(graph.sources), dtype=np.bool_), np.zeros(len(graph.targets), dtype=np.bool_)
    ends[[graph.target_index[target] for target in path.receivers]] = True
    for layer in slots.layers:
        found[layer.heads] = layer.heads_among(ends)
        if layer.mlp is not None and layer.mlp_input is not None:
            found[layer.mlp] = ends[layer.mlp_input]
    return found


def _after(slots: Slots, receivers: Sequence[int], given: Inputs) -> Asked:
    """The second pass: receivers have the inputs that they were given, and every other part follows."""
    live = slots.allowed.copy()
    live[list(receivers)] = False
    routing = Routing(live[None], np.zeros_like(live[None]), pinned=given)
    return routing, slots.needs(routing, [slots.logits])
