"""Generated states survive the codec; generated damage is told, or harmless, and never anything else."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
from holdfast.erasure.kernel import crc32c
from holdfast.errors import Corrupt
from holdfast.snapshot.codec import ALIGNMENT, decode, encode
from hypothesis import given
from hypothesis import strategies as st

text = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
simple = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | text
    | st.binary(max_size=90)
)
keys = st.recursive(
    simple.filter(lambda key: key == key), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4
)
arrays = st.builds(
    lambda dtype, shape: np.arange(math.prod(shape)).reshape(shape).astype(dtype),
    st.sampled_from(["?", "u1", "<i4", "<i8", "<f2", "<f8", "<c16"]),
    st.lists(st.integers(0, 4), max_size=3),
)
leaves = (
    simple
    | arrays
    | st.complex_numbers()
    | st.binary(max_size=90).map(bytearray)
    | st.builds(range, st.integers(), st.integers(), st.integers(1, 9))
    | st.lists(st.integers(-(2**63), 2**63), min_size=60, max_size=70)
    | st.lists(st.floats(), min_size=60, max_size=70)
    | st.frozensets(keys, max_size=5)
    | st.sets(keys, max_size=5)
    | st.integers(-(2**31), 2**31 - 1).map(np.int32)
    | st.floats(width=32).map(np.float32)
)
states: st.SearchStrategy[object] = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(text | st.just("$"), inner, max_size=5)
        | st.dictionaries(keys, inner, max_size=5)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(keys, st.integers(), max_size=3).map(Counter)
        | st.builds(deque, st.lists(inner, max_size=4), st.none() | st.integers(4, 9))
    ),
    max_leaves=12,
)


def written(state: object) -> bytearray:
    encoded = encode(state, "state")
    out = bytearray(encoded.nbytes)
    encoded.write_into(memoryview(out))
    return out


def shown(value: Any) -> str:
    """The types and bits of *value* as text: an obvious twin of what the codec must keep."""
    name = type(value).__name__
    if isinstance(value, np.ndarray | np.generic):
        return f"{name} {value.dtype} {value.shape} {value.tobytes().hex()}"
    if isinstance(value, set | frozenset):
        return f"{name} {sorted(map(shown, value))}"
    if isinstance(value, dict):
        return f"{name} {[(shown(key), shown(item)) for key, item in value.items()]}"
    if isinstance(value, deque):
        return f"{name} {value.maxlen} {[*map(shown, value)]}"
    if isinstance(value, list | tuple):
        return f"{name} {[*map(shown, value)]}"
    return f"{name} {value!r}"


def decoded_or_corrupt(data: bytes | bytearray) -> None:
    try:
        decode(data)
    except Corrupt as error:
        assert len(str(error)) < 500  # noqa: PT017 - any value will do too


@given(states)
def test_round_trip(state: object) -> None:
    data = written(state)
    found = decode(data)
    assert shown(found) == shown(state)
    assert written(found) == data


@given(states, st.data())
def test_damage(state: object, data: st.DataObject) -> None:
    encoded = written(state)
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    decoded_or_corrupt(encoded[: data.draw(st.integers(0, len(encoded)) | st.just(len(encoded)))])


def sealed(body: bytes, raw: bytes) -> bytes:
    start = -(-(32 + len(body)) // ALIGNMENT) * ALIGNMENT
    prefix, sizes = struct.pack("<8sI", b"HFSTATE\0", 1), struct.pack("<QQ", len(body), start + len(raw))
    head = prefix + struct.pack("<I", crc32c(prefix + sizes + body)) + sizes + body
    return head.ljust(start, b"\0") + raw


@given(states, st.data())
def test_damaged_text_under_a_right_checksum(state: object, data: st.DataObject) -> None:
    encoded = written(state)
    (text_bytes,) = struct.unpack_from("<Q", encoded, 16)
    body = encoded[32 : 32 + text_bytes]
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(
            st.integers(0, 255) | st.sampled_from(b'0123456789"[]{},:$')
        )
    start = -(-(32 + text_bytes) // ALIGNMENT) * ALIGNMENT
    decoded_or_corrupt(sealed(bytes(body), bytes(encoded[start:])))


TAGS = [
    *("int", "float", "complex", "bytes", "bytearray", "range", "ints", "floats", "tuple", "deque", "set", "frozenset"),
    *("dict", "OrderedDict", "Counter", "array", "scalar", "raw", "tagged"),
]
numbers = st.sampled_from([0, 1, 2, 8, 64, 128, -1, 2**62, 2**63, 2**200, 0.5, True])
words = st.sampled_from([*TAGS, "<f4", "|u1", "O", "nan", "0x10", "00", "00000000", "t", "\ud800"])
trees: st.SearchStrategy[object] = st.recursive(
    st.none() | numbers | words | st.just([]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.fixed_dictionaries(
            {"$": st.sampled_from(TAGS)},
            optional={
                "v": inner | st.lists(numbers | words, max_size=4),
                "hex": words,
                "at": numbers,
                "nbytes": numbers,
                "dtype": words,
                "shape": st.lists(numbers, max_size=3),
                "maxlen": numbers,
                "tag": words,
            },
        )
        | st.dictionaries(words, inner, max_size=3)
    ),
    max_leaves=15,
)


@given(trees, st.sampled_from([0, 8, 64, 128, 192]))
def test_any_tree_under_a_right_checksum(tree: object, raw_bytes: int) -> None:
    decoded_or_corrupt(sealed(json.dumps(tree).encode(), bytes(raw_bytes)))
