"""Writes that were missed because of how tables are mapped, or how statements are written: each failed when it was
written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from dogpile.cache import make_region
from sqlalchemy import (
    Column,
    Computed,
    Engine,
    FetchedValue,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    Sequence,
    String,
    Table,
    column,
    create_engine,
    delete,
    event,
    exists,
    func,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.sql.expression import ClauseElement, Executable

from querycache import QueryCache
from querycache.tables import cascades

_who: ContextVar[int] = ContextVar("who", default=1)


class Base(DeclarativeBase):
    pass


class OtherBase(DeclarativeBase):
    pass


class Person(Base):
    __tablename__ = "mapped_person"
    id: Mapped[int] = mapped_column(primary_key=True)


class Document(Base):
    __tablename__ = "mapped_document"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(20), default="")
    updated_by: Mapped[int | None] = mapped_column(ForeignKey(Person.id), default=_who.get, onupdate=_who.get)


class Eager(Base):
    __tablename__ = "mapped_eager"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(20), default="")
    updated_by: Mapped[int | None] = mapped_column(ForeignKey(Person.id), default=1, onupdate=text("2"))
    __mapper_args__ = {"eager_defaults": True}


class Versioned(Base):
    __tablename__ = "mapped_versioned"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(20), default="")
    revision: Mapped[int] = mapped_column(unique=True)
    __mapper_args__ = {"version_id_col": revision}


class Animal(Base):
    __tablename__ = "mapped_animal"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    __tablename__ = "mapped_dog"
    dog_id: Mapped[int] = mapped_column(ForeignKey(Animal.id), primary_key=True)
    title: Mapped[str] = mapped_column(String(20), default="")
    updated_by: Mapped[int | None] = mapped_column(ForeignKey(Person.id), default=_who.get, onupdate=_who.get)
    __mapper_args__ = {"polymorphic_identity": "dog"}


class Note(OtherBase):
    """Refers to a table of another MetaData."""

    __tablename__ = "mapped_note"
    id: Mapped[int] = mapped_column(primary_key=True)
    person_id: Mapped[int | None] = mapped_column(ForeignKey(Person.id, ondelete="CASCADE"))


class Desk(Base):
    __tablename__ = "mapped_desk"
    id: Mapped[int] = mapped_column(primary_key=True)
    person_id: Mapped[int | None] = mapped_column(ForeignKey(Person.id, ondelete="SET NULL"), unique=True)


class Lamp(Base):
    __tablename__ = "mapped_lamp"
    id: Mapped[int] = mapped_column(primary_key=True)
    desk: Mapped[int | None] = mapped_column(ForeignKey(Desk.person_id, onupdate="CASCADE"))


class Slim(OtherBase):
    """The same table as Document's, by who does not know of its foreign key."""

    __tablename__ = "mapped_document"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(20), default="")
    updated_by: Mapped[int | None] = mapped_column()


class InsertFromSelect(Executable, ClauseElement):
    """The recipe of SQLAlchemy's documentation, "Compiling sub-elements of a custom expression construct"."""

    inherit_cache = False

    def __init__(self, table: Any, select: Any) -> None:
        self.table, self.select = table, select


@compiles(InsertFromSelect)
def _compile_insert_from_select(element: Any, compiler: Any, **kwargs: Any) -> str:
    table = compiler.process(element.table, asfrom=True, **kwargs)
    return f"INSERT INTO {table} {compiler.process(element.select, **kwargs).strip('()')}"


