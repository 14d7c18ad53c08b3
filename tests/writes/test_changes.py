"""What a statement changes is remembered with its compiled form, and found anew where it is not the same any more."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    create_engine,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column, sessionmaker
from sqlalchemy.pool import StaticPool

from querycache import QueryCache, changes, sa_internals, writes
from tests.writes.library import Book
from tests.writes.test_pitfalls_e import Library, naive

_CHANGES_OF = changes.changes_of


def for_ever(context: Any) -> changes.Changes:
    """The naive way: what was found once."""
    found: changes.Changes = context.compiled.__dict__.setdefault("found", _CHANGES_OF(context))
    return found


def test_a_table_that_is_declared_later_refers_to_one_that_is_not_mapped(sqlite_engine: Engine) -> None:
    def check() -> None:
        library = Library(sqlite_engine)
        metadata = MetaData()
        parent = Table("parent", metadata, Column("id", Integer, primary_key=True))
        metadata.drop_all(sqlite_engine)
        metadata.create_all(sqlite_engine)
        library.write(parent.insert().values(id=1))
        library.write(parent.delete().where(parent.c.id == 2))
        reference = Column("parent_id", ForeignKey("parent.id", ondelete="CASCADE"))
        child = Table("child", metadata, Column("id", Integer, primary_key=True), reference)
        child.drop(sqlite_engine, checkfirst=True)
        child.create(sqlite_engine)
        library.write(child.insert().values(id=1, parent_id=1))
        library.fill(select(child))
        library.write(parent.delete().where(parent.c.id == 1))
        assert library.is_right(select(child))
        library.write(child.delete())

    check()
    with naive(writes, "changes_of", for_ever):
        check()


def test_what_a_write_looks_through_grows_with_what_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not with its square: a test suite may declare its tables anew for each test."""
    tables_in, looked = sa_internals.tables_in, []

    def counted(metadata: MetaData) -> list[Table]:
        looked.append(metadata)
        return tables_in(metadata)

    monkeypatch.setattr(sa_internals, "tables_in", counted)
    engine = create_engine("sqlite://", poolclass=StaticPool)
    QueryCache("memory://").attach(engine)
    kept, counts = [], []
    for number in range(40):

        class Base(DeclarativeBase):
            pass

        class Above(Base):
            __tablename__ = "above"
            id: Mapped[int] = mapped_column(primary_key=True)

        class Below(Base):
            __tablename__ = "below"
            id: Mapped[int] = mapped_column(primary_key=True)
            above_id: Mapped[int] = mapped_column(ForeignKey(Above.id, ondelete="CASCADE"))

        kept.append(Below)
        Base.metadata.create_all(engine)
        looked.clear()
        with Session(engine) as session:
            session.add(Above(id=number))
            session.flush()
            session.delete(session.get_one(Above, number))
            session.commit()
        counts.append(len(looked))
    assert counts[-1] <= 3 * len(kept)
    engine.dispose()


def test_a_unique_index_that_is_made_later(sqlite_engine: Engine) -> None:
    def check(name: str) -> None:
        class Base(DeclarativeBase):
            pass

        class Coin(Base):
            __tablename__ = name
            id: Mapped[int] = mapped_column(primary_key=True)
            number: Mapped[int]
            worth: Mapped[int]

        Base.metadata.drop_all(sqlite_engine)
        Base.metadata.create_all(sqlite_engine)
        library = Library(sqlite_engine)
        with library.sessions.begin() as session:
            session.add(Coin(id=1, number=5, worth=1))
        with library.sessions.begin() as session:
            session.get_one(Coin, 1).worth = 2
        Index(f"{name}_number", Coin.number, unique=True)
        by_number = select(Coin.worth).where(Coin.number == 5)
        library.fill(by_number)
        with library.sessions.begin() as session:
            session.get_one(Coin, 1).worth = 3
        assert library.is_right(by_number)

    check("coin")
    with naive(writes, "changes_of", for_ever):
        check("token")  # or the tables of the former classes would count


