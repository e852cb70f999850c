"""Plans a run: what every client and the server need, what travels, and how long a round takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedlora.client.planned_memory import LIBRARIES, ClientMemory, bytes_of_base
from fedlora.config.clients import client_memories
from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.methods import METHODS
from fedlora.model.quantisation import bits_of
from fedlora.runs.planning.calibration import Speed, calibrate
from fedlora.runs.planning.client_needs import ClientNeeds, usual_rows
from fedlora.runs.planning.simulated_traffic import Traffic, traffic
from fedlora.runs.planning.work import tokens_of_round
from fedlora.runs.session import Session, assemble

SECONDS = 10
"""That a calibration measures."""


@dataclass(frozen=True)
class PlannedClient:
    """What a client needs.

    Args:
        client: its number.
        rank: of its adapter.
        batch: samples of a micro-batch.
        tokens: it trains on in a round.
        memory: None where it has no rows, or where it could not be planned.
        available: bytes that `client_memory` gives it, or None.
        seconds: of a round on this machine, by itself; None: not measured.
    """

    client: int
    rank: int
    batch: int
    tokens: int
    memory: ClientMemory | None
    available: int | None
    seconds: float | None

    @property
    def fits(self) -> bool | None:
        """Whether its memory holds it; None: that is not known."""
        if self.memory is None or self.available is None:
            return None
        return self.memory.total <= self.available


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Args:
        session: of the run, without weights.
        parameters: of the base.
        clients: what each needs.
        traffic: method -> what it transfers; the configured one first.
        excluded: method -> why it cannot run with these ranks and settings.
        server_memory: bytes.
        server_disk: bytes at most in `output_dir` when the run has ended.
        speed: of this machine, or None.
        no_speed: why there is none.
        no_memory: why that of the clients is not known; empty: it is.
    """

    session: Session
    parameters: int
    clients: Sequence[PlannedClient]
    traffic: Mapping[str, Traffic]
    excluded: Mapping[str, str]
    server_memory: int
    server_disk: int
    speed: Speed | None
    no_speed: str
    no_memory: str = ""

    @property
    def seconds_here(self) -> float | None:
        """Of a round whose clients train one after the other on this machine, or None."""
        times = [self.clients[k].seconds for k in self.session.federation.sample(1)]
        return sum(x or 0 for x in times) if self.speed else None

    @property
    def seconds_apart(self) -> float | None:
        """Of a round whose clients each have a machine like this one: the slowest, or None."""
        times = [self.clients[k].seconds or 0 for k in self.session.federation.sample(1)]
        return max(times) if self.speed else None


def make_plan(config: Config, *, seconds: float | None = SECONDS) -> Plan:
    """Plan a run; no weight is read and nothing is written.

    Args:
        config: of the run.
        seconds: that a calibration measures; None: there is none.

    Raises:
        InputError: the configuration, the data or the model cannot be used.
    """
    session = assemble(config, weights=False)
    on_device = session.config.model_copy(update={"use_cpu": not _on_gpu(session)})
    needs = ClientNeeds(session.base, session.data, on_device, session.other_bases)
    speed, no_speed = _speed(session, seconds)
    clients, no_memory = _clients(session, needs, speed)
    moved, excluded = _all_traffic(session)
    own = moved[session.config.method]
    return Plan(
        session=session,
        parameters=session.base.num_parameters,
        clients=clients,
        traffic=moved,
        excluded=excluded,
        server_memory=_server_memory(session, own),
        server_disk=disk_of_server(session.config, own, evaluates=_evaluates(session)),
        speed=speed,
        no_speed=no_speed,
        no_memory=no_memory,
    )


