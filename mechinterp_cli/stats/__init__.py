"""Statistics of patching effects: normalised effects, intervals, tests of many trials, verdicts, contrasts of groups.

Numpy and scipy only.
"""

from mechinterp_cli.stats.contrasts import Contrast, contrast
from mechinterp_cli.stats.families import benjamini_hochberg, max_t, sign_flips, verdicts
from mechinterp_cli.stats.intervals import Intervals, ratio_intervals
from mechinterp_cli.stats.observations import Observations, Status, denominator_threshold, observe
from mechinterp_cli.stats.resampling import Units, choose_units, draw_weights
from mechinterp_cli.stats.summary import ALL_GROUPS, Aggregate, StatsOptions, Summary, summarise

__all__ = [
    "ALL_GROUPS",
    "Aggregate",
    "Contrast",
    "Intervals",
    "Observations",
    "StatsOptions",
    "Status",
    "Summary",
    "Units",
    "benjamini_hochberg",
    "choose_units",
    "contrast",
    "denominator_threshold",
    "draw_weights",
    "max_t",
    "observe",
    "ratio_intervals",
    "sign_flips",
    "summarise",
    "verdicts",
]
