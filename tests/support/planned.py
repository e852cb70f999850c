"""Measures in a process of its own how much memory a client's training takes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_TRAIN = """
import json, resource, sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from fedlora.client.local_training import LocalTraining
from fedlora.client.trainer import train
from fedlora.lowrank import LowRank
from fedlora.model.base import attach
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.targets import find_targets

asked = json.loads(sys.argv[1])
torch.set_num_threads(1)
device = torch.device(asked["device"])
model = AutoModelForCausalLM.from_config(LlamaConfig(**asked["sizes"]))
model.config.use_cache = False
model.to(device)
base = attach(model, None, find_targets(model, "all-linear", "it", None, [], "CAUSAL_LM"))
rank, ids = asked["rank"], list(range(asked["length"]))
adapter = {
    name: LowRank(torch.randn(rank, n, device=device), torch.zeros(m, rank, device=device))
    for name, (m, n) in base.targets.shapes.items()
}
base.load_clients([], [ClientAdapter(adapter)])
rows = [{"input_ids": ids, "labels": ids}] * asked["batch"]
train(model, rows, LocalTraining(per_device_train_batch_size=len(rows), max_steps=3))
if device.type == "cuda":
    print(torch.cuda.max_memory_reserved())
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def measured_peak(sizes: dict[str, Any], **asked: Any) -> int:
    """Bytes at most in use: of the process, or of the GPU without its context.

    Args:
        sizes: of a Llama.
        asked: length and batch of the rows, rank, device.
    """
    told = json.dumps({"sizes": sizes, **asked})
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN, told], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return int(done.stdout.split()[-1])


def planned(sizes: dict[str, Any], *, length: int, batch: int, rank: int, device: str) -> Any:
    """What is planned for the same, from shapes alone."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fedlora.client.planned_memory import client_memory
    from fedlora.model.base import attach
    from fedlora.model.targets import find_targets

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    base = attach(model, None, find_targets(model, "all-linear", "it", None, [], "CAUSAL_LM"))
    ids = list(range(length))
    rows = [{"input_ids": ids, "labels": ids}] * batch
    return client_memory(base, rows, rank, on_gpu=device == "cuda")
