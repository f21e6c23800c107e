"""Is a place readable? Its score beside the best of its baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mechinterp_cli.methods.beside import Floats, estimate
from mechinterp_cli.methods.probe.options import ProbeName
from mechinterp_cli.methods.probe.readout import LABEL, Readout
from mechinterp_cli.methods.probe.verdicts import Readability

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of a run, of one probe.

    Args:
        rows: Of the table `probes`.
        readouts: All places, with what was right at each.
        name: Which probe.
        beside: The probe that baselines are of.
    """

    rows: Sequence[Row]
    readouts: Sequence[Readout]
    name: ProbeName
    beside: ProbeName

    def of(self, readout: Readout) -> Readability:
        """Of one place: score, p where there is one, the best baseline, and the 90 % interval of the difference.

        p is adjusted for all places and probes of the run. The interval is over groups of samples. Baselines are
        compared with sample by sample, the majority class as a constant.

        Args:
            readout: The place.
        """
        row, best = self._own[readout.reading.label], self._best(readout)
        score, p = float(row["score"]), row.get("p_adjusted")
        if best is None:
            return Readability(score, p)
        correct = self._correct(readout, self.name, None)
        beside = self._correct(readout, self.beside, best["baseline"])
        if correct is None:
            return Readability(score, p, float(best["score"]))
        difference = correct - (float(best["score"]) if beside is None else beside)
        groups = list(readout.problem.groups)
        found = estimate(difference[None], None, groups, readout.stats, method="bca")
        low, high = float(found.verdict_low[0]), float(found.verdict_high[0])
        known = bool(np.isfinite([low, high]).all())
        return Readability(score, p, float(best["score"]), low if known else None, high if known else None)

    def _best(self, readout: Readout) -> Row | None:
        """The highest of the baselines of a place or of its view."""
        reading = readout.reading
        beside = [row for row in self._baselines if row["label"] in (reading.label, reading.view.name)]
        return max(beside, key=lambda row: float(row["score"]), default=None)

    def _correct(self, readout: Readout, probe: ProbeName, baseline: str | None) -> Floats | None:
        """[samples] of the place itself, or of another one of its view."""
        name = readout.reading.view.name
        alike = [readout, *(other for other in self.readouts if other.reading.view.name == name)]
        known = (one.correct[probe, baseline] for one in alike if (probe, baseline) in one.correct)
        found = next(known, None)
        return None if found is None else found.double().cpu().numpy()

    @cached_property
    def _own(self) -> Mapping[str, Row]:
        ours = (row for row in self._whole if row["baseline"] is None and row["probe"] == self.name)
        return {row["label"]: row for row in ours}

    @cached_property
    def _baselines(self) -> Sequence[Row]:
        return [row for row in self._whole if row["baseline"] is not None]

    @cached_property
    def _whole(self) -> Sequence[Row]:
        """Over all folds."""
        wanted = {"fold": None, "split": "test", "target": LABEL}
        return [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]
