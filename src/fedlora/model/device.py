"""Says on which device a model lies."""

from __future__ import annotations

from typing import Any, cast

import torch


def device_of(model: Any) -> torch.device:
    """The device of a model's first parameter; models lie on one device."""
    return cast(torch.device, next(model.parameters()).device)
