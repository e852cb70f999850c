"""Adapters that PEFT saved are read, and PEFT loads what is saved here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fedlora
from fedlora.adapters.saved_adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_adapter,
    save_tensors,
    write_adapter,
)
from fedlora.errors import CheckpointError
from fedlora.lowrank import Dense, LowRank, to_dense
from fedlora.model.layers import is_conv1d
from fedlora.model.targets import Targets, find_targets
from support.adapters import (
    LLAMA_LINEAR,
    mixed_deltas,
    plain_model,
    random_lowrank,
)
from support.models import load_base


def token_ids() -> Tensor:
    """Two sequences of 12 tokens."""
    return torch.randint(4, 99, (2, 12), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> Tensor:
    """Of `token_ids`, dropout off."""
    model.eval()
    with torch.no_grad():
        out: Tensor = model(input_ids=token_ids()).logits
    return out


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def base_path(request: pytest.FixtureRequest) -> Path:
    """Both shapes of model: linear layers, and GPT-2's transposed ones."""
    path: Path = request.getfixturevalue(request.param)
    return path


def test_peft_loads_what_is_saved_and_gives_our_logits(base_path: Path, tmp_path: Path) -> None:
    base = load_base(str(base_path), target_modules="all-linear")
    deltas = mixed_deltas(base.targets)
    assert {x.rank for x in deltas.values() if isinstance(x, LowRank)} >= {0, 2, 3, 5}
    assert sum(isinstance(x, Dense) for x in deltas.values()) == 1
    write_adapter(tmp_path / "a", deltas, base.targets)
    config = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    assert len(set(config["rank_pattern"].values())) >= 3
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["fan_in_fan_out"] == (base_path.name == "tiny-gpt2")

    untouched = logits(plain_model(base_path))
    theirs = logits(PeftModel.from_pretrained(plain_model(base_path), tmp_path / "a"))
    base.load([deltas])
    ours = logits(base.model)
    assert (ours - untouched).abs().max() > 0.05  # the update matters
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-6)
    # What is loaded as an adapter to train gives the same too.
    factors = load_adapter(tmp_path / "a").deltas
    ranks_apart = {name: factors[name] for name in base.targets.shapes}
    base.load([], ranks_apart, scale=0.25)
    torch.testing.assert_close(logits(base.model), ours, rtol=1e-4, atol=2e-6)


def test_saved_for_some_layers_only(base_path: Path, tmp_path: Path) -> None:
    """Names that also end other modules are written out in full, or PEFT would adapt those too."""
    model = plain_model(base_path)
    everything = find_targets(model, "all-linear", "x")
    wanted = [n for n in everything.shapes if ".1." in n and n.endswith(("down_proj", "mlp.c_fc"))]
    assert len(wanted) == 1
    targets = find_targets(model, wanted, "x")
    assert targets.names == wanted
    deltas = {wanted[0]: random_lowrank(targets.shapes[wanted[0]], 3, 1)}
    write_adapter(tmp_path / "a", deltas, targets)
    loaded = PeftModel.from_pretrained(model, tmp_path / "a")
    adapted = [n for n, _ in loaded.named_modules() if n.endswith("lora_A")]
    assert adapted == [f"base_model.model.{wanted[0]}.lora_A"]


def test_a_saved_update_is_read_back_unchanged(base_path: Path, tmp_path: Path) -> None:
    targets = find_targets(plain_model(base_path), "all-linear", "x")
    deltas = {
        name: random_lowrank(shape, 1 + i % 5, i)
        for i, (name, shape) in enumerate(targets.shapes.items())
    }
    write_adapter(tmp_path / "a", deltas, targets)
    back = load_adapter(tmp_path / "a").deltas
    assert back.keys() == deltas.keys()
    for name, x in deltas.items():
        assert torch.equal(back[name].A, x.A)
        assert torch.equal(back[name].B, x.B)


def test_missing_and_zero_rank_modules_are_read_back_as_zero(
    base_path: Path, tmp_path: Path
) -> None:
    targets = find_targets(plain_model(base_path), "all-linear", "x")
    deltas = mixed_deltas(targets)
    write_adapter(tmp_path / "a", deltas, targets)
    back = load_adapter(tmp_path / "a").deltas
    assert sorted(back) == sorted(targets.shapes)
    for name, (m, n) in targets.shapes.items():
        wanted = to_dense(deltas[name]) if name in deltas else torch.zeros(m, n)
        torch.testing.assert_close(to_dense(back[name]), wanted, rtol=1e-4, atol=1e-6)


