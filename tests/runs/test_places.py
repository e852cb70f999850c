"""A model, tokenizer or adapter that is not where the configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.errors import InputError

KEYS = ("model_name_or_path", "tokenizer_name", "init_adapter", "chat_template_path")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models/llama-tiny."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama-tiny").mkdir(parents=True)
    return tmp_path


def complaint(keys: dict[str, Any], **more: Any) -> str:
    with pytest.raises(InputError) as raised:
        fedlora.run(fedlora.Config(**{**keys, **more}))
    assert not Path(keys["output_dir"]).exists()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "name",
    [
        "./nope",
        "../nope",
        "nope/",
        "/data/model",
        "models/llama/base",
        "~/nope",
        "C:\\models\\llama",
        "my model",
        "modèle",
        "./models/llama-tinny",
    ],
)
def test_a_path_that_does_not_exist_says_so(
    key: str, name: str, here: Path, small_run: dict[str, Any]
) -> None:
    said = complaint(small_run, **{key: name})
    lacks = "holds no adapter_config.json: " if key == "init_adapter" else ""
    assert said.startswith(f"{key}: {name}: {lacks}there is no such directory; ")
    if "tinny" in name:
        assert said.endswith("did you mean models/llama-tiny?")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["models/llama-tinny", "nobody/nothing", "nothing"])
def test_what_may_be_a_name_on_the_hub_says_both(
    key: str, name: str, here: Path, small_run: dict[str, Any]
) -> None:
    said = complaint(small_run, **{key: name})
    assert said.startswith(f"{key}: {name}: ")
    if key == "init_adapter":  # always a directory
        assert "there is no such directory" in said
        return
    assert "cannot be loaded: " in said
    assert f"(there is no directory {name} either" in said
    if name == "models/llama-tinny":
        assert "did you mean models/llama-tiny?" in said


def test_a_home_that_only_a_shell_knows(
    here: Path, small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here))
    said = complaint(small_run, model_name_or_path="~/models")
    assert said.endswith(f"; ~ stands for your home in a shell alone: give {here}/models")


def test_a_file_in_the_place_of_a_directory(here: Path, small_run: dict[str, Any]) -> None:
    (here / "model.safetensors").write_bytes(b"")
    said = complaint(small_run, model_name_or_path="./model.safetensors")
    assert "is a file; give the directory that it lies in" in said
