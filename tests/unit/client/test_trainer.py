"""Local steps against transformers' Trainer with PEFT, and against loops written out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, get_scheduler

from fedlora.client.local_training import LocalTraining, batches, schedule
from fedlora.client.trainer import train
from fedlora.data.templates import TEMPLATES
from fedlora.data.tokenize import IGNORE, Tokens, tokenize
from fedlora.lowrank import LowRank, unfold
from fedlora.model.base import BaseModel
from fedlora.model.batches import collate, count_labelled
from fedlora.model.loss import summed_loss
from fedlora.model.passes import runner_of
from support.models import load_base
from support.rows import rows
from support.train import RANK, SCALE, adapter_of, by_trainer, losses_of, same, start_of


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def base_path(request: pytest.FixtureRequest) -> Path:
    """Both shapes of model: linear layers, and GPT-2's transposed ones."""
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture
def llama(tiny_llama: Path) -> BaseModel:
    """The tiny Llama with layers in place."""
    return load_base(str(tiny_llama), target_modules="all-linear")


def dataset_of(base: BaseModel, number: int, completion_only: bool = True) -> list[Tokens]:
    """Tokenised rows of different lengths."""
    values = rows(number)
    for i, row in enumerate(values):
        row["completion"] += "abc"[: i % 4]
    template = TEMPLATES["prompt_completion"]
    found = [tokenize(row, template, base.tokenizer, 64, completion_only) for row in values]
    return [row for row in found if row]


def equal(x: dict[str, LowRank], y: dict[str, LowRank]) -> bool:
    """To the bit."""
    return all(torch.equal(x[n].A, y[n].A) and torch.equal(x[n].B, y[n].B) for n in x)


