"""The kinds of aggregate: what each keeps, in SQL and in Python, and what a change of its children does to it.

Every kind reduces rows to a small tuple, its *parts*. The same parts come out of a grouped SELECT (`parts`) and
out of values evaluated in Python (`fold`); `finish` makes the column's value of them. `change` compares the parts
of the rows that one flush touched, before and after, and says what is to happen to the column:

- an `Increment` (count and sum: exact for any change, since the untouched rows cancel),
- a `Merge` (an extreme that can only have moved outwards, or "there is one": no need to look at the other rows),
- `RECOUNT` (everything else: the extreme may have gone away, an average, the latest row).
"""

from __future__ import annotations

import datetime
import decimal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from sqlalchemy import Case, ColumnElement, case, collate, func, literal_column, null, true, types

from querycache.denormalize.errors import DenormalizeError

__all__ = [
    "AVG",
    "COUNT",
    "EXISTS",
    "LATEST",
    "MAX",
    "MIN",
    "RECOUNT",
    "SUM",
    "Change",
    "How",
    "Increment",
    "Kind",
    "Merge",
    "Parts",
    "is_finite",
]

Parts = tuple[Any, ...]

How = Literal["add", "set", "least", "greatest"]
"""What becomes of a column that meets a value: their sum, the value, or the one of them that goes further."""


@dataclass(frozen=True)
class Increment:
    """Add `amount` (int or Decimal) to the column."""

    amount: Any


@dataclass(frozen=True)
class Merge:
    """Set the column to the smaller, the larger or simply the given one of its value and `value`."""

    how: How
    value: Any


@dataclass(frozen=True)
class Recount:
    """Compute the column anew from all its rows, under lock."""


RECOUNT: Final = Recount()
Change = Increment | Merge | Recount

_NUMBERS = (int, float, decimal.Decimal)


class Kind(ABC):
    """One kind of aggregate.

    Attributes:
        name: the public function that declares it.
        empty: the value of a parent without children.
        zero: the parts of no rows.
        measured: whether it needs an expression over the child.
        ordered: whether it needs an order among the children.
    """

    name: ClassVar[str]
    empty: ClassVar[Any]
    zero: ClassVar[Parts]
    measured: ClassVar[bool] = True
    ordered: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    @abstractmethod
    def parts(self, value: ColumnElement[Any]) -> Sequence[ColumnElement[Any]]:
        """The parts as SQL aggregate functions over `value`, which is NULL for rows that do not count."""

    @abstractmethod
    def fold(self, values: Iterable[Any]) -> Parts:
        """The parts of the given values (of the rows that count), in Python."""

    @abstractmethod
    def combine(self, one: Parts, other: Parts) -> Parts:
        """The parts of two disjoint sets of rows taken together."""

    @abstractmethod
    def finish(self, parts: Parts) -> Any:
        """The value of the column."""

    @abstractmethod
    def change(self, before: Parts, after: Parts) -> Change | None:
        """What a change of the touched rows from `before` to `after` does; None if nothing."""

    def gain(self, value: ColumnElement[Any] | None) -> tuple[How, ColumnElement[Any]] | None:
        """What one more row does to the column, as SQL; None if the other rows must be looked at.

        Args:
            value: what the row counts for, NULL if it does not count; None where there is no measure and every row counts.
        """
        return None

    @abstractmethod
    def whole(self, value: ColumnElement[Any]) -> ColumnElement[Any]:
        """The value of the column as one SQL expression over all rows."""

    @abstractmethod
    def misfit(self, column: types.TypeEngine[Any], measure: types.TypeEngine[Any] | None) -> str | None:
        """Why `column` cannot hold this aggregate over `measure` (None: of unknown type), if it cannot."""


def _is(type_: types.TypeEngine[Any] | None, *classes: type[types.TypeEngine[Any]]) -> bool:
    return isinstance(type_, classes)


def _is_float(type_: types.TypeEngine[Any] | None) -> bool:
    return _is(type_, types.Float)


def _is_nan(value: Any) -> bool:
    return bool(value != value)


