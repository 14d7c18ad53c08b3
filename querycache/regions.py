"""Regions: where answers are stored, for how long, and what makes them invalid.

A region is a dogpile.cache region whose backend is a :class:`~querycache.store.StoreBackend`, together with the
ledger of its store, the codec of its entries and its default time to live. It is configured by a URL
(``redis://localhost:6379/0``), by a mapping, or by a dogpile region that exists already.

A fault of the cache server never leaves this module as an exception on the read path: a lookup that fails is
a miss that is not filled, a fill that fails is counted.
"""

from __future__ import annotations

import random
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
from dogpile.cache import CacheRegion, make_region, register_backend
from dogpile.cache.exception import PluginNotFound

from querycache.codec import Codec, Corrupt, Unstorable
from querycache.errors import CacheUnavailable, ConfigurationError, UnknownRegion, shown
from querycache.events import Outcome
from querycache.frozen import Entry
from querycache.ledger import Ledger, Reading
from querycache.options import check_ttl
from querycache.shared_rows import SharedRows
from querycache.store import Meanwhile, StoreBackend

__all__ = ["DEFAULT_REGION", "Lookup", "Region", "Regions"]

DEFAULT_REGION = "default"

_SCHEMES = {
    "memory": "querycache.memory",
    "memcached": "querycache.memcached",
    "null": "querycache.null",
    "redis": "querycache.redis",
    "rediss": "querycache.redis",
    "unix": "querycache.redis",
    "valkey": "querycache.redis",
    "valkeys": "querycache.redis",
}

# The package's entry points say the same, for dogpile regions that are made without this module. Here it is said
# directly, because looking entry points up imports what every installed package registers.
for _name, _class in (
    ("dogpile", "DogpileBackend"),
    ("memcached", "MemcachedBackend"),
    ("memory", "MemoryBackend"),
    ("null", "NullBackend"),
    ("redis", "RedisBackend"),
):
    register_backend(f"querycache.{_name}", f"querycache.backends.{_name}", _class)  # type: ignore[no-untyped-call]

_JITTER = 0.1
"""Part of the time to live by which entries expire early, at random, so that those filled together do not expire
together."""


_SMALL = 64 * 2**10
_RECENT = 2 * 2**20
_BESIDE = 2 * 2**10
"""Entries of at most so many bytes (the first) are kept decoded where nothing in them can be changed, those of the last
so many bytes (the second), counting so many more (the third) for each. Between the same bytes and what they were
decoded to there is nothing to go stale."""


_REMEMBERED = 10_000
"""The further tags of so many entries are remembered."""


class Lookup(msgspec.Struct, frozen=True):
    """What a region knows of a key.

    Attributes:
        entry: the answer, where there is one and every version it was stored under still stands; or, with the
            outcome "stale", where those of the statement itself stand, but not all of those that complete it.
        outcome: "hit", "miss", "stale" or "error".
        reason: why, in a word or two; may be empty.
        reading: the versions that were read; what is asked of the database from now on may be stored under
            them, if they are fillable. None where the server did not answer.
    """

    entry: Entry | None
    outcome: Outcome
    reason: str = ""
    reading: Reading | None = None


