"""What a dialect does: it executes each statement, whoever sent it, and ends each transaction."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, Protocol, TypeVar, cast

from sqlalchemy import event
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.engine.interfaces import ExecuteStyle
from sqlalchemy.pool import PoolProxiedConnection

from querycache import forks
from querycache.errors import CacheUnavailable
from querycache.sa_internals.endings import Outcome, end, rolls_nothing_back
from querycache.sa_internals.returning import ASKED, Asked
from querycache.sa_internals.transactions import driver_connection, info_of, is_open

__all__ = [
    "Row",
    "Tap",
    "driver_settings",
    "has_listeners",
    "has_other_parameters",
    "heed_others",
    "json_serializer",
    "listening",
    "note_reading",
    "sent",
    "tap",
    "tell_of_reading",
    "untap",
]


T = TypeVar("T")

Row = Sequence[object]


class Tap(Protocol):
    """Who listens to a dialect. ``info`` is the dictionary of a pooled DBAPI connection."""

    def asking(self, context: Any) -> bool: ...

    def executing(self, sql: str, context: Any) -> bool: ...

    def executed(self, context: Any, outcome: Outcome) -> None: ...

    def failed(self, info: dict[Any, Any], is_open: bool | None) -> None: ...

    def unseen(self, info: dict[Any, Any]) -> None: ...

    def commit(self, info: dict[Any, Any], dialect: Dialect) -> None: ...

    def end(self, info: dict[Any, Any], outcome: Outcome) -> None: ...


@dataclass(slots=True)
class _Taps:
    """Those who listen to one dialect.

    Attributes:
        reading: the mark of compiled statements, which are kept and used again, that nobody wants to hear of.
        every: True where somebody wants to hear of each statement.
        beside_others: True where the dialect has listeners of its own, who may run a statement in its place.
    """

    listeners: list[Tap] = field(default_factory=list)
    reading: object = field(default_factory=object)
    every: bool = False
    beside_others: bool = False


_SENT = "_querycache_sent"
_TAPS = "_querycache_taps"
_READING = "_querycache_reading"


def note_reading(context: Any) -> None:
    """Tell nobody any more of the statement that is about to run, since it writes nothing."""
    taps: _Taps = context.dialect.__dict__[_TAPS]
    mark = taps.reading  # before the next line: another thread may be about to have every statement told
    if not taps.every:
        context.compiled.__dict__[_READING] = mark


def tell_of_reading(dialect: Any) -> None:
    """Tell of every statement from now on."""
    taps: _Taps = dialect.__dict__[_TAPS]
    taps.every = True
    taps.reading = object()


def tap(engine: Engine, listener: Tap) -> None:
    """Tell a listener of each statement and of the end of each transaction of an engine.

    It takes the place of a few methods of the dialect, rather than to listen to its events: as soon as there is one
    listener, SQLAlchemy asks for them before each statement, which takes more time than all that is done here.
    """
    dialect = engine.dialect
    taps: _Taps | None = dialect.__dict__.get(_TAPS)
    if taps is None:
        taps = _Taps()
        setattr(dialect, _TAPS, taps)
        for name in _EXECUTING:
            setattr(dialect, name, _execution(dialect, name, taps))
        for name, wrap in _WRAPPED.items():
            setattr(dialect, name, wrap(dialect, getattr(dialect, name), taps))
        heed_others(dialect)
    taps.listeners.append(listener)
    taps.reading = object()  # this one has heard of none


def untap(engine: Engine, listener: Tap) -> None:
    """Tell a listener nothing more."""
    engine.dialect.__dict__[_TAPS].listeners.remove(listener)


has_listeners: Callable[[Any], bool] = cast("Any", attrgetter("_has_events"))
"""True where somebody has ever listened to a dialect; asked at the beginning of each transaction."""


def heed_others(dialect: Any) -> bool:
    """Notice listeners of the dialect's events, who may run a statement without it; and be the first of them then.

    Returns True where they may have done so unseen.
    """
    taps: _Taps | None = dialect.__dict__.get(_TAPS)
    if taps is None or not dialect._has_events:
        return False
    found = {
        name: [each for each in getattr(dialect.dispatch, name) if not _only_refuses(each)]
        for name in _EXECUTING
    }
    crowded = any(each is not _in_front.get(name) for name in found for each in found[name])
    first = all(found[name] and found[name][0] is _in_front.get(name) for name in found)
    if crowded is taps.beside_others and (first or not crowded):
        return False
    with listening:
        taps.beside_others = crowded
        (_beside_others.add if crowded else _beside_others.discard)(dialect)
        if crowded or not _beside_others:
            for name, listener in _in_front.items():
                event.remove(Engine, name, listener)
            _in_front.clear()
        if crowded:
            # Those of the class come before those of a dialect, wherever these are inserted.
            _in_front.update({name: _execution_event(name) for name in _EXECUTING})
            for name, listener in _in_front.items():
                event.listen(Engine, name, listener, insert=True)
    return crowded


def _only_refuses(listener: Any) -> bool:
    """True for what is known to run nothing: denormalized columns only refuse statements."""
    return str(getattr(listener, "__module__", "")).startswith("querycache.denormalize.")


_in_front: dict[str, Callable[..., Any]] = {}
"""Our listener of each event, the first of all dialects', while a dialect has others."""

