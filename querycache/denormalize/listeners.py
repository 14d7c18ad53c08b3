"""The wiring: which event of SQLAlchemy leads where.

Mapper events are listened to from the import on. Session events only once there is a plan, on the Session class, so
that every Session is covered, also those that nobody told this package of; an application without aggregates pays
nothing.
"""

from __future__ import annotations

import weakref
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.orm import Mapper, Session

from querycache.denormalize import bulk, configure, guard, readonly
from querycache.denormalize.keeping import keeper_of
from querycache.denormalize.plan import Plan
from querycache.denormalize.strategies import STRATEGIES

__all__ = ["install"]

_attached: weakref.WeakSet[Any] = weakref.WeakSet()


def install() -> None:
    """Listen to mapper configuration. Called once, by the package itself."""
    event.listen(Mapper, "mapper_configured", lambda mapper, cls: configure.note(mapper))
    event.listen(Mapper, "after_configured", configure.build)
    configure.on_plan(_plan_made)


def _plan_made(plan: Plan) -> None:
    for aggregate in plan.aggregates:
        # A plan is made anew when mappers are added to its MetaData; listeners are for ever.
        if aggregate.column not in _attached:
            _attached.add(aggregate.column)
            readonly.protect(aggregate)
            STRATEGIES[aggregate.strategy].attach(plan, aggregate)
    if not event.contains(Session, "before_flush", _before_flush):
        event.listen(Session, "before_flush", _before_flush)
        event.listen(Session, "do_orm_execute", bulk.do_orm_execute)
        event.listen(Engine, "before_execute", guard.before_execute)
        event.listen(Session, "after_flush", _after_flush)
        event.listen(Session, "after_flush_postexec", _after_flush_postexec)
        event.listen(Session, "after_soft_rollback", _after_rollback)
        event.listen(Session, "after_transaction_end", _after_transaction_end)


def _before_flush(session: Session, flush_context: Any, instances: Any) -> None:
    for instance in (*session.new, *session.dirty, *session.deleted) if configure.any_broken() else ():
        configure.raise_if_broken(type(instance))
    keeper_of(session).before_flush(session)
    guard.cover()


def _after_flush(session: Session, flush_context: Any) -> None:
    guard.uncover()
    keeper_of(session).after_flush(session)


def _after_flush_postexec(session: Session, flush_context: Any) -> None:
    keeper_of(session).after_flush_postexec(session)


def _after_rollback(session: Session, previous_transaction: Any) -> None:
    guard.uncover()
    keeper_of(session).after_rollback(session)


def _after_transaction_end(session: Session, transaction: Any) -> None:
    if transaction.parent is None:
        keeper_of(session).after_transaction(session)
