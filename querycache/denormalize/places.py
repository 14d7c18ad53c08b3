"""Decimal places of SQL expressions, as the database counts them.

SQLAlchemy gives a product the type of one of its factors, which has too few places for it. What is added up must not be
rounded to these, since each rounding would stay in the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal
from math import inf
from typing import Any, Final

from sqlalchemy import BindParameter, Case, ColumnElement, types
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression, ExpressionClauseList, Grouping, Label, UnaryExpression
from sqlalchemy.sql.functions import FunctionElement

__all__ = ["rounded", "type_with_places"]

_ONE_OF: Final = ("coalesce", "nullif", "least", "greatest", "abs")
"""Functions whose result has the places of an argument."""


def rounded(value: Any, type_: types.TypeEngine[Any]) -> Any:
    """A Decimal as a column of a type holds it; databases round halves away from zero when they store a Numeric."""
    if not isinstance(type_, types.Numeric) or isinstance(type_, types.Float) or type_.scale is None:
        return value
    if not value.is_finite():  # PostgreSQL has NaN and Infinity
        return value
    return value.quantize(Decimal(1).scaleb(-type_.scale), ROUND_HALF_UP)


def type_with_places(expression: ColumnElement[Any]) -> types.TypeEngine[Any]:
    """The type of an expression; a Numeric with all its places, and without a scale if there is no end of them."""
    type_ = expression.type
    if not isinstance(type_, types.Numeric) or isinstance(type_, types.Float) or type_.scale is None:
        return type_
    places = _places(expression)
    if places is None or places <= type_.scale:
        return type_
    return types.Numeric(scale=None if places == inf else int(places))


def _places(expression: Any) -> float | None:
    """How many there can be; None if unknown."""
    if isinstance(expression, (Grouping, Label, UnaryExpression)):
        return _places(expression.element)
    if isinstance(expression, BinaryExpression):
        return _combined(expression.operator, [expression.left, expression.right])
    if isinstance(expression, ExpressionClauseList):
        return _combined(expression.operator, list(expression.clauses))
    if isinstance(expression, Case):
        results = [then for _, then in expression.whens]
        return _most([*results, expression.else_] if expression.else_ is not None else results)
    if isinstance(expression, FunctionElement) and getattr(expression, "name", "") in _ONE_OF:
        return _most(expression.clauses)
    if isinstance(expression, BindParameter) and isinstance(expression.value, (int, float, Decimal)):
        exponent = Decimal(
            repr(expression.value) if isinstance(expression.value, float) else expression.value
        )
        return max(0, -int(exponent.normalize().as_tuple().exponent))
    type_: Any = getattr(expression, "type", None)
    if isinstance(type_, (types.Integer, types.Boolean)):
        return 0
    known = isinstance(type_, types.Numeric) and not isinstance(type_, types.Float)
    return type_.scale if known else None


def _combined(operator: Any, operands: list[Any]) -> float | None:
    if operator is operators.truediv:
        return inf
    if operator is operators.mul:
        places = [_places(each) for each in operands]
        return None if None in places else sum(each for each in places if each is not None)
    return _most(operands) if operator in (operators.add, operators.sub, operators.mod) else None


def _most(expressions: Iterable[Any]) -> float | None:
    places = [_places(each) for each in expressions]
    return None if None in places else max((each for each in places if each is not None), default=0)
