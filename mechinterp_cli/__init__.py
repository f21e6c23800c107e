"""mechinterp: causal experiments on language models, from one YAML file to a run directory."""

__version__ = "0.1.0"
