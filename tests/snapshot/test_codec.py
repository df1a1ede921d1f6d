"""The codec of the eager state: round trips, refusals that name their path, hostile bytes."""

from __future__ import annotations

import enum
import json
import math
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from holdfast.erasure.kernel import crc32c
from holdfast.errors import Corrupt, StateRefused
from holdfast.snapshot.codec import ALIGNMENT, MAX_DEPTH, Encoded, Raw, Tagged, decode, encode

Point = namedtuple("Point", "x y")


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr either")


class Tensor:
    """Stands for what only the hooks know."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.data = data


def written(encoded: Encoded) -> bytes:
    """The encoding, written over old bytes."""
    out = np.full(encoded.nbytes, 0xAA, np.uint8)
    encoded.write_into(out)
    return out.tobytes()


def round_trip(value: object) -> Any:
    return decode(written(encode(value, "state")))


def same(a: Any, b: Any) -> bool:
    """Whether *a* and *b* are of the same types throughout, and the same bit for bit (any NaN is like any other)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        return same([*a.items()], [*b.items()])
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, range):
        return (a.start, a.stop, a.step) == (b.start, b.stop, b.step)
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def sealed(text: str | bytes, raw: bytes = b"") -> bytes:
    """What a writer of ill will would make: any text and any raw section under a right checksum."""
    text = text.encode() if isinstance(text, str) else text
    start = -(-(32 + len(text)) // ALIGNMENT) * ALIGNMENT
    prefix, sizes = struct.pack("<8sI", b"HFSTATE\0", 1), struct.pack("<QQ", len(text), start + len(raw))
    head = prefix + struct.pack("<I", crc32c(prefix + sizes + text)) + sizes + text
    return head.ljust(start, b"\0") + raw


SIMPLE = [
    None,
    True,
    False,
    0,
    -1,
    2**63 - 1,
    -(2**63),
    2**63,
    -(2**63) - 1,
    10**5000,
    0.0,
    -0.0,
    0.1,
    5e-324,
    1.7976931348623157e308,
    math.inf,
    -math.inf,
    math.nan,
    1j,
    complex(-0.0, -0.0),
    complex(math.nan, -math.inf),
    "",
    "text",
    '"\\\n\0\x7f\u2028é😀',
    "\ud800",
    "\ud83d\ude00",  # a surrogate pair in two characters, which is not "😀"
    b"",
    b"\0\xff",
    bytes(range(256)) * 3,
    bytearray(b""),
    bytearray(b"ab"),
    bytearray(1000),
    range(0),
    range(1, 1),
    range(10, -(10**30), -3),
]
CONTAINERS = [
    [],
    (),
    {},
    set(),
    frozenset(),
    deque(),
    deque(maxlen=0),
    OrderedDict(),
    Counter(),
    [1, True, 1.0, "1", None],
    [True] * 100,
    [None] * 100,
    ["a"] * 100,
    [*range(1000)],
    (*range(1000),),
    [*range(100), 2**64],
    [*range(100), True],
    [0.1 * i for i in range(100)],
    [-0.0, math.nan, math.inf] * 40,
    [-0.0, math.nan, math.inf],
    [1, 2**63],
    [[]],
    ([],),
    [(), [()], {}],
    {"a": 1, "b": {"c": [1, 2]}},
    {"b": 1, "a": 2},
    {"$": 1},
    {"$": "tuple", "v": []},
    {1: "a", "1": "b", None: 0, 2.5: 1, b"k": 2, (1, ("x", None)): 3},
    {True: 1, 0: 2},
    {math.inf: 1, -math.inf: 2},
    {"\ud800": 1},
    {1, 2, 3},
    {"a", "b"},
    {1, "a", None, 2.5, b"x", (1, 2), frozenset((3, "c")), 1j, range(3)},
    {*range(1000)},
    {10**5000, -(10**5000), "a", (10**5000,), range(10**5000)},
    frozenset({frozenset({frozenset(), 1}), ()}),
    deque([1, 2, 3]),
    deque([1, 2, 3], maxlen=3),
    deque(range(200), maxlen=500),
    OrderedDict(b=1, a=2),
    OrderedDict({1: 2}),
    Counter("abracadabra"),
    Counter({(1, 2): 2.5}),
]
DTYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]