def test_nothing_at_all_is_a_zero_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    model = plain_model(tiny_llama)
    before = logits(model)
    write_adapter(tmp_path / "a", {}, find_targets(model, "all-linear", "x"))
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path / "a")), before)


def test_a_write_that_does_not_read_back_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.adapters.peft_files.load_file", lambda path: {"x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="differs from what was written"):
        save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})


def saved_by_peft(path: Path, base: Path, **options: Any) -> Any:
    """A model with an adapter of PEFT's, both of its factors random, saved to `path`."""
    torch.manual_seed(3)
    model = get_peft_model(plain_model(base), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape))
    model.save_pretrained(path)
    return model


def peft_adapter(path: Path, base: Path, **options: Any) -> dict[str, Tensor]:
    """An adapter PEFT made and saved; returns what its own merge adds to each weight `(m, n)`."""
    untouched = {n: p.detach().clone() for n, p in plain_model(base).named_parameters()}
    merged = saved_by_peft(path, base, **options).merge_and_unload()
    layers = {n: m for n, m in merged.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}
    out = {}
    for name, layer in layers.items():
        moved = layer.weight.detach() - untouched.get(f"{name}.weight", layer.weight.detach())
        if moved.any():
            out[name] = moved.T if is_conv1d(layer) else moved
    return out


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("tiny_llama", {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"]}),
        ("tiny_llama", {"r": 4, "lora_alpha": 10, "use_rslora": True}),
        (
            "tiny_llama",
            {
                "r": 4,
                "lora_alpha": 10,
                "target_modules": "all-linear",
                # Patterns as users write them: a bare name, a part of a path, an expression.
                "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7, r".*\.0\..*k_proj": 3},
                "alpha_pattern": {"down_proj": 5, "q_proj": 9},
            },
        ),
        (
            "tiny_llama",
            {
                "r": 4,
                "lora_alpha": 10,
                "target_modules": ["q_proj", "v_proj"],
                "use_rslora": True,
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"v_proj": 3},
            },
        ),
        ("tiny_gpt2", {"r": 3, "lora_alpha": 7, "fan_in_fan_out": True}),
        (
            "tiny_gpt2",
            {
                "r": 4,
                "lora_alpha": 2,
                "fan_in_fan_out": True,
                "target_modules": ["c_attn", "c_fc", "c_proj"],
                "rank_pattern": {"c_fc": 6, "h.1.attn.c_proj": 1},
                "alpha_pattern": {"mlp.c_proj": 11},
            },
        ),
    ],
)
def test_adapters_of_peft_are_what_peft_merges(
    shape: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    wanted = peft_adapter(tmp_path, request.getfixturevalue(shape), **options)
    found = load_adapter(tmp_path).deltas
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert found[name].A.dtype == found[name].B.dtype == torch.float32
        torch.testing.assert_close(to_dense(found[name]), delta, rtol=1e-4, atol=1e-6)


def test_factors_in_the_older_format_and_in_half_precision(
    tiny_llama: Path, tmp_path: Path
) -> None:
    saved_by_peft(tmp_path, tiny_llama, r=4, lora_alpha=10)
    wanted = load_adapter(tmp_path).deltas
    weights = load_file(tmp_path / WEIGHTS_NAME)
    (tmp_path / WEIGHTS_NAME).unlink()
    torch.save(weights, tmp_path / "adapter_model.bin")
    found = load_adapter(tmp_path).deltas
    assert all(torch.equal(found[n].A, x.A) for n, x in wanted.items())
    assert all(torch.equal(found[n].B, x.B) for n, x in wanted.items())
    torch.save({k: v.bfloat16() for k, v in weights.items()}, tmp_path / "adapter_model.bin")
    halves = load_adapter(tmp_path).deltas
    for name, x in wanted.items():
        assert halves[name].B.dtype == torch.float32
        torch.testing.assert_close(to_dense(halves[name]), to_dense(x), rtol=0.05, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("gpt2-emotion-r8-alpha32", 8),
        ("gpt2-emotion-r16-alpha32", 16),
        ("gpt2-spam-r1-alpha1", 1),
    ],
)
def test_real_adapters_keep_their_classifier_head(material: Path, name: str, rank: int) -> None:
    """PEFT saves a classifier's head without naming it in `modules_to_save`."""
    found = load_adapter(material / "adapters" / name)
    assert {x.rank for x in found.deltas.values()} == {rank}
    assert list(found.dense) == ["score.weight"]
    assert found.dense["score.weight"].shape[1] == 768


