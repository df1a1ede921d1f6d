"""``holdfast certs init``: what it makes, what it leaves alone, and that others find nothing wrong with it."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from holdfast.agent.trust import AGENT_NAME, Trust
from holdfast.errors import ConfigError
from holdfast.ops import certs, cli
from holdfast.ops.certs import CA_LIFE, NODE_LIFE, Node, make, parse_node

NOW = datetime(2031, 5, 17, 12, 30, tzinfo=UTC)
Holdfast = Callable[..., tuple[int, str, str]]


@pytest.fixture
def holdfast(capsys: pytest.CaptureFixture[str]) -> Holdfast:
    """The command line in this process: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return call


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- what is made -----------------------------------------------------------------------------------------------------


def test_a_ca_and_nodes_that_agents_accept(tmp_path: Path, holdfast: Holdfast) -> None:
    folder = tmp_path / "made" / "certs"
    code, out, err = holdfast(
        "certs", "init", str(folder), "--node", "n0=10.0.0.1,::1,n0.lan", "--node", "n1", "--json"
    )
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    assert document["folder"] == str(folder)
    ca, *nodes = document["made"]
    assert (ca["name"], ca["names"], ca["options"]) == ("ca", [], [])
    assert [(node["name"], node["names"]) for node in nodes] == [
        ("n0", [AGENT_NAME, "n0", "10.0.0.1", "::1", "n0.lan"]),
        ("n1", [AGENT_NAME, "n1"]),
    ]
    for node in nodes:
        options = dict(option.split("=") for option in node["options"])
        assert options == {
            "--tls-ca": ca["certificate"],
            "--tls-cert": node["certificate"],
            "--tls-key": node["key"],
        }
        assert Trust.read(*options.values()) is not None
    assert set(contents(folder)) == {"ca.pem", "ca.key", "n0.pem", "n0.key", "n1.pem", "n1.key"}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.key")} == {0o600}


def test_the_fields_of_the_certificates(tmp_path: Path) -> None:
    make(tmp_path, [Node("n0", ("10.0.0.1", "n0.lan"))], NOW)
    ca, node = certificate(tmp_path / "ca.pem"), certificate(tmp_path / "n0.pem")
    assert ca.not_valid_after_utc - NOW == CA_LIFE
    assert node.not_valid_after_utc - NOW == NODE_LIFE
    assert ca.not_valid_before_utc == node.not_valid_before_utc == NOW - timedelta(hours=1)
    node.verify_directly_issued_by(ca)
    ca.verify_directly_issued_by(ca)
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert not node.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert ca.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert not node.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    usage = node.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    names = node.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.0.0.1")]
    assert names.get_values_for_type(x509.DNSName) == [AGENT_NAME, "n0", "n0.lan"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_openssl_finds_nothing_wrong_even_when_strict(tmp_path: Path) -> None:
    make(tmp_path, [Node("n0", ("10.0.0.1",))], datetime.now(UTC))
    for purpose in ("sslserver", "sslclient"):
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.pem", "n0.pem"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)


def test_nodes_are_added_to_a_ca_that_is_there(tmp_path: Path, holdfast: Holdfast) -> None:
    assert holdfast("certs", "init", str(tmp_path))[0] == 0
    before = contents(tmp_path)
    assert set(before) == {"ca.pem", "ca.key"}
    code, out, _ = holdfast("certs", "init", str(tmp_path), "--node", "n0")
    assert code == 0
    assert (
        f"n0: holdfast agent --tls-ca={tmp_path}/ca.pem --tls-cert={tmp_path}/n0.pem --tls-key={tmp_path}/n0.key" in out
    )
    assert before.items() <= contents(tmp_path).items()
    assert Trust.read(tmp_path / "ca.pem", tmp_path / "n0.pem", tmp_path / "n0.key") is not None
    code, out, _ = holdfast("certs", "init", str(tmp_path))
    assert (code, "holds a CA already" in out) == (0, True)


def test_a_node_does_not_outlive_its_ca(tmp_path: Path) -> None:
    make(tmp_path, [], NOW - CA_LIFE + timedelta(days=100))
    make(tmp_path, [Node("n0")], NOW)
    assert certificate(tmp_path / "n0.pem").not_valid_after_utc == NOW + timedelta(days=100)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["n1.pem", "n1.key"])
