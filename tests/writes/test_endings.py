"""What becomes of a transaction that was to end: it did, it is open still, or nobody knows."""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, ForeignKey, create_engine, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool, StaticPool

from querycache import QueryCache, sa_internals
from querycache.sa_internals import endings
from tests.writes.library import Author, Book
from tests.writes.test_pitfalls_e import AUTHORS, PRICES, RAISE_PRICE, Library, check_unknown_outcome, naive

UP = "UPDATE book SET price = price + 1"


class Tree(DeclarativeBase):
    pass


class Parent(Tree):
    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True)


class Child(Tree):
    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int] = mapped_column(ForeignKey("parent.id", deferrable=True, initially="DEFERRED"))


def lose(connection: Connection, after: float) -> threading.Thread:
    """Have the network of a connection of PostgreSQL break in a while."""
    number = os.dup(connection.connection.driver_connection.fileno())  # type: ignore[union-attr]

    def shut() -> None:
        time.sleep(after)
        with socket.socket(fileno=number) as wire:
            wire.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=shut)
    thread.start()
    return thread


def wait_for(library: Library, price: int) -> None:
    """Until the database has done what it was asked to."""
    deadline = time.monotonic() + 20
    while library.database(select(Book.price).where(Book.id == 2)) != [(price,)]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def as_if_over(*_: object) -> str:
    return "over"


# --- the server may be at it still ---------------------------------------------------------------------------


def check_commit_that_goes_on(library: Library) -> None:
    library.write(update(Book).values(price=1))
    library.fill(PRICES)
    with library.sessions() as session:
        session.execute(RAISE_PRICE)
        thread = lose(session.connection(), 0.1)
        with pytest.raises(DBAPIError):
            session.commit()
        thread.join()
    library.ask(PRICES)
    library.ask(PRICES)  # a hit, where somebody takes the COMMIT for over
    wait_for(library, 77)
    assert library.is_right(PRICES)


def test_a_commit_that_goes_on_when_its_connection_is_lost(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    with postgresql_engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_sleep(CASE WHEN NEW.price = 77 THEN 1 ELSE 0 END); RETURN NULL; END $$"
        )
        connection.exec_driver_sql(
            "CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON book DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION slowly()"
        )
    check_commit_that_goes_on(library)
    with naive(endings, "_outcome", as_if_over):
        check_commit_that_goes_on(Library(postgresql_engine))


def check_statement_that_goes_on(library: Library, gives_up: Engine) -> None:
    library.cache.attach(gives_up)
    library.fill(PRICES)
    with library.engine.connect() as holder:
        holder.execute(select(Book.id).with_for_update()).all()
        with gives_up.connect() as connection:
            if gives_up.dialect.name == "postgresql":
                lose(connection, 0.3)
            with pytest.raises(DBAPIError):
                connection.execute(RAISE_PRICE)
        library.ask(PRICES)
        library.ask(PRICES)
    wait_for(library, 77)
    assert library.is_right(PRICES)


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_a_statement_that_goes_on_when_its_client_has_given_up(
    request: pytest.FixtureRequest, database: str
) -> None:
    engine: Engine = request.getfixturevalue(f"{database}_engine")
    arguments: dict[str, Any] = {"connect_args": {"read_timeout": 1}} if database == "mariadb" else {}
    gives_up = create_engine(engine.url, isolation_level="AUTOCOMMIT", **arguments)
    check_statement_that_goes_on(Library(engine), gives_up)
    with engine.begin() as connection:
        connection.execute(update(Book).values(price=1))
    with naive(endings, "_outcome", as_if_over):
        check_statement_that_goes_on(Library(engine), gives_up)
    gives_up.dispose()


def test_after_a_lease_such_a_commit_is_taken_for_over(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine, lease=0.2)
    check_unknown_outcome(library)
    deadline = time.monotonic() + 20
    while library.outcome(PRICES) != "hit":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert library.is_right(PRICES)


def test_what_was_prepared_before_is_committed_by_a_process_that_knows_nothing_of_it(
    postgresql_engine: Engine,
) -> None:
    library = Library(postgresql_engine, lease=0.1)
    with postgresql_engine.connect() as connection:
        transaction = connection.begin_twophase("lost")
        connection.execute(RAISE_PRICE)
        transaction.prepare()
        connection.invalidate()
    deadline = time.monotonic() + 20
    while library.outcome(PRICES) != "hit":  # the marks have healed
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with postgresql_engine.connect() as connection:
        connection.commit_prepared("lost", recover=True)
    assert library.database(select(Book.price).where(Book.id == 2)) == [(77,)]
    assert library.is_right(PRICES)