_beside_others: weakref.WeakSet[Any] = weakref.WeakSet()
"""The dialects that have others."""

listening = forks.lock()
"""Held while it changes who listens to whom. It is one lock for all, since none that a fork waits for is taken within
another."""

_EXECUTING = ("do_execute", "do_executemany", "do_execute_no_params")
"""The methods by which a dialect runs a statement. The context is the last of their arguments."""


def _execution(dialect: Dialect, name: str, taps: _Taps) -> Callable[..., Any]:
    """What takes the place of a method that runs a statement."""
    method = getattr(dialect, name)
    one_set, no_parameters = name == "do_execute", name == "do_execute_no_params"
    run = (lambda cursor, sql, parameters, context: method(cursor, sql, context)) if no_parameters else method

    def execute(cursor: Any, sql: str, parameters: Any, context: Any = None) -> Any:
        # Each statement comes through here, cached or not; most are known to write nothing.
        if taps.beside_others or context is None:
            return run(cursor, sql, parameters, context)
        # what _tell() comes to for nearly all of them; and to look into __dict__ makes a context slow from then on
        if (
            getattr(context.compiled, _READING, None) is taps.reading
            and sql is context.statement
            and parameters is context.parameters[0]
            and "isolation_level" not in context.execution_options
        ):
            return run(cursor, sql, parameters, context)
        ending = _tell(taps, name, sql, parameters, context)
        asked: Asked | None = getattr(context, ASKED, None)
        send = run if asked is None or not one_set or hasattr(context, _SENT) else partial(asked.run, run)
        try:
            if ending is None:
                return send(cursor, sql, parameters, context)
            return _ending(ending, context, lambda: send(cursor, sql, parameters, context))
        finally:
            if asked is not None:
                setattr(context, ASKED, None)

    return (
        (lambda cursor, sql, context=None: execute(cursor, sql, None, context)) if no_parameters else execute
    )


def _execution_event(name: str) -> Callable[..., bool | None]:
    """The same as a listener of events. It runs the statement itself where that commits, to know when it has."""

    def execute(cursor: Any, sql: str, *rest: Any) -> bool | None:
        context = rest[-1]  # None for what a dialect asks by itself
        taps: _Taps | None = None if context is None else context.dialect.__dict__.get(_TAPS)
        if taps is None or not taps.beside_others:
            return None
        ending = _tell(taps, name, sql, rest[0], context)
        if ending is None:
            return None
        _ending(ending, context, lambda: getattr(context.dialect, name)(cursor, sql, *rest))
        return True

    return execute


def _tell(taps: _Taps, name: str, sql: str, parameters: Any, context: Any) -> list[Tap] | None:
    """Tell of a statement that is about to run. Gives those that want to hear when it has; None for nobody."""
    if not hasattr(
        context, "statement"
    ):  # a default of an INSERT or UPDATE, which SQLAlchemy asks for ahead of that
        for each in taps.listeners:
            each.asking(context)
        return None
    replaced = sql is not context.statement
    prepared = context.parameters if name == "do_executemany" else context.parameters[0]
    given = prepared if name == "do_execute_no_params" else parameters
    if replaced or given is not prepared:
        # by a listener of before_cursor_execute, of which the context is not told
        context.__dict__[_SENT] = sql, given
    compiled = context.compiled
    if (
        compiled is not None
        and not replaced
        and getattr(compiled, _READING, None) is taps.reading
        and "isolation_level" not in context.execution_options
    ):
        return None
    ending: list[Tap] | None = None
    for each in taps.listeners:
        if each.executing(sql, context):
            ending = [*(ending or ()), each]
    return ending


def has_other_parameters(context: Any) -> bool:
    """True where a listener has put other parameters in the place of those of a statement; not known of what is sent in
    batches."""
    given = getattr(context, _SENT, None)
    if given is None or context.execute_style is ExecuteStyle.INSERTMANYVALUES:
        return False
    return given[1] is not (context.parameters if context.executemany else context.parameters[0])


def sent(context: Any) -> tuple[str, Any]:
    """The SQL and the parameters that the driver was given; to be asked once, after the execution."""
    given: tuple[str, Any] = context.__dict__.pop(_SENT, (context.statement, context.parameters[0]))
    return given


def _ending(taps: Sequence[Tap], context: Any, run: Callable[[], T]) -> T:
    """Execute a statement that commits itself."""

    def tell(outcome: Outcome) -> None:
        for each in taps:
            each.executed(context, outcome)

    return end(context.dialect, context.root_connection.connection, run, tell)


