"""``holdfast run`` with real processes: what the command gets, what comes back, and what becomes of the agent."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from holdfast.agent.client import AgentClient
from holdfast.agent.settings import NodeSettings
from holdfast.errors import AgentUnreachable, DeadlinePassed
from holdfast.ops.run import script_of

DEADLINE_S = 120.0
HOLDFAST = [sys.executable, "-P", "-m", "holdfast"]
# Counts the signals it gets and says so; ends on SIGTERM with the code it was given.
COUNTING = """
import signal, sys
def count(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number == signal.SIGTERM:
        sys.exit(33)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, count)
print("ready", flush=True)
while True:
    signal.pause()
"""
TRAINING = """
import os, signal, torch, holdfast
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with holdfast.Checkpointer(model=model, optimizer=optimizer) as ckpt:
    start = ckpt.restore() or 0
    print("start", start, flush=True)
    for step in range(start, 2):
        model(torch.ones(4)).sum().backward()
        optimizer.step()
        ckpt.wait(ckpt.snapshot(step + 1), "sealed", timeout_s=120)
        if start == 0:
            os.kill(os.getpid(), signal.SIGKILL)
print("done", flush=True)
"""


class Job:
    """A job of its own name in a folder of its own; ``run`` is ``holdfast run`` for it."""

    def __init__(self, folder: Path) -> None:
        self.settings = NodeSettings("job", folder, folder / "agent.sock", autostart=False)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}

    def arguments(self, *command: str) -> list[str]:
        return [*HOLDFAST, "run", "--job", "job", "--shm", str(self.settings.shm), "--", *command]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(*command), env=self.environment, capture_output=True, text=True, timeout=DEADLINE_S
        )

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Without a terminal, so that no signal reaches the command but through ``holdfast run``."""
        return subprocess.Popen(
            self.arguments(*command), env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def agent_pid(self) -> int | None:
        """The process of the agent that answers now."""
        try:
            with AgentClient.at(self.settings) as client:
                return client.status(timeout_s=30).pid
        except (AgentUnreachable, DeadlinePassed):
            return None

    def kill_agent(self) -> None:
        pid = self.agent_pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def job() -> Iterator[Job]:
    folder = Path(f"/dev/shm/hf-run-{uuid.uuid4().hex[:8]}")
    job = Job(folder)
    yield job
    with contextlib.suppress(AssertionError):
        job.kill_agent()
    shutil.rmtree(folder, ignore_errors=True)


def until(condition: Callable[[], bool]) -> None:
    """Return once *condition* holds; fail if that takes too long."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_the_command_gets_the_agents_address_and_its_arguments_word_by_word(job: Job) -> None:
    show = "import os, sys, json; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    done = job.run(sys.executable, "-c", show, "--job", "x y", "--", "$HOME", "")
    assert done.returncode == 0, done.stderr
    arguments, environment = json.loads(done.stdout)
    assert arguments == ["--job", "x y", "--", "$HOME", ""]
    assert environment["HOLDFAST_JOB"] == "job"
    assert environment["HOLDFAST_SHM"] == str(job.settings.shm)
    assert environment["HOLDFAST_AGENT"] == str(job.settings.socket)
    assert job.agent_pid() is not None  # it stays, by its own rule


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137), ("os.kill(os.getpid(), 15)", 143)]
)
def test_the_exit_code_is_the_commands(job: Job, end: str, code: int) -> None:
    assert job.run(sys.executable, "-c", f"import os, sys; {end}").returncode == code


def test_what_cannot_be_run_has_the_shells_exit_codes_and_starts_nothing(job: Job, tmp_path: Path) -> None:
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    plain.write_text("")
    assert job.run("no-such-program-anywhere").returncode == 127
    assert job.run(str(plain)).returncode == 126
    assert not job.settings.shm.exists()
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o700)
    assert job.run(str(broken)).returncode == 126


def test_signals_reach_the_command(job: Job) -> None:
    process = job.start(sys.executable, "-c", COUNTING)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 33


def test_what_is_ignored_stays_ignored(job: Job) -> None:
    """``nohup holdfast run`` protects the command, not only ``holdfast run``."""
    show = "import signal; print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    deaf = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *job.arguments(sys.executable, "-c", show)]
    done = subprocess.run(deaf, env=job.environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_ctrl_c_at_a_terminal_reaches_the_command_once(job: Job) -> None:
    ours, theirs = pty.openpty()
    # The first process of a session that opens a terminal has it as its own; only then does Ctrl-C make a signal of it.
    adopt = "import os, sys; os.open(sys.argv[1], os.O_RDWR); os.execv(sys.argv[2], sys.argv[2:])"
    process = subprocess.Popen(
        [sys.executable, "-c", adopt, os.ttyname(theirs), *job.arguments(sys.executable, "-c", COUNTING)],
        env=job.environment, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.write(ours, b"\x03")
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGUSR1)  # had the first been passed on as well, this would come after it
    assert process.stdout.readline() == "SIGUSR1\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=DEADLINE_S)[0] == "SIGTERM\n"
    assert process.returncode == 33
    os.close(ours)
    os.close(theirs)


def test_an_agent_that_dies_is_started_again(job: Job) -> None:
    process = job.start(sys.executable, "-c", COUNTING)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        former = job.agent_pid()
        job.kill_agent()
        until(lambda former=former: job.agent_pid() not in (None, former))  # type: ignore[misc]
    process.terminate()
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 33


def test_an_agent_that_runs_is_used(job: Job) -> None:
    assert job.run("true").returncode == 0
    first = job.agent_pid()
    assert job.run("true").returncode == 0
    assert (first is not None, job.agent_pid()) == (True, first)


def test_an_agent_managed_elsewhere_must_answer_and_is_not_started(job: Job) -> None:
    job.environment["HOLDFAST_AGENT"] = str(job.settings.socket)
    done = job.run("true")
    assert (done.returncode, "AgentUnreachable" in done.stderr) == (5, True)
    assert not job.settings.shm.exists()


def test_limits_reach_an_agent_that_is_started(job: Job) -> None:
    command = job.arguments("true")
    command[-2:-2] = ["--memory-limit", "64MiB", "--idle-exit", "never"]
    subprocess.run(command, env=job.environment, check=True, capture_output=True, timeout=DEADLINE_S)
    with AgentClient.at(job.settings) as client:
        assert client.status().limit_bytes == 64 << 20


@pytest.mark.slow
def test_a_command_that_failed_continues_when_run_again(job: Job, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    first = job.run(sys.executable, str(script))
    assert (first.returncode, first.stdout) == (137, "start 0\n"), first.stderr
    assert "/1 is held, and the same command continues from it" in first.stderr
    second = job.run(sys.executable, str(script))
    assert (second.returncode, second.stdout) == (0, "start 1\ndone\n"), second.stderr


def test_a_job_is_named_after_its_script_whatever_launches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "other.py", "job.sh", "conf.yaml"):
        Path(name).touch()
    assert script_of(["python", "train.py", "other.py"]) == "train.py"
    assert script_of(["torchrun", "--nproc-per-node", "2", "--conf", "conf.yaml", "train.py"]) == "train.py"
    assert script_of(["python", "-m", "torch.distributed.run", "train.py"]) == "train.py"
    assert script_of(["./train.py"]) == "./train.py"
    assert script_of(["torchrun", "-m", "package.train", "conf.yaml"]) == "package.train"
    assert script_of(["python", "-m", "torch.distributed.run", "-m", "package.train"]) == "package.train"
    assert script_of(["bash", "job.sh"]) == "job.sh"
    assert script_of(["true", "x" * 5000, "\n"]) == "true"
