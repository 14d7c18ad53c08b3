"""Strategy "memory": attribute events keep the parent object right at once, before any flush and without SQL.

    thread.comments.append(Comment(message="one two"))
    thread.word_count                                   # 2, nothing has been flushed

For every child the events remember what it contributes, and to which parent; each event computes that anew and
moves the difference. So it does not matter from which side of the relationship, in which order of attributes or
how often an event tells of one change. Deletions have no attribute event and count from the flush on.

What is written does not depend on what events have told: before each flush the parents get what their rows hold, and
what the children that are flushed make different.

The value is written by the unit of work as any other attribute: read, changed in Python, written. Two
processes that do so at once lose one change; this strategy is for data with one writer at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence, Set
from contextlib import nullcontext
from functools import partial
from typing import Any

from sqlalchemy import event
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.orm import Session, object_session
from sqlalchemy.orm.base import NO_VALUE

from querycache.denormalize import guard
from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key
from querycache.denormalize.chain import Chain
from querycache.denormalize.expressions import attributes_read
from querycache.denormalize.locks import Locks
from querycache.denormalize.plan import Place, Plan
from querycache.denormalize.strategies.base import Strategy, assigning
from querycache.denormalize.strategies.live import (
    LiveRow,
    NotYet,
    Taken,
    find_parent,
    folded,
    is_root,
    known_parent,
    link_of,
    load_parents,
    loaded,
    marked,
    old_rows,
    refuse_late,
    refuse_late_deletions,
    staying,
)
from querycache.denormalize.touched import Touched

__all__ = ["Memory"]

Contribution = tuple[Any, Any]
"""The parent object (or None) and the amount."""


class Memory(Strategy):
    name = "memory"
    prepares = True
    needs_all = True

    def __init__(self) -> None:
        self._ledgers: dict[Any, _Ledger] = {}
        """By column; a ledger knows its column, so a weak key would never go away."""

    def attach(self, plan: Plan, aggregate: Aggregate) -> None:
        if not self._ledgers:
            for name, listener in self._listeners():
                event.listen(Session, name, listener)
        ledger = self._ledgers[aggregate.column] = _Ledger(aggregate)
        ledger.listen()

    def detach(self, aggregate: Aggregate) -> None:
        if self._ledgers.pop(aggregate.column, None) is not None and not self._ledgers:
            for name, listener in self._listeners():
                event.remove(Session, name, listener)

    def _listeners(self) -> tuple[tuple[str, Any], ...]:
        return (
            ("transient_to_pending", self._came),
            ("pending_to_transient", self._left),
            ("persistent_to_detached", self._left),
        )

    def _came(self, session: Session, instance: Any) -> None:
        for ledger in self._ledgers.values():
            if isinstance(instance, ledger.chain.leaf.class_):
                ledger.came(instance)

    def _left(self, session: Session, instance: Any) -> None:
        for ledger in self._ledgers.values():
            if isinstance(instance, ledger.chain.leaf.class_):
                ledger.take_back(instance)

    def before_flush(
        self, session: Session, locks: Locks, aggregates: Sequence[Aggregate], touched: Touched
    ) -> None:
        chains: dict[Chain, list[Aggregate]] = {}
        for aggregate in aggregates:
            chains.setdefault(aggregate.chain, []).append(aggregate)
        for chain, held in chains.items():
            family = _Family(session, locks, chain, touched)
            for aggregate in held:
                self._ledgers[aggregate.column].settle(family)

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


class _Family:
    """The children of one chain that a flush touches: those with rows, as they were and are, and where all will be."""

    def __init__(self, session: Session, locks: Locks, chain: Chain, touched: Touched) -> None:
        self.session = session
        self.locks = locks
        self.chain = chain
        held = session.identity_map
        self.persistent = [
            child
            for key in touched.rows.get(Place(chain, 1), ())
            # A cascade of the database reaches those that the session does not hold, and their parent goes with them.
            if (child := held.get(chain.leaf.identity_key_from_primary_key(key))) is not None
        ]
        self.placed = staying(session, chain, touched, self.persistent)
        self.marked = marked(session, chain)
        self._parents: dict[Key, Any] = {}

    def parents(self, keys: Iterable[Key | None]) -> dict[Key, Any]:
        """Those of the given keys, and of keys that were asked for before."""
        fresh = {key for key in keys if key is not None and None not in key} - self._parents.keys()
        if fresh:
            self._parents.update(dict.fromkeys(fresh))
            self._parents.update(load_parents(self.session, self.chain, fresh))
        return self._parents

    def as_stored(self, names: Set[str]) -> list[tuple[Any, Key, Any]]:
        """What the rows hold, each with the state of its object and the key of its parent. The session knows it, but for
        values that were set before they were loaded, or changed in place, which are read."""
        found: list[tuple[Any, Key, Any]] = []
        unknown: dict[Key, Any] = {}
        links = self.chain.links[0].attributes
        for child in self.persistent:
            state = sqlalchemy_inspect(child)
            values = {
                name: state.committed_state[name] if name in state.committed_state else loaded(child, name)
                for name in (*links, *names)
            }
            if any(value is NO_VALUE for value in values.values()):
                unknown[state.identity] = state
            else:
                key = tuple(values[name] for name in links)
                found.append((state, key, LiveRow(child, self.chain, values)))
        if unknown:
            for key, rows in old_rows(self.locks, self.chain, set(unknown)).items():
                for row in rows:
                    identity = tuple(getattr(row, name) for name in self.chain.keys[1])
                    found.append((unknown[identity], key, row))
        return found


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
        self.heard = {*self.read, *self.chain.links[0].attributes, *self.chain.reverses[0]}
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
        for name in sorted(self.heard):
            event.listen(getattr(leaf.class_, name), "set", self._on_set(name), propagate=True)
        event.listen(leaf.class_, "expire", self._on_expire, propagate=True)
        event.listen(leaf.class_, "refresh", self._on_refresh, propagate=True)
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

    def _on_expire(self, child: Any, names: Any) -> None:
        # One that was collected meanwhile had no changes.
        if child is not None and (names is None or not self.heard.isdisjoint(names)):
            self.take_back(child)

    def _on_refresh(self, child: Any, context: Any, names: Any) -> None:
        # What is loaded because it was not leaves changes of other attributes alone.
        if names is None or not sqlalchemy_inspect(child).committed_state.keys().isdisjoint(names):
            self.take_back(child)

    def came(self, child: Any) -> None:
        """It is to be inserted."""
        if not self._within_flush():
            _, parent, key = known_parent(child, self.chain)
            if key is not None:
                parent = find_parent(object_session(child), self.chain, key)
            if parent is not None:
                self._move(child, {}, adopted=parent)

    def take_back(self, child: Any) -> None:
        """The object takes back what it was changed to, or leaves the session; its parent shows what is stored."""
        state = sqlalchemy_inspect(child)
        now, stored = self.known.pop(state, (None, 0)), self.stored.pop(state, (None, 0))
        if now[0] is stored[0] and now[1] == stored[1]:
            return
        for (parent, amount), sign in ((now, -1), (stored, 1)):
            if amount and is_root(parent, self.chain) and self.aggregate.key in parent.__dict__:
                _add(parent, self.aggregate, sign * amount)

    def _within_flush(self) -> bool:
        # The flush sets foreign keys for changes that have been counted already.
        return guard.is_covered()

    def _now(self, child: Any) -> Contribution:
        """What `child` contributes before the event."""
        state = sqlalchemy_inspect(child)
        known = self.known.get(state)
        if known is None:
            if state.has_identity and state.session is None:
                return (None, 0)  # It is detached, and counts again when it is added and flushed.
            known = self._as_loaded(child) if state.has_identity else (None, 0)
            self.known[state] = self.stored[state] = known
        return known

    def _as_loaded(self, child: Any) -> Contribution:
        """What a persistent child contributed when it was loaded; loads it, as any access would, if it is expired."""
        session = object_session(child)
        assert session is not None
        with session.no_autoflush:
            amount = self._amount(LiveRow(child, self.chain))
            key = tuple(loaded(child, name) for name in self.chain.links[0].attributes)
            return (
                None if None in key else load_parents(session, self.chain, {key}).get(key),
                amount,
            )

    def _move(self, child: Any, overlay: dict[str, Any], *, adopted: Any = None) -> None:
        """Let `child` contribute what it is worth with `overlay` assigned, to the parent that it then has."""
        if self._busy:
            return
        self._busy = True
        try:
            parent = self._now(child)[0]
            if adopted is not None:
                parent = adopted
            elif self._overlays_link(overlay):
                parent = self._parent(child, overlay)
            if object_session(child) is not None or (parent is not None and object_session(parent) is None):
                self._to(child, (parent, self._amount(LiveRow(child, self.chain, overlay, partial=True))))
            elif not sqlalchemy_inspect(child).has_identity:
                self._to(child, (None, 0))  # Nothing says that it will ever be below a parent in a session.
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
            return aggregate.kind.finish(folded(aggregate, [aggregate.value_of(row)]))
        except NotYet:
            return 0

    def _to(self, child: Any, now: Contribution) -> None:
        was = self._now(child)
        # An amount that does not fit is refused before anything is changed.
        shown = [
            (parent, self.aggregate.fit(sign * amount))
            for (parent, amount), sign in ((was, -1), (now, 1))
            if amount and is_root(parent, self.chain) and (was[0] is not now[0] or was[1] != now[1])
        ]
        self.known[sqlalchemy_inspect(child)] = now
        for parent, amount in shown:
            _add(parent, self.aggregate, amount)

    def settle(self, family: _Family) -> None:
        """Give each parent what its row holds, and the differences that this flush makes: whatever events have shown, and
        whatever they have not told of."""
        session, aggregate = family.session, self.aggregate
        stored = family.as_stored(self.read)
        parents = family.parents((*(key for _, key, _ in stored), *(each.key for each in family.placed)))
        deleted = session.deleted
        changes: dict[int, Any] = {}
        written = {
            id(parent): parent
            for parent in (*session.new, *session.dirty)
            if is_root(parent, self.chain)
            and (
                aggregate.key in (state := sqlalchemy_inspect(parent)).committed_state
                or not state.has_identity
            )
        }

        def change(parent: Any, amount: Any) -> None:
            if amount and is_root(parent, self.chain) and parent not in deleted:
                written[id(parent)] = parent
                changes[id(parent)] = changes.get(id(parent), 0) + amount

        was: dict[Any, Contribution] = {}
        for state, key, row in stored:
            was[state] = parents.get(key), self._amount(row)
            change(parents.get(key), -was[state][1])
        now: dict[Any, Contribution] = {sqlalchemy_inspect(child): (None, 0) for child in family.persistent}
        for each in family.placed:
            parent = each.parent if each.key is None else parents.get(each.key)
            amount = self._amount(LiveRow(each.child, self.chain))
            change(parent, amount)
            now[sqlalchemy_inspect(each.child)] = parent, amount
        with assigning():
            for mark, parent in written.items():
                value = _stored_value(session, parent, aggregate)
                setattr(parent, aggregate.key, value + aggregate.fit(changes.get(mark, 0)))
        self.forget(session)
        self.stored.update(was)
        self.known.update(now)
        self.marked[session] = family.marked
        for child in (*session.new, *session.dirty):
            state = sqlalchemy_inspect(child)
            if not state.mapper.isa(self.chain.leaf):
                continue
            if any(name in state.mapper.relationships for name in state.committed_state):
                # Which may write what is read, in the flush: what it was must be known then.
                for name in self.read - state.dict.keys():
                    if state.has_identity:
                        loaded(child, name)
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
        for state, now in _items(self.known):
            if state.session is session:
                self.stored[state] = now
        self.marked.pop(session, None)
        for state, _ in _items(self.settled):
            if state.session is session:
                self.settled.pop(state, None)

    def forget(self, session: Session) -> None:
        """Drop what is known of the session's children, and of those that contributed to its parents."""
        for state, (parent, _) in _items(self.known):
            if state.session is session or (parent is not None and parent in session):
                self.known.pop(state, None)
                self.stored.pop(state, None)


def _items(held: weakref.WeakKeyDictionary[Any, Any]) -> list[tuple[Any, Any]]:
    """What is held now: Sessions in other threads add to it meanwhile, and the list of references is made in one step."""
    states = [reference() for reference in held.keyrefs()]
    return [(state, held[state]) for state in states if state is not None and state in held]


def _stored_value(session: Session, parent: Any, aggregate: Aggregate) -> Any:
    """What the row of a parent holds, as far as the session knows."""
    state = sqlalchemy_inspect(parent)
    if not state.has_identity:
        return aggregate.kind.empty
    committed = state.committed_state.get(aggregate.key)
    if committed is NO_VALUE:  # it was set before it was loaded
        session.expire(parent, [aggregate.key])
    elif aggregate.key in state.committed_state:
        return committed or 0
    return loaded(parent, aggregate.key) or 0


def _add(parent: Any, aggregate: Aggregate, amount: Any) -> None:
    session = object_session(parent)
    # A parent that is loaded here must not flush a change of which not every aggregate has been told.
    with assigning(), nullcontext() if session is None else session.no_autoflush:
        setattr(parent, aggregate.key, (getattr(parent, aggregate.key) or 0) + aggregate.fit(amount))
