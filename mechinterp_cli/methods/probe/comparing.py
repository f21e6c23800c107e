"""What of two probing runs is compared: scores over all held-out samples, place by place and probe by probe."""

import mechinterp_cli.methods.probe.columns  # noqa: F401  the table is registered there
from mechinterp_cli.runs.schema import Standing, register_standing

WHOLE = {"target": "label", "split": "test", "baseline": None, "fold": None}
"""Rows of `probes` over all folds, of the model's own activations and the labels themselves."""

register_standing("probe", Standing("probes", metric="probe", site="", label="{label}", value="score", only=WHOLE))