# --- it is open still ----------------------------------------------------------------------------------------


@pytest.fixture
def tree(sqlite_engine: Engine) -> Any:
    Tree.metadata.create_all(sqlite_engine)
    factory = sessionmaker(sqlite_engine)
    cache = QueryCache("memory://").attach(factory)
    with factory.begin() as session:
        session.add(Parent(id=1))
    return sqlite_engine, cache, factory


def ask(factory: Any) -> list[int]:
    with factory() as session:
        return list(session.scalars(select(Child.id).execution_options(cache_key=True)))


@pytest.mark.parametrize("joined", [False, True])
def test_sqlite_does_not_end_a_transaction_that_it_cannot_commit(tree: Any, joined: bool) -> None:
    """And SQLAlchemy does not roll back after it, so that the next COMMIT commits it."""
    engine, _, factory = tree

    def write(connection: Connection, statement: Any) -> None:
        if joined:
            with factory(bind=connection, join_transaction_mode="control_fully") as session:
                session.execute(statement)
                session.commit()
        else:
            connection.execute(statement)
            connection.commit()

    with engine.connect() as connection:
        with pytest.raises(IntegrityError):
            write(connection, insert(Child).values(id=1, parent=9))
        connection.rollback()
        assert ask(factory) == ask(factory) == []
        write(connection, insert(Parent).values(id=9))
    assert ask(factory) == [1]


def test_what_sqlite_could_not_commit_is_not_stored() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")
    Tree.metadata.create_all(engine)
    factory = sessionmaker(engine)
    QueryCache("memory://").attach(factory)
    session = factory()
    session.execute(insert(Child).values(id=1, parent=9))
    with pytest.raises(IntegrityError):
        session.commit()
    ask(factory)  # on the same connection, to which the row is there
    session.rollback()
    assert ask(factory) == []
    engine.dispose()


class AlwaysOpen(sqlite3.Connection):
    """As where Python's driver is told ``autocommit=False``: the next transaction is begun when one ends."""

    def commit(self) -> None:
        super().commit()
        self.execute("BEGIN")

    def rollback(self) -> None:
        super().rollback()
        self.execute("BEGIN")


