"""Defines what a server and a site that is another process say to each other beside training.

Every call is a message of the server, and what the site answers to it:

    join      whom the server takes it for, and what it sets     -> joined     what the site holds
    agree     what all hold to                                   -> agreed     the same digest
    train     `fedlora.federation.site_wire`                     -> trained    `federation.wire`
    evaluate  likewise, the global model                         -> evaluated  counts and metrics
    leave     the run is over, or the site is asked no more      -> leave      likewise

To any call a site may answer `leave`: it takes part no longer.

Of the headers: `join` and `joined` carry the run and the last round that the server has committed
(0: none), no agreement, and `joined` the fingerprint of the site's base. All others carry base and
agreement, and are refused where these differ. A `join` begins anew what is stale: after it the site
takes any round above that of the join's header, whatever it was asked before. Two messages have to
say of a site that keeps something for itself what it goes on from; see `with_counted`.

Sites have names, which are text. A client's number exists for the draws by the seed alone, and the
server gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from fedlora import __version__
from fedlora.federation import plain_values as plain
from fedlora.federation.envelope import Header, Message, RefusedMessageError
from fedlora.methods.rule import Shapes
from fedlora.text import finite

JOIN, JOINED = "join", "joined"
AGREE, AGREED = "agree", "agreed"
EVALUATED = "evaluated"
LEAVE = "leave"

_COUNTED = "counted"  # in the body of `train` and `evaluate`

Counted = tuple[int, int]
"""Round and attempt of a site's training that counts; `(0, 0)`: none does."""


@dataclass(frozen=True)
class Join:
    """The server asks a site to take part in its run.

    Args:
        client: the site's number, counted from 0.
        num_clients: how many sites there are.
        method: name of the aggregation rule.
        config: configuration keys that the server sets, the rule's options among them; plain
            values, and no path of the server. `lora_r` is the rank it asks of this site.
        version: of the fedlora that wrote it.
    """

    client: int
    num_clients: int
    method: str
    config: Mapping[str, Any]
    version: str = __version__


@dataclass(frozen=True)
class Joined:
    """What a site tells of itself.

    Args:
        site: its name.
        client: its number, as it was told.
        num_examples: rows it trains on.
        tokens: in these rows.
        eval_rows: rows it evaluates the global model on.
        rank: of the adapter it trains.
        label_names: a classifier's labels in the order of their ids; empty: a causal model.
        base: fingerprint of the base's frozen weights.
        data: fingerprint of its tokens.
        architecture: the model's class.
        parameters: of the model, LoRA layers included.
        shapes: target module -> `(m, n)`.
        full_params: shapes of the parameters trained whole.
        confirmed: the round of this run whose global model it has last confirmed; 0: none.
        version: of the fedlora that wrote it.
    """

    site: str
    client: int
    num_examples: int
    tokens: int
    eval_rows: int
    rank: int
    label_names: tuple[str, ...]
    base: str
    data: str
    architecture: str
    parameters: int
    shapes: Shapes
    full_params: Mapping[str, tuple[int, ...]]
    confirmed: int = 0
    version: str = __version__


@dataclass(frozen=True)
class Agree:
    """What all hold to, for a site to compare with what it makes of its configuration.

    Args:
        client: the site's number.
        rank: of the adapter it trains.
        num_clients: how many sites there are.
        digest: `Agreement.digest` of the server.
        first_values: the site is to send the parameters that are trained whole, as they are before
            round 1.
    """

    client: int
    rank: int
    num_clients: int
    digest: str
    first_values: bool = False


@dataclass(frozen=True)
class Agreed:
    """The site holds to the same.

    Args:
        digest: `Agreement.digest` of the site.
        full_params: the parameters that are trained whole, where they were asked for.
    """

    digest: str
    full_params: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """What a site has measured of the global model: counts and metrics, and no row.

    Args:
        rows: that it evaluated on.
        labels: what the loss is a mean over: labelled tokens of a language model, rows of a
            classifier.
        metrics: as `fedlora.client.evaluate.evaluate` gives them; none where there are no rows.
    """

    rows: int
    labels: int
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Leave:
    """Whoever says it takes part no longer.

    Args:
        reason: in words.
    """

    reason: str


# --- to messages ---


def join_message(header: Header, join: Join) -> Message:
    """A `Join` as a message; of the header run and round count."""
    return Message(replace(header, kind=JOIN, base="", agreement=""), asdict(join))


def joined_message(header: Header, joined: Joined) -> Message:
    """A `Joined` as a message."""
    body = {
        **asdict(joined),
        "label_names": list(joined.label_names),
        "shapes": {name: list(shape) for name, shape in joined.shapes.items()},
        "full_params": {name: list(shape) for name, shape in joined.full_params.items()},
    }
    return Message(replace(header, kind=JOINED, base=joined.base, agreement=""), body)


