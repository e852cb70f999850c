"""A configuration as YAML that says what every key does, and reads as itself."""

from __future__ import annotations

import yaml

from fedlora.config.commented_yaml import commented_yaml
from fedlora.config.config import Config


def test_every_key_stands_once_with_its_description_and_reads_as_itself() -> None:
    config = Config(method="flora", client_ranks=[8, 4], learning_rate=1e-5, run_name="a: b # c")
    text = commented_yaml(config)
    lines = text.splitlines()
    keys = [line.split(":", 1)[0] for line in lines]
    fields = [key for key in Config.model_fields if key != "method_options"]
    assert keys == [*fields, "scaling_factor"]  # the rule's own options come last
    assert all(" # " in line for line in lines)
    assert Config(**yaml.safe_load(text)).flat() == config.flat()
