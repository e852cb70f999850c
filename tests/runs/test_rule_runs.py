"""Every rule in real runs: what is trained, what travels, what is saved, and how a run goes on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import fedlora
from fedlora import Config
from fedlora.client.local_training import LocalTraining
from fedlora.client.trainer import train
from fedlora.client.worker import Trained, Worker
from fedlora.commands.cli import main
from fedlora.config.yaml_file import read_yaml
from fedlora.data.datasets import load_data
from fedlora.data.tokenize import Tokens
from fedlora.embedded import BASE_DIR
from fedlora.embedded import CONFIG as EMBEDDED_CONFIG
from fedlora.errors import InputError
from fedlora.federation.exchange import Agreement, client_start, global_delta
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.federation.server import Server
from fedlora.lowrank import Adapter, LowRank, norm, prefix, scale, subtract, to_dense, total_norm
from fedlora.methods import METHODS
from fedlora.methods.shared import prefix_start
from fedlora.methods.values import ServerState
from fedlora.model.base import BaseModel
from fedlora.model.lora_layer import AdapterLayer
from fedlora.runs import evaluation as rating
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.results import Result, RoundResult
from support.models import save_tokenizer
from support.products import in_turn
from support.resume import (
    ROUNDS,
    Driver,
    begin,
    course,
    driver,  # noqa: F401
    whole_lines,
)
from support.rows import (
    rows,
    write_jsonl,
)
from support.runs import (
    evaluation_rows,
    given_adapter,
    loss_of,
    nothing,
)

pytestmark = pytest.mark.usefixtures("kept_bases")


RULES = list(METHODS)


FROZEN_A = ("ffa", "fedsvd")


EXACT = ("exact", "flora", "ffa", "rolora", "fedex", "fedsvd", "fedmomentum")


NO_SERVER_STEP = ("hetlora", "raflora")


PERSONAL = "fedsa"


WEIGHTS = "adapter_model.safetensors"


def ranks_for(method: str, mixed: Sequence[int], equal: int = 4) -> list[int]:
    """Mixed where the rule can combine them."""
    return list(mixed) if METHODS[method].mixed_ranks else [equal] * len(mixed)


@dataclass
class Watched:
    """A finished run, its base, and the messages and states that made it.

    Messages are by `(round, client)`, states by the round they stand after; `own` is what a client
    has kept for itself after a round.
    """

    result: Result
    config: Config
    base: BaseModel
    sent: dict[tuple[int, int], Broadcast] = field(default_factory=dict)
    got: dict[tuple[int, int], ClientUpdate] = field(default_factory=dict)
    states: dict[int, ServerState] = field(default_factory=dict)
    own: dict[tuple[int, int], Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return [line for line in self.result.metrics if line["event"] == "round"]

    @property
    def losses(self) -> list[float]:
        return [found["loss"] for _, found in sorted(self.result.evaluations.items())]

    @property
    def last(self) -> ServerState:
        return self.states[max(self.states)]

    def finals(self) -> list[Path]:
        """The adapters for users: one, or one for every client."""
        if self.config.method != PERSONAL:
            return [self.result.final_dir]
        return [self.result.final_dir / f"client-{k}" for k in sorted(self.last.ranks)]

    def model_of(self, client: int) -> list[Any]:
        """What a client's model adds to the base: the global update, with its own factors."""
        state, own = self.last, dict[str, Tensor]()
        for (_, k), factors in sorted(self.own.items()):
            own = dict(factors) if k == client else own
        adapter = {
            n: LowRank(x.A, own[f"{n}.B"]) if f"{n}.B" in own else x
            for n, x in state.adapter.items()
        }
        return [state.base_delta, adapter]


def watch(
    values: Mapping[str, Any],
    name: str = "out",
    **changes: Any,
) -> Watched:
    """Run with some keys changed, into a directory of that name; options of `run` go through."""
    options = {k: changes.pop(k) for k in ("train_function", "callbacks") if k in changes}
    where = str(Path(values["output_dir"]).with_name(name))
    config = Config(**{**values, **changes, "output_dir": where})
    sent: dict[tuple[int, int], Broadcast] = {}
    got: dict[tuple[int, int], ClientUpdate] = {}
    states: dict[int, ServerState] = {}
    own: dict[tuple[int, int], Mapping[str, Tensor]] = {}
    bases: list[BaseModel] = []
    handle, plan, commit = Worker.handle_together, Server.plan, Server.commit

    def handled(worker: Worker, broadcasts: Sequence[Broadcast], *rest: Any) -> list[Trained]:
        sent.update({(b.round, b.client): b for b in broadcasts})
        bases.append(worker.base)
        everyone = handle(worker, broadcasts, *rest)
        for update in (trained.update for trained in everyone):
            key = update.round, update.client
            got[key] = update
            if update.client in worker.states:
                own[key] = worker.states[update.client].factors
        return everyone

    def planned(server: Server) -> dict[int, Broadcast]:
        states[server.state.round] = server.state
        return plan(server)

    def committed(server: Server) -> Any:
        record = commit(server)
        states[server.state.round] = server.state
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "handle_together", handled)
        patch.setattr(Server, "plan", planned)
        patch.setattr(Server, "commit", committed)
        result = fedlora.run(config, **options)
    return Watched(result, config, bases[0], sent, got, states, own)


@pytest.fixture
def quick(small_run: dict[str, Any]) -> dict[str, Any]:
    """Keys of a run of a fraction of a second."""
    return {**small_run, "eval_exact_match": False, "max_steps": 2, "save_total_limit": 2}


def keys_for(quick: Mapping[str, Any], method: str, **more: Any) -> dict[str, Any]:
    ranks = ranks_for(method, quick["client_ranks"])
    return {**quick, "method": method, "client_ranks": ranks, **more}


