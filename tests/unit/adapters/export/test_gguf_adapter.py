"""GGUF files of adapters: what the gguf reader finds, against whole matrices in float64."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from fedlora.adapters.export.gguf_adapter import read_gguf_adapter, write_gguf_adapter
from fedlora.adapters.export.gguf_layout import Layout
from fedlora.adapters.export.ranks import pad
from fedlora.errors import InputError
from support.adapters import random_lowrank

LAYOUT = Layout("llama", 2, 4, 2, True)
SHAPES = {
    "model.layers.0.self_attn.q_proj": (16, 12),
    "model.layers.1.self_attn.k_proj": (8, 12),
    "model.layers.1.mlp.down_proj": (12, 20),
    "lm_head": (30, 12),
    "model.embed_tokens": (12, 30),
}
FACTORS = {
    name: pad(random_lowrank(shape, 1 + i, i), 6) for i, (name, shape) in enumerate(SHAPES.items())
}
EMBEDDINGS = {"model.embed_tokens"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.gguf"
    write_gguf_adapter(path, FACTORS, EMBEDDINGS, LAYOUT, "mine")
    return path


def test_llama_cpp_would_compute_the_update(file: Path) -> None:
    """`alpha / r lora_b lora_a` in float64, by the reader alone, in llama.cpp's order of rows."""
    reader = gguf.GGUFReader(file)
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    assert reader.get_field("general.architecture").contents() == "llama"
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {x.name: torch.tensor(x.data).double() for x in reader.tensors}
    assert len(tensors) == 2 * len(SHAPES)
    names = LAYOUT.names()
    for module, x in FACTORS.items():
        a, b = (tensors[f"{names[module]}.weight.lora_{end}"] for end in "ab")
        if module in EMBEDDINGS:
            assert a.shape == (30, 6)
            a = a.T
        scale = alpha / a.shape[0]
        assert scale == 1.0
        wanted = x.B.double() @ x.A.double()
        heads = {"q_proj": 4, "k_proj": 2}.get(module.rpartition(".")[2])
        if heads:  # by hand: halves of a head become even and odd rows
            m = wanted.shape[0]
            wanted = wanted.reshape(heads, 2, m // heads // 2, -1).swapaxes(1, 2).reshape(m, -1)
        torch.testing.assert_close(scale * b @ a, wanted, rtol=1e-14, atol=1e-15)


def test_it_is_read_back(file: Path) -> None:
    found = read_gguf_adapter(file)
    assert found.architecture == "llama"
    assert found.embeddings == EMBEDDINGS
    assert found.deltas.keys() == FACTORS.keys()
    for module, x in FACTORS.items():
        assert torch.equal(found.deltas[module].A, x.A)
        assert torch.equal(found.deltas[module].B, x.B)


def _foreign(path: Path, alpha: float, heads: bool, **tensors: torch.Tensor) -> Path:
    """An adapter as llama.cpp's own converter writes it: alpha is any, heads are not counted."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if heads:
        writer.add_head_count(2)
    for name, value in tensors.items():
        writer.add_tensor(name.replace("_weight", ".weight").replace("_lora", ".lora"), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_one_alpha_is_divided_by_each_tensors_own_rank(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, generator=draw), torch.randn(4, 2, generator=draw)
    names = {"output_weight_lora_a": a.numpy(), "output_weight_lora_b": b.half().numpy()}
    found = read_gguf_adapter(_foreign(tmp_path / "x.gguf", 5.0, False, **names))
    torch.testing.assert_close(found.deltas["lm_head"].B, 2.5 * b.half().float())


def test_heads_come_from_the_base_where_the_file_counts_none(tmp_path: Path) -> None:
    a, b = torch.ones(1, 6), torch.arange(8.0)[:, None]
    writer = {"blk.0.attn_q_weight_lora_a": a.numpy(), "blk.0.attn_q_weight_lora_b": b.numpy()}
    path = _foreign(tmp_path / "x.gguf", 1.0, False, **writer)
    with pytest.raises(InputError, match=r"x\.gguf: the rows of its q and k are interleaved"):
        read_gguf_adapter(path)
    found = read_gguf_adapter(path, {"heads": 2}).deltas["model.layers.0.self_attn.q_proj"]
    assert found.B[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("GGUF?")
    with pytest.raises(InputError, match="cannot be read as GGUF"):
        read_gguf_adapter(tmp_path / "text.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type("model")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="is a whole model and no LoRA adapter"):
        read_gguf_adapter(tmp_path / "model.gguf")
    a = torch.ones(1, 6).numpy()
    path = _foreign(tmp_path / "half.gguf", 1.0, False, output_weight_lora_a=a)
    with pytest.raises(InputError, match=r"output\.weight: is no module of llama with both"):
        read_gguf_adapter(path)


def test_modules_and_ranks_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one rank"):
        write_gguf_adapter(
            tmp_path / "x", {**FACTORS, "lm_head": random_lowrank((30, 12), 2, 1)}, (), LAYOUT
        )
    with pytest.raises(InputError, match=r"model\.layers\.7\.mlp\.up_proj: llama\.cpp has no"):
        write_gguf_adapter(
            tmp_path / "x", {"model.layers.7.mlp.up_proj": FACTORS["lm_head"]}, (), LAYOUT
        )
