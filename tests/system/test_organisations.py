"""The guide across organisations as it is written: who runs, who is killed, and who is refused.

One federation serves all tests, in this order: the guide begins it and ends it.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

import fedlora
from fedlora.commands.doctor.certificates import credentials_of
from fedlora.commands.doctor.checks import OK, PROBLEM
from fedlora.commands.doctor.connection import server_checks
from fedlora.config.config import Config
from fedlora.config.federation_file import read_federation
from fedlora.config.yaml_file import read_yaml
from fedlora.engines import carrier
from fedlora.engines.nvflare.kit import read_admin_kit
from fedlora.engines.nvflare.order import run_id
from fedlora.engines.nvflare.session import connect
from fedlora.errors import FedloraError, InputError
from fedlora.runs.events import Event
from support.courses import tensor_files
from support.deployed import SITES, SOURCE, Deployed, in_one_process, until
from support.guided import Guided

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guided]:
    """The guide up to where its federation runs."""
    guide = Guided(Path(tmp_path_factory.mktemp("g")))
    make, rows, start, *_ = guide.blocks
    try:
        assert "site    gamma" in guide.shell(make)
        assert "bounds:" in guide.shell(rows.replace("cd folders\n", ""))
        guide.shell(start)
        yield guide
    finally:
        guide.deployed.stop()


@pytest.fixture(scope="module")
def ran(guided: Guided) -> Path:
    """The output directory of the guide's run."""
    told = guided.shell(guided.blocks[4])
    assert "3 clients, ranks 8 4 2, rows 72 72 72" in told
    assert "ended after round 2" in told
    return guided.folders / "out"


def keys_of(guided: Guided, out: Path, **changed: Any) -> dict[str, Any]:
    """The guide's run, with a kit and an output directory from here."""
    keys = read_yaml(guided.folders / "server.yaml")
    kit = str(guided.folders / "ada@example.org" / "kit")
    return {**keys, "kit": kit, "num_threads": 1, "output_dir": str(out), **changed}


def said_of(guided: Guided, kit: Path) -> tuple[str, str]:
    """What the line of the server says of a kit's certificate, and its state."""
    (check,) = server_checks("localhost", guided.port, credentials_of(kit))
    return check.state, check.found


def test_everybody_is_told_that_all_is_ready(guided: Guided) -> None:
    told = guided.shell(guided.blocks[3])
    assert told.count("takes your certificate") == 3
    assert "72 to train on" in told
    assert "problem" not in told


def test_the_guide_s_run_has_the_bytes_of_one_process(
    guided: Guided, ran: Path, tmp_path: Path
) -> None:
    keys = keys_of(guided, tmp_path / "out")
    quiet = in_one_process(keys, guided.folders, tmp_path / "rows" / "out")
    assert tensor_files(quiet) == tensor_files(ran)
    parts = (guided.folders / "alpha" / "kit").glob("*/app_alpha/*")
    assert "custom" not in {path.name for path in parts}, "a job brings no code"


def after_round(acts: dict[int, Callable[[], None]]) -> Callable[[Event], None]:
    """Listens, and acts once after each of these rounds."""

    def hear(event: Event) -> None:
        if event["event"] == "round" and event["round"] in acts:
            acts.pop(event["round"])()

    return hear


def pid_of(guided: Guided, site: str) -> int:
    """The process of a site's worker that trains."""
    return int(carrier.status(str(guided.folders / site / "worker.sock"))["pid"])


def test_processes_that_are_killed_change_nothing(
    guided: Guided, ran: Path, tmp_path: Path
) -> None:
    """A worker, and then a client's job process, which costs the job.

    `test_addresses.py` kills the server.
    """
    told = list[Event]()
    act = after_round(
        {
            1: lambda: os.kill(pid_of(guided, "beta"), signal.SIGKILL),
            2: lambda: os.kill(guided.deployed.job_process("gamma"), signal.SIGKILL),
        }
    )

    def hear(event: Event) -> None:
        told.append(event)
        act(event)

    keys = keys_of(guided, tmp_path / "out", method="ffa", client_ranks=4, num_rounds=3)
    result = fedlora.run(Config(**keys), report=hear)
    quiet = in_one_process(keys, guided.folders, tmp_path / "rows" / "out")
    assert tensor_files(quiet) == tensor_files(result.output_dir)
    begun = [event["resumed_from"] for event in told if event["event"] == "begin"]
    assert begun[0] is None
    assert len(begun) >= 2


