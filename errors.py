"""Every error that Holdfast raises on purpose. Each says whether to retry, repair or give up.

    HoldfastError
    ├── ConfigError                 a setting, argument or environment is wrong             give up   2
    │   └── BudgetExceeded          declared or available memory does not suffice           repair    3
    ├── StateRefused                a value of the training state cannot be captured        repair    4
    ├── AgentError
    │   ├── AgentUnreachable        no agent answers, or it went away                       retry     5
    │   ├── AgentMismatch           an agent of another version or another job              repair    6
    │   ├── AgentUntrusted          it, or its socket or folder, is not one of ours         give up   7
    │   ├── RankTaken               a living trainer already holds this rank                repair    8
    │   └── StreamBroken            a stream of blocks ended early, or was not as agreed    retry    18
    ├── DeadlinePassed              a wait ended without what it waited for                 retry     9
    ├── SnapshotError
    │   ├── SnapshotSkipped         this snapshot was not taken, or was discarded           retry    10
    │   ├── StateUnreachable        the wanted state cannot be reached in this set-up       repair   11
    │   ├── SnapshotUnknown         no such snapshot here                                   give up  12
    │   ├── SnapshotLost            a snapshot existed, and can no longer be had            give up  13
    │   ├── Corrupt                 bytes do not match their checksum                       repair   14
    │   ├── LayoutMismatch          the live model and the snapshot differ                  repair   15
    │   ├── RestoreDiverged         ranks that must agree hold different bytes              give up  16
    │   └── SourceGone              a peer no longer holds the bytes it was asked for       give up  19
    ├── TierError
    │   ├── TierUnreachable         a tier does not answer, or refuses the operation        retry    20
    │   ├── TierFull                a tier has no room for more                             repair   21
    │   └── ObjectMissing           an object that a tier should hold is not there          repair   22
    └── PeerFailed                  another rank could not do its part                      repair   17

The number is the exit code of the command line for that kind of failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import ClassVar


class Remedy(Enum):
    """What the caller of a failed operation should do."""

    RETRY = "retry"  # the same call may succeed later
    REPAIR = "repair"  # something named in the message must change first
    GIVE_UP = "give up"  # no retry and no repair brings it back


class HoldfastError(Exception):
    """Root of the tree. ``remedy`` and ``exit_code`` are fixed per class."""

    remedy: ClassVar[Remedy] = Remedy.GIVE_UP
    exit_code: ClassVar[int] = 1


class ConfigError(HoldfastError):
    """A setting, an argument or the environment is wrong."""

    exit_code = 2


class BudgetExceeded(ConfigError):
    """Memory that was declared, or is there, does not suffice. Raised before training starts."""

    remedy = Remedy.REPAIR
    exit_code = 3


class StateRefused(HoldfastError):
    """A value in the training state cannot be captured. The message names its path in the state."""

    remedy = Remedy.REPAIR
    exit_code = 4


class AgentError(HoldfastError):
    """Something about the agent of this node."""


class AgentUnreachable(AgentError):
    """No agent answers at the address, or the connection to it broke."""

    remedy = Remedy.RETRY
    exit_code = 5


class AgentMismatch(AgentError):
    """The agent speaks another protocol version, or belongs to another job."""

    remedy = Remedy.REPAIR
    exit_code = 6


class AgentUntrusted(AgentError):
    """The agent's socket or folder belongs to another user, or others may write to it; or TLS: it, or we, lack a
    certificate that the other accepts."""

    exit_code = 7


class RankTaken(AgentError):
    """A living trainer already holds this rank's arena."""

    remedy = Remedy.REPAIR
    exit_code = 8


class StreamBroken(AgentError):
    """A stream of blocks from another agent ended early, or carried something else than was agreed."""

    remedy = Remedy.RETRY
    exit_code = 18


class DeadlinePassed(HoldfastError):
    """A wait ended without what it waited for. The message names what, and for how long."""

    remedy = Remedy.RETRY
    exit_code = 9


class SnapshotError(HoldfastError):
    """Something about one snapshot."""


class SnapshotSkipped(SnapshotError):
    """The snapshot was not taken, or was discarded. The message gives the reason."""

    remedy = Remedy.RETRY
    exit_code = 10


class StateUnreachable(SnapshotError):
    """The wanted state (``protected``, ``persisted``) cannot be reached in this set-up."""

    remedy = Remedy.REPAIR
    exit_code = 11


class SnapshotUnknown(SnapshotError):
    """No snapshot of that name is held here."""

    exit_code = 12


class SnapshotLost(SnapshotError):
    """A complete snapshot is known to have existed, and can no longer be had."""

    exit_code = 13


class Corrupt(SnapshotError):
    """Bytes do not match their checksum, or a record is damaged beyond repair. Another copy may serve."""

    remedy = Remedy.REPAIR
    exit_code = 14


class LayoutMismatch(SnapshotError):
    """The live model and the snapshot differ in names, shapes or dtypes; the message lists the differences."""

    remedy = Remedy.REPAIR
    exit_code = 15


class RestoreDiverged(SnapshotError):
    """After a restore, ranks that must hold the same bytes do not. Nothing restored may be trained on."""

    exit_code = 16


class SourceGone(SnapshotError):
    """Another agent no longer holds the bytes that it was asked for: their slot has been filled anew."""

    exit_code = 19


class TierError(HoldfastError):
    """Something about a tier below memory. The message names the tier and the operation."""


class TierUnreachable(TierError):
    """A tier does not answer in time, refuses the operation, or its device fails."""

    remedy = Remedy.RETRY
    exit_code = 20


class TierFull(TierError):
    """A tier has no room for more: its disk or a quota is full. What was being written is removed again."""

    remedy = Remedy.REPAIR
    exit_code = 21


class ObjectMissing(TierError):
    """An object that a tier should hold is not there. Another tier may have it."""

    remedy = Remedy.REPAIR
    exit_code = 22


class PeerFailed(HoldfastError):
    """Another rank could not do its part of a collective operation; the message names the rank and its reason."""

    remedy = Remedy.REPAIR
    exit_code = 17


def every_error(root: type[HoldfastError] = HoldfastError) -> Iterator[type[HoldfastError]]:
    """All classes of the tree, parents first. Used to carry an error over the wire by its name."""
    yield root
    for child in root.__subclasses__():
        yield from every_error(child)
