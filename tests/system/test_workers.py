"""Worker processes: the bytes of a run in one process, whoever trains whom and whoever dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlora
from fedlora.client.trainer import train
from fedlora.config.config import Config
from fedlora.engines.local import make_worker
from fedlora.engines.workers import MOST_ATTEMPTS, WorkerError, WorkersEngine
from fedlora.errors import FedloraError
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.server import Server
from fedlora.model.lora_layer import AdapterLayer
from fedlora.runs.engine import ClientResult, Failure
from fedlora.runs.events import Event
from fedlora.runs.session import assemble, starting_state
from fedlora.threads import cores
from support.conformance import (
    Callbacks,
    Keys,
    assert_same,
    check_goes_on,
    check_same_bytes,
    classifier,
    for_rule,
    in_memory,
    rules,
    three_clients,
)
from support.courses import take_course, tensor_files

POOL = {"engine": "workers", "num_workers": 2}


def take(keys: Keys, out: Path, **more: Any) -> fedlora.Result:
    functions = {k: more.pop(k) for k in ("report", "train_function", "callbacks") if k in more}
    return fedlora.run(Config(**{**keys, **more, "output_dir": str(out)}), **functions)


def workers() -> list[Any]:
    """The worker processes of this process, by name."""
    return sorted(multiprocessing.active_children(), key=lambda process: process.name)


def pool(
    keys: Keys, out: Path, events: list[Event] | None = None, callbacks: Callbacks = ()
) -> fedlora.Result:
    """Carries a run to two worker processes."""
    return in_memory({**keys, **POOL}, out, events, callbacks)


@pytest.fixture
def keys(small_run: Keys) -> Keys:
    sites = small_run["train_file"].replace("site_*", "site_[0-2]")
    three = {"client_ranks": [8, 4, 2], "train_file": sites}
    return {**small_run, **three, "max_steps": 2, "cohort_size": 1}


@pytest.fixture(autouse=True)
def _nobody_is_left() -> Iterator[None]:
    yield
    assert not workers()


@pytest.mark.parametrize("method", rules())
def test_every_rule_gives_the_same_bytes(small_run: Keys, tmp_path: Path, method: str) -> None:
    """Also where a client keeps something, and where S is dense (`exact`, after some rounds)."""
    check_same_bytes(pool, for_rule(three_clients(small_run), method), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "fedit"])
def test_compressed_updates_give_the_same_bytes(
    small_run: Keys, tmp_path: Path, method: str
) -> None:
    """What a client has lost goes with it from worker to worker."""
    keys = {**for_rule(three_clients(small_run), method), "compression": "int8"}
    check_same_bytes(pool, keys, tmp_path)


def test_a_classifier_whose_clients_know_some_labels_alone(small_run: Keys, tmp_path: Path) -> None:
    check_same_bytes(pool, classifier(three_clients(small_run), tmp_path / "labelled"), tmp_path)


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on(small_run: Keys, tmp_path: Path) -> None:
    def resume(out: Path) -> fedlora.Result:
        return fedlora.run(resume=out)

    keys = {**three_clients(small_run), "num_rounds": 3}
    check_goes_on(pool, resume, keys, tmp_path, stops=(13,))


@pytest.mark.parametrize("size", [2, 3])
def test_clients_share_passes_as_in_one_process(keys: Keys, tmp_path: Path, size: int) -> None:
    """With models of single clients, sampling, and settings of their own."""
    keys |= {
        "cohort_size": size,
        "clients_per_round": 2,
        "num_rounds": 3,
        "client_overrides": {1: {"learning_rate": 1e-3, "lora_target_modules": ["q_proj"]}},
        "lora_target_modules": ["q_proj", "v_proj"],
        "save_client_models": True,
        "eval_personal": True,
    }
    one, other = take(keys, tmp_path / "local"), take(keys, tmp_path / "pool", **POOL)
    assert_same(one, other)
    assert any("client-" in name for name in tensor_files(one.output_dir))


@pytest.mark.slow
def test_more_workers_than_clients_and_automatic_ones(keys: Keys, tmp_path: Path) -> None:
    local = take(keys, tmp_path / "local")
    for number in (1, 6, "auto"):
        pool = take(keys, tmp_path / str(number), engine="workers", num_workers=number)
        assert_same(local, pool)
    settled = (tmp_path / "auto" / "config.yaml").read_text()
    assert f"num_workers: {min(3, int(cores()))}\n" in settled


@pytest.mark.slow
def test_either_engine_goes_on_with_the_others_run(keys: Keys, tmp_path: Path) -> None:
    keys |= {"client_ranks": [4, 4, 4], "num_rounds": 3, "method": "fedsa"}
    whole = take(keys, tmp_path / "whole")

    def stop(result: Any) -> None:
        if result.record.round == 1:
            raise KeyboardInterrupt

    for first, second in (({}, POOL), (POOL, {})):
        out = tmp_path / f"begun by {first.get('engine', 'local')}"
        with pytest.raises(KeyboardInterrupt):
            take(keys, out, callbacks=[stop], **first)
        config = Config(**{**keys, **second, "output_dir": str(out)})
        assert_same(whole, fedlora.run(config, resume=out))


def killing(when: Callable[[Event], bool], events: list[Event]) -> Callable[[Event], None]:
    """A listener that kills the worker which has begun last, when it hears of something."""

    def report(event: Event) -> None:
        events.append(event)
        if when(event):
            os.kill(workers()[0].pid, signal.SIGKILL)

    return report


def test_a_worker_that_is_killed_is_replaced(keys: Keys, tmp_path: Path) -> None:
    keys |= {"num_rounds": 3}
    local, events = take(keys, tmp_path / "local"), list[Event]()
    first_steps = killing(
        lambda e: (
            e["event"] == "step"
            and e["client"] == 0
            and e["step"] == 1
            and sum(x["event"] == "step" and x["client"] == 0 and x["step"] == 1 for x in events)
            == 2
        ),
        events,
    )
    pool = take(keys, tmp_path / "pool", report=first_steps, **POOL)
    assert_same(local, pool)
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert len(warnings) <= 2  # it may have been idle when it was killed
    assert all("was killed by signal 9" in message for message in warnings)
    begins = [e["client"] for e in events if e["event"] == "client_begin"]
    assert sorted(begins) == sorted([0, 1, 2] * 3)  # nobody begins twice in a round


def dies(client: int) -> Callable[..., Any]:
    """A local training under which this client's process ends, always."""

    def own(model: Any, dataset: Any, training: Any) -> Any:
        if training.client == client:
            os._exit(7)
        return train(model, dataset, training)

    return own


