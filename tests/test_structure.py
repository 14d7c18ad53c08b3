"""The part of a key that tells statements apart whose SQL is the same."""

from __future__ import annotations

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


@pytest.mark.parametrize("statement", [select(Doc), select(Doc.name), select(Doc).where(Doc.id.in_([1, 2]))])
def test_a_statement_made_from_one_that_has_run_has_the_key_it_always_had(statement: Select[Any]) -> None:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    factory = sessionmaker(engine)
    cache = QueryCache()
    cache.attach(factory)

    def outcomes() -> list[str]:
        with cache.recording() as events, factory() as session:
            session.execute(statement.execution_options(cache_key="docs")).all()
        return [each.outcome for each in events]

    assert outcomes() == ["miss", "fill"]
    with factory() as session:
        # compiling a statement leaves its mark on it
        session.execute(statement).all()
    assert outcomes() == ["hit"]
    engine.dispose()
