"""What a federation's folders were made from: it grows, and nothing handed out changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.deploy.record import (
    KEPT,
    Record,
    check_addition,
    read_record,
    record_of,
    refuse_foreign,
    write_record,
)
from fedlora.errors import InputError
from support.federations import LEAD, SMALL, federation_of


def record(directory: Path, **changed: Any) -> Record:
    return record_of("nvflare", federation_of(directory, **changed))


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    made, output = record(tmp_path), tmp_path / "out"
    assert read_record(output) is None
    (output / KEPT).mkdir(parents=True)
    write_record(output, made)
    assert read_record(output) == made
    (output / KEPT / "record.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_record(output)


def test_a_directory_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other things"):
        read_record(tmp_path)


def test_one_more_site_is_an_addition_and_one_less_is_told(tmp_path: Path) -> None:
    before = record(tmp_path)
    now = record(tmp_path, sites={**SMALL["sites"], "beta": {}})
    assert check_addition(tmp_path, before, now) == ()
    assert check_addition(tmp_path, now, before) == ("beta",)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "others"}, "name: is now others, and the folders .* say clinics"),
        ({"server": {"host": "example.org"}}, "server: is now host example.org"),
        ({"certificate_days": 9}, "certificate_days: is now 9"),
        ({"admins": {LEAD: "project_admin"}}, "is now project_admin of server"),
        ({"sites": {"alpha": {"organization": "z"}}}, "alpha: is now site of z"),
    ],
)
def test_what_was_handed_out_cannot_change(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check_addition(tmp_path, record(tmp_path), record(tmp_path, **changed))


def test_a_folder_of_somebody_else_is_not_written_into(tmp_path: Path) -> None:
    made = record(tmp_path)
    (tmp_path / "alpha").mkdir()
    refuse_foreign(tmp_path, made, made)
    with pytest.raises(InputError, match="alpha: is there already"):
        refuse_foreign(tmp_path, None, made)
