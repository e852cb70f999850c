"""Files that pictures are written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.commands.views.picture import check_picture, pyplot, save_picture
from fedlora.errors import InputError


def test_a_file_that_cannot_be_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--picture .*x\.jpg: a picture's name ends in"):
        check_picture(str(tmp_path / "x.jpg"), "--picture")
    assert check_picture(str(tmp_path / "x.svg")) == tmp_path / "x.svg"


def test_a_figure_is_written_or_the_reason_said(tmp_path: Path) -> None:
    plot = pyplot()
    figure = plot.figure(figsize=(1, 1))
    save_picture(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot be written: No such file"):
        save_picture(figure, tmp_path / "absent" / "x.png")
    plot.close(figure)
