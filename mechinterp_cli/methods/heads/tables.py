"""From scores to rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.beside import estimate
from mechinterp_cli.methods.heads.options import METRICS
from mechinterp_cli.methods.heads.scoring import Scored, ShownPattern
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.stats import StatsOptions
from mechinterp_cli.stats.intervals import IntervalMethod
from mechinterp_cli.tasks.prompts import PromptSet

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
INTERVAL: IntervalMethod = "bca"
"""Of scores, whatever the config says of effects: scores are bounded, and so are the ends of this interval."""


def kv_head(anatomy: Anatomy, layer: int, head: int) -> int:
    """The key/value head that a query head shares with others, or its own."""
    heads = anatomy.layers[layer].heads
    assert heads is not None
    return heads.shared_by(head)


def score_rows(
    scored: Scored,
    names: Sequence[str],
    layers: Sequence[int],
    anatomy: Anatomy,
    clusters: Sequence[str],
    stats: StatsSection,
) -> list[Row]:
    """One row per score and head: the mean over prompts with its interval, or the one value of the weights.

    Args:
        scored: What was found.
        names: The scores, in order.
        layers: Whose heads.
        anatomy: How many heads there are.
        clusters: Of the scored prompts.
        stats: How intervals are made.
    """
    rows: list[Row] = []
    for name in names:
        places = [(layer, head) for layer in layers for head in range(head_count(anatomy, layer))]
        if name in scored.by_prompt:
            rows += _from_prompts(scored, name, places, clusters, stats)
        elif name in scored.by_weights:
            found = scored.by_weights[name]
            rows += [_one(name, *place, float(found.values[place]), found.chance) for place in places]
        else:
            rows += [_strongest_pair(scored, name, *place) for place in places]
    return [row | {"kv_head": kv_head(anatomy, row["layer"], row["head"])} for row in rows]


def few_sequences(rows: Sequence[Row]) -> list[str]:
    """What a reader must know of scores that are means over few sequences.

    Args:
        rows: As `score_rows` gives them.

    Returns:
        One sentence for scores of as many sequences; none for scores of weights, and of no sequence at all.
    """
    counts = {str(row["score"]): int(row["n"]) for row in rows if row.get("n")}
    known = {row["score"] for row in rows if row.get("ci_low") is not None}
    alike: dict[tuple[int, bool], list[str]] = {}
    for name, count in counts.items():
        if count < StatsOptions.min_prompts:
            alike.setdefault((count, name in known), []).append(name)
    found = []
    for (count, with_interval), names in alike.items():
        which = "scores" if len(names) == len(counts) else ", ".join(names)
        few = f"{count} {'sequence is' if count == 1 else 'sequences are'} fewer than {StatsOptions.min_prompts}"
        found.append(f"{which}: {few}; {'intervals are rough' if with_interval else 'there is no interval'}")
    return found


def head_count(anatomy: Anatomy, layer: int) -> int:
    """Query heads of a layer."""
    heads = anatomy.layers[layer].heads
    return heads.query if heads else 0


def _one(name: str, layer: int, head: int, value: float, chance: float | None) -> Row:
    known = np.isfinite(value)
    return {
        "score": name,
        "layer": layer,
        "head": head,
        "value": value if known else None,
        "chance": chance,
        "status": "ok" if known else "undefined",
    }


def _strongest_pair(scored: Scored, name: str, layer: int, head: int) -> Row:
    found = scored.pairs[name]
    values = found.values[layer, head]
    if not bool(values.isfinite().any()):
        return _one(name, layer, head, float("nan"), found.chance)
    place = int(values.nan_to_num(nan=-1.0).argmax())
    earlier = divmod(place, values.shape[1])
    row = _one(name, layer, head, float(values[earlier]), found.chance)
    return row | {"from_layer": earlier[0], "from_head": earlier[1]}


def _from_prompts(
    scored: Scored, name: str, places: Sequence[tuple[int, int]], clusters: Sequence[str], stats: StatsSection
) -> Iterator[Row]:
    """Means over the prompts in which some position counts; the same ones for every head of a model."""
    found = scored.by_prompt[name]
    values = np.stack([found.values[:, layer, head].numpy() for layer, head in places])
    usable = np.isfinite(values).any(0)
    broken = ~np.isfinite(values[:, usable]).all(1)
    chosen = np.where(broken[:, None], 0.0, values[:, usable])
    labels = np.asarray(clusters, dtype=object)[usable].astype(str)
    chance = None
    if found.chance is not None and usable.any():
        chance = float(found.chance.numpy()[usable].mean())
    if not usable.any():
        yield from (_one(name, *place, float("nan"), chance) | {"n": 0} for place in places)
        return
    ends = estimate(chosen, None, labels.tolist(), stats, method=INTERVAL)
    suffix = ", conditional on these templates" if ends.units.conditional else ""
    for i, place in enumerate(places):
        value = float("nan") if broken[i] else float(chosen[i].mean())
        interval = {"ci_low": None, "ci_high": None} if broken[i] else ends.ends(i, "ci_low", "ci_high")
        made = "undefined" if interval["ci_low"] is None else INTERVAL + suffix
        about = {"ci_method": made, "n": len(labels), "clusters": ends.units.clusters}
        yield _one(name, *place, value, chance) | interval | about


def sequence_rows(
    scored: Scored,
    names: Sequence[str],
    layers: Sequence[int],
    anatomy: Anatomy,
    prompts: PromptSet,
    members: Sequence[int],
) -> pd.DataFrame:
    """One row per score, head and prompt, of the scores that prompts have."""
    parts = []
    for name in [name for name in names if name in scored.by_prompt]:
        values = scored.by_prompt[name].values
        for layer in layers:
            for head in range(head_count(anatomy, layer)):
                parts.append(
                    pd.DataFrame({"prompt": list(members), "value": values[:, layer, head].numpy()}).assign(
                        score=name, layer=layer, head=head
                    )
                )
    if not parts:
        return pd.DataFrame({name: [] for name in ("score", "layer", "head", "prompt", "value")})
    frame = pd.concat(parts, ignore_index=True).dropna(subset="value")
    of = prompts.prompts
    return frame.assign(
        cluster=frame["prompt"].map(lambda i: of[i].cluster), group=frame["prompt"].map(lambda i: of[i].group)
    )


def composition_rows(scored: Scored, names: Sequence[str]) -> pd.DataFrame:
    """One row per pair of heads and composition score."""
    parts = []
    for name in [name for name in names if name in scored.pairs]:
        values = scored.pairs[name].values.numpy()
        where = np.nonzero(np.isfinite(values))
        columns = dict(zip(("layer", "head", "from_layer", "from_head"), where, strict=True))
        parts.append(
            pd.DataFrame({**columns, "value": values[where]}).assign(score=name, chance=scored.pairs[name].chance)
        )
    return pd.concat(parts, ignore_index=True)


def pattern_rows(shown: Sequence[ShownPattern]) -> pd.DataFrame:
    """One row per query and visible key of each head that is drawn."""
    parts = []
    for one in shown:
        query, key = np.tril_indices(len(one.pattern))
        parts.append(
            pd.DataFrame({"query": query, "key": key, "value": one.pattern.numpy()[query, key]}).assign(
                score=one.score, layer=one.layer, head=one.head, prompt=one.prompt
            )
        )
    return pd.concat(parts, ignore_index=True)


def loss_rows(losses: Floats, prompts: PromptSet) -> list[Row]:
    """Each prompt's losses on the unedited model, as `baselines` holds them.

    Args:
        losses: [prompts, metrics]; NaN where a prompt has no such prediction.
        prompts: The prompts.
    """
    rows = []
    for i, prompt in enumerate(prompts.prompts):
        for metric, name in enumerate(METRICS):
            value = float(losses[i, metric])
            known = np.isfinite(value)
            row = {"prompt": i, "cluster": prompt.cluster, "group": prompt.group, "stream": "clean", "metric": name}
            rows.append(row | {"value": value if known else None, "status": "ok" if known else "undefined"})
    return rows
