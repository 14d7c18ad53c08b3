"""Sessions, their connections, and what transactions of these see."""

from __future__ import annotations

import sys
from typing import Any

from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.engine.util import TransactionalContext
from sqlalchemy.orm import Session

from querycache.wording import first_word

__all__ = [
    "autobegin",
    "begins_transaction",
    "checked_out",
    "connections",
    "default_isolation_level",
    "driver_isolation_level",
    "has_begun",
    "has_open_statement",
    "in_transaction",
    "info_of",
    "is_autocommit",
    "is_initializing",
    "is_serializable",
    "is_serializable_by_default",
    "is_told",
    "isolation_level",
    "may_block",
    "reads_uncommitted",
    "root_engine",
    "tells_open",
    "was_given",
]


def autobegin(session: Session) -> None:
    """Begin the Session's transaction as any statement would, without a connection.

    Raises:
        InvalidRequestError: the Session is within the context manager of a transaction that has ended.
    """
    TransactionalContext._trans_ctx_check(session)
    session._autobegin_t()


def may_block() -> bool:
    """False where waiting would stop an event loop: in a greenlet that SQLAlchemy runs under asyncio."""
    greenlet: Any = sys.modules.get("greenlet")
    return greenlet is None or not getattr(greenlet.getcurrent(), "__sqlalchemy_greenlet_provider__", False)


def root_engine(engine: Engine) -> Engine:
    """The engine that ``Engine.execution_options`` has made others from; its events reach them all."""
    while isinstance(engine, OptionEngine):
        engine = engine._proxied
    return engine


def connections(session: Session, bind: Engine | Connection | None = None) -> list[Connection]:
    """The connections of a Session: those it was bound to, and those it has checked out, of its savepoints and
    enclosing transactions as well.

    Args:
        session: whose.
        bind: what it is about to ask, which may be a connection that it has been told of for this one statement.
    """
    # 2.0 keeps them in a name of the class, 2.1 in a plain one
    binds = session.__dict__.get("binds") or session.__dict__.get("_Session__binds") or {}
    found = [bind, session.bind, *binds.values()]
    transaction = session._transaction
    while transaction is not None:
        found += transaction._connections  # by themselves and by their engines
        transaction = transaction._parent
    seen = [
        each for each in found if isinstance(each, Connection) and not each.closed and not each.invalidated
    ]
    return list(dict.fromkeys(seen)) if len(seen) > 1 else seen


def was_given(transaction: Any, connection: Connection) -> bool:
    """True if a Session's transaction was given its connection, in whatever way, rather than to check out one itself."""
    closes_it: bool = transaction._connections[connection][3]
    return not closes_it


def checked_out(session: Session, bind: Engine | Connection) -> Connection | None:
    """The connection that a Session's transaction has for a bind already, without the checks of ``connection()``."""
    transaction = session._transaction
    while transaction is not None:
        if (entry := transaction._connections.get(bind)) is not None:
            return entry[0]
        transaction = transaction._parent
    return None


def is_autocommit(connection: Connection) -> bool:
    """True if each statement of the connection commits itself. Where one was BEGIN, few drivers know."""
    driver: Any = connection.connection.dbapi_connection
    if getattr(driver, "in_transaction", False):  # SQLite's
        return False
    told = getattr(driver, "get_autocommit", None)  # drivers of MySQL, whose server tells of SET autocommit
    if told is not None:
        return bool(told())
    return connection._is_autocommit_isolation() or getattr(driver, "autocommit", None) is True


def default_isolation_level(dialect: Any) -> str | None:
    """The isolation level that the engine asks for, or else the database's own; in capitals and with spaces."""
    # what the database does by itself is known from the first connection on
    level = dialect._on_connect_isolation_level or getattr(dialect, "default_isolation_level", None)
    return level.replace("_", " ").upper() if level else None


def is_initializing(connection: Connection) -> bool:
    """True for the connection on which a dialect gets to know its database; nothing can be noted with it."""
    return info_of(connection) is None


def isolation_level(connection: Connection, begun: bool = False) -> str | None:
    """The isolation level of a connection, in capitals and with spaces, without asking the database.

    Args:
        connection: whose.
        begun: True where a transaction was begun by hand: in autocommit mode, too, it has the database's own level.
    """
    level: str | None = connection.get_execution_options().get("isolation_level")
    level = level.replace("_", " ").upper() if level else None
    level = level or driver_isolation_level(connection) or default_isolation_level(connection.dialect)
    if begun and level == "AUTOCOMMIT":
        level = connection.dialect.default_isolation_level  # as the database has told at the first connection
        return level.replace("_", " ").upper() if level else None
    return level


def is_serializable(connection: Connection) -> bool:
    """True if a connection's transactions are SERIALIZABLE; SQLite's are in their own way."""
    return connection.dialect.name != "sqlite" and isolation_level(connection) == "SERIALIZABLE"