class Process:
    """An engine, sessions and a cache of their own, on a store that others share."""

    def __init__(self, engine: Engine, store: Any) -> None:
        self.engine = engine
        self.cache = QueryCache(store)
        self.sessions = sessionmaker(engine)
        self.cache.attach(self.sessions).attach(engine)

    def ask(self, statement: Any) -> tuple[str, list[tuple[Any, ...]]]:
        with self.cache.recording() as events, self.sessions() as session:
            rows = session.execute(statement.execution_options(cache_key=True)).all()
        return events[0].outcome, [tuple(row) for row in rows]


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Process, Process]]:
    """Who writes, and who reads."""
    store = make_region().configure("querycache.memory")
    engines = [create_engine(f"sqlite:///{tmp_path}/mapped.db") for _ in range(2)]
    for engine in engines:
        event.listen(
            engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys = ON")
        )
    Base.metadata.create_all(engines[0])
    Note.__table__.create(engines[0])  # type: ignore[attr-defined]
    with Session(engines[0]) as session, session.begin():
        session.add_all([Person(id=1), Person(id=2)])
        session.flush()
        session.add_all([Document(id=1), Eager(id=1), Versioned(id=1), Dog(id=1), Note(id=1, person_id=2)])
        session.add(Desk(id=1, person_id=2))
        session.flush()
        session.add(Lamp(id=1, desk=2))
    writer, reader = (Process(engine, store) for engine in engines)
    yield writer, reader
    for engine in engines:
        engine.dispose()


def warm(process: Process, statement: Any) -> list[tuple[Any, ...]]:
    process.ask(statement)
    outcome, rows = process.ask(statement)
    assert outcome == "hit"
    return rows


@pytest.mark.parametrize(
    ("cls", "pinned"),
    [
        (Document, Document.updated_by == 1),
        (Eager, Eager.updated_by == 1),
        (Versioned, Versioned.revision == 1),
        (Dog, Dog.updated_by == 1),
    ],
    ids=["onupdate", "eager onupdate", "version", "subclass"],
)
def test_what_the_flush_itself_sets_had_another_value_before(
    both: tuple[Process, Process], cls: Any, pinned: Any
) -> None:
    writer, reader = both
    statement = select(cls.id, cls.title).where(pinned)
    assert len(warm(reader, statement)) == 1
    token = _who.set(2)
    try:
        with writer.sessions() as session:
            session.get(cls, 1).title = "new"
            session.flush()
            assert session.execute(statement.execution_options(cache_key=True)).all() == []
            session.commit()
    finally:
        _who.reset(token)
    assert reader.ask(statement)[1] == []


@pytest.mark.parametrize(
    "statement",
    [
        select(column("title")).select_from(text("mapped_document")).where(text("id = 1")),
        select(Person.__table__.c.id, text("d.title"))
        .select_from(Person.__table__, text("mapped_document AS d"))
        .where(text("mapped_person.id = 1")),
        select(Person.id).where(
            exists(text("1")).select_from(text("mapped_document")).where(text("title = ''")), Person.id == 1
        ),
    ],
    ids=["alone", "beside another", "exists"],
)
def test_a_text_in_from_names_a_table(both: tuple[Process, Process], statement: Any) -> None:
    writer, reader = both
    before = warm(reader, statement)
    with writer.sessions.begin() as session:
        session.get_one(Document, 1).title = "new"
    assert reader.ask(statement)[1] != before


def test_a_hint_may_be_a_query(both: tuple[Process, Process]) -> None:
    _, reader = both
    hinted = select(Person.id).with_statement_hint("UNION ALL SELECT id FROM mapped_document")
    with reader.sessions() as session:
        assert not reader.cache.explain(session, hinted.execution_options(cache_key=True)).cacheable
        harmless = select(Person.id).with_statement_hint("/* of the application */")
        assert reader.cache.explain(session, harmless.execution_options(cache_key=True)).cacheable


@pytest.mark.parametrize("of", ["engine", "session"])
def test_statements_that_the_application_renders(both: tuple[Process, Process], of: str) -> None:
    writer, reader = both
    statement = select(Person.id).order_by(Person.id)
    assert warm(reader, statement) == [(1,), (2,)]
    write = InsertFromSelect(Person.__table__, select(literal(3)))
    if of == "engine":
        with writer.engine.begin() as connection:
            connection.execute(write)
    else:
        with writer.sessions.begin() as session:
            session.execute(write)
    assert reader.ask(statement)[1] == [(1,), (2,), (3,)]


