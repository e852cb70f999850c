"""Tells all who listen to a run: `progress.json`, the trackers, the caller's own report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedlora.config.config import Config
from fedlora.runs.events import Event, Report, ignore
from fedlora.runs.progress import Progress
from fedlora.runs.tracker_checks import check_trackers
from fedlora.runs.trackers import Trackers
from fedlora.text import finite, first_line


def _to_stderr(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextmanager
def observers(
    config: Config,
    output_dir: str | Path,
    report: Report = ignore,
    warn: Callable[[str], None] = _to_stderr,
) -> Iterator[Report]:
    """All who listen to a run, as one function of its events.

    They are told in the order `progress.json`, trackers of `report_to`, `report`; numbers that are
    not finite reach them as None. The first two are closed in any case, and neither of them makes a
    run fail once it has begun.

    Args:
        config: the run's.
        output_dir: its directory, which exists.
        report: the caller's own; what it raises ends the run.
        warn: told once about a tracker that fails.

    Raises:
        InputError: as `check_trackers`.
    """
    output_dir = Path(output_dir)
    trackers = Trackers(config, output_dir, check_trackers(config), warn)
    progress = Progress(output_dir)
    problem: str | None = None

    def tell(event: Event) -> None:
        plain = finite(event)
        for listener in (progress, trackers, report):
            listener(plain)

    def close(name: str) -> None:
        trackers.close(name, succeeded=problem is None)

    with ExitStack() as stack:
        for name in trackers.names:
            stack.callback(close, name)
        stack.callback(lambda: progress.close(problem))  # first: an upload may take its time
        try:
            yield tell
        except BaseException as error:
            problem = "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)
            raise
