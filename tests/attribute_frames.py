"""Tables as an `attribute` run leaves them, made up: estimates follow exact effects at some sites and miss others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

import mechinterp_cli.methods.attribute.columns  # noqa: F401  the tables' columns are registered there
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.schema import validate
from mechinterp_cli.runs.tables import to_frame

WORDS = (
    " When",
    " Mary",
    " and",
    " John",
    " went",
    " to",
    " the",
    " store",
    ",",
    " John",
    " gave",
    " a",
    " drink",
    " to",
)
Rows = list[dict[str, Any]]


def frame(name: str, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as the table of that name, with the types that it is read with."""
    return to_frame(validate(name, list(rows), "attribute"))


def records(rows: pd.DataFrame) -> Rows:
    """A frame's rows, to be changed and made into a table again."""
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]


@dataclass(frozen=True)
class Fake:
    """A run; parts whose sizes are 0 or whose lists are empty are not there."""

    blocks: Sequence[str] = ("resid_pre", "z")
    estimators: Sequence[str] = ("atp", "ig_inputs")
    metrics: Sequence[str] = ("logit_diff", "prob")
    layers: int = 3
    heads: int = 4
    neurons: int = 0
    """Of a layer, for the block `neuron`."""
    normalised: bool = True
    random: int = 30
    """Nodes that are verified at random."""
    top: int = 5
    follows: Mapping[str, float] = field(default_factory=lambda: {"resid_pre": 0.97, "z": 0.4})
    """By kind of site, Pearson on the random part."""
    reason: str = ""
    """Why there is no Pearson, where there is none."""
    subsets: int = 0
    lens: Sequence[str] = ()
    """Kinds of sites of the lens."""
    lens_positions: Sequence[int] = (0, 5, 13)
    answers: bool = True
    direct: bool = False
    direct_neurons: int = 0
    sources: bool = False
    inputs: Sequence[str] = ()
    """Estimators of tokens."""
    tokens: Sequence[str] = WORDS
    prompts: int = 3
    checkpoints: Sequence[tuple[str | None, int | None]] = ((None, None),)
    listed: int = 10

    @property
    def manifest(self) -> Manifest:
        config = {"metrics": list(self.metrics), "output": {"top": self.listed}, "attribute": {}}
        made = Manifest("attribute", "fake", config, "0", status="complete")
        made.model, made.task = {"id": "toy-induction"}, {"name": "ioi"}
        made.display = {"title": "ioi, denoise, source pair", "scale": "0: no effect, 1: fully restored."}
        return made

    def draw(self, *key: object) -> float:
        """A number that is the same whenever it is asked for."""
        return float(np.random.default_rng([ord(letter) for letter in repr(key)]).normal())

    def nodes(self) -> Iterator[dict[str, Any]]:
        """Every node."""
        for block, kind in enumerate(self.blocks):
            units = {"z": self.heads, "q": self.heads, "k": self.heads, "neuron": self.neurons}.get(kind, 1)
            for layer in range(self.layers):
                for unit in range(units):
                    for position in range(len(self.tokens)):
                        row = {"site": kind, "layer": layer, "position": position, "block": block, "template": "t"}
                        row |= {"head": unit} if kind in ("z", "q", "k") else {}
                        row |= {"neuron": unit} if kind == "neuron" else {}
                        yield {**row, "label": f"{kind} {layer} {unit} @{position}"}

    def exact(self, node: Mapping[str, Any]) -> float:
        """What patching a node does."""
        planted = 0.8 if node["position"] == 9 and node["layer"] == 1 else 0.0
        return planted + 0.05 * self.draw(node["label"])

    def estimate(self, estimator: str, node: Mapping[str, Any]) -> float:
        """What an estimator says of it."""
        share = self.follows.get(node["site"], 0.9)
        said = share * self.exact(node) + (1 - share) * 0.5 * self.draw(node["label"], estimator)
        return abs(said) if estimator == "atp_star" and node["site"] not in ("q", "k") else said

    def every(self, rows: Sequence[Mapping[str, Any]]) -> Rows:
        """The rows at every checkpoint."""
        return [{**row, "checkpoint": name, "tokens_seen": seen} for name, seen in self.checkpoints for row in rows]

    def summary_table(self) -> pd.DataFrame:
        nodes = list(self.nodes())
        rows: Rows = []
        for at, estimator in enumerate(self.estimators):
            order = sorted(range(len(nodes)), key=lambda i: -abs(self.estimate(estimator, nodes[i])))
            top = set(order[: self.top])
            for i, node in enumerate(nodes):
                part = ", ".join(
                    ["top"] * (i in top) + ["random"] * (i % max(1, len(nodes) // max(1, self.random)) == 0)
                )
                for metric in self.metrics:
                    rows.append(self._node(node, estimator, metric, i + at * len(nodes), part if self.random else ""))
        return frame("summary", self.every(rows))

    def _node(self, node: Mapping[str, Any], estimator: str, metric: str, trial: int, part: str) -> dict[str, Any]:
        estimate, exact = self.estimate(estimator, node), self.exact(node)
        scale = 1.0 if metric == self.metrics[0] else 0.5
        row = {**node, "estimator": estimator, "steps": 32 if estimator in ("ig_inputs", "conductance") else None}
        row |= {"trial": trial, "metric": metric, "group": "all", "n": 8, "n_dropped": 0, "status": "ok"}
        row |= {"aggregate": "ratio_of_means" if self.normalised else "mean", "part": part or None}
        row |= {"effect": 4 * scale * estimate, "estimate": 4 * scale * estimate, "value": 1 + 4 * scale * estimate}
        row |= {"ci_low": scale * estimate - 0.1, "ci_high": scale * estimate + 0.1}
        row |= {"normalized": scale * estimate} if self.normalised else {}
        if part:
            row |= {"exact": 4 * scale * exact} | ({"exact_normalized": scale * exact} if self.normalised else {})
        return row

    @property
    def sites(self) -> list[str]:
        kinds = list(dict.fromkeys(self.blocks))
        return ["all", *kinds] if len(kinds) > 1 else kinds

    def verification_table(self) -> pd.DataFrame:
        rows: Rows = []
        for estimator in self.estimators:
            for metric in self.metrics:
                for site in self.sites:
                    signed = estimator != "atp_star" or site in ("q", "k")
                    row = {"estimator": estimator, "metric": metric, "site": site, "nodes": 400, "threshold": 0.05}
                    pearson = None if self.reason else self.follows.get(site, 0.8)
                    agreed = {"pearson": pearson, "spearman": None if pearson is None else pearson - 0.05}
                    agreed |= {"sign_agreement": 0.95 if signed else None, "mean_difference": 0.03}
                    rows.append({**row, **agreed, "part": "random", "rows": self.random, "above": 0.1,
                                 "reason": self.reason or None})  # fmt: skip
                    rows.append({**row, **agreed, "part": "top", "rows": self.top, "above": 0.6})
        return frame("verification", self.every(rows))

    def missed_table(self) -> pd.DataFrame:
        sites = list(dict.fromkeys([*self.sites, "all"]))
        return frame("missed", self.every([
            {"estimator": estimator, "metric": metric, "site": site, "stratum": stratum, "low": 0.0, "high": 0.05,
             "nodes": 370, "rows": 20, "missed": 1, "upper_count": 37, "upper_fraction": 0.1, "threshold": 0.05,
             "level": 0.95}
            for estimator in self.estimators for metric in self.metrics for site in sites
            for stratum in (("all",) if site == "all" else ("all", "below 0.0125"))
        ]))  # fmt: skip

    def subsets_table(self) -> pd.DataFrame:
        return frame("subsets", self.every([
            {"estimator": estimator, "metric": metric, "subset": i, "size": 40, "estimate": 0.1 * i,
             "exact": 0.1 * i + 0.05}
            for estimator in self.estimators for metric in self.metrics for i in range(self.subsets)
        ]))  # fmt: skip

    def parts(self) -> Rows:
        """Direct parts, means over prompts."""
        rows: Rows = [{"component": "embedding", "part_of": "total", "value": 0.4}]
        rows += [{"component": "mlp", "part_of": "total", "layer": layer, "value": self.draw("mlp", layer)}
                 for layer in range(self.layers)]  # fmt: skip
        rows += [
            {"component": "head", "part_of": "total", "layer": layer, "head": head,
             "value": 2.5 if (layer, head) == (1, 2) else 0.3 * self.draw("head", layer, head)}
            for layer in range(self.layers) for head in range(self.heads)
        ]  # fmt: skip
        total = {"component": "total", "part_of": None, "value": sum(row["value"] for row in rows)}
        rows += [
            {"component": "neuron", "part_of": "mlp", "layer": 0, "neuron": neuron, "value": 0.1 * neuron}
            for neuron in range(self.direct_neurons)
        ]
        return [total, *rows]

    def components_table(self) -> pd.DataFrame:
        return frame("components", self.means(self.parts()))

    def means(self, rows: Sequence[Mapping[str, Any]]) -> Rows:
        """Values with what is known of means."""
        known = {"group": "all", "n": 8, "clusters": 8, "ci_method": "bootstrap"}
        ends = [{"ci_low": row["value"] - 0.2, "ci_high": row["value"] + 0.2} for row in rows]
        return self.every([{**row, **known, **end} for row, end in zip(rows, ends, strict=True)])

    def sources_table(self) -> pd.DataFrame:
        return frame("sources", self.means([
            {"layer": layer, "head": head, "source_span": span, "value": self.draw(layer, head, span)}
            for layer in range(self.layers) for head in range(self.heads) for span in ("S2", "IO", "(no span)")
        ]))  # fmt: skip

    def direct_table(self) -> pd.DataFrame:
        rows = [{**row, "prompt": prompt} for prompt in range(self.prompts) for row in self.parts()]
        if self.sources:
            rows += [
                {"prompt": 0, "component": "source", "part_of": "head", "layer": 1, "head": 2, "source_position": at,
                 "source_token": token, "value": 2.0 if at == 1 else 0.01 * at}
                for at, token in enumerate(self.tokens)
            ]  # fmt: skip
        return frame("direct", self.every(rows))

    def lens_table(self) -> pd.DataFrame:
        return frame("lens", self.every([
            row
            for prompt in range(self.prompts)
            for site in self.lens
            for layer in range(1 if site == "embed" else self.layers)
            for position in self.lens_positions
            for row in self._lens(prompt, site, layer, position)
        ]))  # fmt: skip

    def _lens(self, prompt: int, site: str, layer: int, position: int) -> Iterator[dict[str, Any]]:
        p = (layer + 1) / (self.layers + 1)
        asked = {"answer_probability": p / (1 + prompt), "answer_rank": 10 * (self.layers - 1 - layer)}
        for rank in range(3):
            token = self.tokens[(position + layer + rank) % len(self.tokens)]
            row = {"prompt": prompt, "site": site, "layer": layer, "position": position, "rank": rank, "token_id": rank}
            row |= {"token": token, "probability": p / 2**rank, "kl": 4.0 * (1 - p)}
            yield row | (asked if self.answers else {})

    def inputs_table(self) -> pd.DataFrame:
        return frame("inputs", self.every([
            {"prompt": prompt, "template": "t", "estimator": estimator, "position": at, "token": token,
             "metric": metric, "baseline": None if estimator == "rollout" else "mean",
             "value": self.counts(prompt, estimator, at) * (1 if metric != "prob" else 0.1)}
            for prompt in range(self.prompts)
            for estimator in self.inputs
            for metric in (("attention",) if estimator == "rollout" else self.metrics)
            for at, token in enumerate(self.tokens)
        ]))  # fmt: skip

    def counts(self, prompt: int, estimator: str, at: int) -> float:
        """What a token counts for the first metric."""
        planted = {3: -1.5, 9: 2.5}.get(at, 0.0) + 0.2 * self.draw(prompt, estimator, at)
        return abs(planted) / 10 if estimator == "rollout" else planted

    def input_spans_table(self) -> pd.DataFrame:
        return frame("input_spans", self.every([
            {"estimator": estimator, "metric": "attention" if estimator == "rollout" else self.metrics[0],
             "template": "t", "span": span, "mean": mean, "ci_low": mean - 0.2, "ci_high": mean + 0.2, "n": 8,
             "clusters": 8}
            for estimator in self.inputs for span, mean in (("IO", -1.4), ("S2", 2.4))
        ]))  # fmt: skip

    def input_completeness_table(self) -> pd.DataFrame:
        return frame("input_completeness", self.every([
            {"prompt": prompt, "estimator": "integrated_gradients", "steps": 32, "baseline": "mean", "metric": metric,
             "relative_error": 0.002 * (prompt + 1)}
            for prompt in range(self.prompts) for metric in self.metrics
        ]))  # fmt: skip

    def prompts_table(self) -> pd.DataFrame:
        return frame("prompts", [
            {"prompt": prompt, "stream": "clean", "text": "".join(self.tokens), "tokens": list(self.tokens),
             "token_ids": list(range(len(self.tokens))), "template": "t"}
            for prompt in range(self.prompts)
        ])  # fmt: skip

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables that the run has."""
        names: list[str] = ["prompts"]
        names += ["summary"] * bool(self.blocks)
        names += ["verification", "missed"] * bool(self.blocks and self.random)
        names += ["subsets"] * bool(self.subsets) + ["direct", "components"] * self.direct + ["sources"] * self.sources
        names += ["lens"] * bool(self.lens)
        names += ["inputs", "input_spans"] * bool(self.inputs)
        names += ["input_completeness"] * ("integrated_gradients" in self.inputs)
        return {name: getattr(self, f"{name}_table")() for name in names}
