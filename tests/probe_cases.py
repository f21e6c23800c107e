"""A model in which one label is readable but unused and another is used, and prompts of it."""

from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.loaded import LoadedModel, ModelSource
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from tests.attribution_cases import linear_model

UNUSED, COPY, USED = 0, 1, 2
"""Coordinates of the residual stream: a label that nothing reads, the same once more, and one that the logits read."""
SIZE = 2.0
FIRST, LAST, ANSWERS = 8, 88, (2, 3)
"""Tokens of prompts, and the two answers."""


def labels(token: int) -> tuple[int, int]:
    """The unused label of a token and the used one, each 0 or 1, independent of each other."""
    return token % 2, token // 2 % 2


def planted_model(like: LoadedModel, *, copied: bool = True) -> LoadedModel:
    """Two layers without norms and activation functions, and uniform attention.

    Args:
        like: Whose tokenizer it gets; it is never asked.
        copied: Whether the unused label stands at `COPY`, too.
    """
    model: Any = linear_model()
    transformer = model.transformer
    generator = torch.Generator().manual_seed(3)
    embedding: Tensor = transformer.wte.weight.data
    model.lm_head.weight = nn.Parameter(0.3 * torch.randn(embedding.shape, generator=generator), requires_grad=False)
    # much else varies as much as the labels do, so that random directions of their variance are of many kinds
    spreads = torch.linspace(0.7, 2.5, embedding.shape[1] - 3)
    embedding[:, 3:] = torch.randn(embedding[:, 3:].shape, generator=generator) * spreads
    for token in range(len(embedding)):
        unused, used = (SIZE * (2 * label - 1) for label in labels(token))
        embedding[token, : USED + 1] = torch.tensor([unused, unused if copied else 0.0, used])
    transformer.wpe.weight.data[:, : USED + 1] = 0
    for block in transformer.h:
        for reading in (block.attn.c_attn, block.mlp.c_fc):
            reading.weight.data[: USED + 1] = 0
        for writing in (block.attn.c_proj, block.mlp.c_proj):
            writing.weight.data *= 0.1  # labels shall stand out from what else there is
            writing.weight.data[:, : USED + 1] = 0
            writing.bias.data[: USED + 1] = 0
    head: Tensor = model.lm_head.weight.data
    head[:, : USED + 1] = 0
    head[ANSWERS[1], USED], head[ANSWERS[0], USED] = 1.0, -1.0
    source = ModelSource(id="planted", path="folder", revision=None, weight_files={"model.safetensors": "planted"})
    return LoadedModel(model, like.tokenizer, find_anatomy(model), source)


def planted_prompts(count: int, *, seed: int, length: int = 6) -> PromptSet:
    """Random tokens; the answer is the used label of the last one, whose labels are balanced, and so is the group.

    The twin of a prompt ends in a token of both other labels.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for number in range(count):
        tokens = torch.randint(FIRST, LAST, (length,), generator=generator).tolist()
        tokens[-1] = tokens[-1] // 4 * 4 + number % 4  # all four pairs of labels equally often
        twin = [*tokens[:-1], tokens[-1] ^ 3]
        used = labels(tokens[-1])[1]
        prompts.append(
            Prompt(
                "text",
                tuple(tokens),
                (ANSWERS[used],),
                str(used),
                "twin",
                tuple(twin),
                (ANSWERS[1 - used],),
                str(1 - used),
                group=f"used {used}",
                spans={"end": (length - 1,), "start": (0, 1)},
                cluster=f"cluster {number // 4 % 12}",
            )
        )
    return PromptSet("made", tuple(prompts))


def stream(model: LoadedModel, prompts: PromptSet, site: Site, *, corrupt: bool = False) -> Tensor:
    """Residual stream after a layer at the last position, by a plain hook, [prompts, d_model]."""
    seen: list[Tensor] = []
    layer = model.model.get_submodule(f"transformer.h.{site.layer}")

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[:, -1].clone())

    handle = layer.register_forward_hook(keep)
    try:
        tokens = [prompt.corrupt_tokens if corrupt else prompt.clean_tokens for prompt in prompts.prompts]
        model.model(torch.tensor(tokens))
    finally:
        handle.remove()
    return torch.cat(seen)


def mean_difference(activations: Tensor, label: Tensor) -> Tensor:
    """Difference of class means at length 1, [1, features]: the simplest probe."""
    difference = activations[label == 1].mean(0) - activations[label == 0].mean(0)
    return torch.nn.functional.normalize(difference, dim=0)[None]


def last_labels(prompts: PromptSet, which: int) -> Tensor:
    """The unused (0) or used (1) label of every prompt's last token."""
    return torch.tensor([labels(prompt.clean_tokens[-1])[which] for prompt in prompts.prompts])
