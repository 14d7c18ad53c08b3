"""A connection that the database has dropped: the application recovers as it would without the cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import Engine, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from querycache import QueryCache


class Base(DeclarativeBase):
    pass


class Book(Base):
    __tablename__ = "books"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.mark.parametrize("end", [Session.rollback, Session.close], ids=["rollback", "close"])
@pytest.mark.parametrize("wrote", [False, True], ids=["read", "wrote"])
def test_a_transaction_on_a_lost_connection_can_be_ended(
    sqlite_engine: Engine, end: Callable[[Session], None], wrote: bool
) -> None:
    Base.metadata.create_all(sqlite_engine)
    sessions = sessionmaker(sqlite_engine)
    QueryCache().attach(sessions)
    with sessions() as session:
        if wrote:
            session.execute(insert(Book), [{"id": 1}])
        session.connection().invalidate()
        end(session)
        session.add(Book(id=2))
        session.commit()
    with sessions() as session:
        assert session.scalars(select(Book.id).execution_options(cache_key=True)).all() == [2]
