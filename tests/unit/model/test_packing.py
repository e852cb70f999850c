"""Whatever is packed or padded: a row gets what the model's own pass of it alone gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.data.tokenize import Tokens
from fedlora.model.batches import collate
from fedlora.model.loss import summed_loss
from fedlora.model.packing import examine
from fedlora.model.passes import PackedRunner, runner_of
from fedlora.model.rotary_factors import ForwardState, RotaryFactors
from fedlora.model.trial_rows import random_rows
from fedlora.model.wide import computing_in
from support.packing import (
    MIXTURES,
    PACKED,
    ROPES,
    SIZES,
    built,
    found,
    rows_of,
    steps_of,
)


@pytest.mark.parametrize("packed", [True, False])
def test_a_windows_gradient_is_that_of_the_model(packed: bool) -> None:
    """Also in a bidirectional model, with samples padded inside attention."""
    model = built("modernbert", {**SIZES, "local_attention": 16, "num_hidden_layers": 4}, True)
    rows = rows_of([30, 35, 40, 8], True)
    passes = runner_of(model)
    assert passes.packed
    passes.packed = packed
    for p in model.parameters():
        p.grad = None
    passes.backward(model, [rows], [1.0])
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([row["label"]])).backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[n], p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.norm()))


def test_rotary_factors_that_do_not_follow_lengths_split_no_pass() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    yarn["original_max_position_embeddings"] = 64
    for rope in ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, yarn):
        model = built("llama", {**SIZES, "rope_parameters": rope})
        passes = runner_of(model)
        assert passes.packed
        assert not passes._rotary.follow_longest
        assert steps_of(model, [rows_of([12, 100, 70])]) == 1


def test_a_sample_of_no_numbers_leaves_the_others_alone() -> None:
    """One client's diverged rows are nobody else's, though samples are padded in attention."""
    model = built("llama", SIZES)
    passes = runner_of(model)
    rows = rows_of([20, 18, 17])
    clean = found(model, rows)
    table = model.get_input_embeddings()

    def poison(_: Any, given: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, :20] = float("nan")
        return out

    handle = table.register_forward_hook(poison)
    with torch.no_grad():
        logits = torch.cat([x for x, _ in passes.logits_and_labels(model, rows)]).split(
            [19, 17, 16]
        )
    handle.remove()
    assert not torch.isfinite(logits[0]).any()
    assert torch.equal(logits[1], clean[1])
    assert torch.equal(logits[2], clean[2])


def test_judging_changes_nothing() -> None:
    model = built("llama", {**SIZES, "rope_parameters": ROPES["dynamic"][1]["rope_parameters"]})
    before = {n: x.clone() for n, x in [*model.named_parameters(), *model.named_buffers()]}
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    model.train()
    PackedRunner(model)
    assert torch.equal(torch.rand(3), wanted)
    assert model.training
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert before.keys() == after.keys()
    for n, x in before.items():
        assert x.dtype == after[n].dtype, n
        assert torch.equal(x, after[n]), n
    assert model.model.rotary_emb.max_seq_len_cached == 256


def test_a_leak_smaller_than_any_rounding_is_found() -> None:
    """It would be no error in the logits, yet one client's rows would get to another's."""

    def mixes(_: Any, __: Any, out: Tensor) -> Tensor:
        return out + 1e-12 * out.mean(1, keepdim=True)

    def drops(_: Any, __: Any, out: Tensor) -> Tensor:  # as much, and nobody else's
        return out * (1 + 1e-12)

    for hook, packed in ((drops, True), (mixes, False)):
        model = built("llama", SIZES)
        model.model.layers[0].mlp.register_forward_hook(hook)
        assert runner_of(model).packed is packed


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_narrow_model_is_computed_in_a_wide_dtype(name: str) -> None:
    """As its exact copy in float64 is, without a copy."""
    kind, config, _ = PACKED[name]
    narrow = built(kind, config, dtype=torch.bfloat16)
    wide = copy.deepcopy(narrow).double()
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        with computing_in([narrow.config], torch.float64):
            got = narrow(input_ids=ids).logits
        with computing_in([wide.config], torch.float64):
            wanted = wide(input_ids=ids).logits
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_without_the_setting_there_is_no_auxiliary_loss() -> None:
    model = built(*MIXTURES["mixtral"])
    assert runner_of(model).auxiliary == 0


def test_without_a_packed_pass_rows_are_at_least_padded_to_one_length() -> None:
    model = built("llama", SIZES)
    rows = random_rows(model, 0, False)

    def padded(rows: Sequence[Tokens]) -> Tensor:
        return summed_loss(model, collate(rows, torch.device("cpu"), 0))[1]

    rotary = RotaryFactors(ForwardState(model), [model.config], 0)
    verdict = examine(model, [model.config], rotary, rows, padded, None)
    assert (verdict.packed, verdict.together, verdict.auxiliary) == (False, True, 0.0)
