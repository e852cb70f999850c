"""`aggregate == finalize(sum_k w_k encode_k + shift)`, with `encode` computed where the data is.

Every rule plays a round with clients of mixed ranks (of one, where it asks for that) on random
factors in float64. What every client encodes, from nothing but what travels to it, is summed with
the weights, shifted once, and finalized. Three things have to be the same: that, what the server
made of the same updates one by one, and the formula of the rule's paper in dense matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.federation.envelope import Header, decode, encode
from fedlora.federation.exchange import Agreement, client_start, encode_update, global_delta
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.federation.server import Server
from fedlora.federation.wire import (
    GroupNames,
    read_train,
    read_trained,
    train_message,
    trained_message,
)
from fedlora.lowrank import Deltas, Dense, LowRank, add_all, scale_all
from fedlora.methods import METHODS
from fedlora.methods.shared import with_shift
from fedlora.methods.values import Encoded, ServerState
from fedlora.runs.state_file import settled
from support.simulated import (
    F64,
    SHAPES,
    Matrices,
    Round,
    distance,
    matrices,
    matrix,
    play,
    random_adapter,
    ranks_for,
    serve,
    size,
)

TOLERANCE = 1e-11


OPTIONS: dict[str, dict[str, Any]] = {"lora_fair": {"correction_penalty": 0.5}}


SHIFTED = [name for name, rule in METHODS.items() if rule.shift is not None]


MODULES = {1: frozenset({"attn", "wide"})}  # client 1 trains some of the modules alone


@dataclass(frozen=True)
class Case:
    """A server before and after a round, and the round."""

    server: Server
    done: Round

    @property
    def agreement(self) -> Agreement:
        return self.server.agreement

    @property
    def largest(self) -> int:
        return max(self.server.federation.ranks)


@cache
def case(method: str, some_modules: bool = False) -> Case:
    """A third round; in float64, beginning with a given adapter. Tests look at it and change none.

    Args:
        method: the rule.
        some_modules: let client 1 train the modules of `MODULES` alone.
    """
    ranks = ranks_for(METHODS[method])
    given = random_adapter(max(ranks), 1)
    modules = MODULES if some_modules else {}
    server = serve(method, ranks, given, options=OPTIONS.get(method, {}), modules=modules)
    for seed in (1, 2):
        play(server, seed)
    return Case(server, play(server, 3))


def client_encodes(case: Case, client: int) -> Encoded:
    """What a client encodes: from its broadcast, its update and the agreement; no server."""
    sent, update = case.done.sent[client], case.done.updates[client]
    return encode_update(update, client_start(sent, case.agreement), sent, case.agreement)


def plus(x: Encoded, y: Encoded) -> Encoded:
    """The sum of two; one that lacks an entry has a zero there."""

    def tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: sum(t[n] for t in (a, b) if n in t) for n in dict.fromkeys([*a, *b])}

    return Encoded(
        tensors(x.factors, y.factors),
        add_all([x.products, y.products]),
        tensors(x.weights, y.weights),
    )


def times(x: Encoded, factor: float) -> Encoded:
    return Encoded(
        {n: factor * t for n, t in x.factors.items()},
        scale_all(x.products, factor),
        {n: factor * t for n, t in x.weights.items()},
    )


def summed(case: Case) -> Encoded:
    """`sum_k p_k encode_k`, in any order."""
    total = Encoded()
    for client, p in sorted(case.done.weights.items(), reverse=True):
        total = plus(total, times(client_encodes(case, client), p))
    return total


Shift = Callable[[Encoded, ServerState, Any], Encoded]


def law(case: Case, shift: Shift | None) -> Matrices:
    """The global model that the law says, with this shift."""
    before, rule = case.done.before, replace(case.agreement.rule, shift=shift)
    total = with_shift(rule, summed(case), before, case.agreement.options)
    aggregate = rule.finalize(total, before, case.largest, case.agreement.options)
    return matrices(add_all([before.base_delta, aggregate.merge, aggregate.adapter]))


def factors(deltas: Deltas, name: str) -> tuple[Tensor, Tensor]:
    x = deltas[name]
    assert isinstance(x, LowRank)
    return x.A, x.B


def directions(w: Tensor, begin: int, end: int) -> Tensor:
    """The singular directions `begin` to `end` of a matrix."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return (u[:, begin:end] * s[begin:end]) @ v[begin:end]


