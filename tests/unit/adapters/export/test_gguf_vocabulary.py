"""Tokenizers as llama.cpp holds them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fedlora.adapters.export.gguf_vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    vocabulary_of,
)
from fedlora.errors import InputError

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fallback() -> Any:
    """As a SentencePiece model is turned into BPE."""
    vocabulary = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("a", "b"), ("▁", "ab"), ("▁", "a"), ("▁a", "b")]
    core = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    out = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    out.add_tokens(["<mine>"])
    return out


def test_scores_are_the_places_of_merges() -> None:
    found = vocabulary_of(fallback(), 12)
    assert (found.model, found.pre, found.space_prefix) == ("llama", "default", True)
    assert found.tokens[9:] == ["▁ab", "<mine>", "[PAD11]"]
    assert found.kinds == [
        UNKNOWN, CONTROL, CONTROL, BYTE, *[NORMAL] * 6, USER_DEFINED, UNUSED,
    ]  # fmt: skip
    by_token = dict(zip(found.tokens, found.scores, strict=True))
    assert (by_token["ab"], by_token["▁ab"], by_token["▁a"]) == (0.0, -1.0, -2.0)
    assert found.special == {"bos": 1, "eos": 2, "unk": 0}
    assert found.adds == {"bos": True, "eos": False}
    assert found.merges == ()


def byte_level(steps: list[Any]) -> Any:
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template="{{ x }}")


def cut(pattern: str) -> list[Any]:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


@pytest.mark.parametrize(
    ("steps", "pre"),
    [
        (cut(LLAMA_3), "llama-bpe"),
        (cut(LLAMA_3.replace("{1,3}", "")), "qwen2"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
    ],
)
def test_byte_level_cuts_have_names(steps: list[Any], pre: str) -> None:
    found = vocabulary_of(byte_level(steps), 3)
    assert (found.model, found.pre, found.merges) == ("gpt2", pre, ["a b"])
    assert found.adds == {"bos": False, "eos": False}
    assert found.chat_template == "{{ x }}"


def test_what_is_not_known_is_refused_with_the_way_round() -> None:
    with pytest.raises(InputError, match=r"cuts texts is not known here.*--parts adapter"):
        vocabulary_of(byte_level(cut(r"\w+")), 3)
    letters = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(InputError, match="BPE without merges"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=letters), 1)
    with pytest.raises(InputError, match="not a fast one"):
        vocabulary_of(object(), 1)


class Header:
    """Collects what a GGUF writer is told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.told.__setitem__(name, value)


def test_all_of_it_is_written() -> None:
    header = Header()
    Vocabulary(
        "llama", "default", ["a"], [NORMAL], scores=[0.5], special={"eos": 0}, adds={"bos": True}
    ).add_to(header)
    assert header.told == {
        "add_tokenizer_model": "llama",
        "add_tokenizer_pre": "default",
        "add_token_list": ["a"],
        "add_token_types": [NORMAL],
        "add_token_scores": [0.5],
        "add_eos_token_id": 0,
        "add_add_bos_token": True,
        "add_add_space_prefix": False,
    }
