"""Skips tests of extras that are not installed, and says how to install them."""

from __future__ import annotations

import importlib.util

import pytest

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'fedlora[quantized]'",
)
