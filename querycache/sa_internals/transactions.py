"""Sessions, their connections, and what transactions of these see."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.engine.util import TransactionalContext
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session

from querycache.wording import first_word

__all__ = [
    "autobegin",
    "begins_transaction",
    "checked_out",
    "connections",
    "connects_by_url",
    "default_isolation_level",
    "driver_isolation_level",
    "has_begun",
    "has_open_statement",
    "in_transaction",
    "info_of",
    "is_autocommit",
    "is_broken",
    "is_initializing",
    "is_serializable",
    "is_serializable_by_default",
    "is_told",
    "is_unusable",
    "isolation_level",
    "may_block",
    "reads_uncommitted",
    "root_engine",
    "tells_open",
    "transaction_status",
    "was_given",
]


def autobegin(session: Session, bind: Engine | Connection) -> bool:
    """Begin the Session's transaction as any statement would, without a connection; but one that it was given is joined, or
    else neither commit() nor rollback() would reach it. Returns False where all of this was done before.

    What takes a savepoint or another command is not done.

    Raises:
        InvalidRequestError: the Session is within the context manager of a transaction that has ended.
    """
    TransactionalContext._trans_ctx_check(session)
    begins = session._transaction is None
    session._autobegin_t()
    if not isinstance(bind, Connection) or session.twophase:
        return begins
    *_, root = _transactions(session)  # which a savepoint has the connection from
    if bind in root._connections or _takes_savepoint(session, bind):
        return begins
    root._connection_for_bind(bind, None)
    return True


def _takes_savepoint(session: Session, bind: Connection) -> bool:
    """True if a Session begins a savepoint where it joins a connection's transaction."""
    if not bind.in_transaction():
        return False
    how = session.join_transaction_mode
    return how == "create_savepoint" or (how == "conditional_savepoint" and bind.in_nested_transaction())


def _transactions(session: Session) -> Iterator[Any]:
    """A Session's savepoints and its transaction, the innermost first."""
    transaction: Any = session._transaction
    while transaction is not None:
        yield transaction
        transaction = transaction._parent


def is_broken(session: Session) -> bool:
    """True where the next statement will be refused, for a connection of the Session's transaction :func:`is_unusable`."""
    return any(
        isinstance(each, Connection) and is_unusable(each)
        for transaction in _transactions(session)
        for each in transaction._connections
    )


def is_unusable(connection: Connection) -> bool:
    """True where the next statement of a connection will be refused: it was closed, or its transaction is over for
    SQLAlchemy, or for the server, as a driver tells in whose transaction a statement has failed."""
    if connection.closed or connection.invalidated:
        return connection.closed or connection.in_transaction()
    begun = connection.get_transaction(), connection.get_nested_transaction()
    if not all(each is None or each.is_active for each in begun):
        return True
    try:
        TransactionalContext._trans_ctx_check(connection)
    except InvalidRequestError:
        return True
    return transaction_status(_driver(connection)) == _FAILED


def may_block() -> bool:
    """False where waiting would stop an event loop: in a greenlet that SQLAlchemy runs under asyncio."""
    greenlet: Any = sys.modules.get("greenlet")
    return greenlet is None or not getattr(greenlet.getcurrent(), "__sqlalchemy_greenlet_provider__", False)


def connects_by_url(pool: Any) -> bool:
    """True for the pool of an engine that was told neither a ``creator`` nor a pool."""
    return getattr(pool._creator, "__module__", "") == "sqlalchemy.engine.create"


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
    for transaction in _transactions(session):
        found += transaction._connections  # by themselves and by their engines
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
    for transaction in _transactions(session):
        if (entry := transaction._connections.get(bind)) is not None:
            connection: Connection = entry[0]
            return connection
    return None


