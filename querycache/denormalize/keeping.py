"""Keeping: what happens around one flush, from the changes in the session to the UPDATEs of the parents.

before the flush    collect what is touched, lock it, take the image before
(SQLAlchemy flushes)
after it            check that nothing else was touched, take the image after, write the difference
when it is over     show the new values to the objects in the session
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import Connection, Table, select, update
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.orm.attributes import set_committed_value

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key, attribute_columns, in_order, key_condition
from querycache.denormalize.chain import Chain
from querycache.denormalize.errors import DenormalizeError, UncoveredChange
from querycache.denormalize.images import Image, image
from querycache.denormalize.kinds import RECOUNT
from querycache.denormalize.locks import Locks, chunks, parameters
from querycache.denormalize.newcomer import Newcomer, newcomer, only_newcomer
from querycache.denormalize.plan import Place, Plan
from querycache.denormalize.strategies import STRATEGIES
from querycache.denormalize.strategies.base import Strategy, assigning
from querycache.denormalize.strategies.trigger import parents_in
from querycache.denormalize.touched import Fresh, Sorter, Touched, inserted, missed, replaced, spread
from querycache.denormalize.writing import Changes, changes_between, write
from querycache.sa_internals import checked_out

__all__ = ["Keeper", "Work", "connection_written", "forget_classes", "keeper_of", "kept_by_images", "show"]

Shown = dict[Any, set[str]]
"""What a rollback to a savepoint takes back: the attributes by the identity of their object."""

_LOCKED_FROM: Final[dict[str, int | None]] = {"sqlite": None, "postgresql": 1}
"""The least level whose rows are locked before a flush that puts new rows below them; elsewhere 0."""

_FLUSHED: Final = [held for held in STRATEGIES.values() if type(held).flushed is not Strategy.flushed]


def kept_by_images(plan: Plan, chain: Chain) -> list[Aggregate]:
    return [held for held in plan.by_chain[chain] if STRATEGIES[held.strategy].by_images]


class Work:
    """What one flush, or one bulk statement, does to one plan.

    A Session may have several engines. Each chain is kept on the one that has its rows, which is that of the unit of work,
    or of the bulk statement.

    Args:
        bind_arguments: by which the Session chooses the engine of a bulk statement; None in a flush.
    """

    def __init__(
        self,
        session: Session,
        plan: Plan,
        touched: Touched,
        bind_arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.plan = plan
        self.touched = touched
        self.before: dict[Chain, Image] = {}
        self._session = session
        self._bind_arguments = bind_arguments
        self._locks: dict[Connection, Locks] = {}
        self._below: dict[Chain, Locks] = {}

    @property
    def locks(self) -> Locks:
        """Those on the connection of the bulk statement itself."""
        return self._locks_on(self._bind_arguments.get("mapper"))

    @property
    def connection(self) -> Connection:
        return self.locks.connection

    def locks_of(self, chain: Chain) -> Locks:
        """Those on the connection that has the rows of a chain.

        Raises:
            DenormalizeError: if no one connection has them.
        """
        found = self._below.get(chain)
        if found is None:
            found, *others = {self._locks_on(mapper): None for mapper in chain.mappers}
            if others:
                names = ", ".join(dict.fromkeys(mapper.class_.__name__ for mapper in chain.mappers))
                raise DenormalizeError(
                    f"{', '.join(held.name for held in self.plan.by_chain[chain])}: the Session has {names} on several"
                    " engines, and an aggregate can be kept only where all tables of its path are; bind these classes to"
                    " one engine"
                )
            self._below[chain] = found
        return found

    def by_connection(self, aggregates: Iterable[Aggregate]) -> Mapping[Locks, list[Aggregate]]:
        found: dict[Locks, list[Aggregate]] = {}
        for aggregate in aggregates:
            found.setdefault(self.locks_of(aggregate.chain), []).append(aggregate)
        return found

    def _locks_on(self, mapper: Mapper[Any] | None) -> Locks:
        connection = connection_of(self._session, mapper, self._bind_arguments)
        found = self._locks.get(connection)
        if found is None:
            found = self._locks[connection] = Locks(connection, self.plan)
        return found

    def look_before(self, aggregates: dict[Chain, list[Aggregate]]) -> None:
        """Lock what is touched, and take the images before."""
        deleted: dict[Locks, dict[Table, set[Key]]] = {}
        for table in self.touched.deleted.keys() & self.plan.edges.keys():
            locks = self._locks_on(self.plan.mapper_of(table))
            if _to_lock(locks, self.plan.depending_on(table)):
                deleted.setdefault(locks, {})[table] = self.touched.deleted[table]
        for locks, tables in deleted.items():
            spread(locks, self.touched, tables)
        wanted: dict[Locks, dict[Place, set[Key]]] = {}
        for held in (self.touched.rows, self.touched.parents):
            for place, keys in held.items():
                locks = self.locks_of(place.chain)
                if _to_lock(locks, self.plan.by_chain[place.chain]):
                    wanted.setdefault(locks, {}).setdefault(place, set()).update(keys)
        for locks, places in wanted.items():
            locks.lock(places, roots=locks.parents_first)
        for chain, kept in aggregates.items():
            levels = _levels(self.plan, chain, self.touched.rows)
            if levels:
                self.before[chain] = image(self.locks_of(chain), chain, _measured(kept), levels)

    def write_difference(
        self,
        aggregates: dict[Chain, list[Aggregate]],
        after: dict[Place, set[Key]],
        renamed: dict[Any, Key],
        new: Mapping[Place, Mapping[Key, Any]] = MappingProxyType({}),
        anew: Mapping[Mapper[Any], set[Key]] = MappingProxyType({}),
    ) -> dict[Aggregate, set[Key]]:
        """Take the images after, and write; returns the parents written for each aggregate.

        Args:
            after: the touched rows by their keys now, with those that are new.
            renamed: (base mapper, key before) of parents → key now.
            new: the objects of those that are new.
            anew: parents whose aggregates are to be counted, whatever the images say.
        """
        touched = {chain: levels for chain in aggregates if (levels := _levels(self.plan, chain, after))}
        counted = {
            chain: keys
            for chain in (aggregates if anew else ())
            if (keys := {key for mapper, held in anew.items() if mapper.isa(chain.root) for key in held})
        }
        concerned = [
            chain for chain in aggregates if chain in touched or chain in counted or self.before.get(chain)
        ]
        by_root: dict[Mapper[Any], Changes] = {}
        locks_of_root = {chain.root.base_mapper: self.locks_of(chain) for chain in concerned}
        absorbing: dict[Mapper[Any], tuple[Chain, Newcomer, Key, Key]] = {}
        for chain in concerned:
            root = chain.root.base_mapper
            alone = None if anew else self._newcomer(chain, aggregates[chain], touched.get(chain, {}), new)
            if alone and not any(one.root.base_mapper is root for one in concerned if one is not chain):
                absorbing[root] = (chain, *alone)
                continue
            found = self._difference(chain, aggregates[chain], touched.get(chain, {}), renamed)
            found.update({key: dict.fromkeys(aggregates[chain], RECOUNT) for key in counted.get(chain, ())})
            for parent, outcomes in found.items():
                by_root.setdefault(root, {}).setdefault(parent, {}).update(outcomes)
        written: dict[Aggregate, set[Key]] = {}
        for root in sorted(
            {*by_root, *absorbing}, key=lambda held: (self.plan.rank(held), held.class_.__name__)
        ):
            if root in absorbing:
                chain, comes, child, above = absorbing[root]
                if comes.absorb(locks_of_root[root].connection, child, above):
                    for aggregate in aggregates[chain]:
                        written.setdefault(aggregate, set()).add(above)
                    continue
                by_root[root] = self._difference(chain, aggregates[chain], touched[chain], renamed)
            for parent, outcomes in by_root[root].items():
                for aggregate in outcomes:
                    written.setdefault(aggregate, set()).add(parent)
            write(locks_of_root[root], by_root[root])
        return written

    def _newcomer(
        self,
        chain: Chain,
        aggregates: list[Aggregate],
        levels: dict[int, set[Key]],
        new: Mapping[Place, Mapping[Key, Any]],
    ) -> tuple[Newcomer, Key, Key] | None:
        """If all that happened below a chain is one new child whose parent can be brought forward without a look at the
        rows: what is to be done, the key of the child and that of its parent, as its object has them."""
        if levels.keys() != {1} or len(levels[1]) != 1 or self.before.get(chain):
            return None
        known = newcomer(self.plan, chain, aggregates)
        (child,) = levels[1]
        instance = new.get(Place(chain, 1), {}).get(child)
        keys = None if known is None or instance is None else known.keys(instance.__dict__)
        return None if known is None or keys is None else (known, *keys)

    def _difference(
        self,
        chain: Chain,
        aggregates: list[Aggregate],
        levels: dict[int, set[Key]],
        renamed: dict[Any, Key],
    ) -> Changes:
        root, locks = chain.root.base_mapper, self.locks_of(chain)
        before = {renamed.get((root, key), key): parts for key, parts in self.before.get(chain, {}).items()}
        if chain.depth > 1:
            locks.lock({Place(chain, level): keys for level, keys in levels.items()}, roots=False)
        now = image(locks, chain, _measured(aggregates), levels)
        return changes_between(aggregates, before, now, lambda one: STRATEGIES[one.strategy].recounts)


def _to_lock(locks: Locks, aggregates: Iterable[Aggregate]) -> bool:
    """Whether rows that these depend on are to be locked. Of those under "trigger" nothing is read here; but where there can
    be several writers at once, these meet in deadlocks unless all of them lock in one order."""
    return locks.dialect != "sqlite" or any(held.strategy != "trigger" for held in aggregates)


def _measured(aggregates: Iterable[Aggregate]) -> list[Aggregate]:
    return [held for held in aggregates if not STRATEGIES[held.strategy].recounts]


def _levels(plan: Plan, chain: Chain, rows: dict[Place, set[Key]]) -> dict[int, set[Key]]:
    return {place.level: keys for place in plan.places[chain] if (keys := rows.get(place))}


def connection_of(
    session: Session, mapper: Mapper[Any] | None, bind_arguments: Mapping[str, Any] = MappingProxyType({})
) -> Connection:
    """The connection that a Session has for a mapper, in its flush or for the statement that `bind_arguments` tell of."""
    if bind_arguments:
        bind = session.get_bind(**{**bind_arguments, "mapper": mapper})
    else:
        bind = session.get_bind(mapper=mapper)
    found = checked_out(session, bind)
    return session.connection(bind_arguments={"bind": bind}) if found is None else found


def connection_written(session: Session, root: Mapper[Any]) -> Connection:
    """The connection on which a parent's aggregates are written; a Session may read elsewhere."""
    return connection_of(session, root, {"clause": update(root.class_)})