def is_finite(value: Any) -> bool:
    """Whether it can be added and taken away again; PostgreSQL has a NaN and an Infinity among its numbers."""
    return not isinstance(value, decimal.Decimal) or value.is_finite()


def _unknown(type_: types.TypeEngine[Any] | None) -> bool:
    return type_ is None or _is(type_, types.NullType)


class Count(Kind):
    name = "count_of"
    empty = 0
    zero = (0,)
    measured = False
    additive = True

    def parts(self, value: ColumnElement[Any]) -> Sequence[ColumnElement[Any]]:
        return (func.count(value),)

    def fold(self, values: Iterable[Any]) -> Parts:
        return (sum(1 for _ in values),)

    def combine(self, one: Parts, other: Parts) -> Parts:
        return (one[0] + other[0],)

    def finish(self, parts: Parts) -> Any:
        return parts[0]

    def change(self, before: Parts, after: Parts) -> Change | None:
        difference = after[0] - before[0]
        return Increment(difference) if difference else None

    def gain(self, value: ColumnElement[Any] | None) -> tuple[How, ColumnElement[Any]] | None:
        one: ColumnElement[int] = literal_column("1")
        return "add", one if value is None else case((value.is_not(None), one), else_=literal_column("0"))

    def whole(self, value: ColumnElement[Any]) -> ColumnElement[Any]:
        return func.count(value)

    def misfit(self, column: types.TypeEngine[Any], measure: types.TypeEngine[Any] | None) -> str | None:
        return None if _is(column, types.Integer) else "a count needs an integer column"


class Sum(Kind):
    name = "sum_of"
    empty = 0
    zero = (0,)
    additive = True

    def parts(self, value: ColumnElement[Any]) -> Sequence[ColumnElement[Any]]:
        return (func.sum(value),)

    def fold(self, values: Iterable[Any]) -> Parts:
        known = [value for value in values if value is not None]
        if any(isinstance(value, float) for value in known):
            raise DenormalizeError(
                "sum_of: the measure gave a float; sums of floats drift, return an int or a Decimal"
            )
        return (sum(known),)

    def combine(self, one: Parts, other: Parts) -> Parts:
        return ((one[0] or 0) + (other[0] or 0),)

    def finish(self, parts: Parts) -> Any:
        return parts[0] or 0

    def change(self, before: Parts, after: Parts) -> Change | None:
        if not (is_finite(before[0]) and is_finite(after[0])):
            return RECOUNT  # No difference leads away from NaN.
        difference = (after[0] or 0) - (before[0] or 0)
        return Increment(difference) if difference else None

    def gain(self, value: ColumnElement[Any] | None) -> tuple[How, ColumnElement[Any]] | None:
        assert value is not None
        return "add", func.coalesce(value, literal_column("0"))

    def whole(self, value: ColumnElement[Any]) -> ColumnElement[Any]:
        return func.coalesce(func.sum(value), 0)

    def misfit(self, column: types.TypeEngine[Any], measure: types.TypeEngine[Any] | None) -> str | None:
        if _is_float(column) or _is_float(measure):
            return "sums of floats drift with every change: measure and column must be Numeric or an integer type"
        if not _is(column, types.Integer, types.Numeric):
            return "a sum needs an integer or Numeric column"
        if _unknown(measure):
            return None
        if not _is(measure, types.Integer, types.Numeric):
            return f"a sum needs a number to add up, not {measure!r}"
        if _is(column, types.Integer) and not _is(measure, types.Integer):
            return f"an integer column cannot hold sums of {measure!r}"
        if _is(column, types.Numeric) and _is(measure, types.Numeric):
            return _narrower(column, measure)
        if _is(column, types.SmallInteger) and not _is(column, types.BigInteger):
            return "sums outgrow SmallInteger: use Integer or BigInteger"
        if _is(measure, types.BigInteger) and not _is(column, types.BigInteger):
            return "sums of BigInteger need a BigInteger or Numeric column"
        return None


