"""Every aggregation rule against its paper's formula, written out in dense float64 numpy.

A simulated federation is driven through the server; what the global model, the next starts and the
merged side must be is then computed from the clients' matrices alone, by none of the package's
algebra. Further oracles: PEFT's own sums of adapters, arithmetic done by hand, and the errors of
public implementations, each shown to give another result.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fedlora.adapters.aggregate import aggregate
from fedlora.adapters.saved_adapter import load_adapter, write_adapter
from fedlora.client.local_run import tail_penalty
from fedlora.client.local_training import LocalTraining
from fedlora.client.trainer import train
from fedlora.client.worker import Worker
from fedlora.config.config import Config
from fedlora.data.datasets import ClientData
from fedlora.errors import InputError
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import Agreement, client_start, global_delta
from fedlora.federation.messages import ClientState, ClientUpdate
from fedlora.federation.participants import Federation
from fedlora.federation.records import RoundRecord
from fedlora.federation.server import Server, initial_state
from fedlora.lowrank import Delta, Deltas, Dense, LowRank, fold, scaling
from fedlora.methods import METHODS
from fedlora.methods.values import RoundNumbers, Start, Training
from fedlora.model.lora_layer import AdapterLayer
from fedlora.model.targets import find_targets
from support.models import give, load_base

Matrix = NDArray[np.float64]


Pair = tuple[Matrix, Matrix]
"""`A (r, n)`, `B (m, r)`."""


# Ranks above the height of `gate` and the width of `narrow`; `wide` stays as factors.
SHAPES = {"gate": (4, 9), "narrow": (9, 3), "square": (8, 8), "wide": (40, 40)}


MIXED = (2, 5, 3, 5)


EQUAL = (5, 5, 5, 5)


ROWS = (10, 30, 20, 40)


ALWAYS = [name for name, rule in METHODS.items() if rule.exact_when == "always"]


SHARED_RANK = [name for name, rule in METHODS.items() if not rule.mixed_ranks]


def array(x: torch.Tensor) -> Matrix:
    return x.detach().numpy().astype(np.float64)


def tensor(x: Matrix) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def pair(x: Delta) -> Pair:
    assert isinstance(x, LowRank)
    return array(x.A), array(x.B)


def product(x: Pair) -> Matrix:
    a, b = x
    return b @ a


def matrix(x: Delta) -> Matrix:
    return array(x.W) if isinstance(x, Dense) else product(pair(x))


def first(x: Pair, rank: int) -> Pair:
    return x[0][:rank], x[1][:, :rank]


def padded(x: Pair, rank: int) -> Pair:
    """Zeros below A and to the right of B."""
    a, b = x
    return (
        np.vstack([a, np.zeros((rank - len(a), a.shape[1]))]),
        np.hstack([b, np.zeros((b.shape[0], rank - b.shape[1]))]),
    )


def directions(x: Matrix, begin: int, end: int) -> Matrix:
    """The singular directions `begin` to `end` of a matrix, as a matrix."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u[:, begin:end] * s[begin:end]) @ vt[begin:end]


def start_of_exact(x: Matrix, used: int, limit: float) -> Matrix:
    """The first `used` singular directions, with at most `limit` of each singular value."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u[:, :used] * np.minimum(s[:used], limit)) @ vt[:used]


def same(found: Matrix, wanted: Matrix, tolerance: float = 1e-11) -> None:
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= tolerance * (1 + np.linalg.norm(wanted))


def same_pair(found: Pair, wanted: Pair) -> None:
    same(found[0], wanted[0])
    same(found[1], wanted[1])


def apart(x: Matrix, y: Matrix, share: float = 0.05) -> bool:
    """Whether two matrices differ by more than a share of their size."""
    return bool(np.linalg.norm(x - y) > share * max(np.linalg.norm(x), np.linalg.norm(y)))


@dataclass(frozen=True)
class Turn:
    """What one client did in a round.

    `rest` lies frozen beside the start, module by module; `given` is the start as the server knows
    it, without what the client keeps for itself.
    """

    client: int
    p: float
    rank: int
    start: Mapping[str, Pair]
    rest: Mapping[str, Matrix]
    end: Mapping[str, Pair]
    given: Start
    update: ClientUpdate


def mean(turns: Sequence[Turn], values: Iterable[Matrix]) -> Matrix:
    """`sum_k p_k x_k`."""
    return np.sum([t.p * x for t, x in zip(turns, values, strict=True)], axis=0)


def learnt(turns: Sequence[Turn], name: str) -> Matrix:
    """`sum_k p_k (M_k - M_k_start)`."""
    return mean(turns, [product(t.end[name]) - product(t.start[name]) for t in turns])


@dataclass
class Simulation:
    """A federation whose clients move what they train by a random step."""

    server: Server
    own: dict[int, ClientState] = field(default_factory=dict)
    record: RoundRecord | None = None

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        return self.server.federation.shapes

    def factors(self) -> dict[str, Pair]:
        """The global adapter's."""
        return {name: pair(x) for name, x in self.server.state.adapter.items()}

    def matrices(self, deltas: Deltas) -> dict[str, Matrix]:
        return {
            name: matrix(deltas[name]) if name in deltas else np.zeros(shape)
            for name, shape in self.shapes.items()
        }

    def model(self) -> dict[str, Matrix]:
        """The global model's difference from the base."""
        return self.matrices(global_delta(self.server.state))

    def merged(self) -> dict[str, Matrix]:
        return self.matrices(self.server.state.base_delta)

    def play(
        self,
        absent: Sequence[int] = (),
        prune: Mapping[int, int] | None = None,
        same_a: bool = False,
    ) -> list[Turn]:
        """One round: clients that are `absent` never answer, others may `prune` to a rank."""
        server, spec = self.server, self.server.federation
        asked = server.plan()
        training: Training = server.agreement.training
        total = sum(spec.weight(spec.num_examples[k]) for k in asked if k not in absent)
        turns = []
        for k, sent in asked.items():
            if k in absent:
                server.reject(k, "no answer")
                continue
            start = client_start(sent, server.agreement, self.own.get(k))
            steps = np.random.default_rng([3, sent.round, k])
            common = np.random.default_rng([4, sent.round])
            trained, sends = training.trained(sent.round), training.sent(sent.round)
            end, adapter = {}, {}
            for name, x in start.adapter.items():
                a, b = pair(x)
                if "A" in trained:
                    a = a + 0.5 * (common if same_a else steps).standard_normal(a.shape)
                if "B" in trained:
                    b = b + 0.5 * steps.standard_normal(b.shape)
                end[name] = a, b = first((a, b), (prune or {}).get(k, len(a)))
                # As a worker sends it: nothing of a factor that stays at home.
                adapter[name] = LowRank(
                    tensor(a if "A" in sends else 0 * a), tensor(b if "B" in sends else 0 * b)
                )
            if training.keeps == "B":
                self.own[k] = ClientState({f"{n}.B": tensor(b) for n, (_, b) in end.items()})
            update = ClientUpdate(k, sent.round, adapter, spec.num_examples[k], sends=sends)
            assert server.accept(update) == ""
            turns.append(
                Turn(
                    client=k,
                    p=spec.weight(spec.num_examples[k]) / total,
                    rank=sent.rank,
                    start={n: pair(x) for n, x in start.adapter.items()},
                    rest=self.matrices(start.frozen),
                    end=end,
                    given=client_start(sent, server.agreement),
                    update=update,
                )
            )
        self.record = server.commit()
        return turns

    def rounds(self, number: int = 3) -> Iterator[list[Turn]]:
        """So many rounds, in which not always the same clients take part."""
        seen: set[tuple[int, ...]] = set()
        for _ in range(number):
            turns = self.play()
            seen.add(tuple(t.client for t in turns))
            yield turns
        if self.server.federation.clients_per_round is not None:
            assert len(seen) > 1, "the same clients in every round: choose another seed"


def simulate(
    method: str,
    ranks: Sequence[int],
    clients_per_round: int | None = None,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    client_weights: Any = "examples",
    rows: Sequence[int] = ROWS,
    **options: Any,
) -> Simulation:
    rule = METHODS[method]
    federation = Federation(
        ranks,
        rows[: len(ranks)],
        Agreement(rule, rule.options(**options), shapes, 11),
        clients_per_round,
        client_weights,
    )
    state = initial_state(federation)
    wide = {n: LowRank(tensor(a), tensor(b)) for n, (a, b) in _pairs(state.adapter)}
    state = replace(state, adapter=wide)
    return Simulation(Server(federation, state, Mean()))


