"""The parts of classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from torch import Tensor

import fedlora
from fedlora.client.evaluate import scores
from fedlora.client.local_training import LocalTraining
from fedlora.lowrank import unfold
from fedlora.methods import METHODS
from fedlora.model.base import BaseModel
from fedlora.runs.session import Session
from support.architectures import LABELS, Rounds, labelled_rows, save_model
from support.classifier import bert, classifier_of, data, llama, session_of, sites  # noqa: F401
from support.train import RANK, SCALE, adapter_of, by_trainer, losses_of, same, start_of


@pytest.mark.parametrize("method", sorted(METHODS))
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


def peft_classifier(path: Path, session: Session) -> Any:
    """The untouched base with PEFT's layers, beginning at `start_of` and our head."""
    base = session.base
    torch.manual_seed(0)
    model = get_peft_model(
        hf.AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=3, dtype=torch.float32, pad_token_id=0
        ),
        LoraConfig(
            r=RANK,
            lora_alpha=SCALE * RANK,
            target_modules=list(base.targets.shapes),
            modules_to_save=list(base.targets.modules_to_save),
            task_type="SEQ_CLS",
        ),
    )
    for name, x in start_of(base).items():
        a, b = unfold(x, SCALE)
        layer = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data = a
        layer.lora_B["default"].weight.data = b
    for name, parameter in heads_of(model).items():
        parameter.data = base.read_full_params()[name]
    return model


def heads_of(model: Any) -> dict[str, Tensor]:
    """The parameters PEFT trains whole, by their names in the plain model."""
    mark = ".modules_to_save.default"
    return {
        name.replace(mark, "").removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if mark in name
    }


CLIPPED = LocalTraining(
    client=2,
    round=3,
    per_device_train_batch_size=4,
    learning_rate=3e-2,
    warmup_steps=2,
    weight_decay=0.1,
    adam_epsilon=1e-2,  # of the size of gradients, or Adam would undo the clipping
    max_grad_norm=0.3,
    num_train_epochs=3,
)


TRAININGS = {
    "clipping, warm-up, decay, a partial batch": CLIPPED,
    "no clipping, other moments": LocalTraining(
        per_device_train_batch_size=5,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        adam_beta1=0.8,
        adam_beta2=0.95,
        max_grad_norm=0.0,
        num_train_epochs=2.5,
    ),
}


def compare(path: Path, session: Session, training: LocalTraining, where: Path) -> list[float]:
    """Train both ways; losses, adapters and heads are the same."""
    base, data = session.base, session.data.clients[0].train
    assert len({len(row["input_ids"]) for row in data}) > 2  # there is padding
    model, start = peft_classifier(path, session), base.read_full_params()
    assert heads_of(model).keys() == start.keys()
    losses, _ = by_trainer(model, data, training, where)
    ours = losses_of(base, data, training)
    assert len(ours) == len(losses) == training.steps(len(data)) > 3
    assert max(losses) - min(losses) > 0.05
    assert ours == pytest.approx(losses, rel=3e-5)
    same(base.read_adapter(), adapter_of(model, base), 5e-3)
    trained = base.read_full_params()
    for name, theirs in heads_of(model).items():
        limit = 5e-3 * float(theirs.abs().max())
        torch.testing.assert_close(trained[name], theirs.detach(), rtol=0, atol=limit)
        assert float((trained[name] - start[name]).abs().max()) > 10 * limit
    return ours


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS.keys())
def test_training_a_classifier_is_that_of_transformers(
    bert: Path, data: Path, training: LocalTraining, tmp_path: Path
) -> None:
    compare(bert, session_of(bert, data, tmp_path), training, tmp_path)


