"""Path patching by two passes with the oracle's hooks: outputs are frozen and replaced, inputs are read off.

For families without a norm after attention: there freezing a head's z freezes what it adds.
"""

import torch
from torch import Tensor

from mechinterp_cli.engine.circuit_graph import Source, Target
from mechinterp_cli.engine.path_patching import Path
from tests.oracle import Change, Oracle, Place

Seen = dict[Place, Tensor]


def logits_with(oracle: Oracle, base: Tensor, source: Tensor, path: Path) -> Tensor:
    """Logits [prompts, positions, vocab] of the base with a path patched."""
    (_, own), (_, other) = oracle.run(base), oracle.run(source)
    logits, received = oracle.run(base, _first(oracle, own, other, path))
    if path.receivers[0].kind == "logits":
        return logits
    changes: dict[Place, Change] = {}
    for target in path.receivers:
        if target.kind == "mlp":
            changes["mlp_out", target.layer] = _whole(received["mlp_out", target.layer])
        else:
            site: Place = (target.kind, target.layer)
            heads = [other.head for other in path.receivers if (other.kind, other.layer) == site]
            changes[site] = _heads(received[site], heads)
    return oracle.run(base, changes)[0]


def _first(oracle: Oracle, own: Seen, other: Seen, path: Path) -> dict[Place, Change]:
    """Frozen parts have the base's outputs, senders the source's; what is free is left alone."""
    changes: dict[Place, Change] = {}
    for layer in range(len(oracle.layers)):
        heads = range(own["z", layer].shape[2])
        share = len(heads) // own["k", layer].shape[2]
        receiving = {
            head
            for target in path.receivers
            for head in heads
            if target.layer == layer
            and ((target.kind == "q" and head == target.head) or (target.kind in "kv" and head // share == target.head))
        }
        sending = {head for head in heads if Source("head", layer, head) in path.senders}
        frozen = set(heads) if path.rest in ("frozen", "mlps") else receiving
        changes["z", layer] = _mixed(own["z", layer], frozen, other["z", layer], sending)
        if Source("mlp", layer) in path.senders:
            changes["mlp_out", layer] = _whole(other["mlp_out", layer])
        elif path.rest in ("frozen", "heads") or Target("mlp", layer) in path.receivers:
            changes["mlp_out", layer] = _whole(own["mlp_out", layer])
    if Source("embed") in path.senders:
        changes["embed", 0] = _whole(other["embed", 0])
    return changes


def _whole(value: Tensor) -> Change:
    return lambda _x: value


def _heads(value: Tensor, heads: list[int]) -> Change:
    return _mixed(value, set(heads), value, set())


def _mixed(own: Tensor, frozen: set[int], other: Tensor, sending: set[int]) -> Change:
    def change(x: Tensor) -> Tensor:
        x = torch.clone(x)
        for head in frozen:
            x[:, :, head] = own[:, :, head]
        for head in sending:
            x[:, :, head] = other[:, :, head]
        return x

    return change
