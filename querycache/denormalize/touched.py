"""What a flush is about to touch: the rows of each place whose old contribution must be known before any SQL runs.

Read from the session alone, without SQL except for deletions that spread by foreign keys, whose rows the database
knows and the session does not. Taking in too much is harmless (`images.py`), so whatever may change counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from typing import Any

from sqlalchemy import ClauseElement, Table, and_, select
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.orm.attributes import has_parent
from sqlalchemy.orm.collections import collection_adapter

from querycache.denormalize.attributes import Key, changed_by_update, in_order, key_condition, primary_keys
from querycache.denormalize.errors import UncoveredChange
from querycache.denormalize.locks import Locks, chunks, keys_of, parameters
from querycache.denormalize.plan import Place, Plan, Watch, plan_of
from querycache.sa_internals import just_flushed, unflushed

__all__ = ["Fresh", "Sorter", "Touched", "inserted", "missed", "replaced", "spread"]

Fresh = dict[type[Any], list[Any]]
"""New objects by their class."""

LockedFrom = Callable[[Session, Mapper[Any]], int | None]
"""The least level whose rows must be locked before the flush, of the chains of a parent; None if none."""


class Touched:
    """The rows of one plan that a flush touches.

    Attributes:
        rows: keys of persistent rows by place.
        parents: rows that touched rows will belong to, as far as the session tells; to be locked.
        deleted: keys of rows that (may) go away, by table.
        dead: identities of the objects that go away or change their primary key, by base mapper.
        changed: the changed objects behind `rows`.
        renamed: objects whose primary key changes. Where it holds a foreign key that a relationship writes, that shows only
            when the flush has run (`rename`).
        related: objects that were found through relationships; one that was loaded only to be found would be gone.
        orphans: the objects that the flush deletes because they left their parents, and those that go with them, by state.
    """

    def __init__(self) -> None:
        self.rows: dict[Place, set[Key]] = {}
        self.parents: dict[Place, set[Key]] = {}
        self.deleted: dict[Table, set[Key]] = {}
        self.dead: set[tuple[Mapper[Any], Key]] = set()
        self.changed: dict[tuple[Place, Key], Any] = {}
        self.renamed: list[Any] = []
        self.related: list[Any] = []
        self.orphans: dict[Any, Any] = {}

    def add(self, place: Place, key: Key) -> None:
        self.rows.setdefault(place, set()).add(key)

    def reads(self, locked_from: Callable[[Mapper[Any]], int | None]) -> bool:
        """Whether old values are to be read, or rows to be locked, from the level on that `locked_from` tells."""
        return bool(
            self.rows
            or self.deleted
            or self.dead
            or any(
                (least := locked_from(place.chain.root)) is not None and place.level >= least
                for place in self.parents
            )
        )

    def gone(self, tables: Iterable[Any], key: Key) -> None:
        for table in tables:
            self.deleted.setdefault(table, set()).add(key)

    def rename(self, instances: Iterable[Any]) -> None:
        """Note objects whose primary key changes, each once."""
        known = {id(instance) for instance in self.renamed}
        for instance in instances:
            if id(instance) not in known:
                state = sqlalchemy_inspect(instance)
                self.renamed.append(instance)
                self.dead.add((state.mapper.base_mapper, state.identity))


class Sorter:
    """Sorts the objects of flushes by plan; remembers what it learned of each class."""

    def __init__(self) -> None:
        self._classes: dict[type[Any], tuple[Plan, Watch] | None] = {}

    def watch(self, cls: type[Any]) -> tuple[Plan, Watch] | None:
        """The plan and Watch of a class, if any aggregate depends on its instances."""
        try:
            return self._classes[cls]
        except KeyError:
            mapper: Mapper[Any] = sqlalchemy_inspect(cls)
            plan = plan_of(mapper)
            watch = None if plan is None else plan.watch(mapper)
            found = self._classes[cls] = (plan, watch) if plan is not None and watch else None
            return found

    def collect(
        self, session: Session, locked_from: LockedFrom, flushed: Any = None
    ) -> tuple[dict[Plan, Touched], Fresh]:
        """What the pending changes of `session` touch among the rows that are there, and the objects of watched classes
        that are to get rows (or, once the flush has run, got them).

        Args:
            locked_from: tells the least level whose rows must be locked before the flush.
            flushed: the context of the flush, once it has run.
        """
        found: dict[Plan, Touched] = {}
        new, dirty, deleted = unflushed(session) if flushed is None else just_flushed(session, flushed)
        for instance in deleted:
            known = self.watch(type(instance))
            if known is not None:
                plan, watch = known
                _refuse_unseen(type(instance), plan, watch)
                self._deleted(instance, watch, found.setdefault(plan, Touched()))
        for instance in dirty:
            known = self.watch(type(instance))
            if known is not None:
                plan, watch = known
                if watch.unseen:
                    _refuse_unseen(type(instance), plan, watch, _changed(sqlalchemy_inspect(instance), watch))
                self._dirty(
                    instance, watch, found.setdefault(plan, Touched()), _least(session, watch, locked_from)
                )
        return found, self._by_class(new)

    def expect(
        self, session: Session, fresh: Fresh, found: dict[Plan, Touched], locked_from: LockedFrom
    ) -> None:
        """Add to `found` what new objects touch."""
        for cls, instances in fresh.items():
            known = self.watch(cls)
            if known is None:
                continue
            plan, watch = known
            least = _least(session, watch, locked_from)
            locked = [] if least is None else [place for place, _ in watch.places if place.level > least]
            if not locked and not watch.collections:
                continue
            touched = found.setdefault(plan, Touched())
            for instance in instances:
                for place in locked:
                    _parents(instance, place, touched)
                if watch.collections:
                    self._collections(instance, watch, touched)

    def _by_class(self, instances: Iterable[Any]) -> Fresh:
        """The instances of watched classes, in their order; a flush may have many of few classes."""
        found: Fresh = {}
        for instance in instances:
            cls = type(instance)
            held = found.get(cls)
            if held is not None:
                held.append(instance)
            elif (known := self.watch(cls)) is not None:
                _refuse_unseen(cls, *known)
                found[cls] = [instance]
        return found

    def _deleted(self, instance: Any, watch: Watch, touched: Touched) -> None:
        state = sqlalchemy_inspect(instance)
        touched.dead.add((state.mapper.base_mapper, state.identity))
        for place, _ in watch.places:
            touched.add(place, state.identity)
        if watch.guards_deletes:
            touched.gone(state.mapper.tables, state.identity)
        self._collections(instance, watch, touched)

    def _dirty(self, instance: Any, watch: Watch, touched: Touched, least: int | None) -> None:
        state = sqlalchemy_inspect(instance)
        changed = _changed(state, watch)
        for place, relevant in watch.places:
            if not relevant.isdisjoint(changed):
                touched.add(place, state.identity)
                touched.changed[place, state.identity] = instance
                if least is not None and place.level > least:
                    _parents(instance, place, touched)
        if not changed.isdisjoint(primary_keys(state.mapper)):
            touched.renamed.append(instance)
            touched.dead.add((state.mapper.base_mapper, state.identity))
        self._collections(instance, watch, touched)
        if watch.owners and _is_orphan(instance, watch):
            self._orphan(instance, touched)

    def _collections(self, instance: Any, watch: Watch, touched: Touched) -> None:
        """Rows that an object's relationships move, or orphan."""
        state = sqlalchemy_inspect(instance)
        for name, place in watch.collections:
            if name not in state.committed_state and state.persistent:
                continue
            history = state.attrs[name].history
            upper = place.chain.mappers[place.level - 1]
            own = place.chain.relationships[place.level - 1].key == name and state.mapper.isa(upper)
            for child in (*history.added, *history.deleted):
                self._related(child, place, touched)
            if own and history.added and state.identity is not None:
                touched.parents.setdefault(Place(place.chain, place.level - 1), set()).add(state.identity)
        for name in watch.orphans:
            if name in state.committed_state:
                for child in state.attrs[name].history.deleted:
                    self._orphan(child, touched)

    def _related(self, child: Any, place: Place, touched: Touched) -> None:
        if child is None:
            return
        state = sqlalchemy_inspect(child)
        if state.identity is not None and state.mapper.isa(place.chain.mappers[place.level]):
            touched.add(place, state.identity)
            touched.related.append(child)

    def _orphan(self, child: Any, touched: Touched) -> None:
        """An object that left a delete-orphan relationship is deleted inside the flush, with what its own relationships
        delete, unless another parent has taken it."""
        if child is None:
            return
        state = sqlalchemy_inspect(child)
        known = self.watch(type(child))
        if state.identity is None or known is None or state in touched.orphans:
            return
        _, watch = known
        for place, _ in watch.places:
            touched.add(place, state.identity)
        if watch.guards_deletes:
            touched.gone(state.mapper.tables, state.identity)
        if _is_orphan(child, watch):
            goes_with_it = [each for each, *_ in state.mapper.cascade_iterator("delete", state)]
            for instance in (child, *goes_with_it):
                self._orphaned(instance, touched)

    def _orphaned(self, instance: Any, touched: Touched) -> None:
        state = sqlalchemy_inspect(instance)
        known = self.watch(type(instance))
        if state.identity is not None and known is not None and state not in touched.orphans:
            touched.orphans[state] = instance
            self._deleted(instance, known[1], touched)


