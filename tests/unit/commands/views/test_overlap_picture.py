"""The picture of an overlap."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.adapters.overlap import overlap
from fedlora.commands.views.overlap_picture import draw_overlap
from fedlora.commands.views.picture import PICTURES
from support.merging import made

FOUND = overlap([made({"q": ((9, 8), 2), "k": ((9, 8), 1)}, i) for i in (1, 2, 3)])


@pytest.mark.parametrize("ending", PICTURES)
def test_a_picture_of_each_kind(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"overlap{ending}"
    draw_overlap(FOUND, ["a/one", "a/$two", "three"], path)
    begin = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(begin)
    if ending == ".svg":
        text = path.read_text()
        assert "<!-- 2 $two -->" in text
        share = FOUND.pairs[0].shared[0]
        assert f"<!-- {share:.0%} -->" in text
