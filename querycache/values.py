"""Single values from database drivers, as what MessagePack keeps, and back: exactly, and never as code.

MessagePack gives back None, booleans, floats, bytes, integers of 64 bits and well-formed text as they were:
the *plain* values. Every other type has a :class:`Form`: a tag, and functions to and from something plain (a
date is its ordinal, a UUID its bytes, a decimal its text). :func:`pack` writes a value that is not plain as
``[tag, payload]``; containers do so for what they hold. What comes back has exactly the type that went in, so
forms are looked up by exact type: a subclass would come back as its base, and is :class:`Unstorable` instead.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from itertools import chain, repeat
from operator import attrgetter, floordiv
from types import NoneType
from typing import Any, Final, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec

__all__ = [
    "FORMS_BY_TAG",
    "PLAIN",
    "Form",
    "Unstorable",
    "form_of",
    "is_document",
    "pack",
    "pack_all",
    "unpack",
    "unpack_all",
]

PLAIN: Final = frozenset({NoneType, bool, int, float, str, bytes})
_MICROSECOND: Final = timedelta(microseconds=1)


class Unstorable(TypeError):
    """A value that cannot be stored exactly: give the answer to the caller, but do not cache it.

    :ivar reason: why, in a few words fit for counting (``"type Foo"``, ``"size"``).
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"cannot be stored exactly: {reason}{detail and ': ' + detail}")
        self.reason = reason


class Form(NamedTuple):
    """How the values of one type are stored.

    ``dump`` makes something plain but not None, or lists of plain values, out of a value; ``load`` turns that
    back. ``dump_many`` and ``load_many`` do the same for a list of values, where that can be done faster than
    one by one. ``immutable`` tells whether several readers may share one loaded value.
    """

    tag: str
    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]
    dump_many: Callable[[list[Any]], list[Any]] | None = None
    load_many: Callable[[list[Any]], list[Any]] | None = None
    immutable: bool = False


def pack(value: Any) -> Any:
    """One value as a plain value or ``[tag, payload]``.

    :raises Unstorable: its type, or that of something inside it, has no form.
    """
    kind = type(value)
    if kind is int and not -(2**63) <= value < 2**64:
        return ["int", hex(value)]
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return ["str", value.encode("utf-8", "surrogatepass")]
    if kind in PLAIN:
        return value
    form = form_of(kind)
    return [form.tag, form.dump(value)]


def unpack(packed: Any) -> Any:
    """The value that :func:`pack` was given. Raises whatever the loader of a bad payload raises."""
    if type(packed) is list:
        tag, payload = packed
        return FORMS_BY_TAG[tag].load(payload)
    if type(packed) not in PLAIN:
        raise ValueError(f"a tagged value cannot be a {type(packed).__name__}")
    return packed


def pack_all(values: Iterable[Any]) -> list[Any]:
    """Each value packed; see :func:`pack`."""
    return [pack(value) for value in values]


def unpack_all(packed: Iterable[Any]) -> list[Any]:
    """Each value unpacked; see :func:`unpack`."""
    return [unpack(value) for value in packed]


def is_document(value: Any) -> bool:
    """Whether ``value`` is plain, or lists and string-keyed dicts of plain values all the way down."""
    kind = type(value)
    if kind is dict:
        if not set(map(type, value)) <= {str}:
            return False
        value = value.values()
    elif kind is not list:
        return kind in PLAIN
    return set(map(type, value)) <= PLAIN or all(map(is_document, value))


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _is_bare(zone: tzinfo | None) -> bool:
    """Whether ISO 8601 says all there is to say about ``zone``: none, or a fixed offset without a name.

    Offsets of fractions of a second are left out: CPython reads +00:00:00.000001 as UTC.
    """
    if zone is None:
        return True
    if type(zone) is not timezone:
        return False
    offset = zone.utcoffset(None)
    return not offset.microseconds and zone.tzname(None) == timezone(offset).tzname(None)


