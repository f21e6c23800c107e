"""The options that `patch` and `attribute` share: which activations are put where."""

from typing import Literal

from mechinterp_cli.config.base import MethodOptions
from mechinterp_cli.config.types import Seed


class InterchangeOptions(MethodOptions):
    """What is put where; the options that `patch` and `attribute` share."""

    direction: Literal["denoise", "noise"] = "denoise"
    """`denoise` puts clean activations into the corrupted prompt, `noise` corrupted ones into the clean prompt."""
    source: Literal["pair", "other", "mean", "zero"] = "pair"
    """What is put there: the paired prompt's activation, another prompt's (seeded), the data set's mean at the same
    position of the same template, or zero."""
    seed: Seed = 0
    """Seed of the choice of other prompts."""

    @property
    def base_stream(self) -> str:
        """The stream that is patched into."""
        return "corrupt" if self.direction == "denoise" else "clean"

    @property
    def source_stream(self) -> str:
        """The stream that is patched from."""
        return "clean" if self.direction == "denoise" else "corrupt"
