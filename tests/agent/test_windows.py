"""Parts of images, laid out in windows: from every source, through sources that fail, within memory, whatever is asked."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import stat
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from holdfast.agent import combine, rebuild, windows
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.arenas import Arenas
from holdfast.agent.client import WINDOW_BYTES, WINDOW_RANGES, AgentClient, packed
from holdfast.agent.settings import NodeSettings
from holdfast.errors import AgentUnreachable, BudgetExceeded, ConfigError, Corrupt, SnapshotLost
from holdfast.snapshot.arena import Window
from holdfast.snapshot.layout import Layout, Slice
from holdfast.tests.agent.members import JOB, WAIT_S, Group, Member, noise, plenty, refusal, run
from holdfast.tests.agent.test_rebuild import BLOCK, ONE, flip, large, parity, plain, protected
from holdfast.tests.agent.test_tiers import Agent
from holdfast.tests.ops.agents import Cluster, Node, small
from holdfast.tests.storage.broken import Broken, Fault

Parts = Sequence[tuple[int, int]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one block each, batches of a few, and no patience with peers that are down."""
    monkeypatch.setattr(combine, "PIECE_BYTES", BLOCK)
    monkeypatch.setattr(windows, "_BATCH_BYTES", 3 * BLOCK)
    monkeypatch.setattr(rebuild, "_PAUSES_S", (0.0,))


def question(image: wire.MaterialiseRequest, parts: Parts, *, window: int = 0, reader: int = 0) -> wire.ReadRequest:
    return wire.ReadRequest(image=image, ranges=packed(parts), window=window, reader=reader)


async def read(
    member: Member, image: wire.MaterialiseRequest, parts: Parts, **which: int
) -> tuple[bytes, wire.ReadReply]:
    """What the window then holds, and the answer."""
    reply = await member.protector.windows.read(question(image, parts, **which))
    return content(reply, sum(nbytes for _, nbytes in parts)), reply


def content(reply: wire.ReadReply, nbytes: int) -> bytes:
    found = Window.open(reply.path)
    data = found.bytes[:nbytes].tobytes()
    found.close()
    return data


def cut(image: bytes, parts: Parts) -> bytes:
    return b"".join(image[offset : offset + nbytes] for offset, nbytes in parts)


def some_parts(nbytes: int, seed: object, lengths: Sequence[int] = (0, 1, 77, BLOCK, 2 * BLOCK + 5)) -> Parts:
    """Ranges of all kinds: empty, of a byte, over several blocks, overlapping, in any order."""
    draw = random.Random(str(seed))
    starts = [draw.randrange(nbytes) for _ in range(12)] + [0, nbytes - 1]
    return [(start, min(draw.choice(lengths), nbytes - start)) for start in starts] + [(nbytes - 1, 1)]


def calls(group: Group, method: str) -> int:
    return sum(asked == method for _, _, asked in group.asked)


def with_group(
    names: str, m: int, work: Callable[[Group, dict[int, bytes]], Awaitable[None]], limit_bytes: int | None = None
) -> None:
    """Do *work* with a group that guards a snapshot, and the images of that."""

    async def all_of_it() -> None:
        ranks = plain(names)
        async with Group(*ranks, limit_bytes=limit_bytes) as group:
            await work(group, await protected(group, ranks, m, large))

    run(all_of_it)


# -- sources -------------------------------------------------------------------------------------------------------------


def test_parts_come_from_the_slot_here_from_another_and_from_the_group() -> None:
    async def work(group: Group, images: dict[int, bytes]) -> None:
        a = group.members["a"]
        for rank, without, how in (
            (0, "", "read from a slot here"),
            (1, "", "fetched from agent b"),
            (1, "b", "rebuilt from 6 pieces of its group"),
            (3, "cd", "rebuilt from 4 pieces of its group"),
        ):
            request = group.request(rank, ONE, without=without)
            said = await a.protector.windows.describe(request)
            assert (said.layout, said.image_bytes, said.how) == (b"layout of %d" % rank, large(rank), how)
            for seed in range(3):
                parts = some_parts(large(rank), seed, (1, 77, 4000) if seed == 1 else (0, 1, BLOCK, 2 * BLOCK + 5))
                data, reply = await read(a, request, parts)
                assert data == cut(images[rank], parts)
                assert reply.how == how
        assert a.image(1, ONE) is None  # nothing was brought here for it

    with_group("abcd", 2, work)


