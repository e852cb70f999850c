"""The names of a run's files: directories made by any version are read by them."""

from __future__ import annotations

from pathlib import Path

from fedlora.runs import file_names

SAVED_RUN = next(
    parent / "tests/data/run"
    for parent in Path(__file__).resolve().parents
    if (parent / "tests/data/run").is_dir()
)
"""A run that earlier code wrote."""


def test_they_are_what_earlier_code_wrote() -> None:
    assert (SAVED_RUN / file_names.METRICS).is_file()
    assert (SAVED_RUN / file_names.CONFIG).is_file()


def test_they_stay_as_they_are() -> None:
    assert file_names.CONFIG == "config.yaml"
    assert file_names.METRICS == "metrics.jsonl"
    assert file_names.FINAL == "final"
    assert file_names.MANIFEST == "manifest.json"
    assert file_names.LOCK == ".lock"


def test_what_is_unfinished_is_hidden_and_no_configuration() -> None:
    assert file_names.PARTIAL_CONFIG.startswith(".")
    assert not file_names.PARTIAL_CONFIG.endswith(".yaml")


def test_the_line_of_the_configuration_as_written_is_a_comment() -> None:
    assert file_names.AS_WRITTEN == "# Settled by the run itself; as it was written: "


def test_what_the_user_wrote_is_read_from_it() -> None:
    line = file_names.AS_WRITTEN
    assert file_names.as_written(f'dtype: float32\n{line}{{"dtype": "auto"}}\n') == {
        "dtype": "auto"
    }
    for text in ("dtype: float32\n", f"{line}[1]\n", f"{line}{{half\n", ""):
        assert file_names.as_written(text) == {}
