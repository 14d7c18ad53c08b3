"""One table under all the names that it can have: whoever writes it under one, no reader under another is stale.

A table of the default schema is named with it or without. What the default schema is, a connection may be told by itself
(``SET search_path``), of which nobody is told.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    column,
    create_engine,
    event,
    select,
    text,
    update,
)
from sqlalchemy import delete as sqlalchemy_delete
from sqlalchemy import table as sqlalchemy_table
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from querycache import QueryCache


class Base(DeclarativeBase):
    pass


class Unnamed(Base):
    __tablename__ = "pot"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    weight: Mapped[int]


class InPublic(Base):
    __tablename__ = "pot"
    __table_args__ = {"schema": "public"}
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    weight: Mapped[int]


class InOther(Base):
    __tablename__ = "pot"
    __table_args__ = {"schema": "other"}
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    weight: Mapped[int]


@dataclass
class Place:
    """One database with the table in two schemas, reached in several ways."""

    url: Any
    engine: Engine
    cache: QueryCache
    factory: sessionmaker[Session]
    engines: Mapping[str, Engine]

    @contextmanager
    def session(self, way: str) -> Iterator[Session]:
        """``told``: its connection was told of another default schema, by itself."""
        with self.engines.get(way, self.engine).connect() as connection:
            if way == "told":
                connection.exec_driver_sql("SET search_path = other")
                connection.commit()
            try:
                with self.factory(bind=connection) as session:
                    yield session
            finally:
                if way == "told":
                    connection.invalidate()


@pytest.fixture
def place(postgresql_engine: Engine) -> Iterator[Place]:
    with postgresql_engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA other"))
        for table in (InPublic.__table__, InOther.__table__):
            table.create(connection)  # type: ignore[attr-defined]
            connection.execute(table.insert(), [{"id": n, "weight": 0} for n in (1, 2)])  # type: ignore[attr-defined]
    url = postgresql_engine.url
    engines = {
        "default": create_engine(url, connect_args={"options": "-c search_path=other"}),
        "map": postgresql_engine.execution_options(schema_translate_map={None: "other", "public": "other"}),
    }
    cache = QueryCache("memory://")
    factory = sessionmaker(postgresql_engine)
    cache.attach(factory)
    for each in engines.values():
        cache.attach(each)
    yield Place(url, postgresql_engine, cache, factory, engines)
    engines["default"].dispose()


NAMES: Mapping[str, list[tuple[str, Any]]] = {
    "public": [("", Unnamed), ("", InPublic)],
    "other": [("", InOther), ("told", Unnamed), ("default", Unnamed), ("default", InOther), ("map", Unnamed)],
}
"""For each of the two tables, the ways to it: how the connection is made, and the class."""

READERS: Mapping[str, Callable[[Any], Any]] = {
    "by key": lambda cls: select(cls.weight).where(cls.id == 1),
    "all": lambda cls: select(cls.id, cls.weight).order_by(cls.id),
    "text": lambda cls: text(f"SELECT id, weight FROM {_sql(cls)} ORDER BY id").columns(
        id=Integer, weight=Integer
    ),
}


def _sql(cls: Any) -> str:
    return str(cls.__table__.fullname)


def _row(session: Session, cls: Any) -> None:
    session.get_one(cls, 1).weight += 1


WRITERS: Mapping[str, Callable[[Session, Any], object]] = {
    "row": _row,
    "set": lambda session, cls: session.execute(update(cls).values(weight=cls.weight + 1)),
    "text": lambda session, cls: session.execute(text(f"UPDATE {_sql(cls)} SET weight = weight + 1")),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("table", NAMES)
def test_no_reader_is_stale_under_any_name(place: Place, table: str, writer: str) -> None:
    def ask(way: str, cls: Any, reader: str) -> Any:
        statement = READERS[reader](cls)
        with place.session(way) as session:
            return session.execute(statement.execution_options(cache_key=True)).all()

    def is_possible(way: str, kind: str) -> bool:
        return (way, kind) != ("map", "text")  # no schemas are translated in texts

    readers = [(*name, reader) for name in NAMES[table] for reader in READERS if is_possible(name[0], reader)]
    for way, cls in NAMES[table]:
        if not is_possible(way, writer):
            continue
        for each in readers:
            ask(*each)
        with place.cache.recording() as events:
            before = {each: ask(*each) for each in readers}
        assert {event.outcome for event in events} == {"hit"}
        with place.session(way) as session:
            WRITERS[writer](session, cls)
            session.commit()
        for each in readers:
            found = ask(*each)
            assert found != before[each], f"{each} is stale after a write by {way, cls}"


@pytest.mark.parametrize("named", ["table", "entity"])
@pytest.mark.parametrize("table", NAMES)
def test_what_is_invalidated_by_hand_is_so_under_any_name(place: Place, table: str, named: str) -> None:
    for way, cls in NAMES[table]:
        if way:
            continue  # what is named by hand is what the application calls it
        for to_way, reads in NAMES[table]:
            for reader in READERS:
                if (to_way, reader) == ("map", "text"):
                    continue
                statement = READERS[reader](reads).execution_options(cache_key=True)
                with place.session(to_way) as session:
                    session.execute(statement).all()
                    assert place.cache.explain(session, statement).stored
                    session.rollback()
                    if named == "table":
                        place.cache.invalidate(tables=[_sql(cls)])
                    else:
                        place.cache.invalidate(entities=[cls])
                    assert not place.cache.explain(session, statement).stored, (cls, to_way, reads, reader)


# --- tables that several classes declare, and what follows from one for the others ----------------------------------


def stale_after(
    cache: QueryCache, reads: sessionmaker[Session], statement: Any, write: Callable[[], object]
) -> bool:
    """Whether an answer that was a hit before a write is the same after it."""

    def ask() -> Any:
        with reads() as session:
            return session.execute(statement.execution_options(cache_key=True)).all()

    ask()
    with cache.recording() as events:
        before = ask()
    assert [event.outcome for event in events] == ["hit"]
    write()
    return bool(ask() == before)


def transaction(target: Any, *statements: Any) -> Callable[[], None]:
    def write() -> None:
        with target.begin() as connection:
            for each in statements:
                connection.execute(each)

    return write


@pytest.mark.parametrize("how", ["row", "set"])
@pytest.mark.parametrize("schema", [None, "public"])
def test_a_foreign_key_that_refers_to_another_declaration(
    postgresql_engine: Engine, schema: str | None, how: str
) -> None:
    class Family(DeclarativeBase):
        pass

    class Elsewhere(DeclarativeBase):
        pass

    class Parent(Family):
        __tablename__ = "parent"
        __table_args__ = {"schema": "public"}
        id: Mapped[int] = mapped_column(primary_key=True)

    class Child(Family):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int] = mapped_column(ForeignKey("public.parent.id", ondelete="CASCADE"))

    class Again(Elsewhere):
        __tablename__ = "parent"
        __table_args__ = {"schema": schema}
        id: Mapped[int] = mapped_column(primary_key=True)

    Family.metadata.create_all(postgresql_engine)
    factory = sessionmaker(postgresql_engine)
    cache = QueryCache("memory://").attach(factory)
    with factory.begin() as session:
        session.add(Parent(id=1))
        session.flush()
        session.add(Child(id=1, parent_id=1))

    def delete() -> None:
        with factory.begin() as session:
            if how == "row":
                session.delete(session.get_one(Again, 1))
            else:
                session.execute(sqlalchemy_delete(Again))

    assert not stale_after(cache, factory, select(Child.id), delete)


@pytest.fixture
def placeholder(postgresql_engine: Engine) -> Iterator[tuple[QueryCache, Engine, sessionmaker[Session], Any]]:
    """Classes whose schema is called otherwise in the database."""

    class Tenants(DeclarativeBase):
        pass

    class House(Tenants):
        __tablename__ = "house"
        __table_args__ = {"schema": "tenant"}
        id: Mapped[int] = mapped_column(primary_key=True)

    class Room(Tenants):
        __tablename__ = "room"
        __table_args__ = {"schema": "tenant"}
        id: Mapped[int] = mapped_column(primary_key=True)
        house_id: Mapped[int] = mapped_column(ForeignKey("tenant.house.id", ondelete="CASCADE"))

    engine = postgresql_engine.execution_options(schema_translate_map={"tenant": "acme"})
    with postgresql_engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA acme"))
    Tenants.metadata.create_all(engine)
    factory = sessionmaker(engine)
    cache = QueryCache("memory://").attach(factory)
    with factory.begin() as session:
        session.add(House(id=1))
        session.flush()
        session.add(Room(id=1, house_id=1))
    yield cache, postgresql_engine, factory, Room


@pytest.mark.parametrize("write", ["text", "core"])
@pytest.mark.parametrize("through", ["session", "engine"])
def test_cascades_of_tables_that_are_called_otherwise_in_the_database(
    placeholder: Any, write: str, through: str
) -> None:
    cache, engine, factory, room = placeholder
    statement: Any = text("DELETE FROM acme.house")
    if write == "core":
        statement = sqlalchemy_delete(Table("house", MetaData(), schema="acme"))
    target = factory if through == "session" else engine
    assert not stale_after(cache, factory, select(room.id), transaction(target, statement))


def test_entities_that_are_called_otherwise_in_the_database(placeholder: Any) -> None:
    cache, _, factory, room = placeholder
    statement = select(room.id).execution_options(cache_key=True)
    with factory() as session:
        session.execute(statement).all()
        assert cache.explain(session, statement).stored
        cache.invalidate(entities=[room])
        assert not cache.explain(session, statement).stored


@pytest.mark.parametrize("mapped", [True, False])
def test_a_unique_column_of_which_the_writer_knows_nothing(postgresql_engine: Engine, mapped: bool) -> None:
    class Knows(DeclarativeBase):
        pass

    class KnowsNot(DeclarativeBase):
        pass

    class Thin(KnowsNot):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        code: Mapped[int]

    table = Table(
        "thing",
        Knows.metadata,
        Column("id", Integer, primary_key=True),
        Column("code", Integer, unique=True),
        schema="public",
    )
    if mapped:
        type("Thing", (Knows,), {"__table__": table})
    table.create(postgresql_engine)
    factory = sessionmaker(postgresql_engine)
    cache = QueryCache("memory://").attach(factory)

    def add() -> None:
        with factory.begin() as session:
            session.add(Thin(id=1, code=7))

    assert not stale_after(cache, factory, select(table.c.id).where(table.c.code == 7), add)
    Knows.registry.dispose()


@pytest.mark.parametrize("declared", ["total", "public.total"])
@pytest.mark.parametrize("reader", [None, "public"])
@pytest.mark.parametrize("step", ["subtotal", "public.subtotal"])
def test_views_are_declared_under_any_name(
    place: Place, declared: str, reader: str | None, step: str
) -> None:
    with place.engine.begin() as connection:
        connection.execute(text("CREATE VIEW subtotal AS SELECT sum(weight) AS n FROM pot"))
        connection.execute(text("CREATE VIEW total AS SELECT sum(n) AS n FROM subtotal"))
    place.cache.depends(declared, on=[step])
    place.cache.depends("subtotal", on=["public.pot"])
    total = sqlalchemy_table("total", column("n"), schema=reader)
    write = transaction(place.factory, update(Unnamed).values(weight=Unnamed.weight + 1))
    assert not stale_after(place.cache, place.factory, select(total.c.n), write)


# --- what is outside of the promise, and the remedy of the README's table ------------------------------------


@pytest.mark.parametrize(("writer", "stale"), [("shelf", False), ("cupboard", True)])
def test_a_file_of_sqlite_under_two_names(tmp_path: Path, writer: str, stale: bool) -> None:
    """Under one name everywhere nothing is missed. Under two it is another table, as the README says."""

    def engine_of(name: str) -> Engine:
        engine = create_engine("sqlite://")
        event.listen(
            engine, "connect", lambda raw, _: raw.execute(f"ATTACH DATABASE '{tmp_path}/pots' AS {name}")
        )
        return engine

    def table_of(name: str) -> Table:
        columns = Column("id", Integer, primary_key=True), Column("weight", Integer)
        return Table("pot", MetaData(), *columns, schema=name)

    read = table_of("shelf")
    reading, writing = engine_of("shelf"), engine_of(writer)
    with reading.begin() as connection:
        read.create(connection)
        connection.execute(read.insert(), {"id": 1, "weight": 0})
    factory = sessionmaker(reading)
    cache = QueryCache("memory://").attach(factory).attach(writing)

    def write() -> None:
        with writing.begin() as connection:
            connection.execute(update(table_of(writer)).values(weight=1))

    assert stale_after(cache, factory, select(read.c.weight), write) is stale
    for each in (reading, writing):
        each.dispose()


_WRITER = """
import sys