@pytest.mark.parametrize(
    "write",
    [
        lambda session: session.delete(session.get_one(Person, 2)),
        lambda session: session.execute(delete(Person).where(Person.id == 2)),
        lambda session: session.execute(text("DELETE FROM mapped_person WHERE id = 2")),
    ],
    ids=["unit of work", "bulk", "text"],
)
@pytest.mark.parametrize("cls", [Note, Lamp], ids=["other metadata", "set null, then on update"])
def test_rows_that_foreign_keys_change_farther_away(
    both: tuple[Process, Process], write: Callable[[Session], object], cls: Any
) -> None:
    writer, reader = both
    with writer.sessions.begin() as session:
        session.execute(update(Document).values(updated_by=1))
    statement = select(*cls.__table__.columns)
    before = warm(reader, statement)
    with writer.sessions.begin() as session:
        write(session)
    outcome, rows = reader.ask(statement)
    assert outcome == "stale" and rows != before


def test_set_null_of_some_columns_is_an_action() -> None:
    """As PostgreSQL writes it since version 15."""

    class Own(DeclarativeBase):
        pass

    class Parent(Own):
        __tablename__ = "mapped_parent"
        tenant: Mapped[int] = mapped_column(primary_key=True)
        id: Mapped[int] = mapped_column(primary_key=True)

    class Child(Own):
        __tablename__ = "mapped_child"
        id: Mapped[int] = mapped_column(primary_key=True)
        tenant: Mapped[int] = mapped_column(Integer)
        parent_id: Mapped[int | None] = mapped_column(Integer)
        __table_args__ = (
            ForeignKeyConstraint(
                ["tenant", "parent_id"], [Parent.tenant, Parent.id], ondelete="SET NULL (parent_id)"
            ),
        )

    parent, child = Parent.__table__, Child.__table__
    assert isinstance(parent, Table)
    assert cascades(parent, delete=True).tables == {child}


@pytest.mark.parametrize(
    "write",
    [
        lambda session: session.add(Slim(id=2, updated_by=1)),
        lambda session: setattr(session.get_one(Slim, 1), "title", "new"),
    ],
    ids=["insert", "update"],
)
def test_a_class_that_does_not_know_of_a_foreign_key(
    both: tuple[Process, Process], write: Callable[[Session], object]
) -> None:
    """Of two classes on one table, each in this process."""
    writer, reader = both
    statement = select(Document.id, Document.title).where(Document.updated_by == 1)
    before = warm(reader, statement)
    with writer.sessions.begin() as session:
        write(session)
    assert reader.ask(statement)[1] != before


@pytest.mark.parametrize("declared", ["mapped_order", "mapped.mapped_order"])
def test_what_is_declared_follows_schemas(postgresql_engine: Engine, declared: str) -> None:
    with postgresql_engine.begin() as connection:
        connection.execute(text("DROP SCHEMA IF EXISTS mapped CASCADE"))
        connection.execute(text("CREATE SCHEMA mapped"))
        connection.execute(text("CREATE TABLE mapped.mapped_order (id int primary key, amount int)"))
        connection.execute(
            text("CREATE VIEW mapped.mapped_total AS SELECT sum(amount) AS n FROM mapped.mapped_order")
        )
    engine = postgresql_engine.execution_options(schema_translate_map={None: "mapped"})

    class Own(DeclarativeBase):
        pass

    class Order(Own):
        __tablename__ = "mapped_order"
        id: Mapped[int] = mapped_column(primary_key=True)
        amount: Mapped[int]

    total = Table("mapped_total", Own.metadata, autoload_with=postgresql_engine, schema="mapped").to_metadata(
        Own.metadata, schema=None
    )
    store = make_region().configure("querycache.memory")
    writer, reader = (Process(each, store) for each in (engine, engine))
    for each in (writer, reader):
        each.cache.depends("mapped_total", on=[declared])
    by_view = select(total.c.n)
    by_text = (
        text("SELECT n FROM mapped.mapped_total")
        .columns(column("n"))
        .execution_options(cache_tables=[declared])
    )
    for statement in (by_view, by_text):
        warm(reader, statement)
    with writer.sessions.begin() as session:
        session.execute(insert(Order).values(id=1, amount=7))
    assert [reader.ask(statement)[1] for statement in (by_view, by_text)] == [[(7,)], [(7,)]]
    for statement in (by_view, by_text):
        warm(reader, statement)
    writer.cache.invalidate(tables=["mapped_order"])
    assert [reader.ask(statement)[0] for statement in (by_view, by_text)] == ["stale", "stale"]
    with postgresql_engine.begin() as connection:
        connection.execute(text("DROP SCHEMA mapped CASCADE"))


