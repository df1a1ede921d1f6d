"""A group of agents guards what is recorded: parity as the code says, whatever comes late, is given up, or is damaged."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from holdfast.agent import protector
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.client import wire_id
from holdfast.erasure.code import Code
from holdfast.erasure.galois import PRODUCTS
from holdfast.erasure.stripes import Geometry
from holdfast.errors import AgentMismatch, BudgetExceeded, ConfigError, Corrupt, SnapshotUnknown
from holdfast.snapshot.record import block_bytes_for, new_nonce
from holdfast.snapshot.unchanged import Unchanged
from holdfast.tests.agent.members import JOB, Group, Member, noise, refusal, run, snapshot

ONE = snapshot(1)
NAMES = "abcdefgh"


def plain(names: str) -> dict[str, Sequence[int]]:
    """One rank on each."""
    return {name: [rank] for rank, name in enumerate(names)}


def parity_of(images: Sequence[bytes], m: int, member: int, unit: int) -> bytes:
    """The parity image of *member*, segment by segment as the module ``stripes`` words it."""
    geometry = Geometry.of([len(image) for image in images], m, unit)
    padded = [np.frombuffer(image.ljust(geometry.k * geometry.segment_bytes, b"\0"), np.uint8) for image in images]
    rows = Code.of(geometry.k, m).parity
    made = []
    for row in range(m):
        stripe = (member - row) % geometry.n
        total = np.zeros(geometry.segment_bytes, np.uint8)
        for position in range(geometry.k):
            start = position * geometry.segment_bytes
            data = padded[geometry.member(stripe, position)][start : start + geometry.segment_bytes]
            total ^= PRODUCTS[rows[row, position]][data]
        made.append(total.tobytes())
    return b"".join(made)


async def recorded(group: Group, ranks: Mapping[str, Sequence[int]], images: dict[int, bytes], step: int = 1) -> None:
    """Every rank has its image of *step* recorded, and its agent knows."""
    for name, its in ranks.items():
        for rank in its:
            member = group.members[name]
            member.record(rank, snapshot(step), images[rank], index=step % 2)
            member.protector.recorded(rank, snapshot(step), None)


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (3, 2), (5, 2), (6, 3)])
def test_parity_is_what_the_code_says(n: int, m: int) -> None:
    """Images of all lengths, none of them round; the longest has several blocks."""

    async def work() -> None:
        ranks = plain(NAMES[:n])
        images = {rank: noise(70_001 * (rank + 1) + rank, rank) for rank in range(n)}
        unit = block_bytes_for(max(map(len, images.values())))
        async with Group(*ranks) as group:
            await group.assemble(ranks, f"{n - m}+{m}")
            await recorded(group, ranks, images)
            await group.all_guard(ONE)
            for place, name in enumerate(ranks):
                wanted = parity_of([images[rank] for rank in range(n)], m, place, unit)
                assert group.members[name].cells(ONE) == [(0, place, wanted)]

    run(work)


def test_lanes_in_which_some_have_no_rank() -> None:
    async def work() -> None:
        ranks: dict[str, Sequence[int]] = {"a": [0, 3, 5], "b": [1], "c": [2, 4]}
        images = {rank: noise(1000 * (rank + 1), rank) for rank in range(6)}
        async with Group(*ranks) as group:
            await group.assemble(ranks, "2+1")
            await recorded(group, ranks, images)
            await group.all_guard(ONE)
            lanes: list[list[int | None]] = [[0, 1, 2], [3, None, 4], [5, None, None]]
            for place, name in enumerate(ranks):
                wanted = [
                    (lane, place, parity_of([b"" if r is None else images[r] for r in row], 1, place, 1 << 16))
                    for lane, row in enumerate(lanes)
                ]
                assert group.members[name].cells(ONE) == wanted

    run(work)


def test_one_snapshot_after_the_other() -> None:
    """Two cells suffice: the older parity goes when a newer snapshot is what must be kept."""

    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            await group.assemble(ranks, "2+1")
            for step in range(1, 8):
                for rank, name in enumerate("abc"):
                    member = group.members[name]
                    member.record(rank, snapshot(step), noise(5000, f"{rank} {step}"), index=step % 2)
                    member.protector.recorded(rank, snapshot(step), snapshot(step - 1) if step > 1 else None)
                await group.all_guard(snapshot(step))
            for member in group.members.values():
                assert [id.step for _, id, _ in member.arenas.tables()] in ([6, 7], [7, 6])
                status = member.protector.status()
                assert status is not None
                assert (status.damaged, status.trouble, status.tolerance) == (0, "", 1)
                assert status.pulled_bytes == 5000  # one segment of each of the two others: together one image

    run(work)


# -- late, away, given up ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_whoever_hears_of_the_group_last(order: tuple[str, ...]) -> None:
    """Images recorded before there was a group, or before the others knew of it."""

    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            roster = group.roster(ranks, "2+1")
            for name in order:
                member, rank = group.members[name], ranks[name][0]
                member.record(rank, ONE, noise(3000, rank))
                member.protector.recorded(rank, ONE, None)
                await asyncio.sleep(0)
                await member.protector.assemble(roster)
            await group.all_guard(ONE)

    run(work)


def test_offers_that_do_not_fit_one_answer_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many ranks with long layouts: who asks what is offered hears of all of them nevertheless."""
    monkeypatch.setattr(protector, "_PAGE_BYTES", 64)

    async def work() -> None:
        ranks: dict[str, Sequence[int]] = {"a": range(10), "b": range(10, 20)}
        async with Group(*ranks) as group:
            images = {rank: noise(100, rank) for rank in range(20)}
            a = group.members["a"]
            roster = group.roster(ranks, "1+1", image_bytes=1 << 16)
            await a.protector.assemble(roster)
            await recorded(group, {"a": ranks["a"]}, images)
            first = a.protector.offers(wire.OffersRequest(job=JOB, agent="b")).offers
            assert 0 < len(first) < 10
            assert sum(len(offer.layout) for offer in first) <= 64
            await group.members["b"].protector.assemble(roster)
            await recorded(group, {"b": ranks["b"]}, images)
            await group.all_guard(ONE)

    run(work)