def is_autocommit(connection: Connection) -> bool:
    """True if each statement of the connection commits itself. Where one was BEGIN, few drivers know."""
    adapter: Any = connection.connection.dbapi_connection
    told = getattr(adapter, "get_autocommit", None)  # drivers of MySQL, whose server tells of SET autocommit
    if told is not None:
        return bool(told())
    dialect = connection.dialect
    if dialect.name != "postgresql":
        if _is_in_transaction(_driver(connection)):  # of SQLite, and MySQL Connector
            return False
    elif dialect.is_async and _is_in_transaction(_driver(connection)) is False and _has_started(adapter):
        return True
    return connection._is_autocommit_isolation() or getattr(adapter, "autocommit", None) is True


def _has_started(adapter: Any) -> bool:
    """True if SQLAlchemy's adapter of asyncpg has begun a transaction: it begins no other, whoever has ended this one."""
    # 2.0 notes it beside the transaction, 2.1 goes by that alone
    started: bool = getattr(adapter, "_started", getattr(adapter, "_transaction", None) is not None)
    return started


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
    """True if SQLite's driver has a transaction open, whose view of the database may be an old one."""
    return bool(_is_in_transaction(_driver(connection)))


def _driver(connection: Connection) -> Any:
    return driver_connection(connection.dialect, connection.connection)


def driver_connection(dialect: Dialect, pooled: Any) -> Any:
    """The driver's own of a pooled connection, detached or not: without the adapter that drivers of asyncio have."""
    adapter = pooled.dbapi_connection
    return None if adapter is None else dialect.get_driver_connection(adapter)


def has_begun(connection: Connection) -> bool:
    """True if the driver tells of an open transaction, whoever has begun it, be it a raw cursor. Some do not tell."""
    driver = _driver(connection)
    flags = getattr(driver, "server_status", None)
    if isinstance(flags, int) and not flags & 1:  # PyMySQL takes them from all but what returns rows
        result: Any = getattr(driver, "_result", None)
        if getattr(result, "description", None) is None:
            return False
        if result.unbuffered_active or not type(driver).__module__.startswith("pymysql"):
            return True
        try:
            driver.ping(reconnect=False)  # rows of what was no table begin nothing
        except connection.dialect.loaded_dbapi.Error:
            return True  # of a lost connection nothing is known; the statement will say so
    status = transaction_status(driver)
    return status != 0 if status is not None else bool(_is_in_transaction(driver))


def tells_open(connection: Connection) -> bool | None:
    """Whether the driver tells that a transaction is open, just after a statement; None where it does not tell."""
    driver = _driver(connection)
    flags, result = getattr(driver, "server_status", None), getattr(driver, "_result", None)
    if flags is not None and getattr(result, "server_status", None) is None:
        return None  # PyMySQL has them from an earlier statement: this one has returned rows, or failed
    return is_open(driver)


def is_open(driver: Any) -> bool | None:
    """The same of a driver's own connection."""
    status = transaction_status(driver)
    if status is not None:
        return {0: False, 2: True, _FAILED: True}.get(status)  # idle, in one, in one that failed
    return _is_in_transaction(driver)


_FAILED = 3  # of what follows


def transaction_status(driver: Any) -> int | None:
    """What psycopg and psycopg2 tell of a transaction; 0 is "idle", 3 one in which a statement has failed."""
    status = getattr(getattr(driver, "info", None), "transaction_status", None)
    return None if status is None else int(status)


def _is_in_transaction(driver: Any) -> bool | None:
    """What other drivers tell of it; None for nothing."""
    flags = getattr(driver, "server_status", None)
    if isinstance(flags, int):  # of PyMySQL
        return bool(flags & 1)
    told = getattr(driver, "is_in_transaction", None)  # of asyncpg
    if told is not None:
        return None if driver.is_closed() else bool(told())
    try:  # of sqlite3 and MySQL Connector; of pg8000
        found: bool | None = getattr(driver, "in_transaction", getattr(driver, "_in_transaction", None))
    except Exception:  # noqa: BLE001 - a connection that is closed does not tell, and who asks may be in the middle of an error
        return None
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
