"""`fedlora report` without a browser: what is read, collected and written."""

from __future__ import annotations

import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.adapters.saved_adapter import write_adapter
from fedlora.commands.cli import main
from fedlora.commands.report.collect import Collected
from fedlora.commands.report.page import data_of, render, rounded
from fedlora.commands.report.reading import find_runs, names_of
from fedlora.commands.report.series import group
from fedlora.commands.report.spectrum import EXACT_UP_TO, KEPT, read_spectrum
from fedlora.commands.report.verb import verb
from fedlora.commands.run_files import read_run
from fedlora.errors import InputError
from fedlora.lowrank import LowRank
from fedlora.runs.file_names import AS_WRITTEN
from support.report import collected
from support.report_runs import lines_of, targets_of, update, write_run


def is_drawn(name: str, shown: Collected) -> bool:
    """Whether a report's figure of this name becomes a picture."""
    from fedlora.commands.report import figures

    file = io.BytesIO()
    getattr(figures, name)(shown).savefig(file, format="png", dpi=50)
    return file.getvalue().startswith(b"\x89PNG")


def test_bounds_of_bytes(tmp_path: Path) -> None:
    lines = lines_of(clients=4, layers=1)
    traffic = collected(write_run(tmp_path / "run", lines)).runs[0].traffic
    width = sum(m + n for m, n in lines[0]["modules"].values())
    assert traffic.lower == tuple(4 * width * rank for rank in (32, 16, 8, 4))
    assert traffic.upper == 4 * 812345
    assert traffic.up[0] == traffic.lower  # exact sends up what it trained


def test_a_client_that_was_not_asked_has_no_bytes(tmp_path: Path) -> None:
    lines = lines_of(clients=4)
    del lines[2]["clients"][1]
    traffic = collected(write_run(tmp_path / "run", lines)).runs[0].traffic
    assert traffic.up[0][1] is None
    assert traffic.up[1][1] is not None


def test_many_values_of_a_column_are_summed_up(tmp_path: Path) -> None:
    lines = lines_of(clients=2)
    for client in lines[0]["clients"]:
        client["counts"] = {f"topic {i}": 20 - i for i in range(15)}
    clients = collected(write_run(tmp_path / "run", lines)).runs[0].clients
    assert clients.kinds[-1] == "6 others"
    assert len(clients.kinds) == 10
    assert all(sum(row) == sum(20 - i for i in range(15)) for row in clients.counts)


def test_privacy_evaluations_and_rounding(tmp_path: Path) -> None:
    data = data_of(collected(write_run(tmp_path / "run", lines_of(rounds=2))))["runs"][0]
    assert data["privacy"] == [[1, 0.8, 1e-5], [2, rounded(0.8 * 2**0.5), 1e-5]]
    assert data["evals"][0]["scores"] == {"acc": 0.31, "by.history": 0.25}
    assert rounded({"x": [math.nan, math.inf, 1.23456789, 123456789]}) == {
        "x": [None, None, 1.23457, 123456789]
    }


def test_series_are_named_after_what_differs(tmp_path: Path) -> None:
    for method, rank, seed in (("exact", 4, 1), ("exact", 8, 1), ("exact", 8, 2), ("flora", 4, 1)):
        lines = lines_of(rounds=1, method=method, seed=seed)
        path = tmp_path / f"{method}-{rank}-{seed}"
        write_run(path, lines, final=False, seed=seed, lora_r=rank)
    data = collected(tmp_path)
    assert [x.label for x in data.series] == [
        "exact, lora_r 4",
        "exact, lora_r 8",
        "flora, lora_r 4",
    ]
    assert [len(x.runs) for x in data.series] == [1, 2, 1]
    assert [key for key, _ in data.differing] == ["method", "lora_r", "seed"]


