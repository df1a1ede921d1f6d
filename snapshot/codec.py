"""The eager state as bytes, without pickle: JSON for the small things, raw buffers for the large ones.

``encode`` takes exactly the plain types listed below and gives back, through ``decode``, values of the same types and
the same bits (only the payload of a NaN may be lost). Anything else is refused with its path in the state, never
flattened into something similar. Nothing read is ever evaluated, and whatever is wrong with it is ``Corrupt``.

Layout, little-endian, offsets from the start of the encoding::

    0    8   magic "HFSTATE\\0"
    8    4   u32 version, 1
    12   4   u32 crc32c of bytes [0, 12), [16, 32) and the text
    16   8   u64 bytes of the text
    24   8   u64 bytes of the whole encoding; what follows it in a larger buffer is not read
    32   …   the text: one JSON value, UTF-8 (a lone surrogate stands as its three bytes)
    …    …   zeros up to a multiple of 64
    raw  …   the raw buffers in the order in which the text names them, each padded with zeros to a multiple of 64

The checksum covers all but the raw buffers: those are covered by the block checksums of the image that they lie in.
A buffer is named by ``at``, its offset from ``raw``, and ``nbytes``. Since buffers follow each other without gaps,
``at`` says nothing new; it is there for other readers, and is checked.

In the text, null, true, false, strings, finite floats, integers of up to 64 bits, and dicts whose keys are all strings
other than "$" stand for themselves, lists too. All else is an object with a tag in "$"; *items* are a JSON array, or
(64 or more numbers of one type) ``{"$": "ints" | "floats", "at", "nbytes"}``, raw int64 or float64:

    ===================================  ==========================================================================
    int                                  hex text in "v": integers beyond 64 bits
    float                                "nan", "inf" or "-inf" in "v"
    complex                              [real, imaginary] in "v"
    bytes, bytearray                     hex in "hex" (short ones), or at, nbytes
    ints, floats                         a list, as its raw items
    tuple, set, frozenset                items in "v"; sets in an order that depends on their elements alone
    deque                                items in "v", and "maxlen"
    dict, OrderedDict, Counter           [key, value, key, value, …] in "v", in their order
    range                                [start, stop, step] in "v"
    scalar                               a NumPy scalar: dtype, and its bytes as hex in "v"
    array                                a NumPy array: dtype, shape, at, nbytes; in C order
    raw                                  a ``Raw`` that the caller's hook made: dtype, shape, at, nbytes
    tagged                               a ``Tagged`` that the caller's hook made: tag, and its value in "v"
    ===================================  ==========================================================================

Objects that occur twice are stored twice. This module knows no torch: the ``leaf`` hooks do.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from ..erasure.kernel import Buffer, crc32c
from ..errors import Corrupt, StateRefused

MAX_DEPTH: Final = 100
"""How deep containers may nest, when writing and when reading."""

ALIGNMENT: Final = 64
"""Raw buffers lie at multiples of this many bytes from the start of the encoding."""

_MAGIC = b"HFSTATE\0"
_VERSION = 1
_PREFIX = struct.Struct("<8sI")
_CRC = struct.Struct("<I")
_SIZES = struct.Struct("<QQ")
_HEADER_BYTES = _PREFIX.size + _CRC.size + _SIZES.size

# From this many numbers on, packing them beats writing them as text.
_PACK_FROM = 64
# Shorter bytes than this are cheaper in the text than as a buffer of their own.
_HEX_BELOW = 64
_SHOWN_CHARACTERS = 120
_INT64_MAX = (1 << 63) - 1
_INT64_MIN = -(1 << 63)
_MAX_DIMENSIONS = 64

# By name, as other machines may have to read it; long double is left out, as its meaning depends on the machine.
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(name)
    for name in ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16")
}
_KEYS = frozenset((str, int, bool, type(None), float, bytes))
_PACKED = {int: ("ints", "q"), float: ("floats", "d")}
_BULK = frozenset((int, float, str, bool, type(None)))
_HEX_INT = re.compile(r"-?0x[0-9a-f]+")
_NON_FINITE = frozenset(("nan", "inf", "-inf"))

Node: TypeAlias = "bool | int | float | str | list[Node] | dict[str, Node] | None"
"""What JSON can say."""


@dataclass(frozen=True, slots=True, eq=False)
class Raw:
    """An array that only the ``leaf`` hooks understand.

    ``data`` is ``uint8[nbytes]``, C-contiguous. On encoding it is borrowed until ``Encoded.write_into`` is done; on
    decoding it is a copy of the receiver's own. ``dtype`` and ``shape`` are stored as given: their agreement with
    ``data`` is for the hooks to check.
    """

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Tagged:
    """A small thing that only the ``leaf`` hooks understand, said in plain values."""

    tag: str
    value: object


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded state, its arrays still where the caller has them: they must not change before ``write_into``."""

    nbytes: int
    text_bytes: int
    _head: bytes
    _arrays: tuple[tuple[int, npt.NDArray[Any]], ...]

    def write_into(self, destination: memoryview | npt.NDArray[np.uint8]) -> None:
        """Write all ``nbytes`` to the start of *destination*, each array copied once. The rest is left alone.

        Raises:
            ValueError: *destination* is too short, read-only or not contiguous.
        """
        out = np.frombuffer(destination, np.uint8)
        if len(out) < self.nbytes or not out.flags.writeable:
            raise ValueError(f"{self.nbytes} writable bytes needed, {len(out)} given (writable: {out.flags.writeable})")
        end = len(self._head)
        out[:end] = np.frombuffer(self._head, np.uint8)
        for start, array in self._arrays:
            out[end:start] = 0  # padding: equal states give equal bytes, and nothing of an older image shows through
            end = start + array.nbytes
            np.copyto(out[start:end].view(array.dtype).reshape(array.shape), array)
        out[end : self.nbytes] = 0

    def to_bytes(self) -> bytes:
        """All of it."""
        out = np.empty(self.nbytes, np.uint8)
        self.write_into(out)
        return out.tobytes()


