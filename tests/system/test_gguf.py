"""llama.cpp itself loads what `fedlora export --format gguf` writes, and computes the same.

It needs llama-cpp-python, which is built from source and takes minutes: `.ci/run` installs it where
WITH_LLAMA_CPP is set. Without llama.cpp, tests/unit/adapters/export/test_gguf_*.py compare every
tensor with whole matrices in float64.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from fedlora.adapters.aggregate import save_adapter
from fedlora.adapters.export.checkpoint import open_checkpoint
from fedlora.adapters.export.gguf_adapter import write_gguf_adapter
from fedlora.adapters.export.gguf_layout import layout_of
from fedlora.adapters.export.gguf_model import write_gguf_model
from fedlora.adapters.export.gguf_vocabulary import CONTROL, NORMAL, Vocabulary, vocabulary_of
from fedlora.adapters.export.merged import plan_merge
from fedlora.adapters.export.ranks import pad
from fedlora.adapters.saved_adapter import load_adapter
from fedlora.commands.cli import main
from fedlora.lowrank import LowRank
from fedlora.model.sources import find_source
from support.merging import made

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed (WITH_LLAMA_CPP=1 .ci/run installs it)"
)

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    'Tom said: "I have 2 cats & 31 dogs!" They   ran away. Café, naïve.',
]
F32 = 0  # llama.cpp keeps keys and values in float16 unless it is told otherwise


def llama(model: Path, adapter: Path | None = None) -> Any:
    """A model in llama.cpp, which computes in float32."""
    return llama_cpp.Llama(
        str(model), lora_path=None if adapter is None else str(adapter), n_ctx=128, n_threads=1,
        logits_all=True, type_k=F32, type_v=F32, flash_attn=False, verbose=False, seed=0,
    )  # fmt: skip


def llama_logits(model: Any, ids: list[int]) -> Tensor:
    """The logits after each of these tokens, `(n, vocabulary)`."""
    model.reset()
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)])


def greedy(model: Any, ids: list[int], number: int) -> list[int]:
    """The likeliest tokens that llama.cpp goes on with."""
    out = list(ids)
    for _ in range(number):
        out.append(int(llama_logits(model, out)[-1].argmax()))
    return out[len(ids) :]


@torch.inference_mode()
def logits(model: Any, ids: list[int]) -> Tensor:
    """The same by transformers."""
    out: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return out


def same(found: Tensor, wanted: Tensor) -> None:
    """Logits agree to a thousandth of a percent of the largest one."""
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.fixture(scope="module")
def stories(material: Path) -> Path:
    return material / "models" / "stories260K"


@pytest.fixture(scope="module")
def adapter(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of all linear layers, whose ranks differ by module from 1 to 5."""
    config = AutoModelForCausalLM.from_pretrained(stories).config
    d, kv, h = config.hidden_size, config.num_key_value_heads * config.head_dim, config
    shapes = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (h.intermediate_size, d),
        "mlp.up_proj": (h.intermediate_size, d), "mlp.down_proj": (d, h.intermediate_size),
    }  # fmt: skip
    parts = {
        f"model.layers.{i}.{end}": (shape, 1 + (i + j) % 5)
        for i in range(config.num_hidden_layers)
        for j, (end, shape) in enumerate(shapes.items())
    }
    found = made(parts, 3, base_model_name_or_path=str(stories), target_modules=None)
    for x in found.deltas.values():
        x.B.mul_(0.02)
    path = tmp_path_factory.mktemp("gguf") / "adapter"
    save_adapter(path, found)
    return path


