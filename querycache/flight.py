"""Single flight: a cold answer is asked of the database once, however many threads want it.

The first to miss flies; those that miss the same key under the same versions meanwhile wait for it, for a bounded
time, and look again. Who has waited in vain asks the database itself: nobody waits for ever, and a thread that flies
and never lands costs the others one wait. An answer under other versions is another flight, so that nobody waits
for one that is no longer valid.

Flights are known to one process. Several processes may ask once each.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

__all__ = ["MAX_WAIT", "Flights"]

MAX_WAIT = 1.0
"""Seconds that a thread waits for another's flight."""


class Flights:
    """The flights of one process. Safe for use by several threads.

    Without a lock, which a process that is forked meanwhile would find locked for ever.
    """

    def __init__(self) -> None:
        self._landed: dict[Hashable, tuple[threading.Event, int]] = {}

    def wait(self, flight: Hashable) -> bool:
        """Wait for somebody else's flight, if there is one.

        Returns:
            True if there was one, so that it is worth to look again.
        """
        own = os.getpid(), flight
        landed, pilot = self._landed.get(own, (None, 0))
        if landed is None or pilot == threading.get_ident():
            return False
        if not landed.wait(MAX_WAIT) and self._landed.get(own, (None, 0))[0] is landed:
            self._landed.pop(own, None)  # its thread may have been stopped before it could land
        return True

    @contextmanager
    def flying(self, flight: Hashable) -> Iterator[None]:
        """While this is open, others that want the same wait."""
        landed = threading.Event()
        # Of this process: where one is forked meanwhile, nobody flies in the child.
        own = os.getpid(), flight
        try:
            self._landed.setdefault(own, (landed, threading.get_ident()))
            yield
        finally:
            # whoever waits, be it for a later flight: the answer may be there now
            found = self._landed.pop(own, None)
            if found is not None:
                found[0].set()
            landed.set()
