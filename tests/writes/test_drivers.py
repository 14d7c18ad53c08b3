"""What drivers tell of their transactions, each in its own way; those that are not installed here are imitated."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import Connection, create_engine, event, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import sessionmaker

from querycache import QueryCache, sa_internals
from querycache.sa_internals import endings
from tests.writes.test_endings import Child, Parent, Tree, ask


def connection_of(driver: Any, adapter: Any = None, dialect: str = "postgresql") -> Connection:
    """A connection by a driver, or what stands in for one; with the adapter that SQLAlchemy puts before it."""
    pooled = SimpleNamespace(dbapi_connection=driver if adapter is None else adapter)
    shown = SimpleNamespace(
        name=dialect, is_async=adapter is not None, get_driver_connection=lambda connection: driver
    )
    return cast(
        "Connection",
        SimpleNamespace(connection=pooled, dialect=shown, _is_autocommit_isolation=lambda: False),
    )


class Asyncpg:
    def __init__(self, is_open: bool = False, is_closed: bool = False) -> None:
        self._is_open, self._is_closed = is_open, is_closed

    def is_closed(self) -> bool:
        return self._is_closed

    def is_in_transaction(self) -> bool:
        assert not self._is_closed  # it raises AttributeError
        return self._is_open


@pytest.mark.parametrize(
    ("driver", "started", "commits"),
    [
        (Asyncpg(), False, False),
        (Asyncpg(is_open=True), True, False),
        (Asyncpg(), True, True),
        (Asyncpg(is_closed=True), True, False),
    ],
    ids=["new", "open", "ended", "lost"],
)
@pytest.mark.parametrize("notes_it", [True, False], ids=["2.0", "2.1"])
def test_asyncpg_begins_nothing_once_its_transaction_was_ended_by_text(
    driver: Asyncpg, started: bool, commits: bool, notes_it: bool
) -> None:
    adapter = SimpleNamespace(autocommit=False, _transaction=object() if started or notes_it else None)
    if notes_it:
        adapter._started = started
    assert sa_internals.is_autocommit(connection_of(driver, adapter)) is commits


@pytest.mark.parametrize("is_open", [True, False])
def test_pg8000_tells_of_a_transaction_that_a_raw_cursor_has_begun(is_open: bool) -> None:
    connection = connection_of(SimpleNamespace(autocommit=False, _in_transaction=is_open))
    assert sa_internals.has_begun(connection) is is_open
    assert sa_internals.tells_open(connection) is is_open
    assert not sa_internals.is_autocommit(connection)


def test_aiosqlite_does_not_end_a_transaction_that_it_cannot_commit(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/x.db")
    Tree.metadata.create_all(engine)
    factory = sessionmaker(engine)

    async def write() -> None:
        asynchronous = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/x.db")

        def enforce(connection: Any, record: object) -> None:
            connection.execute("PRAGMA foreign_keys = ON")

        event.listen(asynchronous.sync_engine, "connect", enforce)
        QueryCache("memory://", lease=0.01).attach(factory).attach(asynchronous.sync_engine)
        assert ask(factory) == ask(factory) == []
        async with asynchronous.connect() as connection:
            await connection.execute(insert(Child).values(id=1, parent=9))
            with pytest.raises(IntegrityError):
                await connection.commit()
            await connection.rollback()
            assert ask(factory) == ask(factory) == []
            await connection.execute(insert(Parent).values(id=9))
            await connection.commit()
        await asynchronous.dispose()

    asyncio.run(write())
    with engine.connect() as connection:
        assert ask(factory) == list(connection.scalars(select(Child.id))) == [1]
    engine.dispose()


@pytest.mark.parametrize("closed", [False, True])
def test_aiosqlite_tells_of_a_transaction_while_it_is_open(closed: bool) -> None:
    async def look() -> None:
        engine = create_async_engine("sqlite+aiosqlite://")
        async with engine.connect() as connection:
            sync = cast("Connection", connection.sync_connection)
            assert not sa_internals.in_transaction(sync)
            await connection.exec_driver_sql("BEGIN")
            assert sa_internals.in_transaction(sync) and sa_internals.has_begun(sync)
            if closed:
                await (await connection.get_raw_connection()).driver_connection.close()  # type: ignore[union-attr]
                assert sa_internals.tells_open(sync) is None
                await connection.invalidate()
        await engine.dispose()

    asyncio.run(look())


class PyMySQL(Exception):
    pass


class MySQLConnector(Exception):
    def __init__(self, errno: int, sqlstate: str | None) -> None:
        super().__init__(errno, "message", sqlstate)
        self.errno, self.sqlstate = errno, sqlstate


class Psycopg(Exception):
    def __init__(self, sqlstate: str | None) -> None:
        super().__init__("message")
        self.sqlstate = sqlstate


class Psycopg2(Exception):
    def __init__(self, pgcode: str | None) -> None:
        super().__init__("message")
        self.pgcode = pgcode


class Pg8000(Exception):
    pass


@pytest.mark.parametrize(
    ("dialect", "error", "outcome"),
    [
        ("mysql", PyMySQL(1213, "Deadlock found when trying to get lock"), "over"),
        ("mysql", PyMySQL(2013, "Lost connection"), "unknown"),
        ("mysql", PyMySQL(0, ""), "unknown"),
        ("mysql", PyMySQL("Packet sequence number wrong"), "unknown"),
        ("mysql", PyMySQL(), "unknown"),
        ("mariadb", MySQLConnector(1213, "40001"), "over"),
        ("mariadb", MySQLConnector(3024, "HY000"), "over"),
        ("mariadb", MySQLConnector(3024, None), "unknown"),
        ("mariadb", MySQLConnector(2013, "HY000"), "unknown"),
        ("mariadb", MySQLConnector(-1, None), "unknown"),
        ("postgresql", Psycopg("40P01"), "over"),
        ("postgresql", Psycopg(None), "unknown"),
        ("postgresql", Psycopg2("40P01"), "over"),
        ("postgresql", Psycopg2(None), "unknown"),
        ("postgresql", Pg8000({"S": "ERROR", "C": "40P01"}), "over"),
    ],
    ids=str,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_driver_says_itself_is_no_answer_of_the_server(
    dialect: str, error: Exception, outcome: str, wrapped: bool
) -> None:
    shown: Any = SimpleNamespace(
        name=dialect,
        loaded_dbapi=SimpleNamespace(Error=type(error)),
        is_disconnect=lambda *arguments: False,
    )
    raised = DBAPIError("COMMIT", None, error) if wrapped else error
    assert endings._outcome(shown, SimpleNamespace(dbapi_connection=None), raised) == outcome
