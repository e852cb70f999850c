"""A ClientApp as FlowerTune's, with PEFT and TRL; `describe`, `load`, `reply` are fedlora's."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from trl import SFTConfig, SFTTrainer

from fedlora.engines.flower import describe, load, reply
from tuned.model import get_model, load_data

app = ClientApp()


def own(context: Context) -> tuple[int, int]:
    """This client's number and its rank."""
    number = int(context.node_config["partition-id"])
    ranks = [int(rank) for rank in str(context.run_config["ranks"]).split(",")]
    return number, ranks[number % len(ranks)]


@app.query()
def query(message: Message, context: Context) -> Message:
    """Tell the strategy which adapter this client trains."""
    number, rank = own(context)
    config = get_model(str(context.run_config["model"]), rank).peft_config["default"]
    return Message(describe(config, len(load_data(number)), number), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train by TRL from where the strategy says, and send the adapter back."""
    number, rank = own(context)
    rows = load_data(number)
    model = get_model(str(context.run_config["model"]), rank)
    load(model, message, context)
    trainer = SFTTrainer(
        model=model,
        train_dataset=rows,
        args=SFTConfig(
            output_dir="unused",
            max_steps=int(context.run_config["max-steps"]),
            learning_rate=float(context.run_config["learning-rate"]),
            per_device_train_batch_size=8,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
    )
    result = trainer.train()
    return reply(model, message, context, len(rows), {"train_loss": result.training_loss})
