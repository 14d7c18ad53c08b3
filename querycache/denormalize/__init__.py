"""Denormalized columns that stay right: aggregates over related rows, kept in columns of the parent.

    class Thread(Base):
        comments: Mapped[list[Comment]] = relationship(back_populates="thread")
        comment_count: Mapped[int] = count_of("comments", where=lambda comment: ~comment.deleted)
        word_count: Mapped[int] = sum_of("comments", python(lambda c: len(c.message.split())))

Declared once, kept through every flush and every bulk statement of every Session, exact under concurrency, checked by
`verify` and put right by `repair`. docs/denormalize.md has the table from which to choose a strategy.
"""

from querycache.denormalize.configure import aggregates_of, maintain
from querycache.denormalize.declare import (
    Expression,
    avg_of,
    count_of,
    exists_of,
    expression,
    latest_of,
    max_of,
    min_of,
    python,
    sum_of,
)
from querycache.denormalize.errors import (
    AggregateMismatch,
    DenormalizeError,
    DenormalizeWarning,
    ReadOnlyAggregate,
    UncoveredChange,
)
from querycache.denormalize.listeners import install as _install
from querycache.denormalize.triggers import trigger_sql
from querycache.denormalize.verify import Difference, Report, repair, verify, verify_at_commit

__all__ = [
    "AggregateMismatch",
    "DenormalizeError",
    "DenormalizeWarning",
    "Difference",
    "Expression",
    "ReadOnlyAggregate",
    "Report",
    "UncoveredChange",
    "aggregates_of",
    "avg_of",
    "count_of",
    "exists_of",
    "expression",
    "latest_of",
    "maintain",
    "max_of",
    "min_of",
    "python",
    "repair",
    "sum_of",
    "trigger_sql",
    "verify",
    "verify_at_commit",
]

_install()
