"""Fixtures: databases in memory, a count of the SQL they get, and indexes that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import StaticPool

from querycache.session_index import SessionIndex
from tests.session_index.models import Base


@pytest.fixture(scope="module", autouse=True)
def _small_heap(small_heap: None) -> None:
    """Nearly all of these collect garbage."""


def make_engine() -> Engine:
    """An SQLite database in memory whose savepoints work (the driver must not begin transactions itself)."""
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    Base.metadata.create_all(engine)
    return engine


class Statements:
    """The SQL that engines have got."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def watch(self, engine: Engine) -> None:
        @event.listens_for(engine, "before_cursor_execute")
        def record(
            conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
        ) -> None:
            self.seen.append(statement)

    @contextmanager
    def none(self) -> Iterator[None]:
        """Fails if any SQL is emitted inside."""
        before = len(self.seen)
        yield
        assert self.seen[before:] == []

    @contextmanager
    def counted(self, number: int) -> Iterator[None]:
        """Fails unless exactly so many statements are emitted inside."""
        before = len(self.seen)
        yield
        assert len(self.seen) - before == number, self.seen[before:]


@pytest.fixture
def statements() -> Statements:
    return Statements()


@pytest.fixture
def engine(statements: Statements) -> Iterator[Engine]:
    engine = make_engine()
    statements.watch(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def factory(engine: Engine) -> sessionmaker[Session]:
    return sessionmaker(engine)


@pytest.fixture
def session(factory: sessionmaker[Session]) -> Iterator[Session]:
    with factory() as session:
        yield session


@pytest.fixture
def new_index() -> Iterator[Callable[..., SessionIndex]]:
    """Makes SessionIndexes that are detached after the test."""
    made: list[SessionIndex] = []

    def make(*target: Any) -> SessionIndex:
        made.append(SessionIndex(*target))
        return made[-1]

    yield make
    for indexes in made:
        indexes.detach()


@pytest.fixture
def indexes(new_index: Callable[..., SessionIndex], factory: sessionmaker[Session]) -> SessionIndex:
    return new_index(factory)
