"""Decides by a few timed training steps what a configuration leaves open of how clients train.

dtype, threads, worker processes and clients in a pass are measured together on steps of the run's
own clients (`planning.trial_training`), where the run is long enough for that to pay; otherwise
the rules of `runs.automatic` decide. What is configured stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedlora import threads
from fedlora.client.cohort import ENOUGH_TOKENS
from fedlora.config.clients import client_ranks
from fedlora.config.config import Config
from fedlora.data.datasets import FederatedData
from fedlora.methods import METHODS
from fedlora.model.dtype import SMALLEST, bfloat16_is_worth_a_trial, hidden_size
from fedlora.model.loading import load_model
from fedlora.model.sources import Source
from fedlora.runs.planning import kept_choices
from fedlora.runs.planning.client_needs import usual_rows
from fedlora.runs.planning.fastest_way import (
    Candidates,
    Race,
    Way,
    fastest,
    in_words,
    sizes_of_passes,
)
from fedlora.runs.planning.simulated_traffic import adds_to_base
from fedlora.runs.planning.trial_training import TrialClient, TrialTraining
from fedlora.runs.planning.work import clients_of_round, planned_seconds
from fedlora.runs.precisions import bits_held

SHARE = 0.03
"""Of a run's estimated time, that measuring may take."""
MOST_SECONDS = 5.0
"""That measuring may take of any run."""
WORTH_SECONDS = 2.5
"""In less, a model cannot be made and tried."""
LEAST_SECONDS = 1.0
"""For the steps, however long the model took to be made."""
_MOST_CLIENTS = 64
"""Clients whose rows and ranks stand for all."""


def choose_by_time(
    config: Config,
    source: Source,
    tokenizer: Any,
    data: FederatedData,
    free_threads: int,
) -> tuple[Way | None, list[str]]:
    """Measure what is open.

    Args:
        config: of the run.
        source: of the model, none of whose weights are read.
        tokenizer: of the data.
        data: of all clients.
        free_threads: how many there may be.

    Returns:
        The way to train, and what was measured, in words. None: nothing is open, the run is short,
        it runs on a GPU, by a training function of the user's or on a base that any client holds
        quantised, or the model cannot be tried.
    """
    lengths = [[len(row["input_ids"]) for row in part.train] for part in data.clients]
    seconds = min(MOST_SECONDS, SHARE * planned_seconds(config, source.config, lengths))
    if seconds < WORTH_SECONDS or (torch.cuda.is_available() and not config.use_cpu):
        return None, []
    # These take other steps than those that would be timed; and where clients hold the base in
    # several precisions, each worker process merges its own copy of all target weights.
    if config.train_function is not None or config.torch_compile or bits_held(config):
        return None, []
    number = clients_of_round(config, sum(bool(own) for own in lengths))
    clients = trial_clients(config, data)
    open_ways = candidates(
        config, source, clients, number, free_threads, forks=processes_can_be_forked()
    )
    if open_ways.number < 2:
        return None, []
    name = kept_choices.question(_asked(config, source, clients, open_ways))
    if kept := kept_choices.read(name):
        return kept[0], [f"as measured before: {kept[1]}"]
    began = time.perf_counter()
    try:
        trial = _trial(config, source, tokenizer, data, clients, number)
        trial.prepare(open_ways.dtypes[0])
        left = max(LEAST_SECONDS, seconds - (time.perf_counter() - began))
        times = Race(open_ways, trial.seconds, left).run()
    except Exception as error:  # what an architecture does not take must not end the run
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return None, [f"ways to train were not compared: {reason}"]
    if len(times) < 2:
        return None, ["ways to train were not compared: the machine is too busy for it"]
    way = fastest(times)
    words = in_words(way, times)
    kept_choices.write(name, way, words)
    return way, [f"measured in {time.perf_counter() - began:.1f} s: {words}"]


def with_way(config: Config, way: Way | None) -> Config:
    """The configuration with dtype and engine as they were measured to be the fastest."""
    if way is None:
        return config
    update: dict[str, Any] = {"dtype": way.dtype}
    if way.workers > 1 and config.engine == "local":
        update |= {"engine": "workers", "num_workers": way.workers}
    return config.model_copy(update=update)


def with_engine_of_here(
    saved: Config, written: Mapping[str, Any], asked: Config | None
) -> tuple[Config, list[str]]:
    """The configuration to go on with where the run itself had chosen worker processes.

    No bit depends on how many there are. Where they cannot be forked, this process trains with one
    thread, as each of them did, which gives the same bytes.

    Args:
        saved: as the run began, with what may be changed.
        written: what the user had written of the keys that the run settled.
        asked: the configuration given now, whose engine stays if it names one; or None.

    Returns:
        The configuration, and what was changed, in words.
    """
    named = asked is not None and "engine" in asked.model_fields_set
    chosen = saved.engine == "workers" and written.get("engine", "workers") != "workers"
    if not chosen or named:
        return saved, []
    if not processes_can_be_forked():
        keys = {"engine": "local", "num_workers": "auto", "num_threads": 1}
        return saved.model_copy(update=keys), ["worker processes: none, they cannot be forked here"]
    cores = max(1, int(threads.cores()))
    if saved.num_workers == "auto" or saved.num_workers <= cores:
        return saved, []
    words = f"worker processes: {cores} instead of {saved.num_workers}, one for each core"
    return saved.model_copy(update={"num_workers": cores}), [words]


