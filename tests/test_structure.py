"""The part of a key that tells statements apart whose SQL is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Select, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from querycache import QueryCache


class Base(DeclarativeBase):
    pass


class Doc(Base):
    __tablename__ = "docs"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.mark.parametrize(
    "make", [lambda: select(Doc), lambda: select(Doc.name), lambda: select(Doc).where(Doc.id.in_([1, 2]))]
)
def test_a_statement_made_from_one_that_has_run_has_the_key_it_always_had(
    make: Callable[[], Select[Any]],
) -> None:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    factory = sessionmaker(engine)
    cache = QueryCache()
    cache.attach(factory)
    statement = make()
    before = statement.execution_options(cache_key="docs")
    with factory() as session:
        # compiling a statement leaves a mark on it
        session.execute(statement).all()
    after = statement.execution_options(cache_key="docs")

    def outcomes(statement: Select[Any]) -> list[str]:
        with cache.recording() as events, factory() as session:
            session.execute(statement).all()
        return [each.outcome for each in events]

    assert outcomes(before) == ["miss", "fill"]
    assert outcomes(after) == ["hit"]
    assert outcomes(make().execution_options(cache_key="docs")) == ["hit"]
    engine.dispose()
