"""Writes in forms that few applications use, but that must be noticed, and must never fail for being noticed.

Each of these was found by running SQLAlchemy's own tests with a cache attached (``tests/sqlalchemy_suite``).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import ForeignKey, StaticPool, create_engine, delete, insert, select, update
from sqlalchemy.ext.declarative import DeferredReflection
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, Session, mapped_column, relationship, sessionmaker

from querycache import QueryCache
from querycache.denormalize import count_of

pytestmark = pytest.mark.usefixtures("small_heap")


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture
def sessions() -> Iterator[sessionmaker[Session]]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    maker = sessionmaker(engine)
    with maker.begin() as session:
        session.add(Author(id=1, name="one"))
    QueryCache().attach(maker)
    yield maker
    engine.dispose()


NAMES = select(Author.name).order_by(Author.id).execution_options(cache_key=True)


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (insert(Author).values(id=2, name="two"), ["one", "two"]),
        (update(Author).values(name="new"), ["new"]),
        (delete(Author), []),
    ],
    ids=["insert", "update", "delete"],
)
def test_a_write_whose_returned_rows_are_loaded_by_from_statement(
    sessions: sessionmaker[Session], write: Any, names: list[str]
) -> None:
    with sessions() as session:
        assert session.scalars(NAMES).all() == ["one"]

    with sessions.begin() as session:
        session.scalars(select(Author).from_statement(write.returning(Author))).all()

    with sessions() as session:
        assert session.scalars(NAMES).all() == names


def test_classes_that_are_declared_and_not_mapped_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until prepare() reflects their tables, ``registry.mappers`` fails."""

    class Declared(DeclarativeBase):
        pass

    class Later(DeferredReflection, Declared):
        __tablename__ = "later"

    class Thread(Declared):
        __tablename__ = "thread"
        id: Mapped[int] = mapped_column(primary_key=True)
        comments: Mapped[list[Comment]] = relationship()
        number: Mapped[int] = count_of("comments")

    class Comment(Declared):
        __tablename__ = "comment"
        id: Mapped[int] = mapped_column(primary_key=True)
        thread_id: Mapped[int] = mapped_column(ForeignKey("thread.id"))

    engine = create_engine("sqlite://", poolclass=StaticPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE later (id INTEGER PRIMARY KEY, thread_id INTEGER UNIQUE)")
    Declared.metadata.create_all(engine)
    maker = sessionmaker(engine)
    monkeypatch.setattr(Mapper, "_prop_set", None)  # as before any cache was attached
    QueryCache().attach(maker)
    numbers = select(Thread.number).execution_options(cache_key=True)
    for count in (1, 2):
        with maker.begin() as session:
            thread = session.get(Thread, 1) or Thread(id=1)
            thread.comments.append(Comment())
            session.add(thread)
        with maker() as session:
            assert session.scalars(numbers).all() == [count]
    Later.prepare(engine)
    later = select(Later.id).where(Later.thread_id == 1).execution_options(cache_key=True)
    with maker() as session:
        assert session.scalars(later).all() == []
    with maker.begin() as session:
        session.add(Later(id=1, thread_id=1))
    with maker() as session:
        assert session.scalars(later).all() == [1]
    Declared.registry.dispose()  # other tests write to tables of these names by themselves
    engine.dispose()


def test_classes_that_nobody_has_any_more_go() -> None:
    """A registry that is remembered is found among the living by the next look, and so would be remembered for ever."""

    def declare() -> list[weakref.ref[Any]]:
        class Own(DeclarativeBase):
            pass

        class Note(Own):
            __tablename__ = "note"
            id: Mapped[int] = mapped_column(primary_key=True)

        engine = create_engine("sqlite://", poolclass=StaticPool)
        Own.metadata.create_all(engine)
        maker = sessionmaker(engine)
        QueryCache().attach(maker)
        with maker.begin() as session:
            session.add(Note(id=1))
        with maker.begin() as session:
            session.execute(delete(Note))
        with maker() as session:
            assert session.scalars(select(Note.id).execution_options(cache_key=True)).all() == []
        engine.dispose()
        return [weakref.ref(each) for each in (Own.registry, Own.metadata, engine)]

    gone = []
    for _ in range(8):
        gone.append(declare())
        gc.collect()
    assert [reference() for each in gone[:3] for reference in each] == [None] * 9
