"""What an answer looks like from outside, as plain data that two processes can compare.

`Observer.describe` walks whatever a statement gave: rows, mappings, objects. Objects get numbers in the order
in which they are met, so that equal descriptions mean equal identities as well as equal values. Each is
described with its type and with what of it is loaded. `Observer.touch` then reads every attribute of every
object met, as an application would, and notes the SQL that this takes.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from sqlalchemy import Engine, Row, RowMapping, event, inspect
from sqlalchemy.exc import NoInspectionAvailable, SQLAlchemyError
from sqlalchemy.orm import InstanceState

__all__ = ["Observer", "Traffic", "outcome_of", "traffic"]

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    str,
    bytes,
    decimal.Decimal,
    dt.date,
    dt.time,
    dt.timedelta,
    uuid.UUID,
    enum.Enum,
)
_ADDRESS = re.compile(r"0x[0-9a-f]+")


@dataclass
class Traffic:
    """What reached a database: the statements, and how many connections were taken for them.

    Equal if the statements are: one that cannot be compiled fails before or after a connection was taken.
    """

    statements: list[tuple[str, str]] = field(default_factory=list)
    checkouts: int = field(default=0, compare=False)

    @property
    def nothing(self) -> bool:
        return not self.statements and not self.checkouts


@contextmanager
def traffic(engine: Engine) -> Iterator[Traffic]:
    """Notes the statements and the connections of an engine while it is open."""
    seen = Traffic()

    def execute(connection: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool) -> None:
        seen.statements.append((sql, _ADDRESS.sub("0x", repr(parameters))))

    def checkout(connection: Any, record: Any, proxy: Any) -> None:
        seen.checkouts += 1

    event.listen(engine, "before_cursor_execute", execute)
    event.listen(engine, "checkout", checkout)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", execute)
        event.remove(engine, "checkout", checkout)


class Observer:
    """Describes answers; objects met in one answer are recognized in the next."""

    def __init__(self) -> None:
        # Keeps the objects alive too, so that no identity is used twice.
        self._numbers: dict[int, tuple[int, InstanceState[Any]]] = {}
        self._met: list[Any] = []

    def describe(self, value: Any) -> Any:
        """Nested tuples that are equal for answers that an application cannot tell apart."""
        kind = type(value).__qualname__
        if isinstance(value, _PLAIN):
            return kind, repr(value)
        if isinstance(value, Row):
            return kind, tuple(value._fields), tuple(map(self.describe, value))
        if isinstance(value, BaseException):
            return kind, _ADDRESS.sub("0x", str(value))
        if isinstance(value, (Mapping, RowMapping)):
            return kind, tuple((str(key), self.describe(item)) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return kind, tuple(map(self.describe, value))
        if isinstance(value, (set, frozenset)):
            return kind, tuple(sorted(map(repr, map(self.describe, value))))
        try:
            state = inspect(value)
        except NoInspectionAvailable:
            state = None
        if isinstance(state, InstanceState):
            return self._object(value, state)
        if is_dataclass(value):
            return kind, tuple(
                (each.name, self.describe(getattr(value, each.name))) for each in fields(value)
            )
        # an association proxy loads what it is a view of
        return kind, _ADDRESS.sub("0x", str(outcome_of(lambda: repr(value))))

    def _object(self, value: Any, state: InstanceState[Any]) -> Any:
        known = self._numbers.get(id(value))
        if known is not None:
            return "object", known[0]
        number = len(self._numbers)
        self._numbers[id(value)] = number, state
        self._met.append(value)
        # A copy: describing composites may load what they are made of.
        loaded = {key: item for key, item in state.dict.items() if not key.startswith("_")}
        flags = state.persistent, state.modified, state.expired, state.identity, state.identity_token
        unloaded = tuple(sorted(state.unloaded)), tuple(sorted(state.expired_attributes))
        return (
            "object",
            number,
            type(value).__qualname__,
            flags,
            unloaded,
            tuple((key, self.describe(loaded[key])) for key in sorted(loaded)),
        )

    def touch(self, engine: Engine) -> list[Any]:
        """Read each attribute of the objects met so far: what it is, or why not, and the SQL that it took."""
        notes = []
        for value in list(self._met):
            number, state = self._numbers[id(value)]
            for key in sorted(state.mapper.all_orm_descriptors.keys()):
                with traffic(engine) as seen:
                    found = self.describe(outcome_of(lambda: getattr(value, key)))  # noqa: B023
                notes.append((number, key, found, seen.statements))
        return notes


# What SQLAlchemy raises, its own assertions and what Python raises for it included.
_ERRORS = (SQLAlchemyError, AssertionError, AttributeError, LookupError, StopIteration, TypeError)


def outcome_of(action: Callable[[], Any]) -> Any:
    """What an action returns, or the error that it raises."""
    try:
        return action()
    except _ERRORS as error:
        return error
