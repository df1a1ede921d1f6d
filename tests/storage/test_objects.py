"""Object stores: the contract, and a server in trouble."""

from __future__ import annotations

import asyncio
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore
import pytest
from holdfast.errors import ConfigError, Corrupt, TierUnreachable
from holdfast.storage.objects import _aws_files, _reason
from holdfast.storage.store import Store, open_store
from holdfast.tests.storage.contract import MIB, StoreContract, pattern, read, within
from holdfast.tests.storage.moody import Moody
from holdfast.tests.storage.weed import Weed


class TestMemory(StoreContract):
    """obstore's own, without a server."""

    @pytest.fixture
    def url(self) -> str:
        return f"memory://{uuid.uuid4().hex}"


class TestS3(StoreContract):
    """A real server."""

    @pytest.fixture
    def url(self, s3: str) -> str:
        return f"{s3}/run-7"


class TestS3InTrouble(StoreContract):
    """Behind somebody who answers every third request with 500 or 503, and breaks others off in the middle."""

    @pytest.fixture
    def url(self, s3: str, weed: Weed, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        def mood(asked: int) -> int:
            return {0: 503, 3: 500, 7: -1}.get(asked % 9, 0)

        with Moody(weed.environment["AWS_ENDPOINT_URL"], mood) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            yield s3


@pytest.mark.parametrize("status", [500, 503, 403])
def test_a_server_that_never_does_it(s3: str, weed: Weed, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """What may pass is tried until the deadline; what will not is told at once."""
    with Moody(weed.environment["AWS_ENDPOINT_URL"], lambda asked: status) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = open_store(s3, timeout_s=1.5)
        begun = time.monotonic()
        with pytest.raises(TierUnreachable, match=f"write k in {s3}"):
            asyncio.run(store.put("k", [b"x"]))
        assert time.monotonic() - begun < 10
        assert (proxy.asked == 1) == (status == 403)


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back() -> None:
    with Weed() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        url = server.folder()

        async def scene(store: Store) -> None:
            impatient = open_store(url, timeout_s=1.0)
            data = pattern(20 * MIB)
            await store.put("k", [data])
            server.freeze(frozen=True)
            with pytest.raises(TierUnreachable, match="no answer for 1 s"):
                await impatient.get("k")
            server.freeze(frozen=False)
            assert await store.get("k") == data
            server.stop()
            for call in (impatient.get("k"), impatient.list(""), impatient.put("l", [data]), impatient.delete(["k"])):
                with pytest.raises(TierUnreachable):
                    await call
            putting = asyncio.ensure_future(open_store(url, timeout_s=120.0).put("l", [b"patient"]))
            await asyncio.to_thread(server.start)
            await putting
            assert await store.get("l") == b"patient"
            assert await read(store, "k", len(data), 5) == data

        within(url, scene)


def test_two_jobs_in_one_bucket(s3: str) -> None:
    async def play() -> None:
        one, other = open_store(f"{s3}/one"), open_store(f"{s3}/one-more/")
        await one.put("a/k", [b"1"])
        await other.put("a/k", [b"2"])
        await other.put("a/l", [b"2"])
        await one.delete(["a/l"])
        assert [found.key for found in await one.list("")] == ["a/k"]
        assert [found.key for found in await other.list("")] == ["a/k", "a/l"]
        assert [found.key for found in await open_store(s3).list("one/")] == ["one/a/k"]

    asyncio.run(play())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3://",
        "s3:///x",
        "s3://key:secret@bucket/x",
        "s3://b/x?sig=1",
        "s3://b/../c",
        "gopher://x",
        "file://host/x",
    ],
)
def test_what_is_no_tier(url: str) -> None:
    with pytest.raises(ConfigError) as told:
        open_store(url)
    assert "secret" not in str(told.value)


def test_messages_are_short_and_carry_no_signatures() -> None:
    assert (
        _reason(Exception("GET https://a.blob/x?sv=1&sig=TOKEN failed\n  Debug source: TOKEN"))
        == "GET https://a.blob/x failed"
    )
    assert _reason(Exception("404: <Error><Code>No</Code> <Message>Not here</Message></Error>")) == "No: Not here"


def test_a_long_listing_has_time_as_long_as_it_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is late fails it; many pages do not."""

    async def pages(pause_s: float) -> AsyncIterator[list[dict[str, Any]]]:
        for page in range(6):
            await asyncio.sleep(pause_s)
            yield [{"path": f"a/{page}", "size": 1, "last_modified": datetime.now(UTC)}]

    async def scene(pause_s: float) -> int:
        monkeypatch.setattr(obstore, "list", lambda *a, **k: pages(pause_s))
        store = open_store(f"memory://{uuid.uuid4().hex}", timeout_s=2.0)
        return len(await store.list("a/"))

    assert asyncio.run(scene(0.5)) == 6
    with pytest.raises(TierUnreachable, match="no answer"):
        asyncio.run(scene(60.0))


@pytest.mark.parametrize("text", ["aws_secret_access_key = SECRET\n", "[default]\naws_secret_access_key SECRET\n",
                                  "[SECRET]\n[SECRET]\n", "[default]\nSECRET=1\nSECRET=2\n"])  # fmt: skip
def test_no_error_quotes_a_file_of_secrets(tmp_path: Path, text: str) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(text)
    with pytest.raises(ConfigError, match=r"credentials is no AWS profile file: \w+ in line \d") as caught:
        _aws_files({"HOME": str(tmp_path)})
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_profiles_of_aws(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[default]\naws_access_key_id=a\naws_secret_access_key=b%c\n[lab]\naws_access_key_id=l\naws_secret_access_key=m\n"
    )
    (tmp_path / ".aws/config").write_text("[default]\nregion=eu\n[profile lab]\nregion=us\nendpoint_url=http://lab\n")
    home = {"HOME": str(tmp_path)}
    assert _aws_files(home) == {"access_key_id": "a", "secret_access_key": "b%c", "region": "eu"}
    lab = {"access_key_id": "l", "secret_access_key": "m", "region": "us", "endpoint": "http://lab"}
    assert _aws_files(home | {"AWS_PROFILE": "lab"}) == lab
    del lab["region"]
    assert _aws_files(home | {"AWS_PROFILE": "lab", "AWS_REGION": "eu-2"}) == lab
    assert _aws_files(home | {"AWS_ACCESS_KEY_ID": "x"}) == {}
    with pytest.raises(ConfigError, match="nobody"):
        _aws_files(home | {"AWS_PROFILE": "nobody"})
    (tmp_path / ".aws/config").write_text("no profile file")
    with pytest.raises(ConfigError):
        _aws_files(home)


def test_what_is_too_long_for_a_document(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("holdfast.storage.objects.GET_BYTES", 10)
    monkeypatch.setattr("holdfast.storage.files.GET_BYTES", 10)
    for url in (s3, str(tmp_path)):

        async def scene(store: Store) -> None:
            await store.put("k", [b"x" * 11])
            with pytest.raises(Corrupt, match="longer"):
                await store.get("k")

        within(url, scene)
