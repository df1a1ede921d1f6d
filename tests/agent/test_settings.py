"""Where a job's agent lives: what overrides what, which names can be used, and whose folder it must be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from holdfast.agent.settings import NodeSettings, check_owner, default_job, job_hash, prepare_folder
from holdfast.errors import AgentUntrusted, ConfigError


def read(environment: dict[str, str] | None = None, **explicit: str) -> NodeSettings:
    return NodeSettings.read(environment or {}, script="/home/me/train.py", **explicit)


# -- what overrides what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "explicit", "job"),
    [
        ({"HOLDFAST_JOB": "b", "SLURM_JOB_ID": "c"}, {"job": "a"}, "a"),
        ({"HOLDFAST_JOB": "b", "SLURM_JOB_ID": "77"}, {}, "b"),
        ({"SLURM_JOB_ID": "77"}, {}, "77"),
        ({"HOLDFAST_JOB": "", "SLURM_JOB_ID": "77"}, {}, "77"),
    ],
)
def test_the_jobs_name(environment: dict[str, str], explicit: dict[str, str], job: str) -> None:
    found = read(environment, **explicit)
    assert found.job == job
    assert found.shm == Path(f"/dev/shm/holdfast-{os.getuid()}/{job}")
    assert found.socket == found.shm / "agent.sock"
    assert found.autostart


@pytest.mark.parametrize(
    ("environment", "explicit", "shm"),
    [
        ({"HOLDFAST_SHM": "/dev/shm/b"}, {"shm": "/dev/shm/a"}, "/dev/shm/a"),
        ({"HOLDFAST_SHM": "/dev/shm/b"}, {}, "/dev/shm/b"),
        ({}, {"shm": "here"}, str(Path.cwd() / "here")),
    ],
)
def test_the_folder(environment: dict[str, str], explicit: dict[str, str], shm: str) -> None:
    found = read({"HOLDFAST_JOB": "j"} | environment, **explicit)
    assert (found.shm, found.socket) == (Path(shm), Path(shm) / "agent.sock")


@pytest.mark.parametrize(
    ("environment", "explicit", "socket"),
    [
        ({"HOLDFAST_AGENT": "/run/b.sock"}, {"socket": "/run/a.sock"}, "/run/a.sock"),
        ({"HOLDFAST_AGENT": "/run/b.sock"}, {}, "/run/b.sock"),
        ({"HOLDFAST_AGENT": "unix:/run/b.sock"}, {}, "/run/b.sock"),
        ({"HOLDFAST_AGENT": "unix:///run/b.sock"}, {}, "/run/b.sock"),
    ],
)
def test_an_agent_that_is_managed_elsewhere_is_not_started_here(
    environment: dict[str, str], explicit: dict[str, str], socket: str
) -> None:
    found = read(environment, **explicit)
    assert found.socket == Path(socket)
    assert not found.autostart


def test_no_other_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are those that were passed, whatever this process's own environment says."""
    for name in ("HOLDFAST_JOB", "HOLDFAST_SHM", "HOLDFAST_AGENT", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "/wrong")
    assert read({}) == read({"PATH": "/bin"})
    assert "wrong" not in str(read({}))


# -- names -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "x" * 64])
def test_names_that_can_be_used(name: str) -> None:
    assert read(job=name).job == name


@pytest.mark.parametrize("name", [".", "..", "../x", "a/b", "-a", "_a", ".a", "a b", "a\n", "a\0", "ä", "٣", "x" * 65])
def test_names_that_cannot(name: str) -> None:
    with pytest.raises(ConfigError, match="HOLDFAST_JOB"):
        read({"HOLDFAST_JOB": name})


def test_a_socket_path_that_cannot_be_bound() -> None:
    fits = "/" + "s" * 106
    assert read(socket=fits).socket == Path(fits)
    with pytest.raises(ConfigError, match=r"has 108 bytes, at most 107 .*HOLDFAST_SHM"):
        read(socket=fits + "s")
    with pytest.raises(ConfigError, match="109 bytes"):  # bytes are counted, not letters
        read(socket="/" + "ä" * 54)


def test_the_same_script_in_the_same_folder_is_the_same_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = default_job("train.py")
    assert default_job("train.py") == default_job(str(tmp_path / "train.py")) == first
    assert first.startswith("train-")
    assert default_job("other.py") != first
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert default_job(str(tmp_path / "train.py")) != first


@pytest.mark.parametrize(
    "script", ["", "-c", "/", "___", "ünï.py", "a b.py", ".hidden", "x" * 300, "-m", "t\udcff.py", "a.b.c"]
)
def test_whatever_runs_has_a_name_that_can_be_used(script: str) -> None:
    name = default_job(script)
    assert read(job=name).job == name
    assert NodeSettings.read({}, script=script).job == name


def test_the_program_that_runs_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/opt/jobs/pretrain.py"])
    assert default_job() == default_job("/opt/jobs/pretrain.py")
    monkeypatch.setattr("sys.argv", [""])  # an interactive interpreter
    assert read(job=default_job()).job.startswith("python-")


def test_job_hashes() -> None:
    """Part of the format of records: it must never change."""
    assert job_hash("demo") == 0x84684B356C51972A
    assert len({job_hash(f"job{i}") for i in range(100)}) == 100
    assert all(0 <= job_hash(f"job{i}") < 2**64 for i in range(100))


# -- whose folder ----------------------------------------------------------------------------------------------------------


def test_the_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "holdfast-1" / "job"
    prepare_folder(folder)
    prepare_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_folder_that_others_may_enter(tmp_path: Path, mode: int) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job").chmod(mode)
    with pytest.raises(AgentUntrusted, match=f"mode {mode:o}.*700 is needed"):
        prepare_folder(tmp_path / "job")


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "job").symlink_to(tmp_path / "real")
    with pytest.raises(AgentUntrusted, match="symbolic link"):
        prepare_folder(tmp_path / "job")


def test_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_folder(tmp_path / "job")
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(AgentUntrusted, match=f"belongs to uid {tmp_path.stat().st_uid}, not to uid 4242"):
        prepare_folder(tmp_path / "job")


def test_a_link_is_judged_itself_not_what_it_links_to(tmp_path: Path) -> None:
    (tmp_path / "socket").symlink_to("/nowhere")
    with pytest.raises(AgentUntrusted, match="symbolic link"):
        check_owner(tmp_path / "socket")
    with pytest.raises(FileNotFoundError):
        check_owner(tmp_path / "gone")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot make .*HOLDFAST_SHM"):
        prepare_folder(tmp_path / "job")
    with pytest.raises(ConfigError, match=r"cannot make .*HOLDFAST_SHM"):
        prepare_folder(tmp_path / "job" / "deeper")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_above_that_is_somebody_elses(tmp_path: Path) -> None:
    """``/dev/shm`` is everybody's: somebody else can have made ``holdfast-<uid>`` there first."""
    (tmp_path / "holdfast-0").mkdir()
    os.chown(tmp_path / "holdfast-0", 4242, 4242)
    with pytest.raises(AgentUntrusted):
        prepare_folder(tmp_path / "holdfast-0" / "job")