@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mariadb"])
def test_a_default_that_sqlalchemy_asks_for_ahead_of_an_insert(
    request: pytest.FixtureRequest, database: str
) -> None:
    """As it does for keys where nothing may be returned. By then the execution does not know its statement yet."""
    engine: Engine = request.getfixturevalue(f"{database}_engine")
    metadata = MetaData()
    word = Table(
        "mapped_word",
        metadata,
        Column("id", String(20), primary_key=True, default=func.lower("ABC")),
        Column("n", Integer),
        implicit_returning=False,
    )
    metadata.drop_all(engine)
    metadata.create_all(engine)
    process = Process(engine, make_region().configure("querycache.memory"))
    found = select(word.c.n).where(word.c.id == "abc")
    assert warm(process, found) == []
    with engine.begin() as connection:
        assert connection.execute(word.insert().values(n=1)).inserted_primary_key == ("abc",)
    assert process.ask(found)[1] == [(1,)]
    metadata.drop_all(engine)


def test_a_snapshot_begins_with_such_a_default(postgresql_engine: Engine) -> None:
    metadata = MetaData()
    key = Sequence("mapped_numbers", metadata=metadata)
    number = Table(
        "mapped_number", metadata, Column("id", Integer, key, primary_key=True), implicit_returning=False
    )
    other = Table("mapped_other", metadata, Column("id", Integer, primary_key=True), Column("n", Integer))
    metadata.drop_all(postgresql_engine)
    metadata.create_all(postgresql_engine)
    engine = postgresql_engine.execution_options(isolation_level="REPEATABLE READ")
    process = Process(engine, make_region().configure("querycache.memory"))
    found = select(other.c.n)
    with engine.begin() as connection:
        connection.execute(other.insert().values(id=1, n=1))
    warm(process, found)

    def write(connection: Any, cursor: Any, sql: str, *rest: Any) -> None:
        if sql.startswith("INSERT INTO mapped_number"):
            with engine.begin() as another:
                another.execute(other.update().values(n=2))
            warm(process, found)

    event.listen(postgresql_engine, "before_cursor_execute", write)
    try:
        with process.sessions() as session:
            session.execute(number.insert())
            cached = session.execute(found.execution_options(cache_key=True)).all()
            assert cached == session.execute(found).all() == [(1,)]
    finally:
        event.remove(postgresql_engine, "before_cursor_execute", write)
        metadata.drop_all(postgresql_engine)


class Page(Base):
    __tablename__ = "mapped_page"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(20), default="")


_elsewhere = MetaData()
_page_2026 = Table(
    "mapped_page_2026",
    _elsewhere,
    Column("id", Integer, primary_key=True),
    Column("title", String(20)),
)


@contextmanager
def rewriting(
    engine: Engine,
    rewrite: Callable[[str], str],
    change: Callable[[Any], Any] = lambda parameters: parameters,
) -> Iterator[None]:
    """All statements of an engine are sent otherwise than they were compiled."""

    def put(connection: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool) -> Any:
        return rewrite(sql), change(parameters)

    event.listen(engine, "before_cursor_execute", put, retval=True)
    yield
    event.remove(engine, "before_cursor_execute", put)


def change(session: Session) -> None:
    session.get_one(Page, 1).title = "new"


def change_in_bulk(session: Session) -> None:
    session.execute(update(Page).values(title="new"), execution_options={"synchronize_session": False})


def change_on_the_connection(session: Session) -> None:
    session.connection().execute(update(Page.__table__).values(title="new"))  # type: ignore[arg-type]


