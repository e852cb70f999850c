"""Sites in memory: the bytes of a run in one process, and every failure its outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.config.config import Config
from fedlora.methods import METHODS
from support.courses import tensor_files
from support.sites import InMemoryTransport, federate, sites_of

pytestmark = pytest.mark.usefixtures("kept_bases")
Keys = dict[str, Any]


@pytest.fixture
def keys(small_run: Keys) -> Keys:
    files = small_run["train_file"].replace("site_*", "site_[0-2]")
    three = {"client_ranks": [8, 4, 2], "train_file": files}
    return {**small_run, **three, "max_steps": 1, "cohort_size": 1, "num_rounds": 2}


def in_one_process(keys: Keys, out: Path) -> fedlora.Result:
    return fedlora.run(Config(**{**keys, "output_dir": str(out)}))


@pytest.mark.parametrize("method", METHODS)
def test_every_rule_gives_the_same_bytes(keys: Keys, tmp_path: Path, method: str) -> None:
    keys |= {"method": method}
    if not METHODS[method].mixed_ranks:
        keys["client_ranks"] = [4, 4, 4]
    local = in_one_process(keys, tmp_path / "local")
    sites = federate(keys, tmp_path / "sites", InMemoryTransport(sites_of(keys)))
    assert tensor_files(local.output_dir) == tensor_files(sites.output_dir)
