"""Configurations under which an adapter is no sum of products are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from fedlora.adapters.plain_lora import check_plain
from fedlora.errors import InputError

HERE = Path("it")


def config(**values: Any) -> dict[str, Any]:
    """A configuration as PEFT writes it, with these values."""
    plain = LoraConfig(r=4, lora_alpha=8, target_modules=["q"], task_type="CAUSAL_LM").to_dict()
    plain["target_modules"] = ["q"]
    return {**plain, "peft_type": "LORA", **values}


def test_pefts_own_defaults_are_plain() -> None:
    check_plain(HERE, config())
    check_plain(HERE, {"r": 4, "lora_alpha": 8})  # of a version with fewer keys
    check_plain(HERE, config(use_dora=None, enable_lora=[False, False], layer_replication=[]))
    check_plain(HERE, config(peft_type="ADALORA", rank_pattern={"q": [True, False]}))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"use_dora": True}, "use_dora is True; .*DoRA's magnitudes are no sum"),
        ({"bias": "all"}, "bias is 'all'; .*biases that were trained"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; .*train with LoraConfig"),
        ({"trainable_token_indices": [3]}, "embeddings of single tokens that were trained"),
        ({"enable_lora": [True, False]}, "factors for parts of a fused layer"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changes the base weights too"),
        ({"r": "4"}, r"adapter_config.json: r is '4'; expected a number"),
        ({"r": True}, "r is True; expected a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf; expected a number"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern is .*expected names and numbers"),
        ({"task_type": "ANY"}, "task_type is 'ANY'; expected null or one of CAUSAL_LM"),
        ({"revision": 3}, "revision is 3; expected a text or null"),
        ({"target_modules": ["q", 3]}, "target_modules is .*expected a list of names"),
    ],
)
def test_the_key_and_the_reason_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_plain(HERE, config(**values))


def test_long_values_are_shortened() -> None:
    with pytest.raises(InputError) as error:
        check_plain(HERE, config(rank_pattern=["x"] * 100))
    assert len(str(error.value)) < 200
