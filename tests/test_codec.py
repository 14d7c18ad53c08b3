"""Rows come back from bytes exactly as the driver gave them, or not at all."""

from __future__ import annotations

import enum
import io
import ipaddress
import math
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zlib
from array import array
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from random import Random
from types import NoneType
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg.types import multirange
from psycopg.types import range as pg_range

from querycache.codec import Codec, Corrupt, RowSet, Unstorable, pack_rows, unpack_rows
from querycache.values import FORMS_BY_TAG


class Entry(msgspec.Struct, array_like=True, frozen=True):
    layout: str
    rows: RowSet
    more: dict[str, bytes] = {}


KEY = b"sixteen bytes or more"
CODEC = Codec(Entry)
SIGNED = Codec(Entry, signing_key=KEY)
COMPRESSED = Codec(Entry, compress_above=0)
BOTH = Codec(Entry, signing_key=KEY, compress_above=0)
CODECS = pytest.mark.parametrize(
    "codec", [CODEC, SIGNED, COMPRESSED, BOTH], ids=["plain", "signed", "compressed", "signed-compressed"]
)


def through_bytes(rows: list[Any], width: int, codec: Codec[Entry] = CODEC) -> list[tuple[Any, ...]]:
    return unpack_rows(codec.decode(codec.encode(Entry("l", pack_rows(rows, width)))).rows)


def exact(value: Any) -> Any:
    """Something that is equal for two values only if nothing can tell them apart."""
    kind = type(value)
    if kind in (list, tuple, multirange.Multirange) or issubclass(kind, multirange.Multirange):
        return kind, [exact(item) for item in value]
    if kind is dict:
        return kind, [(exact(key), exact(item)) for key, item in value.items()]
    if kind in (set, frozenset):
        return kind, sorted(repr(exact(item)) for item in value)
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is Decimal:
        return kind, value.as_tuple()
    if kind in (datetime, time):
        local = value.replace(tzinfo=None)
        return kind, local, value.fold, exact(value.tzinfo), value.utcoffset(), value.tzname()
    if kind is ZoneInfo:
        return kind, value.key
    if kind is timezone:
        return kind, value.utcoffset(None), value.tzname(None)
    if kind is memoryview:
        return kind, value.tobytes()
    if kind is array:
        return kind, value.typecode, exact(value.tolist())
    if issubclass(kind, pg_range.Range):
        return kind, exact(value.lower), exact(value.upper), value.bounds, value.isempty
    return kind, value


def assert_exact(rows: list[tuple[Any, ...]], width: int) -> None:
    rowset = pack_rows(rows, width)
    assert exact(unpack_rows(rowset)) == exact(rows)
    for codec in (CODEC, SIGNED, COMPRESSED):
        assert exact(through_bytes(rows, width, codec)) == exact(rows)


# --- every type -------------------------------------------------------------------------------------------

any_text = st.text(st.characters(codec=None))  # with lone surrogates
offsets = st.timedeltas(timedelta(hours=-23), timedelta(hours=23))
zones: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.just(timezone.utc),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Etc/GMT+5"]).map(
        ZoneInfo
    ),
    st.builds(timezone, offsets),
    st.builds(timezone, offsets, any_text),
    st.builds(timezone, st.sampled_from([timedelta(0), timedelta(hours=1)]), st.sampled_from(["GMT", "UTC"])),
)


def with_fold(value: Any, fold: int) -> Any:
    return value.replace(fold=fold)


