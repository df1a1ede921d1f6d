"""Who is one of us: a private CA, this node's certificate and key, and what TLS makes of the three.

An agent trusts whoever has a certificate of its CA, and nobody else; so that CA has to be private to Holdfast
(``holdfast certs init`` makes such a one). Nodes are found at whatever address they have today, so addresses prove
nothing and are not looked at: a client asks for the one name that every agent's certificate carries, ``AGENT_NAME``.
Both sides show a certificate. TLS 1.3 only, but for gRPC, which offers 1.2 as well: two agents always settle on 1.3.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConfigError

if TYPE_CHECKING:
    import grpc  # not at run time: ``client`` has a variable to set before gRPC is first imported

AGENT_NAME: Final = "holdfast-agent"
"""A DNS name in the certificate of every agent. It is in no DNS."""

# OpenSSL's numbers of what may be wrong with a certificate (x509_vfy.h).
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_HOSTNAME_MISMATCH: Final = 62
_HANDSHAKE_TURNS: Final = 4  # two are enough for TLS 1.3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trust:
    """Paths of the CA's certificate, of this node's certificate (followed by intermediate ones, if any), and of its key.

    All are PEM files, the key without a passphrase. ``read`` gives one that was checked.
    """

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def read(cls, ca: Path | str | None, cert: Path | str | None, key: Path | str | None) -> Trust | None:
        """What ``--tls-ca``, ``--tls-cert`` and ``--tls-key`` say, checked; None if they say nothing.

        Raises:
            ConfigError: only some are given, or ``check`` finds something.
        """
        given = {"--tls-ca": ca, "--tls-cert": cert, "--tls-key": key}
        missing = [option for option, path in given.items() if path is None]
        if ca is None or cert is None or key is None:
            if len(missing) < len(given):
                raise ConfigError(f"TLS takes --tls-ca, --tls-cert and --tls-key; {' and '.join(missing)} is missing")
            return None
        trust = cls(Path(ca), Path(cert), Path(key))
        trust.check()
        return trust

    def check(self) -> None:
        """Show this node's certificate to ourselves, as server and as client: a peer with the same CA will accept it.

        Raises:
            ConfigError: names the file, and what is wrong with it: missing, not PEM, expired, a key that does not fit the
                certificate, a certificate that the CA did not sign, or that lacks ``AGENT_NAME``.
        """
        for path, kind in ((self.ca, "CERTIFICATE"), (self.cert, "CERTIFICATE"), (self.key, "PRIVATE KEY")):
            _check_pem(path, kind)
        _check_authority(self.ca)
        _authorities(self.cert)  # none, as a rule; but it is a certificate
        try:
            _shake_hands(self.server_context(), self.client_context())
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(f"certificate {self.cert} {_fault(error, self.ca)}") from error
        except ssl.SSLError as error:
            raise ConfigError(f"certificate {self.cert} cannot be used: {error.reason or error}") from error
        if self.key.stat().st_mode & 0o077:
            _log.warning("key %s may be read by others; chmod 600 it", self.key)

    def server_context(self) -> ssl.SSLContext:
        """For accepting peers: asks for their certificate. Reads the files.

        Raises:
            ConfigError: a file cannot be used.
        """
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        # Nobody resumes: a ticket would only lie unread in the socket of a client that closes it.
        context.num_tickets = 0
        return context

    def client_context(self) -> ssl.SSLContext:
        """For calling peers: use it with ``server_hostname=AGENT_NAME``. Reads the files.

        Raises:
            ConfigError: a file cannot be used.
        """
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def server_credentials(self) -> grpc.ServerCredentials:
        """The same for a gRPC server. Raises ``ConfigError``."""
        import grpc

        pair = (_read(self.key), _read(self.cert))
        return grpc.ssl_server_credentials([pair], root_certificates=_read(self.ca), require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """The same for a gRPC channel, which also needs ``channel_options``. Raises ``ConfigError``."""
        import grpc

        return grpc.ssl_channel_credentials(
            _read(self.ca), private_key=_read(self.key), certificate_chain=_read(self.cert)
        )

    @staticmethod
    def channel_options() -> Sequence[tuple[str, str]]:
        """Options that have a gRPC channel ask for ``AGENT_NAME``, whatever address it calls."""
        return (("grpc.ssl_target_name_override", AGENT_NAME),)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(self.ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"CA certificate {self.ca} cannot be read: {error}") from error
        try:
            context.load_cert_chain(self.cert, self.key, password=self._refuse_passphrase)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ConfigError(f"key {self.key} does not fit certificate {self.cert}") from error
            raise ConfigError(f"key {self.key} cannot be used: {error.reason or error}") from error
        except OSError as error:
            raise ConfigError(f"{self.cert} or {self.key} cannot be read: {error.strerror}") from error
        return context

    def _refuse_passphrase(self) -> str:
        raise ConfigError(f"key {self.key} has a passphrase; an agent starts by itself and needs a key without one")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _check_pem(path: Path, kind: str) -> None:
    """Raise ``ConfigError`` unless *path* says that it holds a *kind* (also an ``EC PRIVATE KEY`` is one)."""
    starts = [line.strip() for line in _read(path).splitlines() if line.startswith(b"-----BEGIN ")]
    if not any(line.endswith(kind.encode() + b"-----") for line in starts):
        raise ConfigError(f"{path} is not a PEM file with a {kind.lower()}")


def _authorities(path: Path) -> list[dict[str, Any]]:
    """Those certificates in *path* that may sign others. Raises ``ConfigError`` if one cannot be read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(f"{path} holds no readable certificate: {error.reason or error}") from error
    return context.get_ca_certs()


def _check_authority(path: Path) -> None:
    """Raise ``ConfigError`` unless there is a certificate in *path* that may sign others, and has not expired."""
    ends = [one["notAfter"] for one in _authorities(path)]
    if not ends:
        raise ConfigError(f"{path} holds no certificate of a CA: none in it may sign others")
    if time.time() > max(map(ssl.cert_time_to_seconds, ends)):
        raise ConfigError(f"CA certificate {path} has expired ({', '.join(ends)})")


def _fault(error: ssl.SSLCertVerificationError, ca: Path) -> str:
    """What OpenSSL has against a certificate, in our words."""
    known = {
        _NOT_YET_VALID: "is not valid yet",
        _EXPIRED: "has expired",
        _HOSTNAME_MISMATCH: f"does not carry the name {AGENT_NAME!r}; `holdfast certs init` makes certificates that do",
    }
    return known.get(error.verify_code, f"is not signed by CA {ca}: {error.verify_message}")


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """A whole handshake in memory. Raises ``ssl.SSLError`` as a peer would."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=AGENT_NAME),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(_HANDSHAKE_TURNS):
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
