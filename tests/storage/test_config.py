"""The settings in a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from holdfast.errors import ConfigError
from holdfast.storage import config
from holdfast.storage.config import Config, configured, load_config, parse_config
from holdfast.storage.tiers import Tier

WHOLE = """
job = "run7"
every = 2
slots = 3
protect = "4+2"

[[tier]]
url = "file:///nvme/run7"
every = "1m"
keep = 3

[[tier]]
url = "s3://bucket/run7"
every = "auto"
mtbf = "6h"
milestone_steps = 10_000
limit = "2TB"
"""


def test_all_that_can_be_said() -> None:
    assert parse_config(WHOLE, Path("/")) == Config(
        "run7",
        "4+2",
        2,
        3,
        (
            Tier("file:///nvme/run7", every="1m", keep=3),
            Tier("s3://bucket/run7", every="auto", mtbf="6h", milestone_steps=10_000, limit="2TB"),
        ),
    )


def test_nothing_need_be_said() -> None:
    assert parse_config("", Path("/")) == Config()


def test_the_example_in_the_docstring_is_one() -> None:
    assert config.__doc__ is not None
    example = re.sub(r"(?m)^ {4}", "", config.__doc__.partition("::\n")[2].rpartition("\n\n")[0])
    assert len(parse_config(example, Path("/")).tiers) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jobs = 'x'", "jobs: no such key; did you mean job?"),
        ("tiers = []", "tiers: no such key; did you mean tier?"),
        ("xyz = 1", "xyz: no such key; known are job"),
        ("every = '1'", "every='1': int is needed"),
        ("every = true", "every=True: int is needed"),
        ("job = 7", "job=7: str is needed"),
        ("tier = 7", r"\[\[tier\]\]"),
        ("[tier]\nurl = '/x'", r"\[\[tier\]\]"),
        ("[[tier]]\nkeep = 3", "needs a url"),
        ("[[tier]]\nurl = 7", "needs a url"),
        ("[[tier]]\nurl = '/x'\nkep = 3", r"\[\[tier\]\] kep: no such key; did you mean keep?"),
        ("[[tier]]\nurl = '/x'\nkeep = 0", "tier file:///x: keep=0"),
        ("[[tier]]\nurl = '/x'\n[[tier]]\nurl = '/x'", "lies in tier"),
        ("job = ", "not TOML"),
        ("a = " + "[" * 5000, "not TOML"),
    ],
)
def test_what_is_refused_and_why(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        parse_config(text, Path("/"))


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "holdfast.toml"
    file.write_text("[[tier]]\nurl = 'ckpt'\n")
    found = load_config(file)
    assert found.tiers == (Tier(str(tmp_path / "ckpt")),), "a relative path begins where the file lies"
    assert configured({"HOLDFAST_CONFIG": str(file)}) == found
    assert configured({"HOLDFAST_CONFIG": "/no/such"}, file) == found
    assert configured({}) == Config()
    file.write_text("every = 'x'")
    with pytest.raises(ConfigError, match=f"config {file}: every='x'"):
        load_config(file)
    file.write_bytes(b"job = '\xff'")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(file)
    file.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="more than"):
        load_config(file)
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "other.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
