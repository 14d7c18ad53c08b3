"""Writes that do not look like writes, or of which it does not show what they write; each was once not noticed.

Named after the line of PITFALLS E that they belong to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psycopg.sql
import pytest
from sqlalchemy import (
    Column,
    Connection,
    Delete,
    Engine,
    ForeignKey,
    Insert,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    UniqueConstraint,
    column,
    delete,
    event,
    func,
    insert,
    literal,
    select,
    text,
    update,
    values,
)
from sqlalchemy.ext.compiler import compiles, deregister
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.schema import DropTable, ExecutableDDLElement
from sqlalchemy.sql.expression import ClauseElement, Executable, UpdateBase

from querycache import statement_text
from querycache.temporary import temporary_tables
from querycache.textual import TextStatement, read_text
from querycache.wording import commits, locks_rows, only_reads
from tests.writes.library import Author, Book, Employee, Loan
from tests.writes.test_pitfalls_e import LOANS, PRICES, RAISE_PRICE, Library, point, sa_column

OF_AUTHOR = select(Book.id, Book.price).where(Book.author_id == 1).order_by(Book.id)
EVERY_WAY = (point(1), point(2), PRICES, OF_AUTHOR, select(func.count()).select_from(Book))


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def library(request: pytest.FixtureRequest) -> Library:
    """On each database."""
    return Library(request.getfixturevalue(f"{request.param}_engine"))


@pytest.fixture
def on_postgresql(postgresql_engine: Engine) -> Library:
    return Library(postgresql_engine)


@pytest.fixture
def on_mariadb(mariadb_engine: Engine) -> Library:
    return Library(mariadb_engine)


def check(library: Library) -> None:
    for statement in EVERY_WAY:
        assert library.is_right(statement)


# --- E2: textual SQL, and statements without objects ---------------------------------------------------


def test_E2_text_that_was_told_its_columns(library: Library) -> None:
    """It has the form of a SELECT, whatever it does."""
    library.fill(*EVERY_WAY)
    with library.sessions.begin() as session:
        session.execute(text("DELETE FROM loan WHERE book_id = 2"))
        gone = text("DELETE FROM book WHERE id = 2 RETURNING id").columns(id=Integer)
        assert session.scalars(gone).all() == [2]
    check(library)


def test_E2_objects_from_text_that_was_told_its_columns(on_postgresql: Library) -> None:
    on_postgresql.fill(*EVERY_WAY)
    with on_postgresql.sessions.begin() as session:
        changed = text("UPDATE book SET price = 99 WHERE id = 2 RETURNING id, title, price, author_id")
        columns = changed.columns(Book.id, Book.title, Book.price, Book.author_id)
        assert session.scalars(select(Book).from_statement(columns)).one().price == 99
    check(on_postgresql)


def test_E2_text_that_is_told_what_it_writes(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its parser the library takes text for a write of everything, unless it is told."""
    monkeypatch.setitem(sys.modules, "sqlglot", None)
    read_text.cache_clear()
    others = select(func.count()).select_from(Author)
    raise_price = "UPDATE book SET price = price + 1"
    for options, outcome in (({}, "stale fill"), ({"cache_tables": ["book"]}, "hit")):
        library.fill(others, *EVERY_WAY)
        with library.engine.begin() as connection:
            connection.execute(text(raise_price), execution_options=options)
        assert library.outcome(others) == outcome
        check(library)
    read_text.cache_clear()


@pytest.mark.parametrize("options", [{"cache_tables": ["book"]}, {"cache_ttl": 60}])
def test_E2_text_that_is_told_what_it_reads(
    library: Library, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """A query that cannot be read is no write where the application caches it."""
    monkeypatch.setitem(sys.modules, "sqlglot", None)
    read_text.cache_clear()
    prices = text("SELECT id, price FROM book ORDER BY id").columns(id=Integer, price=Integer)
    statement = prices.execution_options(**options)
    library.fill(*EVERY_WAY)
    assert [library.outcome(statement) for _ in range(2)] == ["miss fill", "hit"]
    library.write(update(Book).values(price=Book.price + 1))
    assert library.is_right(statement) is ("cache_tables" in options)
    for sql in ("WITH x AS (SELECT 1) DELETE FROM book", "SELECT 1; DELETE FROM book"):
        assert not only_reads(sql)
    read_text.cache_clear()


def test_E2_text_in_a_CTE(on_postgresql: Library) -> None:
    on_postgresql.fill(*EVERY_WAY)
    changed = text("UPDATE book SET price = 5 RETURNING id").columns(column("id", Integer)).cte("changed")
    on_postgresql.write(select(changed))
    check(on_postgresql)


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE LOW_PRIORITY book SET price = price + 1",
        "DELETE QUICK IGNORE FROM book WHERE id = 4",
        "ANALYZE UPDATE book SET price = price + 1",
        "ANALYZE FORMAT=JSON DELETE FROM book WHERE id = 4",
        "SET STATEMENT max_statement_time = 10 FOR UPDATE book SET price = price + 1",
    ],
)
def test_E2_text_with_what_only_mariadb_knows(on_mariadb: Library, sql: str) -> None:
    on_mariadb.fill(*EVERY_WAY)
    with on_mariadb.engine.begin() as connection:
        connection.exec_driver_sql(sql).close()
    check(on_mariadb)


@pytest.mark.parametrize(
    "sql",
    [
        "EXPLAIN ANALYZE EXECUTE raise_prices",
        "COMMIT; UPDATE book SET price = price + 1",
        "ROLLBACK; UPDATE book SET price = price + 1",
    ],
)
def test_E2_text_that_carries_another_statement(on_postgresql: Library, sql: str) -> None:
    with on_postgresql.engine.begin() as connection:
        connection.exec_driver_sql("PREPARE raise_prices AS UPDATE book SET price = price + 1")
        on_postgresql.fill(*EVERY_WAY)
        connection.exec_driver_sql(sql).close()
    check(on_postgresql)


