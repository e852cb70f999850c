"""Adapters that PEFT saved are combined into one that PEFT loads, by the verb and from Python."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import fedlora
from fedlora import InputError, aggregate, load_adapter, save_adapter
from fedlora.adapters.saved_adapter import CONFIG_NAME, WEIGHTS_NAME
from fedlora.methods import METHODS, ONE_SHOT
from support.merging import (
    add_to,
    causal,
    change_config,
    cli,  # noqa: F401
    deep,  # noqa: F401
    effect,
    logits,
    made,
    older_format,
    pair,  # noqa: F401
    peft_effect,
    peft_saves,
    refused,
    same_effect,
    true_error,
    weighted,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def in_bfloat16(path: Path) -> None:
    """The same directory with factors in bfloat16."""
    tensors = {k: v.bfloat16() for k, v in load_file(path / WEIGHTS_NAME).items()}
    save_file(tensors, path / WEIGHTS_NAME, metadata={"format": "pt"})


LLAMA: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]},
    {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {"r": 7, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
]


PATTERNS: list[dict[str, Any]] = [
    {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7, r".*\.0\..*k_proj": 3},
        "alpha_pattern": {"down_proj": 5, "q_proj": 9},
    },
    {
        "r": 3,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"down_proj": 5},
        "alpha_pattern": {"q_proj": 1},
    },
]


GPT2: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 7, "fan_in_fan_out": True},
    {
        "r": 4,
        "lora_alpha": 2,
        "fan_in_fan_out": True,
        "target_modules": ["c_attn", "c_fc", "c_proj"],
        "rank_pattern": {"c_fc": 6, "h.1.attn.c_proj": 1},
        "alpha_pattern": {"mlp.c_proj": 11},
    },
]


CASES: dict[str, tuple[str, list[dict[str, Any]], list[float] | None]] = {
    "ranks, alphas, rslora": ("tiny_llama", LLAMA, [0.5, 0.3, 0.2]),
    "weights that do not sum to one": ("tiny_llama", LLAMA, [5, 3, 2]),
    "patterns and partly different targets": ("tiny_llama", PATTERNS, [1, 3]),
    "conv1d": ("tiny_gpt2", GPT2, None),
    "one alone": ("tiny_llama", LLAMA[1:2], None),
    "layers chosen by number": (
        "tiny_llama",
        [LLAMA[0], {**LLAMA[2], "layers_to_transform": [1]}],
        None,
    ),
    "layer 0 alone": ("tiny_llama", [{**LLAMA[2], "layers_to_transform": 0}, LLAMA[0]], None),
    "only layer 0": ("tiny_llama", [{**LLAMA[2], "layers_to_transform": 0}], None),
    "an expression beside names": (
        "tiny_llama",
        [{**LLAMA[0], "target_modules": r".*\.1\..*(up|o)_proj"}, LLAMA[1]],
        [2, 1],
    ),
    "names left out": (
        "tiny_llama",
        [{**LLAMA[0], "exclude_modules": ["model.layers.0.self_attn.q_proj"]}, LLAMA[1]],
        None,
    ),
    "full names beside ends": (
        "tiny_llama",
        [{**LLAMA[0], "target_modules": ["model.layers.1.self_attn.q_proj"]}, LLAMA[1]],
        None,
    ),
    "parameters by name": (
        "tiny_llama",
        [{"r": 3, "lora_alpha": 5, "target_parameters": ["k_proj.weight"]}, LLAMA[0]],
        None,
    ),
    "the output layer of a conv1d model": (
        "tiny_gpt2",
        [{"r": 3, "target_modules": ["c_attn"]}, {"r": 2, "target_modules": ["c_attn", "lm_head"]}],
        None,
    ),
    "more ranks than the layer is wide": (
        "tiny_llama",
        [{"r": 20, "lora_alpha": 8, "target_modules": ["k_proj", "down_proj"]}] * 3,
        [1, 2, 4],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_directory_has_the_effect_of_the_weighted_sum(
    case: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    cli: Any,
    recwarn: pytest.WarningsRecorder,
) -> None:
    fixture, many, weights = CASES[case]
    base = request.getfixturevalue(fixture)
    paths = [peft_saves(tmp_path / f"{i}", base, i, **o) for i, o in enumerate(many)]
    if len(paths) > 1:
        older_format(paths[1])
    wanted = weighted([peft_effect(base, p) for p in paths], weights)
    assert max(float(x.abs().max()) for x in wanted.values()) > 0.05
    given = ["--weights", *weights] if weights else []
    done = cli(*paths, "--output", tmp_path / "out", *given)
    assert done.code == 0, done.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]

    # In our reading, in PEFT's reading, and in what the model says.
    same_effect(effect(load_adapter(tmp_path / "out")), wanted)
    recwarn.clear()
    same_effect(peft_effect(base, tmp_path / "out"), wanted)
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
    theirs = logits(PeftModel.from_pretrained(causal(base), tmp_path / "out"))
    ours = logits(add_to(causal(base), wanted))
    assert (ours - logits(causal(base))).abs().max() > 0.02
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("case", ["ranks, alphas, rslora", "conv1d"])
def test_as_pefts_own_concatenation(
    case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fixture, many, _ = CASES[case]
    base = request.getfixturevalue(fixture)
    many = many if case != "conv1d" else [GPT2[0], {**GPT2[0], "r": 5}]
    weights = [0.6, 0.3, 0.1][: len(many)]
    paths = [peft_saves(tmp_path / f"{i}", base, i, **o) for i, o in enumerate(many)]
    model = PeftModel.from_pretrained(causal(base), paths[0], adapter_name="0")
    for i, path in enumerate(paths[1:], 1):
        model.load_adapter(path, adapter_name=str(i))
    names = [str(i) for i in range(len(paths))]
    model.add_weighted_adapter(
        names, [w / sum(weights) for w in weights], "all", combination_type="cat"
    )
    model.set_adapter("all")
    save_adapter(tmp_path / "out", aggregate([load_adapter(p) for p in paths], weights))
    ours = logits(PeftModel.from_pretrained(causal(base), tmp_path / "out"))
    torch.testing.assert_close(ours, logits(model), rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_in_bfloat16(suffix: str, tiny_llama: Path, tmp_path: Path) -> None:
    """What the file says, exactly: the sum of halves is not rounded to halves again."""
    paths = [peft_saves(tmp_path / f"{i}", tiny_llama, i, **LLAMA[i]) for i in (0, 1)]
    in_bfloat16(paths[0])
    if suffix == "bin":
        older_format(paths[0])
    wanted = weighted([peft_effect(tiny_llama, p) for p in paths])
    merged = aggregate([load_adapter(p) for p in paths])
    same_effect(effect(merged), wanted)
    save_adapter(tmp_path / "out", merged)
    same_effect(peft_effect(tiny_llama, tmp_path / "out"), wanted)
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS_NAME).values()} == {torch.float32}


def test_a_sum_of_sums_is_the_sum(tiny_llama: Path, tmp_path: Path) -> None:
    """The result is an adapter like any other."""
    parts = [
        load_adapter(peft_saves(tmp_path / f"{i}", tiny_llama, i, **o)) for i, o in enumerate(LLAMA)
    ]
    save_adapter(tmp_path / "two", aggregate(parts[:2], [2, 1]))
    nested = aggregate([load_adapter(tmp_path / "two"), parts[2]], [3, 1])
    same_effect(effect(nested), effect(aggregate(parts, [2, 1, 1])))
    assert nested.layers["model.layers.0.self_attn.q_proj"].rank == 4 + 2 + 7


def test_the_same_call_writes_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    paths = [peft_saves(tmp_path / f"{i}", tiny_llama, i, **LLAMA[i]) for i in (0, 1)]
    for name in ("a", "b"):
        save_adapter(tmp_path / name, aggregate([load_adapter(p) for p in paths], [1, 2]))
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_configuration_says_whose_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    paths = [peft_saves(tmp_path / f"{i}", tiny_llama, i, **LLAMA[i]) for i in (0, 1)]
    for path in paths:
        change_config(path, base_model_name_or_path="org/base", revision="v2")
    save_adapter(tmp_path / "out", aggregate([load_adapter(p) for p in paths]))
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["revision"] == "v2"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["inference_mode"] is True
    assert config["r"] == config["lora_alpha"]


def test_an_untrained_adapter_has_no_effect_and_no_error(tiny_llama: Path, tmp_path: Path) -> None:
    """Every B is zero, as PEFT starts."""
    model = get_peft_model(causal(tiny_llama), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "new")
    found = aggregate([load_adapter(tmp_path / "new")] * 2)
    assert all(layer.error == 0.0 for layer in found.layers.values())
    save_adapter(tmp_path / "out", found)
    merged = PeftModel.from_pretrained(causal(tiny_llama), tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(causal(tiny_llama)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": r".*\.1\..*(up|o)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "target_parameters": ["k_proj.weight"]},
    ],
)
def test_what_was_loaded_can_be_saved(
    targets: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """Without `aggregate` between: the same effect, the same modules."""
    path = peft_saves(tmp_path / "in", tiny_llama, 1, r=3, lora_alpha=5, **targets)
    save_adapter(tmp_path / "out", load_adapter(path))
    same_effect(peft_effect(tiny_llama, tmp_path / "out"), peft_effect(tiny_llama, path))


def test_a_name_that_is_the_end_of_another(tmp_path: Path) -> None:
    """PEFT takes the ranks of `rank_pattern` by the ends of names, the first that fits."""
    shape = (8, 8)
    parts = made({"lin": (shape, 2), "a.lin": (shape, 1), "z.lin": (shape, 1)}, 1, task_type=None)
    save_adapter(tmp_path / "out", aggregate([parts]))
    back = load_adapter(tmp_path / "out").deltas
    assert {name: x.rank for name, x in back.items()} == {"lin": 2, "a.lin": 1, "z.lin": 1}

    def toy() -> nn.Module:
        torch.manual_seed(0)
        inner = {n: nn.ModuleDict({"lin": nn.Linear(8, 8)}) for n in "az"}
        return nn.ModuleDict({"lin": nn.Linear(8, 8), **inner})

    same_effect(peft_effect(toy(), tmp_path / "out"), effect(parts))


@pytest.mark.parametrize("rank", [1, 3, 5, 50])
def test_rank_keeps_the_leading_directions(
    rank: int, tiny_llama: Path, tmp_path: Path, cli: Any
) -> None:
    paths = [peft_saves(tmp_path / f"{i}", tiny_llama, i, **o) for i, o in enumerate(LLAMA)]
    weights = [0.5, 0.3, 0.2]
    wanted = weighted([peft_effect(tiny_llama, p) for p in paths], weights)
    done = cli(*paths, "--output", tmp_path / "out", "--weights", *weights, "--rank", rank)
    assert done.code == 0
    found = peft_effect(tiny_llama, tmp_path / "out")
    best = {}
    for name, x in wanted.items():
        left, values, right = np.linalg.svd(x.numpy(), full_matrices=False)
        best[name] = torch.from_numpy(left[:, :rank] * values[:rank] @ right[:rank])
    same_effect(found, best, 1e-4)
    merged = aggregate([load_adapter(p) for p in paths], weights, rank=rank)
    for name, error in true_error(found, wanted).items():
        layer = merged.layers[name]
        assert layer.error == pytest.approx(error, rel=1e-4, abs=2e-6)
        # A sum whose factors would be larger than the matrix may fill it with rounding.
        most = 4 + 2 + 7 if 13 * sum(wanted[name].shape) <= wanted[name].numel() else 16
        assert layer.rank == merged.deltas[name].rank == min(rank, most)
    assert (max(layer.error for layer in merged.layers.values()) > 0.1) == (rank < 13)


def test_as_pefts_own_truncation(tiny_llama: Path, tmp_path: Path) -> None:
    paths = [peft_saves(tmp_path / f"{i}", tiny_llama, i, **o) for i, o in enumerate(LLAMA)]
    model = PeftModel.from_pretrained(causal(tiny_llama), paths[0], adapter_name="0")
    for i, path in enumerate(paths[1:], 1):
        model.load_adapter(path, adapter_name=str(i))
    weights = [0.5, 0.3, 0.2]
    model.add_weighted_adapter(["0", "1", "2"], weights, "all", combination_type="svd", svd_rank=3)
    model.set_adapter("all")
    save_adapter(tmp_path / "out", aggregate([load_adapter(p) for p in paths], weights, rank=3))
    ours = logits(PeftModel.from_pretrained(causal(tiny_llama), tmp_path / "out"))
    torch.testing.assert_close(ours, logits(model), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_energy_keeps_the_fewest_directions(
    energy: float, tiny_llama: Path, tmp_path: Path, cli: Any
) -> None:
    paths = [peft_saves(tmp_path / f"{i}", tiny_llama, i, **o) for i, o in enumerate(LLAMA)]
    wanted = weighted([peft_effect(tiny_llama, p) for p in paths])
    done = cli(*paths, "--output", tmp_path / "out", "--energy", energy)
    assert done.code == 0
    found = peft_effect(tiny_llama, tmp_path / "out")
    merged = aggregate([load_adapter(p) for p in paths], energy=energy)
    for name, x in wanted.items():
        squares = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
        share = squares.cumsum() / squares.sum()
        most = 4 + 2 + 7 if 13 * sum(x.shape) <= x.numel() else 16
        fewest = most if energy == 1.0 else int((share < energy).sum()) + 1
        error = true_error(found, wanted)[name]
        assert merged.layers[name].rank == fewest
        assert merged.layers[name].error == pytest.approx(error, rel=1e-4, abs=2e-6)
        assert error == pytest.approx(math.sqrt(max(1 - share[fewest - 1], 0)), abs=1e-5)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["--rank", 2, "--energy", 0.9], "rank and energy exclude each other"),
        (["--rank", 0], "rank: 0 must be at least 1"),
        (["--rank", -3], "rank: -3"),
        (["--rank", 2.5], r"rank: 2\.5 is no whole number"),
        (["--rank", "many"], "rank: 'many' is no number"),
        (["--rank", "nan"], "rank: .*nan"),
        (["--rank", "inf"], "rank: .*inf"),
        (["--rank"], "rank"),
        (["--rank", 2, 3], "rank: .*is no number"),
        (["--energy", 0], "energy: 0.* must be above 0 and at most 1"),
        (["--energy", 1.5], "energy: 1.5 must be above 0"),
        (["--energy", "nan"], "energy: nan"),
        (["--energy"], "energy"),
    ],
)
def test_impossible_ranks_and_energies(
    keys: list[Any], says: str, pair: list[Path], tmp_path: Path, cli: Any
) -> None:
    refused(cli(*pair, "--output", tmp_path / "out", *keys), says, tmp_path / "out")


def test_options_of_a_rule_on_the_command_line(pair: list[Path], tmp_path: Path, cli: Any) -> None:
    given = ["--method", "florist", "--energy_threshold", 0.4]
    assert cli(*pair, "--output", tmp_path / "a", *given).code == 0
    assert cli(*pair, "--output", tmp_path / "b", "--energy", 0.4).code == 0
    same_effect(effect(load_adapter(tmp_path / "a")), effect(load_adapter(tmp_path / "b")))


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(ONE_SHOT)))
def test_rules_that_need_a_shared_start(
    method: str, pair: list[Path], tmp_path: Path, cli: Any
) -> None:
    done = cli(*pair, "--output", tmp_path / "out", "--method", method)
    refused(done, f"{method} needs a start that all clients share; there are exact", tmp_path / "o")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["--method", "averaging"], "method: averaging is unknown; there are exact, fedit"),
        (["--method"], "method"),
        (["--method", "fedit"], r"fedit needs one rank in all adapters, .* has 4 2; use exact"),
        (["--method", "florist", "--energy_threshold", 2], "energy_threshold: 2.0 must be above 0"),
        (["--method", "florist", "--energy_threshold", "x"], "energy_threshold: 'x' is no number"),
        (
            ["--method", "flora", "--energy_threshold", 0.5],
            "energy_threshold.*flora|flora.*energy_threshold",
        ),
        (["--method", "flexlora", "--energy_threshold", 0.5], "energy_threshold"),
        (["--wieghts", 1, 2], "wieghts"),
        (["--strategy", "mean"], "strategy"),
        (["--resume"], "resume"),
        (["--rank", 2, "--rank", 3], "--rank is given twice"),
        # Options that could change nothing here.
        (["--max_rank", 2], "max_rank"),
    ],
)
def test_impossible_methods_and_options(
    keys: list[Any], says: str, pair: list[Path], tmp_path: Path, cli: Any
) -> None:
    refused(cli(*pair, "--output", tmp_path / "out", *keys), says, tmp_path / "out")


def gpt2_classifier(labels: int = 3) -> Any:
    """A random GPT-2 classifier; the same for the same number of labels."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=100,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        num_labels=labels,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2ForSequenceClassification(config).eval()


