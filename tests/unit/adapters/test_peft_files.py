"""The files of a PEFT directory, read or refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedlora.adapters.peft_files import (
    CONFIG_NAME,
    OLDER_NAME,
    WEIGHTS_NAME,
    as_float,
    read_adapter_config,
    read_json,
    read_model_config,
    read_weights,
    save_tensors,
)
from fedlora.adapters.saved_adapter import write_adapter
from fedlora.errors import InputError
from fedlora.model.targets import find_targets


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"[1]", "holds no JSON object but a list"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{\x00", "written in UTF-16; save it again in UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1", "run `git lfs pull`"),
    ],
)
def test_a_json_file_that_is_none(raw: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(InputError) as error:
        read_json(tmp_path / "x.json")
    assert says in str(error.value)


def test_absent_configurations(tmp_path: Path) -> None:
    assert read_model_config(tmp_path) is None
    with pytest.raises(InputError, match=f"holds no {CONFIG_NAME}; expected a PEFT directory$"):
        read_adapter_config(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_NAME).write_text("{}")
    with pytest.raises(InputError, match=r"as one, two in it are$"):
        read_adapter_config(tmp_path)


def test_weights_of_either_format_are_the_same(tmp_path: Path) -> None:
    """Numbers beside the tensors, such as a step, say nothing of the model."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    torch.save({**tensors, "step": 3}, tmp_path / OLDER_NAME)
    older = read_weights(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    newer = read_weights(tmp_path)
    assert older.keys() == newer.keys() == {"a"}
    assert torch.equal(older["a"], newer["a"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(1)], "holds a list instead of tensors by name"),
        ({"model": {"a": torch.ones(1)}}, r"is a dict and no tensor \(a checkpoint of a trainer\?"),
        ({"a\x00": torch.ones(1)}, "holds unprintable signs"),
    ],
)
def test_a_file_of_something_else(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / OLDER_NAME)
    with pytest.raises(InputError, match=says):
        read_weights(tmp_path)


def test_weights_become_finite_floats() -> None:
    here = Path("it")
    assert as_float(here, "a", torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    narrow = torch.ones(2).to(torch.float8_e4m3fn)
    assert as_float(here, "a", narrow).dtype == torch.float32
    with pytest.raises(InputError, match="it: a is of int64; expected weights of float32"):
        as_float(here, "a", torch.ones(2, dtype=torch.int64))
    with pytest.raises(InputError, match="it: a holds values that are not finite"):
        as_float(here, "a", torch.tensor([1.0, float("nan")]))


def test_tensors_are_written_as_they_are(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(2, 3), "a": torch.ones(1, dtype=torch.float16)}
    save_tensors(tmp_path / WEIGHTS_NAME, tensors)
    back = load_file(tmp_path / WEIGHTS_NAME)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    (tmp_path / CONFIG_NAME).write_text("\ufeff" + json.dumps({"r": 2}), encoding="utf-8")
    assert read_adapter_config(tmp_path) == {"r": 2}
    with pytest.raises(OSError, match="No such file"):
        save_tensors(tmp_path / "absent" / WEIGHTS_NAME, tensors)


def test_the_revision_of_the_base_is_kept(tmp_path: Path) -> None:
    model = nn.ModuleDict({"up": nn.Linear(3, 3)})
    targets = find_targets(model, ["up"], "base", "v2")
    write_adapter(tmp_path, {}, targets)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v2"
