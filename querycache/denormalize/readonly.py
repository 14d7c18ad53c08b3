"""Aggregates are read-only to the application: an assignment raises, and names the aggregate.

`Session.merge()` also assigns, with whatever stale value the given object carries; there the value is dropped and the
stored one stays, since merging a detached parent is no attempt to set its count.
"""

from __future__ import annotations

import inspect
from typing import Any

from sqlalchemy import event
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.orm import ColumnProperty
from sqlalchemy.orm.base import NO_VALUE

from querycache.denormalize.chain import Aggregate
from querycache.denormalize.errors import ReadOnlyAggregate
from querycache.denormalize.strategies.base import assigning, is_assigning

__all__ = ["protect"]

_MERGE = ColumnProperty.merge.__code__


def protect(aggregate: Aggregate) -> None:
    """Have assignments to the aggregate's attribute refused."""
    attribute = getattr(aggregate.chain.root.class_, aggregate.key)

    def refuse(instance: Any, value: Any, old: Any, initiator: Any) -> Any:
        if is_assigning():
            return value
        if _merging():
            return old if _known(old) else _stored(aggregate, instance)
        raise ReadOnlyAggregate(
            f"{aggregate.name} is kept by {aggregate.kind.name}(…) and cannot be set (got {value!r}); change the"
            f" {aggregate.chain.leaf.class_.__name__} rows that it is computed from, or run repair()"
        )

    event.listen(attribute, "set", refuse, retval=True, propagate=True)


def _stored(aggregate: Aggregate, instance: Any) -> Any:
    """The value of an object that has not loaded it, in place of that which is merged onto it."""
    state = sqlalchemy_inspect(instance)
    if not state.persistent:
        return aggregate.kind.empty
    session = state.session
    assert session is not None
    session.refresh(instance, [aggregate.key])  # also where the query, or the mapping, says not to load it
    stored = getattr(instance, aggregate.key)
    # Assigned once more, so that the old value is known to be the same, and is not written: the row may have another by then.
    with assigning():
        setattr(instance, aggregate.key, stored)
    return stored


def _known(old: Any) -> bool:
    # NO_VALUE and NEVER_SET are the same object to a reader of the old value: there is none.
    return old is not NO_VALUE and type(old) is not type(NO_VALUE)


def _merging() -> bool:
    """Whether the assignment comes from ColumnProperty.merge, a few frames up."""
    frame = inspect.currentframe()
    for _ in range(10):
        if frame is None:
            return False
        if frame.f_code is _MERGE:
            return True
        frame = frame.f_back
    return False