@pytest.mark.parametrize("last", ["", "{", "[1]", '{"client_ranks": '])
def test_a_damaged_comment_leaves_the_settled_configuration(tmp_path: Path, last: str) -> None:
    run = write_run(tmp_path / "run", lines_of(rounds=1), lora_r=4)
    with (run / "config.yaml").open("a") as file:
        file.write(AS_WRITTEN + last)
    found = read_run(run, "run")
    assert found.written == found.config
    assert collected(run).series[0].label == "exact"


def test_equal_runs_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, lines_of(rounds=1), final=False)
    assert [x.label for x in collected(tmp_path).series] == ["exact (a)", "exact (b)"]


def test_the_same_directory_twice_is_one_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines_of(rounds=1), final=False)
    assert len(find_runs([str(run), str(run), f"{run}/../run"])) == 1


def test_directories_of_directories(tmp_path: Path) -> None:
    for name in ("x/1", "x/2", "y/1"):
        write_run(tmp_path / name, lines_of(rounds=1), final=False)
    found = find_runs([str(tmp_path)])
    assert names_of(found) == ["x/1", "x/2", "y/1"]
    assert len(group([read_run(p, str(p)) for p in found])) == 3


def perplexities(tmp_path: Path, values: list[float | None], **more: Any) -> Collected:
    lines = lines_of(rounds=len(values) - 1)
    for line in lines:
        line.pop("client_evaluations", None)
        line.pop("personal_evaluations", None)
    for line, value in zip([x for x in lines if "evaluation" in x], values, strict=True):
        line["evaluation"] = {"perplexity": value, "token_accuracy": 0.01 + 0.3 * line["round"]}
    return collected(write_run(tmp_path / "run", lines, **more))


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([1600.0, 4.0, 2.0, 1.5], True),
        ([1600.0, 4.0], True),
        ([30.0, 4.0, 2.0, 1.6], False),  # 15 times the median of the later rounds
        ([2.0, 4.0, 1600.0], False),
        ([1600.0], False),
        ([None, 4.0, 2.0], False),  # beyond what a number can hold: not drawn at all
    ],
)
def test_a_first_round_that_dwarfs_the_rest_makes_the_scale_logarithmic(
    tmp_path: Path, values: list[float | None], log: bool
) -> None:
    data = perplexities(tmp_path, values)
    scales = {x.measure: x.log for x in data.panels if x.kind == "evaluation"}
    assert scales == {"perplexity": log, "token_accuracy": False}
    pages = data_of(data)["panels"]
    assert next(x["log"] for x in pages if x["measure"] == "perplexity") is log
    if len(values) == 1:
        return
    from fedlora.commands.report.figures import quality

    axes = {x.get_title().partition(",")[0]: x for x in quality(data).axes}
    assert axes["Perplexity"].get_yscale() == ("log" if log else "linear")
    assert axes["Token accuracy"].get_yscale() == "linear"


def test_a_band_that_reaches_below_zero_can_be_drawn_on_a_log_scale(tmp_path: Path) -> None:
    for seed, later in ((1, 1.5), (2, 90.0)):
        lines = lines_of(rounds=2, seed=seed)
        for line in lines:
            if "evaluation" in line:
                line["evaluation"]["perplexity"] = later if line["round"] else 5000.0
        write_run(tmp_path / "runs" / str(seed), lines, seed=seed)
    shown = collected(tmp_path / "runs")
    panel = next(x for x in shown.panels if x.measure == "perplexity")
    assert panel.log
    assert panel.lines[0].curve.mean[1] < (panel.lines[0].curve.sd[1] or 0.0)
    assert is_drawn("quality", shown)


def test_singular_values_are_those_of_the_matrix(tmp_path: Path) -> None:
    shapes = {"model.layers.0.q_proj": (40, 30), "model.layers.10.q_proj": (20, 30)}
    deltas = update(shapes)
    write_adapter(tmp_path / "final", deltas, targets_of(shapes))
    found = read_spectrum(tmp_path)
    assert found.source == "final"
    for layer in found.layers:
        x = deltas[layer.name]
        wanted = torch.linalg.svdvals((x.B @ x.A).double())[: layer.rank]
        assert layer.rank == 12
        assert torch.tensor(layer.values).double() == pytest.approx(wanted, rel=1e-5)
        assert layer.norm == pytest.approx(float(wanted.norm()), rel=1e-5)
        share = (wanted**2).cumsum(0) / (wanted**2).sum()
        assert layer.energy_rank == int((share < 0.99).sum()) + 1


