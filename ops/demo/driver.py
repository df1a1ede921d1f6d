"""Runs the reference, runs the attacked run and kills it as planned, and leaves nothing behind but the records."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from ...agent.settings import NodeSettings
from ...erasure.placement import Protection
from ...errors import ConfigError, DeadlinePassed, HoldfastError
from ...storage.tiers import parse_url
from .journal import (
    LOG_NAME,
    TIER_NAME,
    Follower,
    LifeStarted,
    RankRecord,
    StepDone,
    Stopped,
    announced,
    clear,
    clear_tier,
    finished,
    read_run,
)
from .launcher import Launcher, Torchrun, Workers
from .nodes import Node, Simulated
from .schedule import Aim, Landed, Planned, Progress, Target, advanced, due, plan_kills
from .verdict import Verdict, judge
from .victims import EXIT_S, Job, Victim

POLL_S: Final = 0.005
SILENCE_S: Final = 90.0
SILENCE_OF_RANK_S: Final = 10.0
"""Longest time without a step that is waited for, and more for every rank: several times what a restart takes on a busy
machine."""
GRACE_S: Final = 60.0
_FIRST_STEP_S: Final = 0.03
_SPARE_RESTARTS: Final = 3
_NOT_FOR_US: Final = ("HOLDFAST_AGENT", "HOLDFAST_CONFIG")
_LOG_LINES: Final = 10
_ERROR_LINE: Final = re.compile(r"(\[rank\d+\]: ?)?(?!.*ChildFailedError)((\w+\.)+[A-Z]\w+|\w+Error): ")


@dataclass(frozen=True, slots=True)
class Plan:
    """What the user asked for. *ranks* are those of each node; several nodes are simulated ones.

    *targets* take turns over *kills*. ``permute``: whether ranks move to other nodes whenever the job starts again.
    ``timeout_s`` is for both runs together. ``tier`` is a path or a URL; a run spills into a folder of its own under it.
    """

    nodes: int
    ranks: int
    protect: str
    permute: bool
    strategy: str
    steps: int
    targets: Sequence[Aim]
    kills: int
    seed: int
    out: Path
    timeout_s: float
    tier: str | None = None

    @property
    def preempts(self) -> bool:
        """Whether preemption notices are to be given."""
        return self.kills > 0 and any(aim.target is Target.PREEMPT for aim in self.targets)

    def tier_of(self, job: str) -> str | None:
        """URL of the tier that *job* spills to; a preemption needs one, so it gets one in ``out`` if none was named."""
        if self.tier is not None:
            return f"{parse_url(self.tier)}/{job}"  # others may have snapshots there
        return parse_url(str(self.out.absolute() / TIER_NAME)) if self.preempts else None

    @property
    def world(self) -> int:
        """Training processes on all nodes together."""
        return self.nodes * self.ranks

    def check(self) -> None:
        """Raise ``ConfigError`` if more nodes are to be lost at once than the protection is there for, or the tier is none."""
        if self.tier is not None and parse_url(self.tier).startswith("memory://"):
            raise ConfigError(f"--tier {self.tier}: it would be gone with the agents")
        most = max((aim.count for aim in self.targets if aim.target is Target.NODE), default=0)
        spared = Protection.parse(self.protect).shape(self.nodes)[1]
        if most > spared:
            raise ConfigError(
                f"--kill {','.join(['node'] * most)}: with --nodes {self.nodes} --protect {self.protect}, {spared or 'no'} "
                f"node{'s' if spared > 1 else ''} of a group may be lost at once"
            )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Both runs and the verdict. ``relaunches`` counts how often the launcher gave up and was started again.

    ``tier``: URL of where the attacked run's snapshots lie, or None.
    """

    verdict: Verdict
    reference: Sequence[RankRecord]
    attacked: Sequence[RankRecord]
    landed: Sequence[Landed]
    relaunches: int
    tier: str | None


Watch = Callable[[str, Progress, int], None]
"""Called with the name of the run, its progress and the number of kills so far, at every look at it."""


def run_demo(plan: Plan, watch: Watch) -> Outcome:
    """Run *plan*: reference, attack, judgement. Records go to ``plan.out/{reference,attacked}`` and ``kills.json``.

    Raises:
        ConfigError: the plan cannot be carried out.
        DeadlinePassed: a run did not end, or made no step, in time.
        HoldfastError: a run ended by itself, without having been killed.
    """
    plan.check()
    planned = plan_kills(
        plan.seed, kills=plan.kills, targets=plan.targets, steps=plan.steps, ranks=plan.world, nodes=plan.nodes
    )
    deadline = time.monotonic() + plan.timeout_s
    with _terminable():
        with Run(plan, "reference", deadline, protected=False) as reference:
            while reference.goes_on():
                watch("reference", reference.progress, 0)
        with Run(plan, "attacked", deadline, protected=True) as attacked:
            landed = _attack(attacked, planned, watch)
    (plan.out / "kills.json").write_text(json.dumps([asdict(kill) for kill in landed], default=lambda kind: kind.value))
    expected, found = read_run(reference.folder, plan.world), read_run(attacked.folder, plan.world)
    verdict = judge(expected, found, landed, steps=plan.steps, moved=attacked.moved)
    return Outcome(verdict, expected, found, landed, attacked.relaunches, attacked.tier)