def _refuse_unseen(cls: type[Any], plan: Plan, watch: Watch, changed: Set[str] | None = None) -> None:
    """Refuse what is missed by aggregates that are kept by the objects of another class on the same table.

    Args:
        changed: the attributes that change; None where a row comes or goes.
    """
    for table, names in watch.unseen.items():
        if changed is None or not names.isdisjoint(changed):
            raise plan.unseen_change(sqlalchemy_inspect(cls), table)


def _changed(state: Any, watch: Watch) -> Set[str]:
    """The attributes that were set, without keys that SQLAlchemy has copied from table to table."""
    changed: dict[str, Any] = state.committed_state
    if watch.copied.isdisjoint(changed):
        return changed.keys()
    values = state.dict
    same = {
        name for name in watch.copied & changed.keys() if name in values and changed[name] == values[name]
    }
    return changed.keys() - same


def _is_orphan(instance: Any, watch: Watch) -> bool:
    return any(not has_parent(cls, instance, name, optimistic=True) for cls, name in watch.owners)


def _least(session: Session, watch: Watch, locked_from: LockedFrom) -> int | None:
    # Whatever stands on several chains has one row, on one engine.
    return locked_from(session, watch.places[0][0].chain.root) if watch.places else None


def _parents(instance: Any, place: Place, touched: Touched) -> None:
    """The row above `instance`, as far as its attributes in memory say."""
    upper = Place(place.chain, place.level - 1)
    values = instance.__dict__
    attributes = place.chain.links[place.level - 1].attributes
    if attributes:
        key = tuple(values.get(name) for name in attributes)
        if not any(part is None or isinstance(part, ClauseElement) for part in key):
            touched.parents.setdefault(upper, set()).add(key)
    for reverse in place.chain.reverses[place.level - 1]:
        held = values.get(reverse)
        several = not attributes and held is not None and _is_collection(instance, reverse)
        for parent in collection_adapter(held) if several else (held,):
            if parent is not None:
                identity = sqlalchemy_inspect(parent).identity
                if identity is not None:
                    touched.parents.setdefault(upper, set()).add(identity)