def bert(task: str, labels: int = 3) -> Any:
    """A random BERT with the head of a task."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=labels,
    )
    kind = BertForSequenceClassification if task == "SEQ_CLS" else BertForTokenClassification
    return kind(config).eval()


def make_head(task: str, kind: str, labels: int = 3) -> Any:
    """A base with a head."""
    return gpt2_classifier(labels) if kind == "gpt2" else bert(task, labels)


@pytest.mark.parametrize(
    ("task", "kind", "targets"),
    [
        ("SEQ_CLS", "gpt2", ["c_attn"]),
        ("SEQ_CLS", "bert", ["query", "value"]),
        ("TOKEN_CLS", "bert", ["query", "value"]),
    ],
)
def test_heads_are_averaged_with_the_weights(
    task: str, kind: str, targets: list[str], tmp_path: Path, cli: Any
) -> None:
    """PEFT saves a classifier's head unasked, and names heads the model does not have."""
    paths = [
        peft_saves(
            tmp_path / f"{i}",
            make_head(task, kind),
            i,
            task_type=task,
            r=i + 2,
            lora_alpha=5,
            target_modules=targets,
        )
        for i in (0, 1)
    ]
    older_format(paths[1])
    heads = []
    for path in paths:
        trained = dict(PeftModel.from_pretrained(make_head(task, kind), path).named_parameters())
        heads.append({n: p for n, p in trained.items() if ".modules_to_save." in n})
    assert len(heads[0]) == (1 if kind == "gpt2" else 2)
    done = cli(*paths, "--output", tmp_path / "out", "--weights", 3, 1)
    assert done.code == 0, done.err
    assert re.search(r"saved whole and averaged: (score|classifier)\.", done.out)

    effects = [peft_effect(make_head(task, kind), p) for p in paths]
    model = add_to(make_head(task, kind), weighted(effects, [3, 1]))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name in heads[0]:
            plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            own[plain].copy_(0.75 * heads[0][name] + 0.25 * heads[1][name])
    loaded = PeftModel.from_pretrained(make_head(task, kind), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=5e-6)
    assert (logits(model) - logits(make_head(task, kind))).abs().max() > 0.05
    # And once more from there.
    again = aggregate([load_adapter(tmp_path / "out")] * 2)
    save_adapter(tmp_path / "again", again)
    loaded = PeftModel.from_pretrained(make_head(task, kind), tmp_path / "again")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=5e-6)


