"""Sets what NVIDIA FLARE's processes may do: classes that are built, roles, where they write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora.engines.nvflare.kit import CONTROLLER, EXECUTOR, OWN_FILE

RESOURCES = Path("local") / "resources.json"
AUTHORIZATION = Path("local") / "authorization.json"
FOLDER = "@FOLDER@"
"""Stands in the server's resources for its folder, which only its machine knows; `start` fills it
in, since NVIDIA FLARE takes no relative path there."""

_STREAMED = ("site_log_streamer", "log_receiver")
"""What would send a site's logs to the server; they may quote what should stay at the site."""

_LOOKS = {"view": "any"}
_LEADS = {
    "submit_job": "any",
    "clone_job": "none",
    "manage_job": "n:submitter",
    "download_job": "n:submitter",
    "view": "any",
    "operate": "none",
    "shell_commands": "none",
    "byoc": "none",
}
_ALL = {**_LEADS, "manage_job": "any", "download_job": "any", "operate": "any"}

PERMISSIONS = {"project_admin": _ALL, "org_admin": _LOOKS, "lead": _LEADS, "member": _LOOKS}
"""Role -> right -> whom it is granted. Nobody may bring code (`byoc`) or use a shell."""


def write_site_policy(kit: Path) -> None:
    """Set what a site's client may do, in its kit."""
    _write_resources(kit, _of_site, RESOURCES)
    _write(kit / AUTHORIZATION, {"format_version": "1.0", "permissions": PERMISSIONS})
    _write(kit / OWN_FILE, {"socket": "../worker.sock"})


def write_server_policy(kit: Path) -> None:
    """Set what the server may do, in its kit; its resources are filled in when it starts."""
    _write_resources(kit, _of_server, RESOURCES.with_name(RESOURCES.name + ".in"))
    _write(kit / AUTHORIZATION, {"format_version": "1.0", "permissions": PERMISSIONS})
    _write(kit / OWN_FILE, {"runs": "../runs"})


def write_admin_values(kit: Path, sites: list[str]) -> bool:
    """Say in an admin's kit which sites there are; whether that has changed."""
    path, wanted = kit / OWN_FILE, {"sites": sites}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == wanted:
        return False
    _write(path, wanted)
    return True


def _write_resources(kit: Path, change: Callable[[dict[str, Any]], None], to: Path) -> None:
    """Those of the provisioning, with what is changed of them."""
    default = kit / RESOURCES.with_name(RESOURCES.name + ".default")
    resources = json.loads(default.read_text(encoding="utf-8"))
    resources["class_list_enforcement_mode"] = "enforce"
    resources["components"] = [c for c in resources["components"] if c["id"] not in _STREAMED]
    change(resources)
    _write(kit / to, resources)


def _of_site(resources: dict[str, Any]) -> None:
    resources["class_allow_list"] = [EXECUTOR]
    resources["allow_log_streaming"] = False


def _of_server(resources: dict[str, Any]) -> None:
    resources["class_allow_list"] = [CONTROLLER]
    snapshots = resources["snapshot_persistor"]["args"]["storage"]["args"]
    snapshots["root_dir"] = f"{FOLDER}/storage/snapshots"
    (jobs,) = (c for c in resources["components"] if c["id"] == "job_manager")
    jobs["args"]["uri_root"] = f"{FOLDER}/storage/jobs"


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
