"""The main job from Python, end to end on tiny models."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import fedlora
from fedlora import Config
from fedlora.adapters.saved_adapter import WEIGHTS_NAME, write_adapter
from fedlora.client.evaluate import evaluate
from fedlora.client.generation import generate
from fedlora.client.local_training import LocalTraining
from fedlora.client.trainer import train
from fedlora.client.worker import Worker
from fedlora.data.datasets import load_data
from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import client_start, global_delta
from fedlora.federation.messages import ClientUpdate
from fedlora.federation.server import Server, initial_state
from fedlora.lowrank import total_norm
from fedlora.model.lora_layer import AdapterLayer
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.results import Result, RoundResult
from fedlora.runs.session import Session, assemble
from support.kept_bases import original_load_base
from support.rows import rows, write_jsonl
from support.runs import evaluation_rows, given_adapter, loss_of, nothing, run

pytestmark = pytest.mark.usefixtures("kept_bases")


def final_bytes(result: Result) -> bytes:
    """The file of the final adapter's weights."""
    return (result.final_dir / WEIGHTS_NAME).read_bytes()


def rounds_of(result: Result) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` about rounds."""
    return [line for line in result.metrics if line["event"] == "round"]


def asked(result: Result) -> list[list[int]]:
    """Who was asked in every round."""
    return [[c["client"] for c in line["clients"]] for line in rounds_of(result)]


def saved_rounds(result: Result) -> list[str]:
    """The rounds on the disk."""
    return sorted(p.name for p in result.output_dir.glob("round-*"))


def worse_after(good: int) -> Any:
    """A local training that learns in the first rounds and destroys afterwards."""

    def local(model: Any, dataset: Sequence[Tokens], training: LocalTraining) -> Mapping[str, Any]:
        if training.round <= good:
            return train(model, dataset, training)
        rng = torch.Generator().manual_seed(100 * training.round + training.client)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=rng))
        return {}

    return local


@pytest.mark.parametrize("method", ["fedit", "exact", "flora", "zero_pad"])
def test_every_method_learns_and_its_saved_rounds_have_the_loss_that_was_logged(
    small_run: dict[str, Any], method: str
) -> None:
    ranks = [4, 4, 4, 4] if method == "fedit" else small_run["client_ranks"]
    result = run(small_run, method=method, client_ranks=ranks, num_rounds=3, max_steps=6)
    assert sorted(result.evaluations) == [0, 1, 2, 3]
    assert result.evaluations[3]["loss"] < result.evaluations[0]["loss"]
    data = evaluation_rows(small_run)
    base = small_run["model_name_or_path"]
    logged = {line["round"]: line for line in read_metrics(result.output_dir)}
    assert loss_of(base, None, data) == pytest.approx(result.evaluations[0]["loss"], rel=1e-5)
    assert saved_rounds(result) == ["round-1", "round-2", "round-3"]
    losses = set()
    for number in (1, 2, 3):
        found = loss_of(base, result.output_dir / f"round-{number}", data)
        assert found == pytest.approx(result.evaluations[number]["loss"], rel=1e-5)
        losses.add(round(found, 3))
    assert len(losses) == 3  # three different models
    assert logged[2]["evaluation"] == result.evaluations[2]
    assert loss_of(base, result.final_dir, data) == pytest.approx(
        result.evaluations[3]["loss"], rel=1e-5
    )
    tokenizer = AutoTokenizer.from_pretrained(result.final_dir)
    assert tokenizer("abc") == AutoTokenizer.from_pretrained(base)("abc")


def test_the_result_is_what_is_on_the_disk(small_run: dict[str, Any]) -> None:
    result = run(small_run, eval_exact_match="auto")
    assert "exact_match" in result.evaluations[2]
    assert result.final_dir == result.output_dir / "final"
    assert [line["event"] for line in result.metrics] == ["begin", "start", "round", "round", "end"]
    assert read_metrics(result.output_dir) == json.loads(json.dumps(result.metrics))
    stored = fedlora.load_adapter(result.final_dir).deltas
    assert stored.keys() == result.adapter.keys()
    # Norms of what is returned and of what is stored.
    assert total_norm(stored) == pytest.approx(total_norm(result.adapter), rel=1e-5)
    assert result.best_round == 2


def test_the_seed_decides_every_byte(small_run: dict[str, Any]) -> None:
    values = {**small_run, "lora_dropout": 0.1, "clients_per_round": 3}
    first = run(values, "first")
    torch.manual_seed(99)  # what others draw does not matter
    assert final_bytes(run(values, "again")) == final_bytes(first)
    assert final_bytes(run(values, "other", seed=43)) != final_bytes(first)


def test_a_base_that_has_served_a_run_serves_another(small_run: dict[str, Any]) -> None:
    """The tests of this file share their bases, and see what they would see with their own."""
    values = {**small_run, "lora_dropout": 0.1, "eval_exact_match": "auto"}
    bases = [assemble(Config(**values)).base for _ in range(2)]
    assert bases[0].model is bases[1].model
    shared = run(values, "shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora.runs.session.load_base", original_load_base)
        own = run(values, "own")
    assert own.evaluations == shared.evaluations
    assert final_bytes(own) == final_bytes(shared)


def trained_by_hand(session: Session, backwards: bool) -> bytes:
    """Rounds through server and worker alone, with passes in either order; the adapter's file."""
    config = session.config
    federation = session.federation
    server = Server(federation, initial_state(federation), Mean())
    clients = dict(enumerate(session.data.clients))
    worker = Worker(session.base, clients, config, federation.agreement)
    size = config.cohort_size
    assert size != "auto"
    for _ in range(config.num_rounds):
        updates: list[ClientUpdate] = []
        broadcasts = list(server.plan().values())
        cohorts = [broadcasts[at : at + size] for at in range(0, len(broadcasts), size)]
        for cohort in cohorts[::-1] if backwards else cohorts:
            one = [trained.update for trained in worker.handle_together(cohort)]
            updates += one[::-1] if backwards else one
        for update in updates:
            assert not server.accept(update)
        server.commit()
    where = Path(config.output_dir).with_name(f"by-hand-{backwards}")
    write_adapter(where, global_delta(server.state), session.base.targets)
    return (where / WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize("cohort_size", [1, 2, 3])
@pytest.mark.parametrize("method", ["exact", "flora", "zero_pad"])
def test_the_order_of_clients_changes_no_bit(
    small_run: dict[str, Any], method: str, cohort_size: int
) -> None:
    """Nor does the order of cohorts, as long as the same clients share a pass."""
    values = {**small_run, "method": method, "lora_dropout": 0.1, "cohort_size": cohort_size}
    values |= {"max_steps": 2}
    session = assemble(Config(**values))
    forwards = trained_by_hand(session, backwards=False)
    assert trained_by_hand(session, backwards=True) == forwards
    assert final_bytes(run(values)) == forwards


@pytest.mark.parametrize(("wanted", "number"), [(2, 2), (0.5, 2), (0.3, 1), (1.0, 4), (None, 4)])
def test_clients_per_round(small_run: dict[str, Any], wanted: float | None, number: int) -> None:
    result = run(
        small_run,
        clients_per_round=wanted,
        num_rounds=6,
        train_function=nothing,
        eval_rounds=0,
    )
    parts = asked(result)
    assert [len(part) for part in parts] == [number] * 6
    assert all(part == sorted(set(part)) for part in parts)
    assert {k for part in parts for k in part} == {0, 1, 2, 3}  # everyone's turn comes
    assert (len({tuple(part) for part in parts}) > 1) == (number < 4)
    for line in rounds_of(result):
        sizes = [c["num_examples"] for c in line["clients"]]
        weights = [c["weight"] for c in line["clients"]]
        assert weights == pytest.approx([size / sum(sizes) for size in sizes])


def test_more_clients_per_round_than_there_are_is_refused(small_run: dict[str, Any]) -> None:
    with pytest.raises(fedlora.InputError, match="clients_per_round: 5, but there are 4 clients"):
        run(small_run, clients_per_round=5)
    assert not Path(small_run["output_dir"]).exists()


def test_partial_participation_learns(small_run: dict[str, Any]) -> None:
    result = run(small_run, clients_per_round=2, num_rounds=4, max_steps=6)
    losses = [found["loss"] for _, found in sorted(result.evaluations.items())]
    assert losses[-1] < losses[0]
    assert all(line["aggregation_error"] < 1e-5 for line in rounds_of(result))


def test_ranks_are_drawn_from_choices_by_shares(small_run: dict[str, Any]) -> None:
    drawn = {**small_run, "client_ranks": None, "rank_choices": [2, 3, 8]}

    def ranks(**changes: Any) -> list[int]:
        found: list[int] = assemble(Config(**{**drawn, **changes})).config.client_ranks
        return found

    assert ranks(rank_shares=[0, 1, 0]) == [3, 3, 3, 3]
    assert set(ranks()) <= {2, 3, 8}
    assert ranks() == ranks()
    assert len({tuple(ranks(seed=seed)) for seed in range(4)}) > 1
    result = run(drawn, rank_shares=[0.5, 0, 0.5], num_rounds=1, train_function=nothing)
    clients = rounds_of(result)[0]["clients"]
    assert [c["rank"] for c in clients] == ranks(rank_shares=[0.5, 0, 0.5])
    assert {c["rank"] for c in clients} <= {2, 8}


@pytest.mark.parametrize(("given", "ranks"), [(None, [5] * 4), (3, [3] * 4)])
def test_one_rank_for_all(small_run: dict[str, Any], given: int | None, ranks: list[int]) -> None:
    session = assemble(Config(**{**small_run, "client_ranks": given, "lora_r": 5}))
    assert session.config.client_ranks == session.federation.ranks == ranks


def test_a_list_of_another_length_is_refused(small_run: dict[str, Any]) -> None:
    with pytest.raises(fedlora.InputError, match=r"client_ranks: 3, but train_file: .* 4 files"):
        run(small_run, client_ranks=[1, 2, 3])


def test_a_users_own_training_sees_the_adapter_alone(small_run: dict[str, Any]) -> None:
    seen: list[tuple[int, int, int, set[int]]] = []

    def local(model: Any, dataset: Sequence[Tokens], training: LocalTraining) -> dict[str, Any]:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert named
        assert all(n.rpartition(".")[2] in ("A", "B") for n in named)
        ranks = {p.shape[0] for n, p in named.items() if n.endswith(".A")}
        seen.append((training.round, training.client, len(dataset), ranks))
        with torch.no_grad():
            for n, p in named.items():
                if n.endswith(".B"):
                    p.add_(0.01 * (1 + training.client))
        return {"mine": training.client, "steps": training.steps(len(dataset))}

    result = run(small_run, train_function=local)
    rows_of, ranks_of = (24, 16, 12, 8), small_run["client_ranks"]
    assert seen == [(r, k, rows_of[k], {ranks_of[k]}) for r in (1, 2) for k in range(4)]
    for line in rounds_of(result):
        assert [c["metrics"] for c in line["clients"]] == [
            {"mine": k, "steps": 3} for k in range(4)
        ]
    assert result.evaluations[1]["loss"] != result.evaluations[0]["loss"]
    assert final_bytes(result) != final_bytes(run(small_run, "with ours"))


@pytest.mark.parametrize("method", ["exact", "flora"])
def test_every_client_starts_from_the_global_model(small_run: dict[str, Any], method: str) -> None:
    """Whatever its rank: what it trains and what lies frozen beside it are all of the update."""
    data = evaluation_rows(small_run)
    began: list[tuple[int, float]] = []

    def local(model: Any, dataset: Sequence[Tokens], training: LocalTraining) -> Mapping[str, Any]:
        loss = evaluate(model, None, data, batch_size=32)["loss"]
        began.append((training.round, loss))
        return train(model, dataset, training)

    result = run(small_run, method=method, num_rounds=3, max_steps=6, train_function=local)
    assert len(began) == 12
    for number, loss in began:
        assert loss == pytest.approx(result.evaluations[number - 1]["loss"], rel=1e-5)


def test_callbacks_are_told_every_round_and_its_state(small_run: dict[str, Any]) -> None:
    told: list[RoundResult] = []
    others: list[int] = []
    disk: list[list[str]] = []
    where = Path(small_run["output_dir"])
    result = run(
        small_run,
        num_rounds=3,
        callbacks=[
            told.append,
            lambda r: others.append(r.record.round),
            lambda r: disk.append(sorted(p.name for p in where.glob("round-*"))),
        ],
    )
    assert [r.record.round for r in told] == [r.state.round for r in told] == others == [1, 2, 3]
    assert [r.metrics for r in told] == rounds_of(result)
    assert all(r.metrics["evaluation"]["loss"] > 0 for r in told)
    # What is told is saved already, and the state told is the one that is saved.
    assert disk == [["round-1"], ["round-1", "round-2"], ["round-1", "round-2", "round-3"]]
    for r in told:
        stored = fedlora.load_adapter(where / f"round-{r.record.round}").deltas
        assert total_norm(stored) == pytest.approx(total_norm(global_delta(r.state)), rel=1e-5)
    assert len({total_norm(global_delta(r.state)) for r in told}) == 3


@pytest.mark.parametrize("cohort_size", [1, 3, "auto"])
def test_everything_is_reported(small_run: dict[str, Any], cohort_size: int | str) -> None:
    """Clients of a pass begin together, step by turns and end together."""
    events: list[Mapping[str, Any]] = []
    run(small_run, num_rounds=1, cohort_size=cohort_size, report=events.append)
    cohorts = {1: [[0], [1], [2], [3]], 3: [[0, 1, 2], [3]], "auto": [[0, 1, 2, 3]]}[cohort_size]
    assert [(e["event"], e.get("client")) for e in events] == [
        ("begin", None),
        ("evaluate_begin", None),
        ("start", None),
        ("round_begin", None),
        *(
            (kind, client)
            for cohort in cohorts
            for kind in ("client_begin", "step", "step", "step", "client_end")
            for client in cohort
        ),
        ("evaluate_begin", None),
        ("round", None),
        ("end", None),
    ]
    assert events[0]["ranks"] == [8, 4, 2, 2]
    assert events[0]["rows"] == [24, 16, 12, 8]
    steps = [e for e in events if e["event"] == "step" and e["client"] == 2]
    assert [(e["step"], e["steps"]) for e in steps] == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("method", ["exact", "zero_pad"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_client_that_ends_in_nan_is_left_out(
    small_run: dict[str, Any], method: str, value: float
) -> None:
    def local(model: Any, dataset: Sequence[Tokens], training: LocalTraining) -> Mapping[str, Any]:
        metrics = train(model, dataset, training)
        if (training.client, training.round) == (1, 1):
            with torch.no_grad():
                [p for p in model.parameters() if p.requires_grad][3][0, 0] = value
        return metrics

    events: list[Mapping[str, Any]] = []
    result = run(small_run, method=method, train_function=local, report=events.append, max_steps=8)
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert len(warnings) == 1
    assert "client 1 is left out of round 1" in warnings[0]
    first, second = rounds_of(result)
    assert [c["weight"] > 0 for c in first["clients"]] == [True, False, True, True]
    assert sum(c["weight"] for c in first["clients"]) == pytest.approx(1.0)
    assert "NaN or Inf" in first["clients"][1]["rejected"]
    assert [c["weight"] > 0 for c in second["clients"]] == [True] * 4
    losses = [found["loss"] for _, found in sorted(result.evaluations.items())]
    assert losses[2] < losses[1] < losses[0]


def test_a_round_in_which_no_client_counts_changes_nothing(small_run: dict[str, Any]) -> None:
    def local(model: Any, dataset: Sequence[Tokens], training: LocalTraining) -> Mapping[str, Any]:
        if training.round != 2:
            return train(model, dataset, training)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.fill_(math.nan)
        return {}

    events: list[Mapping[str, Any]] = []
    result = run(small_run, num_rounds=3, train_function=local, report=events.append)
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert len(warnings) == 5
    assert "no client counts in round 2" in warnings[-1]
    losses = [found["loss"] for _, found in sorted(result.evaluations.items())]
    assert losses[2] == losses[1] != losses[3]


def test_early_stopping(small_run: dict[str, Any]) -> None:
    """An evaluation that only equals the best is not a better one."""
    result = run(small_run, num_rounds=9, early_stopping_patience=2, train_function=nothing)
    assert [line["round"] for line in rounds_of(result)] == [1, 2]
    assert result.best_round == 0
    later = run(
        small_run, "later", num_rounds=9, early_stopping_patience=3, train_function=worse_after(2)
    )
    assert [line["round"] for line in rounds_of(later)] == [1, 2, 3, 4, 5]
    assert later.best_round == 2


def test_the_best_round_becomes_final(small_run: dict[str, Any]) -> None:
    values = {**small_run, "num_rounds": 6, "max_steps": 6, "save_total_limit": 1}
    result = run(values, load_best_model_at_end=True, train_function=worse_after(2))
    losses = {r: found["loss"] for r, found in result.evaluations.items()}
    assert min(losses, key=lambda r: losses[r]) == result.best_round == 2
    # Never fewer than two to go on from, and the best is kept beside them.
    assert saved_rounds(result) == ["round-2", "round-5", "round-6"]
    assert final_bytes(result) == (result.output_dir / "round-2" / WEIGHTS_NAME).read_bytes()
    data = evaluation_rows(small_run)
    final = loss_of(small_run["model_name_or_path"], result.final_dir, data)
    assert final == pytest.approx(losses[2], rel=1e-5)
    assert result.metrics[-1]["final"] == result.metrics[-1]["best"] == 2

    last = run(values, "last", train_function=worse_after(2))
    assert final_bytes(last) == (last.output_dir / "round-6" / WEIGHTS_NAME).read_bytes()
    assert last.best_round == 2


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, [4, 5]), (2, [4, 5]), (3, [3, 4, 5]), (None, [1, 2, 3, 4, 5])]
)
def test_rounds_kept(small_run: dict[str, Any], limit: int | None, kept: list[int]) -> None:
    result = run(small_run, num_rounds=5, save_total_limit=limit, train_function=nothing)
    assert saved_rounds(result) == [f"round-{number}" for number in kept]


def test_another_metric_decides(small_run: dict[str, Any]) -> None:
    values = {**small_run, "metric_for_best_model": "eval_loss"}
    assert run(values, "down", train_function=worse_after(1)).best_round == 1
    up = run(values, "up", train_function=worse_after(1), greater_is_better=True)
    assert up.best_round == 2
    accuracy = run(
        values, "accuracy", metric_for_best_model="token_accuracy", max_steps=20, num_rounds=1
    )
    found = [accuracy.evaluations[r]["token_accuracy"] for r in (0, 1)]
    assert accuracy.best_round == found.index(max(found))
    with pytest.raises(fedlora.InputError, match=r"'eval_bleu' is not measured; .*eval_loss"):
        run(values, "unknown", metric_for_best_model="eval_bleu")


def test_evaluation_every_so_many_rounds(small_run: dict[str, Any]) -> None:
    values = {**small_run, "num_rounds": 5}
    found = run(values, "two", eval_rounds=2, train_function=nothing)
    assert sorted(found.evaluations) == [0, 2, 4, 5]
    ends = run(values, "none", eval_rounds=0, train_function=nothing)
    assert sorted(ends.evaluations) == [0, 5]


def test_best_needs_an_evaluation(small_run: dict[str, Any]) -> None:
    for key, value in (("load_best_model_at_end", True), ("early_stopping_patience", 1)):
        with pytest.raises(fedlora.InputError, match=f"{key} needs something to evaluate on"):
            run(small_run, eval_file=None, **{key: value})
    bare = run(small_run, eval_file=None)
    assert (bare.evaluations, bare.best_round) == ({}, None)


@pytest.mark.parametrize("method", ["exact", "flora", "zero_pad"])
@pytest.mark.parametrize("rank", [3, 12])
def test_round_0_is_the_given_adapter(
    small_run: dict[str, Any], tmp_path: Path, method: str, rank: int
) -> None:
    """Also where it has a larger rank than any client, and other modules than we train."""
    base = small_run["model_name_or_path"]
    given = given_adapter(
        base, tmp_path / "given", r=rank, lora_alpha=7, target_modules=["q_proj", "up_proj"]
    )
    wanted = loss_of(base, given, evaluation_rows(small_run))
    assert abs(wanted - loss_of(base, None, evaluation_rows(small_run))) > 1e-2
    result = run(small_run, method=method, init_adapter=str(given), num_rounds=1, max_steps=8)
    assert result.evaluations[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert result.evaluations[1]["loss"] < wanted
    final = loss_of(base, result.final_dir, evaluation_rows(small_run))
    assert final == pytest.approx(result.evaluations[1]["loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["exact", "flora", "zero_pad"])
def test_the_given_adapter_is_final_where_it_is_the_best(
    small_run: dict[str, Any], tmp_path: Path, method: str
) -> None:
    base = small_run["model_name_or_path"]
    given = given_adapter(base, tmp_path / "given", r=3, lora_alpha=7)
    result = run(
        small_run,
        method=method,
        init_adapter=str(given),
        load_best_model_at_end=True,
        train_function=worse_after(0),
    )
    assert result.best_round == 0
    final = loss_of(base, result.final_dir, evaluation_rows(small_run))
    assert final == pytest.approx(result.evaluations[0]["loss"], rel=1e-5)


def test_an_adapter_of_other_modules_is_refused(small_run: dict[str, Any], tmp_path: Path) -> None:
    given = given_adapter(small_run["model_name_or_path"], tmp_path / "given", r=3)
    with pytest.raises(
        fedlora.InputError, match=r"init_adapter: .*q_proj .*not among the target modules"
    ):
        run(small_run, init_adapter=str(given), lora_target_modules=["up_proj"])


@pytest.mark.parametrize(
    ("alpha", "rslora", "scales"),
    [
        ("2r", False, [2, 2, 2, 2]),
        ("r", False, [1, 1, 1, 1]),
        ("0.5r", False, [0.5, 0.5, 0.5, 0.5]),
        (16, False, [2, 4, 8, 8]),
        ("16", False, [2, 4, 8, 8]),
        (16, True, [16 / 8**0.5, 8, 16 / 2**0.5, 16 / 2**0.5]),
        ("2r", True, [2 * 8**0.5, 4, 2 * 2**0.5, 2 * 2**0.5]),
    ],
)
def test_alpha_is_a_number_or_a_multiple_of_the_rank(
    small_run: dict[str, Any], alpha: float | str, rslora: bool, scales: list[float]
) -> None:
    found: dict[int, set[float]] = {}

    def local(model: Any, dataset: Sequence[Tokens], training: LocalTraining) -> dict[str, Any]:
        layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
        assert all(len(layer.clients) == 1 for layer in layers)
        found[training.client] = {layer.clients[0].scale for layer in layers}
        return {}

    run(
        small_run,
        lora_alpha=alpha,
        use_rslora=rslora,
        num_rounds=1,
        eval_rounds=0,
        train_function=local,
    )
    assert all(len(found[k]) == 1 for k in range(4))
    assert [found[k].pop() for k in range(4)] == pytest.approx(scales)


def test_the_scale_matters_and_the_loss_logged_is_of_it(small_run: dict[str, Any]) -> None:
    results = {
        alpha: run(small_run, f"alpha-{alpha}", lora_alpha=alpha, use_rslora=alpha == "r")
        for alpha in ("r", "2r", "8r")
    }
    assert len({final_bytes(result) for result in results.values()}) == 3
    data = evaluation_rows(small_run)
    for result in results.values():
        found = loss_of(small_run["model_name_or_path"], result.final_dir, data)
        assert found == pytest.approx(result.evaluations[2]["loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["exact", "flora", "zero_pad"])
def test_server_momentum_and_learning_rate(small_run: dict[str, Any], method: str) -> None:
    values = {**small_run, "method": method}
    plain = run(values, "plain")
    heavy = run(values, "heavy", server_momentum=0.5)
    half = run(values, "half", server_learning_rate=0.5)
    assert len({final_bytes(r) for r in (plain, heavy, half)}) == 3
    # The first round has no velocity yet; afterwards momentum carries it farther.
    first, later = (line["update_norm"] for line in rounds_of(heavy))
    assert first == pytest.approx(rounds_of(plain)[0]["update_norm"], rel=1e-5)
    assert math.isfinite(later)
    assert later > 0
    for result in (heavy, half):
        losses = [found["loss"] for _, found in sorted(result.evaluations.items())]
        assert losses[-1] < losses[0]
        assert all(line["aggregation_error"] is None for line in rounds_of(result))
    if method != "zero_pad":  # products: half the rate, half the way
        whole = rounds_of(plain)[0]["update_norm"]
        assert rounds_of(half)[0]["update_norm"] == pytest.approx(whole / 2, rel=1e-5)


def test_clients_are_evaluated_on_what_they_held_out(small_run: dict[str, Any]) -> None:
    result = run(small_run, client_eval_fraction=0.25)
    tokenizer = AutoTokenizer.from_pretrained(small_run["model_name_or_path"])
    data = load_data(Config(**{**small_run, "client_eval_fraction": 0.25}), tokenizer)
    assert [len(c.eval) for c in data.clients] == [6, 4, 3, 2]
    assert [c["num_examples"] for c in rounds_of(result)[0]["clients"]] == [18, 12, 9, 6]
    for line in (result.metrics[1], *rounds_of(result)):
        assert list(line["client_evaluations"]) == ["0", "1", "2", "3"]
    base = small_run["model_name_or_path"]
    for client, part in enumerate(data.clients):
        found = rounds_of(result)[-1]["client_evaluations"][str(client)]["loss"]
        assert found == pytest.approx(loss_of(base, result.final_dir, part.eval), rel=1e-5)


def test_exact_match_is_measured_where_references_fit(small_run: dict[str, Any]) -> None:
    values = {**small_run, "eval_exact_match": "auto", "num_rounds": 1}
    fits = run(values, "fits", train_function=nothing)
    assert 0 <= fits.evaluations[0]["exact_match"] <= 1
    short = run(values, "short", train_function=nothing, generation_max_new_tokens=3)
    assert "exact_match" not in short.evaluations[0]


def test_rows_without_a_prompt_have_no_exact_match(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "text.jsonl", [{"text": row["prompt"]} for row in rows(8)])
    values = {
        **small_run,
        "train_file": str(tmp_path / "text.jsonl"),
        "eval_file": str(tmp_path / "text.jsonl"),
        "eval_exact_match": "auto",
        "num_rounds": 1,
    }
    assert "exact_match" not in run(values, train_function=nothing).evaluations[0]
    with pytest.raises(fedlora.InputError, match="eval_exact_match"):
        run(values, "asked", eval_exact_match=True)


def test_a_client_without_rows_takes_no_part(small_run: dict[str, Any], tmp_path: Path) -> None:
    """All its rows are held out."""
    write_jsonl(tmp_path / "site_0.jsonl", rows(1))
    write_jsonl(tmp_path / "site_1.jsonl", rows(8))
    events: list[Mapping[str, Any]] = []
    result = run(
        small_run,
        train_file=str(tmp_path / "site_*.jsonl"),
        client_ranks=[2, 2],
        client_eval_fraction=0.6,
        report=events.append,
    )
    assert asked(result) == [[1], [1]]
    assert [e["message"] for e in events if e["event"] == "warning"] == [
        "client 0 has no rows and takes no part"
    ]


def test_an_output_directory_is_never_written_over(small_run: dict[str, Any]) -> None:
    run(small_run, num_rounds=1, train_function=nothing)
    with pytest.raises(fedlora.InputError, match="holds a complete run"):
        run(small_run, num_rounds=1, train_function=nothing)


def test_a_real_model_learns_from_real_answers(material: Path, tmp_path: Path) -> None:
    """A small trained Llama, instructions people wrote, in a short form that fits its window."""
    for client in range(3):
        source = material / "datasets" / "dolly_fed10" / f"local_training_{client}.json"
        values = [
            {"prompt": f"{row['instruction'][:80]}\n", "completion": row["response"][:80]}
            for row in json.loads(source.read_text(encoding="utf-8"))
        ]
        write_jsonl(tmp_path / f"site_{client}.jsonl", values)
    values = {
        "model_name_or_path": str(material / "models" / "stories260K"),
        "train_file": str(tmp_path / "site_*.jsonl"),
        "max_train_samples": 40,
        "client_eval_fraction": 0.2,
        "max_length": 128,
        "client_ranks": [8, 4, 2],
        "num_rounds": 2,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "num_threads": 1,
        "output_dir": str(tmp_path / "out"),
    }
    result = run(values)
    losses = [found["loss"] for _, found in sorted(result.evaluations.items())]
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < 0.95 * losses[0]
    data = evaluation_rows(values)
    found = loss_of(values["model_name_or_path"], result.final_dir, data)
    assert found == pytest.approx(losses[2], rel=1e-5)


def test_metrics_of_an_own_training_become_numbers(small_run: dict[str, Any]) -> None:
    def own(model: Any, dataset: Any, training: LocalTraining) -> dict[str, Any]:
        return {**train(model, dataset, training), "event": torch.tensor(2.5), "note": "x"}

    result = run(small_run, train_function=own)
    for line in rounds_of(result):
        assert {(c["metrics"]["event"], c["metrics"]["note"]) for c in line["clients"]} == {
            (2.5, "x")
        }

    def wrong(model: Any, dataset: Any, training: LocalTraining) -> dict[str, Any]:
        return {"history": [1, 2]}

    with pytest.raises(TypeError, match="history as list"):
        run(small_run, "wrong", train_function=wrong)


@pytest.mark.parametrize("keys", [{"lora_alpha": 7}, {"use_rslora": True, "lora_alpha": 3}])
def test_a_client_that_learns_nothing_sends_its_start_to_the_bit(
    small_run: dict[str, Any], keys: dict[str, Any]
) -> None:
    """Dividing by the scale and multiplying again must not count as learning."""
    session = assemble(Config(**{**small_run, **keys, "start_fraction": 1.0}))
    agreement = session.federation.agreement
    server = Server(session.federation, initial_state(session.federation), Mean())
    clients = dict(enumerate(session.data.clients))
    worker = Worker(session.base, clients, session.config, agreement)
    for sent in server.plan().values():
        server.accept(worker.handle(sent))
    server.commit()
    idle = Worker(
        session.base, clients, session.config, agreement, lambda model, rows, training: {}
    )
    for sent in server.plan().values():
        start = client_start(sent, agreement)
        update = idle.handle(sent)
        for name, x in update.adapter.items():
            assert torch.equal(x.A, start.adapter[name].A)
            assert torch.equal(x.B, start.adapter[name].B)


def test_a_row_longer_than_the_context_is_refused(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "x", "completion": "y" * 299}) + "\n")
    values = {**small_run, "train_file": str(path), "client_ranks": None, "num_clients": 1}
    with pytest.raises(InputError, match=r"max_length: 1024: a row has 301 tokens.* 128"):
        run(values)
    assert not Path(small_run["output_dir"]).exists()


def test_penalties_of_a_model_do_not_change_exact_match(
    small_run: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """Greedy is greedy, whatever sampling its author recommends."""
    other = tmp_path / "model"
    shutil.copytree(tiny_llama, other)
    settings = json.loads((other / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 5.0, "min_new_tokens": 9, "temperature": 3.0}
    settings["do_sample"] = True
    (other / "generation_config.json").write_text(json.dumps(settings))
    answers = []
    for path in (tiny_llama, other):
        base = assemble(Config(**{**small_run, "model_name_or_path": str(path)})).base
        base.load([])
        prompts = [[10, 20, 30, 40], [50, 60]]
        answers.append(generate(base.model, base.tokenizer, prompts, 12))
    assert answers[0] == answers[1]


def test_without_a_configuration_the_embedded_default_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    class StoppedError(Exception):
        pass

    def stop(event: Any) -> None:
        assert event["model"] == "embedded"
        assert event["ranks"] == [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
        raise StoppedError

    with pytest.raises(StoppedError):
        fedlora.run(report=stop)
