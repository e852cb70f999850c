"""Makes one run after another in a process of its own, for `fedlora study`.

    python -m fedlora.commands.study.worker

Reads a JSON object per line, `{"path", "keys", "alone", "trainer"}`, and answers each on standard
output with `{"round": n, "peak": bytes}` for a round that is done, then `{"done": true, "peak":
bytes}` or `{"failed": why}`. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.runs.session import Session


def main() -> None:
    """Answer jobs until standard input ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    _end_with(os.getppid())
    from fedlora.commands.console import quiet_libraries
    from fedlora.errors import FedloraError

    quiet_libraries()

    def heard(event: Mapping[str, Any]) -> None:
        if event["event"] == "round":
            say(round=event["round"], peak=_peak())

    for line in sys.stdin:
        job = json.loads(line)
        try:
            _make(job, heard)
        except FedloraError as error:
            say(failed=str(error))
        except Exception as error:  # another run may well succeed; this one is told of by name
            traceback.print_exc()
            say(failed=f"{type(error).__name__}: {error}")
        else:
            say(done=True, peak=_peak())


def _peak() -> int:
    """The most memory this process has held, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _end_with(parent: int) -> None:
    """End when the study does, however it ended: nobody would read what is made here."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def _session_of_all(keys: str) -> Session:
    """Model and data of the federation whose clients train alone, one run after another.

    Args:
        keys: the runs' configuration keys, as JSON.
    """
    from fedlora.config.config import Config
    from fedlora.runs.session import assemble

    return assemble(Config(**json.loads(keys)))


def _make(job: dict[str, Any], report: Any) -> None:
    """Make the run that a job describes, and tell how far it is.

    Runs that are compared do not measure how they train fastest: each could take another dtype, or
    other clients in a pass, and methods would differ by more than themselves.
    """
    from fedlora.commands.study.trainers import trainer_of
    from fedlora.config.config import Config
    from fedlora.engines.local import run, run_session
    from fedlora.runs.file_names import CONFIG, FINAL
    from fedlora.runs.lone_session import alone

    path = Path(job["path"])
    config = Config(**{**job["keys"], "output_dir": str(path)})
    begun, train = (path / CONFIG).is_file(), trainer_of(job["trainer"])
    if job["alone"] is None:
        _session_of_all.cache_clear()  # this run needs its memory
    if job["alone"] is not None:
        if begun:  # a client alone is soon done again
            shutil.rmtree(path)
        session = _session_of_all(json.dumps(job["keys"]))
        run_session(alone(session, job["alone"], path), report=report, train_function=train)
    elif begun:  # with the number of threads it began with; its settings were compared before
        run(None, resume=path, report=report, train_function=train)
    else:
        run(config, report=report, train_function=train, measure=False)
    assert (path / FINAL).is_dir()
    for old in path.glob("round-*"):  # final/ and metrics.jsonl are what tables and pages need
        shutil.rmtree(old)


if __name__ == "__main__":
    main()
