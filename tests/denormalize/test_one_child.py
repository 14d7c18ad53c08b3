"""One new child of one parent is one UPDATE, which adds what the row holds; and where that cannot be right, it is not."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Boolean, Engine, ForeignKey, Integer, String, Uuid, and_, event, func
from sqlalchemy.orm import Session, declarative_base, foreign, mapped_column, relationship

from querycache.denormalize import count_of, exists_of, latest_of, max_of, min_of, sum_of, verify

Open = Callable[..., Session]
Columns = Callable[[], dict[str, Any]]


def kinds() -> dict[str, Any]:
    return {
        "n": count_of("children", type_=Integer),
        "big": count_of("children", where=lambda c: c.size > 10, type_=Integer),
        "total": sum_of("children", "size", type_=Integer),
        "most": max_of("children", "size", type_=Integer),
        "least": min_of("children", "size", where=lambda c: c.size > 0, type_=Integer),
        "any_big": exists_of("children", where=lambda c: c.size > 10, type_=Boolean),
    }


def family(
    name: str,
    columns: Columns,
    *,
    key: Callable[[], Any] = Integer,
    heir: bool = False,
    only_big: bool = False,
) -> SimpleNamespace:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = f"{name}_parent"
        id = mapped_column(key(), primary_key=True)
        children = relationship(
            "Child",
            primaryjoin=(lambda: and_(Parent.id == foreign(Child.parent_id), Child.size > 10))
            if only_big
            else None,
        )
        locals().update(columns())

    class Child(Base):
        __tablename__ = f"{name}_child"
        id = mapped_column(Integer, primary_key=True)
        kind = mapped_column(String(10))
        parent_id = mapped_column(ForeignKey(f"{name}_parent.id"), index=True)
        size = mapped_column(Integer)
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "child"}

    made = SimpleNamespace(Base=Base, Parent=Parent, Child=Child)
    if heir:

        class Heir(Child):
            __tablename__ = f"{name}_heir"
            id = mapped_column(ForeignKey(f"{name}_child.id"), primary_key=True)
            weight = mapped_column(Integer)
            __mapper_args__ = {"polymorphic_identity": "heir"}

        Parent.heirs = relationship(Heir, viewonly=False, overlaps="children")
        made.Heir = Heir
    return made


@pytest.fixture
def seen(engine: Engine) -> Iterator[list[str]]:
    """The statements on the parent table, and the SELECTs."""
    found: list[str] = []

    def record(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        found.append(" ".join(statement.split()[:2]))

    event.listen(engine, "before_cursor_execute", record)
    yield found
    event.remove(engine, "before_cursor_execute", record)


def added(session: Session, seen: list[str], child: Any) -> list[str]:
    """What the flush of `child` sends beside its INSERT and the locks."""
    session.add(child)
    seen.clear()
    session.flush()
    inserted = next(place for place, statement in enumerate(seen) if statement.startswith("INSERT"))
    return seen[inserted + 1 :]


def test_every_kind_in_one_statement(engine: Engine, opened: Open, seen: list[str]) -> None:
    m = family("one_kinds", kinds)
    session = opened(m)
    session.add_all([m.Parent(id=1), m.Parent(id=2)])
    session.commit()
    parent = session.get_one(m.Parent, 1)
    expected = [
        (12, (1, 1, 12, 12, 12, True)),
        (None, (2, 1, 12, 12, 12, True)),
        (3, (3, 1, 15, 12, 3, True)),
        (-5, (4, 1, 10, 12, 3, True)),
        (40, (5, 2, 50, 40, 3, True)),
    ]
    for size, values in expected:
        assert parent.n is not None  # loaded, so that it would be out of date
        assert added(session, seen, m.Child(parent_id=1, size=size)) == ["UPDATE one_kinds_parent"]
        shown = (parent.n, parent.big, parent.total, parent.most, parent.least, parent.any_big)
        assert shown == values
        assert verify(session, m.Base).right
    session.commit()
    assert session.get_one(m.Parent, 2).n == 0
    session.close()
    m.Base.metadata.drop_all(engine)


def test_uuid_keys(engine: Engine, opened: Open, seen: list[str]) -> None:
    m = family("one_uuid", kinds, key=Uuid)
    session = opened(m)
    key = uuid.uuid4()
    session.add(m.Parent(id=key))
    session.commit()
    assert added(session, seen, m.Child(parent_id=key, size=11)) == ["UPDATE one_uuid_parent"]
    assert session.get_one(m.Parent, key).total == 11
    session.close()
    m.Base.metadata.drop_all(engine)


def test_a_child_that_does_not_count_leaves_the_parent_alone(
    engine: Engine, opened: Open, seen: list[str]
) -> None:
    m = family("one_alone", lambda: {"big": count_of("children", where=lambda c: c.size > 10, type_=Integer)})
    session = opened(m)
    session.add(m.Parent(id=1))
    session.commit()
    with session.no_autoflush:
        added(session, seen, m.Child(parent_id=1, size=1))
    session.commit()
    assert (session.get_one(m.Parent, 1).big, verify(session, m.Base).right) == (0, True)
    assert added(session, seen, m.Child(parent_id=1, size=11)) == ["UPDATE one_alone_parent"]
    assert (session.get_one(m.Parent, 1).big, verify(session, m.Base).right) == (1, True)
    session.close()
    m.Base.metadata.drop_all(engine)


def test_the_condition_of_the_relationship_counts(engine: Engine, opened: Open) -> None:
    m = family("one_join", kinds, only_big=True)
    session = opened(m)
    session.add(m.Parent(id=1))
    session.commit()
    for size in (1, 11):
        session.add(m.Child(parent_id=1, size=size))
        session.commit()
        assert verify(session, m.Base).right
    assert session.get_one(m.Parent, 1).n == 1
    session.close()
    m.Base.metadata.drop_all(engine)


def test_children_in_a_joined_table(engine: Engine, opened: Open, seen: list[str]) -> None:
    m = family(
        "one_heir",
        lambda: {"n": count_of("heirs", type_=Integer), "weight": sum_of("heirs", "weight", type_=Integer)},
        heir=True,
    )
    session = opened(m)
    session.add(m.Parent(id=1))
    session.commit()
    assert added(session, seen, m.Heir(parent_id=1, weight=3)) == [
        "INSERT INTO",
        "UPDATE one_heir_parent",
    ]
    assert added(session, seen, m.Child(parent_id=1)) == []
    parent = session.get_one(m.Parent, 1)
    assert (parent.n, parent.weight, verify(session, m.Base).right) == (1, 3, True)
    session.close()
    m.Base.metadata.drop_all(engine)


def test_a_database_that_puts_the_child_elsewhere_is_believed(engine: Engine, opened: Open) -> None:
    """The object says parent 1, the row says 2."""
    m = family("one_moved", kinds)
    session = opened(m)
    session.add_all([m.Parent(id=1), m.Parent(id=2)])
    session.commit()
    connection = session.connection()
    if engine.dialect.name == "sqlite":
        connection.exec_driver_sql(
            "CREATE TRIGGER one_moved_move AFTER INSERT ON one_moved_child BEGIN"
            " UPDATE one_moved_child SET parent_id = 2 WHERE id = NEW.id; END"
        )
    elif engine.dialect.name == "postgresql":
        connection.exec_driver_sql(
            "CREATE OR REPLACE FUNCTION one_moved_move() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN NEW.parent_id := 2; RETURN NEW; END$$"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER one_moved_move BEFORE INSERT ON one_moved_child FOR EACH ROW"
            " EXECUTE FUNCTION one_moved_move()"
        )
    else:
        connection.exec_driver_sql(
            "CREATE TRIGGER one_moved_move BEFORE INSERT ON one_moved_child FOR EACH ROW SET NEW.parent_id = 2"
        )
    one, two = session.get_one(m.Parent, 1), session.get_one(m.Parent, 2)
    assert (one.n, two.n) == (0, 0)
    session.add(m.Child(parent_id=1, size=4))
    session.flush()
    assert (one.n, two.n, two.total) == (0, 1, 4)
    session.commit()
    assert verify(session, m.Base).right
    session.close()
    m.Base.metadata.drop_all(engine)


def test_what_needs_the_other_children_is_recounted(engine: Engine, opened: Open) -> None:
    m = family(
        "one_last",
        lambda: {
            "n": count_of("children", type_=Integer),
            "last": latest_of("children", "size", order_by="id", type_=Integer),
            "letters": sum_of("children", lambda c: func.length(c.kind), type_=Integer),
        },
    )
    session = opened(m)
    session.add(m.Parent(id=1))
    session.commit()
    for size in (5, 3):
        session.add(m.Child(parent_id=1, size=size))
        session.commit()
        parent = session.get_one(m.Parent, 1)
        assert (parent.last, verify(session, m.Base).right) == (size, True)
    session.close()
    m.Base.metadata.drop_all(engine)


@pytest.mark.parametrize("strategy", ["sql", "recount", "flush"])
def test_the_last_by_a_key_that_the_database_makes(engine: Engine, opened: Open, strategy: str) -> None:
    """Its key is the greatest, though the object does not have it yet."""
    m = family(
        f"one_key_{strategy}",
        lambda: {"last": latest_of("children", "size", order_by="id", type_=Integer, strategy=strategy)},
    )
    session = opened(m)
    session.add(m.Parent(id=1))
    session.commit()
    for sizes in ([5], [3], [8, 2]):
        session.add_all([m.Child(parent_id=1, size=size) for size in sizes])
        session.commit()
        parent = session.get_one(m.Parent, 1)
        assert (parent.last, verify(session, m.Base).right) == (sizes[-1], True)
    session.close()
    m.Base.metadata.drop_all(engine)
