"""What of `sites` and estimators a config, a model or a task cannot do, said before any forward pass."""

from mechinterp_cli.engine.atp_star import check_layers
from mechinterp_cli.engine.relevance import check_rules
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.attribute.nodes import Nodes
from mechinterp_cli.methods.attribute.options import AttributeOptions
from mechinterp_cli.methods.binder import Binder
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.methods.interchange import bind, refuse_mean_of_keys
from mechinterp_cli.methods.places import LayerWindow
from mechinterp_cli.metrics import METRICS, find_metric
from mechinterp_cli.stats import Status

ONE_GRADIENT = ("atp", "atp_star", "relp")
"""Estimators that read gradients at the base alone."""


def check_estimators(options: AttributeOptions, setting: Setting) -> None:
    """Refuse metrics and estimators that say nothing together.

    Raises:
        UserError: A metric without gradient; KL where its gradient is zero; layers together. Names the key.
    """
    loaded = setting.loaded
    for place, name in enumerate(loaded.config.metrics):
        if not find_metric(name).differentiable:
            others = ", ".join(sorted(metric.name for metric in METRICS.values() if metric.differentiable))
            problem = f"{name} is a count and has no gradient, which attribute.estimators need"
            raise loaded.error(("metrics", place), problem, f"Choose from {others}, or measure {name} with patch.")
    if "kl" in loaded.config.metrics and options.base_stream == "clean":
        for place, estimator in enumerate(options.estimators):
            if estimator in ONE_GRADIENT:
                problem = (
                    f"{estimator} with the metric kl says 0 everywhere under direction: noise, since KL to the clean "
                    "output is least at the clean prompt and its gradient there is zero"
                )
                remedy = "Use direction: denoise, ig_inputs or conductance, or another metric."
                raise loaded.error(("attribute", "estimators", place), problem, remedy)
    for place, block in enumerate(options.sites):
        if isinstance(block.layers, LayerWindow):
            problem = "estimates are of single layers, and a window patches several together"
            raise loaded.error(("attribute", "sites", place, "layers"), problem, "Use all or a list, or use patch.")


def lay_out(options: AttributeOptions, setting: Setting) -> Nodes | None:
    """The nodes, checked against model and prompts; None where `sites` asks for none.

    Raises:
        UserError: A site, layer, head, neuron or position that is not there, an estimator that cannot work there, or
            more nodes to verify than there are; names the key.
    """
    if not options.sites:
        return None
    loaded, anatomy, prompts = setting.loaded, setting.model.anatomy, setting.prompts
    bound = bind(loaded, options, anatomy, prompts)
    nodes = Nodes(tuple(Binder(loaded, "attribute", anatomy, prompts).grids(options.sites)), bound)
    refuse_mean_of_keys(loaded, options, [grid.spec(0, 0) for grid in nodes.grids])
    for place, name in enumerate(options.estimators):
        try:
            if name == "atp_star":
                check_layers(anatomy, nodes.sites)
            if name == "relp":
                check_rules(options.rules, nodes.sites)
        except UserError as error:
            raise loaded.error(("attribute", "estimators", place), error.cause, error.remedy) from error
    _check_verify(options, setting, nodes)
    return nodes


def _check_verify(options: AttributeOptions, setting: Setting, nodes: Nodes) -> None:
    """Refuse to verify more nodes than there are; the defaults take as many as there are."""
    verify = options.verify
    if verify is None:
        return
    usable = int((nodes.status() == Status.OK).any(1).sum())
    for key in ("top", "random"):
        wanted = getattr(verify, key)
        if key in verify.model_fields_set and wanted > usable:
            problem = f"{wanted} nodes are to be verified, and the sweep has {usable} that can have an effect"
            raise setting.loaded.error(("attribute", "verify", key), problem, "Lower it, or ask for more sites.")
