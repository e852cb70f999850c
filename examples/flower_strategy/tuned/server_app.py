"""A ServerApp with fedlora's strategy in the place of FlowerTune's FedAvg."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict

from fedlora.engines.flower import FedLora, save
from tuned.model import base_of, get_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the federation, and save the global model as a PEFT directory."""
    config = context.run_config
    strategy = FedLora(
        method=str(config["method"]),
        clients_per_round=int(config["clients-per-round"]),
        min_available_nodes=int(config["clients-per-round"]),
        evaluates=False,
    )
    model = get_model(str(config["model"]), rank=8)  # its target modules count, not its rank
    result = strategy.start(
        grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=int(config["num-server-rounds"]),
    )
    save(result.arrays, str(config["output"]), base_of(str(config["model"])))
