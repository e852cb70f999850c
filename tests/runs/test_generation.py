"""Exact match of models that are perfect, and answers that do not depend on the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from fedlora.client.evaluate import evaluate, references_fit
from fedlora.client.exact_match import turns_of
from fedlora.client.generation import EQUAL, PADDED, batching, generate
from fedlora.data.templates import TEMPLATES
from fedlora.data.tokenize import IGNORE, Tokens, tokenize
from support.models import save_tokenizer

TURN = "{% for m in messages %}"


CHATML = (
    TURN + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


LLAMA3 = (
    TURN + "<|head|>{{ m.role }}<|/head|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)


COHERE = (
    TURN + "<|t|>{{ m.role }}{% if m.role == 'assistant' %}<|r|>{{ m.content }}<|/r|>{% else %}"
    "{{ m.content }}{% endif %}<|/t|>{% endfor %}"
    "{% if add_generation_prompt %}<|t|>assistant<|r|>{% endif %}"
)


ENDLESS = (
    TURN + "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


MARKED = (
    TURN + "{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant> {% endif %}"
)


TEMPLATES_OF: dict[str, tuple[str, list[str]]] = {
    "ChatML in ordinary letters": (CHATML, []),
    "ChatML": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "Llama 3": (LLAMA3, ["<|head|>", "<|/head|>", "<|eot_id|>"]),
    "two special tokens": (COHERE, ["<|t|>", "<|/t|>", "<|r|>", "<|/r|>"]),
    "no end": (ENDLESS, []),
    "the end is not learnt": (MARKED, ["<|end|>"]),
}


def overfitted(rows: list[Tokens], tokenizer: Any) -> Any:
    """A small model trained on these rows until each labelled token is its most likely one."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    longest = max(len(row["input_ids"]) for row in rows)
    ids, labels = torch.zeros(len(rows), longest).long(), torch.full((len(rows), longest), IGNORE)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
    for _ in range(400):
        logits = model(input_ids=ids).logits[:, :-1]
        counted = labels[:, 1:] != IGNORE
        loss = torch.nn.functional.cross_entropy(logits[counted], labels[:, 1:][counted])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if float(loss.detach()) < 0.03:
            break
    return model.eval()


def talks() -> list[list[tuple[str, str]]]:
    """Conversations of one turn to three."""
    return [
        [("say a", "yes aa."), ("and then", "no."), ("why", "for b")],
        [("what is x", "x is 3.")],
        [("who", "me"), ("not you", "you")],
        [("a longer question", "ok then")],
    ]


