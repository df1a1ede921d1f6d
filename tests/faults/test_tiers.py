"""P3: what was persisted outlives everything. Agents and trainers die at named places of a spill, power is cut, disks fill up
and servers go away; what comes back is never older than what any rank knew to be persisted, and equal to it bit for bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from faults.cluster import EACH
from faults.conftest import MakeCluster, MakeJob
from faults.job import Job, await_gone
from holdfast import Tier
from holdfast.crashpoints import PLACES
from holdfast.errors import Corrupt, ObjectMissing, TierUnreachable
from holdfast.storage.names import snapshot_name
from holdfast.storage.prune import Pruner
from holdfast.storage.reader import ImageReader, Listed, list_snapshots, read_entries
from holdfast.storage.store import Store, open_store
from holdfast.storage.tiers import TierSettings
from holdfast.tests.hooks.nodes import until
from holdfast.tests.storage.weed import Weed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEP_S = 0.03  # the machine is to be at work for the fault, not for steps that nobody looks at
SPILL_PLACES = sorted(place for place in PLACES if place.startswith("spill."))
ENDLESS = 1_000_000


def _tier(folder: Path, *, every: int = 1, keep: int = 2, **options: object) -> Tier:
    return Tier(str(folder), every=every, keep=keep, **options)  # type: ignore[arg-type]


async def _whole(store: Store) -> list[Listed]:
    """The snapshots that exist there, oldest first. Every byte of them is read: what a listing shows must be there."""
    found = [listed for listed in await list_snapshots(store) if listed.complete]
    for listed in found:
        for entry in (await read_entries(store, listed)).values():
            assert await ImageReader(entry, [store]).verify() == []
    return found


def look(tier: Tier) -> list[int]:
    """The steps of the snapshots that exist in *tier*, which nobody writes to now."""

    async def looked() -> list[int]:
        store = open_store(tier.url)
        try:
            return [listed.id.step for listed in await _whole(store)]
        finally:
            await store.close()

    return asyncio.run(looked())


def _persisted(job: Job) -> int:
    """The newest step that any rank ever reported."""
    return max((e.get("persisted", 0) for rank in range(job.world) for e in job.log(rank)), default=0)


# -- kills at named places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "part"), [("plain", 0), ("plain", 1), ("ddp", 0), ("fsdp2", 1)])
def test_the_agent_dies_at_a_named_place_of_a_spill(
    make_job: MakeJob, rng: random.Random, tmp_path: Path, strategy: str, part: int
) -> None:
    """With its trainers (the power is cut), with one of them, or alone: then another agent spills what was on its way.

    Some of the places in each run, all with HOLDFAST_THOROUGH. Of two ranks, one snapshot consists of two spills, of which one
    may be whole.
    """
    tier = _tier(tmp_path / "nvme")
    job = make_job(
        world=1 if strategy == "plain" else 2, steps=ENDLESS, step_s=STEP_S, strategy=strategy, tiers=(tier,)
    )
    places = SPILL_PLACES[part::2]
    places = rng.sample(places, len(places) if os.environ.get("HOLDFAST_THOROUGH") else 6 - 2 * job.world)
    fates = ["power", "trainer", "alone"] * len(places)
    for place, fate in zip(places, rng.sample(fates, len(places)), strict=True):
        count = rng.choice([1, 1, 2, 3, 5])
        print(f"{place}={count}, {fate}")
        job.start_agent(crash=f"{place}={count}")
        job.start()
        assert job.agent is not None
        assert job.agent.wait(60) == -signal.SIGKILL, job.errors()
        before = _persisted(job)
        if fate == "power":
            job.cut_power()
            assert max(look(tier), default=0) >= before
            continue
        if fate == "trainer":
            job.kill_ranks(rng.randrange(job.world))
            job.end_ranks()
        _persist(job, before)
        job.cut_power()
        assert max(look(tier)) > before
    _end(job)
    job.judge()


def test_trainers_die_while_their_images_are_spilled(make_job: MakeJob, rng: random.Random, tmp_path: Path) -> None:
    """The agent goes on with what it has begun, or gives it up when the next life takes the slot; both ways nothing is lost."""
    job = make_job(world=2, strategy="fsdp2", steps=ENDLESS, step_s=STEP_S, tiers=(tier := _tier(tmp_path / "nvme"),))
    for turn in range(3):
        job.start()
        job.wait_for("persisted step", lambda log: any(e["life"] == job.lives and e.get("persisted") for e in log))
        time.sleep(rng.uniform(0, 0.1))
        job.kill_ranks(rng.randrange(2))
        if turn % 3 == 2:
            job.cut_power()
            assert look(tier)[-1] >= _persisted(job)
        job.end_ranks()
    _end(job)
    assert min(job.judge()[1:]) > 0


def _persist(job: Job, newer_than: int) -> None:
    """Until a newer step is persisted; ranks that gave up, as their agent died while they restored, begin again."""

    def persisted() -> bool:
        if any(process.exitcode == 1 for process in job.ranks) or not job.ranks:
            job.end_ranks()
            job.start()
        return _persisted(job) > newer_than

    until(persisted, f"a persisted step after {newer_than}")


def _end(job: Job) -> None:
    """A last life, of a few steps, that ends well."""
    job.steps = 5 + max(e.get("step", 0) for rank in range(job.world) for e in job.log(rank))
    job.start()
    job.finish()


# -- several nodes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "protect", "strategy"),
    [("shared", "off", "ddp"), (EACH, "auto", "fsdp2")],
)
def test_power_is_cut_at_random_instants(
    make_cluster: MakeCluster, rng: random.Random, tmp_path: Path, where: str, protect: str, strategy: str
) -> None:
    """Ranks move to other nodes afterwards: where each node has a disk of its own, images are brought by who can read them."""
    cluster = make_cluster(3, protect, strategy, tiers=(_tier(tmp_path / where),), step_s=STEP_S)
    for _ in range(2):
        cluster.begin()
        cluster.start(rng.sample(range(3), 3))
        cluster.await_persisted(rng.randint(1, 3))
        time.sleep(rng.uniform(0, 0.1))
        cluster.cut_power()
    cluster.begin()
    cluster.placement = tuple(rng.sample(range(3), 3))
    cluster.finish()
    assert min(cluster.judge()[1:]) > 0


def test_a_disk_is_lost_with_the_power(make_cluster: MakeCluster, rng: random.Random, tmp_path: Path) -> None:
    """A slower tier serves what that disk had; without one, the refusal names what is missing, and nobody starts afresh."""
    near, far = _tier(tmp_path / EACH / "nvme"), _tier(tmp_path / "far", every=5)
    cluster = make_cluster(3, "off", "fsdp2", tiers=(near, far), step_s=STEP_S)
    gone = rng.randrange(3)
    cluster.begin()
    cluster.start()
    cluster.await_persisted(2)
    until(lambda: bool(_names(far, 3)), "a snapshot in the slower tier")
    cluster.cut_power()
    shutil.rmtree(tmp_path / f"disk{gone}")
    there = look(far)[-1]
    cluster.begin()
    cluster.start()
    assert cluster.await_restored() == there
    cluster.await_persisted(2)
    cluster.cut_power()
    shutil.rmtree(tmp_path / f"disk{gone}")
    shutil.rmtree(tmp_path / "far")
    cluster.begin()
    cluster.start()
    cluster.await_end(1)
    said = cluster.errors()
    assert "SnapshotLost" in said
    assert f"1 of 3 images cannot be had: rank {gone} missing" in said


def _names(tier: Tier, world: int) -> list[int]:
    """The steps of which there is an entry of every rank in *tier*, while others write to it."""
    found: dict[int, set[str]] = {}
    for path in Path(tier.url).glob("entries/*/*.json"):
        found.setdefault(_step(path.parent.name), set()).add(path.name)
    return sorted(step for step, entries in found.items() if len(entries) == world)


# -- tiers in trouble ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def _fill(ballast: Path) -> None:
    """Leave not a byte."""
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def _goes_on(job: Job) -> None:
    """Training does, and snapshots in memory do."""
    log = job.log()
    steps, watermark = len(log), max(e.get("watermark", 0) for e in log)
    job.wait_for("steps without the tier", lambda log: len(log) > steps + 10)
    job.wait_for("snapshots in memory", lambda log: log[-1].get("watermark", 0) > watermark + 3)


def test_a_disk_is_full_for_a_while(make_job: MakeJob, rng: random.Random, small: Path) -> None:
    """Whenever it fills up in a spill: what was begun is removed, and once there is room, spills go on by themselves."""
    tier = _tier(small / "tier", keep=2)
    job = make_job(steps=ENDLESS, step_s=STEP_S, tiers=(tier,))
    job.start()
    for turn in range(3):
        before = _persisted(job)
        job.wait_for("persisted step", lambda log: any(e.get("persisted", 0) > before for e in log))  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        _fill(small / "ballast")
        until(lambda: "TierFull" in (trouble := _trouble(job)) or "room" in trouble or "free" in trouble, "trouble")
        _goes_on(job)
        at = job.log()[-1]["step"]
        (small / "ballast").unlink()
        job.wait_for("persisted step", lambda log: any(e.get("persisted", 0) > at for e in log))  # noqa: B023
        until(lambda: _trouble(job) == "", "the end of the trouble")
        assert job.log()[-1]["skipped"]["not-spilled"] > turn
    job.finish(enough=True)
    job.signal_agent(signal.SIGTERM)
    pid = job.agent_pid()
    assert pid is not None
    await_gone(pid)
    whole = look(tier)
    left = sorted({_step(path.name) for path in (small / "tier" / "snapshots").iterdir() if any(path.iterdir())})
    assert not [path for path in (small / "tier").rglob(".tmp-*") if path.is_file()]
    assert len(left) <= len(whole) + 1, f"{left} are there, of which {whole} are whole"
    job.cut_power()
    _end(job)
    job.judge()


def _trouble(job: Job) -> str:
    return job.status().tiers[0].trouble


def test_a_tier_is_out_of_reach_for_a_while(make_job: MakeJob, rng: random.Random, tmp_path: Path) -> None:
    tier, away = _tier(tmp_path / "nvme"), tmp_path / "away"
    place = Path(tier.url)
    job = make_job(world=2, strategy="ddp", steps=ENDLESS, step_s=STEP_S, tiers=(tier,))
    job.start()
    for _ in range(2):
        before = _persisted(job)
        job.wait_for("persisted step", lambda log: any(e.get("persisted", 0) > before for e in log))  # noqa: B023
        place.rename(away)
        place.write_text("no folder")
        until(lambda: _trouble(job) != "", "trouble")
        _goes_on(job)
        at = job.log()[-1]["step"]
        place.unlink()
        away.rename(place)
        job.wait_for("persisted step", lambda log: any(e.get("persisted", 0) > at for e in log))  # noqa: B023
    job.cut_power()
    assert max(look(tier)) > at
    _end(job)
    job.judge()


@pytest.mark.skipif(not os.environ.get("HOLDFAST_THOROUGH"), reason="minutes; tests/storage kills the server, too")
def test_an_object_store_is_killed_and_started_again(
    make_job: MakeJob, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Weed() as weed:
        for name, value in weed.environment.items():
            monkeypatch.setenv(name, value)
        tier = Tier(weed.bucket(), every=1, keep=2)
        job = make_job(steps=ENDLESS, step_s=0.2, tiers=(tier,))  # it takes the server half a minute to come back
        job.start_agent()
        job.start()
        job.wait_for("persisted step", lambda log: any(e.get("persisted", 0) > 1 for e in log))
        time.sleep(rng.uniform(0, 0.1))
        weed.stop(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        _goes_on(job)
        before = job.log()[-1]["step"]
        weed.start()
        job.wait_for("persisted step", lambda log: any(e.get("persisted", 0) > before for e in log))
        job.cut_power()
        assert max(look(tier)) > before
        job.start_agent()
        _end(job)
        assert job.judge()[-1] > before


# -- damage --------------------------------------------------------------------------------------------------------------

DAMAGE = {
    "chunk": "snapshots/{}/model*/c.*",
    "values": "snapshots/{}/ranks/*/values/c.*",
    "entry": "entries/{}/*.json",
    "metadata": "snapshots/{}/**/zarr.json",
}


def _flip(tier: Tier, kind: str, name: str, rng: random.Random) -> None:
    """Flip one bit of one object of that kind, of that snapshot."""
    root = Path(tier.url)
    path = rng.choice(sorted(path for path in root.glob(DAMAGE[kind].format(name)) if path.is_file()))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_flipped_bits_in_tiers(make_job: MakeJob, rng: random.Random, tmp_path: Path) -> None:
    """In the faster tier: the slower one serves. In the newest of one tier: the one before. In all that there are: refused.
    Metadata is for other readers; ours does not need it."""
    near, far = _tier(tmp_path / "near"), _tier(tmp_path / "far", every=3)
    job = make_job(world=2, strategy=rng.choice(["ddp", "fsdp2"]), steps=ENDLESS, step_s=STEP_S, tiers=(near, far))
    job.start()
    for kind in rng.sample(sorted(DAMAGE), len(DAMAGE)):
        before = max(_names(far, 2), default=0)
        until(lambda: max(_names(far, 2), default=0) > before, "a snapshot in the slower tier")  # noqa: B023
        _await_persisted_twice(job)
        job.cut_power()
        found = look_there(near)
        for name in found:
            _flip(near, kind, name, rng)
        there = found[-1] if kind == "metadata" else look_there(far)[-1]
        assert _begun_again(job) >= _step(there), kind
    _await_persisted_twice(job)
    job.cut_power()
    job.tiers = (near,)
    for kind in ("chunk", "entry"):
        *_, older, newest = look_there(near)
        _flip(near, kind, newest, rng)
        assert _begun_again(job) == _step(older)
        _await_persisted_twice(job)
        job.cut_power()
    kept = tmp_path / "kept"
    shutil.copytree(near.url, kept)
    for name in look_there(near):
        _flip(near, rng.choice(["chunk", "values", "entry"]), name, rng)
    job.start()
    for process in job.ranks:
        process.join(60)
        assert process.exitcode == 1
    assert "SnapshotLost" in job.errors()
    job.cut_power()
    shutil.rmtree(near.url)
    kept.rename(near.url)
    _end(job)
    job.judge()


def _await_persisted_twice(job: Job) -> None:
    def twice(log: Sequence[dict[str, Any]]) -> bool:
        return len({e["persisted"] for e in log if e["life"] == job.lives and e.get("persisted")}) > 1

    job.wait_for("two persisted steps", twice)


def _begun_again(job: Job) -> int:
    """The step from which the next life goes on, which finds damage."""
    job.damaged.add(job.lives + 1)
    job.start()
    job.wait_progress(1)
    return int([e["restored"] for e in job.log() if "restored" in e][-1])


def _step(name: str) -> int:
    return int(name[11:27])


def look_there(tier: Tier) -> list[str]:
    """The names of the snapshots that exist in *tier*, oldest first, without what is damaged."""

    async def looked() -> list[str]:
        store = open_store(tier.url)
        found = []
        for listed in await list_snapshots(store):
            if listed.complete:
                with contextlib.suppress(Corrupt, ObjectMissing):
                    entries = await read_entries(store, listed)
                    damage = [await ImageReader(entry, [store]).verify() for entry in entries.values()]
                    found += [snapshot_name(listed.id)] if not any(damage) else []
        await store.close()
        return found

    return asyncio.run(looked())


# -- preemption ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_preemption_notice_reaches_all_ranks(
    make_job: MakeJob, rng: random.Random, tmp_path: Path, strategy: str
) -> None:
    """Whoever gets it, all end at the same step, well; and just there the job goes on, even when all memory is gone."""
    job = make_job(
        world=3,
        strategy=strategy,
        steps=ENDLESS,
        step_s=STEP_S,
        grace="60s",
        tiers=(_tier(tmp_path / "nvme", every=1000),),
    )
    rank, stopped = rng.randrange(3), 0
    notices: list[tuple[list[int], int]]
    notices = [([rank], signal.SIGTERM), ([0, 1, 2], signal.SIGTERM), ([rank], signal.SIGUSR1), ([], signal.SIGTERM),
               ([], signal.SIGUSR1)]  # fmt: skip
    for ranks, number in notices[["ddp", "fsdp2"].index(strategy) :: 2]:
        print(f"{number!r} to {ranks or 'the agent'}")
        job.start()
        job.wait_progress(rng.randint(1, 5))
        time.sleep(rng.uniform(0, 2 * job.step_s))
        for one in ranks:
            pid = job.ranks[one].pid
            assert pid is not None
            os.kill(pid, number)
        if not ranks:
            job.signal_agent(number)
        stopped = _ended_together(job, stopped)
        if rng.random() < 0.7:
            job.cut_power()
    _end(job)
    began = job.judge()
    assert began[-1] == stopped


def _ended_together(job: Job, restored: int) -> int:
    """The step at which all ranks of this life have ended; it began where the one before had."""
    job.finish()
    lives = [[e for e in job.log(rank) if e["life"] == job.lives] for rank in range(job.world)]
    assert {life[0]["restored"] for life in lives} == {restored}
    assert all(life[-1]["stopped"] for life in lives)
    (last,) = {life[-2]["step"] for life in lives}
    return int(last)


def test_a_rank_stands_still_while_the_notice_comes(make_job: MakeJob, rng: random.Random, tmp_path: Path) -> None:
    """If it goes on in time, all end well. If not, all are killed, and the job goes on from what was complete before."""
    job = make_job(
        world=2,
        strategy="ddp",
        steps=ENDLESS,
        step_s=STEP_S,
        grace="60s",
        tiers=(_tier(tmp_path / "nvme"),),
    )
    for fate in ("goes on", "is killed"):
        job.start()
        job.wait_for("persisted step", lambda log: any(e["life"] == job.lives and e.get("persisted") for e in log))
        still, other = rng.sample([0, 1], 2)
        pids = [process.pid or 0 for process in job.ranks]
        os.kill(pids[still], signal.SIGSTOP)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pids[other], signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.3))
        if fate == "is killed":
            job.cut_power()
            continue
        os.kill(pids[still], signal.SIGCONT)
        job.finish()
        assert len({[e for e in job.log(rank) if "step" in e][-1]["step"] for rank in range(2)}) == 1
    _end(job)
    job.judge()


def test_an_agent_of_several_is_told_to_end(make_cluster: MakeCluster, rng: random.Random, tmp_path: Path) -> None:
    """One node is to go: all ranks on all nodes stop at the same step, persisted, and the job goes on without that node."""
    cluster = make_cluster(3, "auto", "fsdp2", tiers=(_tier(tmp_path / "shared", every=1000),), grace="60s")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        cluster.begin()
        cluster.start()
        cluster.await_protected()
        cluster.signal_agent(rng.randrange(3), number)
        cluster.await_end()
        (last,) = {cluster.log(rank)[-2]["step"] for rank in range(3)}
        cluster.cut_power()
        assert look(cluster.tiers[0])[-1] == last
    cluster.begin()
    cluster.finish()
    assert cluster.judge()[-1] == last


# -- several at once -----------------------------------------------------------------------------------------------------


def test_an_old_run_lives_on_beside_the_new_one(make_job: MakeJob, rng: random.Random, tmp_path: Path) -> None:
    """Both spill to one tier and prune it, and so does an operator: what the new run persisted is there when both are gone."""
    tier = _tier(tmp_path / "shared", keep=1)
    old = make_job(steps=ENDLESS, step_s=STEP_S, tiers=(tier,))
    new = make_job(steps=ENDLESS, step_s=STEP_S, tiers=(tier,), name=old.name, place="-new")
    old.start()
    old.wait_for("persisted step", lambda log: any(e.get("persisted") for e in log))
    for _ in range(3):
        before = _persisted(new)
        new.start()
        until(lambda: _pruned(tier) or _persisted(new) > before, "a persisted step of the new run")  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        new.cut_power()
    old.cut_power()
    _end(new)
    assert min(new.judge()) > 0
    old.steps = 1
    assert _persisted(old) > 0


def _pruned(tier: Tier) -> bool:
    """An operator prunes; False."""

    async def prune() -> None:
        store = open_store(tier.url)
        with contextlib.suppress(TierUnreachable):  # of two who delete at once
            await Pruner(store, TierSettings.parse(tier)).prune()
        await store.close()

    asyncio.run(prune())
    return False
