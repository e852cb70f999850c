"""The server keeps runs outside of jobs, and takes them over from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.engines.nvflare.hosting import configuration, publish, take_over
from fedlora.engines.nvflare.kit import OWN_FILE
from fedlora.engines.nvflare.order import Order, rounds_in
from fedlora.errors import InputError

RUN = "0123456789abcdef"


def kit_of(path: Path, **own: str) -> Path:
    (path / OWN_FILE).parent.mkdir(parents=True)
    (path / OWN_FILE).write_text(json.dumps({"runs": "runs", **own}))
    return path


def a_run(path: Path, *rounds: int) -> Path:
    for number in rounds:
        (path / f"round-{number}").mkdir(parents=True)
        (path / f"round-{number}" / "file").write_text(str(path))
    for name in ("config.yaml", "metrics.jsonl", "progress.json", ".lock"):
        (path / name).write_text(name)
    (path / ".spool.partial").mkdir()
    return path


def test_paths_are_those_of_the_server(tmp_path: Path) -> None:
    settings = {"output_dir": "/admin/out", "report_to": "wandb", "kit": None, "seed": 3}
    kit = kit_of(tmp_path, model_name_or_path="/srv/base")
    config = configuration(Order(RUN, settings, []), kit)
    assert (config.engine, config.kit) == ("nvflare", str(kit))
    assert config.output_dir == str(kit / "runs" / RUN)
    assert (config.model_name_or_path, config.report_to, config.seed) == ("/srv/base", None, 3)


def test_no_code_of_a_model_runs_at_the_server(tmp_path: Path) -> None:
    order = Order(RUN, {"trust_remote_code": True}, [])
    with pytest.raises(InputError, match="runs no code that comes with a model"):
        configuration(order, kit_of(tmp_path))


@pytest.mark.parametrize(("here", "came", "kept"), [((1, 2), (2, 3), [2, 3]), ((3,), (2, 3), [3])])
def test_who_has_come_further_is_gone_on_with(
    tmp_path: Path, here: tuple[int, ...], came: tuple[int, ...], kept: list[int]
) -> None:
    take_over(a_run(tmp_path / "saved", *came), a_run(tmp_path / RUN, *here))
    assert rounds_in(tmp_path / RUN) == kept


def test_a_run_that_is_new_here_is_taken(tmp_path: Path) -> None:
    take_over(a_run(tmp_path / "saved", 1), tmp_path / RUN)
    assert rounds_in(tmp_path / RUN) == [1]
    assert not (tmp_path / RUN / "progress.json").exists()


def test_a_result_holds_what_a_run_is(tmp_path: Path) -> None:
    run = a_run(tmp_path / RUN, 1)
    publish(run, tmp_path / "result")
    names = sorted(path.name for path in (tmp_path / "result").iterdir())
    assert names == ["config.yaml", "metrics.jsonl", "round-1"]
    (run / "metrics.jsonl").write_text("more")
    assert (tmp_path / "result" / "metrics.jsonl").read_text() == "metrics.jsonl"
    publish(tmp_path / "nothing", tmp_path / "none")
    assert not (tmp_path / "none").exists()
