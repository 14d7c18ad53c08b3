"""The errors that a session index raises besides :class:`~querycache.errors.ConfigurationError`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from sqlalchemy.orm import InstanceState
from sqlalchemy.orm.attributes import instance_state

from querycache.errors import QueryCacheError

__all__ = ["IndexFunctionError", "InvalidKey", "UniqueConflict", "UnknownKeys", "describe"]


def describe(obj: object) -> str:
    """An object in an error message, without touching its attributes."""
    state: InstanceState[Any] = instance_state(obj)
    identity = "pending" if state.identity is None else ", ".join(map(repr, state.identity))
    return f"<{type(obj).__name__} ({identity}) at {id(obj):#x}>"


class InvalidKey(QueryCacheError, TypeError):
    """A key cannot be used in this index: it is unhashable, has no order, or is one string where many keys
    belong."""


class IndexFunctionError(QueryCacheError):
    """An index function, or the ``where=`` of an index, raised; ``__cause__`` has its exception.

    The object it was called with stays in line, so every lookup in that index raises this until the function
    can read the object.
    """


class UnknownKeys(QueryCacheError, LookupError):
    """A lookup with ``unknown="raise"`` met objects whose key is not loaded.

    :ivar objects: those objects.
    """

    def __init__(self, message: str, objects: tuple[object, ...]) -> None:
        super().__init__(message)
        self.objects = objects


class UniqueConflict(QueryCacheError):
    """Two objects have the same key in a unique index, found before the flush.

    :ivar index: the name of the index.
    :ivar key: the key, as the index keeps it.
    :ivar objects: the objects that have it, two or more.
    """

    def __init__(self, message: str, index: str, key: Hashable, objects: tuple[object, ...]) -> None:
        super().__init__(message)
        self.index = index
        self.key = key
        self.objects = objects
