"""What one flush, or one bulk statement, does to the aggregates of a plan: it locks what is touched, takes the images before
and after, and writes the difference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Table, update
from sqlalchemy.orm import Mapper, Session

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key
from querycache.denormalize.chain import Chain
from querycache.denormalize.errors import DenormalizeError
from querycache.denormalize.images import Image, image
from querycache.denormalize.kinds import RECOUNT
from querycache.denormalize.locks import Locks
from querycache.denormalize.newcomer import Newcomer, newcomer
from querycache.denormalize.plan import Place, Plan
from querycache.denormalize.strategies import STRATEGIES
from querycache.denormalize.touched import Touched, spread
from querycache.denormalize.writing import Changes, changes_between, write
from querycache.sa_internals import checked_out

__all__ = ["Work", "connection_of", "connection_written"]


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
