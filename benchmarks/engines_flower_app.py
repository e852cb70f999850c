"""The ServerApp and ClientApps that `benchmarks/engines_flower.py` measures, as Flower loads them.

`echo` measures messages: rounds of one exchange, to all nodes, of some sizes. `heavy` is the
client that FlowerTune's template makes: each actor imports torch, transformers and PEFT, and holds
a base of its own.
"""

from __future__ import annotations

import json
import time
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

MARK = "measured "

# Flower looks for these assignments before it loads the module: one a line.
echo = ServerApp()
heavy = ClientApp()
rounds = ServerApp()


@echo.main()
def measure_messages(grid: Grid, context: Context) -> None:
    """Seconds of a round of one exchange with all nodes, by the megabytes sent each way."""
    from fedlora.engines.flower.grid_transport import GridTransport

    transport = GridTransport(grid, int(str(context.run_config["nodes"])), 120.0)
    for megabytes, times in json.loads(str(context.run_config["sizes"])):
        data = bytes(int(1e6 * megabytes) + 1)
        for _ in range(times):
            began = time.perf_counter()
            answers = dict(transport.send(dict.fromkeys(transport.names(), data), None))
            seconds = time.perf_counter() - began
            assert all(answer == data for answer in answers.values()), answers
            told = {"megabytes": megabytes, "seconds": round(seconds, 2)}
            print(MARK + json.dumps(told), flush=True)


@rounds.main()
def ask_all(grid: Grid, context: Context) -> None:
    """Have every node train twice, so that each actor holds what it needs."""
    from fedlora.engines.flower.nodes import wait_for_nodes

    ids = wait_for_nodes(grid, int(str(context.run_config["nodes"])), 300.0)
    for number in (1, 2):
        messages = [
            Message(RecordDict(), id, MessageType.TRAIN, group_id=str(number)) for id in ids
        ]
        errors = [reply.error for reply in grid.send_and_receive(messages) if reply.has_error()]
        assert not errors, errors[0]
        print(MARK + json.dumps({"round": number}), flush=True)
    time.sleep(5)  # while memory is read


_model: list[Any] = []


@heavy.train()
def hold_a_base(message: Message, context: Context) -> Message:
    """Load the base once in this actor, as a client of FlowerTune does in every call."""
    if not _model:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        base = AutoModelForCausalLM.from_pretrained(str(context.run_config["model"]))
        _model.append(get_peft_model(base, LoraConfig(r=8, task_type="CAUSAL_LM")))
    return Message(RecordDict(), reply_to=message)
