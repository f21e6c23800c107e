"""`probe`: what can be read out of activations, beside what could be had without the model."""

from mechinterp_cli.methods.probe import columns, comparing
from mechinterp_cli.methods.probe.experiment import ProbeExperiment
from mechinterp_cli.methods.probe.options import ProbeOptions

__all__ = ["ProbeExperiment", "ProbeOptions", "columns", "comparing"]
