"""FromCache and RelationshipCache as options of statements: what SQLAlchemy does with them on their way."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import ForeignKey, Select, create_engine, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
)
from sqlalchemy.pool import StaticPool

from querycache import FromCache, QueryCache, RelationshipCache
from querycache.options import CacheOptions
from querycache.sa_internals import cache_key_of


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    books: Mapped[list[Book]] = relationship(back_populates="author")
    prizes: Mapped[list[Prize]] = relationship()


class Book(Base):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
    author: Mapped[Author] = relationship(back_populates="books")


class Prize(Base):
    __tablename__ = "prize"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))


Outcomes = Callable[[Select[Any]], list[str]]
AUTHOR = select(Author)


@pytest.fixture
def db() -> Iterator[Session]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    with Session(engine) as db:
        db.add(Author(id=1, books=[Book(id=1)], prizes=[Prize(id=1)]))
        db.commit()
        yield db
    engine.dispose()


@pytest.fixture
def outcomes(db: Session) -> Outcomes:
    """What the cache does when an author is selected, and then the books and the prizes are touched."""
    cache = QueryCache().attach(db)

    def outcomes(statement: Select[Any]) -> list[str]:
        db.expunge_all()
        with cache.recording() as events:
            author = db.scalars(statement).one()
            assert [len(author.books), len(author.prizes)] == [1, 1]
        return [event.outcome for event in events]

    return outcomes


FROM_CACHE, BOOKS, PRIZES = FromCache(), RelationshipCache(Author.books), RelationshipCache(Author.prizes)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([FROM_CACHE], [BOOKS], ["miss", "fill"]),
        ([BOOKS], [BOOKS, PRIZES], ["hit", "miss", "fill"]),
        ([BOOKS], [FROM_CACHE, PRIZES], ["miss", "fill"] * 2),
        ([FROM_CACHE, selectinload(Author.books)], [selectinload(Author.books), PRIZES], ["miss", "fill"]),
        ([BOOKS], [FROM_CACHE], ["miss", "fill"]),
    ],
    ids=["one for another", "one more", "two for one", "beside a loader option", "not for later"],
)
def test_options_do_not_take_the_place_of_others(
    outcomes: Outcomes, first: list[Any], second: list[Any], expected: list[str]
) -> None:
    """SQLAlchemy compiles statements once that differ in such options only, and pairs theirs by position."""
    outcomes(AUTHOR.options(*first))
    assert outcomes(AUTHOR.options(*second)) == expected
    assert set(outcomes(AUTHOR.options(*second))) == {"hit"}


def test_statements_with_values_of_their_own_are_compiled_once() -> None:
    keys = {
        cache_key_of(AUTHOR.options(FromCache(ttl=ttl), RelationshipCache(Author.books, ttl=ttl)))
        for ttl in (1, 2, 3)
    }
    assert len(keys) == 1


def test_objects_are_pickled_with_the_option(db: Session, outcomes: Outcomes) -> None:
    outcomes(AUTHOR.options(BOOKS))
    author = db.scalars(AUTHOR.options(BOOKS)).one()
    db.expunge_all()
    again = pickle.loads(pickle.dumps(author))
    db.add(again)
    db.expire(again, ["books"])
    assert [book.id for book in again.books] == [1]


def test_a_relationship_of_an_alias(outcomes: Outcomes) -> None:
    author = aliased(Author)
    statement = select(author).options(RelationshipCache(author.books))
    assert outcomes(statement) == ["miss", "fill"]
    assert outcomes(statement) == ["hit"]


def test_a_pickled_option_is_as_good_as_a_new_one_in_another_process() -> None:
    code = (
        "import pickle, sys; from querycache.options import CacheOptions; "
        "sys.stdout.buffer.write(pickle.dumps(CacheOptions(key='a name')))"
    )
    for seed in "1", "2":
        pickled = subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}
        )
        assert {pickle.loads(pickled)} == {CacheOptions(key="a name")}


@pytest.mark.skipif(sqlalchemy.__version__.startswith("2.0."), reason="Sessions have no options of their own")
def test_options_of_a_session_and_of_a_statement_meet_in_what_completes_its_objects() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    sessions: Any = sessionmaker(engine, execution_options={"cache_key": True})
    QueryCache().attach(sessions)
    statement = select(Author).options(selectinload(Author.books))
    with sessions() as session:
        session.add(Author(id=1, books=[Book(id=1)]))
        session.flush()  # so that the cache is not asked
        session.expunge_all()
        [author] = session.scalars(statement.execution_options(cache_key="authors", cache_exact=True))
        assert [book.id for book in author.books] == [1]
    engine.dispose()