folds = st.sampled_from([0, 0, 0, 1])
datetimes = st.builds(
    with_fold, st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=zones), folds
)
times = st.builds(with_fold, st.times(timezones=zones), folds)
edge_ints = st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1])
floats = st.floats() | st.sampled_from([-0.0, math.nan, -math.nan, math.inf, 5e-324])
edge_decimals = ["-0", "0E+7", "1.000", "NaN", "-NaN123", "sNaN", "-sNaN7", "-Infinity", "9" * 60, "1E-999"]
decimals = st.decimals() | st.sampled_from(edge_decimals).map(Decimal)
edge_timedeltas = st.sampled_from([timedelta.min, timedelta.max, -timedelta(microseconds=1)])
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "none": st.none(),
    "bool": st.booleans(),
    "int": st.integers(-(2**63), 2**63 - 1),
    "big int": edge_ints | st.integers(-(2**200), 2**200),
    "float": floats,
    "str": any_text,
    "bytes": st.binary(),
    "decimal": decimals,
    "date": st.dates(),
    "datetime": datetimes,
    "time": times,
    "timedelta": st.timedeltas() | edge_timedeltas,
    "uuid": st.uuids(),
    "ip": st.ip_addresses() | st.just(ipaddress.IPv6Address("fe80::1%eth0")),
    "ip interface": st.ip_addresses().map(lambda ip: ipaddress.ip_interface(f"{ip}/7")),
    "ip network": st.ip_addresses().map(lambda ip: ipaddress.ip_network(f"{ip}/7", strict=False)),
}
ZONED: dict[str, st.SearchStrategy[Any]] = {
    str(zone): st.datetimes(timezones=st.just(zone)) for zone in (ZoneInfo("Europe/Berlin"), timezone.utc)
}
scalars: st.SearchStrategy[Any] = st.deferred(lambda: st.one_of(*SCALARS.values()))
hashable_scalars = scalars.filter(lambda value: not (type(value) is Decimal and value.is_snan()))
hashables = st.recursive(
    hashable_scalars, lambda s: st.tuples(s, s) | st.frozensets(s, max_size=3), max_leaves=4
)
bounds = st.sampled_from(["[]", "[)", "(]", "()"])
ranges = st.builds(pg_range.Range, st.none() | st.integers(), st.none() | st.integers(), bounds)
MUTABLES: dict[str, st.SearchStrategy[Any]] = {
    "bytearray": st.binary().map(bytearray),
    "memoryview": st.binary().map(memoryview),
    "array": st.lists(st.integers(-9, 9)).map(lambda items: array("h", items))
    | st.lists(st.floats(width=32)).map(lambda items: array("f", items)),
    "json": st.recursive(
        st.none() | st.booleans() | st.integers() | floats | any_text,
        lambda s: st.lists(s, max_size=4) | st.dictionaries(any_text, s, max_size=4),
    ),
    "sql array": st.lists(decimals | st.none() | st.lists(datetimes, max_size=2), max_size=4),
    "hstore": st.dictionaries(st.text(), st.text() | st.none()),
    "dict of any key": st.dictionaries(hashables, scalars, max_size=4),
    "set": st.sets(hashables, max_size=4),
    "range": ranges | st.just(pg_range.Range(empty=True)) | datetimes.map(pg_range.TimestamptzRange),
    "multirange": st.lists(ranges, max_size=3).map(multirange.Multirange),
    "nested": st.recursive(
        scalars, lambda s: st.lists(s) | st.tuples(s, s) | st.dictionaries(hashables, s), max_leaves=9
    ),
}
anything = st.one_of(scalars, *MUTABLES.values())


def nullable_column(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, max_size=12) | st.lists(st.none() | values, max_size=12)


@pytest.mark.parametrize("kind", [*SCALARS, *ZONED, *MUTABLES])
def test_a_column_of_one_type_comes_back_exactly(kind: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(nullable_column((SCALARS | ZONED | MUTABLES)[kind]))
    def holds(column: list[Any]) -> None:
        assert_exact([(value,) for value in column], 1)

    holds()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 6).flatmap(lambda width: st.lists(st.tuples(*[anything] * width), max_size=8)))
def test_rows_of_anything_come_back_exactly(rows: list[tuple[Any, ...]]) -> None:
    assert_exact(rows, len(rows[0]) if rows else 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 300, 2000]))
