"""The shipped toy model grows an induction head, and its training is what the module says."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.models import toy as toy_module
from mechinterp_cli.models.symbol_models import read_toy
from mechinterp_cli.models.symbols import SYMBOLS, TOKENIZER_FILE, build_tokenizer, load_tokenizer

BLOCK = 32
REVISIONS = [checkpoint.revision for checkpoint in toy_module.checkpoints()]


def attentions(revision: str) -> tuple[Tensor, ...]:
    model = read_toy(ModelOptions(id="toy-induction", revision=revision, attn_implementation="eager")).model
    block = torch.randint(SYMBOLS, (16, BLOCK), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model.train(False)(torch.cat([block, block], dim=1), output_attentions=True)
    return tuple(output.attentions)


def induction_score(revision: str) -> float:
    """Best head's mean attention, over the second copy, to the token after the earlier same token."""
    return max(a.diagonal(-(BLOCK - 1), 2, 3)[..., 1:].mean((0, 2)).max().item() for a in attentions(revision))


def test_an_induction_head_grows_along_the_checkpoints() -> None:
    scores = [induction_score(revision) for revision in REVISIONS]
    assert len(scores) >= 8
    assert scores[0] < 0.1
    assert scores[-1] > 0.8
    # A few checkpoints stand within the change itself, so that it can be looked at.
    assert sum(0.1 < score < 0.86 for score in scores) >= 3


def test_a_previous_token_head_stands_below_it() -> None:
    first_layer = attentions(REVISIONS[-1])[0]
    assert first_layer.diagonal(-1, 2, 3).mean((0, 2)).max() > 0.7


def test_checkpoints_are_in_order_and_count_their_tokens() -> None:
    saved = toy_module.checkpoints()
    assert [c.step for c in saved] == sorted({c.step for c in saved})
    assert all(c.tokens == c.step * 64 * 64 and c.revision == f"step{c.step}" for c in saved)
    assert saved[-1].loss < 0.2 < 3 < saved[0].loss


def test_unknown_checkpoint_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"model\.revision: toy-induction has no checkpoint 'step7'\nIt has: step0, "):
        read_toy(ModelOptions(id="toy-induction", revision="step7"))


def test_training_starts_from_the_shipped_weights_and_learns(tmp_path: Path) -> None:
    toy_module.train(tmp_path, seed=0, steps=(0, 2))
    from safetensors.torch import load_file

    first, shipped = load_file(tmp_path / "step0.safetensors"), load_file(toy_module.FOLDER / "step0.safetensors")
    assert all(torch.equal(first[name], shipped[name]) for name in shipped)
    later = load_file(tmp_path / "step2.safetensors")
    assert not any(torch.equal(first[name], later[name]) for name in shipped)


def test_training_batch_marks_exactly_what_can_be_predicted() -> None:
    tokens, predictable = toy_module.training_batch(torch.Generator().manual_seed(3))
    for row, marks in zip(tokens.tolist(), predictable.tolist(), strict=True):
        block = int(sum(marks)) + 1
        assert marks == [0.0] * (63 - block + 1) + [1.0] * (block - 1)
        assert row[-block:] == row[-2 * block : -block]


def test_tokenizer_is_the_one_the_code_builds() -> None:
    assert TOKENIZER_FILE.read_text(encoding="utf-8") == build_tokenizer().to_str(pretty=True)


def test_one_token_per_symbol_and_back() -> None:
    tokenizer = load_tokenizer(64)
    assert tokenizer("k3 k7 k1").input_ids == [3, 7, 1]
    assert tokenizer.decode([3, 7, 1]) == "k3 k7 k1"
    assert tokenizer(" k63").input_ids == [63]
    assert [tokenizer.decode([i]) for i in range(SYMBOLS)] == [f"k{i}" for i in range(SYMBOLS)]


def test_other_words_become_a_special_token_and_never_a_symbol() -> None:
    tokenizer = load_tokenizer(64)
    assert tokenizer("k64 Mary k03").input_ids == [tokenizer.unk_token_id] * 3
    assert tokenizer.unk_token_id in tokenizer.all_special_ids
