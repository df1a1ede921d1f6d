"""Named places at which a process can be told to die, so that tests can kill it between any two lines that matter.

``HOLDFAST_CRASH="seal.before-record=3,..."`` makes the third arrival at that place SIGKILL the process: nothing is
flushed, unwound or handed over, exactly as in a real kill. Without the variable, ``reach`` is one falsy test.
"""

from __future__ import annotations

import os
import signal
from typing import Final

PLACES: Final = frozenset(
    {
        "capture.before-open",  # trainer: decided to snapshot; the old slot is still sealed
        "capture.opened",  # trainer: the slot is unsealed, nothing is copied yet
        "capture.inside-copy",  # trainer: some of the lazy tensors are copied
        "capture.copied",  # trainer: all is copied, the agent does not know
        "fence.before-commit",  # trainer: torn-copy check passed, commit word not yet stored
        "fence.committed",  # trainer: commit word stored, the agent not yet told
        "seal.before-tables",  # agent: image checksummed, nothing of it written
        "seal.before-record",  # agent: tables written, record not
        "seal.after-record",  # agent: record written, trainer not told
        "adopt.scanned",  # agent: slots of a predecessor found, none served yet
        "bulk.first-block",  # sending agent: a stream is admitted, none of its blocks is sent
        "bulk.mid-stream",  # sending agent: the first block is handed to the kernel, the rest is not
        "attach.reserved",  # agent: a slot file exists, its memory does not yet
        "combine.mid-stripe",  # agent: one piece of parity, or of an image that is fetched or rebuilt, is in its place
        "parity.before-record",  # agent: parity accumulated and checksummed, not yet recorded
        "parity.sealed",  # agent: parity counts, nobody told
        "rebuild.begun",  # agent: a lost image is about to be computed
        "rebuild.verified",  # agent: computed and verified, not yet sealed
        "guarded.heard",  # trainer: its node has all its parity of a snapshot, the other ranks do not know
        "complete.unmarked",  # trainer: a snapshot is protected everywhere, its slot does not say so yet
        "complete.marked",  # trainer: the slot says so
        "spill.begun",  # agent: an image is verified in its slot, nothing of it is written to the tier
        "spill.metadata",  # agent: a spill has made what describes its arrays, and has written nothing
        "spill.chunk",  # agent: one more chunk is written, perhaps not yet durable
        "spill.written",  # agent: all of an image is written, perhaps not yet durable
        "spill.settled",  # agent: all of it is durable, no entry says so
        "spill.committed",  # agent: the entry is durable, nobody told
        "spill.temporary-made",  # whoever spills: an object's temporary file is there, empty
        "spill.temporary-written",  # all its bytes are written, not synced
        "spill.temporary-synced",  # synced, not yet under its name
        "spill.renamed",  # the object can be seen; its folders are not synced
        "spill.folders-synced",  # it is durable, and nobody told
        "spill.drafts-synced",  # the temporary files of many objects are synced, none has its name
        "spill.drafts-renamed",  # all have their names, the folders are not synced
        "restore.planned",  # trainer: every rank knows the plan, nothing is applied
        "restore.inside-apply",  # trainer: some live tensors are overwritten
        "restore.applied",  # trainer: all is applied, newer leftovers not yet discarded
        "prune.before-tombstone",  # whoever prunes: a snapshot is to go, nothing of it is touched
        "prune.buried",  # its tombstone stands, all of it is still there
        "prune.inside",  # some of its entries or data are gone
        "prune.emptied",  # nothing but its tombstone is left
    }
)


def _parse(text: str) -> dict[str, int]:
    wanted: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        place, _, count = item.partition("=")
        if place not in PLACES:
            raise ValueError(f"HOLDFAST_CRASH names {place!r}; known places: {', '.join(sorted(PLACES))}")
        wanted[place] = int(count or 1)
    return wanted


_armed: dict[str, int] = _parse(os.environ.get("HOLDFAST_CRASH", ""))


def arm(text: str) -> None:
    """Replace what the environment asked for. For processes that are forked, not started."""
    _armed.clear()
    _armed.update(_parse(text))


def reach(place: str) -> None:
    """Note that *place* is reached; die here if this is the arrival that was asked for."""
    if _armed and place in _armed:
        _armed[place] -= 1
        if _armed[place] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
