"""Makes tokenizers with chat templates, and shows which stretches of text are learnt."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fedlora.data import chat_trace
from fedlora.data.templates import TEMPLATES
from fedlora.data.tokenize import IGNORE, Tokens, tokenize
from fedlora.model.sources import find_source, load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


MARKED_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SENTENCES = [
    "The river was cold and the stones were grey.",
    "Yes, the answer is simple: add the numbers, and write down the result.",
    "What is the capital of France? The capital of France is Paris.",
    "def area(width, height):\n    if width < 0:\n        return None\n    return width * height",
    "Write a short poem about the sea.  Two spaces, and\ttabs.",
]


def byte_level(special: Sequence[str] = (), *, trained: bool = True, trim: bool = False) -> Any:
    """Like GPT-2's: bytes and (if trained) merges of them, a word with the space before it.

    Args:
        special: further special tokens.
        trained: false leaves a token per byte.
        trim: leave spaces out of the places where tokens stand, as GPT-NeoX's does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400 if trained else len(alphabet),
            initial_alphabet=alphabet,
            special_tokens=["<|endoftext|>", "<|startoftext|>", *special],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<|startoftext|>"
    )


def with_chat(tokenizer: Any, template: str) -> Any:
    """A copy with that chat template."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


def learnt(tokenizer: Any, found: Tokens) -> list[str]:
    """The stretches of text that are learnt."""
    return [tokenizer.decode(ids) for _, ids in stretches(found)]


def stretches(found: Tokens) -> list[tuple[int, list[int]]]:
    """Where the tokens stand that are learnt, and which, neighbours together."""
    out: list[tuple[int, list[int]]] = []
    before = IGNORE
    for i, (token, label) in enumerate(zip(found["input_ids"], found["labels"], strict=True)):
        assert label in (token, IGNORE)
        if label != IGNORE:
            if before == IGNORE:
                out.append((i, []))
            out[-1][1].append(token)
        before = label
    return out


def chat(tokenizer: Any, messages: list[dict[str, Any]], **columns: Any) -> Tokens:
    """A conversation's tokens, the assistant's turns learnt."""
    return tokenize({"messages": messages, **columns}, TEMPLATES["chat"], tokenizer, 100_000, True)


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return [*first, *({"role": roles[i % 2], "content": c} for i, c in enumerate(contents))]


SPECIAL = re.compile(
    r"<\|[^|>\s{}]+\|>|<｜[^｜>\s{}]+｜>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|\[gMASK\]|<sop>"
)
"""Special tokens as they stand in chat templates."""


def chat_templates() -> Path:
    """Those that TRL ships: `X.jinja` and, with markers, `X_training.jinja`.

    TRL is found without being imported, which takes longer than most tests.
    """
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "chat_templates"


@cache
def of_model(name: str) -> Any:
    """A token per byte, the template's special tokens, and the template."""
    path = chat_templates() / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"{name} is not in this version of TRL")
    template = path.read_text(encoding="utf-8")
    special = sorted(set(SPECIAL.findall(template)) - {"<|endoftext|>", "<|startoftext|>"})
    return with_chat(byte_level(special, trained=False), template)


MODELS: list[tuple[str, str, tuple[str, ...]]] = [
    # Equal.
    ("cohere", "", ("",)),
    ("cohere2", "", ("",)),
    ("llama3", "", ("",)),
    # The template goes on with a line end after the token that ends the turn; generation stops
    # before it.
    ("gemma", "", ("\n",)),
    ("gemma3", "", ("\n",)),
    ("diffusion_gemma", "", ("\n",)),
    ("lfm2", "", ("\n",)),
    ("lfm2_v2", "", ("\n",)),
    ("qwen2_5_vl", "", ("\n",)),
    ("qwen3_instruct_2507", "", ("\n",)),
    ("qwen3_vl", "", ("\n",)),
    # And behind the whole conversation there is the end of the text.
    ("phi3", "", ("\n", "\n<|endoftext|>")),
    ("phi3_5", "", ("\n", "\n<|endoftext|>")),
    # TRL's markers enclose what the prompt for generation says already.
    ("qwen2_5", "\n", ("\n",)),
    ("deepseek_r1_distill", "<｜Assistant｜>", ("",)),
    ("deepseekv3", "<｜Assistant｜>", ("",)),
    ("gptoss", "<|start|>assistant", ("",)),
    ("muse_glimmer", "<|start|>assistant", ("",)),
    ("nemotron_3_nano", "<think>", ("\n",)),
    ("nemotron_3_super", "<think>", ("\n",)),
    ("nemotron_3_ultra", "<think>", ("\n",)),
    ("nemotron_3_5_lightning", "<think>", ("\n",)),
    ("qwen3_8", "<think>\n", ("\n",)),
]
"""A template; what only TRL learns before each turn; what after it, and after the last."""


BARE = (
    "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A: ' }}{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
"""No end-of-turn token, and a prompt for generation that ends with a space."""


_marks_once = cache(chat_trace._with_marks.__wrapped__)


@pytest.fixture
def templates_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has one chat template and keeps a few; these tests go through all of them often."""
    monkeypatch.setattr(chat_trace, "_with_marks", _marks_once)


@pytest.fixture(scope="session")
def letters(tiny_llama: Path) -> Any:
    """A token per character."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def metaspace() -> Any:
    """Like Llama 2's: every text begins with `<s>` and its first word with a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session", params=["letters", "byte level", "metaspace", "stories260K"])
def any_tokenizer(request: pytest.FixtureRequest, letters: Any) -> Any:
    """Four kinds, the last that of a real model."""
    if request.param == "letters":
        return letters
    if request.param == "byte level":
        return byte_level(["<|im_start|>", "<|im_end|>"])
    if request.param == "metaspace":
        return metaspace()
    from transformers import AutoTokenizer

    path = request.getfixturevalue("material") / "models" / "stories260K"
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def vicuna(tiny_llama: Path) -> str:
    """The chat template that is built in."""
    tokenizer = load_tokenizer(find_source(str(tiny_llama)), chat_template="vicuna")
    return str(tokenizer.chat_template)
