"""What a strategy is: one way of keeping the columns of a plan right through a flush."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar

from sqlalchemy.orm import Session

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key
from querycache.denormalize.locks import Locks
from querycache.denormalize.plan import Plan
from querycache.denormalize.touched import Touched

__all__ = ["Strategy", "assigning", "is_assigning"]

_assigning: ContextVar[bool] = ContextVar("querycache_denormalize_assigning", default=False)


@contextmanager
def assigning() -> Iterator[None]:
    """While this is open the library itself writes aggregates on objects."""
    token = _assigning.set(True)
    try:
        yield
    finally:
        _assigning.reset(token)


def is_assigning() -> bool:
    return _assigning.get()


class Strategy:
    """The hooks a strategy may fill.

    Attributes:
        name: what `strategy=` calls it.
        by_images: whether it is kept by comparing the images of touched rows before and after the flush.
        recounts: whether touched parents are counted anew rather than brought forward.
        prepares: whether it has something to do before a flush in which no row changes, but new ones come.
        needs_all: whether it must have all pending objects flushed at once.
        expires: whether the unit of work expires the attribute, as it does with SQL expressions that it has written.
    """

    name: ClassVar[str]
    by_images: ClassVar[bool] = False
    recounts: ClassVar[bool] = False
    prepares: ClassVar[bool] = False
    expires: ClassVar[bool] = False
    needs_all: ClassVar[bool] = False

    def attach(self, plan: Plan, aggregate: Aggregate) -> None:
        """Called once for each aggregate when its plan is made."""

    def detach(self, aggregate: Aggregate) -> None:
        """Called once for each aggregate when the mapping of its plan is taken down."""

    def before_flush(
        self, session: Session, locks: Locks, aggregates: Sequence[Aggregate], touched: Touched
    ) -> None:
        """Called before a flush that touches the plan, with the touched rows locked."""

    def after_flush(self, session: Session, aggregates: Sequence[Aggregate]) -> dict[Aggregate, set[Key]]:
        """Called after a flush that touched the plan; returns parents whose values are out of date in memory."""
        return {}

    def flushed(self, session: Session) -> None:
        """Called when a flush is over."""

    def forget(self, session: Session) -> None:
        """Called when what objects in memory say may have changed without an event: after bulk statements and
        rollbacks, and at the end of the transaction."""
