"""One pass of several clients, of real architectures, against each client's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlora.client.trainer import train
from fedlora.data.tokenize import IGNORE
from fedlora.model.batches import count_labelled
from fedlora.model.passes import runner_of
from support.cohort import (
    ALONE,
    MODELS,
    RANKS,
    TOGETHER,
    adapter_of,
    base_of,
    client_adapters_of,
    close,
    rows_of,
    trained,
    trainings_of,
    whole_update,
)


def test_a_client_may_leave_modules_out() -> None:
    base = base_of("llama")
    client_adapters = client_adapters_of(base)
    some = {n: x for n, x in client_adapters[1].adapter.items() if n.endswith("q_proj")}
    client_adapters[1] = replace(client_adapters[1], adapter=some)
    data, trainings = [rows_of("llama", 9, k) for k in range(len(RANKS))], trainings_of(max_steps=2)
    alone = trained(base, client_adapters, data, trainings, ALONE)
    together = trained(base, client_adapters, data, trainings, TOGETHER)
    assert together[1][0].keys() == some.keys()
    close(together, alone, 1e-5)


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
