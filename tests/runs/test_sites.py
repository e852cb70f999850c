"""Sites in memory conform: the bytes of a run in one process, and evaluation where rows are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora.methods import METHODS
from fedlora.runs.events import Event
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.results import Result
from support.conformance import (
    Callbacks,
    Keys,
    Killing,
    check_goes_on,
    check_same_bytes,
    classifier,
    for_rule,
    in_memory,
    lines_of,
    three_clients,
    with_settings_of_clients,
)
from support.courses import tensor_files
from support.sites import InMemoryTransport, SiteInMemory, federate, federate_on, sites_of

pytestmark = pytest.mark.usefixtures("kept_bases")


class Sites:
    """Carries a run to sites in memory, which are remembered."""

    def __init__(self) -> None:
        self.sites: dict[str, SiteInMemory] = {}

    def __call__(
        self, keys: Keys, out: Path, events: list[Event] | None = None, callbacks: Callbacks = ()
    ) -> Result:
        self.sites = sites_of(keys, out.with_name(f"{out.name}-sites"))
        return federate(keys, out, InMemoryTransport(self.sites), events, callbacks)

    def resume(self, out: Path) -> Result:
        return federate_on(out, InMemoryTransport(self.sites))


@pytest.fixture
def keys(small_run: Keys) -> Keys:
    return three_clients(small_run)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fedsa"])
def test_every_rule_gives_the_same_bytes(keys: Keys, tmp_path: Path, method: str) -> None:
    check_same_bytes(Sites(), for_rule(keys, method), tmp_path)


@pytest.mark.parametrize("method", ["exact", "flora", "fedit", "ffa"])
def test_compressed_messages_give_the_same_bytes(keys: Keys, tmp_path: Path, method: str) -> None:
    """What a site has lost stays there; the server's files are those of a run in one process."""
    keys = {**for_rule(keys, method), "compression": "int8", "num_rounds": 3}
    quiet = in_memory(keys, tmp_path / "memory")
    result = Sites()(keys, tmp_path / "sites")
    kept = "round-3/state/clients.safetensors"
    one, other = (tensor_files(x.output_dir) for x in (quiet, result))
    assert kept not in other
    assert {name: x for name, x in one.items() if not name.endswith("clients.safetensors")} == other
    assert lines_of(quiet) == lines_of(result)
    last = lines_of(result)[-1]
    assert 0 < last["compression_error_up"] < 0.1
    assert 0 <= last["compression_error_down"] < 0.1
    plain = lines_of(in_memory({**keys, "compression": "none"}, tmp_path / "plain"))[-1]
    assert last["bytes_up"] < 0.4 * plain["bytes_up"]
    assert last["bytes_down"] < 0.6 * plain["bytes_down"]


def test_a_server_of_compressed_messages_goes_on(keys: Keys, tmp_path: Path) -> None:
    """With what sites have lost, and what it has not handed out yet."""
    carrier, keys = Sites(), {**keys, "compression": "int8", "num_rounds": 3}
    quiet = in_memory(keys, tmp_path / "memory")
    with pytest.raises(KeyboardInterrupt):
        carrier(keys, tmp_path / "sites", Killing(13))
    result = carrier.resume(tmp_path / "sites")
    state = "round-3/state/server.safetensors"
    one, other = (tensor_files(x.output_dir) for x in (quiet, result))
    assert one[state] == other[state]


def test_what_a_client_keeps_stays_at_its_site(keys: Keys, tmp_path: Path) -> None:
    """Of every client's own model the server has the shared part, and the site the rest."""
    keys, carrier, events = for_rule(keys, "fedsa"), Sites(), list[Event]()
    quiet = in_memory(keys, tmp_path / "memory")
    result = carrier(keys, tmp_path / "sites", events)
    state = "round-3/state/server.safetensors"
    one, other = (tensor_files(x.output_dir) for x in (quiet, result))
    assert one[state] == other[state]
    assert "round-3/state/clients.safetensors" not in other
    assert "final/adapter_model.safetensors" in other
    assert any("keeps a model of its own" in e.get("message", "") for e in events)


def test_a_classifier_whose_sites_know_some_labels_alone(keys: Keys, tmp_path: Path) -> None:
    check_same_bytes(Sites(), classifier(keys, tmp_path / "labelled"), tmp_path)


def test_settings_of_single_clients_and_models_of_their_own(keys: Keys, tmp_path: Path) -> None:
    keys = {**with_settings_of_clients(keys), "num_rounds": 2, "save_client_models": True}
    check_same_bytes(Sites(), keys, tmp_path)


def test_sampling_a_schedule_over_all_rounds_and_a_quorum(keys: Keys, tmp_path: Path) -> None:
    keys |= {"clients_per_round": 2, "min_clients_per_round": 2, "num_rounds": 3}
    check_same_bytes(Sites(), {**keys, "lr_scheduler_scope": "federation"}, tmp_path)


def test_a_server_with_rows_evaluates_as_a_run_in_one_process(
    keys: Keys, small_run: Keys, tmp_path: Path
) -> None:
    keys |= {"eval_file": small_run["eval_file"], "num_rounds": 2, "eval_personal": True}
    check_same_bytes(Sites(), {**keys, "max_eval_samples": 6}, tmp_path)


