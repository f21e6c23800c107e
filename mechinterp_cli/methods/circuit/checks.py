"""What a config, a model or a task cannot do, said before any forward pass."""

from collections.abc import Sequence

from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.engine.circuit_items import Items
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.circuit.choose import Topology
from mechinterp_cli.methods.circuit.neurons import ItemTopology
from mechinterp_cli.methods.circuit.options import LINEAR, CircuitOptions
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.metrics import METRICS, check_prompts, find_metric
from mechinterp_cli.tasks.prompts import PromptSet

REST = "rest"
"""The span of all positions that are in no other."""


def check_options(options: CircuitOptions, setting: Setting) -> None:
    """Refuse metrics, scores and tasks that say nothing together.

    Raises:
        UserError: Names the key.
    """
    loaded, metrics = setting.loaded, setting.loaded.config.metrics
    check_prompts([find_metric(name) for name in metrics], setting.prompts.prompts, setting.prompts.task)
    if any(prompt.corrupt_tokens is None for prompt in setting.prompts.prompts):
        problem = "edges that are not kept carry the corrupted prompt, and prompts of this task have none"
        raise loaded.error(("task",), problem, "Give each prompt a `corrupt` of as many tokens, or use another task.")
    for place, name in enumerate(options.scores):
        path = ("circuit", "scores", place)
        if name in LINEAR and not find_metric(metrics[0]).differentiable:
            others = ", ".join(sorted(metric.name for metric in METRICS.values() if metric.differentiable))
            raise loaded.error(path, f"{name} needs a gradient, and {metrics[0]} has none", f"Choose from {others}.")
        if name == "eap" and metrics[0] == "kl" and options.direction == "noise":
            problem = (
                "eap with the metric kl is 0 for every edge under direction: noise, since KL to the clean output is "
                "least at the clean prompt and its gradient there is zero"
            )
            remedy = "Use direction: denoise, eap_ig_inputs, eap_ig_activations or clean_corrupted, or another metric."
            raise loaded.error(path, problem, remedy)
    if options.granularity == "neurons" and "acdc" in options.scores:
        path = ("circuit", "scores", options.scores.index("acdc"))
        problem = "acdc goes from edge to edge, and granularity is neurons"
        raise loaded.error(path, problem, "Use granularity: edges, or another score.")
    if options.granularity != "edges" and options.select == "greedy":
        problem = f"greedy goes from edge to edge, and granularity is {options.granularity}"
        raise loaded.error(("circuit", "select"), problem, "Use select: top.")
    _check_tests(options, setting)


def _check_tests(options: CircuitOptions, setting: Setting) -> None:
    wanted = options.tests.size if options.tests is not None else None
    if isinstance(wanted, str) and getattr(options, wanted) is None:
        problem = f"tests are of the circuit `{wanted}`, and there is none"
        remedy = f"Give circuit.{wanted}, or a share of edges."
        raise setting.loaded.error(("circuit", "tests", "size"), problem, remedy)


def graph_of(options: CircuitOptions, setting: Setting) -> Graph:
    """The graph of the model, with the spans that the section names.

    Raises:
        UserError: The model's residual stream is not a sum of heads and MLPs, or spans cannot be told apart.
    """
    spans = span_names(options, setting)
    try:
        return Graph.of(setting.model.anatomy, spans=spans)
    except UserError as error:
        raise setting.loaded.error(("model", "id"), error.cause, error.remedy) from error


def topology_of(options: CircuitOptions, setting: Setting, graph: Graph) -> Topology:
    """What circuits are made of, as numbers.

    Raises:
        UserError: They are to be made of neurons, and the model's cannot be told apart.
    """
    if options.granularity != "neurons":
        return Topology.of(graph)
    try:
        return ItemTopology.over(Items.of(setting.model.anatomy, graph))
    except UserError as error:
        raise setting.loaded.error(("circuit", "granularity"), error.cause, error.remedy) from error


def span_names(options: CircuitOptions, setting: Setting) -> tuple[str, ...]:
    """Names of the spans that edges are told apart by; one where they are not.

    Raises:
        UserError: A prompt lacks a span, spans overlap, or prompts differ where each position counts.
    """
    prompts, path = setting.prompts, ("circuit", "spans")
    if options.spans is None:
        return ("all",)
    if options.spans == "each":
        shapes = {(prompt.template, prompt.length) for prompt in prompts.prompts}
        if len(shapes) > 1:
            lengths = sorted({prompt.length for prompt in prompts.prompts})
            problem = f"`each` needs prompts of one template and length, and these have {len(shapes)}"
            told = f"{problem} (lengths {', '.join(map(str, lengths))})" if len(lengths) > 1 else problem
            raise setting.loaded.error(path, told, "Name spans, or choose one template (task.templates: 0).")
        return tuple(map(str, range(prompts.prompts[0].length)))
    _check_spans(options.spans, setting, prompts)
    return (*options.spans, REST)


def _check_spans(names: Sequence[str], setting: Setting, prompts: PromptSet) -> None:
    for place, name in enumerate(names):
        if name not in prompts.span_names:
            problem = f"{name!r} is not a span of every prompt"
            remedy = f"There are {', '.join(prompts.span_names)}."
            raise setting.loaded.error(("circuit", "spans", place), problem, remedy)
    for prompt in prompts.prompts:
        at = [position for name in names for position in prompt.spans[name]]
        if len(set(at)) < len(at):
            problem = f"spans {', '.join(names)} share a position in {prompt.clean!r}"
            raise setting.loaded.error(("circuit", "spans"), problem, "Leave one of them out.")