def _is_collection(instance: Any, name: str) -> bool:
    return bool(sqlalchemy_inspect(instance).mapper.relationships[name].uselist)


def inserted(fresh: Fresh, sorter: Sorter) -> dict[Plan, dict[Place, dict[Key, Any]]]:
    """The objects whose rows the flush has inserted, by place and key; asked when it has."""
    found: dict[Plan, dict[Place, dict[Key, Any]]] = {}
    for cls, instances in fresh.items():
        known = sorter.watch(cls)
        if known is None or not known[1].places:
            continue
        plan, watch = known
        by_key = _by_key(sqlalchemy_inspect(cls), instances)
        per_place = found.setdefault(plan, {})
        for place, _ in watch.places:
            per_place.setdefault(place, {}).update(by_key)
    return found


def _by_key(mapper: Mapper[Any], instances: Iterable[Any]) -> dict[Key, Any]:
    """Objects that have been inserted by their keys; an orphan that was not has none."""
    names = primary_keys(mapper)
    try:
        if len(names) == 1:
            (name,) = names
            return {(part,): each for each in instances if (part := each.__dict__[name]) is not None}
        keys = {tuple([each.__dict__[name] for name in names]): each for each in instances}
    except KeyError:  # an attribute that is expired, or mapped under several columns
        keys = {tuple(mapper.primary_key_from_instance(each)): each for each in instances}
    return {key: each for key, each in keys.items() if None not in key}


def spread(locks: Locks, touched: Touched, deleted: Mapping[Table, set[Key]]) -> None:
    """Add the rows that deletions reach through foreign keys, in the database or by ORM cascades.

    The deleted rows are locked as their DELETE will lock them, so that nothing can be put below them meanwhile.
    """
    plan = locks.plan
    for table, keys in deleted.items():
        locks.for_delete(table, keys)
    pending = {table: set(keys) for table, keys in deleted.items()}
    seen: dict[Table, set[Key]] = {table: set(keys) for table, keys in pending.items()}
    while pending:
        table, keys = pending.popitem()
        for number, edge in enumerate(plan.edges.get(table, ())):
            statement = locks.read(plan.memo(("edge", table, number), partial(_edge, edge, plan, table)))
            reached: set[Key] = set()
            for chunk in chunks(keys):
                reached.update(
                    keys_of(
                        locks.connection.execute(statement, parameters(chunk)),
                        len(edge.keys),
                    )
                )
            for place in edge.places:
                touched.rows.setdefault(place, set()).update(reached)
            if edge.spreads:
                fresh = reached - seen.setdefault(edge.table, set())
                if fresh:
                    seen[edge.table] |= fresh
                    pending.setdefault(edge.table, set()).update(fresh)


