"""``torch.distributed.checkpoint`` (DCP) on top of Holdfast: a ``Writer`` for its ``save``, a ``Reader`` for its ``load``.

``plans`` is what a DCP plan becomes in a snapshot, and what a snapshot says to DCP; ``saves`` takes the snapshots; ``opened``
reads them; ``numbers`` is which step a checkpoint's name means.
"""

from .reader import Reader
from .writer import Writer

__all__ = ["Reader", "Writer"]
