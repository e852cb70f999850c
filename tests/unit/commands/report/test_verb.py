"""`fedlora report`: what is written, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.report.verb import check_formats, check_output, verb, write
from fedlora.errors import InputError
from support.report_runs import lines_of, write_run


def test_the_page_is_written_and_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines_of(clients=2, rounds=1, layers=1)[:-1])
    told: list[Any] = []
    output = tmp_path / "page.html"
    assert verb([str(run), "--output", str(output)], told.append) == 0
    assert told[0]["written"] == [str(output)]
    assert told[0]["runs"][0]["name"] == "run"
    assert any("not finished" in problem for problem in told[0]["runs"][0]["problems"])
    assert output.read_text().startswith("<!")


def test_formats_by_the_ending_or_by_name() -> None:
    file = Path("it.PDF")
    assert check_formats(None, file) == ["pdf"]
    assert check_formats("pdf, HTML,pdf", file) == ["html", "pdf"]
    for named in ("svg", ",", ""):
        with pytest.raises(InputError, match="--format"):
            check_formats(named, file)


def test_files_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "dir.html").mkdir()
    for name, says in (
        ("it.txt", "the name of a report ends in one of .html, .png, .pdf"),
        ("dir.html", "is a directory"),
        ("absent/it.html", "there is no directory"),
    ):
        with pytest.raises(InputError) as error:
            check_output(str(tmp_path / name))
        assert says in str(error.value)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    assert write(tmp_path / "it.html", b"one").read_bytes() == b"one"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "full", b"two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "it.html"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "report: give the output directory of a run, or of several"),
        (["run", "--colour"], "--colour: report has no such option"),
        (["absent"], "absent: no such directory"),
    ],
)
def test_mistakes(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        verb(arguments)