def test_E2_a_COMMIT_behind_another_statement(on_postgresql: Library) -> None:
    on_postgresql.fill(*EVERY_WAY)
    with on_postgresql.engine.connect() as connection:
        connection.exec_driver_sql("UPDATE book SET price = price + 1; COMMIT")
        check(on_postgresql)
        connection.rollback()
    check(on_postgresql)


def test_E2_a_bulk_method_within_a_flush(library: Library) -> None:
    """The flush knows its own rows, which are not all that was written of the table."""
    library.fill(*EVERY_WAY)
    with library.sessions() as session:

        @event.listens_for(session, "before_flush")
        def write_more(session: Session, context: Any, instances: Any) -> None:
            session.bulk_update_mappings(Book.__mapper__, [{"id": 2, "price": 501, "author_id": 3}])

        session.get_one(Book, 1).price = 500
        session.commit()
    check(library)


def runs_statements_itself(engine: Engine) -> Any:
    """As tools do that retry, or count. Gives the listener."""

    @event.listens_for(engine, "do_execute", insert=True)
    def run(cursor: Any, sql: str, parameters: Any, context: Any) -> bool:
        cursor.execute(sql, parameters)
        return True

    return run


def test_listeners_that_are_gone_again_cost_nothing(sqlite_engine: Engine) -> None:
    """While somebody else listens to a dialect, UPDATE is not made to return what a SELECT asks for then."""
    library = Library(sqlite_engine)
    sent: list[str] = []

    @event.listens_for(sqlite_engine, "before_cursor_execute")
    def note(connection: Connection, cursor: Any, sql: str, *rest: Any) -> None:
        sent.append(sql.split()[0])

    def flush() -> list[str]:
        with library.sessions.begin() as session:
            session.get_one(Book, 2).price += 1
            sent.clear()
        return list(sent)

    assert flush() == ["UPDATE"]
    listener = runs_statements_itself(sqlite_engine)
    assert flush() == ["UPDATE", "SELECT"]
    event.remove(sqlite_engine, "do_execute", listener)
    library.fill(*EVERY_WAY)
    flush()
    assert flush() == ["UPDATE"]
    check(library)


@pytest.mark.parametrize("early", [True, False])
def test_E2_what_a_listener_runs_in_place_of_the_dialect(sqlite_engine: Engine, early: bool) -> None:
    if early:
        runs_statements_itself(sqlite_engine)
    library = Library(sqlite_engine)
    if not early:
        library.fill(*EVERY_WAY)
        runs_statements_itself(sqlite_engine)
    raised = update(Book).where(Book.id == 2).values(price=Book.price + 1)
    library.write(raised)  # the first that it runs, on a connection of its own
    check(library)
    library.fill(*EVERY_WAY)
    with library.engine.begin() as connection:  # that it does not listen to
        rows = [{"id": number, "title": "new", "price": 1, "author_id": 1} for number in (100, 101)]
        connection.execute(insert(Book), rows)
    check(library)
    library.fill(*EVERY_WAY)
    with library.sessions.begin() as session:
        session.get_one(Book, 2).price += 1
        session.flush()
        assert library.outcome(point(2), session).startswith("bypass")
    check(library)


def test_what_a_dialect_asks_by_itself_while_somebody_listens(sqlite_engine: Engine) -> None:
    """As some do when they connect; there is no context of it."""
    library = Library(sqlite_engine)
    library.fill(*EVERY_WAY)
    listener = runs_statements_itself(sqlite_engine)
    library.write(RAISE_PRICE)
    with library.engine.connect() as connection:
        cursor = connection.connection.cursor()
        connection._cursor_execute(cursor, "SELECT 1", ())
        assert cursor.fetchall() == [(1,)]
    event.remove(sqlite_engine, "do_execute", listener)
    check(library)


def test_E2_what_a_listener_runs_in_place_of_the_dialect_for_a_session(sqlite_engine: Engine) -> None:
    library = Library(sqlite_engine)
    library.fill(*EVERY_WAY)
    runs_statements_itself(sqlite_engine)
    with library.sessions.begin() as session:  # the first transaction since
        session.get_one(Book, 2).price += 1
        session.flush()
        assert library.outcome(point(2), session).startswith("bypass")
    check(library)


def test_E2_ON_CONFLICT_REPLACE_takes_other_rows_away(sqlite_engine: Engine) -> None:
    class Things(DeclarativeBase):
        pass

    class Thing(Things):
        __tablename__ = "thing"
        __table_args__ = (UniqueConstraint("number", sqlite_on_conflict="REPLACE"),)

        id: Mapped[int] = mapped_column(primary_key=True)
        number: Mapped[int]

    library = Library(sqlite_engine)
    Things.metadata.create_all(sqlite_engine)
    with library.sessions.begin() as session:
        session.add(Thing(id=1, number=1))
    first = select(Thing.id, Thing.number).where(Thing.id == 1)
    library.fill(first)
    with library.sessions.begin() as session:
        session.add(Thing(id=2, number=1))
    assert library.ask(first) == []


# --- E4: cascades -----------------------------------------------------------------------------------------


def test_E4_a_table_declared_once_more_without_its_children(library: Library) -> None:
    """As a migration does, or a script."""
    author = Table("author", MetaData(), Column("id", Integer, primary_key=True))
    library.fill(*EVERY_WAY, LOANS)
    library.write(delete(author).where(author.c.id == 2))
    check(library)
    assert library.is_right(LOANS)