def peft_model(base_path: Path, base: BaseModel) -> Any:
    """The untouched base with PEFT's layers, beginning at `start_of`."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32),
        LoraConfig(
            r=RANK,
            lora_alpha=SCALE * RANK,
            target_modules=list(base.targets.shapes),
            lora_dropout=0.0,
            fan_in_fan_out=base.targets.fan_in_fan_out,
            task_type="CAUSAL_LM",
        ),
    )
    for name, x in start_of(base).items():
        a, b = unfold(x, SCALE)
        layer = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data = a
        layer.lora_B["default"].weight.data = b
    return model


TRAININGS = {
    # 22 rows in batches of 4: five whole, one of two; three micro-batches to a step: two steps.
    "accumulation, clipping, warm-up, decay, partial batches": LocalTraining(
        client=2,
        round=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        learning_rate=3e-2,
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=0.1,
        adam_epsilon=1e-2,  # of the size of gradients, or Adam would undo the clipping
        max_grad_norm=0.25,
        num_train_epochs=3,
    ),
    "a share of warm-up, a last step of one micro-batch, half an epoch": LocalTraining(
        per_device_train_batch_size=3,
        gradient_accumulation_steps=7,  # eight micro-batches: steps of seven and of one
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=0.3,
        num_train_epochs=2.5,
    ),
    "steps beyond an epoch, other moments, no clipping": LocalTraining(
        client=1,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="polynomial",
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-4,
        weight_decay=0.3,
        max_grad_norm=0.0,
        num_train_epochs=1,
        max_steps=8,
    ),
    "a constant rate, fewer steps than an epoch": LocalTraining(
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        num_train_epochs=5,
        max_steps=4,
    ),
}


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS.keys())
def test_training_is_that_of_transformers(
    base_path: Path, training: LocalTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(base_path), target_modules="all-linear")
    data = dataset_of(base, 22)
    model = peft_model(base_path, base)
    losses, rates = by_trainer(model, data, training, tmp_path)
    our_rates = record_rates(monkeypatch)
    ours = losses_of(base, data, training)
    assert len(ours) == len(losses) == training.steps(len(data)) > 3
    assert max(losses) - min(losses) > 0.05  # it does move
    assert ours == pytest.approx(losses, rel=2e-5)
    assert our_rates == pytest.approx(rates, rel=1e-6, abs=1e-12)
    # Adam divides by the root of tiny second moments, which multiplies rounding.
    same(base.read_adapter(), adapter_of(model, base), 2e-3)


def test_loss_on_whole_texts_is_that_of_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    """Without a prompt the first token is labelled, and yet predicted from nothing."""
    base = load_base(str(tiny_llama), target_modules="all-linear")
    data = dataset_of(base, 10, completion_only=False)
    assert data[0]["labels"][0] != IGNORE
    training = LocalTraining(
        per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=4
    )
    losses, _ = by_trainer(peft_model(tiny_llama, base), data, training, tmp_path)
    assert losses_of(base, data, training) == pytest.approx(losses, rel=2e-5)


def test_clipping_is_active_in_the_comparison(llama: BaseModel) -> None:
    """The test above would not see clipping if gradients were below the limit anyway."""
    data = dataset_of(llama, 22)
    training = TRAININGS["accumulation, clipping, warm-up, decay, partial batches"]
    clipped = losses_of(llama, data, training)
    assert losses_of(llama, data, replace(training, max_grad_norm=0.0)) != pytest.approx(
        clipped, rel=1e-4
    )


def test_fedprox_is_a_term_of_the_loss(llama: BaseModel, tiny_llama: Path) -> None:
    """`mu/2 ||theta - theta_0||^2` in the graph, all parameters flattened, AdamW by its formula."""
    data = dataset_of(llama, 12)
    training = LocalTraining(
        client=3,
        round=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        weight_decay=0.05,
        max_grad_norm=0.5,
        max_steps=8,
        proximal_mu=3.0,
    )
    model = peft_model(tiny_llama, llama)
    parameters = [p for p in model.parameters() if p.requires_grad]
    theta_0 = [p.detach().clone() for p in parameters]
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    expected = []
    for step, micro in enumerate(batches(data, training, 8), 1):
        together = collate([row for part in micro for row in part])
        loss = model(**together).loss
        expected.append(float(loss.detach()))
        near = sum((p - p_0).square().sum() for p, p_0 in zip(parameters, theta_0, strict=True))
        grads = torch.autograd.grad(loss + training.proximal_mu / 2 * near, parameters)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        factor = min(1.0, training.max_grad_norm / (float(norm) + 1e-6))
        with torch.no_grad():
            for p, g, m, v in zip(parameters, grads, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * factor * g)
                v.mul_(0.999).add_(0.001 * (factor * g).square())
                p.mul_(1 - training.learning_rate * training.weight_decay)
                p.sub_(
                    training.learning_rate
                    * (m / (1 - 0.9**step))
                    / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                )
    # The loss reported is the one on the data, without the term.
    assert losses_of(llama, data, training) == pytest.approx(expected, rel=1e-4)
    same(llama.read_adapter(), adapter_of(model, llama), 5e-3)
    assert losses_of(llama, data, replace(training, proximal_mu=0.0)) != pytest.approx(
        expected, rel=1e-3
    )


def record_rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate at every AdamW step from here on."""
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noting(self: Any, *arguments: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    return rates


def rates_of_transformers(kind: str, warmup: int, total: int, rate: float) -> list[float]:
    """As a loop with `scheduler.step()` after every step sees them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    out = []
    for _ in range(total):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


KINDS = ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warmup", "in_steps"), [(0, 0), (3, 3), (0.25, 5)])
def test_schedules_are_those_of_transformers(kind: str, warmup: float, in_steps: int) -> None:
    rate, steps = 2e-4, 20
    training = LocalTraining(lr_scheduler_type=kind, warmup_steps=warmup, learning_rate=rate)
    factor = schedule(training, steps)
    wanted = rates_of_transformers(kind, in_steps, steps, rate)
    assert [rate * factor(i) for i in range(steps)] == pytest.approx(wanted, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_restarts_each_round_or_spans_the_federation(
    kind: str, llama: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = record_rates(monkeypatch)
    training = LocalTraining(
        num_rounds=3,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        lr_scheduler_type=kind,
        warmup_steps=0.25,
        max_steps=4,
    )
    data = dataset_of(llama, 2)
    for scope in ("round", "federation"):
        for number in (1, 2, 3):
            losses_of(llama, data, replace(training, round=number, lr_scheduler_scope=scope))
    once = rates_of_transformers(kind, 1, 4, 1e-3)
    whole = rates_of_transformers(kind, 3, 12, 1e-3)
    assert rates == pytest.approx([*once * 3, *whole], rel=1e-9, abs=1e-15)


def test_batches_are_shuffled_epochs_cut_as_trainer_cuts_them() -> None:
    data: list[Tokens] = [{"input_ids": [i], "labels": [i]} for i in range(11)]
    training = LocalTraining(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    found = [
        [[row["input_ids"][0] for row in part] for part in micro]
        for micro in batches(data, training, 5)
    ]
    # Six batches, the last of one row; steps of four and of two of them; then the next epoch.
    assert [[len(part) for part in micro] for micro in found] == [
        [2, 2, 2, 2],
        [2, 1],
        [2, 2, 2, 2],
        [2, 1],
        [2, 2, 2, 2],
    ]
    flat = [[i for part in micro for i in part] for micro in found]
    assert sorted(flat[0] + flat[1]) == sorted(flat[2] + flat[3]) == list(range(11))
    assert flat[0] + flat[1] != flat[2] + flat[3]
    for other in ({"seed": 1}, {"round": 2}, {"client": 1}):
        assert list(batches(data, replace(training, **other), 1)) != list(
            batches(data, training, 1)
        )
    assert list(batches(data, replace(training, learning_rate=1.0), 5)) == list(
        batches(data, training, 5)
    )


@pytest.mark.parametrize(
    ("number", "values", "steps"),
    [
        (22, {}, 3),
        (22, {"num_train_epochs": 2.5}, 8),
        (22, {"num_train_epochs": 0.1}, 1),
        (22, {"gradient_accumulation_steps": 2}, 2),
        (22, {"max_steps": 50}, 50),
        (1, {"max_steps": 2, "num_train_epochs": 9}, 2),
        (1, {}, 1),
    ],
)
def test_the_number_of_steps(number: int, values: dict[str, Any], steps: int) -> None:
    assert LocalTraining(per_device_train_batch_size=8, **values).steps(number) == steps


def test_steps_beyond_an_epoch(llama: BaseModel) -> None:
    """Three rows, ten steps of two: every row is seen, epoch after epoch."""
    data = dataset_of(llama, 3)
    told: list[tuple[int, int, int]] = []
    training = LocalTraining(
        per_device_train_batch_size=2,
        max_steps=10,
        on_step=lambda step, steps, loss, tokens: told.append((step, steps, tokens)),
    )
    llama.load([], start_of(llama), SCALE)
    metrics = train(llama.model, data, training)
    lengths = sum(len(row["input_ids"]) for row in data)
    assert [(step, steps) for step, steps, _ in told] == [(i, 10) for i in range(1, 11)]
    assert [told[i][2] + told[i + 1][2] for i in range(0, 10, 2)] == [lengths] * 5
    assert metrics["steps"] == 10
    assert metrics["tokens"] == 5 * lengths


def test_padding_changes_no_loss(llama: BaseModel) -> None:
    """Rows of a batch are as if alone: padding is neither attended to nor learnt."""
    data = dataset_of(llama, 6)
    assert len({len(row["input_ids"]) for row in data}) > 2
    llama.load([], start_of(llama), SCALE)
    llama.model.eval()
    with torch.no_grad():
        together, logits, labels = summed_loss(llama.model, collate(data))
        alone = sum(float(summed_loss(llama.model, collate([row]))[0]) for row in data)
    assert float(together) == pytest.approx(alone, rel=1e-5)
    assert len(logits) == len(labels) == count_labelled(data)
    assert labels.tolist() == [t for row in data for t in row["labels"][1:] if t != IGNORE]


@pytest.mark.parametrize("packed", [True, False])
def test_metrics(llama: BaseModel, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:  # as an architecture is run that needs padding
        monkeypatch.setattr(runner_of(llama.model), "packed", False)
        monkeypatch.setattr(runner_of(llama.model), "joint", False)
    data = dataset_of(llama, 8)
    losses: list[float] = []
    training = LocalTraining(
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        num_train_epochs=4,
        on_step=lambda step, steps, loss, tokens: losses.append(loss),
    )
    llama.load([], start_of(llama), SCALE)
    metrics = train(llama.model, data, training)
    lengths = [len(row["input_ids"]) for row in data]
    assert metrics["steps"] == len(losses) == 4
    assert metrics["loss"] == pytest.approx(sum(losses) / 4)
    assert (metrics["loss_first"], metrics["loss_last"]) == (losses[0], losses[-1])
    assert metrics["tokens"] == 4 * sum(lengths)
    share = 1 - sum(lengths) / (8 * max(lengths))
    assert share > 0.1
    assert metrics["padding"] == pytest.approx(0.0 if packed else share)
    assert not llama.model.training


def test_dropout_depends_on_seed_round_and_client_alone(llama: BaseModel) -> None:
    data = dataset_of(llama, 1)  # of one row, so that the order of batches plays no part
    training = LocalTraining(learning_rate=1e-2, max_steps=2)

    def trained(dropout: float = 0.5, **values: Any) -> dict[str, LowRank]:
        llama.load([], start_of(llama), SCALE, dropout)
        train(llama.model, data, replace(training, **values))
        return llama.read_adapter()

    torch.manual_seed(1)
    first = trained()
    torch.manual_seed(2)
    torch.rand(17)
    state = torch.get_rng_state()
    assert equal(trained(), first)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it disturb anyone else's draws
    assert equal(trained(num_rounds=9), first)
    without = trained(dropout=0.0)
    assert not equal(without, first)
    for other in ({"seed": 1}, {"round": 2}, {"client": 1}):
        assert not equal(trained(**other), first)
        assert equal(trained(dropout=0.0, **other), without)


def test_nothing_to_train_is_an_error(llama: BaseModel) -> None:
    data = dataset_of(llama, 2)
    llama.load([])
    with pytest.raises(ValueError, match="at least one row and one parameter"):
        train(llama.model, data, LocalTraining())
    llama.load([], start_of(llama), SCALE)
    with pytest.raises(ValueError, match="at least one row and one parameter"):
        train(llama.model, [], LocalTraining())
