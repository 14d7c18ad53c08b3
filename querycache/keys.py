"""Keys: what names an answer, the same in every process.

Two statements share an answer only if the driver would be given the same SQL text and the same parameter
values, for the same database, under the same scope. That alone decides the rows, so it is the heart of the
key: the text as compiled for the dialect (``DISTINCT ON``, ``SKIP LOCKED`` and translated schemas are in
it), and the parameters after bind processing, in a canonical form in which ``1``, ``True``, ``1.0`` and
``"1"`` differ.

What the text does not show is which further statements the answer brings along (``selectinload`` and its
like), so a digest of the statement's structure, loader options and criteria included, is part of the key
too. It only separates entries. Nothing wrong is ever served where two structures share a digest: each
further statement is found by its own SQL and parameters, and one that is not found is asked of the database.

Keys are digests (BLAKE2b, RFC 7693): no value of the application can be read from them.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import types
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy.orm import Mapper
from sqlalchemy.types import TypeEngine

from querycache.sa_internals import StatementOption

__all__ = [
    "UnkeyableValue",
    "canonical",
    "digest",
    "hashed",
    "structure_digest",
]


class UnkeyableValue(TypeError):
    """A parameter has a type without a canonical form, so that no key can be made.

    Attributes:
        reason: two or three words that name the type.
    """

    def __init__(self, value: object) -> None:
        self.reason = f"parameter type {type(value).__qualname__}"
        super().__init__(self.reason)


# repr() of these types, exactly and not their subclasses, is one form per value, and tells the type
_CANONICAL = frozenset(
    {
        bool,
        bytes,
        datetime.date,
        datetime.timedelta,
        decimal.Decimal,
        float,
        int,
        str,
        type(None),
        uuid.UUID,
    }
)


def canonical(value: object, dumps: Callable[[Any], object] | None = None) -> str:
    """A text that is equal for equal values of one type and differs otherwise.

    Args:
        value: a value as given to a driver; containers are walked.
        dumps: what the driver makes JSON with, unless a value says.
    Raises:
        UnkeyableValue: the value, or one inside it, is of a type without a canonical form.
    """
    within = canonical if dumps is None else partial(canonical, dumps=dumps)
    kind = type(value)
    if kind in _CANONICAL:
        return repr(value)
    if kind is tuple or kind is list:
        if _CANONICAL.issuperset(map(type, value)):  # type: ignore[call-overload]
            return repr(value)
        return f"{kind.__name__}({','.join(map(within, value))})"  # type: ignore[call-overload]
    if kind is dict:
        pairs = sorted((within(k), within(v)) for k, v in value.items())  # type: ignore[attr-defined]
        return f"dict({','.join(f'{k}:{v}' for k, v in pairs)})"
    if kind is set or kind is frozenset:
        return f"{kind.__name__}({','.join(sorted(map(within, value)))})"  # type: ignore[call-overload]
    if kind is memoryview or kind is bytearray:
        return f"{kind.__name__}({bytes(value)!r})"  # type: ignore[call-overload]
    if isinstance(value, enum.Enum):
        # the value too: flags may have no name, and a release may give a name another value
        return f"{kind.__module__}.{kind.__qualname__}.{value.name}={canonical(value.value)}"
    if kind is datetime.datetime or kind is datetime.time:
        # the repr() of a time zone may be anything; what reaches the database is the offset
        offset = value.utcoffset()  # type: ignore[attr-defined]
        if offset is None and value.tzinfo is not None:  # type: ignore[attr-defined]
            raise UnkeyableValue(value)  # a time of day in a zone with summer time: the driver decides
        return f"{value.replace(tzinfo=None)!r}{offset!r}"  # type: ignore[attr-defined]
    module = kind.__module__
    if module == "ipaddress":
        return f"{kind.__name__}({value})"
    if module == "psycopg.types.json":
        # the text, which the driver makes: by code of the application, and in the order of the keys
        make = value.dumps or dumps or json.dumps  # type: ignore[attr-defined]
        try:
            return f"{kind.__name__}({make(value.obj)!r})"  # type: ignore[attr-defined]
        except Exception as error:  # whatever the application's code raises, it will when the driver runs it
            raise UnkeyableValue(value) from error
    if module == "psycopg.dbapi20":  # Binary
        return f"{kind.__name__}({canonical(value.obj)})"  # type: ignore[attr-defined]
    if module.startswith("psycopg.types.range"):
        bounds = (value.lower, value.upper, value.bounds)  # type: ignore[attr-defined]
        return f"{kind.__name__}({canonical(bounds)})"
    if module.startswith("psycopg.types.multirange"):
        return f"{kind.__name__}({','.join(map(canonical, value))})"  # type: ignore[call-overload]
    raise UnkeyableValue(value)


def digest(parts: Iterable[str | bytes], size: int = 20) -> bytes:
    """BLAKE2b over the parts, each preceded by its length.

    Args:
        parts: texts and bytes, in an order that matters.
        size: length of the digest in bytes.
    """
    return hashed(parts, blake2b(digest_size=size)).digest()


def hashed(parts: Iterable[str | bytes], hasher: blake2b) -> blake2b:
    """A hasher that has taken in more parts; a copy of it can go on with others from there."""
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(4, "big") + data)
    return hasher


def structure_digest(cache_key: Sequence[Any] | None) -> bytes:
    """A digest of a statement's structure that is the same in every process.

    Args:
        cache_key: the ``key`` of SQLAlchemy's :class:`~sqlalchemy.sql.expression.CacheKey`, None where an
            element of the statement has none.
    """
    hasher = blake2b(digest_size=16)
    _walk(cache_key, hasher.update, {})
    return hasher.digest()


def _walk(value: Any, update: Any, numbers: dict[int, int]) -> None:
    # Objects are told apart by what names them in every process; never by repr() or hash(), which hold
    # addresses and random seeds.
    kind = type(value)
    if kind is tuple and value and isinstance(value[0], type) and issubclass(value[0], TypeEngine):
        # A type and its arguments, which SQLAlchemy takes from a set.
        _walk(value[0], update, numbers)
        _walk_unordered(value[1:], update, numbers)
    elif kind is tuple and value and all(isinstance(item, Mapper) for item in value):
        # Classes that selectin_polymorphic has sorted by address.
        _walk_unordered(value, update, numbers)
    elif kind is tuple or kind is list:
        value = _without_our_options(value)
        update(b"(%d," % len(value))
        previous = None
        numbered = len(value) > 1 and isinstance(value[1], type)
        for index, item in enumerate(value):
            # The ORM fills in these defaults when a statement is compiled, so what is made from it later has
            # them. Where they are no defaults, it shows in the SQL.
            if previous == "additional_source_entities":
                _walk_unordered(item, update, numbers)  # those classes of selectin_polymorphic again
            elif (numbered and index in (0, 3) and type(item) is int) or (
                type(item) is str and item.isdecimal()
            ):
                # The number of an element, of a parameter or in place of a name: SQLAlchemy counts on through the
                # defaults that are left out below.
                update(b"#%d," % numbers.setdefault(int(item), len(numbers)))
            elif previous != "_compile_options":
                _walk(item, update, numbers)
            previous = item
    elif kind in _CANONICAL:
        update(f"{value!r},".encode("utf-8", "surrogatepass"))
    elif isinstance(value, Mapping):
        _walk_unordered(value.items(), update, numbers)
    elif isinstance(value, (set, frozenset)):
        _walk_unordered(value, update, numbers)
    elif isinstance(value, type):
        update(f"<{value.__module__}.{value.__qualname__}>".encode())
    elif isinstance(value, Table):
        update(f"table {value.fullname}".encode())
    elif isinstance(value, Column):
        update(
            f"column {value.table.fullname if isinstance(value.table, Table) else ''}.{value.name}".encode()
        )
    elif isinstance(value, Mapper):
        update(f"mapper {value.class_.__module__}.{value.class_.__qualname__}".encode())
    elif isinstance(value, types.CodeType):
        update(f"code {value.co_filename}:{value.co_firstlineno}".encode())
        update(value.co_code)
    elif isinstance(value, enum.Enum):
        update(f"{kind.__qualname__}.{value.name}".encode())
    elif hasattr(value, "__qualname__"):
        update(f"function {value.__module__}.{value.__qualname__}".encode())
    else:
        update(f"<{kind.__module__}.{kind.__qualname__}>".encode())


def _without_our_options(value: Sequence[Any]) -> Sequence[Any]:
    """A part of a key without what asks for the cache: that makes no other statement."""
    for index, item in enumerate(value):
        if type(item) is str and item == "_with_options":
            options = tuple(each for each in value[index + 1] if each[0] is not StatementOption)
            return (*value[:index], *((item, options) if options else ()), *value[index + 2 :])
    return value


def _walk_unordered(values: Iterable[Any], update: Any, numbers: dict[int, int]) -> None:
    digests = []
    for value in values:
        hasher = blake2b(digest_size=16)
        _walk(value, hasher.update, numbers)
        digests.append(hasher.digest())
    update(b"{%d," % len(digests))
    for each in sorted(digests):
        update(each)