def test_modules_to_save_are_averaged(tiny_llama: Path, tmp_path: Path) -> None:
    paths = [
        peft_saves(tmp_path / f"{i}", tiny_llama, i, **LLAMA[i], modules_to_save=["lm_head"])
        for i in (0, 1)
    ]
    parts = [load_adapter(p) for p in paths]
    found = aggregate(parts, [1, 3])
    mean = 0.25 * parts[0].dense["lm_head.weight"] + 0.75 * parts[1].dense["lm_head.weight"]
    assert list(found.dense) == ["lm_head.weight"]
    torch.testing.assert_close(found.dense["lm_head.weight"], mean)
    save_adapter(tmp_path / "out", found)
    model = add_to(
        causal(tiny_llama), weighted([peft_effect(tiny_llama, p) for p in paths], [1, 3])
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(mean)
    loaded = PeftModel.from_pretrained(causal(tiny_llama), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=5e-6)


def test_a_head_that_only_some_have_is_carried_over(
    tiny_llama: Path, tmp_path: Path, cli: Any
) -> None:
    """It is averaged over those that have it; it is no update, so a missing one is not zero."""
    many = [LLAMA[0], {**LLAMA[1], "modules_to_save": ["lm_head"]}]
    paths = [peft_saves(tmp_path / f"{i}", tiny_llama, i, **o) for i, o in enumerate(many)]
    assert cli(*paths, "--output", tmp_path / "out").code == 0
    head = load_adapter(paths[1]).dense["lm_head.weight"]
    assert torch.equal(load_adapter(tmp_path / "out").dense["lm_head.weight"], head)
    model = add_to(causal(tiny_llama), weighted([peft_effect(tiny_llama, p) for p in paths]))
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    loaded = PeftModel.from_pretrained(causal(tiny_llama), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=5e-6)


def test_a_module_adapted_by_one_and_trained_whole_by_another_is_refused(
    tiny_llama: Path, tmp_path: Path, cli: Any
) -> None:
    """No directory can say both, and the sum of a change and a mean means nothing."""
    many = [
        {"r": 2, "target_modules": ["q_proj", "o_proj"]},
        {**LLAMA[1], "modules_to_save": ["o_proj"]},
    ]
    paths = [peft_saves(tmp_path / f"{i}", tiny_llama, i, **o) for i, o in enumerate(many)]
    done = cli(*paths, "--output", tmp_path / "out")
    refused(done, r"layers\.[01]\.self_attn\.o_proj", tmp_path / "out")


def test_heads_of_different_shapes_are_refused(tmp_path: Path, cli: Any) -> None:
    paths = [
        peft_saves(
            tmp_path / f"{labels}",
            gpt2_classifier(labels),
            task_type="SEQ_CLS",
            r=2,
            modules_to_save=["score"],
            target_modules=["c_attn"],
        )
        for labels in (2, 3)
    ]
    for path in paths:
        change_config(path, modules_to_save=["score"])
    done = cli(*paths, "--output", tmp_path / "out")
    refused(done, r"score\.weight: .*\(2, 32\) and \(3, 32\)", tmp_path / "out")


def test_a_head_that_is_named_but_missing_is_refused(
    pair: list[Path], tmp_path: Path, cli: Any
) -> None:
    change_config(pair[1], modules_to_save=["lm_head"])
    done = cli(*pair, "--output", tmp_path / "out")
    refused(done, "modules_to_save names lm_head, but there are no such weights", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, "use_dora is True; only plain LoRA"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; only plain LoRA"),
        ({"bias": "all"}, "bias is 'all'; only plain LoRA"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base weights"),
        ({"init_lora_weights": "pissa_niter_2"}, "'pissa_niter_2', which changes the base"),
        ({"init_lora_weights": "olora"}, "'olora', which changes the base weights"),
        ({"lora_bias": True}, "lora_bias is True; only plain LoRA"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\]; only plain"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication is"),
        ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens is \[3\]"),
    ],
)
def test_what_is_not_plain_lora_is_refused(
    options: dict[str, Any],
    says: str,
    pair: list[Path],
    tiny_llama: Path,
    tmp_path: Path,
    cli: Any,
) -> None:
    """Each as PEFT writes it, beside one that is in order."""
    odd = peft_saves(
        tmp_path / "odd", tiny_llama, **{"r": 4, "target_modules": ["q_proj"], **options}
    )
    done = cli(pair[0], odd, "--output", tmp_path / "out")
    refused(done, says, tmp_path / "out")
    assert str(odd) in done.err


