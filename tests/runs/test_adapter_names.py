"""Names of modules from before a refactoring, of bare models and inside wrappers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora import InputError, aggregate, load_adapter
from fedlora.adapters.saved_adapter import WEIGHTS_NAME
from support.adapter_names import LANGUAGE, OLD, llama, multimodal, respelt, saved
from support.merging import (
    change_config,
    cli,  # noqa: F401
    peft_effect,
    refused,
    same_effect,
    weighted,
)


@pytest.mark.parametrize("known", ["auto_mapping", "config.json", "base", "nothing"])
@pytest.mark.parametrize("kind", sorted(OLD))
def test_names_from_before_a_refactoring(kind: str, known: str, tmp_path: Path, cli: Any) -> None:
    """PEFT reads the old names as today's, and so do we."""
    task = None if known == "auto_mapping" else "CAUSAL_LM"
    paths = [
        saved(
            tmp_path / f"{i}", multimodal(kind), i, task_type=task, target_modules=LANGUAGE, r=i + 2
        )
        for i in range(2)
    ]
    effects = [peft_effect(multimodal(kind), p) for p in paths]
    respelt(paths[1], OLD[kind])
    if kind != "qwen2_vl":  # whose old names this PEFT does not read any more
        same_effect(peft_effect(multimodal(kind), paths[1]), effects[1])
    if known == "config.json":
        multimodal(kind).config.save_pretrained(paths[0])
    if known == "base":
        multimodal(kind).save_pretrained(tmp_path / "base")
        change_config(paths[1], base_model_name_or_path=str(tmp_path / "base"))
    done = cli(*paths, "--output", tmp_path / "out", "--weights", 1, 3)
    if known == "nothing" and kind == "qwen2_vl":
        # `model.layers` is what a text model by itself calls them.
        refused(done, "look like one module under two names", tmp_path / "out")
        assert "model.layers.0.self_attn" in done.err
        assert "model.language_model.layers.0.self_attn" in done.err
        return
    assert done.code == 0, done.err
    assert len(load_adapter(tmp_path / "out").deltas) == 4
    same_effect(peft_effect(multimodal(kind), tmp_path / "out"), weighted(effects, [1, 3]))


def test_a_bare_model_beside_one_with_a_head(tmp_path: Path, cli: Any) -> None:
    """`AutoModel` calls a module `layers.0`, `AutoModelForCausalLM` the same `model.layers.0`."""
    paths = [
        saved(tmp_path / "0", llama(), 0),
        saved(tmp_path / "1", llama().model, 1),
    ]
    for path in paths:
        change_config(path, auto_mapping=None, base_model_name_or_path="org/none")
    done = cli(*paths, "--output", tmp_path / "out")
    refused(done, "look like one module under two names", tmp_path / "out")
    assert re.search(r"model\.layers\.0\S+ \(\S+0\) and layers\.0\S+ \(\S+1\)", done.err)
    # As the message advises.
    llama().config.save_pretrained(paths[0])
    assert cli(*paths, "--output", tmp_path / "out").code == 0
    assert len(load_adapter(tmp_path / "out").deltas) == 4
    wanted = [peft_effect(llama(), paths[0]), peft_effect(llama().model, paths[1])]
    wanted[1] = {f"model.{name}": x for name, x in wanted[1].items()}
    same_effect(peft_effect(llama(), tmp_path / "out"), weighted(wanted))


def test_a_part_that_a_wrapper_put_into_a_layer_is_not_another_module(
    tmp_path: Path, cli: Any
) -> None:
    """Known wrappers are taken out of names; of an unknown one is asked, and nothing halved."""
    one, other = (saved(tmp_path / str(seed), llama(), seed) for seed in (1, 2))
    wanted = aggregate([load_adapter(one), load_adapter(other)])
    tensors = load_file(other / WEIGHTS_NAME)

    def rename(part: str) -> None:
        renamed = {re.sub(r"(layers\.\d+)", rf"\1.{part}", key): t for key, t in tensors.items()}
        save_file(renamed, other / WEIGHTS_NAME)

    rename("_fpw_module")
    found = aggregate([load_adapter(one), load_adapter(other)])
    assert found.deltas.keys() == wanted.deltas.keys()
    for name, x in wanted.deltas.items():
        assert torch.equal(found.deltas[name].B @ found.deltas[name].A, x.B @ x.A)
    rename("inner")
    for method in ("exact", "fedit", "flexlora"):
        with pytest.raises(InputError, match=r"layers\.0\.inner\.self_attn.* one module under two"):
            aggregate([load_adapter(one), load_adapter(other)], method=method)
    done = cli(one, other, "--output", tmp_path / "out")
    refused(done, "look like one module under two names", tmp_path / "out")
