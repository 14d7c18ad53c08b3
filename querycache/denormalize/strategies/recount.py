"""Strategy "recount": lock each touched parent, then count all its children in a second statement.

The order is what makes it right at READ COMMITTED: one statement that counts and writes uses the snapshot from
before it waited for the lock, and forgets what the transaction it waited for has added. It costs a read of all
children of every touched parent, and in return never builds on a value stored earlier: a column that was wrong is right
after the next change below it.
"""

from __future__ import annotations

from querycache.denormalize.strategies.base import Strategy

__all__ = ["Recount"]


class Recount(Strategy):
    name = "recount"
    by_images = True
    recounts = True