def test_no_more_is_moved_than_the_blocks_that_are_touched_each_once() -> None:
    async def work(group: Group, images: dict[int, bytes]) -> None:
        a, request = group.members["a"], group.request(1, ONE)
        (_, reply), (_, here) = (
            await read(a, request, [(BLOCK + 5, 10)]),
            await read(a, group.request(0, ONE), [(0, 9)]),
        )
        assert (reply.pulled_bytes, here.pulled_bytes) == (BLOCK, 0)
        parts = [(2 * BLOCK - 1, BLOCK), (BLOCK, 3), (3 * BLOCK - 1, 2), (5 * BLOCK + 1, BLOCK - 2)]
        data, reply = await read(a, request, parts)
        assert data == cut(images[1], parts)
        assert reply.pulled_bytes == 4 * BLOCK - 1  # blocks 1 to 3, and the last, which is one byte shorter
        _, reply = await read(a, group.request(1, ONE, without="b"), [(BLOCK + 5, 10)])
        assert reply.pulled_bytes == 2 * BLOCK  # what it takes to compute one block of two others

    with_group("abc", 1, work)


def test_what_is_known_of_an_image_is_asked_once() -> None:
    """Until its reader has gone, or the job is somewhere else."""

    async def work(group: Group, images: dict[int, bytes]) -> None:
        a, request, before = group.members["a"], group.request(1, ONE), calls(group, "GetManifest")
        await a.protector.windows.describe(request)
        await asyncio.gather(*(read(a, request, [(9, 99)], window=w, reader=r) for w in (0, 1) for r in (0, 5)))
        assert calls(group, "GetManifest") == before + 1
        await a.protector.windows.give_back(0)
        await read(a, request, [(9, 99)], reader=5)
        assert calls(group, "GetManifest") == before + 1
        await a.protector.windows.give_back(5)
        await read(a, request, [(9, 99)])
        assert calls(group, "GetManifest") == before + 2
        await group.assemble(plain("abc"), "2+1", run="2" * 32)
        await read(a, request, [(9, 99)])
        assert calls(group, "GetManifest") == before + 3

    with_group("abc", 1, work)


def test_many_images_are_not_all_kept_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_IMAGES", 2)

    async def work(group: Group, images: dict[int, bytes]) -> None:
        a = group.members["a"]
        for rank in (0, 1, 2, 3, 1, 0):
            assert (await read(a, group.request(rank, ONE), [(3, 9)]))[0] == images[rank][3:12]
        assert len(a.protector.windows._images) == 2

    with_group("abcd", 1, work)


# -- falling through -----------------------------------------------------------------------------------------------------


def test_damage_costs_one_batch_wherever_it_is() -> None:
    """In the slot here, in that of another, in parity: the next one serves, for what is damaged there."""

    async def work(group: Group, images: dict[int, bytes]) -> None:
        a, b, whole = group.members["a"], group.members["b"], [(0, large(1))]
        flip(b.arenas.image(1, ONE), 4 * BLOCK + 7)
        flip(parity(group.members["c"]), 0)
        data, reply = await read(a, group.request(1, ONE), whole)
        assert data == images[1]
        assert reply.how == "fetched from agent b and rebuilt from 7 pieces of its group"
        data, reply = await read(b, group.request(1, ONE), whole)
        assert data == images[1]
        assert reply.how == "read from a slot here and rebuilt from 7 pieces of its group"
        data, reply = await read(a, group.request(1, ONE), [(0, 3 * BLOCK)])
        assert reply.how == "fetched from agent b"

    with_group("abcd", 2, work)


