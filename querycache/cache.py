"""The one object an application makes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakSet

from dogpile.cache import CacheRegion
from dogpile.util import coerce_string_conf
from sqlalchemy import event, inspect
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from querycache import sa_internals
from querycache.declarations import DEFAULT_SLOTS, Declarations
from querycache.errors import CacheUnavailable, ConfigurationError, shown
from querycache.events import CacheEvent, CacheStats, Explanation, Telemetry
from querycache.interceptor import Interceptor
from querycache.keys import structure_digest
from querycache.ledger import DEFAULT_LEASE
from querycache.options import Policy, check_ttl, names, table_names
from querycache.phases import Consistency, OnOutage, Phases
from querycache.regions import Regions
from querycache.tables import set_write_tags
from querycache.tags import EVERYTHING, key_tag, region_tag, statement_tag, user_tag
from querycache.writes import Writes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["QueryCache"]

_CONFIGURABLE = ("regions", "namespace", "ttl", "consistency", "on_outage", "lease", "slots", "signing_key")


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
        namespace: stands before every key in the store. Give all who write a database the same: what is written under
            another is not seen.
        ttl: seconds until an answer expires, where neither statement nor region say; None for never.
        scope: a function of the session whose value keeps answers apart: tenant, locale, role. It may return
            None, numbers, texts, dates, UUIDs, and tuples, lists, dicts or sets of these. What it asks itself is asked of
            the database.
        policies: what is cached without a word in the statement: :class:`~querycache.Policy` by mapped class.
        consistency: "strict": no lookup that begins after a commit has returned is answered from before it, also if
            the writer is killed in the middle. "commit": half the round trips of a commit, and without the last part.
        on_outage: whether a commit goes through ("available") or raises CacheUnavailable before COMMIT ("refuse")
            when a cache server cannot be told of it. With "available" it is told as soon as it can be reached; until
            then this process does not use it, but others that reach it may be answered from before the commit.
            "refuse" needs consistency "strict", and no dogpile backends of others: what is told after COMMIT only
            comes too late.
        lease: seconds after which a writer that was killed is taken for dead; longer than any COMMIT takes.
        slots: how finely writes of single rows are told apart: the number of slots of each tracked column. All
            processes that share a store and a namespace must give the same number; for another number, take another
            namespace.
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
        consistency: Consistency = "strict",
        on_outage: OnOutage = "available",
        lease: float = DEFAULT_LEASE,
        slots: int = DEFAULT_SLOTS,
        signing_key: bytes | None = None,
    ) -> None:
        if not isinstance(namespace, str) or not namespace or not namespace.isprintable() or " " in namespace:
            raise ConfigurationError(f"namespace={namespace!r}: give a short text without spaces")
        check_ttl("ttl", ttl)
        if isinstance(lease, bool) or not isinstance(lease, (int, float)) or not 0 < lease < math.inf:
            raise ConfigurationError(f"lease={lease!r}: give a positive number of seconds")
        if scope is not None and not callable(scope):
            raise ConfigurationError(f"scope={scope!r}: give a function of the session, or None")
        if policies is not None and not isinstance(policies, Mapping):
            raise ConfigurationError(f"policies={policies!r}: give a mapping of mapped classes to Policy")
        for cls, policy in (policies or {}).items():
            if not isinstance(policy, Policy):
                raise ConfigurationError(f"policies: {cls!r}: {policy!r}: give a Policy(…)")
            if not _is_mapped(cls):
                raise ConfigurationError(
                    f"policies: {cls!r} is not a mapped class, nor the base of one; its models must be imported before"
                )
        for argument, value, choices in (
            ("consistency", consistency, get_args(Consistency)),
            ("on_outage", on_outage, get_args(OnOutage)),
        ):
            if value not in choices:
                raise ConfigurationError(f"{argument}={value!r}: give one of {', '.join(map(repr, choices))}")
        if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
            raise ConfigurationError(f"slots={slots!r}: give a positive whole number")
        if signing_key is not None and (not isinstance(signing_key, bytes) or len(signing_key) < 16):
            raise ConfigurationError("signing_key: give at least 16 random bytes, as bytes, or None")
        # event.contains() goes by id(), and may take a sessionmaker for one that is gone
        self._attached: WeakSet[Any] = WeakSet()
        self._telemetry = Telemetry()
        self._declared = Declarations(slots=slots)
        self._regions = Regions(regions, namespace=namespace, lease=lease, ttl=ttl, signing_key=signing_key)
        if on_outage == "refuse":
            _check_refusable(consistency, self._regions)
        for policy in (policies or {}).values():
            self._regions.get(policy.region)
        phases = Phases(self._regions, self._telemetry, consistency, on_outage)
        self._writes = Writes(self._regions, self._declared, phases)
        self._interceptor = Interceptor(
            self._regions.get, self._writes, self._declared, self._telemetry, scope, policies or {}
        )

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
        table: object
        if isinstance(config, Mapping):
            source, table = "configuration", config
        elif not isinstance(config, (str, PathLike)):
            raise ConfigurationError(f"from_config({config!r}): give the path of a TOML file, or a mapping")
        else:
            source = str(config)
            try:
                content = tomllib.loads(Path(config).read_text("utf-8"))
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                raise ConfigurationError(f"cannot read {source!r}: {error}") from error
            table = content.get("querycache")
            if not isinstance(table, dict):
                raise ConfigurationError(f"{source!r} has no table [querycache]")
        table = dict(table)
        if any(isinstance(name, str) and name.startswith("cache.") for name in table):
            table["regions"] = _regions_to_extend(table.get("regions", {}))
        for name in list(table):
            if isinstance(name, str) and name.startswith("cache."):
                _add_dogpile_key(table, name, table.pop(name))
        unknown = set(table).difference(_CONFIGURABLE)
        if unknown:
            raise ConfigurationError(
                f"{source}: unknown key {min(unknown, key=repr)!r}; known are {', '.join(_CONFIGURABLE)}"
            )
        twice = sorted(set(table).intersection(arguments))
        if twice:
            raise ConfigurationError(f"{source}: {twice[0]} is given twice, there and as an argument")
        if isinstance(table.get("signing_key"), str):
            table["signing_key"] = table["signing_key"].encode()
        return cls(**table, **arguments)

    # --- where it works ------------------------------------------------------------------------------

    def attach(self, target: Any) -> QueryCache:
        """Answer the selects of these Sessions, and notice what they write.

        Everything that goes through the engines of these Sessions is noticed as well, from the first statement
        that one of them sends. Attach an engine by itself where statements are sent through it alone, and where it is
        only later that Sessions are bound to it: what a transaction has written before is not seen.

        Args:
            target: a sessionmaker, a scoped_session, a Session class, one Session, or an Engine.
        Returns:
            The cache itself.
        Raises:
            ConfigurationError: the target is none of these.
        """
        if isinstance(target, Engine):
            self._writes.watch(target)
            return self
        listeners = self._listeners(target)
        if target not in self._attached:
            self._attached.add(target)
            for name, listener in listeners.items():
                event.listen(target, name, listener)
        sa_internals.load_in_order()
        made = target
        if isinstance(target, scoped_session):
            # not to be made now: it may be configured later
            made, target = _made(target), target.session_factory
        binds: list[Any] = []
        if isinstance(target, sessionmaker):
            binds += target.kw.get("bind"), *(target.kw.get("binds") or {}).values()
        if isinstance(made, Session):
            binds = [*sa_internals.connections(made), made.bind, *binds]  # it may have written before
        for bind in binds:
            if isinstance(bind, (Engine, Connection)):
                self._writes.watch_bind(bind)
        return self

    def detach(self, target: Any) -> QueryCache:
        """Undo :meth:`attach`; writes through the engines that were seen so far are still noticed.

        Args:
            target: as given to :meth:`attach`. For an engine, all engines are left alone.
        Raises:
            ConfigurationError: the cache is not attached to the target.
        """
        if isinstance(target, Engine):
            self._writes.unwatch()
            return self
        listeners = self._listeners(target)
        if target not in self._attached:
            raise ConfigurationError(f"detach({target!r}): the cache is not attached to it")
        self._attached.remove(target)
        for name, listener in listeners.items():
            event.remove(target, name, listener)
        return self

    def _listeners(self, target: Any) -> dict[str, Any]:
        known = isinstance(target, (sessionmaker, scoped_session, Session))
        if not known and not (isinstance(target, type) and issubclass(target, Session)):
            remedy = "give a sessionmaker, a scoped_session, a Session class, a Session or an Engine"
            if type(target).__module__.startswith("sqlalchemy.ext.asyncio"):
                remedy = (
                    "Sessions under asyncio are not answered from the cache; give the sync_engine of their engine, so that "
                    "what they write is noticed"
                )
            raise ConfigurationError(f"attach({target!r}): {remedy}")
        return {"do_orm_execute": self._interceptor, **self._writes.session_listeners()}

    def depends(self, name: str, *, on: Iterable[str]) -> None:
        """Declare what SQL does not show: of which tables something in the database is made.

        Args:
            name: a view, a table that triggers write, or a function. Where it is a function, it is also declared
                to give the same answer as long as these tables are not written.
            on: names of tables, as ``table`` or ``schema.table``; may be empty for a function.
        Raises:
            ConfigurationError: a name is not a non-empty string.
        """
        self._declared.depends(table_names("name", [name])[0], table_names("on", on))

    # --- invalidation --------------------------------------------------------------------------------

    def invalidate(
        self,
        *,
        key: str | None = None,
        keys: Iterable[str] = (),
        tags: Iterable[str] = (),
        tables: Iterable[str] = (),
        entities: Iterable[type] = (),
        statement: Any = None,
        region: str | None = None,
        everything: Literal[True] | None = None,
        session: Session | scoped_session[Any] | None = None,
    ) -> None:
        """Make answers invalid, in every process that shares the store.

        A lookup that begins after this has returned is not answered with data from before it, and an answer that is
        being computed meanwhile is not stored.

        Args:
            key: every answer stored under this ``cache_key``, whatever statement and parameters.
            keys: several of these.
            tags: every answer with one of these in its ``cache_tags``.
            tables: every answer that depends on one of these tables, named as ``table`` or ``schema.table``.
            entities: every answer that depends on a table of one of these mapped classes.
            statement: every answer to this statement, whatever its parameters. It is meant as it is executed, with what
                handlers of ``do_orm_execute`` add to it.
            region: alone, every answer in this region; with others, only in the store of this region, which others
                may share.
            everything: True for every answer in every region.
            session: make it part of this session's transaction: it takes effect when that commits, and not if it
                rolls back. ``region`` cannot be given with others then.
        Raises:
            ConfigurationError: nothing was named, or a value cannot be used.
            UnknownRegion: no region has this name.
            CacheUnavailable: a cache server did not answer, so its answers may still be served. The others were told.
        """
        named = [key_tag(each) for each in names("keys", keys)]
        if key is not None:
            if not isinstance(key, str) or not key:
                raise ConfigurationError(f"key={key!r}: give a non-empty string")
            named.append(key_tag(key))
        named.extend(map(user_tag, names("tags", tags)))
        for given in table_names("tables", tables):
            schema, _, name = given.rpartition(".")
            named.extend(set_write_tags((schema or None, name), None))
        if isinstance(entities, type) or not isinstance(entities, Iterable):
            raise ConfigurationError(f"entities={entities!r}: give a list of mapped classes")
        for entity in entities:
            for table in sa_internals.tables_of(entity):
                # whatever its schema is called in the database
                named.extend(set_write_tags((None, table.name), None))
        if statement is not None:
            named.append(statement_tag(structure_digest(sa_internals.cache_key_of(statement))))
        if everything is not None:
            if everything is not True:
                raise ConfigurationError(f"everything={everything!r}: give True, or leave it out")
            named.append(EVERYTHING)
        chosen = None if region is None else self._regions.get(region)
        if not named:
            if region is None:
                raise ConfigurationError(
                    "invalidate(): name what is invalid: key, keys, tags, tables, entities, statement, region or "
                    "everything=True"
                )
            named.append(region_tag(region))
        elif session is not None and chosen is not None:
            raise ConfigurationError(
                f"invalidate(region={region!r}, session=…): name the region alone, or leave it out"
            )
        if isinstance(session, scoped_session):
            session = session()
        if session is not None:
            if not isinstance(session, Session):
                raise ConfigurationError(f"invalidate(session={session!r}): give a Session, or leave it out")
            self._writes.note(session, named)
            return
        silent = []
        for ledger in self._regions.ledgers if chosen is None else [chosen.ledger]:
            try:
                ledger.bump(self._regions.tag_keys(named))
            except CacheUnavailable as error:  # the others are to be told all the same
                silent.append(error)
        if silent:
            raise CacheUnavailable("; ".join(map(str, silent))) from silent[0]

    # --- what it does --------------------------------------------------------------------------------

    def explain(self, session: Session | scoped_session[Any], statement: Any) -> Explanation:
        """What the cache would do with a statement in a session, and why; the database is not asked, but for what other
        handlers ask themselves.

        Args:
            session: a Session to which the cache is attached.
            statement: as given to ``session.execute``.
        Raises:
            ConfigurationError: the cache is not attached to the session.
        """
        if isinstance(session, scoped_session):
            session = session()
        if not isinstance(session, Session) or self._interceptor not in list(session.dispatch.do_orm_execute):
            raise ConfigurationError(f"explain({session!r}, …): the cache is not attached to this session")
        return self._interceptor.explain(session, statement)

    def stats(self) -> CacheStats:
        """What the cache did in this process so far."""
        return self._telemetry.stats()

    @contextmanager
    def recording(self) -> Iterator[list[CacheEvent]]:
        """A context manager that gives the list of the events that happen while it is open, in this process."""
        with self._telemetry.recording() as events:
            yield events


def _check_refusable(consistency: Consistency, regions: Regions) -> None:
    """Raise ConfigurationError where a commit cannot be refused, because no server is told of it before."""
    if consistency == "commit":
        raise ConfigurationError(
            "on_outage='refuse' with consistency='commit', which tells a cache server after COMMIT only: leave one out"
        )
    for region in regions:
        if not region.ledger.store.atomic:
            raise ConfigurationError(
                f"on_outage='refuse': the backend of region {region.name!r} is told after COMMIT only, so that nothing can "
                "be refused; take Redis or memcached, or leave it out"
            )


def _is_mapped(cls: object) -> bool:
    """True for a mapped class, and for one that a mapped class inherits from."""
    if not isinstance(cls, type):
        return False
    return inspect(cls, raiseerr=False) is not None or any(map(_is_mapped, type.__subclasses__(cls)))


def _regions_to_extend(regions: object) -> dict[str, Any]:
    """A copy of the regions, each as a mapping to which keys can be added."""
    if not isinstance(regions, Mapping):
        raise ConfigurationError(
            f"configuration: regions={shown(regions)} beside keys 'cache.REGION.…'; give a mapping of names to regions"
        )
    copy: dict[str, Any] = {}
    for name, region in regions.items():
        if isinstance(region, Mapping):
            copy[name] = dict(region)
            if isinstance(region.get("arguments"), Mapping):
                copy[name]["arguments"] = dict(region["arguments"])
        else:
            copy[name] = {"url": region} if isinstance(region, str) else region
    return copy


def _add_dogpile_key(table: dict[str, Any], name: str, value: object) -> None:
    parts = name.split(".")
    if not (
        (len(parts) == 3 and parts[2] in ("backend", "expiration_time", "arguments"))
        or (len(parts) == 4 and parts[2] == "arguments")
    ):
        raise ConfigurationError(
            f"configuration: cannot use {name!r}; write cache.REGION.backend, cache.REGION.expiration_time or "
            "cache.REGION.arguments.NAME"
        )
    # files of other formats than TOML have texts only, and dogpile takes them for what they look like
    value = coerce_string_conf({name: value})[name]  # type: ignore[no-untyped-call]
    region = table["regions"].setdefault(parts[1], {})
    if not isinstance(region, dict):
        raise ConfigurationError(
            f"configuration: {name!r} is for a region that is given as {region!r}; leave out one"
        )
    if len(parts) == 3:
        known = region.get(parts[2])
        # arguments that were named one by one before are kept
        region[parts[2]] = (
            {**value, **known} if isinstance(value, dict) and isinstance(known, dict) else value
        )
        return
    arguments = region.setdefault("arguments", {})
    if not isinstance(arguments, dict):
        raise ConfigurationError(
            f"configuration: cache.{parts[1]}.arguments={shown(arguments)} beside {name!r}; give a mapping, or leave it out"
        )
    arguments[parts[3]] = value


def _made(sessions: scoped_session[Any]) -> Session | None:
    """The Session of a registry, where it has made one."""
    try:
        return sessions() if sessions.registry.has() else None
    except Exception:  # noqa: BLE001 - its scope may be none, as outside of a request
        return None
