"""Tiers in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure, through ``obstore``.

An object appears when its upload is complete, and is durable then: settling has nothing to do. An upload that never
completes shows nowhere, but may be billed: have the bucket's lifecycle rules abort incomplete multipart uploads.

Requests that fail in passing (no connection, 5xx) are repeated with jittered backoff for as long as the deadline allows;
credentials come from the environment, from the instance, and from files, each service's usual ones.
"""

from __future__ import annotations

import asyncio
import configparser
import os
import random
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import numpy as np

from ..errors import ConfigError, Corrupt, HoldfastError, ObjectMissing, TierFull, TierUnreachable
from .disk import Bytes, as_bytes
from .store import GET_BYTES, TIMEOUT_S, Buffer, Found, Names, checked, checked_prefix, is_key

if TYPE_CHECKING:
    import obstore.store

SCHEMES: Final = ("s3", "gs", "az", "memory")
PART_BYTES: Final = 8 << 20  # of an upload; what is shorter goes in one request
MOST_PARTS: Final = 9_000  # S3 takes 10,000
REQUESTS: Final = 16  # at once
PARTS_AT_ONCE: Final = 4  # of each upload
STREAM_BYTES: Final = 1 << 20  # copied at a time from what arrives, on the loop
SLOWEST_BYTES_PER_S: Final = 1 << 20  # a store that is slower counts as unreachable
DELETE_KEYS: Final = 1000  # per request
LIST_KEYS: Final = 1000  # per answer
_FULL: Final = ("QuotaExceeded", "InsufficientStorage", "StorageFull", "507 ")
_CLIENT_OPTIONS: Final = (
    "allow_http",
    "allow_invalid_certificates",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
)
_PREFIXES: Final = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_FILE_VARIABLES: Final = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
                          "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE")  # fmt: skip

Result = TypeVar("Result")
_memories: dict[str, obstore.store.MemoryStore] = {}  # of this process, by name


