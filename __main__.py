"""``python -m holdfast`` is the command ``holdfast``."""

from .ops.cli import main

main()
