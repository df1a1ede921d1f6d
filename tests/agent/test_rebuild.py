"""Images are had from wherever they can be: every loss of m members, damage in any place, sources that die; or it is said."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
from holdfast.agent import combine, protector, rebuild
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.client import id_of
from holdfast.errors import AgentUnreachable, BudgetExceeded, SnapshotLost
from holdfast.snapshot.arena import Slot
from holdfast.snapshot.record import SnapshotId
from holdfast.tests.agent.members import Group, Member, noise, refusal, run, snapshot

ONE = snapshot(1)
NAMES = "abcdefgh"
BLOCK = 1 << 16


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one block each, and no patience with peers that are down: none comes back in these tests."""
    monkeypatch.setattr(combine, "PIECE_BYTES", BLOCK)
    monkeypatch.setattr(rebuild, "_PAUSES_S", (0.0,))


async def protected(
    group: Group, ranks: dict[str, Sequence[int]], m: int, sizes: Callable[[int], int]
) -> dict[int, bytes]:
    """A group that guards a snapshot; its images."""
    images = {rank: noise(sizes(rank), rank) for its in ranks.values() for rank in its}
    await group.assemble(ranks, f"{len(ranks) - m}+{m}")
    for name, its in ranks.items():
        for rank in its:
            group.members[name].record(rank, ONE, images[rank])
            group.members[name].protector.recorded(rank, ONE, None)
    await group.all_guard(ONE)
    return images


async def bring(group: Group, name: str, rank: int, *, without: Collection[str] = (), id: SnapshotId = ONE) -> str:
    """Have the agent bring an image here; how it did."""
    member = group.members[name]
    reply = await member.protector.materialise(group.request(rank, id, without=without))
    slot = member.arenas.image(rank, id)
    assert slot is not None
    assert slot.place.path == reply.path
    return str(reply.how)


def small(rank: int) -> int:
    return 500 * rank + 3


def large(rank: int) -> int:
    """Several blocks, of all images another number."""
    return 3 * BLOCK * (rank + 1) - rank


def plain(names: str) -> dict[str, Sequence[int]]:
    return {name: [rank] for rank, name in enumerate(names)}


# -- losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (3, 2), (6, 1), (6, 2), (8, 1), (8, 2)])
def test_every_loss_of_up_to_m_members(n: int, m: int) -> None:
    """Without what the lost held, each of their images is rebuilt by an agent that held nothing."""

    async def work() -> None:
        ranks = plain(NAMES[:n])
        async with Group(*ranks) as group:
            images = await protected(group, ranks, m, small)
            new = group.add("new")
            for lost in (p for count in range(1, m + 1) for p in itertools.combinations(range(n), count)):
                for rank in lost:
                    request = group.request(rank, ONE, without=[NAMES[i] for i in lost])
                    reply = await new.protector.materialise(request)
                    assert reply.how.startswith("rebuilt"), reply.how
                    assert new.image(rank, ONE) == images[rank]
                forget(new)

    run(work)


def forget(member: Member) -> None:
    """Whatever was brought to it is gone."""
    member.protector._materialised.clear()
    for slot in member.arenas.let_go([]):
        slot.close()


def test_several_ranks_per_member() -> None:
    async def work() -> None:
        ranks: dict[str, Sequence[int]] = {"a": [0, 3, 5], "b": [1], "c": [2, 4], "d": [6]}
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 1, large)
            for lost in ranks:
                new = group.add("new")
                for rank in ranks[lost]:
                    assert (await bring(group, "new", rank, without=[lost])).startswith("rebuilt")
                    assert new.image(rank, ONE) == images[rank]
                await group.lose("new")

    run(work)


def test_what_is_lost_beyond_m_is_refused_with_reasons() -> None:
    async def work() -> None:
        ranks = plain("abcd")
        async with Group(*ranks) as group:
            await protected(group, ranks, 2, large)
            request = group.request(1, ONE, without="bcd")
            error = await refusal(group.members["a"].protector.materialise(request))
            assert isinstance(error, SnapshotLost)
            assert "rank 1 cannot be had: rebuilding: stripe" in str(error)
            assert "of the 2 pieces that it takes to rebuild member 1; missing: image of member 2" in str(error)
            error = await refusal(group.members["a"].protector.materialise(group.request(1, ONE, without="abcd")))
            assert isinstance(error, SnapshotLost)
            assert "no source" in str(error)

    run(work)


