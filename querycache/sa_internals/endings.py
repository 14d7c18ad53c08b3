"""What has become of a transaction that was to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import DBAPIError

from querycache.sa_internals.transactions import driver_connection, is_open, transaction_status

__all__ = ["Outcome", "end", "rolls_nothing_back"]

T = TypeVar("T")

Outcome = Literal["over", "open", "unknown"]
"""What has become of a transaction that was to end: it did, as far as shows; it is open still; or the server may be at it
still, as where the connection was lost meanwhile."""


def end(dialect: Dialect, connection: Any, run: Callable[[], T], tell: Callable[[Outcome], None]) -> T:
    """Do what ends a transaction, and tell what has become of it, whatever happens.

    Args:
        connection: of the driver, or its stand-in.
        tell: is called with it.
    """
    try:
        result = run()
    except BaseException as error:
        tell(_outcome(dialect, connection, error))
        raise
    tell(_outcome(dialect, connection, None))
    return result


def _outcome(dialect: Dialect, connection: Any, error: BaseException | None) -> Outcome:
    if isinstance(connection, Connection):  # by whose statements a transaction in two phases ends
        if connection.invalidated:
            return "unknown"
        connection = connection.connection
    if error is None:
        return "over"
    if isinstance(error, DBAPIError):  # where that ends it by statements of SQLAlchemy's own
        error = error.orig
    answered = False
    if isinstance(error, dialect.loaded_dbapi.Error):
        try:
            answered = not dialect.is_disconnect(cast("Any", error), connection, None)
        except (AttributeError, IndexError, ValueError):  # of some, for an error without the usual arguments
            answered = False
        answered = answered and (_is_from_server(dialect, error) or _is_waiting(dialect, connection))
    if not answered:
        return "unknown"
    # SQLite does not end a transaction that it cannot commit, psycopg refuses to within its own transaction(), and SQLAlchemy
    # does not roll back after a commit that failed.
    tells = dialect.name in ("sqlite", "postgresql")
    return "open" if tells and is_open(driver_connection(dialect, connection)) else "over"


def _is_from_server(dialect: Dialect, error: Any) -> bool:
    """False for an error by which a driver itself has given up, as after a timeout; the server may be at it still."""
    if dialect.name == "sqlite":
        return True
    if dialect.name in ("mysql", "mariadb"):
        number = getattr(error, "errno", error.args[0] if error.args else None)
        # From 2000 on they are of the client; and MySQL Connector has a server's number for timeouts of its own.
        of_server = isinstance(number, int) and number >= 1000 and not 2000 <= number < 3000
        return of_server and getattr(error, "sqlstate", "") is not None
    # psycopg, asyncpg's adapter and psycopg2 have None where the server did not say it; others do not tell
    return getattr(error, "sqlstate", getattr(error, "pgcode", "")) is not None


def _is_waiting(dialect: Dialect, connection: Any) -> bool:
    """True where a driver of PostgreSQL tells that its server is not at work, so that it has refused something itself."""
    if dialect.name != "postgresql":
        return False
    # idle, in a transaction, in one that failed
    return transaction_status(driver_connection(dialect, connection)) in (0, 2, 3)


def rolls_nothing_back(dialect: Any, connection: Any) -> bool:
    """True where a transaction is open still: one that was begun by text, on an engine that does not roll back in
    autocommit mode."""
    return (
        getattr(dialect, "skip_autocommit_rollback", False)
        and not isinstance(connection, Connection)  # of two phases
        and is_open(driver_connection(dialect, connection)) is not False
        and dialect.detect_autocommit_setting(connection)
    )
