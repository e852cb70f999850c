"""What benchmarks/round.py trains: model shapes, tokenizers, rows, and the settings of each.

`prepare` writes all of it into a scratch directory: the model, `rows-K.json` (tokens and labels of
client K) and `spec.json`, from which every case is run in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOLLY = ROOT.parent / "shared" / "material" / "datasets" / "dolly_fed10"
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
VOCABULARY = 32_000
SPECIAL = ("<pad>", "<s>", "</s>")
LONG_ROWS = 8
"""Rows of full length each client has in the memory cases."""


@dataclass(frozen=True)
class Llama:
    """A Llama's shape; the head is tied to the embedding where `kv_heads` is `heads`."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Setting:
    """A model of the benchmark and how it is trained.

    Args:
        title: for the table.
        shape: None: the embedded model, as its configuration trains it.
        data: "embedded", "dolly" or "synthetic" (every row of full length).
        dtype: of the base in the same-dtype comparison.
        rounds, steps: of the run; steps of each client and round.
    """

    title: str
    shape: Llama | None
    data: str
    dtype: str
    rounds: int
    steps: int
    batch: int = 4
    max_length: int = 512
    learning_rate: float = 3e-4


SETTINGS = {
    "embedded": Setting("embedded default (0.8 M)", None, "embedded", "float32", 5, 20),
    "22m": Setting("Llama 22 M, Dolly", Llama(384, 6, 1024, 6, 6), "dolly", "float32", 2, 5),
    "110m": Setting("Llama 110 M, Dolly", Llama(768, 12, 2048, 12, 12), "dolly", "float32", 2, 2),
    "1.1b": Setting(
        "Llama 1.1 B, 4 x 512", Llama(2048, 22, 5632, 32, 4), "synthetic", "bfloat16", 3, 20
    ),
    "tiny": Setting(
        "tiny Llama, 4 x 32", Llama(64, 2, 128, 4, 2), "synthetic", "bfloat16", 2, 2, max_length=32
    ),
}


def unavailable(name: str) -> str:
    """Why a model cannot be measured here; empty if it can."""
    if SETTINGS[name].data == "dolly" and not DOLLY.is_dir():
        return "the real material (../shared/material/datasets/dolly_fed10) is not on this machine"
    return ""


def prepare(name: str, scratch: Path, rounds: int, steps: int, dtype: str, threads: int) -> None:
    """Write model, rows and settings of a model.

    Args:
        name: of `SETTINGS`.
        scratch: a directory that is made; its `spec.json` is what a case reads.
        rounds, steps, dtype, threads: of every case (threads 0: torch's own choice).
    """
    from fedlora import Config
    from fedlora.config.sources import layered
    from fedlora.config.yaml_file import read_yaml
    from fedlora.embedded import CONFIG
    from fedlora.runs.session import assemble, model_source

    setting = SETTINGS[name]
    scratch.mkdir(parents=True)
    values: dict[str, Any] = {
        "method": "flora",
        "client_ranks": list(RANKS),
        "lora_target_modules": "all-linear",
        "lora_alpha": "2r",
        "lr_scheduler_type": "constant",
        "num_rounds": rounds,
        "max_steps": steps,
        "seed": 42,
        "eval_rounds": 0,
        "eval_exact_match": False,
        "metric_for_best_model": "eval_loss",
        "num_threads": threads or None,
    }
    if setting.shape is None:
        # Peers evaluate nothing; one row is the least that this data set holds out.
        values = layered(read_yaml(CONFIG), {**values, "max_eval_samples": 1})
    else:
        values |= {
            "per_device_train_batch_size": setting.batch,
            "learning_rate": setting.learning_rate,
            "max_length": setting.max_length,
            "model_name_or_path": str(scratch / "model"),
        }
        values |= _dolly(scratch) if setting.data == "dolly" else synthetic(scratch, setting)
        save_model(setting.shape, setting.max_length, scratch / "model", setting.dtype)
    config = Config(**values)
    source, session = model_source(config), assemble(config, weights=False)
    for client, part in enumerate(session.data.clients):
        rows = [{key: list(row[key]) for key in ("input_ids", "labels")} for row in part.train]
        (scratch / f"rows-{client}.json").write_text(json.dumps(rows))
    if setting.data == "dolly":
        _long_rows(scratch, session, setting.max_length)
    model = session.base.model.config
    spec = {
        "name": name,
        "title": setting.title,
        "scratch": str(scratch),
        "model": source.name,
        "config": values,
        "dtype": dtype,
        "threads": threads,
        "rounds": rounds,
        "steps": steps,
        "batch": session.config.per_device_train_batch_size,
        "learning_rate": session.config.learning_rate,
        "ranks": list(RANKS),
        "seed": session.config.seed,
        "shapes": session.base.targets.shapes,
        "parameters": sum(p.numel() for p in session.base.model.parameters()),
        "hidden": model.hidden_size,
        "layers": model.num_hidden_layers,
        "attention": model.num_attention_heads * model.head_dim,
        "vocabulary": model.vocab_size,
        "long_rows": setting.data == "dolly",
    }
    (scratch / "spec.json").write_text(json.dumps(spec))


