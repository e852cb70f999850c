"""Heads of classifiers: drawn from the seed, kept or drawn anew by their labels, averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from fedlora.methods import METHODS
from support.architectures import (
    LABELS,
    Rounds,
    save_model,
)
from support.classifier import (
    bert,  # noqa: F401
    classifier_of,
    data,  # noqa: F401
    session_of,
)
from support.products import in_turn


@pytest.mark.parametrize("method", in_turn(sorted(METHODS), 3))
def test_heads_are_averaged_by_every_rule(
    method: str, bert: Path, data: Path, tmp_path: Path
) -> None:
    ranks = [3, 2] if METHODS[method].mixed_ranks else [3, 3]
    rounds = Rounds(session_of(bert, data, tmp_path, method=method, client_ranks=ranks))
    for _ in (1, 2):
        before, _, updates = rounds.next()
        for name, value in rounds.server.state.dense.items():
            assert all(not torch.equal(u.dense[name], before.dense[name]) for u in updates.values())
            assert not torch.equal(updates[0].dense[name], updates[1].dense[name])
            mean = (11 * updates[0].dense[name].double() + 7 * updates[1].dense[name].double()) / 18
            torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)
            assert value.dtype == torch.float32
        head = sum(t.nbytes for t in before.dense.values())
        for client, sent in updates.items():
            factors = sum(
                x.A.nbytes * ("A" in sent.sends) + x.B.nbytes * ("B" in sent.sends)
                for x in sent.adapter.values()
            )
            assert rounds.record.clients[client].bytes_up == factors + head
            assert rounds.record.clients[client].bytes_down >= head


def test_a_new_head_is_drawn_from_the_seed_alone(bert: Path, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = session_of(bert, data, tmp_path).base.read_full_params()
    torch.manual_seed(2)
    torch.rand(5)
    state = torch.get_rng_state()
    again = session_of(bert, data, tmp_path, method="flora", lora_r=5).base.read_full_params()
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == again.keys() == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(again[name], x) for name, x in first.items())
    assert first["classifier.weight"].abs().min() > 0
    other = session_of(bert, data, tmp_path, seed=43).base.read_full_params()
    assert not torch.equal(other["classifier.weight"], first["classifier.weight"])


@pytest.mark.parametrize(
    "labels", [["fig", "ox 9"], ["ant", "bee", "cat"], ["fig", "ox 9", "yak"]], ids=" ".join
)
def test_other_labels_get_a_new_head(
    labels: list[str], bert: Path, data: Path, tmp_path: Path
) -> None:
    """As many labels or fewer: what the old head learnt belongs to others."""
    path = classifier_of(bert, tmp_path / "classifier", labels)
    session = session_of(path, data, tmp_path)
    assert session.data.label_names == LABELS
    assert session.base.model.config.id2label == dict(enumerate(LABELS))
    old = load_file(path / "model.safetensors")
    new = session.base.read_full_params()
    assert new["classifier.weight"].shape == (3, 32)
    assert not torch.equal(new["classifier.weight"], old["classifier.weight"])
    assert not torch.equal(new["classifier.bias"], old["classifier.bias"])
    assert new["classifier.weight"].abs().max() < 0.2  # of the size of new weights, 0.02
    again = session_of(path, data, tmp_path).base.read_full_params()
    assert all(torch.equal(again[name], x) for name, x in new.items())
    other = session_of(path, data, tmp_path, seed=43).base.read_full_params()
    assert not torch.equal(other["classifier.weight"], new["classifier.weight"])
    assert set(session.base.targets.modules_to_save) == {"classifier"}


def test_names_given_in_another_order_do_not_exchange_the_meaning_of_a_head(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """Its rows follow their labels, or it is drawn anew; it is never read in a wrong order."""
    path = classifier_of(bert, tmp_path / "classifier", LABELS)
    kept = session_of(path, data, tmp_path).base.read_full_params()["classifier.weight"]
    turned = session_of(path, data, tmp_path, label_names=list(LABELS[::-1]))
    assert turned.data.label_names == LABELS[::-1]
    found = turned.base.read_full_params()["classifier.weight"]
    fresh = session_of(bert, data, tmp_path, label_names=list(LABELS[::-1])).base.read_full_params()
    assert torch.equal(found, kept.flip(0)) or torch.equal(found, fresh["classifier.weight"])


def test_the_base_of_a_classifier_is_recognised_without_its_new_head(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """Another head is another start, not another base; other weights are."""
    first = session_of(bert, data, tmp_path)
    assert first.base.fingerprint == session_of(bert, data, tmp_path, seed=7).base.fingerprint
    path = save_model(tmp_path / "copy", hf.AutoConfig.from_pretrained(bert), hf.BertModel)
    tensors = load_file(path / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert session_of(path, data, tmp_path).base.fingerprint != first.base.fingerprint
