"""Aggregates are read-only to the application: an assignment raises, and names the aggregate.

`Session.merge()` also assigns, with whatever stale value the given object carries; there the value is dropped and the
stored one stays, since merging a detached parent is no attempt to set its count.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, event
from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy.orm import ColumnProperty
from sqlalchemy.orm.base import NO_VALUE

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.errors import ReadOnlyAggregate, UncoveredChange
from querycache.denormalize.strategies.base import assigning, is_assigning

__all__ = ["becomes_another", "protect", "protect_discriminator"]

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


def protect_discriminator(column: Column[Any], aggregates: Sequence[Aggregate]) -> None:
    """Have an object not become one of a class that has aggregates, since its row then has them as it was inserted."""
    *_, top = (each for each in aggregates[0].chain.root.iterate_to_root() if each.polymorphic_on is column)
    key = top.get_property_by_column(column).key
    attribute = getattr(top.class_, key, None)
    if attribute is None:  # it is no attribute of the class, and cannot be set
        return

    def refuse(instance: Any, value: Any, old: Any, initiator: Any) -> None:
        state = sqlalchemy_inspect(instance)
        if state.has_identity and value not in (old, state.mapper.polymorphic_identity):
            raise becomes_another(aggregates, f"{type(instance).__name__}.{key} cannot be set to {value!r}")

    event.listen(attribute, "set", refuse, propagate=True)


def becomes_another(aggregates: Sequence[Aggregate], what: str) -> UncoveredChange:
    """What to raise where rows would become those of a class that has aggregates, or are so no more."""
    names = ", ".join(sorted(held.name for held in aggregates))
    classes = ", ".join(sorted({held.chain.root.class_.__name__ for held in aggregates}))
    return UncoveredChange(
        f"{what}: it would make rows those of {classes}, or of another class, and {names} would be as they were before; add"
        ' rows of that class and delete these, or take the execution option {"denormalize": "unchecked"} for an UPDATE, and'
        " then repair()"
    )


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
