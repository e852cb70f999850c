"""The unit of a worker allows what the worker needs, and not more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora.commands.worker.unit import Installed, unit_of
from fedlora.config.site import Site


def made(path: Path, written_to: str | None = None, **values: Any) -> Installed:
    site = Site(
        **{
            "name": "my clinic",
            "state_dir": "/srv/kept",
            "socket": "/run/x/s",
            "settings": {"model_name_or_path": str(path), "train_file": "/srv/rows.jsonl"},
            **values,
        }
    )
    return unit_of(Path("/srv/a site.yaml"), site, "/opt/bin/python", "carol", written_to)


def test_files_alone_need_no_network(tmp_path: Path) -> None:
    installed = made(tmp_path)
    lines = installed.text.splitlines()
    assert installed.name == "fedlora-my-clinic.service"
    for line in (
        "User=carol",
        'ExecStart=/opt/bin/python -m fedlora worker --site "/srv/a site.yaml"',
        "ReadWritePaths=/srv/kept /run/x",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "ProtectHome=read-only",
        "PrivateNetwork=yes",
        "RestrictAddressFamilies=AF_UNIX",
        "Environment=HF_HUB_OFFLINE=1",
        "Environment=HF_DATASETS_CACHE=/srv/kept/cache",
        "RestartPreventExitStatus=2",
    ):
        assert line in lines
    assert "PrivateDevices=yes" not in lines, "a GPU is a device"


def test_a_hub_and_a_port_need_some(tmp_path: Path) -> None:
    by_name = made(tmp_path, settings={"model_name_or_path": "hub/name", "use_cpu": True}).text
    assert "PrivateNetwork" not in by_name
    assert "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n" in by_name
    assert "Environment=HF_HOME=/srv/kept/hub\n" in by_name
    assert "PrivateDevices=yes\n" in by_name
    by_port = made(tmp_path, port=4321).text
    assert "IPAddressDeny=any\nIPAddressAllow=localhost\n" in by_port


def test_what_lies_in_tmp_stays_visible() -> None:
    assert "PrivateTmp=yes" not in made(Path("/srv"), state_dir="/tmp/kept").text
    assert "PrivateTmp=yes" in made(Path("/srv")).text


def test_the_commands_put_it_into_place(tmp_path: Path) -> None:
    assert made(tmp_path, "here.service").commands == (
        "mkdir -p -m 700 /srv/kept",
        "mkdir -p -m 700 /run/x",
        "sudo install -m 644 here.service /etc/systemd/system/fedlora-my-clinic.service",
        "sudo systemctl daemon-reload",
        "sudo systemctl enable --now fedlora-my-clinic.service",
        "fedlora worker --site '/srv/a site.yaml' --status",
    )
