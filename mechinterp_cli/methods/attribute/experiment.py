"""`attribute` on one model: estimates of nodes and how far to trust them, direct attribution, lens, tokens."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mechinterp_cli.engine.plan import layer_parameters
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods import tables as common
from mechinterp_cli.methods.attribute import tables
from mechinterp_cli.methods.attribute.checks import check_estimators, lay_out
from mechinterp_cli.methods.attribute.direct import check_direct, direct_tables
from mechinterp_cli.methods.attribute.effects import Scale
from mechinterp_cli.methods.attribute.estimating import Estimating
from mechinterp_cli.methods.attribute.exact import Selection, draw_subsets, exact_effects, exact_job, idle_trials
from mechinterp_cli.methods.attribute.inputs import check_inputs, input_plan, input_tables
from mechinterp_cli.methods.attribute.lens import check_lens, lens_tables
from mechinterp_cli.methods.attribute.nodes import Nodes
from mechinterp_cli.methods.attribute.options import STEPPED, AttributeOptions, VerifyOptions
from mechinterp_cli.methods.attribute.verify import choose
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.dry_run import cost_of, matmul_rate
from mechinterp_cli.methods.experiment import Experiment, Setting, Tables, prepares
from mechinterp_cli.metrics import check_prompts, find_metric
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.stats import Status
from mechinterp_cli.stats.summary import StatsOptions

Floats = npt.NDArray[np.float64]

PARTS = ("sites", "direct", "lens", "inputs")
"""What a section may ask for."""


class AttributeExperiment(Experiment):
    """An attribution experiment: everything is checked, nothing is computed.

    Args:
        setting: Config, model, and the prompts that are kept.
        options: The section.
        nodes: What is estimated; None without `sites`.
        logits: Clean logits [prompts, vocab], where a metric needs them.
    """

    def __init__(self, setting: Setting, options: AttributeOptions, nodes: Nodes | None, logits: Tensor | None) -> None:
        super().__init__(setting)
        self.options = options
        self.nodes = nodes
        self.logits = logits

    def seeds(self) -> dict[str, int]:
        """Of the choice of other prompts, and of the sample that is verified."""
        verify = self.options.verify
        return {"attribute": self.options.seed} | ({} if verify is None else {"verify": verify.seed})

    def display(self) -> dict[str, str]:
        """Task, direction and source; what 0 and 1 mean."""
        options = self.options
        if self.nodes is None:
            return {"title": self.prompts.task, "scale": ""}
        end = "restored" if options.direction == "denoise" else "broken"
        scale = f"0: no effect, 1: the clean answer is fully {end}."
        return {
            "title": f"{self.prompts.task}, {options.direction}, source {options.source}",
            "scale": scale if self.nodes.bound.has_corrupt else "Change of the metric.",
        }

    def compute(self, bench: Bench) -> Tables:
        """Everything that the section asks for."""
        options, written = self.options, dict[str, Any]()
        if self.nodes is not None:
            written |= self._estimated(bench, self.nodes)
        if options.direct is not None:
            written |= direct_tables(options.direct, self.setting, bench)
        if options.lens is not None:
            written |= lens_tables(options.lens, self.setting, bench)
        if options.inputs is not None:
            written |= input_tables(options.inputs, self.setting, bench, self.logits)
        return written

    def _estimated(self, bench: Bench, nodes: Nodes) -> dict[str, Any]:
        bench.stage("measuring the streams")
        streams = self._streams(nodes)
        estimates = Estimating(self.setting, self.options, nodes, self.logits, bench).run()
        found = tables.Attribution(
            nodes,
            self.prompts,
            self.loaded.config.metrics,
            estimates,
            self._scales(nodes, streams),
            None,
            self._threshold(nodes),
        )
        verify = self.options.verify
        if verify is not None:
            found = self._verified(bench, found, verify)
        bench.stage("working out statistics")
        self._warn_of_few(bench)
        return self._tables(found, streams)

    def _warn_of_few(self, bench: Bench) -> None:
        count = len(self.prompts.prompts)
        if count < StatsOptions.min_prompts:
            few = f"{count} {'prompt is' if count == 1 else 'prompts are'} fewer than {StatsOptions.min_prompts}"
            bench.warn(f"attribute: {few}; intervals of estimates are rough")

    def _streams(self, nodes: Nodes) -> dict[str, Floats]:
        """Stream to [prompts, 1, metrics], without edits."""
        names, prompts = self.loaded.config.metrics, self.prompts
        metrics = measuring.Metrics.of(names, prompts, self.logits, self.model)
        streams: dict[str, Floats] = {}
        for members in measuring.split_members(prompts):
            for name, tokens in nodes.bound.tokens(members).items():
                whole = streams.setdefault(name, np.full((len(prompts.prompts), 1, len(names)), np.nan))
                whole[list(members), 0] = metrics.of_stream(self.model, tokens, members).numpy()
        return streams

    def _scales(self, nodes: Nodes, streams: dict[str, Floats]) -> list[Scale]:
        base = nodes.bound.base_stream
        other = next((name for name in streams if name != base), None)
        stats = self.loaded.config.stats
        return [
            Scale(streams[base][:, 0, at], None if other is None else streams[other][:, 0, at], stats)
            for at in range(len(self.loaded.config.metrics))
        ]

    def _threshold(self, nodes: Nodes) -> float | None:
        """The smallest effect of interest."""
        verify = self.options.verify
        if verify is not None and verify.threshold is not None:
            return verify.threshold
        return self.loaded.config.stats.smallest_effect if nodes.bound.has_corrupt else None

    def _verified(self, bench: Bench, found: tables.Attribution, verify: VerifyOptions) -> tables.Attribution:
        """With exact effects of the strongest estimates and of a random sample, on the first metric's account."""
        strengths = {
            estimates.name: np.nan_to_num(np.abs(found.effects(estimates, 0).best)) for estimates in found.estimates
        }
        choice = choose(verify, found.nodes, found.usable, strengths)
        selection = Selection(choice, draw_subsets(verify, choice, found.usable))
        if not selection.trials:
            return found
        swept = bench.sweep(exact_job(self.setting, found.nodes, selection, self.logits))
        idle = idle_trials(found.status, selection)
        values = exact_effects(swept, found.nodes.bound.base_stream, idle)
        return replace(found, exact=tables.Exact(selection, values))

    def _tables(self, found: tables.Attribution, streams: dict[str, Floats]) -> dict[str, Any]:
        config, frame = self.loaded.config, tables.node_frame(found.nodes)
        summary = tables.summary(found, frame)
        rows: dict[str, Any] = {
            "trials": tables.trials(found, self.model.anatomy),
            "baselines": self._baselines(found, streams),
            "summary": summary,
            "verification": [row for verified in found.verified() for row in verified.verification()],
            "missed": [row for verified in found.verified() for row in verified.missed()],
            "subsets": tables.subsets(found),
        }
        if config.output.rows != "summary":
            top = tables.strongest_nodes(found, config.output.top) if config.output.rows == "top" else None
            rows["results"] = tables.results(found, frame, top)
        return {name: data for name, data in rows.items() if len(data)}

    def _baselines(self, found: tables.Attribution, streams: dict[str, Floats]) -> list[dict[str, Any]]:
        nothing, base = np.zeros((0, 0, 1, 0)), found.nodes.bound.base_stream
        status = np.zeros((0, 0), dtype=np.int8)
        return common.baseline_rows(common.Sweep(self.prompts, (), found.metrics, nothing, status, streams, base, None))

    def plan(self) -> dict[str, Any]:
        """Nodes, passes, rows; the exact effects cost what they would if the strongest were in the first layers."""
        options = self.options
        plan: dict[str, Any] = {"asked": [name for name in PARTS if getattr(options, name)]}
        if self.nodes is not None:
            plan |= self._plan_estimates(self.nodes)
        if options.inputs is not None:
            plan["inputs"] = input_plan(options.inputs, self.setting)
        return plan

    def _plan_estimates(self, nodes: Nodes) -> dict[str, Any]:
        config, anatomy = self.loaded.config, self.model.anatomy
        metrics, status = len(config.metrics), nodes.status()
        tokens = sum(prompt.length for prompt in self.prompts.prompts)
        forward = 2 * layer_parameters(self.model.model, anatomy) * anatomy.n_layers * tokens
        passes = {str(name): self._passes(name, metrics) for name in self.options.estimators}
        flops = forward * sum(passes.values())
        rows = int((status != Status.ABSENT).sum()) * metrics * len(self.options.estimators)
        plan: dict[str, Any] = {
            "nodes": len(nodes),
            "trivial": int((status == Status.TRIVIAL).sum()),
            "passes": passes,
            "flops": flops,
            "seconds": round(flops / matmul_rate(device_of(self.model.model)), 1),
            "result_rows": rows if config.output.rows == "all" else 0,
        }
        verify = self.options.verify
        if verify is not None:
            usable = np.asarray((status == Status.OK).any(1))
            choice = choose(verify, nodes, usable, {"": np.zeros(len(nodes))})
            selection = Selection(choice, draw_subsets(verify, choice, usable))
            plan["exact"] = cost_of(config.engine, self.model, exact_job(self.setting, nodes, selection, self.logits))
        return plan

    def _passes(self, name: str, metrics: int) -> int:
        """Forward passes that one estimator is worth, a backward pass counted as one (weights get no gradients)."""
        if name not in STEPPED:
            backward = metrics * (self.model.anatomy.n_layers if name == "atp_star" else 1)
            return 2 + backward
        steps = self.options.steps
        return 3 + (1 + metrics + (name == "conductance")) * steps


