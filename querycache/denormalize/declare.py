"""The declarations: what a denormalized column holds, and how it is kept.

    class Thread(Base):
        id: Mapped[int] = mapped_column(primary_key=True)
        comments: Mapped[list[Comment]] = relationship(back_populates="thread")
        comment_count: Mapped[int] = count_of("comments")
        word_count: Mapped[int] = sum_of("comments", python(lambda c: len(c.message.split())))

A declaration is an ordinary mapped column that carries a `Declaration` in its `Column.info`. Nothing is looked up
yet: names are resolved, and everything is checked, when the mappers configure (`configure.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.orm import InstrumentedAttribute, MappedColumn, mapped_column
from sqlalchemy.types import TypeEngine

from querycache.denormalize.kinds import AVG, COUNT, EXISTS, LATEST, MAX, MIN, SUM, Kind
from querycache.errors import ConfigurationError

__all__ = [
    "INFO_KEY",
    "STRATEGY_NAMES",
    "Declaration",
    "Expression",
    "avg_of",
    "count_of",
    "exists_of",
    "expression",
    "latest_of",
    "max_of",
    "min_of",
    "python",
    "sum_of",
]

INFO_KEY: Final = "querycache.denormalize"
STRATEGY_NAMES: Final = ("sql", "recount", "flush", "memory", "trigger")

Path = str | InstrumentedAttribute[Any] | Sequence[InstrumentedAttribute[Any]] | Callable[[], Any]


@dataclass(frozen=True)
class Expression:
    """An expression over one child, in SQL, in Python, or (the same thing twice) in both.

    Attributes:
        sql: called with the child's entity, and with those above it on the path as far as it takes
            parameters (`lambda comment, thread: …`); returns a SQL expression.
        python: called with one row of the child, which has the child's column attributes.
        columns: the column attributes that `python` reads; None means that it may read any.
    """

    sql: Callable[..., Any] | None = None
    python: Callable[[Any], Any] | None = None
    columns: tuple[str, ...] | None = None


Measure = str | Callable[..., Any] | Expression


def python(function: Callable[[Any], Any], *, columns: Sequence[str] | None = None) -> Expression:
    """An expression computed in Python: `python(lambda c: len(c.message.split()))`.

    Args:
        function: takes a row of the child with its column attributes (not an entity: no relationships, no
            methods) and returns the value. It must depend on nothing else.
        columns: names of the attributes that it reads. Spares reading the others, and changes of the others
            cost nothing then.
    """
    return Expression(python=function, columns=None if columns is None else tuple(columns))


def expression(
    *, sql: Callable[..., Any], python: Callable[[Any], Any], columns: Sequence[str] | None = None
) -> Expression:
    """One expression in both languages, for the strategies that compute in Python ("flush", "memory") and those that
    compute in SQL. Both must give the same value for every row.

    Args:
        sql: as a plain callable given for an expression: entities to SQL expression.
        python: as for `python()`.
        columns: as for `python()`.
    """
    return Expression(sql=sql, python=python, columns=None if columns is None else tuple(columns))


def column_expression(name: str) -> Expression:
    """The expression that is a plain column attribute of the child."""
    return Expression(
        sql=lambda entity: getattr(entity, name), python=lambda row: getattr(row, name), columns=(name,)
    )


@dataclass(frozen=True, eq=False)
class Declaration:
    """What `count_of(…)` and its siblings say; found again in `Column.info`."""

    kind: Kind
    path: Path
    measure: Expression | None
    where: Expression | None
    order_by: str | None
    strategy: str


def _expression(given: Measure | None, role: str) -> Expression | None:
    if given is None or isinstance(given, Expression):
        return given
    if isinstance(given, str):
        return column_expression(given)
    if callable(given):
        return Expression(sql=given)
    raise ConfigurationError(
        f"{role} must be the name of a column attribute, a callable from the child's entity to a SQL expression,"
        f" python(…) or expression(…); got {given!r}"
    )


def _column(
    kind: Kind,
    path: Path,
    measure: Measure | None,
    where: Measure | None,
    strategy: str,
    type_: TypeEngine[Any] | type[TypeEngine[Any]] | None,
    options: dict[str, Any],
    order_by: str | None = None,
) -> MappedColumn[Any]:
    if strategy not in STRATEGY_NAMES:
        raise ConfigurationError(
            f"{kind.name}: unknown strategy {strategy!r}; there are {', '.join(map(repr, STRATEGY_NAMES))}"
        )
    for taken in (
        "default",
        "insert_default",
        "server_default",
        "onupdate",
        "server_onupdate",
        "nullable",
        "info",
    ):
        if taken in options:
            raise ConfigurationError(f"{kind.name}: {taken}= is set by the aggregate and cannot be given")
    declaration = Declaration(
        kind=kind,
        path=path,
        measure=_expression(measure, f"{kind.name}: the measure"),
        where=_expression(where, f"{kind.name}: where="),
        order_by=order_by,
        strategy=strategy,
    )
    if kind.empty is not None:
        options["insert_default"] = kind.empty
        options["server_default"] = text("false" if kind.empty is False else "0")
    return mapped_column(
        *(() if type_ is None else (type_,)),
        nullable=kind.empty is None,
        info={INFO_KEY: declaration},
        **options,
    )


def count_of(
    path: Path,
    *,
    where: Measure | None = None,
    strategy: str = "sql",
    type_: TypeEngine[Any] | type[TypeEngine[Any]] | None = None,
    **column: Any,
) -> MappedColumn[Any]:
    """A column that counts the children at the end of `path`; 0 without children.

    Args:
        path: relationships from the parent to the children: their names joined by dots ("threads.comments"), the
            attributes, or a callable that returns the attributes.
        where: count only children for which this holds: the name of a Boolean attribute, a callable from the
            child's entity to a SQL condition, `python(…)` or `expression(…)`. NULL is false.
        strategy: "sql", "recount", "flush", "memory" or "trigger"; docs/denormalize.md says which to take.
        type_: the column's type, where the `Mapped[…]` annotation does not say it.
        **column: further arguments of `mapped_column()`.

    Raises:
        ConfigurationError: here for what can be seen here, at mapper configuration for everything else.
    """
    return _column(COUNT, path, None, where, strategy, type_, column)


def sum_of(
    path: Path,
    measure: Measure,
    *,
    where: Measure | None = None,
    strategy: str = "sql",
    type_: TypeEngine[Any] | type[TypeEngine[Any]] | None = None,
    **column: Any,
) -> MappedColumn[Any]:
    """A column that adds up `measure` over the children; 0 without children, and NULL measures count as 0.

    Args:
        measure: what is added up for each child: the name of a column attribute, a callable from the child's
            entity to a SQL expression, `python(…)` or `expression(…)`. Never a float.

    The other arguments are those of `count_of`.
    """
    return _column(SUM, path, measure, where, strategy, type_, column)


def min_of(
    path: Path,
    measure: Measure,
    *,
    where: Measure | None = None,
    strategy: str = "sql",
    type_: TypeEngine[Any] | type[TypeEngine[Any]] | None = None,
    **column: Any,
) -> MappedColumn[Any]:
    """A column that holds the least `measure` of the children; NULL without any. Arguments as for `sum_of`."""
    return _column(MIN, path, measure, where, strategy, type_, column)


def max_of(
    path: Path,
    measure: Measure,
    *,
    where: Measure | None = None,
    strategy: str = "sql",
    type_: TypeEngine[Any] | type[TypeEngine[Any]] | None = None,
    **column: Any,
) -> MappedColumn[Any]:
    """A column that holds the greatest `measure` of the children; NULL without any. Arguments as for `sum_of`."""
    return _column(MAX, path, measure, where, strategy, type_, column)


def avg_of(
    path: Path,
    measure: Measure,
    *,
    where: Measure | None = None,
    strategy: str = "sql",
    type_: TypeEngine[Any] | type[TypeEngine[Any]] | None = None,
    **column: Any,
) -> MappedColumn[Any]:
    """A column that holds the mean `measure` of the children; NULL without any. Arguments as for `sum_of`.

    An average alone cannot be brought forward, so each change reads all children of the parent. For large
    families keep a `sum_of` and a `count_of`, and divide.
    """
    return _column(AVG, path, measure, where, strategy, type_, column)


def exists_of(
    path: Path,
    *,
    where: Measure | None = None,
    strategy: str = "sql",
    type_: TypeEngine[Any] | type[TypeEngine[Any]] | None = None,
    **column: Any,
) -> MappedColumn[Any]:
    """A Boolean column: whether there is a child (for which `where` holds). Arguments as for `count_of`."""
    return _column(EXISTS, path, None, where, strategy, type_, column)


def latest_of(
    path: Path,
    measure: Measure,
    *,
    order_by: str,
    where: Measure | None = None,
    strategy: str = "sql",
    type_: TypeEngine[Any] | type[TypeEngine[Any]] | None = None,
    **column: Any,
) -> MappedColumn[Any]:
    """A column that holds the `measure` of the last child; NULL without any.

    Args:
        order_by: the child's column attribute by which the greatest is the last. Children where it is NULL come
            before all others; the greater primary key wins a tie.

    The other arguments are those of `sum_of`.
    """
    return _column(LATEST, path, measure, where, strategy, type_, column, order_by)
