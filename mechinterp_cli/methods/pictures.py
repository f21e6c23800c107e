"""What of a sweep is drawn: one heat map per site block, of the first metric."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from mechinterp_cli.methods.places import TrialSpec
from mechinterp_cli.report.grid import Heatmap, HeatmapSpec, build_heatmap
from mechinterp_cli.tasks.prompts import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decoded_tokens(prompts: PromptSet, tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[str]]:
    """Decoded tokens of each template's first prompt; the one template of a set also under ``""``."""
    tokens: dict[str, list[str]] = {}
    for prompt in prompts.prompts:
        if prompt.template not in tokens:
            tokens[prompt.template] = [str(tokenizer.decode([token])) for token in prompt.clean_tokens]
    if len(tokens) == 1:
        tokens[""] = next(iter(tokens.values()))
    return tokens


def names_vary(prompts: PromptSet) -> bool:
    """Whether prompts of one template hold different tokens somewhere."""
    first: dict[str, tuple[int, ...]] = {}
    return any(first.setdefault(p.template, p.clean_tokens) != p.clean_tokens for p in prompts.prompts)


def heatmaps(
    summary: pd.DataFrame,
    specs: Sequence[TrialSpec],
    prompts: PromptSet,
    tokens: Mapping[str, Sequence[str]],
    *,
    metric: str,
    normalised: bool,
    title: str,
    subtitle: str,
    normalization: str,
) -> Iterator[tuple[str, Heatmap]]:
    """(file name without ending, picture) of every site block.

    Args:
        summary: The summary table with its `block` and `template` columns.
        specs: The trials.
        prompts: The prompts.
        tokens: From `decoded_tokens`.
        metric: Which metric is drawn.
        normalised: Whether effects are normalised by the other stream.
        title: What was done (`denoise`), put behind the kind and task.
        subtitle: Model, metric, number of prompts.
        normalization: What 0 and 1 mean.
    """
    spec = HeatmapSpec(
        title="",
        subtitle=subtitle,
        normalization=normalization,
        aggregate="ratio_of_means" if normalised else "mean",
        tokens=tokens,
        names_vary=names_vary(prompts),
    )
    one_template = len({p.template for p in prompts.prompts}) == 1
    for block in sorted({s.block for s in specs}):
        rows = summary[(summary["block"] == block) & (summary["metric"] == metric)]
        if one_template:
            rows = rows.assign(template=pd.Series(pd.NA, index=rows.index, dtype=object))
        kind = next(s.kind for s in specs if s.block == block)
        named = HeatmapSpec(**{**vars(spec), "title": f"{kind}, {title}"})
        yield f"{block:02d}-{kind}-{metric}", build_heatmap(rows, named)
