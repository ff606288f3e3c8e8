"""The encoding between candidate and checker: what goes in comes out, and nothing else ever does."""

import collections
import enum
import math
import os
import threading
from typing import Any

import pytest

from qtool.evaluate.sandbox.frames import MAX_FRAME, NotPlain, read_frame, write_frame
from qtool.evaluate.sandbox.wire import pack, unpack

VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        2**63,
        -(2**63),
        10**5000,
        -(10**5000),
        0.0,
        1e-320,
        1.7e308,
        math.inf,
        -math.inf,
    ),
    *("", "a", "\ud800", "\0", "é", b"", b"\xff", bytearray(b"ab"), 1 + 2j, complex(0.0, math.inf)),
    *([], [[]], [1, "a", None], (), (1,), ((1,), [2]), {}, {1: 2, "1": 3, (1, 2): [4], None: 5, 1.5: b""}),
    *(set(), {1, "a"}, frozenset({(1, 2)}), range(0), range(5, 1, -2)),
    *(collections.Counter("aab"), collections.OrderedDict(a=1), collections.deque([1, 2])),
    {"t": [1]},
    {"value": {"i": "0x1"}},
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_what_goes_in_comes_out(value: Any) -> None:
    back = unpack(pack(value))
    assert type(back) is type(value)
    assert back == value


def test_floats_keep_their_sign_and_nan() -> None:
    assert math.isnan(unpack(pack(math.nan)))
    assert math.copysign(1, unpack(pack(-0.0))) == -1
    assert type(unpack(pack([1.0]))[0]) is float


def test_dicts_keep_their_order() -> None:
    assert list(unpack(pack({"b": 1, "a": 2}))) == ["b", "a"]


def test_what_compares_like_a_builtin_travels_as_one() -> None:
    point = collections.namedtuple("point", "x y")
    colour = enum.IntEnum("colour", ["RED"])
    assert unpack(pack(point(1, [2]))) == (1, [2])
    assert type(unpack(pack(point(1, 2)))) is tuple
    assert type(unpack(pack(colour.RED))) is int
    assert list(unpack(pack(iter([1, 2])))) == [1, 2]
    assert list(unpack(pack({1: 2}.items()))) == [(1, 2)]
    assert unpack(pack(collections.defaultdict(int, {1: 2}))) == {1: 2}


class Same(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


def test_what_holds_itself_arrives_so() -> None:
    knot: list[Any] = [1]
    knot.append(knot)
    back = unpack(pack({"a": knot, "b": knot}))
    assert back["a"] is back["b"]
    assert back["a"][1] is back["a"]


@pytest.mark.parametrize(
    "value",
    [object(), Same(), [Same()], {Same(): 1}, len, Same, "x" * (MAX_FRAME + 1), iter(range(10**9))],
    ids=["object", "int", "inside", "key", "function", "class", "long", "endless"],
)
def test_what_is_not_plain_does_not_go_in(value: Any) -> None:
    with pytest.raises(NotPlain):
        pack(value)


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"",
            b"{",
            b"\xff",
            b"{}",
            b'{"t":[],"s":[]}',
            b'{"?":[]}',
            b'{"t":1}',
            b'{"t":{"a":1}}',
            b'{"i":1}',
        ),
        *(b'{"i":"zz"}', b'{"f":"1e5"}', b'{"f":"__import__"}', b'{"b":"0"}', b'{"c":[1,2]}', b'{"r":[1,2]}'),
        *(b'{"r":[1,2,0]}', b'{"d":[[1]]}', b'{"d":[[[],1]]}', b'{"s":[[]]}', b'{"o":["Counter",[]]}'),
        *(b'{"o":["eval",{"d":[]}]}', b'{"o":["Counter",{"d":[]},1]}', b'{"o":1}', b'{"o":[[],{"d":[]}]}'),
        *(b"[" * 100_000, b"1" * 10_000, b'{"r":["a","b","c"]}', b'{"__class__":"int"}'),
    ],
)
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(NotPlain):
        unpack(data)


def test_frames_are_whole_and_bounded() -> None:
    reader, writer = os.pipe()
    block = os.urandom(300_000)
    thread = threading.Thread(target=write_frame, args=(writer, block))
    thread.start()
    assert read_frame(reader) == block
    thread.join()
    write_frame(writer, b"abc")
    with pytest.raises(NotPlain, match="limit 2"):
        read_frame(reader, limit=2)
    os.write(writer, b"")
    os.close(writer)
    assert read_frame(reader) is None
    os.close(reader)


def test_numpy_scalars_travel_as_the_numbers_they_are() -> None:
    """EvalPlus' tests bring numpy, and answers that use it return its numbers."""
    numpy = pytest.importorskip("numpy")
    value = [numpy.float64(1.5), numpy.int64(2), (numpy.bool_(True),), {numpy.str_("a"): numpy.float32(0.5)}]
    back = unpack(pack(value))
    assert back == [1.5, 2, (True,), {"a": 0.5}]
    assert [type(item) for item in (back[0], back[1], back[2][0])] == [float, int, bool]
    matrix = numpy.arange(6, dtype="<i4").reshape(2, 3)
    again = unpack(pack(matrix))
    assert again.dtype == matrix.dtype
    assert (again == matrix).all()
    with pytest.raises(NotPlain, match="a ndarray"):
        pack(numpy.array([object()]))
    with pytest.raises(NotPlain):
        unpack(b'{"n":["|O",[1],"0000000000000000"]}')
