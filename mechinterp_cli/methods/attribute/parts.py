"""Direct effects as tables: a row per prompt and component, and means over prompts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.attribute.splits import Neurons, Sources
from mechinterp_cli.methods.beside import estimate
from mechinterp_cli.methods.direct_effects import DirectEffects
from mechinterp_cli.methods.tables import look_up
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.stats.summary import ALL_GROUPS
from mechinterp_cli.tasks.prompts import Prompt, PromptSet

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
NO_SPAN = "(no span)"
"""In place of a span's name: tokens that are in none."""
_PLACES = ("layer", "head", "neuron", "source_position")
_ESTIMATED_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Part:
    """Components of one name.

    Args:
        component: The name.
        part_of: The component whose value they and others of the same `part_of` sum to.
        values: [prompts, n].
        places: `layer`, `head` or `neuron` to the [n] numbers of each; without any there is one component.
        spans: The span that each one's source tokens are in.
    """

    component: str
    part_of: str | None
    values: Floats
    places: Mapping[str, Integers] = field(default_factory=dict)
    spans: Sequence[str] | None = None


def parts_of(effects: DirectEffects, anatomy: Anatomy) -> list[Part]:
    """The logit difference and the components that sum to it; biases that a model does not have are left out.

    Args:
        effects: Of the model.
        anatomy: Of the model.
    """
    heads, rest = effects.heads.numpy(), effects.attention.numpy()
    apart = ~np.isnan(heads[:1]).all(0)
    layer, head = np.nonzero(apart)
    whole = [x.index for x in anatomy.layers if "attn_out" in x.sites and not apart[x.index].any()]
    biases = [i for i in range(len(apart)) if apart[i].any() and rest[:, i].any()]
    mlps = [x.index for x in anatomy.layers if "mlp_out" in x.sites]
    found = [
        Part("total", None, effects.total.numpy()[:, None]),
        Part("embedding", "total", effects.embedding.numpy()[:, None]),
        Part("head", "total", heads[:, layer, head], {"layer": layer, "head": head}),
        Part("attention_bias", "total", rest[:, biases], {"layer": np.array(biases, dtype=np.int64)}),
        Part("attention", "total", rest[:, whole], {"layer": np.array(whole, dtype=np.int64)}),
        Part("mlp", "total", effects.mlp.numpy()[:, mlps], {"layer": np.array(mlps, dtype=np.int64)}),
    ]
    constant = effects.constant.numpy()[:, None]
    return [*found, *([Part("constant", "total", constant)] if constant.any() else [])]


def neuron_parts(neurons: Neurons, top: int | None) -> list[Part]:
    """Neurons that have rows of their own, each layer's others together, and the biases of MLPs.

    Args:
        neurons: All of them.
        top: How many; all where None.
    """
    chosen = neurons.strongest(top)
    own = {layer: neurons.by_layer[layer][:, index].astype(np.float64) for layer, index in chosen.items()}
    layer = np.repeat(np.array(list(chosen), dtype=np.int64), [len(index) for index in chosen.values()])
    index = np.array([i for index in chosen.values() for i in index], dtype=np.int64)
    left = [i for i in chosen if len(chosen[i]) < neurons.by_layer[i].shape[1]]
    biased = [i for i in chosen if neurons.bias[i].any()]
    return [
        Part("neuron", "mlp", np.concatenate([*own.values()], axis=1), {"layer": layer, "neuron": index}),
        Part(
            "other_neurons",
            "mlp",
            _columns([neurons.sums[i] - own[i].sum(1) for i in left], neurons.prompts),
            {"layer": np.array(left, dtype=np.int64)},
        ),
        Part(
            "mlp_bias",
            "mlp",
            _columns([neurons.bias[i] for i in biased], neurons.prompts),
            {"layer": np.array(biased, dtype=np.int64)},
        ),
    ]


def _columns(values: Sequence[Floats], prompts: int) -> Floats:
    return np.stack(values, axis=1) if values else np.empty((prompts, 0))


def span_labels(prompt: Prompt) -> list[str]:
    """Of each token the spans that it is in, in the order of their names; every token has one label."""
    by_position: list[list[str]] = [[] for _ in range(prompt.length)]
    for name in sorted(prompt.spans):
        for position in prompt.spans[name]:
            by_position[position].append(name)
    return [", ".join(names) or NO_SPAN for names in by_position]


def span_parts(sources: Sources, prompts: Sequence[Prompt]) -> list[Part]:
    """Each head's part by the span of its source tokens, which means the same in every prompt."""
    labels = [span_labels(prompt) for prompt in prompts]
    names = sorted({label for own in labels for label in own})
    layers = sorted(sources.by_prompt[0]) if sources.by_prompt else []
    found = []
    for layer in layers:
        first = sources.by_prompt[0][layer]
        summed = np.zeros((len(prompts), len(names), len(first)))
        for prompt, own in enumerate(labels):
            members = np.array([names.index(label) for label in own])
            np.add.at(summed[prompt], members, sources.by_prompt[prompt][layer].T)
        head = np.tile(np.arange(len(first)), len(names))
        places = {"layer": np.full(len(head), layer), "head": head}
        spans = [name for name in names for _ in range(len(first))]
        found.append(Part("source", "head", summed.reshape(len(prompts), -1), places, spans))
    return found


