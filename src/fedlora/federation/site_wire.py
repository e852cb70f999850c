"""Turns one client's broadcast into a message for a site that keeps the global model, and back.

A worker of a pool is sent whole broadcasts (`wire.train_message`); such a site is sent what it
lacks. Its answer is that of any client (`wire.trained_message`), with a confirmation of the model
it holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedlora.federation.envelope import Header, Message
from fedlora.federation.increments import Sketch
from fedlora.federation.messages import Broadcast, Lacking
from fedlora.federation.wire import TRAIN, refusing, round_numbers, whole_number
from fedlora.methods.values import RoundNumbers

EVALUATE = "evaluate"
"""The kind of a message that asks a site to evaluate the global model."""


@dataclass(frozen=True)
class Asked:
    """What a message for one client asks of it, and what it brings.

    Args:
        client: its number.
        rank: of the adapter it is to train.
        nbytes: of all tensors that are brought.
        numbers: of the round.
        modules: that it trains; None: all.
        lacking: what is brought.
    """

    client: int
    rank: int
    nbytes: int
    numbers: RoundNumbers
    modules: frozenset[str] | None
    lacking: Lacking


def site_message(header: Header, broadcast: Broadcast, lacking: Lacking) -> Message:
    """Asks one client to train, whose site keeps the global model; `HeldModel` reads it.

    Args:
        header: its kind is set here.
        broadcast: what the client is to have.
        lacking: what it lacks of that (`Server.lacking`).
    """
    body = {
        "client": broadcast.client,
        "rank": broadcast.rank,
        "modules": None if broadcast.modules is None else sorted(broadcast.modules),
        "widths": dict(broadcast.numbers.widths),
        "levels": list(broadcast.numbers.levels),
        "held": lacking.held,
        "places": {place: list(indices) for place, indices in lacking.places.items()},
    }
    return Message(replace(header, kind=TRAIN), body, lacking.tensors, lacking.compression)


def read_site_message(message: Message) -> Asked:
    """The inverse of `site_message`.

    Raises:
        RefusedMessageError: it is not what such a message has to be.
    """
    with refusing():
        body, held = message.body, message.body["held"]
        lacking = Lacking(
            None if held is None else whole_number(held),
            message.tensors,
            {str(k): [whole_number(index) for index in of] for k, of in body["places"].items()},
            message.compression,
        )
        return Asked(
            client=whole_number(body["client"]),
            rank=whole_number(body["rank"], least=1),
            nbytes=lacking.nbytes,
            numbers=round_numbers(body),
            modules=None if body["modules"] is None else frozenset(body["modules"]),
            lacking=lacking,
        )


def model_message(header: Header, lacking: Lacking) -> Message:
    """Brings a global model to be evaluated; `HeldModel.evaluated` reads it.

    Args:
        header: its round is the one that was committed; its kind is set here.
        lacking: what the site lacks of the model (`Server.model_lacking`).
    """
    body = {"held": lacking.held}
    return Message(replace(header, kind=EVALUATE), body, lacking.tensors, lacking.compression)


def read_model_message(message: Message) -> Lacking:
    """The inverse of `model_message`.

    Raises:
        RefusedMessageError: it is not what such a message has to be.
    """
    with refusing():
        held = message.body["held"]
        return Lacking(None if held is None else whole_number(held), message.tensors)


def read_confirmation(message: Message) -> Sketch | None:
    """What a site says of the global model it holds; None where it says nothing.

    Raises:
        RefusedMessageError: it is not what it has to be.
    """
    with refusing():
        told = message.body.get("confirmation")
        if told is None:
            return None
        return {
            str(name): [math.nan if x is None else float(x) for x in of]
            for name, of in told.items()
        }
