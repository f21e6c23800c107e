"""The tokenizer of the symbol models: words `k0` … `k63`, one token each.

There is no beginning-of-sequence token, so a prompt has exactly as many tokens as words. Whatever is
not a symbol becomes `<unk>`, which is a special token and so never counts as a symbol.
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

SYMBOLS = 64
"""Number of symbols; token id i is the word `k{i}`."""
UNKNOWN = "<unk>"
VOCABULARY = SYMBOLS + 1
"""Rows of the embedding: the symbols and `<unk>`, which comes last."""
TOKENIZER_FILE = Path(__file__).parent / "data" / "symbols" / "tokenizer.json"


def build_tokenizer() -> Tokenizer:
    """Make the tokenizer from nothing; the shipped file is this one saved."""
    vocabulary = {f"k{i}": i for i in range(SYMBOLS)} | {UNKNOWN: SYMBOLS}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([UNKNOWN])
    return tokenizer


def load_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Load the shipped tokenizer.

    Args:
        max_length: Longest prompt of the model it is for, in tokens.
    """
    make: Any = PreTrainedTokenizerFast  # not annotated
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_file=str(TOKENIZER_FILE),
        unk_token=UNKNOWN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer
