"""What sceptical reviewers have found of what declarations and statements name: columns, texts, functions."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, ForeignKey, Integer
from sqlalchemy.orm import declarative_base, mapped_column, relationship

from querycache.denormalize import (
    UncoveredChange,
    count_of,
    sum_of,
)
from tests.denormalize.family import Open, family, right, two


@pytest.mark.parametrize(
    "name", ["Score", "score (max)", "a.b", "a,b", "x=y", "in WHERE t", "50%", 'say "so"', "back`tick", "it's"]
)
def test_names_of_columns_that_want_quotes(opened: Open, engine: Engine, name: str) -> None:
    m = family(
        f"x_odd{abs(sum(map(ord, name)))}",
        lambda: {"total": sum_of("children", "score", type_=Integer)},
        lambda: {"score": mapped_column(name, Integer)},
    )
    s = opened(m)
    s.add(m.Parent(id=1))
    s.flush()
    s.add(m.Child(id=1, parent_id=1, score=5))
    s.commit()
    s.execute(sa.update(m.Child).values(score=7))
    s.commit()
    assert s.get_one(m.Parent, 1).total == 7
    table = m.Child.__table__
    for statement in (
        sa.update(table).values({table.c[name]: 99}),
        sa.insert(table).values({"id": 2, table.c[name]: 99}),
    ):
        with pytest.raises(UncoveredChange), engine.begin() as connection:
            connection.execute(statement)
    with engine.begin() as connection:  # what nobody reads may change
        connection.execute(sa.update(table).values(message="score = 1"))
    right(s, m)
