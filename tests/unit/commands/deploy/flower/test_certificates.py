"""Certificates and keys of a federation over Flower."""

from __future__ import annotations

import ipaddress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedlora.commands.deploy.flower.certificates import (
    Pair,
    authority,
    node_key,
    server_certificate,
)


@pytest.fixture(scope="module")
def signer() -> Pair:
    return authority("clinics", days=30)


def verified(signer: Pair, server: Pair, host: x509.DNSName | x509.IPAddress) -> None:
    """What a client checks that connects to a host."""
    store = Store([x509.load_pem_x509_certificate(signer.public)])
    verifier = PolicyBuilder().store(store).build_server_verifier(host)
    verifier.verify(x509.load_pem_x509_certificate(server.public), [])


def test_a_client_knows_the_server_by_its_host_and_on_the_loopback(signer: Pair) -> None:
    server = server_certificate("fed.example.org", signer, days=30)
    verified(signer, server, x509.DNSName("fed.example.org"))
    verified(signer, server, x509.DNSName("localhost"))
    verified(signer, server, x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    with pytest.raises(VerificationError):
        verified(signer, server, x509.DNSName("other.example.org"))
    with pytest.raises(VerificationError):
        verified(authority("clinics", days=30), server, x509.DNSName("fed.example.org"))


def test_a_server_may_be_known_by_its_address(signer: Pair) -> None:
    server = server_certificate("10.1.2.3", signer, days=30)
    verified(signer, server, x509.IPAddress(ipaddress.ip_address("10.1.2.3")))


def test_the_servers_certificate_signs_nothing(signer: Pair) -> None:
    server = x509.load_pem_x509_certificate(server_certificate("a.org", signer, 30).public)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    uses = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.SERVER_AUTH]
    usage = server.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign


def test_no_certificate_outlives_its_authority(signer: Pair) -> None:
    late = x509.load_pem_x509_certificate(server_certificate("a.org", signer, days=900).public)
    issuer = x509.load_pem_x509_certificate(signer.public)
    assert late.not_valid_after_utc == issuer.not_valid_after_utc
    assert 29 < (issuer.not_valid_after_utc - issuer.not_valid_before_utc).days <= 30


def test_the_key_fits_the_certificate(signer: Pair) -> None:
    server = server_certificate("a.org", signer, 30)
    key = load_pem_private_key(server.private, password=None)
    certificate = x509.load_pem_x509_certificate(server.public)
    assert key.public_key() == certificate.public_key()


def test_a_nodes_key_is_what_flower_takes() -> None:
    pair = node_key()
    private, public = load_ssh_private_key(pair.private, None), load_ssh_public_key(pair.public)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert private.public_key() == public
    assert pair.public.startswith(b"ecdsa-sha2-nistp384 ")
    assert node_key().private != pair.private
