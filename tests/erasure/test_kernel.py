"""The bulk kernels: known answers, agreement with the slow twins, blocks, edges of memory, the fallbacks."""

from __future__ import annotations

import ctypes
import logging
import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from holdfast.erasure import galois
from holdfast.erasure import kernel as kernels
from holdfast.erasure.galois import Bytes
from holdfast.erasure.kernel import (
    BLOCK_BYTES,
    Checksums,
    Kernel,
    Parity,
    block_checksums,
    checksums_right,
    combine,
    crc32c,
    crc32c_at,
    crc32c_slow,
    multiply_add,
    parity_right,
)
from holdfast.errors import ConfigError

# RFC 3720, B.4, and the check value of the CRC catalogue.
KNOWN = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]


@pytest.fixture
def noise() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)


@pytest.fixture
def _fresh_kernel() -> Iterator[None]:
    """Whatever a test makes of the library search is forgotten before and after it."""
    kernels.kernel.cache_clear()
    yield
    kernels.kernel.cache_clear()


@pytest.mark.parametrize(("data", "expected"), KNOWN)
def test_known_answers(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected
    assert crc32c_slow(data) == expected


@pytest.mark.parametrize("length", [0, 1, 7, 8, 63, 64, 65, 255, 256, 1023, 1024, 5000])
@pytest.mark.parametrize("start", [0, 1, 13])
def test_agrees_with_the_slow_twin(noise: npt.NDArray[np.uint8], start: int, length: int) -> None:
    part = noise[start : start + length]
    assert crc32c(part, 77) == crc32c_slow(part.tobytes(), 77)
    assert crc32c_at(noise.ctypes.data + start, length, 77) == crc32c(part, 77)


def test_chains_over_any_cut(noise: npt.NDArray[np.uint8]) -> None:
    whole = crc32c(noise)
    for cut in (0, 1, 50_000, 99_999, 100_000):
        assert crc32c(noise[cut:], crc32c(noise[:cut])) == whole


def test_long_input_is_fed_in_calls_the_library_can_take(
    monkeypatch: pytest.MonkeyPatch, noise: npt.NDArray[np.uint8]
) -> None:
    whole = crc32c(noise)
    for call_bytes in (1, 4096, 99_999, 100_000):
        monkeypatch.setattr(kernels, "_CALL_BYTES", call_bytes)
        assert crc32c(noise) == whole


def test_takes_any_contiguous_buffer(noise: npt.NDArray[np.uint8]) -> None:
    expected = crc32c(noise.tobytes())
    for buffer in (bytearray(noise), memoryview(noise.tobytes()), noise.reshape(100, 1000), noise.view(np.float32)):
        assert crc32c(buffer) == expected


def test_refuses_a_strided_buffer(noise: npt.NDArray[np.uint8]) -> None:
    with pytest.raises((ValueError, BufferError)):
        crc32c(noise[::2])


def test_refuses_negative_lengths() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        crc32c_at(0, -1)
    with pytest.raises(ValueError, match="-1 bytes"):
        block_checksums(0, -1, 4)
    with pytest.raises(ValueError, match="blocks of 0"):
        block_checksums(0, 8, 0)


@pytest.mark.parametrize("block_bytes", [1000, 4096, 99_999, 100_000, BLOCK_BYTES])
@pytest.mark.parametrize("task_bytes", [1, 10_000, 1 << 20])
@pytest.mark.parametrize("threads", [0, 3])
def test_block_checksums(
    monkeypatch: pytest.MonkeyPatch, noise: npt.NDArray[np.uint8], block_bytes: int, task_bytes: int, threads: int
) -> None:
    monkeypatch.setattr(kernels, "_TASK_BYTES", task_bytes)
    expected = [crc32c(noise[start : start + block_bytes]) for start in range(0, len(noise), block_bytes)]
    with ThreadPoolExecutor(threads or 1) as threads_pool:
        pool: Executor | None = threads_pool if threads else None
        found = block_checksums(noise.ctypes.data, noise.nbytes, block_bytes, pool)
    assert found.dtype == np.uint32
    assert found.tolist() == expected


def test_no_bytes_have_no_blocks() -> None:
    assert block_checksums(0, 0).shape == (0,)


def test_a_failing_pool_leaves_nobody_reading(monkeypatch: pytest.MonkeyPatch, noise: npt.NDArray[np.uint8]) -> None:
    """Once block_checksums has raised, no task of it starts any more."""
    calls = 0

    def failing(address: int, nbytes: int, value: int) -> int:
        nonlocal calls
        calls += 1
        raise RuntimeError("as a test")

    monkeypatch.setattr(kernels, "_TASK_BYTES", 1)
    broken = Kernel(Checksums("failing", failing), kernels.kernel().parity)
    monkeypatch.setattr(kernels, "kernel", lambda: broken)
    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(RuntimeError, match="as a test"):
            block_checksums(noise.ctypes.data, noise.nbytes, 100, pool)
        at_return = calls
        pool.submit(int).result()
        assert calls == at_return


def test_wrong_checksums_are_noticed() -> None:
    def bare_register(address: int, nbytes: int, value: int) -> int:
        """What forgetting the inversions would give."""
        return crc32c_slow(ctypes.string_at(address, nbytes), value ^ 0xFFFFFFFF) ^ 0xFFFFFFFF

    assert checksums_right(kernels.kernel().checksums)
    assert not checksums_right(Checksums("wrong", bare_register))
    assert not checksums_right(Checksums("blind to value", lambda address, nbytes, _: crc32c_at(address, nbytes)))


# -- parity ---------------------------------------------------------------------------------------------------------------

NUMPY = Parity("NumPy", kernels._numpy_multiply_add, kernels._numpy_combine)
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 1000, 4095, 4097]