# -- fetching ------------------------------------------------------------------------------------------------------------


def test_an_image_that_another_agent_holds_is_fetched() -> None:
    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 1, large)
            assert await bring(group, "a", 0) == "held here"
            a, request = group.members["a"], group.request(1, ONE)
            assert (await a.protector.materialise(request)).how == "fetched from agent b"
            assert a.image(1, ONE) == images[1]
            asked = len(group.asked)
            assert (
                await a.protector.materialise(request)
            ).how == "fetched from agent b"  # for another rank of the node
            assert len(group.asked) == asked

    run(work)


def test_a_fetch_that_finds_damage_becomes_a_rebuild() -> None:
    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 1, large)
            flip(group.members["b"].arenas.image(1, ONE), 4 * BLOCK + 7)
            assert (await bring(group, "a", 1)).startswith("rebuilt")
            assert group.members["a"].image(1, ONE) == images[1]

    run(work)


@pytest.mark.parametrize("tables", [False, True])
def test_a_damaged_image_is_repaired_from_a_copy(tables: bool) -> None:
    """In place, so that what is offered and pulled from here on is good; not from the group, of which nothing is left."""

    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 1, large)
            await bring(group, "a", 1)
            b = group.members["b"]
            slot = b.arenas.image(1, ONE)
            assert slot is not None
            flip(slot, 4 * BLOCK + 7)
            flip(slot, 6 * BLOCK - 2)
            slot._bytes[8193] ^= tables
            request = group.request(1, ONE)
            del request.images[next(i for i, image in enumerate(request.images) if image.agent == "b")]
            del request.parities[:]
            reply = await b.protector.materialise(request)
            assert reply.how.startswith("2 damaged blocks repaired")
            assert reply.how.endswith("from agent a")
            assert reply.path == slot.place.path
            assert b.image(1, ONE) == images[1]
            assert b.arenas.manifest(1, ONE) is not None

    run(work)


def test_who_asks_again_with_fewer_sources_is_not_told_the_same() -> None:
    """What was held here has proved damaged meanwhile: it is had from elsewhere, although the question is of the same image."""

    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 1, large)
            b = group.members["b"]
            assert await bring(group, "b", 1) == "held here"
            flip(b.arenas.image(1, ONE), 9)
            request = group.request(1, ONE)
            del request.images[next(i for i, image in enumerate(request.images) if image.agent == "b")]
            assert (await b.protector.materialise(request)).how.startswith("1 damaged blocks repaired")
            assert b.image(1, ONE) == images[1]

    run(work)


def flip(slot: Slot | None, at: int) -> None:
    assert slot is not None
    slot.image[at] ^= 1


def test_a_copy_is_as_good_as_the_image() -> None:
    """Brought to another agent, an image is offered to a third, and takes part in rebuilding others."""

    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 1, large)
            await bring(group, "a", 1)
            await group.lose("b")
            assert await bring(group, "c", 1) == "fetched from agent a"
            assert group.members["c"].image(1, ONE) == images[1]

    run(work)


def test_a_source_that_is_down_is_gone_round() -> None:
    """It is known to hold the image, and does not answer: what it holds is computed from the others."""

    async def work() -> None:
        ranks = plain("abcd")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 2, large)
            new = group.add("new")
            group.down |= {"b", "c"}
            for rank in (1, 2):
                assert (await bring(group, "new", rank)).startswith("rebuilt")
                assert new.image(rank, ONE) == images[rank]
            group.down.add("d")
            error = await refusal(new.protector.materialise(group.request(3, ONE)))
            assert isinstance(error, AgentUnreachable)  # which may pass

    run(work)


