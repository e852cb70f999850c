"""A site before any job: its kit, its socket, its rows and its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.commands.doctor.checks import OK, PROBLEM, WARNING, Check
from fedlora.commands.doctor.site import site_checks
from fedlora.config.site import read_site

ROWS = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(12)]


def checks(
    directory: Path, kit: Path | None = None, ready: bool = False, **own: Any
) -> list[Check]:
    """What is said of a site with such a file."""
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {"name": "alpha", "train_file": "rows.jsonl", "socket": "w.sock", **own}
    (directory / "site.yaml").write_text(yaml.safe_dump(values))
    return list(site_checks(read_site(directory / "site.yaml"), kit, ready))


def named(found: list[Check], name: str) -> Check:
    (check,) = [check for check in found if check.name == name]
    return check


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """As much of a kit as says whose it is."""
    path = tmp_path / "kit"
    (path / "startup").mkdir(parents=True)
    (path / "local").mkdir()
    server = {"name": "clinics", "service": {"target": "localhost:1"}}
    client = {"servers": [server], "client": {"fqsn": "alpha"}}
    (path / "startup" / "fed_client.json").write_text(json.dumps(client))
    (path / "local" / "fedlora.json").write_text(json.dumps({"socket": "../w.sock"}))
    return path


def test_without_a_kit_it_is_the_worker_and_the_clock(tmp_path: Path) -> None:
    found = checks(tmp_path)
    assert [check.name for check in found] == ["clock", "worker", "rows"]
    assert named(found, "worker").state == WARNING
    assert "./start" in named(found, "worker").remedy
    assert "a library does not work" in named(found, "rows").found


def test_a_kit_that_fits_and_lacks_its_certificate(tmp_path: Path, kit: Path) -> None:
    found = checks(tmp_path, kit)
    assert named(found, "kit") == Check("kit", OK, "alpha of clinics")
    assert named(found, "socket").state == OK
    assert "nvflare" in named(found, "engine").found
    assert named(found, "certificate").state == PROBLEM


def test_a_kit_of_another_site_or_socket(tmp_path: Path, kit: Path) -> None:
    found = checks(tmp_path, kit, name="beta", socket="x.sock")
    assert "is that of alpha, and the file that of beta" in named(found, "kit").found
    assert named(found, "socket").state == PROBLEM
    (kit / "local" / "fedlora.json").write_text("{}")
    assert "the socket of the site's worker" in named(checks(tmp_path, kit), "socket").found
    (kit / "startup" / "fed_client.json").write_text("[]")
    assert named(checks(tmp_path, kit), "kit").state == PROBLEM


def test_rows_model_and_memory(tmp_path: Path) -> None:
    found = checks(
        tmp_path,
        ready=True,
        model_name_or_path="embedded",
        client_eval_fraction=0.25,
        use_cpu=True,
        bounds={"lora_r": 4, "max_length": 64},
    )
    assert named(found, "rows").found.startswith("12 of 12 can be used: 9 to train on")
    assert "fingerprint" in named(found, "base").found
    assert "for rank 4" in named(found, "memory for training").found


def test_rows_that_cannot_be_read_and_a_model_that_is_not_named(tmp_path: Path) -> None:
    found = checks(tmp_path, ready=True, train_file="none.jsonl", model_name_or_path="embedded")
    assert named(found, "rows and model").state == PROBLEM
    assert "no model is named" in named(checks(tmp_path, ready=True), "rows").found
    kept = checks(tmp_path, ready=True, model_name_or_path="embedded", use_cpu=True)
    assert named(kept, "evaluation").state == WARNING
