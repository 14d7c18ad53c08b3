"""What a cache entry is made of: rows by column, in an envelope that proves itself.

:func:`pack_rows` turns the raw rows of a driver into a :class:`RowSet`, which is *columnar*: the values of
one column have one type, so the way to store it is decided once per column and the work per value stays
in C. A column of plain values (:mod:`querycache.values`) is stored as it is, a column of one other known
type in that type's form, a column of lists and string-keyed dicts of plain values as a document; in any
other column each value carries the tag of its type. :func:`unpack_rows` gives back equal values of
exactly the original types.

:class:`Codec` turns a msgspec struct, which may contain row sets, into bytes::

    magic (3) | version (1) | flags (1) | stored length (4) | raw length (4) | payload | seal

The payload is MessagePack, deflated above a threshold. The seal is a truncated HMAC-SHA256 where there is a
signing key, else a CRC-32, over everything before it. Whatever is not such an envelope is :class:`Corrupt`:
to a cache, a miss.
"""

from __future__ import annotations

import hmac
import struct
import zlib
from collections.abc import Sequence
from datetime import datetime
from itertools import repeat
from operator import attrgetter
from types import NoneType
from typing import Any, Final, Generic, TypeVar
from zoneinfo import ZoneInfo

import msgspec

from querycache.values import FORMS_BY_TAG, PLAIN, Unstorable, form_of, is_document, pack_all, unpack_all

__all__ = ["Codec", "Corrupt", "RowSet", "Unstorable", "pack_rows", "unpack_rows"]

T = TypeVar("T")


