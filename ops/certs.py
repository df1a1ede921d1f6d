"""``holdfast certs``: a private CA and a certificate for every node, for TLS between agents.

What is made here is what ``agent.trust`` asks for. ECDSA P-256 throughout. Keys are written before their certificates,
mode 0600, without a passphrase: an agent starts by itself.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ..agent.trust import AGENT_NAME
from ..errors import ConfigError
from .answers import console, print_json

if TYPE_CHECKING:  # `holdfast` starts faster without
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from rich.table import Table

CA_LIFE: Final = timedelta(days=3652)
NODE_LIFE: Final = timedelta(days=730)
_CLOCKS_DIFFER_BY: Final = timedelta(hours=1)  # a node whose clock is behind must not refuse what was made just now
_NAME: Final = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
_NAME_CHARACTERS: Final = 64  # what a certificate's common name may have
_CA: Final = "ca"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def certs() -> None:
    """Certificates by which agents know each other."""


@certs.command
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--node", "nodes", metavar="NAME[=ADDRESS,...]", multiple=True,
    help="Make a certificate for this node; may be repeated. Addresses are for other programs: agents do not look at them.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; docs/cli.md names its keys.")
def init(folder: Path, nodes: tuple[str, ...], as_json: bool) -> None:
    """Make a private CA in DIR, unless it holds one, and a certificate and key for each node.

    Nothing is overwritten. Give every node DIR/ca.pem, its own certificate and its own key; keep DIR/ca.key to yourself.
    """
    wanted = [parse_node(text) for text in nodes]
    made = make(folder.absolute(), wanted, datetime.now(UTC))
    if as_json:
        print_json({"folder": str(folder.absolute()), "made": [_json(one) for one in made]})
        return
    if not made:
        console().print(f"{folder} holds a CA already; name nodes with --node")
        return
    console().print(_table(made))
    for one in made:
        if one.options:
            console().print(f"{one.name}: holdfast agent {' '.join(one.options)}", soft_wrap=True)


# -- nodes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Node:
    """A node's name, and the IP addresses and host names by which others may call it."""

    name: str
    addresses: tuple[str, ...] = ()


def parse_node(text: str) -> Node:
    """``NAME`` or ``NAME=ADDRESS,...``. Raises ``ConfigError``."""
    name, equals, rest = text.partition("=")
    addresses = tuple(dict.fromkeys(rest.split(","))) if equals else ()
    if not _NAME.fullmatch(name) or len(name) > _NAME_CHARACTERS:
        raise ConfigError(
            f"--node {text!r}: {name!r} is no host name (letters, digits, '-' and '.', at most {_NAME_CHARACTERS})"
        )
    if name.lower() == _CA:
        raise ConfigError(f"--node {text!r}: {_CA}.pem and {_CA}.key are the CA's; choose another name")
    for address in addresses:
        if not (_is_ip(address) or _NAME.fullmatch(address)):
            raise ConfigError(f"--node {text!r}: {address!r} is neither an IP address nor a host name")
    return Node(name, addresses)


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


# -- making -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA: its certificate, and the key that signs others."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Made:
    """A certificate that was made, and the files it lies in. ``options``: what its node's agent takes; a CA has none."""

    name: str
    certificate: Path
    key: Path
    names: tuple[str, ...]
    not_after: datetime
    sha256: str
    options: tuple[str, ...] = ()


def make(folder: Path, nodes: Sequence[Node], now: datetime) -> list[Made]:
    """Make what is missing of a CA, and a certificate for each of *nodes*, in *folder*; the CA comes first.

    Raises:
        ConfigError: something would be overwritten (then nothing is made), a CA that is there cannot be used, or the
            folder cannot be written.
    """
    if len({node.name.lower() for node in nodes}) < len(nodes):
        raise ConfigError("--node: two nodes have the same name")
    has_ca = _is_there(folder, _CA)
    for node in nodes:
        if _is_there(folder, node.name):
            raise ConfigError(
                f"{folder / node.name}.pem is there already, and is not overwritten; remove it and its key"
            )
    made: list[Made] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = load_authority(folder, now) if has_ca else new_authority(now)
        if not has_ca:
            made.append(_write(folder, _CA, authority.certificate, authority.key))
        for node in nodes:
            made.append(_write(folder, node.name, *issue(authority, node, now)))
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or folder}: {error.strerror}") from error
    return made


