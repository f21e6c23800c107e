"""`heads`: which heads look back, copy, and complete repeated patterns, and whether the model needs them."""

from mechinterp_cli.methods.heads import columns
from mechinterp_cli.methods.heads.options import HeadsOptions

__all__ = ["HeadsOptions", "columns"]
