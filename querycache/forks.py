"""Locks that a forked process finds open.

A process has only the thread that forked it. What another thread had locked at that moment would stay locked for ever, and
what it was changing half changed. So whoever forks waits until these locks are free, and holds them while it does.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

__all__ = ["lock"]

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_held: list[Any] = []
_forking = threading.RLock()  # by one thread at a time


def lock() -> threading.RLock:
    """A lock to be held for a moment: not while another one is taken, nor while anybody is waited for.

    The thread that holds it may take it again, since it may itself be stopped by a signal and fork.
    """
    made = threading.RLock()
    _locks.add(made)
    return made


def _hold() -> None:
    _forking.acquire()
    for each in list(_locks):
        each.acquire()
        _held.append(each)


def _let_go() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_let_go)
