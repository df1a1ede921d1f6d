"""How fast parity is computed, as a share of what the bare library, and plain XOR, make of the same bytes.

    python benchmarks/erasure.py [--rounds 15] [--memory-mib 768] [--quick]

One thread works through segments that are together far larger than the caches, in blocks of 4 MiB. All contenders take turns in
every round; rates are medians over the rounds, in 10^9 bytes read per second of that thread's time (which what else runs on
the machine disturbs less than the clock), and shares are medians of the rounds' ratios.
``copy`` is ``memmove`` from the first of the segments to the last: what the memory allows.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np
import numpy.typing as npt
from holdfast.erasure import kernel as kernels
from holdfast.erasure.code import Code
from holdfast.erasure.kernel import BLOCK_BYTES, combine, multiply_add
from report import Verdict

LIBRARY_SHARE: Final = 0.9
XOR_SHARE: Final = 0.8

Work = Callable[[int], object]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Contest:
    """The same work done in several ways.

    Attributes:
        segments: ``uint8[sources and targets, segment_bytes]``: what is worked on. Targets begin as zeros when ways are checked.
        sources: how many of the segments are read; they come first.
        ways: by name, what does block number i of all segments. The first is ours, the second what it is held to.
        least: the share of the second's speed that is wanted.
    """

    what: str
    segments: Bytes
    sources: int
    ways: dict[str, Work]
    least: float

    def run(self, rounds: int) -> Verdict:
        """Measure, and judge."""
        self._check()
        first, last = addresses(self.segments)[:: len(self.segments) - 1]
        ways = {
            **self.ways,
            "copy": lambda block: ctypes.memmove(last + block * BLOCK_BYTES, first + block * BLOCK_BYTES, BLOCK_BYTES),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                rate = self._rate(ways[name]) * (1 if name == "copy" else self.sources)
                rates[name] += [rate] if number else []  # the first round warms up
        ours, theirs = list(rates.values())[:2]
        share = median(a / b for a, b in zip(ours, theirs, strict=True))
        return Verdict(
            self.what,
            f"{share:.2f} of {list(ways)[1]}",
            f">= {self.least:.2f}",
            share >= self.least,
            ", ".join(f"{name} {median(found) / 1e9:.1f}" for name, found in rates.items()) + " GB/s",
        )

    def _rate(self, work: Work) -> float:
        """Bytes of one segment per second."""
        segment_bytes: int = self.segments.shape[1]
        began_s = time.thread_time()
        for block in range(segment_bytes // BLOCK_BYTES):
            work(block)
        return segment_bytes / (time.thread_time() - began_s)

    def _check(self) -> None:
        """All ways must make the same of the last block; otherwise there is nothing to compare."""
        last = self.segments.shape[1] // BLOCK_BYTES - 1
        targets = self.segments[self.sources :, last * BLOCK_BYTES :]
        found = []
        for work in self.ways.values():
            targets[:] = 0
            work(last)
            found.append(targets.copy())
        assert all(np.array_equal(found[0], other) for other in found[1:]), self.what


def contests(memory_bytes: int) -> Iterator[Contest]:
    """All of them. Each has *memory_bytes* of its own, to be freed before the next one begins."""
    yield encoding(4, 2, memory_bytes)
    yield encoding(8, 2, memory_bytes)
    yield summing(4, memory_bytes)
    yield adding(memory_bytes)


def encoding(k: int, m: int, memory_bytes: int) -> Contest:
    """All parity of a stripe at once, against the library called with nothing in between; and row by row, source by source."""
    segments, code = filled(k + m, memory_bytes), Code.of(k, m)
    data, parity = addresses(segments)[:k], addresses(segments)[k:]
    blocks = range(segments.shape[1] // BLOCK_BYTES)
    prepared = [[(ctypes.c_void_p * len(part))(*at(part, block)) for part in (data, parity)] for block in blocks]
    library = ctypes.CDLL(next(kernels._isal_paths()))
    tables = ctypes.create_string_buffer(32 * k * m)
    library.ec_init_tables(k, m, code.parity.tobytes(), tables)

    def one_by_one(block: int) -> None:
        for source, column in zip(at(data, block), code.parity.T.tolist(), strict=True):
            for target, coefficient in zip(at(parity, block), column, strict=True):
                multiply_add(target, source, BLOCK_BYTES, coefficient)

    ways: dict[str, Work] = {
        "holdfast": lambda block: combine(code.parity, at(data, block), at(parity, block), BLOCK_BYTES),
        "ISA-L": lambda block: library.ec_encode_data(BLOCK_BYTES, k, m, tables, *prepared[block]),
        "multiply_add": one_by_one,
    }
    return Contest(f"combine {k}+{m}", segments, k, ways, LIBRARY_SHARE)


def summing(k: int, memory_bytes: int) -> Contest:
    """All of the only parity of a stripe at once, against NumPy's XOR of one source after the other."""
    segments, parity = filled(k + 1, memory_bytes), Code.of(k, 1).parity
    data, target = addresses(segments)[:k], addresses(segments)[k:]
    rows = segments.reshape(k + 1, -1, BLOCK_BYTES)

    def numpy(block: int) -> None:
        np.bitwise_xor(rows[0, block], rows[1, block], out=rows[k, block])
        for j in range(2, k):
            np.bitwise_xor(rows[k, block], rows[j, block], out=rows[k, block])

    ways: dict[str, Work] = {
        "holdfast": lambda block: combine(parity, at(data, block), at(target, block), BLOCK_BYTES),
        "bitwise_xor": numpy,
    }
    return Contest(f"combine {k}+1", segments, k, ways, XOR_SHARE)


