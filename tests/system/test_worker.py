"""A worker as a process: its life, what it survives, and that no row leaves it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedlora.engines import carrier
from fedlora.engines.carrier import SiteError
from support.one_site import ASKED, Call, OneSite, site_file
from support.rows import rows, write_jsonl
from support.worker_processes import Recorder, alive, ask_cli, told, until, worker


@pytest.fixture
def clinic(tiny_llama: Path, site_files: Path, tmp_path: Path) -> tuple[Path, str]:
    """The file of a site, and the address of its worker."""
    rows_of_site = str(site_files / "site_1.jsonl")
    path = site_file(tmp_path / "clinic", tiny_llama, rows_of_site, socket="s", state_dir="kept")
    return path, str(path.with_name("s"))


@pytest.mark.slow
def test_what_a_worker_survives(clinic: tuple[Path, str]) -> None:
    """Killed within a run, its process and its supervisor, it goes on with the same bytes."""
    path, address = clinic
    with worker(path, address) as running:
        run = OneSite(running.call, "fedsa")
        run.begin()
        run.fold(run.train())
        loaded = running.status()["bases_loaded"]
        first = run.train()
        assert running.status()["bases_loaded"] == loaded == 1, "a round loads no base"
        running.kill_child()
        assert run.train() == first
        run.fold(first)
        status = told(path, "--status")
        assert (status["round"], status["restarts"], status["rows"]) == (2, 1, 12)
        second = run.train()
        refused = ask_cli(path)
        assert (refused.returncode, "is in use by a worker that runs" in refused.stderr) == (
            2,
            True,
        )
        running.process.kill()
        running.process.wait()
    assert Path(address).exists(), "it could not remove its socket"
    until(lambda: "its worker is not running" in reason_of(address))
    path.write_text(f"{path.read_text()}port: {free_port()}\n")  # its address stays what it was
    with worker(path, address) as running:
        run.call = running.call
        assert run.train() == second
        run.fold(second)
        assert run.evaluate().rows == 4
        watch_cancel_and_be_late(path, address, running.call)
        child = running.status()["pid"]
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
        assert not alive(child)
    assert not Path(address).exists()
    gone = ask_cli(path, "--status")
    assert gone.returncode == 2
    assert gone.stderr.startswith(f"fedlora: {address}: no worker has its socket there; start it")


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def reason_of(address: str) -> str:
    """Why nobody answers at an address."""
    with pytest.raises(SiteError) as raised:
        carrier.status(address)
    return raised.value.reason


def watch_cancel_and_be_late(path: Path, address: str, call: Call) -> None:
    """A training that would be long: it is watched, another is refused, and it is given up."""
    run = OneSite(call, asked={**ASKED, "max_steps": 20_000}, run="long")
    run.begin()
    errors: list[SiteError] = []

    def train() -> None:
        try:
            run.train()
        except SiteError as error:
            errors.append(error)

    training = threading.Thread(target=train)
    training.start()
    until(lambda: carrier.status(address)["step"])
    status = told(path, "--status")
    assert (status["event"], status["state"], status["steps"]) == ("status", "training", 20_000)
    with pytest.raises(SiteError, match="is at train of round 1, attempt 0") as busy:
        run.train(attempt=1)
    carrier.cancel(address)
    training.join(60)
    with pytest.raises(SiteError, match="the deadline has passed") as late:
        carrier.call(address, run.train_bytes(), seconds=0.5)
    assert [busy.value.kind, late.value.kind] == ["busy", "deadline"]
    assert [(error.kind, error.reason) for error in errors] == [
        ("deadline", "the call was cancelled")
    ]


SECRET = "Mrs Ellwood of Lower Brook Street, born in 1961, takes amiodarone"
LABELS = ["no", "yes"]
SECRET_LABEL = "amiodarone-overdose"


def forbidden(model: Path, texts: list[str]) -> list[bytes]:
    """The texts, and their token ids as any program would write them; whole, and in parts."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    out = []
    for text in texts:
        for begin in range(0, max(1, len(text) - 12), 6):
            part = text[begin : begin + 12]
            out += [part.encode(), part.encode("utf-16-le"), part.encode("utf-32-le")]
            ids = tokenizer(part, add_special_tokens=False)["input_ids"]
            out += [np.array(ids, dtype=kind).tobytes() for kind in ("<i2", "<i4", "<i8")]
            out += [between.join(map(str, ids)).encode() for between in (",", ", ", " ")]
    return out


