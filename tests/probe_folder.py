"""A model folder in which one label of a token is readable but unused, another is used, and a file of its prompts."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models_files import tiny_llama, write_folder
from tests.probe_cases import SIZE, labels

UNUSED, USED = 0, 1
"""Coordinates of the residual stream, and which of a token's labels they hold."""
ANSWERS = (2, 3)
FIRST, LAST = 8, 64
GAIN = 4.0
"""Of the used coordinate in the logits of both answers."""


def planted_folder(folder: Path) -> Path:
    """Two layers of a Llama that read neither label and write to neither; the logits read the used one."""
    model: Any = tiny_llama()
    generator = torch.Generator().manual_seed(3)
    embedding: Tensor = model.model.embed_tokens.weight.data
    spreads = torch.linspace(0.7, 2.5, embedding.shape[1] - 2)
    embedding[:, 2:] = torch.randn(embedding[:, 2:].shape, generator=generator) * spreads
    for token in range(len(embedding)):
        embedding[token, :2] = SIZE * (2.0 * torch.tensor(labels(token)) - 1)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reading in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reading.weight.data[:, :2] = 0
        for writing in (attention.o_proj, mlp.down_proj):
            writing.weight.data[:2] = 0
    head: Tensor = model.lm_head.weight.data
    head[:] = 0.05 * torch.randn(head.shape, generator=generator)
    head[:, :2] = 0
    head[ANSWERS[0], USED], head[ANSWERS[1], USED] = -GAIN, GAIN
    return write_folder(folder, model)


def planted_task(path: Path, which: int, *, count: int = 120, length: int = 5) -> dict[str, Any]:
    """The task of a file of prompts whose answer is the used label of the last token, labelled with one of both.

    The twin of a prompt ends in a token of both other labels.
    """
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(count):
        tokens = torch.randint(FIRST, LAST, (length,), generator=generator).tolist()
        tokens[-1] = tokens[-1] // 4 * 4 + number % 4
        used = labels(tokens[-1])[1]
        clean, corrupt = (" ".join(f"k{t}" for t in one) for one in (tokens, [*tokens[:-1], tokens[-1] ^ 3]))
        row = {"clean": clean, "corrupt": corrupt, "answer": f" k{ANSWERS[used]}", "group": f"used {used}"}
        row |= {"wrong_answer": f" k{ANSWERS[1 - used]}", "label": ("no", "yes")[labels(tokens[-1])[which]]}
        rows.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return {"name": "file", "file": str(path)}