def _committing(dialect: Dialect, run: Callable[..., Any], taps: _Taps) -> Callable[..., Any]:
    def commit(connection: Any, *args: Any, **kwargs: Any) -> Any:
        info = info_of(connection)
        # Of a transaction that was prepared before nobody knows what it has written.
        if info is not None and (heed_others(dialect) or "recover" in kwargs):
            for each in taps.listeners:
                each.unseen(info)
        if not info:
            return run(connection, *args, **kwargs)
        for each in taps.listeners:
            try:
                each.commit(info, dialect)
            except BaseException:
                # This stops the COMMIT, but the connection would go back to its pool with the transaction open, for
                # the next user to commit.
                try:
                    _give_up(connection)
                finally:
                    for every in taps.listeners:
                        every.end(info, "over")
                raise

        def tell(outcome: Outcome) -> None:
            for each in taps.listeners:
                each.end(info, outcome)

        return end(dialect, connection, lambda: run(connection, *args, **kwargs), tell)

    return commit


def _preparing(dialect: Dialect, run: Callable[..., Any], taps: _Taps) -> Callable[..., Any]:
    def prepare(connection: Any, *args: Any, **kwargs: Any) -> Any:
        unseen = heed_others(dialect)
        for each in taps.listeners:
            if unseen:
                each.unseen(connection.info)
            # where this is refused, SQLAlchemy rolls back by itself
            each.commit(connection.info, dialect)
        return run(connection, *args, **kwargs)

    return prepare


def _rolling_back(dialect: Dialect, run: Callable[..., Any], taps: _Taps) -> Callable[..., Any]:
    def rollback(connection: Any, *args: Any, **kwargs: Any) -> Any:
        info = info_of(connection)
        if info is not None and heed_others(dialect):
            # in autocommit mode there is no COMMIT where it would show
            for each in taps.listeners:
                each.unseen(info)
                with suppress(CacheUnavailable):
                    each.commit(info, dialect)
        if not info:
            return run(connection, *args, **kwargs)

        def tell(outcome: Outcome) -> None:
            still = outcome == "over" and rolls_nothing_back(dialect, connection)
            for each in taps.listeners:
                each.end(info, "open" if still else outcome)

        return end(dialect, connection, lambda: run(connection, *args, **kwargs), tell)

    return rollback


def _resetting(dialect: Dialect, run: Callable[..., Any], taps: _Taps) -> Callable[..., Any]:
    """The same for the transactions that only read, which all end like this."""
    thoroughly = _rolling_back(dialect, run, taps)

    def rollback(connection: Any) -> Any:
        try:
            nothing = not connection._connection_record.info and not dialect._has_events
        except AttributeError:
            nothing = False
        return run(connection) if nothing else thoroughly(connection)

    return rollback


def _failing(dialect: Dialect, run: Callable[..., bool], taps: _Taps) -> Callable[..., bool]:
    """What SQLAlchemy asks of each error of a driver, be it of a statement or of rows that were to be fetched."""

    def is_disconnect(error: Any, connection: Any, cursor: Any) -> bool:
        if isinstance(connection, PoolProxiedConnection) and (info := info_of(connection)):
            for each in taps.listeners:
                each.failed(info, _after_error(dialect, connection))
        return run(error, connection, cursor)

    return is_disconnect


def _after_error(dialect: Dialect, connection: Any) -> bool | None:
    """Whether a driver tells that a transaction is open after an error; None where it does not, or tells what was before."""
    if dialect.name in ("mysql", "mariadb"):
        return None
    return is_open(driver_connection(dialect, connection))


_WRAPPED: dict[str, Callable[..., Callable[..., Any]]] = {
    "is_disconnect": _failing,
    "do_prepare_twophase": _preparing,
    "do_commit": _committing,
    "do_commit_twophase": _committing,
    "do_rollback": _resetting,
    "do_rollback_twophase": _rolling_back,
}


def _give_up(connection: Any) -> None:
    if isinstance(connection, Connection):  # two-phase: what was prepared stays prepared
        connection.invalidate()
    else:
        connection.rollback()


def driver_settings(dialect: Any) -> list[object]:
    """What an engine was told of how its driver reads and writes values: rows are stored as the driver gives them."""
    driver = dialect.driver.removesuffix("_async")  # which gives the same values
    if dialect.name != "postgresql":
        return [driver]  # what else there is, SQLAlchemy does itself when rows are replayed
    hstore = getattr(dialect, "use_native_hstore", None)
    return [driver, dialect._json_deserializer, dialect._json_serializer, dialect._native_inet_types, hstore]


def json_serializer(dialect: Any) -> Callable[[Any], object] | None:
    """What an engine was told to make JSON with; None for the usual."""
    serializer: Callable[[Any], object] | None = getattr(dialect, "_json_serializer", None)
    return serializer