def _pairs(adapter: Deltas) -> list[tuple[str, Pair]]:
    return [(name, pair(x)) for name, x in adapter.items()]


def test_fedit_averages_a_and_b() -> None:
    sim = simulate("fedit", EQUAL, 3)
    now = sim.factors()
    for turns in sim.rounds():
        for name in SHAPES:
            for t in turns:
                same_pair(t.start[name], now[name])
                assert not t.rest[name].any()
            now[name] = (
                mean(turns, [t.end[name][0] for t in turns]),
                mean(turns, [t.end[name][1] for t in turns]),
            )
            same_pair(sim.factors()[name], now[name])
        assert not sim.server.state.base_delta


def test_zero_pad_averages_padded_factors_and_cuts_them_for_each_client() -> None:
    sim = simulate("zero_pad", MIXED, 3)
    now = sim.factors()
    for turns in sim.rounds():
        for name in SHAPES:
            for t in turns:
                assert t.rank == MIXED[t.client]
                same_pair(t.start[name], first(now[name], t.rank))
            now[name] = (
                mean(turns, [padded(t.end[name], 5)[0] for t in turns]),
                mean(turns, [padded(t.end[name], 5)[1] for t in turns]),
            )
            same_pair(sim.factors()[name], now[name])
        assert not sim.server.state.base_delta


def test_ffa_averages_b_under_one_a() -> None:
    for ranks in (EQUAL, MIXED):
        sim = simulate("ffa", ranks, 3)
        frozen, now = sim.factors(), sim.factors()
        for turns in sim.rounds():
            for name in SHAPES:
                a, b = now[name]
                wanted = b.copy()
                for t in turns:
                    same_pair(t.start[name], first((a, b), t.rank))
                    assert t.update.sends == "B"
                    assert np.array_equal(t.end[name][0], frozen[name][0][: t.rank])
                    # Padding: what a client does not train does not change.
                    wanted[:, : t.rank] += t.p * (t.end[name][1] - b[:, : t.rank])
                if ranks == EQUAL:
                    same(wanted, mean(turns, [t.end[name][1] for t in turns]))
                now[name] = frozen[name][0], wanted
                same_pair(sim.factors()[name], now[name])
                assert np.array_equal(sim.factors()[name][0], frozen[name][0])


def test_rolora_averages_b_in_odd_rounds_and_a_in_even_ones() -> None:
    sim = simulate("rolora", EQUAL, 3)
    now = sim.factors()
    for number, turns in enumerate(sim.rounds(4), 1):
        for name in SHAPES:
            a, b = now[name]
            for t in turns:
                assert t.update.sends == ("B" if number % 2 else "A")
                same_pair(t.start[name], (a, b))
                frozen = 0 if number % 2 else 1
                assert np.array_equal(t.end[name][frozen], t.start[name][frozen])
            if number % 2:
                now[name] = a, mean(turns, [t.end[name][1] for t in turns])
            else:
                now[name] = mean(turns, [t.end[name][0] for t in turns]), b
            same_pair(sim.factors()[name], now[name])


def test_fedsa_averages_a_and_leaves_every_b_at_its_client() -> None:
    sim = simulate("fedsa", EQUAL, 2)
    a = {name: x[0] for name, x in sim.factors().items()}
    own: dict[int, dict[str, Matrix]] = {}
    returned = 0
    for number, turns in enumerate(sim.rounds(5), 1):
        for t in turns:
            returned += t.client in own and number > 1
            for name, (m, _) in SHAPES.items():
                # The personal model: the present A, the client's own B of when it last trained.
                kept = own.get(t.client, {}).get(name, np.zeros((m, 5)))
                same_pair(t.start[name], (a[name], kept))
                assert t.update.sends == "A"
                assert not t.update.adapter[name].B.any()
            own[t.client] = {name: t.end[name][1] for name in SHAPES}
        for name in SHAPES:
            a[name] = mean(turns, [t.end[name][0] for t in turns])
            same(sim.factors()[name][0], a[name])
            assert not sim.factors()[name][1].any()
        assert all(not x.any() for x in sim.model().values()), "there is no global model"
    assert returned > 1
    # B never travels.
    sent = sim.server.plan()
    assert {b.nbytes for b in sent.values()} == {8 * sum(5 * n for _, n in SHAPES.values())}
    assert {t.update.nbytes for t in turns} == {8 * sum(5 * n for _, n in SHAPES.values())}


@pytest.mark.parametrize("client_weights", ["examples", "uniform"])
def test_hetlora_weighs_padded_factors_by_the_norm_of_the_product(client_weights: str) -> None:
    sim = simulate("hetlora", MIXED, 3, client_weights=client_weights)
    now = sim.factors()
    for turns in sim.rounds():
        for name in SHAPES:
            weights = np.array([np.linalg.norm(product(t.end[name])) for t in turns])
            if client_weights == "examples":  # else the paper's weights: the norms alone
                weights *= [ROWS[t.client] for t in turns]
            weights /= weights.sum()
            for t in turns:
                same_pair(t.start[name], first(now[name], t.rank))
            pads = [padded(t.end[name], 5) for t in turns]
            now[name] = (
                np.sum([w * a for w, (a, _) in zip(weights, pads, strict=True)], axis=0),
                np.sum([w * b for w, (_, b) in zip(weights, pads, strict=True)], axis=0),
            )
            same_pair(sim.factors()[name], now[name])
        assert not sim.server.state.base_delta


def test_hetlora_goes_on_with_pruned_ranks() -> None:
    sim = simulate("hetlora", MIXED)
    sim.play()
    turns = sim.play(prune={1: 4, 2: 2})
    name = "wide"
    weights = np.array([t.p * np.linalg.norm(product(t.end[name])) for t in turns])
    pads = [padded(t.end[name], 5) for t in turns]
    assert [t.end[name][0].shape[0] for t in turns] == [2, 4, 2, 5]
    a = np.sum([w * x[0] for w, x in zip(weights, pads, strict=True)], axis=0) / weights.sum()
    b = np.sum([w * x[1] for w, x in zip(weights, pads, strict=True)], axis=0) / weights.sum()
    same_pair(sim.factors()[name], (a, b))
    # The global adapter keeps the federation's rank; client 3 still has all of it.
    sent = sim.server.plan()
    assert {k: x.rank for k, x in sent.items()} == {0: 2, 1: 4, 2: 2, 3: 5}
    assert {k: x.adapter[name].rank for k, x in sent.items()} == {0: 2, 1: 4, 2: 2, 3: 5}
    # A rank never grows again.
    k = 1
    grown = ClientUpdate(
        k, 3, {n: LowRank(torch.ones(5, c), torch.ones(r, 5)) for n, (r, c) in SHAPES.items()}, 1
    )
    with pytest.raises(ValueError, match="ranks other than"):
        sim.server.accept(grown)


@pytest.mark.parametrize("method", ["zero_pad", "hetlora"])
def test_padding_with_small_clients_alone_empties_the_tail(method: str) -> None:
    """Zeros are averaged too; exact only where the largest rank takes part alone."""
    sim = simulate(method, MIXED)
    sim.play()
    turns = sim.play(absent=(1, 2, 3))
    for name in SHAPES:
        same_pair(sim.factors()[name], padded(turns[0].end[name], 5))
    assert sim.record is not None
    assert sim.record.aggregation_error is not None
    assert sim.record.aggregation_error > 0.1


def test_hetlora_stays_where_nobody_has_learnt_anything() -> None:
    sim = simulate("hetlora", MIXED)
    before = sim.factors()
    for k, sent in sim.server.plan().items():
        zero = {n: LowRank(2 * x.A, x.B) for n, x in sent.leading.items()}  # B = 0: norm 0
        sim.server.accept(ClientUpdate(k, 1, zero, ROWS[k]))
    sim.server.commit()
    for name in SHAPES:
        same_pair(sim.factors()[name], before[name])


def layers(rank: int, scale: float, seed: int) -> tuple[nn.Module, list[Pair]]:
    """Two adapter layers; the pairs are what LoRA trains, without its scale."""
    rng = np.random.default_rng(seed)
    found, pairs = [], []
    for m, n in ((6, 7), (4, 5)):
        a, b = rng.standard_normal((rank, n)), rng.standard_normal((m, rank))
        layer = AdapterLayer(nn.Linear(n, m, bias=False).double())
        give(layer, [], LowRank(tensor(a), tensor(scale * b)), scale, 0.0)
        found.append(layer)
        pairs.append((a, b))
    return nn.Sequential(*found), pairs


