"""Strategy "memory": attribute events keep the parent object right at once, before any flush and without SQL.

    thread.comments.append(Comment(message="one two"))
    thread.word_count                                   # 2, nothing has been flushed

For every child the events remember what it contributes, and to which parent; each event computes that anew and
moves the difference. So it does not matter from which side of the relationship, in which order of attributes or
how often an event tells of one change. Deletions have no attribute event and count from the flush on.

The value is written by the unit of work as any other attribute: read, changed in Python, written. Two
processes that do so at once lose one change; this strategy is for data with one writer at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence, Set
from contextlib import nullcontext
from functools import partial
from typing import Any

from sqlalchemy import event
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.orm import Session, object_session
from sqlalchemy.orm.base import NO_VALUE

from querycache.denormalize import guard
from querycache.denormalize.chain import Aggregate, Key, attributes_read
from querycache.denormalize.errors import UncoveredChange
from querycache.denormalize.locks import Locks
from querycache.denormalize.plan import Plan
from querycache.denormalize.strategies.base import Strategy, assigning
from querycache.denormalize.strategies.live import (
    LiveRow,
    NotYet,
    Taken,
    find_parent,
    going,
    known_parent,
    link_of,
    load_parents,
    marked,
    refuse_late,
    refuse_late_deletions,
)
from querycache.denormalize.touched import Touched

__all__ = ["Memory"]

Contribution = tuple[Any, Any]
"""The parent object (or None) and the amount."""


class Memory(Strategy):
    name = "memory"
    prepares = True

    def __init__(self) -> None:
        self._ledgers: dict[Any, _Ledger] = {}
        """By column; a ledger knows its column, so a weak key would never go away."""

    def attach(self, plan: Plan, aggregate: Aggregate) -> None:
        ledger = self._ledgers[aggregate.column] = _Ledger(aggregate)
        ledger.listen()

    def detach(self, aggregate: Aggregate) -> None:
        self._ledgers.pop(aggregate.column, None)

    def before_flush(
        self, session: Session, locks: Locks, aggregates: Sequence[Aggregate], touched: Touched
    ) -> None:
        for aggregate in aggregates:
            self._ledgers[aggregate.column].settle(session, touched)

    def after_flush(self, session: Session, aggregates: Sequence[Aggregate]) -> dict[Aggregate, set[Key]]:
        for aggregate in aggregates:
            self._ledgers[aggregate.column].check(session)
        return {}

    def flushed(self, session: Session) -> None:
        for ledger in self._ledgers.values():
            ledger.written(session)

    def forget(self, session: Session) -> None:
        for ledger in self._ledgers.values():
            ledger.forget(session)


class _Ledger:
    """What each child of one aggregate contributes, as far as the parents in memory have it."""

    def __init__(self, aggregate: Aggregate) -> None:
        self.aggregate = aggregate
        self.chain = aggregate.chain
        self.read = {
            name
            for given in (aggregate.declaration.measure, aggregate.declaration.where)
            for name in attributes_read(given, aggregate.chain)[0][-1]
        }
        self.known: weakref.WeakKeyDictionary[Any, Contribution] = weakref.WeakKeyDictionary()
        """What the parents in memory have of each child; `stored` what the rows have."""
        self.stored: weakref.WeakKeyDictionary[Any, Contribution] = weakref.WeakKeyDictionary()
        self.settled: weakref.WeakKeyDictionary[Any, tuple[Key, frozenset[str]]] = weakref.WeakKeyDictionary()
        """Of the children that a flush is about to write, the foreign key and the attributes that have changed."""
        self.marked: weakref.WeakKeyDictionary[Session, set[Any]] = weakref.WeakKeyDictionary()
        """The states of the children that were marked as deleted when a flush began."""
        self._busy = False

    def listen(self) -> None:
        leaf, chain = self.chain.leaf, self.chain
        for name in sorted({*self.read, *chain.links[0].attributes, *chain.reverses[0]}):
            event.listen(getattr(leaf.class_, name), "set", self._on_set(name), propagate=True)
        event.listen(leaf.class_, "expire", self._on_reload, propagate=True)
        event.listen(
            leaf.class_,
            "refresh",
            lambda child, context, names: self._on_reload(child, names),
            propagate=True,
        )
        collection = getattr(chain.root.class_, chain.relationships[0].key)
        event.listen(collection, "append", self._on_append, propagate=True)
        event.listen(collection, "remove", self._on_remove, propagate=True)
        if not chain.relationships[0].uselist:
            event.listen(collection, "set", self._on_replace, propagate=True, active_history=True)

    def _on_set(self, name: str) -> Any:
        def changed(child: Any, value: Any, old: Any, initiator: Any) -> None:
            if not self._within_flush():
                self._move(child, {name: value})

        return changed

    def _on_append(self, parent: Any, child: Any, initiator: Any) -> None:
        if not self._within_flush():
            self._move(child, {}, adopted=parent)

    def _on_remove(self, parent: Any, child: Any, initiator: Any) -> None:
        if not self._within_flush() and self._now(child)[0] is parent:
            self._to(child, (None, 0))

    def _on_replace(self, parent: Any, child: Any, old: Any, initiator: Any) -> None:
        """The one child gives way to another, or to none."""
        if old is not child and isinstance(old, self.chain.leaf.class_):
            self._on_remove(parent, old, initiator)
        if child is not None:
            self._on_append(parent, child, initiator)

    def _on_reload(self, child: Any, names: Any) -> None:
        """The object takes back what it was changed to; so does its parent."""
        if child is None:  # collected meanwhile, so it had no changes
            return
        state = sqlalchemy_inspect(child)
        now, stored = self.known.pop(state, (None, 0)), self.stored.pop(state, (None, 0))
        if now[0] is stored[0] and now[1] == stored[1]:
            return
        for (parent, amount), sign in ((now, -1), (stored, 1)):
            if parent is not None and amount and self.aggregate.key in parent.__dict__:
                _add(parent, self.aggregate, sign * amount)

    def _within_flush(self) -> bool:
        # The flush sets foreign keys for changes that have been counted already.
        return guard.is_covered()

    def _now(self, child: Any) -> Contribution:
        """What `child` contributes before the event."""
        state = sqlalchemy_inspect(child)
        known = self.known.get(state)
        if known is None:
            known = self._as_loaded(child) if state.has_identity else (None, 0)
            self.known[state] = self.stored[state] = known
        return known

    def _as_loaded(self, child: Any) -> Contribution:
        """What a persistent child contributed when it was loaded; loads it, as any access would, if it is expired."""
        session = object_session(child)
        if session is None:
            raise UncoveredChange(
                f"{type(child).__name__} is detached; {self.aggregate.name} cannot be kept in memory. merge() it first"
            )
        with session.no_autoflush:
            row = LiveRow(child, self.chain)
            amount = self._amount(row)
            key = tuple(getattr(child, name) for name in self.chain.links[0].attributes)
            return (None if None in key else self._loaded(session, child, key), amount)

    def _loaded(self, session: Session, child: Any, key: Any) -> Any:
        parent = find_parent(session, self.chain, key)
        if parent is None:
            for reverse in self.chain.reverses[0]:
                parent = getattr(child, reverse)
                if parent is not None and sqlalchemy_inspect(parent).identity != key:
                    # It shows the one from before the key was set.
                    parent = load_parents(session, self.chain, {key}).get(key)
        if parent is None:
            raise UncoveredChange(
                f"{self.chain.root.class_.__name__} {key!r} is not in the session; strategy 'memory' changes"
                f" {self.aggregate.name} on the object. Load it first, or take strategy 'sql'"
            )
        return parent

    def _move(self, child: Any, overlay: dict[str, Any], *, adopted: Any = None, final: bool = False) -> None:
        """Let `child` contribute what it is worth with `overlay` assigned, to the parent that it then has."""
        if self._busy:
            return
        self._busy = True
        try:
            parent = self._now(child)[0]
            if adopted is not None:
                parent = adopted
            elif self._overlays_link(overlay) or (final and parent is None):
                parent = self._parent(child, overlay)
            self._to(child, (parent, self._amount(LiveRow(child, self.chain, overlay, partial=not final))))
        finally:
            self._busy = False

    def _parent(self, child: Any, overlay: dict[str, Any]) -> Any:
        _, parent, key = known_parent(child, self.chain, overlay)
        session = object_session(child)
        if key is None or session is None:
            return parent
        with session.no_autoflush:
            # Where the key belongs to no row, the database refuses the child, or nobody holds a count of it.
            return load_parents(session, self.chain, {key}).get(key)

    def _overlays_link(self, overlay: dict[str, Any]) -> bool:
        return any(name in overlay for name in (*self.chain.links[0].attributes, *self.chain.reverses[0]))

    def _amount(self, row: LiveRow) -> Any:
        aggregate = self.aggregate
        try:
            if not aggregate.counts(row):
                return 0
            return aggregate.kind.finish(aggregate.kind.fold([aggregate.value_of(row)]))
        except NotYet:
            return 0

    def _to(self, child: Any, now: Contribution) -> None:
        was = self._now(child)
        self.known[sqlalchemy_inspect(child)] = now
        for (parent, amount), sign in ((was, -1), (now, 1)):
            if parent is not None and amount and (was[0] is not now[0] or was[1] != now[1]):
                _add(parent, self.aggregate, sign * amount)

    def settle(self, session: Session, touched: Touched) -> None:
        """Bring in what no event told of: deletions, attributes left to defaults, foreign keys set before the object
        was in a session, and objects that a rollback had thrown out."""
        fresh = [parent for parent in session.new if sqlalchemy_inspect(parent).mapper.isa(self.chain.root)]
        with assigning():
            for parent in fresh:
                setattr(parent, self.aggregate.key, self.aggregate.kind.empty)
        for state, (parent, _) in list(self.known.items()):
            if any(parent is one for one in fresh):
                self.known[state] = (parent, 0)
        self.marked[session] = marked(session, self.chain)
        gone = going(session, self.chain, touched)
        for child in gone.values():
            self._to(child, (None, 0))
        for child in (*session.new, *session.dirty):
            state = sqlalchemy_inspect(child)
            if not state.mapper.isa(self.chain.leaf):
                continue
            if id(child) not in gone and (state in self.known or not state.has_identity):
                self._move(child, {}, final=True)
            elif id(child) not in gone and any(
                name in state.mapper.relationships for name in state.committed_state
            ):
                # Which may write what is read, in the flush: what it was must be known then.
                with session.no_autoflush:
                    for name in self.read - state.dict.keys():
                        getattr(child, name)
            self.settled[state] = link_of(child, self.chain), frozenset(state.committed_state)

    def check(self, session: Session) -> None:
        """A flush has written the children: as they are known?"""
        refuse_late_deletions(session, self.aggregate, self.marked.get(session, set()))
        for child in (*session.new, *session.dirty):
            state = sqlalchemy_inspect(child)
            if not state.mapper.isa(self.chain.leaf):
                continue
            link, changed = self.settled.get(state, (None, frozenset()))
            taken = None
            if state in self.known:
                taken = Taken(link, *self.known[state])
            elif state.has_identity and self._is_worth_as_before(
                child, state.committed_state.keys() - changed
            ):
                continue
            amount = partial(self._amount, LiveRow(child, self.chain))
            refuse_late(session, child, self.aggregate, taken, amount)

    def _is_worth_as_before(self, child: Any, names: Set[str]) -> bool:
        """Whether the attributes `names`, which the flush has changed, make no difference."""
        committed = sqlalchemy_inspect(child).committed_state
        before = {name: committed[name] for name in self.read & names}
        if not before:
            return True
        if NO_VALUE in before.values():
            return False
        return bool(
            self._amount(LiveRow(child, self.chain, before)) == self._amount(LiveRow(child, self.chain))
        )

    def written(self, session: Session) -> None:
        """A flush is over: the rows have what the parents have."""
        for state, now in list(self.known.items()):
            if state.session is session:
                self.stored[state] = now
        self.marked.pop(session, None)
        for state in [state for state in self.settled if state.session is session]:
            del self.settled[state]

    def forget(self, session: Session) -> None:
        """Drop what is known of the session's children, and of those that contributed to its parents."""
        for state, (parent, _) in list(self.known.items()):
            if state.session is session or (parent is not None and parent in session):
                del self.known[state]
                self.stored.pop(state, None)


def _add(parent: Any, aggregate: Aggregate, amount: Any) -> None:
    session = object_session(parent)
    # A parent that is loaded here must not flush a change of which not every aggregate has been told.
    with assigning(), nullcontext() if session is None else session.no_autoflush:
        setattr(parent, aggregate.key, (getattr(parent, aggregate.key) or 0) + aggregate.fit(amount))
