"""What the server of sites sets for a site."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from fedlora.client.worker import local_training_of
from fedlora.config.config import Config
from fedlora.config.site_run import SERVER_KEYS
from fedlora.federation import plain_values
from fedlora.methods import METHODS
from fedlora.runs.site_settings import site_settings

CONFIG = Config(
    model_name_or_path="an/encoder",
    method="exact",
    start_fraction=0.5,
    train_file="/home/server/secret.jsonl",
    learning_rate=1e-3,
    lora_target_modules=["q_proj", "v_proj"],
    client_overrides={1: {"max_steps": 7, "lora_target_modules": ["q_proj"]}},
)


def test_a_site_trains_as_the_client_would() -> None:
    for client in (0, 1):
        settings = site_settings(CONFIG, client, 4)
        theirs = Config(method="exact", **settings)
        ours = CONFIG.of_client(client)
        assert local_training_of(theirs) == local_training_of(ours)
        assert (theirs.lora_r, theirs.lora_target_modules) == (4, ["q_proj", "v_proj"])
        assert theirs.rule_options() == CONFIG.rule_options()


def test_it_travels_as_plain_values_and_holds_no_path_of_the_server(tmp_path: Path) -> None:
    settings = site_settings(CONFIG, 0, 4)
    assert plain_values.settings(json.loads(json.dumps(settings))) == settings
    assert "/home" not in json.dumps(settings)
    options = {option.name for option in fields(METHODS["exact"].options)}
    assert settings.keys() <= {*SERVER_KEYS, *options}
    assert settings["model_name_or_path"] == "an/encoder"
    here = CONFIG.model_copy(update={"model_name_or_path": str(tmp_path)})
    assert not {"model_name_or_path", "model_revision"} & site_settings(here, 0, 4).keys()


def test_labels_at_the_server_mean_a_classifier() -> None:
    assert site_settings(CONFIG, 0, 4)["lora_task_type"] == "auto"
    labelled = CONFIG.model_copy(update={"label_column_name": "label"})
    assert site_settings(labelled, 0, 4)["lora_task_type"] == "SEQ_CLS"
