"""Lets trainers of transformers and TRL do a client's local training.

They train a client's model in place. `trainer_arguments` says in their words how the configuration
wants a client to train, and `run_trainer` trains, tells the progress and gives the figures. Neither
imports transformers' Trainer or TRL: the user's own training does.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

from fedlora.client.local_training import LocalTraining
from fedlora.errors import InputError
from fedlora.model.lora_layer import AdapterLayer

_SAME = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
)
"""Settings that `TrainingArguments` has under the same name and in the same meaning."""


def trainer_arguments(model: Any, training: LocalTraining) -> dict[str, Any]:
    """How a client trains, as arguments of `TrainingArguments`, `SFTConfig`, `DPOConfig`, ....

    They train in the dtype of the model, without checkpoints, progress bars and reports, and draw
    the order of rows by the run's seed, the round and the client. A loss that is not finite is
    told as it is.

    Args:
        model: what the local training is given.
        training: what it is given too.

    Raises:
        InputError: a setting that these trainers do not have.
    """
    if training.lr_scheduler_scope != "round":
        raise InputError(
            "lr_scheduler_scope: federation: a trainer of transformers begins its schedule anew in "
            "every round; use lr_scheduler_scope: round, or lr_scheduler_type: constant"
        )
    for key in ("proximal_mu", "tail_penalty"):
        if getattr(training, key):
            raise InputError(
                f"{key}: {getattr(training, key)}: trainers of transformers and TRL have no such "
                "term in their loss; leave it out, or use fedlora's own training"
            )
    checkpointing = any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )
    return {
        **{name: getattr(training, name) for name in _SAME},
        "optim": "adamw_torch",
        "seed": (training.seed * 1_000_003 + training.round * 1_009 + training.client) % 2**32,
        "use_cpu": model.device.type == "cpu",
        "bf16": False,
        "gradient_checkpointing": checkpointing,
        # Reentrant checkpoints give no gradients where the embeddings are frozen.
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "output_dir": os.path.join(tempfile.gettempdir(), f"fedlora-trainer-{os.getuid()}"),
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # which would tell 0.0 of a client that has diverged
        "include_num_input_tokens_seen": "non_padding",
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_trainer(trainer: Any, training: LocalTraining) -> dict[str, Any]:
    """Train with a trainer of transformers or TRL, telling the run of every step.

    Args:
        trainer: made for the model that the local training is given.
        training: what the local training is given.

    Returns:
        loss (mean over the steps), loss_first, loss_last, steps, tokens and seconds: what a local
        training returns. Tokens are counted without padding where the batches have an attention
        mask, or the trainer was given the tokenizer (`processing_class`); else with it.

    Raises:
        InputError: the output layer has an adapter, which TRL's trainers would not train.
    """
    from transformers.trainer_callback import PrinterCallback

    _check_output_layer(trainer)
    trainer.remove_callback(PrinterCallback)  # what it prints would stand among the run's lines
    losses: list[float] = []
    trainer.add_callback(_tell_steps(training, losses))
    began = time.perf_counter()
    trainer.train()
    return {
        "loss": sum(losses) / max(len(losses), 1),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "steps": len(losses),
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": time.perf_counter() - began,
    }


def _check_output_layer(trainer: Any) -> None:
    """Refuse an adapter at the output layer, whose weight TRL's trainers multiply by themselves."""
    of_trl = any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__)
    if of_trl and isinstance(trainer.model.get_output_embeddings(), AdapterLayer):
        raise InputError(
            "lora_target_modules: TRL's trainers read the weight of the output layer (lm_head) "
            "without its adapter, which would learn nothing; leave it out"
        )


def _tell_steps(training: LocalTraining, losses: list[float]) -> Any:
    """A callback of transformers that notes the loss of every step, and tells the run of it.

    Telling may end the training, by an exception: that is how a site gives up.
    """
    from transformers import TrainerCallback

    class TellSteps(TrainerCallback):  # type: ignore[misc]
        """Notes and tells every step."""

        seen = 0

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            """Called by the trainer after every step, and once more at the end."""
            if "loss" not in logs:
                return
            losses.append(float(logs["loss"]))
            tokens, self.seen = state.num_input_tokens_seen - self.seen, state.num_input_tokens_seen
            if training.on_step is not None:
                training.on_step(len(losses), state.max_steps, losses[-1], int(tokens))

    return TellSteps()
