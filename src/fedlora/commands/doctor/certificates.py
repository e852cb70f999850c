"""Looks at a participant's kit: whose it is, and how long its certificate is valid.

`cryptography` reads the certificates; it comes with the engine whose kit this is.
"""

from __future__ import annotations

import datetime
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.commands.doctor.checks import OK, PROBLEM, WARNING, Check

SOON = 30
"""Days before its end from which a certificate is worth a warning."""

_ANEW = "ask whoever deployed the federation for a new folder"


@dataclass(frozen=True)
class Credentials:
    """What a participant shows to others, and what it knows them by.

    Args:
        certificate: its own.
        key: that belongs to it.
        root: the certificate of the federation.
    """

    certificate: Path
    key: Path
    root: Path


def credentials_of(kit: Path) -> Credentials:
    """Those of a participant's kit."""
    startup = kit / "startup"
    base = "server" if (startup / "server.crt").is_file() else "client"
    return Credentials(startup / f"{base}.crt", startup / f"{base}.key", startup / "rootCA.pem")


def certificate_checks(own: Credentials, name: str, now: datetime.datetime) -> Iterator[Check]:
    """Whether the certificate is the federation's, belongs to the key, and is valid now.

    Args:
        own: the participant's.
        name: that the certificate has to bear.
        now: of the clock, in UTC.
    """
    try:
        from cryptography import x509
    except ImportError:
        remedy = "pip install 'fedlora[nvflare]'"
        yield Check("certificate", WARNING, "cannot be read without cryptography", remedy)
        return
    missing = [path for path in (own.certificate, own.key, own.root) if not path.is_file()]
    if missing:
        yield Check("certificate", PROBLEM, f"{missing[0]} is missing", _ANEW)
        return
    try:
        certificate = x509.load_pem_x509_certificate(own.certificate.read_bytes())
        root = x509.load_pem_x509_certificate(own.root.read_bytes())
    except (OSError, ValueError) as error:
        yield Check("certificate", PROBLEM, f"{own.certificate} cannot be read: {error}", _ANEW)
        return
    yield _validity("certificate", certificate, now)
    yield _validity("federation's certificate", root, now)
    for wrong in _mismatches(own, certificate, root, name):
        yield Check("certificate", PROBLEM, wrong, _ANEW)
    mode = stat.S_IMODE(os.stat(own.key).st_mode)
    if mode & 0o077:
        yield Check("private key", WARNING, f"{own.key} can be read by others", "chmod 600 it")


def _validity(what: str, certificate: Any, now: datetime.datetime) -> Check:
    """How long a certificate is valid."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    names = certificate.subject.rfc4514_string()
    if now < start:
        remedy = "set the clock: certificates of the future are refused by everybody"
        return Check(what, PROBLEM, f"{names}, valid from {start:%Y-%m-%d %H:%M} UTC", remedy)
    if now > end:
        return Check(what, PROBLEM, f"{names}, ended on {end:%Y-%m-%d}", _ANEW)
    days = (end - now).days
    found = f"{names}, until {end:%Y-%m-%d} ({days} days)"
    if days < SOON:
        return Check(what, WARNING, found, f"{_ANEW} before it ends")
    return Check(what, OK, found)


def _mismatches(own: Credentials, certificate: Any, root: Any, name: str) -> Iterator[str]:
    """What does not belong together."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509.oid import NameOID

    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        yield f"{own.certificate} is of another federation than {own.root}"
    borne = [x.value for x in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if name not in borne:
        yield f"{own.certificate} is that of {', '.join(map(str, borne))}, not of {name}"
    try:
        key = load_pem_private_key(own.key.read_bytes(), None)
    except (OSError, ValueError) as error:
        yield f"{own.key} cannot be read: {error}"
        return
    if key.public_key() != certificate.public_key():
        yield f"{own.key} does not belong to {own.certificate}"