def finite(adapter: Adapter) -> bool:
    return all(bool(x.A.isfinite().all() and x.B.isfinite().all()) for x in adapter.values())


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def logits(model: Any) -> Tensor:
    """Of three sequences of 12, 12 and 7 tokens, where they are no padding; or of the rows."""
    ids = torch.randint(4, 99, (3, 12), generator=torch.Generator().manual_seed(5))
    ids[2, 7:] = 0
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    return found[ids != 0] if found.ndim == 3 else found


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference of logits, in units of the largest of them."""
    x, y = logits(ours), logits(theirs)
    return float((x - y).abs().max() / x.abs().max())


MIXED = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]


SHORT = {
    "max_train_samples": 16,
    "max_eval_samples": 24,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "num_rounds": 2,
    "eval_exact_match": False,
    "metric_for_best_model": "eval_loss",
    "num_threads": 1,
}


@pytest.fixture(scope="module", params=in_turn(RULES, 0))
def embedded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """The embedded default in a short form, run once by every rule."""
    method = request.param
    values = {**read_yaml(EMBEDDED_CONFIG), **SHORT, "method": method}
    values["client_ranks"] = ranks_for(method, MIXED, 8)
    values["output_dir"] = str(tmp_path_factory.mktemp("embedded") / method)
    return watch(values, method)


def test_the_embedded_default_learns(embedded: Watched) -> None:
    run, method, base = embedded, embedded.config.method, embedded.base
    assert run.losses[2] < run.losses[1] < run.losses[0]
    assert run.losses[2] < 0.9 * run.losses[0]
    steps = [[run.got[number, k].metrics["loss"] for k in range(10)] for number in (1, 2)]
    assert sum(steps[1]) < sum(steps[0])
    # What is logged is complete, and is what is on the disk.
    assert read_metrics(run.result.output_dir) == as_json(run.result.metrics)
    assert [x["event"] for x in run.result.metrics] == ["begin", "start", "round", "round", "end"]
    for number, line in enumerate(run.rounds, 1):
        assert line["round"] == number
        assert line["evaluation"].keys() == {"loss", "perplexity", "token_accuracy"}
        assert line["seconds"].keys() == {"train", "aggregate", "evaluate"}
        assert (line["aggregation_error"] is None) == (method == PERSONAL)
        assert line["truncation_error"] == 0.0
        assert (line["update_norm"] > 0) == (method != PERSONAL)
        assert line["global_rank"] > 0
        assert [c["client"] for c in line["clients"]] == list(range(10))
        assert sum(c["weight"] for c in line["clients"]) == pytest.approx(1)
        assert line["bytes_up"] == sum(c["bytes_up"] for c in line["clients"]) > 0
        assert line["bytes_down"] == sum(c["bytes_down"] for c in line["clients"])
        for c in line["clients"]:
            assert c["rank"] == run.states[number - 1].ranks[c["client"]]
            assert c["rejected"] == ""
            assert c["metrics"]["steps"] == 2
            assert c["metrics"].keys() >= {"loss", "loss_first", "loss_last", "tokens", "padding"}
    # What users load is what was evaluated.
    assert run.result.final_dir.name == "final"
    assert (run.result.final_dir / WEIGHTS).exists() == (method != PERSONAL)
    assert not (run.result.final_dir / "client-10").exists()
    AutoTokenizer.from_pretrained(run.result.final_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    for client, path in enumerate(run.finals()):
        theirs = PeftModel.from_pretrained(model, path)
        base.load(run.model_of(client))
        assert difference(base.model, theirs) < 1e-5
        base.load([])
        assert difference(base.model, theirs) > 1e-2
        model = theirs.unload()


@pytest.mark.parametrize("embedded", ["hetlora", "rolora", "fedsa"], indirect=True)
def test_the_command_line_does_the_same(
    embedded: Watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, method, out = embedded, embedded.config.method, tmp_path / "out"
    ranks = ranks_for(method, MIXED, 8)
    argv = [word for key, value in SHORT.items() for word in (f"--{key}", str(value).lower())]
    argv += ["--method", method, "--output_dir", str(out), "--client_ranks", *map(str, ranks)]
    assert main(["run", *argv]) == 0
    told = capsys.readouterr().out
    assert f"method {method}, 2 rounds" in told
    assert f"{run.losses[2]:.4f}" in told
    ending = "/client-*" if method == PERSONAL else ""
    assert f"final adapter: {out / 'final'}{ending}  " in told
    for path in run.finals():
        same = out / "final" / path.relative_to(run.result.final_dir) / WEIGHTS
        assert same.read_bytes() == (path / WEIGHTS).read_bytes()


def test_factors_that_are_not_trained_stay_to_the_bit(embedded: Watched) -> None:
    run, method = embedded, embedded.config.method
    rule, options = METHODS[method], run.config.rule_options()
    shapes = {n: x.shape for n, x in run.got[1, 0].adapter.items()}
    for (number, client), update in run.got.items():
        trained = rule.training(options).trained(number)
        usual = "B" if method in FROZEN_A else "AB"
        assert trained == ("BA"[number - 1] if method == "rolora" else usual)
        start = client_start(
            run.sent[number, client], Agreement(rule, options, shapes, run.config.seed)
        ).adapter
        for name, x in update.adapter.items():
            a, b = start[name].A[: x.rank], start[name].B[:, : x.rank]
            assert torch.equal(x.A, a) == ("A" not in trained) or "A" not in update.sends
            assert torch.equal(x.B, b) == ("B" not in trained) or "B" not in update.sends
            assert bool(x.A.any()) == ("A" in update.sends)
            assert not x.B.any() or "B" in update.sends

    saved = fedlora.load_adapter(run.result.final_dir).deltas if method in FROZEN_A else {}
    for name, stored in saved.items():
        first, last = run.states[0].adapter[name], run.last.adapter[name]
        assert isinstance(first, LowRank)
        assert isinstance(last, LowRank)
        if method == "ffa":  # the one draw of the beginning
            assert torch.equal(last.A, first.A)
            if last.rank * sum(last.shape) <= math.prod(last.shape):  # saved as factors
                assert torch.equal(stored.A, first.A)
                assert torch.equal(stored.B, last.B)
        else:  # turned by the server within the rows it began with
            assert torch.equal(stored.A, last.A)
            inside = last.A @ first.A.T @ first.A
            torch.testing.assert_close(inside, last.A, rtol=0, atol=1e-5)


def memory(parameters: Iterable[Tensor]) -> set[int]:
    """Where their numbers lie: an optimizer holds a client's parameters as parts of a vector."""
    return {p.untyped_storage().data_ptr() for p in parameters}