def adding(memory_bytes: int) -> Contest:
    """One source into the only parity, as agents do when a block arrives."""
    segments = filled(2, memory_bytes)
    source, target = addresses(segments)
    rows = segments.reshape(2, -1, BLOCK_BYTES)
    ways: dict[str, Work] = {
        "holdfast": lambda block: multiply_add(
            target + block * BLOCK_BYTES, source + block * BLOCK_BYTES, BLOCK_BYTES, 1
        ),
        "bitwise_xor": lambda block: np.bitwise_xor(rows[1, block], rows[0, block], out=rows[1, block]),
    }
    return Contest("multiply_add 1", segments, 1, ways, XOR_SHARE)


# -- memory ------------------------------------------------------------------------------------------------------------------


def filled(count: int, memory_bytes: int) -> Bytes:
    """Segments of whole blocks of noise, every page of them touched, each beginning where a page does."""
    segment_bytes = memory_bytes // count // BLOCK_BYTES * BLOCK_BYTES
    room = np.empty(count * segment_bytes + 4096, np.uint8)
    segments = room[-room.ctypes.data % 4096 :][: count * segment_bytes].reshape(count, segment_bytes)
    segments.reshape(-1, BLOCK_BYTES)[:] = np.random.default_rng(0).integers(0, 256, BLOCK_BYTES, np.uint8)
    return segments


def addresses(segments: Bytes) -> list[int]:
    """Where each of them begins."""
    return [row.ctypes.data for row in segments]


def at(starts: Sequence[int], block: int) -> list[int]:
    """Where a block of each segment begins."""
    return [start + block * BLOCK_BYTES for start in starts]


def main() -> int:
    """Measure and print. A missed target is a finding, not an error: the exit code is 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="how often everybody takes a turn")
    parser.add_argument(
        "--memory-mib", type=int, default=768, help="that one pass of a contender goes through; at least 64"
    )
    parser.add_argument("--quick", action="store_true", help="five rounds: some ten seconds")
    given = parser.parse_args()
    loaded = kernels.kernel().parity.name
    print(f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; parity by {loaded}\n")
    if not loaded.startswith("ISA-L"):
        print("ISA-L does not load here: there is nothing to compare with")
        return 0
    for contest in contests(given.memory_mib << 20):
        verdict = contest.run(given.rounds or (5 if given.quick else 15))
        word = "ok" if verdict.met else "MISSED"
        print(f"{verdict.what:18}{verdict.figure:>20}  {verdict.limit:>8}  {word:8}{verdict.note}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