from sqlalchemy import ForeignKey, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from querycache import QueryCache

database, store, declared = sys.argv[1:]

class Base(DeclarativeBase):
    pass

class Shelf(Base):
    __tablename__ = "shelf"
    id: Mapped[int] = mapped_column(primary_key=True)

class Jar(Base):
    __tablename__ = "jar"
    id: Mapped[int] = mapped_column(primary_key=True)
    shelf: Mapped[int] = mapped_column(*[ForeignKey("shelf.id")] if declared == "alike" else [])

engine = create_engine(database)
QueryCache(store, namespace="declared", lease=0.1).attach(engine).attach(Session)
with Session(engine) as session:
    session.get_one(Jar, 1).shelf = 2
    session.commit()
"""


@pytest.mark.parametrize(("declared", "stale"), [("alike", False), ("without its foreign key", True)])
def test_two_processes_that_declare_a_table(
    sqlite_engine: Engine, redis_store_url: str, declared: str, stale: bool
) -> None:
    """Alike, nothing is missed. Where the writer does not know the column, the reader's rows are not, as the README says."""
    metadata = MetaData()
    shelf = Table("shelf", metadata, Column("id", Integer, primary_key=True))
    jar = Table(
        "jar",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("shelf", ForeignKey(shelf.c.id)),
    )
    metadata.create_all(sqlite_engine)
    with sqlite_engine.begin() as connection:
        connection.execute(shelf.insert(), [{"id": 1}, {"id": 2}])
        connection.execute(jar.insert(), {"id": 1, "shelf": 1})
    factory = sessionmaker(sqlite_engine)
    cache = QueryCache(redis_store_url, namespace="declared", lease=0.1).attach(factory)
    statement = select(jar.c.id).where(jar.c.shelf == 1)
    for _ in range(200):  # a store that may have lost its versions stores nothing for a lease
        with factory() as session:
            session.execute(statement.execution_options(cache_key=True)).all()
            if cache.explain(session, statement.execution_options(cache_key=True)).stored:
                break
        time.sleep(0.01)
    url = sqlite_engine.url.render_as_string(hide_password=False)

    def write() -> None:
        command = [sys.executable, "-c", _WRITER, url, redis_store_url, declared]
        subprocess.run(command, check=True, timeout=60)

    assert stale_after(cache, factory, statement, write) is stale
