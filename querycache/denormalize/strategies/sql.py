"""Strategy "sql", the default: deltas taken in the flush, old values read under lock, increments by the database.

Nothing but the touched rows is read: their contribution before the flush and after it, and the difference is added
to the parent by one UPDATE, `n = n + :difference`. Two transactions that touch different children of one parent
add up; two that touch the same child wait for each other on the child's lock, and the second reads what the first
has left. Extremes that cannot be brought forward, averages and latest values are recounted for the parents
concerned, under their locks.
"""

from __future__ import annotations

from querycache.denormalize.strategies.base import Strategy

__all__ = ["Sql"]


class Sql(Strategy):
    name = "sql"
    by_images = True
