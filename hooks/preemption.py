"""A preemption notice: the signal by which a scheduler says that this process will be killed soon."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Final

from ..errors import HoldfastError

_log = logging.getLogger(__name__)
SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)
_TRIES: Final = 8  # steps at which a last snapshot is tried, when the job is to end


class Notice:
    """Whether a notice has come, by a signal or otherwise, and how much of the time that it leaves is left.

    Some launchers pass on what the scheduler has sent to every process anyway, so the same signal may come twice. Only once the
    grace is over does one do what it would have done without us.
    """

    def __init__(self, grace_s: float | None, signals: Sequence[signal.Signals] = SIGNALS) -> None:
        """Without *grace_s*, no signal is listened to. Signals can be had by the main thread only."""
        self.grace_s = grace_s
        self._given_s: float | None = None
        self._pid = os.getpid()
        self._former: dict[signal.Signals, Any] = {}
        if grace_s is None:
            return
        if threading.current_thread() is not threading.main_thread():
            _log.warning("not made on the main thread: signals give no preemption notice here")
            return
        for number in signals:
            self._former[number] = signal.signal(number, self._heard)

    @property
    def given(self) -> bool:
        """Whether it has come."""
        return self._given_s is not None

    @property
    def left_s(self) -> float:
        """What is left of the grace; all of it before a notice."""
        grace_s = self.grace_s or 0.0
        return grace_s if self._given_s is None else max(0.0, self._given_s + grace_s - time.monotonic())

    def give(self, reason: str) -> None:
        """Here it is. Later ones change nothing."""
        if self._given_s is None:
            self._given_s = time.monotonic()
            _log.warning("%s: a last snapshot is taken, and the job ends", reason)

    def close(self) -> None:
        """Have signals do again what they did before."""
        for number, former in self._former.items():
            if signal.getsignal(number) == self._heard:
                signal.signal(number, former if former is not None else signal.SIG_DFL)
        self._former.clear()

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        # No logging here: a handler runs between any two lines of the training loop, which may be logging.
        if os.getpid() == self._pid and self._given_s is None:
            self._given_s = time.monotonic()
        elif os.getpid() != self._pid or self.left_s == 0.0:  # a forked worker has nobody to ask whether it should stop
            signal.signal(number, self._former.get(signal.Signals(number)) or signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Ending:
    """The last step of a job that is to end.

    Attributes:
        over: what could be done for the state is done.
    """

    def __init__(self, notice: Notice, least_s: float) -> None:
        """*least_s*: what a wait may take even if nothing is left of the grace: some other rank's may be."""
        self.over = False
        self._notice = notice
        self._least_s = least_s
        self._tries = 0

    @property
    def _left_s(self) -> float:
        return max(self._notice.left_s, self._least_s)

    def goes_on(self, *, taken: bool, missed: bool, wait: Callable[[float], None]) -> bool:
        """Whether this is not the step at which the last snapshot is seen to safety.

        Args:
            taken: there is a snapshot of this step. Without one, *wait* waits so many seconds for a slot, and the next may do.
            missed: the other ranks have ended already.
        """
        if self.over:
            return True  # the loop goes on all the same, which is its business
        if missed:
            self.over = True
            _log.warning("the other ranks have ended without this one, which came too late to their last step")
            return True
        if not taken and self._tries < _TRIES:
            self._tries += 1
            wait(self._left_s / _TRIES / 2)
            return True
        return False

    def see(self, step: int, state: str, wait: Callable[[float], None]) -> None:
        """*wait*, for so many seconds, until the last snapshot, of *step*, is in that *state*."""
        self.over = True
        try:
            wait(self._left_s)
        except HoldfastError as error:
            _log.warning("the last snapshot, of step %d, could not be %s: %s", step, state, error)
        else:
            _log.warning("the last snapshot, of step %d, is %s", step, state)