@pytest.mark.parametrize("key", ["kasa_config", "use_bdlora", "monteclora_config"])
def test_variants_of_lora_with_factors_of_their_own_are_refused(
    key: str, tiny_llama: Path, tmp_path: Path, cli: Any
) -> None:
    """Block-diagonal factors, for example, have other shapes than the layer's."""
    from peft.tuners.lora import config as known

    kinds = {
        "kasa_config": ("KasaConfig", {}),
        "use_bdlora": (
            "BdLoraConfig",
            {"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False},
        ),
        "monteclora_config": ("MontecloraConfig", {}),
    }
    name, options = kinds[key]
    if not hasattr(known, name):
        pytest.skip(f"this PEFT has no {name}")
    variant = getattr(known, name)(**options)
    path = peft_saves(tmp_path / "odd", tiny_llama, 1, target_modules=["q_proj"], **{key: variant})
    refused(cli(path, "--output", tmp_path / "out"), "only plain|cannot use", tmp_path / "out")


def test_another_type_of_adapter_is_refused(
    pair: list[Path], tiny_llama: Path, tmp_path: Path, cli: Any
) -> None:
    model = get_peft_model(
        causal(tiny_llama), LoHaConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "loha")
    done = cli(pair[0], tmp_path / "loha", "--output", tmp_path / "out")
    refused(done, "peft_type is 'LOHA'; only plain LoRA", tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["gpt2", "openai-community/gpt2"], "openai-community/gpt2"),
        (["openai-community/gpt2", "gpt2"], "openai-community/gpt2"),
        (["", "org/base"], "org/base"),
        ([None, "org/base"], "org/base"),
    ],
)
def test_other_spellings_of_a_base(
    names: list[str | None], kept: str, pair: list[Path], tmp_path: Path, cli: Any
) -> None:
    for path, name in zip(pair, names, strict=True):
        change_config(path, base_model_name_or_path=name)
    assert cli(*pair, "--output", tmp_path / "out").code == 0
    assert load_adapter(tmp_path / "out").config["base_model_name_or_path"] == kept


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("task_type", "SEQ_2_SEQ_LM", "task_type: 'CAUSAL_LM' and 'SEQ_2_SEQ_LM'"),
    ],
)
def test_adapters_that_do_not_belong_together(
    key: str, value: str, says: str, pair: list[Path], tmp_path: Path, cli: Any
) -> None:
    change_config(pair[0], revision="v1")
    change_config(pair[1], **{key: value})
    refused(cli(*pair, "--output", tmp_path / "out"), says, tmp_path / "out")