class Region:
    """A place for answers.

    Args:
        name: what statements call it.
        ledger: of the store that keeps entries and versions.
        namespace: stands before every key.
        codec: turns entries into bytes.
        ttl: seconds until an answer expires whose statement does not say; None for never.
    """

    def __init__(
        self, name: str, ledger: Ledger, *, namespace: str, codec: Codec[Entry], ttl: float | None = None
    ) -> None:
        self.name = name
        self.ledger = ledger
        self.ttl = ttl
        self._codec = codec
        self._entries = f"{namespace}:e:"
        self._tags = f"{namespace}:t:"
        self.shared_rows = SharedRows()
        self._further: dict[str, tuple[str, ...]] = {}
        self._recent: dict[str, tuple[bytes, Entry]] = {}
        self._recent_bytes = 0
        self._lock = threading.Lock()

    def promise(self, marks: bool) -> str:
        """What invalidation in this region's store promises, in words.

        Args:
            marks: whether tags are marked there before a commit becomes visible.
        """
        whose = "" if self.ledger.store.shared else ", for what this process writes"
        if marks:
            return f"strict{whose}"
        dies = "" if whose else ", and where its writer dies then"
        return f"after commit{whose}: stale answers are possible while a commit returns{dies}"

    def entry_key(self, digest: bytes) -> str:
        """The key in the store for the digest that names an answer."""
        return self._entries + digest.hex()

    def tag_keys(self, tags: Iterable[str]) -> tuple[str, ...]:
        """The keys in the store of tags."""
        return tuple(map(self._tags.__add__, tags))

    def lookup(
        self, key: str, tag_keys: tuple[str, ...], exact: bool = False, meanwhile: Meanwhile | None = None
    ) -> Lookup:
        """Find an answer, and the versions of its tags, in one round trip.

        Statements that complete its objects have tags of their own, which the entry names. They are remembered,
        so that only a process that has not seen the entry needs a second round trip.

        Args:
            exact: it may be the answer to another statement, with other tags.
            meanwhile: is called, if there is a server to wait for, while it has not answered yet.
        """
        further = self._further.get(key, ())
        try:
            reading = self.ledger.lookup(key, tag_keys, further, exact=exact, meanwhile=meanwhile)
        except CacheUnavailable:
            return Lookup(None, "error", "unavailable")
        if reading.payload is None:
            return Lookup(None, "stale" if reading.stale else "miss", "", reading)
        now = reading.tags[len(tag_keys) :]
        if now != further:
            self._remember(key, now)
        try:
            entry = self._decode(key, reading.payload)
        except Corrupt as fault:
            return Lookup(None, "miss", fault.reason, reading)
        if reading.fallen:
            return Lookup(entry, "stale", "in part", reading)
        return Lookup(entry, "hit", "", reading)

    def _remember(self, key: str, further: tuple[str, ...]) -> None:
        if len(self._further) >= _REMEMBERED:
            self._further.clear()
        self._further[key] = further

    def _decode(self, key: str, payload: bytes) -> Entry:
        recent = self._recent.get(key)
        if recent is not None and recent[0] == payload:
            return recent[1]
        entry = self._codec.decode(payload, context=key.encode())
        if len(payload) <= _SMALL and entry.immutable:
            self._keep_decoded(key, payload, entry)
        return entry

    def _keep_decoded(self, key: str, payload: bytes, entry: Entry) -> None:
        if not self._lock.acquire(blocking=False):
            return  # another thread is at it; or was, where this process was forked
        try:
            self._drop_decoded(key)
            self._recent[key] = payload, entry
            self._recent_bytes += len(payload) + _BESIDE
            while self._recent_bytes > _RECENT:
                self._drop_decoded(next(iter(self._recent)))
        finally:
            self._lock.release()

    def _drop_decoded(self, key: str) -> None:
        recent = self._recent.pop(key, None)
        if recent is not None:
            self._recent_bytes -= len(recent[0]) + _BESIDE

    def observe(self, tag_keys: tuple[str, ...]) -> Reading | None:
        """The versions of tags now; None where the server does not answer."""
        try:
            return self.ledger.lookup(None, tag_keys)
        except CacheUnavailable:
            return None

    def seconds_left(self, ttl: float | None, created: float) -> float | None:
        """How long an answer may be kept that was created then; None for as long as there is room.

        It may have been found, and only completed since. By a clock that disagrees with the one it was created by, it
        is kept no longer.

        Args:
            ttl: seconds that an answer of this statement is kept; None for the region's own.
            created: seconds since 1970.
        """
        seconds = self.ttl if ttl is None else ttl
        if seconds is None:
            return None
        age = time.time() - created
        return max(0.0, seconds * (1 - _JITTER * random.random()) - age) if age >= 0 else 0.0

    def fill(
        self, key: str, entry: Entry, reading: Reading, seconds: float | None, tag_keys: tuple[str, ...]
    ) -> str:
        """Store an answer under the versions read before the database was asked.

        Args:
            seconds: until it expires; None for never.
            tag_keys: those that the next lookup will ask for by itself.
        Returns:
            Why it was not stored, in a word or two; empty where it was.
        """
        further = tuple(tag for tag in reading.tags if tag not in tag_keys)
        if further or key in self._further:
            self._remember(key, further)
        try:
            payload = self._codec.encode(entry, context=key.encode())
            return "" if self.ledger.fill(key, reading, payload, seconds) else "refused"
        except Unstorable as refusal:
            return refusal.reason
        except CacheUnavailable:
            return "unavailable"