# --- E16: what a statement reads --------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_E16_a_CTE_named_like_the_table_it_is_made_from(
    request: pytest.FixtureRequest, database: str
) -> None:
    library = Library(request.getfixturevalue(f"{database}_engine"))
    dear = text(
        "WITH book AS (SELECT id, price FROM book WHERE price > 15) SELECT id, price FROM book ORDER BY id"
    )
    library.fill(dear)
    library.write(RAISE_PRICE)
    assert library.is_right(dear)


# --- E18: who commits, and when -----------------------------------------------------------------------------


def test_E18_BEGIN_and_COMMIT_as_text_on_an_autocommit_connection(library: Library) -> None:
    library.fill(*EVERY_WAY)
    with library.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        for end in ("ROLLBACK", "COMMIT"):
            connection.exec_driver_sql("BEGIN")
            connection.execute(RAISE_PRICE)
            if library.engine.dialect.name != "sqlite":  # where others would have to wait
                for statement in EVERY_WAY:
                    library.ask(statement)
            connection.exec_driver_sql(end)
            check(library)
        library.fill(*EVERY_WAY)
        connection.execute(update(Book).values(price=3))  # and this commits itself again
        check(library)


def test_E18_autocommit_set_as_text(on_mariadb: Library) -> None:
    on_mariadb.fill(*EVERY_WAY)
    with on_mariadb.engine.connect() as connection:
        connection.exec_driver_sql("SET autocommit = 1")
        connection.execute(RAISE_PRICE)
        check(on_mariadb)
        connection.rollback()
        check(on_mariadb)
        connection.invalidate()


# --- definitions ----------------------------------------------------------------------------------------------


def test_definitions_follow_the_schema_translation(on_postgresql: Library) -> None:
    metadata = MetaData(schema="tenant")
    things = Table("thing", metadata, sa_column("id"))
    engine = on_postgresql.engine.execution_options(schema_translate_map={"tenant": "tenant_2"})
    library = Library(engine)
    library.write(text("CREATE SCHEMA tenant_2"))
    metadata.create_all(engine)
    library.write(insert(things).values(id=1))
    library.fill(select(things))
    with engine.begin() as connection:
        things.drop(connection)
        things.create(connection)
    assert library.ask(select(things)) == []


# --- E14: what every connection has for itself -------------------------------------------------------------------


def create_in_text(table: Table, connection: Connection) -> None:
    connection.exec_driver_sql(f"CREATE TEMPORARY TABLE {table.name} (id INTEGER)")


@pytest.mark.parametrize("create", [Table.create, create_in_text])
def test_E14_a_temporary_table_is_not_answered_from_that_of_another_connection(
    library: Library, create: Any
) -> None:
    mine = Table("mine", MetaData(), sa_column("id"), prefixes=["TEMPORARY"])
    statement = select(mine)
    connections = [library.engine.connect(), library.engine.connect()]
    for number, connection in enumerate(connections, 1):
        create(mine, connection)
        connection.execute(insert(mine).values(id=number))
        connection.commit()
    for _ in range(2):
        for number, connection in enumerate(connections, 1):
            with library.sessions(bind=connection) as session:
                assert library.ask(statement, session) == [(number,)]
                assert library.outcome(statement, session) == "bypass temporary table"
    for connection in connections:
        connection.invalidate()
        connection.close()


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("CREATE TEMP TABLE IF NOT EXISTS pg_temp.mine (id int)", {"mine"}),
        ('create or replace temporary table "Mine"(id int)', {"mine"}),
        ("CREATE /* a */ LOCAL TEMPORARY TABLE mine AS SELECT 1", {"mine"}),
        ("SELECT 1 INTO TEMP mine", {"mine"}),
        ("SELECT 1 INTO TEMPORARY TABLE mine", {"mine"}),
        ("CREATE TEMP VIEW mine AS SELECT 1", {"mine"}),
        ("CREATE OR REPLACE TEMP RECURSIVE VIEW mine (id) AS SELECT 1", {"mine"}),
        ("CREATE TEMP TABLE mine (id int); CREATE TEMP TABLE yours (id int)", {"mine", "yours"}),
        ("BEGIN NOT ATOMIC CREATE TEMPORARY TABLE `a`.`mine` (id int); END", {"mine"}),
        ("EXECUTE IMMEDIATE 'CREATE TEMPORARY TABLE mine SELECT 1'", {"mine"}),
        ("DO $$ BEGIN CREATE TEMP TABLE mine AS SELECT 1; END $$", {"mine"}),
        ("CREATE TABLE pg_temp.mine (id int)", {"mine"}),
        ('CREATE UNLOGGED TABLE "pg_temp_3" . mine (id int)', {"mine"}),
        ("SELECT 1 INTO pg_temp.mine", {"mine"}),
        ("CREATE VIEW pg_temp.mine AS SELECT 1", {"mine"}),
        ("ALTER TABLE known RENAME TO mine", {"mine"}),
        ('ALTER VIEW IF EXISTS "known" RENAME TO mine', {"mine"}),
        ("ALTER TABLE pg_temp.strange RENAME TO mine", {"mine"}),
        ("RENAME TABLE known TO mine", {"mine"}),
        ("RENAME TABLE other TO a, known TO mine", {"a", "mine"}),
        ("ALTER TABLE known ADD COLUMN a int, RENAME AS mine", {"mine"}),
        ("ALTER TABLE known RENAME mine", {"mine"}),
        ("CREATE TEMP TABLE a (id int); ALTER TABLE a RENAME TO mine", {"a", "mine"}),
        ("ALTER TABLE other RENAME TO mine", set()),
        ("RENAME TABLE other TO mine", set()),
        ("CREATE TABLE temp_orary (id int)", set()),
        ("CREATE TABLE temp.mine (id int)", set()),
        ("SELECT temp FROM weather", set()),
    ],
)
def test_E14_names_of_temporary_tables(sql: str, found: set[str]) -> None:
    assert temporary_tables(sql, "postgresql", {"known"}) == found


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE temp.mine (id int)",
        "CREATE TABLE IF NOT EXISTS [Temp].[mine] (id int)",
        "CREATE VIRTUAL TABLE temp.mine USING fts5(id)",
        "ALTER TABLE temp.strange RENAME TO mine",
    ],
)
def test_E14_names_of_temporary_tables_of_sqlite(sql: str) -> None:
    assert temporary_tables(sql, "sqlite", set()) == {"mine"}
    assert not temporary_tables(sql, "mysql", set())


