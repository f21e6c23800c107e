"""`probe`: what can be read out of activations, beside what could be had without the model."""

from mechinterp_cli.methods.probe import columns
from mechinterp_cli.methods.probe.options import ProbeOptions

__all__ = ["ProbeOptions", "columns"]
