"""The rows of a single site, which has those of no other client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.data.site_rows import load_site_rows
from fedlora.errors import InputError
from support.rows import rows, write_jsonl


def config(path: Path, **keys: Any) -> Config:
    """A site's configuration."""
    return Config(train_file=str(path), **keys)


def test_the_sites_rows_stand_at_its_number(tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "mine.jsonl", rows(3))
    raw = load_site_rows(config(own, eval_file=str(own)), 2, 4)
    assert [len(of) for of in raw.clients] == [0, 0, 3, 0]
    assert raw.clients[2] == raw.eval == rows(3)
    assert raw.names == ["", "", "mine.jsonl", ""]


def test_a_pattern_is_its_own_file_or_one_for_each(tmp_path: Path) -> None:
    for i in (2, 10, 1):
        write_jsonl(tmp_path / f"part_{i}.jsonl", rows(1, i))
    pattern = tmp_path / "part_*.jsonl"
    for client, file in enumerate((1, 2, 10)):  # in natural order
        assert load_site_rows(config(pattern), client, 3).clients[client] == rows(1, file)
    alone = load_site_rows(config(tmp_path / "part_1?.jsonl"), 0, 3)
    assert alone.names[0] == "part_10.jsonl"
    with pytest.raises(InputError, match="matches 3 files; at a site it has to match its own"):
        load_site_rows(config(pattern), 0, 4)
    with pytest.raises(InputError, match="matches no files"):
        load_site_rows(config(tmp_path / "none_*.jsonl"), 0, 3)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"partition": "quantity"}, "partition: quantity divides one data set"),
        ({"eval_fraction": 0.5}, "eval_fraction divides one data set; .* client_eval_fraction"),
        ({"eval_file": "absent.json"}, r"^eval_file: .*absent\.json: no such file"),
    ],
)
def test_a_site_divides_nothing(keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "mine.jsonl", rows(3))
    with pytest.raises(InputError, match=says):
        load_site_rows(config(own, **keys), 0, 2)


def test_a_site_without_rows_of_its_own() -> None:
    with pytest.raises(InputError, match="no data: give the site's own rows as train_file"):
        load_site_rows(Config(), 0, 2)
    with pytest.raises(InputError, match="no data"):  # the package's rows are nobody's own
        load_site_rows(Config(dataset_name="embedded"), 0, 2)
