"""Opens a snapshot in a folder as anybody would who has zarr and has never heard of Holdfast, and tells what is in it.

    python plain.py SNAPSHOT_FOLDER OUT.npz

Every array's bits go into OUT under its path; ``!`` and the path have its ``holdfast`` attributes, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import zarr


def main(folder: str, out: str) -> None:
    group = zarr.open_group(folder, mode="r")
    found: dict[str, Any] = {"!": json.dumps(group.attrs["holdfast"])}
    for path, member in group.members(max_depth=None):
        if isinstance(member, zarr.Array):
            found[path] = np.asarray(member[...], order="C")
            found[f"!{path}"] = json.dumps(member.attrs["holdfast"])
    assert "holdfast" not in sys.modules
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
