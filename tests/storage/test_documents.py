"""Sealed documents: what is changed is noticed, and only what is changed."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from holdfast.erasure.kernel import crc32c
from holdfast.errors import Corrupt
from holdfast.storage.documents import seal, unseal
from hypothesis import given, settings
from hypothesis import strategies as st

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), plain, max_size=5))
def test_both_ways(document: dict[str, Any]) -> None:
    sealed = seal(document)
    assert unseal(sealed, "it") == document
    assert unseal(json.dumps(json.loads(sealed), indent=3).encode(), "it") == document  # as an editor would leave it


def test_as_specified() -> None:
    crc = crc32c(b'{"a":[1,"\\u00e9"],"b":null}')
    assert json.loads(seal({"b": None, "a": [1, "é"]})) == {
        "crc32c": f"{crc:08x}",
        "document": {"a": [1, "é"], "b": None},
    }


def test_every_flipped_bit_is_noticed() -> None:
    document = {"name": "weight", "rows": [0, 17], "scale": 1.5}
    sealed = seal(document)
    for bit in range(8 * len(sealed)):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        with suppress(Corrupt):
            assert unseal(bytes(damaged), "it") == document  # white space, or a digit's case


def sealed_text(text: str) -> bytes:
    """With a right checksum, whatever it is."""
    return f'{{"crc32c":"{crc32c(text.encode()):08x}","document":{text}}}'.encode()


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{", b'{"crc32c":"00000000"}', b'{"document":{}}',
     sealed_text("[]"), sealed_text('"x"'),
     sealed_text('{"a":1,"a":2}'), sealed_text('{"a":NaN}'), sealed_text('{"a":Infinity}'), sealed_text('{"a":1e999}'),
     b"[" * 100_000,
     b'{"crc32c":"0","document":' + b'{"a":' * 50_000, seal({"a": 1})[:-3], seal({"a": 1}) + b"x",
     b'{"a":1,' + seal({"a": 1})[1:],
     sealed_text('{"a":' + "9" * 5000 + "}")],
)  # fmt: skip
def test_what_is_none(data: bytes) -> None:
    with pytest.raises(Corrupt, match=r"^the entry "):
        unseal(data, "the entry")


def test_what_json_does_not_know_is_refused() -> None:
    for value in (float("nan"), float("inf"), b"x", object()):
        with pytest.raises((ValueError, TypeError)):
            seal({"a": value})