class Keeper:
    """Keeps the aggregates of one Session; made at its first flush that concerns any."""

    def __init__(self) -> None:
        self.works: dict[Plan, Work] = {}
        self._sorter = Sorter()
        self._levels: dict[Mapper[Any], int | None] = {}
        self._stale: dict[Aggregate, set[Key]] = {}
        self._shown: Shown = {}
        self._triggered: set[Aggregate] = set()
        """Those of whose parents only the database knows which it has written."""

    def check(self, plan: Plan) -> None:
        """Check that this Session can keep the aggregates of a plan, before it changes rows that they count.

        Raises:
            UncoveredChange: naming them.
        """

    def forget_classes(self) -> None:
        """Look classes up anew, since plans have changed."""
        self._sorter = Sorter()

    def before_flush(self, session: Session, *, partly: bool) -> None:
        """Prepare a flush; `partly` says that only some of the pending objects are flushed."""
        self.works = {}
        self._levels = {}
        found, fresh = self._sorter.collect(session, self._locked_from)
        self._sorter.expect(session, fresh, found, self._locked_from)
        for cls in fresh:
            known = self._sorter.watch(cls)
            if known is None:
                continue
            plan, watch = known
            if watch.roots:
                _begin_empty(fresh[cls], watch.roots)
            if plan not in found and _preparing(plan):
                found[plan] = Touched()
        for plan, touched in found.items():
            prepared = _preparing(plan)
            if not prepared and not touched.reads(partial(self._locked_from, session)):
                continue
            work = self.works[plan] = Work(session, plan, touched)
            work.look_before(_kept(plan))
            for strategy, held in prepared:
                if partly and strategy.needs_all:
                    raise UncoveredChange(
                        f"flush(objects) flushes a part of what is pending, and strategy {strategy.name!r} of"
                        f" {', '.join(one.name for one in held)} has it all written at once; call flush()"
                    )
                _refuse_replaced(strategy, held, replaced(fresh, touched, self._sorter))
                for locks, part in work.by_connection(held).items():
                    strategy.before_flush(session, locks, part, touched)

    def _locked_from(self, session: Session, root: Mapper[Any]) -> int | None:
        if root not in self._levels:
            name = session.get_bind(mapper=root).dialect.name
            self._levels[root] = _LOCKED_FROM.get(name, 0)
        return self._levels[root]

    def after_flush(self, session: Session, flush_context: Any) -> None:
        again, objects = self._sorter.collect(session, _nowhere, flush_context)
        alone = self._one_newcomer(session, again, objects)
        if alone:
            return
        new = inserted(objects, self._sorter)
        for plan in {**again, **new, **self.works}:
            work = self.works.get(plan)
            if work is None:
                work = self.works[plan] = Work(session, plan, Touched())
            if plan in again:
                work.touched.rename(again[plan].renamed)
                missed(plan, work.touched, again[plan], new.get(plan, {}))
            after: dict[Place, set[Key]] = {place: set(keys) for place, keys in work.touched.rows.items()}
            renamed: dict[Any, Key] = {}
            for instance in work.touched.renamed:
                state = sqlalchemy_inspect(instance)
                key = tuple(state.mapper.primary_key_from_instance(instance))
                renamed[state.mapper.base_mapper, state.identity] = key
                for place in list(after):
                    if state.mapper.isa(place.chain.mappers[place.level]) and state.identity in after[place]:
                        after[place].add(key)
            fresh = new.get(plan, {})
            for place, by_key in fresh.items():
                after.setdefault(place, set()).update(by_key)
            anew = replaced(objects, work.touched, self._sorter)
            stale = work.write_difference(_kept(plan), after, renamed, {} if alone is False else fresh, anew)
            for strategy, held in _by_strategy(plan):
                stale.update(strategy.after_flush(session, held))
            self._note_triggered(stale)
            for aggregate, keys in stale.items():
                self._stale.setdefault(aggregate, set()).update(keys)

    def _one_newcomer(self, session: Session, again: dict[Plan, Touched], fresh: Fresh) -> bool | None:
        """Bring the aggregates forward by the shortest way, if all that the flush did to them was to insert one object.

        Returns:
            whether it is done; None where that was not all.
        """
        if len(fresh) != 1:
            return None
        if again and any(touched.rows for touched in again.values()):
            return None
        if self.works and any(work.touched.rows or work.touched.deleted for work in self.works.values()):
            return None
        ((cls, instances),) = fresh.items()
        known = self._sorter.watch(cls)
        if len(instances) != 1 or known is None:
            return None
        comes = only_newcomer(known[0], cls, known[1])
        keys = None if comes is None else comes.keys(instances[0].__dict__)
        if comes is None or keys is None:
            return None
        connection = connection_of(session, comes.root)
        if not comes.absorb(connection, *keys):
            return False
        self._stale = {aggregate: {keys[1]} for aggregate in comes.aggregates}
        return True

    def after_flush_postexec(self, session: Session) -> None:
        stale, self._stale, works, self.works = self._stale, {}, self.works, {}
        for strategy in _FLUSHED if works else ():
            strategy.flushed(session)
        if stale:
            show(session, stale, self._shown)

    def after_bulk(self, session: Session, stale: dict[Aggregate, set[Key]]) -> None:
        for strategy in STRATEGIES.values():
            strategy.forget(session)
        self._note_triggered(stale)
        show(session, stale, self._shown)

    def _note_triggered(self, stale: dict[Aggregate, set[Key]]) -> None:
        self._triggered.update(held for held in stale if held.strategy == "trigger")

    def after_rollback(self, session: Session) -> None:
        """A rollback, also to a savepoint, takes back values that the ORM does not know to have changed."""
        self.works, self._stale = {}, {}
        for strategy in STRATEGIES.values():
            strategy.forget(session)
        stale = {identity: set(names) for identity, names in self._shown.items()}
        triggered = parents_in(session, list(self._triggered)) if self._triggered else {}
        for aggregate, keys in triggered.items():
            for key in keys:
                identity = aggregate.chain.root.identity_key_from_primary_key(key)
                stale.setdefault(identity, set()).add(aggregate.key)
        by_root: dict[Any, dict[Any, list[str]]] = {}
        for identity, names in stale.items():
            instance = session.identity_map.get(identity)
            if instance is None:
                continue
            state = sqlalchemy_inspect(instance)
            # What the unit of work has written, the rollback has expired as a whole.
            if state.persistent and (loaded := names & state.dict.keys()):
                by_root.setdefault(state.mapper, {})[state] = sorted(loaded)
        _renew(session, by_root, readable=session.in_transaction() and session.is_active)

    def after_transaction(self, session: Session) -> None:
        for strategy in STRATEGIES.values():
            strategy.forget(session)
        self._shown.clear()
        self._triggered.clear()


