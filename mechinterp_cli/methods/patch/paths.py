"""Path blocks of `patch`: from the config's names to trials, and their values."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.engine.circuit_graph import Graph, Source, Target, source_named, target_named
from mechinterp_cli.engine.edge_patching import EdgePatching, Pairs
from mechinterp_cli.engine.path_patching import Path, check_path, patch_paths
from mechinterp_cli.engine.wiring import wired
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.binder import KeyPath
from mechinterp_cli.methods.circuit.saving import Saving
from mechinterp_cli.methods.interchange import Interchange
from mechinterp_cli.methods.job import Floats, Job
from mechinterp_cli.methods.patch.options import PathBlock, PathOptions
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.stats import Status

SITE = "path"
"""What stands in the tables' column `site`."""
_HEAD = re.compile(r"(\d+)\.(\d+)((?:\.[qkv])?)")
_MLP = re.compile(r"mlp(\d+)")
_WHOLE_HEAD = re.compile(r"a(\d+)\.h(\d+)")

Found = TypeVar("Found")


@dataclass(frozen=True)
class PathSpec:
    """One trial: a path.

    Args:
        index: Its number in the run.
        block: Its block.
        path: From whom to whom.
        receivers: The receivers as the config has them.
    """

    index: int
    block: int
    path: Path
    receivers: str

    @property
    def name(self) -> str:
        """`a9.h6->logits`."""
        return f"{'+'.join(sender.name for sender in self.path.senders)}->{self.receivers}"

    @property
    def family(self) -> str:
        """Trials of one block are corrected together."""
        return f"{SITE} block {self.block}"

    def columns(self) -> dict[str, Any]:
        """Where it acts, for tables: layer and head are a single sender's."""
        sender = self.path.senders[0] if len(self.path.senders) == 1 else None
        rest = {"frozen": "", "free": ", all follow"}.get(self.path.rest, f", {self.path.rest} follow")
        return {
            "label": f"path {self.name}{rest}",
            "site": SITE,
            "layer": sender.layer if sender and sender.kind != "embed" else None,
            "head": sender.head if sender and sender.kind == "head" else None,
            "kv_head": None,
            "neuron": None,
            "position": None,
            "span": None,
            "template": None,
            "block": self.block,
        }

    def rows(self, source: str) -> list[dict[str, Any]]:
        """One row per sender, for the trials table.

        Args:
            source: The stream that senders send.
        """
        return [
            {
                "trial": self.index,
                "edit": edit,
                "op": f"{SITE}, {self.path.rest}",
                "site": SITE,
                "layer": None if sender.kind == "embed" else sender.layer,
                "head": sender.head if sender.kind == "head" else None,
                "source": source,
                "set": self.name,
            }
            for edit, sender in enumerate(self.path.senders)
        ]


def expand_paths(loaded: LoadedConfig, blocks: Sequence[Any], anatomy: Anatomy, first: int) -> list[PathSpec]:
    """The trials of the path blocks, in the config's order.

    Args:
        loaded: The config, for errors with file and line.
        blocks: All blocks of `patch.sites`; others are passed over.
        anatomy: The model.
        first: The number of the first trial.

    Raises:
        UserError: The model's parts cannot be told apart, a part is not there, or a path is none; names the key.
    """
    specs = list[PathSpec]()
    for number, block in enumerate(blocks):
        if isinstance(block, PathBlock):
            key: KeyPath = ("patch", "sites", number, "path")
            for path in _paths(loaded, key, block.path, anatomy):
                specs.append(PathSpec(first + len(specs), number, path, "+".join(block.path.receivers)))
    return specs


def _paths(loaded: LoadedConfig, key: KeyPath, options: PathOptions, anatomy: Anatomy) -> list[Path]:
    graph = _found(loaded, key, partial(Graph.of, anatomy))
    receivers = list[Target]()
    for place, name in enumerate(options.receivers):
        where: KeyPath = (*key, "receivers", place)
        receivers += [t for t in _found(loaded, where, partial(_receivers, graph, name)) if t not in receivers]
    paths = list[Path]()
    for place, senders in enumerate(_senders(loaded, key, options, graph)):
        path = Path(senders, tuple(receivers), options.rest)
        swept = isinstance(options.senders, str)
        if swept and not _reaches(graph, path):
            continue
        where = (*key, "senders") if swept else (*key, "senders", place)
        _found(loaded, where, partial(check_path, graph, path))
        paths.append(path)
    if not paths:
        problem = f"no sender writes before {' and '.join(options.receivers)} read"
        raise loaded.error((*key, "senders"), problem, "Receivers come after senders.")
    return paths


def _found(loaded: LoadedConfig, key: KeyPath, find: Callable[[], Found]) -> Found:
    """What is found, or the error with file, line and key."""
    try:
        return find()
    except UserError as error:
        raise loaded.error(key, error.cause, error.remedy) from error