def test_training_a_causal_classifier_is_that_of_transformers(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    """It reads the last token that is no padding."""
    compare(llama, session_of(llama, data, tmp_path), CLIPPED, tmp_path)


def test_an_accumulated_step_is_that_of_the_whole_batch(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """Where Trainer, whose classifiers are not told the rows of a step, adds means of batches."""
    session = session_of(bert, data, tmp_path)
    rows_of = session.data.clients[0].train[:8]
    at_once = replace(CLIPPED, per_device_train_batch_size=8, num_train_epochs=4)
    start = session.base.read_full_params()
    whole = losses_of(session.base, rows_of, at_once)
    session.base.load([], None, full_params=start)
    parts = replace(at_once, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    assert losses_of(session.base, rows_of, parts) == pytest.approx(whole, rel=1e-5)


def gradients(base: BaseModel, data: Any) -> tuple[float, float]:
    """The norms of the adapter's and of the head's gradient in the first step of `CLIPPED`."""
    from fedlora.client.local_training import batches
    from fedlora.model.batches import collate
    from fedlora.model.loss import summed_loss

    base.load([], start_of(base), SCALE)
    micro = next(iter(batches(data, CLIPPED, 1)))
    base.model.train()
    (summed_loss(base.model, collate(micro[0]))[0] / len(micro[0])).backward()
    heads = {id(p) for p in base.full_params.values()}
    trained = [p for p in base.model.parameters() if p.requires_grad]
    sums = [0.0, 0.0]
    for p in trained:
        sums[id(p) in heads] += float(p.grad.square().sum())
        p.grad = None
    return sums[0] ** 0.5, sums[1] ** 0.5


def test_gradients_are_clipped_over_adapter_and_head_together(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """One plain step with the limit between the parts and the whole: only the sum exceeds it."""
    session = session_of(bert, data, tmp_path)
    base, part = session.base, session.data.clients[0].train
    adapter, head = gradients(base, part)
    together = (adapter**2 + head**2) ** 0.5
    limit = (max(adapter, head) + together) / 2
    assert max(adapter, head) < limit < 0.999 * together
    # With a huge epsilon and no moments AdamW's step is `-lr / eps * gradient`.
    eps = 1e4
    training = replace(
        CLIPPED,
        adam_beta1=0.0,
        adam_beta2=0.0,
        adam_epsilon=eps,
        learning_rate=eps,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_steps=1,
    )
    start = base.read_full_params()

    def moved(max_grad_norm: float) -> dict[str, Tensor]:
        base.load([], None, full_params=start)
        losses_of(base, part, replace(training, max_grad_norm=max_grad_norm))
        return {name: x - start[name] for name, x in base.read_full_params().items()}

    free, clipped = moved(0.0), moved(limit)
    for name, x in free.items():
        torch.testing.assert_close(clipped[name], x * (limit / together), rtol=1e-3, atol=1e-6)
    size = sum(float(x.square().sum()) for x in free.values()) ** 0.5
    assert size == pytest.approx(head, rel=1e-2)


def test_clipping_is_active_in_the_comparison(bert: Path, data: Path, tmp_path: Path) -> None:
    session = session_of(bert, data, tmp_path)
    part, start = session.data.clients[0].train, session.base.read_full_params()
    clipped = losses_of(session.base, part, CLIPPED)
    session.base.load([], None, full_params=start)
    free = losses_of(session.base, part, replace(CLIPPED, max_grad_norm=0.0))
    assert free != pytest.approx(clipped, rel=1e-3)


@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(
            st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), min_size=1, max_size=40
        ).map(lambda pairs: (n, pairs))
    )
)
@settings(deadline=None, max_examples=60)
def test_scores_are_those_of_scikit_learn(case: tuple[int, list[tuple[int, int]]]) -> None:
    number, pairs = case
    truth, guess = [t for t, _ in pairs], [g for _, g in pairs]
    names = [f"label {i}" for i in range(number)]
    found = scores(torch.tensor(truth), torch.tensor(guess), names)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert found["macro_f1"] == pytest.approx(
        f1_score(truth, guess, average="macro", zero_division=0)
    )
    table = precision_recall_fscore_support(
        truth, guess, labels=list(range(number)), zero_division=0
    )
    assert list(found["per_class"]) == names
    for i, name in enumerate(names):
        assert [found["per_class"][name][key] for key in ("precision", "recall", "f1")] == (
            pytest.approx([column[i] for column in table[:3]])
        )
        assert found["per_class"][name]["support"] == table[3][i]


def test_labels_absent_in_truth_or_guesses() -> None:
    """Of five labels one is never guessed, one never true, one neither."""
    truth, guess = [0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 3, 0, 0, 1]
    found = scores(torch.tensor(truth), torch.tensor(guess), list("abcde"))
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 3}
    assert found["per_class"]["d"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["per_class"]["e"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    expected = f1_score(truth, guess, average="macro", zero_division=0)  # over a, b, c, d
    assert found["macro_f1"] == pytest.approx(expected)
    assert found["macro_f1"] != pytest.approx(
        f1_score(truth, guess, average="macro", labels=range(5), zero_division=0)
    )


def test_labels_are_sorted_naturally(bert: Path, tmp_path: Path) -> None:
    labels = ["item 10", "item 9", "b", "10", "9", "item 1"]
    part = labelled_rows(12, 0, labels)
    files = sites(tmp_path / "files", part, part, held_out=part[:3])
    session = session_of(bert, files, tmp_path)
    assert session.data.label_names == ("9", "10", "b", "item 1", "item 9", "item 10")
    ids = [session.data.label_names.index(row["label"]) for row in part]
    assert [row["label"] for row in session.data.clients[0].train] == ids


def test_fractions_are_no_labels(bert: Path, tmp_path: Path) -> None:
    part = labelled_rows(12, 0, [0.5, 1.0])
    files = sites(tmp_path / "files", part, part, held_out=part)
    with pytest.raises(fedlora.InputError, match=r"label_column_name: .*0\.5.*whole numbers"):
        session_of(bert, files, tmp_path)


def test_one_label_is_no_classification(bert: Path, tmp_path: Path) -> None:
    part = labelled_rows(6, 0, ["fig"])
    files = sites(tmp_path / "files", part, part, held_out=labelled_rows(3))
    with pytest.raises(fedlora.InputError, match=r"label has one value \(fig\) in all 12"):
        session_of(bert, files, tmp_path)


def test_a_row_without_a_label_is_named(bert: Path, tmp_path: Path) -> None:
    part = labelled_rows(6)
    hole = [*part[:2], {"text": "a", "label": None}]
    files = sites(tmp_path / "files", part, hole, held_out=part)
    with pytest.raises(fedlora.InputError, match=r"label_1\.jsonl, row 3 has no label"):
        session_of(bert, files, tmp_path)


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