def direct_table(
    parts: Iterable[Part], sources: Sources | None, prompts: Sequence[Prompt], tokens: Sequence[Sequence[str]]
) -> pa.Table:
    """One row per prompt and component, by prompt.

    Args:
        parts: The components.
        sources: Of each head, by token.
        prompts: The prompts.
        tokens: Each prompt's tokens as text.
    """
    blocks = [_part_block(part) for part in parts]
    blocks += [] if sources is None else [_source_block(i, own) for i, own in sorted(sources.by_prompt.items())]
    whole = pa.concat_tables(blocks)
    prompt = whole["prompt"].to_numpy()
    whole = whole.take(pa.array(np.argsort(prompt, kind="stable")))
    prompt = np.sort(prompt)
    starts = np.cumsum([0, *map(len, tokens)])[:-1]
    position = whole["source_position"].fill_null(-1).to_numpy()
    at = pa.array(starts[prompt] + position, mask=position < 0)
    named = {
        "cluster": look_up([one.cluster for one in prompts], pa.string(), prompt),
        "group": look_up([one.group for one in prompts], pa.string(), prompt),
        "source_token": pa.array([token for own in tokens for token in own], pa.string()).take(at),
        "source_span": pa.array([label for one in prompts for label in span_labels(one)]).take(at),
    }
    return pa.table({**{name: whole[name] for name in whole.column_names}, **named})


def _part_block(part: Part) -> pa.Table:
    count, n = part.values.shape
    places = {name: np.tile(index, count) for name, index in part.places.items()}
    return _block(part, np.repeat(np.arange(count), n), part.values.ravel(), places)


def _source_block(prompt: int, by_layer: Mapping[int, Floats]) -> pa.Table:
    values = np.concatenate([by_layer[layer].ravel() for layer in sorted(by_layer)])
    shapes = [(layer, *by_layer[layer].shape) for layer in sorted(by_layer)]
    layer = np.concatenate([np.full(heads * keys, layer) for layer, heads, keys in shapes])
    head = np.concatenate([np.repeat(np.arange(heads), keys) for _, heads, keys in shapes])
    position = np.concatenate([np.tile(np.arange(keys), heads) for _, heads, keys in shapes])
    places = {"layer": layer, "head": head, "source_position": position}
    return _block(Part("source", "head", values), np.full(len(values), prompt), values, places)


def _block(part: Part, prompt: Integers, value: Floats, places: Mapping[str, Integers]) -> pa.Table:
    n = len(value)
    return pa.table(
        {
            "prompt": pa.array(prompt, pa.int32()),
            **_named(part, n),
            **{name: _index(places.get(name), n) for name in _PLACES},
            "value": pa.array(value, pa.float64()),
        }
    )


def _named(part: Part, n: int) -> dict[str, pa.Array]:
    values = {"component": part.component, "part_of": part.part_of}
    return {name: pa.repeat(pa.scalar(value, pa.string()), n) for name, value in values.items()}


def _which(part: Part, n: int) -> dict[str, pa.Array]:
    """The columns that say which components they are."""
    if part.spans is None:
        return _named(part, n) | {name: _index(part.places.get(name), n) for name in _PLACES[:3]}
    places = {name: _index(part.places[name], n) for name in ("layer", "head")}
    return places | {"source_span": pa.array(part.spans, pa.string())}


def _index(values: Integers | None, n: int) -> pa.Array:
    return pa.nulls(n, pa.int32()) if values is None else pa.array(values, pa.int32())


def means_table(parts: Iterable[Part], prompts: PromptSet, stats: StatsSection) -> pa.Table:
    """Each component's mean over all prompts, and over those of each group, with its interval.

    Args:
        parts: The components; all with spans (table `sources`), or none (`components`).
        prompts: The prompts.
        stats: How intervals are made.
    """
    own = [prompt.group for prompt in prompts.prompts]
    names = list(dict.fromkeys(own))
    groups = {ALL_GROUPS: list(range(len(own)))}
    if len(names) > 1:
        groups |= {name: [i for i, group in enumerate(own) if group == name] for name in names}
    clusters = [prompt.cluster for prompt in prompts.prompts]
    kept = [part for part in parts if part.values.shape[1]]
    return pa.concat_tables(
        _estimated(part, group, part.values[members], [clusters[i] for i in members], stats)
        for group, members in groups.items()
        for part in kept
    )


def _estimated(part: Part, group: str, values: Floats, clusters: Sequence[str], stats: StatsSection) -> pa.Table:
    """Means of one part's components over some prompts."""
    count, n = values.shape
    steps = range(0, n, _ESTIMATED_AT_ONCE)
    found = [estimate(values[:, i : i + _ESTIMATED_AT_ONCE].T.copy(), None, clusters, stats) for i in steps]
    low, high = (np.concatenate([getattr(one, end) for one in found]) for end in ("low", "high"))
    bounded = np.isfinite(low) & np.isfinite(high)
    facts: dict[str, Any] = {"n": count, "clusters": len(set(clusters))}
    return pa.table(
        {
            "group": pa.repeat(pa.scalar(group, pa.string()), n),
            **_which(part, n),
            "value": pa.array(np.concatenate([one.estimate for one in found])),
            **{name: pa.repeat(pa.scalar(value, pa.int32()), n) for name, value in facts.items()},
            "ci_low": pa.array(low, mask=~bounded),
            "ci_high": pa.array(high, mask=~bounded),
            "ci_method": pa.array(np.where(bounded, stats.interval, "undefined"), pa.string()),
        }
    )