def test_long_tables_come_by_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of parity list all members' layouts: together they may be longer than a message."""
    monkeypatch.setattr(protector, "_PAGE_BYTES", 100)

    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 1, large)
            table = group.members["b"].arenas.tables()[0][2].to_text()
            new = group.add("new")
            assert (await bring(group, "new", 0, without="a")).startswith("rebuilt")
            assert new.image(0, ONE) == images[0]
            asked = [who for asking, who, what in group.asked if (asking, what) == ("new", "GetManifest")]
            assert asked.count("b") == -(-len(table) // 100)

    run(work)


def test_a_table_that_becomes_another_between_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protector, "_PAGE_BYTES", 100)

    async def work() -> None:
        ranks = plain("ab")
        async with Group(*ranks) as group:
            await protected(group, ranks, 1, large)
            b = group.members["b"]
            answer = b.protector.manifest

            def other(request: wire.ManifestRequest) -> wire.Manifest:
                told = answer(request)
                told.record += b"x" * (request.text_offset > 0)
                return told

            monkeypatch.setattr(b.protector, "manifest", other)
            request = group.request(0, ONE, without="a")
            assert isinstance(await refusal(group.add("new").protector.materialise(request)), SnapshotLost)

    run(work)


# -- damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [
        [0],
        [BLOCK - 1, BLOCK],
        [2 * BLOCK + 5, 5 * BLOCK, 5 * BLOCK + 1],
        range(0, 6 * BLOCK - 1, BLOCK),
        [6 * BLOCK - 2],
    ],
    ids=["first byte", "two blocks", "some", "all blocks", "last byte"],
)
def test_damaged_blocks_are_repaired_in_place(where: Sequence[int]) -> None:
    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 1, large)
            b = group.members["b"]
            slot = b.arenas.image(1, ONE)
            for at in where:
                flip(slot, at)
            blocks = len({at // BLOCK for at in where})
            request = group.request(1, ONE)
            del request.images[next(i for i, image in enumerate(request.images) if image.agent == "b")]
            reply = await b.protector.materialise(request)  # its trainer has found the damage, and strikes it
            assert reply.how.startswith(f"{blocks} damaged blocks repaired, rebuilt from")
            assert b.arenas.image(1, ONE) is slot
            assert b.image(1, ONE) == images[1]
            status = b.protector.status()
            assert status is not None
            assert status.damaged == blocks

    run(work)


@pytest.mark.parametrize("at", [8193, 8192 + 4 * 6 + 2])
def test_damaged_tables_are_written_again(at: int) -> None:
    """The checksums of the blocks, and the layout behind them."""

    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            await protected(group, ranks, 1, large)
            b = group.members["b"]
            slot = b.arenas.image(1, ONE)
            assert slot is not None
            slot._bytes[at] ^= 1
            assert b.arenas.manifest(1, ONE) is None
            request = group.request(1, ONE)
            del request.images[next(i for i, image in enumerate(request.images) if image.agent == "b")]
            assert "and tables" in (await b.protector.materialise(request)).how
            assert b.arenas.manifest(1, ONE) is not None

    run(work)


def parity(member: Member) -> Slot:
    ((_, _, table),) = member.arenas.tables()
    found = member.arenas.cell(0, ONE, table.key, table.me)
    assert found is not None
    return found[0]


def test_damaged_sources_are_erasures() -> None:
    """One member's parity and image are damaged, and one member is lost: two of two."""

    async def work() -> None:
        ranks = plain("abcde")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 2, large)
            new = group.add("new")
            for at in range(0, 8 * BLOCK, BLOCK):
                flip(group.members["c"].arenas.image(2, ONE), at)
                flip(parity(group.members["c"]), at)
            assert (await bring(group, "new", 0, without="a")).startswith("rebuilt")
            assert new.image(0, ONE) == images[0]
            status = new.protector.status()
            assert status is None  # it is in no group

    run(work)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8, 64])
