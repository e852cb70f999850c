"""Makes the keys and certificates of a federation over Flower.

An authority of the federation's own signs the server's certificate, by which sites know the
server. By their own keys the server knows the sites.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_EARLIER = timedelta(minutes=5)
"""A certificate is valid from so long before now, since clocks differ."""

_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@dataclass(frozen=True)
class Pair:
    """A private key, and what may be known of it, as the bytes of their files.

    Args:
        private: the key, in PEM (OpenSSH's for a site).
        public: the certificate in PEM, or a site's public key as OpenSSH writes it.
    """

    private: bytes
    public: bytes


def authority(name: str, days: int) -> Pair:
    """A new certificate authority.

    Args:
        name: of the federation.
        days: that its certificate is valid.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _named(f"{name} authority")
    signed = (
        _certificate(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .sign(key, hashes.SHA384())
    )
    return Pair(_pem(key), signed.public_bytes(Encoding.PEM))


def server_certificate(host: str, signer: Pair, days: int) -> Pair:
    """A new key and certificate of the server, for its host and the loopback.

    Args:
        host: name or address at which sites reach the server.
        signer: the authority.
        days: that the certificate is valid, but no longer than the authority's.
    """
    issuer = x509.load_pem_x509_certificate(signer.public)
    signing_key = load_pem_private_key(signer.private, password=None)
    assert isinstance(signing_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    hosts = dict.fromkeys((host, "localhost", "127.0.0.1"))
    of_authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())  # type: ignore[arg-type]
    signed = (
        _certificate(
            _named(host), issuer.subject, key.public_key(), days, issuer.not_valid_after_utc
        )
        .add_extension(x509.SubjectAlternativeName([_general(x) for x in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(of_authority, critical=False)
        .sign(signing_key, hashes.SHA384())
    )
    return Pair(_pem(key), signed.public_bytes(Encoding.PEM))


def node_key() -> Pair:
    """A new key of a SuperNode (ECDSA, P-384), as `ssh-keygen -t ecdsa -b 384` makes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return Pair(private, public + b"\n")


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    """A certificate without its extensions but the one that names its key."""
    now = datetime.now(UTC)
    until = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(min(until, latest) if latest else until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _named(name: str) -> x509.Name:
    """A subject; X.509 allows a common name 64 characters, and no one reads it."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*names: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{use: use in names for use in _USES})


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
