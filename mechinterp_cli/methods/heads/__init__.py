"""`heads`: which heads look back, copy, and complete repeated patterns, and whether the model needs them."""

from mechinterp_cli.methods.heads.experiment import HeadsExperiment
from mechinterp_cli.methods.heads.options import HeadsOptions

__all__ = ["HeadsExperiment", "HeadsOptions"]