@pytest.fixture(params=["as loaded", "NumPy"])
def parity(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Parity:
    """What the functions of the module use in this test."""
    loaded = kernels.kernel()
    if request.param == "NumPy":
        monkeypatch.setattr(kernels, "kernel", lambda: Kernel(loaded.checksums, NUMPY))
        return NUMPY
    return loaded.parity


@pytest.fixture
def fenced() -> Iterator[tuple[int, int]]:
    """Address and length of three pages; to touch what lies before or behind them ends the process."""
    page = mmap.PAGESIZE
    whole = mmap.mmap(-1, 5 * page)
    held = ctypes.c_char.from_buffer(whole)
    address = ctypes.addressof(held)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for fence in (address, address + 4 * page):
        assert protect(fence, page, 0) == 0
    yield address + page, 3 * page
    for fence in (address, address + 4 * page):
        assert protect(fence, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    del held
    whole.close()


@pytest.mark.usefixtures("parity")
@pytest.mark.parametrize("nbytes", LENGTHS)
def test_multiply_add_agrees_with_the_twin(noise: Bytes, nbytes: int) -> None:
    """Any length and alignment, every kind of coefficient; and nothing beside the target changes."""
    for source, target in ((0, 0), (1, 0), (0, 1), (3, 29), (32, 16), (63, 64)):
        found = noise[50_000:60_000].copy()
        for coefficient in (0, 1, 2, 3, 0x1D, 0x80, 0x8E, 0xFF):
            expected = found.copy()
            galois.multiply_add(expected[target : target + nbytes], noise[source : source + nbytes], coefficient)
            multiply_add(found.ctypes.data + target, noise.ctypes.data + source, nbytes, coefficient)
            assert np.array_equal(found, expected), (source, target, coefficient)


def test_multiply_add_knows_every_coefficient(noise: Bytes) -> None:
    source = noise[:333]
    for coefficient in range(256):
        found, expected = np.zeros(333, np.uint8), np.zeros(333, np.uint8)
        multiply_add(found.ctypes.data, source.ctypes.data, 333, coefficient)
        galois.multiply_add(expected, source, coefficient)
        assert np.array_equal(found, expected), coefficient


@pytest.mark.usefixtures("parity")
@pytest.mark.parametrize("nbytes", LENGTHS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (2, 4), (2, 8), (3, 5), (6, 2), (8, 32)])
def test_combine_agrees_with_the_twin(noise: Bytes, rows: int, columns: int, nbytes: int) -> None:
    rng = np.random.default_rng((rows, columns, nbytes))
    for start in (0, 1, 37):
        matrix = rng.integers(0, 256, (rows, columns), np.uint8)
        sources = [noise[start + 1999 * j : start + 1999 * j + nbytes] for j in range(columns)]
        found = np.full((rows, nbytes + 2), 0xA5, np.uint8)
        expected = found.copy()
        galois.combine(matrix, sources, list(expected[:, 1:-1]))
        combine(matrix, [source.ctypes.data for source in sources], [row.ctypes.data + 1 for row in found], nbytes)
        assert np.array_equal(found, expected), start


@pytest.mark.usefixtures("parity")
def test_combine_of_ones_and_zeros(noise: Bytes) -> None:
    """Sums, copies and nothing: also where a row has no coefficient at all, the target does not keep what it held."""
    sources = noise[:3000].reshape(3, 1000)
    found = np.full((4, 1000), 7, np.uint8)
    matrix = np.array([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]], np.uint8)
    combine(matrix, [row.ctypes.data for row in sources], [row.ctypes.data for row in found], 1000)
    assert np.array_equal(found[0], sources[0] ^ sources[1] ^ sources[2])
    assert np.array_equal(found[1], sources[1])
    assert not found[2].any()
    assert np.array_equal(found[3], sources[0] ^ sources[2])


