"""What `import fedlora` gives, as another project's strict type checker sees it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora

PROGRAM = '''
"""A user's program: all of fedlora's public names, each with the type it has to have."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_type

import torch

import fedlora
from fedlora import (
    METHODS,
    Broadcast,
    Budget,
    CheckpointError,
    ClientUpdate,
    Config,
    Dense,
    Federation,
    FedloraError,
    InputError,
    LocalTraining,
    LowRank,
    Result,
    RoundResult,
    Rule,
    SavedAdapter,
    Server,
    Worker,
    aggregate,
    load_adapter,
    reference_model,
    run,
    run_trainer,
    save_adapter,
    save_partitions,
    trainer_arguments,
)


def seen(result: RoundResult) -> None:
    assert_type(result.record.round, int)
    assert_type(result.record.bytes_up, int)
    assert_type(result.metrics, Mapping[str, Any])


def my_training(model: Any, dataset: Any, training: Budget) -> dict[str, float]:
    assert_type(training.learning_rate, float)
    return {"loss": 0.0}


def by_trainer(model: Any, dataset: Any, training: LocalTraining) -> dict[str, Any]:
    assert_type(trainer_arguments(model, training), dict[str, Any])
    return run_trainer(reference_model(model), training)


def longer(training: LocalTraining) -> Budget:
    return replace(training, max_steps=2 * training.max_steps)


def told(event: Mapping[str, Any]) -> None:
    print(event["event"])


def federation(where: str) -> Result:
    config = Config(num_rounds=3, method="exact", start_fraction=0.5, output_dir=where)
    assert_type(config, Config)
    assert_type(config.num_rounds, int)
    assert_type(config.seed, int)
    assert_type(config.flat(), dict[str, Any])
    assert_type(config.to_yaml(comments=True), str)
    result = run(config, callbacks=[seen], report=told)
    assert_type(result, Result)
    assert_type(result.final_dir, Path)
    assert_type(result.best_round, int | None)
    assert_type(result.evaluations, dict[int, dict[str, Any]])
    result = fedlora.run(config, train_function=my_training)
    return run(resume=Path(where))


def partitions(federated_dataset: Any) -> Config:
    return Config(train_file=save_partitions(federated_dataset, Path("parts"), split="train"))


def adapters(one: str, other: Path) -> None:
    first, second = load_adapter(one), load_adapter(other)
    assert_type(first, SavedAdapter)
    merged = aggregate([first, second], [3, 1], method="exact", rank=8)
    assert_type(merged.weights, tuple[float, ...])
    for name, layer in merged.layers.items():
        assert_type(name, str)
        assert_type(layer.error, float)
    save_adapter("both", merged)
    save_adapter(Path("again"), second)


def algebra(result: Result) -> torch.Tensor:
    total = torch.zeros(())
    for update in result.adapter.values():
        if isinstance(update, Dense):
            assert_type(update.W, torch.Tensor)
            total = total + update.W.norm()
        else:
            assert_type(update, LowRank)
            assert_type(update.A, torch.Tensor)
            assert_type(update.rank, int)
            total = total + (update.B @ update.A).norm()
    LowRank(torch.zeros(2, 3), torch.zeros(4, 2))
    return total


def one_round(server: Server, worker: Worker, federation: Federation) -> float | None:
    assert_type(federation.clients_per_round, int | float | None)
    for client, broadcast in server.plan().items():
        assert_type(client, int)
        assert_type(broadcast, Broadcast)
        update = worker.handle(broadcast)
        assert_type(update, ClientUpdate)
        assert_type(server.accept(update), str)
    return server.commit().aggregation_error


def rules() -> list[str]:
    rule = METHODS["flora"]
    assert_type(rule, Rule)
    assert_type(rule.mixed_ranks, bool)
    assert_type(fedlora.__version__, str)
    return [name for name, rule in METHODS.items() if rule.one_shot]


def main() -> int:
    try:
        algebra(federation("out"))
    except InputError as error:
        assert isinstance(error, ValueError)
        print(error)
        return 2
    except (CheckpointError, FedloraError):
        return 1
    return 0
'''


MISTAKES = {
    "fedlora.nothing": 'Module has no attribute "nothing"',
    "fedlora.run(3)": 'incompatible type "int"',
    'fedlora.Config().num_rounds + "x"': "Unsupported operand types",
    "fedlora.load_adapter(3.5)": 'incompatible type "float"',
    "fedlora.aggregate(3)": 'incompatible type "int"',
    "fedlora.run(callbacks=[lambda r: r.nothing])": 'has no attribute "nothing"',
    "fedlora.METHODS[3]": "Invalid index type",
    "fedlora.LowRank(1, 2)": 'incompatible type "int"',
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy --strict says of both files, with no settings but the command line.

    They lie in a directory of the user's own.
    """
    pytest.importorskip("mypy", reason="mypy is not installed")
    where = tmp_path_factory.mktemp("user")
    (where / "program.py").write_text(PROGRAM)
    (where / "mistakes.py").write_text("\n".join(["import fedlora", *MISTAKES, ""]))
    command = [sys.executable, "-m", "mypy", "--strict", "program.py", "mistakes.py"]
    environment = {k: v for k, v in os.environ.items() if k != "MYPYPATH"}
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    return done.stdout.splitlines()


def test_the_program_uses_every_public_name() -> None:
    tree = ast.parse(PROGRAM)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "fedlora"
        for alias in node.names
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(fedlora.__all__) == imported
    assert imported <= used


@pytest.mark.slow
def test_a_strict_type_checker_agrees(said: list[str]) -> None:
    assert [line for line in said if not line.startswith("mistakes.py:")] == said[-1:]
    assert said[-1].endswith("in 1 file (checked 2 source files)")


@pytest.mark.slow
def test_a_strict_type_checker_finds_mistakes(said: list[str]) -> None:
    for number, message in enumerate(MISTAKES.values(), 2):
        mine = [line for line in said if line.startswith(f"mistakes.py:{number}:")]
        assert any(message in line for line in mine), (message, said)


def test_every_name_is_there_and_no_other() -> None:
    for name in fedlora.__all__:
        assert getattr(fedlora, name) is not None
    assert set(fedlora.__all__) <= set(dir(fedlora))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fedlora.nothing  # type: ignore[attr-defined]


def test_the_marker_is_shipped() -> None:
    assert (Path(fedlora.__file__).parent / "py.typed").is_file()


def test_importing_the_package_is_quick() -> None:
    program = "import sys, fedlora; assert not {'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
