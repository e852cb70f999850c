"""LoRA updates as ArrayRecords."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.adapters.saved_adapter import load_adapter
from fedlora.engines.flower.peft_records import (
    global_record,
    lora_record,
    read_lora,
    record_of,
    save,
    tensors_of,
)
from fedlora.errors import InputError
from fedlora.lowrank import Dense, LowRank, to_dense


def update(rank: int = 2) -> LowRank:
    generator = torch.Generator().manual_seed(0)
    return LowRank(
        torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
    )


def test_an_update_comes_back_under_any_scale() -> None:
    record = lora_record({"layer.q": update()}, 0.5, {"head.weight": torch.ones(2, 3)})
    assert set(record) == {
        "base_model.model.layer.q.lora_A.weight",
        "base_model.model.layer.q.lora_B.weight",
        "base_model.model.head.weight",
    }
    state = read_lora(record)
    torch.testing.assert_close(to_dense(state.updates(0.5)["layer.q"]), to_dense(update()))
    assert set(state.whole) == {"head.weight"}


def test_a_matrix_is_an_adapter_too() -> None:
    matrix = torch.arange(30.0).reshape(5, 6)
    state = read_lora(global_record({"q": Dense(matrix)}, {}))
    torch.testing.assert_close(to_dense(state.updates(1.0)["q"]), matrix)


def test_half_precision_is_carried_as_float32() -> None:
    value = torch.tensor([1.5, -2.25], dtype=torch.bfloat16)
    (back,) = tensors_of(record_of({"x": value})).values()
    assert back.dtype == torch.float32
    assert torch.equal(back, value.float())


@pytest.mark.parametrize(
    "name", ["base_model.model.q.lora_magnitude_vector", "base_model.model.q.lora_embedding_A"]
)
def test_other_adapters_than_plain_lora_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no factor of plain LoRA"):
        read_lora(record_of({name: torch.ones(2, 2)}))


def test_a_result_is_saved_as_a_directory_of_peft(tmp_path: Path) -> None:
    two = {"layer.q": update(2), "layer.v": update(3)}
    save(global_record(two, {}), tmp_path / "final", "some/model")
    saved = load_adapter(tmp_path / "final")
    assert saved.config["base_model_name_or_path"] == "some/model"
    for name, x in two.items():
        torch.testing.assert_close(to_dense(saved.deltas[name]), to_dense(x))


def test_a_result_of_no_round_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter to write"):
        save(record_of({}), tmp_path / "final", "some/model")
    assert not (tmp_path / "final").exists()
