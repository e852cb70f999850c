"""Names of modules from before a refactoring, of bare models and inside wrappers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedlora import InputError, aggregate, load_adapter, save_adapter
from fedlora.adapters.saved_adapter import CONFIG_NAME, WEIGHTS_NAME
from support.adapter_names import (
    LANGUAGE,
    LLAMA,
    OLD,
    llama,
    multimodal,
    respelt,
    saved,
)
from support.merging import (
    change_config,
    cli,  # noqa: F401
    peft_effect,
    randomise,
    refused,
    same_effect,
    weighted,
)


@pytest.mark.slow
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


PRE = "base_model.model."


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda k: k.replace(PRE, f"{PRE}_orig_mod."),
    "compiled outside": lambda k: f"_orig_mod.{k}",
    "compiled layers": lambda k: re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", k),
    "data parallel": lambda k: f"module.{k}",
    "data parallel inside": lambda k: k.replace(PRE, f"{PRE}module."),
    "fsdp": lambda k: (
        f"_fsdp_wrapped_module.{k.replace('self_attn.', '_fsdp_wrapped_module.self_attn.')}"
    ),
    "checkpointed": lambda k: k.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "a trainer's module": lambda k: f"model.{k}",
    "the prefix twice": lambda k: PRE + k,
    "the adapter's name": lambda k: k.replace("lora_A.", "lora_A.default.").replace(
        "lora_B.", "lora_B.default."
    ),
    "another adapter's name": lambda k: k.replace("lora_A.", "lora_A.site_3.").replace(
        "lora_B.", "lora_B.site_3."
    ),
    "several at once": lambda k: (
        "module._orig_mod."
        + k.replace("layers.", "_fsdp_wrapped_module.layers.").replace("lora_A.", "lora_A.x.")
    ),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_models(case: str, tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{i}", llama(), i) for i in range(2)]
    wanted = weighted([peft_effect(llama(), p) for p in paths])
    respelt(paths[1], WRAPPED[case])
    out = aggregate([load_adapter(p) for p in paths])
    assert {len(layer.ranks) for layer in out.layers.values()} == {2}
    assert all(None not in layer.ranks for layer in out.layers.values())
    save_adapter(tmp_path / "out", out)
    same_effect(peft_effect(llama(), tmp_path / "out"), wanted)
    # One alone, of unequal ranks after a cut, is written as PEFT loads it too.
    save_adapter(tmp_path / "alone", load_adapter(paths[1]))
    assert peft_effect(llama(), tmp_path / "alone").keys() == wanted.keys()


def test_full_names_of_a_wrapped_model(tmp_path: Path) -> None:
    """`target_modules` names them as they were then."""
    one = saved(tmp_path / "0", llama(), 0, target_modules=["model.layers.1.self_attn.q_proj"])
    wanted = peft_effect(llama(), one)
    respelt(one, lambda k: k.replace(PRE, f"{PRE}_orig_mod."))
    change_config(one, target_modules=["_orig_mod.model.layers.1.self_attn.q_proj"])
    save_adapter(tmp_path / "out", aggregate([load_adapter(one)]))
    same_effect(peft_effect(llama(), tmp_path / "out"), wanted)


def test_old_names_alone_are_written_as_today(tmp_path: Path) -> None:
    """Ranks by module are matched with today's names, so old ones would not load."""
    path = saved(
        tmp_path / "a",
        multimodal("gemma3"),
        1,
        target_modules=LANGUAGE,
        rank_pattern={r"model\.language_model\.layers\.0\.self_attn\.q_proj": 3},
    )
    wanted = peft_effect(multimodal("gemma3"), path)
    respelt(path, OLD["gemma3"])
    change_config(
        path,
        rank_pattern={r"language_model\.model\.layers\.0\.self_attn\.q_proj": 3},
        target_modules=r".*language_model\.model.*\.(q_proj|v_proj)",
    )
    save_adapter(tmp_path / "out", aggregate([load_adapter(path)]))
    same_effect(peft_effect(multimodal("gemma3"), tmp_path / "out"), wanted)


def heads(kind: str) -> Any:
    """A random classifier of two labels."""
    torch.manual_seed(4)
    shape = {**LLAMA, "num_labels": 2, "max_position_embeddings": 64}
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**shape)).eval()
    if kind == "llama":
        return AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model("llama", **shape, pad_token_id=0)
        ).eval()
    return RobertaForSequenceClassification(RobertaConfig(**shape)).eval()


def raw_copy(path: Path, model: Any, adapter: str, prefix: str = "", all_of_it: bool = True) -> Any:
    """A whole state dict, as trainers save it, with the configuration beside it."""
    state = {f"{prefix}{k}": v.clone() for k, v in model.state_dict().items()}
    if not all_of_it:
        state = {
            k: v
            for k, v in state.items()
            if "lora_" in k or "modules_to_save" in k or "original" in k
        }
    path.mkdir()
    torch.save(state, path / "adapter_model.bin")
    model.peft_config[adapter].save_pretrained(path)
    return model