class _OfShards(Keeper):
    """Refuses to keep aggregates: a Session of shards chooses an engine by each object, and not by its class."""

    def check(self, plan: Plan) -> None:
        names = ", ".join(sorted(held.name for held in plan.aggregates))
        raise UncoveredChange(
            f"a ShardedSession has rows of one class on several engines, of which {names} would be kept on one; write rows"
            " that they count through a Session for each shard, with bind= its engine"
        )

    def before_flush(self, session: Session, *, partly: bool) -> None:
        found, fresh = self._sorter.collect(session, _nowhere)
        for plan, touched in found.items():
            if touched.rows or touched.deleted:
                self.check(plan)
        for cls in fresh:
            known = self._sorter.watch(cls)
            if known is not None and known[1].places:
                self.check(known[0])
            if known is not None:
                _begin_empty(fresh[cls], known[1].roots)


def _begin_empty(instances: Iterable[Any], roots: Sequence[Aggregate]) -> None:
    """A copy of another parent (`make_transient`) has the value of that one; what is new has no children yet."""
    for instance in instances:
        values = instance.__dict__
        for aggregate in roots:
            if aggregate.key in values and aggregate.strategy != "memory":
                with assigning():
                    setattr(instance, aggregate.key, aggregate.kind.empty)


def _refuse_replaced(
    strategy: Strategy, aggregates: Sequence[Aggregate], anew: Mapping[Mapper[Any], set[Key]]
) -> None:
    for mapper, keys in anew.items():
        held = [one.name for one in aggregates if mapper.isa(one.chain.root)]
        if held:
            raise UncoveredChange(
                f"{mapper.class_.__name__} {in_order(keys)[0]!r} is deleted and added in one flush, which makes one UPDATE"
                f" of it; strategy {strategy.name!r} cannot tell what is then below it for {', '.join(held)}. flush() between"
                " the two, or take strategy 'sql'"
            )