@pytest.fixture(scope="module")
def exported(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files, by the command line."""
    out = tmp_path_factory.mktemp("gguf") / "out"
    words = ["--format", "gguf", "--dtype", "float32", "--output", str(out), "--use_cpu", "true"]
    assert main(["export", str(adapter), *words]) == 0
    return out


@pytest.fixture(scope="module")
def base_file(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untouched base in GGUF, for the adapter."""
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    plan = plan_merge(
        model, open_checkpoint(find_source(str(stories))), made({}), {}, torch.float32
    )
    words = vocabulary_of(AutoTokenizer.from_pretrained(stories), model.config.vocab_size)
    write_gguf_model(path, plan, layout_of(model.config), model.config, words, torch.float32)
    return path


@pytest.fixture(scope="module")
def beside(stories: Path, adapter: Path) -> Any:
    """PEFT's adapter on the base of transformers."""
    base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).eval()


def test_texts_become_the_same_tokens(stories: Path, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = llama(exported / "model.gguf")
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=True) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_logits_and_greedy_text_are_those_of_transformers(
    kind: str, exported: Path, base_file: Path, beside: Any, stories: Path
) -> None:
    model = (
        llama(base_file, exported / "adapter.gguf")
        if kind == "adapter"
        else llama(exported / "model.gguf")
    )
    tokenizer = AutoTokenizer.from_pretrained(stories)
    with beside.disable_adapter():
        untouched = logits(beside, tokenizer(TEXTS[0])["input_ids"])
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        wanted = logits(beside, ids)
        same(llama_logits(model, ids), wanted)
    ids = tokenizer(TEXTS[0])["input_ids"]
    # It is the adapter that is compared, and not the base.
    assert float((untouched - logits(beside, ids)).abs().max()) > 1.0
    written = beside.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0]
    assert greedy(model, ids, 24) == written[len(ids) :].tolist()


SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
OTHERS = {
    "untied llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama 3": LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA_3),
    "wide heads": LlamaConfig(**SIZES, tie_word_embeddings=False, head_dim=32),
    "mistral": MistralConfig(**SIZES, tie_word_embeddings=False, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True, head_dim=16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_random_models_of_every_architecture(name: str, tmp_path: Path) -> None:
    """Base and adapter (embedding and output layer too, where they are two), and merged."""
    config = OTHERS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms too
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "base")
    shapes = {
        module: tuple(layer.weight.shape)
        for module, layer in model.named_modules()
        if module.endswith(("_proj", "lm_head"))
    }
    if config.tie_word_embeddings:
        del shapes["lm_head"]
    held = made({n: (s, 1 + i % 4) for i, (n, s) in enumerate(shapes.items())}, target_modules=None)
    if not config.tie_word_embeddings:
        draw = torch.Generator().manual_seed(9)
        table = LowRank(torch.randn(2, 40, generator=draw), torch.randn(64, 2, generator=draw))
        held.deltas["model.embed_tokens"] = table
    for x in held.deltas.values():
        x.B.mul_(0.05)
    embeddings = held.deltas.keys() & {"model.embed_tokens"}
    layout, checkpoint = layout_of(config), open_checkpoint(find_source(str(tmp_path / "base")))
    words = Vocabulary(
        "llama", "default", [f"t{i}" for i in range(40)], [CONTROL] * 3 + [NORMAL] * 37,
        scores=[0.0] * 40, special={"bos": 1, "eos": 2, "unk": 0},
    )  # fmt: skip
    held = replace(held, embeddings=frozenset(embeddings))
    for file, deltas in (("base", {}), ("merged", held.deltas)):
        plan = plan_merge(model, checkpoint, held, deltas, torch.float32)
        path = tmp_path / f"{file}.gguf"
        write_gguf_model(path, plan, layout, config, words, torch.float32)
    padded = {n: pad(x, 4) for n, x in held.deltas.items()}
    write_gguf_adapter(tmp_path / "adapter.gguf", padded, embeddings, layout)
    save_adapter(tmp_path / "peft", held)
    assert load_adapter(tmp_path / "peft").deltas.keys() == held.deltas.keys()
    beside = PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    ids = torch.randint(3, 40, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = logits(beside, ids)
    same(llama_logits(llama(tmp_path / "merged.gguf"), ids), wanted)
    same(llama_logits(llama(tmp_path / "base.gguf", tmp_path / "adapter.gguf"), ids), wanted)