def test_many_rows_come_back_exactly(seed: int, count: int) -> None:
    random = Random(seed)
    choices: list[Callable[[], Any]] = [
        lambda: random.randrange(-(2**63), 2**63),
        lambda: str(random.random()),
        lambda: Decimal(random.randrange(10**9)).scaleb(-random.randrange(9)),
        lambda: datetime(2024, 10, 27) + timedelta(seconds=random.randrange(10**6)),
        lambda: datetime.fromtimestamp(1.73e9 + random.randrange(10**7), ZoneInfo("Europe/Berlin")),
        lambda: UUID(int=random.getrandbits(128)),
        lambda: [random.random(), {"k": [random.randrange(9)]}],
    ]
    makers = [random.choice(choices) for _ in range(random.randrange(1, 9))]
    nullable = [random.random() < 0.3 for _ in makers]
    rows = []
    for _ in range(count):
        row = (
            None if null and random.random() < 0.5 else make()
            for make, null in zip(makers, nullable, strict=True)
        )
        rows.append(tuple(row))
    assert_exact(rows, len(makers))


def test_B6_one_true_and_text_one_stay_what_they_are() -> None:
    rows = [(1, 1.0, True, "1", b"1", Decimal(1)), (True, 1, 1.0, b"1", "1", 1)]
    assert_exact(rows, 6)
    assert_exact([(value,) for value in rows[0]], 1)
    assert_exact([([value],) for value in rows[0]], 1)


def test_D12_no_rows_rows_of_null_and_rows_without_columns_are_answers() -> None:
    answers: list[tuple[list[Any], int]] = [([], 3), ([], 0), ([(None,)], 1), ([(None, None)] * 3, 2)]
    for rows, width in [*answers, ([(), ()], 0)]:
        assert through_bytes(rows, width) == rows
        assert pack_rows(rows, width).width == width
        assert len(pack_rows(rows, width)) == len(rows)


def test_rows_may_be_any_sequences() -> None:
    class DriverRow(tuple[object, ...]):
        pass

    assert exact(through_bytes([[1, "a"], DriverRow([2, "b"])], 2)) == exact([(1, "a"), (2, "b")])


def test_both_readings_of_an_ambiguous_local_time_stay_apart() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    summer, winter = (datetime(2024, 10, 27, 2, 30, tzinfo=berlin, fold=fold) for fold in (0, 1))
    assert summer.utcoffset() != winter.utcoffset()
    assert_exact([(summer,), (winter,)], 1)
    assert_exact([(winter.time(), winter.timetz())], 2)


@pytest.mark.parametrize("name", ["", "Büro", "a\0b", "\ud800"])
def test_a_zone_keeps_the_name_that_it_was_given(name: str) -> None:
    zone = timezone(timedelta(hours=1), name)
    assert_exact([(time(1, tzinfo=zone), datetime(2024, 1, 1, tzinfo=zone)), (None, None)], 2)


def test_the_zone_of_a_datetime_is_the_same_object_in_this_process() -> None:
    for zone in (ZoneInfo("Asia/Tokyo"), timezone.utc):
        moment = datetime(2024, 1, 1, tzinfo=zone)
        value, folded, inside = through_bytes([(moment, moment.replace(fold=1), [moment])], 3)[0]
        assert value.tzinfo is folded.tzinfo is inside[0].tzinfo is zone


def test_extreme_moments() -> None:
    east = timezone(timedelta(hours=23, minutes=59, seconds=59, microseconds=1))
    west = timezone(timedelta(hours=-23))
    assert_exact([(datetime.min, datetime.max)], 2)
    assert_exact([(datetime.min.replace(tzinfo=east), datetime.max.replace(tzinfo=west))], 2)
    assert_exact([(date.min, date.max, time.min, time.max, timedelta.min, timedelta.max)], 6)
    berlin = ZoneInfo("Europe/Berlin")
    assert_exact([(datetime.min.replace(tzinfo=berlin),), (datetime(2024, 3, 31, 2, 30, tzinfo=berlin),)], 1)


def test_a_document_is_new_each_time() -> None:
    entry = CODEC.encode(Entry("l", pack_rows([({"a": [1]},)], 1)))
    ((first,),) = unpack_rows(CODEC.decode(entry).rows)
    first["a"].append(2)  # type: ignore[index]
    assert unpack_rows(CODEC.decode(entry).rows) == [({"a": [1]},)]


