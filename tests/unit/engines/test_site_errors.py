"""What a server is told of an error at a site never quotes what the error is about."""

from __future__ import annotations

import pytest

from fedlora.config.site_run import BoundError
from fedlora.engines.carrier import SiteError
from fedlora.engines.site_errors import StoppedError, told_to_server
from fedlora.errors import CheckpointError, InputError
from fedlora.federation.envelope import RefusedMessageError

ROW = "Mrs Ellwood, born 1961"


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (RefusedMessageError("it is cut short"), "refused", "it is cut short"),
        (BoundError("lora_r: 8 is too many"), "refused", "lora_r: 8 is too many"),
        (StoppedError("the call was cancelled"), "deadline", "the call was cancelled"),
        (
            InputError(f"train_file: {ROW}\nlabel_names: {ROW}"),
            "mistake",
            "train_file, label_names cannot be used at this site; the worker's log at the site "
            "says more",
        ),
        (
            CheckpointError(f"/home/{ROW}: damaged"),
            "mistake",
            "what the site has cannot be used; the worker's log at the site says more",
        ),
        (
            KeyError(ROW),
            "failed",
            "its training failed with KeyError; the worker's log at the site says more",
        ),
        (
            MemoryError(ROW),
            "failed",
            "memory ran out at the site; ask for smaller batches or shorter samples",
        ),
        (SiteError("busy", "it trains"), "busy", "it trains"),
    ],
)
def test_errors_in_words_for_a_server(
    error: Exception, kind: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SiteError) as raised, told_to_server():
        raise error
    assert (raised.value.kind, raised.value.reason) == (kind, reason)
    assert raised.value.__cause__ is None
    if ROW in str(error):
        assert ROW in capsys.readouterr().err, "the site's own log says it"


def test_what_goes_well_is_left_alone() -> None:
    with told_to_server():
        done = True
    assert done
