"""What the shipped base model and its tokenizer can and cannot do."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.embedded import BASE_DIR, instructions
from fedlora.embedded.skills import symbolic


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_DIR)


@pytest.fixture(scope="module")
def base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE_DIR).eval()


def test_tokenizer_gives_one_token_per_character_and_adds_none(tokenizer: Any) -> None:
    rows = instructions(300, 0, "train") + instructions(300, 0, "eval") + symbolic(300, 0, "train")
    for row in rows:
        for text in (row["prompt"], row["completion"]):
            ids = tokenizer.encode(text)
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    ["".join(map(chr, range(32, 127))), " two  spaces , and ' n't . ", "a", ""],
)
def test_tokenizer_round_trips_printable_ascii(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.unk_token_id not in tokenizer.encode(text)


def test_tokenizer_marks_other_characters_as_unknown(tokenizer: Any) -> None:
    assert tokenizer.encode("é\n") == [tokenizer.unk_token_id] * 2


def test_special_tokens_agree(tokenizer: Any, base: Any) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<unk>"]
    for name, expected in {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.items():
        assert getattr(tokenizer, name) == expected
        assert getattr(base.config, name) == expected
        assert getattr(base.generation_config, name) == expected
    assert base.config.vocab_size == len(tokenizer) == 99


def _exact_match(base: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Return the share of rows whose greedy continuation is the completion and then the end."""
    import torch

    batch = tokenizer(
        [row["prompt"] for row in rows], padding=True, padding_side="left", return_tensors="pt"
    )
    with torch.inference_mode():
        out = base.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=14,
            do_sample=False,
        )
    hits = 0
    for ids, row in zip(out[:, batch["input_ids"].shape[1] :].tolist(), rows, strict=True):
        expected = [*tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
        hits += ids[: len(expected)] == expected
    return hits / len(rows)


def test_base_solves_held_out_symbolic_prompts(base: Any, tokenizer: Any) -> None:
    assert _exact_match(base, tokenizer, symbolic(400, 2, "eval")) >= 0.98


def test_base_does_not_solve_instructions(base: Any, tokenizer: Any) -> None:
    assert _exact_match(base, tokenizer, instructions(400, 2, "eval")) < 0.015
