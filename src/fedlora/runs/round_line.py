"""Makes the line of a round in `metrics.jsonl` from what was recorded and measured of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from fedlora.federation.records import RoundRecord
from fedlora.runs.events import Evaluations, Round, Scores, Seconds


def round_line(
    record: RoundRecord,
    evaluations: Evaluations,
    personal: Mapping[int, Scores],
    *,
    attempts: int,
    given_up: tuple[int, int] = (0, 0),
    seconds: Seconds,
) -> Round:
    """The line of a round.

    Args:
        record: of the server.
        evaluations: of the global model.
        personal: client -> what its own model measures, where that is asked for.
        attempts: how often the round was tried.
        given_up: bytes up and down of the attempts before the last.
        seconds: where the time went.
    """
    line = cast(
        Round,
        {
            "event": "round",
            **_fields(record),
            "bytes_up": record.bytes_up,
            "bytes_down": record.bytes_down,
            **evaluations,
        },
    )
    if personal:  # by client, whatever the order in which they answered
        line["personal_evaluations"] = {str(k): personal[k] for k in sorted(personal)}
    line["attempts"] = attempts
    if attempts > 1:
        line["given_up_bytes_up"], line["given_up_bytes_down"] = given_up
    line["seconds"] = seconds
    return line


def _fields(record: RoundRecord) -> dict[str, Any]:
    """The fields of a record; how much rounding has lost stands there where anything is rounded."""
    return {
        key: value
        for key, value in dataclasses.asdict(record).items()
        if value is not None or not key.startswith("compression_error")
    }
