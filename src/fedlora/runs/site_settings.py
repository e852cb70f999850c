"""Tells which configuration keys the server of sites sets for a site, and to what."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fedlora.config.config import Config
from fedlora.config.keys import Mark, keys_marked
from fedlora.data.reading import is_classification


def site_settings(config: Config, client: int, rank: int) -> dict[str, Any]:
    """What the server sets for a site: what decides how it trains, and no path of the server.

    Where the base is named as on the hub, its name is among them; a directory of the server says
    nothing to a site, which then has to name its own.

    Args:
        config: of the run, with the settings of single clients read.
        client: the site's number.
        rank: that it is asked to train.
    """
    own = config.of_client(client)
    settings = {key: getattr(own, key) for key in keys_marked(Config, Mark.OF_CLIENT)}
    settings |= {key: getattr(config, key) for key in keys_marked(Config, Mark.OF_SITES)}
    # The precision of the base is a site's own where the server asks for none.
    settings = {k: x for k, x in settings.items() if x or not k.startswith("load_in_")}
    # All adapt the same modules; a broadcast says which of them a client trains.
    settings["lora_target_modules"] = config.lora_target_modules
    settings["lora_r"] = rank
    if is_classification(config.lora_task_type, config.label_column_name, config.template):
        settings["lora_task_type"] = "SEQ_CLS"
    name = config.model_name_or_path
    if name is None or Path(name).is_absolute() or Path(name).exists():
        del settings["model_name_or_path"], settings["model_revision"]
    return {**settings, **dataclasses.asdict(config.rule_options())}