class Extreme(Kind):
    """The least or the greatest value; its parts are (rows with a value, the extreme of them)."""

    empty = None
    zero = (0, None)
    how: ClassVar[Literal["least", "greatest"]]

    def combine(self, one: Parts, other: Parts) -> Parts:
        if not one[0] or not other[0]:
            return one if one[0] else other
        if not self._comparable(one[1], other[1]):
            # Which of two texts the database calls less is its collation's secret: claim nothing.
            return (one[0] + other[0], None)
        return (one[0] + other[0], (min if self.how == "least" else max)(one[1], other[1]))

    def finish(self, parts: Parts) -> Any:
        return parts[1]

    def fold(self, values: Iterable[Any]) -> Parts:
        known = [value for value in values if value is not None]
        if not known:
            return (0, None)
        return (len(known), min(known) if self.how == "least" else max(known))

    def change(self, before: Parts, after: Parts) -> Change | None:
        if not before[0] and not after[0]:
            return None
        if after[1] is not None and (not before[0] or self._outwards(before[1], after[1])):
            return Merge(self.how, after[1])
        return RECOUNT

    def gain(self, value: ColumnElement[Any] | None) -> tuple[How, ColumnElement[Any]] | None:
        assert value is not None
        return self.how, value

    def _outwards(self, before: Any, after: Any) -> bool:
        return self._comparable(before, after) and bool(
            after <= before if self.how == "least" else after >= before
        )

    @staticmethod
    def _comparable(one: Any, other: Any) -> bool:
        """Whether every database compares the two as Python does; text has collations, and NaN no order in Python."""
        if isinstance(one, _NUMBERS) and isinstance(other, _NUMBERS):
            return not (_is_nan(one) or _is_nan(other))
        return type(one) is type(other) and isinstance(one, datetime.date)

    def misfit(self, column: types.TypeEngine[Any], measure: types.TypeEngine[Any] | None) -> str | None:
        return _other_family(column, measure)


def _collated(value: ColumnElement[Any]) -> ColumnElement[Any]:
    """SQLite forgets within CASE by which collation a column is ordered."""
    collation = getattr(value.type, "collation", None)
    return collate(value, collation) if collation is not None and isinstance(value, Case) else value


class Min(Extreme):
    name = "min_of"
    how = "least"

    def parts(self, value: ColumnElement[Any]) -> Sequence[ColumnElement[Any]]:
        return (func.count(value), func.min(_collated(value)))

    def whole(self, value: ColumnElement[Any]) -> ColumnElement[Any]:
        return func.min(_collated(value))


class Max(Extreme):
    name = "max_of"
    how = "greatest"

    def parts(self, value: ColumnElement[Any]) -> Sequence[ColumnElement[Any]]:
        return (func.count(value), func.max(_collated(value)))

    def whole(self, value: ColumnElement[Any]) -> ColumnElement[Any]:
        return func.max(_collated(value))


class Avg(Kind):
    name = "avg_of"
    empty = None
    zero = (0, None)

    def parts(self, value: ColumnElement[Any]) -> Sequence[ColumnElement[Any]]:
        return (func.count(value), func.sum(value))

    def fold(self, values: Iterable[Any]) -> Parts:
        known = [value for value in values if value is not None]
        return (len(known), sum(known) if known else None)

    def combine(self, one: Parts, other: Parts) -> Parts:
        if not one[0] or not other[0]:
            return one if one[0] else other
        return (one[0] + other[0], one[1] + other[1])

    def finish(self, parts: Parts) -> Any:
        count, total = parts
        if not count:
            return None
        # Decimal division keeps 28 digits of integers of any size; a float total has no more to give.
        return total / count if isinstance(total, float) else decimal.Decimal(total) / count

    def change(self, before: Parts, after: Parts) -> Change | None:
        return RECOUNT if before != after else None

    def whole(self, value: ColumnElement[Any]) -> ColumnElement[Any]:
        return func.avg(value)

    def misfit(self, column: types.TypeEngine[Any], measure: types.TypeEngine[Any] | None) -> str | None:
        if not _is(column, types.Numeric, types.Float):
            return "an average needs a Numeric or Float column"
        if not _unknown(measure) and not _is(measure, types.Integer, types.Numeric, types.Float):
            return f"an average needs a number, not {measure!r}"
        return None