def test_an_admin_stops_a_run_and_goes_on_elsewhere(
    guided: Guided, ran: Path, tmp_path: Path
) -> None:
    """The job is aborted past fedlora, and goes on over the workers' sockets."""

    def abort() -> None:
        pid = pid_of(guided, "gamma")
        os.kill(pid, signal.SIGSTOP)  # so that the run cannot end before
        session = connect(read_admin_kit(guided.deployed.kit()))
        name = f"fedlora-{run_id(tmp_path / 'out')}"
        session.abort(session.running(name) or "")
        session.close()
        os.kill(pid, signal.SIGCONT)

    keys = keys_of(guided, tmp_path / "out", num_rounds=3)
    with pytest.raises(FedloraError, match=r"the job was aborted by ada@example\.org"):
        fedlora.run(Config(**keys), report=after_round({1: abort}))
    assert (tmp_path / "out" / "round-1").is_dir()
    sites = {name: str(guided.folders / name / "worker.sock") for name in SITES}
    over_sockets = {**keys, "engine": "sites", "kit": None, "sites": sites}
    result = fedlora.run(Config(**over_sockets), resume=tmp_path / "out")
    quiet = in_one_process(keys, guided.folders, tmp_path / "rows" / "out")
    assert tensor_files(quiet) == tensor_files(result.output_dir)


def test_no_certificate_and_one_of_another_federation(
    guided: Guided, ran: Path, tmp_path: Path
) -> None:
    """The kit of the real site is taken; the others end in the handshake."""
    kit = guided.folders / "alpha" / "kit"
    assert said_of(guided, kit)[0] == OK
    root = str(credentials_of(kit).root)
    bare = subprocess.run(
        [sys.executable, "-c", _BARE, str(guided.port), root], capture_output=True, text=True
    )
    assert "let in" not in bare.stdout
    other = Deployed(tmp_path / "other")
    other.deploy({})
    keys = keys_of(guided, tmp_path / "out", kit=str(other.kit()))
    with pytest.raises(FedloraError, match=r"the server at localhost:\d+ cannot be reached"):
        fedlora.run(Config(**keys))
    theirs = other.folders / "alpha" / "kit" / "startup"
    state, found = said_of(guided, theirs.parent)
    assert (state, "verify failed" in found or "certificate" in found) == (PROBLEM, True)
    mixed = tmp_path / "mixed"
    shutil.copytree(kit, mixed)
    for name in ("client.crt", "client.key"):
        shutil.copy(theirs / name, mixed / "startup" / name)
    state, found = said_of(guided, mixed)
    assert (state, "refuses your certificate" in found) == (PROBLEM, True)


_BARE = """
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[2])
context.set_alpn_protocols(["h2"])
try:
    with socket.create_connection(("localhost", int(sys.argv[1]))) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as secured:
            secured.sendall(b"PRI * HTTP/2.0")
            print("let in" if secured.recv(9) else "the connection ends")
except OSError as error:
    print(error)
"""
"""Calls a server without a certificate, and says how that ends."""


def test_a_certificate_that_has_ended(guided: Guided, tmp_path: Path) -> None:
    """Signed by the federation itself, for a day that is over."""
    kit = tmp_path / "kit"
    shutil.copytree(guided.folders / "alpha" / "kit", kit)
    state = guided.folders / ".federation" / "workspace" / "clinics" / "state" / "cert.json"
    kept = json.loads(state.read_text())
    signing = serialization.load_pem_private_key(kept["root_pri_key"].encode(), None)
    own = credentials_of(kit)
    before = x509.load_pem_x509_certificate(own.certificate.read_bytes())
    end = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    made = x509.CertificateBuilder(
        before.issuer,
        before.subject,
        before.public_key(),
        x509.random_serial_number(),
        end - datetime.timedelta(days=9),
        end,
        list(before.extensions),
    ).sign(signing, hashes.SHA256())  # type: ignore[arg-type]
    own.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    found = said_of(guided, kit)
    assert (found[0], "refuses your certificate" in found[1]) == (PROBLEM, True)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fedlora", "doctor", "--json", "--kit", str(kit)),
            *("--site", str(guided.folders / "alpha" / "site.yaml")),
        ],
        env=guided.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    lines = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert f"ended on {end:%Y-%m-%d}" in lines["certificate"]["found"]
    assert lines["server"]["state"] == PROBLEM


