"""Options that trade time for memory, and a dtype that is measured, in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedlora
from fedlora.config.config import Config
from fedlora.model.acceleration import accelerate
from fedlora.model.passes import runner_of
from support.cohort import (
    RANKS,
    TOGETHER,
    base_of,
    client_adapters_of,
    close,
    rows_of,
    trained,
    trainings_of,
)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_recomputed_activations_give_the_same(name: str, dropout: float) -> None:
    ends, kept = [], []
    for checkpointing in (False, True):
        base = base_of(name, dropout)
        accelerate(base.model, gradient_checkpointing=checkpointing)
        data = [rows_of(name, 9, k) for k in range(len(RANKS))]
        client_adapters = client_adapters_of(base, dropout=dropout)
        ends.append(trained(base, client_adapters, data, trainings_of(), TOGETHER))
        kept.append(kept_by(base, client_adapters, data[0]))
    close(ends[1], ends[0], 1e-5)
    assert kept[1] < 0.5 * kept[0]


def kept_by(base: Any, client_adapters: Any, rows: Any) -> int:
    """Bytes that a forward pass of one client keeps for the backward pass."""
    base.load_clients([], client_adapters[:1])
    base.model.train()
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in base.model.parameters()}

    def note(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = runner_of(base.model).forward(base.model, rows)
    del out
    return sum(size for where, size in kept.items() if where not in own)


def test_a_run_takes_the_options(small_run: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        keys = {**small_run, "gradient_checkpointing": checkpointing, "lora_dropout": 0.1}
        keys["output_dir"] = str(tmp_path / str(checkpointing))
        found.append(fedlora.run(Config(**keys)).metrics[-2]["evaluation"]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_dtype_found_is_that_of_the_run(
    small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = torch.bfloat16, "so it was measured"
    monkeypatch.setattr("fedlora.runs.automatic.resolve_dtype", lambda config, device: found)
    events: list[Any] = []

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedlora.run(Config(**small_run), report=events.append, callbacks=[stop])
    assert "base in bfloat16: so it was measured" in events[0]["choices"]
    assert "dtype: bfloat16" in (Path(small_run["output_dir"]) / "config.yaml").read_text()
    # And a resumed run does not measure again.
    monkeypatch.setattr(
        "fedlora.runs.automatic.resolve_dtype", lambda *_: pytest.fail("measured again")
    )
    fedlora.run(resume=small_run["output_dir"])
