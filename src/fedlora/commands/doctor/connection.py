"""Tries to reach a federation's server: its name, its port, its certificate, and what it takes."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import socket
import ssl
from collections.abc import Iterator
from typing import Any

from fedlora.commands.doctor.certificates import SOON, Credentials
from fedlora.commands.doctor.checks import OK, PROBLEM, WARNING, Check

_SECONDS = 10.0
"""That a server may take to answer at each step."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""How a client of HTTP/2 begins; a server that accepts its certificate answers with settings."""

_UNSYNCHRONISED = 5  # what the kernel says of a clock that nothing keeps right


def clock_check() -> Check:
    """Whether the system keeps its clock right; certificates depend on it."""
    now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    try:
        libc = ctypes.CDLL(None)
        state = libc.adjtimex(ctypes.create_string_buffer(512))  # all zero: it changes nothing
    except (OSError, AttributeError):
        return Check("clock", OK, f"{now}; this system does not say whether it is kept right")
    if state == _UNSYNCHRONISED:
        remedy = "compare it with another one, or let chrony or systemd-timesyncd keep it"
        return Check("clock", WARNING, f"{now}; nothing keeps it right", remedy)
    return Check("clock", OK, f"{now}, kept right by the system")


def server_checks(
    host: str, port: int, own: Credentials | None, what: str = "server"
) -> Iterator[Check]:
    """Whether a server can be reached, is who it should be, and lets this participant in.

    Args:
        host: its name or address.
        port: that it listens on.
        own: what is shown to it, and what it is recognised by; None: neither.
        what: it is called in the lines.
    """
    where = f"{host}:{port}"
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        remedy = "is the name right? ask your network's administrator, or add it to /etc/hosts"
        yield Check(what, PROBLEM, f"{where}: the name is not known ({error.strerror})", remedy)
        return
    try:
        plain = socket.create_connection((host, port), _SECONDS)
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        why = "nobody listens there" if refused else error.strerror or str(error)
        remedy = f"does a firewall let {address}:{port} through?"
        if refused:
            remedy = "start the server with ./start in its folder, or ask whoever runs it"
        yield Check(what, PROBLEM, f"{where} ({address}): {why}", remedy)
        return
    with contextlib.closing(plain):
        yield from _secured(plain, host, where, own, what)


def _secured(
    plain: socket.socket, host: str, where: str, own: Credentials | None, what: str
) -> Iterator[Check]:
    """What the server says over TLS."""
    plain.settimeout(_SECONDS)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if own is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        if own is not None:
            context.load_verify_locations(own.root)
            context.load_cert_chain(own.certificate, own.key)
        secured = context.wrap_socket(plain, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        remedy = (
            "is this the server of your federation? if it was deployed anew, so must be your folder"
        )
        yield Check(what, PROBLEM, f"{where}: {error.verify_message}", remedy)
        return
    except (OSError, ValueError) as error:
        remedy = "does a proxy stand between? the server is to be reached without one"
        yield Check(what, PROBLEM, f"{where}: no TLS: {error}", remedy)
        return
    with contextlib.closing(secured):
        yield from _end_of(secured, what)
        if own is None:
            yield Check(what, OK, f"{where} listens, with TLS")
        elif why := _refusal(secured):
            remedy = "see the line of your certificate; ask whoever deployed the federation"
            yield Check(what, PROBLEM, f"{where} refuses your certificate: {why}", remedy)
        else:
            yield Check(what, OK, f"{where} listens, and takes your certificate")


def _refusal(secured: ssl.SSLSocket) -> str | None:
    """Why the server ends the connection; None: it answers. TLS 1.3 tells after the handshake."""
    try:
        secured.sendall(_PREFACE)
        return None if secured.recv(9) else "it ends the connection"
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return getattr(error, "reason", None) or error.strerror or str(error)


def _end_of(secured: ssl.SSLSocket, what: str) -> Iterator[Check]:
    """A line where the server's own certificate ends soon, or has ended."""
    try:
        from cryptography import x509
    except ImportError:
        return
    encoded: Any = secured.getpeercert(binary_form=True)
    end = x509.load_der_x509_certificate(encoded).not_valid_after_utc
    days = (end - datetime.datetime.now(datetime.UTC)).days
    if days < SOON:
        state = PROBLEM if days < 0 else WARNING
        remedy = "the federation has to be deployed anew"
        yield Check(f"{what}'s certificate", state, f"ends on {end:%Y-%m-%d}", remedy)