def test_what_was_written_is_forgotten_where_sqlite_always_has_a_transaction_open(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/x.db", connect_args={"factory": AlwaysOpen})
    Tree.metadata.create_all(engine)
    factory = sessionmaker(engine)
    QueryCache("memory://").attach(factory)
    for end in ("commit", "rollback"):
        with engine.connect() as connection:
            connection.execute(insert(Parent))
            assert connection.info
            getattr(connection, end)()
            assert not connection.info
    engine.dispose()


ON_BOTH = [
    ["BEGIN", UP, "COMMIT AND CHAIN", UP, "?", "COMMIT"],
    ["BEGIN", UP, "ROLLBACK AND CHAIN", UP, "?", "COMMIT"],
]
BY_TEXT = {
    "postgresql": [
        *ON_BOTH,
        [f"BEGIN; {UP}", "?", "COMMIT"],
        [f"{UP}; BEGIN; {UP}", "?", "COMMIT"],
        ["BEGIN", UP, f"COMMIT; BEGIN; {UP}", "?", "COMMIT"],
        ["SELECT 1; BEGIN", UP, "?", "COMMIT"],
        ["BEGIN; SAVEPOINT x", UP, "?", "RELEASE x", "?", "COMMIT"],
        ["BEGIN", UP, "ABORT AND CHAIN", UP, "?", "END"],
    ],
    "mariadb": [
        *ON_BOTH,
        [
            "SET completion_type = 1",
            "BEGIN",
            UP,
            "COMMIT",
            UP,
            "?",
            "COMMIT",
            "SET completion_type = 0",
            "COMMIT",
        ],
    ],
}


def check_steps(library: Library, steps: list[str]) -> None:
    """In autocommit mode; at each "?" somebody reads what is committed so far, and stores it."""
    library.fill(PRICES)
    with library.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for step in steps:
            if step == "?":
                library.ask(PRICES)
                library.ask(PRICES)
            else:
                connection.exec_driver_sql(step)
        assert library.is_right(PRICES)
    assert library.is_right(PRICES)


@pytest.mark.parametrize(
    ("database", "steps"), [(database, steps) for database, each in BY_TEXT.items() for steps in each]
)
def test_a_transaction_that_a_text_has_left_open_in_autocommit_mode(
    request: pytest.FixtureRequest, database: str, steps: list[str]
) -> None:
    check_steps(Library(request.getfixturevalue(f"{database}_engine")), steps)


@pytest.mark.parametrize("steps", [*ON_BOTH, ["BEGIN", UP, "COMMIT", UP, "?"]])
def test_a_driver_that_does_not_tell_whether_a_transaction_is_open(
    mariadb_engine: Engine, monkeypatch: pytest.MonkeyPatch, steps: list[str]
) -> None:
    monkeypatch.setattr(sa_internals, "tells_open", lambda connection: None)
    check_steps(Library(mariadb_engine), steps)


def lose_a_deadlock(library: Library, connection: Connection, statement: Any) -> None:
    """Have a statement of a transaction that holds book 1 wait for book 2, whose holder waits for book 1."""
    with library.engine.connect() as other, ThreadPoolExecutor() as thread:
        # a transaction that has changed more is not the one to be given up
        other.execute(update(Book).where(Book.id > 1).values(title="other"))
        waits = thread.submit(other.execute, update(Book).where(Book.id == 1).values(title="other"))
        time.sleep(0.3)
        with pytest.raises(DBAPIError, match="1213"):
            connection.execute(statement)
        waits.result()
        other.rollback()


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_a_deadlock_ends_a_transaction_that_was_begun_by_hand(
    mariadb_engine: Engine, monkeypatch: pytest.MonkeyPatch, reads: bool, tells: bool
) -> None:
    if not tells:
        monkeypatch.setattr(sa_internals, "tells_open", lambda connection: None)
    library = Library(mariadb_engine)
    library.fill(PRICES)
    of_the_other = select(Book.id).where(Book.id == 2).with_for_update()
    statement = of_the_other if reads else update(Book).where(Book.id == 2).values(title="own")
    with mariadb_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("START TRANSACTION"))
        connection.execute(update(Book).where(Book.id == 1).values(title="own"))
        lose_a_deadlock(library, connection, statement)
        connection.execute(update(Book).values(price=97))
        assert library.is_right(PRICES)
        connection.execute(update(Book).values(price=98))
        assert library.is_right(PRICES)
    assert library.is_right(PRICES)


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_a_transaction_that_was_begun_by_hand_goes_on_after_an_error(
    request: pytest.FixtureRequest, database: str
) -> None:
    library = Library(request.getfixturevalue(f"{database}_engine"))
    library.fill(PRICES)
    with library.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for step in ("BEGIN", UP, "SAVEPOINT x"):
            connection.exec_driver_sql(step)
        with pytest.raises(IntegrityError):
            connection.execute(insert(Author).values(id=1, name="again"))
        for step in ("ROLLBACK TO SAVEPOINT x", UP, UP):
            connection.exec_driver_sql(step)
        library.fill(PRICES)
        connection.exec_driver_sql("COMMIT")
        assert library.is_right(PRICES)
    assert library.is_right(PRICES)


AUTHOR_OF_2 = select(Book.author_id).where(Book.id == 2)
SKIPS: dict[str, Any] = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True, "pool_size": 1}


