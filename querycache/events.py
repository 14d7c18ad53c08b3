"""What the cache tells of itself: what it did, one event a decision, counted always and recorded on request; and
what it would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from querycache import forks

__all__ = ["CacheEvent", "CacheStats", "Explanation", "Outcome", "Telemetry"]

Outcome = Literal["hit", "miss", "stale", "bypass", "fill", "error"]


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """One decision of the cache.

    Attributes:
        outcome: "hit" (answered from the cache), "miss" (nothing stored), "stale" (something stored that an
            invalidation has made invalid), "bypass" (the cache was not asked, or not trusted), "fill" (an
            answer was stored) or "error" (a fault that cost nothing but the cache's help).
        reason: why, in one word or a few; empty where there is nothing to say.
        region: name of the region.
        key: the user's ``cache_key`` where it is a string, otherwise the start of the key's digest.
    """

    outcome: Outcome
    reason: str
    region: str
    key: str


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since the cache was made, in this process.

    Attributes:
        hits, misses, stale, bypasses, fills, errors: number of events of each outcome.
        reasons: number of events for each (outcome, reason) that has a reason.
    """

    hits: int = 0
    misses: int = 0
    stale: int = 0
    bypasses: int = 0
    fills: int = 0
    errors: int = 0
    reasons: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def hit_ratio(self) -> float:
        """Hits as a part of all lookups, 0.0 to 1.0; 0.0 before the first."""
        lookups = self.hits + self.misses + self.stale
        return self.hits / lookups if lookups else 0.0


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the cache would do with a statement, and why.

    Attributes:
        cacheable: True if the cache would be asked.
        reason: why it would not, or what it would find; in a few words.
        region: name of the region; empty where nobody asked for the cache.
        key: the key of the answer in the store.
        tags: what the answer depends on, as far as it is known.
        stored: True if there is a valid answer now.
        age: seconds since that was stored, by the clocks of this process and the one that stored it.
        promise: "strict", or what the store can promise instead.
    """

    cacheable: bool
    reason: str
    region: str = ""
    key: str = ""
    tags: tuple[str, ...] = ()
    stored: bool = False
    age: float | None = None
    promise: str = ""


class Telemetry:
    """Counts events and hands them to those who record."""

    def __init__(self) -> None:
        self._lock = forks.lock()
        self._counts: Counter[tuple[Outcome, str]] = Counter()
        self._recorders: tuple[list[CacheEvent], ...] = ()

    def emit(self, outcome: Outcome, region: str, key: str, reason: str = "") -> None:
        with self._lock:
            self._counts[outcome, reason] += 1
        if self._recorders:
            event = CacheEvent(outcome, reason, region, key)
            for recorder in self._recorders:
                recorder.append(event)

    def stats(self) -> CacheStats:
        with self._lock:
            counts = dict(self._counts)
        total: Counter[str] = Counter()
        for (outcome, _), count in counts.items():
            total[outcome] += count
        return CacheStats(
            hits=total["hit"],
            misses=total["miss"],
            stale=total["stale"],
            bypasses=total["bypass"],
            fills=total["fill"],
            errors=total["error"],
            reasons={(outcome, reason): count for (outcome, reason), count in counts.items() if reason},
        )

    @contextmanager
    def recording(self) -> Iterator[list[CacheEvent]]:
        events: list[CacheEvent] = []
        with self._lock:
            self._recorders = (*self._recorders, events)
        try:
            yield events
        finally:
            with self._lock:
                self._recorders = tuple(each for each in self._recorders if each is not events)
