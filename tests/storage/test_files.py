"""Stores of files: the contract, and what files have of their own: power cuts, kills, full and failing disks."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from holdfast.errors import ObjectMissing, TierFull, TierUnreachable
from holdfast.storage import disk as disk_module
from holdfast.storage.disk import Disk
from holdfast.storage.files import HELD_BYTES, THREADS, UNSYNCED_FILES, FileStore
from holdfast.storage.store import Buffer, Store, open_store
from holdfast.storage.work import Work
from holdfast.tests.storage.contract import MIB, StoreContract, pattern, read, within
from holdfast.tests.storage.powercut import RecordingDisk, after_power_cut


class TestOnDisk(StoreContract):
    """A folder of a file system with a device."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/made/by/it"


class TestInMemory(StoreContract):
    """A folder of a file system without one."""

    @pytest.fixture
    def url(self) -> Iterator[str]:
        folder = tempfile.mkdtemp(dir="/dev/shm")
        yield folder
        shutil.rmtree(folder)


class TestThroughTheCache(StoreContract):
    """A file system that knows neither O_DIRECT nor how to set space aside."""

    @pytest.fixture
    def url(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        def refused(self: Disk, fd: int) -> None:
            self._direct = False

        monkeypatch.setattr(Disk, "_go_direct", refused)
        monkeypatch.setattr(disk_module, "_reserve", lambda fd, nbytes: None)
        return str(tmp_path / "tier")


# ---- power cuts ----


def test_power_may_be_cut_anywhere(tmp_path: Path) -> None:
    """After any system call: what was said to be durable is there, and nothing is there in part."""
    disk = RecordingDisk()
    root = tmp_path / "disk" / "tier"
    story: list[tuple[str, bytes | None, int, int | None]] = []  # key, value, begun and durable after so many calls

    async def tell() -> None:
        store = FileStore(root, disk=disk)
        waiting: list[tuple[str, bytes, int]] = []

        async def put(key: str, nbytes: int, *, durable: bool) -> None:
            begun, data = len(disk.log), pattern(nbytes, len(disk.log))
            await store.put(key, [data], durable=durable)
            if durable:
                story.append((key, data, begun, len(disk.log)))
            else:
                waiting.append((key, data, begun))

        async def settle() -> None:
            await store.settle()
            story.extend((key, data, begun, len(disk.log)) for key, data, begun in waiting)
            waiting.clear()

        await put("a/b/1", 100, durable=True)
        await put("a/b/2", 5000, durable=False)
        await put("a/c/3", MIB + 1, durable=False)
        await settle()
        await put("a/b/1", 200, durable=True)
        await put("a/b/2", 10, durable=False)
        await put("d", 10, durable=True)
        await settle()
        begun = len(disk.log)
        await store.delete(["a/b/1", "a/b/2"])
        story.extend((key, None, begun, len(disk.log)) for key in ("a/b/1", "a/b/2"))
        await put("a/b/1", 300, durable=True)
        await put("a/never/settled", 300, durable=False)
        story.extend((key, data, begun, None) for key, data, begun in waiting)
        await store.close()

    (tmp_path / "disk").mkdir()
    asyncio.run(tell())
    calls = len(disk.log)
    assert calls > 40
    for cut in range(calls + 1):
        for seed in range(4):
            shutil.rmtree(tmp_path / "after", ignore_errors=True)
            after_power_cut(disk.log[:cut], tmp_path / "disk", tmp_path / "after", random.Random(f"{cut} {seed}"))
            found = within(str(tmp_path / "after" / "tier"), _contents)
            for key in {key for key, *_ in story}:
                told = [(value, begun, end) for of, value, begun, end in story if of == key and begun < cut]
                last = max((i for i, (_, _, end) in enumerate(told) if end is not None and end <= cut), default=None)
                allowed = (
                    [value for value, _, _ in told[last:]] if last is not None else [None, *(v for v, _, _ in told)]
                )
                assert found.get(key) in allowed, f"{key} after {cut} calls, seed {seed}: {disk.log[cut - 1]}"
            assert found.keys() <= {key for key, *_ in story}


async def _contents(store: Store) -> dict[str, bytes]:
    return {found.key: await store.get(found.key) for found in await store.list("")}


# ---- kills ----

DURABLE = ["temporary-made", "temporary-written", "temporary-synced", "renamed", "folders-synced"]
DEFERRED = ["temporary-made", "temporary-written", "drafts-synced", "drafts-renamed"]
_PUT = """
import asyncio, sys
from holdfast.storage.store import open_store

async def main(url, durable):
    store = open_store(url)
    for value in (b"old", b"new"):
        for key in ("a/small", "a/b/large"):
            data = value * (1 if key == "a/small" else 700_000)
            await store.put(key, [data[:2], data[2:]], durable=durable)
        await store.settle()
        print(value.decode(), flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2] == "durable"))
"""


@pytest.mark.parametrize("arrival", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("mode", "place"), [*(("durable", place) for place in DURABLE), *(("deferred", place) for place in DEFERRED)]
)
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, mode: str, place: str, arrival: int) -> None:
    if place.startswith("drafts") and arrival > 2:
        pytest.skip("there are two of these")
    url = str(tmp_path / "tier")
    done = subprocess.run(
        [sys.executable, "-c", _PUT, url, mode],
        env={**os.environ, "HOLDFAST_CRASH": f"spill.{place}={arrival}"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    said = done.stdout.split()

    async def scene(store: Store) -> None:
        found = {one.key for one in await store.list("")}
        assert found <= {"a/small", "a/b/large"}
        for key, times in (("a/small", 1), ("a/b/large", 700_000)):
            if said or key in found:
                assert await store.get(key) in [value * times for value in (b"old", b"new")]
        before = sum(len(files) for _, _, files in os.walk(url))
        freed = await store.sweep(1e9)  # old or not: their process is dead
        after = [path for path, _, files in os.walk(url) for _ in files]
        assert len(after) == len(found)
        assert (before > len(after)) >= (freed > 0)
        await store.put("a/b/large", [b"goes on"])

    within(url, scene)


# ---- full and failing disks ----


class Failing(Disk):
    """Fails the named call, as often as told."""

    def __init__(self, call: str, code: int, times: int = 1) -> None:
        super().__init__()
        self._call, self._code, self._times = call, code, times

    def _fail(self, call: str) -> None:
        if call == self._call and self._times > 0:
            self._times -= 1
            raise OSError(self._code, os.strerror(self._code))

    def make_folder(self, path: Path) -> bool:
        self._fail("make_folder")
        return super().make_folder(path)

    def create(self, path: Path) -> int:
        self._fail("create")
        return super().create(path)

    def write(self, fd: int, parts: Sequence[Buffer], work: Work) -> None:
        super().write(fd, parts[:-1], work)
        self._fail("write")
        os.truncate(fd, 0)
        super().write(fd, parts, work)

    def sync(self, fd: int) -> None:
        self._fail("sync")
        super().sync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._fail("rename")
        super().rename(source, target)

    def sync_folder(self, path: Path) -> None:
        self._fail("sync_folder")
        super().sync_folder(path)


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("call", ["make_folder", "create", "write", "sync", "rename", "sync_folder"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_fails_anywhere(tmp_path: Path, call: str, durable: bool, code: int) -> None:
    """It is told, it leaves nothing in part and no temporary file, and the next try succeeds."""

    async def play() -> None:
        store = FileStore(tmp_path / "tier", disk=Failing(call, code))
        wanted = TierFull if code in (errno.ENOSPC, errno.EDQUOT) else TierUnreachable
        data = pattern(MIB + 3)

        async def put() -> None:
            await store.put("a/b/k", [data, b"crcc"], durable=durable)
            await store.settle()

        with pytest.raises(wanted, match=f"{store.url}.*{os.strerror(code)}"):
            await put()
        for found in await store.list(""):
            assert found.nbytes == MIB + 7
        await put()
        assert await read(store, "a/b/k", MIB + 7) == data + b"crcc"
        assert [name for _, _, files in os.walk(tmp_path) for name in files] == ["k"]
        await store.close()

    asyncio.run(play())


def test_what_could_not_be_synced_is_not_believed_later(tmp_path: Path) -> None:
    """A second sync of a file succeeds although its bytes are lost; so it takes a second put."""

    async def play() -> None:
        store = FileStore(tmp_path / "tier", disk=Failing("sync", errno.EIO))
        await store.put("a", [b"1"], durable=False)
        await store.put("b", [b"2"], durable=False)
        for _ in range(2):
            with pytest.raises(TierUnreachable, match="a and 0 more"):
                await store.settle()
        assert [found.key for found in await store.list("")] == ["b"]
        await store.put("a", [b"1"], durable=False)
        await store.settle()
        assert [found.key for found in await store.list("")] == ["a", "b"]
        await store.close()

    asyncio.run(play())


def test_a_full_file_system(tmp_path: Path) -> None:
    """A real one: small objects still fit where a large one does not, and what did not fit leaves no trace."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:

        async def scene(store: Store) -> None:
            await store.put("old", [pattern(3 * MIB)])
            free = await store.free_bytes()
            assert free is not None
            assert free <= 5 * MIB
            for durable in (True, False):
                with pytest.raises(TierFull):
                    await store.put("large", [pattern(6 * MIB)], durable=durable)
                with pytest.raises(TierFull):
                    await asyncio.gather(*(store.put(f"s{i}", [pattern(100_000)], durable=durable) for i in range(100)))
                await store.settle()
                await store.delete([found.key for found in await store.list("") if found.key != "old"])
                assert await store.free_bytes() == free
            assert await store.get("old") == pattern(3 * MIB)
            await store.put("small", [b"x"])

        within(str(folder / "tier"), scene)
    finally:
        subprocess.run(["umount", folder], check=True)


# ---- deadlines ----


class Hanging(Disk):
    """Hangs in ``sync``, like a network file system whose server is away, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.cleaned = threading.Event(), threading.Event()

    def sync(self, fd: int) -> None:
        self.back.wait(60)
        super().sync(fd)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.cleaned.set()


def test_who_was_told_that_a_put_failed_does_not_find_it_later(tmp_path: Path) -> None:
    async def play() -> None:
        disk = Hanging()
        store = FileStore(tmp_path / "tier", timeout_s=0.1, disk=disk)
        with pytest.raises(TierUnreachable, match=r"write a/b in file://.*no progress for 0.1 s"):
            await store.put("a/b", [b"x"])
        disk.back.set()
        assert await asyncio.to_thread(disk.cleaned.wait, 30)
        assert await store.list("") == []
        await store.put("a/b", [b"y"])
        assert await store.get("a/b") == b"y"
        await store.close()

    asyncio.run(play())


# ---- what else lies in a folder ----


def test_what_is_forgotten_troubles_nobody_even_while_all_threads_hang(tmp_path: Path) -> None:
    let_go = threading.Event()

    class Bad(Disk):
        def sync(self, fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def read(self, fd: int, parts: Sequence[memoryview], work: Work) -> None:
            let_go.wait(60)

    async def play() -> None:
        (tmp_path / "there").write_bytes(b"x")
        store = FileStore(tmp_path, timeout_s=0.5, disk=Bad())
        for name in ("lost", "waits"):
            await store.put(name, [b"x"], durable=False)
            if name == "lost":
                with pytest.raises(TierUnreachable, match="Input/output error"):
                    await store.settle()
        hung = [store.read_into("there", [memoryview(bytearray(1))]) for _ in range(THREADS)]
        assert all(isinstance(end, TierUnreachable) for end in await asyncio.gather(*hung, return_exceptions=True))
        with pytest.raises(TierUnreachable):
            await store.forget(["lost", "waits"])
        let_go.set()
        await store.settle()
        await store.close()

    asyncio.run(play())


def test_links_are_not_followed(tmp_path: Path) -> None:
    tier, outside = tmp_path / "tier", tmp_path / "outside"
    outside.mkdir()
    (outside / "k").write_bytes(b"theirs")
    tier.mkdir()
    (tier / "a").symlink_to(outside)
    (tier / "l").symlink_to(outside / "k")
    (tmp_path / "link").symlink_to(tier)

    async def scene(store: Store) -> None:
        for key in ("a/k", "l", "a/b/c"):
            with pytest.raises(ObjectMissing):
                await store.get(key)
            with pytest.raises(ObjectMissing):
                await store.read_into(key, [memoryview(bytearray(6))])
        for durable in (True, False):
            with pytest.raises(TierUnreachable, match="link"):
                await store.put("a/b/c", [bytes(HELD_BYTES + 1)], durable=durable)
        await store.put("a/n", [b"x"], durable=False)
        with pytest.raises(TierUnreachable, match="link"):
            await store.settle()
        await store.delete(["a/k", "a/n", "l"])
        await store.settle()
        for prefix in ("", "a/"):
            assert await store.list(prefix) == []
            assert await store.children(prefix) == []
            await store.confirm(prefix)
        assert [path.name for path in outside.iterdir()] == ["k"]
        await store.put("b/k", [b"ours"])
        assert await store.get("b/k") == b"ours", "the tier itself may be one"
        await store.close()

    asyncio.run(scene(open_store(str(tmp_path / "link"))))


def test_it_is_plain_files(tmp_path: Path) -> None:
    async def scene(store: Store) -> None:
        await store.put("a/zarr.json", [b"{", b"}"])
        await store.put("a/c/0", [pattern(2 * MIB)])

    within(str(tmp_path / "tier"), scene)
    assert (tmp_path / "tier/a/zarr.json").read_bytes() == b"{}"
    assert (tmp_path / "tier/a/c/0").read_bytes() == pattern(2 * MIB)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0", "a", "c", "tier", "zarr.json"]


def test_foreign_things_are_left_alone(tmp_path: Path) -> None:
    """Links lead nowhere, pipes hold nobody up, odd names are not seen, and nothing of it is removed."""
    root = tmp_path / "tier"
    (root / "a").mkdir(parents=True)
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "link").symlink_to("/etc/passwd")
    (root / "a" / "mine é.txt").write_text("x")
    (root / "a" / ".tmp-notes").write_text("x")
    os.mkfifo(root / "a" / "pipe")

    async def scene(store: Store) -> None:
        await store.put("a/k", [b"x"])
        assert [found.key for found in await store.list("")] == ["a/.tmp-notes", "a/k"]
        assert await store.children("a/") == []
        with pytest.raises(ObjectMissing):
            await store.get("a/pipe")
        with pytest.raises(ObjectMissing):
            await read(store, "a/pipe", 1)
        await store.delete(["a/k"])
        assert await store.sweep(-1e9) == 0

    within(str(root), scene)
    assert len(list((root / "a").iterdir())) == 5


def test_sweeping(tmp_path: Path) -> None:
    """Those of the living and of other nodes stay until they are old."""

    async def scene(store: Store) -> None:
        await store.put("a/k", [b"x" * (HELD_BYTES + 1)], durable=False)
        (own,) = (tmp_path / "tier/a").iterdir()
        elsewhere = own.with_name(f".tmp-00000000-{2**22 + 1}-{'0' * 32}")
        elsewhere.write_bytes(bytes(5000))
        dead = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))  # beyond what the kernel gives
        dead.write_bytes(bytes(5000))
        assert await store.sweep(3600) >= 5000
        assert set((tmp_path / "tier/a").iterdir()) == {own, elsewhere}
        os.utime(elsewhere, (1, 1))
        assert await store.sweep(3600) >= 5000
        await store.settle()
        assert len(await store.get("a/k")) == HELD_BYTES + 1
        (tmp_path / "tier/left/empty").mkdir(parents=True)
        await store.sweep(-1e9)
        assert await store.children("") == ["a"]

    within(str(tmp_path / "tier"), scene)


def test_descriptors_are_bounded(tmp_path: Path) -> None:
    async def scene(store: Store) -> None:
        before = len(os.listdir("/proc/self/fd"))
        most = 0
        for i in range(3 * UNSYNCED_FILES):
            await store.put(f"d/{i}", [b"x"], durable=False)
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
        assert most <= UNSYNCED_FILES + 10
        await store.settle()
        assert len(await store.list("d/")) == 3 * UNSYNCED_FILES
        assert len(os.listdir("/proc/self/fd")) <= before + 10

    within(str(tmp_path / "tier"), scene)


def test_folders_come_and_go_under_a_writer(tmp_path: Path) -> None:
    """Another process removes folders that are empty for a moment; no put fails of that."""
    url = str(tmp_path / "tier")

    async def play() -> None:
        writer, remover = open_store(url), open_store(url)

        async def remove() -> None:
            for _ in range(60):
                await remover.delete(["a/b/c/gone"])

        async def write() -> None:
            for i in range(60):
                await writer.put("a/b/c/k", [b"%d" % i])
                await writer.delete(["a/b/c/k"])

        await asyncio.gather(remove(), write())
        await writer.put("a/b/c/k", [b"end"])
        assert await remover.get("a/b/c/k") == b"end"
        await writer.close()
        await remover.close()

    asyncio.run(play())


def test_what_is_put_while_others_settle_is_not_seen_before_it_is_synced(tmp_path: Path) -> None:
    """Ranks of a node share a store: one settles, another goes on to put. What the one makes visible must be synced."""
    synced: set[int] = set()
    renamed: list[tuple[str, bool]] = []
    between, go_on = threading.Event(), threading.Event()

    class Watching(Disk):
        def sync(self, fd: int) -> None:
            super().sync(fd)
            synced.add(os.fstat(fd).st_ino)

        def rename(self, source: Path, target: Path) -> None:
            between.set()
            go_on.wait(30)
            renamed.append((target.name, os.stat(source).st_ino in synced))
            super().rename(source, target)

    async def play() -> None:
        store = FileStore(tmp_path / "tier", disk=Watching())
        for name in ("large", "small"):
            size = HELD_BYTES + 1 if name == "large" else 1
            await store.put(f"first-{name}", [bytes(size)], durable=False)
        settling = asyncio.create_task(store.settle())
        assert await asyncio.to_thread(between.wait, 30)
        for name in ("large", "small"):
            size = HELD_BYTES + 1 if name == "large" else 1
            await store.put(f"second-{name}", [bytes(size)], durable=False)
        go_on.set()
        await settling
        assert sorted(renamed) == [("first-large", True), ("first-small", True)]
        await store.settle()
        assert all(was for _, was in renamed)
        assert len(renamed) == 4
        await store.close()

    asyncio.run(play())