@dataclass(frozen=True)
class Module:
    """One module of a round, in matrices.

    `clients` are those who train it: client -> `(p, rank, A, B)` at the end of the round.
    """

    name: str
    case: Case

    @property
    def clients(self) -> dict[int, tuple[float, int, Tensor, Tensor]]:
        ended = {k: x for k, x in self.case.done.ended.items() if self.name in x}
        return {
            k: (self.case.done.weights[k], x[self.name].rank, *factors(x, self.name))
            for k, x in ended.items()
        }

    @property
    def base(self) -> Tensor:
        """What was merged before the round."""
        return matrices(self.case.done.before.base_delta)[self.name]

    @property
    def before(self) -> Tensor:
        """The global adapter's product."""
        return matrices(self.case.done.before.adapter)[self.name]

    @property
    def shared(self) -> tuple[Tensor, Tensor]:
        """The global factors."""
        return factors(self.case.done.before.adapter, self.name)

    @property
    def learnt(self) -> Tensor:
        """`sum_k p_k (M_k - M_k_start)`."""
        return self.case.done.wanted[self.name]

    def started(self, client: int) -> Tensor:
        return matrix(self.case.done.starts[client].adapter[self.name])


def added(x: Module) -> Tensor:
    """exact, flora, fedex, fedmomentum: what was learnt comes on top, and nothing else."""
    return x.base + x.before + x.learnt


def florist(x: Module) -> Tensor:
    """The fewest directions that hold 90% of the energy of what was learnt."""
    values = torch.linalg.svdvals(x.learnt).square()
    kept = int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
    return x.base + directions(x.learnt, 0, kept)


def mean_factors(x: Module, weights: Mapping[int, float] | None = None) -> tuple[Tensor, Tensor]:
    """The mean of the factors padded with zeros; who does not train the module keeps the global
    one."""
    a, b = x.shared
    w = weights or {k: p for k, (p, *_) in x.clients.items()}
    rest = 0.0 if weights else 1.0 - sum(w.values())
    total_a, total_b = rest * a, rest * b
    for k, (_, rank, a_k, b_k) in x.clients.items():
        total_a[:rank] += w[k] * a_k
        total_b[:, :rank] += w[k] * b_k
    whole = sum(w.values()) + rest
    return total_a / whole, total_b / whole


def averaged(x: Module) -> Tensor:
    """fedit, zero_pad, rolora, fedsa, fedsvd: the product of the mean factors."""
    a, b = mean_factors(x)
    return x.base + b @ a


def ffa(x: Module) -> Tensor:
    """`B + sum_k p_k pad(B_k - B[:, :r_k])` under the common A."""
    a, b = x.shared
    total = b.clone()
    for p, rank, _, b_k in x.clients.values():
        total[:, :rank] += p * (b_k - b[:, :rank])
    return x.base + total @ a


def hetlora(x: Module) -> Tensor:
    """`sum_k w_k pad(A_k) / sum_k w_k` with `w_k = p_k ||B_k A_k||`, and B alike."""
    a, b = mean_factors(x, {k: p * float((b @ a).norm()) for k, (p, _, a, b) in x.clients.items()})
    return x.base + b @ a


def flexlora(x: Module) -> Tensor:
    """`sum_k p_k B_k A_k`; who does not train the module has S there."""
    rest = 1.0 - sum(p for p, *_ in x.clients.values())
    return x.base + rest * x.before + sum(p * b @ a for p, _, a, b in x.clients.values())