def terms(model: Any) -> list[Any]:
    return [term for layer in model for term in layer.clients]


@pytest.mark.parametrize(("rank", "share", "begin"), [(4, 0.5, 2), (4, 0.99, 3), (3, 0.5, 1)])
def test_hetloras_penalty_and_its_gradient(rank: int, share: float, begin: int) -> None:
    scale, weight = 1.7, 0.3
    model, pairs = layers(rank, scale, 1)
    penalty = tail_penalty(terms(model), LocalTraining(tail_penalty=weight, tail_from=share))
    wanted = weight * sum(
        np.linalg.norm(scale * b[:, begin:]) * np.linalg.norm(a[begin:]) for a, b in pairs
    )
    assert float(penalty.detach()) == pytest.approx(wanted, rel=1e-12)
    penalty.backward()
    for layer, (a, b) in zip(model, pairs, strict=True):
        size_a, size_b = np.linalg.norm(a[begin:]), np.linalg.norm(b[:, begin:])
        of_a, of_b = np.zeros_like(a), np.zeros_like(b)
        of_a[begin:] = weight * scale * size_b * a[begin:] / size_a
        of_b[:, begin:] = weight * scale * size_a * b[:, begin:] / size_b
        same(array(layer.A.grad), of_a)
        same(array(layer.B.grad), of_b)


def test_hetloras_penalty_has_a_gradient_at_zero_and_without_a_tail() -> None:
    for share, empty_b in ((0.5, True), (1.0, False)):
        model, _ = layers(4, 2.0, 2)
        for layer in model:
            if empty_b:
                layer.B.data.zero_()
        penalty = tail_penalty(terms(model), LocalTraining(tail_penalty=0.1, tail_from=share))
        assert float(penalty.detach()) == 0.0
        penalty.backward()
        for layer in model:
            for p in (layer.A, layer.B):
                assert p.grad is None or bool(torch.isfinite(p.grad).all())
                assert p.grad is None or not p.grad.any()


def random_updates(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            0.3 * torch.randn(rank, n, generator=g), 0.3 * torch.randn(m, rank, generator=g)
        )
        for name, (m, n) in shapes.items()
    }


def test_the_local_loss_holds_hetloras_penalty_and_training_shrinks_the_tail(
    tiny_llama: Path,
) -> None:
    base = load_base(str(tiny_llama), target_modules=["q_proj", "v_proj"])
    adapter = random_updates(base.targets.shapes, 4, 1)
    rows = [{"input_ids": [5, 9, 7, 12], "labels": [-100, 9, 7, 12]}]
    begin, losses, tails = 2, [], []
    for weight in (0.0, 0.5):
        base.load([], adapter, 2.0)
        training = LocalTraining(
            learning_rate=5e-3, max_steps=10, tail_penalty=weight, tail_from=0.5, max_grad_norm=0.0
        )
        losses.append(train(base.model, rows, training)["loss_first"])
        ends = [pair(x) for x in base.read_adapter().values()]
        tails.append(sum(np.linalg.norm(b[:, begin:]) * np.linalg.norm(a[begin:]) for a, b in ends))
    began = [pair(x) for x in adapter.values()]
    at_first = sum(np.linalg.norm(b[:, begin:]) * np.linalg.norm(a[begin:]) for a, b in began)
    assert losses[1] - losses[0] == pytest.approx(0.5 * at_first, rel=1e-5)
    assert tails[1] < 0.99 * at_first
    assert tails[1] < 0.99 * tails[0]


def test_a_hetlora_client_prunes_where_its_tail_has_shrunk(tiny_llama: Path) -> None:
    targets = ["q_proj", "v_proj"]
    base = load_base(str(tiny_llama), target_modules=targets)
    config = Config(
        model_name_or_path=str(tiny_llama),
        lora_target_modules=targets,
        method="hetlora",
        rank_decay=0.5,
        use_rslora=True,
    )
    ranks, shapes = [1, 3, 4, 4], base.targets.shapes
    factor = {0: 0.5, 1: 0.5, 2: 2.0, 3: 0.9}  # what a client's tail becomes

    def local(model: Any, rows: Any, training: LocalTraining) -> dict[str, Any]:
        assert training.tail_penalty == 1e-3
        assert training.tail_from == 0.5
        for layer in model.modules():
            if isinstance(layer, AdapterLayer):
                assert layer.A is not None
                begin = len(layer.A) // 2
                # One layer grows: the sum over all modules decides.
                grows = 1.01 if layer is model.get_submodule(next(iter(shapes))) else 1.0
                layer.B.data[:, begin:] *= factor[training.client] * grows
        return {}

    agreement = Agreement(METHODS["hetlora"], config.rule_options(), shapes, 3)
    federation = Federation(ranks, [1, 1, 1, 1], agreement)
    clients = dict.fromkeys(range(4), ClientData([{"input_ids": [5, 6], "labels": [5, 6]}]))
    worker = Worker(base, clients, config, agreement, local)
    # Before anything is learnt every tail is 0 and nobody prunes.
    server = Server(federation, initial_state(federation), Mean())
    for sent in server.plan().values():
        assert all(x.rank == sent.rank for x in worker.handle(sent).adapter.values())
    state = replace(server.state, adapter=random_updates(shapes, 4, 5))
    server = Server(federation, state, Mean())
    for sent in server.plan().values():
        assert server.accept(worker.handle(sent)) == ""
    server.commit()
    # gamma r, rounded down, and at least 1.
    assert {k: sent.rank for k, sent in server.plan().items()} == {0: 1, 1: 1, 2: 4, 3: 2}


@pytest.mark.parametrize("constant", [None, 0.3])
def test_flora_merges_the_stack_and_starts_afresh(constant: float | None) -> None:
    sim = simulate("flora", MIXED, 3, scaling_factor=constant)
    wanted = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for turns in sim.rounds():
        for name in SHAPES:
            assert not any(t.start[name][1].any() or t.rest[name].any() for t in turns)
            p = {t.client: t.p if constant is None else constant for t in turns}
            stack_b = np.hstack([p[t.client] * t.end[name][1] for t in turns])
            stack_a = np.vstack([t.end[name][0] for t in turns])
            wanted[name] = wanted[name] + stack_b @ stack_a
            same(sim.merged()[name], wanted[name])
        assert not sim.server.state.adapter
        assert sim.record is not None
        assert [c.weight for c in sim.record.clients] == pytest.approx(list(p.values()))


@pytest.mark.parametrize("tau", [0.3, 0.8, 0.95, 0.999])
def test_florist_keeps_the_fewest_directions_of_the_stack(tau: float) -> None:
    sim = simulate("florist", MIXED, 3, energy_threshold=tau)
    wanted = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    dropped = 0
    for turns in sim.rounds():
        for name in SHAPES:
            assert not any(t.start[name][1].any() for t in turns)
            stack = mean(turns, [product(t.end[name]) for t in turns])
            energy = np.linalg.svd(stack, compute_uv=False) ** 2
            keep = next(p for p in range(99) if energy[:p].sum() >= tau * energy.sum())
            dropped += keep < np.linalg.matrix_rank(stack)
            wanted[name] = wanted[name] + directions(stack, 0, keep)
            same(sim.merged()[name], wanted[name], 1e-9)
        assert not sim.server.state.adapter
    assert dropped


def test_florist_keeps_all_at_one_and_is_flora_to_the_bit() -> None:
    florist, flora = (
        simulate("florist", MIXED, 3, energy_threshold=1.0),
        simulate("flora", MIXED, 3),
    )
    for turns, others in zip(florist.rounds(), flora.rounds(), strict=True):
        for t, o in zip(turns, others, strict=True):
            assert all(np.array_equal(t.end[n][0], o.end[n][0]) for n in SHAPES)
        for name, x in florist.merged().items():
            assert np.array_equal(x, flora.merged()[name])


def test_flexlora_sums_products_and_hands_out_leading_directions() -> None:
    sim = simulate("flexlora", MIXED, 3)
    whole = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    cut = 0
    for turns in sim.rounds():
        for name in SHAPES:
            for t in turns:
                same(product(t.start[name]), directions(whole[name], 0, t.rank), 1e-9)
                assert not t.rest[name].any()
                cut += np.linalg.matrix_rank(whole[name]) > t.rank
                a, b = t.start[name]
                used = np.linalg.norm(b, axis=0) > 0
                sizes = np.linalg.norm(a, axis=1)[used], np.linalg.norm(b, axis=0)[used]
                same(sizes[0], sizes[1])  # balanced
            whole[name] = mean(turns, [product(t.end[name]) for t in turns])
            same(sim.model()[name], whole[name], 1e-9)
        assert not sim.server.state.base_delta
    assert cut


