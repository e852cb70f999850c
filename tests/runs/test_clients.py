"""What is a client's own: ranks, target modules and settings, trained and resumed with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedlora
from fedlora import Config
from fedlora.client.local_training import LocalTraining
from fedlora.commands.cli import main
from fedlora.config.config import CLIENT_KEYS
from fedlora.config.yaml_file import read_yaml
from fedlora.errors import InputError
from fedlora.runs.metrics_log import read_metrics
from support.clients import keys  # noqa: F401

pytestmark = pytest.mark.usefixtures("kept_bases")


WEIGHTS = "adapter_model.safetensors"


OWN: dict[int, dict[str, Any]] = {
    0: {"max_steps": 1, "lora_r": 3},
    1: {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lora_alpha": "1r"},
    2: {"max_train_samples": 5, "learning_rate": 1e-3, "lora_dropout": 0.5},
    3: {"max_steps": -1, "num_train_epochs": 2, "lora_target_modules": ["q_proj", "v_proj"]},
}


@pytest.fixture
def own_files(tmp_path: Path) -> Path:
    """A file for each client."""
    path = tmp_path / "clients"
    path.mkdir()
    for client, own in OWN.items():
        (path / f"client_{client}.yaml").write_text(yaml.safe_dump(own))
    return path


def lines(result: fedlora.Result) -> list[list[dict[str, Any]]]:
    """Every round's clients, without what depends on the clock."""
    rounds = [line for line in result.metrics if line["event"] == "round"]
    for line in rounds:
        for client in line["clients"]:
            client["metrics"].pop("seconds")
    return [line["clients"] for line in rounds]


def test_every_client_trains_by_its_own_settings(keys: dict[str, Any]) -> None:
    plain = lines(fedlora.run(Config(**{**keys, "output_dir": keys["output_dir"] + "-plain"})))
    own = lines(fedlora.run(Config(**keys, client_overrides=OWN)))
    for clients in own:
        assert [c["rank"] for c in clients] == [3, 2, 2, 2]
        # Three steps, but for those that have their own: one, and two epochs of 8 rows by 4.
        assert [c["metrics"]["steps"] for c in clients] == [1, 3, 3, 4]
        assert [c["num_examples"] for c in clients] == [24, 16, 5, 8]
        assert [c["weight"] for c in clients] == pytest.approx([n / 53 for n in (24, 16, 5, 8)])
    for clients in plain:
        assert [c["rank"] for c in clients] == [2, 2, 2, 2]
        assert [c["metrics"]["steps"] for c in clients] == [3, 3, 3, 3]
        assert [c["num_examples"] for c in clients] == [24, 16, 12, 8]
    # A row of rank r and a module (m, n) is sent as r (m + n) numbers of four bytes.
    attention = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    mlp = [(48, 32), (48, 32), (32, 48)]
    sizes = {name: 2 * sum(shape) for name, shape in attention.items()}
    every = sum(sizes.values()) + 2 * sum(m + n for m, n in mlp)
    few = sizes["q"] + sizes["v"]
    wanted = [4 * rank * size for rank, size in ((3, every), (2, every), (2, every), (2, few))]
    assert [c["bytes_up"] for c in own[0]] == wanted
    assert [c["bytes_up"] for c in plain[0]] == [4 * 2 * every] * 4


def one_round(small_run: dict[str, Any], own: dict[str, Any]) -> tuple[list[Any], bytes]:
    """The clients of the only round, client 1 with settings of its own; and the final adapter."""
    values = {**small_run, "num_rounds": 1, "eval_file": None, "lora_target_modules": ["q_proj"]}
    values["output_dir"] += "".join(f"-{key}" for key in own)
    result = fedlora.run(Config(**values, client_overrides={1: own}))
    return lines(result)[0], (result.final_dir / WEIGHTS).read_bytes()


def test_each_setting_changes_its_client_alone(small_run: dict[str, Any]) -> None:
    plain, weights = one_round(small_run, {})
    for own in (
        {"learning_rate": 1e-4},
        {"lora_alpha": 64},
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 2},
        {"max_train_samples": 5},
        {"max_steps": 1},
        {"weight_decay": 0.5},
        {"proximal_mu": 10.0},
        {"max_grad_norm": 1e-8},
        {"lr_scheduler_type": "cosine"},
        {"warmup_steps": 5},
        {"adam_beta1": 0.1},
        {"adam_beta2": 0.1},
        {"adam_epsilon": 0.1},
    ):
        clients, changed = one_round(small_run, own)
        assert changed != weights, own
        for client in (0, 2, 3):
            assert clients[client]["metrics"] == plain[client]["metrics"], (own, client)
    size = small_run["per_device_train_batch_size"]
    clients, same = one_round(small_run, {"max_steps": 3, "per_device_train_batch_size": size})
    assert same == weights, "a setting that says what the run says changes nothing"
    assert clients == plain


