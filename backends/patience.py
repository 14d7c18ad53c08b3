"""How long an answer may take that comes in pieces.

A socket's timeout is for each piece. A server that is nearly dead, or none at all, may send a byte at a time for ever.
"""

from __future__ import annotations

import time

__all__ = ["Patience"]

_PIECE = 2**20


class Patience:
    """For one answer, or several to what was sent at once: the timeout, and as long again for each megabyte. For what is
    sent likewise.

    :param timeout: seconds.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._ends = 0.0

    def start(self) -> None:
        """From now on the other side is waited for."""
        self._ends = time.monotonic() + self._timeout

    def received(self, size: int) -> None:
        """A piece of so many bytes has come, and there is more to come; or has been sent.

        :raises TimeoutError: it is too late.
        """
        self._ends += self._timeout * size / _PIECE
        if time.monotonic() > self._ends:
            raise TimeoutError("it takes too long")