def raflora_sum(turns: Sequence[Turn], name: str, before: Matrix, levels: Sequence[int]) -> Matrix:
    """Partition by partition, over the clients that train it; one that nobody trains stays."""
    out = np.zeros_like(before)
    for begin, end in zip([0, *levels[:-1]], levels, strict=True):
        having = [t for t in turns if t.rank >= end]
        share = sum(ROWS[t.client] for t in having)
        if not having:
            out += directions(before, begin, end)
        for t in having:
            a, b = t.end[name]
            out += ROWS[t.client] / share * b[:, begin:end] @ a[begin:end]
    return out


def test_raflora_weighs_every_partition_over_the_clients_that_train_it() -> None:
    sim = simulate("raflora", MIXED)
    whole = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    flex = []
    # Rank 5 is absent first when there is nothing to keep, then when there is.
    for absent in ((1, 3), (), (1, 3), (2,), (0, 1)):
        turns = sim.play(absent)
        for name in SHAPES:
            for t in turns:
                same(product(t.start[name]), directions(whole[name], 0, t.rank), 1e-9)
            wanted = raflora_sum(turns, name, whole[name], (2, 3, 5))
            whole[name] = wanted
            same(sim.model()[name], whole[name], 1e-9)
        flex.append(apart(whole["wide"], mean(turns, [product(t.end["wide"]) for t in turns])))
        assert not sim.server.state.base_delta
    assert all(flex), "FlexLoRA's sum would have passed"


def test_raflora_is_flexlora_at_equal_ranks() -> None:
    sim = simulate("raflora", EQUAL, 3)
    for _ in range(3):
        before = sim.server.state
        turns = sim.play()
        flexlora = METHODS["flexlora"]
        agreement = replace(sim.server.agreement, rule=flexlora, options=flexlora.options())
        federation = replace(sim.server.federation, agreement=agreement)
        other = Simulation(Server(federation, before, Mean()))
        other.server.plan()
        for t in turns:
            other.server.accept(t.update)
        other.server.commit()
        for name, x in sim.model().items():
            same(x, other.model()[name])


@pytest.mark.parametrize("ranks", [MIXED, EQUAL])
def test_fedmomentum_trains_the_leading_directions_and_merges_the_others(
    ranks: Sequence[int],
) -> None:
    sim = simulate("fedmomentum", ranks, 3)
    adapter = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    merged = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for turns in sim.rounds():
        for name in SHAPES:
            for t in turns:
                same(product(t.start[name]), directions(adapter[name], 0, t.rank), 1e-9)
                same(t.rest[name], directions(adapter[name], t.rank, 99), 1e-9)
            total = adapter[name] + learnt(turns, name)
            adapter[name] = directions(total, 0, 5)
            merged[name] = merged[name] + total - adapter[name]
            same(product(sim.factors()[name]), adapter[name], 1e-9)
            same(sim.merged()[name], merged[name], 1e-9)
            # Nothing is lost.
            same(sim.model()[name], adapter[name] + merged[name])
        a, b = sim.factors()["wide"]
        same(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0))
    assert np.linalg.norm(merged["wide"]) > 1


@pytest.mark.parametrize(
    ("fraction", "cap"), [(0.0, 0.67), (0.75, 0.67), (1.0, 0.67), (0.75, None), (1.0, 0.1)]
)
def test_exact_adds_what_was_learnt_to_the_whole(fraction: float, cap: float | None) -> None:
    sim = simulate("exact", MIXED, 3, start_fraction=fraction, start_cap=cap)
    whole = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    used = {2: round(2 * fraction), 3: round(3 * fraction), 5: round(5 * fraction)}
    shortened = 0
    for turns in sim.rounds():
        for name in SHAPES:
            for t in turns:
                limit = float("inf") if cap is None else cap / t.rank
                start = start_of_exact(whole[name], used[t.rank], limit)
                same(product(t.start[name]), start, 1e-9)
                same(t.rest[name], whole[name] - start, 1e-9)
                shortened += not np.allclose(start, directions(whole[name], 0, used[t.rank]))
                a, b = t.start[name]
                assert a.shape[0] == t.rank
                assert (np.linalg.norm(a, axis=1) > 0).all()
                # Rows are as long as fresh ones are in the mean, and columns are bounded.
                there = np.linalg.norm(b, axis=0) > 0
                same(np.linalg.norm(a[there], axis=1), np.full(there.sum(), 3**-0.5), 1e-9)
                assert (np.linalg.norm(b, axis=0) <= limit * 3**0.5 * (1 + 1e-12)).all()
            whole[name] = whole[name] + learnt(turns, name)
            same(sim.model()[name], whole[name])
        assert not sim.server.state.base_delta
    assert bool(shortened) == (cap is not None and fraction > 0)


@pytest.mark.parametrize("ranks", [EQUAL, MIXED])
def test_fedex_averages_factors_and_merges_the_residual(ranks: Sequence[int]) -> None:
    sim = simulate("fedex", ranks, 3)
    now = sim.factors()
    merged = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for turns in sim.rounds():
        for name in SHAPES:
            a, b = now[name]
            tails = {t.client: b[:, t.rank :] @ a[t.rank :] for t in turns}
            for t in turns:
                same_pair(t.start[name], first((a, b), t.rank))
                same(t.rest[name], tails[t.client])
            # The tail counts as the client's own in both sums.
            now[name] = (
                mean(turns, [np.vstack([t.end[name][0], a[t.rank :]]) for t in turns]),
                mean(turns, [np.hstack([t.end[name][1], b[:, t.rank :]]) for t in turns]),
            )
            wanted = mean(turns, [product(t.end[name]) + tails[t.client] for t in turns])
            merged[name] = merged[name] + wanted - product(now[name])
            same_pair(sim.factors()[name], now[name])
            same(sim.merged()[name], merged[name])
            same(sim.model()[name], merged[name] + product(now[name]))


def test_fedex_without_the_frozen_tail_is_wrong_from_the_second_round() -> None:
    """`sum_k p_k M_k - B A`, the paper's residual, forgets what small clients held frozen."""
    sim = simulate("fedex", MIXED)
    errors = []
    for _ in range(3):
        before, (a, b) = sim.model(), sim.factors()["wide"]
        turns = sim.play()
        change = learnt(turns, "wide")
        same(sim.model()["wide"] - before["wide"], change)
        missing = mean(turns, [b[:, t.rank :] @ a[t.rank :] for t in turns])
        naive = sim.model()["wide"] - missing
        errors.append(np.linalg.norm(naive - before["wide"] - change) / np.linalg.norm(change))
    assert errors[0] < 1e-12  # B = 0: there is no tail
    assert min(errors[1:]) > 0.03


def test_fedsvd_averages_b_and_takes_an_orthonormal_a_from_the_product() -> None:
    sim = simulate("fedsvd", EQUAL, 3)
    now = sim.factors()
    for turns in sim.rounds():
        for name, (m, n) in SHAPES.items():
            for t in turns:
                same_pair(t.start[name], now[name])
                assert np.array_equal(t.end[name][0], t.start[name][0])
                assert t.update.sends == "B"
            wanted = mean(turns, [t.end[name][1] for t in turns]) @ now[name][0]
            a, b = now[name] = sim.factors()[name]
            # Refactoring leaves the product as it is; the rank stays, whatever the layer's width.
            same(b @ a, wanted)
            assert a.shape == (5, n)
            assert b.shape == (m, 5)
            there = min(5, n)
            same(a @ a.T, np.diag([1.0] * there + [0.0] * (5 - there)))
            same(b.T @ b, np.diag(np.diag(b.T @ b)))
            values = np.linalg.svd(wanted, compute_uv=False)[: min(5, m, n)]
            same(np.linalg.norm(b, axis=0)[: len(values)], values)
        assert not sim.server.state.base_delta


def test_fedsvd_starts_from_an_orthonormal_a_and_no_b() -> None:
    for name, (a, b) in simulate("fedsvd", EQUAL).factors().items():
        there = min(5, SHAPES[name][1])
        same(a @ a.T, np.diag([1.0] * there + [0.0] * (5 - there)), 1e-5)
        assert not b.any()


