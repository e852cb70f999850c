"""What `fedlora run` makes of Flower's log and of its list of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora.client.trainer import train
from fedlora.config.config import Config
from fedlora.engines.flower import submit
from fedlora.engines.flower.event_lines import event_line
from fedlora.errors import FedloraError, InputError
from fedlora.runs.events import Event
from fedlora.runs.file_names import METRICS


def round_line(number: int) -> str:
    return event_line({"event": "round", "round": number}) + "\n"


STARTED = "Successfully started run 77\n"


class Flower:
    """Flower's commands: each submission prints a log, and its run ends as it is told.

    Args:
        runs: log and status of each submission.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *runs: tuple[list[str], str]) -> None:
        self.runs, self.resumed = list(runs), list[bool]()
        self.status = ""
        monkeypatch.setattr(submit, "write_bundle", self.bundle)
        monkeypatch.setattr(submit, "_listen", self.listen)
        monkeypatch.setattr(submit, "_status", lambda run, config: self.status)

    def bundle(self, app: Path, values: Any, *, resume: bool, events: bool) -> None:
        assert events
        self.resumed.append(resume)

    def listen(self, end: Any, command: Sequence[str], report: Any) -> None:
        lines, self.status = self.runs.pop(0)
        for line in lines:
            end.hear(line, report)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(engine="flower", output_dir=str(tmp_path / "out"), num_clients=2)


def test_a_run_that_is_lost_is_submitted_again(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    flower = Flower(
        monkeypatch,
        ([STARTED, round_line(1)], "finished:failed"),
        ([STARTED, round_line(2)], "finished:completed"),
    )
    monkeypatch.setattr(submit, "_result", lambda path: path)
    events: list[Event] = []
    submit.submit(config, events.append, resume=False)
    assert flower.resumed == [False, True]
    assert [e["event"] for e in events] == ["round", "warning", "round"]
    assert "goes on after round 1" in events[1]["message"]


def test_it_is_submitted_again_a_few_times_only(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    lost = ([STARTED, "Traceback: something\n"], "finished:failed")
    flower = Flower(monkeypatch, *[lost] * (submit.MOST_FAILURES + 1))
    with pytest.raises(
        FedloraError, match=r"\(finished:failed\), 3 times in a row\n(.|\n)*something"
    ):
        submit.submit(config, lambda event: None, resume=False)
    assert flower.runs == []


def test_what_the_server_app_says_ends_it(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    mistake = event_line({"event": "error", "message": "sites: alpha: no rows"})
    Flower(monkeypatch, ([STARTED, mistake, "Traceback\n"], "finished:failed"))
    with pytest.raises(FedloraError, match=r"^sites: alpha: no rows$"):
        submit.submit(config, lambda event: None, resume=False)


def test_a_run_that_was_not_begun_is_told(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    Flower(monkeypatch, (["Error: cannot connect\n"], ""))
    with pytest.raises(FedloraError, match="has not begun the run:\n  Error: cannot connect"):
        submit.submit(config, lambda event: None, resume=False)


def test_a_log_that_breaks_off_is_read_on(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    Flower(
        monkeypatch,
        ([STARTED, round_line(1)], "running"),
        ([round_line(1), round_line(2)], "finished:completed"),
    )
    monkeypatch.setattr(submit, "_result", lambda path: path)
    events: list[Event] = []
    submit.submit(config, events.append, resume=False)
    assert [e["round"] for e in events] == [1, 2]


def test_a_directory_that_is_not_free_is_told_before(config: Config) -> None:
    path = Path(config.output_dir)
    path.mkdir()
    (path / METRICS).write_text("")
    with pytest.raises(InputError, match="output_dir"):
        submit.submit(config, lambda event: None, resume=False)


def test_flower_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fedlora\[flower\]'"):
        submit.check_flower()


def test_a_simulation_is_checked_before_flower_is_started(config: Config, tmp_path: Path) -> None:
    keys = {"model_name_or_path": "embedded", "train_file": str(tmp_path / "missing.jsonl")}
    with pytest.raises(InputError, match=r"missing\.jsonl"):
        submit.submit(config.model_copy(update=keys), lambda event: None, resume=False)
    assert submit.check_simulation(config) is None, "it is a deployment"


def test_only_a_training_with_a_name_reaches_the_clients_of_a_simulation(tmp_path: Path) -> None:
    def mine(model: Any, rows: Any, training: Any) -> dict[str, float]:
        return {}

    (tmp_path / "own_of_submit.py").write_text("def half(model, dataset, training): return {}\n")
    own = f"{tmp_path}/own_of_submit.py:half"
    submit.check_training(Config(engine="flower", train_file="a.jsonl", train_function=own), train)
    with pytest.raises(InputError, match="given in Python does not reach; name it in the config"):
        submit.check_training(Config(engine="flower", train_file="a.jsonl"), mine)
    with pytest.raises(InputError, match="sites train by themselves"):
        submit.check_training(Config(engine="flower"), mine)
