"""What the config that `mechinterp init` writes asks for: small experiments on a model that comes with the package.

Only what is set stands here. What every key means, and the keys that are not set, come from the schema.
"""

from collections.abc import Mapping
from typing import Any

_TOY: Mapping[str, Any] = {"id": "toy-induction"}
_PAIRS: Mapping[str, Any] = {"name": "induction", "n": 32, "seed": 0}

STARTERS: Mapping[str, Mapping[str, Any]] = {
    "patch": {
        "name": "my-patch",
        "model": _TOY,
        "task": _PAIRS,
        "patch": {
            "direction": "denoise",
            "sites": [
                {"kind": "resid_pre", "layers": "all", "positions": "each"},
                {"kind": "z", "layers": "all", "heads": "each", "positions": "all"},
            ],
        },
        "metrics": ["logit_diff"],
    },
    "ablate": {
        "name": "my-ablate",
        "model": _TOY,
        "task": _PAIRS,
        "ablate": {
            "units": [{"kind": "head", "layers": "all", "heads": "each"}, {"kind": "mlp", "layers": "all"}],
            "values": ["mean"],
            "design": "single",
        },
        "metrics": ["logit_diff"],
    },
    "heads": {
        "name": "my-heads",
        "model": _TOY,
        "task": {"name": "repeats", "n": 32, "seed": 0},
        "heads": {
            "scores": ["induction", "previous_token", "prefix_matching", "duplicate_token", "copying"],
            "causal": {"scores": ["induction"], "k": [1, 2, 4]},
        },
    },
    "attribute": {
        "name": "my-attribute",
        "model": _TOY,
        "task": _PAIRS,
        "attribute": {
            "direction": "denoise",
            "sites": [
                {"kind": "z", "layers": "all", "heads": "each", "positions": "all"},
                {"kind": "resid_pre", "layers": "all", "positions": "each"},
            ],
            "estimators": ["atp", "ig_inputs"],
            "verify": {"top": 10, "random": 10},
        },
        "metrics": ["logit_diff"],
    },
    "probe": {
        "name": "my-probe",
        "model": _TOY,
        "task": {"name": "induction_labels", "n": 32, "seed": 0},
        "probe": {"sites": [{"kind": "resid_post", "layers": "all"}], "probes": ["logistic"]},
    },
    "circuit": {
        "name": "my-circuit",
        "model": _TOY,
        "task": {**_PAIRS, "n": 48, "corruption": "all"},
        "circuit": {
            "scores": ["eap_ig_inputs", "exact"],
            "sizes": [0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
            "random": {"draws": 5},
            "tests": {"size": 0.5},
            "stability": {"size": 0.2},
        },
        "metrics": ["logit_diff"],
    },
}
"""By subcommand, in the layout of the YAML file."""
