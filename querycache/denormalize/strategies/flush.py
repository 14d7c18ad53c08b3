"""Strategy "flush": computed in `before_flush` from the objects, written with the parent by the unit of work.

The old contribution of each touched child is read from its row under lock, the new one from the object; parents are
loaded where the session does not hold them, and get the difference as a SQL expression, so that the flush's own
UPDATE of the parent carries it: one statement with the parent's other changes, `version_id_col` counted up, parent
events fired. Kinds that cannot be brought forward are computed from the parent's other children, read under the
parent's lock, and the touched ones.

It sees what the session sees: defaults and expressions that the database computes are refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, time
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import DateTime, Time, func
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import flag_modified

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key
from querycache.denormalize.chain import Chain
from querycache.denormalize.errors import UncoveredChange
from querycache.denormalize.images import ChildRow
from querycache.denormalize.kinds import Increment
from querycache.denormalize.locks import Locks, chunks, parameters
from querycache.denormalize.plan import Place
from querycache.denormalize.queries import Queried, recount_query
from querycache.denormalize.strategies.base import Strategy, assigning
from querycache.denormalize.strategies.live import (
    LiveRow,
    Taken,
    folded,
    is_root,
    load_parents,
    marked,
    old_rows,
    refuse_late,
    refuse_late_deletions,
    staying,
)
from querycache.denormalize.touched import Touched

__all__ = ["Flush"]


class Flush(Strategy):
    name = "flush"
    prepares = True
    expires = True
    needs_all = True

    def __init__(self) -> None:
        self._looks: weakref.WeakKeyDictionary[Session, dict[Aggregate, _Look]] = weakref.WeakKeyDictionary()
        self._assigned: weakref.WeakKeyDictionary[Session, dict[Aggregate, list[Any]]] = (
            weakref.WeakKeyDictionary()
        )
        """The parents that a flush is to write, until it has."""

    def before_flush(
        self, session: Session, locks: Locks, aggregates: Sequence[Aggregate], touched: Touched
    ) -> None:
        assigned = self._assigned.setdefault(session, {})
        for aggregate in aggregates:
            _take_back(session, aggregate, assigned.pop(aggregate, ()))
        chains: dict[Chain, list[Aggregate]] = {}
        for aggregate in aggregates:
            chains.setdefault(aggregate.chain, []).append(aggregate)
        for chain, held in chains.items():
            family = _Family(session, locks, chain, touched)
            family.find_parents()
            assigned.update((aggregate, list(family.parents.values())) for aggregate in held)
            family.bring_forward(held)
            was = marked(session, chain)
            self._looks.setdefault(session, {}).update(
                {aggregate: _Look(family.taken(aggregate), was) for aggregate in held}
            )

    def after_flush(self, session: Session, aggregates: Sequence[Aggregate]) -> dict[Aggregate, set[Key]]:
        """The parents whose attribute is now an expired SQL expression."""
        looks = self._looks.get(session, {})
        for aggregate in aggregates:
            _check(session, aggregate, looks.get(aggregate, _Look({}, set())))
        stale: dict[Aggregate, set[Key]] = {}
        for instance in session.dirty:
            state = sqlalchemy_inspect(instance)
            for aggregate in aggregates:
                if aggregate.key in state.expired_attributes and state.mapper.isa(aggregate.chain.root):
                    stale.setdefault(aggregate, set()).add(state.identity)
        return stale

    def flushed(self, session: Session) -> None:
        self._looks.pop(session, None)
        self._assigned.pop(session, None)

    def forget(self, session: Session) -> None:
        self._looks.pop(session, None)


class _Look(NamedTuple):
    """What the children of an aggregate were taken to be before a flush, by their identity in memory, and the states of
    those that were marked as deleted."""

    taken: Mapping[int, tuple[Any, Taken]]
    marked: set[Any]


def _take_back(session: Session, aggregate: Aggregate, parents: Iterable[Any]) -> None:
    """Take back what parents were given for a flush that never came to be, because a before_flush listener raised."""
    for parent in parents:
        state = sqlalchemy_inspect(parent)
        if state.session is session and state.persistent and aggregate.key in state.committed_state:
            session.expire(parent, [aggregate.key])


def _check(session: Session, aggregate: Aggregate, look: _Look) -> None:
    """A flush has written the children: as they were taken to be?"""
    refuse_late_deletions(session, aggregate, look.marked)
    taken = look.taken
    for child, was in taken.values():
        row = LiveRow(child, aggregate.chain)
        refuse_late(session, child, aggregate, was, partial(_worth, aggregate, row))
    for child in session.new:
        if id(child) not in taken and sqlalchemy_inspect(child).mapper.isa(aggregate.chain.leaf):
            refuse_late(session, child, aggregate, None, lambda: None)


def _worth(aggregate: Aggregate, row: LiveRow) -> Any:
    """What a child counts for; but for a key, which the database may still have to make."""
    if not aggregate.counts(row):
        return _NOTHING
    value = aggregate.value_of(row)
    return (value[0], value[2]) if aggregate.kind.ordered else value


_NOTHING = object()


class _Family:
    """The touched children of one chain, as they were and as they will be."""

    def __init__(self, session: Session, locks: Locks, chain: Chain, touched: Touched) -> None:
        self.session = session
        self.locks = locks
        self.chain = chain
        self.touched = touched
        self.deleted = session.deleted
        self.keys = touched.rows.get(Place(chain, 1), set())
        self.parents: dict[int, Any] = {}
        """Objects by their identity in memory, since not every one can be hashed."""
        self.children: list[tuple[Any, Key, Any]] = []
        """Those that will be there, with their foreign keys and parents as objects."""
        self.before: dict[int, list[Any]] = {}
        self.after: dict[int, list[Any]] = {}

    def find_parents(self) -> None:
        old = old_rows(self.locks, self.chain, self.keys)
        placed = staying(self.session, self.chain, self.touched, self._persistent(old))
        keys = {*old, *(each.key for each in placed if each.key is not None)}
        loaded = load_parents(self.session, self.chain, keys) if keys else {}
        for key, rows in old.items():
            self._put(self.before, loaded.get(key), rows)
        for each in placed:
            parent = each.parent if each.key is None else loaded.get(each.key)
            self._put(self.after, parent, [LiveRow(each.child, self.chain)])
            self.children.append((each.child, each.link, parent))

    def _put(self, rows: dict[int, list[Any]], parent: Any, more: Iterable[Any]) -> None:
        if is_root(parent, self.chain) and parent not in self.deleted:
            self.parents[id(parent)] = parent
            rows.setdefault(id(parent), []).extend(more)

    def bring_forward(self, aggregates: Sequence[Aggregate]) -> None:
        counted = [held for held in aggregates if not held.kind.additive]
        others = self._other_children() if counted else {}
        with assigning():
            for mark, instance in self.parents.items():
                for aggregate in aggregates:
                    self._assign(
                        aggregate, instance, self.before.get(mark, []), self.after.get(mark, []), others
                    )

    def _assign(
        self,
        aggregate: Aggregate,
        instance: Any,
        before: Sequence[Any],
        after: Sequence[Any],
        others: dict[Key, list[ChildRow]],
    ) -> None:
        identity = sqlalchemy_inspect(instance).identity
        if not aggregate.kind.additive:
            rows = [*(others.get(identity, []) if identity is not None else []), *after]
            value = aggregate.finish(self._fold(aggregate, rows))
            setattr(instance, aggregate.key, value)
            # It is written even if the object, which may be out of date, holds that value already.
            flag_modified(instance, aggregate.key)
            return
        change = aggregate.kind.change(self._fold(aggregate, before), self._fold(aggregate, after))
        if isinstance(change, Increment):
            amount = aggregate.fit(change.amount)
            if identity is None:
                setattr(instance, aggregate.key, (getattr(instance, aggregate.key) or 0) + amount)
            else:
                setattr(instance, aggregate.key, func.coalesce(aggregate.column, 0) + amount)

    def taken(self, aggregate: Aggregate) -> dict[int, tuple[Any, Taken]]:
        """What the children are taken to be, by their identity in memory."""
        found: dict[int, tuple[Any, Taken]] = {}
        for child, link, parent in self.children:
            value = None if parent is None else _worth(aggregate, LiveRow(child, self.chain))
            found[id(child)] = child, Taken(link, parent, value)
        return found

    def _other_children(self) -> dict[Key, list[ChildRow]]:
        """The children of the persistent parents that this flush does not touch."""
        keys = {sqlalchemy_inspect(parent).identity for parent in self.parents.values()} - {None}
        self.locks.lock({Place(self.chain, 0): keys}, roots=True)
        queried: Queried = self.locks.plan.memo(
            ("rows of", self.chain), lambda: recount_query(self.chain, (), rows=True)
        )
        statement = self.locks.read(queried.statement)
        positions = [self.chain.leaf_columns.index(name) for name in self.chain.keys[1]]
        found: dict[Key, list[ChildRow]] = {}
        for chunk in chunks(keys):
            for row in self.locks.connection.execute(statement, parameters(chunk)):
                values = row[queried.values]
                key = tuple(values[position] for position in positions)
                if None not in key and key not in self.keys:
                    found.setdefault(tuple(row[queried.parent]), []).append(self._row(values))
        return found

    def _fold(self, aggregate: Aggregate, rows: Sequence[Any]) -> Any:
        values = [aggregate.value_of(row) for row in rows if aggregate.counts(row)]
        # What a type of the application's own makes of moments, it makes of all of them.
        if self.locks.dialect != "postgresql" and isinstance(aggregate.compared, (DateTime, Time)):
            values = [_without_zone(value) for value in values]
        return folded(aggregate, values)

    def _row(self, values: Iterable[Any]) -> ChildRow:
        return ChildRow(self.chain.leaf.class_.__name__, self.chain.leaf_columns, values)

    def _persistent(self, old: Mapping[Key, Iterable[ChildRow]]) -> Iterable[Any]:
        names = self.chain.keys[1]
        there = {tuple(getattr(row, name) for name in names) for rows in old.values() for row in rows}
        for key in self.keys:
            child = self.session.identity_map.get(self.chain.leaf.identity_key_from_primary_key(key))
            if child is None and key not in there:
                # It was deleted and flushed before, and leaves a collection that still shows it.
                continue
            if child is None:
                raise UncoveredChange(
                    f"{self.chain.leaf.class_.__name__} {key!r} is changed by a cascade that the session does not hold;"
                    " strategy 'flush' cannot follow it, take strategy 'sql'"
                )
            yield child


def _without_zone(value: Any) -> Any:
    """A moment as the databases keep it that have no time zones; of latest_of, that in its order."""
    if isinstance(value, tuple):
        return (_without_zone(value[0]), *value[1:])
    return value.replace(tzinfo=None) if isinstance(value, (datetime, time)) else value
