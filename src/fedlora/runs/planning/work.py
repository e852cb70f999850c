"""Estimates from configuration and rows alone how much a run will compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedlora.client.worker import local_training_of
from fedlora.config.config import Config

RATE = 30e9
"""Operations a second that are assumed of any machine. The estimate is no forecast: it has to be
the same wherever and whenever a configuration is run."""


def tokens_of_round(own: Config, lengths: Sequence[int]) -> int:
    """Tokens that a client trains on in a round.

    Args:
        own: the configuration as the client trains by it.
        lengths: of its rows.
    """
    if not lengths:
        return 0
    if own.max_steps <= 0:
        return round(own.num_train_epochs * sum(lengths))
    rows = own.per_device_train_batch_size * own.gradient_accumulation_steps
    steps = local_training_of(own).steps(len(lengths))
    return round(steps * min(rows, len(lengths)) * sum(lengths) / len(lengths))


def layer_parameters(model: Any) -> int:
    """Parameters of a transformer's layers, `L (4 h^2 + 3 h i)`, from its configuration.

    Args:
        model: configuration of transformers. 0: it does not tell.
    """
    text = model.get_text_config()
    width, layers = (getattr(text, x, None) or 0 for x in ("hidden_size", "num_hidden_layers"))
    inner = getattr(text, "intermediate_size", None) or 4 * width
    return int(layers * width * (4 * width + 3 * inner))


def planned_seconds(config: Config, model: Any, lengths: Sequence[Sequence[int]]) -> float:
    """Seconds that the training of a run would take at `RATE`.

    Args:
        config: of the run.
        model: configuration of transformers.
        lengths: of every client's rows.
    """
    tokens = [tokens_of_round(config.of_client(k), own) for k, own in enumerate(lengths)]
    asked = clients_of_round(config, sum(bool(own) for own in lengths))
    mean = sum(tokens) / max(1, sum(bool(own) for own in lengths))
    return config.num_rounds * asked * mean * 4 * layer_parameters(model) / RATE


def clients_of_round(config: Config, able: int) -> int:
    """How many clients a round asks.

    Args:
        config: of the run.
        able: clients that have rows.
    """
    wanted = config.clients_per_round
    if wanted is None:
        return able
    if isinstance(wanted, float):
        return max(1, int(wanted * able + 0.5))
    return min(wanted, able)
