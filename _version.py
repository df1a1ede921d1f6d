"""The version of this package; trainers and agents of one job must agree on the protocol, not on this."""

__version__ = "0.1.0"