def _dump_zone(zone: tzinfo | None) -> Any:
    if zone is None:
        return None
    if type(zone) is ZoneInfo and zone.key:
        return zone.key
    if type(zone) is timezone:
        # the application's own name, which may have lone surrogates
        name = str(zone.tzname(None)).encode("utf-8", "surrogatepass")
        return [zone.utcoffset(None) // _MICROSECOND, name]
    raise Unstorable(f"time zone {_type_name(type(zone))}", repr(zone))


def _load_zone(packed: Any) -> tzinfo | None:
    if packed is None:
        return None
    if isinstance(packed, str):
        return ZoneInfo(packed)
    offset, name = timezone(timedelta(microseconds=packed[0])), packed[1].decode("utf-8", "surrogatepass")
    # Without a name of its own where it had none, so that timezone.utc comes back as itself.
    return offset if offset.tzname(None) == name else timezone(offset.utcoffset(None), name)


def _dump_moment(moment: datetime | time) -> Any:
    """ISO 8601 where that is exact, else ``[ISO 8601 without zone, fold, zone]``."""
    if not moment.fold and _is_bare(moment.tzinfo):
        return moment.isoformat()
    return [moment.replace(tzinfo=None).isoformat(), moment.fold, _dump_zone(moment.tzinfo)]


def _load_moment(kind: type[datetime] | type[time], packed: Any) -> datetime | time:
    if type(packed) is str:
        return kind.fromisoformat(packed)
    text, fold, zone = packed
    return kind.fromisoformat(text).replace(tzinfo=_load_zone(zone), fold=fold)


def _dump_moments(kind: type[datetime] | type[time], moments: list[Any]) -> list[Any]:
    # By identity: equal time zones can differ in their names.
    zones = {id(zone): zone for zone in map(attrgetter("tzinfo"), moments)}
    if any(map(attrgetter("fold"), moments)) or not all(map(_is_bare, zones.values())):
        return list(map(_dump_moment, moments))
    return list(map(kind.isoformat, moments))


def _load_moments(kind: type[datetime] | type[time], packed: list[Any]) -> list[Any]:
    if set(map(type, packed)) <= {str}:
        return list(map(kind.fromisoformat, packed))
    return [_load_moment(kind, value) for value in packed]


def _moment_form(kind: type[datetime] | type[time]) -> Form:
    dump_many, load_many = partial(_dump_moments, kind), partial(_load_moments, kind)
    return Form(
        kind.__name__, _dump_moment, partial(_load_moment, kind), dump_many, load_many, immutable=True
    )


def _dump_memoryview(view: memoryview) -> bytes:
    if view.format != "B" or view.ndim != 1:
        raise Unstorable("memoryview not of bytes", f"format {view.format!r}, {view.ndim} dimensions")
    return view.tobytes()


def _load_pairs(packed: list[Any]) -> dict[Any, Any]:
    flat = iter(unpack_all(packed))
    return dict(zip(flat, flat, strict=True))


def _loaded_type(tag: str) -> Any:
    """The class of a database client that ``tag`` names, or None where that client is not in use.

    Found in what the client itself has loaded: nothing is imported here, least of all because bytes name it.
    """
    module, _, name = tag.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _dump_range(value: Any) -> Any:
    return [] if value.isempty else [pack(value.lower), pack(value.upper), value.bounds]


def _load_range(tag: str, packed: Any) -> Any:
    if not packed:
        return _loaded_type(tag)(empty=True)
    lower, upper, bounds = packed
    return _loaded_type(tag)(unpack(lower), unpack(upper), bounds)


def _load_multirange(tag: str, packed: Any) -> Any:
    return _loaded_type(tag)(unpack_all(packed))


_FORMS: Final[dict[type, Form]] = {
    Decimal: Form("decimal", str, Decimal, immutable=True),
    date: Form("date", date.toordinal, date.fromordinal, immutable=True),
    datetime: _moment_form(datetime),
    time: _moment_form(time),
    timedelta: Form(
        "timedelta",
        lambda value: pack(value // _MICROSECOND),
        lambda packed: timedelta(microseconds=unpack(packed)),
        lambda values: list(map(floordiv, values, repeat(_MICROSECOND))),
        lambda packed: list(map(timedelta, repeat(0), repeat(0), packed)),
        immutable=True,
    ),
    UUID: Form(
        "uuid",
        attrgetter("bytes"),
        lambda packed: UUID(bytes=packed),
        None,
        lambda packed: msgspec.convert(packed, list[UUID]),
        immutable=True,
    ),
    **{
        kind: Form(kind.__name__, str, kind, immutable=True)
        for kind in (IPv4Address, IPv6Address, IPv4Interface, IPv6Interface, IPv4Network, IPv6Network)
    },
    bytearray: Form("bytearray", bytes, bytearray),
    memoryview: Form("memoryview", _dump_memoryview, memoryview),
    array: Form(
        "array",
        lambda value: [value.typecode, pack_all(value)],
        lambda packed: array(packed[0], unpack_all(packed[1])),
    ),
    list: Form("list", pack_all, unpack_all),
    tuple: Form("tuple", pack_all, lambda packed: tuple(unpack_all(packed))),
    set: Form("set", pack_all, lambda packed: set(unpack_all(packed))),
    frozenset: Form("frozenset", pack_all, lambda packed: frozenset(unpack_all(packed))),
    dict: Form("dict", lambda value: pack_all(chain.from_iterable(value.items())), _load_pairs),
}

_SUBTYPES: Final = ("", "Int4", "Int8", "Numeric", "Date", "Timestamp", "Timestamptz")
_RANGES: Final = [f"psycopg.types.range.{subtype}Range" for subtype in _SUBTYPES]
_MULTIRANGES: Final = [f"psycopg.types.multirange.{subtype}Multirange" for subtype in _SUBTYPES]
# Types of clients that may not be installed, by full name, which is also the tag.
_CLIENT_FORMS: Final[dict[str, Form]] = {
    **{tag: Form(tag, _dump_range, partial(_load_range, tag)) for tag in _RANGES},
    **{tag: Form(tag, pack_all, partial(_load_multirange, tag)) for tag in _MULTIRANGES},
}

FORMS_BY_TAG: Final[dict[str, Form]] = {
    **{form.tag: form for form in _FORMS.values()},
    **_CLIENT_FORMS,
    # Values of plain types that MessagePack does not hold: big integers, and text with lone surrogates.
    "int": Form("int", hex, lambda packed: int(packed, 16), immutable=True),
    "str": Form("str", str.encode, lambda packed: packed.decode("utf-8", "surrogatepass"), immutable=True),
}


def form_of(kind: type) -> Form:
    """The form for values of exactly the type ``kind``.

    :raises Unstorable: there is none.
    """
    form = _FORMS.get(kind)
    if form is None:
        tag = _type_name(kind)
        form = _CLIENT_FORMS.get(tag)
        if form is None or _loaded_type(tag) is not kind:
            raise Unstorable(f"type {tag}")
    return form