def test_a_member_may_not_submit(guided: Guided, ran: Path, tmp_path: Path) -> None:
    kit = str(guided.folders / "bob@example.org" / "kit")
    with pytest.raises(InputError, match=r"bob@example\.org may not submit"):
        fedlora.run(Config(**keys_of(guided, tmp_path / "out", kit=kit)))


def test_more_than_a_site_grants(guided: Guided, ran: Path, tmp_path: Path) -> None:
    keys = keys_of(guided, tmp_path / "out", client_ranks=[8, 4, 32])
    with pytest.raises(InputError, match=r"gamma: lora_r: 32 is asked for, .* at most 16"):
        fedlora.run(Config(**keys))
    assert not (tmp_path / "out").exists()
    assert "lora_r: 32 is asked for" in (guided.folders / "gamma" / "client.log").read_text()


def test_one_more_site_with_another_agreement_and_with_another_base(
    guided: Guided, ran: Path, tmp_path: Path
) -> None:
    """The guide's fourth site has another fedlora at first, and then other weights."""
    before = (guided.folders / "alpha" / "kit" / "startup" / "client.key").read_bytes()
    kit = tmp_path / "kit"
    told = guided.shell(guided.blocks[5])
    assert re.search(r"site +delta .*\(made\)", told)
    assert re.search(r"site +alpha .*\(as it was\)", told)
    assert (guided.folders / "alpha" / "kit" / "startup" / "client.key").read_bytes() == before
    shutil.copytree(guided.folders / "ada@example.org" / "kit", kit)
    delta, log = guided.folders / "delta", guided.folders / "server" / "server.log"
    shutil.copy(guided.folders / "alpha" / "rows.jsonl", delta / "rows.jsonl")
    keys = keys_of(guided, tmp_path / "out", kit=str(kit), client_ranks=[8, 4, 2, 2])

    start = guided.blocks[2].replace("server alpha beta gamma", "delta")
    guided.shell(start.replace("alpha beta gamma", "delta"), other_version(tmp_path / "source"))
    said = "the other side holds to another agreement (method, its options, target modules or seed)"
    with pytest.raises(InputError, match=re.escape(f"sites: delta: {said}")):
        fedlora.run(Config(**keys))
    assert f"does not do what it was asked: {said}" in (delta / "client.log").read_text()

    guided.deployed.kill("delta")
    other_base(delta / "base")
    text = (delta / "site.yaml").read_text()
    (delta / "site.yaml").write_text(text.replace(": embedded", ": base"))
    guided.deployed.start(["delta"])
    with pytest.raises(InputError, match="delta") as refused:
        fedlora.run(Config(**keys))
    assert "base" in str(refused.value)
    assert str(refused.value) in log.read_text()
    assert not (tmp_path / "out").exists()


def other_version(path: Path) -> Path:
    """The package with one more option of a rule, as a later version may have it."""
    shutil.copytree(SOURCE, path)
    rule = path / "fedlora" / "methods" / "exact.py"
    option = "    start_fraction: float = bounded("
    assert option in rule.read_text()
    more = "    some_more: float = bounded(0.0, training=True, ge=0, le=1)\n"
    rule.write_text(rule.read_text().replace(option, more + option))
    return path


def other_base(path: Path) -> None:
    """The embedded base with one weight changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedlora.embedded import BASE_DIR

    model = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    next(model.parameters()).data.add_(0.5)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(path)


def test_the_federation_ends_as_the_guide_ends_it(guided: Guided) -> None:
    """The last test of this file: the sites' folders end with their server's."""
    assert read_federation(guided.folders.parent / "federation.yaml").name == "clinics"
    guided.shell(guided.blocks[6])
    for name in ("alpha", "beta", "gamma"):
        path = guided.folders / name / "worker.sock"
        until(lambda path=path: not path.exists(), f"{name} has ended")  # type: ignore[misc]
