"""One base and adapters that take turns on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedlora.commands.eval.models import load_models, tokenizer_of
from fedlora.commands.eval.options import Loading
from fedlora.commands.eval.subject import find_subject
from fedlora.errors import InputError
from support.merging import logits, peft_saves


def test_the_base_and_an_adapter_are_those_of_peft(tiny_llama: Path, tmp_path: Path) -> None:
    path = peft_saves(tmp_path / "a", tiny_llama, r=2, target_modules=["q_proj"])
    subject = find_subject(Loading(str(path), use_cpu=True, num_threads=1))
    assert subject.models == ["base", "adapter"]
    models = load_models(subject, ["base", "adapter"])
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), path)
    for name, wanted in (("adapter", tuned), ("base", plain), ("adapter", tuned)):
        with models.using(name) as model:
            torch.testing.assert_close(logits(model), logits(wanted))
    assert models.context == 128


def test_an_adapter_of_another_base(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    path = peft_saves(tmp_path / "a", tiny_llama, r=2, target_modules=["q_proj"])
    subject = find_subject(Loading(str(path), base=str(tiny_gpt2), use_cpu=True, num_threads=1))
    with pytest.raises(InputError, match=r"cannot be loaded on .*--base names another base model"):
        load_models(subject, ["adapter"])


def test_the_tokenizer_that_lies_beside_an_adapter_goes_first(
    tiny_llama: Path, tmp_path: Path
) -> None:
    path = peft_saves(tmp_path / "a", tiny_llama, r=2, target_modules=["q_proj"])
    plain = tokenizer_of(find_subject(Loading(str(path))))
    plain.add_tokens(["<own>"])
    plain.save_pretrained(path)
    own = tokenizer_of(find_subject(Loading(str(path))))
    assert len(own) == len(plain)
    assert "<own>" in own.get_vocab()
