"""What a statement reads, or writes, without it showing in its tables."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import (
    Column,
    DateTime,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    and_,
    bindparam,
    case,
    cast,
    column,
    delete,
    extract,
    func,
    insert,
    literal,
    literal_column,
    select,
    table,
    text,
)
from sqlalchemy.schema import CreateIndex
from sqlalchemy.sql.elements import quoted_name
from sqlalchemy.util import compat

from querycache.analysis import analyse
from tests.writes.library import Book
from tests.writes.test_pitfalls_e import RAISE_PRICE, Library

SHELVES = MetaData()
SHELF = Table("shelf", SHELVES, Column("book", Integer, primary_key=True))
EVENTS = MetaData()
EVENT = Table(
    "event",
    EVENTS,
    Column("id", Integer, primary_key=True),
    Column("at", DateTime),
    Column("what", String(20)),
)


@pytest.fixture
def library(sqlite_engine: Engine) -> Library:
    return _with_tables(Library(sqlite_engine))


@pytest.fixture
def on_postgresql(postgresql_engine: Engine) -> Library:
    return _with_tables(Library(postgresql_engine))


@pytest.fixture
def on_mariadb(mariadb_engine: Engine) -> Library:
    return _with_tables(Library(mariadb_engine))


def _with_tables(library: Library) -> Library:
    SHELVES.create_all(library.engine)
    EVENTS.create_all(library.engine)
    soon = datetime.now() + timedelta(seconds=1)
    library.write(insert(SHELF).values(book=1), insert(EVENT).values(id=1, at=soon, what="now"))
    return library


def _is_right_after(library: Library, statement: Any, *writes: Any) -> bool:
    for _ in range(3):
        library.ask(statement)
    library.write(*writes)
    return library.is_right(statement)


def _is_asked_for(library: Library, statement: Any) -> bool:
    """Whether the database is asked each time."""
    library.ask(statement)
    return library.outcome(statement) != "hit" and library.outcome(statement) != "hit"


# --- tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "condition",
    [
        "book.id IN shelf",
        "book.id in main.shelf",
        'book.id NOT IN "shelf"',
        "book.id IN'shelf'",
        "book.id IN /* these */ [shelf]",
        "(book.id) IN `shelf`",
    ],
)
def test_IN_and_a_table(library: Library, condition: str) -> None:
    """SQLite: IN t is IN (SELECT * FROM t)."""
    put = insert(SHELF).values(book=2)
    assert _is_right_after(library, select(Book.id).where(text(condition)).order_by(Book.id), put)
    whole = text(f"SELECT id FROM book WHERE {condition} ORDER BY id").columns(column("id"))
    assert _is_right_after(library, whole, insert(SHELF).values(book=3))


@pytest.mark.parametrize("named", [text("shelf"), literal_column("shelf"), column("shelf")])
def test_IN_as_an_operator_of_the_application(library: Library, named: Any) -> None:
    for condition in (Book.id.op("IN")(named), Book.id.bool_op("NOT IN")(named)):
        statement = select(Book.id).where(condition).order_by(Book.id)
        assert _is_right_after(library, statement, insert(SHELF).values(book=4))
        library.write(delete(SHELF).where(SHELF.c.book == 4))


@pytest.mark.parametrize(
    "condition", ["book.id IN (1, 2)", "book.title <> 'in stock' -- in short", "instr(title, 'in') > 0"]
)
def test_no_IN_and_a_table(library: Library, condition: str) -> None:
    statement = select(Book.id).where(text(condition + "\n"))
    library.fill(statement)
    whole = text(f"SELECT id FROM book WHERE id IN :ids AND {condition}\n").columns(column("id"))
    library.fill(whole.bindparams(bindparam("ids", [1, 2], expanding=True)))
    assert _is_right_after(library, statement, RAISE_PRICE)


@pytest.mark.parametrize(
    "statement",
    [
        text("SELECT user_version FROM pragma_user_version").columns(column("user_version")),
        select(table("pragma_user_version", column("user_version"))),
        select(func.count()).select_from(table("pragma_table_list")),
        select(func.count()).select_from(table("sqlite_master", schema="main")),
        select(func.count()).select_from(table("dbstat")),
    ],
    ids=str,
)
def test_tables_of_SQLite_itself(library: Library, statement: Any) -> None:
    with library.cache.recording() as events:
        try:
            library.ask(statement)
        except Exception:  # noqa: BLE001 - it may have been left out of this SQLite
            pytest.skip("not in this SQLite")
    assert [event.reason.startswith("system table") for event in events] == [True]


def test_tables_of_PostgreSQL_itself(on_postgresql: Library) -> None:
    statement = select(func.count()).select_from(table("pg_backend_memory_contexts"))
    assert _is_asked_for(on_postgresql, statement)
    assert _is_asked_for(on_postgresql, select(func.count()).select_from(table("pg_seclabels")))


def test_a_sequence_that_is_read_as_a_table(on_postgresql: Library, on_mariadb: Library) -> None:
    named = text("SELECT id, last_value(id) OVER (ORDER BY id) AS last_value FROM book").columns(
        column("id"), column("n")
    )
    on_postgresql.fill(named)
    with on_postgresql.engine.begin() as connection:
        connection.exec_driver_sql("DROP SEQUENCE IF EXISTS counter")
        connection.exec_driver_sql("CREATE SEQUENCE counter")
    for statement in (
        select(table("shelf_book_seq", column("last_value"))),
        select(func.max(table("shelf_book_seq", column("last_value")).alias().c.last_value)),
        text("SELECT last_value FROM shelf_book_seq").columns(column("last_value")),
        text("SELECT * FROM shelf_book_seq").columns(column("last_value"), column("log"), column("called")),
        text("SELECT last_value FROM counter").columns(column("n")),
        select(literal_column("last_value")).select_from(text("counter")),
        select(column("last_value")).select_from(table("counter")),
    ):
        assert _is_asked_for(on_postgresql, statement)
    with on_mariadb.engine.begin() as connection:
        connection.exec_driver_sql("CREATE SEQUENCE numbers")
        connection.exec_driver_sql("CREATE SEQUENCE order_seq")
    for statement in (
        select(table("numbers", column("next_not_cached_value"))),
        text("SELECT next_not_cached_value FROM numbers").columns(column("n")),
        select(literal_column("NEXT VALUE FOR numbers")),
        select(literal_column("next /* one */ value\nfor numbers")),
        text("SELECT PREVIOUS VALUE FOR numbers").columns(column("n")),
        select(literal_column("*")).select_from(table("order_seq")),
        text("SELECT * FROM order_seq"),
    ):
        assert _is_asked_for(on_mariadb, statement)


@pytest.mark.parametrize("name", ["public.shelf", "shelf, book", "(SELECT * FROM shelf) AS x"])
def test_a_table_that_is_text(on_postgresql: Library, name: str) -> None:
    """Where the application forbids quotes, the name of a table may be any SQL."""
    named = table(quoted_name(name, False))
    put = insert(SHELF).values(book=2)
    assert _is_right_after(on_postgresql, select(func.count()).select_from(named), put)


class Given:
    """What stands in braces in a t-string, on a Python that has none; SQLAlchemy has a Template of its own there."""

    def __init__(self, value: Any) -> None:
        self.value = value


def t(*parts: Any) -> Any:
    """A t-string of texts and values, as Python 3.14 reads them."""
    given = getattr(sys.modules.get("string.templatelib"), "Interpolation", Given)
    return sqlalchemy.tstring(
        compat.Template(*(each if isinstance(each, str) else given(each[0]) for each in parts))
    )


@pytest.mark.skipif(not hasattr(sqlalchemy, "tstring"), reason="SQLAlchemy 2.0 has no t-strings")
@pytest.mark.parametrize(
    "statement",
    [
        lambda: t("SELECT book FROM shelf WHERE book < ", [3]),
        lambda: t("SELECT book FROM ", [SHELF], " WHERE ", [SHELF.c.book < 3]),
        lambda: t("SELECT book FROM shelf").columns(column("book", Integer)),
        lambda: select(t("SELECT book FROM shelf").columns(column("book", Integer)).subquery()),
        lambda: select(Book.id).where(t("EXISTS (SELECT 1 FROM shelf WHERE book = ", [2], ")")),
        lambda: select(Book.id).where(Book.id.in_(t("SELECT book FROM shelf"))),
        lambda: select(literal_column("x.book")).select_from(t("(SELECT book FROM shelf) AS x")),
        lambda: (
            select(SHELF.c.book).where(SHELF.c.book == 1, t("1 = 1 OR book = ", [2])).order_by(SHELF.c.book)
        ),
    ],
)
def test_a_t_string(library: Library, statement: Any) -> None:
    assert _is_right_after(library, statement(), insert(SHELF).values(book=2))


@pytest.mark.skipif(not hasattr(sqlalchemy, "tstring"), reason="SQLAlchemy 2.0 has no t-strings")
def test_what_a_t_string_does(library: Library) -> None:
    """It is a query, and answered as such, or it is not; or it changes by itself."""
    query = t("SELECT book FROM shelf WHERE book < ", [3])
    library.fill(query)
    assert library.outcome(t("SELECT book FROM shelf WHERE book < ", [3])) == "hit"
    assert _is_asked_for(library, t("SELECT book FROM shelf WHERE book < ", [func.random()]))
    assert _is_asked_for(library, select(SHELF.c.book).order_by(t("random()")))
    library.write(t("INSERT INTO shelf (book) VALUES (", [2], ")"))
    assert library.is_right(query)
    writing = t("UPDATE shelf SET book = book + 10 RETURNING book").columns(column("book", Integer))
    assert library.outcome(writing) == "bypass not a select"
    assert library.is_right(query)


def test_a_column_that_is_text(on_postgresql: Library) -> None:
    for name in ("random()", "current_timestamp"):
        assert _is_asked_for(on_postgresql, select(column(quoted_name(name, False))))
    statement = select(column(quoted_name("(SELECT max(book) FROM shelf)", False)))
    assert _is_right_after(on_postgresql, statement, insert(SHELF).values(book=2))


def test_a_name_without_quotes_is_a_name(library: Library) -> None:
    shelf = table(quoted_name("shelf", False), column(quoted_name("book", False)))
    library.fill(select(shelf.c.book))
    assert _is_right_after(library, select(shelf.c.book), insert(SHELF).values(book=2))


@pytest.mark.parametrize("name", ["public.shelf", "ONLY shelf"])
def test_a_write_to_a_table_that_is_text(on_postgresql: Library, name: str) -> None:
    statement = select(SHELF.c.book).order_by(SHELF.c.book)
    named = table(quoted_name(name, False), column("book"))
    moved = named.update().values(book=7)
    assert _is_right_after(on_postgresql, statement, moved)
    declared = Table(quoted_name(name, False), MetaData(), Column("book", Integer, primary_key=True))
    assert _is_right_after(on_postgresql, statement, declared.update().values(book=8))


def test_an_index_on_a_table_that_is_text(on_postgresql: Library) -> None:
    on_postgresql.fill(select(SHELF.c.book))
    declared = Table(quoted_name("public.shelf", False), MetaData(), Column("book", Integer))
    on_postgresql.write(CreateIndex(Index("of_books", declared.c.book)))
    assert on_postgresql.outcome(select(SHELF.c.book)) != "hit"


# --- answers that change by themselves ----------------------------------------------------------------------------


def test_a_hint_that_asks_the_clock(on_mariadb: Library) -> None:
    with on_mariadb.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE book ADD SYSTEM VERSIONING")
    for moment in ("NOW()", "(NOW(6) - INTERVAL 1 SECOND)", "TIMESTAMP CURRENT_TIMESTAMP", "@moment"):
        hint = f"FOR SYSTEM_TIME AS OF {moment}"
        compiled = select(Book.id).with_hint(Book, hint).compile(on_mariadb.engine)
        assert analyse(compiled).functions, hint


@pytest.mark.parametrize(
    "hint", ["USE INDEX (PRIMARY)", "FORCE INDEX FOR ORDER BY (PRIMARY)", "IGNORE KEY (PRIMARY)"]
)
def test_a_hint_about_an_index(on_mariadb: Library, hint: str) -> None:
    statement = select(Book.id, Book.price).with_hint(Book, hint).order_by(Book.id)
    on_mariadb.fill(statement)
    assert _is_right_after(on_mariadb, statement, RAISE_PRICE)


def test_a_part_of_a_table_by_chance(on_postgresql: Library) -> None:
    for statement in (
        text("SELECT count(*) FROM book TABLESAMPLE bernoulli (50)").columns(column("n")),
        select(func.count()).select_from(text("book TableSample system (50)")),
    ):
        assert _is_asked_for(on_postgresql, statement)


@pytest.mark.parametrize(
    "statement",
    [
        select(extract("second", literal("now"))),
        select(func.coalesce(EVENT.c.at, literal("now", String))),
        select(EVENT.c.id).where(EVENT.c.at < literal("now", String)),
        select(case((EVENT.c.id == 1, EVENT.c.at), else_=literal("now", String))),
        select(EVENT.c.id).where(func.coalesce(EVENT.c.at, literal("today", String)).is_not(None)),
    ],
    ids=str,
)
def test_a_moment_that_is_given_as_text(library: Library, statement: Any) -> None:
    assert _is_asked_for(library, statement)


@pytest.mark.parametrize(
    "made",
    [literal("now", String) + literal("", String), case((EVENT.c.id == 1, "now"), else_="today")],
    ids=str,
)
def test_a_moment_that_is_made_within_and_cast_without(on_postgresql: Library, made: Any) -> None:
    within = select(made.label("moment"))
    for source in (within.subquery(), within.cte(), within.subquery().alias()):
        assert _is_asked_for(on_postgresql, select(cast(source.c.moment, DateTime)))
        assert _is_asked_for(on_postgresql, select(func.date(source.c.moment)))


@pytest.mark.parametrize(
    "condition",
    [
        EVENT.c.what == "now",
        EVENT.c.what.in_(["now", "then"]),
        EVENT.c.what.like("now%"),
        EVENT.c.what.ilike("%now"),
        EVENT.c.what.contains("now"),
        EVENT.c.what.istartswith("now"),
        func.lower(EVENT.c.what) == "now",
        ~EVENT.c.what.contains("now"),
        EVENT.c.what + "!" != "now" + EVENT.c.what,
        case((EVENT.c.id == 1, "today"), else_="later") != "never",
        and_(case((EVENT.c.id == 1, "today"), else_="later") != "never", cast(EVENT.c.what, Integer) != 7),
        case({"now": 1}, value=EVENT.c.what, else_=2) == 1,
    ],
    ids=str,
)
def test_a_word_that_is_compared_with_text(library: Library, condition: Any) -> None:
    statement = select(EVENT.c.id).where(condition)
    library.fill(statement)
    assert library.is_right(statement)
