"""Adapters that others have published are aggregated, read by hand as the judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
)

from fedlora import aggregate, load_adapter
from fedlora.adapters.saved_adapter import CONFIG_NAME, WEIGHTS_NAME
from fedlora.lowrank import total_norm
from support.merging import (
    Dense64,
    add_to,
    change_config,
    cli,  # noqa: F401
    effect,
    logits,
    refused,
    same_effect,
    weighted,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


EMOTION = ("r8-alpha10", "r8-alpha32", "r8-alpha8-large-norm", "r16-alpha32")


@pytest.fixture(scope="module")
def big_gpt2() -> Any:
    """A random classifier of GPT-2's size, with few words."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=64,
        num_labels=6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2ForSequenceClassification(config).eval()


def read_by_hand(path: Path, only: str = "") -> tuple[Dense64, Tensor]:
    """Updates `alpha / r B A` (of some layers) and head of a published adapter, in float64."""
    config = json.loads((path / CONFIG_NAME).read_text())
    if (path / WEIGHTS_NAME).exists():
        tensors = load_file(path / WEIGHTS_NAME)
    else:
        tensors = torch.load(path / "adapter_model.bin", map_location="cpu", weights_only=True)
    deltas, start = {}, "base_model.model."
    for key, a in tensors.items():
        if ".lora_A." in key and only in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix(start).removesuffix(".lora_A.weight")
            deltas[name] = config["lora_alpha"] / config["r"] * (b.double() @ a.double())
    return deltas, tensors[f"{start}score.weight"].double()


def test_the_four_emotion_adapters_combine(
    material: Path, big_gpt2: Any, tmp_path: Path, cli: Any
) -> None:
    paths = [material / "adapters" / f"gpt2-emotion-{name}" for name in EMOTION]
    norms = [total_norm(load_adapter(p).deltas) for p in paths]
    assert norms[2] == pytest.approx(121.9, abs=0.1)
    assert all(2 < x < 11 for i, x in enumerate(norms) if i != 2)

    weights = [0.4, 0.3, 0.05, 0.25]
    done = cli(*paths, "--output", tmp_path / "out", "--weights", *weights)
    assert done.code == 0, done.err
    assert done.out.count("transformer.h.") == 12
    assert "saved whole and averaged: score.weight" in done.out
    hands = [read_by_hand(p) for p in paths]
    wanted = weighted([h[0] for h in hands], weights)
    found = load_adapter(tmp_path / "out")
    assert found.config["base_model_name_or_path"] == "openai-community/gpt2"
    assert {x.rank for x in found.deltas.values()} == {8 + 8 + 8 + 16}
    same_effect(effect(found), wanted)
    head = sum(w * h[1] for w, h in zip(weights, hands, strict=True))
    assert isinstance(head, Tensor)
    torch.testing.assert_close(found.dense["score.weight"], head.float())

    # With equal weights the large one is nearly all of the sum.
    equal = aggregate([load_adapter(p) for p in paths])
    assert total_norm(equal.deltas) == pytest.approx(norms[2] / 4, rel=0.02)
    low = aggregate([load_adapter(p) for p in paths], weights, energy=0.9)
    name = "transformer.h.5.attn.c_attn"
    squares = torch.linalg.svdvals(wanted[name]).square()
    fewest = int((squares.cumsum(0) / squares.sum() < 0.9).sum()) + 1
    assert low.layers[name].rank == fewest < 40
    error = float((squares[fewest:].sum() / squares.sum()).sqrt())
    assert low.layers[name].error == pytest.approx(error, rel=1e-3)

    before = logits(big_gpt2)
    loaded = PeftModel.from_pretrained(big_gpt2, tmp_path / "out")
    theirs = logits(loaded)
    plain = loaded.unload()  # without the adapter, but with the head
    ours = logits(add_to(plain, wanted))
    add_to(plain, {n: -x for n, x in wanted.items()})
    assert (ours - before).abs().max() > 0.01
    torch.testing.assert_close(plain.score.weight, head.float())
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("other", ["gpt2-spam-r1-alpha1", "gpt2-tomatoes-r8-two-targets"])
def test_heads_of_other_tasks_do_not_join(
    other: str, material: Path, tmp_path: Path, cli: Any
) -> None:
    paths = [material / "adapters" / f"gpt2-emotion-{EMOTION[0]}", material / "adapters" / other]
    done = cli(*paths, "--output", tmp_path / "out")
    refused(done, r"score\.weight: .*\(2, 768\) and \(6, 768\)", tmp_path / "out")