# Named by number: what a set prints depends on the process, and parallel runs must name their tests alike.
@pytest.mark.parametrize("value", [*SIMPLE, *CONTAINERS], ids=[str(i) for i in range(len([*SIMPLE, *CONTAINERS]))])
def test_round_trip(value: object) -> None:
    assert same(round_trip(value), value)
    assert same(round_trip({"x": [value, (value,)]}), {"x": [value, (value,)]})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 3), (33, 1, 2)])
def test_arrays(dtype: str, shape: tuple[int, ...]) -> None:
    noise = np.random.default_rng(1).integers(
        0, 2 if dtype == "?" else 256, (*shape, np.dtype(dtype).itemsize), np.uint8
    )
    array = noise.view(dtype).reshape(shape)
    for given in (array, array.copy(order="F"), np.repeat(array, 2, axis=0)[::2] if shape else array):
        found = round_trip(given)
        assert same(found, array)
        assert found.flags.c_contiguous
        assert found.flags.owndata
        assert found.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_scalars(dtype: str) -> None:
    value = np.frombuffer(bytes([1] * 16), dtype)[0]
    assert same(round_trip(value), value)


def test_nan_bits_of_arrays_survive() -> None:
    array = np.array([0x7FF8000000000123, 0xFFF0000000000001], np.uint64).view(np.float64)
    assert same(round_trip(array), array)


def test_random_generator_states() -> None:
    old = np.random.RandomState(3)
    new = np.random.Generator(np.random.PCG64(3))
    expected = old.random_sample(3).tolist(), new.random(3).tolist()
    old, new = np.random.RandomState(3), np.random.Generator(np.random.PCG64(3))
    state = round_trip({"old": old.get_state(), "new": new.bit_generator.state})
    old.seed(0)
    old.set_state(state["old"])
    new = np.random.Generator(np.random.PCG64(0))
    new.bit_generator.state = state["new"]
    assert (old.random_sample(3).tolist(), new.random(3).tolist()) == expected


@pytest.mark.parametrize(
    ("value", "path", "reason"),
    [
        (
            {"loader": {"sampler": [0, {"rng": lambda: 0}]}},
            "extras['loader']['sampler'][1]['rng']: ",
            "of type function",
        ),
        (Point(1, 2), "extras: ", "store a plain tuple"),
        ([Colour.RED], "extras[0]: ", "store a plain int"),
        ([Text("a")] * 100, "extras[0]: ", "store a plain str"),
        ([*range(99), Colour.RED], "extras[99]: ", "store a plain int"),
        ((defaultdict(list),), "extras[0]: ", "store a plain dict"),
        ({1: {2: Unprintable()}}, "extras[1][2]: ", "of type Unprintable"),
        ({Text("a"): 1}, "extras.keys()[0]: ", "as a key"),
        ({"a": {1: 1, (2, 1j): 1}}, "extras['a'].keys()[1]: ", "as a key"),
        ({frozenset(): 1}, "extras.keys()[0]: ", "as a key"),
        ({1, Unprintable}, "extras[", "of type type"),
        (deque([object()]), "extras[0]: ", "of type object"),
        (np.array([None]), "extras: ", "plain numpy.ndarray"),
        (np.array(["a"]), "extras: ", "plain numpy.ndarray"),
        (np.zeros(2, "i4,f4"), "extras: ", "plain numpy.ndarray"),
        (np.zeros(2, ">i4"), "extras: ", "plain numpy.ndarray"),
        (np.zeros(2, "M8[s]"), "extras: ", "plain numpy.ndarray"),
        (np.zeros(2, "g"), "extras: ", "plain numpy.ndarray"),
        (np.zeros((2, 2)).view(np.recarray), "extras: ", "plain numpy"),
        (np.datetime64("2020-01-01"), "extras: ", "NumPy's scalars"),
        (np.str_("a"), "extras: ", "store a plain str"),
        (Tensor(np.zeros(1, np.uint8)), "extras: ", "of type Tensor"),
        (memoryview(b"a"), "extras: ", "of type memoryview"),
        (..., "extras: ", "of type ellipsis"),
        ({(10**5000, 1j): 1}, "extras.keys()[0]: <tuple>", "as a key"),
    ],
)
def test_refusals_name_the_path(value: object, path: str, reason: str) -> None:
    with pytest.raises(StateRefused) as refused:
        encode(value, "extras")
    message = str(refused.value)
    assert message.startswith(path)
    assert reason in message
    assert len(message) < 400