class Regions:
    """The regions of one cache, by name.

    Args:
        configuration: a URL or a dogpile region for the default region; or a mapping of names to URLs, dogpile
            regions or mappings with ``url`` or ``backend``, ``arguments``, ``ttl`` (or ``expiration_time``).
        namespace, lease, signing_key: as given to QueryCache.
        ttl: for regions that do not say.
    Raises:
        ConfigurationError: something cannot be used; the message names it.
    """

    def __init__(
        self,
        configuration: object,
        *,
        namespace: str,
        lease: float,
        ttl: float | None,
        signing_key: bytes | None,
    ) -> None:
        if isinstance(configuration, (str, CacheRegion)):
            configuration = {DEFAULT_REGION: configuration}
        if not isinstance(configuration, Mapping) or not configuration:
            raise ConfigurationError(
                f"regions={shown(configuration)}: give a URL such as 'memory://', or a mapping of names to URLs"
            )
        codec = Codec(Entry, signing_key=signing_key)
        ledgers: dict[object, Ledger] = {}
        self._regions: dict[str, Region] = {}
        for name, given in configuration.items():
            if not isinstance(name, str) or not name:
                raise ConfigurationError(f"region name {name!r}: give a non-empty string")
            url, cache, own_ttl = _dogpile_region(name, given, known=ledgers)
            if url not in ledgers:
                ledgers[url] = Ledger(_store(cache), f"{namespace}:writers", lease=lease)
            self._regions[name] = Region(
                name, ledgers[url], namespace=namespace, codec=codec, ttl=ttl if own_ttl is None else own_ttl
            )
            if not ledgers[url].store.atomic:
                warnings.warn(
                    f"region {name!r}: its backend cannot count atomically, so a lookup may be answered from before a "
                    "commit that is just returning, or whose process died in that moment",
                    RuntimeWarning,
                    stacklevel=4,
                )
        self.ledgers = tuple(ledgers.values())
        self._tags = f"{namespace}:t:"
        self._default = self._regions.get(DEFAULT_REGION) or next(iter(self._regions.values()))

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions.values())

    def tag_keys(self, tags: Iterable[str]) -> list[str]:
        """The keys of tags, which are the same in every store."""
        return [*map(self._tags.__add__, sorted(tags))]

    def get(self, name: str | None = None) -> Region:
        """The region of this name; the default one (or the first, where none is named so) for None.

        Raises:
            UnknownRegion: there is none.
        """
        if name is None:
            return self._default
        try:
            return self._regions[name]
        except KeyError:
            raise UnknownRegion(
                f"unknown region {name!r}: configured are {', '.join(map(repr, self._regions))}"
            ) from None


def _store(cache: CacheRegion | None) -> StoreBackend:
    """The store of a dogpile region; for a backend that is none, one that makes do with what dogpile offers."""
    assert cache is not None
    backend = cache.actual_backend
    if not isinstance(backend, StoreBackend):
        backend = make_region().configure("querycache.dogpile", arguments={"region": cache}).backend
    assert isinstance(backend, StoreBackend)
    return backend


def _dogpile_region(
    name: str, given: object, known: Mapping[object, object]
) -> tuple[object, CacheRegion | None, float | None]:
    """From a configuration: what identifies the store, its dogpile region, and the time to live.

    Regions with the same URL share one store, and so one ledger; the dogpile region is None where it is known.
    """
    if isinstance(given, CacheRegion):
        if not given.is_configured:
            raise ConfigurationError(
                f"region {name!r}: the dogpile region is not configured; call configure() first"
            )
        return given, given, _ttl(name, given.expiration_time)
    if isinstance(given, str):
        given = {"url": given}
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"region {name!r}: cannot use {shown(given)}; give a URL, a mapping or a dogpile region"
        )
    settings = dict(given)
    ttl = _ttl(name, settings.pop("ttl", settings.pop("expiration_time", None)))
    identity: object = name
    if "url" in settings:
        identity = settings.pop("url")
        backend, arguments = _from_url(name, identity)
    elif "backend" in settings:
        backend, arguments = settings.pop("backend"), settings.pop("arguments", {})
        if not isinstance(arguments, Mapping):
            raise ConfigurationError(f"region {name!r}: arguments={shown(arguments)}: give a mapping")
    else:
        raise ConfigurationError(
            f"region {name!r}: neither 'url' nor 'backend' among {sorted(map(str, given))}"
        )
    if settings:
        raise ConfigurationError(
            f"region {name!r}: unknown setting {min(settings)!r}; known are url, backend, arguments, ttl"
        )
    if identity in known:
        return identity, None, ttl
    try:
        return identity, make_region(name).configure(backend, arguments=arguments), ttl
    except PluginNotFound:
        raise ConfigurationError(
            f"region {name!r}: no dogpile backend is registered as {backend!r}; is its package installed?"
        ) from None


def _ttl(name: str, value: Any) -> float | None:
    value = None if value == -1 else value  # dogpile's "never"
    check_ttl(f"ttl of region {name!r}", value)
    return None if value is None else float(value)


def _from_url(name: str, url: object) -> tuple[str, dict[str, Any]]:
    try:
        parts = urlsplit(url) if isinstance(url, str) and "://" in url else None
    except ValueError:
        parts = None
    if parts is None or not isinstance(url, str):
        raise ConfigurationError(
            f"region {name!r}: {shown(url)} is no URL; give one such as 'redis://localhost:6379/0'"
        )
    if parts.scheme.startswith("dogpile+"):
        return parts.scheme.removeprefix("dogpile+"), dict(parse_qsl(parts.query))
    if parts.scheme not in _SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ConfigurationError(
            f"region {name!r}: unknown scheme {parts.scheme!r} in {shown(url)}; "
            f"known are {known} and dogpile+NAME:// for other dogpile backends"
        )
    return _SCHEMES[parts.scheme], {"url": url}