def test_two_of_two_labels_and_different_targets_combine(
    material: Path, tmp_path: Path, cli: Any
) -> None:
    names = ("gpt2-spam-r1-alpha1", "gpt2-tomatoes-r8-two-targets")
    paths = [material / "adapters" / name for name in names]
    assert cli(*paths, "--output", tmp_path / "out").code == 0
    found = load_adapter(tmp_path / "out")
    hands = [read_by_hand(p, only=".11.") for p in paths]
    same_effect(
        {n: x for n, x in effect(found).items() if ".11." in n}, weighted([h[0] for h in hands])
    )
    assert len(found.deltas) == 36
    layers = aggregate([load_adapter(p) for p in paths]).layers
    assert layers["transformer.h.3.attn.c_attn"].ranks == (1, 8)
    assert layers["transformer.h.3.mlp.c_proj"].ranks == (None, 8)
    torch.testing.assert_close(
        found.dense["score.weight"], ((hands[0][1] + hands[1][1]) / 2).float()
    )


def test_the_untrained_one_with_a_missing_head(material: Path, tmp_path: Path, cli: Any) -> None:
    odd = material / "adapters" / "gpt2-untrained-r16-missing-head"
    other = material / "adapters" / f"gpt2-emotion-{EMOTION[3]}"
    done = cli(odd, other, "--output", tmp_path / "out")
    refused(done, "modules_to_save names classifier, but there are no such", tmp_path / "out")
    # As the message advises.
    shutil.copytree(odd, tmp_path / "mended")
    change_config(tmp_path / "mended", modules_to_save=None)
    assert cli(tmp_path / "mended", other, "--output", tmp_path / "out").code == 0
    found = load_adapter(tmp_path / "out")
    hand, head = read_by_hand(other)
    same_effect(effect(found), {n: x / 2 for n, x in hand.items()})
    torch.testing.assert_close(found.dense["score.weight"], head.float())
    assert found.config["task_type"] == "SEQ_CLS"


def test_the_original_layout_of_loralib(material: Path, tmp_path: Path, cli: Any) -> None:
    odd = material / "adapters" / "roberta-mnli-r8-not-peft"
    done = cli(odd, "--output", tmp_path / "out")
    refused(done, r"loralib's format, which does not say alpha; put an adapter_config\.json")
    # With what it was trained with beside it, it is read; its head too.
    (tmp_path / "odd").mkdir()
    shutil.copy(odd / "roberta_base_lora_mnli.bin", tmp_path / "odd")
    config = {"r": 8, "lora_alpha": 16, "task_type": "SEQ_CLS"}
    (tmp_path / "odd" / CONFIG_NAME).write_text(json.dumps(config))
    assert cli(tmp_path / "odd", "--output", tmp_path / "out").code == 0
    found = load_adapter(tmp_path / "out")
    raw = torch.load(odd / "roberta_base_lora_mnli.bin", map_location="cpu", weights_only=True)
    name = "roberta.encoder.layer.3.attention.self.value"
    wanted = 2 * raw[f"{name}.lora_B"].double() @ raw[f"{name}.lora_A"].double()
    torch.testing.assert_close(effect(found)[name], wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(found.dense["classifier.out_proj.weight"], raw["classifier.out_proj.weight"])
