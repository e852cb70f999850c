"""Messages as bytes beside copying memory: 50 MB in 1 and in 448 tensors; round trips to workers.

    python benchmarks/wire.py

Prints, for each number of tensors, what encoding and decoding take against one copy of the same
bytes (a ratio of 10 is a tenth of the speed), and how many bytes a message has beyond its tensors;
then the time from a request to a worker process to its answer, without training, and the same for
the resident worker of a site over its socket. Fails if the rounds of a run load a base again.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import site_worker
import torch
from common import RESULTS, machine

from fedlora.federation.envelope import Header, Message, decode, encode

MEGABYTES = 50
REPEATS = 7
HEADER = Header("0" * 16, 1, 0, "train", "0" * 64, "0" * 64)


def median(function: Callable[[], Any]) -> float:
    """Median seconds of a call; the first one does not count."""
    function()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def echo(connection: Any) -> None:
    """A worker process that reads a message and sends it back."""
    torch.set_num_threads(1)
    while data := connection.recv_bytes():
        connection.send_bytes(encode(decode(data)))


def round_trip(message: Message) -> float:
    """Median seconds to another process and back, encoded and decoded at both ends."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=echo, args=(theirs,), daemon=True)
    process.start()

    def there_and_back() -> None:
        ours.send_bytes(encode(message))
        decode(ours.recv_bytes())

    seconds = median(there_and_back)
    ours.send_bytes(b"")
    process.join()
    return seconds


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "| tensors | copy, ms | encode, ms | decode, ms | encode / copy | decode / copy | "
        "beyond the tensors |",
        "|---|---|---|---|---|---|---|",
    ]
    for number in (1, 448):
        values = MEGABYTES * 10**6 // 4 // number
        tensors = {
            f"g0/model.layers.{i}.self_attn.q_proj/A": torch.randn(values) for i in range(number)
        }
        message = Message(HEADER, {"clients": []}, tensors)
        data = encode(message)
        beyond = len(data) / sum(value.nbytes for value in tensors.values()) - 1
        source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        copy = median(source.clone)
        written, read = median(partial(encode, message)), median(partial(decode, data))
        lines.append(
            f"| {number} | {1e3 * copy:.1f} | {1e3 * written:.1f} | {1e3 * read:.1f} | "
            f"{written / copy:.1f} | {read / copy:.1f} | {100 * beyond:.3f}% |"
        )
    small = Message(HEADER, {"clients": []}, {"g0/q_proj/A": torch.randn(8, 512)})
    trip = round_trip(small)
    call, loaded = site_worker.measure()
    if loaded != 1:
        raise SystemExit(f"{site_worker.ROUNDS} rounds of one run loaded {loaded} bases")
    text = (
        f"{machine()}; one thread, medians of {REPEATS}; {MEGABYTES} MB of float32.\n\n"
        + "\n".join(lines)
        + f"\n\nA request to a worker and its answer, without training: {1e3 * trip:.1f} ms.\n"
        + f"A call to a site's resident worker over its socket, without training: {1e3 * call:.1f} "
        f"ms; {site_worker.ROUNDS} rounds of a run loaded 1 base.\n"
    )
    print(text)
    (RESULTS / "wire.md").write_text(text)


if __name__ == "__main__":
    main()
