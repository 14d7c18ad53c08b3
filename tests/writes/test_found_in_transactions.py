"""Writes that were not noticed, or views of the database that were not recognized, for what a transaction shares.

Each was found in review: what several Sessions write on one connection, transactions that are begun, ended or
isolated beneath SQLAlchemy, and connections that a Session is given.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import (
    DDL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    Table,
    create_engine,
    event,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, InvalidRequestError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, Session, mapped_column, sessionmaker
from sqlalchemy.pool import QueuePool

from querycache import QueryCache
from querycache.textual import read_text
from tests.writes.library import Author, Book
from tests.writes.test_pitfalls_e import PRICES, Library, point

EACH = (point(1), point(3), PRICES)
BOOK: Table = Book.__table__  # type: ignore[assignment]


@pytest.fixture
def library(sqlite_engine: Engine) -> Library:
    return Library(sqlite_engine)


@pytest.fixture
def on_postgresql(postgresql_engine: Engine) -> Library:
    return Library(postgresql_engine)


@pytest.fixture
def on_mariadb(mariadb_engine: Engine) -> Library:
    return Library(mariadb_engine)


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest) -> Library:
    """Where a transaction that writes shows in the driver, and where it does not."""
    return Library(request.getfixturevalue(f"{request.param}_engine"))


def check(library: Library, *statements: Any) -> None:
    for statement in statements or EACH:
        assert library.is_right(statement)


# --- several Sessions on one connection -----------------------------------------------------------------


def test_another_sessions_flush_does_not_tell_the_rows_of_this_one(library: Library) -> None:
    library.fill(*EACH)
    with library.engine.begin() as connection, Session(connection) as unattached:
        unattached.get_one(Book, 3).price = 97
        unattached.flush()
        with library.sessions(bind=connection) as attached:
            attached.get_one(Book, 1).price = 98
            attached.flush()
        unattached.commit()
    check(library)


@pytest.mark.parametrize("attached", [True, False])
def test_a_flush_within_a_flush(library: Library, attached: bool) -> None:
    """Of the same table, by an event of the outer one; whichever of the two has the last word."""
    library.fill(*EACH)

    def write_more(mapper: Mapper[Any], connection: Connection, book: Book) -> None:
        if book.id == 3:
            inner = library.sessions(bind=connection) if attached else Session(connection)
            with inner:
                inner.get_one(Book, 1).price = 98
                inner.flush()

    event.listen(Book, "after_update", write_more)
    try:
        with library.sessions.begin() as session:
            session.get_one(Book, 3).price = 97
    finally:
        event.remove(Book, "after_update", write_more)
    check(library)


class Elsewhere(DeclarativeBase):
    pass


class Shelf(Elsewhere):
    __tablename__ = "shelf"
    id: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[int]


def test_two_schemas_in_one_transaction(library: Library) -> None:
    """Written by Sessions that nobody listens to."""
    engine = library.engine
    with engine.connect() as connection:
        connection.exec_driver_sql("ATTACH DATABASE ':memory:' AS other")
        metadata = MetaData()
        for schema in (None, "other"):
            table = Table(
                "shelf",
                metadata,
                Column("id", Integer, primary_key=True),
                Column("place", Integer),
                schema=schema,
            )
            table.create(connection)
            connection.execute(table.insert(), {"id": 1, "place": 0})
        connection.commit()
        maps = [{None: None}, {None: "other"}]

        def ask(schemas: Any) -> str:
            statement = select(Shelf.place).where(Shelf.id == 1)
            with library.sessions(bind=connection.execution_options(schema_translate_map=schemas)) as session:
                return f"{library.outcome(statement, session)}: {library.ask(statement, session)}"

        for each in maps:
            while ask(each) != "hit: [(0,)]":
                pass
        with connection.begin():
            for each in maps:
                with Session(connection.execution_options(schema_translate_map=each)) as session:
                    session.get_one(Shelf, 1).place = 1
                    session.commit()  # not of the connection's transaction
        assert [ask(each) for each in maps] == ["stale fill: [(1,)]"] * 2
        connection.invalidate()


def test_statements_compiled_into_a_cache_of_the_applications_own(library: Library) -> None:
    """They look like those of the unit of work, and change other rows."""
    library.fill(*EACH)
    options: Any = {"compiled_cache": {}}
    with library.sessions.begin() as session:
        book = session.get_one(Book, 1)
        statement = update(BOOK).where(BOOK.c.id == 3).values(price=97)
        session.connection().execute(statement, execution_options=options)
        book.price = 98
    check(library)
    library.fill(*EACH)

    def write_more(mapper: Mapper[Any], connection: Connection, book: Book) -> None:
        statement = update(BOOK).where(BOOK.c.id == 3).values(price=96)
        connection.execute(statement, execution_options=options)

    event.listen(Book, "after_update", write_more)
    try:
        with library.sessions.begin() as session:
            session.get_one(Book, 1).price = 95
    finally:
        event.remove(Book, "after_update", write_more)
    check(library)


# --- connections that a Session is given ----------------------------------------------------------------


class Chooses(Session):
    chosen: Connection

    def get_bind(self, *args: Any, **kwargs: Any) -> Connection:
        return self.chosen


def given(cache: QueryCache, connection: Connection, way: str) -> tuple[Session, dict[str, Any]]:
    """A Session that asks this connection, and the options with which it does."""
    if way == "bind_arguments":
        session, options = Session(), {"bind_arguments": {"bind": connection}}
    elif way == "get_bind":
        session, options = Chooses(), {}
        session.chosen = connection
    elif way == "binds":
        session, options = Session(binds={Book: connection}), {}
    else:
        session, options = Session(connection), {}
    cache.attach(session)
    return session, options


WAYS = ["bind_arguments", "get_bind", "binds", "bind"]


@pytest.mark.parametrize("way", WAYS)
def test_a_given_connections_own_write_is_seen(either: Library, way: str) -> None:
    either.fill(*EACH)
    with either.engine.connect() as connection:
        connection.execute(update(BOOK).values(price=97))
        session, options = given(either.cache, connection, way)
        with session:
            asked = session.execute(PRICES, execution_options={"cache_key": True}, **options)
            assert {price for _, price in asked} == {97}
        connection.rollback()


@pytest.mark.parametrize("way", WAYS)
def test_what_a_given_connection_wrote_unseen_is_not_stored(either: Library, way: str) -> None:
    either.cache.detach(either.engine)
    unseen = QueryCache("memory://", lease=0.01)
    with either.engine.connect() as connection:
        connection.execute(update(BOOK).values(price=97))
        session, options = given(unseen, connection, way)
        with session, unseen.recording() as events:
            for _ in range(5):
                session.execute(PRICES, execution_options={"cache_key": True}, **options).all()
                time.sleep(0.02)  # until the store has its lease behind it
        assert not {"hit", "fill"} & {event.outcome for event in events}
        connection.rollback()


# --- transactions that are begun, isolated or ended beneath SQLAlchemy -----------------------------------


def check_old_view(library: Library, connection: Connection, old: list[Any]) -> None:
    """A transaction that shows the database as it was keeps to itself what it sees, and is told nothing newer."""
    with library.sessions(bind=connection) as session:
        for statement in EACH:
            assert not {"hit", "fill"} & set(library.outcome(statement, session).split())
        assert library.ask(point(1), session) == old != library.database(point(1))
    connection.exec_driver_sql("ROLLBACK")
    check(library)
    library.fill(*EACH)


@pytest.mark.parametrize(
    "begin",
    ["START TRANSACTION", "BEGIN", "START TRANSACTION WITH CONSISTENT SNAPSHOT", "SET autocommit = 0"],
)
def test_a_transaction_begun_by_hand_in_autocommit_mode(on_mariadb: Library, begin: str) -> None:
    on_mariadb.fill(*EACH)
    with on_mariadb.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(begin)
        old = on_mariadb.ask(point(1), on_mariadb.sessions(bind=connection))
        connection.execute(point(1)).all()
        on_mariadb.write(update(BOOK).values(price=97))
        check_old_view(on_mariadb, connection, old)
        connection.exec_driver_sql("SET autocommit = 1")


def test_what_is_written_once_autocommit_is_off_is_known_at_the_commit(on_mariadb: Library) -> None:
    with on_mariadb.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("SET autocommit = 0")
        connection.execute(update(BOOK).values(price=97))
        on_mariadb.fill(*EACH)
        connection.exec_driver_sql("COMMIT")
        check(on_mariadb)
        connection.exec_driver_sql("SET autocommit = 1")


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
@pytest.mark.parametrize("commits", [True, False])
def test_a_given_connection_of_a_further_bind_that_nobody_has_watched(
    request: pytest.FixtureRequest, database: str, commits: bool
) -> None:
    library = Library(request.getfixturevalue(f"{database}_engine"))
    sessions = sessionmaker()
    QueryCache("memory://", lease=0.01).attach(sessions)
    unseen = create_engine(library.engine.url)
    cached = {"cache_key": True}
    for _ in range(5 if commits else 0):  # with a store that has its lease behind it
        with sessions(bind=library.engine) as session:
            session.execute(PRICES, execution_options=cached).all()
        time.sleep(0.02)
    with unseen.connect() as connection:
        connection.execute(update(BOOK).values(price=97))
        with sessions(binds={Author: library.engine, Book: connection}) as session:
            session.execute(select(Author.name), execution_options=cached).all()
            for _ in range(3):
                assert {price for _, price in session.execute(PRICES, execution_options=cached)} == {97}
                time.sleep(0.02)
        (connection.commit if commits else connection.rollback)()
    with sessions(bind=library.engine) as session:
        assert session.execute(PRICES, execution_options=cached).all() == library.database(PRICES)
    unseen.dispose()


def test_two_phases_are_answered_as_one(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    engine = library.engine.execution_options(isolation_level="REPEATABLE READ")
    for outcome in ("miss fill", "hit"):
        with library.sessions(bind=engine, twophase=True) as session:
            session.execute(text("SELECT 1"))
            assert library.outcome(PRICES, session) == outcome


def test_a_ping_by_hand_begins_no_snapshot(mariadb_engine: Engine) -> None:
    library = Library(mariadb_engine)
    engine = create_engine(mariadb_engine.url)
    library.cache.attach(engine)

    def ping(connection: Any, *rest: object) -> None:
        connection.cursor().execute("SELECT 1")

    event.listen(engine, "checkout", ping)
    for outcome in ("miss fill", "hit"):
        with library.sessions(bind=engine) as session:
            session.execute(text("SELECT 1"))
            assert library.outcome(PRICES, session) == outcome
    engine.dispose()


def test_a_transaction_begun_by_hand_that_the_driver_knows_to_be_over(on_mariadb: Library) -> None:
    with on_mariadb.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("START TRANSACTION")
        connection.execute(update(BOOK).values(price=97))
        connection.exec_driver_sql("DROP TABLE IF EXISTS nobody_has_this")  # commits
        on_mariadb.fill(PRICES)
        connection.exec_driver_sql("DELETE FROM tag WHERE id = 99")
        assert on_mariadb.outcome(PRICES) == "hit"
        check(on_mariadb)


def test_a_driver_that_was_told_to_be_serializable(on_postgresql: Library) -> None:
    on_postgresql.fill(*EACH)
    engine = create_engine(on_postgresql.engine.url)
    on_postgresql.cache.attach(engine)

    def tell(connection: Any, record: object) -> None:
        connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE

    event.listen(engine, "connect", tell)
    with on_postgresql.sessions(bind=engine) as session:
        session.execute(text("SELECT 1"))
        for statement in EACH:
            assert on_postgresql.outcome(statement, session) == "bypass snapshot"
    engine.dispose()


def test_a_transaction_of_a_session_that_is_serializable(on_postgresql: Library) -> None:
    on_postgresql.fill(*EACH)
    with on_postgresql.sessions() as session:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        assert on_postgresql.outcome(point(1), session) == "bypass serializable"
    assert on_postgresql.outcome(point(1)) == "hit"


@pytest.mark.parametrize(
    "statement",
    [
        "SET @a = 1",
        "CREATE TEMPORARY TABLE passing (a INTEGER)",
        "DROP TEMPORARY TABLE IF EXISTS passing",
        "CREATE TABLE IF NOT EXISTS book (a INTEGER)",
    ],
)
def test_a_transaction_begun_by_hand_may_go_on_after_what_may_commit(
    on_mariadb: Library, statement: str
) -> None:
    """All but the last do not commit."""
    on_mariadb.fill(*EACH)
    with on_mariadb.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("START TRANSACTION")
        connection.execute(PRICES).all()
        connection.exec_driver_sql(statement)
        on_mariadb.write(update(BOOK).where(BOOK.c.id == 3).values(price=97))
        for each in EACH:
            with on_mariadb.sessions(bind=connection) as session:
                assert on_mariadb.ask(each, session) == list(map(tuple, connection.execute(each)))
        connection.execute(update(BOOK).where(BOOK.c.id == 1).values(price=98))
        on_mariadb.fill(*EACH)
        connection.exec_driver_sql("COMMIT")
        check(on_mariadb)


def raw(connection: Any) -> None:
    """Read something where SQLAlchemy does not see it."""
    cursor = connection.cursor()
    cursor.execute("SELECT count(*) FROM tag")
    cursor.fetchall()
    cursor.close()


def by_a_cursor(engine: Engine) -> Connection:
    connection = engine.connect()
    raw(connection.connection)
    return connection


def at_checkout(engine: Engine) -> Connection:
    event.listen(engine, "checkout", lambda connection, record, proxy: raw(connection))
    return engine.connect()


def at_begin(engine: Engine) -> Connection:
    event.listen(engine, "begin", lambda connection: raw(connection.connection))
    connection = engine.connect()
    connection.begin()
    return connection


@pytest.mark.parametrize("begin", [by_a_cursor, at_checkout, at_begin])
@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
@pytest.mark.parametrize("known", [True, False])
def test_a_snapshot_that_began_where_nobody_saw_it(
    request: pytest.FixtureRequest, database: str, begin: Callable[[Engine], Connection], known: bool
) -> None:
    given: Engine = request.getfixturevalue(f"{database}_engine")
    library = Library(given)
    engine = create_engine(given.url, isolation_level="REPEATABLE READ")
    library.cache.attach(engine)
    if known:  # other transactions of the engine were seen
        with library.sessions(bind=engine) as session:
            session.execute(text("SELECT 1"))
    with begin(engine) as connection:
        old = library.database(point(3))
        library.write(update(BOOK).values(price=97))
        with library.sessions(bind=connection) as session:
            assert library.outcome(point(3), session) == "bypass snapshot"  # and stores nothing
            library.fill(point(3))
            assert library.ask(point(3), session) == old != library.database(point(3))
    check(library)
    engine.dispose()


def test_transactions_that_went_on_before_the_cache_was_attached(postgresql_engine: Engine) -> None:
    other = Library(postgresql_engine)
    engine = create_engine(postgresql_engine.url, isolation_level="REPEATABLE READ")
    cache = QueryCache("memory://", lease=0.01)
    with engine.connect() as one, engine.connect() as two:
        old = one.execute(PRICES).all()
        two.execute(PRICES).all()
        sessions = sessionmaker(engine)
        cache.attach(sessions)
        other.write(update(BOOK).values(price=97))
        for connection in (one, two):
            with sessions(bind=connection) as session, cache.recording() as events:
                assert session.execute(PRICES, execution_options={"cache_key": True}).all() == old
            assert [each.outcome for each in events] == ["bypass"]
    engine.dispose()


@pytest.mark.parametrize("way", ["engine", "engine option", "connection", "server"])
@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_what_is_serializable_is_asked_of_the_database(
    request: pytest.FixtureRequest, database: str, way: str
) -> None:
    """It must see what is read, to refuse what others write beside it."""
    library = Library(request.getfixturevalue(f"{database}_engine"))
    library.fill(*EACH)
    bind: Any = library.engine
    if way == "engine":
        bind = create_engine(bind.url, isolation_level="SERIALIZABLE")
    elif way == "server" and database == "postgresql":
        bind = create_engine(
            bind.url, connect_args={"options": "-c default_transaction_isolation=serializable"}
        )
        bind.connect().close()
    else:
        bind = bind.execution_options(isolation_level="SERIALIZABLE")
    library.cache.attach(bind)
    if way == "connection":
        bind = bind.connect()
    for _ in range(2):
        with library.sessions(bind=bind) as session:
            for statement in EACH:
                assert library.outcome(statement, session) == "bypass serializable"
    if way == "connection":
        bind.close()
    elif way != "engine option":
        bind.dispose()


def test_a_snapshot_of_somebody_else(on_postgresql: Library) -> None:
    engine = on_postgresql.engine.execution_options(isolation_level="REPEATABLE READ")
    with engine.connect() as exporter, engine.connect() as connection:
        name = exporter.exec_driver_sql("SELECT pg_export_snapshot()").scalar_one()
        old = on_postgresql.database(point(1))
        on_postgresql.write(update(BOOK).values(price=97))
        on_postgresql.fill(*EACH)
        connection.exec_driver_sql(f"SET TRANSACTION SNAPSHOT '{name}'")
        check_old_view(on_postgresql, connection, old)


@pytest.mark.parametrize("schema", ["", "pg_catalog."])
def test_an_isolation_level_that_a_function_sets(on_postgresql: Library, schema: str) -> None:
    on_postgresql.fill(*EACH)
    with on_postgresql.engine.connect() as connection:
        setting = f"SELECT {schema}set_config('default_transaction_isolation', 'repeatable read', false)"
        connection.exec_driver_sql(setting)
        connection.commit()
        old = list(map(tuple, connection.execute(point(1))))
        on_postgresql.write(update(BOOK).values(price=97))
        check_old_view(on_postgresql, connection, old)


ISOLATING = [
    ("postgresql", "SET lock_timeout = 0; SET default_transaction_isolation = 'repeatable read'"),
    (
        "postgresql",
        "SET lock_timeout = 0; SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ",
    ),
    ("postgresql", "COMMIT; SET default_transaction_isolation = 'repeatable read'"),
    ("postgresql", "SELECT 1; SET default_transaction_isolation = 'repeatable read'"),
    (
        "postgresql",
        "DO $$ BEGIN PERFORM set_config('default_transaction_isolation', 'repeatable read', false); END $$",
    ),
    ("mariadb", "BEGIN NOT ATOMIC SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ; END"),
    ("mariadb", "EXECUTE IMMEDIATE 'SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ'"),
    ("mariadb", "EXECUTE IMMEDIATE concat('SET SESSION tx_isol', 'ation = \"REPEATABLE-READ\"')"),
    ("mariadb", "/*!50000 SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ */"),
]


@pytest.mark.parametrize("as_ddl", [False, True])
@pytest.mark.parametrize(
    ("database", "sql"),
    [*ISOLATING, ("postgresql", "SET default_transaction_isolation = 'repeatable read'")],
)
def test_an_isolation_level_set_among_other_things(
    request: pytest.FixtureRequest, database: str, sql: str, as_ddl: bool
) -> None:
    library = Library(request.getfixturevalue(f"{database}_engine"))
    committed = library.engine.execution_options(isolation_level="READ COMMITTED")
    library.fill(*EACH)
    with (committed if database == "mariadb" else library.engine).connect() as connection:
        if as_ddl:
            connection.execute(DDL(sql))
        else:
            connection.exec_driver_sql(sql).close()
        connection.commit()
        old = list(map(tuple, connection.execute(point(1))))
        library.write(update(BOOK).values(price=97))
        check_old_view(library, connection, old)
        connection.invalidate()


def test_a_level_set_by_a_statement_that_was_prepared(on_mariadb: Library) -> None:
    on_mariadb.fill(*EACH)
    committed = on_mariadb.engine.execution_options(isolation_level="READ COMMITTED")
    with committed.connect() as connection:
        setting = "PREPARE setting FROM 'SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ'"
        connection.exec_driver_sql(setting)
        connection.exec_driver_sql("EXECUTE setting")
        connection.commit()
        old = list(map(tuple, connection.execute(point(1))))
        on_mariadb.write(update(BOOK).values(price=97))
        check_old_view(on_mariadb, connection, old)
        connection.invalidate()


def test_a_transaction_that_begins_as_another_was_isolated(on_postgresql: Library) -> None:
    on_postgresql.fill(*EACH)
    with on_postgresql.engine.connect() as connection:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.exec_driver_sql("COMMIT AND CHAIN")
        old = list(map(tuple, connection.execute(point(1))))
        on_postgresql.write(update(BOOK).values(price=97))
        check_old_view(on_postgresql, connection, old)
        connection.invalidate()


@pytest.mark.parametrize(
    "sql",
    [
        "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM tag",
        "COMMIT; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM tag",
    ],
)
@pytest.mark.parametrize("as_ddl", [False, True])
def test_a_transaction_begun_among_other_statements(on_postgresql: Library, sql: str, as_ddl: bool) -> None:
    on_postgresql.fill(*EACH)
    with on_postgresql.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if as_ddl:
            connection.execute(DDL(sql))
        else:
            connection.exec_driver_sql(sql).close()
        old = list(map(tuple, connection.execute(point(1))))
        on_postgresql.write(update(BOOK).values(price=97))
        check_old_view(on_postgresql, connection, old)
        connection.invalidate()


@pytest.mark.parametrize(
    "settings",
    [["BEGIN"], ["BEGIN", "COMMIT AND CHAIN"], ["SET completion_type = 1", "BEGIN", "COMMIT"]],
)
def test_a_transaction_of_mariadb_that_goes_on_in_autocommit_mode(
    on_mariadb: Library, settings: list[str]
) -> None:
    on_mariadb.fill(*EACH)
    with on_mariadb.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for each in settings:
            connection.exec_driver_sql(each)
        old = list(map(tuple, connection.execute(point(1))))
        on_mariadb.write(update(BOOK).values(price=97))
        check_old_view(on_mariadb, connection, old)
        connection.invalidate()


@pytest.mark.parametrize(
    ("sql", "begins"),
    [
        ("BEGIN; SELECT 1", True),
        ("SELECT 1; start\n transaction", True),
        ("/* a */ COMMIT; -- b\nBEGIN", True),
        ("BEGIN; UPDATE book SET price = 1; COMMIT AND CHAIN", True),
        ("BEGIN; UPDATE book SET price = 1; ROLLBACK TO SAVEPOINT a", True),
        ("BEGIN; UPDATE book SET price = 1; COMMIT", False),
        ("BEGIN; UPDATE book SET price = 1; ROLLBACK", False),
        ("UPDATE book SET title = '; BEGIN'; SELECT 1", False),
        (
            "CREATE FUNCTION f() RETURNS int AS $$ DECLARE a int; BEGIN RETURN 1; END $$ LANGUAGE plpgsql",
            False,
        ),
        ("BEGIN NOT ATOMIC SELECT 1; SELECT 2; END", False),
    ],
)
def test_several_statements_that_leave_a_transaction_open(sql: str, begins: bool) -> None:
    assert read_text(sql, "postgresql").begins == begins


@pytest.mark.parametrize(
    ("dialect", "sql"),
    [
        ("postgresql", "COMMIT AND NO CHAIN"),
        ("postgresql", "ROLLBACK TO SAVEPOINT a"),
        ("postgresql", "SHOW transaction_isolation"),
        ("postgresql", "SET lock_timeout = 0; SET statement_timeout = 0"),
        ("postgresql", "CREATE EXTENSION pgcrypto"),
        ("mysql", "START TRANSACTION"),
        ("mysql", "CALL close_day()"),
        ("sqlite", "PRAGMA foreign_keys = ON"),
    ],
)
def test_what_isolates_nothing(dialect: str, sql: str) -> None:
    assert not read_text(sql, dialect).isolates


def test_a_connection_that_reads_what_is_not_committed() -> None:
    """Set as text, on a database that connections share."""
    url = "sqlite:///file:shared?mode=memory&cache=shared&uri=true"
    shared = Library(create_engine(url, poolclass=QueuePool))
    shared.fill(*EACH)
    with shared.engine.connect() as writer, shared.sessions() as session:
        session.execute(text("PRAGMA read_uncommitted = 1"))
        writer.execute(update(BOOK).values(price=97))
        shared.cache.invalidate(tables=["book"])
        for statement in EACH:
            assert "fill" not in shared.outcome(statement, session)
        session.rollback()
        for statement in EACH:
            assert "fill" not in shared.outcome(statement, session)
        writer.rollback()
        check(shared)
    shared.engine.dispose()


@pytest.mark.parametrize(
    ("setting", "lasts"),
    [
        ("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", False),
        ("set /* */ local transaction_isolation = 'serializable'", False),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ", True),
        ("SET default_transaction_isolation = 'repeatable read'", True),
    ],
)
def test_an_isolation_level_lasts_as_long_as_it_was_set_for(
    on_postgresql: Library, setting: str, lasts: bool
) -> None:
    """The connection is kept by its pool, and others use it."""
    on_postgresql.fill(*EACH)
    with on_postgresql.engine.connect() as connection:
        with on_postgresql.sessions(bind=connection) as session:
            session.execute(text(setting))
            if lasts:
                session.commit()  # it holds from the next one on
            session.execute(point(2)).all()
            old = on_postgresql.ask(point(1), session)
            on_postgresql.write(update(BOOK).values(price=97))
            assert on_postgresql.ask(point(1), session) == old != on_postgresql.database(point(1))
        connection.rollback()
        on_postgresql.fill(*EACH)
        with on_postgresql.sessions(bind=connection) as session:
            session.execute(select(literal(1))).all()
            old = on_postgresql.ask(point(1), session)
            on_postgresql.write(update(BOOK).values(price=98))
            newest = on_postgresql.database(point(1))
            assert on_postgresql.ask(point(1), session) == (old if lasts else newest)
            on_postgresql.fill(point(1))
            outcome = on_postgresql.outcome(point(1), session)
            assert outcome == ("bypass snapshot" if lasts else "hit")
        connection.invalidate()


@pytest.mark.parametrize("how", ["result", "yield_per", "core", "raw"])
@pytest.mark.parametrize("begun", [False, True])
def test_beside_an_open_result_sqlite_shows_what_was_there_when_it_began(
    library: Library, how: str, begun: bool
) -> None:
    with library.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        numbers = [{"id": number, "name": "x" * 40} for number in range(100, 3_000)]
        connection.execute(insert(Author), numbers)
        connection.commit()
    library.fill(*EACH)
    every: Any = select(Author.__table__)
    with library.sessions() as session:
        if begun:
            session.connection()
        if how == "result":
            rows: Any = session.execute(every)
        elif how == "yield_per":
            rows = session.execute(select(Author), execution_options={"yield_per": 10})
        elif how == "core":
            rows = session.connection().execute(every)
        else:
            rows = session.connection().connection.cursor().execute("SELECT * FROM author")
        rows.fetchone()
        library.write(update(BOOK).values(price=97))
        for statement in EACH:
            assert library.outcome(statement, session) == "bypass snapshot"
        check(library)
    # and so does its connection when it serves others, unless the result is closed
    for _ in range(10):
        with library.cache.recording() as events:
            prices = [row[2] for row in library.ask(point(1))]
        assert prices == [97] or events[-1].reason == "snapshot"
    rows.close()
    check(library)
    library.fill(*EACH)


def test_a_result_that_was_read_or_closed_leaves_no_old_view(library: Library) -> None:
    library.fill(*EACH)
    with library.sessions() as session:
        session.execute(select(Author.id)).all()
        session.execute(select(Author.id)).close()
        assert library.outcome(PRICES, session) == "hit"


@pytest.mark.parametrize("isolation_level", [None, "AUTOCOMMIT"])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("textual", [False, True])
def test_a_savepoint_that_is_the_transaction_on_sqlite(
    library: Library, isolation_level: Any, inner: bool, textual: bool
) -> None:
    """Its RELEASE commits, and what comes before it does not."""
    library.fill(*EACH)
    options: Any = {"isolation_level": isolation_level} if isolation_level else {}
    with library.engine.connect().execution_options(**options) as connection:
        if textual:
            connection.exec_driver_sql("SAVEPOINT a")
            if inner:
                connection.exec_driver_sql("SAVEPOINT b")
                connection.execute(update(BOOK).where(BOOK.c.id == 1).values(price=96))
                connection.exec_driver_sql("RELEASE b")
            connection.execute(update(BOOK).where(BOOK.c.id == 3).values(price=97))
            library.fill(*EACH)
            connection.exec_driver_sql("RELEASE SAVEPOINT a")
        else:
            with connection.begin_nested():
                if inner:
                    with connection.begin_nested():
                        connection.execute(update(BOOK).where(BOOK.c.id == 1).values(price=96))
                connection.execute(update(BOOK).where(BOOK.c.id == 3).values(price=97))
                library.fill(*EACH)
        check(library)
        connection.rollback()
    check(library)


@pytest.mark.parametrize("between", [" ", " -- done\n", " /* done;\n */ -- really\n\t"])
def test_a_commit_after_a_comment(on_postgresql: Library, between: str) -> None:
    on_postgresql.fill(*EACH)
    with on_postgresql.engine.connect() as connection:
        connection.exec_driver_sql(f"UPDATE book SET price = 97;{between}COMMIT")
        connection.rollback()
    check(on_postgresql)


# --- engines ----------------------------------------------------------------------------------------------


def test_a_watched_engine_is_not_kept_alive(tmp_path: Path) -> None:
    """An application may make one for each tenant, or for each test."""
    cache = QueryCache("memory://", lease=0.01)
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
    library = Library(engine)
    cache.attach(engine).attach(library.sessions)
    library.fill(*EACH)
    with library.sessions.begin() as session:
        session.get_one(Book, 1).price = 97
    with library.sessions() as session:
        session.connection().exec_driver_sql("BEGIN")
        library.ask(PRICES, session)
    engine.dispose()
    kept = weakref.ref(engine)
    del engine, library, session
    gc.collect()
    assert kept() is None
    other = create_engine("sqlite://")
    assert cache.attach(other).detach(other) is cache


def test_a_session_that_is_attached_after_its_flush(library: Library) -> None:
    library.fill(*EACH)
    library.cache.detach(library.engine)
    with Session(library.engine) as session:
        session.get_one(Book, 1).price = 97
        session.flush()
        library.cache.attach(session)
        session.commit()
    check(library)


def test_a_raw_cursors_write_that_is_made_known_is_not_stored(library: Library) -> None:
    """As the README says."""
    library.fill(*EACH)
    with library.sessions() as session:
        session.connection().connection.cursor().execute("UPDATE book SET price = 97")
        library.cache.invalidate(tables=["book"], session=session)
        for statement in EACH:
            assert library.outcome(statement, session) == "bypass own write"
        session.rollback()
    check(library)


# --- what a hit must not keep from the database ------------------------------------------------------------


def same_left(library: Library, act: Callable[[Connection, Any], object]) -> bool:
    """True if what is done on a connection leaves the same whether the statement that it is given is answered or not."""
    authors = select(Author.id)
    library.fill(authors)
    left = []
    for statement in (authors.execution_options(cache_key=True), authors):
        with library.engine.connect() as connection:
            act(connection, statement)
        left.append(library.ask(point(1)))
        library.write(update(Book).values(price=10))
    return bool(left[0] == left[1])


@pytest.mark.parametrize(
    "mode", ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]
)
def test_a_transaction_that_a_session_has_only_hit_in_is_rolled_back(either: Library, mode: Any) -> None:
    """Where it was given a connection whose transaction began outside, as it is without a cache."""

    def act(connection: Connection, statement: Any) -> None:
        outer = connection.begin()
        with either.sessions(bind=connection, join_transaction_mode=mode) as session:
            session.get_one(Book, 1).price = 99
            session.commit()
            session.execute(statement).all()
            session.rollback()
        if outer.is_active:
            outer.commit()

    assert same_left(either, act)


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_hit_begins_the_transaction_of_a_given_connection(either: Library, end: str) -> None:
    """Or else what Core writes beside it is lost by the Session's commit(), and kept by its rollback()."""

    def act(connection: Connection, statement: Any) -> None:
        session = either.sessions(bind=connection)
        session.execute(statement).all()
        assert connection.in_transaction()
        connection.execute(update(Book).where(Book.id == 1).values(price=99))
        getattr(session, end)()
        assert not connection.in_transaction()

    assert same_left(either, act)


