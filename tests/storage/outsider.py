"""What plain zarr, in a process of its own that does not know this package, finds in a tier."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.names import data_of


@dataclass(frozen=True)
class Outsider:
    """Arrays by path, and their ``holdfast`` attributes; the group's own are under ""."""

    arrays: dict[str, npt.NDArray[Any]]
    facts: dict[str, dict[str, Any]]

    def bits(self, path: str) -> bytes:
        """The elements of an array, row-major."""
        return self.arrays[path].tobytes()


def look(tier: Path, id: SnapshotId, scratch: Path) -> Outsider:
    """Open the snapshot with nothing but zarr."""
    out = scratch / "found.npz"
    script = Path(__file__).with_name("plain.py")
    # -I: neither the folder of the script nor the environment tell Python where our package is.
    subprocess.run(
        [sys.executable, "-I", str(script), str(tier / data_of(id)), str(out)], check=True, timeout=120, cwd=scratch
    )
    with np.load(out, allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files if not name.startswith("!")}
        facts = {name[1:]: json.loads(str(held[name])) for name in held.files if name.startswith("!")}
    return Outsider(arrays, facts)
