"""A client's local training by the SFTTrainer of TRL."""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import fedlora


def train(model, dataset, training):
    """Train the adapter of one client in one round; give figures for the log."""
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(max_length=None, **fedlora.trainer_arguments(model, training)),
        train_dataset=Dataset.from_list(list(dataset)),
        processing_class=training.tokenizer,
    )
    return fedlora.run_trainer(trainer, training)
