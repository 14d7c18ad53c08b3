"""A bounded pool of connections to one server, the one used last first.

Taking and giving back what is idle touches no lock, since that is done for every lookup.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from querycache.errors import CacheUnavailable

__all__ = ["Pool"]

T = TypeVar("T")


class Pool(Generic[T]):
    """Things that one thread at a time may use, made when they are needed. Safe for use by several threads.

    In a process that was forked from the one that made it, the pool starts anew: two processes must not speak on one
    connection.

    :param make: makes one more.
    :param close: closes one that is not needed any more.
    :param size: how many there may be.
    :param timeout: seconds to wait for one to be given back when there are that many.
    """

    def __init__(
        self, make: Callable[[], T], close: Callable[[T], object], size: int, timeout: float
    ) -> None:
        self._make = make
        self._close = close
        self._size = size
        self._timeout = timeout
        self._start()

    def _start(self) -> None:
        self._idle: list[T] = []
        # A signal may stop whoever has taken one, at any moment: what nobody holds any more leaves its place by itself.
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()
        self._waiting = 0
        self._given_back = threading.Condition()
        self._pid = os.getpid()  # last: until then, no other thread of a child takes what its parent has

    def take(self) -> T:
        """One for this thread alone; :meth:`give_back` it, whatever happened to it.

        :raises CacheUnavailable: none became free in time. That is no fault of the server.
        """
        if self._pid != os.getpid():
            inherited = self._idle
            self._start()
            for each in inherited:
                self._close(each)
        try:
            return self._idle.pop()
        except IndexError:
            return self._wait()

    def _wait(self) -> T:
        deadline = time.monotonic() + self._timeout
        with self._given_back:
            # Counted before it looks again: what is given back from now on is either seen here, or announced.
            self._waiting += 1
            try:
                while True:
                    try:
                        return self._idle.pop()
                    except IndexError:
                        pass
                    if len(self._made) < self._size:
                        made = self._make()
                        self._made.add(made)
                        return made
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise CacheUnavailable(f"none of {self._size} connections became free")
                    # Nobody tells of one that was lost, so it looks once more in any case.
                    self._given_back.wait(left)
            finally:
                self._waiting -= 1

    def give_back(self, one: T) -> None:
        """Let others have what :meth:`take` gave."""
        self._idle.append(one)
        if self._waiting:
            with self._given_back:
                self._given_back.notify()

    def clear(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._close(self._idle.pop())
