"""What reviewers have found of values that databases and Python see with different eyes, and of objects that hold them."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import (
    Column,
    Engine,
    ForeignKey,
    Index,
    Integer,
    Interval,
    Numeric,
    String,
    Table,
    TypeDecorator,
)
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import (
    Session,
    attribute_keyed_dict,
    configure_mappers,
    declarative_base,
    mapped_column,
    relationship,
)

from querycache.denormalize import (
    DenormalizeWarning,
    UncoveredChange,
    avg_of,
    count_of,
    max_of,
    min_of,
    python,
    repair,
    sum_of,
    trigger_sql,
    verify,
)
from querycache.errors import ConfigurationError
from tests.denormalize.family import Open, family, kept, right, two

SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
POSTGRESQL = pytest.mark.parametrize(
    "engine", [pytest.param("postgresql", marks=pytest.mark.server("postgresql"))], indirect=True
)


def _numbers(strategy: str, scale: int | None) -> SimpleNamespace:
    Base: Any = declarative_base()
    p, type_ = f"v_nan_{strategy}_{scale or 0}", Numeric(10, scale) if scale else Numeric()

    class Parent(Base):
        __tablename__ = f"{p}_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child")
        total = sum_of("children", "size", strategy=strategy, type_=type_)
        if strategy != "memory":
            least = min_of("children", "size", strategy=strategy, type_=type_)
            most = max_of("children", "size", strategy=strategy, type_=type_)
            mean = avg_of("children", "size", strategy=strategy, type_=type_)

    class Child(Base):
        __tablename__ = f"{p}_child"
        id = mapped_column(Integer, primary_key=True)
        size = mapped_column(type_)
        parent_id = mapped_column(ForeignKey(f"{p}_parent.id"))
        __table_args__ = (Index(f"{p}_by_size", "parent_id", "size"),)

    return SimpleNamespace(Base=Base, Parent=Parent, Child=Child)


@POSTGRESQL
@pytest.mark.parametrize("scale", [None, 2])
@pytest.mark.parametrize("strategy", ["sql", "recount"])
def test_a_number_that_is_none(opened: Open, strategy: str, scale: int | None) -> None:
    m = _numbers(strategy, scale)
    s = opened(m)
    s.add_all([m.Parent(id=1), m.Parent(id=2)])
    s.flush()
    s.add(m.Child(id=1, parent_id=1, size=Decimal("NaN")))
    s.commit()
    right(s, m)
    assert s.get_one(m.Parent, 1).total.is_nan()
    s.add_all([m.Child(id=2, parent_id=1, size=Decimal(5)), m.Child(id=3, parent_id=1, size=Decimal(7))])
    s.commit()
    right(s, m)
    s.get_one(m.Child, 1).parent_id = 2
    s.commit()
    right(s, m)
    assert (s.get_one(m.Parent, 1).total, s.get_one(m.Parent, 1).most) == (12, 7)
    s.get_one(m.Child, 3).size = Decimal("NaN")
    s.get_one(m.Child, 1).size = Decimal(1)
    s.commit()
    right(s, m)
    s.execute(sa.delete(m.Child).where(m.Child.id == 3))
    s.commit()
    right(s, m)
    assert [p.total for p in (s.get_one(m.Parent, 1), s.get_one(m.Parent, 2))] == [5, 1]
    s.commit()
    s.connection().execute(
        sa.update(m.Parent.__table__).values(total=9), execution_options={"denormalize": "unchecked"}
    )
    s.commit()
    assert repair(s.get_bind(), m.Base).repaired == 2


@SQLITE
@pytest.mark.parametrize("strategy", ["flush", "memory"])
def test_what_cannot_be_added_up_in_python(opened: Open, strategy: str) -> None:
    m = family(f"v_add_{strategy}", kept(strategy))
    s = opened(m)
    two(s, m)
    parent = s.get_one(m.Parent, 1)
    for size, match in (("7", "cannot add up or compare"), (Decimal("NaN"), "cannot take NaN away")):
        with pytest.raises(UncoveredChange, match=rf"Parent\.total: strategy '{strategy}' {match}.*'sql'"):
            s.add(m.Child(id=3, parent=parent, size=size))
            s.commit()
        s.rollback()
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "recount", "trigger"])
def test_many_to_many_that_is_a_dict_on_the_other_side(opened: Open, strategy: str) -> None:
    Base: Any = declarative_base()
    p = f"v_dict_{strategy}"
    pairs = Table(
        f"{p}_pair",
        Base.metadata,
        Column("parent_id", ForeignKey(f"{p}_parent.id"), primary_key=True),
        Column("child_id", ForeignKey(f"{p}_child.id"), primary_key=True),
    )

    class Parent(Base):
        __tablename__ = f"{p}_parent"
        id = mapped_column(Integer, primary_key=True)
        name = mapped_column(String(9))
        children = relationship("Child", secondary=pairs, back_populates="parents")
        n = count_of("children", strategy=strategy, type_=Integer)
        total = sum_of("children", "size", strategy=strategy, type_=Integer)

    class Child(Base):
        __tablename__ = f"{p}_child"
        id = mapped_column(Integer, primary_key=True)
        size = mapped_column(Integer)
        parents = relationship(
            Parent, secondary=pairs, back_populates="children", collection_class=attribute_keyed_dict("name")
        )

    m = SimpleNamespace(Base=Base)
    s = opened(m)
    a, b = Parent(id=1, name="a"), Parent(id=2, name="b")
    s.add_all([a, b])
    s.flush()
    child = Child(id=1, size=1)
    child.parents["a"] = a
    s.add(child)
    s.commit()
    right(s, m)
    child.parents["b"] = b
    s.commit()
    child.size = 5
    assert len(child.parents) == 2
    s.commit()
    right(s, m)
    del child.parents["a"]
    s.commit()
    right(s, m)
    assert [(a.n, a.total), (b.n, b.total)] == [(0, 0), (1, 5)]


@pytest.mark.parametrize("strategy", ["sql", "recount", "flush", "memory", "trigger"])
def test_a_session_of_shards(tmp_path: Path, strategy: str) -> None:
    m = family(f"v_shard_{strategy}", kept(strategy))
    engines = {name: sa.create_engine(f"sqlite:///{tmp_path / name}.db") for name in ("one", "two")}
    for engine in engines.values():
        m.Base.metadata.create_all(engine)

    def choose(mapper: Any, instance: Any, clause: Any = None) -> str:
        return "two" if instance is not None and instance.id > 10 else "one"

    with ShardedSession(
        shards=engines,
        shard_chooser=choose,
        identity_chooser=lambda *_, **__: ["one", "two"],
        execute_chooser=lambda context: ["one", "two"],
    ) as s:
        s.add_all([m.Parent(id=1), m.Parent(id=11)])
        s.commit()
        for parent in (1, 11):
            s.add(m.Child(id=parent, parent_id=parent, size=1))
            with pytest.raises(
                UncoveredChange, match=r"a ShardedSession .*Parent\.n, Parent\.total .*for each shard"
            ):
                s.commit()
            s.rollback()
        with Session(engines["two"]) as of_shard:
            of_shard.add(m.Child(id=11, parent_id=11, size=1))
            of_shard.commit()
        s.get_one(m.Parent, 11).title = "new"
        s.commit()
        with pytest.raises(UncoveredChange, match="a ShardedSession"):
            s.delete(s.get_one(m.Child, 11))
            s.commit()
        s.rollback()
        if strategy != "trigger":
            with pytest.raises(UncoveredChange, match="a ShardedSession"):
                s.execute(sa.update(m.Child).values(size=2))
    for engine in engines.values():
        assert verify(engine, m.Base).right
        engine.dispose()


@pytest.mark.parametrize("strategy", ["sql", "recount", "trigger"])
def test_extremes_that_a_collation_calls_equal(opened: Open, engine: Engine, strategy: str) -> None:
    Base: Any = declarative_base()
    texts = "utf8mb4_general_ci"
    collation = {"sqlite": "NOCASE", "mysql": texts, "mariadb": texts}.get(engine.dialect.name)
    p, type_ = f"v_ci_{strategy}_{engine.dialect.name}", String(20, collation=collation)

    class Parent(Base):
        __tablename__ = f"{p}_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child")
        least = min_of("children", "name", strategy=strategy, type_=type_)
        most = max_of("children", "name", strategy=strategy, type_=type_)

    class Child(Base):
        __tablename__ = f"{p}_child"
        id = mapped_column(Integer, primary_key=True)
        name = mapped_column(type_)
        parent_id = mapped_column(ForeignKey(f"{p}_parent.id"))
        __table_args__ = (Index(f"{p}_by_name", "parent_id", "name"),)

    m = SimpleNamespace(Base=Base)
    s = opened(m)
    s.add_all([Parent(id=1), Parent(id=2)])
    s.commit()
    for number, name in enumerate(["b", "B", "B", "c", "C", "b"]):
        s.add(Child(id=9 - number, parent_id=1, name=name))
        s.commit()
        right(s, m)
    s.delete(s.get_one(Child, 9))
    s.commit()
    right(s, m)
    for wrong in ("a", None):
        with engine.begin() as connection:
            connection.execute(
                sa.update(Parent.__table__).values(least=wrong),
                execution_options={"denormalize": "unchecked"},
            )
        assert [each.key for each in verify(engine, Base).differences] == ([(1,), (2,)] if wrong else [(1,)])
        assert repair(engine, Base).repaired == (2 if wrong else 1)


def test_a_constant_that_no_trigger_can_hold() -> None:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "v_constant_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child")
        n = count_of(
            "children", where=lambda c: c.took > timedelta(hours=1), strategy="trigger", type_=Integer
        )

    class Child(Base):
        __tablename__ = "v_constant_child"
        id = mapped_column(Integer, primary_key=True)
        took = mapped_column(Interval)
        parent_id = mapped_column(ForeignKey("v_constant_parent.id"))

    with pytest.raises(
        ConfigurationError, match=r"Parent\.n: .*cannot be written into a trigger of m.*take strategy 'sql'"
    ):
        trigger_sql(Base, "mariadb")


@pytest.mark.parametrize("strategy", ["flush", "memory"])
def test_a_type_that_makes_something_else_of_values(strategy: str) -> None:
    Base: Any = declarative_base()

    class Stripped(TypeDecorator[str]):
        impl = String(20)
        cache_ok = True

        def process_bind_param(self, value: Any, dialect: Any) -> Any:
            return None if value is None else value.strip()

    class Parent(Base):
        __tablename__ = "v_stripped_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child")
        letters = sum_of(
            "children", python(lambda c: len(c.name), columns=("name",)), strategy=strategy, type_=Integer
        )

    class Child(Base):
        __tablename__ = "v_stripped_child"
        id = mapped_column(Integer, primary_key=True)
        name = mapped_column(Stripped())
        parent_id = mapped_column(ForeignKey("v_stripped_parent.id"))

    with pytest.warns(DenormalizeWarning, match=r"Parent\.letters: .* counts Child\.name as it is assigned"):
        configure_mappers()
    Base.registry.dispose()