def test_a_slot_that_is_filled_anew_while_it_is_read_gives_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes change after they were verified there, and before they are copied."""

    async def work(group: Group, images: dict[int, bytes]) -> None:
        a = group.members["a"]
        slot = a.arenas.image(0, ONE)
        assert slot is not None
        add = combine.Combiner._take

        def late(self: Any, piece: Any, source: Any, address: int) -> bool:
            taken = add(self, piece, source, address)
            self._target[piece.target_offset] ^= source.here is not None
            return taken

        monkeypatch.setattr(combine.Combiner, "_take", late)
        data, reply = await read(a, group.request(0, ONE), [(0, large(0))])
        assert data == images[0]
        assert reply.how.startswith("rebuilt from")

    with_group("abc", 1, work)


def test_a_source_that_is_down_is_asked_once() -> None:
    async def work(group: Group, images: dict[int, bytes]) -> None:
        a, request, before = group.members["a"], group.request(1, ONE), len(group.asked)
        group.down |= {"b"}
        for part in some_parts(large(1), 4):
            data, _ = await read(a, request, [part])
            assert data == cut(images[1], [part])
        # For its image, and for its parity.
        assert [asked for asked in group.asked[before:] if asked[1] == "b"] == [("a", "b", "GetManifest")] * 2

    with_group("abcd", 2, work)


def test_a_source_that_goes_away_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(group: Group, images: dict[int, bytes]) -> None:
        a, request = group.members["a"], group.request(3, ONE)
        opened = a.protector._origins._open

        async def losing(address: str, like: Any, extents: Any) -> Any:
            stream = await opened(address, like, extents)
            if len(lost) == 0 and len(extents) < 3:  # the last batch
                lost.append(group.by_address(address).name)
                await group.lose(lost[0])
            return stream

        lost: list[str] = []
        monkeypatch.setattr(a.protector._origins, "_open", losing)
        data, reply = await read(a, request, [(0, 11 * BLOCK)])
        assert lost == ["d"]
        assert data == images[3][: 11 * BLOCK]
        assert reply.how == "fetched from agent d and rebuilt from 6 pieces of its group"

    with_group("abcd", 2, work)


def test_what_cannot_be_had_is_said_with_reasons() -> None:
    async def work(group: Group, images: dict[int, bytes]) -> None:
        a = group.members["a"]
        error = await refusal(read(a, group.request(1, ONE, without="abcd"), [(0, 9)]))
        assert isinstance(error, SnapshotLost)
        assert "rank 1 cannot be had: no source" in str(error)
        request = group.request(1, ONE, without="bc")
        for slot in (group.members["a"].arenas.image(0, ONE), group.members["d"].arenas.image(3, ONE)):
            flip(slot, 9)
        for name in "ad":
            for at in range(0, 12 * BLOCK, BLOCK):
                flip(parity(group.members[name]), at)
        error = await refusal(read(a, request, [(0, 9)]))
        assert isinstance(error, SnapshotLost)
        assert "rebuilding: stripe" in str(error)
        group.down |= {"b", "c", "d"}
        request = group.request(1, ONE)
        error = await refusal(read(a, request, [(0, 9)]))
        assert isinstance(error, AgentUnreachable)  # which may pass
        group.down.clear()
        assert (await read(a, request, [(0, 9)]))[0] == images[1][:9]  # and has

    with_group("abcd", 2, work)


def test_an_image_of_another_world_is_none() -> None:
    async def work(group: Group, images: dict[int, bytes]) -> None:
        for without in ("", "a", "b"):
            for rank in (0, 1):
                request = group.request(rank, ONE, without=without)
                request.world = 4
                error = await refusal(read(group.members["a"], request, [(0, 9)]))
                assert isinstance(error, SnapshotLost)
                assert "is of 64 ranks; one of 4 is wanted" in str(error)

    with_group("abc", 1, work)


# -- tiers ---------------------------------------------------------------------------------------------------------------

ROWS = 5000
SLICES = [
    Slice("whole", "uint8", (ROWS, 100), (0, 0), (ROWS, 100), chunk=(1000, 100)),
    Slice("odd", "float32", (7,), (0,), (7,)),
    Slice("none", "float32", (0, 3), (0, 0), (0, 3)),
    Slice("scalar", "int64", (), (), ()),
    Slice("part", "uint8", (64, 50), (32, 0), (32, 50), chunk=(32, 50)),
]
LAYOUT = Layout.of(3, SLICES)
VALUES = 3000


class Spilled(Agent):
    """Whose images have several slices, gaps between them, and values."""

    def image(self) -> bytes:
        image = bytearray(LAYOUT.values_offset + VALUES)
        for placed in LAYOUT.placed:
            image[placed.offset : placed.end] = noise(placed.slice.nbytes, placed.slice.name)
        image[LAYOUT.values_offset :] = noise(VALUES)
        return bytes(image)

    async def put_image(self, tiers: int) -> bytes:
        """It lies in the tiers then, and nowhere else."""
        image, text = self.image(), LAYOUT.to_text()
        self.arenas.reserve(0, 2, image_bytes=len(image), table_bytes=4096 + len(text))
        slot = self.arenas.slot(0, 0)
        slot.image[: len(image)] = np.frombuffer(image, np.uint8)
        sums = self.arenas.sums(slot, len(image))
        sums.landed(0, len(image))
        self.arenas.seal_read(slot, ONE, rank=0, world=1, watermark=-1, image_bytes=len(image), layout=text, sums=sums)
        assert await self.spill(ONE, tiers=tiers) is None
        slot.unseal()
        return image


def stored(*where: tuple[int, str, str]) -> wire.MaterialiseRequest:
    """What a trainer asks whose image lies in those tiers: index, agent, address."""
    tiers = [wire.TierSource(tier=tier, agent=agent, address=address) for tier, agent, address in where]
    return wire.MaterialiseRequest(id=group_id(), rank=0, world=1, tiers=tiers)


def group_id() -> wire.Id:
    return wire.Id(run=ONE.run, generation=ONE.generation, step=ONE.step)


def with_tiers(
    folder: Path,
    work: Callable[[Member, Spilled, bytes, Group], Awaitable[None]],
    tiers: Sequence[str] = ("near", "far"),
) -> None:
    async def all_of_it() -> None:
        agent = Spilled(*(folder / name for name in tiers))
        async with agent, Group("a", "b") as group:
            image = await agent.put_image(len(tiers))
            group.members["a"].protector.windows._tiers = agent.tiers.origin
            await work(group.members["a"], agent, image, group)

    run(all_of_it)


def test_parts_come_from_a_tier(tmp_path: Path) -> None:
    async def work(a: Member, agent: Spilled, image: bytes, group: Group) -> None:
        request = stored((0, "a", ""), (1, "a", ""))
        said = await a.protector.windows.describe(request)
        assert (said.layout, said.image_bytes) == (LAYOUT.to_text(), len(image))
        for seed in range(4):
            parts = [*some_parts(len(image), seed), (LAYOUT.values_offset - 70, VALUES), (0, len(image))]
            data, reply = await read(a, request, parts)
            assert data == cut(image, parts)
            assert reply.how == f"read from {(tmp_path / 'near').as_uri()}"
        _, reply = await read(a, request, [(100_001, 5)])
        assert reply.pulled_bytes == 100_000  # one chunk
        leases = list((tmp_path / "near").rglob("readers/*"))
        assert leases
        await a.protector.windows.give_back(0)
        assert not any(lease.exists() for lease in leases)

    with_tiers(tmp_path, work)


@pytest.mark.parametrize("trouble", ["flipped", "missing", "away"])
def test_what_one_tier_lacks_comes_from_the_next(tmp_path: Path, trouble: str) -> None:
    async def work(a: Member, agent: Spilled, image: bytes, group: Group) -> None:
        if trouble == "away":
            faults = [Fault(name, "fail", times=999) for name in ("put", "get", "list", "read_into")]
            agent.put(Broken(await agent.tiers.all[0].opened(), *faults))
        else:
            (chunk,) = (tmp_path / "near").rglob("*whole*/c.2.0")
            found = bytearray(chunk.read_bytes())
            found[7] ^= 1
            chunk.unlink() if trouble == "missing" else chunk.write_bytes(found)
        data, _ = await read(a, stored((0, "a", ""), (1, "a", "")), [(0, len(image))])
        assert data == image
        # Without the other tier, what is elsewhere in the image can be had all the same.
        if trouble != "away":
            request = stored((0, "a", ""))
            assert (await read(a, request, [(0, 200_000)]))[0] == image[:200_000]
            error = await refusal(read(a, request, [(0, 200_001)]))
            assert isinstance(error, SnapshotLost)
            assert "no tier has an undamaged copy" in str(error)

    with_tiers(tmp_path, work)


def test_a_tier_of_another_node_is_read_by_its_agent(tmp_path: Path) -> None:
    async def work(a: Member, agent: Spilled, image: bytes, group: Group) -> None:
        b, brings = group.members["b"], []

        async def bring(address: str, request: wire.MaterialiseRequest) -> wire.MaterialiseReply:
            brings.append(address)
            text = LAYOUT.to_text()
            async with b.arenas.filling(0, ONE, image_bytes=len(image), table_bytes=4096 + len(text)) as slot:
                slot.image[: len(image)] = np.frombuffer(image, np.uint8)
                sums = b.arenas.sums(slot, len(image))
                sums.landed(0, len(image))
                sealed = b.arenas.seal_read(
                    slot, ONE, rank=0, world=1, watermark=-1, image_bytes=len(image), layout=text, sums=sums
                )
            return wire.MaterialiseReply(path=slot.place.path, how="read", checks_crc=sealed.checks_crc)

        a.protector._peers.bring = bring  # type: ignore[method-assign]
        request = stored((0, "b", b.address))
        for part in [(5, 70_000), (100_000, 9)]:
            assert (await read(a, request, [part]))[0] == cut(image, [part])
        assert brings == [b.address]

    with_tiers(tmp_path, work)


def test_without_any_tier_known_one_is_to_ask_again() -> None:
    async def work() -> None:
        async with Agent() as agent, Group("a") as group:
            group.members["a"].protector.windows._tiers = agent.tiers.origin
            error = await refusal(read(group.members["a"], stored((0, "a", "")), [(0, 9)]))
            assert isinstance(error, AgentUnreachable)

    run(work)


# -- windows -------------------------------------------------------------------------------------------------------------


def windows_of(member: Member) -> list[str]:
    return sorted(path.name for path in member.folder.glob("window-*"))


def test_windows_grow_are_counted_and_are_given_back() -> None:
    async def work(group: Group, images: dict[int, bytes]) -> None:
        a, request = group.members["a"], group.request(0, ONE)
        before = a.arenas.reserved_bytes
        _, first = await read(a, request, [(0, 9)])
        await read(a, request, [(0, 9)], window=1)
        assert windows_of(a) == ["window-00000.0", "window-00000.1"]
        assert stat.S_IMODE(Path(first.path).stat().st_mode) == 0o600
        assert a.arenas.reserved_bytes == before + (2 << 20)
        inode = Path(first.path).stat().st_ino
        _, again = await read(a, request, [(0, 99)])
        assert (again.path, Path(again.path).stat().st_ino) == (first.path, inode)
        mapped = Window.open(first.path)
        many = [(0, large(0))] * 6
        data, grown = await read(a, request, many)
        assert data == cut(images[0], many)
        assert (grown.path, mapped.in_place) == (first.path, False)
        assert bytes(mapped.bytes[:99]) == images[0][:99]  # what was mapped stays as it was
        mapped.close()
        assert a.arenas.reserved_bytes == before + (3 << 20)
        await read(a, request, [(0, 9)], reader=7)
        assert await a.protector.windows.read(question(request, [])) == wire.ReadReply()
        assert windows_of(a) == ["window-00007.0"]
        assert a.arenas.reserved_bytes == before + (1 << 20)
        with pytest.raises(Corrupt, match=r"window-00000\.0 cannot be opened"):
            Window.open(first.path)

    with_group("ab", 1, work)


def test_a_window_that_was_removed_is_made_again() -> None:
    async def work(group: Group, images: dict[int, bytes]) -> None:
        a, request = group.members["a"], group.request(0, ONE)
        _, reply = await read(a, request, [(0, 9)])
        Path(reply.path).unlink()
        assert (await read(a, request, [(0, 9)]))[0] == images[0][:9]

    with_group("ab", 1, work)


def test_memory_that_does_not_suffice_for_a_window_is_said_to() -> None:
    async def work(group: Group, images: dict[int, bytes]) -> None:
        a, request = group.members["a"], group.request(0, ONE)
        a.arenas._limit_bytes = a.arenas.reserved_bytes + (1 << 20)
        await read(a, request, [(0, 9)])
        error = await refusal(read(a, request, [(0, 9)], window=1))
        assert isinstance(error, BudgetExceeded)
        assert str(a.arenas.reserved_bytes + (1 << 20)) in str(error)
        assert "--memory-limit" in str(error)
        assert windows_of(a) == ["window-00000.0"]
        assert (await read(a, request, [(5, 9)]))[0] == images[0][5:14]

    with_group("ab", 1, work)


def test_windows_end_with_their_agent(tmp_path: Path) -> None:
    """With one that ends, at once; with one that was killed, when its successor begins. Other files are left alone."""
    folder = tmp_path / "shm"
    folder.mkdir(mode=0o700)
    settings = NodeSettings(JOB, folder, folder / "agent.sock", True)
    for ends in (True, False):
        arenas = Arenas(settings, "a", None, plenty)
        arenas.reserve(3, 1, image_bytes=4096, table_bytes=4096)
        arenas.window(3, 0, 5)
        (folder / "window-00003.1.new").write_bytes(b"half")
        (folder / "window-00003.10").write_bytes(b"no name of ours")
        (folder / "window-00004.0").symlink_to(folder / "window-00003.10")
        if ends:
            arenas.close()
            assert not (folder / "window-00003.0").exists()
        after = Arenas(settings, "a", None, plenty)
        after.adopt()
        assert sorted(after.foreign) == ["window-00003.10", "window-00004.0"]
        assert not list(folder.glob("window-00003.[01]*[!0]"))
        after.close()
        (folder / "window-00004.0").unlink()
        arenas.close()


# -- what is asked -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(0, large(0) + 1)], f"bytes up to {large(0) + 1} of an image of {large(0)}"),
        ([(1 << 40, 1)], "of an image of"),
        ([((1 << 64) - 1, 2)], f"bytes from {(1 << 64) - 1} on of an image are asked for"),
        ([(0, (1 << 64) - 1)] * 2, "a window takes"),
        ([(0, WINDOW_BYTES // 2)] * 3, f"a window takes {WINDOW_BYTES}"),
        ([(0, 1)] * (WINDOW_RANGES + 1), f"{WINDOW_RANGES + 1} ranges"),
    ],
)
def test_what_is_too_much_or_not_there_is_refused(parts: Parts, message: str) -> None:
    async def work(group: Group, images: dict[int, bytes]) -> None:
        a, request = group.members["a"], group.request(0, ONE)
        error = await refusal(read(a, request, parts))
        assert isinstance(error, ConfigError)
        assert message in str(error)
        for odd in (question(request, [(0, 1)], window=2), wire.ReadRequest(image=request, ranges=bytes(24))):
            assert isinstance(await refusal(a.protector.windows.read(odd)), ConfigError)
        assert (await read(a, request, [(0, 1)] * 2))[0] == images[0][:1] * 2

    with_group("ab", 1, work)


def test_as_many_ranges_as_there_may_be_and_overlapping() -> None:
    async def work(group: Group, images: dict[int, bytes]) -> None:
        draw = random.Random(3)
        parts = [(draw.randrange(large(1) - 40), draw.randrange(40)) for _ in range(WINDOW_RANGES)]
        reply = await group.members["a"].protector.windows.read(question(group.request(1, ONE), parts))
        assert content(reply, sum(nbytes for _, nbytes in parts)) == cut(images[1], parts)
        assert reply.pulled_bytes == large(1)

    with_group("ab", 1, work)


# -- real agents ---------------------------------------------------------------------------------------------------------


def test_agents_that_are_killed_between_two_reads() -> None:
    """A reader goes on from what is left when the node that it read from is lost, and from its own agent's successor."""
    folder = Path(tempfile.mkdtemp(prefix="hfw-", dir="/dev/shm"))
    cluster = Cluster(folder)
    try:
        nodes = cluster.nodes(3)
        cluster.snapshot(cluster.group(nodes, "2+1"), 0, ONE)
        said = [held_by(node) for node in nodes]
        image = wire.MaterialiseRequest(
            id=group_id(), rank=1, world=3,
            images=[
                wire.Source(rank=i.rank, agent=its.agent, address=its.address, checks_crc=i.checks_crc)
                for its in said
                for i in its.images
            ],
            parities=[wire.ParitySource(parity=p, agent=its.agent, address=its.address) for its in said for p in its.parities],
        )  # fmt: skip
        layout, wanted = small(rank=1, world=3)
        request = question(image, [(9, 20), (0, len(wanted))])
        answers: list[wire.ReadReply] = []
        for loss in (None, nodes[1], nodes[0]):
            if loss is nodes[1]:
                cluster.lose(loss)
            elif loss is not None:
                loss.end(signal.SIGKILL)
                assert Path(answers[-1].path).exists()
                nodes[0] = cluster.node(folder="job-n0", listen=loss.listen)
                assert not Path(answers[-1].path).exists(), "what a killed agent leaves is swept up"
                cluster.trainer(nodes[0], rank=0, world=3)
            with AgentClient.at(nodes[0].settings) as client:
                assert client.describe_image(image, WAIT_S).layout == layout.to_text()
                answers.append(client.read_ranges(request, WAIT_S))
            assert content(answers[-1], 20 + len(wanted)) == wanted[9:29] + wanted
        assert [answer.how.split()[0] for answer in answers] == ["fetched", "rebuilt", "rebuilt"]
    finally:
        cluster.close()
        shutil.rmtree(folder)


def held_by(node: Node) -> wire.ImageList:
    with AgentClient.at(node.settings) as client:
        return client.inventory(WAIT_S)
