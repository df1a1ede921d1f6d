"""What every store promises, once, for all of them. A test class inherits it and says where such a store is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pytest
from holdfast.errors import Corrupt, ObjectMissing
from holdfast.storage.store import Store, open_store

Result = TypeVar("Result")
MIB = 1 << 20
SIZES = [0, 1, 4095, 4096, MIB - 1, MIB, MIB + 1, 8 * MIB, 8 * MIB + 1, 20 * MIB + 12345]
NO_KEYS = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    "..",
    "../a",
    "a/../b",
    "a/.",
    ".",
    "a\\b",
    "a\0",
    "a\n",
    "é",
    "x" * 256,
    "a/" * 500 + "a",
]


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    """The store at *url*, closed in the end."""
    store = open_store(url)
    try:
        yield store
    finally:
        await store.close()


def within(url: str, scene: Callable[[Store], Awaitable[Result]]) -> Result:
    """What *scene* returns, played with the store at *url*."""

    async def play() -> Result:
        async with opened(url) as store:
            return await scene(store)

    return asyncio.run(play())


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """Bytes of which no part looks like another."""
    return np.random.default_rng(seed).bytes(nbytes)


def split(data: bytes, *places: int) -> list[memoryview]:
    """*data* as parts, cut at *places*."""
    bounds = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    return [memoryview(data)[a:b] for a, b in pairwise(bounds)]


async def read(store: Store, key: str, nbytes: int, *places: int) -> bytes:
    """An object of that length, read into parts that end at *places*."""
    target = bytearray(nbytes)
    bounds = [0, *sorted(min(place, nbytes) for place in places), nbytes]
    await store.read_into(key, [memoryview(target)[a:b] for a, b in pairwise(bounds)])
    return bytes(target)


class StoreContract:
    """The promises of ``Store``."""

    @pytest.fixture
    def url(self) -> str:
        """Where an empty store is."""
        raise NotImplementedError

    @pytest.mark.parametrize("durable", [True, False])
    @pytest.mark.parametrize("nbytes", SIZES)
    def test_what_is_put_is_what_is_read(self, url: str, nbytes: int, durable: bool) -> None:
        async def scene(store: Store) -> None:
            data = pattern(nbytes)
            await store.put("a/b.c/%2E_-", split(data, 1, 70_000, nbytes - 4 if nbytes > 4 else 0), durable=durable)
            await store.settle()
            assert await store.get("a/b.c/%2E_-") == data
            assert await read(store, "a/b.c/%2E_-", nbytes, nbytes // 2, nbytes - 4 if nbytes > 8 else 0) == data
            (found,) = await store.list("")
            assert (found.key, found.nbytes) == ("a/b.c/%2E_-", nbytes)

        within(url, scene)

    def test_a_put_replaces(self, url: str) -> None:
        async def scene(store: Store) -> None:
            for data in (b"long" * 1000, b"", b"short", pattern(2 * MIB), b"last"):
                await store.put("k", [data])
                assert await store.get("k") == data
            await store.put("k", [b"waits"], durable=False)
            assert await store.get("k") in (b"last", b"waits")
            await store.settle()
            assert await store.get("k") == b"waits"
            await store.put("k", [b"one"], durable=False)
            await store.put("k", [b"two"], durable=False)
            await store.settle()
            assert await store.get("k") == b"two"
            await store.put("k", [b"one"], durable=False)
            await store.put("k", [b"two"])
            await store.settle()
            assert await store.get("k") == b"two"

        within(url, scene)

    def test_another_store_object_sees_it(self, url: str) -> None:
        async def scene(store: Store) -> None:
            async with opened(url) as other:
                await store.put("a/x", [b"1"])
                await store.put("a/y", [b"2"], durable=False)
                await store.settle()
                await store.confirm("a/")
                assert [found.key for found in await other.list("a/")] == ["a/x", "a/y"]
                await other.delete(["a/x"])
                assert [found.key for found in await store.list("a/")] == ["a/y"]

        within(url, scene)

    def test_what_was_not_settled_never_shows_in_part(self, url: str) -> None:
        async def scene(store: Store) -> None:
            await store.put("a", [pattern(3 * MIB)], durable=False)
            await store.close()
            async with opened(url) as other:
                assert [found.nbytes for found in await other.list("")] in ([], [3 * MIB])

        within(url, scene)

    def test_what_is_missing_is_named(self, url: str) -> None:
        async def scene(store: Store) -> None:
            for key in ("a", "b/c/d"):
                with pytest.raises(ObjectMissing, match=key):
                    await store.get(key)
                with pytest.raises(ObjectMissing, match=key):
                    await read(store, key, 3)
            await store.put("b/c/d", [b"123"])
            for key in ("b", "b/c", "b/c/d/e"):  # a folder is no object, an object no folder
                with pytest.raises(ObjectMissing):
                    await store.get(key)

        within(url, scene)

    def test_another_length_is_damage(self, url: str) -> None:
        async def scene(store: Store) -> None:
            for nbytes in (10, 3 * MIB):
                await store.put("k", [pattern(nbytes)])
                for wrong in (nbytes - 1, nbytes + 1, 0, 4 * MIB):
                    with pytest.raises(Corrupt, match="k in "):
                        await read(store, "k", wrong)

        within(url, scene)

    def test_listing(self, url: str) -> None:
        async def scene(store: Store) -> None:
            assert await store.list("") == []
            assert await store.list("none/") == []
            assert await store.children("") == []
            keys = ["a/b/1", "a/b/2", "a/b/c/d/e", "a/b.x", "a/b0/1", "a/ba", "b", "c/zarr.json"]
            for key in reversed(keys):
                await store.put(key, [key.encode()], durable=False)
            await store.settle()
            assert [found.key for found in await store.list("")] == sorted(keys)
            assert [found.nbytes for found in await store.list("")] == [len(key) for key in sorted(keys)]
            assert [found.key for found in await store.list("a/b/")] == ["a/b/1", "a/b/2", "a/b/c/d/e"]
            assert await store.list("a/b/c/d/e/") == []
            assert await store.children("") == ["a", "c"]
            assert await store.children("a/") == ["b", "b0"]
            assert await store.children("a/b/") == ["c"]
            assert await store.children("b/") == []

        within(url, scene)

    def test_deleting(self, url: str) -> None:
        async def scene(store: Store) -> None:
            await store.delete([])
            await store.delete(["never/there", "a"])
            for key in ("a/b/c/1", "a/b/2", "a/3"):
                await store.put(key, [b"x"])
            await store.put("a/4", [b"x"], durable=False)
            await store.delete(["a/b/c/1", "a/b/2", "a/b/2", "a/nothing", "a/4"])
            await store.settle()
            assert [found.key for found in await store.list("")] == ["a/3"]
            await store.delete(["a/b"])  # the name of a folder that was
            await store.put("a/b", [b"now an object"])
            await store.delete(["a/3", "a/b"])
            assert await store.list("") == []
            await store.put("a/b/c/1", [b"again"])
            assert await store.get("a/b/c/1") == b"again"

        within(url, scene)

    def test_many_are_deleted(self, url: str) -> None:
        async def scene(store: Store) -> None:
            keys = [f"many/{i:04d}" for i in range(1100)]
            for at in range(0, len(keys), 50):
                await asyncio.gather(*(store.put(key, [b""], durable=False) for key in keys[at : at + 50]))
            await store.settle()
            assert [found.key for found in await store.list("many/")] == keys
            await store.delete(keys)
            assert await store.list("") == []

        within(url, scene)

    @pytest.mark.parametrize("key", NO_KEYS)
    def test_what_is_no_key_is_refused(self, url: str, key: str) -> None:
        async def scene(store: Store) -> None:
            for call in (
                lambda: store.put(key, [b"x"]),
                lambda: store.get(key),
                lambda: store.read_into(key, [memoryview(bytearray(1))]),
                lambda: store.delete(["a", key]),
            ):
                with pytest.raises(Corrupt):
                    await call()
            for prefix in {key, f"{key}/"} - {"", "a/"}:
                with pytest.raises(Corrupt):
                    await store.list(prefix)
                with pytest.raises(Corrupt):
                    await store.children(prefix)
            assert await store.list("") == []

        within(url, scene)

    def test_a_reader_sees_the_old_or_the_new(self, url: str) -> None:
        async def scene(store: Store) -> None:
            versions = [pattern(2 * MIB + 5, seed) for seed in range(4)]
            await store.put("k", [versions[0]])

            async def write(data: bytes) -> None:
                async with opened(url) as other:
                    await other.put("k", [data])

            writing = [asyncio.ensure_future(write(data)) for data in versions[1:]]
            while not all(task.done() for task in writing):
                assert await store.get("k") in versions
                assert await read(store, "k", 2 * MIB + 5, 7) in versions
            await asyncio.gather(*writing)

        within(url, scene)

    def test_times_are_of_the_last_put(self, url: str) -> None:
        async def scene(store: Store) -> None:
            await store.put("a", [b"1"])
            await store.put("b", [b"1"])
            a, b = await store.list("")
            assert a.modified_s <= b.modified_s
            await store.put("a", [b"2"])
            assert (await store.list(""))[0].modified_s >= b.modified_s

        within(url, scene)

    def test_a_cancelled_put_is_whole_or_nothing_and_leaves_memory_alone(self, url: str) -> None:
        async def scene(store: Store) -> None:
            data = bytearray(pattern(24 * MIB))
            sent = bytes(data)
            for turns in range(6):
                task = asyncio.ensure_future(store.put("k", [memoryview(data)]))
                for _ in range(turns * turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task})
                data[:] = bytes(len(data))  # it is ours again
                assert [found.nbytes for found in await store.list("")] in ([], [len(sent)])
                if await store.list(""):
                    assert await store.get("k") == sent
                data[:] = sent

        within(url, scene)

    def test_many_at_once(self, url: str) -> None:
        async def scene(store: Store) -> None:
            objects = {f"d{i % 7}/o{i}": pattern(1 + i * 40_000, i) for i in range(60)}
            await asyncio.gather(
                *(store.put(key, [data], durable=i % 3 == 0) for i, (key, data) in enumerate(objects.items()))
            )
            await store.settle()
            found = await asyncio.gather(*(read(store, key, len(data)) for key, data in objects.items()))
            assert found == list(objects.values())

        within(url, scene)

    def test_as_a_dictionary_would(self, url: str) -> None:
        """Random operations, compared with a dict."""

        async def scene(store: Store) -> None:
            rng = random.Random(4)
            model: dict[str, bytes] = {}
            keys = [f"{a}/{b}" for a in ("x", "x/y", "z") for b in "123"]
            for _ in range(150):
                key = rng.choice(keys)
                match rng.randrange(5):
                    case 0 | 1:
                        model[key] = pattern(rng.choice([0, 3, 5000, MIB + 1]), rng.randrange(100))
                        await store.put(key, split(model[key], rng.randrange(6000)))
                    case 2:
                        await store.delete([key])
                        model.pop(key, None)
                    case 3:
                        inside = {k for k in model if k.startswith("x/")}
                        assert {found.key for found in await store.list("x/")} == inside
                    case _ if key in model:
                        assert await read(store, key, len(model[key]), 100) == model[key]
                    case _:
                        with pytest.raises(ObjectMissing):
                            await store.get(key)

        within(url, scene)

    def test_the_rest_of_what_it_offers(self, url: str) -> None:
        async def scene(store: Store) -> None:
            await store.settle()
            await store.confirm("")
            await store.confirm("nothing/here/")
            assert await store.sweep(0.0) == 0
            free = await store.free_bytes()
            assert free is None or free > 0
            await store.put("a", [b"x"])
            assert await store.sweep(0.0) == 0
            assert await store.get("a") == b"x"

        within(url, scene)