@pytest.mark.parametrize("kind", [*SCALARS, *ZONED, *MUTABLES])
def test_only_what_nobody_can_change_is_called_immutable(kind: str) -> None:
    @settings(max_examples=10, deadline=None)
    @given((SCALARS | ZONED | MUTABLES)[kind])
    def holds(value: Any) -> None:
        immutable = pack_rows([(1, value)], 2).immutable
        if isinstance(value, (list, dict, set, bytearray, memoryview, array, multirange.Multirange)):
            assert not immutable
        elif kind in ZONED or type(value) in (NoneType, bool, float, bytes, Decimal, date, UUID):
            assert immutable

    holds()


# --- what cannot be stored --------------------------------------------------------------------------------


class Colour(enum.IntEnum):
    RED = 1


class Name(str):
    pass


class Cents(Decimal):
    pass


class Moment(datetime):
    pass


class Odd(tzinfo):
    def utcoffset(self, moment: datetime | None) -> timedelta:
        return timedelta(0)

    def tzname(self, moment: datetime | None) -> str:
        return "odd"

    def dst(self, moment: datetime | None) -> None:
        return None


class Pretender:
    """Calls itself a client's type."""


Pretender.__module__, Pretender.__qualname__ = "psycopg.types.range", "Range"
Stranger = type("Stranger", (), {"__module__": "no.such.module"})
Point = namedtuple("Point", "x y")
# A zone that was read from a file knows no key to find it by again.
TZIF = b"TZif" + bytes(16) + struct.pack(">6l", 0, 0, 0, 0, 1, 4) + bytes(6) + b"UTC\0"
NAMELESS = ZoneInfo.from_file(io.BytesIO(TZIF))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (object(), "type object"),
        (Colour.RED, "Colour"),
        (Name("x"), "Name"),
        (Cents(1), "Cents"),
        (Moment(2024, 1, 1), "Moment"),
        (OrderedDict(a=1), "OrderedDict"),
        (Point(1, 2), "Point"),
        (1j, "type complex"),
        (Pretender(), "psycopg.types.range.Range"),
        (Stranger(), "no.such.module.Stranger"),
        (datetime(2024, 1, 1, tzinfo=Odd()), "Odd"),
        (time(tzinfo=Odd()), "Odd"),
        (datetime(2024, 1, 1, tzinfo=NAMELESS), "zoneinfo.ZoneInfo"),
        (memoryview(array("i", [1])), "memoryview"),
    ],
)
@pytest.mark.parametrize("inside", ["alone", "beside", "list", "dict", "key", "range"])
def test_D9_a_value_of_an_unknown_type_is_unstorable_and_named(value: Any, name: str, inside: str) -> None:
    rows: list[tuple[Any, ...]]
    if inside == "alone":
        rows = [(1, value), (2, None)]
    elif inside == "beside":
        rows = [(1, value), (2, "x")]
    elif inside == "list":
        rows = [(1, [[value]])]
    elif inside == "dict":
        rows = [(1, {"a": {"b": value}})]
    elif inside == "key":
        if type(value) in (OrderedDict, memoryview):
            value = (object(),)
            name = "type object"
        rows = [(1, {value: 1})]
    else:
        rows = [(1, pg_range.Range(value, None))]
    with pytest.raises(Unstorable) as caught:
        pack_rows(rows, 2)
    assert name in caught.value.reason
    assert caught.value.reason in str(caught.value)


def test_a_value_that_contains_itself_or_nests_too_deeply_is_unstorable() -> None:
    loop: list[Any] = []
    loop.append(loop)
    deep: Any = None
    for _ in range(100_000):
        deep = [deep]
    for value in (loop, deep, (loop,), {1: deep}):
        with pytest.raises(Unstorable, match="nesting"):
            pack_rows([(value,)], 1)
    while deep:  # taken apart level by level, for the sake of interpreters that free recursively
        deep = deep[0]


@pytest.mark.parametrize("rows", [[(1, 2), (3,)], [(1,)], [(1, 2, 3)], [()]])
def test_rows_of_another_width_are_unstorable(rows: list[tuple[Any, ...]]) -> None:
    with pytest.raises(Unstorable, match="width"):
        pack_rows(rows, 2)


