"""A signal may stop a lookup at any moment: a time limit, Ctrl-C. What comes after it knows nothing of what was under way."""

from __future__ import annotations

import dis
import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, ForeignKey, select, update
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
)

from querycache import QueryCache, flight, interceptor, load
from querycache.flight import Flights


class Base(DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "stopped_shelf"
    id: Mapped[int] = mapped_column(primary_key=True)
    books: Mapped[list[Book]] = relationship()


class Book(Base):
    __tablename__ = "stopped_book"
    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int] = mapped_column(ForeignKey("stopped_shelf.id"))
    title: Mapped[str]


PLAIN = select(Shelf).options(selectinload(Shelf.books))
CACHED = PLAIN.execution_options(cache_key=True)


class Timeout(BaseException):
    pass


_NOTHING = dis.opmap["NOP"]
"""What there is at the line of a `try`, where no signal is heeded."""


@contextmanager
def stopped(number: int, *files: str | None) -> Iterator[list[str]]:
    """Raise at the line of this number, or where a function begins, of what is run in some files. Gives where that was."""
    numbers = itertools.count()
    where: list[str] = []

    def trace(frame: Any, kind: str, argument: object) -> Any:
        if frame.f_code.co_filename not in files:
            return trace if kind == "call" else None
        stops = kind == "call" or (kind == "line" and frame.f_code.co_code[frame.f_lasti] != _NOTHING)
        if stops and next(numbers) == number:
            sys.settrace(None)
            where.append(f"{frame.f_code.co_name}:{frame.f_lineno} {kind}")
            raise Timeout
        return trace

    was = sys.gettrace()
    sys.settrace(trace)
    try:
        yield where
    except Timeout:
        pass
    finally:
        sys.settrace(was)


@pytest.mark.parametrize("asked", ["hit", "explained"])
def test_a_lookup_that_is_stopped_anywhere(sqlite_engine: Engine, asked: str) -> None:
    # To stop it at some lines leaves an exception behind, in this thread alone.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_stop_anywhere, sqlite_engine, asked).result()


def _stop_anywhere(sqlite_engine: Engine, asked: str) -> None:
    Base.metadata.create_all(sqlite_engine)
    sessions = sessionmaker(sqlite_engine)
    cache = QueryCache()
    cache.attach(sessions)
    with sessions.begin() as session:
        session.add(Shelf(id=1, books=[Book(id=1, title="-1")]))

    def titles(session: Session) -> list[str]:
        session.expunge_all()
        return [book.title for shelf in session.scalars(PLAIN) for book in shelf.books]

    for number in itertools.count():
        with sessions() as session:
            for _ in range(2):
                session.scalars(CACHED).all()
        with sessions() as session:
            with stopped(number, interceptor.__file__, load.__file__) as where:
                if asked == "hit":
                    session.scalars(CACHED).all()
                else:
                    cache.explain(session, CACHED)
            session.rollback()
            with sessions.begin() as other:
                other.execute(update(Book).values(title=str(number)))
            assert titles(session) == [str(number)], where
        if not where:
            break
    assert number > 20


def test_a_flight_that_is_stopped_anywhere_costs_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "MAX_WAIT", 0.01)
    for number in itertools.count():
        flights = Flights()
        with stopped(number, flight.__file__) as where, flights.flying("here"):
            pass
        waited = []
        for _ in range(2):
            with ThreadPoolExecutor(1) as pool:
                waited.append(pool.submit(flights.wait, "here").result())
        assert waited[1:] == [False], where
        if not where:
            break
    assert number > 3


def test_who_waits_for_a_slow_flight_is_told_when_it_lands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also who came when somebody else had waited for it in vain, and flies now."""
    monkeypatch.setattr(flight, "MAX_WAIT", 0.2)
    flights = Flights()
    slow, later = flights.flying("here"), flights.flying("here")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(slow.__enter__).result()
        assert other.submit(flights.wait, "here").result()
        other.submit(later.__enter__).result()
        monkeypatch.setattr(flight, "MAX_WAIT", 60)
        one.submit(slow.__exit__, None, None, None)
        begun = time.monotonic()
        flights.wait("here")
        assert time.monotonic() - begun < 30
        other.submit(later.__exit__, None, None, None).result()