def test_large_factors_give_their_leading_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = EXACT_UP_TO + 40
    left, _ = torch.linalg.qr(torch.randn(size, size))
    right, _ = torch.linalg.qr(torch.randn(size, size))
    values = 3.0 * 0.93 ** torch.arange(size)
    x = LowRank(right.contiguous(), (left * values).contiguous())
    shapes = {"proj": (size, size)}
    write_adapter(tmp_path / "final", {"proj": x}, targets_of(shapes))
    layer = read_spectrum(tmp_path).layers[0]
    assert layer.rank is None
    assert len(layer.values) == KEPT
    assert layer.values == pytest.approx(values[:KEPT].tolist(), rel=1e-3)


def test_newest_round_stands_in_for_a_missing_or_damaged_final(tmp_path: Path) -> None:
    shapes = {"proj": (8, 6)}
    for name in ("round-2", "round-10", "final"):
        write_adapter(tmp_path / name, update(shapes, 3), targets_of(shapes))
    (tmp_path / "final" / "adapter_model.safetensors").write_bytes(b"not a tensor")
    found = read_spectrum(tmp_path)
    assert found.source == "round-10"
    assert "final cannot be used" in found.note


def test_personal_models_have_no_global_spectrum(tmp_path: Path) -> None:
    (tmp_path / "final" / "client-0").mkdir(parents=True)
    found = read_spectrum(tmp_path)
    assert not found.layers
    assert "one model for each client" in found.note


def problems(path: Path) -> str:
    """What the report says is missing; the page can be made all the same."""
    data = collected(path)
    assert "</html>" in render(data)
    return "\n".join(data.runs[0].problems)


def test_a_whole_run_lacks_nothing(tmp_path: Path) -> None:
    assert problems(write_run(tmp_path / "run", lines_of())) == ""


def test_unfinished_run_says_how_far_it_came(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines_of(rounds=4)[:4], final=False)
    assert "not finished: 2 of 4 rounds" in problems(run)
    assert f"fedlora run --resume {run}" in problems(run)


def test_run_that_has_not_begun(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [], final=False)
    assert "metrics.jsonl is empty" in problems(run)
    (run / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing" in problems(run)


def test_older_run_without_a_line_on_its_beginning(tmp_path: Path) -> None:
    lines = lines_of(clients=4)[1:]
    for line in lines:
        line.pop("layers", None)
    run = write_run(tmp_path / "run", lines, final=False)
    assert "an older version" in problems(run)
    shown = collected(run).runs[0]
    assert shown.clients.ids == (0, 1, 2, 3)
    assert shown.clients.ranks == (32, 16, 8, 4)
    assert shown.traffic.upper is None
    assert shown.errors.layers == ()


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines_of(rounds=4), final=False)
    file = run / "metrics.jsonl"
    texts = file.read_bytes().splitlines(keepends=True)
    texts[3] = texts[3][:40] + b"\n"  # round 2, cut off
    texts[4] = b"\xff\xfe\x00 rubbish\n"  # round 3
    texts += [b'{"event": 3}\n', b'["a list"]\n', b'{"event": "round"}\n', b"[" * 10**5]
    file.write_bytes(b"".join(texts))
    said = problems(run)
    assert "6 lines are damaged" in said
    assert "no line of rounds 2, 3" in said
    assert [row["round"] for row in collected(run).runs[0].quality] == [0, 1, 4]


