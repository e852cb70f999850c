"""A worker's status and a site's check, in lines for a person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora.commands.worker.show import check_lines, status_lines
from fedlora.config.site import Bounds, Site
from fedlora.runs.site_check import SiteCheck

STATUS: dict[str, Any] = {
    "site": "clinic",
    "state": "training",
    "since": 1000.0,
    "pid": 7,
    "restarts": 1,
    "run": "r-1",
    "round": 3,
    "attempt": 0,
    "step": 4,
    "steps": 10,
    "loss": 1.25,
    "rows": 1200,
    "eval_rows": 30,
    "rank": 8,
    "memory_bytes": 2_000_000,
    "bases_loaded": 1,
}


def test_a_worker_that_trains() -> None:
    first, *others = status_lines(STATUS, 1012.0)
    assert first.startswith("clinic: training since ")
    assert first.endswith(" (12 s)")
    assert others == [
        "  run     r-1, round 3, attempt 0: step 4 of 10, loss 1.2500",
        "  rows    1,200 to train on, 30 to evaluate on; rank 8",
        "  memory  2.0 MB; the base was loaded 1 times",
        "  process 7, started again 1 times",
    ]


def test_a_worker_that_starts() -> None:
    status = {key: STATUS[key] for key in ("site", "since", "pid", "restarts")}
    lines = status_lines({**status, "state": "starting"}, 1000.0)
    assert len(lines) == 2
    assert "starting" in lines[0]


def test_a_check_says_what_can_be_used_and_how_to_go_on() -> None:
    site = Site(name="x", socket="/s", max_rank=4, bounds=Bounds(lora_target_modules=["q", "v"]))
    check = SiteCheck(10, 7, 2, 90, {"no text": 1}, ("no", "yes"), "text", "Net", 1000, 3, ("n",))
    lines = check_lines(Path("site.yaml"), site, check)
    assert lines[0] == "x: ready"
    assert lines[-1] == "fedlora worker --site site.yaml"
    text = "\n".join(lines)
    for said in (
        "9 of 10 can be used: 7 to train on (90 tokens), 2 to evaluate on",
        "1 dropped: no text",
        "labels no, yes",
        "3 modules that can be trained",
        "bounds  max_rank 4; lora_target_modules q, v",
        "socket  /s",
        "note    n",
    ):
        assert said in text


def test_a_check_without_a_model_and_without_bounds() -> None:
    lines = check_lines(Path("s"), Site(name="x", socket="/s", port=99), SiteCheck(10))
    text = "\n".join(lines)
    assert "10 read; which can be used shows once a model is named" in text
    assert "none: a server may set what it likes" in text
    assert "port 99 of 127.0.0.1, called by /s" in text