@prepares(AttributeOptions)
def prepare(options: AttributeOptions, setting: Setting) -> AttributeExperiment:
    """Check everything, choose the prompts, and lay out the nodes.

    Without forward passes (`setting.compute`) `keep: correct` keeps everything.

    Raises:
        UserError: Anything that the config, the model or the task cannot do.
    """
    loaded = setting.loaded
    if not any(getattr(options, name) for name in PARTS):
        remedy = f"Give at least one of {', '.join(PARTS[:-1])} and {PARTS[-1]}."
        raise loaded.error(("attribute",), "nothing is asked for", remedy)
    if options.sites:
        check_estimators(options, setting)
    if options.sites or options.inputs is not None:
        metrics = [find_metric(name) for name in loaded.config.metrics]
        check_prompts(metrics, setting.prompts.prompts, setting.prompts.task)
    _check_parts(options, setting)
    lay_out(options, setting)
    prompts, logits = measuring.select(setting)
    kept = replace(setting, prompts=prompts)
    return AttributeExperiment(kept, options, lay_out(options, kept), logits)


def _check_parts(options: AttributeOptions, setting: Setting) -> None:
    if options.direct is not None:
        check_direct(options.direct, setting)
    if options.lens is not None:
        check_lens(options.lens, setting)
    if options.inputs is not None:
        check_inputs(options.inputs, setting)
