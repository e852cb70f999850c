"""Readers: legal ranks, what is refused and why, what to type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.adapters.export.readers import (
    READERS,
    VLLM_RANKS,
    Base,
    base_facts,
    check_reader,
    gguf_commands,
    gguf_modelfile,
    modelfile,
    next_commands,
    rank_for,
    wants_one_rank,
)
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError
from support.merging import made

BASE = Base("some/base", tied=True)
OTHERS = [reader for reader in READERS if reader != "peft"]


def adapter(*names: str) -> SavedAdapter:
    return made(dict.fromkeys(names or ("model.layers.0.self_attn.q_proj",), ((6, 4), 2)))


@pytest.mark.parametrize("rank", [1, 2, 8, 9, 64, 65, 257, 320, 321, 512])
def test_vllm_gets_the_next_rank_it_can_be_started_with(rank: int) -> None:
    legal = rank_for("vllm", rank)
    assert legal in VLLM_RANKS
    assert legal >= rank
    assert all(other < rank or other >= legal for other in VLLM_RANKS)
    assert rank_for("llama.cpp", rank) == rank


def test_vllm_serves_no_more_than_512() -> None:
    with pytest.raises(InputError, match="has rank 513, and vLLM serves 512 at most: give --rank"):
        rank_for("vllm", 513)


def test_peft_alone_reads_patterns() -> None:
    assert [reader for reader in READERS if not wants_one_rank(reader)] == ["peft"]


@pytest.mark.parametrize("reader", OTHERS)
def test_a_plain_adapter_is_accepted(reader: str) -> None:
    assert check_reader(reader, adapter(), BASE) == []


@pytest.mark.parametrize("reader", OTHERS)
def test_what_a_reader_would_misread_is_refused_with_the_way_round_it(reader: str) -> None:
    whole = replace(adapter(), dense={"score.weight": torch.zeros(2, 4)})
    carried = replace(adapter(), base={"model.embed_tokens.weight": torch.zeros(2, 4)})
    for one, base, why in (
        (whole, BASE, "score: trained whole"),
        (carried, BASE, "carries weights of its base"),
        (adapter(), replace(BASE, conv1d=True), "Conv1D layers"),
    ):
        with pytest.raises(InputError, match=rf"--for {reader}: .*{why}.*--format merged"):
            check_reader(reader, one, base)
        assert check_reader("peft", one, base) == []


def test_mlx_refuses_names_it_would_pass_over() -> None:
    with pytest.raises(InputError, match=r"h\.0\.attn: MLX's models begin"):
        check_reader("mlx", adapter("transformer.h.0.attn"), BASE)


def test_llama_cpp_refuses_the_output_layer_of_a_tied_base() -> None:
    for reader in ("llama.cpp", "ollama"):
        with pytest.raises(InputError, match="lm_head, which is the embedding too"):
            check_reader(reader, adapter("lm_head"), BASE)
        assert check_reader(reader, adapter("lm_head"), replace(BASE, tied=False)) == []
        embedding = replace(
            adapter("model.embed_tokens"), embeddings=frozenset({"model.embed_tokens"})
        )
        with pytest.raises(InputError, match="would change both"):
            check_reader(reader, embedding, BASE)
        assert check_reader(reader, embedding, replace(BASE, tied=False)) == []
    (note,) = check_reader("vllm", adapter("lm_head"), BASE)
    assert "only some of vLLM's models" in note


def test_what_to_type() -> None:
    where = Path("my adapters/x")

    def typed(reader: str, rank: int | None = 64, classifies: bool = False) -> str:
        return "\n".join(next_commands(reader, where, BASE, rank, classifies))

    assert typed("vllm") == (
        "vllm serve some/base --enable-lora --max-lora-rank 64 --lora-modules x='my adapters/x'"
    )
    assert typed("peft") == typed("peft", None) == ""
    assert "convert_lora_to_gguf.py 'my adapters/x' --base some/base" in typed("llama.cpp")
    assert "ollama create x -f 'my adapters/x'/Modelfile" in typed("ollama")
    assert "--adapter-path 'my adapters/x'" in typed("mlx")
    assert typed("vllm", None) == "vllm serve 'my adapters/x'"
    assert typed("vllm", None, True).endswith("--runner pooling")
    for reader in OTHERS:
        assert "my adapters/x" in typed(reader, None)


def test_the_modelfile_names_files_beside_it() -> None:
    lines = [line for line in modelfile(False).splitlines() if not line.startswith("#")]
    assert lines == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
    assert modelfile(True).splitlines()[-1] == "FROM ./model.gguf"


def test_gguf_files_are_used_as_they_are() -> None:
    where, files = Path("my adapters/x"), ["model.gguf", "adapter.gguf", "README.md"]
    lines = gguf_commands("llama.cpp", where, BASE, files)
    assert lines[0] == "llama-cli -m 'my adapters/x'/model.gguf"
    assert lines[-1] == "llama-cli -m base.gguf --lora 'my adapters/x'/adapter.gguf"
    assert len(gguf_commands("llama.cpp", where, BASE, files[:1])) == 1
    assert gguf_commands("ollama", where, BASE, files) == [
        "ollama create x -f 'my adapters/x'/Modelfile"
    ]
    assert gguf_modelfile(True) == "FROM ./model.gguf\n"
    assert gguf_modelfile(False).splitlines()[-2:] == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]


def test_facts_of_a_base_that_is_not_here() -> None:
    assert base_facts("x", None, True) == Base("x", False, True)
