"""One table under all the names that it can have: whoever writes it under one, no reader under another is stale.

A table of the default schema is named with it or without. What the default schema is, a connection may be told by itself
(``SET search_path``), of which nobody is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Engine, Integer, create_engine, select, text, update
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