@pytest.fixture
def saved(tiny_llama: Path, tmp_path: Path) -> Path:
    """A directory PEFT saved, for a test to spoil."""
    saved_by_peft(tmp_path / "saved", tiny_llama, r=4, lora_alpha=8)
    return tmp_path / "saved"


def change_config(path: Path, **values: Any) -> None:
    """Overwrite keys of `adapter_config.json`; None removes one."""
    config = {**json.loads((path / CONFIG_NAME).read_text()), **values}
    kept = {k: v for k, v in config.items() if v is not None}
    (path / CONFIG_NAME).write_text(json.dumps(kept))


def change_weights(path: Path, remove: str = "", **more: Tensor) -> None:
    """Take out the tensors whose key holds `remove`, add others."""
    weights = load_file(path / WEIGHTS_NAME)
    kept = {k: v for k, v in weights.items() if not remove or remove not in k}
    save_file({**kept, **more}, path / WEIGHTS_NAME)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, "use_dora is True; only plain LoRA"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; only plain LoRA"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias is True; only plain LoRA"),
    ],
)
def test_what_is_not_a_sum_of_products_is_refused(
    options: dict[str, Any], says: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Each directory as PEFT itself writes it."""
    saved_by_peft(tmp_path, tiny_llama, r=4, lora_alpha=8, **options)
    with pytest.raises(fedlora.InputError, match=says) as found:
        load_adapter(tmp_path)
    assert str(tmp_path) in str(found.value)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_relative_to_a_changed_base_are_refused(
    tiny_llama: Path, tmp_path: Path, init: str
) -> None:
    """These take a part of the weights into the factors; `B A` is far from what was learnt."""
    saved_by_peft(tmp_path, tiny_llama, r=4, lora_alpha=8, init_lora_weights=init)
    with pytest.raises(fedlora.InputError, match=f"'{init}', which changes the base weights"):
        load_adapter(tmp_path)


def test_an_adapter_that_acts_on_some_tokens_only_is_refused(saved: Path) -> None:
    change_config(saved, alora_invocation_tokens=[5, 6])
    with pytest.raises(
        fedlora.InputError, match=r"alora_invocation_tokens is \[5, 6\]; only plain"
    ):
        load_adapter(saved)


def test_another_kind_of_adapter_is_refused(saved: Path) -> None:
    change_config(saved, peft_type="LOHA")
    with pytest.raises(fedlora.InputError, match=r"peft_type is 'LOHA'; only plain LoRA"):
        load_adapter(saved)


def test_a_directory_without_a_configuration_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / CONFIG_NAME).unlink()
    with pytest.raises(fedlora.InputError, match=r"holds no adapter_config\.json; expected a PEFT"):
        load_adapter(saved)
    with pytest.raises(fedlora.InputError, match=r"holds no adapter_config\.json"):
        load_adapter(tmp_path / "nowhere")


def test_a_broken_configuration_is_refused(saved: Path) -> None:
    (saved / CONFIG_NAME).write_text('{"r": 4,')
    with pytest.raises(fedlora.InputError, match=r"adapter_config\.json: cannot be read"):
        load_adapter(saved)
    (saved / CONFIG_NAME).write_text("[1, 2]")
    with pytest.raises(fedlora.InputError, match=r"adapter_config\.json"):
        load_adapter(saved)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_configuration_that_lacks_a_key_is_refused(saved: Path, key: str) -> None:
    change_config(saved, **{key: None})
    with pytest.raises(fedlora.InputError, match=rf"\b{key}\b"):
        load_adapter(saved)


def test_damaged_or_missing_weights_are_refused(saved: Path) -> None:
    content = (saved / WEIGHTS_NAME).read_bytes()
    (saved / WEIGHTS_NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(fedlora.InputError, match="its weights cannot be read"):
        load_adapter(saved)
    (saved / WEIGHTS_NAME).unlink()
    with pytest.raises(fedlora.InputError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(saved)


def test_factors_that_do_not_fit_are_refused(saved: Path) -> None:
    content = (saved / WEIGHTS_NAME).read_bytes()
    change_weights(saved, remove="layers.0.self_attn.q_proj.lora_B")
    with pytest.raises(fedlora.InputError, match=r"factors of model\.layers\.0\.self_attn\.q_proj"):
        load_adapter(saved)
    (saved / WEIGHTS_NAME).write_bytes(content)
    change_config(saved, r=5)
    with pytest.raises(fedlora.InputError, match="has rank 4, its configuration says 5"):
        load_adapter(saved)


def test_an_adapter_without_factors_is_refused(saved: Path) -> None:
    change_weights(saved, remove="lora_")
    with pytest.raises(fedlora.InputError, match="holds no LoRA factors"):
        load_adapter(saved)


def endings(targets: Targets) -> set[str]:
    """The last parts of the names chosen."""
    return {name.rpartition(".")[2] for name in targets.shapes}


def test_targets_by_name(tiny_llama: Path) -> None:
    targets = find_targets(plain_model(tiny_llama), ["v_proj", "q_proj"], "tiny")
    assert list(targets.shapes) == [
        f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qv"
    ]
    assert targets.shapes["model.layers.0.self_attn.q_proj"] == (32, 32)
    assert targets.shapes["model.layers.0.self_attn.v_proj"] == (16, 32)
    assert (targets.names, targets.fan_in_fan_out) == (["q_proj", "v_proj"], False)


def test_targets_of_transposed_layers_have_out_and_in_features(tiny_gpt2: Path) -> None:
    targets = find_targets(plain_model(tiny_gpt2), ["c_attn", "mlp.c_fc"], "tiny")
    assert targets.shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert targets.shapes["transformer.h.1.mlp.c_fc"] == (128, 32)
    assert targets.fan_in_fan_out


@pytest.mark.parametrize(
    "wanted",
    [
        "model.layers.1.self_attn.q_proj",
        ["model.layers.1.self_attn.q_proj"],
        "layers.1.self_attn.q_proj",
        r".*\.1\..*q_proj",
    ],
)
def test_a_full_name_or_an_expression_chooses_one_module(
    tiny_llama: Path, wanted: str | list[str]
) -> None:
    targets = find_targets(plain_model(tiny_llama), wanted, "tiny")
    assert list(targets.shapes) == targets.names == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    "wanted", [["q_proj", "up_proj"], "all-linear", None, r".*\.0\.mlp\.(up|down)_proj"]
)
@pytest.mark.parametrize("shape", ["tiny_llama", "tiny_gpt2"])
def test_targets_are_those_peft_adapts(
    wanted: list[str] | str | None, shape: str, request: pytest.FixtureRequest
) -> None:
    if shape == "tiny_gpt2" and wanted not in ("all-linear", None):
        wanted = ["c_attn", "c_fc"] if isinstance(wanted, list) else r".*\.0\.mlp\.c_(fc|proj)"
    path = request.getfixturevalue(shape)
    ours = find_targets(plain_model(path), wanted, "tiny")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=wanted)
    theirs = get_peft_model(plain_model(path), config)
    adapted = {
        n.removeprefix("base_model.model.").removesuffix(".lora_A")
        for n, _ in theirs.named_modules()
        if n.endswith(".lora_A")
    }
    assert set(ours.shapes) == adapted
    assert not any("lm_head" in name for name in ours.shapes)


def test_the_output_head_is_a_target_only_when_named(tiny_llama: Path) -> None:
    model = plain_model(tiny_llama)
    assert endings(find_targets(model, "all-linear", "tiny")) == LLAMA_LINEAR
    assert endings(find_targets(model, ["lm_head"], "tiny")) == {"lm_head"}


@pytest.mark.parametrize("wanted", [["q_proj", "query"], "query", ["embed_tokens"], []])
def test_no_match_lists_candidates(tiny_llama: Path, wanted: list[str] | str) -> None:
    with pytest.raises(fedlora.InputError, match="matches no linear layer of tiny") as found:
        find_targets(plain_model(tiny_llama), wanted, "tiny")
    message = str(found.value)
    assert message.startswith("lora_target_modules: ")
    assert all(name in message for name in LLAMA_LINEAR)


def test_an_expression_that_is_none_is_an_input_error(tiny_llama: Path) -> None:
    with pytest.raises(fedlora.InputError, match=r"'\*_proj' is no regular expression .*q_proj"):
        find_targets(plain_model(tiny_llama), "*_proj", "tiny")


def test_no_default_of_peft_lists_candidates(tiny_llama: Path) -> None:
    model = plain_model(tiny_llama)
    model.config.model_type = "unheard-of"
    with pytest.raises(fedlora.InputError, match=r"architecture 'unheard-of'; give .*q_proj"):
        find_targets(model, None, "tiny")
