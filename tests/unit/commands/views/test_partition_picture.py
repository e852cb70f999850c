"""Who holds what, as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.commands.views.partition import Division
from fedlora.commands.views.partition_picture import draw_partition
from fedlora.commands.views.picture import PICTURES, check_picture
from fedlora.errors import InputError

DIVISION = Division(
    "all.csv, $5 [b]", "kind", ["$a", "b_c"], [[2, 1], [0, 4]], ["x", ""], [4, 2], []
)


@pytest.mark.parametrize("ending", PICTURES)
def test_a_picture_of_each_kind(ending: str, tmp_path: Path) -> None:
    path = check_picture(str(tmp_path / f"who{ending}"))
    draw_partition(DIVISION, path)
    begin = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(begin)


def test_texts_of_the_user_are_no_formulas(tmp_path: Path) -> None:
    draw_partition(DIVISION, tmp_path / "who.svg")
    text = (tmp_path / "who.svg").read_text()
    assert "<!-- $a -->" in text
    assert "<!-- 0 x  (r=4) -->" in text


def test_files_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "dir.png").mkdir()
    for name, says in (
        ("who.jpg", "a picture's name ends in .png, .svg, .pdf"),
        ("dir.png", "is a directory"),
        ("absent/who.png", "there is no directory"),
    ):
        with pytest.raises(InputError) as error:
            check_picture(str(tmp_path / name))
        assert says in str(error.value)