def add_many(session: Session) -> None:
    session.execute(insert(Page).returning(Page.id), [{"id": 7, "title": "new"}, {"id": 8, "title": "new"}])


def ask(session: Session) -> None:
    session.execute(select(Page.id))


def _another_table(sql: str) -> str:
    if sql.startswith("SELECT mapped_page.id"):
        return "INSERT INTO mapped_page_2026 (id, title) VALUES (9, 'new') RETURNING id"
    return sql.replace("mapped_page", "mapped_page_2026")


@pytest.mark.parametrize("write", [change, change_in_bulk, change_on_the_connection, add_many, ask])
def test_what_a_listener_sends_in_the_place_of_a_statement(
    both: tuple[Process, Process], write: Callable[[Session], None]
) -> None:
    writer, reader = both
    _elsewhere.create_all(writer.engine)
    with writer.sessions.begin() as session:
        session.add(Page(id=1))
        session.execute(_page_2026.insert().values(id=1, title=""))
    found = select(_page_2026.c.title).order_by(_page_2026.c.id)
    for _ in range(2):  # the second time it is known what was compiled
        warm(reader, found)
        with writer.sessions() as session:
            kept = session.get_one(Page, 1)
            with rewriting(writer.engine, _another_table):
                write(session)
                session.commit()
            del kept
        with reader.sessions() as session:
            now = list(map(tuple, session.execute(found)))
        assert ("new",) in now
        assert reader.ask(found)[1] == now
        with writer.sessions.begin() as session:
            session.execute(_page_2026.delete().where(_page_2026.c.id > 1))
            session.execute(_page_2026.update().values(title=""))
            session.execute(update(Page).values(title=""))


def flush_many(session: Session) -> None:
    session.add_all([Page(title="new"), Page(title="new")])
    session.flush()


@pytest.mark.parametrize("parser", [True, False])
@pytest.mark.parametrize(
    "rewrite",
    [
        lambda sql: f"/* traced */ {sql} -- so",
        lambda sql: f"-- by view(1)\n{sql}",
        lambda sql: sql.replace(" ", " /*+ hint(1) */ ", 1),
        lambda sql: f"{sql};",
    ],
)
@pytest.mark.parametrize(
    "write", [change, change_in_bulk, change_on_the_connection, add_many, flush_many, ask]
)
def test_a_comment_that_a_listener_adds_changes_nothing(
    both: tuple[Process, Process],
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Session], None],
    rewrite: Callable[[str], str],
    parser: bool,
) -> None:
    """As tracing does: other tables are not written, nor other rows where single ones were."""
    writer, reader = both
    with writer.sessions.begin() as session:
        session.add_all([Page(id=1), Page(id=2)])
    beside, row = select(Person.id), select(Page.title).where(Page.id == 2)
    warm(reader, beside)
    warm(reader, row)
    if not parser:
        monkeypatch.setitem(sys.modules, "sqlglot", None)
    with rewriting(writer.engine, rewrite), writer.sessions.begin() as session:
        write(session)
    assert reader.ask(beside)[0] == "hit"
    alone = write in (change, flush_many, ask)
    assert reader.ask(row)[0] == ("hit" if alone else "stale")


