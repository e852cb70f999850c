"""A client's local training by the DPOTrainer of TRL, on rows with prompt, chosen and rejected."""

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import fedlora


def train(model, dataset, training):
    """Train the adapter of one client in one round; give figures for the log."""
    arguments = fedlora.trainer_arguments(model, training)
    trainer = DPOTrainer(
        model=model,
        ref_model=fedlora.reference_model(model),
        args=DPOConfig(beta=0.1, max_length=training.max_length, **arguments),
        train_dataset=Dataset.from_list(list(dataset)),
        processing_class=training.tokenizer,
    )
    return fedlora.run_trainer(trainer, training)
