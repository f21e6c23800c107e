"""What computes at each granularity: edges of heads and MLPs, or heads and single neurons."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine import edge_scores as scoring
from mechinterp_cli.engine.edge_patching import EdgePatching, Pairs, exact_edge_effects
from mechinterp_cli.engine.edge_routing import AllButOne
from mechinterp_cli.engine.edge_scores import EdgeScores, Method, edge_scores
from mechinterp_cli.engine.gradients import Differentiable
from mechinterp_cli.engine.neuron_patching import NeuronPatching
from mechinterp_cli.engine.neuron_scores import neuron_scores
from mechinterp_cli.engine.neuron_wiring import NeuronWiring
from mechinterp_cli.engine.wavefront import Measure
from mechinterp_cli.engine.wiring import Wiring

Parts = Wiring | NeuronWiring
Patching = EdgePatching | NeuronPatching
Tick = Callable[[int], None]


def patching(parts: Parts, pairs: Pairs) -> Patching:
    """What runs circuits on some prompts.

    Raises:
        UserError: Parts of this model cannot be patched; says why.
        ProofError: They do not give this model's own logits.
    """
    return NeuronPatching(parts, pairs) if isinstance(parts, NeuronWiring) else EdgePatching(parts, pairs)


def exact(parts: Parts, pairs: Pairs, measure: Measure, tick: Tick) -> Float[Tensor, "choices prompts metrics"]:
    """M(patched) − M(base) of every edge, or of every head and neuron, alone.

    Args:
        parts: The model.
        pairs: The prompts; `own` is the base.
        measure: Logits to metrics.
        tick: Called with how many are done.

    Raises:
        UserError: As `patching`.
        ProofError: As `patching`.
    """
    engine = patching(parts, pairs)
    if isinstance(engine, EdgePatching):
        return exact_edge_effects(engine, np.arange(engine.graph.n_edges), measure, tick)
    count = len(engine.wiring.items)
    return engine.run(AllButOne(count, np.arange(count)), measure, tick) - engine.streams(measure)[:1]


def estimated(parts: Parts, pairs: Pairs, metric: Differentiable, method: Method, steps: int, tick: Tick) -> EdgeScores:
    """The same, estimated from gradients.

    Args:
        parts: The model.
        pairs: The prompts; `own` is the base.
        metric: One metric, [n, 1].
        method: Which gradient is taken.
        steps: Of integrated gradients.
        tick: Told of every backward pass how many prompts (and steps) it was for.

    Raises:
        UserError: The metric has no gradient where the method takes it.
        RunError: An estimate is not finite.
    """
    prompts = scoring.Pairs(pairs.own, pairs.other, pairs.read, pairs.span_of)
    if isinstance(parts, NeuronWiring):
        return neuron_scores(parts, prompts, metric, method=method, steps=steps, tick=tick)
    return edge_scores(parts, prompts, metric, method=method, steps=steps, tick=tick)