def test_E14_a_column_is_no_schema() -> None:
    assert not temporary_tables("ALTER TABLE weather RENAME COLUMN temp TO temperature", "sqlite", set())


class CreateAs(Executable, ClauseElement):
    """As applications write it."""

    inherit_cache = False


@compiles(CreateAs)
def _create_as(element: CreateAs, compiler: Any, **kwargs: Any) -> str:
    return "CREATE TEMPORARY TABLE book AS SELECT 666 AS id, 666 AS price"


class Rendered(Select[Any]):
    """A SELECT that is part of something else, as in old recipes."""

    inherit_cache = False
    form: str


@compiles(Rendered)
def _rendered(element: Rendered, compiler: Any, **kwargs: Any) -> str:
    return element.form.format(compiler.visit_select(element, **kwargs))


def rendered(form: str, *columns: Any) -> Rendered:
    made = Rendered(*columns)
    made.form = form
    return made


SHADOW = literal(666).label("id"), literal(666).label("price")
SHADOWING: list[tuple[str, list[Any]]] = [
    ("sqlite", ["CREATE TABLE temp.book AS SELECT 666 AS id, 666 AS price"]),
    (
        "sqlite",
        ["CREATE TEMP TABLE a AS SELECT 666 AS id, 666 AS price", "ALTER TABLE temp.a RENAME TO book"],
    ),
    ("postgresql", ["SELECT 666 AS id, 666 AS price INTO pg_temp.book"]),
    (
        "postgresql",
        ["CREATE TEMP TABLE a (b int); CREATE TEMP TABLE book AS SELECT 666 AS id, 666 AS price"],
    ),
    ("postgresql", ["CREATE TEMP RECURSIVE VIEW book (id, price) AS SELECT 666, 666"]),
    ("postgresql", ["CREATE TEMP VIEW a AS SELECT 666 AS id, 666 AS price", "ALTER VIEW a RENAME TO book"]),
    (
        "mariadb",
        [
            "BEGIN NOT ATOMIC CREATE TEMPORARY TABLE a (b int);"
            " CREATE TEMPORARY TABLE book SELECT 666 AS id, 666 AS price; END"
        ],
    ),
    ("mariadb", ["CREATE TEMPORARY TABLE a SELECT 666 AS id, 666 AS price", "RENAME TABLE a TO book"]),
    ("mariadb", [CreateAs()]),
    ("postgresql", [rendered("CREATE TEMP TABLE book AS {}", *SHADOW)]),
    ("postgresql", [rendered("{} INTO TEMP book", *SHADOW)]),
]


def test_E2_a_select_that_the_application_renders_as_a_write(library: Library) -> None:
    library.fill(*EVERY_WAY)
    values = [literal(9).label("id"), literal("nine"), literal(96), literal(1)]
    library.write(rendered("INSERT INTO book (id, title, price, author_id) {}", *values))
    check(library)
    library.fill(*EVERY_WAY)


@pytest.fixture
def upserting() -> Iterator[None]:
    """The application has each INSERT update what is there."""

    def upsert(element: Any, compiler: Any, **kwargs: Any) -> str:
        if compiler.dialect.name == "sqlite":
            return str(compiler.visit_insert(element.prefix_with("OR REPLACE"), **kwargs))
        sql, returning, rest = compiler.visit_insert(element, **kwargs).partition(" RETURNING")
        columns = [column.name for column in element.table.columns if not column.primary_key]
        if compiler.dialect.name == "postgresql":
            clause = "ON CONFLICT (id) DO UPDATE SET " + ", ".join(
                f"{name} = excluded.{name}" for name in columns
            )
        else:
            clause = "ON DUPLICATE KEY UPDATE " + ", ".join(f"{name} = VALUES({name})" for name in columns)
        return f"{sql} {clause}{returning}{rest}"

    compiles(Insert)(upsert)
    yield
    deregister(Insert)


@pytest.mark.parametrize("way", ["flush", "Core"])
def test_E2_an_insert_that_the_application_renders(library: Library, upserting: None, way: str) -> None:
    """As SQLAlchemy's documentation shows it for another default."""
    statements = (*EVERY_WAY, LOANS)
    library.fill(*statements)
    values = {"id": 2, "title": "moved", "price": 96, "author_id": 2}
    if way == "Core":
        library.write(insert(Book).values(values))
    else:
        with library.sessions.begin() as session:
            session.add(Book(**values))
    for statement in statements:
        assert library.is_right(statement)
    library.fill(*statements)


def test_E2_what_is_rendered_otherwise_on_another_database(library: Library, upserting: None) -> None:
    """It looks like SQLAlchemy's own on this one."""

    class Quick(Insert):
        inherit_cache = True

    compiles(Quick, "oracle")(lambda element, compiler, **kwargs: compiler.visit_insert(element, **kwargs))
    library.fill(*EVERY_WAY)
    library.write(Quick(Book).values(id=2, title="moved", price=96, author_id=2))
    check(library)


class Overriding(Insert):
    """An INSERT that sqlglot cannot read."""

    inherit_cache = True