def test_damage_counts_where_it_is_only(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Every other member is damaged in every segment, each elsewhere: whole members could not be spared, nor pieces of
    several blocks, but blocks can."""
    monkeypatch.setattr(combine, "PIECE_BYTES", blocks * BLOCK)

    async def work() -> None:
        ranks = plain("abcdef")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 2, lambda rank: 32 * BLOCK)
            new = group.add("new")
            for turn, name in enumerate("bcdef"):
                for segment in range(4):
                    flip(group.members[name].arenas.image(turn + 1, ONE), (8 * segment + turn) * BLOCK + 9)
                for row in range(2):
                    flip(parity(group.members[name]), (8 * row + turn) * BLOCK)
            assert (await bring(group, "new", 0, without="a")).startswith("rebuilt")
            assert new.image(0, ONE) == images[0]

    run(work)


def test_damage_in_two_pieces_of_one_place_that_end_differently() -> None:
    """The last segment of an image is shorter than those that it is added to."""

    async def work() -> None:
        ranks = plain("abcdefg")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 3, lambda rank: 8 * BLOCK - 1000)
            new = group.add("new")
            for rank, name in ((2, "c"), (3, "d")):
                for at in range(0, 8 * BLOCK, BLOCK):
                    flip(group.members[name].arenas.image(rank, ONE), at)
            for rank, name in ((0, "a"), (1, "b"), (4, "e"), (5, "f"), (6, "g")):
                assert (await bring(group, "new", rank, without=name)).startswith("rebuilt")
                assert new.image(rank, ONE) == images[rank]

    run(work)


def test_a_source_that_goes_away_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        ranks = plain("abcd")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 2, large)
            new = group.add("new")
            request = group.request(0, ONE, without="a")
            opened = new.protector._origins._open

            async def losing(address: str, like: Any, extents: Any) -> Any:
                stream = await opened(address, like, extents)
                if len(group.members) == 5:
                    await group.lose(group.by_address(address).name)
                return stream

            monkeypatch.setattr(new.protector._origins, "_open", losing)
            assert (await new.protector.materialise(request)).how.startswith("rebuilt")
            assert new.image(0, ONE) == images[0]
            assert len(group.members) == 4

    run(work)


# -- memory --------------------------------------------------------------------------------------------------------------


def test_memory_for_other_ranks_images_is_given_back() -> None:
    """Of replicas, each node needs the images of all ranks; they go with the first snapshot of the new run."""

    async def work() -> None:
        ranks = plain("abcd")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 1, large)
            a = group.members["a"]
            before = a.arenas.reserved_bytes
            again = "2" * 32
            await group.assemble(ranks, "3+1", run=again)
            for rank in (1, 2, 3):
                await bring(group, "a", rank)
                assert a.image(rank, ONE) == images[rank]
            assert a.arenas.reserved_bytes > before + sum(large(rank) for rank in (1, 2, 3))
            await group.assemble(ranks, "3+1", floor=ONE, run=again)
            a.protector.complete(ONE)
            assert a.image(3, ONE) == images[3]  # the new run has nothing of its own yet
            a.protector.complete(snapshot(2, 2, again))
            assert a.arenas.reserved_bytes == before
            assert sorted(path.name for path in a.folder.glob("rank-*")) == ["rank-00000.slot-0", "rank-00000.slot-1"]
            assert a.image(0, ONE) == images[0]

    run(work)


def test_memory_that_does_not_suffice_is_said_to() -> None:
    """The snapshot is not lost: it could be had with more memory."""

    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks, limit_bytes=5 << 20) as group:
            await protected(group, ranks, 1, lambda rank: 1 << 20)
            a = group.members["a"]
            await bring(group, "a", 1)
            held = a.arenas.reserved_bytes
            error = await refusal(a.protector.materialise(group.request(2, ONE)))
            assert isinstance(error, BudgetExceeded)
            assert "--memory-limit" in str(error)
            assert a.arenas.reserved_bytes == held

    run(work)


def test_the_older_snapshot_makes_room_before_the_restored_one() -> None:
    """A rank that has a slot for the image, full of something older, needs no further memory."""

    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 1, large)
            c = group.members["c"]
            c.arenas.let_go([])  # it held rank 2, and all of that is lost
            for index, step in enumerate((-1, 0)):
                c.record(2, snapshot(step), noise(large(2), step), index=index)
            held = c.arenas.reserved_bytes
            assert (await bring(group, "c", 2)).startswith("rebuilt")
            assert c.image(2, ONE) == images[2]
            assert c.arenas.reserved_bytes == held
            assert sum(id_of(group.request(2, snapshot(step)).id) == snapshot(step) for step in (-1, 0)) == 2

    run(work)
