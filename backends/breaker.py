"""A circuit breaker: a server that does not answer costs one timeout every few seconds, not one per query.

After a fault the circuit is open, and calls are refused without touching the network. When the cool-down is
over, one call is let through to try; while it is under way the others are still refused. If it succeeds the
circuit closes, if not the cool-down begins again.

The begin and the end of an outage are logged, as ``querycache``, once each; that a server refuses, once a minute.

Calls that must not be left out go through an open circuit: a writer that does not mark its tags because some
lookup had a timeout a second ago would leave stale entries behind on a server that is well again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from querycache import forks
from querycache.errors import CacheUnavailable

__all__ = ["COOL_DOWN", "CircuitBreaker"]

_log = logging.getLogger("querycache")

COOL_DOWN = 2.0
"""Seconds for which a server is left alone after a fault."""

_REMIND = 60.0
"""Seconds after which a refusal is logged again."""


class CircuitBreaker:
    """The state of one server as this process sees it. Safe for use by several threads.

    :param server: what the server is called in error messages.
    :param clock: monotonic seconds.
    """

    def __init__(self, server: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._clock = clock
        self._lock = forks.lock()
        self._fault = ""  # what it was; not the exception, which would keep alive whatever was under way
        self._next_try = 0.0
        self._next_told = 0.0

    def admit(self, *, essential: bool = False) -> None:
        """Ask whether a call may be made; follow it by :meth:`succeeded` or :meth:`failed`.

        :param essential: let the call through even when the circuit is open.
        :raises CacheUnavailable: the circuit is open.
        """
        if not self._fault:
            return
        with self._lock:
            if not self._fault or essential:
                return
            now = self._clock()
            if now < self._next_try:
                raise CacheUnavailable(
                    f"{self._server} is left alone for {self._next_try - now:.1f} s after: {self._fault}"
                )
            self._next_try = now + COOL_DOWN

    def succeeded(self) -> None:
        """The server answered."""
        if self._fault:
            with self._lock:
                over, self._fault = bool(self._fault), ""
            if over:
                _log.info("%s answers again", self._server)

    def refused(self, refusal: BaseException) -> None:
        """The server answered that it will not do what it was asked, as one that is full or lacks rights for this user."""
        self.succeeded()
        now = self._clock()
        with self._lock:
            new = now >= self._next_told
            if new:
                self._next_told = now + _REMIND
        if new:
            _log.warning("%s refuses something that the cache asks of it: %s", self._server, refusal)

    def failed(self, fault: BaseException) -> None:
        """The server did not answer, or broke the connection."""
        told = str(fault) or type(fault).__name__
        with self._lock:
            new, self._fault = not self._fault, told
            self._next_try = self._clock() + COOL_DOWN
        if new:
            _log.warning(
                "%s does not answer, so the database is asked; trying again every %g s: %s",
                self._server,
                COOL_DOWN,
                told,
            )
