"""Decides what a configuration leaves open: threads, dtype, clients in a pass, exact answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch

from fedlora import threads
from fedlora.client.evaluate import references_fit
from fedlora.client.memory import automatic_size, largest_need, memory_available
from fedlora.config.config import Config
from fedlora.data.datasets import FederatedData
from fedlora.federation.participants import Federation
from fedlora.model.base import BaseModel
from fedlora.model.dtype import resolve_dtype
from fedlora.model.passes import runner_of
from fedlora.model.quantisation import bits_of
from fedlora.model.sources import Source
from fedlora.runs.checks import check_context, check_prompts
from fedlora.runs.planning.fastest_way import Way


@dataclass(frozen=True)
class Threads:
    """How many threads torch gets.

    Args:
        number: of threads.
        choices: what was chosen, in words.
        warnings: what to warn of, in words.
    """

    number: int
    choices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def of_way(self, way: Way | None) -> Threads:
        """As many as were measured to be the fastest.

        Beside worker processes the run's own process evaluates, on as many as there may be.
        """
        return self if way is None or way.workers else replace(self, number=way.threads)


def choose_threads(config: Config, *, look: bool) -> Threads:
    """As many threads as configured; where that is left open, no more than there are free cores.

    Args:
        config: of the run.
        look: whether to look how busy the machine is (`fedlora.threads`), which takes a moment.
    """
    number = config.num_threads or torch.get_num_threads()
    room = threads.look() if look and number > 1 and not _on_cuda(config) else None
    if room is None or (fit := room.threads(number)) == number:
        return Threads(number)
    if config.num_threads:
        return Threads(number, warnings=(threads.unchanged(number, fit, room),))
    return Threads(fit, choices=(threads.fewer(number, fit, room),))


def with_dtype(config: Config, source: Source) -> tuple[Config, list[str]]:
    """The configuration with the dtype of the base decided, and how the base is held and why."""
    bits = bits_of(config)
    quantised = [f"linear layers in {bits} bits"] if bits is not None else []
    if config.dtype != "auto":
        return config, quantised
    device = torch.device("cuda" if _on_cuda(config) else "cpu")
    dtype, why = resolve_dtype(source.config, device)
    name = str(dtype).removeprefix("torch.")
    return config.model_copy(update={"dtype": name}), [f"base in {name}: {why}", *quantised]


def _on_cuda(config: Config) -> bool:
    return torch.cuda.is_available() and not config.use_cpu


def frozen_dtype(base: BaseModel) -> str:
    """The dtype that the frozen weights have, by the name a configuration gives it."""
    frozen = (p for name, p in base.model.named_parameters() if name not in base.full_params)
    return str(cast(torch.dtype, next(frozen).dtype)).removeprefix("torch.")


def choose_exact_match(
    config: Config, base: BaseModel, data: FederatedData, task: str
) -> tuple[bool, int]:
    """Whether answers are generated and compared with their references.

    Where the configuration leaves it open, they are if every prompt fits into the model's context
    together with its answer, and no reference is longer than an answer may be.

    Returns:
        Whether they are, and the model's context in tokens.

    Raises:
        InputError: a row is too long for the model, or answers are asked for and nothing is asked.
    """
    longest, context = check_context(config, base, data)
    if task != "CAUSAL_LM":
        return False, context
    if config.eval_exact_match == "auto":
        fits = longest + config.generation_max_new_tokens <= context
        return fits and references_fit(data.eval, config.generation_max_new_tokens), context
    if config.eval_exact_match:
        check_prompts(data)
    return config.eval_exact_match, context


def choose_num_workers(config: Config, base: BaseModel, federation: Federation) -> int | None:
    """How many worker processes there are: as configured, or one for each core or GPU.

    Never more than there are clients in a round. None: all clients train in this process.
    """
    if config.engine == "local":
        return None
    if config.num_workers != "auto":
        return config.num_workers
    on_gpu = base.device.type == "cuda"
    places = torch.cuda.device_count() if on_gpu else max(1, int(threads.cores()))
    return max(1, min(places, len(federation.sample(1))))


def choose_cohort_size(
    config: Config,
    base: BaseModel,
    data: FederatedData,
    federation: Federation,
    num_workers: int | None = None,
    most: int | None = None,
) -> int:
    """How many clients train in one pass: as configured, or as many as memory holds.

    Several workers share the round's clients and, on a CPU, the memory.

    Args:
        config: of the run.
        base: with its weights.
        data: of all clients.
        federation: who takes part.
        num_workers: processes that train; None: this one does.
        most: in a pass, as it was measured to be the fastest; None: as many as make it faster.

    Raises:
        InputError: the model cannot be trained at all, which is said before any round.
    """
    passes = runner_of(base.model)
    if config.cohort_size != "auto":
        return config.cohort_size
    if not passes.joint or base.tied:
        return 1
    sizes = [config.of_client(k).per_device_train_batch_size for k in range(len(federation.ranks))]
    rows = [part.train for part in data.clients]
    need = largest_need(base, list(zip(rows, sizes, federation.ranks, strict=True)), config.seed)
    available_bytes = (
        int(config.cohort_memory * 2**30)
        if config.cohort_memory
        else memory_available(base.device) // 2
    )
    clients, number = len(federation.sample(1)), num_workers or 1
    if base.device.type == "cpu":
        available_bytes //= number
    size = automatic_size(need, math.ceil(clients / number), available_bytes, base.device)
    return min(size, most or size)
