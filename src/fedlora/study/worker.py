"""A process that makes one run after another for `fedlora study`.

    python -m fedlora.study.worker

Reads a JSON object per line, `{"path", "keys", "alone", "trainer"}`, and answers each on standard
output with `{"round": n}` for a round that is done, then `{"done": true, "peak": bytes}` or
`{"failed": why}`. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer jobs until standard input ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    from fedlora.console import quiet_libraries
    from fedlora.errors import FedloraError

    quiet_libraries()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            _make(job, lambda event: say(round=event["round"]) if event["event"] == "round" else 0)
        except FedloraError as error:
            say(failed=str(error))
        except Exception as error:  # another run may well succeed; this one is told of by name
            say(failed=f"{type(error).__name__}: {error}")
        else:
            say(done=True, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _make(job: dict[str, Any], report: Any) -> None:
    from fedlora.checkpoint import CONFIG, FINAL
    from fedlora.config import Config
    from fedlora.engines.local import run, run_session
    from fedlora.setup import alone, assemble
    from fedlora.study.trainers import trainer_of

    path = Path(job["path"])
    config = Config(**{**job["keys"], "output_dir": str(path)})
    begun = (path / CONFIG).is_file()
    if job["alone"] is not None:
        if begun:  # a client alone is soon done again
            shutil.rmtree(path)
        session = assemble(config)
        run_session(alone(session, job["alone"], path), report=report)
    elif begun:
        run(config, resume=path, report=report, train_function=trainer_of(job["trainer"]))
    else:
        run(config, report=report, train_function=trainer_of(job["trainer"]))
    assert (path / FINAL).is_dir()
    for old in path.glob("round-*"):  # final/ and metrics.jsonl are what tables and pages need
        shutil.rmtree(old)


if __name__ == "__main__":
    main()
