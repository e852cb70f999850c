"""Data sets of the hub and directories of files, split by split."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora import Config
from fedlora.data.datasets import find_labels, load_rows, template_of
from fedlora.data.hub import read_hub
from fedlora.errors import InputError


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with splits train and test: a text, a class, a number of stars."""
    from datasets import ClassLabel, Dataset, Features, Value

    kinds = ClassLabel(names=["negative", "positive"])
    form = Features({"text": Value("string"), "label": kinds, "stars": Value("int32")})
    path = tmp_path_factory.mktemp("data") / "reviews"
    path.mkdir()
    train = {"text": ["a", "b", "c"], "label": [1, 0, -1], "stars": [5, 1, 3]}
    test = {"text": ["d"], "label": [None], "stars": [4]}
    Dataset.from_dict(train, features=form).to_parquet(str(path / "train.parquet"))
    Dataset.from_dict(test, features=form).to_parquet(str(path / "test.parquet"))
    return path


def test_class_numbers_become_their_names(data_set: Path) -> None:
    assert read_hub(str(data_set), None, "train") == [
        {"text": "a", "label": "positive", "stars": 5},
        {"text": "b", "label": "negative", "stars": 1},
        {"text": "c", "label": None, "stars": 3},
    ]
    assert read_hub(str(data_set), None, "test") == [{"text": "d", "label": None, "stars": 4}]


def test_a_part_of_a_split(data_set: Path) -> None:
    assert [row["text"] for row in read_hub(str(data_set), None, "train[1:]")] == ["b", "c"]
    assert [row["text"] for row in read_hub(str(data_set), None, "train+test")] == list("abcd")


def test_the_splits_of_a_run(data_set: Path) -> None:
    values = {"dataset_name": str(data_set), "num_clients": 2}
    raw = load_rows(Config(**values, dataset_test_split="test"))
    assert sorted(row["text"] for row in raw.train) == ["a", "b", "c"]
    assert [row["text"] for row in raw.eval] == ["d"]
    assert load_rows(Config(**values)).eval == []
    assert raw.title == str(data_set)


@pytest.mark.parametrize("split", ["training", "validation[:10]"])
@pytest.mark.parametrize("key", ["dataset_train_split", "dataset_test_split"])
def test_a_split_that_is_not_there(key: str, split: str, data_set: Path) -> None:
    with pytest.raises(InputError) as raised:
        load_rows(Config(dataset_name=str(data_set), num_clients=1, **{key: split}))
    assert str(raised.value) == (
        f"dataset_name: {data_set}: split {split!r} cannot be loaded: it has train, test"
    )


def test_what_is_no_data_set(
    data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for name, says in (
        (str(tmp_path / "empty"), "doesn't contain any data files"),
        (str(tmp_path / "nowhere" / "there"), "Couldn't find any data file"),
        ("nobody/nothing", "Couldn't "),
    ):
        with pytest.raises(InputError) as raised:
            read_hub(name, None, "train")
        message = str(raised.value)
        assert message.startswith(f"dataset_name: {name}: split 'train' cannot be loaded: ")
        assert says in message
        assert "\n" not in message
    with pytest.raises(InputError, match=r"BuilderConfig 'other' not found\. Available:"):
        read_hub(str(data_set), "other", "train")


def test_a_class_with_names_is_learnt(data_set: Path) -> None:
    config = Config(dataset_name=str(data_set), num_clients=1, dataset_train_split="train[:2]")
    raw = load_rows(config)
    assert find_labels(raw, template_of(config, raw, True), config.label_names) == [
        "negative",
        "positive",
    ]
