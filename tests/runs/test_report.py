"""`fedlora report` of real runs: its numbers, its series, its page and its pictures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora import embedded as demo
from fedlora.commands.cli import main
from fedlora.commands.report.page import data_of, render
from fedlora.commands.run_files import read_run
from fedlora.config.sources import layered
from fedlora.config.yaml_file import read_yaml
from support.report import collected
from support.report_runs import lines_of, write_run

pytestmark = pytest.mark.usefixtures("kept_bases")


def close(shown: Any, written: float) -> bool:
    """Equal to the documented six significant digits."""
    return math.isclose(shown, written, rel_tol=5.1e-6, abs_tol=0.0)


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short runs of the embedded model by four clients: exact and flora, two seeds each."""
    root = tmp_path_factory.mktemp("real")
    for method in ("exact", "flora"):
        for seed in (1, 2):
            keys = {
                "num_rounds": 2,
                "max_steps": 1,
                "num_clients": 4,
                "client_ranks": [8, 4, 4, 2],
                "max_train_samples": 24,
                "per_device_train_batch_size": 4,
                "max_eval_samples": 6,
                "client_eval_fraction": 0.1,
                "num_threads": 1,
                "method": method,
                "seed": seed,
                "output_dir": str(root / f"{method}-{seed}"),
            }
            fedlora.run(fedlora.Config(**layered(read_yaml(demo.CONFIG), keys)))
    return root


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


def test_numbers_of_a_real_run_are_those_of_its_metrics(real_runs: Path) -> None:
    run = real_runs / "exact-1"
    shown = data_of(collected(run))["runs"][0]
    lines = metrics_of(run)
    written = [line for line in lines if line["event"] == "round"]
    start = next(line for line in lines if line["event"] == "start")
    begin = next(line for line in lines if line["event"] == "begin")
    assert [row["round"] for row in shown["quality"]] == [0, 1, 2]
    for row, line in zip(shown["quality"], [start, *written], strict=True):
        for key, value in line["evaluation"].items():
            assert close(row["evaluation"][key], value)
        own = [x["loss"] for x in line["client_evaluations"].values()]
        assert close(row["client_evaluations"]["loss"], sum(own) / len(own))
    for k, line in enumerate(written):
        assert sum(x or 0 for x in shown["traffic"]["up"][k]) == line["bytes_up"]
        assert sum(x or 0 for x in shown["traffic"]["down"][k]) == line["bytes_down"]
        assert close(shown["errors"]["total"][k], line["aggregation_error"])
        assert close(shown["seconds"]["train"][k], line["seconds"]["train"])
        for name, x in line["layers"].items():
            at = shown["errors"]["layers"].index(name)
            assert close(shown["errors"]["cells"][at][k], x["error"])
            assert close(shown["errors"]["norms"][at][k], x["norm"])
    change = next(x for x in shown["changes"] if x["measure"] == "loss")
    for i, client in enumerate(shown["clients"]["ids"]):
        assert close(change["before"][i], start["client_evaluations"][str(client)]["loss"])
        assert close(change["after"][i], written[-1]["client_evaluations"][str(client)]["loss"])
    for i, client in enumerate(begin["clients"]):
        assert shown["clients"]["ranks"][i] == client["rank"]
        assert shown["clients"]["rows"][i] == client["rows"]
        assert sum(shown["clients"]["counts"][i]) == sum(client["counts"].values())
    assert shown["parameters"] == begin["parameters"]
    assert shown["problems"] == []


def test_seeds_become_mean_and_deviation(real_runs: Path) -> None:
    data = collected(real_runs)
    assert [series.label for series in data.series] == ["exact", "flora"]
    panel = next(x for x in data.panels if (x.kind, x.measure) == ("evaluation", "loss"))
    values = [
        next(line for line in metrics_of(real_runs / f"exact-{seed}") if line["event"] == "round")
        for seed in (1, 2)
    ]
    one, two = (line["evaluation"]["loss"] for line in values)
    curve = panel.lines[0].curve
    assert curve.mean[1] == pytest.approx((one + two) / 2)
    assert curve.sd[1] == pytest.approx(abs(one - two) / math.sqrt(2))
    assert curve.count[1] == 2
    assert [run.label for run in data.runs][:2] == ["exact, seed 1", "exact, seed 2"]