def _reaches(graph: Graph, path: Path) -> bool:
    first = min(graph.reads[graph.target_index[target]] for target in path.receivers)
    return all(graph.source_index[sender] < first for sender in path.senders)


def _senders(loaded: LoadedConfig, key: KeyPath, options: PathOptions, graph: Graph) -> list[tuple[Source, ...]]:
    """The senders of every trial."""
    if isinstance(options.senders, str):
        kind = "head" if options.senders == "heads" else "mlp"
        return [(source,) for source in graph.sources if source.kind == kind]
    found = []
    for place, item in enumerate(options.senders):
        names = item if isinstance(item, tuple) else (item,)
        where = (*key, "senders", place)
        found.append(tuple(_found(loaded, where, partial(_sender, graph, name)) for name in names))
    return found


def _written(name: str) -> str:
    """A name in the graph's own words: `9.6.q` is `a9.h6.q`, `mlp3` is `m3`."""
    name = _HEAD.sub(r"a\1.h\2\3", name) if _HEAD.fullmatch(name) else name
    return _MLP.sub(r"m\1", name) if _MLP.fullmatch(name) else name


def _sender(graph: Graph, name: str) -> Source:
    source = source_named(_written(name))
    graph.edge(source, graph.targets[-1])
    return source


def _receivers(graph: Graph, name: str) -> list[Target]:
    """The targets of a name; a head's are its query and the key and value that it reads."""
    name, layers = _written(name), graph.targets[-1].layer
    if not (head := _WHOLE_HEAD.fullmatch(name)):
        targets = [target_named(name, layers)]
    else:
        source = _sender(graph, name)
        heads, shared = (
            sum(target.kind == kind and target.layer == source.layer for target in graph.targets) for kind in ("q", "k")
        )
        own = source.head // (heads // shared)
        layer = int(head[1])
        targets = [Target("q", layer, source.head), Target("k", layer, own), Target("v", layer, own)]
    for target in targets:
        graph.edge(Source("embed"), target)
    return targets


def check_setting(loaded: LoadedConfig, block: int, bound: Interchange, model: LoadedModel) -> None:
    """Refuse what paths cannot be patched with.

    Raises:
        UserError: Another source than the paired prompt, causal tracing, or half precision; names the key.
    """
    if bound.draws > 1 or bound.options.source != "pair":
        problem = "paths carry what the paired prompt has there: source pair, without tracing"
        raise loaded.error(("patch", "sites", block, "path"), problem, "Leave out source and tracing.")
    if model.source.dtype != "float32":
        problem = f"paths are patched in float32, the model is in {model.source.dtype}"
        raise loaded.error(("patch", "sites", block, "path"), problem, "Set model.dtype: float32.")


def path_status(specs: Sequence[PathSpec], bound: Interchange) -> npt.NDArray[np.int8]:
    """[paths, prompts] of `Status`: nothing is sent where the streams do not differ."""
    if not specs:
        return np.empty((0, len(bound.prompts.prompts)), dtype=np.int8)
    own = [Status.OK if differs else Status.TRIVIAL for differs in bound.differs]
    return np.tile(np.array(own, dtype=np.int8), (len(specs), 1))


def path_values(specs: Sequence[PathSpec], bound: Interchange, model: LoadedModel, job: Job, bench: Bench) -> Floats:
    """[paths, prompts, 1, metrics]; each bucket is saved as it ends.

    Args:
        specs: The trials.
        bound: Streams.
        model: The model.
        job: The experiment's; its buckets and measures.
        bench: Keeps what is finished.

    Raises:
        UserError: The residual stream of this model is not the sum of its parts; says why.
        ProofError: The parts do not give this model's own logits.
        RunError: NaN or infinity in a layer.
    """
    bench.stage("patching paths")
    values = np.empty((len(specs), job.prompts, 1, len(job.metrics)))
    total = len(specs) * len(job.members)
    names = "\n".join(f"{spec.path.name} {spec.path.rest}" for spec in specs)
    wiring = None
    for number, (members, measure) in enumerate(zip(job.members, job.measures, strict=True)):
        shape = (len(specs), len(members), len(job.metrics))
        facts = {"paths": hashlib.sha256(names.encode()).hexdigest(), "shape": json.dumps(shape)}
        saving = Saving(bench, f"paths-{number:03d}", facts)
        saved = saving.read()
        if saved is None:
            wiring = wiring or wired(model.model, model.anatomy)
            tokens = bound.tokens(members)
            engine = EdgePatching(wiring, Pairs.of(tokens[bound.base_stream], tokens[bound.source_stream]))

            def tick(done: int, before: int = number * len(specs)) -> None:
                bench.progress.advance(before + done, total)

            saved = patch_paths(engine, [spec.path for spec in specs], measure, tick).numpy()
            saving.write(saved)
        values[:, list(members), 0] = saved.reshape(shape)
    return values
