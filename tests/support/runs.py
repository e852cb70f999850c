"""Makes short runs, and measures by PEFT and transformers alone what they have saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedlora
from fedlora import Config
from fedlora.client.local_training import LocalTraining
from fedlora.data.datasets import load_data
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.runs.results import Result

OPTIONS = ("train_function", "callbacks", "report")
"""Arguments of `fedlora.run` that are no keys of a configuration."""


def run(values: Mapping[str, Any], name: str = "out", **changes: Any) -> Result:
    """Run with some keys changed, into a directory of that name; options of `run` go through."""
    options = {key: changes.pop(key) for key in OPTIONS if key in changes}
    where = str(Path(values["output_dir"]).with_name(name))
    return fedlora.run(Config(**{**values, **changes, "output_dir": where}), **options)


def nothing(model: Any, dataset: Sequence[Tokens], training: LocalTraining) -> dict[str, Any]:
    """A local training that leaves everything as it is."""
    return {}


def evaluation_rows(values: Mapping[str, Any]) -> Sequence[Tokens]:
    """The common held-out rows of a run."""
    tokenizer = AutoTokenizer.from_pretrained(values["model_name_or_path"])
    return load_data(Config(**values), tokenizer).eval


def loss_of(base: str, adapter: Path | None, data: Sequence[Tokens]) -> float:
    """Of an adapter PEFT loads on the untouched base, row by row, by transformers' own loss."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    total, count = 0.0, 0
    for row in data:
        number = sum(label != IGNORE for label in row["labels"][1:])
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])
            )
        total, count = total + float(out.loss) * number, count + number
    return total / count


def given_adapter(base: str, path: Path, **options: Any) -> Path:
    """An adapter of PEFT's own, both factors random."""
    torch.manual_seed(8)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", **options),
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.5 * torch.randn(p.shape))
    model.save_pretrained(path)
    return path


def timeless(x: Any, *others: str) -> Any:
    """Lines of a run's log without what depends on the clock, and without other fields."""
    if isinstance(x, dict):
        left_out = ("seconds", "started", *others)
        return {k: timeless(v, *others) for k, v in x.items() if k not in left_out}
    return [timeless(v, *others) for v in x] if isinstance(x, list) else x