def test_what_the_seed_draws_makes_no_other_configuration(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    """Ranks, a measured dtype, cohorts, names of the run: only the seed was written otherwise."""
    keys = {**small_run, "num_rounds": 1, "max_steps": 1, "client_ranks": None}
    keys |= {"rank_choices": [2, 4, 8], "client_overrides": {1: {"lora_r": 3, "max_steps": 2}}}
    ranks = []
    for method, seed in (("exact", 1), ("exact", 2), ("flora", 3)):
        own = {"method": method, "seed": seed, "run_name": f"{method} {seed}", "project": str(seed)}
        path = tmp_path / f"{method}-{seed}"
        fedlora.run(fedlora.Config(**{**keys, **own, "output_dir": str(path)}))
        ranks.append([x["rank"] for x in metrics_of(path)[0]["clients"]])
    assert ranks[0] != ranks[1]
    data = collected(tmp_path)
    assert [(x.label, len(x.runs)) for x in data.series] == [("exact", 2), ("flora", 1)]
    assert ("client_ranks", tuple(" ".join(map(str, x)) for x in ranks)) in data.differing
    # Drawn from other choices, or given as a list: another configuration.
    for name, more in (("other", {"rank_choices": [2, 16]}), ("given", {"client_ranks": ranks[0]})):
        changed = {**keys, "client_overrides": None, "rank_choices": None, **more, "seed": 1}
        fedlora.run(fedlora.Config(**{**changed, "output_dir": str(tmp_path / name)}))
    assert len(collected(tmp_path).series) == 4


def test_a_rank_written_in_two_ways_is_one_configuration(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    for seed, ranks in ((1, {"client_ranks": [4, 4, 4, 4]}), (2, {"lora_r": 4})):
        keys = {**small_run, "num_rounds": 1, "max_steps": 1, "client_ranks": None, "lora_r": 4}
        own = {**ranks, "seed": seed, "output_dir": str(tmp_path / str(seed))}
        fedlora.run(fedlora.Config(**{**keys, **own}))
    assert [len(x.runs) for x in collected(tmp_path).series] == [2]


def test_a_run_begun_twice_still_knows_what_was_written(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    import shutil

    keys = {**small_run, "num_rounds": 1, "max_steps": 1, "client_ranks": None}
    path = tmp_path / "run"
    config = fedlora.Config(**{**keys, "rank_choices": [2, 8], "output_dir": str(path)})
    fedlora.run(config)
    said = read_run(path, "run").written
    assert (said["rank_choices"], said["client_ranks"]) == ([2, 8], None)
    for lost in ("final", "round-1"):
        shutil.rmtree(path / lost)
    (path / "metrics.jsonl").unlink()
    fedlora.run(None, resume=path)
    assert read_run(path, "run").written == said


def test_clients_alone_are_named_and_repeated_over_seeds(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    from fedlora.engines.local import run_session
    from fedlora.runs.lone_session import alone
    from fedlora.runs.session import assemble

    for seed in (1, 2):
        keys = {**small_run, "num_rounds": 1, "max_steps": 1, "seed": seed}
        session = assemble(fedlora.Config(**{**keys, "output_dir": str(tmp_path / f"all-{seed}")}))
        run_session(session)
        for client in (2, 3):  # of one rank
            run_session(alone(session, client, tmp_path / f"alone-{client}-{seed}"))
    data = collected(tmp_path)
    assert sorted((x.label, len(x.runs)) for x in data.series) == [
        ("client 2 alone", 2),
        ("client 3 alone", 2),
        ("exact", 2),
    ]


def test_page_needs_nothing_else(real_runs: Path) -> None:
    page = render(collected(real_runs))
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", outside)
    assert "@import" not in outside
    assert "url(" not in outside
    assert "default-src 'none'" in page
    assert page.count("<script") == page.count("</script>") == 3
    assert "<!--" not in outside.replace("<!doctype", "")


def test_command_writes_page_and_pictures(
    real_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "both.html"
    arguments = [str(real_runs), "--output", str(output), "--format", "html,png,pdf"]
    assert main(["report", *arguments]) == 0
    written = sorted(path.name for path in tmp_path.iterdir())
    names = ("bytes", "clients", "data", "error", "quality", "seconds", "spectrum")
    assert written == ["both.html", "both.pdf", *(f"both-{x}.png" for x in names)] or written == [
        *(f"both-{x}.png" for x in names),
        "both.html",
        "both.pdf",
    ]
    assert (tmp_path / "both-quality.png").read_bytes().startswith(b"\x89PNG")
    pdf = (tmp_path / "both.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page ") == len(names)
    assert f"written: {output}" in capsys.readouterr().out


def test_hundred_rounds_of_hundred_clients_stay_under_four_megabytes(tmp_path: Path) -> None:
    lines = lines_of(clients=100, rounds=100, layers=32)
    for i, line in enumerate(x for x in lines if x["event"] == "round"):
        for client in line["clients"]:  # no two numbers alike
            client["bytes_up"] += 1009 * i + client["client"]
            client["bytes_down"] += 2003 * i + client["client"]
    run = write_run(tmp_path / "run", lines)
    assert len(render(collected(run)).encode()) < 4_000_000