@pytest.mark.usefixtures("parity")
def test_a_matrix_of_any_memory_order(noise: Bytes) -> None:
    matrix = noise[:8].reshape(4, 2)
    found, expected = np.zeros((2, 2, 100), np.uint8)
    sources = noise[:400].reshape(4, 100)
    galois.combine(matrix.T, list(sources), list(expected))
    combine(matrix.T, [row.ctypes.data for row in sources], [row.ctypes.data for row in found], 100)
    assert np.array_equal(found, expected)


@pytest.mark.usefixtures("parity")
def test_twice_is_never(noise: Bytes) -> None:
    found = noise[:5000].copy()
    for _ in range(2):
        multiply_add(found.ctypes.data, noise.ctypes.data + 7000, 5000, 99)
    assert np.array_equal(found, noise[:5000])


@pytest.mark.usefixtures("parity")
@pytest.mark.parametrize("piece_bytes", [1, 64, 100, 999, 1000])
def test_long_blocks_are_fed_in_calls(monkeypatch: pytest.MonkeyPatch, noise: Bytes, piece_bytes: int) -> None:
    monkeypatch.setattr(kernels, "_CALL_BYTES", piece_bytes)
    monkeypatch.setattr(kernels, "_COPY_BYTES", piece_bytes)
    found, expected = np.zeros((2, 2, 1000), np.uint8)
    matrix = np.array([[5, 6], [7, 1]], np.uint8)
    sources = noise[:2000].reshape(2, 1000)
    galois.combine(matrix, list(sources), list(expected))
    combine(matrix, [row.ctypes.data for row in sources], [row.ctypes.data for row in found], 1000)
    assert np.array_equal(found, expected)
    galois.multiply_add(expected[0], sources[1], 200)
    multiply_add(found[0].ctypes.data, sources[1].ctypes.data, 1000, 200)
    assert np.array_equal(found, expected)


@pytest.mark.usefixtures("parity")
@pytest.mark.parametrize("nbytes", [*LENGTHS, 12_288])
def test_nothing_beyond_the_ends_is_touched(fenced: tuple[int, int], nbytes: int) -> None:
    """Segments end where mapped memory ends: a kernel that reads a whole vector more would kill the agent."""
    address, length = fenced
    elsewhere = np.ones((2, nbytes), np.uint8)
    other, another = (row.ctypes.data for row in elsewhere)
    for edge in (address, address + length - nbytes):
        multiply_add(edge, other, nbytes, 3)
        multiply_add(other, edge, nbytes, 3)
        combine(np.array([[2, 1], [9, 4]], np.uint8), [edge, edge], [other, another], nbytes)
        combine(np.array([[2], [9]], np.uint8), [other], [edge, another], nbytes)


@pytest.mark.usefixtures("parity")
def test_no_bytes_are_no_work() -> None:
    multiply_add(0, 0, 0, 5)
    multiply_add(0, 0, 100, 0)
    combine(np.ones((1, 2), np.uint8), [0, 0], [0], 0)
    combine(np.ones((0, 2), np.uint8), [0, 0], [], 100)


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        multiply_add(0, 0, -1, 5)
    for coefficient in (-1, 256):
        with pytest.raises(ValueError, match=str(coefficient)):
            multiply_add(0, 0, 1, coefficient)
    with pytest.raises(ValueError, match="-1 bytes"):
        combine(np.ones((1, 1), np.uint8), [0], [0], -1)
    for shape in ((2, 1), (1, 2), (1,)):
        with pytest.raises(ValueError, match="does not combine"):
            combine(np.ones(shape, np.uint8), [0], [0], 8)
    with pytest.raises(ValueError, match="int64"):
        combine(np.ones((1, 1), np.int64), [0], [0], 8)
    with pytest.raises(ValueError, match="does not combine"):
        combine(np.ones((1, 0), np.uint8), [], [0], 8)


