"""What a run asks of an engine."""

from __future__ import annotations

import inspect

from fedlora.engines.local import LocalEngine
from fedlora.federation.messages import ClientUpdate
from fedlora.runs.engine import ClientResult, Engine, EngineState, Failure


def test_an_answer_is_its_updates_clients_and_makes_a_model_when_it_is_asked() -> None:
    made = []

    def model() -> dict[str, object]:
        made.append(1)
        return {}

    answer = ClientResult(ClientUpdate(3, 1, {}, 5), model)  # type: ignore[arg-type]
    assert answer.client == 3
    assert made == []
    assert answer.model() == {}
    assert made == [1]


def test_values_of_an_engine() -> None:
    assert Failure(3, "it was late").client == 3
    assert EngineState() == EngineState({}, {})
    assert EngineState().facts is not EngineState().facts


def test_the_reference_engine_has_every_part_with_its_arguments() -> None:
    for name, wanted in vars(Engine).items():
        if name.startswith("_"):
            continue
        own = inspect.getattr_static(LocalEngine, name)
        assert isinstance(own, property) is isinstance(wanted, property)
        if inspect.isfunction(wanted):
            names = [list(inspect.signature(f).parameters) for f in (own, wanted)]
            assert names[0] == names[1]
