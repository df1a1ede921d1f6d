"""Parts of images, laid out in windows: from every source, through sources that fail, within memory, whatever is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from holdfast.agent import combine, rebuild, windows
from holdfast.agent import wire_pb2 as wire
from holdfast.snapshot.arena import Window
from holdfast.tests.agent.members import Group, Member, run
from holdfast.tests.agent.test_rebuild import BLOCK, ONE, large, plain, protected

Parts = Sequence[tuple[int, int]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one block each, batches of a few, and no patience with peers that are down."""
    monkeypatch.setattr(combine, "PIECE_BYTES", BLOCK)
    monkeypatch.setattr(windows, "_BATCH_BYTES", 3 * BLOCK)
    monkeypatch.setattr(rebuild, "_PAUSES_S", (0.0,))


async def read(
    member: Member, request: wire.MaterialiseRequest, parts: Parts, *, window: int = 0, reader: int = 0
) -> tuple[bytes, wire.ReadReply]:
    """What the window then holds, and the answer."""
    ranges = [wire.Range(offset=offset, nbytes=nbytes) for offset, nbytes in parts]
    reply = await member.protector.windows.read(
        wire.ReadRequest(image=request, ranges=ranges, window=window, reader=reader)
    )
    found = Window.open(reply.path)
    data = found.bytes[: sum(nbytes for _, nbytes in parts)].tobytes()
    found.close()
    return data, reply


def parts_of(image: bytes, parts: Parts) -> bytes:
    return b"".join(image[offset : offset + nbytes] for offset, nbytes in parts)


def some_parts(nbytes: int, seed: object, count: int = 12) -> list[tuple[int, int]]:
    """Ranges of all kinds: empty, of a byte, over several blocks, overlapping, in any order."""
    draw = random.Random(str(seed))
    starts = [draw.randrange(nbytes) for _ in range(count)]
    found = [(start, draw.choice([0, 1, 77, BLOCK, 2 * BLOCK + 5])) for start in starts]
    return [(start, min(length, nbytes - start)) for start, length in found] + [(0, nbytes), (nbytes - 1, 1)]


# -- sources -------------------------------------------------------------------------------------------------------------


def test_parts_come_from_the_slot_here_from_another_and_from_the_group() -> None:
    async def work() -> None:
        ranks = plain("abcd")
        async with Group(*ranks) as group:
            images = await protected(group, ranks, 2, large)
            a = group.members["a"]
            for rank, without, how in (
                (0, "", "read from a slot here"),
                (1, "", "fetched from agent b"),
                (1, "b", "rebuilt from 6 pieces of its group"),
                (3, "cd", "rebuilt from 4 pieces of its group"),
            ):
                request = group.request(rank, ONE, without=without)
                said = await a.protector.windows.describe(request)
                assert (said.layout, said.image_bytes) == (b"layout of %d" % rank, large(rank))
                for seed in range(3):
                    parts = some_parts(large(rank), seed)
                    data, reply = await read(a, request, parts)
                    assert data == parts_of(images[rank], parts)
                    assert reply.how == how
            assert a.image(1, ONE) is None  # nothing was brought here for it

    run(work)