def _attack(run: Run, planned: Sequence[Planned], watch: Watch) -> list[Landed]:
    """Let *run* go on to its end, and kill as *planned*, each as soon as it is due and its victims are all alive."""
    landed: list[Landed] = []
    waiting = deque(planned)
    while run.goes_on():
        watch("attacked", run.progress, len(landed))
        if waiting and due(waiting[0], run.progress, landed[-1] if landed else None):
            time.sleep(waiting[0].fraction * run.step_s)
            with run.job.victims(waiting[0], run.progress.life) as victims:
                if victims:
                    landed.append(_kill(run, waiting.popleft(), victims))
    return landed


def _kill(run: Run, kill: Planned, victims: Sequence[Victim]) -> Landed:
    if kill.target is Target.PREEMPT:
        return _preempt(run, kill, victims)
    wall_s = time.time()
    for victim in victims:
        victim.send(signal.SIGKILL)
    lost = run.lose(kill.nodes, victims) if kill.target is Target.NODE else ()
    names = [victim.name for victim in victims]
    return Landed(kill.target, run.progress.life, run.progress.step, wall_s, names, lost)


def _preempt(run: Run, kill: Planned, ranks: Sequence[Victim]) -> Landed:
    """Tell one rank that it will be killed soon, and leave the rest to the job."""
    life, step, noticed = run.progress.life, run.progress.step, ranks[kill.rank]
    wall_s, began_s = time.time(), time.monotonic()
    noticed.send(signal.SIGTERM)
    run.see_out(ranks)
    exit_s = round(time.monotonic() - began_s, 3)
    return Landed(kill.target, life, step, wall_s, [noticed.name], exit_s=exit_s)


