"""Tests that what a key is marked as is what happens to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedlora import Config
from fedlora.commands.completion import configuration_keys
from fedlora.commands.report.series import differing
from fedlora.config.errors_in_words import members
from fedlora.config.keys import Mark, keys_marked
from fedlora.data.datasets import ClientData, FederatedData
from fedlora.errors import InputError
from fedlora.federation.exchange import Agreement
from fedlora.federation.participants import Federation
from fedlora.methods import METHODS
from fedlora.runs import resume
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.lone_session import alone
from fedlora.runs.resume import as_it_began
from fedlora.runs.session import Session

KEYS = [key for key in Config.model_fields if key != "method_options"]


FREE = keys_marked(Config, Mark.OUTPUT, Mark.CARRIER)


BEGAN: dict[str, Any] = {"num_clients": 2, "client_ranks": [8, 8]}


BESIDE: dict[str, dict[str, Any]] = {  # what a key needs beside it
    "prompt_template": {"completion_template": "{b}"},
    "partition_shares": {"partition": "quantity"},
    "partition": {"partition_column": "a"},
    "template": {"completion_template": "{b}"},
    "num_workers": {"engine": "workers"},
    "round_timeout": {"engine": "workers"},
    "sites": {"engine": "sites", "sites": {"a": "one"}},
    "kit": {"engine": "nvflare", "kit": "one"},
}


VALUES: list[Any] = [
    {0: {"max_steps": 2}}, {"a": "/other"}, 3, 2, 0.25, True, False, "3r", [4, 5], [0.3, 0.7],
    ["a"], "flora", "cosine", "quantity", "custom",
    "uniform", "federation", "workers", "float32", "CAUSAL_LM", "text", "int8", "other",
    "my_training:sft", "6GB",
]  # fmt: skip


def changed(key: str, than: Config) -> Config:
    """A configuration that differs from another in one key."""
    for value in VALUES:
        try:
            config = Config(**{**than.model_dump(exclude_unset=True), key: value})
        except InputError:
            continue
        if getattr(config, key) != getattr(than, key):
            return config
    raise AssertionError(f"{key}: none of the values tried is another one")


def saved(config: Config, directory: Path) -> Path:
    (directory / "config.yaml").write_text(config.to_yaml())
    return directory


Begun = Callable[[str], tuple[Config, Path]]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Begun]:
    """Key -> a run's configuration in which it may stand, and the run's directory.

    The files are written and parsed once for all keys that need nothing beside them.
    """

    @cache
    def made(beside: str) -> tuple[Config, Path]:
        config = Config(**{**BEGAN, **BESIDE.get(beside, {})})
        return config, saved(config, tmp_path_factory.mktemp("begun"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "read_yaml", cache(resume.read_yaml))
        yield lambda key: made(key if key in BESIDE else "")


# Ranks that were drawn are saved as given ones; test_resume has what a resume makes of them.
@pytest.mark.parametrize("key", [k for k in KEYS if k not in ("rank_choices", "rank_shares")])
def test_a_resume_may_change_what_reports_and_carries_alone(key: str, begun: Begun) -> None:
    began, directory = begun(key)
    now = changed(key, began)
    if key in FREE:
        resumed = as_it_began(directory, now)
        assert getattr(resumed, key) == (
            str(directory) if key == "output_dir" else getattr(now, key)
        )
        return
    with pytest.raises(InputError) as raised:
        as_it_began(directory, now)
    assert f"  {key}: " in str(raised.value) or "client_ranks: " in str(raised.value)


@pytest.mark.parametrize("key", keys_marked(Config, Mark.AUTOMATIC))
def test_an_automatic_key_may_be_left_open_on_resume(key: str, tmp_path: Path) -> None:
    left_open = None if type(None) in members(Config.model_fields[key].annotation) else "auto"
    assert Config.model_fields[key].default == left_open
    decided = changed(key, Config(**BEGAN, **BESIDE.get(key, {}))).model_copy(
        update={"num_clients": 2}
    )
    if key == "client_ranks":
        decided = Config(num_clients=2, client_ranks=[16, 16])  # what lora_r makes of it
    again = decided.model_copy(update={key: left_open})
    resumed = as_it_began(saved(decided, tmp_path), again)
    assert resumed.flat() == {**decided.flat(), "output_dir": str(tmp_path)}


@pytest.mark.parametrize("key", KEYS)
def test_what_a_run_makes_absolute(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    if str not in members(Config.model_fields[key].annotation) or key in (
        "method", "lora_alpha", "client_overrides", "train_function", "client_memory"
    ):  # fmt: skip
        return  # no text, or text that is something else
    config = Config(**{**BESIDE.get(key, {}), key: "here"})
    absolute = key in keys_marked(Config, Mark.ABSOLUTE)
    assert getattr(resolve_paths(config), key) == (str(tmp_path / "here") if absolute else "here")


def test_the_file_of_a_training_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").touch()
    resolved = [resolve_paths(Config(train_function=x)) for x in ("own:sft", "other:sft")]
    assert [x.train_function for x in resolved] == [f"{tmp_path.resolve()}/own.py:sft", "other:sft"]


@pytest.mark.parametrize("key", [k for k in KEYS if k not in ("rank_choices", "rank_shares")])
def test_what_makes_another_experiment_of_a_run(key: str) -> None:
    one = Config(**{**BEGAN, **BESIDE.get(key, {})})
    other = changed(key, one)
    alike = key in keys_marked(Config, Mark.OUTPUT, Mark.REPETITION, Mark.MACHINE)
    assert (key in differing([one.flat(), other.flat()])) != alike


def test_a_client_alone_differs_from_its_federation_in_the_keys_that_say_so(
    tmp_path: Path,
) -> None:
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    config = Config(
        method="exact", start_fraction=0.5, num_clients=2, min_clients_per_round=2,
        clients_needed_per_round=2,
        client_ranks=[4, 8], client_overrides={0: {"max_steps": 3}}, save_total_limit=None,
        client_memory=["6GB", "12GB"],
        compression="int8",
    )  # fmt: skip
    session = Session(
        config,
        base=None,  # type: ignore[arg-type]
        data=FederatedData((ClientData(rows), ClientData(rows)), rows, "text", {}, ""),
        federation=Federation(
            [4, 8], [1, 1], Agreement(METHODS["exact"], config.rule_options(), {"layer": (2, 2)}, 0)
        ),
        warnings=(),
    )
    by_itself = alone(session, 1, tmp_path).config
    differ = {key for key in Config.model_fields if getattr(by_itself, key) != getattr(config, key)}
    assert differ == {*keys_marked(Config, Mark.ALONE), "output_dir"}


def test_shells_complete_what_is_marked_as_a_path() -> None:
    options = configuration_keys()
    for mark, path in ((Mark.FILE, "file"), (Mark.DIRECTORY, "directory")):
        assert {k for k, option in options.items() if option.path == path} == set(
            keys_marked(Config, mark)
        )