def test_a_member_that_is_away_is_waited_for() -> None:
    async def work() -> None:
        ranks = plain("abcd")
        async with Group(*ranks) as group:
            group.down.add("c")
            await group.assemble(ranks, "2+2")
            await recorded(group, ranks, {rank: noise(3000, rank) for rank in range(4)})
            await group.until("its absence to be noticed", lambda: not reachable(group.members["a"], "c"))
            assert not any(member.guarded() for member in group.members.values())
            group.down.clear()
            await group.all_guard(ONE)
            assert all(reachable(group.members[name], "c") for name in "abcd")

    run(work)


def reachable(member: Member, name: str) -> bool:
    status = member.protector.status()
    assert status is not None
    return next(m.reachable for m in status.members if m.agent == name)


def test_a_snapshot_that_is_not_guarded_in_time_is_told_of() -> None:
    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            group.down.add("b")
            await group.assemble(ranks, "2+1", timeout_s=0.2)
            await recorded(group, ranks, {rank: noise(3000, rank) for rank in range(3)})
            await group.until("the end of patience", lambda: all(m.unguarded() for m in group.members.values()))
            id, reason = group.members["a"].unguarded()[0]
            assert id == ONE
            assert reason == "not protected within 0.2 s: no image was offered by b"
            group.down.clear()
            await group.all_guard(ONE)  # nobody gave it up: it is guarded late

    run(work)


def test_what_was_given_up_is_not_guarded() -> None:
    async def work() -> None:
        ranks = plain("ab")
        async with Group(*ranks) as group:
            await group.assemble(ranks, "1+1")
            a, b = group.members["a"], group.members["b"]
            a.record(0, ONE, noise(3000))
            a.protector.recorded(0, ONE, None)
            a.protector.withdrawn(ONE)
            b.record(1, ONE, noise(3000))
            b.protector.recorded(1, ONE, None)
            await recorded(group, ranks, {0: noise(3000), 1: noise(3000)}, step=2)
            await group.all_guard(snapshot(2))
            assert a.guarded() == [snapshot(2)]
            assert a.cells(ONE) == []

    run(work)


# -- damage --------------------------------------------------------------------------------------------------------------


def test_an_image_that_is_damaged_at_its_owner_is_not_guarded() -> None:
    """Parity of bytes that are not those of the manifest would rebuild no image. It is said whose, and tried again."""

    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            await group.assemble(ranks, "2+1")
            images = {rank: noise(3000, rank) for rank in range(3)}
            slots = {rank: group.members[name].record(rank, ONE, images[rank]) for rank, name in enumerate("abc")}
            slots[1].image[77] ^= 4
            for rank, name in enumerate("abc"):
                group.members[name].protector.recorded(rank, ONE, None)
            a = group.members["a"]
            await group.until("trouble", lambda: trouble(a) == "damaged at their owners: rank 1: 1 pieces")
            assert a.guarded() == []
            slots[1].image[77] ^= 4
            await group.all_guard(ONE)
            status = a.protector.status()
            assert status is not None
            assert status.damaged > 0

    run(work)


def trouble(member: Member) -> str:
    status = member.protector.status()
    return "" if status is None else status.trouble


