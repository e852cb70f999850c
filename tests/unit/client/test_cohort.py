"""Several clients in one pass: each ends where it ends alone, on the same batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    OPTConfig,
    OPTForCausalLM,
)

from fedlora.client.cohort import train_cohort
from fedlora.client.memory import automatic_size, largest_need, memory_available
from fedlora.client.trainer import train
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.lowrank import Adapter, Dense, add, prefix, scale, to_dense
from fedlora.model.base import BaseModel, attach
from fedlora.model.batches import count_labelled
from fedlora.model.client_rows import MixedRowsError
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.passes import runner_of
from fedlora.model.targets import find_targets
from support.cohort import (
    ALONE,
    MODELS,
    RANKS,
    TOGETHER,
    Ends,
    adapter_of,
    base_of,
    client_adapters_of,
    close,
    rows_of,
    trained,
    trainings_of,
)


def distance(one: Ends, client_adapters: Sequence[ClientAdapter]) -> float:
    """How far the clients have come, relative to where they began."""
    return min(
        float((x[n].A - s.adapter[n].A).norm() / s.adapter[n].A.norm())
        for (x, _, _), s in zip(one, client_adapters, strict=True)
        for n in x
        if "A" in s.trains
    )


@pytest.mark.parametrize("name", MODELS)
def test_fifty_steps_together_are_fifty_steps_alone(name: str) -> None:
    base = base_of(name)
    client_adapters, trainings = (
        client_adapters_of(base),
        trainings_of(max_steps=50, learning_rate=5e-4),
    )
    data = [rows_of(name, 14, k) for k in range(len(RANKS))]
    assert runner_of(base.model).joint
    alone = trained(base, client_adapters, data, trainings, ALONE)
    close(trained(base, client_adapters, data, trainings, TOGETHER), alone, 1e-5)
    close(trained(base, client_adapters, data, trainings, [[2, 0], [3, 1]]), alone, 1e-5)
    assert distance(alone, client_adapters) > 1e-3


CASES: dict[str, dict[str, Any]] = {
    "clipping bites": {"max_grad_norm": 0.05},
    "no clipping": {"max_grad_norm": 0.0},
    "FedProx": {"proximal_mu": 3.0},
    "accumulation": {"gradient_accumulation_steps": 3},
    "weight decay": {"weight_decay": 0.3},
    "a penalty on tails": {"tail_penalty": 0.05, "tail_from": 0.5},
    "epochs, the last batch short": {"max_steps": -1, "num_train_epochs": 2.0},
    "the run's schedule": {"lr_scheduler_scope": "federation", "num_rounds": 4},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_each_client_has_its_own(name: str, case: dict[str, Any]) -> None:
    base = base_of(name)
    client_adapters, trainings = client_adapters_of(base), trainings_of(**case)
    data = [rows_of(name, 11 + k, k) for k in range(len(RANKS))]
    alone = trained(base, client_adapters, data, trainings, ALONE)
    close(trained(base, client_adapters, data, trainings, TOGETHER), alone, 1e-5)
    if case.get("max_steps") != -1:
        assert [m["steps"] for _, _, m in alone] == [6, 9, 4, 9]
    if "num_train_epochs" not in case and case.get("max_grad_norm") != 0:
        plain = trained(base, client_adapters, data, trainings_of(), ALONE)
        moved = [
            float((x[n].A - y[n].A).norm())
            for (x, _, _), (y, _, _) in zip(alone, plain, strict=True)
            for n in x
        ]
        assert max(moved) > 1e-5, "the setting changes nothing here"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("where", ["before the adapter", "in the base"])
def test_dropout_is_drawn_from_each_clients_own_stream(name: str, where: str) -> None:
    base = base_of(name, 0.2 if where == "in the base" else 0.0)
    assert runner_of(base.model).joint
    client_adapters = client_adapters_of(base, dropout=0.0 if where == "in the base" else 0.3)
    data = [rows_of(name, 9, k) for k in range(len(RANKS))]
    trainings = trainings_of()
    alone = trained(base, client_adapters, data, trainings, ALONE)
    close(trained(base, client_adapters, data, trainings, TOGETHER), alone, 1e-5)
    close(trained(base, client_adapters, data, trainings, [[3, 1], [0, 2]]), alone, 1e-5)
    other = trained(base, client_adapters, data, [replace(b, seed=4) for b in trainings], ALONE)
    name_of = next(iter(alone[0][0]))
    assert not torch.equal(other[0][0][name_of].B, alone[0][0][name_of].B)


@pytest.mark.parametrize("trains", ["A", "B"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_frozen_factor_stays_to_the_bit(name: str, trains: str) -> None:
    base = base_of(name)
    client_adapters = client_adapters_of(base, trains=trains)
    data = [rows_of(name, 9, k) for k in range(len(RANKS))]
    alone = trained(base, client_adapters, data, trainings_of(), ALONE)
    together = trained(base, client_adapters, data, trainings_of(), TOGETHER)
    close(together, alone, 1e-5)
    for (x, _, _), client_adapter in zip(together, client_adapters, strict=True):
        for n, began in client_adapter.adapter.items():
            assert torch.equal(x[n].A, began.A) == (trains == "B")
            assert torch.equal(x[n].B, began.B) == (trains == "A")


def test_a_client_may_leave_modules_out() -> None:
    base = base_of("llama")
    client_adapters = client_adapters_of(base)
    some = {n: x for n, x in client_adapters[1].adapter.items() if n.endswith("q_proj")}
    client_adapters[1] = replace(client_adapters[1], adapter=some)
    data = [rows_of("llama", 9, k) for k in range(len(RANKS))]
    alone = trained(base, client_adapters, data, trainings_of(), ALONE)
    together = trained(base, client_adapters, data, trainings_of(), TOGETHER)
    assert together[1][0].keys() == some.keys()
    close(together, alone, 1e-5)


def whole_update(base: BaseModel, rank: int, dense: bool) -> dict[str, Any]:
    found = adapter_of(base, rank, 99)
    return {n: Dense(to_dense(x)) if dense else x for n, x in found.items()}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_common_update_less_each_start_is_each_clients_rest(
    name: str, dense: bool, dropout: float
) -> None:
    """S beneath everybody and `-start_k` its own, or `S - start_k` merged for one client alone."""
    base = base_of(name)
    whole = whole_update(base, 6, dense)
    starts: list[Adapter] = [
        {n: prefix(adapter_of(base, 6, 99)[n], rank) for n in whole} for rank in RANKS
    ]
    data = [rows_of(name, 9, k) for k in range(len(RANKS))]
    trainings = trainings_of()
    common = [
        ClientAdapter(start, {n: scale(x, -1.0) for n, x in start.items()}, 2.0, dropout)
        for start in starts
    ]
    together = trained(base, common, data, trainings, TOGETHER, [{}, whole])
    for k, start in enumerate(starts):
        rest = {n: add([whole[n], scale(x, -1.0)]) for n, x in start.items()}
        one = [ClientAdapter(start, {}, 2.0, dropout)]
        base.load_clients([rest], one)
        metrics = train_cohort(base, [data[k]], [trainings[k]])[0]
        close([(base.read_adapter(), {}, metrics)], [together[k]], 1e-5)


def test_in_bfloat16_a_shared_branch_gives_what_merging_gives_in_float32() -> None:
    """The same run with S beside a bfloat16 base and merged into the same weights in float32."""
    narrow, wide = base_of("llama", dtype=torch.bfloat16), base_of("llama")
    with torch.no_grad():
        for (_, x), (_, y) in zip(
            narrow.model.named_parameters(), wide.model.named_parameters(), strict=True
        ):
            y.copy_(x.float())
    data = [rows_of("llama", 9, k) for k in range(len(RANKS))]
    ends = []
    for base in (narrow, wide):
        whole = whole_update(base, 6, dense=False)
        base.load_clients([whole], [])
        layer = next(iter(base.layers.values()))
        assert (layer.branch is not None) == (base is narrow)
        trainings = trainings_of(learning_rate=1e-4)
        ends.append(trained(base, client_adapters_of(base), data, trainings, TOGETHER, [whole]))
    for (_, _, m), (_, _, n) in zip(*ends, strict=True):
        assert m["loss"] == pytest.approx(n["loss"], rel=2e-2)
    # And without S the loss is another, by more than that.
    without = trained(
        narrow, client_adapters_of(narrow), data, trainings_of(learning_rate=1e-4), TOGETHER
    )
    assert abs(without[0][2]["loss"] - ends[0][0][2]["loss"]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_parts_are_added_once(dtype: torch.dtype) -> None:
    base = base_of("llama", dtype=dtype)
    whole = whole_update(base, 6, dense=False)
    base.load_clients([whole], client_adapters_of(base))
    layer = next(iter(base.layers.values()))
    held = layer.merged if dtype == torch.float32 else layer.branch
    assert held is not None
    base.load_clients([{}, whole], client_adapters_of(base))
    assert (layer.merged if dtype == torch.float32 else layer.branch) is held
    base.load_clients([dict(whole_update(base, 6, dense=False))], [])
    assert (layer.merged if dtype == torch.float32 else layer.branch) is not held


def test_where_rows_cannot_be_told_apart_clients_train_alone() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=100,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        dropout=0.0,
    )
    model = OPTForCausalLM(config)
    targets = find_targets(model, "all-linear", "opt", None, [], "CAUSAL_LM")
    base = attach(model, None, targets)
    assert not runner_of(base.model).packed
    base.load_clients([], client_adapters_of(base))
    data = [rows_of("llama", 9, k) for k in range(len(RANKS))]
    with pytest.raises(MixedRowsError, match="one client at a time"):
        train_cohort(base, data, trainings_of())
    ends = trained(base, client_adapters_of(base), data, trainings_of(), ALONE)
    assert all(m["padding"] > 0 for _, _, m in ends)


def test_several_clients_on_rows_that_nobody_divided_are_refused() -> None:
    base = base_of("llama")
    base.load_clients([], client_adapters_of(base))
    with pytest.raises(MixedRowsError, match="cannot be told apart"):
        base.model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_what_a_client_needs_grows_with_its_longest_rows() -> None:
    base = base_of("llama")
    before = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    needs = []
    for length, size in ((8, 2), (16, 2), (16, 4)):
        rows: list[Tokens] = [
            {"input_ids": [5] * length, "labels": [5] * length} for _ in range(size)
        ]
        short: list[Tokens] = [{"input_ids": [5] * 3, "labels": [5] * 3}] * 9
        needs.append(largest_need(base, [(rows, size, 4), (short, size, 8), ([], 99, 64)]))
    # On average with the client of short rows, of three tokens each.
    assert [need.tokens for need in needs] == [(16 + 6) / 2, (32 + 6) / 2, (64 + 12) / 2]
    assert 1.5 < needs[1].activations / needs[0].activations < 3
    assert 1.5 < needs[2].activations / needs[1].activations < 2.5
    # Value, gradient and two moments of a rank 8 adapter: the largest of those with rows.
    numbers = sum(8 * (m + n) for m, n in base.targets.shapes.values())
    assert {need.state for need in needs} == {16 * numbers}
    after = dict(base.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.grad is None for p in after.values())


def test_the_measured_need_is_what_a_pass_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the clients keep twice as much: the figure is of what is really held."""
    base = base_of("llama")
    rows = rows_of("llama", 8, 1)
    size = sum(len(r["input_ids"]) for r in rows)
    one = largest_need(base, [(rows, 8, 4)])
    two = largest_need(base, [([*rows, *rows], 16, 4)])
    assert (one.tokens, two.tokens) == (size, 2 * size)
    assert two.activations == pytest.approx(2 * one.activations, rel=0.2)