def new_authority(now: datetime, life: timedelta = CA_LIFE) -> Authority:
    """A CA that may sign certificates of nodes, and nothing that signs others."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # Each CA has a name of its own, so that a certificate of another one is said to be just that.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Holdfast CA {serial:x}"[:_NAME_CHARACTERS])])
    builder = _builder(subject, subject, key, serial, now, now + life)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Authority(_signed(builder, key), key)


def issue(
    authority: Authority, node: Node, now: datetime, life: timedelta = NODE_LIFE, agent_name: str = AGENT_NAME
) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    """A certificate and key of *node*, for both sides of a connection; it does not outlive its CA."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.DNSName(name) for name in dict.fromkeys((agent_name, node.name))]
    for address in node.addresses:
        names.append(x509.IPAddress(ipaddress.ip_address(address)) if _is_ip(address) else x509.DNSName(address))
    signer = authority.certificate
    builder = _builder(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node.name)]), signer.subject, key,
        x509.random_serial_number(), now, min(now + life, signer.not_valid_after_utc),
    )  # fmt: skip
    identifier = signer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False),
        (x509.SubjectAlternativeName(names), False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False),
    ):
        builder = builder.add_extension(extension, critical)
    return _signed(builder, authority.key), key


def load_authority(folder: Path, now: datetime) -> Authority:
    """The CA that lies in *folder*. Raises ``ConfigError`` if it can sign nothing."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    paths = {"certificate": folder / f"{_CA}.pem", "key": folder / f"{_CA}.key"}
    for what, path in paths.items():
        if not path.exists():
            raise ConfigError(f"the CA in {folder} has no {what}: {path} is missing")
    try:
        certificate = x509.load_pem_x509_certificate(paths["certificate"].read_bytes())
        key = load_pem_private_key(paths["key"].read_bytes(), password=None)
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except (ValueError, TypeError, x509.ExtensionNotFound) as error:
        raise ConfigError(f"the CA in {folder} cannot be used: {error}") from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"key {paths['key']} does not fit CA certificate {paths['certificate']}")
    if certificate.not_valid_after_utc <= now:
        raise ConfigError(
            f"CA certificate {paths['certificate']} expired on {certificate.not_valid_after_utc:%Y-%m-%d}"
        )
    return Authority(certificate, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, serial: int, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    from cryptography import x509

    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), serial)
    builder = builder.not_valid_before(now - _CLOCKS_DIFFER_BY).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _signed(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> x509.Certificate:
    from cryptography.hazmat.primitives import hashes

    return builder.sign(key, hashes.SHA256())


# -- files ------------------------------------------------------------------------------------------------------------


def _is_there(folder: Path, name: str) -> bool:
    """Whether a certificate or a key of that name lies in *folder*."""
    return any(os.path.lexists(folder / f"{name}.{kind}") for kind in ("pem", "key"))


def _write(folder: Path, name: str, certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> Made:
    """Write the key, then the certificate: a certificate that is there has its key beside it."""
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    paths = folder / f"{name}.pem", folder / f"{name}.key"
    _write_new(paths[1], key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _write_new(paths[0], certificate.public_bytes(Encoding.PEM), 0o644)
    made = Made(name, *paths, (), certificate.not_valid_after_utc, certificate.fingerprint(SHA256()).hex())
    if name == _CA:
        return made
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    options = (f"--tls-ca={folder / _CA}.pem", f"--tls-cert={paths[0]}", f"--tls-key={paths[1]}")
    return replace(made, names=tuple(str(one.value) for one in names), options=options)


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write *path*, which must not exist: not even as a link to somewhere."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


# -- showing ----------------------------------------------------------------------------------------------------------


def _table(made: Sequence[Made]) -> Table:
    from rich.table import Table

    table = Table("what", "certificate", "key", "names", "valid until", "SHA-256")
    for one in made:
        table.add_row(
            f"node {one.name}" if one.options else "CA",
            str(one.certificate),
            str(one.key),
            ", ".join(one.names),
            f"{one.not_after:%Y-%m-%d}",
            f"{one.sha256[:16]}…",
        )
    return table


def _json(one: Made) -> dict[str, Any]:
    return {
        "name": one.name,
        "certificate": str(one.certificate),
        "key": str(one.key),
        "names": one.names,
        "not_after": one.not_after.isoformat(),
        "sha256": one.sha256,
        "options": one.options,
    }