def test_cycles_are_refused() -> None:
    inner: dict[str, Any] = {"x": 1}
    inner["back"] = [inner]
    with pytest.raises(StateRefused, match=r"^s\['a'\]\['back'\]\[0\]: this is s\['a'\] again"):
        encode({"a": inner}, "s")
    ring: list[Any] = []
    ring.append((ring,))
    with pytest.raises(StateRefused, match=r"^s\[0\]\[0\]: this is s again"):
        encode(ring, "s")


def test_the_same_object_twice_is_no_cycle() -> None:
    part = [1]
    assert round_trip([part, part, {"p": part}]) == [[1], [1], {"p": [1]}]


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: (v,), lambda v: frozenset((v,)), lambda v: {"a": v}, lambda v: {1: v}]
)
def test_depth_limit_is_the_same_both_ways(wrap: Any) -> None:
    value: Any = 0
    for _ in range(MAX_DEPTH):
        value = wrap(value)
    assert same(round_trip(value), value)
    with pytest.raises(StateRefused, match=f"nested more than {MAX_DEPTH} levels deep"):
        encode(wrap(value), "s")


def test_deep_keys_are_refused_too() -> None:
    key: Any = ()
    for _ in range(MAX_DEPTH - 2):
        key = (key,)
    assert same(round_trip({key: 1}), {key: 1})
    for _ in range(900):
        key = (key,)
    for value in ({key: 1}, {key}):
        with pytest.raises(StateRefused, match=f"nested more than {MAX_DEPTH} levels deep"):
            encode(value, "s")


def test_sets_are_written_in_one_order() -> None:
    """Whatever order the hashes of strings give in this process."""
    script = (
        "import sys, numpy as np; from holdfast.snapshot.codec import encode\n"
        "big = [bytes([i]) * 100 for i in range(5)]\n"
        "e = encode({'a', 1, b'x', (2, 'b'), frozenset(('c', 'd', 'e')), None, *big}, 's')\n"
        "out = np.zeros(e.nbytes, np.uint8); e.write_into(out); print(out.tobytes().hex())"
    )
    outputs = set()
    for seed in "0123":
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, env=environment, timeout=120
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_small_states_are_plain_json() -> None:
    data = written(encode({"lr": 0.1, "betas": [0.9, 0.99], "name": "é", "none": None}, "s"))
    (text_bytes,) = struct.unpack_from("<Q", data, 16)
    assert json.loads(data[32 : 32 + text_bytes]) == {"lr": 0.1, "betas": [0.9, 0.99], "name": "é", "none": None}


class TestWriteInto:
    def test_raw_buffers_are_aligned_and_padding_is_zero(self) -> None:
        encoded = encode([np.full(3, 7, np.uint8), np.full(65, 8, np.uint8)], "s")
        data = written(encoded)
        assert encoded.nbytes % ALIGNMENT == 0
        start = data.index(b"\x07\x07\x07")
        assert start % ALIGNMENT == 0
        assert data[start:] == b"\x07" * 3 + bytes(61) + b"\x08" * 65 + bytes(63)

    def test_takes_a_memoryview_and_leaves_the_rest_alone(self) -> None:
        encoded = encode([1, np.arange(3)], "s")
        out = bytearray(b"\xaa" * (encoded.nbytes + 10))
        encoded.write_into(memoryview(out)[3:])
        assert out[:3] + out[-7:] == b"\xaa" * 10
        assert same(decode(memoryview(out)[3:]), [1, np.arange(3)])

    def test_refuses_what_it_cannot_write_to(self) -> None:
        encoded = encode([1], "s")
        with pytest.raises(ValueError, match="64 writable bytes needed, 63 given"):
            encoded.write_into(memoryview(bytearray(63)))
        with pytest.raises(ValueError, match="writable: False"):
            encoded.write_into(memoryview(bytes(64)))

    def test_a_bytearray_stays_resizable(self) -> None:
        value = bytearray(b"a" * 1000)
        encoded = encode(value, "s")
        value.extend(b"more")
        assert decode(written(encoded)) == b"a" * 1000


