"""Writes in forms that few applications use, but that must be noticed, and must never fail for being noticed.

Each of these was found by running SQLAlchemy's own tests with a cache attached (``tests/sqlalchemy_suite``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import StaticPool, create_engine, delete, insert, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from querycache import QueryCache


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
