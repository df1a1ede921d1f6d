"""Slots are made on several threads at once, while others look at them: within the budget, and nobody sees half of one."""

from __future__ import annotations

import asyncio
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.arenas import Arenas
from holdfast.agent.budget import Memory
from holdfast.agent.client import packed
from holdfast.agent.guard import Accumulate, Cell, Guard, Offer, Stage, Table
from holdfast.agent.manifest import CellTable
from holdfast.agent.settings import NodeSettings
from holdfast.errors import BudgetExceeded
from holdfast.snapshot.arena import Slot
from holdfast.snapshot.record import SnapshotId
from holdfast.tests.agent.members import JOB, Group, Member, noise, plenty, run, snapshot

SIZE = 1 << 20
WAIT_S = 120.0
ONE = snapshot(1)


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(f"/dev/shm/holdfast-test-{uuid.uuid4().hex[:10]}")
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


def arenas_in(folder: Path, limit_bytes: int | None = None, memory: Callable[[Path], Memory] | None = None) -> Arenas:
    return Arenas(NodeSettings(JOB, folder, folder / "agent.sock", True), "a", limit_bytes, memory or plenty)


def test_two_that_make_slots_at_once_do_not_spend_the_same_budget(folder: Path) -> None:
    """One has looked at the budget and has not taken its memory yet when the other comes."""
    second = threading.Event()

    def memory(shm: Path) -> Memory:
        if threading.current_thread().name == "second":
            second.set()
        else:
            other.start()
            second.wait(0.2)  # only if it is let in, which it must not be
        return plenty(shm)

    refused: list[BudgetExceeded] = []

    def make() -> None:
        try:
            arenas.reserve(1, 1, image_bytes=SIZE, table_bytes=4096)
        except BudgetExceeded as error:
            refused.append(error)

    arenas = arenas_in(folder, SIZE + SIZE // 2, memory)
    other = threading.Thread(target=make, name="second")
    arenas.reserve(0, 1, image_bytes=SIZE, table_bytes=4096)
    other.join(WAIT_S)
    assert len(refused) == 1
    assert arenas.reserved_bytes < SIZE + SIZE // 2
    arenas.remove()
    arenas.close()


def test_cells_may_come_while_others_are_gone_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arenas = arenas_in(folder)
    arenas.reserve_cells(1, 2, image_bytes=SIZE, table_bytes=4096)
    prefault = Slot.prefault

    def and_more(slot: Slot) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(arenas.reserve_cells, 2, 2, image_bytes=SIZE, table_bytes=4096).result(WAIT_S)
        prefault(slot)

    monkeypatch.setattr(Slot, "prefault", and_more)
    arenas.prefault_cells()
    arenas.close()


def test_a_slot_is_there_while_it_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds nothing then; once it is larger it is another. If there is no memory for it, the former comes back."""
    arenas = arenas_in(folder)
    (before,) = arenas.reserve(0, 1, image_bytes=SIZE, table_bytes=4096)
    create, fails = Slot.create, [True]

    def looked_at(place: object) -> Slot:
        assert arenas.place(0, 0) == before
        assert arenas.slot(0, 0).sealed_record() is None
        assert (arenas.inventory(), arenas.spoiled(), arenas.image(0, ONE)) == ([], [], None)
        if fails.pop():
            raise BudgetExceeded("no memory")
        return create(place)  # type: ignore[arg-type]

    monkeypatch.setattr(Slot, "create", looked_at)
    fails[:] = [False]
    larger = arenas.grow(0, 0, image_bytes=2 * SIZE, table_bytes=4096)
    assert arenas.place(0, 0) == larger != before

    before, fails[:] = larger, [True]
    monkeypatch.setattr(Slot, "create", lambda place: create(place) if place == before else looked_at(place))
    with pytest.raises(BudgetExceeded):
        arenas.grow(0, 0, image_bytes=3 * SIZE, table_bytes=4096)
    assert arenas.place(0, 0) == before
    arenas.close()


# -- cells ---------------------------------------------------------------------------------------------------------------


async def _guard(group: Group, step: int) -> None:
    for rank, name in enumerate("ab"):
        member = group.members[name]
        member.record(rank, snapshot(step), noise(1000, f"{rank}/{step}"), index=step % 2)
        member.protector.recorded(rank, snapshot(step), None)
    await group.all_guard(snapshot(step))


def _parity(member: Member, step: int) -> list[tuple[int, int]]:
    """Key and place of the cells of that snapshot."""
    return [(table.key, table.me) for _, id, table in member.arenas.tables() if id == snapshot(step)]


def test_a_cells_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever pulls parity asks for each stream of it anew; tables may be megabytes. A cell that is filled anew is another."""

    async def work() -> None:
        async with Group("a", "b") as group:
            await group.assemble({"a": [0], "b": [1]}, "1+1")
            await _guard(group, 1)
            arenas = group.members["a"].arenas
            ((key, me),) = _parity(group.members["a"], 1)
            read: list[bytes] = []
            from_text = CellTable.from_text

            def reading(text: bytes) -> CellTable:
                read.append(text)
                return from_text(text)

            monkeypatch.setattr(CellTable, "from_text", reading)
            for _ in range(5):
                assert arenas.cell(0, ONE, key, me) is not None
                assert arenas.cell(0, ONE, key + 1, me) is None
                assert arenas.cell(0, snapshot(2), key, me) is None
            assert len(read) <= 1
            for step in (2, 3):  # as many as there are cells, and one more: it takes the place of the first
                await _guard(group, step)
            read.clear()
            ((key, me),) = _parity(group.members["a"], 3)
            assert arenas.cell(0, snapshot(3), key, me) is not None
            assert arenas.cell(0, ONE, key, me) is None

    run(work)


def test_a_late_word_on_the_last_run_frees_nothing_that_the_new_one_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is elsewhere now. The agent hears that its last snapshot was complete while it prepares the new run's parity."""

    async def work() -> None:
        async with Group("a", "b", "c") as group:
            await group.assemble({"a": [0, 1], "b": [2]}, "1+1")
            a = group.members["a"]
            image = noise(1000, 1)
            a.record(1, ONE, image)
            reserve = a.arenas.reserve_cells
            loop, heard = asyncio.get_running_loop(), threading.Event()

            def late(*shape: int, **sizes: int) -> None:
                loop.call_soon_threadsafe(a.protector.complete, ONE)
                loop.call_soon_threadsafe(heard.set)
                assert heard.wait(WAIT_S)
                reserve(*shape, **sizes)

            monkeypatch.setattr(a.arenas, "reserve_cells", late)
            again = uuid.UUID(int=2).hex
            await group.assemble({"a": [0], "b": [2], "c": [1]}, "2+1", run=again)
            assert a.image(1, ONE) == image
            a.protector.complete(snapshot(2, 2, again))
            await group.until("released", lambda: a.image(1, ONE) is None)

    run(work)


# -- another world -------------------------------------------------------------------------------------------------------

AGAIN = uuid.UUID(int=2).hex


def _slots(member: Member) -> list[int]:
    """Whose slots there are."""
    return sorted({int(path.name[5:10]) for path in member.folder.glob("rank-*")})


def test_images_of_ranks_that_are_no_more_go_with_the_first_complete_snapshot() -> None:
    """Not with one of the last run, nor while somebody of that number is attached; also without a group."""

    async def work() -> None:
        async with Group("a", "b") as group:
            await group.assemble({"a": [0, 1, 2, 3], "b": [4]}, "1+1")
            a = group.members["a"]
            for rank in range(4):
                a.record(rank, ONE, noise(1000, rank))
            await group.assemble({"a": [0, 1]}, "off", run=AGAIN)
            a.protector.complete(ONE, {0, 1, 3})
            assert _slots(a) == [0, 1, 2, 3]
            a.protector.complete(snapshot(2, 2, AGAIN), {0, 1, 3})
            assert _slots(a) == [0, 1, 3]
            a.protector.complete(snapshot(3, 2, AGAIN), {0, 1})
            assert _slots(a) == [0, 1]
            assert not list(a.folder.glob("lane-*")), "nobody protects any more"

    run(work)


def test_a_world_that_grows_has_room_beside_the_old_one_or_is_refused(folder: Path) -> None:
    arenas = arenas_in(folder, limit_bytes=5 * SIZE)
    arenas.reserve(0, 2, image_bytes=SIZE, table_bytes=4096)
    arenas.reserve(1, 1, image_bytes=SIZE, table_bytes=4096)
    with pytest.raises(BudgetExceeded, match=rf"would take \d+ bytes of memory, {5 * SIZE} are allowed"):
        arenas.reserve(2, 2, image_bytes=SIZE, table_bytes=4096)
    assert len(arenas.reserve(2, 1, image_bytes=SIZE, table_bytes=4096)) == 1
    for slot in arenas.let_go([0, 2]):
        slot.close()
    assert len(arenas.reserve(3, 1, image_bytes=SIZE, table_bytes=4096)) == 1
    arenas.remove()
    arenas.close()


async def _snap(group: Group, ranks: dict[str, list[int]], id: SnapshotId, keep: SnapshotId | None) -> dict[int, bytes]:
    """Every rank records an image of *id*, and all is guarded; the images."""
    images = {rank: noise(70_000 + rank, (rank, id)) for its in ranks.values() for rank in its}
    for name, its in ranks.items():
        for rank in its:
            group.members[name].record(rank, id, images[rank], index=1 - id.step % 2)
            group.members[name].protector.recorded(rank, id, keep)
    await group.until(f"{id} guarded", lambda: all(id in group.members[name].guarded() for name in ranks))
    return images


def test_what_the_job_stands_by_outlasts_a_change_of_world() -> None:
    """Six ranks on three nodes become two on two of them. Nothing of the old world is protected anew: its images and its parity
    stay until a snapshot of the new one is complete, whatever is given up before; then they go."""

    async def work() -> None:
        old, new = {"a": [0, 3], "b": [1, 4], "c": [2, 5]}, {"a": [0], "b": [1]}
        async with Group(*old) as group:
            await group.assemble(old, "2+1")
            images = await _snap(group, old, ONE, None)
            members = [group.members[name] for name in new]
            roster = group.roster(new, "1+1", run=AGAIN)
            roster.kept.extend(group.request(0, ONE).parities)
            roster.kept.extend(group.request(3, ONE).parities)
            for member in members:
                await member.protector.assemble(roster)
            first, second, third = (snapshot(step, 2, AGAIN) for step in (2, 4, 5))
            await _snap(group, new, first, ONE)
            for member in members:
                member.protector.withdrawn(first)  # some rank gave it up
            await _snap(group, new, second, ONE)
            await group.lose("c")
            for rank in (2, 5):
                ask = wire.ReadRequest(image=group.request(rank, ONE), ranges=packed([(3, 69_997 + rank)]))
                reply = await members[0].protector.windows.read(ask)
                assert reply.how.startswith("rebuilt")
                assert Path(reply.path).read_bytes()[: len(images[rank]) - 3] == images[rank][3:]
            for member in members:
                member.protector.complete(second)
            assert [_slots(member) for member in members] == [[0], [1]]
            await _snap(group, new, third, second)
            for member in members:
                assert {id for _, id, _ in member.arenas.tables()} == {second, third}
                assert sorted(path.name for path in member.folder.glob("lane-*")) == [
                    "lane-00000.cell-0",
                    "lane-00000.cell-1",
                ]

    run(work)


def test_parity_that_is_not_relied_on_is_no_obstacle_when_the_world_changes() -> None:
    """Both cells hold parity of the snapshot that the job goes back to, and that of others is what it stands by."""
    cells = [[Cell(Stage.HELD, ONE, 1), Cell(Stage.HELD, ONE, 2)]]
    table = Table(("a", "b"), ((0,), (1,)), 0, 1)
    id = snapshot(2, 2, AGAIN)
    offers = [Offer(member, 0, member, id, 9, 1000, 1 << 16, member) for member in (0, 1)]
    for kept, floor in ((True, None), (False, None), (True, ONE)):
        guard = Guard()
        guard.assemble(table, AGAIN, floor, cells, 60.0, kept=kept)
        guard.offered(offers[1], 0.0)
        actions = guard.recorded(offers[0], ONE, 0.0)
        begun = any(isinstance(action, Accumulate) for action in actions)
        assert begun == (kept and floor is None)
