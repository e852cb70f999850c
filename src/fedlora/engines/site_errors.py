"""Tells a server what went wrong at a site without a word of the site's rows.

The text of an error may quote what it stumbled over: a row, a label, a path. It is written to the
worker's own log. What travels is chosen here: texts about the message itself, bounds, the name of a
configuration key, or the kind of the error.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from fedlora.client.cohort import out_of_memory
from fedlora.config.config import Config
from fedlora.config.site_run import BoundError
from fedlora.engines.carrier import SiteError
from fedlora.errors import FedloraError
from fedlora.federation.envelope import RefusedMessageError
from fedlora.federation.held_model import LostModelError

_LOOK = "the worker's log at the site says more"


class StoppedError(Exception):
    """A call's deadline has passed, or it was cancelled; the text says which."""


def log(text: str) -> None:
    """Write to the worker's log, which is its standard error."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def told_to_server() -> Iterator[None]:
    """Whatever goes wrong within becomes what the server may know of it.

    Raises:
        SiteError: for every exception.
    """
    try:
        yield
    except SiteError:
        raise
    except LostModelError as error:
        log(f"lost: {error}")
        raise SiteError("lost", str(error)) from None
    except (RefusedMessageError, BoundError) as error:
        log(f"refused: {error}")
        raise SiteError("refused", str(error)) from None
    except StoppedError as error:
        log(f"stopped: {error}")
        raise SiteError("deadline", str(error)) from None
    except FedloraError as error:
        log(f"cannot be used: {error}")
        raise SiteError("mistake", _mistake(error)) from None
    except Exception as error:
        log("".join(traceback.format_exception(error)))
        if out_of_memory(error):
            reason = "memory ran out at the site; ask for smaller batches or shorter samples"
        else:
            reason = f"its training failed with {type(error).__name__}; {_LOOK}"
        raise SiteError("failed", reason) from None


def _mistake(error: FedloraError) -> str:
    """Which keys of the configuration cannot be used, and not why: that may quote data."""
    starts = (line.partition(":")[0] for line in str(error).splitlines())
    keys = list(dict.fromkeys(start for start in starts if start in Config.model_fields))
    if keys:
        return f"{', '.join(keys)} cannot be used at this site; {_LOOK}"
    return f"what the site has cannot be used; {_LOOK}"
