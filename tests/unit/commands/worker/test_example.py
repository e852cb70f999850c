"""The example of a site's file can be used as it stands, and shows every key."""

from __future__ import annotations

from pathlib import Path

from fedlora.commands.worker.example import EXAMPLE
from fedlora.config.site import OWN_KEYS, SITE_KEYS, Bounds, read_site
from fedlora.config.site_run import check_settings


def test_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(EXAMPLE)
    site = read_site(path)
    assert site.name == "clinic"
    assert check_settings(site).num_threads == 1
    assert all(value for key, value in site.bounds.model_dump().items() if key[0] != "m")


def test_what_stands_in_comments_is_possible_too(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    lines = EXAMPLE.splitlines()
    alone = ("# rank:", "# The file", "# Relative", "# ---")
    path.write_text(
        "\n".join(
            line.replace("# ", "", 1) if line.lstrip().startswith("# ") and ": " in line[:40]
            and not line.startswith(alone) else line
            for line in lines
        )
    )  # fmt: skip
    site = read_site(path)
    assert site.port == 8765
    assert site.bounds.model_name_or_path == ["Qwen/Qwen2.5-0.5B"]
    assert check_settings(site).label_names == ["negative", "positive"]


def test_every_key_is_named() -> None:
    for key in (*OWN_KEYS, *SITE_KEYS, *Bounds.model_fields):
        assert key in EXAMPLE, key