def raflora(x: Module) -> Tensor:
    """Each partition of the rank over the clients that train it; S where nobody does."""
    levels, total = sorted(set(x.case.server.federation.ranks)), torch.zeros_like(x.before)
    for begin, end in zip([0, *levels[:-1]], levels, strict=True):
        having = [(p, a, b) for p, rank, a, b in x.clients.values() if rank >= end]
        share = sum(p for p, *_ in having)
        total += directions(x.before, begin, end) if not having else 0.0
        for p, a, b in having:
            total += p / share * b[:, begin:end] @ a[begin:end]
    return x.base + total


def lora_fair(x: Module) -> Tensor:
    """The mean factors, B corrected by ridge regression on the mean of the products."""
    a, b = mean_factors(x)
    wanted = x.before + x.learnt
    gram = a @ a.T + 0.5 * torch.eye(len(a), dtype=F64)
    return x.base + (b + (wanted - b @ a) @ a.T @ torch.linalg.inv(gram)) @ a


PAPER: dict[str, Callable[[Module], Tensor]] = {
    **dict.fromkeys(["exact", "flora", "fedex", "fedmomentum"], added),
    **dict.fromkeys(["fedit", "zero_pad", "rolora", "fedsa", "fedsvd"], averaged),
    "florist": florist,
    "ffa": ffa,
    "hetlora": hetlora,
    "flexlora": flexlora,
    "raflora": raflora,
    "lora_fair": lora_fair,
}


def paper(case: Case) -> Matrices:
    return {name: PAPER[case.agreement.rule.name](Module(name, case)) for name in SHAPES}


@pytest.mark.parametrize("some_modules", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_law_holds(method: str, some_modules: bool) -> None:
    told = case(method, some_modules)
    after = matrices(global_delta(told.done.after))
    by_law, by_paper = law(told, told.agreement.rule.shift), paper(told)
    scale = size(after) + told.done.size
    assert distance(by_law, after) <= TOLERANCE * scale
    assert distance(by_paper, after) <= TOLERANCE * scale


@pytest.mark.parametrize("method", SHIFTED)
@pytest.mark.parametrize("factor", [None, 0.5, -1.0, 1.1])
def test_without_its_shift_or_with_another_the_law_fails_by_far(
    method: str, factor: float | None
) -> None:
    """A shift that is left out, halved, turned round, or ten percent too large."""
    told = case(method)
    right = told.agreement.rule.shift
    assert right is not None

    def scaled(encoded: Encoded, state: ServerState, options: Any) -> Encoded:
        assert factor is not None
        return times(right(encoded, state, options), factor)

    wrong, wanted = law(told, None if factor is None else scaled), paper(told)
    assert distance(wrong, wanted) > 1e-3 * size(wanted)
    assert distance(law(told, right), wanted) <= TOLERANCE * size(wanted)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SHIFTED])
def test_another_rule_s_encode_fails_by_far(method: str) -> None:
    """The check can tell: with one client's part left out of the sum nothing agrees."""
    told = case(method)
    fewer = replace(told.done, weights={k: p for k, p in told.done.weights.items() if k != 2})
    wrong = law(replace(told, done=fewer), None)
    wanted = paper(told)
    assert distance(wrong, wanted) > 1e-3 * size(wanted)


@pytest.mark.parametrize("method", SHIFTED)
def test_the_shift_is_linear(method: str) -> None:
    """Added to every update or once to their sum; so clients may drop out of a secure sum."""
    told = case(method, some_modules=True)
    rule, options, before = told.agreement.rule, told.agreement.options, told.done.before
    assert rule.shift is not None
    one_by_one = Encoded()
    for client, p in told.done.weights.items():
        added_here = rule.shift(client_encodes(told, client), before, options)
        one_by_one = plus(one_by_one, times(added_here, p))
    at_once = rule.shift(summed(told), before, options)
    for name in dict.fromkeys([*one_by_one.factors, *at_once.factors]):
        torch.testing.assert_close(at_once.factors[name], one_by_one.factors[name])
    gap = distance(matrices(one_by_one.products), matrices(at_once.products))
    assert gap <= TOLERANCE * (1 + size(matrices(at_once.products)))


