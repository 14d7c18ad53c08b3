"""What sceptical reviewers have found about mappings: what is not loaded, joined tables, keys of the mapper's own."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Boolean, Integer
from sqlalchemy.orm import Session, defer, load_only

from querycache.denormalize import count_of, exists_of, max_of
from tests.denormalize.family import Open, family, right, two

STRATEGIES = ["sql", "recount", "flush", "memory", "trigger"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["flush", "bulk", "load_only", "raiseload", "expired"])
def test_a_parent_is_merged_onto_one_that_is_not_loaded(
    opened: Open, engine: sa.Engine, strategy: str, how: str
) -> None:
    """The stored value stays, and is not written once more either: another may have changed it by then."""

    def columns() -> dict[str, Any]:
        made: dict[str, Any] = {"n": count_of("children", strategy=strategy, type_=Integer)}
        if strategy not in ("flush", "memory"):
            made["best"] = max_of("children", "size", strategy=strategy, type_=Integer)
            made["some"] = exists_of("children", strategy=strategy, type_=Boolean)
        return made

    name = f"m_merge_{strategy}_{how}"
    m = family(name, columns, lambda: {"__table_args__": (sa.Index(f"{name}_i", "parent_id", "size"),)})
    s = opened(m)
    two(s, m)
    cached = s.get_one(m.Parent, 1)
    s.expunge(cached)
    cached.title = "new"
    s.rollback()
    options = {"load_only": [load_only(m.Parent.title)], "raiseload": [defer(m.Parent.n, raiseload=True)]}
    parent = s.get_one(m.Parent, 1, options=options.get(how, []))
    if how == "flush":
        s.add(m.Child(id=3, parent=parent, size=9))
        s.flush()
    elif how == "bulk":
        s.execute(sa.insert(m.Child).values(id=3, parent_id=1, size=9))
    elif how == "expired":
        s.expire(parent, list(columns()))
    written: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, sql: str, *_: Any) -> None:
        if sql.startswith("UPDATE"):
            written.append(sql)

    try:
        assert s.merge(cached) is parent
        s.flush()
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    assert [sql.count("=") for sql in written] == [2], written  # the title, by the key
    assert parent.n == (3 if how in ("flush", "bulk") else 2)
    s.commit()
    with Session(engine) as other:
        assert other.get_one(m.Parent, 1).title == "new"
    right(s, m)
