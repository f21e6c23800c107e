"""Attribution to tokens as tables: every token, sums beside the whole, means over prompts of one template."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.beside import estimate
from mechinterp_cli.methods.tables import look_up
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.stats.observations import denominator_threshold
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from mechinterp_cli.tasks.tokenise import Encoder

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
COMPLETE = 0.01
"""Sums that miss the whole by more than this share of it are warned of."""


@dataclass(frozen=True, eq=False)
class Attributed:
    """What one estimator says of every token.

    Args:
        estimator: Its name.
        steps: Of integrated gradients; else None.
        baseline: What an absent token is; None for rollout.
        metrics: What is attributed.
        values: By prompt, [metrics, positions].
    """

    estimator: str
    steps: int | None
    baseline: str | None
    metrics: tuple[str, ...]
    values: Sequence[Floats]

    @property
    def about(self) -> Row:
        """Its columns."""
        return {"estimator": self.estimator, "steps": self.steps, "baseline": self.baseline}


@dataclass(frozen=True, eq=False)
class Whole:
    """What the tokens' shares should sum to.

    Args:
        found: The shares.
        inputs: [metrics, prompts], the metrics at the input.
        baselines: [metrics, prompts], at the baseline.
        stats: Thresholds.
    """

    found: Attributed
    inputs: Floats
    baselines: Floats
    stats: StatsSection

    @property
    def differences(self) -> Floats:
        """[metrics, prompts]: M(input) − M(baseline)."""
        return self.inputs - self.baselines

    @property
    def errors(self) -> Floats:
        """[metrics, prompts]: the tokens' sum minus the difference."""
        return np.stack([values.sum(1) for values in self.found.values], axis=1) - self.differences

    def threshold(self, metric: int) -> float:
        """A difference smaller than this is too small to be divided by."""
        stats = self.stats
        share, floor = stats.denominator_relative, stats.denominator_absolute
        return denominator_threshold(self.inputs[metric], self.baselines[metric], share=share, floor=floor)

    def shares(self, metric: int) -> Floats:
        """[prompts]: |error| / |difference|; where the difference is too small, beside the smallest that is not."""
        below = np.maximum(np.abs(self.differences[metric]), self.threshold(metric))
        return np.asarray(np.abs(self.errors[metric]) / below)

    def rows(self, prompts: PromptSet) -> Iterator[Row]:
        """One row per prompt and metric."""
        for metric, name in enumerate(self.found.metrics):
            usable = np.abs(self.differences[metric]) >= self.threshold(metric)
            for at, prompt in enumerate(prompts.prompts):
                difference, error = float(self.differences[metric, at]), float(self.errors[metric, at])
                yield {
                    "prompt": at,
                    "cluster": prompt.cluster,
                    "group": prompt.group,
                    **self.found.about,
                    "metric": name,
                    "input": float(self.inputs[metric, at]),
                    "baseline_value": float(self.baselines[metric, at]),
                    "difference": difference,
                    "sum": difference + error,
                    "error": error,
                    "relative_error": error / difference if usable[at] else None,
                }

    def facts(self) -> dict[str, float]:
        """Of each metric the largest error, as a share."""
        return {name: float(np.nanmax(self.shares(at), initial=0)) for at, name in enumerate(self.found.metrics)}

    def warnings(self, *, half: bool) -> Iterator[str]:
        """Metrics whose sums miss the whole.

        Args:
            half: Whether the model is in half precision, which rounds as much as that by itself.
        """
        for metric, name in enumerate(self.found.metrics):
            shares = np.nan_to_num(self.shares(metric))
            count, worst = int((shares > COMPLETE).sum()), int(shares.argmax())
            if count:
                yield (
                    f"{self.found.estimator}, {name}: on {count} of {len(shares)} prompts the tokens' sum misses "
                    f"M(input) - M(baseline) by more than {COMPLETE:.0%} of it (prompt {worst}: {shares[worst]:.1%}); "
                    f"{self._remedy(half)}"
                )

    def _remedy(self, half: bool) -> str:
        baseline = self.found.baseline
        if baseline == "zero":
            # Norms give back the size of what they are given: all of the change is where that is nearly nothing.
            return (
                "norms make the metric jump next to zero, which more steps hardly follow: use baseline: corrupt or mean"
            )
        ways = [f"raise attribute.inputs.steps (now {self.found.steps})"]
        ways += ["use baseline: corrupt, whose line is shorter"] if baseline == "mean" else []
        return ", or ".join([*ways, *(["use model.dtype: float32"] if half else [])])


def input_columns(found: Sequence[Attributed], prompts: PromptSet, model: LoadedModel) -> pa.Table:
    """The table `inputs`: one row per estimator, prompt, metric and position.

    `share` is the value divided by the sum of the magnitudes of the prompt's values; null where all are 0.
    """
    encoder = Encoder(model.tokenizer)
    tokens = [token for prompt in prompts.prompts for token in encoder.strings(prompt.clean_tokens)]
    return pa.concat_tables([pa.table(_columns(one, prompts, tokens)) for one in found])