def test_a_field_that_messagepack_does_not_hold_is_unstorable() -> None:
    rows = pack_rows([], 1)
    values: list[Any] = [2**64, object(), "\ud800"]
    for entry in (Entry("\ud800", rows), *(Entry("l", rows, {"a": value}) for value in values)):
        with pytest.raises(Unstorable, match="value"):
            CODEC.encode(entry)


def test_more_than_the_limit_is_unstorable() -> None:
    with pytest.raises(Unstorable, match="size"):
        COMPRESSED.encode(Entry("l", pack_rows([(bytes(64 * 2**20),)], 1)))


# --- types of database clients ----------------------------------------------------------------------------


@pytest.mark.parametrize("subtype", ["", "Int4", "Int8", "Numeric", "Date", "Timestamp", "Timestamptz"])
def test_every_range_type_comes_back_as_itself(subtype: str) -> None:
    kind = getattr(pg_range, f"{subtype}Range")
    several = getattr(multirange, f"{subtype}Multirange")
    bounds: Any = {"Date": date(2024, 1, 1), "Numeric": Decimal("1.50"), "": "a"}.get(subtype, 1)
    if subtype.startswith("Timestamp"):
        bounds = datetime(2024, 1, 1, tzinfo=ZoneInfo("Europe/Berlin") if subtype == "Timestamptz" else None)
    values = [kind(bounds, None), kind(None, bounds, "(]"), kind(bounds, bounds, "[]"), kind(empty=True)]
    assert_exact([(value, several([value]), [value]) for value in values], 3)


def test_a_client_that_is_not_loaded_is_neither_needed_nor_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = CODEC.encode(Entry("l", pack_rows([(pg_range.Range(1, 2),)], 1)))
    monkeypatch.delitem(sys.modules, "psycopg.types.range")
    rowset = CODEC.decode(entry).rows
    with pytest.raises(Corrupt, match="undecodable"):
        unpack_rows(rowset)
    assert "psycopg.types.range" not in sys.modules
    alone = "import querycache.codec, sys; sys.exit('psycopg' in sys.modules)"
    subprocess.run([sys.executable, "-c", alone], check=True)


# --- the envelope -----------------------------------------------------------------------------------------

SAMPLE = Entry(
    "l", pack_rows([(1, "a", Decimal("1.5"), None), (2, "ä" * 9, Decimal(2), {"k": [1.5]})], 4), {"m": b"\0"}
)
HEADER = struct.Struct(">3sBBII")


def reseal(payload: bytes, *, flags: int = 0, size: int | None = None) -> bytes:
    """An unsigned envelope, as the module describes it, around any payload."""
    body = HEADER.pack(b"\xc1qc", 1, flags, len(payload), len(payload) if size is None else size) + payload
    return body + zlib.crc32(body).to_bytes(4, "big")


