"""Who reads a snapshot in a tier says so, so that nobody deletes it meanwhile. There are no locks in a tier: two writes
and two looks, in opposite order.

    a reader     writes its lease, then looks for a tombstone: if there is one, it does not read
    a deleter    writes the tombstone, then looks for leases: if one is fresh, it deletes nothing yet

Whoever writes second sees the other. If both do, the reader gives way, and the deleter comes back later; the tombstone
stays, so that the question does not arise again. A lease is fresh if it was written less than ``LEASE_S`` before the
tombstone, by the store's own clock, to which nobody else's is compared. A reader that was killed leaves a lease that
ages; the files of ``readers/`` go with the snapshot.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

from ..errors import ObjectMissing, SnapshotUnknown, TierError
from ..snapshot.record import SnapshotId
from .documents import seal
from .names import dooms_of, lease_key, readers_of, snapshot_name, tombstone_key
from .store import Found, Store

LEASE_S: Final = 300.0
RENEW_S: Final = 60.0
_log = logging.getLogger(__name__)


@asynccontextmanager
async def reading(store: Store, id: SnapshotId, *, renew_s: float = RENEW_S) -> AsyncIterator[None]:
    """Inside, nobody deletes snapshot *id* from *store*. Everything is to be read inside, its entries as well.

    Where nothing can be written, reading goes on without a lease, and with a warning: what is deleted meanwhile is then
    missed by whoever reads it, and never taken for something else.

    Raises:
        SnapshotUnknown: it is deleted, or about to be.
    """
    key = lease_key(id, uuid.uuid4())
    leased = await _written(store, key, id)
    renewing = asyncio.create_task(_renew(store, key, id, renew_s)) if leased else None
    try:
        if await _entombed(store, id):
            raise SnapshotUnknown(f"snapshot {snapshot_name(id)} is deleted from {store.url}")
        yield
    finally:
        if renewing is not None:
            renewing.cancel()
            await asyncio.wait({renewing})
            try:
                await store.delete([key])
            except TierError as error:
                _log.info("a lease stays behind, for %g s: %s", LEASE_S, error)


async def buried(store: Store, id: SnapshotId) -> bool:
    """Whether the snapshot has a tombstone, or is about to have one unless it has become complete.

    Who writes an entry asks after that: who deletes may not have seen it.
    """
    # In this order: what dooms it stays until the tombstone is there.
    return bool(await store.list(dooms_of(id))) or await _entombed(store, id)


async def _entombed(store: Store, id: SnapshotId) -> bool:
    try:
        await store.get(tombstone_key(id))
    except ObjectMissing:
        return False
    return True


async def leased(store: Store, id: SnapshotId, now_s: float) -> bool:
    """Whether anybody reads the snapshot. *now_s* is of the store's clock, such as the time of a fresh tombstone."""
    return any_fresh(await store.list(readers_of(id)), now_s)


def any_fresh(leases: Iterable[Found], now_s: float) -> bool:
    """Whether any of *leases* still counts. One of the future does: the clock went back, or it is newer than *now_s*."""
    return any(now_s - lease.modified_s < LEASE_S for lease in leases)


async def _written(store: Store, key: str, id: SnapshotId) -> bool:
    document = {"format": 1, "snapshot": snapshot_name(id), "host": os.uname().nodename, "pid": os.getpid()}
    try:
        await store.put(key, [seal(document)])
    except TierError as error:
        _log.warning("snapshot %s is read without a lease, it may be deleted meanwhile: %s", snapshot_name(id), error)
        return False
    return True


async def _renew(store: Store, key: str, id: SnapshotId, renew_s: float) -> None:
    while True:
        await asyncio.sleep(renew_s)
        await _written(store, key, id)  # if that fails: it is tried again long before the lease has aged