@pytest.mark.parametrize("penalty", [0.0, 0.01, 3.0])
def test_lora_fair_is_a_ridge_regression_on_the_mean_of_the_products(penalty: float) -> None:
    sim = simulate("lora_fair", EQUAL, 3, correction_penalty=penalty)
    now = sim.factors()
    for turns in sim.rounds():
        for name, (m, n) in SHAPES.items():
            for t in turns:
                same_pair(t.start[name], now[name])
            a = mean(turns, [t.end[name][0] for t in turns])
            b = mean(turns, [t.end[name][1] for t in turns])
            missed = mean(turns, [product(t.end[name]) for t in turns]) - b @ a
            # min_D ||missed - D A||^2 + lambda ||D||^2, as one stacked least-squares problem.
            left = np.vstack([a.T, np.sqrt(penalty) * np.eye(5)])
            right = np.vstack([missed.T, np.zeros((5, m))])
            d = np.linalg.lstsq(left, right, rcond=None)[0].T
            found = sim.factors()[name]
            same(found[0], a)
            if n >= 5 or penalty:  # else D is not unique: the product is
                same(found[1], b + d, 1e-9)
            same(product(found), (b + d) @ a, 1e-9)
            # Never further from the mean of the products than the means of the factors are.
            assert np.linalg.norm(missed - (product(found) - b @ a)) <= np.linalg.norm(missed)
            if penalty == 0:  # what is left is orthogonal to the row space of A
                same((missed + b @ a - product(found)) @ a.T, np.zeros((m, 5)), 1e-8)
            now[name] = found
        assert not sim.server.state.base_delta


def test_lora_fair_lies_between_fedit_and_the_mean_of_the_products() -> None:
    errors = []
    for method, options in (
        ("lora_fair", {"correction_penalty": 0.0}),
        ("lora_fair", {"correction_penalty": 1.0}),
        ("lora_fair", {"correction_penalty": 1e9}),
        ("fedit", {}),
    ):
        sim = simulate(method, EQUAL, **options)
        sim.play()
        assert sim.record is not None
        errors.append(sim.record.aggregation_error)
    assert errors[0] < errors[1] < errors[2] <= errors[3]
    assert errors[2] == pytest.approx(errors[3], rel=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fedsa"])
def test_a_rule_is_exact_when_it_says_so(method: str) -> None:
    """The change of the global model against `sum_k p_k (M_k - M_k_start)`, and the record's."""
    rule = METHODS[method]
    sim = simulate(method, MIXED if rule.mixed_ranks else EQUAL, 3)
    errors = []
    for _ in range(3):
        before = sim.model()
        turns = sim.play()
        wanted = np.concatenate([learnt(turns, name).ravel() for name in SHAPES])
        found = np.concatenate([(sim.model()[name] - before[name]).ravel() for name in SHAPES])
        error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        assert sim.record is not None
        assert sim.record.aggregation_error == pytest.approx(error, rel=1e-6, abs=1e-6)
        errors.append(error)
    if method in ALWAYS:
        assert max(errors) < 1e-10
    else:
        assert max(errors) > 1e-3


@pytest.mark.parametrize(
    ("method", "ranks", "same_a", "options"),
    [
        ("fedit", EQUAL, True, {}),
        ("zero_pad", EQUAL, True, {}),
        ("lora_fair", EQUAL, True, {"correction_penalty": 0.0}),
        ("florist", MIXED, False, {"energy_threshold": 1.0}),
        ("hetlora", (5,), False, {}),
        ("flexlora", (40, 40), False, {}),
        ("raflora", (40, 40), False, {}),
    ],
)
def test_a_rule_is_exact_under_its_condition(
    method: str, ranks: Sequence[int], same_a: bool, options: dict[str, Any]
) -> None:
    sim = simulate(method, ranks, **options)
    for _ in range(3):
        before = sim.model()
        turns = sim.play(same_a=same_a)
        for name in SHAPES:
            same(sim.model()[name] - before[name], learnt(turns, name), 1e-9)


@pytest.mark.parametrize(
    "method",
    ["exact", "fedex", "fedmomentum", "fedsvd", "ffa", "flexlora", "flora", "florist", "rolora"],
)
def test_a_server_momentum_goes_on_the_same_way_or_is_refused(method: str) -> None:
    """With clients that learn nothing the model moves by mu times its last change.

    A velocity of factors means nothing in the next round if that has other directions.
    """
    options = {"energy_threshold": 1.0} if method == "florist" else {}
    plain = simulate(method, (40, 40), **options)
    federation = replace(plain.server.federation, server_momentum=0.5)
    agreement = federation.agreement
    try:
        server, refusal = Server(federation, plain.server.state, Mean()), ""
    except InputError as error:
        server, refusal = plain.server, str(error)
    if refusal:
        assert "server_momentum" in refusal
        return
    sim = Simulation(server)
    models = [sim.model()]
    sim.play()
    models.append(sim.model())
    for k, sent in server.plan().items():
        start = client_start(sent, agreement)
        sends = agreement.training.sent(2)
        server.accept(ClientUpdate(k, 2, start.adapter, ROWS[k], sends=sends))
    server.commit()
    models.append(sim.model())
    for name in SHAPES:
        before, after, last = (m[name] for m in models)
        same(last - after, 0.5 * (after - before), 1e-9)


@pytest.mark.parametrize("method", SHARED_RANK)
def test_mixed_ranks_are_refused_where_a_rule_cannot_combine_them(method: str) -> None:
    with pytest.raises(InputError, match=rf"method: {method} needs one rank.*2 5 3 5") as refused:
        simulate(method, MIXED)
    offered = str(refused.value).rpartition("(")[2].rstrip(")").split(", ")
    assert offered == [m for m in METHODS if METHODS[m].mixed_ranks]
    for other in offered:
        simulate(other, MIXED)


def encoded(sim: Simulation, turn: Turn) -> Any:
    """What the server makes of an update: what was not sent is what it started from."""
    sends = turn.update.sends
    start = {n: first(pair(turn.given.adapter[n]), len(a)) for n, (a, _) in turn.end.items()}
    kept = {
        n: LowRank(
            tensor(a if "A" in sends else start[n][0]), tensor(b if "B" in sends else start[n][1])
        )
        for n, (a, b) in turn.end.items()
    }
    widths = dict.fromkeys(kept, max(sim.server.federation.ranks))
    numbers = RoundNumbers(widths, sim.server.state.levels)
    agreement = sim.server.agreement
    return agreement.rule.encode(kept, turn.given, numbers, agreement.options)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_rule_encodes_is_what_it_declares(method: str) -> None:
    rule = METHODS[method]
    sim = simulate(method, MIXED if rule.mixed_ranks else EQUAL)
    training = sim.server.agreement.training
    for number in (1, 2):
        turns = sim.play()
        for turn in turns:
            found = encoded(sim, turn)
            kinds = [k for k in ("factors", "products") if getattr(found, k)]
            assert " and ".join(kinds) == rule.secure_sum
            sends = training.sent(number)
            assert turn.update.sends == sends
            for key, value in found.factors.items():
                if key.endswith((".A", ".B")) and method != "hetlora":
                    assert bool(value.any()) == (key[-1] in sends), key
            if "products" in kinds:
                assert sends == "AB"
    # Factors of one shape from every client, so that they can be summed under a mask.
    if rule.secure_sum == "factors":
        shapes = [{k: tuple(v.shape) for k, v in encoded(sim, t).factors.items()} for t in turns]
        assert all(s == shapes[0] for s in shapes)


def moved(update: ClientUpdate, factor: str) -> ClientUpdate:
    adapter = {
        n: LowRank(x.A + (factor == "A"), x.B + (factor == "B")) for n, x in update.adapter.items()
    }
    return replace(update, adapter=adapter)


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_counts_exactly_where_it_is_sent(method: str) -> None:
    sim = simulate(method, MIXED if METHODS[method].mixed_ranks else EQUAL)
    for _ in range(2):
        before, turns = sim.server.state, sim.play()
        after = [*sim.factors().values()] if method == "fedsa" else [*sim.model().values()]
        for factor in "AB":
            again = Simulation(Server(sim.server.federation, before, Mean()))
            again.server.plan()
            for t in turns:
                again.server.accept(moved(t.update, factor))
            again.server.commit()
            other = [*again.factors().values()] if method == "fedsa" else [*again.model().values()]
            equal = all(
                np.array_equal(x, y) for x, y in zip(_flat(after), _flat(other), strict=True)
            )
            assert equal == (factor not in turns[0].update.sends)


def _flat(values: Sequence[Any]) -> list[Matrix]:
    return [m for v in values for m in (v if isinstance(v, tuple) else (v,))]


def test_which_factors_every_rule_trains_and_sends() -> None:
    told = {}
    for name, rule in METHODS.items():
        training = rule.training(rule.options())
        told[name] = [(training.trained(r), training.sent(r)) for r in (1, 2, 3)]
    usual = [("AB", "AB")] * 3
    special = {
        "ffa": [("B", "B")] * 3,
        "fedsvd": [("B", "B")] * 3,
        "fedsa": [("AB", "A")] * 3,
        "rolora": [("B", "B"), ("A", "A"), ("B", "B")],
    }
    assert told == {name: special.get(name, usual) for name in METHODS}


def test_bytes_down_are_those_of_the_factors_a_client_lacks() -> None:
    a = 8 * sum(5 * n for _, n in SHAPES.values())
    b = 8 * sum(5 * m for m, _ in SHAPES.values())
    wanted = {
        "fedit": [a + b] * 3,
        "ffa": [b] * 3,
        "fedsa": [a] * 3,
        "fedsvd": [a + b] * 3,
        "rolora": [a + b, b, a],
        "lora_fair": [a + b] * 3,
    }
    for method, sizes in wanted.items():
        sim = simulate(method, EQUAL)
        found = []
        for _ in sizes:
            found.append({x.nbytes for x in sim.server.plan().values()})
            sim.play()
        assert found == [{size} for size in sizes], method


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_cites_its_paper_and_says_when_it_is_exact(method: str) -> None:
    rule = METHODS[method]
    text = " ".join((sys.modules[f"fedlora.methods.{method}"].__doc__ or "").split())
    numbers = re.findall(r"\d{4}\.\d{5}", rule.paper)
    assert numbers
    assert all(number in text for number in numbers)
    assert "Exact when" in text
    assert rule.title
    assert rule.title[0].islower()
    if rule.exact_when == "always":
        assert "Exact when: always" in text
    if not rule.mixed_ranks and rule.exact_when == "always":
        assert "one rank" in text


DEFAULTS: dict[str, dict[str, Any]] = {
    "exact": {"start_fraction": 0.75, "start_cap": 0.67, "max_rank": None},
    "hetlora": {"rank_penalty": 1e-3, "rank_decay": 0.99},
    "flora": {"scaling_factor": None},
    "florist": {"energy_threshold": 0.9},
    "lora_fair": {"correction_penalty": 0.01},
}


NAN, INF = float("nan"), float("inf")


IMPOSSIBLE = [
    ("exact", "start_fraction", (-0.1, 1.1, NAN)),
    ("exact", "start_cap", (0.0, -1.0, NAN, INF)),
    ("exact", "max_rank", (0, -1)),
    ("hetlora", "rank_penalty", (-1e-9, -1.0, NAN, INF)),
    ("hetlora", "rank_decay", (0.0, -0.5, 1.01, NAN)),
    ("flora", "scaling_factor", (0.0, -0.1, NAN, INF)),
    ("florist", "energy_threshold", (0.0, -0.1, 1.1, NAN)),
    ("lora_fair", "correction_penalty", (-0.01, NAN, INF)),
]


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_of_a_rules_options(method: str) -> None:
    options = METHODS[method].options
    found = {f.name: getattr(options(), f.name) for f in fields(options)}
    assert found == DEFAULTS.get(method, {})
    assert Config(method=method).rule_options() == options()
    text = options.__doc__ or ""
    assert all(f"{key}: " in text for key in found)


@pytest.mark.parametrize(
    ("method", "key", "value"), [(m, k, v) for m, k, values in IMPOSSIBLE for v in values]
)
def test_impossible_options_are_refused_by_name(method: str, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        METHODS[method].options(**{key: value})
    with pytest.raises(InputError, match=key):
        Config(method=method, **{key: value})


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("exact", "start_fraction", 0.0),
        ("exact", "start_cap", None),
        ("exact", "max_rank", 1),
        ("hetlora", "rank_penalty", 0.0),
        ("hetlora", "rank_decay", 1.0),
        ("flora", "scaling_factor", 0.1),
        ("florist", "energy_threshold", 1.0),
        ("lora_fair", "correction_penalty", 0.0),
    ],
)
def test_the_ends_of_an_options_range_are_allowed(method: str, key: str, value: Any) -> None:
    assert getattr(Config(method=method, **{key: value}).rule_options(), key) == value


