"""What the model says with and without an ablation: greedy continuations of the first prompts."""

from collections.abc import Sequence

import torch

from mechinterp_cli.engine.edits import Bucket
from mechinterp_cli.engine.generate import Continuation, greedy
from mechinterp_cli.methods.ablate.units import Ablation, Unit, merge
from mechinterp_cli.methods.ablate.values import Values
from mechinterp_cli.methods.beside import Row
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.tasks.prompts import PromptSet
from mechinterp_cli.tasks.tokenise import Encoder


def continuations(
    model: LoadedModel,
    prompts: PromptSet,
    chosen: Sequence[int],
    units: Sequence[Unit],
    trial: Ablation | None,
    values: Values,
    count: int,
) -> list[Row]:
    """Columns `prompt`, `text` and `token_ids` for each of some prompts.

    Of values that are drawn the first draw is shown.

    Args:
        model: The model.
        prompts: The prompts.
        chosen: Which of them.
        units: All units.
        trial: What is ablated; None for the unedited model.
        values: What stands in its place.
        count: How many tokens.
    """
    encoder = Encoder.of(model.tokenizer, add_bos=False)
    rows = []
    for prompt in chosen:
        tokens = torch.tensor([prompts.prompts[prompt].clean_tokens] * values.draws)
        bucket = Bucket.of({"clean": tokens, **values.tokens([prompt])})
        merged = [] if trial is None else merge([units[unit] for unit in trial.units])
        edits = [edit for one in merged for edit in values.edits(one, [prompt])]
        said: Continuation = greedy(model.model, model.anatomy, bucket, edits, count)
        ids = said.of(0)
        rows.append({"prompt": prompt, "text": encoder.text_of(tuple(ids)), "token_ids": ids})
    return rows
