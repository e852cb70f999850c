"""The model and the tokenizer that a user names, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig

from fedlora.errors import InputError
from fedlora.model.sources import (
    Source,
    check_place,
    find_source,
    in_one_line,
    label_order,
    load_tokenizer,
)
from support.tokens import CHATML


def test_labels_of_a_checkpoint() -> None:
    named = LlamaConfig(id2label={10: "c", 0: "a", 2: "b"})
    assert Source("m", named, True).labels == ("a", "b", "c")
    numbered = LlamaConfig(num_labels=3)
    assert Source("m", numbered, True).labels == ("0", "1", "2")
    assert label_order(Source("m", named, True), ["b", "c", "a"]) == ("a", "b", "c")
    assert label_order(Source("m", named, True), ["b", "c", "d"]) == ("b", "c", "d")
    assert label_order(Source("m", named, False), ["b", "c", "a"]) == ("b", "c", "a")


def test_a_source_is_read_without_weights(tiny_llama: Path) -> None:
    source = find_source(str(tiny_llama))
    assert source.config.model_type == "llama"
    assert not source.classifier
    assert load_tokenizer(source).pad_token == "<pad>"


def test_names_that_can_only_be_paths(tmp_path: Path) -> None:
    check_place("key", "organisation/model-1.0")  # may be on the hub
    check_place("key", str(tmp_path))
    (tmp_path / "llama-7b").mkdir()
    with pytest.raises(InputError, match=r"there is no such directory; did you mean .*llama-7b\?"):
        check_place("key", str(tmp_path / "lama-7b"))
    with pytest.raises(InputError, match=r"has llama-7b$"):
        check_place("key", str(tmp_path / "something"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is a file; give the directory that it lies in"):
        check_place("key", str(tmp_path / "config.json"))
    with pytest.raises(InputError, match=r"key: a/b: holds no adapter_config\.json"):
        check_place("key", "a/b", holds="adapter_config.json")


def test_a_librarys_error_is_one_line() -> None:
    with pytest.raises(InputError) as error, in_one_line("it fails"):
        raise RuntimeError("a\nb " + "x" * 300)
    assert str(error.value).startswith("it fails: a b xxx")
    assert str(error.value).endswith("...")
    with pytest.raises(InputError, match=r"^as it is$"), in_one_line("it fails"):
        raise InputError("as it is")


def test_a_chat_template_from_a_file_a_tokenizer_or_the_package(
    tiny_llama: Path, tmp_path: Path
) -> None:
    source = find_source(str(tiny_llama))
    (tmp_path / "mine.jinja").write_text(CHATML)
    mine = load_tokenizer(source, chat_template=str(tmp_path / "mine.jinja"))
    assert mine.chat_template == CHATML
    mine.save_pretrained(tmp_path / "other")
    assert load_tokenizer(source, chat_template=str(tmp_path / "other")).chat_template == CHATML
    assert "USER" in load_tokenizer(source, chat_template="vicuna").chat_template
    with pytest.raises(InputError, match="has no chat template"):
        load_tokenizer(source, chat_template=str(tiny_llama))


def test_a_tokenizer_without_an_end_writes_no_text(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    source = find_source(str(tiny_llama))
    with pytest.raises(InputError, match="the tokenizer has no end-of-text token"):
        load_tokenizer(source, str(tmp_path))
    assert load_tokenizer(source, str(tmp_path), generates=False).pad_token == "<pad>"