class ObjectStore:
    """A bucket, or what lies under one path in it."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._store = _opened(url, timeout_s)
        self._requests = asyncio.Semaphore(REQUESTS)
        self._uploads = asyncio.Semaphore(REQUESTS // PARTS_AT_ONCE)

    async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
        """See Store. Durable or not makes no difference."""
        import obstore

        arrays = [array for part in parts if (array := as_bytes(part)).nbytes]
        nbytes = sum(array.nbytes for array in arrays)
        part_bytes = max(PART_BYTES, -(-nbytes // MOST_PARTS))

        async def small() -> None:
            data = b"".join(array.data for array in arrays)
            await obstore.put_async(self._store, key, data, use_multipart=False)

        async def large() -> None:
            upload = _Upload(arrays, part_bytes)
            try:
                await obstore.put_async(
                    self._store, key, upload, use_multipart=True, chunk_size=part_bytes, max_concurrency=PARTS_AT_ONCE
                )
            finally:
                upload.call_off()

        checked(key)
        if nbytes <= PART_BYTES:
            await self._ask("write", key, small, nbytes)
        else:
            async with self._uploads:
                await self._ask("write", key, large, nbytes)

    async def settle(self) -> None:
        """See Store. Nothing waits for it."""

    async def forget(self, keys: Sequence[str]) -> None:
        """See Store. Nothing waits."""

    async def confirm(self, prefix: str) -> None:
        """See Store. What can be seen is durable."""

    async def get(self, key: str) -> bytes:
        """See Store."""
        import obstore

        async def ask() -> bytes:
            found = await obstore.get_async(self._store, key)
            if found.meta["size"] > GET_BYTES:
                raise Corrupt(f"{key} in {self.url} is longer than any document: {found.meta['size']} bytes")
            return (await found.bytes_async()).to_bytes()

        return await self._ask("read", checked(key), ask)

    async def read_into(self, key: str, parts: Sequence[memoryview]) -> None:
        """See Store."""
        import obstore

        wanted = sum(part.nbytes for part in parts)

        async def ask() -> None:
            found = await obstore.get_async(self._store, key)
            there = found.meta["size"]
            if there != wanted:
                raise Corrupt(f"{key} in {self.url} has {there} bytes, not {wanted}")
            await _fill(parts, found.stream(min_chunk_size=STREAM_BYTES), f"{key} in {self.url}")

        await self._ask("read", checked(key), ask, wanted)

    async def list(self, prefix: str) -> list[Found]:
        """See Store."""
        import obstore

        limit, loop, most = asyncio.timeout(self._timeout_s), asyncio.get_running_loop(), -1

        async def ask() -> Sequence[Found]:
            found: list[Found] = []
            pages = aiter(obstore.list(self._store, prefix or None, chunk_size=LIST_KEYS))
            while True:
                nonlocal most
                if len(found) > most:  # a page more than any try so far: that is progress, however many are to come
                    most = len(found)
                    limit.reschedule(loop.time() + self._timeout_s)
                page = await anext(pages, None)
                if page is None:
                    return found
                found += [Found(one["path"], one["size"], one["last_modified"].timestamp()) for one in page]

        found = await self._ask("list", checked_prefix(prefix), ask, limit=limit)
        # Not every store takes a prefix for a folder: "a/b" must not bring "a/bc".
        inside = (one for one in found if one.key.startswith(prefix) and is_key(one.key))
        return sorted(inside, key=lambda one: one.key)

    async def children(self, prefix: str) -> Names:
        """See Store."""
        import obstore

        async def ask() -> Sequence[str]:
            return (await obstore.list_with_delimiter_async(self._store, prefix or None))["common_prefixes"]

        found = await self._ask("list", checked_prefix(prefix), ask)
        names = (path.rstrip("/").removeprefix(prefix) for path in found)
        return sorted(name for name in names if is_key(name) and "/" not in name)

    async def delete(self, keys: Sequence[str]) -> None:
        """See Store."""
        import obstore

        async def ask(batch: Sequence[str]) -> None:
            try:
                await obstore.delete_async(self._store, batch)
            except FileNotFoundError:  # some stores mind; then the others of the batch may still be there
                for key in batch:
                    with suppress(FileNotFoundError):
                        await obstore.delete_async(self._store, key)

        for key in keys:
            checked(key)
        for at in range(0, len(keys), DELETE_KEYS):
            batch = [*keys[at : at + DELETE_KEYS]]
            await self._ask("delete", batch[0] if len(keys) == 1 else "", partial(ask, batch))

    async def sweep(self, older_than_s: float) -> int:
        """See Store. What is left of uploads cannot be seen from here."""
        return 0

    async def free_bytes(self) -> int | None:
        """See Store."""
        return None

    async def close(self) -> None:
        """See Store. Connections close by themselves when they have been idle."""

    async def _ask(
        self,
        operation: str,
        key: str,
        ask: Callable[[], Awaitable[Result]],
        nbytes: int = 0,
        *,
        limit: asyncio.Timeout | None = None,
    ) -> Result:
        """What *ask* returns. All that is asked may be asked again. obstore repeats requests that get no answer, or 5xx;
        not those whose answer breaks off, and that is done here. *limit*: instead of that for *nbytes*; *ask* moves it."""
        deadline_s = self._timeout_s + nbytes / SLOWEST_BYTES_PER_S
        what = f"cannot {operation} {f'{key} in ' if key else ''}{self.url}"
        pause_s = 0.1
        async with self._requests:
            with _translated(what, operation, deadline_s):
                async with limit or asyncio.timeout(deadline_s):
                    while True:
                        try:
                            return await ask()
                        except _broken_off() as error:
                            if not isinstance(error, EOFError) and "HTTP error" not in str(error):
                                raise
                        await asyncio.sleep(pause_s * (0.5 + random.random()))  # noqa: S311 - so that not all come at once
                        pause_s = min(2 * pause_s, 5.0)


class _Upload:
    """Hands out copies of *arrays*, part by part. obstore goes on with an upload for a while after its caller has given
    up: then there are no more parts, the upload fails, and memory that is not ours any more is not looked at."""

    def __init__(self, arrays: Sequence[Bytes], part_bytes: int) -> None:
        self._arrays, self._part_bytes = [*arrays], part_bytes
        self._lock = threading.Lock()
        self._off = False

    def __iter__(self) -> Iterator[memoryview]:
        return self

    def __next__(self) -> memoryview:
        with self._lock:
            if self._off:
                raise InterruptedError("called off")
            if not self._arrays:
                raise StopIteration
            part, filled = np.empty(self._part_bytes, np.uint8), 0
            while self._arrays and filled < self._part_bytes:
                array = self._arrays[0]
                count = min(array.nbytes, self._part_bytes - filled)
                part[filled : filled + count] = array[:count]
                filled += count
                self._arrays[:1] = [array[count:]] if count < array.nbytes else []
            return part[:filled].data

    def call_off(self) -> None:
        """Nothing is handed out after this."""
        with self._lock:
            self._off = True
            self._arrays.clear()


async def _fill(parts: Sequence[memoryview], stream: AsyncIterator[bytes], what: str) -> None:
    targets = [array for part in parts if (array := as_bytes(part)).nbytes]
    async for data in stream:
        chunk = np.frombuffer(data, np.uint8)
        while chunk.nbytes:
            if not targets:
                raise Corrupt(f"{what} is longer than it said")
            count = min(chunk.nbytes, targets[0].nbytes)
            targets[0][:count] = chunk[:count]
            chunk, targets[0] = chunk[count:], targets[0][count:]
            if not targets[0].nbytes:
                del targets[0]
    if targets:
        raise EOFError(f"{what} ended early")


@cache
def _broken_off() -> tuple[type[Exception], ...]:
    from obstore.exceptions import GenericError

    return GenericError, EOFError


@contextmanager
def _translated(what: str, operation: str, deadline_s: float) -> Iterator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except HoldfastError:
        raise
    except TimeoutError as error:
        raise TierUnreachable(f"{what}: no answer for {deadline_s:.0f} s") from error
    except (BaseError, OSError, ValueError, EOFError) as error:
        reason = _reason(error)
        if isinstance(error, FileNotFoundError) and operation == "read" and "NoSuchBucket" not in str(error):
            raise ObjectMissing(f"{what}: it is not there") from error
        if any(sign in str(error) for sign in _FULL):
            raise TierFull(f"{what}: {reason}") from error
        raise TierUnreachable(f"{what}: {reason}") from error


def _reason(error: Exception) -> str:
    """What *error* says, in one line, and without signatures and tokens, which some services carry in a URL's query."""
    said = " ".join(str(error).partition("Debug source:")[0].split())
    answer = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", said)
    return f"{answer[1]}: {answer[2]}" if answer else re.sub(r"\?[^\s)\"']*", "", said)[:400]