@pytest.mark.parametrize("ends", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_a_transaction_begun_by_text_that_is_not_rolled_back_in_autocommit_mode(
    request: pytest.FixtureRequest, database: str, ends: str
) -> None:
    """The next user of its connection is in it still."""
    library = Library(request.getfixturevalue(f"{database}_engine"))
    library.fill(PRICES)
    engine = create_engine(library.engine.url, **SKIPS)
    sessions = sessionmaker(engine)
    library.cache.attach(engine).attach(sessions)
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql(UP)
        connection.exec_driver_sql("UPDATE book SET author_id = 3 WHERE id = 2")
    library.fill(PRICES)
    with sessions() as session:
        library.ask(AUTHOR_OF_2, session)  # which nobody has stored, and which it must not
        assert library.ask(PRICES, session) == session.connection().execute(PRICES).all()
    assert library.is_right(PRICES)
    assert library.is_right(AUTHOR_OF_2)
    with engine.connect() as connection:
        connection.exec_driver_sql(ends)
    assert library.is_right(PRICES)
    engine.dispose()


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_nothing_is_kept_of_what_was_over_before_a_rollback_was_left_out(
    request: pytest.FixtureRequest, database: str
) -> None:
    library = Library(request.getfixturevalue(f"{database}_engine"))
    engine = create_engine(library.engine.url, **SKIPS)
    sessions = sessionmaker(engine)
    library.cache.attach(engine).attach(sessions)
    for steps in ([UP], ["BEGIN", UP, "COMMIT"], ["BEGIN", UP, "ROLLBACK"]):
        with engine.connect() as connection:
            for step in steps:
                connection.exec_driver_sql(step)
        assert library.is_right(PRICES)
        library.fill(PRICES)
        with sessions() as session:
            assert library.outcome(PRICES, session) == "hit"
    engine.dispose()


def test_a_commit_by_text_of_what_was_to_be_prepared(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    library.fill(PRICES)
    with postgresql_engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(RAISE_PRICE)
        connection.exec_driver_sql("COMMIT")
        transaction.rollback()
    assert library.database(select(Book.price).where(Book.id == 2)) == [(77,)]
    assert library.is_right(PRICES)


def test_a_session_in_two_phases_that_was_committed_by_text(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    library.fill(PRICES)
    engine = create_engine(postgresql_engine.url, poolclass=NullPool)
    library.cache.attach(engine)
    # as without the cache: psycopg can neither prepare it nor roll it back
    with pytest.raises(DBAPIError), library.sessions(bind=engine, twophase=True) as session:
        session.execute(RAISE_PRICE)
        session.execute(text("COMMIT"))
        session.commit()
    assert library.is_right(PRICES)


# --- what is named by hand -----------------------------------------------------------------------------------


def test_what_is_named_by_hand_in_autocommit_mode_changes_at_the_commit(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    library.fill(PRICES)
    autocommit = postgresql_engine.execution_options(isolation_level="AUTOCOMMIT")
    with library.sessions(bind=autocommit) as session:
        session.execute(text("SELECT 1"))
        library.cache.invalidate(tables=["book"], session=session)
        session.execute(update(Author).values(name="x"))  # commits, and not what was named
        library.fill(PRICES)
        session.connection().connection.cursor().execute(UP)  # of which nobody tells
        session.commit()
    assert library.is_right(
        PRICES,
    )
    assert library.is_right(AUTHORS)


def test_what_is_named_by_hand_is_about_any_of_a_sessions_databases(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    library.fill(PRICES)
    with (
        postgresql_engine.connect() as given,
        library.sessions(binds={Author: given, Book: postgresql_engine}) as session,
    ):
        session.execute(select(Author.id))
        raw = session.connection(bind_arguments={"mapper": Book}).connection
        raw.cursor().execute(UP)
        library.cache.invalidate(tables=["book"], session=session)
        session.commit()
        given.rollback()
    assert library.is_right(PRICES)


# --- what a driver does by itself ------------------------------------------------------------------------------


def test_a_COMMIT_that_psycopg_refuses_leaves_the_transaction_open(postgresql_engine: Engine) -> None:
    library = Library(postgresql_engine)
    engine = create_engine(postgresql_engine.url, pool_size=1)
    library.cache.attach(engine)
    library.fill(PRICES)
    with library.sessions(bind=engine) as session:
        session.execute(RAISE_PRICE)
        driver: Any = session.connection().connection.driver_connection
        with driver.transaction(), pytest.raises(DBAPIError, match="forbidden"):
            session.commit()
    library.fill(PRICES)
    with library.sessions(bind=engine) as session:  # gets it as it was left
        session.add(Author(id=50, name="x"))
        session.commit()
    assert library.database(select(Book.price).where(Book.id == 2)) == [(77,)]
    assert library.is_right(PRICES)
    engine.dispose()


@pytest.mark.parametrize("how", ["ANALYZE TABLE book", "OPTIMIZE TABLE book", "CHECK TABLE book"])
def test_what_commits_and_returns_rows(mariadb_engine: Engine, how: str) -> None:
    """PyMySQL goes on to tell of the transaction that is over."""
    library = Library(mariadb_engine)
    with library.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql(UP)
        connection.exec_driver_sql(how).all()
        assert library.is_right(PRICES)
        library.fill(PRICES)
        connection.exec_driver_sql(UP)
        assert library.is_right(PRICES)
    assert library.is_right(PRICES)


def test_a_connection_that_somebody_has_closed(sqlite_engine: Engine) -> None:
    """The application is told what it would be told without the cache."""
    library = Library(sqlite_engine)
    with library.sessions() as session:
        session.execute(RAISE_PRICE)
        driver: Any = session.connection().connection.driver_connection
        driver.close()
        with pytest.raises(ProgrammingError, match="closed"):
            session.execute(RAISE_PRICE)
