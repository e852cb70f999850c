"""What a server sets meets a site's bounds, and becomes the site's configuration of a run."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.config.site import Bounds, Site
from fedlora.config.site_run import (
    SERVER_KEYS,
    BoundError,
    check_settings,
    check_steps,
    rank_at,
    run_config,
)
from fedlora.errors import InputError
from fedlora.runs.site_settings import site_settings

SETTINGS = {"train_file": "rows.jsonl", "model_name_or_path": "/models/base"}


def a_site(settings: dict[str, Any] | None = None, **values: Any) -> Site:
    bounds = Bounds(**values.pop("bounds", {}))
    return Site(name="x", bounds=bounds, settings=settings or SETTINGS, **values)


def at(site: Site, method: str = "exact", client: int = 1, **asked: Any) -> Config:
    return run_config(site, method, asked, client, 4)


def test_the_server_sets_training_and_the_site_its_own() -> None:
    asked = {"lora_r": 8, "learning_rate": 0.01, "client_eval_fraction": 0.5, "start_fraction": 0.3}
    config = at(a_site({**SETTINGS, "client_eval_fraction": 0.1}), **asked)
    assert (config.learning_rate, config.client_eval_fraction) == (0.01, 0.1)
    assert (config.client_ranks, config.lora_r, config.num_clients) == (8, 8, 2)
    assert (config.num_threads, config.train_file) == (1, "rows.jsonl")
    assert config.rule_options().start_fraction == 0.3


def test_everything_that_a_server_sends_may_be_set() -> None:
    asked = site_settings(Config(model_name_or_path="hub/name", lora_r=4), 0, 4)
    assert at(a_site(), client=0, **asked).client_ranks == 4
    assert {"train_file", "trust_remote_code", "output_dir"}.isdisjoint(SERVER_KEYS)


def test_the_revision_of_another_model_does_not_count() -> None:
    assert at(a_site(), model_revision="main").model_revision is None


@pytest.mark.parametrize(
    ("values", "asked", "rank"),
    [({}, 8, 8), ({"rank": 2}, 8, 2), ({"max_rank": 4}, 8, 4), ({"max_rank": 16}, 8, 8)],
)
def test_the_rank_at_a_site(values: dict[str, Any], asked: int, rank: int) -> None:
    assert rank_at(a_site(**values), asked) == rank
    assert at(a_site(**values), lora_r=asked).client_ranks == rank


@pytest.mark.parametrize(
    ("bounds", "asked", "said"),
    [
        ({"lora_r": 4}, {"lora_r": 8}, "lora_r: 8 is asked for, and this site allows at most 4"),
        ({"max_steps": 9}, {"max_steps": 10}, "max_steps: 10 is asked for"),
        ({"num_train_epochs": 1}, {"num_train_epochs": 2.5}, "num_train_epochs: 2.5 is asked"),
        ({"max_length": 64}, {}, "max_length: 1024 is asked for, and this site allows at most 64"),
        ({"learning_rate": 1e-3}, {"learning_rate": 0.1}, "learning_rate: 0.1 is asked for"),
        (
            {"lora_target_modules": ["q_proj"]},
            {"lora_target_modules": ["q_proj", "lm_head"]},
            "lora_target_modules: lm_head is asked for, and this site allows q_proj",
        ),
        ({"lora_target_modules": ["q_proj"]}, {}, "lora_target_modules: all-linear is asked for"),
        (
            {"lora_target_modules": ["all-linear"]},
            {"lora_modules_to_save": ["lm_head"]},
            "lora_modules_to_save: lm_head is asked for",
        ),
        (
            {"model_name_or_path": ["a/b"]},
            {"model_name_or_path": "c/d"},
            "model_name_or_path: c/d is asked for, and this site allows a/b",
        ),
        ({}, {"trust_remote_code": True}, "trust_remote_code: is not a server's to set"),
        ({}, {"train_function": "os:system"}, "train_function: is not a server's to set"),
        ({}, {"start_fractoin": 1}, "start_fractoin: is not a server's to set"),
        ({}, {"lora_r": 0}, "lora_r: 0 must be at least 1"),
    ],
)
def test_what_is_beyond_a_bound_is_refused_with_the_bound(
    bounds: dict[str, Any], asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(BoundError) as raised:
        at(a_site(bounds=bounds), **asked)
    assert said in str(raised.value)


def test_what_is_within_the_bounds_is_taken() -> None:
    bounds = {
        "lora_r": 8,
        "max_steps": 10,
        "num_train_epochs": 1,
        "lora_target_modules": ["all-linear"],
        "model_name_or_path": ["a/b"],
    }
    asked = {"lora_r": 8, "max_steps": 10, "num_train_epochs": 9, "model_name_or_path": "a/b"}
    assert at(a_site(bounds=bounds), **asked).max_steps == 10


def test_a_site_without_a_model_takes_one_that_it_allows() -> None:
    site = a_site({"train_file": "x"}, bounds={"model_name_or_path": ["a/b"]})
    assert at(site, model_name_or_path="a/b").model_name_or_path == "a/b"
    for asked in ({}, {"model_name_or_path": "c/d"}):
        with pytest.raises(BoundError, match="this site names no model"):
            at(site, **asked)


def test_another_rule_and_another_client_are_refused() -> None:
    with pytest.raises(BoundError, match="this site knows no rule 'magic'"):
        at(a_site(), method="magic")
    with pytest.raises(BoundError, match="client 4, but there are 4 clients"):
        at(a_site(), client=4)


def test_steps_of_epochs_are_bounded_too() -> None:
    check_steps(a_site(bounds={"max_steps": 4}), 4)
    with pytest.raises(BoundError, match="are 5 steps on the rows of this site, which allows at"):
        check_steps(a_site(bounds={"max_steps": 4}), 5)


def test_values_are_looked_at_before_a_server_asks() -> None:
    assert check_settings(a_site()).train_file == "rows.jsonl"
    with pytest.raises(InputError, match="client_eval_fraction: 2 must be less than 1"):
        check_settings(a_site({**SETTINGS, "client_eval_fraction": 2}))
    with pytest.raises(InputError, match="no data: give the site's own rows"):
        check_settings(a_site({"model_name_or_path": "m"}))
