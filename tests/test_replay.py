"""What a replayed statement must have in common with one that the database has answered.

Each of these was found by running SQLAlchemy's own tests on replayed rows (``tests/sqlalchemy_suite``).
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import ForeignKey, StaticPool, create_engine, event, select
from sqlalchemy.exc import StatementError
from sqlalchemy.ext import serializer
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    immediateload,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
)

from querycache import QueryCache
from querycache.backends.memory import MemoryBackend
from querycache.sa_internals.replay import ReplayCursor


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author] = relationship(back_populates="books")


@pytest.fixture
def cache() -> QueryCache:
    return QueryCache()


@pytest.fixture
def session(cache: QueryCache) -> Iterator[Session]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    with Session(engine) as seed, seed.begin():
        seed.add(Author(id=1, name="one", books=[Book(id=1), Book(id=2)]))
    maker = sessionmaker(engine)
    cache.attach(maker)
    with maker() as session:
        yield session
    engine.dispose()


def begin_while_the_store_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a server, which the memory store is not."""
    fetch = MemoryBackend.fetch

    def slowly(self: MemoryBackend, key: str | None, counters: Any = (), meanwhile: Any = None) -> Any:
        if meanwhile is not None:
            meanwhile()
        return fetch(self, key, counters)

    monkeypatch.setattr(MemoryBackend, "fetch", slowly)


