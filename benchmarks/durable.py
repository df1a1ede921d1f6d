"""A state on disk, durably, and back: the bare limits, and the ways of others, each with its own fsyncs.

====================  ==================================================================================================
bare                  one file, written and read by one thread with O_DIRECT in large pieces; one fsync. The limit
torch.save            one file; fsync
dcp                   ``torch.distributed.checkpoint`` with its ``FileSystemWriter``, which fsyncs
safetensors           one file of a flat dict; fsync
====================  ==================================================================================================

Loading copies into tensors that are there already, as a restore into a live model does.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from workload import Workload

PEERS: Final = ("torch.save", "dcp", "safetensors")
Bytes = npt.NDArray[np.uint8]
State = dict[str, torch.Tensor]

_PIECE_BYTES: Final = 16 << 20
_BLOCK: Final = 4096
_UNITS: Final = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


def size_of(text: str) -> int:
    """Bytes from a text like ``256MB``."""
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text)


def state_of(workload: Workload) -> State:
    """Every tensor of the state under a name; the tensors themselves."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in workload.model.named_parameters()}
    state = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for parameter, moments in workload.optimizer.state.items():
        state |= {f"optimizer.{names[parameter]}.{key}": value for key, value in moments.items()}
    return state


def resident(nbytes: int) -> Bytes:
    """Page-aligned memory that is there: *nbytes*, rounded up to whole blocks, none of them zeros."""
    memory = np.frombuffer(mmap.mmap(-1, -(-nbytes // _BLOCK) * _BLOCK), np.uint8)
    memory[:] = 7
    return memory


# -- writing -----------------------------------------------------------------------------------------------------------


def write_bare(memory: Bytes, folder: Path) -> None:
    """*memory*, which begins on a page and is whole blocks, into one file; durable."""
    fd = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    try:
        at = 0
        while at < memory.nbytes:
            at += os.pwrite(fd, memory[at : at + _PIECE_BYTES].data, at)
        os.fsync(fd)
    finally:
        os.close(fd)
    _sync(folder)


def save(name: str, state: State, folder: Path) -> None:
    """Have *state* in *folder*, durably, as *name* does it."""
    _SAVE[name](state, folder)
    _sync(folder)
    _sync(folder.parent)


def _save_torch(state: State, folder: Path) -> None:
    torch.save(state, folder / "state.pt")
    _sync(folder / "state.pt")


def _save_dcp(state: State, folder: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

    save_dcp(state, storage_writer=FileSystemWriter(folder, sync_files=True), no_dist=True)


def _save_safetensors(state: State, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / "state.safetensors")
    _sync(folder / "state.safetensors")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_bare(memory: Bytes, folder: Path) -> None:
    """The file of ``write_bare``, into *memory*."""
    fd = os.open(folder / "bare", os.O_RDONLY | os.O_DIRECT)
    try:
        at = 0
        while at < memory.nbytes:
            at += os.preadv(fd, [memory[at : at + _PIECE_BYTES].data], at)
    finally:
        os.close(fd)


def load(name: str, state: State, folder: Path) -> None:
    """Read what ``save`` wrote into the tensors of *state*."""
    _LOAD[name](state, folder)


def _load_torch(state: State, folder: Path) -> None:
    _copy(state, torch.load(folder / "state.pt", weights_only=True))


def _load_dcp(state: State, folder: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_dcp

    load_dcp(state, storage_reader=FileSystemReader(folder), no_dist=True)


def _load_safetensors(state: State, folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "state.safetensors", framework="pt") as found:
        for name, tensor in state.items():
            tensor.copy_(found.get_tensor(name))


def _copy(state: State, found: State) -> None:
    for name, tensor in state.items():
        tensor.copy_(found[name])


_SAVE: Final[dict[str, Callable[[State, Path], None]]] = {
    "torch.save": _save_torch, "dcp": _save_dcp, "safetensors": _save_safetensors,
}  # fmt: skip
_LOAD: Final[dict[str, Callable[[State, Path], None]]] = {
    "torch.save": _load_torch, "dcp": _load_dcp, "safetensors": _load_safetensors,
}  # fmt: skip


def forget_files(folder: Path) -> str:
    """Have nothing of *folder* in the page cache, as far as this user may; says how."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return "posix_fadvise for each file"
    return "drop_caches"


# -- timing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds on the clock, and of the processor."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], Any], *others: int) -> Took:
    """What *work* takes, in this process and in those of which the numbers are given."""
    cpu_s, began_s = _cpu_s(others), time.perf_counter()
    work()
    wall_s = time.perf_counter() - began_s
    return Took(wall_s, _cpu_s(others) - cpu_s)


def _cpu_s(others: tuple[int, ...]) -> float:
    total = time.process_time()
    for pid in others:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def end_agent(shm: Path) -> None:
    """Ask the agent of that folder to end, and see that it does."""
    import signal

    try:
        pid = int((shm / "agent.pid").read_text())
        os.kill(pid, signal.SIGTERM)
    except (OSError, ValueError):
        return
    deadline_s = time.monotonic() + 20.0
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
