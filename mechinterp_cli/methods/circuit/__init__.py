"""`circuit`: which edges carry the behaviour, and is that the whole story?"""

from mechinterp_cli.methods.circuit import columns
from mechinterp_cli.methods.circuit.options import CircuitOptions

__all__ = ["CircuitOptions", "columns"]