@compiles(Overriding)
def _overriding(element: Overriding, compiler: Any, **kwargs: Any) -> str:
    return str(
        compiler.visit_insert(element, **kwargs).replace(" VALUES", " OVERRIDING SYSTEM VALUE VALUES", 1)
    )


def test_E2_an_insert_that_cannot_be_read_writes_its_own_table(on_postgresql: Library) -> None:
    authors = select(Author.id)
    on_postgresql.fill(*EVERY_WAY, authors)
    on_postgresql.write(Overriding(Book).values(id=9, title="nine", price=96, author_id=2))
    assert on_postgresql.outcome(authors) == "hit"
    check(on_postgresql)


NINE = select(literal(9), literal("nine"), literal(96), literal(1))


def _into(target: str, element: Any, compiler: Any, **kwargs: Any) -> str:
    always = "OVERRIDING SYSTEM VALUE " if compiler.dialect.name == "postgresql" else ""
    return f"INSERT INTO {target} (id, title, price, author_id) {always}{compiler.process(element.source, **kwargs)}"


class CopyTo(UpdateBase):
    """An INSERT that the application renders from beginning to end, as SQLAlchemy's documentation shows it."""

    inherit_cache = False

    def __init__(self, table: Any, source: Any) -> None:
        self.table, self.source = table, source


class CopyNamed(UpdateBase):
    """The same, and what it writes to is only told by the text."""

    inherit_cache = False

    def __init__(self, name: str, source: Any) -> None:
        self.name, self.source = name, source


class CopyOf(Executable, ClauseElement):
    """The same again, and SQLAlchemy takes it for no DML at all."""

    inherit_cache = False

    def __init__(self, table: Any, source: Any) -> None:
        self.table, self.source = table, source


class Elsewhere(Insert):
    """An INSERT into another table than its own."""

    inherit_cache = True


@compiles(CopyTo)
@compiles(CopyOf)
def _copy(element: CopyTo, compiler: Any, **kwargs: Any) -> str:
    return _into(compiler.process(element.table, asfrom=True, **kwargs), element, compiler, **kwargs)


@compiles(CopyNamed)
def _copy_named(element: CopyNamed, compiler: Any, **kwargs: Any) -> str:
    return _into(element.name, element, compiler, **kwargs)


@compiles(Elsewhere)
def _elsewhere(element: Elsewhere, compiler: Any, **kwargs: Any) -> str:
    sql = compiler.visit_insert(element, **kwargs).replace("INTO author ", "INTO book ", 1)
    return str(sql.replace("(id, name)", "(id, title, price, author_id)").replace(", 'x')", ", 'x', 96, 1)"))


COPIES = {
    "UpdateBase": CopyTo(Book.__table__, NINE),
    "UpdateBase with a CTE": CopyTo(Book.__table__, select(NINE.cte("nine"))),
    "by its name": CopyNamed("book", NINE),
    "by its name, with a CTE": CopyNamed("book", select(NINE.cte("nine"))),
    "Executable": CopyOf(Book.__table__, NINE),
    "Executable with a CTE": CopyOf(Book.__table__, select(NINE.cte("nine"))),
    "into another table": Elsewhere(Author).values(id=9, name=text("'x'")),
}


@pytest.mark.parametrize("read", [True, False], ids=["read", "not read"])
@pytest.mark.parametrize("copy", COPIES)
def test_E2_an_insert_rendered_from_beginning_to_end(
    library: Library, monkeypatch: pytest.MonkeyPatch, copy: str, read: bool
) -> None:
    """Of which SQLAlchemy says it is none, or of another table; with its parser and without."""
    if not read:
        monkeypatch.setitem(sys.modules, "sqlglot", None)
    read_text.cache_clear()
    others = select(Employee.id)
    library.fill(*EVERY_WAY, LOANS, others)
    library.write(COPIES[copy])
    assert library.database(select(Book.price).where(Book.id == 9)) == [(96,)]
    check(library)
    if "CTE" not in copy:  # without the parser, what is in it may be anything
        assert library.outcome(others) == "hit"
    read_text.cache_clear()


class Spelled(Executable, ClauseElement):
    """An INSERT as the application spells it, of which only its text tells."""

    inherit_cache = False

    def __init__(self, sql: str) -> None:
        self.sql = sql


@compiles(Spelled)
def _spelled(element: Spelled, compiler: Any, **kwargs: Any) -> str:
    return element.sql


@pytest.mark.parametrize(
    ("sql", "table"),
    [
        ('INSERT INTO "a""b" (id) VALUES (7)', 'a"b'),
        ("INSERT INTO main /* the archive */ . plain (id) VALUES (7)", "plain"),
        ("INSERT INTO main -- archive\n . plain (id) VALUES (7)", "plain"),
        ("INSERT INTO main.plain (id) VALUES (7)", "plain"),
        ('INSERT INTO "plain" VALUES (7)', "plain"),
        ("INSERT OR IGNORE INTO [plain](id) VALUES (7)", "plain"),
        ("INSERT INTO plain SELECT 7", "plain"),
    ],
)
def test_E2_how_an_insert_names_its_table(
    sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch, sql: str, table: str
) -> None:
    """Without the parser."""
    monkeypatch.setitem(sys.modules, "sqlglot", None)
    read_text.cache_clear()
    library = Library(sqlite_engine)
    written = Table(table, MetaData(), sa_column("id"))
    written.create(sqlite_engine)
    others = select(Employee.id)
    library.fill(select(written), others)
    library.write(Spelled(sql))
    assert library.ask(select(written)) == library.database(select(written)) == [(7,)]
    # where it cannot be told, anything may have been written
    assert (library.outcome(others) == "hit") == ('""' not in sql and "archive" not in sql)
    read_text.cache_clear()


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT ALL INTO a VALUES (1) INTO b VALUES (2) SELECT 1",
        "INSERT INTO a OUTPUT inserted.id INTO log VALUES (1)",
        "INSERT INTO a EXEC fill",
        "INSERT INTO a.b.c VALUES (1)",
        'INSERT INTO U&"d\\0061t" (id) VALUES (1)',
        "INSERT INTO a (id) WITH x AS (SELECT 1) SELECT * FROM x",
        "INSERT INTO a VALUES (1); DELETE FROM b",
        "INSERT INTO a /*! SELECT 1 */",
    ],
)
def test_an_insert_that_may_write_more_than_its_table(sql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statement_text, "read_sent", lambda *_: TextStatement(False))
    context = SimpleNamespace(statement=sql)
    assert not statement_text.read_rendered(context).understood


