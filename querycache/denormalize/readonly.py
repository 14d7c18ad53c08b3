"""Aggregates are read-only to the application: an assignment raises, and names the aggregate.

`Session.merge()` also assigns, with whatever stale value the given object carries; there the value is dropped and the
stored one stays, since merging a detached parent is no attempt to set its count.
"""

from __future__ import annotations

import inspect
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import ColumnProperty
from sqlalchemy.orm.base import NO_VALUE

from querycache.denormalize.chain import Aggregate
from querycache.denormalize.errors import ReadOnlyAggregate
from querycache.denormalize.strategies.base import is_assigning

__all__ = ["protect"]

_MERGE = ColumnProperty.merge.__code__


def protect(aggregate: Aggregate) -> None:
    """Have assignments to the aggregate's attribute refused."""
    attribute = getattr(aggregate.chain.root.class_, aggregate.key)

    def refuse(instance: Any, value: Any, old: Any, initiator: Any) -> Any:
        if is_assigning():
            return value
        if _merging():
            # NO_VALUE and NEVER_SET are the same object to a reader of the old value: there is none.
            return aggregate.kind.empty if not _known(old) else old
        raise ReadOnlyAggregate(
            f"{aggregate.name} is kept by {aggregate.kind.name}(…) and cannot be set (got {value!r}); change the"
            f" {aggregate.chain.leaf.class_.__name__} rows that it is computed from, or run repair()"
        )

    event.listen(attribute, "set", refuse, retval=True, propagate=True)


def _known(old: Any) -> bool:
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