def _nowhere(session: Session, root: Mapper[Any]) -> None:
    """No row is to be locked."""


def _kept(plan: Plan) -> dict[Chain, list[Aggregate]]:
    def found() -> dict[Chain, list[Aggregate]]:
        every = {chain: kept_by_images(plan, chain) for chain in plan.by_chain}
        return {chain: held for chain, held in every.items() if held}

    kept: dict[Chain, list[Aggregate]] = plan.memo(("kept",), found)
    return kept


def _by_strategy(plan: Plan) -> list[tuple[Strategy, list[Aggregate]]]:
    def found() -> list[tuple[Strategy, list[Aggregate]]]:
        every = (
            (strategy, [held for held in plan.aggregates if held.strategy == name])
            for name, strategy in STRATEGIES.items()
        )
        return [(strategy, held) for strategy, held in every if held]

    by_strategy: list[tuple[Strategy, list[Aggregate]]] = plan.memo(("by strategy",), found)
    return by_strategy


def _preparing(plan: Plan) -> list[tuple[Strategy, list[Aggregate]]]:
    prepared: list[tuple[Strategy, list[Aggregate]]] = plan.memo(
        ("preparing",), lambda: [one for one in _by_strategy(plan) if one[0].prepares]
    )
    return prepared


def show(session: Session, stale: dict[Aggregate, set[Key]], shown: Shown) -> None:
    """Have the parents that are in the session see their new values, and note in `shown` what a rollback to the savepoint
    would take back: also of parents that are loaded only until then.

    The attribute is expired, so the next access reads it; under asyncio, where an access cannot, it is read now.
    """
    by_root: dict[Any, dict[Any, list[str]]] = {}
    identities: dict[Any, Any] = {}
    held: dict[Any, Any] = {}
    nested = session.in_nested_transaction()
    for aggregate, keys in stale.items():
        root = aggregate.chain.root
        for key in keys:
            identity = identities.get((root, key))
            if identity is None:
                identity = identities[root, key] = root.identity_key_from_primary_key(key)
            if nested:
                shown.setdefault(identity, set()).update((aggregate.key, *aggregate.carried))
            if identity not in held:
                held[identity] = session.identity_map.get(identity)
            if (instance := held[identity]) is not None:
                state = sqlalchemy_inspect(instance)
                if aggregate.key in state.dict or _is_to_load(aggregate, state):
                    by_root.setdefault(root, {}).setdefault(state, []).append(aggregate.key)
                for name in aggregate.carried:
                    if name in state.dict and name not in state.committed_state:
                        by_root.setdefault(root, {}).setdefault(state, []).append(name)
    _renew(session, by_root)


