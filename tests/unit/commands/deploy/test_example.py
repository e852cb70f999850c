"""The example of a federation's file names every key that there is."""

from __future__ import annotations

from fedlora.commands.deploy.example import EXAMPLE
from fedlora.config.federation_file import (
    FederationAdmin,
    FederationFile,
    FederationServer,
    FederationSite,
)
from fedlora.config.site import Bounds


def test_every_key_stands_in_it() -> None:
    kinds = (FederationFile, FederationServer, FederationSite, FederationAdmin, Bounds)
    keys = {key for kind in kinds for key in kind.model_fields} - {"settings"}
    assert not [key for key in keys if f"{key}:" not in EXAMPLE]