def test_damaged_parity_of_the_floor_is_made_again() -> None:
    async def work() -> None:
        ranks = plain("abc")
        async with Group(*ranks) as group:
            await group.assemble(ranks, "2+1")
            await recorded(group, ranks, {rank: noise(3000, rank) for rank in range(3)})
            await group.all_guard(ONE)
            b = group.members["b"]
            (before,) = b.cells(ONE)
            ((_, _, table),) = b.arenas.tables()
            held = b.arenas.cell(0, ONE, table.key, table.me)
            assert held is not None
            held[0].image[5] ^= 1
            b.told.clear()
            await group.assemble(ranks, "2+1", floor=ONE, run=snapshot(0, run="2" * 32).run)
            await group.all_guard(ONE)
            assert b.cells(ONE) == [before]
            status = b.protector.status()
            assert status is not None
            assert status.damaged == 1

    run(work)


def test_ranks_that_moved_have_their_parity_made_again() -> None:
    """The images, their order and so the key are the same, and yet each agent is another member now."""

    async def work() -> None:
        async with Group(*"abc") as group:
            images = [noise(3000, rank) for rank in range(3)]
            await group.assemble(plain("abc"), "2+1")
            await recorded(group, plain("abc"), dict(enumerate(images)))
            await group.all_guard(ONE)
            moved = plain("bca")
            for name, (rank,) in moved.items():
                group.members[name].record(rank, ONE, images[rank])
                group.members[name].told.clear()
            await group.assemble(moved, "2+1", floor=ONE)
            await group.all_guard(ONE)
            for place, name in enumerate("bca"):
                wanted = (0, place, parity_of(images, 1, place, 1 << 16))
                assert wanted in group.members[name].cells(ONE)

    run(work)


# -- what has not changed ------------------------------------------------------------------------------------------------


def told_unchanged(before: tuple[int, bytes] | None, now: bytes, chance: random.Random) -> Unchanged | None:
    """What a trainer says of an image; at times nothing, or something of a filling that nobody knows of."""
    kind = chance.randrange(4)
    if before is None or kind == 0:
        return None
    if kind == 1:
        return Unchanged(new_nonce(chance), ((0, len(now)),))
    same = np.flatnonzero(
        np.frombuffer(before[1][: len(now)], np.uint8) != np.frombuffer(now[: len(before[1])], np.uint8)
    )
    edges = [-1, *same.tolist(), min(len(now), len(before[1]))]
    return Unchanged(before[0], tuple((a + 1, b) for a, b in itertools.pairwise(edges) if b > a + 1))


@pytest.mark.parametrize("seed", range(3))
def test_parity_is_right_whatever_is_left_of_the_last(seed: int) -> None:
    """Members change some bytes, lengthen or shorten their images, and say it, or not."""

    async def work() -> None:
        ranks, chance = plain("abcd"), random.Random(seed)
        images = [noise(700_000, (rank, seed)) for rank in range(4)]
        held: dict[tuple[int, int], tuple[int, bytes]] = {}
        async with Group(*ranks) as group:
            await group.assemble(ranks, "2+2")
            for step in range(1, 13):
                for rank, name in enumerate("abcd"):
                    image, at = bytearray(images[rank]), chance.randrange(700_000)
                    image[at : at + 50] = noise(chance.choice((0, 50, 90)), (step, rank))
                    images[rank] = bytes(image)
                    member, index = group.members[name], step % 2
                    unchanged = told_unchanged(held.get((rank, index)), images[rank], chance)
                    slot = member.record(rank, snapshot(step), images[rank], index=index)
                    held[rank, index] = slot.word, images[rank]
                    keep = snapshot(step - 1) if step > 1 else None
                    member.protector.recorded(rank, snapshot(step), keep, unchanged)
                await group.all_guard(snapshot(step))
                unit = block_bytes_for(max(map(len, images)))
                for place, name in enumerate("abcd"):
                    assert group.members[name].cells(snapshot(step)) == [(0, place, parity_of(images, 2, place, unit))]
                    assert group.members[name].arenas.verify_cells(snapshot(step)) == 0

    run(work)