def test_other_shapes_are_refused(pair: list[Path], tmp_path: Path, cli: Any) -> None:
    """Under the same name, but of a base of another width."""
    tensors = load_file(pair[1] / WEIGHTS_NAME)
    save_file(
        {k: v[:, :16].clone() if "lora_A" in k else v for k, v in tensors.items()},
        pair[1] / WEIGHTS_NAME,
    )
    done = cli(*pair, "--output", tmp_path / "out")
    refused(
        done, r"layers\.0\.self_attn\.q_proj: shapes \(32, 32\) and \(32, 16\)", tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1], "weights: 1 for 2 adapters; give one for each"),
        ([1, 2, 3], "weights: 3 for 2 adapters"),
        ([1, -1], "expected positive numbers"),
        ([2, -1], "expected positive numbers"),
        ([0, 0], "expected positive numbers"),
        ([1, "nan"], "expected positive numbers"),
        ([1, "inf"], "expected positive numbers"),
        ([1, "half"], "weights: 'half' is no number"),
        (["0.5,0.5"], "weights: '0.5,0.5' is no number"),
        ([1, "none"], "weights: .*is no number"),
        ([], "weights"),
    ],
)
def test_impossible_weights(
    weights: list[Any], says: str, pair: list[Path], tmp_path: Path, cli: Any
) -> None:
    done = cli(*pair, "--output", tmp_path / "out", "--weights", *weights)
    refused(done, says, tmp_path / "out")


