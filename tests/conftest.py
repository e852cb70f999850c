"""Models and data the tests share: tiny, random, fixed by a seed."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from support.models import LLAMA, save_tokenizer
from support.paths import MATERIAL
from support.rows import rows, write_jsonl
from support.tiers import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_deselected,
    pytest_sessionfinish,
    pytest_testnodedown,
    pytest_unconfigure,
)

# While libraries are imported and tests collected, much is made and little thrown away: looking
# for garbage among it again and again takes a quarter of that time. So no library comes before.
gc.disable()

# Tokens of large data are cached; tests leave the user's cache alone.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="fedlora-tests-")


def pytest_collection_finish() -> None:
    """What the imports made lives to the end; the garbage collector need not look at it again.

    Of several processes the first collects no tests, and so never waits for torch.
    """
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def material() -> Path:
    """Real models, adapters and data beside the repository; skips where they are absent."""
    if not MATERIAL.is_dir():
        pytest.skip("the real material (../shared/material) is not on this machine")
    return MATERIAL


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (2 layers, 32 wide, grouped-query attention) with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            **LLAMA,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 (2 layers, 32 wide, transposed Conv1D layers, no dropout) with a tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    path = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=100,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def site_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `site_0.jsonl` ... `site_3.jsonl` of 24, 16, 12 and 8 rows, `eval.jsonl`."""
    path = tmp_path_factory.mktemp("sites")
    offset = 0
    for site, number in enumerate((24, 16, 12, 8)):
        write_jsonl(path / f"site_{site}.jsonl", rows(number, offset))
        offset += number
    write_jsonl(path / "eval.jsonl", rows(10, 1000))
    return path


@pytest.fixture
def small_run(tiny_llama: Path, site_files: Path, tmp_path: Path) -> dict[str, Any]:
    """Flat keys of a run of half a second: clients of ranks 8, 4, 2, 2; two rounds of three steps.

    Nothing is generated to count exact matches, which would take as long as all the rest.
    """
    return {
        "model_name_or_path": str(tiny_llama),
        "train_file": str(site_files / "site_*.jsonl"),
        "eval_file": str(site_files / "eval.jsonl"),
        "client_ranks": [8, 4, 2, 2],
        "num_rounds": 2,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_exact_match": False,
        "num_threads": 1,
        "output_dir": str(tmp_path / "out"),
    }
