"""Small documents in a tier: JSON that carries a checksum of itself, so that damage is noticed before it is believed.

    {"crc32c": "<8 hex digits>", "document": {…}}

The checksum is of the document's canonical JSON: keys sorted, no spaces, ASCII. So a document may be reformatted by
whoever looks at it with an editor or ``jq``, and still is what it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ..erasure.kernel import crc32c
from ..errors import Corrupt


def seal(document: Mapping[str, Any]) -> bytes:
    """*document* with its checksum. Values are what JSON knows; no infinities, no NaN."""
    text = _canonical(document)
    return f'{{"crc32c":"{crc32c(text.encode()):08x}","document":{text}}}\n'.encode()


def unseal(data: bytes, what: str) -> dict[str, Any]:
    """The document in *data*, verified. Its contents, such as which keys it has, are up to the caller.

    Raises:
        Corrupt: not a sealed document, or not the one that was sealed. The message begins with *what*.
    """
    try:
        outer = json.loads(data.decode(), parse_constant=_refused, object_pairs_hook=_object)
        document, crc = outer["document"], outer["crc32c"]
        text = _canonical(document)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Corrupt(f"{what} is not a sealed document: {str(error)[:200]}") from error
    if not isinstance(document, dict) or set(outer) != {"crc32c", "document"}:
        raise Corrupt(f"{what} is not a sealed document")
    if crc != f"{crc32c(text.encode()):08x}":
        raise Corrupt(f"{what} does not match its checksum")
    return document


def _canonical(document: object) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # readers differ in which one they take
        raise ValueError("a key is there twice")
    return found