def _edge(edge: Any, plan: Plan, table: Table) -> Any:
    above, below = table.alias(), edge.table.alias()
    on = and_(*(below.c[held.key] == above.c[referred.key] for held, referred in edge.joins))
    return (
        select(*(below.c[column.key] for column in edge.keys))
        .join_from(below, above, on)
        .where(key_condition(tuple(above.c[column.key] for column in plan.key_of(table))))
    )


def replaced(fresh: Fresh, touched: Touched, sorter: Sorter) -> dict[Mapper[Any], set[Key]]:
    """New parents that take the place of deleted ones under the same key, by mapper: one UPDATE of the row that is there,
    which leaves what it holds and what may still be below it."""
    found: dict[Mapper[Any], set[Key]] = {}
    if not touched.dead:
        return found
    for cls, instances in fresh.items():
        known = sorter.watch(cls)
        if known is None or not known[1].roots:
            continue
        mapper: Mapper[Any] = sqlalchemy_inspect(cls)
        keys = {key for key in _by_key(mapper, instances) if (mapper.base_mapper, key) in touched.dead}
        if keys:
            found[mapper] = keys
    return found


def missed(plan: Plan, before: Touched, again: Touched, new: Mapping[Place, Mapping[Key, Any]]) -> None:
    """Compare what was collected before the flush with what shows after it.

    Args:
        new: the rows that the flush has inserted, of which there was nothing to be looked at: a one-to-one relationship
            that was not loaded before it was set shows the new row for the old one.

    Raises:
        UncoveredChange: if a row was changed that had not been announced, so that its old contribution is unknown.
    """
    for table in again.deleted.keys() & plan.edges.keys():
        unknown = again.deleted[table] - before.deleted.get(table, set())
        if unknown and any(held.strategy != "trigger" for held in plan.depending_on(table)):
            raise UncoveredChange(
                f"{table.fullname} {in_order(unknown)[0]!r} was deleted after the aggregates were looked at that its deletion"
                " changes, by a before_flush listener registered later or a mapper event; register that listener on the"
                " Session class before the mappers configure"
            )
    for place, keys in again.rows.items():
        if all(held.strategy == "trigger" for held in plan.by_chain[place.chain]):
            continue
        late = {
            key
            for key in keys - before.rows.get(place, set()) - new.get(place, {}).keys()
            if not _follows(place, key, plan, before, again)
        }
        if not late:
            continue
        raise UncoveredChange(
            f"{place.chain.mappers[place.level].class_.__name__} {in_order(late)[0]!r} was changed after"
            f" {', '.join(sorted(held.name for held in plan.by_chain[place.chain]))} had been looked at: by a before_flush"
            " listener registered later than this package's, by a mapper event such as before_update, by an after_flush"
            " listener, of whose changes SQLAlchemy writes none, or by a parent that it was given before its object was"
            " expired. Make the change"
            " where the attribute that leads to it is set (a validator, an attribute event), or in a before_flush listener"
            " registered on the Session class before the mappers configure"
        )


def _follows(place: Place, key: Key, plan: Plan, before: Touched, again: Touched) -> bool:
    """Whether the flush itself changed this row, because its parent went away or took another key: its link changed
    with that of nothing else, and the parent's own change accounts for it."""
    instance = again.changed.get((place, key))
    if instance is None:
        return False
    state = sqlalchemy_inspect(instance)
    chain, level = place.chain, place.level
    names = chain.links[level - 1].attributes
    relevant = plan.relevant[place]
    changed = _changed(state, plan.watch(state.mapper)) & relevant
    if not names or not changed <= {*names, *chain.reverses[level - 1]}:
        return False
    old = tuple(state.committed_state.get(name, instance.__dict__.get(name)) for name in names)
    if changed_by_update(chain.mappers[level], relevant) and any(
        sqlalchemy_inspect(parent).identity == old for parent in before.renamed
    ):
        return False
    return (chain.mappers[level - 1].base_mapper, old) in before.dead