TARGETS = ["q_proj", "v_proj", "down_proj"]


PEFT_RANKS, PEFT_ROWS = (4, 2, 3), (1, 2, 5)


PEFT_SHARES = [p / 8 for p in PEFT_ROWS]


def plain_model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def peft_adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with adapters of different rank, alpha and scale, and where they are saved."""
    configs = {
        "one": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
        "two": LoraConfig(r=2, lora_alpha=16, target_modules=TARGETS),
        "three": LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    }
    model = get_peft_model(plain_model(tiny_llama), configs["one"], adapter_name="one")
    for name in ("two", "three"):
        model.add_adapter(name, configs[name])
    g = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.2 * torch.randn(value.shape, generator=g)
    path = tmp_path_factory.mktemp("peft")
    model.save_pretrained(path)
    model.add_weighted_adapter(list(configs), PEFT_SHARES, "cat", combination_type="cat")
    model.add_weighted_adapter(
        list(configs), PEFT_SHARES, "svd", combination_type="svd", svd_rank=3
    )
    return model, path


def peft_deltas(model: Any, adapter: str) -> dict[str, Matrix]:
    """PEFT's own `s B A` of every module."""
    return {
        name.removeprefix("base_model.model."): array(module.get_delta_weight(adapter))
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A
    }


def peft_round(method: str, path: Path, shapes: Mapping[str, tuple[int, int]]) -> Server:
    """One round whose updates are the saved adapters."""
    rule = METHODS[method]
    federation = Federation(PEFT_RANKS, PEFT_ROWS, Agreement(rule, rule.options(), shapes))
    server = Server(federation, initial_state(federation), Mean())
    server.plan()
    for k, name in enumerate(("one", "two", "three")):
        update = load_adapter(path / name).deltas
        assert server.accept(ClientUpdate(k, 1, update, PEFT_ROWS[k])) == ""
    server.commit()
    return server


@pytest.mark.parametrize("method", ["flora", "exact", "flexlora", "fedex", "fedmomentum"])
def test_one_round_is_pefts_weighted_sum(method: str, peft_adapters: tuple[Any, Path]) -> None:
    model, path = peft_adapters
    wanted = peft_deltas(model, "cat")
    assert len(wanted) == 6
    parts = [peft_deltas(model, name) for name in ("one", "two", "three")]
    server = peft_round(method, path, {name: x.shape for name, x in wanted.items()})
    for name, x in global_delta(server.state).items():
        same(matrix(x), wanted[name], 1e-5)
        total = np.sum([p * d[name] for p, d in zip(PEFT_SHARES, parts, strict=True)], axis=0)
        same(matrix(x), total, 1e-5)


def test_a_rank_affords_what_pefts_svd_keeps(peft_adapters: tuple[Any, Path]) -> None:
    model, path = peft_adapters
    wanted = peft_deltas(model, "svd")
    server = peft_round("flexlora", path, {name: x.shape for name, x in wanted.items()})
    sent = server.plan()[2]
    assert sent.rank == 3
    start = client_start(sent, server.agreement)
    for name, x in start.adapter.items():
        same(matrix(x), wanted[name], 1e-5)
    adapters = [load_adapter(path / name) for name in ("one", "two", "three")]
    combined = aggregate(adapters, PEFT_SHARES, method="flora", rank=3)
    for name, x in combined.deltas.items():
        assert x.rank == 3
        same(matrix(x), wanted[name], 1e-5)


