"""What ``pip install`` of the repository gives: one package, one command, nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    (wheel,) = tmp_path.glob("holdfast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"holdfast"}
    assert "holdfast/py.typed" in names
    assert not [name for name in names if name.startswith(("holdfast/tests", "holdfast/benchmarks", "holdfast/.venv"))]
    sources = {str(path.relative_to(ROOT)) for floor in ("agent", "erasure", "hooks", "ops", "snapshot", "storage")
               for path in (ROOT / floor).rglob("*.py")}  # fmt: skip
    assert sources <= {name.removeprefix("holdfast/") for name in names}
    code = "import holdfast, holdfast.ops.cli; print(holdfast.__file__, holdfast.__version__)"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )
    assert str(tmp_path) in shown.stdout
