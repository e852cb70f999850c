"""The examples of other people's trainers, in process: they learn, and as we do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlora
from fedlora.client.local_training import LocalTraining
from fedlora.config.sources import layered
from fedlora.config.train_function import load_train_function
from fedlora.config.yaml_file import read_yaml
from fedlora.data.datasets import load_data
from fedlora.data.tokenize import Tokens
from fedlora.embedded import BASE_DIR
from support.paths import REPOSITORY
from support.runs import nothing
from support.train import SCALE, dataset_of, llama, start_of  # noqa: F401

pytest.importorskip("trl", reason="trl is not installed")

SHORT = {"num_clients": 2, "client_ranks": [8, 4], "num_rounds": 2, "max_steps": 2, "seed": 1}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the examples count from the repository's root."""
    monkeypatch.chdir(REPOSITORY)


def example(name: str, where: Path, **more: Any) -> fedlora.Config:
    """The configuration of an example, for two clients, rounds and steps."""
    values = read_yaml(REPOSITORY / "examples" / "trainers" / f"{name}.yaml")
    few = {"num_threads": 1, "output_dir": str(where)}
    if name != "dpo":
        few |= {"max_train_samples": 32, "max_eval_samples": 16}
    return fedlora.Config(**layered(values, {**SHORT, **few, **more}))


@pytest.mark.parametrize("name", ["sft", "hf_trainer", "dpo"])
def test_an_example_learns(name: str, tmp_path: Path) -> None:
    events: list[Any] = []
    result = fedlora.run(example(name, tmp_path / "out"), report=events.append)
    steps = [event for event in events if event["event"] == "step"]
    assert [(e["client"], e["step"], e["steps"]) for e in steps] == [
        (client, step, 2) for _ in range(2) for client in range(2) for step in (1, 2)
    ]
    assert all(event["tokens"] > 0 for event in steps)
    clients = [event for event in events if event["event"] == "client_end"]
    assert {c["metrics"]["steps"] for c in clients} == {2}
    losses = {number: figures["loss"] for number, figures in result.evaluations.items()}
    if name == "dpo":
        assert clients[0]["metrics"]["loss_first"] == pytest.approx(0.693147, abs=1e-5), "log 2"
        assert clients[2]["metrics"]["loss_first"] != pytest.approx(0.693147, abs=1e-3), (
            "in round 2 the reference is the base, not what the round began with"
        )
    else:
        assert losses[2] < losses[1] < losses[0]


def trained_by(function: Any, base: Any, data: Sequence[Tokens]) -> Mapping[str, Any]:
    """What a local training makes of an adapter, on all rows at once."""
    training = LocalTraining(
        per_device_train_batch_size=len(data),
        learning_rate=1e-2,
        max_steps=3,
        tokenizer=base.tokenizer,
    )
    base.load([], start_of(base), SCALE)
    function(base.model, data, training)
    return dict(base.read_adapter())


@pytest.mark.parametrize("name", ["sft", "hf_trainer"])
def test_on_the_same_batches_they_train_as_we_do(name: str, llama: Any) -> None:
    """A batch of all rows leaves nothing to draw."""
    from fedlora.client.trainer import train

    data = dataset_of(llama, 4)
    ours = trained_by(train, llama, data)
    theirs = trained_by(load_train_function(f"examples/trainers/{name}.py:train"), llama, data)
    start = start_of(llama)
    for module, x in ours.items():
        moved = float((x.B - start[module].B).norm())
        assert float((x.B - theirs[module].B).norm()) < 1e-3 * moved
        assert moved > 0


def test_fedloras_own_training_learns_the_chosen_answers(tmp_path: Path) -> None:
    config = example("dpo", tmp_path / "own", train_function=None, max_steps=4)
    result = fedlora.run(config)
    assert result.evaluations[2]["loss"] < result.evaluations[0]["loss"]


def test_rows_of_preferences(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = example("dpo", tmp_path / "x", train_function=None)
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    data = load_data(config, tokenizer)
    row = data.clients[0].train[0]
    learnt = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(learnt, skip_special_tokens=True).strip() == row["chosen"].strip()
    assert row["rejected"] != row["chosen"]
    assert any(note.startswith("preference data: the chosen answers") for note in data.taken)


def test_two_trainings_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(fedlora.InputError, match="another one was given in Python; leave one"):
        fedlora.run(example("sft", tmp_path / "two"), train_function=nothing)


def test_a_run_goes_on_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's path is kept, as other paths are."""
    (tmp_path / "idle_training.py").write_text(
        "def train(model, dataset, training):\n    return {'loss': 0.5}\n"
    )
    monkeypatch.chdir(tmp_path)

    def stop(result: fedlora.RoundResult) -> None:
        raise KeyboardInterrupt

    config = example("sft", tmp_path / "out", train_function="idle_training:train")
    with pytest.raises(KeyboardInterrupt):
        fedlora.run(config, callbacks=[stop])
    monkeypatch.chdir("/")
    result = fedlora.run(resume=tmp_path / "out")
    assert result.metrics[-2]["round"] == 2
    saved = read_yaml(tmp_path / "out" / "config.yaml")["train_function"]
    assert saved == f"{tmp_path.resolve()}/idle_training.py:train"
    assert torch.isfinite(torch.tensor(result.evaluations[2]["loss"]))
