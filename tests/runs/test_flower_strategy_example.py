"""The app under `examples/flower_strategy`: FlowerTune's layout with clients of mixed rank."""

from __future__ import annotations

import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora import load_adapter
from support.flower_grid import InProcessGrid
from support.paths import REPOSITORY

pytest.importorskip("trl", reason="TRL is not installed")

APP = REPOSITORY / "examples" / "flower_strategy"


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The app's own run-config, with the app to be imported."""
    monkeypatch.syspath_prepend(str(APP))
    yield tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    for name in [name for name in sys.modules if name.split(".")[0] == "tuned"]:
        del sys.modules[name]


def test_clients_of_mixed_rank_learn_together(
    defaults: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuned import client_app, server_app  # type: ignore[import-not-found]
    from tuned.model import load_data  # type: ignore[import-not-found]

    monkeypatch.chdir(tmp_path)
    own = {"num-server-rounds": 2, "max-steps": 3, "output": "out"}
    run_config = {**defaults, **own}
    nodes = [{"partition-id": k, "num-partitions": 3} for k in range(3)]
    grid = InProcessGrid(one_at_a_time(client_app.app), nodes, run_config)
    context = Context(1, 1, {}, RecordDict(), run_config)
    server_app.app(grid, context)

    trained = [m for m in grid.pushed if m.metadata.message_type == "train"]
    ranks = sorted(
        {
            record["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0]
            for message in trained
            if (record := message.content.array_records["arrays"])
        }
    )
    assert ranks == [4, 8, 16]
    assert load_adapter(tmp_path / "out").deltas
    assert loss_of(str(tmp_path / "out"), load_data(7)) < loss_of(None, load_data(7))


def one_at_a_time(app: ClientApp) -> ClientApp:
    """An app as in Flower, where every client is a process: transformers loads in one thread."""
    lock = threading.Lock()

    def locked(message: Message, context: Context) -> Message:
        with lock:
            return app(message, context)

    return cast("ClientApp", locked)


def loss_of(adapter: str | None, rows: Any) -> float:
    """The mean loss over all tokens of some rows, of the base or with the adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedlora.embedded import BASE_DIR

    model = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    losses = []
    for row in rows.select(range(16)):
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt").input_ids
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    return sum(losses) / len(losses)