def test_an_output_that_holds_something_is_left_alone(
    pair: list[Path], tmp_path: Path, cli: Any
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    refused(cli(*pair, "--output", tmp_path / "out"), "exists and is not empty; choose another")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("mine")
    refused(cli(*pair, "--output", tmp_path / "file"), "exists and is not empty")
    assert (tmp_path / "file").read_text() == "mine"
    refused(cli(*pair, "--output", pair[0]), "exists and is not empty")
    with pytest.raises(InputError, match="exists and is not empty"):
        save_adapter(tmp_path / "out", load_adapter(pair[0]))


def test_an_empty_output_is_used_and_parents_are_made(
    pair: list[Path], tmp_path: Path, cli: Any
) -> None:
    (tmp_path / "empty").mkdir()
    assert cli(*pair, "--output", tmp_path / "empty").code == 0
    assert cli(*pair, "--output", tmp_path / "a" / "b" / "c").code == 0
    for path in ("empty", "a/b/c"):
        assert len(load_adapter(tmp_path / path).deltas) == 2


def test_an_output_that_cannot_be_made(pair: list[Path], tmp_path: Path, cli: Any) -> None:
    (tmp_path / "file").write_text("mine")
    done = cli(*pair, "--output", tmp_path / "file" / "out")
    refused(done, "cannot be written: Not a directory")


def test_missing_directories_and_arguments(pair: list[Path], tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "out"
    refused(cli(pair[0], tmp_path / "nowhere", "--output", out), r"nowhere: holds no adapter_", out)
    refused(cli(), "give PEFT directories and --output DIR")
    refused(cli(*pair), "give PEFT directories and --output DIR")
    refused(cli("--output", out), "give PEFT directories and --output DIR", out)
    refused(cli(*pair, "--output"), "give PEFT directories and --output DIR")
    refused(cli("--output", out, *pair), "give PEFT directories and --output DIR", out)
    with pytest.raises(InputError, match="at least one adapter"):
        aggregate([])


def test_factors_that_are_not_numbers_are_refused(
    pair: list[Path], tmp_path: Path, cli: Any
) -> None:
    """A diverged adapter would make the whole sum NaN."""
    tensors = load_file(pair[1] / WEIGHTS_NAME)
    next(v for k, v in tensors.items() if "lora_B" in k)[0, 0] = float("nan")
    save_file(tensors, pair[1] / WEIGHTS_NAME)
    done = cli(*pair, "--output", tmp_path / "out")
    refused(done, "q_proj", tmp_path / "out")


@pytest.fixture(scope="module")
def adalora(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An AdaLoRA adapter PEFT trained until its ranks differ, some of them zero."""
    path = tmp_path_factory.mktemp("adalora") / "adapter"
    torch.manual_seed(7)
    model = get_peft_model(
        causal(tiny_llama),
        AdaLoraConfig(
            task_type="CAUSAL_LM",
            init_r=4,
            target_r=2,
            lora_alpha=10,
            tinit=1,
            tfinal=2,
            total_step=8,
            deltaT=1,
            target_modules=["q_proj", "v_proj", "down_proj"],
        ),
    )
    model.train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rng = torch.Generator().manual_seed(3)
    early = {}
    for step in range(8):
        ids = torch.randint(4, 99, (4, 10), generator=rng)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
        if step == 0:
            model.save_pretrained(path.with_name("early"))
            early = {n: x.double() for n, x in _adalora_deltas(model).items()}
    model.eval()
    trained = {n: x.double() for n, x in _adalora_deltas(model).items()}
    said = logits(model)
    model.save_pretrained(path)
    return SimpleNamespace(
        path=path,
        deltas=trained,
        logits=said,
        early=path.with_name("early"),
        early_deltas=early,
    )


def _adalora_deltas(model: Any) -> dict[str, Tensor]:
    """PEFT's own delta of every layer."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "ranknum")
    }


def test_adalora_is_what_peft_trained_and_what_it_loads(
    adalora: SimpleNamespace, tiny_llama: Path
) -> None:
    config = json.loads((adalora.path / CONFIG_NAME).read_text())
    kept = {n.rpartition(".lora_E")[0]: sum(mask) for n, mask in config["rank_pattern"].items()}
    assert len(set(kept.values())) >= 3
    assert min(kept.values()) == 0
    found = load_adapter(adalora.path)
    assert {n: x.rank for n, x in found.deltas.items()} == kept
    same_effect(effect(found), adalora.deltas)
    same_effect(effect(found), peft_effect(tiny_llama, adalora.path))
    loaded = PeftModel.from_pretrained(causal(tiny_llama), adalora.path)
    torch.testing.assert_close(logits(loaded), adalora.logits, rtol=1e-4, atol=5e-6)


def test_adalora_before_its_ranks_are_cut(adalora: SimpleNamespace, tiny_llama: Path) -> None:
    found = load_adapter(adalora.early)
    same_effect(effect(found), adalora.early_deltas)
    same_effect(effect(found), peft_effect(tiny_llama, adalora.early))


def test_adalora_and_lora_are_stacked_exactly(
    adalora: SimpleNamespace, tiny_llama: Path, tmp_path: Path, cli: Any
) -> None:
    plain = peft_saves(tmp_path / "plain", tiny_llama, 1, **LLAMA[0])
    wanted = weighted([adalora.deltas, peft_effect(tiny_llama, plain)], [3, 1])
    done = cli(adalora.path, plain, "--output", tmp_path / "out", "--weights", 3, 1)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["peft_type"] == "LORA"
    same_effect(effect(load_adapter(tmp_path / "out")), wanted)
    theirs = logits(PeftModel.from_pretrained(causal(tiny_llama), tmp_path / "out"))
    ours = logits(add_to(causal(tiny_llama), wanted))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=5e-6)


def test_adalora_that_does_not_fit_is_refused(
    adalora: SimpleNamespace, tmp_path: Path, cli: Any
) -> None:
    shutil.copytree(adalora.path, tmp_path / "odd")
    tensors = load_file(adalora.path / WEIGHTS_NAME)
    gone = next(k for k in tensors if k.endswith("lora_E"))
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "odd" / WEIGHTS_NAME)
    done = cli(tmp_path / "odd", "--output", tmp_path / "out")
    refused(done, "the factors of .* are incomplete or do not fit", tmp_path / "out")
    # LoRA has no diagonal.
    save_file(tensors, tmp_path / "odd" / WEIGHTS_NAME)
    change_config(tmp_path / "odd", peft_type="LORA", rank_pattern={})
    done = cli(tmp_path / "odd", "--output", tmp_path / "out")
    refused(done, "the factors of .* are incomplete or do not fit", tmp_path / "out")


