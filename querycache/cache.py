"""The one object an application makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from dogpile.cache import CacheRegion
from sqlalchemy import event
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from querycache.errors import ConfigurationError
from querycache.events import CacheEvent, CacheStats, Telemetry
from querycache.interceptor import Interceptor
from querycache.ledger import DEFAULT_LEASE
from querycache.options import Policy, check_ttl, names
from querycache.regions import Region, Regions
from querycache.tags import EVERYTHING, key_tag, region_tag, user_tag

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["QueryCache"]

_CONFIGURABLE = ("regions", "namespace", "ttl", "lease", "signing_key")


class QueryCache:
    """A second-level cache: answers selects of the Sessions it is attached to.

    ::

        cache = QueryCache("redis://localhost:6379/0", ttl=300)
        cache.attach(Session)
        session.scalars(select(User).execution_options(cache_key="all-users")).all()

    Args:
        regions: a URL (``memory://``, ``redis://…``, ``memcached://…``, ``null://``, ``dogpile+NAME://…``), a
            configured dogpile region, or a mapping of region names to these or to mappings with ``url`` (or
            ``backend`` and ``arguments``) and ``ttl``. Statements that name no region use the one called
            "default", or the first.
        namespace: stands before every key in the store; give each application its own.
        ttl: seconds until an answer expires, where neither statement nor region say; None for never.
        scope: a function of the session whose value keeps answers apart: tenant, locale, role. It may return
            None, numbers, texts, dates, UUIDs, and tuples, lists, dicts or sets of these.
        policies: what is cached without a word in the statement: :class:`~querycache.Policy` by mapped class.
        lease: seconds after which a writer that was killed is taken for dead; longer than any COMMIT takes.
        signing_key: at least 16 random bytes. Entries are signed with it, and entries that are not are misses.
    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.
    """

    def __init__(
        self,
        regions: str | CacheRegion | Mapping[str, object] = "memory://",
        *,
        namespace: str = "qc",
        ttl: float | None = None,
        scope: Callable[[Session], object] | None = None,
        policies: Mapping[type, Policy] | None = None,
        lease: float = DEFAULT_LEASE,
        signing_key: bytes | None = None,
    ) -> None:
        if not isinstance(namespace, str) or not namespace or not namespace.isprintable() or " " in namespace:
            raise ConfigurationError(f"namespace={namespace!r}: give a short text without spaces")
        check_ttl("ttl", ttl)
        check_ttl("lease", lease)
        if scope is not None and not callable(scope):
            raise ConfigurationError(f"scope={scope!r}: give a function of the session, or None")
        for cls, policy in (policies or {}).items():
            if not isinstance(cls, type) or not isinstance(policy, Policy):
                raise ConfigurationError(f"policies: {cls!r}: {policy!r} is not a mapped class with a Policy")
        self._telemetry = Telemetry()
        self._regions = Regions(regions, namespace=namespace, lease=lease, ttl=ttl, signing_key=signing_key)
        self._interceptor = Interceptor(self._regions.get, self._telemetry, scope, policies or {})

    @classmethod
    def from_config(cls, config: str | PathLike[str] | Mapping[str, Any], **arguments: Any) -> QueryCache:
        """Make a cache from a TOML file or a mapping.

        A file has a table ``[querycache]`` with ``namespace``, ``ttl``, ``lease`` and tables
        ``[querycache.regions.NAME]`` with ``url`` and ``ttl``; a mapping has the content of that table. Keys in
        the style of dogpile's ``configure_from_config`` (``cache.NAME.backend``, ``cache.NAME.expiration_time``,
        ``cache.NAME.arguments.url``) are understood as well.

        Args:
            config: path of the file, or the mapping.
            arguments: what a file cannot hold: ``scope`` and ``policies``.
        Raises:
            ConfigurationError: the file cannot be read, or has a key that is not known.
        """
        if isinstance(config, Mapping):
            source, table = "configuration", dict(config)
        else:
            source = str(config)
            try:
                content = tomllib.loads(Path(config).read_text("utf-8"))
            except (OSError, tomllib.TOMLDecodeError) as error:
                raise ConfigurationError(f"cannot read {source!r}: {error}") from error
            if "querycache" not in content:
                raise ConfigurationError(f"{source!r} has no table [querycache]")
            table = content["querycache"]
        for name in list(table):
            if name.startswith("cache."):
                _add_dogpile_key(table, name, table.pop(name))
        unknown = sorted(set(table).difference(_CONFIGURABLE))
        if unknown:
            raise ConfigurationError(
                f"{source}: unknown key {unknown[0]!r}; known are {', '.join(_CONFIGURABLE)}"
            )
        if isinstance(table.get("signing_key"), str):
            table["signing_key"] = table["signing_key"].encode()
        return cls(**table, **arguments)

    # --- where it works ------------------------------------------------------------------------------

    def attach(self, target: Any) -> QueryCache:
        """Answer the selects of these Sessions.

        Args:
            target: a sessionmaker, a scoped_session, a Session class or one Session.
        Returns:
            The cache itself.
        Raises:
            ConfigurationError: the target is none of these.
        """
        event.listen(self._checked(target), "do_orm_execute", self._interceptor)
        return self

    def detach(self, target: Any) -> QueryCache:
        """Undo :meth:`attach`.

        Raises:
            ConfigurationError: the cache is not attached to the target.
        """
        if not event.contains(self._checked(target), "do_orm_execute", self._interceptor):
            raise ConfigurationError(f"detach({target!r}): the cache is not attached to it")
        event.remove(target, "do_orm_execute", self._interceptor)
        return self

    @staticmethod
    def _checked(target: Any) -> Any:
        if isinstance(target, (sessionmaker, scoped_session, Session)):
            return target
        if isinstance(target, type) and issubclass(target, Session):
            return target
        raise ConfigurationError(
            f"attach({target!r}): give a sessionmaker, a scoped_session, a Session class or a Session"
        )

    # --- invalidation --------------------------------------------------------------------------------

    def invalidate(
        self,
        *,
        key: str | None = None,
        keys: Iterable[str] = (),
        tags: Iterable[str] = (),
        region: str | None = None,
        everything: Literal[True] | None = None,
    ) -> None:
        """Make answers invalid, now and in every process that shares the store.

        A lookup that begins after this has returned is not answered with data from before it, and an answer
        that is being computed meanwhile is not stored.

        Args:
            key: every answer stored under this ``cache_key``, whatever statement and parameters.
            keys: several of these.
            tags: every answer with one of these in its ``cache_tags``.
            region: alone, every answer in this region; with others, only there.
            everything: True for every answer in every region.
        Raises:
            ConfigurationError: nothing was named, or a value cannot be used.
            UnknownRegion: no region has this name.
            CacheUnavailable: a cache server did not answer, so its answers may still be served.
        """
        named = [key_tag(each) for each in names("keys", keys if key is None else [*keys, key])]
        named.extend(map(user_tag, names("tags", tags)))
        if everything is not None:
            if everything is not True:
                raise ConfigurationError(f"everything={everything!r}: give True, or leave it out")
            named.append(EVERYTHING)
        where: Iterable[Region] = self._regions if region is None else [self._regions.get(region)]
        if not named:
            if region is None:
                raise ConfigurationError(
                    "invalidate(): name what is invalid: key, keys, tags, region or everything=True"
                )
            named.append(region_tag(region))
        for each in where:
            each.invalidate(named)

    # --- what it does --------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """What the cache did in this process so far."""
        return self._telemetry.stats()

    @contextmanager
    def recording(self) -> Iterator[list[CacheEvent]]:
        """A context manager that gives the list of the events that happen while it is open, in this process."""
        with self._telemetry.recording() as events:
            yield events


def _add_dogpile_key(table: dict[str, Any], name: str, value: object) -> None:
    parts = name.split(".")
    if len(parts) < 3 or parts[2] not in ("backend", "expiration_time", "arguments"):
        raise ConfigurationError(
            f"configuration: cannot use {name!r}; write cache.REGION.backend, cache.REGION.expiration_time or "
            "cache.REGION.arguments.NAME"
        )
    region = table.setdefault("regions", {}).setdefault(parts[1], {})
    if parts[2] == "arguments" and len(parts) == 4:
        region.setdefault("arguments", {})[parts[3]] = value
    else:
        region[parts[2]] = value