@pytest.mark.slow
def test_who_ends_every_worker_is_left_out(keys: Keys, tmp_path: Path) -> None:
    events: list[Event] = []
    keys |= {"num_rounds": 1}
    pool = take(keys, tmp_path, report=events.append, train_function=dies(2), **POOL)
    (line,) = rounds_with_metrics(pool)
    assert [client["client"] for client in line["clients"] if not client["weight"]] == [2]
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert len(warnings) == MOST_ATTEMPTS
    assert warnings[-1] == (
        "client 2 is left out of round 1: its worker process has ended with exit code 7, "
        f"{MOST_ATTEMPTS} times"
    )


def rounds_with_metrics(result: fedlora.Result) -> list[dict[str, Any]]:
    return [line for line in result.metrics if line["event"] == "round"]


def test_an_error_of_the_training_ends_the_run(keys: Keys, tmp_path: Path) -> None:
    def broken(model: Any, dataset: Any, training: Any) -> Any:
        raise ZeroDivisionError("no steps")

    def mistaken(model: Any, dataset: Any, training: Any) -> Any:
        raise FedloraError("say what to do")

    with pytest.raises(WorkerError, match="ZeroDivisionError: no steps") as caught:
        take(keys, tmp_path / "one", train_function=broken, **POOL)
    assert "in broken" in caught.value.__notes__[0]  # where in the user's code
    with pytest.raises(FedloraError, match=r"^say what to do$"):
        take(keys, tmp_path / "two", train_function=mistaken, **POOL)


def sleeps(model: Any, dataset: Any, training: Any) -> Any:
    """A local training of which client 1 does not see the end in round 1."""
    if (training.client, training.round) == (1, 1):
        time.sleep(600)
    return train(model, dataset, training)


@pytest.mark.slow
def test_who_is_not_done_by_the_deadline_has_failed(keys: Keys) -> None:
    """It makes no step, so its process is replaced; and the next round trains it again."""
    session = assemble(Config(**{**keys, **POOL}))
    server = Server(session.federation, starting_state(session), Mean())
    with closing(WorkersEngine(session, sleeps, lambda event: None)) as engine:
        list(engine.exchange([], None))
        outcomes = list(engine.exchange([*server.plan().values()], time.monotonic() + 8))
        assert sorted(outcome.client for outcome in outcomes) == [0, 1, 2]
        (failure,) = (outcome for outcome in outcomes if isinstance(outcome, Failure))
        assert failure == Failure(1, "it was not done by the round's deadline", late=True)
        for outcome in outcomes:
            if isinstance(outcome, ClientResult):
                assert server.accept(outcome.update) == ""
        server.reject(1, failure.reason)
        server.commit()
        assert all(
            isinstance(outcome, ClientResult)
            for outcome in engine.exchange([*server.plan().values()])
        )