@pytest.mark.parametrize(("method", "stops"), [("exact", (2, 13)), ("ffa", (21,))])
def test_a_server_that_is_killed_goes_on(
    keys: Keys, tmp_path: Path, method: str, stops: Sequence[int]
) -> None:
    carrier = Sites()
    keys = {**for_rule(keys, method), "num_rounds": 3}
    check_goes_on(carrier, carrier.resume, keys, tmp_path, stops)


def test_a_server_that_is_killed_finds_what_sites_keep(keys: Keys, tmp_path: Path) -> None:
    """In the middle of a round, when one site has trained already."""
    keys = {**for_rule(keys, "fedsa"), "num_rounds": 3}
    quiet = tensor_files(in_memory(keys, tmp_path / "memory").output_dir)
    carrier, ends = Sites(), list[Event]()

    def stop(event: Event) -> None:
        ends.append(event)
        if sum(e["event"] == "client_end" for e in ends) == 5:
            raise KeyboardInterrupt

    class Stopping(list[Event]):
        def append(self, event: Event) -> None:
            stop(event)

    with pytest.raises(KeyboardInterrupt):
        carrier(keys, tmp_path / "sites", Stopping())
    result = carrier.resume(tmp_path / "sites")
    name = "round-3/state/server.safetensors"
    assert tensor_files(result.output_dir)[name] == quiet[name]


# --- federated evaluation ---


def evaluations(result: Result, key: str = "evaluation") -> list[Any]:
    return [x[key] for x in result.metrics if x["event"] in ("start", "round")]


def test_sites_evaluate_and_the_server_has_neither_rows_nor_weights(
    keys: Keys, tmp_path: Path
) -> None:
    """The sum of the sites is what one process measures on all their held-out rows."""
    keys |= {"client_eval_fraction": 0.25, "num_rounds": 2, "early_stopping_patience": 2}
    quiet, carrier = in_memory(keys, tmp_path / "memory"), Sites()
    result = carrier({**keys, "server_evaluation": False}, tmp_path / "sites")
    assert tensor_files(quiet.output_dir) == tensor_files(result.output_dir)
    for one, other in zip(evaluations(quiet), evaluations(result), strict=True):
        assert {name: pytest.approx(x, rel=1e-5) for name, x in one.items()} == other
    by_client = "client_evaluations"
    assert evaluations(quiet, by_client) == evaluations(result, by_client)
    first = result.metrics[0]["clients"]
    assert [client["eval_rows"] for client in first] == [6, 4, 3]
    assert [client["name"] for client in first] == sorted(carrier.sites)


def test_sites_evaluate_a_classifier(keys: Keys, tmp_path: Path) -> None:
    keys = {**classifier(keys, tmp_path / "labelled"), "num_rounds": 1}
    keys |= {"client_eval_fraction": 0.5}
    quiet, result = in_memory(keys, tmp_path / "memory"), Sites()(keys, tmp_path / "sites")
    for one, other in zip(evaluations(quiet), evaluations(result), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["accuracy"] == pytest.approx(one["accuracy"])
    assert "per_class" in evaluations(result, "client_evaluations")[0]["0"]


def test_models_of_single_sites_are_evaluated_there(keys: Keys, tmp_path: Path) -> None:
    keys = {**for_rule(keys, "fedsa"), "client_eval_fraction": 0.25, "num_rounds": 2}
    quiet, result = in_memory(keys, tmp_path / "memory"), Sites()(keys, tmp_path / "sites")
    name = "client_evaluations"
    assert evaluations(quiet, name) == evaluations(result, name)


def test_the_run_can_be_reported_watched_and_evaluated(
    keys: Keys, small_run: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedlora.commands.cli import main

    keys |= {"client_eval_fraction": 0.25, "num_rounds": 2, "eval_file": small_run["eval_file"]}
    result = Sites()(keys, tmp_path / "sites")
    assert main(["watch", str(result.output_dir), "--json"]) == 0
    assert '"status": "ended' in capsys.readouterr().out
    assert main(["report", str(result.output_dir), "--output", str(tmp_path / "page.html")]) == 0
    assert fedlora.load_adapter(result.final_dir).deltas
    assert main(["eval", str(result.output_dir), "--models", "global"]) == 0
    measured = next(line for line in read_metrics(result.output_dir) if line["event"] == "eval")
    assert measured["scores"]["loss"] == pytest.approx(evaluations(result)[-1]["loss"], rel=1e-5)


def test_a_run_whose_rows_are_at_its_sites_cannot_be_evaluated_elsewhere(
    keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedlora.commands.cli import main

    result = Sites()({**keys, "num_rounds": 1}, tmp_path / "sites")
    assert main(["eval", str(result.output_dir)]) == 2
    assert "the rows of this run lie at its sites" in capsys.readouterr().err
    assert main(["run", str(result.output_dir / "config.yaml"), "--dry_run"]) == 2
    assert "--dry_run looks at rows, which lie at the sites" in capsys.readouterr().err