def is_serializable_by_default(dialect: Dialect) -> bool:
    """True if those of a dialect are, unless they are told otherwise."""
    return dialect.name != "sqlite" and default_isolation_level(dialect) == "SERIALIZABLE"


def is_told(dialect: Dialect) -> bool:
    """True where the driver can be told of an isolation level without SQLAlchemy's knowing."""
    return dialect.driver in _TOLD


def driver_isolation_level(connection: Connection) -> str | None:
    """What a driver of PostgreSQL was told by itself, by a listener for example; None for nothing."""
    if not is_told(connection.dialect):
        return None
    level = getattr(connection.connection.dbapi_connection, "isolation_level", None)
    return _LEVELS.get(getattr(level, "name", level))


_TOLD = frozenset({"psycopg", "psycopg2", "psycopg_async"})
# by the name of psycopg's constants, and by the numbers of psycopg2
_LEVELS: dict[Any, str] = {
    "READ_UNCOMMITTED": "READ UNCOMMITTED",
    "READ_COMMITTED": "READ COMMITTED",
    "REPEATABLE_READ": "REPEATABLE READ",
    "SERIALIZABLE": "SERIALIZABLE",
    4: "READ UNCOMMITTED",
    1: "READ COMMITTED",
    2: "REPEATABLE READ",
    3: "SERIALIZABLE",
}


def reads_uncommitted(session: Session) -> bool:
    """True if a connection of the session sees what others have not committed yet."""
    return any(isolation_level(connection) == "READ UNCOMMITTED" for connection in connections(session))


def in_transaction(connection: Connection) -> bool:
    """True if SQLite's driver has a transaction open, whose view of the database may be an old one.

    Most other drivers do not tell.
    """
    return bool(getattr(connection.connection.dbapi_connection, "in_transaction", False))


def has_begun(connection: Connection) -> bool:
    """True if the driver tells of an open transaction, whoever has begun it, be it a raw cursor. Some do not tell."""
    driver: Any = connection.connection.driver_connection
    status = getattr(getattr(driver, "info", None), "transaction_status", None)
    if status is not None:  # of psycopg and psycopg2; 0 is "idle"
        return bool(status != 0)
    flags = getattr(driver, "server_status", None)
    if isinstance(flags, int):  # of PyMySQL, which takes them from all but what returns rows
        result: Any = getattr(driver, "_result", None)
        if flags & 1 or getattr(result, "description", None) is None:
            return bool(flags & 1)
        if result.unbuffered_active or not type(driver).__module__.startswith("pymysql"):
            return True
        try:
            driver.ping(reconnect=False)  # rows of what was no table begin nothing
        except connection.dialect.loaded_dbapi.Error:
            return True  # of a lost connection nothing is known; the statement will say so
        return bool(driver.server_status & 1)
    told = getattr(driver, "is_in_transaction", None)  # of asyncpg
    return bool(told() if callable(told) else getattr(driver, "in_transaction", False))


def tells_open(connection: Connection) -> bool | None:
    """Whether the driver tells that a transaction is open, just after a statement; None where it does not tell."""
    driver: Any = connection.connection.driver_connection
    status = getattr(getattr(driver, "info", None), "transaction_status", None)
    if status is not None:  # of psycopg and psycopg2
        return {0: False, 2: True, 3: True}.get(int(status))  # idle, in one, in one that failed
    flags = getattr(driver, "server_status", None)
    if isinstance(flags, int):  # of PyMySQL, which takes them from all but what returns rows
        return bool(flags & 1)
    told = getattr(driver, "is_in_transaction", None)  # of asyncpg
    found: bool | None = told() if callable(told) else getattr(driver, "in_transaction", None)
    return found


def has_open_statement(connection: Connection) -> bool:
    """True if a statement of SQLite was not read to its end, outside of a transaction.

    The driver does not tell, but SQLite does when it refuses to VACUUM. This one it refuses in any case, for where it is
    to write.
    """
    driver: Any = connection.connection.dbapi_connection
    try:
        driver.execute("VACUUM INTO NULL")
    except connection.dialect.loaded_dbapi.Error as refusal:
        cursor = driver.cursor()
        cursor.execute("SELECT 1")  # or else the refusal would be told as the reason of a later error
        cursor.close()
        return "in progress" in str(refusal)
    return False


def begins_transaction(connection: Connection, sql: str) -> bool:
    """True if SQLite's driver begins a transaction of its own before this statement."""
    driver: Any = connection.connection.dbapi_connection
    return driver.isolation_level is not None and first_word(sql) in ("insert", "update", "delete", "replace")


def info_of(connection: Any) -> dict[Any, Any] | None:
    """The dictionary of a connection; None for those that a dialect makes for itself.

    It is empty while nothing was noted, and then there is nothing to tell anybody.
    """
    try:
        return connection.info  # type: ignore[no-any-return]
    except (AttributeError, NotImplementedError):
        # a bare DBAPI connection has none, and neither has what stands in for one at first connect
        return None
