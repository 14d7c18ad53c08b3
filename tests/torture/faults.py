"""Faults, one at a time, while the workers work."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

import redis

from tests.servers import Server
from tests.torture.history import now
from tests.torture.worker import AFTER_COMMIT, BEFORE_COMMIT, FLUSH_IN_COMMIT

if TYPE_CHECKING:
    from tests.torture.round import Workers

__all__ = ["Faults", "kinds_for"]

LONGEST_PAUSE = 1.5
STARVATION = 1.5

KILLS = ("kill", "kill before COMMIT", "kill after COMMIT")
LOSSES = ("restart", "crash")
REDIS_LOSSES = ("flush", "evict", "flush before COMMIT, kill after")
# What makes a server fail for one and not for the other, if only because one was served just before: commits must be
# refused then.
PARTIAL = ("pause",)
REDIS_PARTIAL = ("starve",)


def kinds_for(store: str, on_outage: str) -> list[str]:
    """The kinds of faults that the promise covers.

    A server that is paused, or has no memory left for a version, may fail a writer and yet answer a reader a moment
    later, from before the commit. With ``on_outage="available"`` that is the price, and stated; so these faults are
    for ``on_outage="refuse"``.
    """
    kinds = [*KILLS, *LOSSES]
    if store == "redis":
        kinds += REDIS_LOSSES
    if on_outage == "refuse":
        kinds += PARTIAL
        if store == "redis":
            kinds += REDIS_PARTIAL
    return kinds


class Faults:
    """Injects faults into the workers of a round and their cache server.

    Attributes:
        injected: how many of each kind.
        times: begin and end of each, in nanoseconds.
    """

    def __init__(self, workers: Workers, store: Server, kinds: Sequence[str], random: Random) -> None:
        self._workers = workers
        self._store = store
        self._random = random
        self._kinds = list(kinds)
        self._todo: list[str] = []
        self._second = False
        self.injected: Counter[str] = Counter()
        self.times: list[tuple[str, int, int]] = []

    def inject(self) -> None:
        """One fault, all kinds in turn in an order of chance."""
        if not self._kinds:
            return
        if not self._todo:
            self._todo = self._random.sample(self._kinds, len(self._kinds))
        kind = self._todo.pop()
        actions: dict[str, Callable[[], bool]] = {
            "kill": self._kill,
            "kill before COMMIT": lambda: self._kill_at(BEFORE_COMMIT),
            "kill after COMMIT": lambda: self._kill_at(AFTER_COMMIT),
            "flush before COMMIT, kill after": lambda: self._kill_at(FLUSH_IN_COMMIT),
            "restart": self._restart,
            "crash": self._crash,
            "flush": self._flush,
            "evict": self._evict,
            "evict slots after COMMIT": lambda: self._workers.evict_in_commit(self._random),
            "pause": self._pause,
            "starve": self._starve,
        }
        begin = now()
        if actions[kind]():
            self.injected[kind] += 1
            self.times.append((kind, begin, now()))

    def pause(self, mean: float) -> float:
        """Seconds until the next one. They come two at a time: the second meets what the first has left behind."""
        self._second = not self._second
        if self._second:
            return min(1.0, mean) * self._random.random()
        return mean * (1 + 2 * self._random.random())

    # --- the workers ------------------------------------------------------------------------------------

    def _kill(self) -> bool:
        self._workers.kill(self._random)
        return True

    def _kill_at(self, point: int) -> bool:
        return self._workers.kill_at(point, self._random)

    # --- the cache server ---------------------------------------------------------------------------------

    def _restart(self) -> bool:
        self._store.restart()
        return True

    def _crash(self) -> bool:
        self._store.kill()
        time.sleep(self._random.random() * 0.3)
        self._store.start()
        return True

    def _pause(self) -> bool:
        self._store.pause()
        time.sleep(self._random.random() * LONGEST_PAUSE)
        self._store.resume()
        return True

    def _flush(self) -> bool:
        with redis.Redis.from_url(self._store.url) as client:
            client.flushall()
        return True

    def _evict(self) -> bool:
        """Some of all keys are lost, entries and versions alike."""
        with redis.Redis.from_url(self._store.url) as client:
            keys = [key for key in client.scan_iter(count=1000) if self._random.random() < 0.2]
            if keys:
                client.delete(*keys)
        return bool(keys)

    def _starve(self) -> bool:
        with redis.Redis.from_url(self._store.url) as client:
            before = client.info("stats")["evicted_keys"]
            used = client.info("memory")["used_memory"]
            client.config_set("maxmemory-policy", "allkeys-lru")
            client.config_set("maxmemory", int(used * 0.97))
            time.sleep(STARVATION)
            client.config_set("maxmemory", 0)
            return bool(client.info("stats")["evicted_keys"] > before)
