"""`fedlora export` in a process of its own: what memory merging takes, and what a person sees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.adapters.aggregate import save_adapter
from support.merging import made
from support.models import save_tokenizer

LAYERS, WIDTH = 24, 256
SHARD = 10**7

_MEASURE = """
import json, sys
from fedlora.commands.cli import main

adapter, output, shard = sys.argv[1:]
words = ["export", adapter, "--held_out", "false", "--use_cpu", "true"]
words += ["--format", "merged", "--check", "weights", "--max_shard_size", shard]

def kilobytes(name):
    lines = dict(x.split(":", 1) for x in open("/proc/self/status") if ":" in x)
    return int(lines[name].split()[0])

assert main([*words, "--output", output + "-first"]) == 0  # loads every library there is to load
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = kilobytes("VmRSS")
assert main([*words, "--output", output]) == 0
print(json.dumps({"grown": 1024 * (kilobytes("VmHWM") - before)}))
"""


@pytest.fixture(scope="module")
def several_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of 100 MB in files of 10 MB, and an adapter of all its attention layers."""
    path = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path / "base", max_shard_size="10MB")
    save_tokenizer(path / "base")
    parts = {
        f"model.layers.{i}.self_attn.{end}": ((WIDTH, WIDTH), 4)
        for i in range(LAYERS)
        for end in ("q_proj", "v_proj")
    }
    save_adapter(path / "adapter", made(parts, base_model_name_or_path=str(path / "base")))
    return path / "base", path / "adapter"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts peaks there")
def test_merging_takes_the_memory_of_a_shard_or_two(
    several_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = several_shards
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(adapter), str(tmp_path / "out"), str(SHARD)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])["grown"]
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    total = sum(file.stat().st_size for file in base.glob("model-*.safetensors"))
    assert len(files) > 8
    assert total > 9 * SHARD
    assert grown < 2 * SHARD, f"{grown / 1e6:.1f} MB for shards of {SHARD / 1e6:.0f} MB"
    assert "compared by its weights, not by logits" in done.stdout
