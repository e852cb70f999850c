"""`fedlora partition`, as a program reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.partition import verb
from fedlora.errors import InputError
from support.rows import rows, write_jsonl


def test_who_holds_what(tmp_path: Path) -> None:
    everything = rows(60)
    path = write_jsonl(tmp_path / "all.jsonl", everything)
    told: list[Any] = []
    arguments = ["--train_file", str(path), "--client_ranks", "4", "2", "2"]
    picture = tmp_path / "who.svg"
    assert verb([*arguments, "--by", "kind", "--output", str(picture)], told.append) == 0
    (line,) = told
    assert [client["rank"] for client in line["clients"]] == [4, 2, 2]
    assert sum(client["rows"] for client in line["clients"]) == 60
    for kind in {row["kind"] for row in everything}:
        held = sum(client["counts"].get(kind, 0) for client in line["clients"])
        assert held == sum(row["kind"] == kind for row in everything)
    assert line["eval"]["rows"] == sum(line["eval"]["counts"].values()) == 0  # none are held out
    assert line["picture"] == picture
    assert picture.is_file()


def test_without_a_column_there_are_rows_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", rows(9))
    told: list[Any] = []
    verb(["--train_file", str(path), "--num_clients", "3"], told.append)
    assert told[0]["column"] is None
    assert [client["rows"] for client in told[0]["clients"]] == [3, 3, 3]
    assert "counts" not in told[0]["clients"][0]


def test_automatic_ranks_are_not_known_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", rows(9))
    told: list[Any] = []
    arguments = ["--train_file", str(path), "--num_clients", "3", "--client_ranks", "auto"]
    arguments += ["--client_memory", "6GB"]
    verb([*arguments, "--output", str(tmp_path / "who.svg")], told.append)
    assert [client["rank"] for client in told[0]["clients"]] == [None] * 3
    assert "(r=" not in (tmp_path / "who.svg").read_text()
    verb(arguments)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "-", "3", "33.3%"] in lines


def test_a_picture_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a picture's name ends in"):
        verb(["--train_file", "absent.jsonl", "--output", str(tmp_path / "who.txt")])
    with pytest.raises(InputError, match="no such file"):
        verb(["--train_file", "absent.jsonl"])
