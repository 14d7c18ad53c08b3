"""The wiring: which event of SQLAlchemy leads where.

Mapper events are listened to from the import on. Session events only while there is a plan, on the Session class, so
that every Session is covered, also those that nobody told this package of; an application without aggregates pays
nothing. `registry.dispose()` (or `clear_mappers()`) ends the plan of the classes that it takes down, and with the last plan
the Session and Engine classes are as if this package had never been there.
"""

from __future__ import annotations

import weakref
from typing import Any, Final

from sqlalchemy import Connection, Engine, MetaData, Table, event
from sqlalchemy.orm import Mapper, Session, configure_mappers

from querycache.denormalize import bulk, configure, guard, readonly
from querycache.denormalize.declare import INFO_KEY
from querycache.denormalize.keeping import Keeper, forget_classes, keeper_of
from querycache.denormalize.plan import Plan
from querycache.denormalize.strategies import STRATEGIES
from querycache.denormalize.strategies.trigger import drop_triggers, make_triggers

__all__ = ["install"]

_attached: weakref.WeakSet[Any] = weakref.WeakSet()
_kept: weakref.WeakSet[MetaData] = weakref.WeakSet()
"""The MetaData whose aggregates are kept."""


def install() -> None:
    """Listen to mapper configuration. Called once, by the package itself."""
    event.listen(Mapper, "mapper_configured", lambda mapper, cls: configure.note(mapper))
    event.listen(Mapper, "after_configured", configure.build)
    for target in (MetaData, Table):
        event.listen(target, "before_create", _configured)
        event.listen(target, "after_create", _tables_made)
        event.listen(target, "before_drop", _tables_go)
    event.listen(object, "class_uninstrument", _class_gone, propagate=True)
    configure.on_plan(_plan_made)


def _plan_made(plan: Plan) -> None:
    for aggregate in plan.aggregates:
        # A plan is made anew when mappers are added to its MetaData; listeners are for ever.
        if aggregate.column not in _attached:
            _attached.add(aggregate.column)
            readonly.protect(aggregate)
            STRATEGIES[aggregate.strategy].attach(plan, aggregate)
    for column, aggregates in (
        (c, held) for each in plan.discriminators.values() for c, held in each.items()
    ):
        if column not in _attached:
            _attached.add(column)
            readonly.protect_discriminator(column, aggregates)
    _kept.add(plan.metadata)
    forget_classes()
    if not event.contains(Session, "before_flush", _before_flush):
        for target, name, listener in _LISTENERS:
            event.listen(target, name, listener)


def _class_gone(cls: type[Any]) -> None:
    """The mapping of a class that holds aggregates is taken down, and with it those of its MetaData."""
    for metadata in list(_kept):
        plan = metadata.info.get(INFO_KEY)
        if isinstance(plan, Plan) and any(held.chain.root.class_ is cls for held in plan.aggregates):
            del metadata.info[INFO_KEY]
            _kept.discard(metadata)
            forget_classes()
            for aggregate in plan.aggregates:
                STRATEGIES[aggregate.strategy].detach(aggregate)
    if not _kept and event.contains(Session, "before_flush", _before_flush):
        for target, name, listener in _LISTENERS:
            event.remove(target, name, listener)


def _configured(target: MetaData | Table, connection: Connection, **options: Any) -> None:
    """`create_all()` may come before anything has configured the mappers, and must make the triggers all the same."""
    metadata = target if isinstance(target, MetaData) else target.metadata
    if any(INFO_KEY in column.info for table in metadata.tables.values() for column in table.columns):
        configure_mappers()


def _tables_made(target: MetaData | Table, connection: Connection, **options: Any) -> None:
    plan = _plan_on(target, connection, options)
    if plan is not None:
        # All of a MetaData, also of tables that were there: an aggregate may be new.
        make_triggers(plan, [target] if isinstance(target, Table) else target.tables.values(), connection)


def _tables_go(target: MetaData | Table, connection: Connection, **options: Any) -> None:
    _configured(target, connection)
    plan = _plan_on(target, connection, options)
    if plan is not None:
        drop_triggers(plan, [target] if isinstance(target, Table) else options["tables"], connection)


def _plan_on(target: MetaData | Table, connection: Connection, options: dict[str, Any]) -> Plan | None:
    """The plan whose triggers are to be made or dropped; None also where that is done for the MetaData as a whole, and for
    a mock engine, which has no tables to look for."""
    if options.get("_is_metadata_operation") or not isinstance(connection, Connection):
        return None
    plan = (target if isinstance(target, MetaData) else target.metadata).info.get(INFO_KEY)
    return plan if isinstance(plan, Plan) else None


def _before_flush(session: Session, flush_context: Any, instances: Any) -> None:
    if configure.any_broken():
        for instance in (*session.new, *session.dirty, *session.deleted):
            configure.raise_if_broken(type(instance))
    keeper = keeper_of(session)
    keeper.before_flush(session, partly=bool(instances))
    if guard.is_any_at_work():
        _refuse_within_another(session, keeper)
    guard.cover(flush_context)


def _refuse_within_another(session: Session, keeper: Keeper) -> None:
    """A mapper event may flush another Session on the connection of its own."""
    for work in keeper.works.values():
        for place in work.touched.rows:
            guard.refuse_within_flush(
                session,
                work.locks_of(place.chain).connection,
                f"the flush of another Session that changes {place.chain.mappers[place.level].class_.__name__},",
                ", ".join(held.name for held in work.plan.by_chain[place.chain]),
                flushes=True,
            )


def _after_flush(session: Session, flush_context: Any) -> None:
    guard.uncover(session)
    keeper_of(session).after_flush(session, flush_context)


def _after_flush_postexec(session: Session, flush_context: Any) -> None:
    keeper_of(session).after_flush_postexec(session)


def _after_rollback(session: Session, previous_transaction: Any) -> None:
    guard.uncover(session)
    keeper_of(session).after_rollback(session)


def _after_transaction_end(session: Session, transaction: Any) -> None:
    if transaction.parent is None:
        keeper_of(session).after_transaction(session)


_LISTENERS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (Session, "before_flush", _before_flush),
    (Session, "do_orm_execute", bulk.do_orm_execute),
    (Engine, "do_execute", guard.do_execute),
    (Engine, "do_executemany", guard.do_execute),
    (Engine, "do_execute_no_params", guard.do_execute_no_params),
    (Session, "after_flush", _after_flush),
    (Session, "after_flush_postexec", _after_flush_postexec),
    (Session, "after_soft_rollback", _after_rollback),
    (Session, "after_transaction_end", _after_transaction_end),
)
"""What is listened to while there is a plan."""