def candidates(
    config: Config,
    source: Source,
    clients: Sequence[TrialClient],
    number: int,
    free_threads: int,
    *,
    forks: bool,
) -> Candidates:
    """The ways to train that are open; see `choose_by_time`.

    Args:
        clients: as they are timed.
        number: of clients in a round.
        free_threads: how many there may be.
        forks: whether worker processes may be chosen where no engine is named.
    """
    places = _places(config, number, free_threads, forks=forks)
    if config.cohort_size == "auto":
        tokens = sum(client.tokens for client in clients) / len(clients)
        most = max(1, int(ENOUGH_TOKENS["cpu"] // max(tokens, 1)))
        sizes = {x for _, n in places for x in sizes_of_passes(math.ceil(number / max(1, n)), most)}
    else:
        sizes = {min(config.cohort_size, number)}
    return Candidates(_dtypes(config, source), places, tuple(sorted(sizes)), number)


def processes_can_be_forked() -> bool:
    """Whether worker processes may be made without being asked for.

    A notebook's kernel and a program that runs a federation in a thread have threads of their own,
    whose locks a forked process would find held for ever.
    """
    in_main = threading.current_thread() is threading.main_thread()
    return sys.platform == "linux" and in_main and "ipykernel" not in sys.modules


def _places(
    config: Config, clients: int, free_threads: int, *, forks: bool
) -> tuple[tuple[int, int], ...]:
    """`(threads of a process, worker processes)`; 0 workers: the run's own process trains."""
    cores = max(1, int(threads.cores()))
    if config.engine == "workers":
        return ((1, min(cores, clients) if config.num_workers == "auto" else config.num_workers),)
    if config.num_threads is not None:
        return ((config.num_threads, 0),)
    few = {1, free_threads // 2, free_threads} - {0}
    places = [(number, 0) for number in sorted(few, reverse=True)]
    workers = min(cores, clients)
    unnamed = "engine" not in config.model_fields_set and config.num_workers == "auto"
    if forks and unnamed and workers > 1:
        places.append((1, workers))
    return tuple(places)


def _dtypes(config: Config, source: Source) -> tuple[str, ...]:
    if config.dtype != "auto":
        return (config.dtype,)
    if hidden_size(source.config) < SMALLEST or not bfloat16_is_worth_a_trial():
        return ("float32",)
    return ("float32", "bfloat16")


def trial_clients(config: Config, data: FederatedData) -> list[TrialClient]:
    """Clients that have rows, some of them where there are many, with rows of usual length."""
    ranks = [config.lora_r] * len(data.clients)
    if config.client_ranks != "auto":
        ranks = client_ranks(config, len(data.clients))
    able = [client for client, part in enumerate(data.clients) if part.train]
    return [
        TrialClient(
            ranks[client],
            usual_rows(
                data.clients[client].train, config.of_client(client).per_device_train_batch_size
            ),
        )
        for client in able[:: math.ceil(len(able) / _MOST_CLIENTS)]
    ]


def _trial(
    config: Config,
    source: Source,
    tokenizer: Any,
    data: FederatedData,
    clients: Sequence[TrialClient],
    number: int,
) -> TrialTraining:
    """What trains a step in the ways that are asked for."""
    shapes_in_float32 = config.model_copy(update={"dtype": "float32"})
    base, _ = load_model(source, tokenizer, shapes_in_float32, data.label_names, weights=False)
    merges = adds_to_base(METHODS[config.method], config.rule_options())
    mean_rank = sum(client.rank for client in clients) / len(clients)
    return TrialTraining(
        base,
        clients,
        round(mean_rank * number) if merges else 0,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _asked(
    config: Config, source: Source, clients: Sequence[TrialClient], open_ways: Candidates
) -> dict[str, Any]:
    """All that the fastest way depends on beside the machine, but for seeds and single rows.

    Tokens and ranks count by powers of two, so that runs on much the same rows ask the same.
    """
    own = source.config.to_dict()
    shape = {k: own[k] for k in sorted(own) if not k.startswith("_") and k not in _NO_SHAPE}
    number = len(clients)
    return {
        "shape": hashlib.sha256(json.dumps(shape, default=str).encode()).hexdigest(),
        "modules": config.lora_target_modules,
        "method": config.method,
        "checkpointing": config.gradient_checkpointing,
        "tokens": round(math.log2(1 + sum(client.tokens for client in clients) / number)),
        "rank": round(math.log2(sum(client.rank for client in clients) / number)),
        "ways": [list(open_ways.dtypes), open_ways.places, open_ways.clients],
        "sizes": "auto" if config.cohort_size == "auto" else config.cohort_size,
    }


_NO_SHAPE = (
    "architectures",
    "dtype",
    "transformers_version",
    "id2label",
    "label2id",
)
"""Keys of a model's configuration on which no time depends."""
