"""Messages and answers are packed for FLARE, and come out as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from fedlora.engines.carrier import SiteError
from fedlora.engines.nvflare.parcels import pack, pack_error, unpack, unpack_answer


@pytest.mark.parametrize("seconds", [None, 2.5])
def test_a_message_comes_out_as_it_was(seconds: float | None) -> None:
    assert unpack(pack(b"\x00model\xff", seconds)) == (b"\x00model\xff", seconds)
    assert unpack_answer(pack(b"trained")) == b"trained"


def test_a_message_is_one_buffer() -> None:
    arrays = [x for x in pack(b"model").values() if isinstance(x, np.ndarray)]
    assert [(x.dtype, x.shape) for x in arrays] == [(np.uint8, (5,))]


def test_what_the_worker_says_is_said_to_the_server() -> None:
    with pytest.raises(SiteError, match="too many steps") as caught:
        unpack_answer(pack_error(SiteError("refused", "too many steps")))
    assert caught.value.kind == "refused"


@pytest.mark.parametrize(
    ("parcel", "kind", "said"),
    [
        (make_reply(ReturnCode.TASK_ABORTED), "deadline", "given up at the site"),
        (make_reply(ReturnCode.TASK_RESULT_FILTER_ERROR), "refused", "a filter of the site"),
        (make_reply(ReturnCode.EXECUTION_EXCEPTION), "failed", "could not run it at the site"),
        (Shareable(), "refused", "holds no message"),
        (None, "failed", "is no answer"),
        (pack_error(SiteError("no such kind", "x")), "refused", "holds no message"),
    ],
)
def test_what_is_no_answer_has_its_kind(parcel: Any, kind: str, said: str) -> None:
    with pytest.raises(SiteError, match=said) as caught:
        unpack_answer(parcel)
    assert caught.value.kind == kind


@pytest.mark.parametrize("buffer", [b"bytes", np.zeros(3), np.zeros((2, 2), np.uint8)])
def test_another_buffer_is_no_message(buffer: Any) -> None:
    parcel = Shareable()
    parcel["message"] = buffer
    with pytest.raises(SiteError, match="holds no message"):
        unpack(parcel)