class Optimizer(torch.optim.AdamW):
    """Notes what it is given, what has a gradient, and how large that is."""

    made: list[Optimizer] = []  # noqa: RUF012

    def __init__(self, *given: Any, **keys: Any) -> None:
        super().__init__(*given, **keys)
        self.graded: list[set[int]] = []
        self.norms: list[float] = []
        type(self).made.append(self)

    @property
    def given(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> Any:
        graded = [p for p in self.given if p.grad is not None]
        self.graded.append(memory(graded))
        self.norms.append(float(torch.stack([p.grad.norm() for p in graded]).norm()))
        return super().step(closure)


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[Optimizer]:
    """Every optimizer that is made, in order."""
    monkeypatch.setattr(Optimizer, "made", [])
    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    return Optimizer.made


@pytest.mark.parametrize("method", ["ffa", "fedsvd", "rolora", "fedsa", "hetlora"])
def test_a_frozen_factor_has_no_gradient_and_no_optimizer_state(
    quick: dict[str, Any], optimizers: list[Optimizer], method: str
) -> None:
    rounds: list[int] = []

    def spied(model: Any, dataset: Any, training: LocalTraining) -> Mapping[str, Any]:
        wanted = METHODS[method].training(METHODS[method].options()).trained(training.round)
        layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
        frozen = [m.B if wanted == "A" else m.A for m in layers if wanted != "AB"]
        trained = [p for m in layers for p in (m.A, m.B) if all(p is not f for f in frozen)]
        before = [p.detach().clone() for p in frozen]
        metrics = train(model, dataset, training)
        ours, [*_, optimizer] = memory(trained), optimizers
        assert memory(optimizer.given) == ours
        assert sum(p.numel() for p in optimizer.given) == sum(p.numel() for p in trained)
        assert memory(optimizer.state) == ours
        assert optimizer.graded == [ours, ours]
        assert not ours & memory(frozen)
        assert all(p.grad is None and not p.requires_grad for p in frozen)
        assert all(torch.equal(p, x) for p, x in zip(frozen, before, strict=True))
        rounds.append(training.round)
        return metrics

    values = keys_for(quick, method, lora_dropout=0.2, proximal_mu=0.1, weight_decay=0.1)
    run = watch(values, train_function=spied)
    assert rounds == [1, 1, 1, 1, 2, 2, 2, 2]
    assert all(math.isfinite(loss) for loss in run.losses)


@pytest.mark.parametrize("method", ["ffa", "rolora"])
def test_the_options_of_training_work_beside_frozen_factors(
    quick: dict[str, Any], optimizers: list[Optimizer], method: str
) -> None:
    values = keys_for(quick, method, max_steps=4, client_ranks=4)
    plain = watch(values, "plain", max_grad_norm=0)
    assert max(norm for x in optimizers for norm in x.norms) > 0.05
    optimizers.clear()
    clipped = watch(values, "clipped", max_grad_norm=1e-2)
    assert max(norm for x in optimizers for norm in x.norms) <= 1.001e-2
    assert len(optimizers) == 8
    held = watch(values, "held", max_grad_norm=0, proximal_mu=100.0)
    dropped = watch(values, "dropped", max_grad_norm=0, lora_dropout=0.5)
    again = watch(values, "again", max_grad_norm=0, lora_dropout=0.5)
    finals = [(x.result.final_dir / WEIGHTS).read_bytes() for x in (plain, clipped, held, dropped)]
    assert len(set(finals)) == 4
    assert (again.result.final_dir / WEIGHTS).read_bytes() == finals[3]
    # The nearer to the start, the smaller the update.
    assert held.rounds[0]["update_norm"] < 0.7 * plain.rounds[0]["update_norm"]


def test_rolora_alternates(quick: dict[str, Any]) -> None:
    run = watch(keys_for(quick, "rolora", num_rounds=4))
    for number in (1, 2, 3, 4):
        before, after = run.states[number - 1].adapter, run.states[number].adapter
        for name in before:
            assert torch.equal(after[name].A, before[name].A) == (number % 2 == 1)
            assert torch.equal(after[name].B, before[name].B) == (number % 2 == 0)
            for client in range(4):
                assert run.got[number, client].sends == "AB"[number % 2]
    assert run.losses == sorted(run.losses, reverse=True)


class Spy:
    """The package's training, with the factors before and after it, `s B` as it is sent."""

    def __init__(self) -> None:
        self.began: dict[tuple[int, int], dict[str, LowRank]] = {}
        self.ended: dict[tuple[int, int], dict[str, LowRank]] = {}

    def read(self, model: Any) -> dict[str, LowRank]:
        return {
            name: LowRank(m.A.detach().clone(), m.clients[0].scale * m.B.detach())
            for name, m in model.named_modules()
            if isinstance(m, AdapterLayer) and m.A is not None and m.B is not None
        }

    def __call__(
        self, model: Any, dataset: Sequence[Any], training: LocalTraining
    ) -> Mapping[str, Any]:
        key = training.round, training.client
        self.began[key] = self.read(model)
        metrics = train(model, dataset, training)
        self.ended[key] = self.read(model)
        return metrics


def test_fedsa_averages_a_and_keeps_b(quick: dict[str, Any]) -> None:
    spy = Spy()
    run = watch(keys_for(quick, "fedsa"), train_function=spy)
    shares = [24 / 60, 16 / 60, 12 / 60, 8 / 60]
    for name, x in run.states[1].adapter.items():
        mean = sum(p * spy.ended[1, k][name].A for k, p in enumerate(shares))
        torch.testing.assert_close(x.A, mean, rtol=1e-5, atol=1e-6)
        for state in run.states.values():
            assert not state.adapter[name].B.any()
        for k in range(4):
            assert torch.equal(spy.began[2, k][name].A, x.A)
            assert torch.equal(spy.began[2, k][name].B, spy.ended[1, k][name].B)
            assert spy.ended[1, k][name].B.any()
            for number in (1, 2):  # what crosses the wire
                assert run.got[number, k].sends == "A"
                assert not run.got[number, k].adapter[name].B.any()
                assert not run.sent[number, k].adapter[name].B.any()
    models = [fedlora.load_adapter(path).deltas for path in run.finals()]
    for k, model in enumerate(models):
        assert total_norm(model) > 0
        for name, x in model.items():
            wanted = run.last.adapter[name].A, spy.ended[2, k][name].B
            torch.testing.assert_close(to_dense(x), wanted[1] @ wanted[0], rtol=1e-4, atol=1e-6)
            assert all(not torch.equal(to_dense(x), to_dense(y[name])) for y in models[:k])


def test_a_client_of_fedsa_that_is_absent_keeps_its_b(quick: dict[str, Any]) -> None:
    spy = Spy()
    run = watch(
        keys_for(quick, "fedsa", num_rounds=7, clients_per_round=2, client_eval_fraction=0.2),
        train_function=spy,
    )
    last: dict[int, int] = {}
    pauses = 0
    for number, client in sorted(spy.began):
        for name, x in spy.began[number, client].items():
            assert torch.equal(x.A, run.states[number - 1].adapter[name].A)
            if client not in last:
                assert not x.B.any()
                continue
            kept = spy.ended[last[client], client][name].B
            torch.testing.assert_close(x.B, kept, rtol=1e-6, atol=1e-8)
        pauses += client in last and last[client] < number - 1
        last[client] = number
    assert pauses >= 2
    # Evaluated in every round: the absent one's model changes with A alone.
    for line in run.rounds:
        assert list(line["client_evaluations"]) == ["0", "1", "2", "3"]
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.25])
def test_fedsa_evaluates_every_clients_own_model(quick: dict[str, Any], fraction: float) -> None:
    """On its own held-out rows; where it has none, on the common ones."""
    values = keys_for(quick, "fedsa", client_eval_fraction=fraction, max_steps=4)
    run = watch(values)
    data = load_data(Config(**values), AutoTokenizer.from_pretrained(values["model_name_or_path"]))
    held_out = [len(part.eval) for part in data.clients]
    assert held_out == {0.0: [0] * 4, 0.05: [1, 1, 1, 0], 0.25: [6, 4, 3, 2]}[fraction]
    logged = run.rounds[-1]["client_evaluations"]
    assert list(logged) == ["0", "1", "2", "3"]
    for k, part in enumerate(data.clients):
        found = loss_of(values["model_name_or_path"], run.finals()[k], part.eval or data.eval)
        assert found == pytest.approx(logged[str(k)]["loss"], rel=1e-5)
    for line in (run.result.metrics[1], *run.rounds):
        assert line["evaluation"].keys() == {"loss", "perplexity", "token_accuracy"}
        for key, value in line["evaluation"].items():
            each = [x[key] for x in line["client_evaluations"].values()]
            assert value == pytest.approx(sum(each) / 4)
    assert len({x["loss"] for x in logged.values()}) == 4
    assert run.losses[2] < run.losses[0]


