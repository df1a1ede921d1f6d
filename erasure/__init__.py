"""Erasure coding: codes, bulk kernels, group placement and stripe geometry, over bytes and integers.

Nothing here knows tensors, sockets or files. Bulk bytes are named by address and length or by a buffer, are never
copied on the way to a kernel, and are worked on without the GIL.
"""