def test_values_of_wrong_types_are_not_shown(tmp_path: Path) -> None:
    lines = lines_of(rounds=2)
    lines[0] |= {"modules": {"q": [1]}, "clients": "none", "parameters": "many", "environment": 3}
    lines[2] |= {
        "clients": [3, {"client": "x"}, {"client": 0, "bytes_up": None, "bytes_down": -1}],
        "aggregation_error": "small",
        "layers": {"q": 3, "p": {"error": None}},
        "evaluation": {"loss": None, "exact_match": "high", "token_accuracy": True},
        "client_evaluations": {"0": None},
        "personal_evaluations": [],
        "seconds": None,
        "privacy": {"epsilon": 10**400},
    }
    run = write_run(tmp_path / "run", lines, final=False, num_rounds="many", seed=[1])
    assert "final/ is missing" in problems(run)
    drawn = json.dumps(data_of(collected(run)))
    for wrong in ('"small"', '"high"', str(10**400)):
        assert wrong not in drawn


def test_damaged_configuration(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines_of(rounds=1))
    (run / "config.yaml").write_text("a: [1\nb")
    assert "config.yaml is damaged" in problems(run)
    (run / "config.yaml").unlink()
    assert "config.yaml is missing" in problems(run)
    assert collected(run).runs[0].method == "exact"


def test_resumed_run_shows_the_later_rounds(tmp_path: Path) -> None:
    lines = lines_of(rounds=2)
    again = json.loads(json.dumps(lines[3]))
    again["evaluation"]["loss"] = 9.5
    text = [*lines[:4], {"event": "resume", "round": 1}, again, *lines[4:]]
    run = write_run(tmp_path / "run", text)
    assert collected(run).runs[0].quality[2]["evaluation"]["loss"] == 9.5


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!--"
    lines = lines_of(rounds=1, method=evil, model=evil)
    page = render(collected(write_run(tmp_path / "run", lines)))
    assert "alert(1)</script>" not in page
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    assert json.loads(found.group(1))["runs"][0]["model"] == evil


def test_pictures_of_runs_with_nothing_to_draw(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [], final=False)
    assert verb([str(run), f"--output={tmp_path / 'it.pdf'}"]) == 0
    assert (tmp_path / "it.pdf").read_bytes().startswith(b"%PDF")


def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    lines = lines_of(rounds=2)
    for client in lines[0]["clients"]:
        client["counts"] = {"$x^{": 3, "$y": 2}
    assert is_drawn("data", collected(write_run(tmp_path / "run", lines)))


def test_mistakes_are_explained(tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "run", lines_of(rounds=1), final=False))
    (tmp_path / "empty").mkdir()
    (tmp_path / "dir.html").mkdir()
    out = ["--output", str(tmp_path / "report.html")]
    for arguments, said in (
        ([], "give the output directory"),
        ([str(tmp_path / "none"), *out], "no such directory"),
        ([f"{run}/config.yaml", *out], "is a file"),
        ([str(tmp_path / "empty"), *out], "holds no run"),
        ([run, "--output", str(tmp_path / "report")], "ends in one of .html"),
        ([run, "--output", str(tmp_path / "report.svg")], "ends in one of .html"),
        ([run, "--output", str(tmp_path / "dir.html")], "is a directory"),
        ([run, "--output", str(tmp_path / "no" / "report.html")], "there is no directory"),
        ([run, "--output"], "--output: give"),
        ([run, *out, "--format", "html,svg"], "--format svg"),
        ([run, *out, "--format", ","], "--format: give"),
        ([run, *out, "--theme"], "no such option"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            verb(list(arguments))
    assert not (tmp_path / "report.html").exists()


def test_unwritable_place_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", lines_of(rounds=1), final=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs this test
    with pytest.raises(InputError, match="cannot be written"):
        verb([str(run), "--output", str(tmp_path / "report.html")])


def test_a_full_disk_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", lines_of(rounds=1), final=False)
    output = tmp_path / "report.html"
    output.write_text("old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        verb([str(run), "--output", str(output)])
    assert output.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "run"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--format" in said
    assert all(len(line) <= 100 for line in said.splitlines())