EncodeLeaf: TypeAlias = "Callable[[object], Raw | Tagged | None]"
"""Called with each value of a type not listed above; None refuses it."""
DecodeLeaf: TypeAlias = "Callable[[Raw | Tagged], object]"
"""The way back. May raise anything: what it raises becomes ``Corrupt``."""


def encode(value: object, path: str, leaf: EncodeLeaf | None = None) -> Encoded:
    """Encode *value*; *path* is where it lies in the training state, for messages.

    Arrays are not copied here but by ``Encoded.write_into``; all else is taken as it is now.

    Raises:
        StateRefused: something in *value* is not of a supported type, contains itself, or is nested deeper than
            ``MAX_DEPTH``. The message names its path. What *leaf* raises passes through.
    """
    encoder = _Encoder(leaf)
    try:
        node = encoder.value(value, 0)
    except _Refusal as refusal:
        raise StateRefused(refusal.message(path)) from None
    return _encoded(encoder, node)


def _encoded(encoder: _Encoder, node: Node) -> Encoded:
    text = _to_json(node).encode("utf-8", "surrogatepass")
    raw_start = _aligned(_HEADER_BYTES + len(text))
    nbytes = raw_start + encoder.end
    prefix, sizes = _PREFIX.pack(_MAGIC, _VERSION), _SIZES.pack(len(text), nbytes)
    head = b"".join((prefix, _CRC.pack(_checksum(prefix, sizes, text)), sizes, text))
    return Encoded(nbytes, len(text), head, tuple((raw_start + at, array) for at, array in encoder.arrays))


