"""Flower's error codes in words."""

from __future__ import annotations

import pytest
from flwr.app import Error
from flwr.common.constant import ErrorCode

from fedlora.engines.carrier import KINDS
from fedlora.engines.flower.failures import in_words, site_error

CODES = [value for name, value in vars(ErrorCode).items() if name.isupper()]


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_a_kind_and_words(code: int) -> None:
    error = site_error(Error(code))
    assert error.kind in KINDS
    assert error.reason.endswith(f"(code {code})")


def test_the_node_s_own_reason_is_told_on_one_line() -> None:
    reason = "Traceback ...\n  File x\nValueError: no rows\n"
    assert in_words(Error(2, reason)) == "its ClientApp raised an exception: ValueError: no rows"


def test_a_code_of_a_later_flower_is_told() -> None:
    assert site_error(Error(99)).kind == "failed"