@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only", "control_fully"])
def test_a_hit_in_a_savepoint_joins_what_is_around_it(either: Library, mode: Any) -> None:
    def act(connection: Connection, statement: Any) -> None:
        outer = connection.begin()
        connection.execute(update(Book).where(Book.id == 1).values(price=99))
        with either.sessions(bind=connection, join_transaction_mode=mode) as session:
            with session.begin_nested():
                session.execute(statement).all()
            session.rollback()
        if outer.is_active:
            outer.commit()

    assert same_left(either, act)


def test_a_transaction_of_two_phases_is_begun_on_a_given_connection(on_postgresql: Library) -> None:
    def act(connection: Connection, statement: Any) -> None:
        with on_postgresql.sessions(bind=connection, twophase=True) as session:
            session.execute(statement).all()
            connection.execute(update(Book).where(Book.id == 1).values(price=99))
            session.commit()

    assert same_left(on_postgresql, act)


def test_a_hit_joins_a_transaction_without_a_statement(either: Library) -> None:
    """But not where that takes a savepoint."""
    authors = select(Author.id)
    either.fill(authors)
    sent: list[str] = []
    event.listen(either.engine, "before_cursor_execute", lambda *given: sent.append(given[2]))
    with either.engine.connect() as connection, connection.begin():
        for mode in ("conditional_savepoint", "create_savepoint"):
            with either.sessions(bind=connection, join_transaction_mode=mode) as session:
                assert either.outcome(authors, session) == "hit"
    assert sent == []


