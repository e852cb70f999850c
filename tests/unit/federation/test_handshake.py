"""What server and sites say beside training: it comes back as it was, and garbage is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.federation.envelope import Header, Message, RefusedMessageError, decode, encode
from fedlora.federation.handshake import (
    Agree,
    Agreed,
    Evaluated,
    Join,
    Joined,
    Leave,
    agree_message,
    agreed_message,
    counted_of,
    evaluated_message,
    join_message,
    joined_message,
    leave_message,
    read_agree,
    read_agreed,
    read_evaluated,
    read_join,
    read_joined,
    read_leave,
    with_counted,
)
from fedlora.federation.messages import Lacking
from fedlora.federation.site_wire import model_message, read_model_message

HEADER = Header("run", 2, 0, "", "base", "agreement")
HEAD = {"score.weight": (2, 3)}
JOINED = Joined(
    site="hospital a",
    client=1,
    num_examples=24,
    tokens=480,
    eval_rows=4,
    rank=8,
    label_names=("no", "yes"),
    base="b" * 64,
    data="d" * 64,
    architecture="LlamaForCausalLM",
    parameters=1000,
    shapes={"layers.0.q_proj": (4, 3)},
    full_params=HEAD,
    confirmed=2,
)
Says = tuple[Callable[..., Message], Any, Callable[[Message], Any]]
SAID: list[Says] = [
    (
        join_message,
        Join(1, 3, "exact", {"learning_rate": 1e-3, "lora_target_modules": ["q_proj"]}),
        read_join,
    ),
    (joined_message, JOINED, read_joined),
    (agree_message, Agree(1, 8, 3, "a" * 64, first_values=True), read_agree),
    (evaluated_message, Evaluated(4, 40, {"loss": 0.5, "exact_match": 1}), read_evaluated),
    (
        evaluated_message,
        Evaluated(4, 4, {"loss": 0.5, "per_class": {"no": {"f1": 0.5, "support": 2}}}),
        read_evaluated,
    ),
    (evaluated_message, Evaluated(0, 0, {}), read_evaluated),
    (leave_message, Leave("maintenance"), read_leave),
]


def sent(message: Message) -> Message:
    return decode(encode(message))


@pytest.mark.parametrize(("write", "value", "read"), SAID)
def test_what_was_said_comes_back(write: Any, value: Any, read: Any) -> None:
    assert read(sent(write(HEADER, value))) == value


def test_headers_of_a_join_name_what_is_known() -> None:
    asked = join_message(HEADER, Join(0, 1, "exact", {})).header
    told = joined_message(HEADER, JOINED).header
    assert (asked.run, asked.round, asked.base, asked.agreement) == ("run", 2, "", "")
    assert (told.run, told.round, told.base, told.agreement) == ("run", 2, "b" * 64, "")


def test_first_values_come_with_the_agreement() -> None:
    given = Agreed("a" * 64, {"score.weight": torch.randn(2, 3)})
    back = read_agreed(sent(agreed_message(HEADER, given)), HEAD)
    assert back.digest == given.digest
    assert torch.equal(back.full_params["score.weight"], given.full_params["score.weight"])
    assert read_agreed(sent(agreed_message(HEADER, Agreed("a"))), {}) == Agreed("a")
    for wanted in ({}, {"score.weight": (3, 2)}, {"score.bias": (2,)}):
        with pytest.raises(RefusedMessageError, match="other parameters"):
            read_agreed(sent(agreed_message(HEADER, given)), wanted)


def test_a_site_hears_which_training_counted() -> None:
    lacking = Lacking(1, {"dense/score.weight": torch.ones(2, 3)})
    asked = sent(with_counted(model_message(HEADER, lacking), (2, 1)))
    assert counted_of(asked) == (2, 1)
    assert read_model_message(asked).held == 1  # a reader of the rest is not disturbed
    for body in ({}, {"counted": 2}, {"counted": [1]}, {"counted": [1, -1]}, {"counted": "12"}):
        with pytest.raises(RefusedMessageError, match="which training counted"):
            counted_of(Message(HEADER, body))


def test_another_version_is_told_before_anything_else() -> None:
    join = sent(join_message(HEADER, Join(0, 1, "exact", {}, version="9.0")))
    future = replace(join, body={**join.body, "something": "new"})
    joined = joined_message(HEADER, replace(JOINED, version="9.0"))
    for read, message in ((read_join, future), (read_joined, joined)):
        with pytest.raises(RefusedMessageError, match=r"runs fedlora 9\.0, this one .* install"):
            read(message)


def test_losses_that_are_no_numbers_travel_as_none() -> None:
    told = evaluated_message(HEADER, Evaluated(1, 1, {"loss": float("nan")}))
    assert read_evaluated(sent(told)).metrics == {"loss": None}


@pytest.mark.parametrize(("write", "value", "read"), SAID)
def test_what_is_not_as_it_has_to_be_is_refused(write: Any, value: Any, read: Any) -> None:
    """Another kind, tensors, a part too many or too few, and garbage in the place of each part."""
    good = write(HEADER, value)
    bad = [
        replace(good, header=replace(good.header, kind="other")),
        replace(good, tensors={"x": torch.ones(1)}),
        replace(good, body={**good.body, "more": 1}),
        *(
            replace(good, body={k: x for k, x in good.body.items() if k != key})
            for key in good.body
        ),
    ]
    for garbage in ([[]], {"x": [{}]}, "\n" * 3000, -1, 10**30):
        bad += [replace(good, body={**good.body, key: garbage}) for key in good.body]
    for message in bad:
        with pytest.raises(RefusedMessageError):
            read(message)


def test_bytes_that_were_changed_are_refused() -> None:
    rng = random.Random(0)
    for write, value, _ in SAID:
        data = encode(write(HEADER, value))
        for _ in range(50):
            broken = bytearray(data)
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            with pytest.raises(RefusedMessageError):
                decode(bytes(broken))