def test_what_a_client_may_spend_reaches_its_training_function(keys: dict[str, Any]) -> None:
    """Every client's settings, as its local training sees them."""
    seen: dict[int, LocalTraining] = {}

    def note(model: Any, dataset: Any, training: LocalTraining) -> dict[str, Any]:
        seen[training.client] = training
        return {"rows": len(dataset)}

    own = {
        1: dict.fromkeys(("weight_decay", "adam_beta1", "adam_beta2", "proximal_mu"), 0.25),
        2: {"warmup_steps": 2, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine"},
        3: {"num_train_epochs": 3, "adam_epsilon": 1e-3, "learning_rate": 0.5},
    }
    fedlora.run(Config(**{**keys, "num_rounds": 1}, client_overrides=own), train_function=note)
    assert sorted(seen) == [0, 1, 2, 3]
    for client, training in seen.items():
        for key in CLIENT_KEYS:
            if hasattr(training, key):
                wanted = own.get(client, {}).get(key, getattr(Config(**keys), key))
                assert getattr(training, key) == wanted, (client, key)


def test_the_saved_configuration_reproduces_the_run(
    keys: dict[str, Any], own_files: Path, tmp_path: Path
) -> None:
    pattern = str(own_files / "*.yaml")
    first = fedlora.run(Config(**keys, client_overrides=pattern))
    saved = read_yaml(tmp_path / "out" / "config.yaml")
    assert saved["client_ranks"] == [3, 2, 2, 2]
    assert saved["client_overrides"][0] == {"max_steps": 1}
    shutil.rmtree(own_files)  # they are read once
    again = fedlora.run(Config(**{**saved, "output_dir": str(tmp_path / "again")}))
    assert lines(again) == lines(first)
    weights = [(path / WEIGHTS).read_bytes() for path in (first.final_dir, again.final_dir)]
    assert weights[0] == weights[1]
    table = fedlora.run(
        Config(**{**keys, "client_overrides": OWN, "output_dir": str(tmp_path / "table")})
    )
    assert (table.final_dir / WEIGHTS).read_bytes() == weights[0]


class StoppedError(Exception):
    """Raised by a callback to end a run."""


def stop(result: fedlora.RoundResult) -> None:
    raise StoppedError


Interrupted = Callable[..., Config]


@pytest.fixture
def interrupted(keys: dict[str, Any]) -> Interrupted:
    """Begins a run with these overrides and stops it after its first round."""

    def begin(overrides: Any, **more: Any) -> Config:
        config = Config(**{**keys, **more}, client_overrides=overrides)
        with pytest.raises(StoppedError):
            fedlora.run(config, callbacks=[stop])
        return config

    return begin


def test_resumed_with_the_same_files(
    interrupted: Interrupted, own_files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = interrupted(str(own_files / "*.yaml"))
    resumed = fedlora.run(config, resume=out)
    assert [line["round"] for line in resumed.metrics if line["event"] == "round"] == [1, 2]
    whole = config.model_copy(update={"output_dir": str(tmp_path / "whole")})
    result = fedlora.run(whole)
    assert (result.final_dir / WEIGHTS).read_bytes() == (out / "final" / WEIGHTS).read_bytes()


def test_resumed_with_the_table_that_the_files_make(
    interrupted: Interrupted, own_files: Path, tmp_path: Path
) -> None:
    config = interrupted(str(own_files / "*.yaml"))
    table = config.model_copy(update={"client_overrides": OWN})
    assert fedlora.run(table, resume=tmp_path / "out").metrics[-1]["round"] == 2


def test_resumed_without_the_files(
    interrupted: Interrupted, own_files: Path, tmp_path: Path
) -> None:
    interrupted(str(own_files / "*.yaml"))
    shutil.rmtree(own_files)
    assert main(["run", "--resume", str(tmp_path / "out")]) == 0
    assert read_metrics(tmp_path / "out")[-1]["round"] == 2


@pytest.mark.parametrize(
    ("client", "change", "says"),
    [
        (0, {"max_steps": 1, "lora_r": 4}, "client_ranks: [3, 2, 2, 2] when it began, [4, 2, 2,"),
        (0, {"max_steps": 2, "lora_r": 3}, "client_overrides: {0: {'max_steps': 1}"),
        (2, {}, "client_overrides: "),
        (3, {**OWN[3], "weight_decay": 0.1}, "client_overrides: "),
    ],
)
def test_resumed_with_other_files_is_refused(
    interrupted: Interrupted,
    own_files: Path,
    tmp_path: Path,
    client: int,
    change: dict[str, Any],
    says: str,
) -> None:
    out = tmp_path / "out"
    config = interrupted(str(own_files / "*.yaml"))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (own_files / f"client_{client}.yaml").write_text(yaml.safe_dump(change))
    with pytest.raises(InputError) as raised:
        fedlora.run(config, resume=out)
    message = str(raised.value)
    assert "the configuration differs from the one the run began with" in message
    assert says in message
    assert message.count(" when it began, ") == 1
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_resumed_with_one_file_less_is_refused(
    interrupted: Interrupted, own_files: Path, tmp_path: Path
) -> None:
    config = interrupted(str(own_files / "*.yaml"))
    (own_files / "client_3.yaml").unlink()
    with pytest.raises(InputError, match=r"client_overrides: .* when it began, "):
        fedlora.run(config, resume=tmp_path / "out")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({4: {"max_steps": 1}}, "client_overrides: client 4, but there are 4 clients, counted fro"),
        ({0: {"seed": 1}}, "client_overrides: client 0: seed is not a client's own to set"),
        ({0: {"lora_target_modules": "query"}}, "client 0: lora_target_modules 'query' is not am"),
        ({0: {"lora_r": 4}}, "client 0: lora_r 4, but client_ranks says 8; give the rank in one"),
    ],
)
def test_a_run_is_refused_before_anything_is_written(
    small_run: dict[str, Any], table: dict[int, Any], says: str
) -> None:
    with pytest.raises(InputError) as raised:
        fedlora.run(Config(**small_run, client_overrides=table))
    assert says in str(raised.value)
    assert not Path(small_run["output_dir"]).exists()


def test_a_client_of_few_modules_moves_no_others(keys: dict[str, Any]) -> None:
    """Where every client trains queries alone, nothing else of the model changes."""
    table = {client: {"lora_target_modules": ["q_proj"]} for client in range(4)}
    delta = fedlora.run(Config(**{**keys, "num_rounds": 1}, client_overrides=table)).adapter
    moved = {name for name, x in delta.items() if torch.linalg.norm(x.B @ x.A) > 0}
    assert moved == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
