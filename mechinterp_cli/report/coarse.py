"""Heat maps of more cells than a screen has room for: neighbouring columns are joined, and the caption says so."""

from dataclasses import replace

import numpy as np

from mechinterp_cli.report.behind import Behind
from mechinterp_cli.report.grid import CELL_STANDING, Heatmap, Panel

MAX_COLUMNS = 2_000
"""Of a panel, whose columns are a pixel wide at least."""
MAX_CELLS = 20_000
"""Of a picture: beyond, it takes seconds to draw and megabytes on a page."""


def coarse(heatmap: Heatmap) -> Heatmap:
    """The heat map itself, or one whose columns are bins of neighbours, each cell the strongest of its bin.

    Args:
        heatmap: Of any size.
    """
    total = sum(panel.values.size for panel in heatmap.panels)
    widest = max(len(panel.columns) for panel in heatmap.panels)
    width = max(-(-widest // MAX_COLUMNS), -(-total // MAX_CELLS))
    if width <= 1 or widest <= 1:
        return heatmap
    panels = tuple(_joined(panel, width) for panel in heatmap.panels)
    noun = next((panel.column_title for panel in panels if panel.column_title), "column")
    caption = f"{heatmap.caption} Columns are bins of {width}; each cell is the strongest {noun} of its bin.".strip()
    return replace(heatmap, panels=panels, caption=caption, scale=heatmap.colours)


def _joined(panel: Panel, width: int) -> Panel:
    """The panel with every `width` columns as one."""
    starts = range(0, len(panel.columns), width)
    values = np.full((len(panel.layers), len(starts)), np.nan)
    status = np.full(values.shape, "absent", dtype=object)
    details: dict[tuple[int, int], Behind] = {}
    sizes = np.nan_to_num(np.abs(panel.values), nan=-1.0)
    rank = np.vectorize(CELL_STANDING.__getitem__, otypes=[np.float64])(panel.status)
    labels = []
    for at, start in enumerate(starts):
        end = min(start + width, len(panel.columns))
        for row in range(len(panel.layers)):
            part = slice(start, end)
            best = start + int(np.lexsort((sizes[row, part], rank[row, part]))[-1])
            values[row, at], status[row, at] = panel.values[row, best], panel.status[row, best]
            found = panel.details.get((row, best), {})
            details[row, at] = {**found, "strongest": panel.columns[best]}
        last = panel.columns[end - 1]
        labels.append(panel.columns[start] if end - start == 1 else f"{panel.columns[start]} – {last}")
    return replace(panel, columns=tuple(labels), values=values, status=status, details=details)
