"""TLS settings: what is refused at start and in which words, and who accepts whom, over ``ssl`` and over gRPC."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import Certificate
from holdfast.agent.trust import AGENT_NAME, Trust
from holdfast.errors import ConfigError
from holdfast.ops.certs import Node, issue, make, new_authority

NOW = datetime.now(UTC)
YEAR = timedelta(days=365)
WAIT_S = 120.0


def trust_in(folder: Path, name: str = "n0") -> Trust:
    """A node of the CA in *folder*, which is made if it is not there."""
    make(folder, [Node(name)], NOW)
    return Trust(folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key")


def write(path: Path, what: Certificate | EllipticCurvePrivateKey, passphrase: bytes = b"") -> Path:
    if isinstance(what, Certificate):
        path.write_bytes(what.public_bytes(Encoding.PEM))
    else:
        cipher = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        path.write_bytes(what.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, cipher))
        path.chmod(0o600)
    return path


def refusal(trust: Trust) -> str:
    with pytest.raises(ConfigError) as refused:
        Trust.read(trust.ca, trust.cert, trust.key)
    return str(refused.value)


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    return trust_in(tmp_path / "certs")


# -- at start ---------------------------------------------------------------------------------------------------------


def test_what_certs_init_makes_is_accepted(trust: Trust) -> None:
    assert Trust.read(str(trust.ca), str(trust.cert), str(trust.key)) == trust


def test_nothing_given_is_no_tls() -> None:
    assert Trust.read(None, None, None) is None


def test_some_options_are_not_enough(trust: Trust) -> None:
    with pytest.raises(ConfigError, match="--tls-cert and --tls-key is missing"):
        Trust.read(trust.ca, None, None)


@pytest.mark.parametrize("which", ["ca", "cert", "key"])
@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), (b"\x30\x82 no text", "not a PEM file")])
def test_a_file_that_is_missing_or_not_pem_is_named(trust: Trust, which: str, content: bytes | None, said: str) -> None:
    path: Path = getattr(trust, which)
    path.unlink() if content is None else path.write_bytes(content)
    message = refusal(trust)
    assert str(path) in message
    assert said in message


@pytest.mark.parametrize("which", ["ca", "cert", "key"])
def test_pem_with_nonsense_inside_is_named(trust: Trust, which: str) -> None:
    path: Path = getattr(trust, which)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "QUJD", lines[-1], ""]))
    assert str(path) in refusal(trust)


def test_swapped_files_are_noticed(trust: Trust) -> None:
    assert f"{trust.key} is not a PEM file with a certificate" in refusal(Trust(trust.ca, trust.key, trust.cert))


def test_a_key_of_another_certificate(trust: Trust) -> None:
    other = trust_in(trust.ca.parent, "n1")
    mixed = Trust(trust.ca, trust.cert, other.key)
    assert refusal(mixed) == f"key {other.key} does not fit certificate {trust.cert}"


def test_a_key_with_a_passphrase_asks_nobody(trust: Trust) -> None:
    certificate, key = issue(new_authority(NOW), Node("x"), NOW)
    write(trust.cert, certificate)
    write(trust.key, key, passphrase=b"secret")
    assert f"key {trust.key} has a passphrase" in refusal(trust)


def test_a_certificate_of_another_ca(trust: Trust, tmp_path: Path) -> None:
    other = trust_in(tmp_path / "other")
    message = refusal(Trust(other.ca, trust.cert, trust.key))
    assert message.startswith(f"certificate {trust.cert} is not signed by CA {other.ca}")


@pytest.mark.parametrize(
    ("made", "life", "said"), [(NOW - YEAR, YEAR / 2, "has expired"), (NOW + YEAR, YEAR, "is not valid yet")]
)
def test_a_certificate_at_the_wrong_time(trust: Trust, made: datetime, life: timedelta, said: str) -> None:
    authority = new_authority(NOW - 2 * YEAR)
    certificate, key = issue(authority, Node("n0"), made, life)
    write(trust.ca, authority.certificate)
    write(trust.cert, certificate)
    write(trust.key, key)
    assert refusal(trust) == f"certificate {trust.cert} {said}"


def test_an_expired_ca(trust: Trust) -> None:
    authority = new_authority(NOW - 2 * YEAR, YEAR)
    certificate, key = issue(authority, Node("n0"), NOW - 2 * YEAR)
    write(trust.ca, authority.certificate)
    write(trust.cert, certificate)
    write(trust.key, key)
    assert refusal(trust).startswith(f"CA certificate {trust.ca} has expired")


def test_a_certificate_that_may_not_sign_is_no_ca(trust: Trust) -> None:
    assert "holds no certificate of a CA" in refusal(Trust(trust.cert, trust.cert, trust.key))


def test_a_certificate_without_the_agents_name(trust: Trust) -> None:
    authority = new_authority(NOW)
    certificate, key = issue(authority, Node("n0"), NOW, agent_name="something-else")
    write(trust.ca, authority.certificate)
    write(trust.cert, certificate)
    write(trust.key, key)
    assert f"does not carry the name '{AGENT_NAME}'" in refusal(trust)


def test_a_key_that_others_may_read_is_told(trust: Trust, caplog: pytest.LogCaptureFixture) -> None:
    trust.check()
    assert not caplog.records
    trust.key.chmod(0o644)
    trust.check()
    assert f"{trust.key} may be read by others" in caplog.text


def test_an_agent_checks_without_the_library_that_makes_certificates(trust: Trust) -> None:
    code = (
        "import sys\nfrom holdfast.agent.trust import Trust\nTrust.read(*sys.argv[1:])\n"
        "assert not {'cryptography', 'grpc', 'torch'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(trust.ca), str(trust.cert), str(trust.key)]
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)


def test_both_contexts_ask_for_a_certificate_and_speak_tls_1_3_only(trust: Trust) -> None:
    for context in (trust.server_context(), trust.client_context()):
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert trust.client_context().check_hostname


# -- over gRPC --------------------------------------------------------------------------------------------------------

Call = Callable[[grpc.ChannelCredentials | None], bytes]


@contextmanager
def serving(trust: Trust) -> Iterator[Call]:
    """A server that has *trust*; what it gives calls it by its bare address, with the given credentials."""
    server = grpc.server(ThreadPoolExecutor(1))
    echo: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"Echo": echo}),))
    port = server.add_secure_port("127.0.0.1:0", trust.server_credentials())
    server.start()

    def one(credentials: grpc.ChannelCredentials | None) -> bytes:
        target, options = f"127.0.0.1:{port}", Trust.channel_options()
        channel = grpc.secure_channel(target, credentials, options) if credentials else grpc.insecure_channel(target)
        with channel:
            echoed: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/t/Echo")
            return echoed(b"hello", timeout=WAIT_S)

    try:
        yield one
    finally:
        server.stop(None).wait(WAIT_S)


@pytest.fixture
def call(trust: Trust) -> Iterator[Call]:
    with serving(trust) as one:
        yield one


def test_grpc_works_between_nodes_of_one_ca(trust: Trust, call: Call) -> None:
    assert call(trust.channel_credentials()) == b"hello"
    assert call(trust_in(trust.ca.parent, "n1").channel_credentials()) == b"hello"


def test_grpc_asks_for_the_agents_name(trust: Trust) -> None:
    authority = new_authority(NOW)
    certificate, key = issue(authority, Node("n0"), NOW, agent_name="something-else")
    folder = trust.ca.parent
    odd = Trust(
        write(folder / "odd-ca.pem", authority.certificate), write(folder / "odd.pem", certificate),
        write(folder / "odd.key", key),
    )  # fmt: skip
    with serving(odd) as call_odd, pytest.raises(grpc.RpcError) as refused:
        call_odd(odd.channel_credentials())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_grpc_refuses_everybody_else(trust: Trust, call: Call, tmp_path: Path) -> None:
    other = trust_in(tmp_path / "other")
    stranger = Trust(trust.ca, other.cert, other.key).channel_credentials()  # trusts us; we do not trust it
    for credentials in (
        None,
        other.channel_credentials(),
        grpc.ssl_channel_credentials(trust.ca.read_bytes()),
        stranger,
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call(credentials)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert call(trust.channel_credentials()) == b"hello"
