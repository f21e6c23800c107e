"""`patch`: put activations of one run into another, and see how far the answer follows."""

from mechinterp_cli.methods.patch import columns
from mechinterp_cli.methods.patch.options import PatchOptions

__all__ = ["PatchOptions", "columns"]
