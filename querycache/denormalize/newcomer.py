"""One new child of one parent: one UPDATE, which has the database add what the row holds.

Nothing was there before that had to be read, and nothing is compared. The statement is made once for each chain and
carries its options itself, since a flush of one object is short, and each of these costs a part of it that shows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Select,
    Update,
    Uuid,
    and_,
    bindparam,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import BindTyping
from sqlalchemy.orm import Mapper, aliased
from sqlalchemy.sql.compiler import SQLCompiler

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key, attribute_columns
from querycache.denormalize.chain import Chain
from querycache.denormalize.locks import OWN
from querycache.denormalize.plan import Plan, Watch
from querycache.denormalize.strategies import STRATEGIES
from querycache.denormalize.writing import is_parent, key_parameter, meets

__all__ = ["Newcomer", "newcomer", "only_newcomer"]


_Text = tuple[str, Callable[[tuple[Any, ...]], Any]]
"""SQL for the driver, and what makes its parameters of the keys of the child and the parent."""


class Newcomer:
    """What one more row below a chain does to the aggregates of its parent."""

    def __init__(self, chain: Chain, aggregates: Sequence[Aggregate]) -> None:
        self.root: Mapper[Any] = chain.root
        self.aggregates = aggregates
        self._statement = _statement(chain, aggregates)
        self._child = chain.keys[1]
        self._parent = chain.links[0].attributes
        self._names = [_child_parameter(i) for i in range(len(self._child))]
        self._names += [key_parameter(i) for i in range(len(self._parent))]
        # what a cache cannot read in text without a parser
        self._written = {"cache_tables": (self.aggregates[0].table.fullname,)}
        self._texts: weakref.WeakKeyDictionary[Dialect, _Text | None] = weakref.WeakKeyDictionary()

    def keys(self, values: dict[str, Any]) -> tuple[Key, Key] | None:
        """The keys of a child that has been inserted, and of its parent, by its attributes; None if they do not say, or
        not as the database means it: texts may be equal there that are not in Python."""
        parent = tuple([values.get(name) for name in self._parent])
        for part in parent:
            if type(part) is not int and type(part) is not UUID:
                return None
        child = tuple([values.get(name) for name in self._child])
        return None if None in child else (child, parent)

    def absorb(self, connection: Connection, child: Key, parent: Key) -> bool:
        """Bring the aggregates of one parent forward.

        Args:
            child: the key of the row that has been inserted.
            parent: the key of its parent, as far as the session knows.

        Returns:
            whether it is done. If not, the row is not below that parent, or does not count.
        """
        given = (*child, *parent)
        text = None
        if "schema_translate_map" not in connection.get_execution_options():
            try:
                text = self._texts[connection.dialect]
            except KeyError:
                text = self._texts[connection.dialect] = _text(
                    self._statement, self._names, connection.dialect
                )
        if text is None:
            result = connection.execute(self._statement, dict(zip(self._names, given, strict=True)))
        else:
            sql, arrange = text
            result = connection.exec_driver_sql(sql, arrange(given), self._written)
        return bool(result.rowcount)


def newcomer(plan: Plan, chain: Chain, aggregates: Sequence[Aggregate]) -> Newcomer | None:
    """What is to be done for one more child of a chain; None where that is not one UPDATE for all of its aggregates."""
    held: list[Newcomer] = plan.memo(
        ("newcomer", chain), lambda: [Newcomer(chain, aggregates)] if _absorbs(chain, aggregates) else []
    )
    return held[0] if held else None


def only_newcomer(plan: Plan, cls: type[Any], watch: Watch) -> Newcomer | None:
    """What is to be done for a flush that does nothing but insert one object of a class; None where that is nothing, or
    more than this."""
    held: list[Newcomer] = plan.memo(("only newcomer", cls), lambda: _only_newcomer(plan, watch))
    return held[0] if held else None


def _only_newcomer(plan: Plan, watch: Watch) -> list[Newcomer]:
    by_images = all(STRATEGIES[aggregate.strategy].by_images for aggregate in plan.aggregates)
    if not by_images or len(watch.places) != 1:
        return []
    chain = watch.places[0][0].chain
    held = newcomer(plan, chain, plan.by_chain[chain])
    return [] if held is None else [held]


def _absorbs(chain: Chain, aggregates: Sequence[Aggregate]) -> bool:
    keys = aggregates[0].table_key
    return (
        chain.depth == 1
        and chain.links[0].secondary is None
        and chain.leaf.base_mapper is not chain.root.base_mapper
        and all(isinstance(column.type, (Integer, Uuid)) for column in keys)
        and chain.root.tables == [aggregates[0].table]
        and not chain.root.single  # whose table has rows of other classes
        and all(held.absorbs and not STRATEGIES[held.strategy].recounts for held in aggregates)
    )


def _text(statement: Update, names: Sequence[str], dialect: Dialect) -> _Text | None:
    """The statement as text, which SQLAlchemy executes in half the time; None where its parameters are more than the keys
    as they are, or the driver must be told of their types."""
    compiled = statement.compile(dialect=dialect)
    assert isinstance(compiled, SQLCompiler)
    if compiled.binds.keys() != set(names) or dialect.bind_typing is BindTyping.SETINPUTSIZES:
        return None
    if any(bind.type.dialect_impl(dialect).bind_processor(dialect) for bind in compiled.binds.values()):
        return None
    if dialect.paramstyle in ("named", "pyformat"):
        return str(compiled), lambda keys: dict(zip(names, keys, strict=True))
    if dialect.paramstyle in ("qmark", "format") and compiled.positiontup:
        return str(compiled), itemgetter(*(names.index(name) for name in compiled.positiontup))
    return None


def _child_parameter(number: int) -> str:
    return f"denormalize_child_{number}"


def _statement(chain: Chain, aggregates: Sequence[Aggregate]) -> Update:
    """Subqueries of the child alone: MySQL lets none read the table that is updated."""
    entities = (chain.root.class_, aliased(chain.leaf, flat=True))
    child = entities[1]
    new = and_(
        *(
            column == bindparam(_child_parameter(i), type_=column.type)
            for i, column in enumerate(attribute_columns(child, chain.keys[1]))
        )
    )
    table = aggregates[0].table
    values: dict[Any, ColumnElement[Any]] = {}
    counts: list[ColumnElement[bool]] = []
    for aggregate in aggregates:
        value = aggregate.value(entities)
        counts.append(true() if aggregate.counts_all else value.is_not(None))
        if not aggregate.counts_all:
            value = select(value).select_from(child).where(new).scalar_subquery()
        gain = aggregate.kind.gain(None if aggregate.counts_all else value)
        assert gain is not None
        values[aggregate.column] = meets(aggregate, *gain)
    # A row that counts for none of them must not touch the parent.
    joined = getattr(chain.root.class_, chain.relationships[0].key).of_type(child)
    below: Select[Any] = select(literal_column("1")).select_from(child).where(new, joined, or_(*counts))
    statement = update(table).where(is_parent(aggregates[0]), below.correlate(table).exists()).values(values)
    return statement.execution_options(**OWN)