def flip_a_byte(path: Path) -> None:
    """In the middle of the numbers."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x40
    path.write_bytes(bytes(content))


def test_a_damaged_write_is_an_error(
    pair: list[Path], tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(tensors: Any, path: Any, **keys: Any) -> None:
        save_file(tensors, path, **keys)
        flip_a_byte(Path(path))

    monkeypatch.setattr("fedlora.adapters.peft_files.save_file", spoiled)
    done = cli(*pair, "--output", tmp_path / "out")
    refused(done, "what was read back differs from what was written")
    with pytest.raises(fedlora.CheckpointError, match="read back"):
        save_adapter(tmp_path / "out2", load_adapter(pair[0]))


@pytest.mark.parametrize("key", ["lora_alpha", "r", "use_rslora"])
def test_a_configuration_that_says_something_else_is_an_error(
    key: str, pair: list[Path], tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are right, the scale they are read with is not."""
    writes = Path.write_text

    def spoiled(path: Path, text: str, *args: Any, **keys: Any) -> int:
        if path.name == CONFIG_NAME:
            wrong = {"lora_alpha": 999, "r": 3, "use_rslora": True}[key]
            text = json.dumps({**json.loads(text), key: wrong})
        return writes(path, text, *args, **keys)

    monkeypatch.setattr(Path, "write_text", spoiled)
    done = cli(*pair, "--output", tmp_path / "out")
    assert done.code == 2
    assert "written and read back" not in done.out
    assert re.search("differs from what was written|configuration says", done.err)


def test_the_table_of_many(deep: list[Path], tmp_path: Path, cli: Any) -> None:
    """Ten adapters still fit, layer names whole or folded, never cut."""
    done = cli(*(deep * 5), "--output", tmp_path / "out")
    assert done.code == 0
    assert "…" not in done.out
    table = [line for line in done.out.splitlines() if str(deep[0].parent) not in line]
    assert max(len(line) for line in table if str(tmp_path) not in line) <= 80
    assert len(re.findall(r"weight 0\.1000", done.out)) == 10
    names = load_adapter(deep[1]).deltas
    squeezed = "".join(line.split()[0] for line in table if line.split())
    assert all(name in squeezed for name in names)


def test_help(cli: Any) -> None:
    done = cli("--help")
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) <= 100
    for word in ("--output", "--weights", "--method", "--rank", "--energy", "load_adapter"):
        assert word in done.out
    assert all(re.search(rf"\b{method}\b", done.out) for method in ONE_SHOT)
    assert not re.search(r"\b(ffa|rolora|fedsa|fedsvd)\b", done.out)
    assert "METHODS_HERE" not in done.out