def agree_message(header: Header, agree: Agree) -> Message:
    """An `Agree` as a message."""
    return Message(replace(header, kind=AGREE), asdict(agree))


def agreed_message(header: Header, agreed: Agreed) -> Message:
    """An `Agreed` as a message."""
    return Message(replace(header, kind=AGREED), {"digest": agreed.digest}, agreed.full_params)


def evaluated_message(header: Header, evaluated: Evaluated) -> Message:
    """An `Evaluated` as a message."""
    return Message(replace(header, kind=EVALUATED), finite(asdict(evaluated)))


def leave_message(header: Header, leave: Leave) -> Message:
    """A `Leave` as a message."""
    return Message(replace(header, kind=LEAVE), asdict(leave))


def with_counted(message: Message, counted: Counted) -> Message:
    """A `train` or `evaluate` message that says which training of the site counted last.

    A site that keeps a factor for itself goes on from what it kept then. What it trained since is
    lost, for the server never had it: it came too late, or the round was given up.
    """
    return replace(message, body={**message.body, _COUNTED: list(counted)})


# --- from messages ---


def read_join(message: Message) -> Join:
    """The inverse of `join_message`.

    Raises:
        RefusedMessageError: it is of another version of fedlora, or not what it has to be; so do
            all functions that follow.
    """
    return Join(
        **_parts(
            message,
            JOIN,
            client=plain.whole,
            num_clients=plain.positive,
            method=plain.name,
            config=plain.settings,
            version=plain.name,
        )
    )


def read_joined(message: Message) -> Joined:
    """The inverse of `joined_message`."""
    return Joined(
        **_parts(
            message,
            JOINED,
            site=plain.name,
            client=plain.whole,
            num_examples=plain.whole,
            tokens=plain.whole,
            eval_rows=plain.whole,
            rank=plain.positive,
            label_names=plain.names,
            base=plain.name,
            data=plain.name,
            architecture=plain.name,
            parameters=plain.whole,
            shapes=plain.module_shapes,
            full_params=plain.shapes,
            confirmed=plain.whole,
            version=plain.name,
        )
    )


def read_agree(message: Message) -> Agree:
    """The inverse of `agree_message`."""
    return Agree(
        **_parts(
            message,
            AGREE,
            client=plain.whole,
            rank=plain.positive,
            num_clients=plain.positive,
            digest=plain.name,
            first_values=plain.truth,
        )
    )


def read_agreed(message: Message, wanted: Mapping[str, tuple[int, ...]]) -> Agreed:
    """The inverse of `agreed_message`.

    Args:
        message: of that kind.
        wanted: names and shapes of the parameters that were asked for; others are refused.
    """
    parts = _parts(message, AGREED, tensors=True, digest=plain.name)
    came = {name: tuple(value.shape) for name, value in message.tensors.items()}
    if came != dict(wanted):
        raise RefusedMessageError("it brings other parameters than those that were asked for")
    return Agreed(parts["digest"], {name: message.tensors[name] for name in wanted})


def read_evaluated(message: Message) -> Evaluated:
    """The inverse of `evaluated_message`."""
    return Evaluated(
        **_parts(message, EVALUATED, rows=plain.whole, labels=plain.whole, metrics=plain.metrics),
    )


def read_leave(message: Message) -> Leave:
    """The inverse of `leave_message`."""
    return Leave(**_parts(message, LEAVE, reason=plain.text))


def counted_of(message: Message) -> Counted:
    """What `with_counted` has said."""
    try:
        round, attempt = map(plain.whole, message.body[_COUNTED])
    except (KeyError, TypeError, ValueError):
        raise RefusedMessageError("it does not say which training counted last") from None
    return round, attempt


# --- parts ---


def _parts(
    message: Message, kind: str, tensors: bool = False, **readers: Callable[[Any], Any]
) -> dict[str, Any]:
    """The values of a body, each read by its reader; neither more nor fewer.

    Of a message with a version, that is looked at first: another version may have other parts.
    """
    _check_kind(message, kind)
    body = message.body
    if "version" in readers:
        _check_version(body.get("version"))
    if message.tensors and not tensors:
        raise RefusedMessageError(f"a message {kind} brings no tensors")
    for key in body.keys() ^ readers.keys():
        what = "an unknown part" if key in body else "no"
        raise RefusedMessageError(f"a message {kind} has {what} {str(key)[:40]}")
    values = {}
    for key, reader in readers.items():
        try:
            values[key] = reader(body[key])
        except ValueError:
            raise RefusedMessageError(f"a message {kind} has no usable {key}") from None
    return values


def _check_kind(message: Message, kind: str) -> None:
    if message.header.kind != kind:
        raise RefusedMessageError(f"a message {kind} was expected, not {message.header.kind[:40]}")


def _check_version(version: Any) -> None:
    if version != __version__:
        raise RefusedMessageError(
            f"the other side runs fedlora {str(version)[:40]}, this one {__version__}; install the "
            "same version on both"
        )
