"""Several clients in one pass: what they share, what it needs, and what is refused.

Whole trainings of several clients are in tests/runs/test_clients_train_together.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    OPTConfig,
    OPTForCausalLM,
)

from fedlora.client.cohort import train_cohort
from fedlora.client.memory import automatic_size, largest_need, memory_available
from fedlora.data.tokenize import Tokens
from fedlora.model.base import attach
from fedlora.model.client_rows import MixedRowsError
from fedlora.model.passes import runner_of
from fedlora.model.targets import find_targets
from support.cohort import (
    ALONE,
    RANKS,
    base_of,
    client_adapters_of,
    rows_of,
    trained,
    trainings_of,
    whole_update,
)


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
    ends = trained(base, client_adapters_of(base), data, trainings_of(max_steps=2), ALONE)
    assert all(m["padding"] > 0 for _, _, m in ends)