def test_the_size_follows_the_memory() -> None:
    device = torch.device("cpu")
    base = base_of("llama")
    need = largest_need(base, [(rows_of("llama", 4, 1), 4, 4)])
    room = 2**28  # what the head's logits may take
    assert automatic_size(need, 10, room + 3 * need.nbytes, device) == 3
    assert automatic_size(need, 2, room + 3 * need.nbytes, device) == 2
    assert automatic_size(need, 10, 0, device) == 1
    assert automatic_size(replace(need, tokens=2048), 10, 2**40, device) == 2
    assert automatic_size(replace(need, tokens=10**6), 10, 2**40, device) == 1
    assert memory_available(device) > 2**20


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_without_padding_scores_as_the_model_does(name: str) -> None:
    base = base_of(name)
    base.load([whole_update(base, 3, False)])
    rows = rows_of(name, 7, 5)
    passes = runner_of(base.model)
    base.model.eval()
    with torch.inference_mode():
        logits, labels = (
            torch.cat(x) for x in zip(*passes.logits_and_labels(base.model, rows), strict=True)
        )
        at = 0
        for row in rows:
            out = base.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float()
            if "label" in row:
                wanted, truth = out[None], torch.tensor([row["label"]])
            else:
                learnt = torch.tensor(row["labels"][1:])
                wanted, truth = out[:-1][learnt != IGNORE], learnt[learnt != IGNORE]
            torch.testing.assert_close(logits[at : at + len(truth)], wanted, rtol=1e-4, atol=1e-5)
            assert labels[at : at + len(truth)].tolist() == truth.tolist()
            at += len(truth)
        assert at == len(labels) == count_labelled(rows)


