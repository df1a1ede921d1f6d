"""What users say of tiers: what it comes to, what is refused, and how it travels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from holdfast.errors import ConfigError
from holdfast.storage.quantity import parse_bytes, parse_seconds
from holdfast.storage.tiers import (
    TIERS_LIMIT,
    Auto,
    EverySeconds,
    EverySteps,
    Tier,
    TierSettings,
    parse_tiers,
    parse_url,
)

WHOLE = Tier(
    "s3://bucket/run7",
    every="auto",
    keep=5,
    milestone_steps=10_000,
    mtbf="6h",
    limit="2TB",
    keep_min=2,
    bandwidth="500MB",
    uploads=4,
)


def test_what_it_comes_to() -> None:
    assert TierSettings.parse(WHOLE) == TierSettings(
        "s3://bucket/run7", Auto(21600.0), 5, 10_000, 2 * 10**12, 2, 500_000_000, 4
    )
    assert TierSettings.parse(Tier("file:///nvme/x")) == TierSettings("file:///nvme/x", EverySeconds(1800.0), 3)
    assert TierSettings.parse(Tier("gs://b", every=500)).every == EverySteps(500)


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("/nvme/run7", "file:///nvme/run7"),
        ("/nvme/run7/", "file:///nvme/run7"),
        ("file:///nvme/run7/", "file:///nvme/run7"),
        ("/with space/%41#?", "file:///with%20space/%2541%23%3F"),
        ("file:///with%20space", "file:///with%20space"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("az://container/x", "az://container/x"),
        ("memory://", "memory://"),
        ("memory://x/y", "memory://x/y"),
    ],
)
def test_urls(url: str, whole: str) -> None:
    assert parse_url(url) == whole
    assert parse_url(whole) == whole


def test_paths_begin_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse_url("ckpt") == (tmp_path / "ckpt").as_uri()
    assert parse_url("~/ckpt") == "file:///home/somebody/ckpt"


@pytest.mark.parametrize(
    "url",
    ["", "http://x/y", "s3://", "s3:///key", "s3://b//x", "s3://b/../x", "file://nvme/x", "file:///", "/", "/a/../b",
     "file:///a/%2e%2e/b", "file:///a%00b", "a\nb", "s3://b/x?region=y", "s3://b/x#y", "x" * 3000, None, 7],
)  # fmt: skip
def test_urls_that_are_no_place(url: Any) -> None:
    with pytest.raises(ConfigError, match="tier"):
        parse_url(url)


def test_credentials_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="credentials") as refused:
        parse_url("s3://KEY:SECRET@bucket/x")
    assert "SECRET" not in str(refused.value)
    assert "KEY" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("every", 0), ("every", -5), ("every", 1.5), ("every", True), ("every", "600"), ("every", "5 parsecs"), ("every", "0s"),
     ("every", None), ("keep", 0), ("keep", "3"), ("keep", True), ("keep_min", 4), ("keep_min", 0), ("milestone_steps", 0),
     ("limit", "2"), ("limit", 2**40), ("limit", "0GB"), ("bandwidth", "fast"), ("uploads", 0), ("uploads", 1000),
     ("any_job", 1)],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"tier s3://b/x: {field}="):
        TierSettings.parse(replace(Tier("s3://b/x"), **{field: value}))


def test_mtbf_is_looked_at_where_it_counts() -> None:
    with pytest.raises(ConfigError, match="mtbf="):
        TierSettings.parse(Tier("s3://b/x", every="auto", mtbf="often"))


def test_places_that_overlap_are_refused() -> None:
    with pytest.raises(ConfigError, match="lies in tier"):
        parse_tiers([Tier("/nvme/a"), Tier("file:///nvme/a/")])
    with pytest.raises(ConfigError, match="lies in tier"):
        parse_tiers([Tier("s3://b"), Tier("s3://b/x")])
    assert len(parse_tiers([Tier("/nvme/a"), Tier("/nvme/ab"), Tier("s3://b/x")])) == 3


def test_so_many_at_most() -> None:
    with pytest.raises(ConfigError, match=f"{TIERS_LIMIT} at most"):
        parse_tiers([Tier(f"/nvme/{index}") for index in range(TIERS_LIMIT + 1)])
    with pytest.raises(ConfigError, match=r"a holdfast\.Tier is needed"):
        parse_tiers(["s3://b/x"])  # type: ignore[list-item]


@pytest.mark.parametrize("tier", [WHOLE, Tier("/x", every=7), Tier("s3://b", every="1.5h")])
def test_there_and_back(tier: Tier) -> None:
    settings = TierSettings.parse(tier)
    assert TierSettings.from_json(settings.to_json()) == settings
    assert "\n" not in settings.to_json()


@pytest.mark.parametrize(
    "change",
    [{"url": "s3://b/../x"}, {"url": 7}, {"url": "relative"}, {"keep": 0}, {"keep": None}, {"keep": "3"}, {"every": {}},
     {"every": {"steps": 0}}, {"every": {"steps": "x"}}, {"every": {"seconds": -1}}, {"every": {"seconds": 1e400}},
     {"every": {"days": 1}}, {"every": [1]}, {"every": {"steps": 1, "seconds": 1}}, {"uploads": 0}, {"bytes_per_s": 0},
     {"any_job": 1},
     {"limit_bytes": -1}, {"more": 1}, {"every": {"mtbf_s": float("nan")}}],
)  # fmt: skip
def test_what_came_over_the_wire_is_checked(change: dict[str, Any]) -> None:
    fields = json.loads(TierSettings.parse(WHOLE).to_json())
    with pytest.raises(ConfigError):
        TierSettings.from_json(json.dumps(fields | change))


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "7", '"x"', "[" * 100_000])
def test_what_is_no_settings(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        TierSettings.from_json(text)


def test_amounts() -> None:
    assert parse_bytes("1.5GiB", "x") == 3 << 29
    assert parse_bytes("2 TB", "x") == 2 * 10**12
    assert parse_seconds("1.5h", "x") == 5400
    for text in ("", "5", "5 ", "s", "-1s", "1e3s", "٣s", "5S", "nan", None, 5, b"5s"):
        with pytest.raises(ConfigError, match="x="):
            parse_seconds(text, "x")
