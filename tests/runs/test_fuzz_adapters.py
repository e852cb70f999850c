"""No directory ends in a traceback: mutated PEFT directories either combine, and load again, or are
refused with a reason."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fedlora.adapters.saved_adapter import CONFIG_NAME, WEIGHTS_NAME, load_adapter
from fedlora.commands.cli import main
from fedlora.errors import FedloraError

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"v_proj": 3},
    "alpha_pattern": {},
    "modules_to_save": None,
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "auto_mapping": None,
    "revision": None,
}


KEYS = [
    *CONFIG,
    "init_r",
    "lora_bias",
    "enable_lora",
    "target_parameters",
    "layers_to_transform",
    "exclude_modules",
    "trainable_token_indices",
    "ensure_weight_tying",
    "layer_replication",
]


LABELS: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "id2label": {"0": "no", "1": "yes"},
    "label2id": {"no": 0, "yes": 1},
}


def tensors(classifier: bool) -> dict[str, Tensor]:
    """What a plain adapter holds."""
    rng = torch.Generator().manual_seed(0)
    out = {}
    for layer in (0, 1):
        for name, rank in (("q_proj", 2), ("v_proj", 3)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            out[f"{key}.lora_A.weight"] = torch.randn(rank, 6, generator=rng)
            out[f"{key}.lora_B.weight"] = torch.randn(4, rank, generator=rng)
    if classifier:
        out["base_model.model.classifier.weight"] = torch.randn(2, 6, generator=rng)
        out["base_model.model.classifier.bias"] = torch.randn(2, generator=rng)
    return out


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**400, -1, 2**70, 0, 1e308, 1e-320, float("nan"), float("inf")]),
    st.sampled_from(["", "LORA", "ADALORA", "SEQ_CLS", "TOKEN_CLS", "all", "lora_only", "pissa"]),
    st.sampled_from(["(", "[", "*", "a" * 5000, "\ud800", "\x00", "q_proj", "classifier", "é"]),
    st.recursive(
        st.none() | st.integers(-2, 4) | st.text(max_size=6),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3),
        max_leaves=5,
    ),
)


NAMES = st.sampled_from(
    [
        "base_model.model.lora_A.weight",
        "base_model.model..lora_A.weight",
        "lora_A",
        "",
        ".",
        "base_model.model.",
        "module.module.module",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.weight",
        "base_model.model.classifier.original_module.weight",
        "base_model.model.lm_head.base_layer.weight",
        "base_model.model.model.norm.weight",
        "modules_to_save.default.weight",
        ".base_layer.",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_E",
        "base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.a(.lora_A.weight",
        "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ]
)


SHAPES = st.lists(st.integers(0, 4), max_size=4)


KINDS: list[torch.dtype] = [
    torch.float64,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint16,
]


def odd(kind: int, value: Tensor) -> Any:
    """Something else in place of a tensor."""
    choices: list[Callable[[], Any]] = [
        lambda: value.to_sparse() if value.ndim else value,
        lambda: torch.nn.Parameter(value) if value.is_floating_point() else value,
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        lambda: torch.empty(tuple(value.shape), device="meta"),
        lambda: value.float() * float("nan"),
        lambda: value.float() * float("inf"),
        lambda: value.float() * 1e30,
        lambda: 3,
        lambda: [value],
        lambda: {"a": value},
        lambda: np.zeros(3),
        lambda: Path("x"),
        lambda: None,
    ]
    return choices[kind % len(choices)]()


EMPTY: dict[str, Any] = {
    "config": {},
    "labels": None,
    "drop": [],
    "rename": [],
    "add": [],
    "respell": "",
    "shape": [],
    "dtype": [],
    "odd": [],
    "classifier": False,
    "older": False,
    "file": None,
}


DAMAGE = ["cut", "flip", "empty", "pointer", "directory", "gone", "bom", "utf-16"]


DAMAGE += ["pickle", "text", "link", "deep", "list", "loop"]


_INDEX = st.integers(0, 30)


CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "config": st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2),
    "labels": st.dictionaries(st.sampled_from([*LABELS, "num_labels"]), VALUES, max_size=2),
    "drop": st.lists(_INDEX, min_size=1, max_size=2),
    "rename": st.lists(st.tuples(_INDEX, NAMES), min_size=1, max_size=2),
    "add": st.lists(st.tuples(NAMES, SHAPES), min_size=1, max_size=2),
    "respell": st.sampled_from(["_orig_mod.", "module.", "language_model.", "base_model.model."]),
    "shape": st.lists(st.tuples(_INDEX, SHAPES), min_size=1, max_size=2),
    "dtype": st.lists(st.tuples(_INDEX, st.sampled_from(KINDS)), min_size=1, max_size=2),
    "odd": st.lists(st.tuples(_INDEX, st.integers(0, 12)), min_size=1, max_size=1),
    "classifier": st.just(True),
    "older": st.just(True),
    "file": st.tuples(
        st.sampled_from([CONFIG_NAME, "weights", "config.json"]),
        st.sampled_from(DAMAGE),
        st.integers(0, 500),
    ),
}
"""What may be done to a directory; some of it at a time, so that the rest is still in order."""


@st.composite
def mutations(draw: st.DrawFn) -> dict[str, Any]:
    """What is done to one directory."""
    chosen = draw(st.sets(st.sampled_from(sorted(CHANGES)), max_size=3))
    return {**EMPTY, **{name: draw(CHANGES[name]) for name in sorted(chosen)}}


def build(path: Path, change: dict[str, Any]) -> None:
    """Write the mutated directory."""
    path.mkdir()
    config = {**CONFIG, **change["config"]}
    if change["classifier"] and "task_type" not in change["config"]:
        config["task_type"] = "SEQ_CLS"
    (path / CONFIG_NAME).write_text(json.dumps(config))
    if change["labels"] is not None:
        (path / "config.json").write_text(json.dumps({**LABELS, **change["labels"]}))
    held: dict[str, Any] = tensors(change["classifier"])
    names = list(held)
    for i in change["drop"]:
        held.pop(names[i % len(names)], None)
    for i, shape in change["shape"]:
        if (name := names[i % len(names)]) in held:
            held[name] = torch.ones(shape)
    for i, kind in change["dtype"]:
        if (name := names[i % len(names)]) in held:
            held[name] = held[name].to(kind)
    for i, name in change["rename"]:
        if names[i % len(names)] in held:
            held[name] = held.pop(names[i % len(names)])
    for name, shape in change["add"]:
        held[name] = torch.ones(shape)
    if change["respell"]:
        prefix = "base_model.model."
        held = {k.replace(prefix, prefix + change["respell"]): v for k, v in held.items()}
        names = list(held)
    plain = all(isinstance(x, Tensor) for x in held.values())
    for i, kind in change["odd"]:
        name = names[i % len(names)]
        if name in held and (change["older"] or kind in (4, 5, 6)):
            held[name] = odd(kind, held[name])
    file = path / ("adapter_model.bin" if change["older"] or not plain else WEIGHTS_NAME)
    if file.name == WEIGHTS_NAME:
        save_file({k: v.clone() for k, v in held.items()}, file)
    else:
        torch.save(held, file)
    if change["file"]:
        which, how, number = change["file"]
        spoil(file if which == "weights" else path / which, how, number)


PICKLED = pickle.dumps({"a": (print, os.system, Path("x"))})


def spoil(file: Path, how: str, number: int) -> None:
    """Damage a file."""
    raw = file.read_bytes() if file.exists() else b"{}"
    file.unlink(missing_ok=True)
    if how == "directory":
        file.mkdir()
    elif how == "link":
        file.symlink_to(file.parent / "nowhere")
    elif how == "loop":
        file.symlink_to(file)
    elif how != "gone":
        flipped = bytearray(raw or b"x")
        flipped[number % len(flipped)] ^= 1 + number % 255
        file.write_bytes(
            {
                "cut": raw[: number % (len(raw) + 1)],
                "flip": bytes(flipped),
                "empty": b"",
                "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                "bom": b"\xef\xbb\xbf" + raw,
                "utf-16": raw.decode("latin-1").encode("utf-16"),
                "pickle": PICKLED,
                "text": "not what you think \x00 é".encode("latin-1"),
                "deep": b"[" * 100_000,
                "list": b"[1, 2]",
            }[how]
        )


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(first=mutations(), second=st.none() | mutations())
def test_no_directory_ends_in_a_traceback(
    first: dict[str, Any], second: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone or beside one that is in order, on the command line and in Python."""
    where = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        good = {**EMPTY, "classifier": first["classifier"], "labels": first["labels"] and {}}
        build(where / "a", first)
        build(where / "b", good if second is None else second)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(["aggregate", str(where / "a"), str(where / "b"), "--output", f"{where}/o"])
            said = capsys.readouterr()
            try:
                load_adapter(where / "a")
                loads = True
            except FedloraError:
                loads = False
        assert loads or code == 2
        if code == 0:
            assert load_adapter(where / "o").deltas
        else:
            assert code == 2
            assert said.err.startswith("fedlora: ")
            assert "Traceback" not in said.err
            assert not (where / "o").exists()
    finally:
        shutil.rmtree(where)


def test_a_directory_that_is_in_order_combines(tmp_path: Path) -> None:
    """What is mutated above is a directory that works."""
    for name, more in (("a", {}), ("b", {"classifier": True, "labels": {}})):
        build(tmp_path / name, {**EMPTY, **more})
        assert main(["aggregate", str(tmp_path / name), "--output", f"{tmp_path}/{name}o"]) == 0


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b", "~nobody/x", "/dev/null", ""])
def test_paths_that_cannot_be(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["aggregate", name, "--output", str(tmp_path / "o")]) == 2
    assert capsys.readouterr().err.startswith("fedlora: ")
