"""`toy-induction`: a small Llama that grows an induction head while it learns to repeat.

`python -m mechinterp_cli.models.toy` trains it again, about a minute on two cores, and writes the files
that the package ships: `config.json`, one `step{N}.safetensors` per checkpoint, and `checkpoints.json`.
A training sequence is a random prefix and then one block of random symbols twice; only the second
copy can be predicted, by looking up what followed the same symbol before.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mechinterp_cli.models.symbols import SYMBOLS, VOCABULARY

FOLDER = Path(__file__).parent / "data" / "toy-induction"
"""Where the shipped files are."""
POSITIONS = 64
"""Longest prompt: no longer one was trained on, and the model fails beyond it."""
_CHECKPOINTS = (0, 50, 100, 120, 140, 160, 180, 200, 250, 300, 400, 600, 1000, 1500)
_BATCH, _LENGTH = 64, POSITIONS
_LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment of the training."""

    revision: str
    """`step{N}`, after N updates: what `model.revision` chooses it by."""
    step: int
    tokens: int
    """Tokens seen."""
    loss: float
    """Mean cross-entropy on the second copies of the last batch, nats per token."""

    @property
    def file(self) -> Path:
        """The weights."""
        return FOLDER / f"{self.revision}.safetensors"


def checkpoints() -> tuple[Checkpoint, ...]:
    """The shipped checkpoints in order of training; the last is the finished model."""
    entries = json.loads((FOLDER / "checkpoints.json").read_text(encoding="utf-8"))
    return tuple(Checkpoint(**entry) for entry in entries)


def toy_config() -> LlamaConfig:
    """The architecture of the toy model."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def training_batch(generator: torch.Generator) -> tuple[Int[Tensor, "batch length"], Float[Tensor, "batch length-1"]]:
    """Draw sequences, and mark what can be predicted.

    Returns:
        Token ids, and for every token but the first whether it is in the second copy after that
        copy's first symbol (1.0) or not (0.0).
    """
    tokens = torch.randint(SYMBOLS, (_BATCH, _LENGTH), generator=generator)
    prefixes = torch.randint(0, _LENGTH // 2, (_BATCH, 1), generator=generator)
    # The block ends where the sequence ends, so its length follows from the prefix.
    blocks = (_LENGTH - prefixes) // 2
    position = torch.arange(_LENGTH).expand(_BATCH, -1)
    second = position >= _LENGTH - blocks
    tokens = tokens.gather(1, torch.where(second, position - blocks, position))
    predictable = position > _LENGTH - blocks
    return tokens, predictable[:, 1:].float()


def train(folder: Path, *, seed: int, steps: tuple[int, ...] = _CHECKPOINTS) -> None:
    """Train from random weights and save a checkpoint after each number of updates in `steps`.

    Args:
        folder: Where the files go; made if it is not there.
        seed: Of the weights and of the data.
        steps: In rising order; training ends with the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(toy_config())
    model.config.save_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    saved: list[Checkpoint] = []
    for step in range(steps[-1] + 1):
        loss = _loss(model, generator)
        if step in steps:
            saved.append(_save(model, folder, step, loss.item()))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    text = json.dumps([asdict(checkpoint) for checkpoint in saved], indent=2)
    (folder / "checkpoints.json").write_text(text + "\n", encoding="utf-8")


def _loss(model: LlamaForCausalLM, generator: torch.Generator) -> Float[Tensor, ""]:
    tokens, predictable = training_batch(generator)
    log_probabilities = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    surprise = -log_probabilities.gather(2, tokens[:, 1:, None])[..., 0]
    loss: Tensor = (surprise * predictable).sum() / predictable.sum()
    return loss


def _save(model: LlamaForCausalLM, folder: Path, step: int, loss: float) -> Checkpoint:
    checkpoint = Checkpoint(revision=f"step{step}", step=step, tokens=step * _BATCH * _LENGTH, loss=round(loss, 4))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / checkpoint.file.name, metadata={"format": "pt"})
    return checkpoint


def main() -> None:
    """Train the toy model into a folder."""
    parser = argparse.ArgumentParser(prog="python -m mechinterp_cli.models.toy", description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train(options.folder, seed=options.seed)


if __name__ == "__main__":
    main()
