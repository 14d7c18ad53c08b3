"""The store that keeps nothing: a cache that is switched off, without a change in the application."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from querycache.backends.url import parse_options, split_arguments
from querycache.store import Mark, Meanwhile, StoreBackend

__all__ = ["NullBackend"]


class NullBackend(StoreBackend):
    """Finds nothing, stores nothing, and never fails.

    :param arguments: ``url``: ``null://``, or none.
    :raises ConfigurationError: there is another argument.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        _, given = split_arguments(arguments)
        parse_options("the null store", {}, given)

    def fetch(
        self, key: str | None, counters: Sequence[str] = (), meanwhile: Meanwhile | None = None
    ) -> tuple[bytes | None, list[int | None]]:
        return None, [None] * len(counters)

    def store(self, key: str, payload: bytes, ttl: float | None = None) -> bool:
        return False

    def remove(self, keys: Iterable[str]) -> None:
        pass

    def begin(self, counters: Sequence[str]) -> dict[str, Mark]:
        return {}

    def end(self, marks: Mapping[str, Mark]) -> None:
        pass

    def bump(self, counters: Sequence[str], *, essential: bool = True) -> None:
        pass

    def swap(self, changes: Sequence[tuple[str, int | None, int]]) -> list[bool]:
        return [False] * len(changes)

    def settle(self, counters: Sequence[str], witness: str) -> list[int | None]:
        return [None] * len(counters)

    def lost_nothing_for(self, seconds: float) -> bool:
        return False

    def ping(self) -> None:
        pass

    def close(self) -> None:
        pass