def decode(buffer: Buffer, leaf: DecodeLeaf | None = None) -> object:
    """The value that ``encode`` was given, rebuilt from the encoding at the start of *buffer*.

    All that is returned owns its memory. Without *leaf*, ``Raw`` and ``Tagged`` are returned as they are. Any bytes
    may be given: memory use stays within a small multiple of their number.

    Raises:
        Corrupt: the bytes are not an encoding, or not a whole one.
        ValueError, BufferError: *buffer* is not C-contiguous.
    """
    data = np.frombuffer(buffer, np.uint8)
    text, raw = _open(data)
    decoder = _Decoder(raw, leaf)
    try:
        value = decoder.value(_parse(text), 0)
    except RecursionError as error:
        raise Corrupt("encoded state: its text is nested too deeply") from error
    if decoder.end != len(raw):
        raise Corrupt(f"encoded state: {len(raw)} raw bytes, {decoder.end} of them named by its text")
    return value


def _open(data: npt.NDArray[np.uint8]) -> tuple[bytes, npt.NDArray[np.uint8]]:
    """The verified text, copied, and the raw section, as a view. Raises ``Corrupt``."""
    if len(data) < _HEADER_BYTES:
        raise Corrupt(f"encoded state: cut off after {len(data)} bytes, inside its header")
    # Copied once, then looked at: somebody else may be writing to shared memory.
    header = data[:_HEADER_BYTES].tobytes()
    magic, version = _PREFIX.unpack_from(header)
    (crc,) = _CRC.unpack_from(header, _PREFIX.size)
    text_bytes, nbytes = _SIZES.unpack_from(header, _PREFIX.size + _CRC.size)
    if magic != _MAGIC:
        raise Corrupt(f"encoded state: begins with {magic!r} instead of {_MAGIC!r}")
    if version != _VERSION:
        raise Corrupt(f"encoded state: format version {version}; this Holdfast reads {_VERSION}")
    raw_start = _aligned(_HEADER_BYTES + text_bytes)
    if not raw_start <= nbytes <= len(data):
        raise Corrupt(f"encoded state: {text_bytes} bytes of text, {nbytes} in all, but {len(data)} are there")
    text = data[_HEADER_BYTES : _HEADER_BYTES + text_bytes].tobytes()
    found = _checksum(header[: _PREFIX.size], header[-_SIZES.size :], text)
    if found != crc:
        raise Corrupt(f"encoded state: crc32c {found:#010x} instead of {crc:#010x}")
    return text, data[raw_start:nbytes]


