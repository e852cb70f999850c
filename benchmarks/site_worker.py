"""What a resident worker costs beside training: a call over its socket, and bases loaded by rounds.

It is a part of `benchmarks/wire.py`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fedlora
from fedlora.config.config import Config
from fedlora.embedded import instructions
from fedlora.engines import carrier
from fedlora.federation.envelope import Header, decode, encode
from fedlora.federation.exchange import Agreement
from fedlora.federation.handshake import (
    Agree,
    Join,
    agree_message,
    join_message,
    read_agreed,
    read_joined,
)
from fedlora.methods import METHODS
from fedlora.runs.site_settings import site_settings

ROUNDS, CALLS = 3, 30


@contextmanager
def worker(directory: Path) -> Iterator[str]:
    """A worker with rows of the embedded data set; gives the address of its socket."""
    lines = [json.dumps(row) + "\n" for row in instructions(64, 1, "train")]
    (directory / "rows.jsonl").write_text("".join(lines))
    site = directory / "site.yaml"
    site.write_text("name: site\nmodel_name_or_path: embedded\ntrain_file: rows.jsonl\n")
    process = subprocess.Popen([sys.executable, "-m", "fedlora", "worker", "--site", str(site)])
    address = str(directory / "site-state" / "worker.sock")
    try:
        while not is_up(address):
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def is_up(address: str) -> bool:
    """Whether a worker has imported all that it needs."""
    try:
        return bool(carrier.status(address)["state"] == "idle")
    except carrier.SiteError:
        return False


def measure() -> tuple[float, int]:
    """Median seconds of a call without training, and how many bases the rounds of a run loaded.

    The call carries a message that is decoded, compared with what the site holds to, kept on its
    disk and answered.
    """
    with tempfile.TemporaryDirectory() as scratch, worker(Path(scratch)) as address:
        config = Config(
            model_name_or_path="embedded",
            engine="sites",
            sites={"site": address},
            num_rounds=ROUNDS,
            max_steps=1,
            lora_r=4,
            dtype="float32",
            num_threads=1,
            output_dir=f"{scratch}/run",
        )
        fedlora.run(config)
        loaded = int(carrier.status(address)["bases_loaded"])
        return statistics.median(call_seconds(config, address)), loaded


def call_seconds(config: Config, address: str) -> list[float]:
    """How long calls take that ask a site what it holds to."""
    header = Header("0" * 16, 0, 0, "", "", "")
    join = Join(0, 1, config.method, site_settings(config, 0, config.lora_r))
    answer = carrier.call(address, encode(join_message(header, join)))
    joined = read_joined(decode(answer))
    rule, options = METHODS[config.method], config.rule_options()
    digest = Agreement(rule, options, joined.shapes, config.seed).digest
    agree = Agree(0, joined.rank, 1, digest)
    header = Header(header.run, 0, 0, "", joined.base, digest)
    seconds = []
    for _ in range(CALLS):
        began = time.perf_counter()
        answer = carrier.call(address, encode(agree_message(header, agree)))
        read_agreed(decode(answer), {})
        seconds.append(time.perf_counter() - began)
    return seconds
