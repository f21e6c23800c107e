"""Exact effects, by the engine: of the nodes that estimates are checked on, and of random sets of the others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mechinterp_cli.engine.edits import Bucket, Site, Trial
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods.attribute.nodes import Nodes
from mechinterp_cli.methods.attribute.options import VerifyOptions
from mechinterp_cli.methods.attribute.verify import Choice
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.methods.job import Job, Swept
from mechinterp_cli.methods.specs import TrialSpec
from mechinterp_cli.stats import Status
from mechinterp_cli.tasks.draw import Draw

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
JOB = "exact"


@dataclass(frozen=True, eq=False)
class Selection:
    """What is computed exactly.

    Args:
        choice: Single nodes.
        subsets: Sets of nodes that are patched together; none of them is among the single ones.
    """

    choice: Choice
    subsets: tuple[Integers, ...]

    @property
    def trials(self) -> int:
        """How many trials that makes."""
        return len(self.choice.nodes) + len(self.subsets)


def draw_subsets(options: VerifyOptions, choice: Choice, usable: npt.NDArray[np.bool_]) -> tuple[Integers, ...]:
    """Random sets of the nodes that are not computed one by one, each drawn from all of them.

    Args:
        options: How many, of what size, and the seed.
        choice: What is computed one by one.
        usable: Which nodes are not known to be 0.
    """
    left = usable.copy()
    left[choice.nodes] = False
    among = np.flatnonzero(left).tolist()
    size, draw = min(options.subset_size, len(among)), Draw(options.seed)
    if not size:
        return ()
    return tuple(np.array(sorted(draw.few(among, size)), dtype=np.int64) for _ in range(options.subsets))


def exact_job(setting: Setting, nodes: Nodes, selection: Selection, logits: Tensor | None) -> Job:
    """The engine's work: a trial per chosen node, then one per set.

    Args:
        setting: Config, model, prompts.
        nodes: All nodes.
        selection: What is computed.
        logits: Clean logits [prompts, vocab], where a metric needs them.
    """
    bound, model, prompts = nodes.bound, setting.model, setting.prompts
    members = measuring.split_members(prompts)
    names = setting.loaded.config.metrics
    metrics = measuring.Metrics.of(names, prompts, logits, model)
    specs = _specs(nodes, selection)
    sites = {Site(spec.kind, layer) for spec in specs.values() for layer in spec.layers}
    means = bound.means_of(model, sites, members, compute=setting.compute)

    def trials(part: Sequence[int]) -> tuple[Trial, ...]:
        single = {trial.index: trial for trial in bound.trials(list(specs.values()), part, means)}
        return tuple(_trials(bound.base_stream, selection, single))

    return Job(
        trials=selection.trials,
        prompts=len(prompts.prompts),
        members=members,
        works=tuple(Work(Bucket.of(bound.tokens(part)), trials(part)) for part in members),
        measures=tuple(metrics.on(part) for part in members),
        metrics=names,
        name=JOB,
    )


def _specs(nodes: Nodes, selection: Selection) -> dict[int, TrialSpec]:
    """Every node that takes part, by its number, which is its trial's index here."""
    everyone = np.unique(np.concatenate([selection.choice.nodes, *selection.subsets])).tolist()
    return {node: nodes.spec(node, node) for node in everyone}


def _trials(stream: str, selection: Selection, single: dict[int, Trial]) -> Iterator[Trial]:
    """Trials of one bucket, numbered as the selection has them; those that do nothing are left out."""
    sets = [[node] for node in selection.choice.nodes.tolist()] + [subset.tolist() for subset in selection.subsets]
    for index, members in enumerate(sets):
        found = [single[node] for node in members if node in single]
        if found:
            computed = sorted({prompt for trial in found for prompt in trial.prompts})
            yield Trial(index, stream, tuple(edit for trial in found for edit in trial.edits), tuple(computed))


def exact_effects(swept: Swept, base: str, idle: npt.NDArray[np.bool_]) -> Floats:
    """[metrics, trials, prompts] of exact effects, 0 where a trial is known to do nothing.

    Args:
        swept: What the job came to.
        base: The stream that is patched into.
        idle: [trials, prompts].
    """
    effects = swept.values[:, :, 0] - swept.streams[base][None, :, 0]
    return np.where(idle[None], 0.0, np.moveaxis(effects, -1, 0))


def idle_trials(status: npt.NDArray[np.int8], selection: Selection) -> npt.NDArray[np.bool_]:
    """[trials, prompts] of a selection: which trials do nothing, or are not there.

    Args:
        status: [nodes, prompts] of `Status`.
        selection: What is computed.
    """
    idle = status != Status.OK
    rows = [idle[selection.choice.nodes], *(idle[subset].all(0)[None] for subset in selection.subsets)]
    return np.concatenate(rows)
