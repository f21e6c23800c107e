"""What an absent token is, as an embedding at layer 0: zero, the mean embedding, or the corrupted prompt's."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp_cli.engine.atp import Sources, stream, zeros
from mechinterp_cli.engine.capture import TOKENS_PER_PASS
from mechinterp_cli.engine.edits import Edit, Site
from mechinterp_cli.engine.entering import entering
from mechinterp_cli.engine.gradients import EMBED
from mechinterp_cli.methods.attribute.options import Baseline
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.methods.measure import split_members

CORRUPT = "corrupt"
Members = Sequence[int]
"""The prompts of a bucket."""


@dataclass(frozen=True, eq=False)
class Absent:
    """What stands in the place of absent tokens.

    Args:
        name: Which baseline.
        setting: Model and prompts.
        mean: [d_model], for `mean`.
    """

    name: Baseline
    setting: Setting
    mean: Tensor | None

    @classmethod
    def of(cls, name: Baseline, setting: Setting) -> "Absent":
        """A baseline of the clean prompts; without `setting.compute` their mean is zero."""
        return cls(name, setting, mean_embedding(setting) if name == "mean" else None)

    def sources(self, members: Members) -> Sources:
        """It as what estimators put in place of the embeddings of a bucket."""
        model = self.setting.model
        if self.name == CORRUPT:
            return stream(model.model, model.anatomy, self.streams(members)[CORRUPT])
        if self.mean is None:
            return zeros
        mean = self.mean

        def everywhere(_prompts: Tensor, sites: Collection[Site]) -> Mapping[Site, Tensor]:
            return dict.fromkeys(sites, mean)

        return everywhere

    def streams(self, members: Members) -> dict[str, Tensor]:
        """Streams of a bucket, ids [prompts, positions]: `clean`, and `corrupt` where it is the baseline."""
        prompts = [self.setting.prompts.prompts[i] for i in members]
        tokens = {"clean": torch.tensor([prompt.clean_tokens for prompt in prompts])}
        if self.name == CORRUPT:
            tokens[CORRUPT] = torch.tensor([prompt.corrupt_tokens for prompt in prompts])
        return tokens

    def edit(self, positions: tuple[tuple[int, ...], ...]) -> Edit:
        """The edit that takes tokens away.

        Args:
            positions: For every prompt of a bucket.
        """
        if self.name == CORRUPT:
            return Edit(EMBED, "replace", positions, source=CORRUPT)
        if self.mean is None:
            return Edit(EMBED, "zero", positions)
        return Edit(EMBED, "constant", positions, values=self.mean[None, None])

    def absent(self, members: Members) -> Bool[Tensor, "prompts positions"]:
        """Where a bucket's embedding already is the baseline, bit by bit; nowhere without `setting.compute`."""
        tokens = self.streams(members)["clean"]
        if not self.setting.compute:
            return torch.zeros(tokens.shape, dtype=torch.bool)
        source = self.sources(members)
        parts = []
        for prompts in torch.split(torch.arange(len(tokens)), max(1, TOKENS_PER_PASS // tokens.shape[1])):
            here = _entering(self.setting, tokens[prompts])
            parts.append((here == source(prompts, {EMBED})[EMBED].to(here)).all(-1).cpu())
        return torch.cat(parts)


def mean_embedding(setting: Setting) -> Tensor:
    """Mean [d_model] of what enters layer 0 over all tokens of all clean prompts, summed in float64."""
    if not setting.compute:
        return torch.zeros(setting.model.anatomy.d_model)
    total, count = torch.zeros(setting.model.anatomy.d_model, dtype=torch.float64), 0
    dtype = torch.float32
    for members in split_members(setting.prompts):
        tokens = torch.tensor([setting.prompts.prompts[i].clean_tokens for i in members])
        for part in torch.split(tokens, max(1, TOKENS_PER_PASS // tokens.shape[1])):
            seen = _entering(setting, part)
            dtype = seen.dtype
            total += seen.double().cpu().sum((0, 1))
            count += part.numel()
    return (total / count).to(dtype)  # rounded once: all estimators have the same baseline


def _entering(setting: Setting, tokens: Tensor) -> Tensor:
    return entering(setting.model.model, setting.model.anatomy, tokens)
