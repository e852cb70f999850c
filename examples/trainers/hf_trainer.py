"""A client's local training by the Trainer of transformers."""

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import fedlora


def train(model, dataset, training):
    """Train the adapter of one client in one round; give figures for the log."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**fedlora.trainer_arguments(model, training)),
        train_dataset=list(dataset),
        data_collator=DataCollatorForSeq2Seq(training.tokenizer),
        processing_class=training.tokenizer,
    )
    return fedlora.run_trainer(trainer, training)
