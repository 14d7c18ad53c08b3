"""What a flush asks the database about the rows that it has updated: nothing more, where UPDATE can return it."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, ForeignKey, String, event, exc, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, attributes, mapped_column, object_session
from sqlalchemy.orm.exc import StaleDataError

from tests.writes.library import Author, Book
from tests.writes.test_pitfalls_e import Library

OF_AUTHOR_3 = select(Book.id, Book.price).where(Book.author_id == 3)


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.getfixturevalue(f"{request.param}_engine"))


def statements(engine: Engine) -> list[str]:
    """The first words of the statements that are sent from now on."""
    found: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(connection: Connection, cursor: Any, sql: str, *rest: Any) -> None:
        found.append(sql.split()[0])

    return found


def outdated(library: Library, session: Session) -> Book:
    """A book that has moved to author 3 since this session has read it."""
    library.write(update(Book).where(Book.id == 2).values(author_id=1))
    book = session.get_one(Book, 2)
    library.write(update(Book).where(Book.id == 2).values(author_id=3))
    library.fill(OF_AUTHOR_3)
    return book


def test_one_row_is_one_statement_where_update_returns(library: Library) -> None:
    with library.sessions() as session:
        book = outdated(library, session)
        sent = statements(library.engine)
        book.price = 99
        session.commit()
    returns = library.engine.dialect.update_returning
    assert sent == (["UPDATE"] if returns else ["UPDATE", "SELECT"])
    assert library.is_right(OF_AUTHOR_3)
    assert library.database(select(Book.price).where(Book.id == 2)) == [(99,)]


def test_rows_of_which_some_are_returned(library: Library) -> None:
    """Two of one statement, which returns nothing then, and one of another."""
    with library.sessions() as session:
        book, others = outdated(library, session), [session.get_one(Book, number) for number in (3, 4)]
        library.write(update(Book).where(Book.id == 4).values(author_id=3))
        library.fill(OF_AUTHOR_3)
        book.title, others[0].price, others[1].price = "another", 98, 99
        session.commit()
    assert library.is_right(OF_AUTHOR_3)


def test_a_row_that_is_gone_is_noticed_by_the_orm_as_ever(library: Library) -> None:
    with library.sessions() as session:
        book = outdated(library, session)
        with library.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM loan WHERE book_id = 2")
            connection.exec_driver_sql("DELETE FROM book WHERE id = 2")
        book.price = 99
        with pytest.raises(StaleDataError):
            session.flush()
        session.rollback()
    assert library.is_right(OF_AUTHOR_3)


@pytest.mark.parametrize("comment", [" -- from the tests", " /* from the tests */"])
def test_what_a_listener_has_added_stays_the_last(sqlite_engine: Engine, comment: str) -> None:
    library = Library(sqlite_engine)

    @event.listens_for(sqlite_engine, "before_cursor_execute", retval=True)
    def add(connection: Connection, cursor: Any, sql: str, parameters: Any, *rest: Any) -> tuple[str, Any]:
        return sql + comment, parameters

    with library.sessions() as session:
        outdated(library, session).price = 99
        session.commit()
    assert library.is_right(OF_AUTHOR_3)


class Own(DeclarativeBase):
    pass


class Folder(Own):
    __tablename__ = "folder of 100%"
    id: Mapped[int] = mapped_column(primary_key=True)
    up: Mapped[int | None] = mapped_column('up "there" %', ForeignKey("folder of 100%.id"))
    name: Mapped[str] = mapped_column(String(40), default="")
    changed: Mapped[int] = mapped_column(default=0, onupdate=7)


class Silent(Own):
    __tablename__ = "silent"
    __table_args__ = {"implicit_returning": False}
    id: Mapped[int] = mapped_column(primary_key=True)
    up: Mapped[int | None] = mapped_column(ForeignKey("silent.id"))
    name: Mapped[str] = mapped_column(String(40), default="")


@pytest.mark.parametrize("entity", [Folder, Silent])
def test_names_that_need_quotes_and_tables_that_return_nothing(library: Library, entity: Any) -> None:
    Own.metadata.drop_all(library.engine)
    Own.metadata.create_all(library.engine)
    within = select(entity.id, entity.name).where(entity.up == 1)
    try:
        with library.sessions() as session:
            session.add_all([entity(id=1), entity(id=2)])
            session.commit()
            folder = session.get_one(entity, 2)
            library.write(update(entity).where(entity.id == 2).values(up=1))
            library.fill(within)
            folder.name = "new"
            session.commit()
            assert folder.up == 1
        assert library.is_right(within)
    finally:
        Own.metadata.drop_all(library.engine)


@pytest.mark.parametrize("silent", [False, True])
def test_a_table_whose_updates_return_nothing_is_named(
    sqlite_engine: Engine, caplog: pytest.LogCaptureFixture, silent: bool
) -> None:
    """A virtual table cannot return anything; nor can views with rules, or columns that must not be read."""

    class Virtual(DeclarativeBase):
        pass

    class Jotting(Virtual):
        __tablename__ = "jotting"
        __table_args__ = {"implicit_returning": False} if silent else {}
        rowid: Mapped[int] = mapped_column(primary_key=True)
        author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
        words: Mapped[str]

    library = Library(sqlite_engine)
    with library.engine.begin() as connection:
        connection.exec_driver_sql("CREATE VIRTUAL TABLE jotting USING fts5 (author_id, words)")
        connection.execute(insert(Jotting).values(rowid=1, author_id=1, words="old"))
    words = select(Jotting.words).where(Jotting.author_id == 1)
    library.fill(words)
    with library.sessions() as session:
        session.get_one(Jotting, 1).words = "new"
        if silent:
            session.commit()
        else:
            with pytest.raises(exc.OperationalError):
                session.commit()
    assert library.is_right(words)
    assert bool(caplog.records) is not silent
    assert silent or "implicit_returning=False" in caplog.text


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
@pytest.mark.parametrize("how", ["flush", "statement", "text"])
def test_what_is_written_through_a_view(request: pytest.FixtureRequest, database: str, how: str) -> None:
    class Views(DeclarativeBase):
        pass

    class Offer(Views):
        __tablename__ = "offer"
        id: Mapped[int] = mapped_column(primary_key=True)
        price: Mapped[int]

    library = Library(request.getfixturevalue(f"{database}_engine"))
    with library.engine.begin() as connection:
        connection.exec_driver_sql("CREATE OR REPLACE VIEW offer AS SELECT id, price FROM book")
    library.cache.depends("offer", on=["book"])
    library.cache.depends("book", on=["offer"])
    one, offered = select(Book.price).where(Book.id == 2), select(Offer.id, Offer.price)
    library.fill(one, offered)
    try:
        with library.sessions() as session:
            if how == "flush":
                session.get_one(Offer, 2).price = 66
                session.flush()
            elif how == "statement":
                session.execute(update(Offer).where(Offer.id == 2).values(price=66))
            else:
                session.execute(text("UPDATE offer SET price = 66 WHERE id = 2"))
            assert library.ask(one, session) == [(66,)]
            session.commit()
        assert library.is_right(one)
        assert library.is_right(offered)
    finally:
        with library.engine.begin() as connection:
            connection.exec_driver_sql("DROP VIEW offer")


def test_a_flush_of_many_is_no_dearer_than_its_rows(sqlite_engine: Engine) -> None:
    """They may be sent one by one, and each time the whole of them is at hand."""
    library = Library(sqlite_engine)

    def events_of(number: int) -> int:
        count = 0

        def note(frame: object, kind: str, argument: object) -> None:
            nonlocal count
            count += 1

        with library.sessions() as session:
            session.add_all([Book(title="new", price=1, author_id=2) for _ in range(number)])
            sys.setprofile(note)
            try:
                session.flush()
            finally:
                sys.setprofile(None)
        return count

    events_of(10)
    assert events_of(400) < 6 * events_of(100)


# --- a flush that fails ------------------------------------------------------------------------------------------


def test_after_a_failed_flush_what_it_did_not_touch_is_answered(library: Library) -> None:
    authors, books = select(Author.id, Author.name), select(Book.id, Book.price)
    library.fill(authors, books)
    with library.sessions() as session:
        with pytest.raises(IntegrityError), session.begin_nested():
            session.add(Book(id=1, title="twice", price=1, author_id=1))
            session.flush()
        assert library.outcome(authors, session) == "hit"
        assert library.outcome(books, session) == "bypass own write"


class Kept(Own):
    """No transaction takes back what was written here."""

    __tablename__ = "kept"
    __table_args__ = {"mysql_engine": "MyISAM"}
    id: Mapped[int] = mapped_column(primary_key=True)


def test_what_a_failed_flush_has_written_in_spite_of_all(mariadb_engine: Engine) -> None:
    """The next flush tells of its own rows, which are not all that was written."""
    library = Library(mariadb_engine)
    Own.metadata.create_all(library.engine)
    two = select(Kept.id).where(Kept.id == 2)
    try:
        library.write(insert(Kept).values(id=3))
        library.fill(two)
        with library.sessions() as session, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the driver: this table cannot be rolled back
            with pytest.raises(IntegrityError), session.begin_nested():
                session.add_all([Kept(id=2), Kept(id=3)])  # a flush writes in the order of its keys
                session.flush()
            session.add(Kept(id=4))
            session.commit()
        assert library.is_right(two)
    finally:
        Own.metadata.drop_all(library.engine)


def read_again(book: Book, connection: Connection) -> None:
    session = object_session(book)
    assert session is not None
    session.refresh(book)


def populate(book: Book, connection: Connection) -> None:
    session = object_session(book)
    assert session is not None
    statement = select(Book).where(Book.id == book.id)
    session.scalars(statement, execution_options={"populate_existing": True}).all()


def take_for_loaded(book: Book, connection: Connection) -> None:
    attributes.set_committed_value(book, "author_id", book.author_id)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("look", [read_again, populate, take_for_loaded])
def test_a_listener_that_reads_what_was_flushed(library: Library, look: Any, by_hand: bool) -> None:
    """To see what triggers have made of it, for example: its object knows nothing of before then."""

    def listener(mapper: Any, connection: Connection, book: Book) -> None:
        look(book, connection)

    event.listen(Book, "after_update", listener)
    try:
        of_author = [select(Book.id).where(Book.author_id == author) for author in (1, 2, 3)]
        library.write(update(Book).where(Book.id == 2).values(author_id=1))
        library.fill(*of_author)
        with library.sessions() as session:
            book = session.get_one(Book, 2)
            book.author_id = select(Author.id).where(Author.id == 3).scalar_subquery() if by_hand else 3  # type: ignore[assignment]
            session.commit()
        assert all(map(library.is_right, of_author))
    finally:
        event.remove(Book, "after_update", listener)


@pytest.mark.parametrize("name", ["after_insert", "after_update"])
def test_a_listener_that_sets_what_was_flushed(library: Library, name: str) -> None:
    """Too late to be written with it; SQLAlchemy takes it for what the row has."""

    def move(mapper: Any, connection: Connection, book: Book) -> None:
        book.author_id = 2

    of_author = [select(Book.id).where(Book.author_id == author) for author in (1, 2, 3)]
    library.write(update(Book).where(Book.id == 2).values(author_id=1))
    library.fill(*of_author)
    event.listen(Book, name, move)
    try:
        with library.sessions() as session, warnings.catch_warnings():
            warnings.simplefilter("ignore", exc.SAWarning)
            if name == "after_insert":
                session.add(Book(id=77, title="late", price=1, author_id=3))
            else:
                session.get_one(Book, 2).author_id = 3
            session.commit()
    finally:
        event.remove(Book, name, move)
    assert all(map(library.is_right, of_author))


def test_a_commit_in_the_middle_of_a_flush(library: Library) -> None:
    """What is written after it is told by the same flush, and made known by the next COMMIT."""

    def commit(mapper: Any, connection: Connection, author: Author) -> None:
        connection.exec_driver_sql("COMMIT")

    library.fill(OF_AUTHOR_3)
    event.listen(Author, "after_insert", commit)
    try:
        with library.sessions() as session:
            session.add_all([Author(id=77, name="first"), Book(id=77, title="second", price=1, author_id=3)])
            session.flush()
            library.fill(OF_AUTHOR_3)
            session.commit()
    finally:
        event.remove(Author, "after_insert", commit)
    assert library.is_right(OF_AUTHOR_3)
