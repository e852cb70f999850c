"""The file of a site that is deployed: it can be read, and grants what the federation's says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.deploy.site_file import FILL_IN, site_text
from fedlora.config.site import Site, read_site
from support.federations import federation_of


def site_of(directory: Path, **known: Any) -> tuple[str, Site]:
    """The text of a site's file, and what is read of it."""
    federation = federation_of(directory, sites={"alpha": known})
    text = site_text("alpha", federation.name, federation.sites["alpha"])
    (directory / "site.yaml").write_text(text)
    return text, read_site(directory / "site.yaml")


def test_what_is_not_known_is_marked(tmp_path: Path) -> None:
    text, site = site_of(tmp_path)
    assert text.count(f"# {FILL_IN}") >= 4
    assert (site.name, site.socket) == ("alpha", str(tmp_path / "worker.sock"))
    assert site.settings["train_file"] == str(tmp_path / "rows.jsonl")
    assert site.bounds.model_dump(exclude_none=True) == {}


@pytest.mark.parametrize("own", [{"rank": 4}, {"max_rank": 4}])
def test_what_is_known_stands_there(tmp_path: Path, own: dict[str, int]) -> None:
    bounds = {"lora_r": 16, "learning_rate": 0.01, "lora_target_modules": ["q_proj"]}
    _, site = site_of(
        tmp_path,
        bounds=bounds,
        dataset_name="some/rows",
        template="chat",
        model_name_or_path="some/base",
        use_cpu=True,
        client_eval_fraction=0.2,
        **own,
    )
    assert site.bounds.model_dump(exclude_none=True) == bounds
    assert {key: getattr(site, key) for key in own} == own
    assert site.settings == {
        "dataset_name": "some/rows",
        "template": "chat",
        "model_name_or_path": "some/base",
        "use_cpu": True,
        "client_eval_fraction": 0.2,
    }
