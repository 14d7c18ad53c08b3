"""How the keys of an index are made of their parts."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import product
from typing import Any

from sqlalchemy.orm import QueryableAttribute, Session

from querycache.errors import ConfigurationError
from querycache.session_index.errors import InvalidKey, describe
from querycache.session_index.parts import FunctionPart, Part, RelationshipPart, stored
from querycache.session_index.reading import UNKNOWN, Reader, Unknown

__all__ = ["KeySpec"]


class KeySpec:
    """How the keys of one index are made.

    :ivar many: whether one object has many keys.
    :ivar silent: whether an object can become known without any event.
    :ivar undeclared: whether a function reads attributes that were not declared.
    """

    def __init__(self, label: str, parts: Sequence[Part], where: Part | None, many: bool) -> None:
        self.label = label
        self.parts = tuple(parts)
        self.where = where
        self.many = many
        self.silent = False
        self.undeclared = any(isinstance(p, FunctionPart) and not p.declared for p in self.all_parts)

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """The parts of the key, and the condition of a partial index."""
        return self.parts if self.where is None else (*self.parts, self.where)

    @property
    def attributes(self) -> Iterable[QueryableAttribute[Any]]:
        """The attributes that the parts read."""
        return (attribute for part in self.parts for attribute in part.attributes)

    def configure(self, *, ordered: bool) -> None:
        """Find out what depends on the mapper configuration.

        :param ordered: whether the keys are to have an order.
        :raises ConfigurationError: if the parts do not make a key.
        """
        for part in self.parts:
            part.configure()
        self.many = self.many or self.parts[0].many
        self.silent = any(part.silent for part in self.all_parts)
        if ordered and any(isinstance(part, RelationshipPart) for part in self.parts):
            raise ConfigurationError(f"index {self.label}: objects have no order; leave out ordered=True")
        if len(self.parts) > 1 and (self.many or any(part.many for part in self.parts)):
            raise ConfigurationError(
                f"index {self.label}: an index of many keys for each object has one attribute or function, "
                f"not {len(self.parts)}; use a function that returns the tuples"
            )

    def read(self, reader: Reader) -> tuple[Hashable, ...] | Unknown:
        """The keys of one object: none where a partial index leaves it out.

        :raises InvalidKey: if a key is not hashable, or is a string where many keys belong.
        :raises IndexFunctionError: if a function raised.
        """
        if self.where is not None:
            included = stored(self.where.read(reader))
            if included is UNKNOWN:
                return Unknown.UNKNOWN
            if not included:
                return ()
        if self.many:
            values = self.parts[0].read(reader)
            return UNKNOWN if values is UNKNOWN else self._each(values, reader)
        key: Any
        if len(self.parts) == 1:
            key = stored(self.parts[0].read(reader))
            if key is UNKNOWN:
                return Unknown.UNKNOWN
        else:
            key = tuple([stored(part.read(reader)) for part in self.parts])
            if any(part is UNKNOWN for part in key):
                return UNKNOWN
        self._check_hashable(key, reader.obj)
        return (key,)

    def forms(self, session: Session, value: Any) -> list[Hashable]:
        """The keys under which the objects with a looked up value may be kept.

        :raises InvalidKey: if no object can have that value.
        """
        if len(self.parts) == 1:
            keys: list[Any] = list(self.parts[0].forms(session, value))
        else:
            if not isinstance(value, tuple) or len(value) != len(self.parts):
                raise InvalidKey(
                    f"index {self.label} is looked up by a tuple of {len(self.parts)} values, "
                    f"not by {value!r}"
                )
            keys = list(
                product(*(part.forms(session, item) for part, item in zip(self.parts, value, strict=True)))
            )
        for key in keys:
            self._check_hashable(key, None)
            if key is UNKNOWN or (isinstance(key, tuple) and UNKNOWN in key):
                raise InvalidKey(f"index {self.label} is looked up by values, not by SQL: {value!r}")
        return keys

    def twins(self, session: Session, key: Any) -> list[Hashable]:
        """All forms of a kept key, itself included."""
        if len(self.parts) == 1:
            return list(self.parts[0].twins(session, key))
        return list(product(*(part.twins(session, item) for part, item in zip(self.parts, key, strict=True))))

    def _each(self, values: Any, reader: Reader) -> tuple[Hashable, ...] | Unknown:
        if values is None:
            return ()
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise InvalidKey(
                f"index {self.label} has many keys for each object, and takes an iterable of them or None; "
                f"{describe(reader.obj)} has {values!r}"
            )
        keys = [stored(value) for value in values]
        for key in keys:
            self._check_hashable(key, reader.obj)
        return UNKNOWN if UNKNOWN in keys else tuple(dict.fromkeys(keys))

    def _check_hashable(self, key: Any, obj: object | None) -> None:
        try:
            hash(key)
        except TypeError as error:
            whose = "" if obj is None else f" of {describe(obj)}"
            raise InvalidKey(
                f"index {self.label}: the key {key!r}{whose} is not hashable; use a tuple or frozenset, or "
                "multi=True for an index of its items"
            ) from error
