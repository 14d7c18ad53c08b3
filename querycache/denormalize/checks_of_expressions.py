"""What is checked of one expression, a measure or a condition: that each change of what it reads is seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import types
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Mapper
from sqlalchemy.sql import visitors
from sqlalchemy.sql.functions import FunctionElement

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.declare import INFO_KEY, Expression
from querycache.denormalize.expressions import attributes_read, sql_of
from querycache.denormalize.places import type_with_places
from querycache.errors import ConfigurationError

__all__ = ["check_expression", "check_nested"]

_MOVING = frozenset(
    [
        "clock_timestamp",
        "connection_id",
        "curdate",
        "current_date",
        "current_time",
        "current_timestamp",
        "current_user",
        "curtime",
        "gen_random_uuid",
        "getdate",
        "last_insert_id",
        "last_insert_rowid",
        "localtime",
        "localtimestamp",
        "nextval",
        "now",
        "pg_backend_pid",
        "rand",
        "random",
        "randomblob",
        "session_user",
        "statement_timestamp",
        "sysdate",
        "timeofday",
        "transaction_timestamp",
        "utc_date",
        "utc_time",
        "utc_timestamp",
        "uuid",
        "uuid_generate_v1",
        "uuid_generate_v4",
        "uuidv4",
        "uuidv7",
    ]
)
"""Functions that give another value by the clock, by chance or for another connection."""

_MOVING_BY_DEFAULT = frozenset(
    ["date", "datetime", "julianday", "strftime", "time", "unix_timestamp", "unixepoch"]
)


def check_expression(
    aggregate: Aggregate, given: Expression | None, role: str
) -> types.TypeEngine[Any] | None:
    """Check one expression; return its SQL type if it has one."""
    if given is None:
        return None
    leaf = aggregate.chain.leaf
    if given.columns is not None:
        check_nested(aggregate, leaf, set(given.columns) & {each.key for each in leaf.column_attrs}, role)
        for name in given.columns:
            if name not in aggregate.chain.leaf_columns:
                raise ConfigurationError(
                    f"{aggregate.name}: {leaf.class_.__name__} has no column attribute {name!r}, which {role} reads;"
                    f" it has {', '.join(aggregate.chain.leaf_columns)}"
                )
    if given.sql is None:
        return None
    try:
        built: Any = sql_of(given, aggregate.chain.entities())
    except (AttributeError, TypeError, ArgumentError) as error:
        raise ConfigurationError(
            f"{aggregate.name}: {role} failed for {leaf.class_.__name__}: {error}"
        ) from error
    if not hasattr(built, "self_group"):
        raise ConfigurationError(
            f"{aggregate.name}: {role} must return a SQL expression, got {built!r}; an expression in Python is given"
            " as python(…)"
        )
    read, foreign = attributes_read(Expression(given.sql, columns=given.columns), aggregate.chain)
    texts = [each for each in sorted(foreign) if each.startswith("the text ")]
    if texts:
        raise ConfigurationError(
            f"{aggregate.name}: {role} has {', '.join(texts)}, which does not tell what it reads; write it with the"
            " attributes of the entity, or as expression(sql=…, python=…, columns=(…)) with the names of what it reads"
        )
    if foreign:
        raise ConfigurationError(
            f"{aggregate.name}: {role} reads {', '.join(sorted(foreign))}, which is not of the entities that it is"
            " given; what is not on the path changes unseen, and the entities on the path are passed as arguments"
        )
    for element in visitors.iterate(built):
        if isinstance(element, FunctionElement) and _moves(element):
            raise ConfigurationError(
                f"{aggregate.name}: {role} calls {element.name}(), whose value changes without a write that would bring the"
                " column forward; store what it is to be in a column, or ask for it when the rows are read"
            )
    for mapper, names in zip(aggregate.chain.mappers, read, strict=True):
        check_nested(aggregate, mapper, names, role)
    if read[0]:
        raise ConfigurationError(
            f"{aggregate.name}: {role} reads columns of the parent, {', '.join(sorted(read[0]))}; it may read the"
            " children and what is between"
        )
    return type_with_places(built)


def _moves(function: FunctionElement[Any]) -> bool:
    """Whether a function gives another value each time; SQLite's of dates do so of the text "now" and of nothing."""
    name = str(getattr(function, "name", "")).lower()
    if name not in _MOVING_BY_DEFAULT:
        return name in _MOVING
    given = list(function.clauses)[name == "strftime" :]
    return not given or any(getattr(each, "value", None) in ("now", "NOW") for each in given)


def check_nested(aggregate: Aggregate, mapper: Mapper[Any], names: Iterable[str], role: str) -> None:
    for name in sorted(names):
        column = mapper.column_attrs[name].columns[0]
        if INFO_KEY in getattr(column, "info", {}):
            raise ConfigurationError(
                f"{aggregate.name}: {role} reads {mapper.class_.__name__}.{name}, which is an aggregate itself and"
                " changes outside the unit of work; aggregate over the longer path instead"
            )