@pytest.mark.server("postgresql")
def test_one_statement_in_several_schemas(postgresql_engine: Engine) -> None:
    def check() -> None:
        table = Table(
            "pot", MetaData(schema="place"), Column("id", Integer, primary_key=True), Column("worth", Integer)
        )
        cache = QueryCache("memory://").attach(postgresql_engine)
        sessions = sessionmaker(postgresql_engine)
        cache.attach(sessions)

        def worth(session: Session) -> int:
            found = select(table.c.worth).where(table.c.id == 1).execution_options(cache_key=True)
            return session.scalars(found).one()

        maps = [{"schema_translate_map": {"place": name}} for name in ("here", "there")]
        with postgresql_engine.begin() as connection:
            for name, options in zip(("here", "there"), maps, strict=True):
                connection.execute(text(f"DROP SCHEMA IF EXISTS {name} CASCADE"))
                connection.execute(text(f"CREATE SCHEMA {name}"))
                table.create(connection.execution_options(**options))
                connection.execute(insert(table).values(id=1, worth=0))
        for new in (1, 2):
            for options in maps:
                engine = postgresql_engine.execution_options(**options)
                with sessions(bind=engine) as session:
                    worth(session)
                with engine.begin() as connection:
                    connection.execute(update(table).values(worth=new))
                with sessions(bind=engine) as session:
                    assert worth(session) == new
        cache.detach(sessions)

    check()
    with naive(writes, "changes_of", for_ever):
        check()


def test_tables_that_are_made_for_a_moment_make_nothing_forgotten(sqlite_engine: Engine) -> None:
    library = Library(sqlite_engine)
    before = sa_internals.declared(Book.metadata)
    Table(
        "moment", MetaData(), Column("id", Integer, primary_key=True), Column("number", Integer, unique=True)
    )
    library.write(insert(Book).values(id=900, title="new", price=1, author_id=1))
    assert sa_internals.declared() is before
    try:
        Table("for_good", Book.metadata, Column("id", Integer, primary_key=True))
        assert sa_internals.declared() is not before
    finally:
        Book.metadata.remove(Book.metadata.tables["for_good"])


def test_what_is_asked_changes_nothing_of_what_is_declared(sqlite_engine: Engine) -> None:
    library = Library(sqlite_engine)
    before = sa_internals.declared(Book.metadata)
    books, other = select(Book).cte(), aliased(Book)
    sub = select(Book.id, Book.author_id).subquery()
    library.database(
        select(books.c.id, other.id, sub.c.id).where(other.id == books.c.id, sub.c.id == other.id)
    )
    assert sa_internals.declared() is before


def test_writes_while_another_thread_declares_tables(sqlite_engine: Engine) -> None:
    library = Library(sqlite_engine)
    metadata = MetaData()
    parent = Table("busy", metadata, Column("id", Integer, primary_key=True))
    parent.create(sqlite_engine, checkfirst=True)
    done = threading.Event()

    def declare() -> None:
        for number in itertools.count():
            if done.is_set():
                return
            Table(
                f"busy_{number % 500}_{number}",
                metadata,
                Column("id", Integer, primary_key=True),
                Column("parent_id", ForeignKey("busy.id", ondelete="CASCADE")),
            )
            if number % 500 == 499:
                metadata.clear()
                parent.to_metadata(metadata)

    thread = threading.Thread(target=declare)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        for _ in range(60):
            library.write(parent.delete())
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_an_index_that_is_made_within_a_flush(sqlite_engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Coin(Base):
        __tablename__ = "pawned"
        id: Mapped[int] = mapped_column(primary_key=True)
        number: Mapped[int] = mapped_column(unique=True)
        worth: Mapped[int] = mapped_column(default=0)
        year: Mapped[int] = mapped_column(default=0)

    Base.metadata.create_all(sqlite_engine)
    library = Library(sqlite_engine)
    with library.sessions.begin() as session:
        session.add_all([Coin(id=1, number=1), Coin(id=2, number=2)])

    made = []

    def declare(connection: Any, cursor: Any, sql: str, *rest: object) -> None:
        if sql.startswith("UPDATE") and not made:
            made.append(Index("pawned_year", Coin.year, unique=True))

    event.listen(sqlite_engine, "after_cursor_execute", declare)
    coins = select(Coin.id, Coin.worth, Coin.year).order_by(Coin.id)
    library.fill(coins)
    with library.sessions.begin() as session:
        first, second = session.get_one(Coin, 1), session.get_one(Coin, 2)
        first.worth, second.year = 5, 6
    assert library.is_right(coins)


def test_nothing_is_listened_to_for_the_first_time_while_threads_ask() -> None:
    """SQLAlchemy's ``listen()`` is for one thread alone; two that met there failed."""
    program = """
from sqlalchemy import Column, Integer, MetaData, Table, event

from querycache import sa_internals

def listen(*arguments, **keywords):
    raise AssertionError(arguments)

event.listen = listen
before = sa_internals.declared(metadata := MetaData())
Table("later", metadata, Column("id", Integer, primary_key=True))
assert sa_internals.declared() is not before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
