"""Events as lines of a log."""

from __future__ import annotations

from fedlora.engines.flower.event_lines import event_line, read_event


def test_an_event_is_found_in_the_line_of_a_log() -> None:
    event = {"event": "round", "round": 3, "text": "a\nb"}
    line = event_line(event)
    assert "\n" not in line
    assert read_event(f"INFO : {line}\n") == event


def test_other_lines_are_no_events() -> None:
    assert read_event("INFO : Starting ServerApp") is None
    assert read_event("fedlora-event {") is None
    assert read_event("fedlora-event [1]") is None
