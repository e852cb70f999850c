"""What the benchmark of NVIDIA FLARE builds in its processes, in the place of a run.

The server sends messages to the sites as a run does, and in FLARE's own way for comparison: an
adapter as one array or many, which a site's executor sends back.
"""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from nvflare.apis.controller_spec import Task
from nvflare.apis.executor import Executor
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable

from fedlora.engines.nvflare.transport import NvflareTransport

ARRAYS = "benchmark_arrays"


class Rounds(Controller):  # type: ignore[misc]
    """Sends what a benchmark asks for, and writes the seconds down.

    Args:
        cases: [megabytes, rounds, number of arrays; 0: as a run sends it] of every case.
        output: file to write to.
    """

    def __init__(self, cases: list[list[Any]], output: str) -> None:
        super().__init__(task_check_period=0.05)
        self.cases, self.output = cases, output

    def start_controller(self, fl_ctx: Any) -> None:
        """Nothing."""

    def stop_controller(self, fl_ctx: Any) -> None:
        """Nothing."""

    def process_result_of_unknown_task(self, *_: Any) -> None:
        """Nothing."""

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        """All cases; a first round of each is not counted."""
        began, engine = time.time(), fl_ctx.get_engine()
        names = [client.name for client in engine.get_clients()]
        transport = NvflareTransport(self, engine, names, names, lambda: abort_signal.triggered)
        out = []
        for megabytes, rounds, arrays in self.cases:
            payload = bytes(int(megabytes * 1e6))
            seconds = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                if arrays:
                    self._send_arrays(names, len(payload), arrays, fl_ctx)
                else:
                    left = set(names)  # no answer is kept, as a run keeps none
                    for name, answer in transport.send(dict.fromkeys(names, payload), None):
                        assert answer == payload, answer
                        left.remove(name)
                    assert not left, left
                seconds.append(time.perf_counter() - start)
            out.append(min(seconds[1:]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        told = {"began": began, "seconds": out, "peak_mib": peak, "pid": os.getpid()}
        Path(self.output).write_text(json.dumps(told))

    def _send_arrays(self, names: list[str], nbytes: int, arrays: int, fl_ctx: Any) -> None:
        answers: SimpleQueue[str] = SimpleQueue()

        def received(client_task: Any, fl_ctx: Any) -> None:
            assert len(client_task.result["arrays"]) == arrays
            answers.put(client_task.client.name)

        for name in names:
            data = Shareable()
            data["arrays"] = {
                str(i): np.zeros(nbytes // 4 // arrays, np.float32) for i in range(arrays)
            }
            task = Task(name=ARRAYS, data=data, result_received_cb=received)
            self.send(task=task, fl_ctx=fl_ctx, targets=[name])
        for _ in names:
            answers.get()


class Echo(Executor):  # type: ignore[misc]
    """Sends arrays back."""

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        """What was sent."""
        reply = Shareable()
        reply["arrays"] = shareable["arrays"]
        return reply
