"""Running the estimators: bucket by bucket, within a budget of memory, each bucket saved as it ends."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from mechinterp_cli.config.schema import memory_bytes
from mechinterp_cli.engine import atp as engine
from mechinterp_cli.engine.atp import Batching, Inquiry, batching_within
from mechinterp_cli.engine.atp_star import FIXED_KINDS, atp_star
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import EMBED
from mechinterp_cli.engine.integrated import conductance, ig_inputs
from mechinterp_cli.engine.plan import free_memory
from mechinterp_cli.engine.relevance import relevance_rules
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods.attribute.nodes import Nodes
from mechinterp_cli.methods.attribute.options import STEPPED, AttributeOptions, EstimatorName
from mechinterp_cli.methods.attribute.tables import Estimates
from mechinterp_cli.methods.bench import Bench, settings_of
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.metrics import Measurer
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.kinds import RESIDUAL_KINDS

Floats = npt.NDArray[np.float64]

COMPLETE = 0.01
"""Integrated gradients whose sums miss the whole change by more than this share of it are warned of."""
STREAMS = tuple(kind for kind in RESIDUAL_KINDS if kind not in ("attn_out", "mlp_out"))
"""Everything that reaches the metric passes through these: conductance sums to the whole change at each."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """What one estimator says of the prompts of one length.

    Args:
        values: [metrics, nodes, prompts].
        cuts: Site to, of each metric, Σ over prompts of |sum of its estimates − whole change|, and Σ |whole change|;
            of the sites at which the estimator is complete.
    """

    values: Floats
    cuts: Mapping[str, Sequence[tuple[float, float]]]

    def to_table(self) -> pa.Table:
        """As it is saved."""
        table = pa.table({"value": self.values.reshape(-1)})
        return table.replace_schema_metadata({"shape": json.dumps(self.values.shape), "cuts": json.dumps(self.cuts)})

    @classmethod
    def from_table(cls, table: pa.Table, shape: tuple[int, ...]) -> "Bucket | None":
        """What was saved, or None where it is something else."""
        facts = table.schema.metadata or {}
        if tuple(json.loads(facts.get(b"shape", b"[]"))) != shape or table.column_names != ["value"]:
            return None
        cuts = {site: [tuple(pair) for pair in pairs] for site, pairs in json.loads(facts[b"cuts"]).items()}
        return cls(table["value"].to_numpy().reshape(shape), cuts)


class Estimating:
    """All estimators of an experiment.

    Args:
        setting: Config, model, and the prompts that are kept.
        options: The section.
        nodes: What is estimated.
        logits: Clean logits [prompts, vocab], where a metric needs them.
        bench: Keeps what is finished.
    """

    def __init__(
        self, setting: Setting, options: AttributeOptions, nodes: Nodes, logits: Tensor | None, bench: Bench
    ) -> None:
        self.setting = setting
        self.options = options
        self.nodes = nodes
        self.bench = bench
        model, self._prompts = setting.model, setting.prompts.prompts
        self.members = measuring.split_members(setting.prompts)
        self._means = nodes.bound.means_of(model, {*nodes.sites, EMBED}, self.members, compute=True)
        self._measurer = Measurer(setting.loaded.config.metrics, self._prompts, logits, device=device_of(model.model))
        self._batching = self._shared_out()
        self._try_rules()

    def run(self) -> list[Estimates]:
        """Every estimator's estimates of every node.

        Raises:
            UserError: A site at which nothing can be differentiated.
            RunError: An estimate that is not finite, or a bucket that cannot be saved.
        """
        done, total = 0, sum(work(self.options, name) for name in self.options.estimators) * len(self._prompts)
        found = []
        for name in self.options.estimators:
            self.bench.stage(f"estimating: {name}")
            parts = []
            for bucket in range(len(self.members)):

                def tick(items: int, bucket: int = bucket) -> None:
                    nonlocal done
                    done += items
                    self.bench.progress.advance(min(done, total), total)

                parts.append(self._bucket(name, bucket, tick))
            found.append(self._joined(name, parts))
        return found

    def _try_rules(self) -> None:
        """RelP on one prompt, before anything long begins: what its rules cannot hold on shows in a pass alone.

        Raises:
            UserError: Names the estimator.
        """
        if "relp" not in self.options.estimators:
            return
        asked = self._asked(0)
        self._answered("relp", replace(asked, tokens=asked.tokens[:1], read=asked.read[:1]))

    def _answered(self, name: EstimatorName, asked: Inquiry) -> engine.Estimates:
        with self._named("estimators", self.options.estimators.index(name)):
            return self._estimator(name)(asked)

    @contextmanager
    def _named(self, *key: str | int) -> Iterator[None]:
        """What the engine refuses is said of a key of the section."""
        try:
            yield
        except UserError as error:
            raise self.setting.loaded.error(("attribute", *key), error.cause, error.remedy) from error

    def _joined(self, name: EstimatorName, parts: Sequence[Bucket]) -> Estimates:
        values = np.zeros((len(self._measurer.names), len(self.nodes), len(self._prompts)))
        for members, part in zip(self.members, parts, strict=True):
            values[:, :, list(members)] = part.values
        self._tell_completeness(name, parts)
        signless = self._signless if name == "atp_star" else frozenset()
        return Estimates(name, self.options.steps if name in STEPPED else None, values, signless)

    @property
    def _signless(self) -> frozenset[str]:
        """Kinds of sites that get GradDrop."""
        return frozenset(site.kind for site in self.nodes.sites) - frozenset(FIXED_KINDS)

    def _bucket(self, name: EstimatorName, bucket: int, tick: Callable[[int], None]) -> Bucket:
        """One estimator on one bucket, as it was saved or computed now."""
        members = self.members[bucket]
        shape = (len(self._measurer.names), len(self.nodes), len(members))
        key = self.bench.unit_key(f"estimate-{name.replace('_', '-')}-{bucket:03d}")
        saved = self._saved(key, shape)
        if saved is not None:
            tick(work(self.options, name) * len(members))
            return saved
        asked = replace(self._asked(bucket), batching=self._batching, tick=tick)
        found = self._answered(name, asked)
        values = np.zeros(shape)
        for where, part in self.nodes.gather(found.by_site, members):
            values[:, where] = part
        made = Bucket(values, _cuts(name, found))
        self.bench.run.units.write(key, made.to_table())
        return made

    def _saved(self, key: str, shape: tuple[int, ...]) -> Bucket | None:
        if not self.bench.run.units.path(key).exists():
            return None
        try:
            saved = Bucket.from_table(self.bench.run.units.read(key), shape)
        except RunError:
            saved = None
        if saved is None:
            self.bench.run.warn(f"units/{key}.parquet was damaged; it is computed again")
        return saved

    def _estimator(self, name: EstimatorName) -> Callable[[Inquiry], engine.Estimates]:
        model, steps = self.setting.model, self.options.steps
        known: dict[str, Callable[[Inquiry], engine.Estimates]] = {
            "atp": engine.atp,
            "atp_star": atp_star,
            "ig_inputs": partial(ig_inputs, steps=steps),
            "conductance": partial(conductance, steps=steps),
            "relp": partial(engine.atp, rules=partial(relevance_rules, model.model, model.anatomy, self.options.rules)),
        }
        return known[name]

    def _asked(self, bucket: int) -> Inquiry:
        model, members = self.setting.model, self.members[bucket]
        tokens = self.nodes.bound.tokens(members)
        base = tokens[self.nodes.bound.base_stream]
        index = torch.tensor(members)

        def metric(logits: Tensor, prompts: Tensor) -> Tensor:
            return self._measurer.differentiable(logits, index.to(prompts.device)[prompts])

        return Inquiry(
            model.model,
            model.anatomy,
            base,
            torch.full((len(members),), base.shape[1] - 1),
            metric,
            self._sources(members, tokens),
            frozenset(self.nodes.sites),
            check_finite=self.setting.loaded.config.engine.on_nan == "error",
        )

    def _sources(self, members: Sequence[int], tokens: Mapping[str, Tensor]) -> engine.Sources:
        """What is put in place, as `patch` does it."""
        model, source = self.setting.model, self.options.source
        if source == "zero":
            return engine.zeros
        if source == "mean":
            assert self._means is not None
            means = self._means

            def read(prompts: Tensor, sites: Collection[Site]) -> dict[Site, Tensor]:
                chosen = [members[i] for i in prompts.tolist()]
                return {site: means.at(site, chosen) for site in sites}

            return read
        others = self.nodes.bound.others(members)
        put = tokens[self.nodes.bound.source_stream]
        return engine.stream(model.model, model.anatomy, put if others is None else put[list(others)])

    def _shared_out(self) -> Batching:
        """How many tokens a pass takes: as planned before, else what memory allows the longest prompt; noted."""
        recorded: dict[str, Any] | None = self.bench.recorded_facts.get("batching")
        if recorded is None:
            config, model = self.setting.loaded.config.engine, self.setting.model
            budget = memory_bytes(config.max_memory, free_memory(device_of(model.model)))
            longest = max(range(len(self.members)), key=lambda at: self._prompts[self.members[at][0]].length)
            with self._named("sites"):
                fit = batching_within(self._asked(longest), max(1, budget // 2))
            recorded = {
                "tokens": min(fit.tokens, settings_of(config, model).rows_per_call),
                "checkpointing": fit.checkpointing,
            }
        self.bench.note({"batching": recorded})
        return Batching(**recorded)

    def _tell_completeness(self, name: EstimatorName, parts: Sequence[Bucket]) -> None:
        """Note how nearly sums are the whole change, where they should be."""
        errors = {}
        for site in parts[0].cuts:
            pairs = np.array([part.cuts[site] for part in parts]).sum(0)
            with np.errstate(invalid="ignore", divide="ignore"):
                errors[site] = float(np.nanmax(pairs[:, 0] / np.where(pairs[:, 1] > 0, pairs[:, 1], np.nan), initial=0))
        if not errors:
            return
        worst = max(errors, key=lambda site: errors[site])
        known = self.bench.facts.get("completeness", {})
        self.bench.note({"completeness": {**known, name: errors}})
        if errors[worst] > COMPLETE:
            self.bench.warn(
                f"{name}: at {worst} estimates miss the whole change by {errors[worst]:.1%} of it; raise "
                f"attribute.steps (now {self.options.steps})"
            )


def work(options: AttributeOptions, name: EstimatorName) -> int:
    """Passes over each prompt, for progress."""
    return options.steps if name in STEPPED else 1


def _cuts(name: EstimatorName, found: engine.Estimates) -> dict[str, list[tuple[float, float]]]:
    """Sums beside the whole change, at the sites where the estimator is complete."""
    kinds = {"ig_inputs": ("embed",), "conductance": STREAMS}.get(name, ())
    if found.end is None:
        return {}
    change = (found.end - found.base).double()
    cuts = {}
    for site, values in found.by_site.items():
        if site.kind in kinds:
            missed = (values.double().sum(-1) - change).abs().sum(1)
            pairs = zip(missed.tolist(), change.abs().sum(1).tolist(), strict=True)
            cuts[f"{site.kind} {site.layer}"] = list(pairs)
    return cuts