@pytest.mark.parametrize("kind", ["select", "join", "update", "insert"])
def test_E2_values_in_a_CTE_are_no_statement(
    request: pytest.FixtureRequest, kind: str, sqlite_engine: Engine, postgresql_engine: Engine
) -> None:
    given = values(column("number", Integer), name="given").data([(1,), (2,)]).cte("given")
    statement: Any = {
        "select": select(given.c.number),
        "join": select(Book.id).join(given, given.c.number == Book.id),
        "update": update(Book).values(price=96).where(Book.id == given.c.number),
        "insert": insert(Book).from_select(
            ["id", "title", "price", "author_id"],
            select(given.c.number + 10, literal("ten"), literal(96), literal(1)),
        ),
    }[kind]
    for engine in (sqlite_engine, postgresql_engine):
        library = Library(engine)
        library.fill(*EVERY_WAY)
        if kind in ("select", "join"):
            assert library.is_right(statement)
            assert library.outcome(statement) == "hit"
        else:
            library.write(statement)
        check(library)


class Truncate(ExecutableDDLElement):
    """DDL that the application renders."""

    def __init__(self, element: Any) -> None:
        self.element = element


@compiles(Truncate)
def _truncate(element: Truncate, compiler: Any, **kwargs: Any) -> str:
    return f"TRUNCATE TABLE {compiler.preparer.format_table(element.element)} CASCADE"


def test_E2_DDL_that_the_application_renders(on_postgresql: Library) -> None:
    """It may do more than to the table that it is made of."""
    metadata = MetaData()
    sent = Table("sent", metadata, sa_column("id"))
    Table("answered", metadata, Column("id", ForeignKey(sent.c.id), primary_key=True))
    answered = select(metadata.tables["answered"])
    metadata.create_all(on_postgresql.engine)
    on_postgresql.write(insert(sent).values(id=1), insert(metadata.tables["answered"]).values(id=1))
    on_postgresql.fill(answered)
    on_postgresql.write(Truncate(sent))
    assert on_postgresql.ask(answered) == on_postgresql.database(answered) == []


def test_E2_what_is_rendered_is_read_once_for_all_batches(
    sqlite_engine: Engine, upserting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(sqlite_engine)
    texts: set[str] = set()
    read = statement_text.read_text
    monkeypatch.setattr(statement_text, "read_text", lambda *given: texts.add(given[0]) or read(*given))
    for size in (20, 30):
        with library.sessions.begin() as session:
            session.add_all([Book(title="one of many", price=1, author_id=1) for _ in range(size)])
    assert len(texts) == 1
    library.fill(*EVERY_WAY)
    check(library)


def test_E2_a_select_with_a_limit_of_time_is_one(on_mariadb: Library) -> None:
    """What MariaDB takes before a statement would commit by itself."""
    library = on_mariadb
    library.fill(*EVERY_WAY)
    limited = rendered("SET STATEMENT max_statement_time = 5 FOR {}", func.replace(Book.title, "a", "b"))
    with library.sessions() as session:
        session.execute(RAISE_PRICE)
        for statement in (limited, limited.with_for_update()):
            session.execute(statement).all()
        session.rollback()
    assert [library.outcome(each) for each in EVERY_WAY] == ["hit"] * len(EVERY_WAY)
    kept = limited.execution_options(cache_ttl=60)
    assert [library.outcome(kept) for _ in range(2)] == ["miss fill", "hit"]


class Archive(Delete):
    """A DELETE that leaves word of it elsewhere."""

    inherit_cache = False


@compiles(Archive)
def _archive(element: Archive, compiler: Any, **kwargs: Any) -> str:
    return f"WITH gone AS ({compiler.visit_delete(element, **kwargs)} RETURNING 1) UPDATE book SET price = 96"


def test_E2_a_delete_that_the_application_renders(on_postgresql: Library) -> None:
    on_postgresql.fill(*EVERY_WAY, LOANS)
    on_postgresql.write(Archive(Loan))
    assert on_postgresql.is_right(LOANS)
    check(on_postgresql)


@pytest.mark.parametrize(("database", "statements"), SHADOWING)
def test_E14_a_temporary_table_in_place_of_another(
    request: pytest.FixtureRequest, database: str, statements: list[Any]
) -> None:
    library = Library(request.getfixturevalue(f"{database}_engine"))
    library.fill(PRICES)
    with library.sessions() as session:
        for each in statements:
            session.execute(text(each) if isinstance(each, str) else each)
        session.commit()
        assert library.ask(PRICES, session) == [(666, 666)]
        assert library.outcome(PRICES, session) == "bypass temporary table"
        assert library.ask(PRICES) != [(666, 666)]
        session.connection().invalidate()


@pytest.mark.parametrize(
    ("database", "schema"), [("sqlite", "temp"), ("postgresql", "pg_temp"), ("sqlite", "told")]
)
def test_E14_a_temporary_table_by_its_schema(
    request: pytest.FixtureRequest, database: str, schema: str
) -> None:
    """Also where it was made by somebody else, and where the schema is translated."""
    engine = request.getfixturevalue(f"{database}_engine")
    library = Library(engine.execution_options(schema_translate_map={"told": "temp"}))
    mine = Table("mine", MetaData(), sa_column("id"), schema=schema)
    with library.sessions() as session:
        cursor = session.connection().connection.cursor()
        cursor.execute(f"CREATE TABLE {schema.replace('told', 'temp')}.mine (id INTEGER)")
        session.execute(insert(mine).values(id=1))
        session.commit()
        textual = text(f"SELECT id FROM {schema.replace('told', 'temp')}.mine")
        for statement in (select(mine), select(mine.alias().c.id), textual):
            for options in ({}, {"cache_ttl": 60}):
                outcome = library.outcome(statement.execution_options(**options), session)
                assert outcome == "bypass temporary table"
        session.connection().invalidate()


# --- the text alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "sql"),
    [
        ("postgresql", "SET lock_timeout = '10s'"),
        ("postgresql", "ANALYZE book"),
        ("postgresql", "EXPLAIN SELECT * FROM book"),
        ("mysql", "SET innodb_lock_wait_timeout = 10"),
        ("mysql", "SHOW CREATE TABLE book"),
        ("postgresql", "LOCK TABLE book IN EXCLUSIVE MODE"),
        ("mysql", "LOCK TABLES book WRITE"),
        ("mysql", "UNLOCK TABLES"),
        ("mysql", "FLUSH TABLES"),
        ("mysql", "OPTIMIZE TABLE book"),
        ("mysql", "DO SLEEP(0)"),
        ("mysql", "DO (SLEEP(0))"),
        ("mysql", "DO GET_LOCK(CONCAT(DATABASE(), ' from (a)'), 1)"),
        ("postgresql", "COMMENT ON TABLE book IS 'x'"),
        ("postgresql", "REINDEX TABLE book"),
        ("postgresql", "VALUES (1)"),
        ("postgresql", "TABLE book"),
        ("mysql", "SELECT id FROM book WHERE MATCH (title) AGAINST (%s IN BOOLEAN MODE) LIMIT %s"),
    ],
)
def test_text_that_only_sounds_like_a_write_is_none(dialect: str, sql: str) -> None:
    found = read_text(sql, dialect)
    assert found.understood
    assert not found.writes