def test_what_no_member_has_changed_is_not_pulled_again() -> None:
    async def work() -> None:
        ranks = plain("abc")
        images = [noise(4_000_000, rank) for rank in range(3)]
        pulled: list[int] = []
        async with Group(*ranks) as group:
            await group.assemble(ranks, "2+1", image_bytes=4 << 20)
            nonces: dict[tuple[int, int], int] = {}
            for step in range(1, 6):
                for rank, name in enumerate("abc"):
                    images[rank] = images[rank][:-1000] + noise(1000, (step, rank))
                    since = nonces.get((rank, step % 2))
                    unchanged = Unchanged(since, ((0, 3_999_000),)) if since is not None else None
                    slot = group.members[name].record(rank, snapshot(step), images[rank], index=step % 2)
                    nonces[rank, step % 2] = slot.word
                    keep = snapshot(step - 1) if step > 1 else None
                    group.members[name].protector.recorded(rank, snapshot(step), keep, unchanged)
                await group.all_guard(snapshot(step))
                status = group.members["a"].protector.status()
                assert status is not None
                pulled.append(status.pulled_bytes)
        assert pulled[:2] == [4_000_000] * 2
        # One block of parity, made of one of each of the others; of these one is the last, which is shorter.
        assert all(0 < nbytes <= 2 * block_bytes_for(4_000_000) for nbytes in pulled[2:])

    run(work)


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_nonsense_from_peers_is_refused() -> None:
    async def work() -> None:
        ranks = plain("ab")
        async with Group(*ranks) as group:
            await group.assemble(ranks, "1+1")
            a, b = group.members["a"], group.members["b"]
            b.record(1, ONE, noise(3000))
            manifest = b.arenas.manifest(1, ONE)
            assert manifest is not None
            offer = wire.Offer(
                job=JOB, agent="b", rank=1, record=manifest.record.to_bytes(), checks=manifest.checks.tobytes()
            )
            assert a.protector.offer(offer).need_layout
            with pytest.raises(AgentMismatch, match="serves job 'members', not 'another'"):
                a.protector.offer(wire.Offer(job="another", agent="b", rank=1))
            with pytest.raises(AgentMismatch):
                a.protector.offers(wire.OffersRequest(job="another", agent="b"))
            with pytest.raises(Corrupt):
                a.protector.offer(wire.Offer(job=JOB, agent="b", rank=1, record=b"nonsense"))
            damaged = wire.Offer(
                job=JOB, agent="b", rank=1, layout=manifest.layout, record=offer.record, checks=b"1234"
            )
            with pytest.raises(Corrupt):
                a.protector.offer(damaged)
            assert a.protector.offers(wire.OffersRequest(job=JOB, agent="b")).offers == []

    run(work)


def test_only_what_is_held_is_granted() -> None:
    async def work() -> None:
        async with Group("a") as group:
            a = group.members["a"]
            a.record(0, ONE, noise(3000))

            def ask(id: int = 1, rank: int = 0, crc: int | None = None, end: int = 3000) -> wire.GrantReply:
                (held,) = a.arenas.inventory()
                image = wire.ImageSource(rank=rank, checks_crc=held.checks_crc if crc is None else crc)
                ranges = [wire.Range(offset=end - 10, nbytes=10)]
                return a.protector.grant(
                    wire.GrantRequest(job=JOB, agent="b", id=wire_id(snapshot(id)), image=image, ranges=ranges)
                )

            assert len(ask().token) == 32
            for wrong in ({"id": 2}, {"rank": 1}, {"crc": 1}):
                with pytest.raises(SnapshotUnknown):
                    ask(**wrong)
            for end in (3001, 4096, 1 << 63):
                with pytest.raises(Corrupt, match="beyond the 3000"):
                    ask(end=end)
            with pytest.raises(AgentMismatch):
                a.protector.grant(wire.GrantRequest(job="another", agent="b", id=wire_id(ONE)))
            with pytest.raises(SnapshotUnknown):
                a.protector.manifest(
                    wire.ManifestRequest(job=JOB, id=wire_id(ONE), parity=wire.ParityCell(lane=0, key=5))
                )

    run(work)


def test_a_group_without_this_agent_is_refused() -> None:
    async def work() -> None:
        async with Group(*"abc") as group:
            roster = group.roster(plain("ab"), "1+1")
            error = await refusal(group.members["c"].protector.assemble(roster))
            assert isinstance(error, ConfigError)
            twice = group.roster(plain("ab"), "1+1")
            twice.peers[1].agent = "a"
            assert isinstance(await refusal(group.members["a"].protector.assemble(twice)), ConfigError)

    run(work)


def test_parity_beyond_the_budget_is_refused() -> None:
    async def work() -> None:
        async with Group(*"ab", limit_bytes=1 << 20) as group:
            error = await refusal(group.members["a"].protector.assemble(group.roster(plain("ab"), "1+1")))
            assert isinstance(error, BudgetExceeded)

    run(work)


@pytest.mark.parametrize(("names", "protect"), [("ab", "off"), ("a", "auto")])
def test_no_group(names: str, protect: str) -> None:
    async def work() -> None:
        async with Group(*names) as group:
            for name in names:
                answer = await group.members[name].protector.assemble(group.roster(plain(names), protect))
                assert answer.alone
                assert group.members[name].protector.status() is None

    run(work)
