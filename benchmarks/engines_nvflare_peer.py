"""Trains an adapter as users of Hugging Face do it with NVIDIA FLARE: a script and its job.

It has the shape of FLARE's own example of language models: TRL's `SFTTrainer` with PEFT in a
process of its own, FLARE's client API around it, and `FedAvgRecipe` at the server. Each round the
global adapter is loaded and evaluated, and trained for one epoch with a new optimizer; the example
also saves and loads a checkpoint of it, which this leaves out.

    engines_nvflare_peer.py FILE      # JSON: "model", "train", "test", "output", "rank", ...
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

FIRST = "model."
"""What the server puts before a parameter's name, for its model lies in an attribute."""


def lora(rank: int) -> LoraConfig:
    """The adapter."""
    targets = "all-linear"
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")


class PeerModel(torch.nn.Module):
    """The server's model, of which it sends the adapter alone.

    Args:
        model: directory of the base.
        rank: of the adapter.
    """

    def __init__(self, model: str, rank: int) -> None:
        super().__init__()
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora(rank))

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """The adapter's parameters."""
        return {FIRST + k: x for k, x in get_peft_model_state_dict(self.model).items()}

    def load_state_dict(self, values: Any, *_: Any, **__: Any) -> Any:
        """Take the adapter's parameters."""
        own = {name.removeprefix(FIRST): torch.as_tensor(x) for name, x in values.items()}
        return set_peft_model_state_dict(self.model, own)


def write_job(path: Path, sites: Mapping[str, Path], model: str, rank: int, rounds: int) -> None:
    """Write the job.

    Args:
        path: of its directory.
        sites: site -> the file that its script reads.
        model: directory of the base.
        rank: of the adapter.
        rounds: how many.
    """
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe.utils import set_per_site_config

    at_server = {"model": model, "rank": rank}
    recipe = FedAvgRecipe(
        name=path.name,
        model={"class_path": f"{Path(__file__).stem}.PeerModel", "args": at_server},
        min_clients=len(sites),
        num_rounds=rounds,
        train_script=__file__,
        launch_external_process=True,
        key_metric="neg_eval_loss",
    )
    set_per_site_config(recipe, {name: {"train_args": str(x)} for name, x in sites.items()})
    recipe.add_server_file(__file__)
    recipe.export(str(path.parent))


def main() -> None:
    """Take part in all rounds, and write down when each began and what it cost."""
    import nvflare.client as flare
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    asked = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    flare.init()
    files = {"train": asked["train"], "test": asked["test"]}
    rows = load_dataset("json", data_files=files)
    with tempfile.TemporaryDirectory() as scratch:
        options = SFTConfig(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=asked["batch"],
            learning_rate=asked["learning_rate"],
            lr_scheduler_type="constant",
            max_length=asked["max_length"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(asked["model"]),
            processing_class=AutoTokenizer.from_pretrained(asked["model"]),
            train_dataset=rows["train"],
            eval_dataset=rows["test"],
            peft_config=lora(asked["rank"]),
            args=options,
        )
        told = []
        while flare.is_running():
            received = flare.receive()
            if received is None:
                break
            began = time.time()
            adapter = {
                name.removeprefix(FIRST): torch.as_tensor(x) for name, x in received.params.items()
            }
            set_peft_model_state_dict(trainer.model, adapter)
            loss = trainer.evaluate()["eval_loss"]
            before = time.time()
            trainer.train()
            seconds = time.time() - before
            out = {
                FIRST + name: x.detach().float().numpy()
                for name, x in get_peft_model_state_dict(trainer.model).items()
            }
            sent = flare.FLModel(
                params=out,
                metrics={"neg_eval_loss": -loss},
                meta={"NUM_STEPS_CURRENT_ROUND": trainer.state.global_step},
            )
            told.append(
                {
                    "began": began,
                    "training": seconds,
                    "loss": loss,
                    "bytes_down": sum(x.numel() * x.element_size() for x in adapter.values()),
                    "bytes_up": sum(x.nbytes for x in out.values()),
                }
            )
            Path(asked["output"]).write_text(json.dumps(told))
            flare.send(sent)


if __name__ == "__main__":
    main()