@pytest.mark.parametrize(
    ("dialect", "sql", "table"),
    [
        ("mysql", "REPLACE INTO book (id) VALUES (%s)", (None, "book")),
        ("mysql", "replace low_priority book set id = %(id)s", (None, "book")),
        ("sqlite", "/* one */ REPLACE INTO book (id) SELECT id FROM author", (None, "book")),
        ("postgresql", "CREATE TEMP TABLE book (id int) ON COMMIT DROP", (None, "book")),
        ("postgresql", "CREATE TEMPORARY TABLE book (id int) ON COMMIT DELETE ROWS", (None, "book")),
        ("postgresql", "REFRESH MATERIALIZED VIEW Book;", (None, "book")),
        ("postgresql", 'REFRESH MATERIALIZED VIEW CONCURRENTLY own."Book" WITH NO DATA', ("own", "Book")),
    ],
)
def test_text_that_writes_one_table(dialect: str, sql: str, table: tuple[str | None, str]) -> None:
    found = read_text(sql, dialect)
    assert found.understood
    assert found.writes == {table}


@pytest.mark.parametrize(
    ("dialect", "sql"),
    [
        ("postgresql", "DO $$ BEGIN DELETE FROM book END $$"),
        ("mysql", "DO of_ours(1)"),
        ("mysql", """DO "it's", of_ours(1), "it's" """),
        ("mysql", "DO `'`, of_ours(1), `'`"),
        ("mysql", "DO '/*', of_ours(1), '*/'"),
        ("mysql", "DO 1 # '\n , of_ours(1) # '"),
        ("mysql", "DO 1 -- '\n , of_ours(1) -- '"),
        ("mysql", r"DO '\', of_ours(1), '\'"),
        ("mariadb", "DO (SELECT 1)"),
    ],
)
def test_what_DO_may_do(dialect: str, sql: str) -> None:
    assert not read_text(sql, dialect).understood


def test_a_commit_is_found_behind_other_statements_and_not_in_names() -> None:
    assert commits("DELETE FROM book; COMMIT", "postgresql")
    assert commits("DELETE FROM book;\n END", "postgresql")
    assert not commits("UPDATE book SET commit = 1", "postgresql")


def test_a_textual_select_that_cannot_be_read_counts_as_a_write_of_everything(on_postgresql: Library) -> None:
    """It may call what writes; nobody is answered from before it, whatever it reads."""
    on_postgresql.fill(PRICES)
    unread = text("SELECT xmlparse(content '<a/>')")
    assert not read_text(unread.text, "postgresql").understood
    with on_postgresql.sessions() as session:
        session.execute(unread).all()
        assert on_postgresql.outcome(PRICES, session) == "bypass own write"
        session.commit()
    assert on_postgresql.outcome(PRICES) == "stale fill"


@pytest.mark.parametrize(
    "find",
    [
        locks_rows,
        only_reads,
        lambda sql: commits(sql, "postgresql"),
        lambda sql: read_text(sql, "postgresql"),
        lambda sql: temporary_tables(sql, "postgresql", set()),
    ],
)
@pytest.mark.parametrize("before", ["SELECT 1 FOR ", "SELECT 1; ", "CREATE ", "UPDATE x SET "])
def test_many_comments_do_not_take_for_ever(find: Callable[[str], object], before: str) -> None:
    """It does not end before the universe does, where a comment can be read in two ways."""
    find(f"{before}{'/* x */ ' * 200}x")


