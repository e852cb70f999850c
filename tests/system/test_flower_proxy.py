"""The nginx that `fedlora deploy flower` sets up: the fleet passes, all else is refused."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedlora.commands.deploy.flower.folders import deploy
from support.flower_federation import federation
from support.flower_proxy import SuperLink, free_ports, nginx, request, superlink

pytestmark = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin") is None,
    reason="nginx is not installed (apt-get install nginx)",
)


@dataclass
class Deployment:
    """What the sites see of it, and what the SuperLink behind it sees.

    Args:
        server: the server's folder.
        port: of nginx.
        behind: the SuperLink.
    """

    server: Path
    port: int
    behind: SuperLink

    def ask(self, line: str, body: bytes = b"") -> tuple[int, bytes]:
        return request(self.server, self.port, line, body)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("proxy")
    port, loopback = free_ports(2)
    deploy(federation(directory, port=port, loopback=loopback), directory / "out")
    server = directory / "out" / "server"
    with superlink(server, loopback) as behind, nginx(server, port):
        yield Deployment(server, port, behind)


FLEET = (
    "register-node", "activate-node", "deactivate-node", "unregister-node", "send-node-heartbeat",
    "pull-messages", "push-messages", "get-run", "get-fab", "push-object", "pull-object",
    "confirm-message-received",
)  # fmt: skip


@pytest.mark.parametrize("call", FLEET)
def test_what_a_supernode_calls_passes(call: str, deployment: Deployment) -> None:
    assert deployment.ask(f"POST /v1/fleet/{call}", b"a message") == (200, b"done")
    assert deployment.behind.asked[-1] == f"POST /v1/fleet/{call}"
    assert deployment.behind.bodies[-1] == b"a message"


def test_these_are_the_calls_that_flower_knows() -> None:
    from flwr.superlink.routers.fleet.router import router

    paths = {route.path for route in router.routes}  # type: ignore[attr-defined]
    assert paths == {f"/v1/fleet/{call}" for call in FLEET}


def test_a_piece_of_an_array_passes(deployment: Deployment) -> None:
    piece = bytes(8 * 2**20)
    assert deployment.ask("POST /v1/fleet/push-object", piece) == (200, b"done")
    assert deployment.behind.bodies[-1] == piece


REFUSED = (
    "POST /v1/control/start-run",
    "POST /v1/control/register-node",
    "POST /v1/runtime/pull-task",
    "GET /health",
    "GET /docs",
    "GET /openapi.json",
    "POST /",
    "POST /v1/fleet/",
    "POST /v1/fleet",
    "GET /v1/fleet/get-run",
    "PUT /v1/fleet/get-run",
    # Ways around that others have left open
    "POST /v1/fleet/../control/start-run",
    "POST /v1/fleet/%2e%2e/control/start-run",
    "POST /v1/fleet/..%2fcontrol%2fstart-run",
    "POST /v1/fleet/get-run/../../control/start-run",
    "POST /v1/fleet/get-run%2f..%2f..%2fcontrol%2fstart-run",
    "POST /v1/fleet;/../control/start-run",
    "POST /v1/fleet/%00/../../control/start-run",
    "POST //v1/control/start-run",
    "POST /V1/control/start-run",
    "POST http://localhost/v1/control/start-run",
)


@pytest.mark.parametrize("line", REFUSED)
def test_everything_else_is_refused(line: str, deployment: Deployment) -> None:
    before = len(deployment.behind.asked)
    status, _ = deployment.ask(line)
    assert status in (400, 403)
    assert deployment.behind.asked[before:] == []


def test_what_reaches_the_superlink_is_the_path_that_was_checked(deployment: Deployment) -> None:
    """nginx reads `..` away; the SuperLink must not be left to read it in another way."""
    status, _ = deployment.ask("POST /v1/control/start-run/..%2f..%2ffleet/get-run?x=/v1/control")
    assert status == 200
    assert deployment.behind.asked[-1] == "POST /v1/fleet/get-run"


def test_a_client_that_does_not_know_the_authority_gives_up(deployment: Deployment) -> None:
    foreign = deployment.server.parent / "foreign"
    foreign.mkdir()
    deploy(federation(foreign), foreign / "out")
    with pytest.raises(ssl.SSLCertVerificationError):
        request(foreign / "out" / "server", deployment.port, "POST /v1/fleet/get-run")
