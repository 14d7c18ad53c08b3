"""Any other dogpile.cache backend as a store, with a weaker promise.

A dogpile backend can get, set and delete, and nothing more: no counting, no comparing. So the version of a
tag is a token, a fresh one each time, written after the COMMIT, and phase one does nothing. What that
promises less than the other stores do:

- Between COMMIT and the new token, a lookup may still be answered from before the COMMIT.
- A writer that dies in this moment, or cannot reach the cache then, leaves stale answers behind until they
  expire.
- What the backend's own expiry or eviction removes is safe here too; what it *brings back* (a file restored
  from a backup, a server that fails over to a replica) is not.

Expiry is kept by this module, since dogpile backends have none per entry.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dogpile.cache import CacheRegion

from querycache import versions
from querycache.backends.breaker import CircuitBreaker
from querycache.errors import CacheUnavailable, ConfigurationError
from querycache.store import Mark, Meanwhile, StoreBackend

__all__ = ["DogpileBackend"]

_DEADLINE = struct.Struct(">d")
_NEVER = float("inf")


class DogpileBackend(StoreBackend):
    """A store on the backend of a dogpile.cache region.

    :param arguments: ``region``: a configured region. Its backend, proxies and key mangler are used; its
        expiration time and its serializer are not.
    :param clock: seconds since the epoch, for the expiry of entries.
    :raises ConfigurationError: there is no such region among the arguments, or something else.
    """

    atomic = False
    ordered = False

    def __init__(self, arguments: Mapping[str, Any], *, clock: Callable[[], float] = time.time) -> None:
        region = arguments.get("region")
        if not isinstance(region, CacheRegion) or not region.is_configured or len(arguments) != 1:
            raise ConfigurationError(
                f"the dogpile store needs one argument, a configured dogpile region; given: {arguments!r}"
            )
        self._backend = region.backend
        self._mangle: Callable[[str], str] = region.key_mangler or str
        self._clock = clock
        self._name = f"dogpile backend {type(region.actual_backend).__qualname__}"
        self._breaker = CircuitBreaker(self._name)

    # -- entries --------------------------------------------------------------------------------------------

    def fetch(
        self, key: str | None, counters: Sequence[str] = (), meanwhile: Meanwhile | None = None
    ) -> tuple[bytes | None, list[int | None]]:
        entry = [] if key is None else [key]
        values = self._get([*counters, *entry])
        payload = None
        if entry:
            blob = values.pop()
            if blob is not None and len(blob) >= _DEADLINE.size:
                [deadline] = _DEADLINE.unpack_from(blob)
                payload = blob[_DEADLINE.size :] if self._clock() < deadline else None
        return payload, [None if value is None else versions.parse(value) for value in values]

    def store(self, key: str, payload: bytes, ttl: float | None = None) -> bool:
        deadline = _NEVER if ttl is None else self._clock() + ttl
        self._set({key: _DEADLINE.pack(deadline) + payload})
        return True

    def remove(self, keys: Iterable[str]) -> None:
        mangled = [self._mangle(key) for key in keys]
        if mangled:
            with self._faults():
                self._backend.delete_multi(mangled)

    # -- counters -------------------------------------------------------------------------------------------

    def begin(self, counters: Sequence[str]) -> dict[str, Mark]:
        return dict.fromkeys(counters, (0, 0))

    def end(self, marks: Mapping[str, Mark]) -> None:
        self.bump(list(marks))

    def bump(self, counters: Sequence[str], *, essential: bool = True) -> None:
        new = b"%d" % versions.fresh()
        self._set(dict.fromkeys(counters, new), essential=essential)

    def swap(self, changes: Sequence[tuple[str, int | None, int]]) -> list[bool]:
        _, found = self.fetch(None, [counter for counter, _, _ in changes])
        same = [version == expected for version, (_, expected, _) in zip(found, changes, strict=True)]
        self._set(
            {
                counter: b"%d" % version
                for (counter, _, version), swapped in zip(changes, same, strict=True)
                if swapped
            }
        )
        return same

    def settle(self, counters: Sequence[str], witness: str) -> list[int | None]:
        _, found = self.fetch(None, counters)
        new = versions.fresh()
        missing = [
            counter
            for counter, version in zip(counters, found, strict=True)
            if not versions.is_clean(version)
        ]
        self._set(dict.fromkeys(missing, b"%d" % new))
        return [version if versions.is_clean(version) else new for version in found]

    # -- the backend ----------------------------------------------------------------------------------------

    def lost_nothing_for(self, seconds: float) -> bool:
        return True  # there are no marks that could be lost

    def ping(self) -> None:
        self._get(["ping"])

    def close(self) -> None:
        pass  # the region belongs to the application

    def _get(self, keys: Sequence[str]) -> list[bytes | None]:
        if not keys:
            return []
        with self._faults():
            values = self._backend.get_serialized_multi([self._mangle(key) for key in keys])
        return [value if isinstance(value, bytes) else None for value in values]

    def _set(self, values: Mapping[str, bytes], *, essential: bool = False) -> None:
        if values:
            with self._faults(essential):
                self._backend.set_serialized_multi(
                    {self._mangle(key): value for key, value in values.items()}
                )

    @contextmanager
    def _faults(self, essential: bool = False) -> Iterator[None]:
        self._breaker.admit(essential=essential)
        try:
            yield
        except Exception as error:  # what an unknown client raises is unknown
            self._breaker.failed(error)
            raise CacheUnavailable(f"{self._name} failed: {error!r}") from error
        self._breaker.succeeded()