@pytest.mark.parametrize(
    "sql", ["REINDEX snapshot", "COMMENT ON TABLE snapshot IS 'isolation of autocommit'"]
)
def test_a_table_that_is_called_like_an_isolation(sql: str) -> None:
    assert not read_text(sql, "postgresql").isolates


def test_a_string_makes_no_temporary_table() -> None:
    assert not temporary_tables("INSERT INTO log VALUES ('create temp table book')", "postgresql", set())
    found = temporary_tables("DO $$ BEGIN CREATE TEMP TABLE book (id int); END $$", "postgresql", set())
    assert found == {"book"}


def test_a_query_that_writes_is_told_without_the_parser(
    on_postgresql: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sqlglot", None)
    read_text.cache_clear()
    raising = "WITH x AS (UPDATE book SET price = price + 1 RETURNING id) SELECT id FROM x"
    statement = text(raising).columns(id=Integer).execution_options(cache_ttl=60)
    assert on_postgresql.outcome(statement) == "bypass not a select"
    read_text.cache_clear()


# --- E2: statements that are no text -----------------------------------------------------------------------


class Unreadable:
    """As objects of a driver that gives no text of them."""

    def __init__(self, sql: str) -> None:
        self.sql = sql

    def as_string(self, connection: object) -> str:
        raise TypeError(connection)


def _given_as(kind: str, sql: str) -> Any:
    if kind == "composed":
        return psycopg.sql.SQL("{}{}").format(psycopg.sql.SQL(sql), psycopg.sql.SQL(""))
    return {"text": sql, "bytes": sql.encode()}[kind]


@pytest.mark.parametrize("kind", ["text", "composed", "bytes"])
def test_E2_a_statement_that_is_no_text(on_postgresql: Library, kind: str) -> None:
    on_postgresql.fill(*EVERY_WAY)
    with on_postgresql.sessions.begin() as session:
        session.connection().exec_driver_sql(_given_as(kind, "UPDATE book SET price = 77 WHERE id = 2"))
        asked = session.connection().exec_driver_sql(_given_as(kind, "SELECT price FROM book WHERE id = 2"))
        assert asked.scalar() == 77
    check(on_postgresql)


@pytest.mark.parametrize("kind", ["composed", "bytes"])
def test_E2_a_statement_that_is_no_text_and_commits_itself(on_postgresql: Library, kind: str) -> None:
    on_postgresql.fill(*EVERY_WAY)
    with on_postgresql.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(_given_as(kind, "UPDATE book SET price = 77 WHERE id = 2"))
        check(on_postgresql)


def test_E2_a_statement_that_a_driver_makes_no_text_of(
    sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(cursor: Any, sql: Any, parameters: Any, context: Any = None) -> None:
        cursor.execute(getattr(sql, "sql", sql), parameters)

    monkeypatch.setattr(sqlite_engine.dialect, "do_execute", run)
    library = Library(sqlite_engine)
    library.fill(*EVERY_WAY)
    with library.sessions.begin() as session:
        statement: Any = Unreadable("UPDATE book SET price = 77 WHERE id = 2")
        session.connection().exec_driver_sql(statement)
    check(library)


# --- E2: rows that are not told apart, and those that go with a table ------------------------------------------


class OwnBase(DeclarativeBase):
    pass


class Shelf(OwnBase):
    __tablename__ = "shelf"
    id: Mapped[int] = mapped_column(primary_key=True)


PLACE = Table(
    "place",
    OwnBase.metadata,
    Column("number", Integer),
    Column("shelf_id", ForeignKey("shelf.id", ondelete="CASCADE")),
    Column("label", String(10)),
    Column("note", String(10)),
)


class Place(OwnBase):
    """The table says nothing of the primary key."""

    __table__ = PLACE
    __mapper_args__ = {"primary_key": [PLACE.c.number]}


@pytest.fixture
def with_places(library: Library) -> Library:
    OwnBase.metadata.create_all(library.engine)
    with library.sessions.begin() as session:
        session.add_all(Shelf(id=number) for number in (1, 2, 3))
        session.flush()
        session.add_all([Place(number=1, shelf_id=1, label="a"), Place(number=2, shelf_id=3, label="b")])
    return library


def test_E2_a_table_without_a_primary_key(with_places: Library) -> None:
    """Of two objects one is on another shelf meanwhile, and each is written by an UPDATE of its own."""
    of_shelf = select(PLACE.c.number, PLACE.c.label).where(PLACE.c.shelf_id == 2)
    with with_places.sessions(expire_on_commit=False) as session:
        one, other = session.get_one(Place, 1), session.get_one(Place, 2)
        session.commit()
        with with_places.sessions.begin() as another:
            another.get_one(Place, 1).shelf_id = 2
        with_places.fill(of_shelf)
        one.label, other.note = "changed", "changed"
        session.commit()
    assert with_places.is_right(of_shelf)


@pytest.mark.parametrize("how", ["statement", "method"])
def test_E2_what_goes_with_a_table_that_is_dropped(sqlite_engine: Engine, how: str) -> None:
    """SQLite deletes all rows of it before, and what refers to them."""
    library = Library(sqlite_engine)
    OwnBase.metadata.create_all(sqlite_engine)
    library.write(insert(Shelf).values(id=1), insert(PLACE).values(number=1, shelf_id=1))
    places = select(PLACE.c.number)
    library.fill(places)
    with library.engine.begin() as connection:
        if how == "statement":
            connection.execute(DropTable(Shelf.__table__))  # type: ignore[arg-type]
        else:
            Shelf.__table__.drop(connection)  # type: ignore[attr-defined]
    assert library.ask(places) == library.database(places) == []
