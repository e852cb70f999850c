"""Carries a federation by Flower, and gives those who know Flower its parts.

    from fedlora.engines.flower import FedLora             # a Strategy for a ServerApp of yours
    from fedlora.engines.flower import describe, load, reply      # for a ClientApp of yours (PEFT)

Names are loaded when first used, so that a ClientApp which imports one module of this package pays
for that alone. Flower itself is an extra: `pip install 'fedlora[flower]'`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.engines.flower.peft_client import describe, load, reply
    from fedlora.engines.flower.peft_records import save
    from fedlora.engines.flower.strategy import FedLora

_HOMES = {
    "FedLora": "strategy",
    "describe": "peft_client",
    "load": "peft_client",
    "reply": "peft_client",
    "save": "peft_records",
}

__all__ = ["FedLora", "describe", "load", "reply", "save"]


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