@pytest.mark.parametrize(("method", "adapter"), [("flora", "cat"), ("exact", "cat"), ("", "svd")])
def test_what_is_written_merges_into_the_same_weights(
    method: str, adapter: str, peft_adapters: tuple[Any, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    model, path = peft_adapters
    shapes = {name: x.shape for name, x in peft_deltas(model, "cat").items()}
    if method:
        found = global_delta(peft_round(method, path, shapes).state)
    else:
        parts = [load_adapter(path / name) for name in ("one", "two", "three")]
        found = aggregate(parts, PEFT_SHARES, rank=3).deltas
    targets = find_targets(plain_model(tiny_llama), TARGETS, str(tiny_llama))
    write_adapter(tmp_path / "ours", found, targets)
    ours = PeftModel.from_pretrained(plain_model(tiny_llama), tmp_path / "ours").merge_and_unload()
    model.save_pretrained(tmp_path / "theirs", selected_adapters=[adapter])
    theirs = PeftModel.from_pretrained(plain_model(tiny_llama), tmp_path / "theirs" / adapter)
    weights = theirs.merge_and_unload().state_dict()
    base = plain_model(tiny_llama).state_dict()
    changed = 0
    for name, value in ours.state_dict().items():
        same(array(value), array(weights[name]), 1e-5)
        changed += not torch.equal(value, base[name])
    assert changed == 6


def hand(method: str, a: Sequence[float], b: Sequence[float]) -> Server:
    """Two clients with as many rows each, p = 1/2; factor rules begin from `a`, `b`."""
    rule = METHODS[method]
    agreement = Agreement(rule, rule.options(), {"w": (2, 2)})
    federation = Federation([1, 1], [1, 1], agreement)
    state = initial_state(federation)
    if state.adapter:
        state = replace(state, adapter={"w": column_times_row(b, a)})
    return Server(federation, state, Mean())


def column_times_row(b: Sequence[float], a: Sequence[float]) -> LowRank:
    return LowRank(torch.tensor([list(a)]).double(), torch.tensor([[x] for x in b]).double())


def hand_round(server: Server, *updates: LowRank) -> None:
    number = server.state.round + 1
    server.plan()
    for k, update in enumerate(updates):
        server.accept(ClientUpdate(k, number, {"w": update}, 1))
    server.commit()


def numbers(x: Any) -> list[list[float]]:
    return [[round(float(v), 9) for v in row] for row in np.asarray(x)]


def whole_of(server: Server) -> list[list[float]]:
    return numbers(matrix(global_delta(server.state)["w"]))


# Round 1. Both begin with B = 0. M_1 = (2, 0)^T (4, 0) = [8 0; 0 0], M_2 = (0, 2)^T (0, 2) =
# [0 0; 0 4]. Wanted: (M_1 + M_2) / 2 = [4 0; 0 2].
ROUND_1 = column_times_row((2, 0), (4, 0)), column_times_row((0, 2), (0, 2))


def test_flora_by_hand() -> None:
    server = hand("flora", (1, 1), (0, 0))
    # The stack [2 0; 0 2]/2 [4 0; 0 2] is the wanted [4 0; 0 2]; all of it is merged.
    hand_round(server, *ROUND_1)
    assert whole_of(server) == [[4, 0], [0, 2]]
    assert not server.state.adapter
    # Both begin with B = 0 again. M_1 = (2, 0)^T (0, 4) = [0 8; 0 0], M_2 = (2, 4)^T (1, 0) =
    # [2 0; 4 0]. Their mean [1 4; 2 0] comes on top of [4 0; 0 2].
    hand_round(server, column_times_row((2, 0), (0, 4)), column_times_row((2, 4), (1, 0)))
    assert whole_of(server) == [[5, 4], [2, 2]]


def test_fedit_by_hand() -> None:
    server = hand("fedit", (1, 1), (0, 0))
    # A = ((4, 0) + (0, 2)) / 2 = (2, 1), B = (1, 1)^T: [2 1; 2 1], not the wanted [4 0; 0 2].
    hand_round(server, *ROUND_1)
    assert numbers(server.state.adapter["w"].A) == [[2, 1]]
    assert numbers(server.state.adapter["w"].B) == [[1], [1]]
    assert whole_of(server) == [[2, 1], [2, 1]]
    # From there client 1 trains B to (3, 1)^T, client 2 trains A to (4, 3).
    # A = ((2, 1) + (4, 3)) / 2 = (3, 2), B = ((3, 1) + (1, 1)) / 2 = (2, 1)^T: [6 4; 3 2].
    hand_round(server, column_times_row((3, 1), (2, 1)), column_times_row((1, 1), (4, 3)))
    assert whole_of(server) == [[6, 4], [3, 2]]


def test_fedex_by_hand() -> None:
    server = hand("fedex", (1, 1), (0, 0))
    # Factors as in fedit; [4 0; 0 2] - [2 1; 2 1] = [2 -1; -2 1] is merged.
    hand_round(server, *ROUND_1)
    assert numbers(matrix(server.state.adapter["w"])) == [[2, 1], [2, 1]]
    assert numbers(matrix(server.state.base_delta["w"])) == [[2, -1], [-2, 1]]
    assert whole_of(server) == [[4, 0], [0, 2]]
    # M_1 = (3, 1)^T (2, 1) = [6 3; 2 1], M_2 = (1, 1)^T (4, 3) = [4 3; 4 3], mean [5 3; 3 2]; the
    # factors' means give [6 4; 3 2]. Residual [-1 -1; 0 0], merged onto [2 -1; -2 1]: [1 -2; -2 1].
    hand_round(server, column_times_row((3, 1), (2, 1)), column_times_row((1, 1), (4, 3)))
    assert numbers(matrix(server.state.base_delta["w"])) == [[1, -2], [-2, 1]]
    # [4 0; 0 2] plus the mean of what was learnt, [5 3; 3 2] - [2 1; 2 1] = [3 2; 1 1].
    assert whole_of(server) == [[7, 2], [1, 3]]


def test_exact_by_hand() -> None:
    server = hand("exact", (1, 1), (0, 0))
    hand_round(server, *ROUND_1)
    assert whole_of(server) == [[4, 0], [0, 2]]
    # The leading direction of [4 0; 0 2] is [4 0; 0 0]. A client of rank 1 trains .67 of it, with a
    # row of length 3^-0.5 (up to the sign of both); the rest lies frozen beside it.
    sent = server.plan()[0]
    start = client_start(sent, server.agreement)
    root = 3**0.5
    same(array(start.adapter["w"].A.abs()), np.array([[1 / root, 0]]))
    same(array(start.adapter["w"].B.abs()), np.array([[0.67 * root], [0]]))
    same(matrix(start.adapter["w"]), np.array([[0.67, 0], [0, 0]]))
    same(matrix(start.frozen["w"]), np.array([[3.33, 0], [0, 2]]))
    # M_1 = (1, 0)^T (2.67, 4) = [2.67 4; 0 0] has learnt [2 4; 0 0]. M_2 = (.67, 2)^T (1, 0) =
    # [.67 0; 2 0] has learnt [0 0; 2 0]. The mean [1 2; 1 0] comes on top of [4 0; 0 2].
    hand_round(server, column_times_row((1, 0), (2.67, 4)), column_times_row((0.67, 2), (1, 0)))
    assert [[round(x, 6) for x in row] for row in whole_of(server)] == [[5, 2], [1, 2]]


@pytest.mark.parametrize("method", METHODS)
def test_known_error_later_clients_dropped_from_the_mean(method: str) -> None:
    """A loop that assigns the first client, or overwrites with each, instead of adding."""
    sim = simulate(method, EQUAL)
    before = sim.server.state
    turns = sim.play()
    whole = _flat([*sim.factors().values()] if method == "fedsa" else [*sim.model().values()])
    for dropped in range(len(turns)):
        again = Simulation(Server(sim.server.federation, before, Mean()))
        again.server.plan()
        for t in turns:
            if t.client != dropped:
                again.server.accept(t.update)
        again.server.commit()
        left = _flat(
            [*again.factors().values()] if method == "fedsa" else [*again.model().values()]
        )
        assert any(apart(x, y, 0.01) for x, y in zip(whole, left, strict=True)), dropped


@pytest.mark.parametrize(("shape", "ranks"), [((4, 4), (4, 4)), ((4, 6), (4, 4)), ((6, 4), (4, 4))])
def test_known_error_a_and_b_told_apart_by_shape(
    shape: tuple[int, int], ranks: tuple[int, int]
) -> None:
    """`if x.shape[0] == rank: stack rows`: with rank = m or m = n that takes B for A."""
    m, n = shape
    sim = simulate("flora", ranks, shapes={"w": shape})
    turns = sim.play()
    wanted = mean(turns, [product(t.end["w"]) for t in turns])
    same(sim.model()["w"], wanted)
    if m == 4:
        stacked_a = np.vstack([t.end["w"][0] for t in turns])  # (8, n)
        stacked_b = np.vstack([t.p * t.end["w"][1] for t in turns])  # (8, 4): rows, as A's
        wrong = stacked_b.T @ stacked_a
        assert apart(wrong, wanted)
    for method in ("fedit", "zero_pad", "hetlora", "ffa", "rolora", "fedex", "lora_fair"):
        sim = simulate(method, ranks, shapes={"w": shape})
        for _ in range(2):
            turns = sim.play()
        a, b = sim.factors()["w"]
        assert (a.shape, b.shape) == ((4, n), (m, 4))
        same(sim.model()["w"], b @ a + sim.merged()["w"])


def test_known_error_mixed_ranks_and_a_square_module_padded_on_the_wrong_side() -> None:
    """`(r_k, n)` is padded below, `(m, r_k)` to the right, also where m = n = r_k for one."""
    sim = simulate("zero_pad", (4, 2), shapes={"w": (4, 4)})
    turns = sim.play()
    a = turns[0].p * turns[0].end["w"][0]
    a[:2] += turns[1].p * turns[1].end["w"][0]
    b = turns[0].p * turns[0].end["w"][1]
    b[:, :2] += turns[1].p * turns[1].end["w"][1]
    same_pair(sim.factors()["w"], (a, b))
    wrong = turns[0].p * turns[0].end["w"][1]
    wrong[:2] += turns[1].p * turns[1].end["w"][1].T
    assert apart(wrong @ a, b @ a)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", ["flora", "exact", "flexlora", "fedex", "fedmomentum"])
def test_known_error_the_servers_scale_instead_of_the_clients(
    method: str, use_rslora: bool
) -> None:
    """One alpha for all makes `s_k = alpha / r_k` differ; the stack's own `alpha / sum r` is none
    of them."""
    alpha, ranks, rows = 16, (2, 4, 8), (1, 2, 1)
    rule = METHODS[method]
    federation = Federation(ranks, rows, Agreement(rule, rule.options(), {"w": (12, 12)}))
    server = Server(federation, initial_state(federation), Mean())
    server.plan()
    g = torch.Generator().manual_seed(0)
    wanted, unscaled = np.zeros((12, 12)), np.zeros((12, 12))
    for k, rank in enumerate(ranks):
        a, b = torch.randn(rank, 12, generator=g), torch.randn(12, rank, generator=g)
        s = scaling(alpha, rank, use_rslora)
        assert s == pytest.approx({2: 8, 4: 4, 8: 2}[rank] * (rank**0.5 if use_rslora else 1))
        server.accept(ClientUpdate(k, 1, {"w": fold(a, b, s)}, rows[k]))
        wanted += rows[k] / 4 * s * array(b) @ array(a)
        unscaled += rows[k] / 4 * array(b) @ array(a)
    server.commit()
    found = matrix(global_delta(server.state)["w"])
    same(found, wanted, 1e-5)
    for rank in (*ranks, sum(ranks)):
        assert apart(scaling(alpha, rank, use_rslora) * unscaled, wanted)
    if use_rslora:
        assert apart(found, unscaled * alpha / 4)


def test_known_error_scales_multiplied_after_the_mean_of_the_factors() -> None:
    """fedit: `s` belongs to B; on both factors it counts twice."""
    rule = METHODS["fedit"]
    federation = Federation([2, 2], [1, 1], Agreement(rule, rule.options(), {"w": (5, 6)}))
    server = Server(federation, initial_state(federation), Mean())
    server.plan()
    g = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(2, 6, generator=g), torch.randn(5, 2, generator=g)) for _ in range(2)]
    for k, (a, b) in enumerate(pairs):
        server.accept(ClientUpdate(k, 1, {"w": fold(a, b, 3.0)}, 1))
    server.commit()
    a, b = (np.mean([array(x[i]) for x in pairs], axis=0) for i in (0, 1))
    same(matrix(server.state.adapter["w"]), 3.0 * b @ a, 1e-5)
    assert apart(9.0 * b @ a, 3.0 * b @ a)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].mixed_ranks])
