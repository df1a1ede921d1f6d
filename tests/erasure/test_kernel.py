"""The checksum kernels: known answers, agreement with the slow twin, blocks, the fallback."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from holdfast.erasure import kernel as kernels
from holdfast.erasure.kernel import BLOCK_BYTES, Kernel, block_checksums, crc32c, crc32c_at, crc32c_slow, self_check
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
    monkeypatch.setattr(kernels, "kernel", lambda: Kernel("failing", failing))
    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(RuntimeError, match="as a test"):
            block_checksums(noise.ctypes.data, noise.nbytes, 100, pool)
        at_return = calls
        pool.submit(int).result()
        assert calls == at_return


def test_self_check_notices_a_wrong_library() -> None:
    def bare_register(address: int, nbytes: int, value: int) -> int:
        """What forgetting the inversions would give."""
        return crc32c_slow(ctypes.string_at(address, nbytes), value ^ 0xFFFFFFFF) ^ 0xFFFFFFFF

    assert self_check(kernels.kernel())
    assert not self_check(Kernel("wrong", bare_register))
    assert not self_check(Kernel("blind to value", lambda address, nbytes, _: crc32c_at(address, nbytes)))


def test_isal_is_found_here() -> None:
    assert kernels.kernel().name.startswith("ISA-L")


@pytest.mark.usefixtures("_fresh_kernel")
class TestFallback:
    def test_without_isal(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, noise: npt.NDArray[np.uint8]
    ) -> None:
        expected = crc32c(noise, 5)
        kernels.kernel.cache_clear()
        monkeypatch.setattr(kernels, "_isal_paths", lambda: iter(["/nowhere/libisal.so.2"]))
        monkeypatch.setattr(kernels, "_COPY_BYTES", 999)
        with caplog.at_level(logging.WARNING):
            assert crc32c(noise, 5) == expected
            assert crc32c(b"", 5) == 5
        assert len(caplog.records) == 1
        assert "google-crc32c" in caplog.text

    def test_a_wrong_isal_is_not_used(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(kernels, "_isal_paths", lambda: iter(["here"]))
        monkeypatch.setattr(kernels, "_isal", lambda path: Kernel("wrong", lambda address, nbytes, value: 0))
        with caplog.at_level(logging.WARNING):
            assert kernels.kernel().name == "google-crc32c"
        assert "wrong checksums" in caplog.text

    def test_nothing_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "_isal_paths", lambda: iter(()))
        monkeypatch.setattr(kernels, "_google_crc32c_at", lambda address, nbytes, value: 1)
        with pytest.raises(ConfigError, match="no library"):
            kernels.kernel()

    def test_a_library_without_the_function_is_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        good = next(kernels._isal_paths())
        wrong = str(Path(good).with_name("libnullcode-pyeclib.so.1"))
        monkeypatch.setattr(kernels, "_isal_paths", lambda: iter([wrong, good]))
        assert good in kernels.kernel().name


def test_loading_imports_neither_pyeclib_nor_torch() -> None:
    script = (
        "import sys; from holdfast.erasure.kernel import crc32c; assert crc32c(b'123456789') == 0xE3069283;"
        "assert not {'torch', 'pyeclib', 'google_crc32c'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