class Run:
    """One training run. A context: at its end no process and no shared memory of the run is left.

    Attributes:
        progress: as of the last ``goes_on``.
        relaunches: how often the launcher had given up and was started again.
        moved: the lives that ended because they were preempted; after each, the job went on with none of its machines.
        tier: URL of the tier that it spills to, or None.
    """

    def __init__(self, plan: Plan, name: str, deadline: float, *, protected: bool) -> None:
        """*deadline*: when the run must have ended, on the monotonic clock."""
        self.folder = (plan.out / name).absolute()
        self.progress = Progress()
        self.relaunches = 0
        self.moved: list[int] = []
        self._plan, self._name, self._deadline, self._protected = plan, name, deadline, protected
        # A name of its own: an agent or snapshots of another demo must never be taken for this one's.
        self._settings = NodeSettings.read({}, job=f"demo-{os.getpid()}-{secrets.token_hex(4)}")
        self.tier = plan.tier_of(self._settings.job) if protected else None
        self._simulated = self._simulate() if plan.nodes > 1 else None
        here = Node("", self._settings.shm, tuple(range(plan.world)))
        self._nodes = self._simulated.nodes if self._simulated else [here]
        self.job = Job(self.folder, self._nodes)
        self._launcher = self._make_launcher()
        self._followers = [Follower(self.folder, rank) for rank in range(plan.world)]
        self._recent: deque[StepDone] = deque(maxlen=20)
        self._heard = time.monotonic()
        self._launched_at_step = 0
        self._stopped: dict[int, int] = {}  # by rank, the newest life that ended because of a notice

    def _simulate(self) -> Simulated:
        plan = self._plan
        return Simulated(
            self._settings, self.folder, count=plan.nodes, ranks=plan.ranks, agents=self._protected,
            permute=plan.seed if plan.permute else None,
        )  # fmt: skip

    def _make_launcher(self) -> Launcher:
        plan = self._plan
        arguments = [f"--out={self.folder}", f"--steps={plan.steps}", f"--seed={plan.seed}"]
        arguments += [f"--strategy={plan.strategy}", *([f"--protect={plan.protect}"] if self._protected else [])]
        arguments += [f"--tier={self.tier}"] if self.tier else []
        arguments += [f"--grace={GRACE_S}"] if self._protected and plan.preempts else []
        environment = _environment(self._settings)
        restarts = plan.kills + _SPARE_RESTARTS if self._protected else 0
        if self._simulated:
            return Workers(self.folder, arguments, environment, nodes=self._simulated, restarts=restarts)
        return Torchrun(self.folder, arguments, environment, ranks=plan.ranks, restarts=restarts)

    def __enter__(self) -> Self:
        clear(self.folder)
        if self.tier is not None and self._plan.tier is None:
            clear_tier(self._plan.out)
        with contextlib.ExitStack() as undo:
            undo.callback(self._close)
            self._launcher.start(first_life=0)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._launcher.end()
        # torchrun puts every rank into a session of its own; had it to be killed, they would outlive it.
        self.job.kill_ranks()
        if self._protected:
            self.job.dismiss_agents()
        if self._simulated:
            self._simulated.close()

    def lose(self, indices: Sequence[int], victims: Sequence[Victim]) -> list[str]:
        """The processes of these nodes, *victims*, have been killed: delete their memory too. Returns their names."""
        for victim in victims:
            victim.ended(EXIT_S)
        lost = [self._nodes[index] for index in indices]
        for node in lost:
            node.lose()
        return [node.name for node in lost]

    def see_out(self, ranks: Sequence[Victim]) -> None:
        """Wait until *ranks*, which have been told to, have ended."""
        for rank in ranks:
            while not rank.ended(POLL_S):
                self._read_news()
                self._check_time()

    @property
    def step_s(self) -> float:
        """How long a step of rank 0 takes, the median of recent ones of one life."""
        gaps = [
            after.wall_s - before.wall_s
            for before, after in itertools.pairwise(self._recent)
            if after.life == before.life
        ]
        return statistics.median(gaps) if gaps else _FIRST_STEP_S

    def goes_on(self) -> bool:
        """Wait a moment, and see what is new. False once training has ended well."""
        time.sleep(POLL_S)
        # Asked before the journals are read: what a run wrote before its end must not be missed.
        code = self._launcher.poll()
        self._read_news()
        if code == 0 and finished(self.folder, self._plan.world):
            return False
        if code == 0:
            self._move()
        elif code is not None:
            self._relaunch(code)
        self._check_time()
        return True

    def _read_news(self) -> None:
        for rank, follower in enumerate(self._followers):
            for event in follower.news():
                self._heard = time.monotonic()
                match event:
                    case LifeStarted():
                        self.progress = advanced(self.progress, event.life, event.start)
                    case StepDone():
                        loss = float.fromhex(event.loss) if rank == 0 else None
                        self.progress = advanced(self.progress, event.life, event.step, loss)
                        if rank == 0:
                            self._recent.append(event)
                    case Stopped():
                        self._stopped[rank] = event.life

    def _move(self) -> None:
        """Every rank exited with 0 before the end of training, as it does when it is preempted: take the machines away, and
        start the job again elsewhere, as a scheduler would."""
        life, world = self.progress.life, self._plan.world
        here = [rank for rank in range(world) if self._stopped.get(rank) != life]
        if here or self.progress.newest_step <= self._launched_at_step:
            raise HoldfastError(
                f"the {self._name} run ended by itself with code 0 at step {self.progress.step} of {self._plan.steps}"
                + (f"; ranks {here} were not preempted" if here else ", without a step")
                + f".\n{self._log_excerpt()}"
            )
        self.job.take_machines()
        if not self._simulated:  # there is no other machine: this one, empty, takes its own place
            self._nodes[0].lost = False
        self.moved.append(life)
        self._launched_at_step = self.progress.newest_step
        self._launcher.start(life + 1)

    def _relaunch(self, code: int) -> None:
        """Start the launcher again, as a cluster would, if the job had come further under the last one."""
        if not self._protected or self.progress.newest_step <= self._launched_at_step:
            raise HoldfastError(f"the {self._name} run ended by itself with code {code}.\n{self._log_excerpt()}")
        self.relaunches += 1
        self._launched_at_step = self.progress.newest_step
        entries = (announced(self.folder, rank) for rank in range(self._plan.world))
        self._launcher.start(1 + max((entry["life"] for entry in entries if entry), default=-1))

    def _check_time(self) -> None:
        now = time.monotonic()
        where = f"the {self._name} run, now at step {self.progress.step} of {self._plan.steps}"
        if now > self._deadline:
            raise DeadlinePassed(f"waited {self._plan.timeout_s:g} s for {where}, to end.\n{self._log_excerpt()}")
        silence_s = SILENCE_S + SILENCE_OF_RANK_S * self._plan.world
        if now > self._heard + silence_s:
            raise DeadlinePassed(f"waited {silence_s:g} s for the next step of {where}.\n{self._log_excerpt()}")

    def _log_excerpt(self) -> str:
        """What the log says of the trouble: the errors in it, as torchrun's own report at its end names no reason."""
        path = self.folder / LOG_NAME
        lines = path.read_text(errors="replace").splitlines()
        errors = [line for line in lines if _ERROR_LINE.match(line)]
        return "\n".join([f"From {path}:", *(f"  {line}" for line in (errors or lines)[-_LOG_LINES:])])


def _environment(settings: NodeSettings) -> Mapping[str, str]:
    """That of this process, with the job of its own; the user's agent and settings are left out of it."""
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_US}
    environment |= {"HOLDFAST_JOB": settings.job, "HOLDFAST_SHM": str(settings.shm)}
    # More threads than one would sum in an order that depends on timing: no run would equal another.
    return environment | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end this block as Ctrl-C does, by an exception, so that every context in it is left properly."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, lambda signum, _frame: sys.exit(128 + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