def _opened(url: str, timeout_s: float) -> obstore.store.ObjectStore:
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"a tier is {parts.scheme}://bucket/path, with nothing else; credentials go in the environment"
        )
    if not parts.netloc and parts.scheme != "memory":
        raise ConfigError(f"{url!r} names no bucket")
    if parts.path.strip("/") and not is_key(parts.path.strip("/")):
        raise ConfigError(f"{url!r} has a path that no object can lie under")
    import obstore.exceptions
    from obstore.store import MemoryStore, from_url

    if parts.scheme == "memory":
        name = parts.netloc + parts.path.rstrip("/")
        return _memories.setdefault(name, MemoryStore()) if name else MemoryStore()
    limit = timedelta(seconds=timeout_s)
    options: dict[str, Any] = {
        "client_options": {
            **_client_options(parts.scheme, os.environ),
            "timeout": limit,
            "connect_timeout": min(limit, timedelta(seconds=5)),
        },
        "retry_config": {
            "max_retries": 10_000,  # the deadline counts
            "retry_timeout": limit,
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": min(limit / 4, timedelta(seconds=5))},
        },
    }
    if parts.scheme == "s3":
        options["config"] = _aws_files(os.environ)
        if str(options["config"].get("endpoint")).startswith("http://"):
            options["client_options"].setdefault("allow_http", True)
    try:
        return from_url(url, **options)
    except (obstore.exceptions.BaseError, ValueError, OSError) as error:
        raise ConfigError(f"{url!r} cannot be opened: {_reason(error)}") from error


def _client_options(scheme: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Those of the environment, as ``AWS_ALLOW_HTTP``: obstore forgets them as soon as it is given any others."""
    prefix = _PREFIXES[scheme]
    said = {name: environment.get(f"{prefix}_{name.upper()}") for name in _CLIENT_OPTIONS}
    options: dict[str, Any] = {
        name: text.lower() in ("1", "true", "yes", "on", "y") if name.startswith("allow_") else text
        for name, text in said.items()
        if text
    }
    endpoints = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
    if any(environment.get(name, "").startswith("http://") for name in endpoints if name.startswith(prefix)):
        options.setdefault("allow_http", True)  # who writes http:// means it
    return options


def _where(error: configparser.Error | UnicodeDecodeError) -> str:
    """What kind of error, and its line: no more, as what the parsers say quotes the file, and secrets are in it."""
    lines = [getattr(error, "lineno", None), *(line for line, _ in getattr(error, "errors", ()))]
    line = next((number for number in lines if isinstance(number, int)), None)
    return type(error).__name__ + (f" in line {line}" if line is not None else "")


def _aws_files(environment: Mapping[str, str]) -> dict[str, str]:
    """What the AWS credentials and config files say of the chosen profile, unless the environment gives credentials.

    obstore reads the environment and asks the instance, but does not know these files. Profiles that have to be asked
    for (single sign-on, assumed roles) are not followed: export their credentials.
    """
    if any(environment.get(name) for name in _FILE_VARIABLES):
        return {}
    profile = environment.get("AWS_PROFILE") or "default"
    home = Path(environment.get("HOME") or "~").expanduser() / ".aws"
    found: dict[str, str] = {}
    for variable, name, section in (
        ("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile),
    ):
        file = configparser.RawConfigParser()
        path = Path(environment.get(variable) or home / name)
        try:
            file.read(path)
        except (configparser.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no AWS profile file: {_where(error)}") from None
        if file.has_section(section):
            found.update(file.items(section))
    if not found and environment.get("AWS_PROFILE"):
        raise ConfigError(f"AWS_PROFILE is {profile!r}, and no such profile is in the files under {home}")
    wanted = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
              "aws_session_token": "session_token", "region": "region", "endpoint_url": "endpoint"}  # fmt: skip
    set_already = {"region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
                   "endpoint_url": ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")}  # fmt: skip
    return {
        to: found[name]
        for name, to in wanted.items()
        if found.get(name) and not any(environment.get(variable) for variable in set_already.get(name, ()))
    }