class Exists(Kind):
    name = "exists_of"
    empty = False
    zero = (0,)
    measured = False

    def parts(self, value: ColumnElement[Any]) -> Sequence[ColumnElement[Any]]:
        return (func.count(value),)

    def fold(self, values: Iterable[Any]) -> Parts:
        return (sum(1 for _ in values),)

    def combine(self, one: Parts, other: Parts) -> Parts:
        return (one[0] + other[0],)

    def finish(self, parts: Parts) -> Any:
        return parts[0] > 0

    def change(self, before: Parts, after: Parts) -> Change | None:
        if before[0] == after[0]:
            return None
        return Merge("set", True) if after[0] else RECOUNT

    def gain(self, value: ColumnElement[Any] | None) -> tuple[How, ColumnElement[Any]] | None:
        # True is the greater of two truth values, and NULL none.
        return "greatest", true() if value is None else case((value.is_not(None), true()), else_=null())

    def whole(self, value: ColumnElement[Any]) -> ColumnElement[Any]:
        return func.count(value) > 0

    def misfit(self, column: types.TypeEngine[Any], measure: types.TypeEngine[Any] | None) -> str | None:
        return None if _is(column, types.Boolean) else "it needs a Boolean column"


class Latest(Kind):
    """The measure of the last child by its order; ties go to the greater primary key. Its value is no aggregate
    function, so the recount selects it in a subquery of its own (`aggregate.py`); the parts only count rows."""

    name = "latest_of"
    empty = None
    zero = (0,)
    ordered = True

    def parts(self, value: ColumnElement[Any]) -> Sequence[ColumnElement[Any]]:
        return (func.count(value),)

    def fold(self, values: Iterable[Any]) -> Parts:
        """`values` are (order, primary key, measure) triples; rows whose order is NULL come first.

        Keys that the database is still to generate will be greater than those it has, in the order of the rows.
        """

        def rank(numbered: tuple[int, Any]) -> tuple[Any, ...]:
            number, (order, key, _) = numbered
            new = None in key
            return order is not None, order, new, (number,) if new else key

        last = max(enumerate(values), key=rank, default=None)
        return (last[1][2] if last else None,)

    def combine(self, one: Parts, other: Parts) -> Parts:
        return one

    def finish(self, parts: Parts) -> Any:
        return parts[0]

    def change(self, before: Parts, after: Parts) -> Change | None:
        return RECOUNT

    def whole(self, value: ColumnElement[Any]) -> ColumnElement[Any]:
        return value

    def misfit(self, column: types.TypeEngine[Any], measure: types.TypeEngine[Any] | None) -> str | None:
        return _other_family(column, measure)


_FAMILIES: tuple[tuple[type[types.TypeEngine[Any]], ...], ...] = (
    (types.Boolean,),
    (types.Integer, types.Numeric, types.Float),
    (types.String,),
    (types.DateTime,),
    (types.Date,),
    (types.Time,),
    (types.Interval,),
    (types.LargeBinary,),
    (types.Uuid,),
)


def _other_family(column: types.TypeEngine[Any], measure: types.TypeEngine[Any] | None) -> str | None:
    if _unknown(measure):
        return None
    for family in _FAMILIES:
        if isinstance(measure, family):
            if not isinstance(column, family):
                return f"a column of type {column!r} cannot hold values of type {measure!r}"
            if _is(column, types.Integer) and not _is(measure, types.Integer):
                return f"an integer column cannot hold values of type {measure!r}"
            break
    return None


def _narrower(column: Any, measure: Any) -> str | None:
    if column.scale is not None and (measure.scale is None or measure.scale > column.scale):
        return (
            f"{column!r} has fewer decimal places than the measure's {measure!r}; give it as many, or round the measure,"
            f" func.round(…, {column.scale}, type_={column!r})"
        )
    return None


COUNT: Final = Count()
SUM: Final = Sum()
MIN: Final = Min()
MAX: Final = Max()
AVG: Final = Avg()
EXISTS: Final = Exists()
LATEST: Final = Latest()
