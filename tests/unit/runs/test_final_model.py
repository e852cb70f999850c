"""The model a run ends with, written and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.adapters.saved_adapter import load_adapter
from fedlora.errors import CheckpointError
from fedlora.federation.messages import ClientState
from fedlora.lowrank import LowRank, to_dense
from fedlora.methods.values import ServerState
from fedlora.model.base import BaseModel
from fedlora.runs.final_model import (
    model_of_round,
    model_of_state,
    write_global_model,
    write_personal_models,
)
from support.models import load_base


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> BaseModel:
    out: BaseModel = load_base(str(tiny_llama), target_modules=["q_proj"])
    return out


def state_of(base: BaseModel) -> ServerState:
    """After round 3, with something merged and something trained on."""
    torch.manual_seed(0)
    shapes = base.targets.shapes

    def factors(rank: int) -> dict[str, LowRank]:
        return {
            x: LowRank(torch.randn(rank, n), torch.randn(m, rank)) for x, (m, n) in shapes.items()
        }

    return ServerState(3, factors(2), base_delta=factors(1))


def test_the_global_model_is_what_was_merged_and_what_is_trained(
    base: BaseModel, tmp_path: Path
) -> None:
    state, last = state_of(base), tmp_path / "round-3"
    (last / "client-1").mkdir(parents=True)
    (last / "client-1" / "kept").write_text("x")
    model = model_of_state(state)
    assert model.round == 3
    write_global_model(tmp_path / "final", base, model, last)
    saved = load_adapter(tmp_path / "final").deltas
    for name, x in state.adapter.items():
        wanted = to_dense(x) + to_dense(state.base_delta[name])
        torch.testing.assert_close(to_dense(saved[name]), wanted, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "final" / "client-1" / "kept").read_text() == "x"
    assert (tmp_path / "final" / "tokenizer_config.json").is_file()


def test_a_clients_own_factor_stands_in_its_own_model(base: BaseModel, tmp_path: Path) -> None:
    state = state_of(base)
    name = next(iter(state.adapter))
    own = ClientState({f"{name}.B": torch.ones_like(state.adapter[name].B)})
    write_personal_models(tmp_path / "final", base, state, {1: own}, 2, {})
    common, personal = (
        to_dense(load_adapter(tmp_path / "final" / f"client-{k}").deltas[name]) for k in (0, 1)
    )
    merged, x = to_dense(state.base_delta[name]), state.adapter[name]
    torch.testing.assert_close(common, merged + x.B @ x.A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(personal, merged + torch.ones_like(x.B) @ x.A, rtol=1e-5, atol=1e-5)


def test_a_best_round_that_is_damaged_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "round-2").mkdir()
    with pytest.raises(CheckpointError, match=r"load_best_model_at_end needs.* --resume"):
        model_of_round(tmp_path, 2)
