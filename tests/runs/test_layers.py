"""Runs of models with layers that adapters cannot or must not go into."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

import fedlora
from fedlora.errors import InputError
from support.layers import (
    ROUTERS,
    data,  # noqa: F401
    models,  # noqa: F401
)


def train(model: Path, data: Path, out: Path, **more: Any) -> tuple[fedlora.Result, list[str]]:
    """Three rounds of two clients, and what the user was warned of."""
    keys = {
        "model_name_or_path": str(model),
        "train_file": str(data / "text_*.jsonl"),
        "eval_file": str(data / "eval.jsonl"),
        "client_ranks": [3, 2],
        "num_rounds": 3,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_exact_match": False,
        "use_cpu": True,
        "num_threads": 1,
        "dtype": "float32",
        "output_dir": str(out),
    }
    told: list[str] = []

    def report(event: Any) -> None:
        if event["event"] == "warning":
            told.append(event["message"])

    return fedlora.run(fedlora.Config(**{**keys, **more}), report=report), told


def loss_by_peft(model: Path, adapter: Path, data: Path, merged: bool = True) -> float:
    """Nats per completion token of the held-out rows in float64, by transformers and PEFT."""
    base = hf.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, experts_implementation="eager"
    )
    theirs = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).double().eval()
    theirs = theirs.merge_and_unload() if merged else theirs
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    total, count = 0.0, 0
    for line in (data / "eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = theirs(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
        count += ids.shape[1] - len(prompt)
    return total / count


@pytest.mark.parametrize("name", ["falcon", "falcon_new"])
@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_what_lies_frozen_beside_a_subclass_is_evaluated(
    name: str,
    dtype: str,
    within: float,
    models: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
) -> None:
    """flora has everything it learnt frozen beside the base: PEFT's merge must have the loss."""
    result, told = train(models(name), data, tmp_path / "out", method="flora", dtype=dtype)
    losses = [found["loss"] for found in result.evaluations.values()]
    for number in (1, 2, 3):
        adapter = result.output_dir / f"round-{number}"
        expected = loss_by_peft(models(name), adapter, data)
        assert losses[number] == pytest.approx(expected, abs=within), number
    assert losses[3] < losses[0] - 0.05
    assert not told


def router_of(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if "Router" in type(m).__name__]


@pytest.mark.parametrize("name", ROUTERS)
def test_all_linear_leaves_out_routers_that_give_tuples(
    name: str, models: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    result, told = train(models(name), data, tmp_path / "out", num_rounds=2)
    model = hf.AutoModelForCausalLM.from_pretrained(models(name))
    routers = router_of(model)
    assert routers
    assert not set(routers) & set(result.adapter)
    assert {n for n in result.adapter if n.endswith("q_proj")}
    assert len([w for w in told if routers[0] in w and "tuple" in w]) == 1
    expected = loss_by_peft(models(name), result.final_dir, data)
    assert result.evaluations[2]["loss"] == pytest.approx(expected, abs=1e-5)
    assert result.evaluations[2]["loss"] < result.evaluations[0]["loss"]
    # PEFT takes the router, and then fails as soon as it runs.
    theirs = get_peft_model(model, LoraConfig(target_modules=["router"]))
    with pytest.raises(AttributeError, match="tuple"):
        theirs(input_ids=torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("wanted", [["router"], ["q_proj", "router"], r".*\.(router|q_proj)"])
def test_a_router_that_is_named_is_refused_before_training(
    name: str, wanted: Any, models: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"lora_target_modules: .*router gives a tuple .*q_proj"):
        train(models(name), data, tmp_path / "out", lora_target_modules=wanted)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "ends"), [("jamba", ("dt_proj",)), ("bloom", ("dense", "dense_4h_to_h"))]
)
def test_architectures_that_read_weights_past_their_layers(
    name: str,
    ends: tuple[str, ...],
    models: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
) -> None:
    result, told = train(models(name), data, tmp_path / "out", num_rounds=1)
    assert not [n for n in result.adapter if n.endswith(ends)]
    assert [w for w in told if ends[0] in w and "read past the layer" in w]
    expected = loss_by_peft(models(name), result.final_dir, data)
    assert result.evaluations[1]["loss"] == pytest.approx(expected, abs=1e-5)
    for end in ends:
        with pytest.raises(InputError, match=rf"lora_target_modules: .*{end} has its weight read"):
            train(models(name), data, tmp_path / "no", lora_target_modules=[end])