class Corrupt(ValueError):
    """Bytes that are no valid entry: to a cache, a miss.

    :ivar reason: ``"foreign"`` (not an envelope), ``"version"`` (of another format), ``"truncated"``,
        ``"length"`` (too many bytes, or not the raw length announced), ``"signature"``, ``"checksum"`` or
        ``"undecodable"``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"not a valid cache entry: {reason}")
        self.reason = reason


# What loading can raise, given bytes that this module did not write. OSError: ZoneInfo of a directory's name.
_UNDECODABLE: Final = (
    msgspec.MsgspecError,  # which is a ValueError in new versions only
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
    OSError,
)

# Forms of columns that are no forms of single values.
_DOCUMENT: Final = "document"
_TAGGED: Final = "tagged"
_ZONED: Final = "zoned"


class RowSet(msgspec.Struct, array_like=True, frozen=True):
    """The rows of one statement, by column. Made by :func:`pack_rows`, read by :func:`unpack_rows`.

    :ivar width: number of columns.
    :ivar columns: the stored values of each column. Rows without columns are kept as one column of None.
    :ivar special: ``(index, form, argument)`` of each column that is not stored as it is.
    """

    width: int
    columns: list[list[Any]]
    special: list[tuple[int, str, str]]

    def __len__(self) -> int:
        return len(self.columns[0])

    @property
    def immutable(self) -> bool:
        """Whether surely no value can be changed in place, so that readers may share the same objects."""
        return all(
            name == _ZONED or (name in FORMS_BY_TAG and FORMS_BY_TAG[name].immutable)
            for _, name, _ in self.special
        )


_probe: Final = msgspec.msgpack.Encoder()


def _holds(column: list[Any]) -> bool:
    """Whether MessagePack holds all of these values; not integers beyond 64 bits, nor lone surrogates."""
    try:
        _probe.encode(column)
    except (OverflowError, UnicodeEncodeError):
        return False
    return True


def _pack_zoned(moments: list[Any]) -> tuple[str, str, list[Any]] | None:
    """Datetimes of one named zone as local times; None where these would not be exact."""
    zone = moments[0].tzinfo
    if type(zone) is not ZoneInfo or not zone.key or any(map(attrgetter("fold"), moments)):
        return None
    if any(other is not zone for other in map(attrgetter("tzinfo"), moments)):
        return None
    local = map(datetime.combine, map(datetime.date, moments), map(datetime.time, moments))
    return _ZONED, zone.key, list(map(datetime.isoformat, local))


def _unpack_zoned(key: str, packed: list[Any]) -> list[Any]:
    # combine() mapped takes a third of the time of replace(tzinfo=...) in a loop.
    local = list(map(datetime.fromisoformat, packed))
    zones = repeat(ZoneInfo(key))
    return list(map(datetime.combine, map(datetime.date, local), map(datetime.time, local), zones))


def _pack_column(values: list[Any], kinds: set[type]) -> tuple[str, str, list[Any]]:
    """The form, its argument and the stored values of a column whose values are not all plain."""
    if kinds <= PLAIN | {list, dict} and all(map(is_document, values)):
        return (_DOCUMENT, "", values) if _holds(values) else (_TAGGED, "", pack_all(values))
    nullable = NoneType in kinds
    types = kinds - {NoneType}
    if len(types) > 1:
        return _TAGGED, "", pack_all(values)
    (kind,) = types
    present = [value for value in values if value is not None] if nullable else values
    packed = _pack_zoned(present) if kind is datetime else None
    if packed is None:
        form = form_of(kind)
        packed = form.tag, "", form.dump_many(present) if form.dump_many else list(map(form.dump, present))
        if not _holds(packed[2]):
            return _TAGGED, "", pack_all(values)
    name, argument, column = packed
    return name, argument, _with_nones(values, column) if nullable else column


def _unpack_column(name: str, argument: str, column: list[Any]) -> list[Any]:
    if name == _DOCUMENT:
        return column
    if name == _TAGGED:
        return unpack_all(column)
    nullable = None in column
    present = [value for value in column if value is not None] if nullable else column
    if name == _ZONED:
        values = _unpack_zoned(argument, present)
    else:
        form = FORMS_BY_TAG[name]
        values = form.load_many(present) if form.load_many else list(map(form.load, present))
    return _with_nones(column, values) if nullable else values


def _with_nones(pattern: list[Any], present: list[Any]) -> list[Any]:
    """``present`` in the places where ``pattern`` is not None."""
    following = iter(present)
    return [None if value is None else next(following) for value in pattern]


def pack_rows(rows: Sequence[Sequence[object]], width: int) -> RowSet:
    """Raw driver rows as a row set.

    :param rows: the rows, each a sequence of ``width`` values.
    :param width: number of columns, which an empty list of rows cannot tell.
    :raises Unstorable: a value is of a type that would not come back exactly; ``reason`` names the type.
    """
    try:
        columns: list[list[Any]] = list(map(list, zip(*rows, strict=True)))
    except ValueError as error:
        raise Unstorable("rows of different widths", str(error)) from error
    if rows and len(columns) != width:
        raise Unstorable("rows of another width", f"{len(columns)} values for {width} columns")
    if not columns:
        columns = [[None] * len(rows) for _ in range(width or 1)]
    special: list[tuple[int, str, str]] = []
    suspects: list[int] = []
    try:
        for index, values in enumerate(columns):
            kinds = set(map(type, values))
            if kinds <= PLAIN:
                suspects.append(index)
            else:
                name, argument, columns[index] = _pack_column(values, kinds)
                special.append((index, name, argument))
        if not _holds(columns):
            for index in suspects:
                if not _holds(columns[index]):
                    columns[index] = pack_all(columns[index])
                    special.append((index, _TAGGED, ""))
    except RecursionError as error:
        raise Unstorable("nesting", "a value is nested too deeply, or contains itself") from error
    return RowSet(width, columns, special)


def unpack_rows(rowset: RowSet) -> list[tuple[object, ...]]:
    """The rows that :func:`pack_rows` was given, as tuples.

    :raises Corrupt: :func:`pack_rows` did not make the row set, or it names a time zone or a type of a
        database client that this process does not have.
    """
    columns = rowset.columns
    try:
        if rowset.special:
            columns = columns.copy()
            for index, name, argument in rowset.special:
                columns[index] = _unpack_column(name, argument, columns[index])
        if len(columns) != (rowset.width or 1):
            raise ValueError(f"{len(columns)} columns instead of {rowset.width}")
        if not rowset.width:
            return [() for _ in columns[0]]
        return list(zip(*columns, strict=True))
    except _UNDECODABLE as error:
        raise Corrupt("undecodable") from error


_MAGIC: Final = b"\xc1qc"  # 0xC1 begins neither MessagePack nor pickle nor text
_VERSION: Final = 1
_HEADER: Final = struct.Struct(">3sBBII")
_COMPRESSED: Final = 1
_SIGNED: Final = 2
_CRC_SIZE: Final = 4
_HMAC_SIZE: Final = 16
_MAX_RAW: Final = 64 * 2**20  # bytes; what a small deflated entry may grow to


class Codec(Generic[T]):
    """Values of one msgspec struct type, as bytes in an envelope.

    :param type: the struct type.
    :param signing_key: with a key, envelopes are signed, and only envelopes signed with it are decoded.
    :param compress_above: payloads of more bytes are deflated, where that makes them smaller; None for never.
        Inflating 1 000 rows (100 kB) takes nearly twice as long as decoding what comes out, and saves half of
        the transfer: a loss on any network beyond 1 Gbit/s. The default is where size begins to count for
        itself: memcached takes 1 MB.
    :raises ValueError: ``signing_key`` is shorter than 16 bytes, or ``compress_above`` is negative.
    """

    def __init__(
        self, type: type[T], *, signing_key: bytes | None = None, compress_above: int | None = 256 * 1024
    ) -> None:
        if signing_key is not None and len(signing_key) < 16:
            raise ValueError(f"signing_key has {len(signing_key)} bytes; give at least 16 random ones")
        if compress_above is not None and compress_above < 0:
            raise ValueError(f"compress_above is {compress_above}; give a number of bytes, or None for never")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(type, ext_hook=_no_extension)
        self._key = signing_key
        self._signed = 0 if signing_key is None else _SIGNED
        self._seal_size = _CRC_SIZE if signing_key is None else _HMAC_SIZE
        self._compress_above = _MAX_RAW if compress_above is None else compress_above

    def _seal(self, body: bytes | memoryview, context: bytes) -> bytes:
        if self._key is None:
            return zlib.crc32(body, zlib.crc32(context)).to_bytes(_CRC_SIZE, "big")
        # The length keeps (context, body) pairs apart that join to the same bytes.
        message = b"".join((len(context).to_bytes(8, "big"), context, body))
        return hmac.digest(self._key, message, "sha256")[:_HMAC_SIZE]

    def encode(self, value: T, *, context: bytes = b"") -> bytes:
        """``value`` as bytes.

        :param context: where the bytes will be stored, say the key of the entry. It is sealed with them but
            is no part of them: under another context they are corrupt, so that nobody can swap entries.
        :raises Unstorable: ``value`` holds something that MessagePack does not, or more than 64 MiB.
        """
        try:
            raw = self._encoder.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise Unstorable("value", str(error)) from error
        size = len(raw)
        if size > _MAX_RAW:
            raise Unstorable("size", f"{size} bytes, of {_MAX_RAW} allowed")
        flags, payload = self._signed, raw
        if size > self._compress_above:
            deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)  # no Adler-32: the seal is enough
            deflated = deflate.compress(raw) + deflate.flush()
            if len(deflated) < size:
                flags, payload = flags | _COMPRESSED, deflated
        body = _HEADER.pack(_MAGIC, _VERSION, flags, len(payload), size) + payload
        return body + self._seal(body, context)

    def decode(self, data: bytes, *, context: bytes = b"") -> T:
        """The value that :meth:`encode` was given.

        :param context: as given to :meth:`encode`.
        :raises Corrupt: ``data`` is anything but an envelope of this format, type, signing key and context.
        """
        if data[:3] != _MAGIC:
            raise Corrupt("truncated" if _MAGIC.startswith(data[:3]) else "foreign")
        if data[3:4] and data[3] != _VERSION:
            raise Corrupt("version")
        if len(data) < _HEADER.size:
            raise Corrupt("truncated")
        _, _, flags, stored, size = _HEADER.unpack_from(data)
        if flags & _SIGNED != self._signed:
            raise Corrupt("signature")
        end = _HEADER.size + stored
        if len(data) != end + self._seal_size:
            raise Corrupt("truncated" if len(data) < end + self._seal_size else "length")
        view = memoryview(data)
        if not hmac.compare_digest(self._seal(view[:end], context), data[end:]):
            raise Corrupt("checksum" if self._key is None else "signature")
        body = view[_HEADER.size : end]
        payload = _inflate(body, size) if flags & _COMPRESSED else body
        try:
            return self._decoder.decode(payload)
        except _UNDECODABLE as error:
            raise Corrupt("undecodable") from error


def _no_extension(code: int, data: memoryview) -> Any:
    raise ValueError(f"extension type {code}, which is never written")


def _inflate(deflated: memoryview, size: int) -> bytes:
    """``size`` bytes, and never more, whatever ``deflated`` would grow to."""
    if size > _MAX_RAW:
        raise Corrupt("length")
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        raw = inflate.decompress(deflated, size + 1)
    except zlib.error as error:
        raise Corrupt("undecodable") from error
    if len(raw) != size or not inflate.eof:
        raise Corrupt("length")
    return raw
