"""What a run tells is kept until the admin has taken it."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

from fedlora.engines.nvflare.feed import Feed, Outcome, read_outcome, write_outcome


def question(events: int, metrics: bytes = b"") -> dict[str, Any]:
    sha256 = hashlib.sha256(metrics).hexdigest()
    return {"events": events, "metrics": len(metrics), "sha256": sha256}


def test_events_are_told_once() -> None:
    feed = Feed()
    feed.tell({"event": "begin"})
    feed.tell({"event": "round"})
    assert [e["event"] for e in feed.answer(question(0))["events"]] == ["begin", "round"]
    assert feed.answer(question(2))["events"] == []
    feed.tell({"event": "end"})
    answer = feed.answer(question(2))
    assert [e["event"] for e in answer["events"]] == ["end"]
    assert answer["outcome"] is None
    assert feed.answer(None)["events"][0]["event"] == "begin"


def test_whole_lines_of_the_log_are_told(tmp_path: Path) -> None:
    feed = Feed()
    feed.of(tmp_path)
    assert feed.answer(question(0))["config"] is None, "there is no run yet"
    (tmp_path / "config.yaml").write_text("method: exact\n")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"a": 1}\n{"b": 2}\n{"half')
    answer = feed.answer(question(0))
    assert (answer["config"], answer["offset"]) == ("method: exact\n", 0)
    assert answer["metrics"] == '{"a": 1}\n{"b": 2}\n'
    answer = feed.answer(question(0, b'{"a": 1}\n'))
    assert (answer["offset"], answer["metrics"]) == (9, '{"b": 2}\n')


def test_who_knows_other_lines_is_told_all(tmp_path: Path) -> None:
    feed = Feed()
    feed.of(tmp_path)
    (tmp_path / "config.yaml").write_text("method: exact\n")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"a": 1}\n')
    for other in (b'{"b": 2}\n', b'{"a": 1}\n{"c": 3}\n'):
        answer = feed.answer(question(0, other))
        assert (answer["offset"], answer["metrics"]) == (0, '{"a": 1}\n')


def test_the_end_is_told_last_and_waited_for() -> None:
    feed = Feed()
    feed.end(Outcome("ended"), 60.0)  # nobody has ever asked, so nobody is waited for
    feed = Feed()
    feed.tell({"event": "end"})
    feed.answer(question(0))
    ended = threading.Thread(target=feed.end, args=(Outcome("mistake", "no rows"), 60.0))
    ended.start()
    while (answer := feed.answer(question(1)))["outcome"] is None:
        pass
    ended.join(30)
    assert not ended.is_alive()
    assert answer["outcome"] == {"kind": "mistake", "message": "no rows"}


def test_the_end_stands_in_the_result_too(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    write_outcome(tmp_path, Outcome("stopped", "aborted"))
    assert read_outcome(tmp_path) == Outcome("stopped", "aborted")