@pytest.mark.parametrize("name", TEMPLATES_OF)
def test_perfect_models_have_an_exact_match_of_one(name: str, tmp_path: Path) -> None:
    template, special = TEMPLATES_OF[name]
    save_tokenizer(tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    rows: list[Tokens] = []
    for talk in talks():
        messages = [
            {"role": role, "content": text}
            for turn in talk
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        rows.append(tokenize({"messages": messages}, TEMPLATES["chat"], tokenizer, 400, True))
    last = rows[3]  # cut in the middle of its answer
    begin = next(i for i, label in enumerate(last["labels"]) if label != IGNORE)
    rows[3] = {key: value[: begin + 3] for key, value in last.items()}
    assert sum(len(turns_of(row)) for row in rows) == 7
    assert references_fit(rows, 24)
    assert not references_fit(rows, 4)
    model = overfitted(rows, tokenizer)

    def exact(data: list[Tokens], size: int) -> float:
        found = evaluate(
            model, tokenizer, data, batch_size=size, exact_match=True, max_new_tokens=24
        )
        if data is rows:
            assert found["token_accuracy"] == 1.0
        return float(found["exact_match"])

    for size in (1, 3, 16):
        assert exact(rows, size) == 1.0
    # Of the first conversation's three turns, one has another reference.
    turn = turns_of(rows[0])[1]
    at = len(turn.prompt)
    cut = {key: list(value[: at + len(turn.reference)]) for key, value in rows[0].items()}
    cut["input_ids"][at] = cut["labels"][at] = tokenizer.get_vocab()["Z"]
    assert exact([cut], 2) == 0.5
    # What fedlora generate shows stops there too.
    if name not in ("no end", "the end is not learnt"):
        said = generate(model, tokenizer, [t.prompt for t in turns_of(rows[0])], 24)
        assert said == ["yes aa.", "no.", "for b"]


SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


HEADS = {**SMALL, "intermediate_size": 48, "num_attention_heads": 4}


OLD = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}


FREE = ("llama", "gpt2", "bloom", "mistral", "opt")


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**HEADS),
    "gpt2": lambda: hf.GPT2Config(**OLD, n_positions=64),
    "openai-gpt": lambda: hf.OpenAIGPTConfig(**OLD, n_positions=64),
    "mistral": lambda: hf.MistralConfig(**HEADS, num_key_value_heads=2, sliding_window=6),
    "opt": lambda: hf.OPTConfig(
        vocab_size=100, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, pad_token_id=0, max_position_embeddings=64,
    ),
    "bloom": lambda: hf.BloomConfig(
        vocab_size=100, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0
    ),
    "mpt": lambda: hf.MptConfig(vocab_size=100, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "rwkv": lambda: hf.RwkvConfig(**SMALL, attention_hidden_size=32),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        **HEADS, lru_width=32, attention_window_size=8, num_key_value_heads=1,
        block_types=["recurrent", "attention"],
    ),
    "mamba": lambda: hf.MambaConfig(**SMALL, state_size=4),
    "mamba2": lambda: hf.Mamba2Config(
        **SMALL, num_heads=4, head_dim=16, state_size=4, n_groups=1, chunk_size=8
    ),
    "lfm2": lambda: hf.Lfm2Config(
        **HEADS, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    ),
}  # fmt: skip


def decided(config: Any) -> Any:
    """A random model with weights so large that its answers are no matter of rounding."""
    torch.manual_seed(1)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def random_prompts(*lengths: int) -> list[list[int]]:
    source = torch.Generator().manual_seed(3)
    return [torch.randint(4, 100, (n,), generator=source).tolist() for n in lengths]


def alone(model: Any, tokenizer: Any, prompt: list[int], number: int) -> str:
    """The answer of transformers' own generation to one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=number,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=2,
    )[0, len(prompt) :].tolist()
    out = out[: out.index(2)] if 2 in out else out
    return str(tokenizer.decode(out, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("name", MODELS)
def test_an_answer_is_the_same_in_every_batch(name: str, tmp_path: Path) -> None:
    """The oracle is transformers' own generation after one prompt alone."""
    save_tokenizer(tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    model, prompts = decided(MODELS[name]()), random_prompts(5, 3, 14, 9, 5, 3, 11)
    wanted = [alone(model, tokenizer, prompt, 8) for prompt in prompts]
    assert len(set(wanted)) > 2
    assert generate(model, tokenizer, prompts, 8) == wanted
    if name in FREE:  # and those that can be padded still are
        assert batching(model, tokenizer, 14) == PADDED
    if name == "recurrent_gemma":  # its convolutions read the padding
        assert batching(model, tokenizer, 14) == EQUAL


ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 30,
        "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 5.0, 8.0],
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_answers_beside_longer_prompts_keep_their_rotary_factors(name: str, tmp_path: Path) -> None:
    """Whether a batch, or what was answered before it, is beyond the limit moves no answer."""
    save_tokenizer(tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    longest = 128 if name == "longrope" else 30
    model = decided(
        hf.LlamaConfig(**HEADS, max_position_embeddings=longest, rope_parameters=ROPES[name])
    )
    prompts = random_prompts(5, 17, 28, 3, 20, 9, 40, 60)
    wanted = [alone(copy.deepcopy(model), tokenizer, prompt, 12) for prompt in prompts]
    # Short prompts are asked first, so that it is not the batch tried that decides.
    for part in (slice(0, 2), slice(0, 3), slice(3, 7), slice(0, 8), slice(5, 7)):
        assert generate(model, tokenizer, prompts[part], 12) == wanted[part], part
    assert batching(model, tokenizer, 8) == PADDED