def test_a_savepoint_that_is_over_before_its_block_is(either: Library) -> None:
    authors = select(Author.id)
    either.fill(authors)
    for cached in (True, False):
        with (
            either.engine.connect() as connection,
            connection.begin(),
            either.sessions(bind=connection, join_transaction_mode="rollback_only") as session,
            connection.begin_nested() as nested,
        ):
            nested.rollback()
            with pytest.raises(InvalidRequestError, match="closed transaction"):
                session.execute(authors.execution_options(cache_key=cached or None))


@pytest.mark.parametrize("how", ["aborted", "invalidated"])
def test_what_the_database_would_refuse_on_a_given_connection(on_postgresql: Library, how: str) -> None:
    authors = select(Author.id)
    on_postgresql.fill(authors)
    errors = []
    for cached in (True, False):
        with on_postgresql.engine.connect() as connection:
            connection.begin()
            if how == "aborted":
                with pytest.raises(DBAPIError):
                    connection.execute(text("SELECT 1 / 0"))
            else:
                connection.invalidate()
            with on_postgresql.sessions(bind=connection) as session:
                with pytest.raises(SQLAlchemyError) as error:
                    session.execute(authors.execution_options(cache_key=cached or None)).all()
                errors.append(error.type)
    assert errors[0] is errors[1]


@pytest.mark.filterwarnings("ignore:transaction already deassociated")
@pytest.mark.parametrize("how", ["aborted", "invalidated", "closed"])
def test_what_the_database_would_refuse_is_not_answered(on_postgresql: Library, how: str) -> None:
    authors = select(Author.id)
    on_postgresql.fill(authors)
    errors = []
    for cached in (True, False):
        with on_postgresql.sessions() as session:
            connection = session.connection()
            if how == "aborted":
                with pytest.raises(DBAPIError):
                    session.execute(text("SELECT 1 / 0"))
            elif how == "invalidated":
                connection.invalidate()
            else:
                connection.close()
            with pytest.raises(SQLAlchemyError) as error:
                session.execute(authors.execution_options(cache_key=cached or None)).all()
            errors.append(error.type)
            with suppress(SQLAlchemyError):
                session.rollback()
    assert errors[0] is errors[1]