def test_fedsa_has_no_best_round_to_load(
    quick: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values = keys_for(quick, "fedsa", load_best_model_at_end=True)
    with pytest.raises(InputError, match="load_best_model_at_end: method fedsa makes a model for"):
        watch(values)
    where = Path(values["output_dir"])
    values = {**values, "client_ranks": 4, "load_best_model_at_end": "true"}
    argv = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    assert main(["run", *argv]) == 2
    assert "only the last round's are kept; leave it out" in capsys.readouterr().err
    assert not where.exists()


def test_fedsa_stops_early_by_the_mean(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 0 gets better all the time, the mean does not."""
    script = [[9, 3, 3, 3], [8, 2, 2, 2], [7, 2, 4, 2], [6, 3, 5, 2], [5, 0, 0, 0]]
    left: Iterator[int] = iter([x for row in script for x in row])
    monkeypatch.setattr(rating, "evaluate", lambda *_, **__: {"loss": float(next(left))})
    run = watch(
        keys_for(quick, "fedsa", num_rounds=9, early_stopping_patience=2), train_function=nothing
    )
    assert run.losses == [4.5, 3.5, 3.75, 4.0]
    assert run.result.best_round == 1
    assert run.result.metrics[-1] == {"event": "end", "round": 3, "final": 3, "best": 1}
    assert all((path / WEIGHTS).is_file() for path in run.finals())


def tail(adapter: Adapter, share: float) -> float:
    cut = {n: int(share * x.rank) for n, x in adapter.items()}
    return sum(float(x.B[:, cut[n] :].norm() * x.A[cut[n] :].norm()) for n, x in adapter.items())


def test_the_rank_penalty_changes_training(quick: dict[str, Any]) -> None:
    values = keys_for(quick, "hetlora", max_steps=6, num_rounds=1, rank_decay=0.5)
    runs = {x: watch(values, f"penalty-{x}", rank_penalty=x) for x in (0, 1e-3, 1.0)}
    tails = {x: [tail(run.got[1, k].adapter, 0.5) for k in range(4)] for x, run in runs.items()}
    for k in range(4):
        assert tails[1.0][k] < 0.5 * tails[0][k]
        assert tails[1e-3][k] != tails[0][k]
        # It is in the loss that is logged, too; the first step, with B = 0, has none.
        losses = [runs[x].got[1, k].metrics for x in (0, 1.0)]
        assert losses[0]["loss_first"] == pytest.approx(losses[1]["loss_first"], rel=1e-6)
        assert losses[0]["loss"] < losses[1]["loss"]


def test_ranks_prune_themselves(quick: dict[str, Any]) -> None:
    values = keys_for(quick, "hetlora", num_rounds=5, max_steps=3, learning_rate=3e-2)
    run = watch(values, rank_penalty=3.0, rank_decay=0.5)
    ranks = [[c["rank"] for c in line["clients"]] for line in run.rounds]
    assert ranks[0] == [8, 4, 2, 2]
    assert ranks[-1] != ranks[0]
    options = run.config.rule_options()
    shapes = {n: x.shape for n, x in run.got[1, 0].adapter.items()}
    rule, pruned = METHODS["hetlora"], 0
    for (number, k), update in run.got.items():
        sent = run.sent[number, k]
        assert sent.rank == ranks[number - 1][k] == run.states[number - 1].ranks[k]
        assert {x.rank for x in sent.adapter.values()} == {sent.rank}
        [rank] = {x.rank for x in update.adapter.values()}
        assert run.states[number].ranks[k] == rank
        assert rank in (sent.rank, max(1, sent.rank // 2))
        assert update.nbytes == 4 * rank * sum(m + n for m, n in shapes.values())
        if rank == sent.rank > 1:
            start = client_start(sent, Agreement(rule, options, shapes, run.config.seed))
            assert tail(update.adapter, 0.5) >= tail(start.adapter, 0.5)
        pruned += rank < sent.rank
    assert pruned >= 2
    for before, after in pairwise(ranks):
        assert all(x >= y >= 1 for x, y in zip(before, after, strict=True))
    assert all(math.isfinite(loss) for loss in run.losses)
    assert run.losses[-1] < run.losses[0]
    kept = watch(values, "kept", rank_penalty=3.0, rank_decay=1)
    assert [[c["rank"] for c in line["clients"]] for line in kept.rounds] == [[8, 4, 2, 2]] * 5


def test_bytes_are_what_travels(embedded: Watched) -> None:
    run, method = embedded, embedded.config.method
    shapes = [x.shape for x in run.got[1, 0].adapter.values()]
    a, b = 4 * sum(n for _, n in shapes), 4 * sum(m for m, _ in shapes)  # bytes of a direction
    single = {"ffa": [b, b], "fedsvd": [b, b], "fedsa": [a, a], "rolora": [b, a]}
    up = single.get(method, [a + b] * 2)
    for number, line in enumerate(run.rounds):
        sizes = {c["client"]: c["bytes_up"] for c in line["clients"]}
        ranks = {k: next(iter(run.got[number + 1, k].adapter.values())).rank for k in range(10)}
        wanted = {k: up[number] * rank for k, rank in ranks.items()}
        assert sizes == wanted
    down = {
        "ffa": [b, b],
        "fedsa": [a, a],
        "rolora": [a + b, b],
        "fedit": [a + b] * 2,
        "zero_pad": [a + b] * 2,
        "hetlora": [a + b] * 2,
        "fedsvd": [a + b] * 2,
        "lora_fair": [a + b] * 2,
    }
    if method in down:
        for number, line in enumerate(run.rounds):
            held = [run.sent[number + 1, k].rank for k in range(10)]
            counted = [c["bytes_down"] for c in line["clients"]]
            assert counted == [down[method][number] * rank for rank in held]
    else:
        first, second = ([c["bytes_down"] for c in line["clients"]] for line in run.rounds)
        assert (set(first) == {0}) == (method != "fedex")  # which begins with one A for all
        assert all(size > 0 for size in second)


@pytest.mark.parametrize("keys", [{}, {"server_momentum": 0.5}], ids=["plain", "momentum"])
@pytest.mark.parametrize("method", ["ffa", "fedsa", "rolora"])
def test_what_is_not_sent_down_is_there_already(
    quick: dict[str, Any], method: str, keys: dict[str, Any]
) -> None:
    """A factor that does not travel is, to the bit, the one the client was sent or drew before."""
    if keys and not METHODS[method].server_momentum:
        keys = {"server_learning_rate": 0.5}
    run = watch(keys_for(quick, method, num_rounds=6, clients_per_round=3, max_steps=1, **keys))
    rule, seen, checked = METHODS[method], set[int](), 0
    for number in range(1, 7):
        now = {k for n, k in run.sent if n == number}
        for k in now:
            sent = run.sent[number, k]
            lacking = rule.sent_down(number, k in seen)
            size = sum(
                x.A.nbytes * ("A" in lacking) + x.B.nbytes * ("B" in lacking)
                for x in sent.adapter.values()
            )
            assert sent.nbytes == size
            before = run.sent[number - 1, k].adapter if k in seen else run.states[0].adapter
            for name, x in sent.adapter.items():
                for factor in {"A", "B"} - set(lacking):
                    old = prefix(before[name], x.rank)
                    assert torch.equal(getattr(x, factor), getattr(old, factor))
                    checked += 1
        seen = now
    assert checked > 0


def test_rules_are_exact_where_they_say_so(quick: dict[str, Any], embedded: Watched) -> None:
    method = embedded.config.method
    errors = [line["aggregation_error"] for line in embedded.rounds]
    if method == PERSONAL:
        assert errors == [None, None]
    elif method in EXACT:
        assert max(errors) < 1e-5
    elif method == "flexlora":  # nothing is dropped yet in the first round
        assert errors[0] < 1e-5
        assert errors[1] > 1e-4
    else:
        assert min(errors) > 1e-4
    if method == "florist":
        run = watch(keys_for(quick, method, energy_threshold=1))
        assert max(line["aggregation_error"] for line in run.rounds) < 1e-5
    if method == "raflora":  # by its own claim: equal ranks that hold all of the update
        run = watch(keys_for(quick, method, client_ranks=40))
        assert max(line["aggregation_error"] for line in run.rounds) < 1e-5
    if method == "flexlora":
        run = watch(keys_for(quick, method, client_ranks=[40, 36, 33, 32]))
        assert max(line["aggregation_error"] for line in run.rounds) < 1e-5


@pytest.fixture(scope="module")
def killable(tiny_llama: Path, site_files: Path) -> dict[str, Any]:
    """A run of three rounds in which clients pause and rounds are removed."""
    return {
        "model_name_or_path": str(tiny_llama),
        "train_file": str(site_files / "site_*.jsonl"),
        "eval_file": str(site_files / "eval.jsonl"),
        "client_ranks": [8, 4, 2, 2],
        "num_rounds": ROUNDS,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-2,
        "lora_dropout": 0.1,
        "clients_per_round": 3,
        "cohort_size": 2,
        "eval_exact_match": False,
        "save_total_limit": 2,
        "num_threads": 1,
    }


RESUMED: dict[str, dict[str, Any]] = {
    "fedsa": {},
    "hetlora": {"rank_penalty": 5.0, "rank_decay": 0.5, "clients_per_round": None},
    "rolora": {},
    "fedex": {},
    "raflora": {},
    "fedsvd": {},
    "fedmomentum": {"server_momentum": 0.5},
    "lora_fair": {},
}


@pytest.fixture(scope="module")
def uninterrupted(
    killable: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """For a rule the keys of a run, and the directory of one that was never interrupted."""
    done: dict[str, tuple[dict[str, Any], Path]] = {}

    def get(method: str) -> tuple[dict[str, Any], Path]:
        if method not in done:
            path = tmp_path_factory.mktemp("whole") / method
            values = {**keys_for(killable, method), **RESUMED[method]}
            fedlora.run(Config(**{**values, "output_dir": str(path)}))
            done[method] = values, path
        return done[method]

    return get


def tensors(path: Path) -> dict[str, bytes]:
    """Every file of numbers in a run's directory."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*.safetensors")}


# In the last step of round 2, by its last cohort; in the state of round 3; with final/ all but
# there.
KILLS = [(method, "in a client's steps", 8) for method in RESUMED]


for keeper in ("fedsa", "hetlora"):
    KILLS += [(keeper, "half of the state", 3), (keeper, "before final is named", 1)]


@pytest.mark.parametrize(("method", "point", "n"), KILLS, ids=[f"{m}-{p}" for m, p, _ in KILLS])
def test_killed_and_resumed_ends_with_the_same_bytes(
    driver: Driver,
    uninterrupted: Callable[[str], tuple[dict[str, Any], Path]],
    tmp_path: Path,
    method: str,
    point: str,
    n: int,
) -> None:
    values, whole = uninterrupted(method)
    path = begin(driver, tmp_path, values, point=point, n=n)
    assert not (path / "final").exists()
    before = whole_lines(path)
    assert driver("run", "--resume", path) == 0, driver.stderr
    assert (path / "metrics.jsonl").read_bytes().startswith(before)
    assert tensors(path) == tensors(whole)
    assert course(path) == course(whole)
    files = tensors(path)
    assert any(name.startswith("final") for name in files)
    assert ("round-3/state/clients.safetensors" in files) == (method == "fedsa")
    if method == "hetlora":
        ranks = [[c["rank"] for c in line["clients"]] for line in course(path)[2:5]]
        assert ranks[0] == [8, 4, 2, 2]
        assert ranks[2] != ranks[0]


@pytest.mark.parametrize("method", in_turn(RULES, 1))
def test_absent_clients_catch_up(quick: dict[str, Any], method: str) -> None:
    spy = Spy()
    values = keys_for(quick, method, num_rounds=4, clients_per_round=2, learning_rate=5e-3)
    run = watch(values, train_function=spy)
    asked = [[k for number, k in run.sent if number == wanted] for wanted in (1, 2, 3, 4)]
    assert [len(part) for part in asked] == [2] * 4
    assert len({k for part in asked for k in part}) > 2
    assert all(math.isfinite(loss) for loss in run.losses)
    assert run.losses[-1] < run.losses[0]
    assert all(finite(x) for x in (*spy.began.values(), *spy.ended.values()))
    assert total_norm(global_delta(run.last)) < math.inf
    if method in EXACT:
        assert max(line["aggregation_error"] for line in run.rounds) < 1e-5
    # Whoever comes, in whichever round: it starts from the global model as it now is.
    for number, k in run.sent:
        sent = run.sent[number, k]
        now = global_delta(run.states[number - 1])
        if method in ("exact", "flora", "florist", "fedex", "fedmomentum"):
            shapes = {n: x.shape for n, x in spy.began[number, k].items()}
            options = run.config.rule_options()
            agreement = Agreement(METHODS[method], options, shapes, run.config.seed)
            start = client_start(sent, agreement)
            for name, x in start.adapter.items():
                parts = [to_dense(d[name]) for d in (sent.base_delta, start.frozen) if name in d]
                total = sum(parts, to_dense(x))
                wanted = to_dense(now[name]) if name in now else torch.zeros_like(total)
                torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5)
        for name, began in spy.began[number, k].items():
            assert began.rank == sent.rank
            if METHODS[method].client_init is prefix_start:
                shared = prefix(run.states[number - 1].adapter[name], sent.rank)
                assert torch.equal(began.A, shared.A)
                if method != PERSONAL:
                    torch.testing.assert_close(began.B, shared.B, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", in_turn(RULES, 2))
def test_classifiers_by_every_rule(quick: dict[str, Any], tmp_path: Path, method: str) -> None:
    labels = ("fig", "ox", "yew")

    def labelled(number: int, offset: int) -> list[dict[str, Any]]:
        return [
            {"text": f"{'abc'[i % 3]} {row['prompt']}", "label": labels[i % 3]}
            for i, row in enumerate(rows(number, offset))
        ]

    for site, number in enumerate((9, 7)):
        write_jsonl(tmp_path / f"label_{site}.jsonl", labelled(number, 20 * site))
    write_jsonl(tmp_path / "eval.jsonl", labelled(9, 1000))
    run = watch(
        quick,
        method=method,
        train_file=str(tmp_path / "label_*.jsonl"),
        eval_file=str(tmp_path / "eval.jsonl"),
        label_column_name="label",
        client_ranks=ranks_for(method, [3, 2], 3),
        num_rounds=1,
        max_steps=4,
    )
    assert run.losses[1] < run.losses[0]
    [head] = run.last.dense
    shares = [9 / 16, 7 / 16]
    mean = sum(p * run.got[1, k].dense[head] for k, p in enumerate(shares))
    torch.testing.assert_close(run.last.dense[head], mean, rtol=1e-5, atol=1e-6)
    assert not torch.equal(run.last.dense[head], run.states[0].dense[head])
    assert run.result.evaluations[1]["accuracy"] >= 0
    for client, path in enumerate(run.finals()):
        model = AutoModelForSequenceClassification.from_pretrained(
            quick["model_name_or_path"], num_labels=3
        )
        run.base.load(run.model_of(client), full_params=run.last.dense)
        assert difference(run.base.model, PeftModel.from_pretrained(model, path)) < 1e-5


@pytest.mark.parametrize("method", in_turn(RULES, 3))
def test_clients_that_train_a_part_of_the_modules(quick: dict[str, Any], method: str) -> None:
    """Client 0 trains q_proj alone, the others also v_proj, nobody the rest."""
    q, v = ["q_proj"], ["q_proj", "v_proj"]
    own = {0: {"lora_target_modules": q}, **{k: {"lora_target_modules": v} for k in (1, 2, 3)}}
    run = watch(keys_for(quick, method, client_overrides=own, max_steps=3))
    assert run.losses[2] < run.losses[0]
    assert run.last.dense == {}  # nothing is trained whole unless it is asked for
    for (_, client), update in run.got.items():
        ends = {name.rpartition(".")[2] for name in update.adapter}
        assert ends == set(q if client == 0 else v)
        assert update.nbytes == sum(
            x.A.nbytes * ("A" in update.sends) + x.B.nbytes * ("B" in update.sends)
            for x in update.adapter.values()
        )
    if method in EXACT:
        assert max(line["aggregation_error"] for line in run.rounds) < 1e-5
    for client, path in enumerate(run.finals()):
        saved = fedlora.load_adapter(path).deltas
        trained = q if method == PERSONAL and client == 0 else v
        moved = {n.rpartition(".")[2] for n, x in saved.items() if norm(x) > 0}
        assert moved == set(trained)


SERVER_STEP = ("server_learning_rate", "server_momentum")


NO_MOMENTUM = ("rolora", "fedsvd")
"""Rules that train another factor, or in another basis, in every round."""


@pytest.mark.parametrize(
    ("method", "key"),
    [
        *((name, key) for name in NO_SERVER_STEP for key in SERVER_STEP),
        *((name, "server_momentum") for name in NO_MOMENTUM),
    ],
)
def test_a_server_step_is_refused_where_it_has_no_meaning(
    quick: dict[str, Any], capsys: pytest.CaptureFixture[str], method: str, key: str
) -> None:
    message = (
        f"method: {method} divides by weights of its own, so server_learning_rate and "
        "server_momentum have no meaning with it; leave them out"
    )
    if method in NO_MOMENTUM:
        message = (
            f"method: {method} trains something else in every round, so the momentum of the round "
            "before has no meaning; leave server_momentum out"
        )
    values = {**quick, "method": method, "client_ranks": 4, key: 0.5}
    with pytest.raises(InputError) as raised:
        fedlora.run(Config(**values))
    assert str(raised.value) == message
    where = Path(values["output_dir"])
    assert not where.exists()  # a mistake in the input leaves nothing in the way
    argv = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    for more in ([], ["--dry_run"]):
        assert main(["run", *argv, *more]) == 2
        assert capsys.readouterr().err == f"fedlora: {message}\n"
        assert not where.exists()


@pytest.mark.parametrize(
    "method", in_turn([name for name in RULES if name not in NO_SERVER_STEP], 0)
)
def test_a_server_step_is_taken_by_all_others(quick: dict[str, Any], method: str) -> None:
    values = keys_for(quick, method)
    plain = watch(values, "plain", num_rounds=1)
    momentum = {} if method in NO_MOMENTUM else {"server_momentum": 0.5}
    half = watch(values, "half", server_learning_rate=0.5, **momentum)
    assert half.losses[2] < half.losses[0]
    assert half.losses[1] != plain.losses[1]
    assert all(math.isfinite(loss) for loss in half.losses)
    assert all(line["aggregation_error"] is None for line in half.rounds)
    if method in (*EXACT, "florist", "flexlora"):  # the sum is of products, or of one factor alone
        whole = plain.rounds[0]["update_norm"]
        assert half.rounds[0]["update_norm"] == pytest.approx(whole / 2, rel=1e-4)


@pytest.mark.parametrize("method", [name for name in EXACT if name not in NO_MOMENTUM])
def test_momentum_goes_on_in_the_same_direction(quick: dict[str, Any], method: str) -> None:
    """Where nothing is learnt in round 2, the model moves on by mu times its first move."""

    def once(model: Any, dataset: Any, training: LocalTraining) -> Mapping[str, Any]:
        return train(model, dataset, training) if training.round == 1 else {}

    run = watch(keys_for(quick, method, server_momentum=0.5), train_function=once)
    first, second = (global_delta(run.states[number]) for number in (1, 2))
    wanted = {n: scale(x, 1.5) for n, x in first.items()}
    apart = {n: subtract(second[n], x) for n, x in wanted.items()}
    assert total_norm(first) > 0
    assert total_norm(apart) < 1e-4 * total_norm(first)


@pytest.mark.parametrize("method", in_turn(RULES, 1))
def test_ranks_above_the_width_of_a_layer(quick: dict[str, Any], method: str) -> None:
    spy = Spy()
    ranks = ranks_for(method, [40, 36, 20, 2], 40)
    values = {**quick, "method": method, "client_ranks": ranks, "learning_rate": 3e-3}
    run = watch(values, train_function=spy)
    assert run.losses[2] < run.losses[0]
    assert all(math.isfinite(line["update_norm"]) for line in run.rounds)
    for number, k in spy.began:
        assert {x.rank for x in spy.began[number, k].values()} == {ranks[k]}
        assert finite(spy.ended[number, k])
        assert finite(run.got[number, k].adapter)
    if method in EXACT:
        assert max(line["aggregation_error"] for line in run.rounds) < 1e-5
    rows_of = evaluation_rows(run.config.model_dump())
    if method != PERSONAL:
        found = loss_of(quick["model_name_or_path"], run.result.final_dir, rows_of)
        assert found == pytest.approx(run.losses[2], rel=1e-5)
    if method == "fedsvd":
        for state in run.states.values():
            for x in state.adapter.values():
                gram = x.A @ x.A.T  # orthonormal rows, and zeros beyond the width
                used = min(x.rank, x.shape[1])
                wanted = torch.diag((torch.arange(x.rank) < used).float())
                torch.testing.assert_close(gram, wanted, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Given:
    """An adapter to go on from, and its loss on the held-out rows of `quick`."""

    path: Path
    rank: int
    data: Sequence[Tokens]
    loss: float


@pytest.fixture(scope="module", params=[3, 12])
def given(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    site_files: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Given:
    """An adapter of PEFT's own of this rank, of q_proj and up_proj alone."""
    base, path = str(tiny_llama), tmp_path_factory.mktemp("given") / "adapter"
    modules = ["q_proj", "up_proj"]
    given_adapter(base, path, r=request.param, lora_alpha=7, target_modules=modules)
    files = {"train_file": site_files / "site_*.jsonl", "eval_file": site_files / "eval.jsonl"}
    data = evaluation_rows({"model_name_or_path": base, **{k: str(x) for k, x in files.items()}})
    return Given(path, request.param, data, loss_of(base, path, data))


@pytest.mark.parametrize("method", in_turn(RULES, 2))
def test_going_on_from_an_adapter(quick: dict[str, Any], given: Given, method: str) -> None:
    """Round 0 is the adapter, whatever its rank; whoever learns nothing stays at it.

    With fedsa every client begins with the adapter's B as its own, and goes on from there.
    """
    values = keys_for(quick, method, init_adapter=str(given.path), num_rounds=1)
    run = watch(values, max_steps=6)
    assert run.losses[0] == pytest.approx(given.loss, rel=1e-5)
    assert run.losses[1] < given.loss
    if method == PERSONAL:
        assert all(x["loss"] == pytest.approx(given.loss) for x in _each(run.result.metrics[1]))
    if given.rank > 4 and method in ("flexlora", "raflora"):
        return  # clients hold of it what their rank affords
    idle = watch(values, "idle", client_ranks=4, train_function=nothing)
    assert idle.losses == pytest.approx([given.loss] * 2, rel=1e-5)
    found = loss_of(quick["model_name_or_path"], idle.finals()[0], given.data)
    assert found == pytest.approx(given.loss, rel=1e-5)


def _each(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(line["client_evaluations"].values())


@pytest.fixture(scope="module")
def narrow_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with layers of 4 to 16 rows and columns: ranks exceed them, factors outgrow them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("narrow") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.mark.parametrize("present", [None, 3], ids=["all", "three"])
@pytest.mark.parametrize("method", in_turn(RULES, 3))
def test_factors_larger_than_a_layer_beside_clients_that_leave_layers_out(
    method: str, present: int | None, narrow_llama: Path, site_files: Path, tmp_path: Path
) -> None:
    """`r (m + n) > m n` for most layers; one client trains a few layers alone, and may be absent.

    Exact rules change the global model by `sum_k p_k (M_k - M_k_start)`, in float64 from what was
    sent; a run resumed after round 2 ends with the same bytes.
    """
    values: dict[str, Any] = {
        "model_name_or_path": str(narrow_llama),
        "train_file": str(site_files / "site_*.jsonl"),
        "method": method,
        "client_ranks": ranks_for(method, (8, 4, 2, 12), equal=8),
        "client_overrides": {1: {"lora_target_modules": ["q_proj", "up_proj"]}},
        "clients_per_round": present,
        "num_rounds": 3,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "num_threads": 1,
        "dtype": "float32",
        "output_dir": str(tmp_path / "whole"),
    }

    def copy(done: RoundResult) -> None:
        """What a run that was killed after round 2 has left."""
        if done.record.round == 2:
            shutil.copytree(tmp_path / "whole", tmp_path / "killed")

    seen = watch(values, "whole", callbacks=[copy])
    shapes = {name: tuple(shape) for name, shape in seen.result.metrics[0]["modules"].items()}
    assert any(12 * (m + n) > m * n for m, n in shapes.values())
    rule, options = METHODS[method], seen.config.rule_options()
    for number, line in enumerate(seen.rounds, 1):
        if method not in EXACT:
            continue
        before, after = seen.states[number - 1], seen.states[number]
        for name, shape in shapes.items():
            wanted = torch.zeros(shape, dtype=torch.float64)
            for one in line["clients"]:
                sent = seen.sent[number, one["client"]]
                start = client_start(sent, Agreement(rule, options, shapes, seen.config.seed))
                got = seen.got[number, one["client"]]
                if name not in got.adapter:
                    assert one["client"] == 1
                    continue
                began, ended = start.adapter[name], got.adapter[name]
                a = ended.A if "A" in got.sends else began.A
                b = ended.B if "B" in got.sends else began.B
                learnt = b.double() @ a.double() - began.B.double() @ began.A.double()
                wanted += one["weight"] * learnt
            change = torch.zeros(shape, dtype=torch.float64)
            for state, sign in ((after, 1), (before, -1)):
                for part in (state.base_delta, state.adapter):
                    if name in part:
                        x = part[name]
                        factors = isinstance(x, LowRank)
                        change += sign * (x.B.double() @ x.A.double() if factors else x.W.double())
            assert float((change - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-7, name
        assert line["aggregation_error"] < 1e-5
    assert all(math.isfinite(one["metrics"]["loss"]) for r in seen.rounds for one in r["clients"])

    resumed = fedlora.run(resume=tmp_path / "killed")
    for ours, theirs in zip(
        sorted(resumed.final_dir.rglob(WEIGHTS)),
        sorted(seen.result.final_dir.rglob(WEIGHTS)),
        strict=True,
    ):
        assert ours.read_bytes() == theirs.read_bytes()
