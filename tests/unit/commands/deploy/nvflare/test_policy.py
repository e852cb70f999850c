"""What NVIDIA FLARE's processes may do: fedlora's classes, no code of jobs, no shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.deploy.nvflare import policy
from fedlora.engines.nvflare.kit import CONTROLLER, EXECUTOR, own_values, runs_of, socket_of

DEFAULT: dict[str, Any] = {
    "class_allow_list": ["nvflare.Other"],
    "allow_log_streaming": True,
    "snapshot_persistor": {"args": {"storage": {"args": {"root_dir": "/tmp/nvflare/x"}}}},
    "components": [
        {"id": "job_manager", "args": {"uri_root": "/tmp/nvflare/jobs"}},
        {"id": "site_log_streamer"},
        {"id": "log_receiver"},
        {"id": "resource_manager"},
    ],
}


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """As much of a kit as is read."""
    path = tmp_path / "alpha" / "kit"
    (path / "local").mkdir(parents=True)
    (path / "local" / "resources.json.default").write_text(json.dumps(DEFAULT))
    return path


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def test_a_site_runs_the_executor_alone_and_sends_no_logs(kit: Path) -> None:
    policy.write_site_policy(kit)
    resources = read(kit / "local" / "resources.json")
    assert resources["class_allow_list"] == [EXECUTOR]
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["allow_log_streaming"] is False
    assert [c["id"] for c in resources["components"]] == ["job_manager", "resource_manager"]
    assert Path(socket_of(kit)).resolve() == kit.parent / "worker.sock"


def test_the_server_keeps_all_it_writes_in_its_own_folder(kit: Path) -> None:
    policy.write_server_policy(kit)
    text = (kit / "local" / "resources.json.in").read_text()
    assert "/tmp/" not in text
    assert text.count("@FOLDER@/storage/") == 2
    assert json.loads(text)["class_allow_list"] == [CONTROLLER]
    assert runs_of(kit).resolve() == kit.parent / "runs"


def test_nobody_brings_code_or_uses_a_shell(kit: Path) -> None:
    policy.write_site_policy(kit)
    granted = read(kit / "local" / "authorization.json")["permissions"]
    assert set(granted) == {"project_admin", "org_admin", "lead", "member"}
    for rights in granted.values():
        assert rights.get("byoc", "none") == rights.get("shell_commands", "none") == "none"
    assert [role for role in granted if "submit_job" in granted[role]] == ["project_admin", "lead"]


def test_an_admin_is_told_the_sites(kit: Path) -> None:
    assert policy.write_admin_values(kit, ["alpha"])
    assert not policy.write_admin_values(kit, ["alpha"])
    assert policy.write_admin_values(kit, ["alpha", "beta"])
    assert own_values(kit) == {"sites": ["alpha", "beta"]}
