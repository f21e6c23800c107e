"""Small tokenizers, trained on the tasks' own words, that split texts as the large ones do."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mechinterp_cli.tasks.library import agreement, capitals, greater_than, ioi

CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def corpus() -> Iterator[str]:
    words = [*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS, *greater_than.NOUNS]
    words += [form for noun in agreement.NOUNS for form in noun]
    words += ["is", "are", "was", "were", "has", "have"]
    words += [word for fact in capitals.FACTS for word in f"{fact.country} {fact.capital}".split()]
    texts = [*ioi.TEMPLATES, *capitals.TEMPLATES, "The lasted from the year to the year", "near behind with beside now"]
    texts += [str(year) for year in range(1100, 1800, 7)] * 20
    yield from [f"The {word}" for word in words] * 2
    yield from texts * 2
    yield from list(ioi.NAMES) * 2
    # Two and three digits in a row become tokens where the pre-tokenizer lets them.
    yield from [f"{number:0{width}}" for width in (2, 3) for number in range(10**width)] * 2


def wrap(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """As transformers gives it."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)  # type: ignore[no-untyped-call]  # unannotated


def decode(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens)))


@cache
def byte_level(digits: int = 1, *, bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """Words after a space are single tokens; numbers are split from the left into groups of `digits`."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(rf"\d{{1,{digits}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT if chat else None)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2 does: a space is put before every text, so that " Mary" alone has two. Years are one token."""
    words = {f"▁{word}" for text in corpus() for word in text.split()}
    words |= {f"▁{year}" for year in range(1100, 1800)} | {"▁to", "▁the", "▁a", "▁store,", "▁school,", "▁and"}
    words |= {f"▁{place}{mark}" for place in ioi.PLACES for mark in ",."}
    vocabulary = {word: i for i, word in enumerate(["<unk>", "▁", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return wrap(tokenizer, unk_token="<unk>")


@cache
def symbols(count: int = 64, *, unknown: bool = True) -> PreTrainedTokenizerFast:
    """Words `k0` to `k{count - 1}`; with `unknown` anything else is `<unk>`, without it an error."""
    vocabulary = {f"k{i}": i for i in range(count)} | ({"<unk>": count} if unknown else {})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(tokenizer, **({"unk_token": "<unk>"} if unknown else {}))
