"""What a search for circuits starts from: everything that is known before anything is computed."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods.circuit.choose import Ranking, Topology
from mechinterp_cli.methods.circuit.item_columns import ItemColumns
from mechinterp_cli.methods.circuit.neurons import ItemTopology
from mechinterp_cli.methods.circuit.options import CircuitOptions
from mechinterp_cli.methods.circuit.sets import Handmade
from mechinterp_cli.methods.circuit.splitting import Split
from mechinterp_cli.methods.circuit.tables import EdgeColumns, Floats
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.metrics import find_metric
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.tasks.prompts import PromptSet

Side = Literal["train", "evaluate"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Config, model and prompts of one search.

    Args:
        setting: Config, model, and the prompts that are kept.
        options: The section.
        graph: The model's graph.
        topology: The same as numbers.
        sets: Circuits that are given.
        split: Training and evaluation prompts.
        logits: Clean logits [prompts, vocab], where a metric needs them.
    """

    setting: Setting
    options: CircuitOptions
    graph: Graph
    topology: Topology
    sets: tuple[Handmade, ...]
    split: Split
    logits: Tensor | None

    @property
    def loaded(self) -> LoadedConfig:
        """The config."""
        return self.setting.loaded

    @property
    def model(self) -> LoadedModel:
        """The model."""
        return self.setting.model

    @property
    def prompts(self) -> PromptSet:
        """All prompts."""
        return self.setting.prompts

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured; edges are scored by the first."""
        return self.loaded.config.metrics

    @property
    def metric(self) -> str:
        """What edges are scored by."""
        return self.metrics[0]

    @property
    def of_nodes(self) -> bool:
        """Whether circuits are made of nodes."""
        return self.options.granularity == "nodes"

    @property
    def columns(self) -> EdgeColumns:
        """What circuits are made of, for tables."""
        topology = self.topology
        return ItemColumns(topology.items) if isinstance(topology, ItemTopology) else EdgeColumns(self.graph)

    @property
    def base(self) -> Literal["clean", "corrupt"]:
        """The stream that scores are of patching into."""
        return "clean" if self.options.direction == "noise" else "corrupt"

    @property
    def better(self) -> int:
        """1 where the metric is better the higher it is, else −1."""
        return 1 if find_metric(self.metric).higher_is_better else -1

    @property
    def sign(self) -> int:
        """Of a score for a positive effect: an edge whose patching makes the clean prompt worse helps."""
        return self.better * (-1 if self.options.direction == "noise" else 1)

    def chosen(self, side: Side) -> list[int]:
        """The prompts of one side."""
        return list(self.split.train if side == "train" else self.split.evaluate)

    def clusters(self, side: Side) -> list[str]:
        """Of the prompts of one side."""
        return [self.prompts.prompts[i].cluster for i in self.chosen(side)]

    def measured(self) -> measuring.Metrics:
        """The run's metrics over all its prompts."""
        return measuring.Metrics.of(self.metrics, self.prompts, self.logits, self.model)

    def ranking(self, scores: Floats) -> Ranking:
        """The ranking of edges that circuits are tested, drawn and written of."""
        options = self.options
        return Ranking.of(self.topology, scores, options.rank, select=options.select, of_nodes=self.of_nodes)

    def streams(self) -> dict[str, Floats]:
        """Stream to [prompts, 1, metrics] of every prompt, by the model as it is."""
        prompts, metrics = self.prompts.prompts, self.measured()
        shape = (len(prompts), 1, len(self.metrics))
        found = {name: torch.empty(shape, dtype=torch.float64).numpy() for name in ("clean", "corrupt")}
        for members in measuring.split_members(self.prompts):
            for name, whole in found.items():
                tokens = torch.tensor([getattr(prompts[i], f"{name}_tokens") for i in members])
                whole[list(members), 0] = metrics.of_stream(self.model, tokens, members).numpy()
        return found