class TestLeaf:
    @staticmethod
    def leaf(value: object) -> Raw | Tagged | None:
        if isinstance(value, Tensor):
            return Raw("bfloat16", (len(value.data) // 2,), value.data)
        if isinstance(value, Point):
            return Tagged("point", [value.x, value.y])
        return None

    @staticmethod
    def unleaf(leaf: Raw | Tagged) -> object:
        if isinstance(leaf, Tagged):
            assert isinstance(leaf.value, list)
            return Point(*leaf.value)
        assert (leaf.dtype, leaf.shape) == ("bfloat16", (len(leaf.data) // 2,))
        return Tensor(leaf.data)

    def test_round_trip(self) -> None:
        data = np.arange(10, dtype=np.uint8)
        state = {"t": Tensor(data), "p": (Point(1, Point(2.5, "x")),), "empty": Tensor(data[:0])}
        found: Any = decode(written(encode(state, "s", self.leaf)), self.unleaf)
        assert found["t"].data.tolist() == data.tolist()
        assert found["t"].data.flags.owndata
        assert found["empty"].data.shape == (0,)
        assert same(found["p"], state["p"])

    def test_without_a_hook_leaves_are_handed_out(self) -> None:
        found: Any = decode(written(encode([Point(1, 2), Tensor(np.ones(4, np.uint8))], "s", self.leaf)))
        assert found[0] == Tagged("point", [1, 2])
        assert (found[1].dtype, found[1].shape, found[1].data.tolist()) == ("bfloat16", (2,), [1, 1, 1, 1])

    def test_refused_inside_a_leaf(self) -> None:
        with pytest.raises(StateRefused, match=r"^s\['p'\]<point>\[1\]: "):
            encode({"p": Point(1, object())}, "s", self.leaf)

    def test_raw_data_must_be_flat_bytes(self) -> None:
        for data in (np.zeros(2, np.int8), np.zeros((2, 2), np.uint8), np.zeros(4, np.uint8)[::2]):
            with pytest.raises(ValueError, match="uint8"):
                encode(object(), "s", lambda _, data=data: Raw("x", (1,), data))  # type: ignore[misc]

    def test_what_a_hook_cannot_restore_is_corrupt(self) -> None:
        data = written(encode(Point(1, 2), "s", self.leaf))

        def failing(leaf: Raw | Tagged) -> object:
            raise KeyError("no such thing")

        with pytest.raises(Corrupt, match="'point' cannot be restored: 'no such thing'"):
            decode(data, failing)


class TestCorrupt:
    def test_every_truncation(self) -> None:
        data = written(encode({"a": [1, np.arange(20)]}, "s"))
        for length in range(len(data)):
            with pytest.raises(Corrupt):
                decode(data[:length])

    def test_every_flipped_bit_before_the_raw_section(self) -> None:
        data = written(encode({"a": [1, (2.5, "x")]}, "s"))
        (text_bytes,) = struct.unpack_from("<Q", data, 16)
        for bit in range((32 + text_bytes) * 8):
            wrong = bytearray(data)
            wrong[bit // 8] ^= 1 << bit % 8
            with pytest.raises(Corrupt):
                decode(wrong)

    def test_another_version_is_named(self) -> None:
        data = bytearray(written(encode(1, "s")))
        data[8] = 9
        with pytest.raises(Corrupt, match="version 9; this Holdfast reads 1"):
            decode(data)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "NaN",
            "-Infinity",
            "1 2",
            b"\xff",
            "9" * 10_000,
            "[" * 100_000,
            "[" * 102 + "]" * 102,
            '{"a":' * 102 + "1" + "}" * 102,
            '{"$":[]}',
            '{"$":"eval","v":"1"}',
            '{"$":"tuple"}',
            '{"$":"tuple","v":1}',
            '{"$":"tuple","v":{"a":1}}',
            '{"$":"int","v":5}',
            '{"$":"int","v":"1_0"}',
            '{"$":"float","v":"1.5"}',
            '{"$":"complex","v":[1,2]}',
            '{"$":"complex","v":[1.0]}',
            '{"$":"bytes","hex":"zz"}',
            '{"$":"bytes","hex":5}',
            '{"$":"bytes"}',
            '{"$":"range","v":[0,1,0]}',
            '{"$":"range","v":[0,true,1]}',
            '{"$":"deque","v":[1,2],"maxlen":1}',
            '{"$":"deque","v":[],"maxlen":-1}',
            '{"$":"deque","v":[],"maxlen":99999999999999999999}',
            '{"$":"set","v":[1,1]}',
            '{"$":"set","v":[[]]}',
            '{"$":"frozenset","v":[{}]}',
            '{"$":"set","v":[{"$":"tagged","tag":"t","v":[]}]}',
            '{"$":"dict","v":[1]}',
            '{"$":"dict","v":[[],1]}',
            '{"$":"dict","v":[1,1,true,2]}',
            '{"$":"Counter","v":{"$":"ints","at":0,"nbytes":4}}',
            '{"$":"ints","at":0,"nbytes":8}',
            '{"$":"ints","at":0,"nbytes":-8}',
            '{"$":"ints","at":-8,"nbytes":8}',
            '{"$":"ints","at":0.0,"nbytes":0}',
            '{"$":"array","dtype":"<f4","shape":[4611686018427387904,4],"at":0,"nbytes":0}',
            '{"$":"array","dtype":"<f4","shape":[0,4611686018427387904,4611686018427387904],"at":0,"nbytes":0}',
            '{"$":"array","dtype":"<f4","shape":[0,99999999999999999999],"at":0,"nbytes":0}',
            '{"$":"array","dtype":"<f4","shape":[-1,0],"at":0,"nbytes":0}',
            '{"$":"array","dtype":"<f4","shape":[true,0],"at":0,"nbytes":0}',
            '{"$":"array","dtype":"<f4","shape":0,"at":0,"nbytes":0}',
            '{"$":"array","dtype":"O","shape":[0],"at":0,"nbytes":0}',
            '{"$":"array","dtype":[],"shape":[0],"at":0,"nbytes":0}',
            '{"$":"scalar","dtype":"<f4","v":"00"}',
            '{"$":"raw","dtype":"x","shape":[1],"at":0,"nbytes":1}',
            '{"$":"tagged","tag":1,"v":1}',
        ],
        ids=lambda text: str(text)[:60],
    )
    def test_hostile_text(self, text: str | bytes) -> None:
        with pytest.raises(Corrupt):
            decode(sealed(text))

    def test_raw_buffers_must_be_named_once_and_in_order(self) -> None:
        first, again = '{"$":"ints","at":0,"nbytes":64}', '{"$":"ints","at":64,"nbytes":64}'
        assert decode(sealed(f"[{first},{again}]", bytes(128))) == [[0] * 8, [0] * 8]
        for text, raw in (
            (f"[{first},{first}]", bytes(64)),
            (f"[{again},{first}]", bytes(128)),
            (f"[{again}]", bytes(128)),
            (f"[{first}]", bytes(128)),
            ("1", bytes(64)),
        ):
            with pytest.raises(Corrupt):
                decode(sealed(text, raw))

    def test_nothing_returned_lies_in_the_buffer(self) -> None:
        data = bytearray(written(encode([np.arange(4), b"x" * 100], "s")))
        found: Any = decode(data)
        data[:] = bytes(len(data))
        data.clear()  # fails while anything still views it
        assert same(found, [np.arange(4), b"x" * 100])


def test_the_module_imports_no_torch() -> None:
    script = "import sys, holdfast.snapshot.codec; assert 'torch' not in sys.modules"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
