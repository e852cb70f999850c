"""The file of a site: its keys, its paths, its bounds, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.config.config import Config
from fedlora.config.site import OWN_KEYS, SITE_KEYS, Site, read_site
from fedlora.errors import InputError


def site(directory: Path, **values: Any) -> Site:
    path = directory / "site.yaml"
    path.write_text(yaml.safe_dump(values))
    return read_site(path)


def test_the_site_s_own_keys_are_keys_of_a_configuration() -> None:
    assert set(SITE_KEYS) <= set(Config.model_fields)
    assert not set(SITE_KEYS) & set(OWN_KEYS)


def test_paths_count_from_the_directory_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    read = site(
        tmp_path,
        name="clinic",
        train_file="rows.jsonl",
        model_name_or_path="base",
        tokenizer_name="hub/name",
        state_dir="kept",
    )
    assert read.settings == {
        "train_file": str(tmp_path / "rows.jsonl"),
        "model_name_or_path": str(tmp_path / "base"),
        "tokenizer_name": "hub/name",
    }
    assert (read.state_dir, read.socket) == (
        str(tmp_path / "kept"),
        str(tmp_path / "kept" / "worker.sock"),
    )
    named = site(tmp_path, name="a/b", socket="x.sock")
    assert (named.state_dir, named.socket) == (
        str(tmp_path / "a-b-state"),
        str(tmp_path / "x.sock"),
    )


def test_bounds_are_read(tmp_path: Path) -> None:
    read = site(tmp_path, name="x", bounds={"lora_r": "8", "lora_target_modules": "q_proj"})
    assert (read.bounds.lora_r, read.bounds.lora_target_modules) == (8, ["q_proj"])
    assert read.bounds.max_steps is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "name: is missing; give one"),
        ({"name": 3}, "name: 3: expected text"),
        ({"name": "\n"}, "expected a short name of the site"),
        ({"trian_file": "x"}, "trian_file: unknown key of a site; did you mean train_file?"),
        ({"seeds": 1}, "seeds: unknown key of a site; fedlora worker --example shows all of them"),
        ({"max_steps": 1}, "max_steps: is the server's to set; a site limits it under `bounds`"),
        ({"bounds": 3}, "bounds: 3: expected a table of keys and values"),
        ({"bounds": {"max_step": 3}}, "bounds: max_step: unknown key; did you mean max_steps?"),
        ({"bounds": {"max_steps": 0}}, "bounds: max_steps: 0 must be at least 1"),
        ({"bounds": {"lora_r": True}}, "bounds: lora_r: True: expected a whole number or none"),
        ({"port": 70000}, "port: 70000 must be less than 65536"),
        ({"rank": 2, "max_rank": 4}, "rank and max_rank exclude each other"),
        ({"socket": "s" * 120}, "is longer than the 107 bytes that a socket's path may have"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    named = values if not values or "name" in values else {"name": "x", **values}
    with pytest.raises(InputError) as raised:
        site(tmp_path, **named)
    assert str(raised.value).startswith(f"{tmp_path / 'site.yaml'}: ")
    assert said in str(raised.value)


def test_a_long_path_is_no_matter_beside_a_port(tmp_path: Path) -> None:
    assert site(tmp_path, name="x", socket="s" * 120, port=4321).port == 4321