def test_known_error_one_rank_of_the_server_for_all_clients(method: str) -> None:
    sim = simulate(method, MIXED)
    for _ in range(3):
        for t in sim.play():
            assert t.rank == MIXED[t.client]
            for name, (m, n) in SHAPES.items():
                a, b = t.start[name]
                assert (a.shape, b.shape) == ((t.rank, n), (m, t.rank))
    if method in ("flexlora", "raflora"):
        cuts = [directions(sim.model()["wide"], 0, r) for r in (2, 3, 5)]
        assert apart(cuts[0], cuts[1])
        assert apart(cuts[1], cuts[2])
    # An update of the server's rank, or any other, is refused.
    sent = sim.server.plan()[0]
    large = {n: LowRank(torch.ones(5, c), torch.ones(r, 5)) for n, (r, c) in SHAPES.items()}
    with pytest.raises(ValueError, match="ranks other than"):
        sim.server.accept(ClientUpdate(0, sent.round, large, 1))


def test_known_error_the_residual_transposed() -> None:
    """On a square module `W + residual.T` raises nothing."""
    sim = simulate("fedex", EQUAL, shapes={"w": (8, 8)})
    sim.play()
    before = sim.model()["w"]
    turns = sim.play()
    adapter = product(sim.factors()["w"])
    residual = sim.merged()["w"]
    same(sim.model()["w"] - before, learnt(turns, "w"))
    wrong = adapter + residual.T
    assert apart(wrong, sim.model()["w"])
    # Not so much as a symmetric part explains it.
    assert apart(residual, residual.T)


@pytest.mark.parametrize("method", METHODS)
def test_known_error_weights_computed_but_not_used(method: str) -> None:
    """`sum_k x_k / K` beside a list of weights that nobody reads."""
    by_rows, alike = (
        simulate(method, EQUAL, client_weights=kind) for kind in ("examples", "uniform")
    )
    turns = by_rows.play()
    assert [t.p for t in alike.play()] == [0.25] * 4
    assert [t.p for t in turns] == [0.1, 0.3, 0.2, 0.4]
    found, other = (
        _flat([*s.factors().values()] if method == "fedsa" else [*s.model().values()])
        for s in (by_rows, alike)
    )
    assert any(apart(x, y) for x, y in zip(found, other, strict=True))
    # Rows in the same proportions are the same weights.
    tenfold = simulate(method, EQUAL, rows=[10 * n for n in ROWS])
    tenfold.play()
    for name, x in by_rows.model().items():
        same(tenfold.model()[name], x)


def test_known_error_v_sliced_as_if_it_were_its_transpose() -> None:
    """`U, S, V = svd(W)` gives `V^T`: `V[:, :r]` are columns of it, and fit on a square module."""
    sim = simulate("flexlora", (3, 3), shapes={"w": (8, 8)})
    sim.play()
    whole = sim.model()["w"]
    start = sim.play()[0].start["w"]
    u, s, vt = np.linalg.svd(whole)
    same(product(start), (u[:, :3] * s[:3]) @ vt[:3], 1e-9)
    assert apart((u[:, :3] * s[:3]) @ vt[:, :3].T, product(start))
    # The same for an orthonormal A taken from the product.
    sim = simulate("fedsvd", (3, 3), shapes={"w": (8, 8)})
    sim.play()
    a, b = sim.factors()["w"]
    u, s, vt = np.linalg.svd(b @ a)
    same(a.T @ a, vt[:3].T @ vt[:3], 1e-9)
    assert apart(a.T @ a, vt[:, :3] @ vt[:, :3].T)


def test_known_error_singular_values_on_both_factors() -> None:
    """`A = S V^T` and `B = U S` square them; balanced, each carries the root."""
    sim = simulate("flexlora", (3, 3), shapes={"w": (8, 7)})
    sim.play()
    whole = sim.model()["w"]
    a, b = sim.play()[0].start["w"]
    u, s, vt = np.linalg.svd(whole)
    same(np.linalg.norm(a, axis=1) ** 2, s[:3], 1e-9)
    same(np.linalg.norm(b, axis=0) ** 2, s[:3], 1e-9)
    assert apart((u[:, :3] * s[:3] ** 2) @ vt[:3], b @ a)


def test_known_error_flora_averages_what_it_stacks() -> None:
    """The weight belongs to one factor of the stack: on both it is squared."""
    sim = simulate("flora", EQUAL)
    turns = sim.play()
    squared = np.sum([t.p**2 * product(t.end["wide"]) for t in turns], axis=0)
    assert apart(sim.model()["wide"], squared)
    same(sim.model()["wide"], mean(turns, [product(t.end["wide"]) for t in turns]))


def test_the_oracles_cover_every_rule() -> None:
    """A new rule needs its formula here."""
    source = Path(__file__).read_text(encoding="utf-8")
    covered = set(re.findall(r'simulate\("(\w+)"', source))
    assert covered >= set(METHODS)