def deflate(payload: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(payload) + packer.flush()


def reason(codec: Codec[Entry], data: bytes, **context: bytes) -> str:
    with pytest.raises(Corrupt) as caught:
        codec.decode(data, **context)
    assert caught.value.reason in str(caught.value)
    return caught.value.reason


@CODECS
def test_an_entry_comes_back_equal(codec: Codec[Entry]) -> None:
    assert codec.decode(codec.encode(SAMPLE)) == SAMPLE
    assert codec.encode(SAMPLE) == codec.encode(SAMPLE)


def test_the_layout_of_the_envelope() -> None:
    payload = msgspec.msgpack.encode(SAMPLE)
    assert CODEC.encode(SAMPLE) == reseal(payload)
    assert CODEC.decode(reseal(deflate(payload), flags=1, size=len(payload))) == SAMPLE


@CODECS
def test_D8_every_change_of_one_byte_is_noticed(codec: Codec[Entry]) -> None:
    data = codec.encode(SAMPLE)
    seen = set()
    for position in range(len(data)):
        for flip in (*(1 << bit for bit in range(8)), 0xFF, 0x55):
            changed = bytearray(data)
            changed[position] ^= flip
            seen.add(reason(codec, bytes(changed)))
    assert {"foreign", "version", "truncated", "length", "signature"} <= seen
    assert ("checksum" in seen) == (codec in (CODEC, COMPRESSED))


@CODECS
def test_D8_every_truncation_is_noticed(codec: Codec[Entry]) -> None:
    data = codec.encode(SAMPLE)
    assert {reason(codec, data[:end]) for end in range(len(data))} == {"truncated"}
    assert reason(codec, data + b"\0") == "length"


@CODECS
def test_D8_foreign_bytes_are_a_miss(codec: Codec[Entry]) -> None:
    for foreign in (pickle.dumps(1), b"{}", b"\x93\x01", b"x" * 1000, codec.encode(SAMPLE)[1:]):
        assert reason(codec, foreign) == "foreign"


@CODECS
def test_D8_another_format_version_is_a_miss(codec: Codec[Entry]) -> None:
    data = bytearray(codec.encode(SAMPLE))
    for version in (0, 2, 255):
        data[3] = version
        assert reason(codec, bytes(data)) == "version"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_D8_random_bytes_are_corrupt(data: bytes, with_magic: bool) -> None:
    for codec in (CODEC, SIGNED):
        assert reason(codec, b"\xc1qc\x01" + data if with_magic else data)


def rows_or_corrupt(data: bytes) -> None:
    """Bytes with a right seal but any content give something or are corrupt; no other error comes out."""
    try:
        rows = unpack_rows(CODEC.decode(data).rows)
    except Corrupt as corrupt:
        assert corrupt.reason in ("undecodable", "length")
    else:
        assert all(type(row) is tuple for row in rows)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(anything, anything), max_size=3), st.data())
def test_D8_sealed_nonsense_is_corrupt_and_nothing_worse(rows: list[Any], data: st.DataObject) -> None:
    payload = bytearray(msgspec.msgpack.encode(Entry("l", pack_rows(rows, 2))))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    rows_or_corrupt(reseal(bytes(payload)))
    rows_or_corrupt(reseal(bytes(payload), flags=1, size=len(payload)))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text() | st.integers(0, 9), s, max_size=3),
    max_leaves=6,
)
forms = st.sampled_from(["document", "tagged", "zoned", "no such form", "os.path.join", *FORMS_BY_TAG])
tagged = st.lists(st.tuples(forms, json_like | st.lists(json_like)) | json_like, max_size=3)


@settings(max_examples=400, deadline=None)
@given(
    st.integers(-1, 3),
    st.lists(st.lists(json_like, max_size=3) | tagged, max_size=3),
    st.lists(
        st.tuples(st.integers(-1, 3), forms, st.sampled_from(["", "Europe/Berlin", "Europe", "../x", "\0"]))
    ),
)
@example(1, [["2024-01-01"]], [(0, "zoned", "Europe")])
@example(1, [["2024-01-01"]], [(0, "zoned", "")])
@example(1, [["x"]], [(0, "decimal", "")])
@example(1, [[2**63]], [(0, "date", "")])
@example(1, [[2**63]], [(0, "timedelta", "")])
@example(0, [], [])
def test_D8_row_sets_that_nobody_packed(width: int, columns: list[Any], special: list[Any]) -> None:
    rows_or_corrupt(reseal(msgspec.msgpack.encode(("l", (width, columns, special)))))


