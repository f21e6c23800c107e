"""`ablate`: take parts away and measure what breaks."""

import mechinterp_cli.methods.ablate.columns as columns
from mechinterp_cli.methods.ablate.experiment import AblateExperiment
from mechinterp_cli.methods.ablate.options import AblateOptions

__all__ = ["AblateExperiment", "AblateOptions", "columns"]
