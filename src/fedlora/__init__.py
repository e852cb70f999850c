"""Fine-tunes language models by federated LoRA, with adapters of different rank.

    import fedlora
    result = fedlora.run(fedlora.Config(num_rounds=3, ...))

Names are loaded when first used, so that importing the package stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedlora.adapters.aggregate import aggregate, save_adapter
    from fedlora.adapters.any_format import load_adapter
    from fedlora.adapters.saved_adapter import SavedAdapter
    from fedlora.client.local_training import Budget, LocalTraining
    from fedlora.client.other_trainers import run_trainer, trainer_arguments
    from fedlora.client.worker import Worker
    from fedlora.config.config import Config
    from fedlora.data.flwr_partitions import save_partitions
    from fedlora.engines.local import run
    from fedlora.errors import CheckpointError, FedloraError, InputError
    from fedlora.federation.messages import Broadcast, ClientUpdate
    from fedlora.federation.participants import Federation
    from fedlora.federation.server import Server
    from fedlora.lowrank import Dense, LowRank
    from fedlora.methods import METHODS
    from fedlora.methods.rule import Rule
    from fedlora.model.reference import reference_model
    from fedlora.runs.results import Result, RoundResult

_HOMES = {
    "Broadcast": "federation.messages",
    "Budget": "client.local_training",
    "CheckpointError": "errors",
    "ClientUpdate": "federation.messages",
    "Config": "config.config",
    "Dense": "lowrank",
    "Federation": "federation.participants",
    "FedloraError": "errors",
    "InputError": "errors",
    "LocalTraining": "client.local_training",
    "LowRank": "lowrank",
    "METHODS": "methods",
    "Result": "runs.results",
    "RoundResult": "runs.results",
    "Rule": "methods.rule",
    "SavedAdapter": "adapters.saved_adapter",
    "Server": "federation.server",
    "Worker": "client.worker",
    "aggregate": "adapters.aggregate",
    "load_adapter": "adapters.any_format",
    "reference_model": "model.reference",
    "run": "engines.local",
    "run_trainer": "client.other_trainers",
    "save_adapter": "adapters.aggregate",
    "save_partitions": "data.flwr_partitions",
    "trainer_arguments": "client.other_trainers",
}

__all__ = [
    "METHODS",
    "Broadcast",
    "Budget",
    "CheckpointError",
    "ClientUpdate",
    "Config",
    "Dense",
    "Federation",
    "FedloraError",
    "InputError",
    "LocalTraining",
    "LowRank",
    "Result",
    "RoundResult",
    "Rule",
    "SavedAdapter",
    "Server",
    "Worker",
    "aggregate",
    "load_adapter",
    "reference_model",
    "run",
    "run_trainer",
    "save_adapter",
    "save_partitions",
    "trainer_arguments",
]


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
        return getattr(import_module(f"fedlora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
