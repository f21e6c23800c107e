"""`ablate`: take parts away and measure what breaks."""

from mechinterp_cli.methods.ablate import columns
from mechinterp_cli.methods.ablate.options import AblateOptions

__all__ = ["AblateOptions", "columns"]