def _columns(found: Attributed, prompts: PromptSet, tokens: Sequence[str]) -> dict[str, Any]:
    count, lengths = len(found.metrics), np.array([prompt.length for prompt in prompts.prompts])
    first = np.cumsum(lengths) - lengths
    # Of each prompt: metric by metric, all positions.
    prompt = np.repeat(np.arange(len(lengths)), lengths * count)
    position = np.concatenate([np.tile(np.arange(n), count) for n in lengths])
    metric = np.concatenate([np.repeat(np.arange(count), n) for n in lengths])
    size = len(prompt)
    of = prompts.prompts
    return {
        "prompt": pa.array(prompt, pa.int32()),
        "cluster": look_up([one.cluster for one in of], pa.string(), prompt),
        "group": look_up([one.group for one in of], pa.string(), prompt),
        "template": look_up([one.template for one in of], pa.string(), prompt),
        "estimator": pa.repeat(pa.scalar(found.estimator, pa.string()), size),
        "steps": pa.repeat(pa.scalar(found.steps, pa.int32()), size),
        "baseline": pa.repeat(pa.scalar(found.baseline, pa.string()), size),
        "metric": look_up(found.metrics, pa.string(), metric),
        "position": pa.array(position, pa.int32()),
        "token": look_up(tokens, pa.string(), first[prompt] + position),
        "value": pa.array(np.concatenate([values.reshape(-1) for values in found.values]), from_pandas=False),
        "share": _shares(found.values),
    }


def _shares(values: Sequence[Floats]) -> pa.Array:
    parts, masks = [], []
    for own in values:
        total = np.abs(own).sum(1, keepdims=True)
        parts.append(own / np.where(total == 0, 1, total))
        masks.append(np.broadcast_to(total == 0, own.shape))
    flat = [np.concatenate([part.reshape(-1) for part in some]) for some in (parts, masks)]
    return pa.array(flat[0], mask=flat[1], from_pandas=False)


@dataclass(frozen=True)
class _Spot:
    """A place that means the same in all prompts of a template."""

    template: str | None
    """None: of all."""
    members: tuple[int, ...]
    span: str | None
    position: int | None

    def positions(self, prompt: Prompt) -> list[int]:
        return [self.position or 0] if self.span is None else list(prompt.spans[self.span])

    @property
    def about(self) -> Row:
        return {"template": self.template, "span": self.span, "position": self.position}


def span_rows(found: Sequence[Attributed], prompts: PromptSet, stats: StatsSection) -> list[Row]:
    """The table `input_spans`: means over prompts, of every span (the sum over its tokens) and every position.

    Positions and spans of each template that two prompts or more have; spans that all prompts have over all templates
    too.
    """
    spots = _spots(prompts)
    return [row for one in found for row in _summarised(one, spots, prompts, stats)]


def _spots(prompts: PromptSet) -> dict[tuple[int, ...], list[_Spot]]:
    """Places by the prompts that have them."""
    by_template: dict[str | None, list[int]] = {}
    for at, prompt in enumerate(prompts.prompts):
        by_template.setdefault(prompt.template, []).append(at)
    if len(by_template) > 1:
        by_template[None] = list(range(len(prompts.prompts)))
    spots = {}
    for template, numbers in by_template.items():
        members = tuple(numbers)
        if len(members) > 1:
            spots[members] = list(_of_template(template, members, [prompts.prompts[i] for i in members]))
    return spots


def _of_template(template: str | None, members: tuple[int, ...], prompts: Sequence[Prompt]) -> Iterator[_Spot]:
    shared = set.intersection(*(set(prompt.spans) for prompt in prompts))
    for span in sorted(shared, key=lambda name: (min(prompts[0].spans[name]), name)):
        yield _Spot(template, members, span, None)
    if template is not None and len({prompt.length for prompt in prompts}) == 1:
        for position in range(prompts[0].length):
            yield _Spot(template, members, None, position)


def _summarised(
    found: Attributed, by_members: Mapping[tuple[int, ...], Sequence[_Spot]], prompts: PromptSet, stats: StatsSection
) -> Iterator[Row]:
    for members, spots in by_members.items():
        numbers = np.empty((len(found.metrics), len(spots), len(members)))
        for column, at in enumerate(members):
            for row, spot in enumerate(spots):
                numbers[:, row, column] = found.values[at][:, spot.positions(prompts.prompts[at])].sum(1)
        for metric, name in enumerate(found.metrics):
            usable = np.isfinite(numbers[metric]).all(0)
            clusters = [prompts.prompts[at].cluster for at, use in zip(members, usable, strict=True) if use]
            if len(clusters) < 2:
                continue
            means = estimate(numbers[metric][:, usable], None, clusters, stats)
            for row, spot in enumerate(spots):
                yield {
                    **found.about,
                    "metric": name,
                    **spot.about,
                    "mean": float(means.estimate[row]),
                    **means.ends(row, "ci_low", "ci_high"),
                    "n": len(clusters),
                    "clusters": len(set(clusters)),
                }


def by_prompt(values: torch.Tensor) -> list[Floats]:
    """[metrics, prompts, positions] as one array [metrics, positions] of each prompt."""
    return list(values.double().cpu().transpose(0, 1).numpy())