def test_nothing_is_overwritten_and_then_nothing_is_made(tmp_path: Path, holdfast: Holdfast, left: str) -> None:
    (tmp_path / left).write_text("mine")
    code, _, err = holdfast("certs", "init", str(tmp_path), "--node", "n0", "--node", "n1")
    assert code == 2
    assert f"{tmp_path}/n1.pem is there already, and is not overwritten" in err
    assert contents(tmp_path) == {left: b"mine"}


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "n0.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not overwritten"):
        make(tmp_path, [Node("n0")], NOW)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("missing", ["ca.pem", "ca.key"])
def test_half_a_ca(tmp_path: Path, missing: str) -> None:
    make(tmp_path, [], NOW)
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=f"{missing} is missing"):
        make(tmp_path, [Node("n0")], NOW)
    assert len(contents(tmp_path)) == 1


@pytest.mark.parametrize("spoiled", ["ca.pem", "ca.key"])
def test_a_spoiled_ca(tmp_path: Path, spoiled: str) -> None:
    make(tmp_path, [], NOW)
    (tmp_path / spoiled).write_text("nonsense")
    with pytest.raises(ConfigError, match="cannot be used"):
        make(tmp_path, [Node("n0")], NOW)


def test_a_ca_with_the_key_of_another(tmp_path: Path) -> None:
    make(tmp_path / "a", [], NOW)
    make(tmp_path / "b", [], NOW)
    os.replace(tmp_path / "b" / "ca.key", tmp_path / "a" / "ca.key")
    with pytest.raises(ConfigError, match=r"a/ca\.key does not fit CA certificate"):
        make(tmp_path / "a", [Node("n0")], NOW)


def test_an_expired_ca(tmp_path: Path) -> None:
    make(tmp_path, [], NOW - CA_LIFE - timedelta(days=1))
    with pytest.raises(ConfigError, match="expired on 2031-05-16"):
        make(tmp_path, [Node("n0")], NOW)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        make(tmp_path / "certs", [], NOW)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "certs").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        make(tmp_path / "certs", [], NOW)


def test_nodes_with_one_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two nodes have the same name"):
        make(tmp_path, [Node("n0"), Node("N0")], NOW)


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("n0", Node("n0")),
        ("gpu-3.rack-1.lan=10.0.0.1", Node("gpu-3.rack-1.lan", ("10.0.0.1",))),
        ("n0=10.0.0.1,fe80::1,10.0.0.1,host", Node("n0", ("10.0.0.1", "fe80::1", "host"))),
    ],
)
def test_nodes_as_they_are_written(text: str, node: Node) -> None:
    assert parse_node(text) == node


@pytest.mark.parametrize(
    "text",
    [
        "",
        "=10.0.0.1",
        "../n0",
        "n 0",
        "n_0",
        "-n0",
        "ca",
        "CA",
        "n" * 65,
        "n0=",
        "n0=10.0.0.1,",
        "n0=1/2",
        "ü",
        "n0\n",
        "n0..",
    ],
)
def test_nodes_that_make_no_file_name_or_no_address(text: str, tmp_path: Path, holdfast: Holdfast) -> None:
    with pytest.raises(ConfigError, match="--node"):
        parse_node(text)
    assert holdfast("certs", "init", str(tmp_path / "certs"), "--node", text)[0] == 2
    assert not (tmp_path / "certs").exists()


# -- the command ------------------------------------------------------------------------------------------------------


def test_help_needs_no_cryptography() -> None:
    code = (
        "import sys\nfrom holdfast.ops.cli import main\n"
        "try:\n    main(['certs', 'init', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'cryptography', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_options_and_keys_are_documented(tmp_path: Path, holdfast: Holdfast) -> None:
    text = (Path(certs.__file__).parents[1] / "docs" / "cli.md").read_text("utf-8")
    section = text.partition("## holdfast certs")[2].partition("\n## ")[0]
    document = json.loads(holdfast("certs", "init", str(tmp_path), "--json")[1])
    assert {key for key in [*document, *document["made"][0]] if f"`{key}`" not in section} == set()
    options = {option for parameter in certs.init.params for option in parameter.opts if option.startswith("--")}
    assert {option for option in options if f"`{option}" not in section} == set()