@pytest.mark.parametrize("method", METHODS)
def test_who_drops_out_is_gone_from_the_sum(method: str) -> None:
    """The law over those that are left is the round without the others."""
    told = case(method)
    left = {k: p for k, p in told.done.weights.items() if k in (0, 3)}
    shares = {k: p / sum(left.values()) for k, p in left.items()}
    fewer = replace(told, done=replace(told.done, weights=shares))
    alone = Server(told.server.federation, told.done.before, type(told.server.aggregator)())
    alone.plan()
    for client in left:
        assert alone.accept(told.done.updates[client]) == ""
    alone.commit()
    after = matrices(global_delta(alone.state))
    assert distance(law(fewer, told.agreement.rule.shift), after) <= TOLERANCE * size(after)


HEADER = Header("run", 3, 0, "", "base", "agreement")


def travelled(sent: Broadcast) -> Broadcast:
    """A broadcast made anew from its message's bytes: nothing of the server's is left in it."""
    message, _ = train_message(HEADER, [sent], {}, GroupNames())
    (back,), _ = read_train(decode(encode(message)), {})
    return back


def exchanged(update: ClientUpdate, shapes: Mapping[str, tuple[int, int]]) -> ClientUpdate:
    """An update made anew from the bytes of what travels."""
    message = decode(encode(trained_message(HEADER, [update], {})))
    asked = {name: shapes[name] for name in update.adapter}
    (back,), _ = read_trained(message, {update.client: asked})
    return back


def own_agreement(agreement: Agreement) -> Agreement:
    """A client's own, from its configuration and its model."""
    rule = METHODS[agreement.rule.name]
    options = rule.options(**OPTIONS.get(rule.name, {}))
    return Agreement(rule, options, dict(reversed(SHAPES.items())), agreement.seed)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("method", METHODS)
def test_a_client_encodes_the_same_as_the_server(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = METHODS[method]
    ranks = ranks_for(rule)
    server = serve(
        method,
        ranks,
        random_adapter(max(ranks), 1, dtype),
        options=OPTIONS.get(method, {}),
        dtype=dtype,
        dense={"head": torch.ones(3)},
        modules=MODULES,
    )
    for seed in (1, 2):
        play(server, seed, dtype)
        server.state = settled(server.state)  # as a run does after every round
    before, seen = server.state, list[Encoded]()
    fold = server.aggregator.fold

    def watched(encoded: Encoded, weight: float) -> None:
        seen.append(encoded)
        fold(encoded, weight)

    monkeypatch.setattr(server.aggregator, "fold", watched)
    done = play(server, 3, dtype)
    assert len(seen) == len(ranks)
    agreement = own_agreement(server.agreement)
    assert agreement.digest == server.agreement.digest
    for client, on_the_server in enumerate(seen):
        sent = travelled(done.sent[client])
        update = exchanged(done.updates[client], SHAPES)
        own = encode_update(update, client_start(sent, agreement), sent, agreement)
        own = with_shift(rule, own, before, agreement.options)
        assert_same(own, on_the_server)


def assert_same(own: Encoded, other: Encoded) -> None:
    """Bit for bit."""
    mine, theirs = tensors_of(own), tensors_of(other)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype
        assert torch.equal(value, theirs[key]), key


def tensors_of(encoded: Encoded) -> dict[tuple[str, str, str], Tensor]:
    """Every tensor of an encoded update."""
    tensors = {("factors", name, ""): value for name, value in encoded.factors.items()}
    tensors |= {("weights", name, ""): value for name, value in encoded.weights.items()}
    for name, x in encoded.products.items():
        held = {"W": x.W} if isinstance(x, Dense) else {"A": x.A, "B": x.B}
        tensors |= {("products", name, part): value for part, value in held.items()}
    return tensors


def test_no_rule_s_encode_takes_the_server_s_state() -> None:
    """The types say it: `encode(update, start, numbers, options)`."""
    from typing import get_type_hints

    for name, rule in METHODS.items():
        hints = get_type_hints(rule.encode)
        hints.pop("return")
        assert ServerState not in hints.values(), name
