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
from typing import Any, Final

from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Mapper, Session

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key, in_order
from querycache.denormalize.chain import Chain
from querycache.denormalize.errors import UncoveredChange
from querycache.denormalize.newcomer import only_newcomer
from querycache.denormalize.plan import Place, Plan
from querycache.denormalize.showing import Shown, renew, show
from querycache.denormalize.strategies import STRATEGIES
from querycache.denormalize.strategies.base import Strategy, assigning
from querycache.denormalize.strategies.trigger import parents_in
from querycache.denormalize.touched import Fresh, Sorter, Touched, inserted, missed, replaced
from querycache.denormalize.work import Work, connection_of

__all__ = ["Keeper", "forget_classes", "keeper_of"]

_LOCKED_FROM: Final[dict[str, int | None]] = {"sqlite": None, "postgresql": 1}
"""The least level whose rows are locked before a flush that puts new rows below them; elsewhere 0."""

_FLUSHED: Final = [held for held in STRATEGIES.values() if type(held).flushed is not Strategy.flushed]


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
        renew(session, by_root, readable=session.in_transaction() and session.is_active)

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
    """By chain, those that are kept by images."""

    def found() -> dict[Chain, list[Aggregate]]:
        every = {
            chain: [held for held in aggregates if STRATEGIES[held.strategy].by_images]
            for chain, aggregates in plan.by_chain.items()
        }
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