def _clients(
    session: Session, needs: ClientNeeds, speed: Speed | None
) -> tuple[list[PlannedClient], str]:
    """What each client needs; and why memory is not known, or nothing."""
    memories = client_memories(session.config, len(session.data.clients))
    planned, no_memory = [], ""
    for client, part in enumerate(session.data.clients):
        own, rank = session.config.of_client(client), session.federation.ranks[client]
        batch, lengths = own.per_device_train_batch_size, [len(r["input_ids"]) for r in part.train]
        tokens = tokens_of_round(own, lengths)
        memory = None
        if lengths and not no_memory:
            try:
                memory = needs.memory(client, batch, rank)
            except InputError as error:
                no_memory = str(error)
        planned.append(
            PlannedClient(
                client=client,
                rank=rank,
                batch=batch,
                tokens=tokens,
                memory=memory,
                available=memories[client] if memories else None,
                seconds=tokens / speed.tokens if speed else None,
            )
        )
    return planned, no_memory


def _speed(session: Session, seconds: float | None) -> tuple[Speed | None, str]:
    """How fast this machine trains, or why that is not known."""
    if seconds is None:
        return None, "not measured (--no_calibration)"
    config, federation = session.config, session.federation
    if bits_of(config) or session.other_bases:  # random weights are made in full precision
        return None, "not measured on a quantised base"
    client = max(federation.sample(1), key=lambda k: len(session.data.clients[k].train))
    rows = session.data.clients[client].train
    size = config.of_client(client).per_device_train_batch_size
    device = torch.device("cuda" if _on_gpu(session) else "cpu")
    try:
        batch = usual_rows(rows, size)
        speed = calibrate(
            session.base,
            batch,
            federation.ranks[client],
            device,
            seconds,
            gradient_checkpointing=config.gradient_checkpointing,
        )
    except InputError as error:
        return None, str(error)
    except Exception as error:  # what an architecture does not take must not end the plan
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return None, f"not measured: {reason}"
    return speed, ""


def _all_traffic(session: Session) -> tuple[dict[str, Traffic], dict[str, str]]:
    """What every method would transfer, the configured one first; and which cannot run."""
    config, federation = session.config, session.federation
    dense = sum(p.numel() for p in session.base.full_params.values())
    moved, excluded = dict[str, Traffic](), dict[str, str]()
    for name in sorted(METHODS, key=lambda name: name != config.method):
        rule = METHODS[name]
        if not rule.mixed_ranks and len(set(federation.ranks)) > 1:
            excluded[name] = "needs one rank for all clients"
            continue
        options = config.rule_options() if name == config.method else rule.options()
        try:
            moved[name] = traffic(federation, rule, options, config.num_rounds, dense)
        except InputError as error:
            if name == config.method:
                raise
            excluded[name] = str(error).removeprefix(f"method: {name} ")
    return moved, excluded


def _on_gpu(session: Session) -> bool:
    """Whether the run would train on a GPU: shapes alone lie on none, so what was asked counts."""
    on_cpu = session.asked.get("use_cpu", session.config.use_cpu)
    return torch.cuda.is_available() and not on_cpu


def _evaluates(session: Session) -> bool:
    """Whether the server holds the base, to evaluate the global model."""
    return session.config.server_evaluation and bool(session.data.eval)


def _server_memory(session: Session, own: Traffic) -> int:
    """What the server takes: its state, a round's updates, and the base where it evaluates."""
    libraries = LIBRARIES["cuda" if _on_gpu(session) else "cpu"]
    weights = bytes_of_base(session.base) if _evaluates(session) else 0
    return libraries + weights + 2 * own.state + own.updates


def disk_of_server(config: Config, own: Traffic, *, evaluates: bool = False) -> int:
    """At most what lies in `output_dir` at the end: rounds with state and adapter, and `final/`.

    States count as if each were written whole; rounds share files of what they have in common
    (`runs.saved_state`).

    Args:
        config: of the run.
        own: what its method keeps.
        evaluates: the best round stays beside the newest ones.
    """
    kept, every = config.num_rounds, config.save_adapter_rounds
    adapters = math.ceil(kept / every)
    if config.save_total_limit is not None:
        newest = max(2, config.save_total_limit)
        kept = min(kept, newest + evaluates + (every > newest))  # the newest adapter stays too
        adapters = min(kept, math.ceil(newest / every) + evaluates)
    if config.load_best_model_at_end:  # what was the best round has one
        adapters = kept
    return kept * own.state + adapters * own.model + own.model