def rows_of(spec: dict[str, Any], client: int) -> list[dict[str, list[int]]]:
    """The tokenised rows of a client: `input_ids`, `labels`."""
    path = Path(spec["scratch"]) / f"rows-{client}.json"
    found: list[dict[str, list[int]]] = json.loads(path.read_text())
    return found


def drawn(spec: dict[str, Any], client: int, round: int) -> Iterator[int]:
    """Row numbers in the order a client trains on them in a round, epoch after epoch, for ever."""
    from fedlora.seeds import Purpose, generator

    rng = generator(spec["seed"], round, client, Purpose.BATCHES)
    number = len(rows_of(spec, client))
    while True:
        yield from rng.permutation(number).tolist()


def trained_rows(spec: dict[str, Any], client: int, round: int) -> list[dict[str, list[int]]]:
    """The rows a client trains on in a round. An epoch's last batch may be smaller."""
    rows, order = rows_of(spec, client), drawn(spec, client, round)
    out: list[dict[str, list[int]]] = []
    left = len(rows)
    for _ in range(spec["steps"]):
        size = min(spec["batch"], left)
        out += [rows[next(order)] for _ in range(size)]
        left = left - size or len(rows)
    return out


def save_model(shape: Llama, context: int, path: Path, dtype: str) -> None:
    """Random weights, made on the GPU where there is one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(context, 64),
        tie_word_embeddings=shape.heads == shape.kv_heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(path)


def save_tokenizer(core: Any, path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    pad, begin, end = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, bos_token=begin, eos_token=end
    ).save_pretrained(path)


def _dolly_rows() -> Iterator[dict[str, str]]:
    for client in range(len(RANKS)):
        yield from json.loads((DOLLY / f"local_training_{client}.json").read_text())


def _dolly(scratch: Path) -> dict[str, Any]:
    """Dolly divided by category, with a byte-level BPE trained on its own texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = (row[key] for row in _dolly_rows() for key in ("instruction", "context", "response"))
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    save_tokenizer(core, scratch / "model")
    # A few hundred rows keep the distribution of lengths and spare tokenising all of them.
    return {
        "train_file": str(DOLLY / "local_training_*.json"),
        "template": "alpaca",
        "max_train_samples": 256,
    }


def synthetic(scratch: Path, setting: Setting) -> dict[str, Any]:
    """Rows of random words, a token each: a quarter prompt, cut at `max_length`."""
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCABULARY))]
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save_tokenizer(core, scratch / "model")
    rng = np.random.default_rng(0)
    prompt = setting.max_length // 4
    for client in range(len(RANKS)):
        lines = []
        for _ in range(setting.batch * 8):
            text = [words[i] for i in rng.integers(len(SPECIAL), VOCABULARY, setting.max_length)]
            row = {"prompt": " ".join(text[:prompt]) + " ", "completion": " ".join(text[prompt:])}
            lines.append(json.dumps(row))
        (scratch / f"site_{client}.jsonl").write_text("\n".join(lines) + "\n")
    return {"train_file": str(scratch / "site_*.jsonl"), "template": "prompt_completion"}


def _long_rows(scratch: Path, session: Any, max_length: int) -> None:
    """Files `long_K.jsonl` of rows that fill `max_length`, so that every batch is as large."""
    from fedlora.data.templates import TEMPLATES

    tokenizer, render = session.base.tokenizer, TEMPLATES["alpaca"].render
    found: list[str] = []
    for row in _dolly_rows():
        prompt, completion = render(row)
        if len(prompt) + len(completion) < max_length:  # a token is a character or more
            continue
        own = len(tokenizer(prompt)["input_ids"])
        if own <= max_length // 2 and own + len(tokenizer(completion)["input_ids"]) >= max_length:
            found.append(json.dumps(row))
        if len(found) == LONG_ROWS * len(RANKS):
            break
    for client in range(len(RANKS)):
        own_rows = found[client :: len(RANKS)]
        (scratch / f"long_{client}.jsonl").write_text("\n".join(own_rows) + "\n")