def test_wrong_parity_is_noticed() -> None:
    good = kernels.kernel().parity
    assert parity_right(good)
    assert parity_right(NUMPY)

    def of_another_field(target: int, source: int, nbytes: int, coefficient: int) -> None:
        good.multiply_add(target, source, nbytes, coefficient ^ 1 if coefficient > 1 else coefficient)

    def short_of_the_end(target: int, source: int, nbytes: int, coefficient: int) -> None:
        good.multiply_add(target, source, nbytes - nbytes % 16, coefficient)

    def beyond_the_end(target: int, source: int, nbytes: int, coefficient: int) -> None:
        good.multiply_add(target, source, nbytes, coefficient)
        ctypes.memset(target + nbytes, 0, 1)

    def without_the_fifth(matrix: Bytes, sources: Sequence[int], targets: Sequence[int], nbytes: int) -> None:
        good.combine(np.delete(matrix, slice(4, 5), axis=0), sources, [*targets[:4], *targets[5:]], nbytes)

    for wrong in (of_another_field, short_of_the_end, beyond_the_end):
        assert not parity_right(Parity("wrong", wrong, good.combine))
    assert not parity_right(Parity("wrong", good.multiply_add, without_the_fifth))


def test_works_without_the_gil(noise: Bytes) -> None:
    """Where threads never take turns by themselves, one that does nothing but call a kernel still lets others run."""
    kernels.kernel()  # looking for it would let others run, too
    block = np.zeros(1 << 16, np.uint8)
    running, seen = threading.Event(), threading.Event()
    let_in: list[bool] = []

    def work() -> None:
        deadline_s = time.monotonic() + 20
        running.set()
        while not seen.is_set() and time.monotonic() < deadline_s:
            multiply_add(block.ctypes.data, noise.ctypes.data, len(block), 3)
        let_in.append(seen.is_set())

    thread = threading.Thread(target=work)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        thread.start()
        running.wait()
        seen.set()
        thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert let_in == [True]


def test_isal_is_found_here() -> None:
    assert kernels.kernel().checksums.name.startswith("ISA-L")
    assert kernels.kernel().parity.name.startswith("ISA-L")


@pytest.mark.usefixtures("_fresh_kernel")
class TestFallback:
    def test_without_isal(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, noise: Bytes
    ) -> None:
        checksum = crc32c(noise, 5)
        expected = noise[:999].copy()
        multiply_add(expected.ctypes.data, noise.ctypes.data, 999, 7)
        kernels.kernel.cache_clear()
        monkeypatch.setattr(kernels, "_isal_paths", lambda: iter(["/nowhere/libisal.so.2"]))
        monkeypatch.setattr(kernels, "_COPY_BYTES", 998)
        with caplog.at_level(logging.WARNING):
            assert crc32c(noise, 5) == checksum
            assert crc32c(b"", 5) == 5
            found = noise[:999].copy()
            multiply_add(found.ctypes.data, noise.ctypes.data, 999, 7)
        assert np.array_equal(found, expected)
        assert len(caplog.records) == 1
        assert "google-crc32c" in caplog.text
        assert "NumPy" in caplog.text

    def test_a_wrong_isal_is_not_used(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(kernels, "_isal_paths", lambda: iter(["here"]))
        monkeypatch.setattr(
            kernels, "_isal_checksums", lambda path: Checksums("wrong", lambda address, nbytes, value: 0)
        )
        monkeypatch.setattr(kernels, "_isal_parity", lambda path: Parity("wrong", lambda *_: None, lambda *_: None))
        with caplog.at_level(logging.WARNING):
            assert kernels.kernel().checksums.name == "google-crc32c"
            assert kernels.kernel().parity.name == "NumPy"
        assert "wrong checksums" in caplog.text
        assert "wrong parity" in caplog.text

    def test_nothing_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "_isal_paths", lambda: iter(()))
        monkeypatch.setattr(kernels, "_google_crc32c_at", lambda address, nbytes, value: 1)
        with pytest.raises(ConfigError, match="no library"):
            kernels.kernel()

    def test_a_library_without_the_functions_is_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        good = next(kernels._isal_paths())
        wrong = str(Path(good).with_name("libnullcode-pyeclib.so.1"))
        monkeypatch.setattr(kernels, "_isal_paths", lambda: iter([wrong, good]))
        assert good in kernels.kernel().checksums.name
        assert good in kernels.kernel().parity.name

    def test_a_library_with_checksums_only_gives_those(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def lacking(path: str) -> Parity:
            raise AttributeError(f"{path}: undefined symbol: ec_init_tables")

        monkeypatch.setattr(kernels, "_isal_parity", lacking)
        with caplog.at_level(logging.WARNING):
            loaded = kernels.kernel()
        assert loaded.checksums.name.startswith("ISA-L")
        assert loaded.parity.name == "NumPy"
        assert len(caplog.records) == 1
        assert "google-crc32c" not in caplog.text


def test_loading_imports_neither_pyeclib_nor_torch() -> None:
    script = (
        "import sys; from holdfast.erasure.kernel import crc32c; assert crc32c(b'123456789') == 0xE3069283;"
        "assert not {'torch', 'pyeclib', 'google_crc32c'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