def test_a_hint_in_a_query_does_not_make_it_write(
    both: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody can read it, and one of its columns is called as what writes."""
    monkeypatch.setitem(sys.modules, "sqlglot", None)
    _, reader = both
    found, beside = select(Person.id.label("load"), func.replace("a", "b", "c")), select(Page.id)
    warm(reader, beside)
    with (
        rewriting(reader.engine, lambda sql: sql.replace("SELECT ", "SELECT ALL ", 1)),
        reader.sessions.begin() as session,
    ):
        session.execute(found)
    assert reader.ask(beside)[0] == "hit"


def test_several_statements_in_the_place_of_a_query(postgresql_engine: Engine) -> None:
    """Of which the first is a query, too."""
    Base.metadata.create_all(postgresql_engine)
    process = Process(postgresql_engine, make_region().configure("querycache.memory"))
    with process.sessions.begin() as session:
        session.add(Page(id=1))
    found = select(Page.title)
    several = "SELECT 'x'; UPDATE mapped_page SET title = title || 'x'"
    for _ in range(2):
        warm(process, found)
        with (
            rewriting(
                postgresql_engine,
                lambda sql: several if "person" in sql else sql,
                lambda given: given or None,
            ),
            process.sessions.begin() as session,
        ):
            session.execute(select(Person.id))
        with process.sessions() as session:
            assert process.ask(found)[1] == list(map(tuple, session.execute(found)))


def _of_page_2(parameters: Any) -> Any:
    """Whatever is for page 1 is for page 2."""
    if isinstance(parameters, Mapping):
        return {name: 2 if value == 1 else value for name, value in parameters.items()}
    if isinstance(parameters, list):
        return [_of_page_2(each) for each in parameters]
    return tuple(2 if value == 1 else value for value in parameters)


def _change_page(session: Session) -> None:
    session.get_one(Page, 1).title = "new"


def _change_pages(session: Session) -> None:
    for page in session.scalars(select(Page).where(Page.id.in_([1, 3]))).all():
        page.title = "new"


def _delete_page(session: Session) -> None:
    session.delete(session.get_one(Page, 1))


def _add_page(session: Session) -> None:
    session.add(Page(id=1, title="new"))


def _add_pages(session: Session) -> None:
    _add_page(session)
    session.add(Page(id=3, title="new"))


@pytest.mark.parametrize(
    ("write", "before"),
    [
        (_change_page, ["", "", ""]),
        (_change_pages, ["", "", ""]),
        (_delete_page, ["", ""]),
        (_add_page, []),
        (_add_pages, []),
    ],
)
def test_what_a_listener_gives_in_the_place_of_parameters(
    both: tuple[Process, Process], write: Callable[[Session], None], before: list[str]
) -> None:
    """The objects of a flush know nothing of it."""
    writer, reader = both
    row = select(Page.title).where(Page.id == 2)
    with writer.sessions.begin() as session:
        session.add_all(Page(id=number, title=title) for number, title in enumerate(before, 1))
    warm(reader, row)
    with writer.sessions() as session:
        write(session)
        with rewriting(writer.engine, lambda sql: sql, _of_page_2):
            session.commit()
    with reader.sessions() as session:
        now = list(map(tuple, session.execute(row)))
    assert now != [(title,) for title in before[1:2]]
    assert reader.ask(row)[1] == now


# --- tables that are declared several times, in part, or later ------------------------------------------------


class Firm(Base):
    __tablename__ = "mapped_firm"
    id: Mapped[int] = mapped_column(primary_key=True)


class Clerk(Base):
    __tablename__ = "mapped_clerk"
    id: Mapped[int] = mapped_column(primary_key=True)
    firm_id: Mapped[int] = mapped_column(ForeignKey(Firm.id, ondelete="CASCADE"))


Table("mapped_clerk", OtherBase.metadata, Column("id", Integer, primary_key=True))


class Bill(OtherBase):
    """Refers to a stub of a table that refers to others elsewhere."""

    __tablename__ = "mapped_bill"
    id: Mapped[int] = mapped_column(primary_key=True)
    clerk_id: Mapped[int] = mapped_column(ForeignKey("mapped_clerk.id", ondelete="CASCADE"))


class Badge(OtherBase):
    """Refers to a table that is not declared in its MetaData at all."""

    __tablename__ = "mapped_badge"
    id: Mapped[int] = mapped_column(primary_key=True)
    firm_id: Mapped[int] = mapped_column(ForeignKey("mapped_firm.id", ondelete="CASCADE"))


@pytest.mark.parametrize(
    "write",
    [
        lambda session: session.delete(session.get_one(Firm, 1)),
        lambda session: session.execute(delete(Firm).where(Firm.id == 1)),
        lambda session: session.execute(Firm.__table__.delete()),
        lambda session: session.execute(text("DELETE FROM mapped_firm WHERE id = 1")),
    ],
    ids=["unit of work", "bulk", "Core", "text"],
)
@pytest.mark.parametrize(
    "statement",
    [select(Bill.id), select(Bill.id).where(Bill.clerk_id == 1), select(Badge.id)],
    ids=["whole", "pinned", "undeclared target"],
)
def test_foreign_keys_that_go_from_one_metadata_to_another(
    both: tuple[Process, Process], write: Callable[[Session], object], statement: Any
) -> None:
    writer, reader = both
    with writer.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE mapped_bill (id INTEGER PRIMARY KEY, clerk_id REFERENCES mapped_clerk ON DELETE CASCADE)"
        )
        connection.exec_driver_sql(
            "CREATE TABLE mapped_badge (id INTEGER PRIMARY KEY, firm_id REFERENCES mapped_firm ON DELETE CASCADE)"
        )
    with writer.sessions.begin() as session:
        for each in (Firm(id=1), Clerk(id=1, firm_id=1), Bill(id=1, clerk_id=1)):
            session.add(each)
            session.flush()
        session.execute(text("INSERT INTO mapped_badge VALUES (1, 1)"))
    assert warm(reader, statement) == [(1,)]
    with writer.sessions.begin() as session:
        write(session)
    assert reader.ask(statement)[1] == []


def test_a_class_that_does_not_know_that_the_database_makes_a_value(both: tuple[Process, Process]) -> None:
    """With an object that is older than its row."""

    class One(DeclarativeBase):
        pass

    class Another(DeclarativeBase):
        pass

    class Told(One):
        __tablename__ = "mapped_load"
        id: Mapped[int] = mapped_column(primary_key=True)
        weight: Mapped[int]
        bucket: Mapped[int] = mapped_column(Computed("weight % 10"), info={"cache_tracked": True})

    class Untold(Another):
        __tablename__ = "mapped_load"
        id: Mapped[int] = mapped_column(primary_key=True)
        weight: Mapped[int]
        bucket: Mapped[int] = mapped_column(info={"cache_tracked": True})

    writer, reader = both
    One.metadata.create_all(writer.engine)
    with writer.sessions.begin() as session:
        session.add(Told(id=1, weight=1))
    with writer.sessions(expire_on_commit=False) as old:
        load = old.get_one(Untold, 1)
        old.commit()
        with writer.sessions.begin() as session:
            session.get_one(Untold, 1).weight = 3
        statement = select(Told.id, Told.weight).where(Told.bucket == 3)
        assert warm(reader, statement) == [(1, 3)]
        load.weight = 7
        old.commit()
    assert reader.ask(statement)[1] == []


def test_a_schema_that_is_translated_to_that_of_another_class(tmp_path: Path) -> None:
    class One(DeclarativeBase):
        pass

    class Another(DeclarativeBase):
        pass

    class Wide(One):
        __tablename__ = "mapped_lot"
        __table_args__ = {"schema": "tenant"}
        id: Mapped[int] = mapped_column(primary_key=True)
        number: Mapped[int] = mapped_column(info={"cache_tracked": True})

    class Narrow(Another):
        __tablename__ = "mapped_lot"
        __table_args__ = {"schema": "other"}
        id: Mapped[int] = mapped_column(primary_key=True)
        number: Mapped[int]

    engine = create_engine(f"sqlite:///{tmp_path}/mapped.db")
    event.listen(engine, "connect", lambda raw, record: raw.execute(f"ATTACH '{tmp_path}/other.db' AS other"))
    one = Process(
        engine.execution_options(schema_translate_map={"tenant": "other"}),
        make_region().configure("querycache.memory"),
    )
    Wide.__table__.create(one.engine)  # type: ignore[attr-defined]
    with one.sessions.begin() as session:
        session.add(Wide(id=1, number=1))
    statement = select(Wide.id).where(Wide.number == 1).order_by(Wide.id)
    assert warm(one, statement) == [(1,)]
    with one.sessions.begin() as session:
        session.add(Narrow(id=2, number=1))
    assert one.ask(statement)[1] == [(1,), (2,)]
    engine.dispose()


def test_a_class_is_mapped_after_a_statement_of_its_table_was_answered(both: tuple[Process, Process]) -> None:
    writer, reader = both
    metadata = MetaData()
    Table("mapped_writer", metadata, Column("id", Integer, primary_key=True))
    letters = Table(
        "mapped_letter",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("writer_id", ForeignKey("mapped_writer.id")),
    )
    metadata.create_all(writer.engine)
    with writer.engine.begin() as connection:
        connection.execute(insert(metadata.tables["mapped_writer"]).values(id=1))

    def statement() -> Any:
        return select(letters.c.id).where(letters.c.writer_id == 1)

    assert warm(reader, statement()) == []

    class Another(DeclarativeBase):
        pass

    class Letter(Another):
        __tablename__ = "mapped_letter"
        id: Mapped[int] = mapped_column(primary_key=True)
        writer_id: Mapped[int]

    with writer.sessions.begin() as session:
        session.add(Letter(id=1, writer_id=1))
    assert reader.ask(statement())[1] == [(1,)]


class Item(Base):
    __tablename__ = "mapped_item"
    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[int] = mapped_column(unique=True)
    title: Mapped[str | None] = mapped_column(String(20))


class ByCode(OtherBase):
    """Another key of the same rows; of the first it is not told unless it asks."""

    __table__ = Table(
        "mapped_item",
        OtherBase.metadata,
        Column("id", Integer, FetchedValue(), unique=True),
        Column("code", Integer, primary_key=True, autoincrement=False),
        Column("title", String(20)),
    )
    __mapper_args__ = {"eager_defaults": False, "exclude_properties": ["id"]}


@pytest.mark.parametrize(
    "write",
    [
        lambda session: session.add(ByCode(code=20)),
        lambda session: setattr(session.get_one(ByCode, 10), "title", "new"),
        lambda session: session.delete(session.get_one(ByCode, 10)),
    ],
    ids=["insert", "update", "delete"],
)
def test_a_class_with_another_primary_key(
    both: tuple[Process, Process], write: Callable[[Session], object]
) -> None:
    writer, reader = both
    with writer.sessions.begin() as session:
        session.add(Item(id=1, code=10))
    statements = [select(Item.id, Item.title).where(Item.id == number) for number in (1, 2)]
    before = [warm(reader, statement) for statement in statements]
    with writer.sessions.begin() as session:
        write(session)
    with Session(reader.engine) as session:
        rows = [list(map(tuple, session.execute(statement))) for statement in statements]
    assert rows != before
    assert [reader.ask(statement)[1] for statement in statements] == rows


def test_a_foreign_key_to_a_column_whose_table_is_declared_later(both: tuple[Process, Process]) -> None:
    class One(DeclarativeBase):
        pass

    target = Column("id", Integer, primary_key=True)

    class Early(One):
        __tablename__ = "mapped_early"
        id: Mapped[int] = mapped_column(primary_key=True)
        later: Mapped[int | None] = mapped_column(ForeignKey(target, ondelete="CASCADE"))

    writer, reader = both
    with writer.sessions.begin() as session:
        session.add(Person(id=7))
    assert reader.ask(select(Person.id).where(Person.id == 7))[1] == [(7,)]
    later, table = Table("mapped_later", One.metadata, target), Early.__table__
    assert cascades(later, delete=True).tables == {table}


@pytest.mark.parametrize(
    ("hint", "outcome", "rows"),
    [("OR mapped_person.id > 5", "stale", [1, 6]), ("/*+ SeqScan(x) */", "hit", [1])],
)
def test_what_a_hint_adds_to_a_statement(
    both: tuple[Process, Process], hint: str, outcome: str, rows: list[int]
) -> None:
    writer, reader = both
    statement = select(Person.id).where(Person.id == 1).with_statement_hint(hint)
    warm(reader, statement)
    with writer.sessions.begin() as session:
        session.add(Person(id=6))
    assert reader.ask(statement) == (outcome, [(each,) for each in rows])
