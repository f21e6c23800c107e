"""Effects of single prompts: what a trial moved, and how far of the way to the other stream."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Status(IntEnum):
    """What became of one trial on one prompt."""

    OK = 0
    TRIVIAL = 1
    """Not computed because the effect is exactly 0."""
    UNDEFINED = 2
    """Computed, but too little lies between the streams to normalise by."""
    NAN = 3
    """The metric is NaN, on this trial or on an unedited stream."""
    ABSENT = 4
    """The trial does not apply to this prompt (it lacks the span); counted nowhere."""

    @property
    def label(self) -> str:
        """As tables write it."""
        return self.name.lower()


@dataclass(frozen=True)
class Observations:
    """Trials × prompts, of one metric.

    Numbers are NaN where there is none; `status` says whether that stands for null or for a NaN that was computed.
    """

    value: Floats
    effect: Floats
    """Value minus the base stream's."""
    normalized: Floats
    """Effect over (other − base); NaN where undefined or without another stream."""
    status: npt.NDArray[np.int8]
    threshold: float
    """Denominators smaller than this are undefined, in the metric's own unit."""

    @property
    def shape(self) -> tuple[int, int]:
        """Trials and prompts."""
        trials, prompts = self.value.shape
        return trials, prompts


def denominator_threshold(base: Floats, other: Floats, *, share: float = 0.05, floor: float = 1e-3) -> float:
    """Smallest difference between the streams that effects may be divided by.

    Args:
        base: The metric of each prompt on the stream that is patched into.
        other: The same on the stream that is patched from.
        share: Share of the metric's spread: its standard deviation over prompts, root mean square of the two streams.
        floor: Never less than this, in the metric's unit.
    """
    spread = float(np.sqrt((np.nanvar(base) + np.nanvar(other)) / 2)) if np.isfinite(base + other).any() else 0.0
    return max(share * spread, floor)


def observe(
    values: Floats,
    status: npt.NDArray[np.int8],
    base: Floats,
    other: Floats | None = None,
    *,
    share: float = 0.05,
    floor: float = 1e-3,
) -> Observations:
    """Fills in trivial values and takes each prompt's effect and normalised effect.

    `normalized = (value − base) / (other − base)`. Denoising has base = corrupt and other = clean, which is
    `(patched − corrupt) / (clean − corrupt)`; noising has base = clean and other = corrupt, which is
    `(clean − patched) / (clean − corrupt)`. Both are 0 without effect and 1 where the other stream is reached.

    Args:
        values: `[trials, prompts]`, NaN where not computed.
        status: `[trials, prompts]` of `Status`; `UNDEFINED` and `NAN` are found here and need not be set.
        base: `[prompts]`, the metric on the stream that is patched into.
        other: `[prompts]`, the metric on the stream that is patched from, where there is one.
        share: See `denominator_threshold`.
        floor: See `denominator_threshold`.
    """
    found = status.astype(np.int8, copy=True)
    present, trivial = found != Status.ABSENT, found == Status.TRIVIAL
    value = np.where(trivial, base, np.where(present, values, np.nan))
    with np.errstate(invalid="ignore"):
        effect = value - base
    unusable = np.isnan(effect) if other is None else np.isnan(effect) | np.isnan(other)
    found[present & unusable] = Status.NAN
    if other is None:
        return Observations(value, effect, np.full_like(value, np.nan), found, floor)
    threshold = denominator_threshold(base, other, share=share, floor=floor)
    with np.errstate(invalid="ignore"):
        denominator = np.where(np.abs(other - base) >= threshold, other - base, np.nan)
    found[(found == Status.OK) & np.isnan(denominator)] = Status.UNDEFINED
    with np.errstate(invalid="ignore"):
        return Observations(value, effect, effect / denominator, found, threshold)