def test_the_head_in_chunks_is_the_head_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    data = [rows_of("llama", 9, k) for k in range(len(RANKS))]
    whole = trained(base, client_adapters_of(base), data, trainings_of(), TOGETHER)
    monkeypatch.setattr("fedlora.model.head.CHUNK_NUMBERS", 64 * 100)
    assert max(count_labelled(rows) for rows in data) > 64
    close(trained(base, client_adapters_of(base), data, trainings_of(), TOGETHER), whole, 1e-5)


@pytest.mark.parametrize("longest", [0, 512])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_both_ways_to_compute_attention_agree(
    name: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products for short samples, torch's kernel for long ones; PyTorch's padded pass decides."""
    base = base_of(name)
    monkeypatch.setattr("fedlora.model.packed_attention.LONGEST_PRODUCT", longest)
    rows = rows_of(name, 9, 1)
    gradients: list[Mapping[str, Tensor]] = []
    passes = runner_of(base.model)
    for packed in (True, False):
        monkeypatch.setattr(passes, "packed", packed)
        base.load_clients([], client_adapters_of(base)[:1])
        passes.backward(base.model, [rows], [0.1])
        gradients.append({n: p.grad for n, p in base.parameters_of(0) if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for n, g in gradients[1].items():
        torch.testing.assert_close(gradients[0][n], g, rtol=1e-3, atol=1e-6)


def test_a_sliding_window_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=5,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    rows = [r for r in rows_of("llama", 9, 1) if len(r["input_ids"]) > 12]
    assert rows
    for longest in (512, 0):
        monkeypatch.setattr("fedlora.model.packed_attention.LONGEST_PRODUCT", longest)
        passes = runner_of(model)
        assert passes.packed
        with torch.inference_mode():
            found = torch.cat([x for x, _ in passes.logits_and_labels(model, rows)])
            monkeypatch.setattr(passes, "packed", False)
            wanted = torch.cat([x for x, _ in passes.logits_and_labels(model, rows)])
            monkeypatch.setattr(passes, "packed", True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_public_trainer_is_a_cohort_of_one() -> None:
    base = base_of("llama")
    data, training = rows_of("llama", 9, 0), trainings_of()[0]
    base.load([], adapter_of(base, 6, 0), 2.0)
    train(base.model, data, training)
    one = base.read_adapter()
    client_adapters = client_adapters_of(base)
    (other, _, _), *_ = trained(base, client_adapters[:1], [data], [training], [[0]])
    assert all(torch.equal(one[n].A, other[n].A) for n in one)
    assert all(torch.equal(one[n].B, other[n].B) for n in one)


@pytest.mark.parametrize("name", MODELS)
def test_padding_is_reported(name: str) -> None:
    base = base_of(name)
    data = [rows_of(name, 9, k) for k in range(len(RANKS))]
    ends = trained(base, client_adapters_of(base), data, trainings_of(), TOGETHER)
    assert [m["padding"] for _, _, m in ends] == [0.0] * len(RANKS)


def test_the_loss_and_its_gradient_are_those_of_pytorch() -> None:
    from fedlora.model.loss import CrossEntropy

    source = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(7, 11, generator=source)
    labels = torch.randint(11, (7,), generator=source)
    weights = torch.rand(7, generator=source)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = CrossEntropy.apply(ours * 1.0, labels, weights)
    wanted = torch.nn.functional.cross_entropy(theirs, labels, reduction="none") * weights
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
