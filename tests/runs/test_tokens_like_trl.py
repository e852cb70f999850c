"""Tokens and labels are those that TRL's SFTTrainer trains on."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedlora.data.templates import (
    TEMPLATES,
    UnusableRowError,
)
from fedlora.data.tokenize import Tokens, tokenize
from support.tokens import (
    BARE,
    CHATML,
    MARKED_CHATML,
    any_tokenizer,  # noqa: F401
    byte_level,
    letters,  # noqa: F401
    templates_compiled_once,  # noqa: F401
    turns,
    vicuna,  # noqa: F401
    with_chat,
)

pytestmark = pytest.mark.usefixtures("templates_compiled_once")


@cache
def _loaded(path: Path) -> Any:
    """The model that SFTTrainer is given, which here trains nothing."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def of_trl(
    model: Path, tokenizer: Any, rows: list[dict[str, Any]], out: Path, **settings: Any
) -> list[Tokens]:
    """What TRL's SFTTrainer trains on: tokens and labels, from its data set and its collator."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        _loaded(model),
        SFTConfig(
            output_dir=str(out),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        found.append({key: batch[key][0].tolist() for key in ("input_ids", "labels")})
    return found


def of_ours(
    tokenizer: Any,
    rows: list[dict[str, Any]],
    template: str,
    max_length: int,
    completion_only: bool,
) -> list[Tokens]:
    """What fedlora trains on."""
    found = []
    for row in rows:
        try:
            made = tokenize(row, TEMPLATES[template], tokenizer, max_length, completion_only)
        except UnusableRowError:
            continue
        found.append(made)
    return found


TEXTS = [
    "Once upon a time, a very little while ago.",
    "  two spaces,\ttabs\n\n    and code: x  =  1\n",
    "Zoë's 日本 🙂 na\u0308ive",
    "ends with a space ",
    "the end is there</s>",
    "ends <|endoftext|>",
    "x",
]


PAIRS = [
    {"prompt": "What is the capital of France?", "completion": " Paris."},
    {"prompt": "What is the capital of France? ", "completion": "Paris is."},
    {"prompt": "Add the numb", "completion": "ers, and write down the result"},
    {"prompt": "def area(width):\n", "completion": "    return width * 2"},
    {"prompt": "def area(width):\n    ", "completion": "    return"},
    {"prompt": "stop", "completion": ""},
    {"prompt": "Zoë 🙂", "completion": "🙂 日本"},
    {"prompt": "it ends", "completion": " here</s>"},
    {"prompt": "The river was cold and the stones were grey. " * 3, "completion": "Yes"},
]


TALKS = [
    turns("What is the capital of France?", "The capital is Paris."),
    turns("hi", "  Zoë 🙂", "and\n\nnow?", "    return 1\n", "so", "yes ", system="Be kind."),
    turns("The river was cold and the stones were grey. " * 3, "Yes"),
    turns("x", "y", "x", "y"),
]


CUTS = (1000, 40, 12, 5)


def test_texts_equal_trls(any_tokenizer: Any, tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    for cut in CUTS:
        theirs = of_trl(tiny_llama, any_tokenizer, rows, tmp_path, max_length=cut)
        assert len(theirs) == len(rows)
        for completion_only in (True, False):
            assert of_ours(any_tokenizer, rows, "text", cut, completion_only) == theirs


@pytest.mark.parametrize("completion_only", [True, False])
def test_prompts_and_completions_equal_trls(
    completion_only: bool, any_tokenizer: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """Rows that lose their completion to the cut are dropped by both."""
    numbers = set()
    for cut in CUTS:
        theirs = of_trl(
            tiny_llama,
            any_tokenizer,
            PAIRS,
            tmp_path,
            max_length=cut,
            completion_only_loss=completion_only,
        )
        assert of_ours(any_tokenizer, PAIRS, "prompt_completion", cut, completion_only) == theirs
        numbers.add(len(theirs))
    assert max(numbers) == len(PAIRS)
    assert (min(numbers) < len(PAIRS)) == completion_only


def test_a_completion_without_a_prompt_equals_trls(
    any_tokenizer: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """But for the first label, which nothing predicts: TRL leaves a tokenizer's `<s>` out."""
    row = {"prompt": "", "completion": "Yes, the answer"}
    [theirs] = of_trl(tiny_llama, any_tokenizer, [row], tmp_path)
    [ours] = of_ours(any_tokenizer, [row], "prompt_completion", 1024, True)
    assert ours["input_ids"] == theirs["input_ids"]
    assert ours["labels"][1:] == theirs["labels"][1:] == theirs["input_ids"][1:]


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("template", [CHATML, BARE, "vicuna"])
def test_conversational_completions_equal_trls(
    template: str,
    completion_only: bool,
    any_tokenizer: Any,
    tiny_llama: Path,
    tmp_path: Path,
    vicuna: str,
) -> None:
    tokenizer = with_chat(any_tokenizer, vicuna if template == "vicuna" else template)
    rows = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in TALKS]
    cut, numbers = 1000, []
    for _ in range(2):
        theirs = of_trl(
            tiny_llama,
            tokenizer,
            rows,
            tmp_path,
            max_length=cut,
            completion_only_loss=completion_only,
        )
        assert of_ours(tokenizer, rows, "prompt_completion", cut, completion_only) == theirs
        numbers.append(len(theirs))
        cut = len(theirs[0]["input_ids"]) - 1  # in the completion of the first
    assert numbers[0] == len(rows)
    assert numbers[1] > 0
    assert (numbers[1] < len(rows)) == completion_only


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, "vicuna"])
def test_whole_conversations_equal_trls(
    template: str, any_tokenizer: Any, tiny_llama: Path, tmp_path: Path, vicuna: str
) -> None:
    tokenizer = with_chat(any_tokenizer, vicuna if template == "vicuna" else template)
    rows = [{"messages": talk} for talk in TALKS]
    for cut in (1000, 30):
        settings = {"max_length": cut, "assistant_only_loss": False}
        theirs = of_trl(tiny_llama, tokenizer, rows, tmp_path, **settings)
        assert len(theirs) == len(rows)
        assert of_ours(tokenizer, rows, "chat", cut, False) == theirs