def _is_to_load(aggregate: Aggregate, state: Any) -> bool:
    """Whether an attribute that is not loaded must be made to, since no access would: a new parent has none where NULL was
    inserted, and the unit of work has expired what it wrote."""
    unloaded = STRATEGIES[aggregate.strategy].expires or aggregate.key not in state.expired_attributes
    return unloaded and state.mapper.isa(aggregate.chain.root)


def _renew(session: Session, by_root: dict[Any, dict[Any, list[str]]], *, readable: bool = True) -> None:
    """Forget values in memory, or read them where an access later could not."""
    for root, states in by_root.items():
        if readable and session.get_bind(mapper=root).dialect.is_async:
            _read(session, root, states)
        else:
            for state, names in states.items():
                session.expire(state.object, names)


def _read(session: Session, root: Any, states: dict[Any, list[str]]) -> None:
    names = sorted({name for held in states.values() for name in held})
    keys = [attribute.key for attribute in (root.get_property_by_column(c) for c in root.primary_key)]
    columns = attribute_columns(root.class_, keys)
    statement = select(*columns, *attribute_columns(root.class_, names)).where(key_condition(columns))
    connection = connection_written(session, root)
    by_key = {state.identity: state for state in states}
    for chunk in chunks(by_key):
        for row in connection.execute(statement, parameters(chunk)):
            state = by_key[tuple(row[: len(keys)])]
            for name, value in zip(names, row[len(keys) :], strict=True):
                if name in states[state]:
                    set_committed_value(state.object, name, value)


_KEEPER: Final = "_querycache_keeper"
"""Where a Session has its own: each flush asks for it several times."""

_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


def forget_classes() -> None:
    """Have every Session look classes up anew: a plan was made, or is gone."""
    for keeper in list(_keepers):
        keeper.forget_classes()


def keeper_of(session: Session) -> Keeper:
    """The keeper of `session`."""
    found: Keeper | None = getattr(session, _KEEPER, None)
    if found is None:
        found = _OfShards() if isinstance(session, ShardedSession) else Keeper()
        setattr(session, _KEEPER, found)
        _keepers.add(found)
    return found
