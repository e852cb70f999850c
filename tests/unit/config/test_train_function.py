"""A local training is named as `module:function`, and imported by its name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedlora.config.config import Config
from fedlora.config.train_function import is_name, load_train_function, placed
from fedlora.errors import InputError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


@pytest.mark.parametrize("name", ["sft:train", "my.own:train", "a/b.py:train", "/x y/b.py:train"])
def test_what_is_a_name(name: str) -> None:
    assert is_name(name)
    assert Config(train_function=name).train_function == name


@pytest.mark.parametrize("name", ["sft", "sft.train", ":train", "sft:", "a/b:train", "a b:train"])
def test_what_is_none(name: str) -> None:
    with pytest.raises(InputError, match="expected module:function, such as my_training:sft"):
        Config(train_function=name)


def test_sites_name_their_own() -> None:
    with pytest.raises(InputError, match="each names its own training in its own file"):
        Config(train_function="sft:train", engine="sites", sites={"a": "a.sock"})


def test_a_file_goes_by_its_path(here: Path) -> None:
    (here / "near_by.py").touch()
    absolute = f"{here.resolve() / 'near_by.py'}:train"
    assert placed("near_by:train", here) == absolute
    assert placed("near_by.py:train", here) == absolute
    assert placed("package.module:train", here) == "package.module:train"
    assert placed("far.py:train", here) == "far.py:train"


def test_a_function_of_a_file_that_imports_one_beside_it(here: Path) -> None:
    (here / "train_settings_beside.py").write_text("FIGURE = 0.25\n")
    (here / "train_with_them.py").write_text(
        "from train_settings_beside import FIGURE\n"
        "def train(model, dataset, training):\n    return {'loss': FIGURE}\n"
    )
    train = load_train_function("train_with_them:train")
    assert train(None, [], None) == {"loss": 0.25}
    assert load_train_function(f"{here}/train_with_them.py:train") is train
    assert train.__module__ == "train_with_them"


def test_a_function_of_an_installed_module() -> None:
    from fedlora.client.trainer import train

    assert load_train_function("fedlora.client.trainer:train") is train


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("no_such_module:train", None, "No module named 'no_such_module'"),
        ("missing.py:train", None, "there is no file missing.py"),
        ("without_it.py:train", "figure = 1", "the module has no function train"),
        ("no_function.py:train", "train = 3", "the module has no function train"),
        ("breaks.py:train", "1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("json.py:train", "", "another module is called json already"),
    ],
)
def test_what_cannot_be_imported(name: str, text: str | None, said: str, here: Path) -> None:
    if text is not None:
        (here / name.partition(":")[0]).write_text(text)
    with pytest.raises(InputError, match=said) as raised:
        load_train_function(name)
    assert str(raised.value).startswith(f"train_function: {name}: ")