@pytest.mark.parametrize("adapter", ["default", "site_a"])
@pytest.mark.parametrize("all_of_it", [True, False])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_state_dicts_saved_raw(kind: str, all_of_it: bool, adapter: str, tmp_path: Path) -> None:
    """The trained copy is taken; what it is a copy of, and the base, are not."""
    targets = ["q_proj"] if kind == "llama" else ["query"]
    models = []
    for i in range(2):
        config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets)
        model = get_peft_model(heads(kind), config, adapter_name=adapter)
        randomise(model, i)
        models.append(model)
    (tmp_path / "0").mkdir()
    models[0].save_pretrained(tmp_path / "0")
    clean = tmp_path / "0" if adapter == "default" else tmp_path / "0" / adapter
    raw_copy(tmp_path / "1", models[1], adapter, all_of_it=all_of_it)
    out = aggregate([load_adapter(clean), load_adapter(tmp_path / "1")], [1, 3])
    assert all("embed" in name for name in out.base)
    save_adapter(tmp_path / "out", out)
    loaded = PeftModel.from_pretrained(heads(kind), tmp_path / "out")
    means: dict[str, Tensor] = {}
    for (name, one), other in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        if ".modules_to_save." in name:
            means[name.replace(f".{adapter}.", ".default.")] = 0.25 * one + 0.75 * other
    there = dict(loaded.state_dict())
    assert means
    for name, mean in means.items():
        torch.testing.assert_close(there[name], mean, rtol=1e-5, atol=1e-6)
    assert len(out.deltas) == 2
    assert all(None not in layer.ranks for layer in out.layers.values())


def test_heads_without_pefts_prefix(tmp_path: Path) -> None:
    paths = [
        saved(tmp_path / f"{i}", heads("bert"), i, task_type="SEQ_CLS", target_modules=["query"])
        for i in range(2)
    ]
    wanted = [load_adapter(p).dense["classifier.weight"] for p in paths]
    respelt(paths[1], lambda k: k.removeprefix(PRE) if "classifier" in k else k)
    out = aggregate([load_adapter(p) for p in paths])
    torch.testing.assert_close(out.dense["classifier.weight"], (wanted[0] + wanted[1]) / 2)


def test_a_head_that_only_its_key_names(tmp_path: Path) -> None:
    """Neither the task nor `modules_to_save` says it; the result's configuration does."""
    path = saved(tmp_path / "a", heads("bert"), 1, task_type="SEQ_CLS", target_modules=["query"])
    head = load_adapter(path).dense["classifier.weight"]
    respelt(path, lambda k: k.replace("classifier.", "classifier.modules_to_save.default."))
    change_config(path, task_type=None, modules_to_save=None)
    save_adapter(tmp_path / "out", aggregate([load_adapter(path)]))
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["modules_to_save"] == [
        "classifier"
    ]
    loaded = PeftModel.from_pretrained(heads("bert"), tmp_path / "out")
    torch.testing.assert_close(
        loaded.base_model.model.classifier.modules_to_save["default"].weight, head
    )


def test_several_adapters_in_one_file(tmp_path: Path, cli: Any) -> None:
    model = get_peft_model(heads("bert"), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model.add_adapter("other", LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    raw_copy(tmp_path / "a", model, "default")
    done = cli(tmp_path / "a", "--output", tmp_path / "out")
    refused(done, r"hold several adapters \(default, other\); save one", tmp_path / "out")


def test_an_adapter_in_a_subdirectory_is_pointed_to(tmp_path: Path, cli: Any) -> None:
    saved(tmp_path / "a" / "site", llama(), 1)
    refused(cli(tmp_path / "a", "--output", tmp_path / "o"), "expected a PEFT directory, as site")


def test_a_raw_state_dict_of_another_base_is_refused(tmp_path: Path) -> None:
    """It repeats the base's weights, which are the base's fingerprint."""
    for i in range(2):
        torch.manual_seed(i)
        base = LlamaForCausalLM(LlamaConfig(**LLAMA))
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
        raw_copy(tmp_path / f"{i}", model, "default")
    with pytest.raises(InputError, match="repeat this weight of the base, and 100 of its 100 rows"):
        aggregate([load_adapter(tmp_path / f"{i}") for i in range(2)])


def test_a_causal_model_loads_as_before(tiny_llama: Path, tmp_path: Path) -> None:
    """Names that are right are left alone, and no base is built for them."""
    path = saved(tmp_path / "a", AutoModelForCausalLM.from_pretrained(tiny_llama), 1)
    out = aggregate([load_adapter(path)] * 2)
    assert out.deltas.keys() == load_adapter(path).deltas.keys()