@pytest.mark.slow
def test_a_round_that_is_asked_again_sends_everything_again(keys: Keys) -> None:
    """Other clients, or in another order: what they are sent has other names then."""
    keys |= {"method": "zero_pad", "engine": "workers", "num_workers": 1}
    session = assemble(Config(**keys))
    server = Server(session.federation, starting_state(session), Mean())
    with closing(WorkersEngine(session, train, lambda event: None)) as engine:
        list(engine.exchange([server.plan()[2]]))
        (result,) = engine.exchange([server.plan()[0]])
    assert isinstance(result, ClientResult)
    (expected,) = make_worker(session, train, {}).handle_together([server.plan()[0]])
    for name, value in expected.update.tensors.items():
        assert torch.equal(result.update.tensors[name], value)


@pytest.mark.slow
def test_a_round_waits_for_nobody_beyond_its_time(keys: Keys, tmp_path: Path) -> None:
    events: list[Event] = []
    keys |= {"num_rounds": 2, "round_timeout": 10.0, "min_clients_per_round": 2}
    pool = take(keys, tmp_path, report=events.append, train_function=sleeps, **POOL)
    first, second = rounds_with_metrics(pool)
    assert [client["outcome"] for client in first["clients"]] == ["counted", "late", "counted"]
    assert all(client["weight"] for client in second["clients"])
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert warnings == ["client 1 is left out of round 1: it was not done by the round's deadline"]


def steps_on(model: Any, dataset: Any, training: Any) -> Any:
    """A local training of which client 0 sees no end: step after step."""
    if training.client == 0:
        for step in range(1, 100_000):
            training.on_step(step, 100_000, 1.0, 1)
            time.sleep(0.01)
    return train(model, dataset, training)


@pytest.mark.slow
def test_a_full_round_stops_who_still_trains(keys: Keys, tmp_path: Path) -> None:
    """No worker is replaced, and whoever was stopped is asked again."""
    events, pids = list[Event](), set[int]()

    def report(event: Event) -> None:
        events.append(event)
        pids.update(process.pid for process in workers())

    keys |= {"num_rounds": 3, "clients_needed_per_round": 2, "method": "fedsa"}
    keys |= {"client_ranks": [4, 4, 4]}
    pool = take(keys, tmp_path, report=report, train_function=steps_on, **POOL)
    for line in rounds_with_metrics(pool):
        assert [c["outcome"] for c in line["clients"]] == ["unneeded", "counted", "counted"]
        assert [c["weight"] > 0 for c in line["clients"]] == [False, True, True]
    assert not [e for e in events if e["event"] == "warning"]
    assert len(pids) == 2


@pytest.mark.slow
def test_workers_that_load_the_base_themselves_give_the_same(keys: Keys, tmp_path: Path) -> None:
    """As those on GPUs do, which cannot be forked."""
    keys |= {"num_rounds": 1}
    local, out = take(keys, tmp_path / "local"), tmp_path / "spawned"
    spawned = take_course(
        {**keys, **POOL},
        out,
        lambda session, tell: WorkersEngine(session, train, tell, start_method="spawn"),
    )
    assert_same(local, spawned)


RUN_UNTIL_KILLED = """
import json, multiprocessing, sys, fedlora
def report(event):
    if event["event"] == "step":
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
fedlora.run(fedlora.Config(**json.loads(sys.argv[1])), report=report)
"""


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed(keys: Keys) -> None:
    keys |= {"max_steps": 10_000, **POOL}
    command = [sys.executable, "-c", RUN_UNTIL_KILLED, json.dumps(keys)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--num_workers", "2"], "num_workers belongs to engine: workers"),
        (["--engine", "workers", "--num_workers", "0"], "num_workers: 0 must be at least 1"),
        (
            ["--engine", "worker"],
            "engine: 'worker': expected local, workers, sites, nvflare or flower",
        ),
    ],
)
def test_mistakes(given: Sequence[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from fedlora.commands.cli import main

    assert main(["run", "--output_dir", "nowhere", *given]) == 2
    assert words in capsys.readouterr().err


def notes_merged(model: Any, dataset: Any, training: Any) -> dict[str, Any]:
    """Trains, and counts layers whose merged weight lies in shared memory, or in this process."""
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer) and m.merged is not None]
    shared = sum(layer.merged is layer.place for layer in layers)
    return {**train(model, dataset, training), "shared": shared, "own": len(layers) - shared}


@pytest.mark.slow
def test_what_is_merged_into_the_base_lies_in_memory_once(keys: Keys, tmp_path: Path) -> None:
    keys |= {"method": "flora", "num_rounds": 2}
    result = take(keys, tmp_path, train_function=notes_merged, **POOL)
    merged = [
        [(c["metrics"]["shared"], c["metrics"]["own"]) for c in line["clients"]]
        for line in result.metrics
        if line["event"] == "round"
    ]
    assert merged[0] == [(0, 0)] * 3
    assert all(shared > 0 and own == 0 for shared, own in merged[1])
