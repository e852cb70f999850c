"""Puts a worker's status and a site's check into lines for a person."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.text import human_bytes

if TYPE_CHECKING:
    from fedlora.config.site import Site
    from fedlora.runs.site_check import SiteCheck


def status_lines(status: Mapping[str, Any], now: float) -> list[str]:
    """What a worker is at.

    Args:
        status: as the worker tells it.
        now: seconds of the epoch.
    """
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status["since"]))
    seconds = max(0, round(now - status["since"]))
    lines = [f"{status['site']}: {status['state']} since {since} ({seconds:,} s)"]
    if status.get("run"):
        lines.append(f"  run     {status['run']}, {_round(status)}")
    if status.get("rows") is not None:
        lines.append(
            f"  rows    {status['rows']:,} to train on, {status['eval_rows']:,} to evaluate on; "
            f"rank {status['rank']}"
        )
    if status.get("memory_bytes"):
        lines.append(
            f"  memory  {human_bytes(status['memory_bytes'])}; the base was loaded "
            f"{status['bases_loaded']} times"
        )
    lines.append(f"  process {status['pid']}, started again {status['restarts']} times")
    return lines


def _round(status: Mapping[str, Any]) -> str:
    """The round, and how far its training is."""
    text = f"round {status['round']}, attempt {status['attempt']}"
    if status.get("step") is not None:
        loss = "none" if status["loss"] is None else f"{status['loss']:.4f}"
        text += f": step {status['step']} of {status['steps']}, loss {loss}"
    return text


def check_lines(path: Path, site: Site, check: SiteCheck) -> list[str]:
    """What a site has, and how to start its worker."""
    return [f"{site.name}: ready", *_what_it_has(site, check), f"fedlora worker --site {path}"]


def _what_it_has(site: Site, check: SiteCheck) -> Iterator[str]:
    if check.train_rows is None:
        yield f"  rows    {check.rows:,} read; which can be used shows once a model is named"
    else:
        dropped = sum(check.dropped.values())
        yield (
            f"  rows    {check.rows - dropped:,} of {check.rows:,} can be used: "
            f"{check.train_rows:,} to train on ({check.tokens:,} tokens), "
            f"{check.eval_rows:,} to evaluate on"
        )
        for why, number in check.dropped.items():
            yield f"          {number:,} dropped: {why}"
        labels = f"; labels {', '.join(check.labels)}" if check.labels else ""
        yield f"  text    template {check.template}{labels}"
        yield (
            f"  model   {check.architecture}, {check.parameters:,} parameters, {check.modules} "
            "modules that can be trained"
        )
    yield f"  bounds  {_bounds(site)}"
    where = f"port {site.port} of 127.0.0.1, called by {site.socket}" if site.port else site.socket
    yield f"  socket  {where}"
    for note in check.notes:
        yield f"  note    {note}"


def _bounds(site: Site) -> str:
    own = {"rank": site.rank, "max_rank": site.max_rank, **site.bounds.model_dump()}
    given = [
        f"{key} {', '.join(value) if isinstance(value, list) else value}"
        for key, value in own.items()
        if value is not None
    ]
    return "; ".join(given) or "none: a server may set what it likes"