def _parse(text: bytes) -> Node:
    """The JSON tree. Raises ``Corrupt`` or, from deep nesting, ``RecursionError``."""
    try:
        node: Node = _from_json(text.decode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise Corrupt(f"encoded state: its text is not JSON: {error}") from error
    return node


def _checksum(prefix: bytes, sizes: bytes, text: bytes) -> int:
    return crc32c(b"".join((prefix, sizes, text)))


def _aligned(nbytes: int) -> int:
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


_to_json = json.JSONEncoder(ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")).encode


def _shown(value: object) -> str:
    """*value* for a message: short, on one line."""
    try:
        text = " ".join(reprlib.repr(value).split())  # what a value's own repr raises, reprlib catches
    except ValueError:  # an integer of more digits than Python prints
        text = f"<{type(value).__qualname__}>"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_from_json = json.JSONDecoder(parse_constant=_no_constant).decode


class _Refusal(Exception):
    """A refused value, on its way up to ``encode``: each container adds itself and its step of the path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.steps: list[str] = []
        self.containers: list[object] = []

    def leave(self, container: object, step: str) -> _Refusal:
        self.containers.append(container)
        self.steps.append(step)
        return self

    def message(self, path: str) -> str:
        """The path from the top down to what is refused, and why."""
        steps = self.steps[::-1]
        seen: dict[int, int] = {}
        # Cycles are not looked for while encoding: they end at the depth limit, and show here.
        for depth, container in enumerate(reversed(self.containers)):
            first = seen.setdefault(id(container), depth)
            if first != depth:
                outer, inner = path + "".join(steps[:first]), path + "".join(steps[:depth])
                return f"{inner}: this is {outer} again; a state that contains itself cannot be captured"
        return f"{path}{''.join(steps)}: {self.reason}"


def _refused(value: object) -> _Refusal:
    """Why *value* is refused, and what to do about it."""
    kind = type(value)
    parent = next((base.__name__ for base in kind.__mro__[1:] if base in _ENCODERS), None)
    if isinstance(value, np.ndarray):
        hint = "of NumPy's arrays, plain numpy.ndarray of fixed-size native numbers or bools can"
    elif parent is not None:
        hint = f"it would come back as a plain {parent}, not as this subclass: store a plain {parent}"
    elif isinstance(value, np.generic):
        hint = "of NumPy's scalars, fixed-size numbers and bools can"
    else:
        hint = "give its owner a state_dict() of plain values, or leave it out of the state"
    return _Refusal(f"{_shown(value)} of type {kind.__qualname__} cannot be captured without pickle; {hint}")


def _deeper(depth: int) -> int:
    if depth >= MAX_DEPTH:
        raise _Refusal(f"nested more than {MAX_DEPTH} levels deep")
    return depth + 1


def _is_key(key: object, depth: int = 0) -> bool:
    """Whether *key* may be the key of a dict: a simple value, or a tuple of such."""
    if type(key) is tuple:
        # Too deep a tuple passes here, and is refused for its depth.
        return depth > MAX_DEPTH or all(_is_key(item, depth + 1) for item in key)
    return type(key) in _KEYS


def _set_order(value: object, depth: int = 0) -> str:
    """A sort key for the elements of a set: the same in every process, whatever the hashes are."""
    kind = type(value)
    if depth > MAX_DEPTH:
        return ""  # refused later, for its depth
    if isinstance(value, range):
        value = (value.start, value.stop, value.step)
    if isinstance(value, tuple | frozenset):
        parts: Iterable[str] = (_set_order(item, depth + 1) for item in value)
        return f"{kind.__name__}({','.join(sorted(parts) if kind is frozenset else parts)})"
    if kind is int:
        return f"int:{value:x}"  # base ten is limited in length
    return f"{kind.__name__}:{value!r}" if kind in _ENCODERS else f"{kind.__qualname__}:{_shown(value)}"


class _Encoder:
    """One pass over a state: makes the JSON tree, and collects the arrays with their offsets in the raw section.

    Values are dispatched by exact type, so that subclasses fall through to the hook. *depth* counts the containers
    around a value.
    """

    __slots__ = ("arrays", "end", "leaf")

    def __init__(self, leaf: EncodeLeaf | None) -> None:
        self.leaf = leaf
        self.arrays: list[tuple[int, npt.NDArray[Any]]] = []
        self.end = 0

    def value(self, value: Any, depth: int) -> Node:
        encoder = _ENCODERS.get(type(value))
        return self.put_foreign(value, depth) if encoder is None else encoder(self, value, depth)

    def put_foreign(self, value: object, depth: int) -> Node:
        """Whatever is of no type listed: for the hook."""
        leaf = None if self.leaf is None else self.leaf(value)
        if isinstance(leaf, Tagged):
            inner = _deeper(depth)
            try:
                return {"$": "tagged", "tag": leaf.tag, "v": self.value(leaf.value, inner)}
            except _Refusal as refusal:
                raise refusal.leave(value, f"<{leaf.tag}>") from None
        if isinstance(leaf, Raw):
            data = leaf.data
            if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
                raise ValueError(f"Raw.data is {data.dtype}{list(data.shape)}, not contiguous uint8[nbytes]")
            return {"$": "raw", "dtype": leaf.dtype, "shape": list(leaf.shape), **self.buffer(data)}
        raise _refused(value)

    def buffer(self, array: npt.NDArray[Any]) -> dict[str, Node]:
        """Take *array* into the raw section, and say where it lies."""
        at, nbytes = self.end, array.nbytes
        if nbytes:
            self.arrays.append((at, array))
            self.end = _aligned(at + nbytes)
        return {"at": at, "nbytes": nbytes}

    def put_as_is(self, value: str | bool | None, _depth: int) -> Node:
        return value

    def put_int(self, value: int, _depth: int) -> Node:
        # Text of base ten takes quadratic time, and Python limits its length.
        return value if _INT64_MIN <= value <= _INT64_MAX else {"$": "int", "v": hex(value)}

    def put_float(self, value: float, _depth: int) -> Node:
        return value if math.isfinite(value) else {"$": "float", "v": repr(value)}

    def put_complex(self, value: complex, depth: int) -> Node:
        return {"$": "complex", "v": [self.put_float(value.real, depth), self.put_float(value.imag, depth)]}

    def put_bytes(self, value: bytes | bytearray, _depth: int) -> Node:
        tag = type(value).__name__
        if len(value) < _HEX_BELOW:
            return {"$": tag, "hex": value.hex()}
        # A bytearray is copied at once: a view of it would forbid its owner to resize it.
        return {"$": tag, **self.buffer(np.frombuffer(bytes(value), np.uint8))}

    def put_range(self, value: range, depth: int) -> Node:
        return {"$": "range", "v": [self.put_int(part, depth) for part in (value.start, value.stop, value.step)]}

    def put_array(self, value: npt.NDArray[Any], _depth: int) -> Node:
        name = value.dtype.str
        if name not in _DTYPES:
            raise _refused(value)
        return {"$": "array", "dtype": name, "shape": list(value.shape), **self.buffer(value)}

    def put_scalar(self, value: np.generic, _depth: int) -> Node:
        return {"$": "scalar", "dtype": value.dtype.str, "v": value.tobytes().hex()}

    def put_list(self, value: list[Any], depth: int) -> Node:
        return self.items(value, value, depth)

    def put_tuple(self, value: tuple[Any, ...], depth: int) -> Node:
        return {"$": "tuple", "v": self.items(value, value, depth)}

    def put_deque(self, value: deque[Any], depth: int) -> Node:
        return {"$": "deque", "v": self.items(value, list(value), depth), "maxlen": value.maxlen}

    def put_set(self, value: set[Any] | frozenset[Any], depth: int) -> Node:
        kinds = set(map(type, value))
        items = sorted(value) if kinds in ({int}, {str}) else sorted(value, key=_set_order)
        return {"$": type(value).__name__, "v": self.items(value, items, depth)}

    def items(self, owner: object, values: list[Any] | tuple[Any, ...], depth: int) -> Node:
        """*values* of the container *owner*: as a whole where all are of one simple type, else one by one."""
        depth = _deeper(depth)
        if not values:
            return []
        # One pass in C over the types: going one by one takes five times as long.
        kind: type = type(values[0])
        if kind in _BULK and [*map(type, values)].count(kind) == len(values):
            whole = self.bulk(kind, values)
            if whole is not None:
                return whole
        nodes: list[Node] = []
        try:
            for item in values:
                nodes.append(self.value(item, depth))
        except _Refusal as refusal:
            raise refusal.leave(owner, f"[{len(nodes)}]") from None
        return nodes

    def bulk(self, kind: type, values: list[Any] | tuple[Any, ...]) -> Node:
        """*values*, all of type *kind*, as they are or as raw numbers; None where some of them need a tag."""
        if kind in _PACKED and len(values) >= _PACK_FROM:
            tag, code = _PACKED[kind]
            try:
                data = struct.pack(f"<{len(values)}{code}", *values)
            except struct.error:  # an integer beyond 64 bits
                return None
            return {"$": tag, **self.buffer(np.frombuffer(data, f"<{code}"))}
        if kind is int and (min(values) < _INT64_MIN or max(values) > _INT64_MAX):
            return None
        if kind is float and not all(map(math.isfinite, values)):
            return None
        return list(values)

    def put_dict(self, value: dict[Any, Any], depth: int) -> Node:
        if "$" in value or [*map(type, value)].count(str) != len(value):
            return self.put_pairs(value, depth)
        depth = _deeper(depth)
        nodes: dict[str, Node] = {}
        key = ""
        try:
            for key, item in value.items():
                encoder = _ENCODERS.get(type(item))
                nodes[key] = self.put_foreign(item, depth) if encoder is None else encoder(self, item, depth)
        except _Refusal as refusal:
            raise refusal.leave(value, f"[{key!r}]") from None
        return nodes

    def put_pairs(self, value: Mapping[Any, Any], depth: int) -> Node:
        depth = _deeper(depth)
        nodes: list[Node] = []
        step = ""
        try:
            for key, item in value.items():
                step = f".keys()[{len(nodes) // 2}]"
                if not _is_key(key):
                    raise _Refusal(f"{_shown(key)} of type {type(key).__qualname__} cannot be captured as a key")
                nodes.append(self.value(key, depth))
                step = f"[{key!r}]" if type(key) is str else f"[{_shown(key)}]"
                nodes.append(self.value(item, depth))
        except _Refusal as refusal:
            raise refusal.leave(value, step) from None
        return {"$": type(value).__name__, "v": nodes}


class Draft(_Encoder):
    """A dict that is encoded in two steps: its items are taken now, and made into bytes later, on any thread."""

    __slots__ = ("_nodes", "_path")

    def __init__(self, path: str, leaf: EncodeLeaf | None = None) -> None:
        super().__init__(leaf)
        self._nodes, self._path = dict[str, Node](), path

    def take(self, key: str, value: object) -> None:
        """Take *value* as item *key*; its arrays are borrowed until ``own``, or all is written. Raises as ``encode``."""
        try:
            self._nodes[key] = self.value(value, 1)
        except _Refusal as refusal:
            raise StateRefused(refusal.leave(self._nodes, f"[{key!r}]").message(self._path)) from None

    def own(self) -> None:
        """Copy all arrays taken so far: their owners may change them from here on."""
        self.arrays = [(at, array.copy()) for at, array in self.arrays]

    def encoded(self) -> Encoded:
        """All of it."""
        return _encoded(self, self._nodes)


_ENCODERS: Final[dict[type, Callable[[_Encoder, Any, int], Node]]] = {
    **dict.fromkeys((np.dtype(name).type for name in _DTYPES), _Encoder.put_scalar),
    type(None): _Encoder.put_as_is,
    bool: _Encoder.put_as_is,
    str: _Encoder.put_as_is,
    int: _Encoder.put_int,
    float: _Encoder.put_float,
    complex: _Encoder.put_complex,
    bytes: _Encoder.put_bytes,
    bytearray: _Encoder.put_bytes,
    range: _Encoder.put_range,
    list: _Encoder.put_list,
    tuple: _Encoder.put_tuple,
    deque: _Encoder.put_deque,
    set: _Encoder.put_set,
    frozenset: _Encoder.put_set,
    dict: _Encoder.put_dict,
    OrderedDict: _Encoder.put_pairs,
    Counter: _Encoder.put_pairs,
    np.ndarray: _Encoder.put_array,
}


class _Decoder:
    """One pass over a JSON tree, in the order in which it was written.

    Raw buffers must follow each other in that order. So no two values share one, and the bytes given bound the memory
    used. All methods raise ``Corrupt`` only, but for ``RecursionError``.
    """

    __slots__ = ("end", "leaf", "raw")

    def __init__(self, raw: npt.NDArray[np.uint8], leaf: DecodeLeaf | None) -> None:
        self.raw = raw
        self.leaf = leaf
        self.end = 0

    def value(self, node: Node, depth: int) -> Any:
        if isinstance(node, list):
            return self.items(node, depth)
        if not isinstance(node, dict):
            return node
        if "$" not in node:
            depth = self.deeper(depth)
            return {key: self.value(item, depth) for key, item in node.items()}
        tag = node["$"]
        decoder = _DECODERS.get(tag) if isinstance(tag, str) else None
        if decoder is None:
            raise Corrupt(f"encoded state: unknown tag {_shown(tag)}")
        return decoder(self, node, depth)

    def deeper(self, depth: int) -> int:
        if depth >= MAX_DEPTH:
            raise Corrupt(f"encoded state: nested more than {MAX_DEPTH} levels deep")
        return depth + 1

    def items(self, node: Node, depth: int) -> list[Any]:
        """The elements of a container."""
        depth = self.deeper(depth)
        if isinstance(node, list):
            return [self.value(item, depth) for item in node]
        if isinstance(node, dict) and node.get("$") in ("ints", "floats"):
            region = self.region(node)
            _require(len(region) % 8 == 0, node)
            numbers: list[Any] = region.view("<i8" if node["$"] == "ints" else "<f8").tolist()
            return numbers
        raise _malformed(node)

    def region(self, node: dict[str, Node]) -> npt.NDArray[np.uint8]:
        """The raw bytes that *node* names: a view, to be copied."""
        at, nbytes = node.get("at"), node.get("nbytes")
        if type(at) is not int or type(nbytes) is not int or at != self.end or nbytes < 0:
            raise Corrupt(f"encoded state: a buffer out of order: {_shown(node)}, expected at {self.end}")
        if at + nbytes > len(self.raw):
            raise Corrupt(f"encoded state: a buffer [{at}, {at + nbytes}) beyond the {len(self.raw)} raw bytes")
        self.end = _aligned(at + nbytes)
        return self.raw[at : at + nbytes]

    def get_items(self, node: dict[str, Node], depth: int) -> list[Any]:
        return self.items(node, depth)

    def get_int(self, node: dict[str, Node], _depth: int) -> int:
        text = _text(node, "v")
        _require(_HEX_INT.fullmatch(text) is not None, node)
        return int(text, 16)

    def get_float(self, node: dict[str, Node], _depth: int) -> float:
        text = _text(node, "v")
        _require(text in _NON_FINITE, node)
        return float(text)  # a new object each time: sets tell NaNs apart by identity

    def get_complex(self, node: dict[str, Node], depth: int) -> complex:
        parts = self.items(node.get("v"), depth)
        _require([*map(type, parts)] == [float, float], node)
        return complex(*parts)

    def get_bytes(self, node: dict[str, Node], _depth: int) -> bytes:
        return _from_hex(node, "hex") if "hex" in node else self.region(node).tobytes()

    def get_bytearray(self, node: dict[str, Node], depth: int) -> bytearray:
        return bytearray(self.get_bytes(node, depth))

    def get_range(self, node: dict[str, Node], depth: int) -> range:
        parts = self.items(node.get("v"), depth)
        _require([*map(type, parts)] == [int, int, int] and parts[2] != 0, node)
        return range(*parts)

    def get_tuple(self, node: dict[str, Node], depth: int) -> tuple[Any, ...]:
        return tuple(self.items(node.get("v"), depth))

    def get_deque(self, node: dict[str, Node], depth: int) -> deque[Any]:
        items, maxlen = self.items(node.get("v"), depth), node.get("maxlen")
        if maxlen is None:
            return deque(items)
        if type(maxlen) is not int or not len(items) <= maxlen <= _INT64_MAX:
            raise _malformed(node)
        return deque(items, maxlen)

    def get_set(self, node: dict[str, Node], depth: int) -> set[Any] | frozenset[Any]:
        items = self.items(node.get("v"), depth)
        try:
            found: set[Any] | frozenset[Any] = set(items) if node["$"] == "set" else frozenset(items)
        except TypeError as error:
            raise Corrupt(f"encoded state: {error} in a set") from error
        _require(len(found) == len(items), node)
        return found

    def get_dict(self, node: dict[str, Node], depth: int) -> dict[Any, Any]:
        return self.fill({}, node, depth)

    def get_ordered_dict(self, node: dict[str, Node], depth: int) -> dict[Any, Any]:
        return self.fill(OrderedDict(), node, depth)

    def get_counter(self, node: dict[str, Node], depth: int) -> dict[Any, Any]:
        return self.fill(Counter(), node, depth)

    def fill(self, mapping: dict[Any, Any], node: dict[str, Node], depth: int) -> dict[Any, Any]:
        """*mapping*, with the pairs of *node* put into it."""
        pairs = self.items(node.get("v"), depth)
        keys = pairs[::2]
        _require(len(pairs) % 2 == 0 and all(map(_is_key, keys)), node)
        for key, value in zip(keys, pairs[1::2], strict=True):
            mapping[key] = value
        _require(len(mapping) == len(keys), node)
        return mapping

    def get_array(self, node: dict[str, Node], _depth: int) -> npt.NDArray[Any]:
        dtype, shape, region = _DTYPES.get(_text(node, "dtype")), _shape(node), self.region(node)
        if dtype is None or math.prod(shape) * dtype.itemsize != len(region):
            raise _malformed(node)
        try:
            array = np.empty(shape, dtype)
        except ValueError as error:  # no elements, but dimensions beyond what NumPy can count
            raise Corrupt(f"encoded state: an array of shape {shape}: {error}") from error
        array.reshape(-1).view(np.uint8)[:] = region
        return array

    def get_scalar(self, node: dict[str, Node], _depth: int) -> Any:
        dtype, data = _DTYPES.get(_text(node, "dtype")), _from_hex(node, "v")
        if dtype is None or len(data) != dtype.itemsize:
            raise _malformed(node)
        return np.frombuffer(data, dtype)[0]

    def get_raw(self, node: dict[str, Node], _depth: int) -> object:
        return self.from_leaf(Raw(_text(node, "dtype"), _shape(node), self.region(node).copy()))

    def get_tagged(self, node: dict[str, Node], depth: int) -> object:
        return self.from_leaf(Tagged(_text(node, "tag"), self.value(node.get("v"), self.deeper(depth))))

    def from_leaf(self, leaf: Raw | Tagged) -> object:
        if self.leaf is None:
            return leaf
        try:
            return self.leaf(leaf)
        except Corrupt:
            raise
        except Exception as error:  # whatever a hook does with bytes that nobody vouches for
            what = leaf.tag if isinstance(leaf, Tagged) else f"{leaf.dtype}{list(leaf.shape)}"
            raise Corrupt(f"encoded state: {_shown(what)} cannot be restored: {error}") from error


_DECODERS: Final[dict[str, Callable[[_Decoder, dict[str, Node], int], object]]] = {
    "int": _Decoder.get_int,
    "float": _Decoder.get_float,
    "complex": _Decoder.get_complex,
    "bytes": _Decoder.get_bytes,
    "bytearray": _Decoder.get_bytearray,
    "range": _Decoder.get_range,
    "ints": _Decoder.get_items,
    "floats": _Decoder.get_items,
    "tuple": _Decoder.get_tuple,
    "deque": _Decoder.get_deque,
    "set": _Decoder.get_set,
    "frozenset": _Decoder.get_set,
    "dict": _Decoder.get_dict,
    "OrderedDict": _Decoder.get_ordered_dict,
    "Counter": _Decoder.get_counter,
    "array": _Decoder.get_array,
    "scalar": _Decoder.get_scalar,
    "raw": _Decoder.get_raw,
    "tagged": _Decoder.get_tagged,
}


def _malformed(node: Node) -> Corrupt:
    return Corrupt(f"encoded state: malformed {_shown(node)}")


def _require(condition: bool, node: Node) -> None:
    if not condition:
        raise _malformed(node)


def _text(node: dict[str, Node], name: str) -> str:
    text = node.get(name)
    if not isinstance(text, str):
        raise _malformed(node)
    return text


def _from_hex(node: dict[str, Node], name: str) -> bytes:
    try:
        return bytes.fromhex(_text(node, name))
    except ValueError as error:
        raise _malformed(node) from error


def _shape(node: dict[str, Node]) -> tuple[int, ...]:
    shape = node.get("shape")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise _malformed(node)
    sizes = tuple(size for size in shape if type(size) is int and 0 <= size <= _INT64_MAX)
    _require(len(sizes) == len(shape), node)
    return sizes
