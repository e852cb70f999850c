"""Keeps what was found out about a model for as long as the model lives."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

Value = TypeVar("Value")


class PerModel(Generic[Value]):
    """One value for each model; two threads may ask about two models at once.

    Args:
        make: model -> its value, which must not hold the model, or the model would never be freed.
    """

    def __init__(self, make: Callable[[Any], Value]) -> None:
        self._make = make
        self._values: WeakKeyDictionary[Any, Value] = WeakKeyDictionary()
        self._lock = Lock()

    def __call__(self, model: Any) -> Value:
        """The value of this model, made the first time it is asked for."""
        with self._lock:
            if model in self._values:
                return self._values[model]
        # Outside the lock: making it runs the model, and other models need not wait for that.
        value = self._make(model)
        with self._lock:
            return self._values.setdefault(model, value)
