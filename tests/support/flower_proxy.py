"""A real nginx before a stand-in for Flower's SuperLink, with the settings that are deployed."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def free_ports(number: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class SuperLink:
    """Answers every request, and keeps what it was asked.

    Args:
        port: on which it listens.
        asked: method and path of every request.
        bodies: of every request.
    """

    port: int
    asked: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)


@contextmanager
def superlink(server: Path, port: int) -> Iterator[SuperLink]:
    """A stand-in for the SuperLink with the certificate of the server's folder."""
    seen = SuperLink(port)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            seen.asked.append(f"{self.command} {self.path}")
            seen.bodies.append(self.rfile.read(int(self.headers["Content-Length"] or 0)))
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"done")

        def do_GET(self) -> None:
            self.do_POST()

        def do_PUT(self) -> None:
            self.do_POST()

        def log_message(self, format: str, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.crt", server / "server.key")
    listener = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    listener.socket = context.wrap_socket(listener.socket, server_side=True)
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


@contextmanager
def nginx(server: Path, port: int) -> Iterator[None]:
    """The nginx that the server's folder starts, until it listens; ended at the end."""
    (server / "state" / "nginx").mkdir(parents=True)
    (server / "logs").mkdir()
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    assert program is not None
    command = [program, "-p", str(server), "-c", "nginx.conf", "-e", "logs/nginx-error.log"]
    started = subprocess.Popen([*command, "-g", "daemon off; user root;"])
    try:
        while True:
            with socket.socket() as call:
                if call.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert started.poll() is None, (server / "logs" / "nginx-error.log").read_text()
            time.sleep(0.05)
        yield
    finally:
        started.terminate()
        started.wait(60)


def request(server: Path, port: int, lines: str, body: bytes = b"") -> tuple[int, bytes]:
    """Send a request as it is written to localhost, and read the status and the body."""
    context = ssl.create_default_context(cafile=str(server / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as call,
    ):
        head = f"{lines} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        call.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b""
        while part := call.recv(65536):
            answer += part
    top, _, rest = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), rest
