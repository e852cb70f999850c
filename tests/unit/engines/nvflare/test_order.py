"""A job says what is to be run, and carries no code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.engines.nvflare.kit import CONTROLLER, EXECUTOR, TASK
from fedlora.engines.nvflare.order import (
    Order,
    copy_saved,
    read_order,
    rounds_in,
    run_id,
    saved_in,
    write_job,
)
from fedlora.errors import InputError

ORDER = Order("0123456789abcdef", {"num_rounds": 3}, ["alpha", "beta"], resumes=True)


def test_a_job_is_configuration_alone(tmp_path: Path) -> None:
    job = tmp_path / "job"
    write_job(job, ORDER, ["alpha"])
    files = sorted(p.relative_to(job).as_posix() for p in job.rglob("*") if p.is_file())
    assert files == [
        "app_server/config/config_fed_server.json",
        "app_server/config/fedlora_run.json",
        "app_site/config/config_fed_client.json",
        "meta.json",
    ]
    meta, server, site = (
        json.loads((job / name).read_text()) for name in (files[3], files[0], files[2])
    )
    assert meta["deploy_map"] == {"app_server": ["server"], "app_site": ["alpha"]}
    assert server["workflows"][0]["path"] == CONTROLLER
    assert server["server"]["task_request_interval"] == 0.1, "elsewhere it is ignored"
    (executor,) = site["executors"]
    assert (executor["tasks"], executor["executor"]["path"]) == ([TASK], EXECUTOR)
    assert read_order(job / "app_server" / "config") == ORDER
    assert saved_in(job / "app_server" / "config") is None


def test_the_names_in_a_job_are_those_of_classes() -> None:
    from fedlora.engines.nvflare.controller import CourseController
    from fedlora.engines.nvflare.executor import SiteExecutor

    for path, kind in ((CONTROLLER, CourseController), (EXECUTOR, SiteExecutor)):
        assert path == f"{kind.__module__}.{kind.__name__}"


@pytest.mark.parametrize("run", ["../../elsewhere", "0123", ""])
def test_a_run_is_no_path(tmp_path: Path, run: str) -> None:
    write_job(tmp_path / "job", Order(run, {}, []), [])
    with pytest.raises(InputError, match="names no run"):
        read_order(tmp_path / "job" / "app_server" / "config")


def test_a_job_without_an_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="says not what is to be run"):
        read_order(tmp_path)


def a_run(path: Path, header: str) -> Path:
    for number in (2, 10):
        (path / f"round-{number}").mkdir(parents=True)
        (path / f"round-{number}" / "file").write_text("x")
    (path / "metrics.jsonl").write_text(header + "\n")
    (path / "config.yaml").write_text("method: exact\n")
    (path / "progress.json").write_text("{}")
    return path


def test_saved_rounds_go_with_a_job(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", "{}")
    assert rounds_in(run) == [2, 10]
    write_job(tmp_path / "job", ORDER, ["alpha"], run)
    saved = saved_in(tmp_path / "job" / "app_server" / "config")
    assert saved is not None
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["config.yaml", "metrics.jsonl", "round-10", "round-2"]
    copy_saved(saved, tmp_path / "again")
    assert rounds_in(tmp_path / "again") == [2, 10]


def test_a_run_is_known_by_its_id_or_its_first_line(tmp_path: Path) -> None:
    assert run_id(tmp_path) is None
    known = a_run(tmp_path / "a", json.dumps({"event": "begin", "run": ORDER.run}))
    assert run_id(known) == ORDER.run
    alone = run_id(a_run(tmp_path / "b", json.dumps({"event": "begin", "started": "now"})))
    assert alone is not None
    assert len(alone) == 16
    assert alone == run_id(a_run(tmp_path / "c", json.dumps({"event": "begin", "started": "now"})))