@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.server("postgresql"))]
)
def test_nothing_of_a_session_stays_behind(
    request: pytest.FixtureRequest, cache: QueryCache, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    """A load that was begun for nothing would refer to its Session, and the other way round."""
    begin_while_the_store_is_at_work(monkeypatch)
    engine = request.getfixturevalue(f"{database}_engine")
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Author(id=1, books=[Book(id=1)]))
    gc.collect()
    gc.disable()
    try:
        for mode in ("use", "use", "refresh", "refresh"):
            session = Session(engine)
            cache.attach(session)
            with session:
                statement = AUTHORS_WITH_BOOKS.execution_options(cache_mode=mode)
                assert session.scalars(statement).one().books
            gone = weakref.ref(session)
            cache.detach(session)
            del session
            assert gone() is None, mode
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{}, {"preserve_rowcount": True}, {"prebuffer_rows": True}])
def test_a_replay_begun_ahead_gives_what_it_gives_otherwise(
    session: Session, cache: QueryCache, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    found = []
    begin_while_the_store_is_at_work(monkeypatch)
    statement = select(Author, Author.name).execution_options(cache_key=True, **options)
    with cache.recording() as events:
        for name in ("one", "one", "two", "two"):
            if name == "two" and "two" not in str(found):
                session.commit()
                session.connection().exec_driver_sql("INSERT INTO author (id, name) VALUES (2, 'two')")
                session.commit()
            result = session.execute(statement)
            found.append([name for _, name in result])
    assert found == [["one"], ["one"], ["one", "two"], ["one", "two"]]
    assert [each.outcome for each in events] == ["miss", "fill", "hit", "stale", "fill", "hit"]


AUTHORS_WITH_BOOKS = (
    select(Author).options(selectinload(Author.books)).execution_options(cache_key="authors", mine=1)
)


@pytest.mark.parametrize("outcome", ["miss", "hit"])
def test_post_loads_are_shown_to_handlers_with_the_options_that_were_given(
    cache: QueryCache, session: Session, outcome: str
) -> None:
    if outcome == "hit":
        session.scalars(AUTHORS_WITH_BOOKS).all()
        session.expunge_all()
    seen: list[dict[str, Any]] = []

    @event.listens_for(session, "do_orm_execute")
    def note(state: ORMExecuteState) -> None:
        seen.append(dict(state.execution_options))

    with cache.recording() as events:
        session.scalars(AUTHORS_WITH_BOOKS).all()

    assert events[0].outcome == outcome
    for options in seen:
        public = {name: value for name, value in options.items() if not name.startswith(("_", "sa_"))}
        assert public == {"cache_key": "authors", "mine": 1}
    assert len(seen) == 2


def test_a_post_load_flushes_where_only_its_statement_was_told_not_to(session: Session) -> None:
    statement = select(Author).options(selectinload(Author.books)).execution_options(autoflush=False)
    flushed = []

    for options in ({}, {"cache_key": True}):
        author = session.get_one(Author, 1)
        author.name = "changed"
        session.expire(author, ["books"])
        session.scalars(statement.execution_options(**options)).all()
        flushed.append(author not in session.dirty)
        session.rollback()

    assert flushed[0] == flushed[1]


def test_a_bypass_with_handlers_after_the_cache_loads_as_if_there_were_none(session: Session) -> None:
    event.listen(session, "do_orm_execute", lambda state: None)
    statement = select(Author).options(immediateload(Author.books)).execution_options(yield_per=1)

    (author,) = session.scalars(statement.execution_options(cache_key=True))

    assert len(author.__dict__["books"]) == 2


@pytest.mark.parametrize("options", [{}, {"cache_key": True}], ids=["uncached", "cached"])
def test_parameters_that_cannot_be_resolved_raise_what_they_raise_uncached(
    cache: QueryCache, session: Session, options: dict[str, Any]
) -> None:
    transient = Author()

    with (
        cache.recording() as events,
        pytest.raises(StatementError, match=r"Can't resolve value for column author\.id") as raised,
    ):
        session.scalars(select(Book).where(Book.author == transient).execution_options(**options)).all()

    assert raised.value.statement is not None
    assert [(each.outcome, each.reason) for each in events] == [("bypass", "parameters")] * len(options)


def test_a_statement_that_is_kept_can_be_copied(session: Session) -> None:
    """What is remembered with it, to prepare it once, belongs to an engine of this process."""
    mapped = select(Book.id).order_by(Book.id).execution_options(cache_key=True)
    table = Book.metadata.tables["book"]
    core = select(table.c.id).order_by(table.c.id).execution_options(cache_key=True)
    for statement in (mapped, core):
        for _ in range(4):
            assert session.scalars(statement).all() == [1, 2]
    sent = serializer.loads(serializer.dumps(mapped), Base.metadata, session)
    for other in (sent, pickle.loads(pickle.dumps(core)), copy.copy(mapped), copy.deepcopy(core)):
        assert session.scalars(other).all() == [1, 2]
        assert session.scalars(other.limit(1)).all() == [1]


def test_results_of_a_statement_that_is_kept_are_read_side_by_side(session: Session) -> None:
    statement = select(Book.id, Book.author_id).order_by(Book.id).execution_options(cache_key=True)
    for _ in range(3):
        session.execute(statement).all()
    results = [session.execute(statement) for _ in range(3)]
    assert [result.fetchone() for result in results] == [(1, 1)] * 3
    assert [result.fetchone() for result in results] == [(2, 1)] * 3
    assert [result.fetchone() for result in results] == [None] * 3


def test_a_statement_that_is_kept_is_asked_of_several_engines(cache: QueryCache) -> None:
    statement = select(Author.name).execution_options(cache_key=True)
    engines = [create_engine("sqlite://", poolclass=StaticPool) for _ in range(2)]
    for number, engine in enumerate(engines):
        Base.metadata.create_all(engine)
        cache.attach(maker := sessionmaker(engine))
        with maker.begin() as db:
            db.add(Author(name=str(number)))
    for _ in range(4):
        for number, engine in enumerate(engines):
            with Session(engine) as db:
                cache.attach(db)
                assert db.scalars(statement).all() == [str(number)]


def test_a_signal_while_rows_are_taken_is_what_the_application_sees(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    statement = select(Author.id, Author.name).execution_options(cache_key=True)
    rows = session.execute(statement).all()
    with monkeypatch.context() as patch:
        patch.setattr(ReplayCursor, "fetchall", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.execute(statement).all()
    assert session.execute(statement).all() == rows
