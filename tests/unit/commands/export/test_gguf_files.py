"""Which GGUF files are written, and that both pass their comparisons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fedlora.adapters.export.gguf_adapter import read_gguf_adapter
from fedlora.adapters.export.ranks import relative_distance, spectrum
from fedlora.adapters.export.readers import Base
from fedlora.commands.export.files import Job
from fedlora.commands.export.gguf_files import fill_gguf, gguf_parts
from fedlora.commands.export.origin import Origin
from fedlora.commands.export.request import read_request
from fedlora.errors import InputError
from support.merging import made

SHAPES = {
    "model.layers.0.self_attn.q_proj": ((16, 16), 3),
    "model.layers.1.mlp.up_proj": ((24, 16), 1),
}
ADAPTER = made(SHAPES)


class _Subject:
    """A base whose configuration is here."""

    def __init__(self, config: object) -> None:
        self.source = type("Source", (), {"config": config, "name": "base"})()
        self.of_a_run, self.classifies = False, False


LLAMA = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def origin(adapter: object = ADAPTER) -> Origin:
    return Origin("x", Path("x"), adapter, "adapter", _Subject(LLAMA))  # type: ignore[arg-type]


def test_an_adapter_alone_has_one_rank_and_passes(tmp_path: Path) -> None:
    request = read_request(
        ["x", "--format", "gguf", "--parts", "adapter", "--output", "y", "--for", "ollama"]
    )
    skeleton = type("Skeleton", (), {"config": LLAMA})()
    job = Job(origin(), request, spectrum(ADAPTER.deltas), 3, 3, skeleton, parts=("adapter",))
    checks = fill_gguf(job, tmp_path)
    assert len(checks) == 2
    assert all(check.passed for check in checks)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "adapter.gguf"]
    shapes = {x.name: x.shape.tolist() for x in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert all(3 in shape for shape in shapes.values())
    assert shapes["blk.1.ffn_up.weight.lora_b"] == [3, 24]
    found = read_gguf_adapter(tmp_path / "adapter.gguf").deltas
    assert relative_distance(found, ADAPTER.deltas) < 1e-6
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "Modelfile").read_text()


def job(parts: str, adapter: Any = ADAPTER, tokenizer: Any = None) -> Job:
    request = read_request(["x", "--format", "gguf", "--output", "y", "--parts", parts])
    skeleton = type("Skeleton", (), {"config": LLAMA})()
    return Job(origin(adapter), request, spectrum(adapter.deltas), 3, 3, skeleton, tokenizer)


def known_tokenizer() -> Any:
    """Byte-level BPE as GPT-2 has it."""
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_what_cannot_be_written_is_left_out_of_both() -> None:
    known = known_tokenizer()
    assert gguf_parts(job("both", tokenizer=known), Base("base")) == (("adapter", "merged"), [])
    whole = replace(ADAPTER, dense={"model.norm.weight": torch.ones(16)})
    parts, (note,) = gguf_parts(job("both", whole, known), Base("base"))
    assert parts == ("merged",)
    assert note.startswith("no adapter.gguf: model.norm: trained whole")
    parts, (note,) = gguf_parts(job("both"), Base("base"))
    assert parts == ("adapter",)
    assert note.startswith("no model.gguf: its tokenizer is not a fast one")


def test_nothing_that_can_be_written_is_an_error() -> None:
    whole = replace(ADAPTER, dense={"model.norm.weight": torch.ones(16)})
    with pytest.raises(InputError, match=r"^--format gguf: model\.norm: trained whole"):
        gguf_parts(job("adapter", whole), Base("base"))
    with pytest.raises(InputError, match=r"^--format gguf: model\.norm.*; its tokenizer"):
        gguf_parts(job("both", whole), Base("base"))
    with pytest.raises(InputError, match=r"tokenizer is not a fast one.*--parts adapter"):
        gguf_parts(job("merged"), Base("base"))
    table = replace(ADAPTER, embeddings=frozenset({"model.embed_tokens"}))
    with pytest.raises(InputError, match=r"llama\.cpp would change both"):
        gguf_parts(job("adapter", table), Base("base", tied=True))
