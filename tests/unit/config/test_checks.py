"""What keys must be together: every check by itself, one key away from a sound configuration."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from fedlora.config import checks
from fedlora.config.config import Config


def unchecked(**values: Any) -> Config:
    """A configuration whose keys were not checked, neither alone nor together."""
    return Config().model_copy(update=values)


@pytest.mark.parametrize(
    ("check", "values", "says"),
    [
        (checks.check_method, {"method": "exakt"}, "method: 'exakt' is none of .*exact"),
        (checks.check_alpha, {"lora_alpha": -1.0}, "lora_alpha: -1.0 must be greater than 0"),
        (checks.check_alpha, {"lora_alpha": "0r"}, "lora_alpha: 0r must be greater than 0"),
        (
            checks.check_one_data_source,
            {"train_file": "a.json", "dataset_name": "b"},
            "train_file and dataset_name exclude each other",
        ),
        (checks.check_ranks, {"client_ranks": [4, 0]}, "client_ranks: 0 must be at least 1"),
        (checks.check_ranks, {"rank_choices": []}, "rank_choices: the list is empty"),
        (
            checks.check_ranks,
            {"rank_choices": [2], "client_ranks": 4},
            "client_ranks and rank_choices exclude each other",
        ),
        (
            checks.check_client_memory,
            {"client_ranks": "auto", "client_memory": "6GB", "engine": "sites"},
            "auto looks at the rows, which lie at the sites",
        ),
        (
            checks.check_client_memory,
            {
                "client_ranks": "auto",
                "client_memory": "6GB",
                "engine": "flower",
                "train_file": "rows.jsonl",
            },
            "client_ranks: auto is not decided with engine: flower; .*give them as a list",
        ),
        (
            checks.check_rank_shares,
            {"rank_choices": [2, 4], "rank_shares": [1.0]},
            "rank_shares: 1 shares for 2 rank_choices",
        ),
        (
            checks.check_rank_shares,
            {"rank_choices": [2, 4], "rank_shares": [0.0, 0.0]},
            r"rank_shares: \[0.0, 0.0\] must be positive",
        ),
        (checks.check_clients_per_round, {"clients_per_round": 1.5}, "1.5 is no share"),
        (
            checks.check_round_under_failure,
            {"clients_per_round": 5, "clients_needed_per_round": 6},
            "clients_needed_per_round: 6 are more than clients_per_round 5 asks",
        ),
        (
            checks.check_round_under_failure,
            {"min_clients_per_round": 4, "clients_needed_per_round": 3},
            "min_clients_per_round: 4 are more than clients_needed_per_round 3, with which",
        ),
        (checks.check_sites, {"engine": "sites"}, "engine: sites needs them"),
        (checks.check_sites, {"engine": "sites", "sites": {}}, "engine: sites needs them"),
        (
            checks.check_sites,
            {"sites": {"a": "b"}},
            "belong to engine: sites, not to engine: local",
        ),
        (checks.check_sites, {"engine": "sites", "sites": {"a\n": "b"}}, "is no name"),
        (checks.check_sites, {"engine": "sites", "sites": {"": "b"}}, "is no name"),
        (checks.check_sites, {"engine": "sites", "sites": {"a": " "}}, "a has no address"),
        (
            checks.check_sites,
            {"engine": "sites", "sites": {"a": "x", "b": "x"}},
            "have the same address",
        ),
        (checks.check_kit, {"engine": "nvflare"}, "kit: engine: nvflare needs it"),
        (checks.check_kit, {"kit": "a"}, "belongs to engine: nvflare, not to engine: local"),
        (checks.check_local_training, {"cohort_size": 0}, "cohort_size: 0 must be at least 1"),
        (checks.check_local_training, {"max_steps": 0}, "max_steps: 0 trains nothing"),
        (checks.check_partition, {"partition": "labels"}, "labels needs partition_column"),
        (checks.check_partition, {"partition_shares": [1.0]}, "belongs to partition: quantity"),
        (
            checks.check_partition,
            {"partition": "quantity", "partition_shares": [1.0, 0.0]},
            "must be positive",
        ),
        (checks.check_custom_template, {"template": "custom"}, "needs completion_template"),
        (
            checks.check_custom_template,
            {"template": "chat", "completion_template": "{a}"},
            "belong to template: custom, not chat",
        ),
        (checks.check_custom_template, {"prompt_template": "{a}"}, "needs completion_template"),
        (
            checks.check_task,
            {"lora_task_type": "CAUSAL_LM", "label_column_name": "label"},
            "CAUSAL_LM learns no labels",
        ),
        (
            checks.check_task,
            {"lora_task_type": "SEQ_CLS", "template": "chat"},
            "chat is no text to classify",
        ),
        (checks.check_task, {"text_column_names": ["a", "b", "c"]}, "give one column, or two"),
        (checks.check_task, {"label_names": ["a", "a"]}, "label_names: a name is given twice"),
        (
            checks.check_rule_options,
            {"method_options": {"nonsense": 3}},
            "nonsense: method exact has no such option",
        ),
    ],
)
def test_a_check_says_which_key_and_why(check: Any, values: dict[str, Any], says: str) -> None:
    check(unchecked())
    with pytest.raises(ValueError, match=says):
        check(unchecked(**values))


def test_every_check_is_run() -> None:
    functions = inspect.getmembers(checks, inspect.isfunction)
    written = [function for name, function in functions if name.startswith("check_")]
    assert set(checks.CHECKS) == set(written)


@pytest.mark.parametrize(
    "values",
    [
        {"clients_per_round": 1.0},
        {"clients_per_round": 30},
        {"rank_choices": [2, 4], "rank_shares": [0.0, 1.0]},
        {"partition": "dirichlet", "label_column_name": "label"},
        {"partition": "quantity", "partition_shares": [3.0, 1.0]},
        {"max_steps": -1},
        {"template": "custom", "completion_template": "{a}"},
        {"completion_template": "{a}"},
    ],
)
def test_limits_themselves_are_allowed(values: dict[str, Any]) -> None:
    for check in checks.CHECKS:
        check(unchecked(**values))