@pytest.mark.parametrize("template", [MARKED_CHATML, "vicuna"])
def test_assistant_turns_with_markers_equal_trls(
    template: str, any_tokenizer: Any, tiny_llama: Path, tmp_path: Path, vicuna: str
) -> None:
    tokenizer = with_chat(any_tokenizer, vicuna if template == "vicuna" else template)
    rows = [{"messages": talk} for talk in TALKS]
    cut, numbers = 1000, []
    for _ in range(2):
        settings = {"max_length": cut, "assistant_only_loss": True}
        theirs = of_trl(tiny_llama, tokenizer, rows, tmp_path, **settings)
        assert of_ours(tokenizer, rows, "chat", cut, True) == theirs
        numbers.append(len(theirs))
        cut = len(theirs[0]["input_ids"]) - 2  # in the first's answer, before that of the third
    assert numbers[0] == len(rows)
    assert 0 < numbers[1] < len(rows)


def test_tools_and_settings_of_a_row_equal_trls(tiny_llama: Path, tmp_path: Path) -> None:
    """Tools may be JSON text: a data set's columns cannot hold functions of all shapes."""
    tool = {
        "type": "function",
        "function": {
            "name": "rain",
            "description": "Whether it rains.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
    listing = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{{ mood or '' }}\n"
    tokenizer = with_chat(byte_level(["<|im_start|>", "<|im_end|>"]), listing + MARKED_CHATML)
    for tools in ([tool], json.dumps([tool])):
        extra = {"tools": tools, "chat_template_kwargs": {"mood": "glad"}}
        rows = [{"messages": turns("x", "yes"), **extra}]
        theirs = of_trl(tiny_llama, tokenizer, rows, tmp_path, assistant_only_loss=True)
        assert tokenizer.decode(theirs[0]["input_ids"]).startswith("[rain]glad\n")
        assert of_ours(tokenizer, rows, "chat", 1024, True) == theirs


def test_real_rows_with_a_real_tokenizer_equal_trls(
    material: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(material / "models" / "stories260K")
    path = material / "datasets" / "dolly_fed10" / "local_training_0.json"
    everything = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in everything if row["context"]][:15]
    rows += [row for row in everything if not row["context"]][:15]
    pairs = []
    for row in rows:
        prompt, completion = TEMPLATES["alpaca"].render(row)
        pairs.append({"prompt": prompt, "completion": completion})
    numbers = []
    for cut in (10_000, 256):
        theirs = of_trl(tiny_llama, tokenizer, pairs, tmp_path, max_length=cut)
        assert of_ours(tokenizer, rows, "alpaca", cut, True) == theirs
        numbers.append(len(theirs))
    assert numbers[0] == 30
    assert 0 < numbers[1] < 30
