"""The admin's directory follows the server's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fedlora.config.config import Config
from fedlora.engines.nvflare.feed import Outcome
from fedlora.engines.nvflare.mirror import Mirror, own_config
from fedlora.runs.events import Event

AT_SERVER = "method: exact\noutput_dir: /srv/runs/1\nkit: /srv/kit\nnum_threads: 4\nseed: 7\n"
WRITTEN = '# Settled by the run itself; as it was written: {"num_threads": null}\n'


def config_of(out: Path, **keys: Any) -> Config:
    return Config(engine="nvflare", kit="/my/kit", output_dir=str(out), **keys)


def answer(*events: Event, metrics: str = "", offset: int = 0, **more: Any) -> dict[str, Any]:
    plain = {"config": AT_SERVER + WRITTEN, "outcome": None, **more}
    return {"events": list(events), "metrics": metrics, "offset": offset, **plain}


def test_the_configuration_has_the_paths_of_this_machine(tmp_path: Path) -> None:
    text = own_config(AT_SERVER + WRITTEN, config_of(tmp_path / "out"))
    values = yaml.safe_load(text)
    assert (values["output_dir"], values["kit"]) == (str(tmp_path / "out"), "/my/kit")
    assert (values["seed"], values["num_threads"]) == (7, 4)
    assert text.endswith(WRITTEN)


def test_the_directory_is_made_when_the_run_begins(tmp_path: Path) -> None:
    events, out = list[Event](), tmp_path / "out"
    with Mirror(config_of(out), events.append, None) as mirror:
        assert mirror.question()["events"] == 0
        assert mirror.take(answer({"event": "warning", "message": "m"}, config=None)) is None
        assert not out.exists()
        mirror.take(answer({"event": "evaluate_begin"}, metrics='{"event": "begin"}\n'))
        line = '{"event": "round", "round": 1}\n'
        assert mirror.question()["metrics"] == 19
        mirror.take(answer(metrics=line, offset=19))
        assert mirror.rounds == 1
        assert (out / "metrics.jsonl").read_text() == '{"event": "begin"}\n' + line
        outcome = mirror.take(answer(outcome={"kind": "ended", "message": ""}))
        assert outcome == Outcome("ended")
        assert mirror.question()["events"] == 2
        mirror.next_job()
        assert mirror.question()["events"] == 0
    assert [event["event"] for event in events] == ["warning", "evaluate_begin"]
    assert (out / "progress.json").is_file()


def test_lines_that_the_server_has_not_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Mirror(config_of(out), lambda event: None, None) as mirror:
        mirror.take(answer(metrics='{"a": 1}\n{"b": 2}\n'))
        mirror.take(answer(metrics='{"c": 3}\n', offset=0))
    assert (out / "metrics.jsonl").read_text() == '{"c": 3}\n'


def test_the_files_of_a_result_are_taken_over(tmp_path: Path) -> None:
    out, result = tmp_path / "out", tmp_path / "result"
    for name in ("round-2", "round-3", "final"):
        (result / name).mkdir(parents=True)
        (result / name / "file").write_text(name)
    (result / "config.yaml").write_text(AT_SERVER)
    (result / "metrics.jsonl").write_text('{"event": "end"}\n')
    with Mirror(config_of(out), lambda event: None, None) as mirror:
        mirror.take(answer())
        for name in ("round-1", "round-2"):
            (out / name).mkdir()
        mirror.install(result)
        mirror.install(tmp_path / "nothing")
    names = {path.name for path in out.iterdir()}
    assert {"round-2", "round-3", "final"} <= names
    assert "round-1" not in names
    assert (out / "metrics.jsonl").read_text() == '{"event": "end"}\n'