def test_D8_columns_of_different_lengths_are_corrupt() -> None:
    for rowset in (RowSet(2, [[1, 2], [1]], []), RowSet(3, [[1], [1]], []), RowSet(1, [[1], [1]], [])):
        with pytest.raises(Corrupt, match="undecodable"):
            unpack_rows(rowset)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xdd\xff\xff\xff\xff",
        b"\x92\xa1l\x93\x01\x91" + b"\xdd\x7f\xff\xff\xff" * 50,
        b"\x92\xa1l\x93\x01\x91" + b"\x91" * 200_000,
        b"\x92\xa1l\x93\x01\x91\x91\xc6\xff\xff\xff\xff",
        b"\x92\xa1l\x93\x01\x91\x91\xdf\xff\xff\xff\xff",
        b"\x92\xa1l\x93\x01\x91\x91\xc7\x01\x05x\x90",  # an extension type
        b"\x92\xa1l\x93\x01\x91\x91\xa1\xff\x90",  # text that is not UTF-8
    ],
)
def test_a_payload_that_promises_more_than_it_has_is_corrupt_and_cheap(payload: bytes) -> None:
    tracemalloc.start()
    try:
        assert reason(CODEC, reseal(payload)) == "undecodable"
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("claimed", [0, 1, 1000, 2**26, 2**32 - 1])
def test_a_bomb_does_not_go_off(claimed: int) -> None:
    bomb = deflate(bytes(100 * 2**20))
    assert len(bomb) < 200_000
    tracemalloc.start()
    try:
        assert reason(CODEC, reseal(bomb, flags=1, size=claimed)) == "length"
        assert tracemalloc.get_traced_memory()[1] < 3 * min(claimed, 2**26) + 2**20
    finally:
        tracemalloc.stop()


def test_deflated_bytes_that_end_early_or_are_none() -> None:
    payload = msgspec.msgpack.encode(SAMPLE)
    assert reason(CODEC, reseal(deflate(payload)[:-3], flags=1, size=len(payload))) == "length"
    assert reason(CODEC, reseal(b"", flags=1, size=0)) == "length"
    assert reason(CODEC, reseal(payload, flags=1, size=len(payload))) in ("undecodable", "length")


def test_entries_of_another_struct_are_corrupt() -> None:
    class Other(msgspec.Struct, array_like=True):
        number: int

    assert reason(CODEC, Codec(Other).encode(Other(1))) == "undecodable"


# --- signatures and contexts ------------------------------------------------------------------------------


def test_unsigned_bytes_are_refused_where_there_is_a_key_and_signed_where_there_is_none() -> None:
    assert reason(SIGNED, CODEC.encode(SAMPLE)) == "signature"
    assert reason(CODEC, SIGNED.encode(SAMPLE)) == "signature"
    assert reason(SIGNED, reseal(msgspec.msgpack.encode(SAMPLE), flags=2)) in ("signature", "truncated")
    assert reason(Codec(Entry, signing_key=KEY + b"!"), SIGNED.encode(SAMPLE)) == "signature"


@pytest.mark.parametrize("codec", [CODEC, SIGNED])
def test_an_entry_belongs_to_its_context(codec: Codec[Entry]) -> None:
    data = codec.encode(SAMPLE, context=b"key 1")
    assert codec.decode(data, context=b"key 1") == SAMPLE
    for other in (b"key 2", b"", b"key 1\0"):
        assert reason(codec, data, context=other) in ("checksum", "signature")


def test_context_and_body_cannot_be_cut_elsewhere() -> None:
    # The header of an envelope that would hold all of the one that follows, its key stretched over it.
    size = len(SIGNED.encode(SAMPLE)) - 16
    header = HEADER.pack(b"\xc1qc", 1, 2, size, size)
    data = SIGNED.encode(SAMPLE, context=b"key" + header)
    assert reason(SIGNED, header + data, context=b"key") == "signature"


@pytest.mark.parametrize("key", [b"", b"short"])
def test_a_short_signing_key_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match=f"{len(key)} bytes; give at least 16"):
        Codec(Entry, signing_key=key)


# --- compression ------------------------------------------------------------------------------------------


def test_only_what_is_large_and_gets_smaller_is_deflated() -> None:
    def flags(codec: Codec[Entry], text: str) -> int:
        return codec.encode(Entry(text, pack_rows([], 1)))[4]

    codec = Codec(Entry, compress_above=1000)
    assert [flags(codec, "x" * 900), flags(codec, "x" * 1100)] == [0, 1]
    assert flags(COMPRESSED, "abc") == 0
    assert flags(Codec(Entry, compress_above=None), "x" * 10**6) == 0
    assert [flags(CODEC, "x" * 200_000), flags(CODEC, "x" * 300_000)] == [0, 1]


def test_a_negative_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="compress_above is -1"):
        Codec(Entry, compress_above=-1)
