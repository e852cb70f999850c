"""The model and the data: FlowerTune's `models.py` and `dataset.py`, with stand-ins to try it."""

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedlora.embedded import BASE_DIR, instructions


def base_of(name: str) -> str:
    """Where transformers finds the model."""
    return str(BASE_DIR) if name == "embedded" else name


def get_model(name: str, rank: int) -> PeftModel:
    """The base with a fresh adapter; alpha is twice the rank, whatever that is."""
    base = AutoModelForCausalLM.from_pretrained(base_of(name))
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)


def load_data(client: int) -> Dataset:
    """A client's rows, with `prompt` and `completion`. Yours come from `FDS.load_partition`."""
    rows = Dataset.from_list(instructions(64, seed=client, split="train"))
    return rows.select_columns(["prompt", "completion"])
