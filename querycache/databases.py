"""Which database an engine speaks to, the same in every process that speaks to it."""

from __future__ import annotations

import os
import secrets
import threading
import types
import weakref
from contextlib import suppress
from functools import partial

from sqlalchemy.engine import Engine
from sqlalchemy.pool import Pool, SingletonThreadPool, StaticPool

from querycache.keys import UnkeyableValue, canonical
from querycache.sa_internals import connects_by_url, driver_settings, root_engine

__all__ = ["bind_identity", "own_database"]

_identities: weakref.WeakKeyDictionary[Engine, str] = weakref.WeakKeyDictionary()


def bind_identity(engine: Engine) -> str:
    """Which database an engine speaks to, without its password, and what its driver makes of the values there.

    What is only in memory on SQLite belongs to one engine, and to the thread that asks where :func:`own_database` says so. To
    one engine belongs also what a ``creator`` connects to when the URL does not say. Such engines get a random identity of
    their own, which they share with what ``Engine.execution_options`` makes from them. So do those whose driver is given a
    function that has no name by which it is known in every process.
    """
    engine = root_engine(engine)
    identity = _identities.get(engine)
    if identity is None:
        # once: a relative path of SQLite does not follow a process that changes its directory
        identity = _identities.setdefault(engine, _identity(engine) or f"private:{secrets.token_hex(8)}")
    return identity + (own_database(engine) or "")


def _identity(engine: Engine) -> str | None:
    url = engine.url
    backend = url.get_backend_name()
    if backend == "sqlite":
        name = url.database
        private = not name or name == ":memory:" or name.startswith("file:")
        return None if private else f"sqlite:{os.path.abspath(str(name))}"
    if not (url.host or url.database or url.query):
        return None
    settings = [_named(each) for each in driver_settings(engine.dialect)]
    if None in settings:
        return None
    return f"{backend}:{url.username}@{url.host}:{url.port}/{url.database}?{dict(url.query)} {settings}"


def own_database(engine: Engine) -> str | None:
    """Which of an engine's databases this thread speaks to; empty where it has one, and None where nobody can tell.

    SQLite gives each connection a database in memory of its own, and a pool that is disposed of loses it. What a ``creator``
    connects to is one database, unless each thread has a connection.
    """
    if engine.dialect.name != "sqlite" or engine.url.host:  # another program's that speaks as SQLite
        return ""
    name, told = engine.url.database or ":memory:", engine.url.query
    is_uri = bool(told) and str(told.get("uri")).lower() in _TRUE  # or else SQLite is told nothing of it
    if name != ":memory:" and not (is_uri and (name in _NAMELESS or _MEMORY & set(told.items()))):
        return ""
    pool = engine.pool
    if isinstance(pool, StaticPool):
        return _of_pool(pool).token
    if is_uri and (told.get("cache") == "shared" or (("vfs", "memdb") in told.items() and name[5:6] == "/")):
        return _of_pool(pool).token
    if isinstance(pool, SingletonThreadPool):
        return _of_pool(pool).of_thread.token
    return None if connects_by_url(pool) else ""


_TRUE = ("true", "yes", "on", "y", "t", "1")  # as SQLAlchemy reads it
_NAMELESS = ("file:", "file::memory:")
_MEMORY = {("mode", "memory"), ("vfs", "memdb")}


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.token = secrets.token_hex(8)


class _OfPool:
    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        self.of_thread = _OfThread()


_pools: weakref.WeakKeyDictionary[Pool, _OfPool] = weakref.WeakKeyDictionary()


def _of_pool(pool: Pool) -> _OfPool:
    known = _pools.get(pool)
    return _pools.setdefault(pool, _OfPool()) if known is None else known


def _named(value: object) -> str | None:
    """A text for a setting that is the same in every process; None where there is none."""
    with suppress(UnkeyableValue):
        return canonical(value)
    if isinstance(value, partial):
        parts = [_named(each) for each in (value.func, *value.args, *value.keywords.values())]
        return None if None in parts else f"{parts} {list(value.keywords)}"
    if isinstance(value, types.FunctionType):
        known = value.__closure__ is None
    elif isinstance(value, types.BuiltinFunctionType):  # which a method in C is as well
        known = isinstance(value.__self__, types.ModuleType)
    else:
        known = isinstance(value, type)
    name = f"{value.__module__}.{value.__qualname__}" if known else "<"  # type: ignore[attr-defined]
    return None if "<" in name else name
