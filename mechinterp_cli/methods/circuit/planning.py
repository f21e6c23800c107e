"""What a search for circuits will take."""

from typing import Any

from mechinterp_cli.engine.plan import layer_parameters
from mechinterp_cli.methods.circuit.choose import Topology
from mechinterp_cli.methods.circuit.layout import Layout
from mechinterp_cli.methods.circuit.neurons import ItemTopology
from mechinterp_cli.methods.circuit.scoring import passes
from mechinterp_cli.methods.dry_run import matmul_rate
from mechinterp_cli.models.anatomy import device_of


def plan_of(layout: Layout) -> dict[str, Any]:
    """Nodes, edges, passes of every score, circuits; a circuit costs a forward pass at most.

    Args:
        layout: Config, model, prompts.
    """
    options, graph, anatomy, topology = layout.options, layout.graph, layout.model.anatomy, layout.topology
    circuits, random = _circuits(layout), options.random.draws * len(options.sizes)
    tests, asked = 0, options.tests
    if asked is not None:
        tests = 2 + asked.edges + 2 * asked.inflated + 2 * asked.subsets
    tokens = {
        side: sum(layout.prompts.prompts[i].length for i in chosen)
        for side, chosen in (("train", layout.split.train), ("evaluate", layout.split.evaluate))
    }
    scored = {str(name): passes(name, options, topology, graph) for name in options.scores}
    forward = 2 * layer_parameters(layout.model.model, anatomy) * anatomy.n_layers
    run = circuits + random + tests
    flops = forward * (sum(scored.values()) * tokens["train"] + run * tokens["evaluate"])
    return {
        "nodes": len(graph.sources) + 1,
        **_made_of(topology),
        "train": len(layout.split.train),
        "evaluate": len(layout.split.evaluate),
        "passes": scored,
        "trials": run,
        "computed": run * len(layout.split.evaluate),
        "units": len(options.scores) + 1,
        "flops": flops,
        "seconds": round(flops / matmul_rate(device_of(layout.model.model)), 1),
        "score_bytes": len(topology) * (4 * len(layout.split.train) + 8) * len(options.scores),
        "edge_rows": len(topology) * len(options.scores) if layout.loaded.config.output.rows == "all" else 0,
    }


def _made_of(topology: Topology) -> dict[str, int]:
    """How many edges there are; or neurons, and all that circuits of neurons are made of."""
    if not isinstance(topology, ItemTopology):
        return {"edges": len(topology)}
    return {"neurons": len(topology.neurons), "items": len(topology)}


def _circuits(layout: Layout) -> int:
    """Those of rankings by both ways, of thresholds, and given ones."""
    options = layout.options
    ranked = 2 * len(options.sizes) * sum(name != "acdc" for name in options.scores)
    return ranked + len(options.acdc.thresholds) * ("acdc" in options.scores) + len(layout.sets)