@pytest.fixture(params=["causal", "classifier"])
def private(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path
) -> tuple[Path, dict[str, Any]]:
    """The file of a site whose rows hold the secret, and what its server asks beside the usual."""
    plain = rows(12)
    for i in (1, 4, 9):
        plain[i] |= {"prompt": f"{SECRET}>", "completion": SECRET[::-1]}
    keys: dict[str, Any] = {"socket": "s", "state_dir": "kept"}
    asked: dict[str, Any] = {"eval_exact_match": "auto"}
    if request.param == "classifier":
        labelled = [{"text": r["prompt"], "label": LABELS[i % 2]} for i, r in enumerate(plain)]
        labelled[4]["label"] = SECRET_LABEL
        plain = labelled
        keys |= {"label_column_name": "label", "text_column_names": ["text"]}
        asked |= {"label_names": [*LABELS, SECRET_LABEL]}
    table = write_jsonl(tmp_path / "rows.jsonl", plain)
    return site_file(tmp_path / "clinic", tiny_llama, str(table), **keys), asked


@pytest.mark.slow
def test_no_row_leaves_the_site(private: tuple[Path, dict[str, Any]], tiny_llama: Path) -> None:
    """Every byte that a worker sends is read: rounds, evaluations, status, refusals, errors."""
    path, asked = private
    address = str(path.with_name("s"))
    with worker(path, address) as running, Recorder(f"{address}-seen", address).open() as seen:

        def call(message: bytes) -> bytes:
            return carrier.call(seen.address, message, seconds=120)

        secrets = [SECRET, SECRET[::-1]]
        if "label_names" in asked:
            broken = OneSite(call, asked={**ASKED, "label_names": LABELS}, run="broken")
            with pytest.raises(SiteError, match="label_names cannot be used at this site"):
                broken.join()
            assert SECRET_LABEL in running.log.read_text(), "the site itself is told"
            assert SECRET_LABEL.encode() not in seen.sent
        run = OneSite(call, asked={**ASKED, **asked})
        run.begin()
        for _ in range(2):
            run.fold(run.train())
            evaluated = run.evaluate()
        carrier.status(seen.address)
        with pytest.raises(SiteError, match="of the past"):
            call(run.train_bytes(round=1))
        refused = OneSite(call, asked={**ASKED, **asked, "train_file": "/etc/passwd"}, run="two")
        with pytest.raises(SiteError, match="is not a server's to set"):
            refused.join()
        assert told(path, "--stop") == {"event": "stopped", "site": "clinic"}
        assert running.process.wait(60) == 0
    assert evaluated.rows == 3
    assert len(seen.sent) > 10_000, "the rounds came through the recorder"
    assert b"num_examples" in seen.sent
    found = [x for x in forbidden(tiny_llama, secrets) if x in seen.sent]
    assert found == []


def test_the_recorder_would_find_a_row(tiny_llama: Path) -> None:
    """The test above can fail: rows in any of these forms are found."""
    ids = AutoTokenizer.from_pretrained(tiny_llama)(SECRET)["input_ids"]
    for sent in (
        json.dumps({"row": SECRET}).encode(),
        np.array(ids, dtype="<i8").tobytes(),
        np.array(ids, dtype="<i2").tobytes(),
        json.dumps(ids).encode(),
    ):
        assert any(x in sent for x in forbidden(tiny_llama, [SECRET]))


def test_a_unit_that_systemd_understands(clinic: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = clinic
    unit = tmp_path / "fedlora-clinic.service"
    done = ask_cli(path, "--install", "--output", str(unit))
    assert done.returncode == 0
    assert f"sudo install -m 644 {unit} /etc/systemd/system/fedlora-clinic.service" in done.stdout
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not here to check the unit")
    checked = subprocess.run(
        [verify, "verify", str(unit)],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_file_that_cannot_be_used(tiny_llama: Path, tmp_path: Path) -> None:
    path = site_file(tmp_path / "clinic", tiny_llama, "rows.jsonl", socket="s", trian_file="x")
    done = ask_cli(path)
    said = "trian_file: unknown key of a site; did you mean train_file?"
    assert (done.returncode, done.stderr) == (2, f"fedlora: {path}: {said}\n")
    assert not path.with_name("s").exists()
