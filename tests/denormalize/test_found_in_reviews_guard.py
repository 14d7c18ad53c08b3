"""What reviewers have found of writes that the unit of work does not see, and of the guard against them."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Computed, Engine, ForeignKey, Integer, String, bindparam, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import declarative_base, mapped_column, relationship, sessionmaker

from querycache.denormalize import (
    DenormalizeError,
    DenormalizeWarning,
    ReadOnlyAggregate,
    UncoveredChange,
    count_of,
    max_of,
    sum_of,
)
from querycache.errors import ConfigurationError
from tests.denormalize.family import Open, family, n, right, two


def test_bulk_update_with_named_parameters(opened: Open) -> None:
    m = family("r_bind", n)
    s = opened(m)
    two(s, m)
    with suppress(DenormalizeError):
        s.execute(
            sa.update(m.Child).where(m.Child.id == bindparam("cid")).values(size=bindparam("news")),
            {"cid": 1, "news": 50},
        )
    s.commit()
    right(s, m)


def test_bulk_update_with_named_parameter_in_where(opened: Open) -> None:
    m = family("r_bindw", n)
    s = opened(m)
    two(s, m)
    with suppress(DenormalizeError):
        s.execute(sa.update(m.Child).where(m.Child.id == bindparam("cid")).values(size=50), {"cid": 1})
    s.commit()
    right(s, m)


def test_bulk_update_with_named_parameters_works(opened: Open) -> None:
    m = family("r_bindx", n)
    s = opened(m)
    two(s, m)
    s.execute(
        sa.update(m.Child).where(m.Child.id == bindparam("cid")).values(size=bindparam("size_")),
        {"cid": 1, "size_": 50},
    )
    s.commit()
    right(s, m)


def test_bulk_delete_with_named_parameter(opened: Open) -> None:
    m = family("r_bindd", n)
    s = opened(m)
    two(s, m)
    s.execute(sa.delete(m.Child).where(m.Child.id == bindparam("cid")), {"cid": 1})
    s.commit()
    right(s, m)


def test_bulk_update_aggregate_with_named_parameters(opened: Open) -> None:
    m = family("r_binda", n)
    s = opened(m)
    two(s, m)
    with suppress(DenormalizeError):
        s.execute(sa.update(m.Parent).where(m.Parent.id == bindparam("cid")).values(n=50), {"cid": 1})
    s.commit()
    right(s, m)


@pytest.mark.parametrize("what", ["bulk_insert_mappings", "bulk_update_mappings", "own compiled cache"])
def test_what_looks_like_the_flush_in_a_mapper_event(opened: Open, what: str) -> None:
    m = family("r_like", n)

    @event.listens_for(m.Parent, "after_update")
    def more(mapper: Any, connection: Any, target: Any) -> None:
        if what == "own compiled cache":
            statement = sa.insert(m.Child.__table__).values(id=99, parent_id=1, size=3)
            connection.execute(statement, execution_options={"compiled_cache": {}})
        elif what == "bulk_insert_mappings":
            s.bulk_insert_mappings(m.Child, [{"id": 99, "parent_id": 1, "size": 3}])
        else:
            s.bulk_update_mappings(m.Child, [{"id": 1, "size": 100}])

    s = opened(m)
    two(s, m)
    s.get_one(m.Parent, 2).title = "x"
    with pytest.raises(UncoveredChange, match="outside the unit of work"):
        s.commit()
    s.rollback()
    right(s, m)


@pytest.mark.parametrize("what", ["insert", "update", "delete"])
def test_core_in_a_mapper_event(opened: Open, what: str) -> None:
    m = family(f"r_core{what}", n)

    @event.listens_for(m.Parent, "after_update")
    def more(mapper: Any, connection: Any, target: Any) -> None:
        t = m.Child.__table__
        connection.execute(
            {
                "insert": sa.insert(t).values(id=99, parent_id=1, size=3),
                "update": sa.update(t).values(size=100),
                "delete": sa.delete(t).where(t.c.id == 1),
            }[what]
        )

    s = opened(m)
    two(s, m)
    s.get_one(m.Parent, 2).title = "x"
    with suppress(DenormalizeError):
        s.commit()
    s.rollback()
    right(s, m)


def test_core_in_after_insert_beside_one_newcomer(opened: Open) -> None:
    m = family("r_coreai", n)

    @event.listens_for(m.Child, "after_insert")
    def more(mapper: Any, connection: Any, target: Any) -> None:
        if target.size == 1:
            t = m.Child.__table__
            connection.execute(sa.update(t).where(t.c.id == 1).values(size=100))

    s = opened(m)
    two(s, m)
    s.add(m.Child(parent_id=1, size=1))
    with suppress(DenormalizeError):
        s.commit()
    s.rollback()
    right(s, m)


def test_update_of_two_tables(opened: Open, engine: Engine) -> None:
    if engine.dialect.name not in ("mysql", "mariadb"):
        pytest.skip("MySQL only")
    m = family("r_multi", n)
    s = opened(m)
    two(s, m)
    with suppress(DenormalizeError):
        s.execute(
            sa.update(m.Parent)
            .where(m.Parent.id == m.Child.parent_id)
            .values({m.Child.size: 50})
            .execution_options(synchronize_session=False)
        )
    s.commit()
    right(s, m)


def test_core_update_of_two_tables(opened: Open, engine: Engine) -> None:
    if engine.dialect.name not in ("mysql", "mariadb"):
        pytest.skip("MySQL only")
    m = family("r_multic", n)
    s = opened(m)
    two(s, m)
    p, c = m.Parent.__table__, m.Child.__table__
    with suppress(DenormalizeError):
        s.connection().execute(
            sa.update(p).where(p.c.id == c.c.parent_id).values({p.c.title: "x", c.c.size: 50})
        )
    s.commit()
    right(s, m)


def test_core_update_of_two_tables_aggregate(opened: Open, engine: Engine) -> None:
    if engine.dialect.name not in ("mysql", "mariadb"):
        pytest.skip("MySQL only")
    m = family("r_multia", n)
    s = opened(m)
    two(s, m)
    p, c = m.Parent.__table__, m.Child.__table__
    with suppress(DenormalizeError):
        s.connection().execute(
            sa.update(c).where(p.c.id == c.c.parent_id).values({c.c.message: "x", p.c.n: 50})
        )
    s.commit()
    right(s, m)


@pytest.mark.parametrize("parser", [True, False])
def test_one_newcomer_leaves_other_answers_in_the_cache(
    opened: Open, engine: Engine, parser: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from querycache import QueryCache
    from querycache.textual import read_text

    if not parser:
        monkeypatch.setitem(sys.modules, "sqlglot", None)
    read_text.cache_clear()
    m = family("r_cache", n)
    s = opened(m)
    two(s, m)
    s.add(m.Child(id=3, parent_id=2, size=1))
    s.commit()
    sessions = sessionmaker(engine)
    cache = QueryCache("memory://").attach(sessions)
    asked = sa.select(m.Child.id).where(m.Child.parent_id == 2).execution_options(cache_key="x")
    try:
        for _ in range(2):
            with sessions() as other, cache.recording() as events:
                other.execute(asked).all()
        assert events[-1].outcome == "hit"
        with sessions() as other:
            other.add(m.Child(parent_id=1, size=4))
            other.commit()
        with sessions() as other, cache.recording() as events:
            other.execute(asked).all()
        assert events[-1].outcome == "hit"
    finally:
        cache.detach(sessions)
        read_text.cache_clear()


def test_a_change_leaves_other_answers_over_the_children_in_the_cache(opened: Open, engine: Engine) -> None:
    from querycache import QueryCache

    m = family("r_cachec", n)
    s = opened(m)
    two(s, m)
    s.add(m.Child(id=3, parent_id=2, size=1))
    s.commit()
    sessions = sessionmaker(engine)
    cache = QueryCache("memory://").attach(sessions)
    asked = sa.select(m.Child.id).where(m.Child.parent_id == 2).execution_options(cache_key="x")
    try:
        for _ in range(2):
            with sessions() as other, cache.recording() as events:
                other.execute(asked).all()
        assert events[-1].outcome == "hit"
        with sessions() as other:
            other.get_one(m.Child, 1).size = 100
            other.commit()
        with sessions() as other, cache.recording() as events:
            other.execute(asked).all()
        assert events[-1].outcome == "hit"
    finally:
        cache.detach(sessions)


def test_a_generated_column_comes_first(opened: Open, engine: Engine) -> None:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "r_gen_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child")
        n = count_of("children", type_=Integer)

    class Child(Base):
        __tablename__ = "r_gen_child"
        id = mapped_column(Integer, primary_key=True)
        twice = mapped_column(Integer, Computed("size * 2", persisted=True))
        size = mapped_column(Integer)
        parent_id = mapped_column(ForeignKey("r_gen_parent.id"))

    m = SimpleNamespace(Base=Base)
    s = opened(m)
    s.add_all([Parent(id=1), Parent(id=2)])
    s.flush()
    s.add(Child(id=1, size=3, parent_id=1))
    s.commit()
    s.connection(
        execution_options={"isolation_level": "REPEATABLE READ"} if engine.dialect.name != "sqlite" else {}
    )
    s.get_one(Child, 1).parent_id = 2
    s.commit()
    right(s, m)


def test_results_of_a_bulk_insert(opened: Open) -> None:
    m = family("r_ins", n)
    s = opened(m)
    two(s, m)
    statement = sa.insert(m.Child).values(parent_id=2, size=4)
    result = s.execute(statement)
    assert s.get_one(m.Child, result.inserted_primary_key[0]).size == 4
    with s.begin_nested() as savepoint:
        plain = s.execute(statement, execution_options={"denormalize": "unchecked"})
        savepoint.rollback()
    assert result.rowcount == plain.rowcount
    s.commit()
    right(s, m)


def test_an_insert_of_one_row_that_leaves_a_conflict_alone(opened: Open, engine: Engine) -> None:
    """What it says is the key of its row is that of another."""
    m = family("r_conf", n)
    s = opened(m)
    two(s, m)
    statement: Any
    if engine.dialect.name == "mariadb" or engine.dialect.name == "mysql":
        statement = sa.insert(m.Child).prefix_with("IGNORE")
    else:
        insert = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[engine.dialect.name]
        statement = insert(m.Child).on_conflict_do_nothing()
    for key in (1, 3):
        s.execute(statement.values(id=key, parent_id=2, size=4))
    s.commit()
    right(s, m)
    assert (s.get_one(m.Parent, 1).n, s.get_one(m.Parent, 2).n) == (2, 1)


def test_a_column_named_as_a_parameter(opened: Open) -> None:
    m = family(
        "r_key",
        n,
        parent=lambda: {"key_0": mapped_column(Integer), "to_0": mapped_column(Integer)},
        child=lambda: {"child_0": mapped_column(Integer)},
    )
    s = opened(m)
    two(s, m)
    s.add(m.Child(parent_id=1, size=5))
    s.commit()
    s.get_one(m.Child, 1).size = 50
    s.commit()
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "flush", "recount", "trigger"])
def test_one_to_one_replaced(opened: Open, strategy: str) -> None:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = f"r_one_{strategy}_parent"
        id = mapped_column(Integer, primary_key=True)
        child = relationship("Child", uselist=False, cascade="all, delete-orphan", back_populates="parent")
        total = sum_of("child", "size", type_=Integer, strategy=strategy)

    class Child(Base):
        __tablename__ = f"r_one_{strategy}_child"
        id = mapped_column(Integer, primary_key=True)
        size = mapped_column(Integer)
        parent_id = mapped_column(ForeignKey(f"r_one_{strategy}_parent.id"))
        parent = relationship(Parent, back_populates="child")

    m = SimpleNamespace(Base=Base)
    s = opened(m)
    p = Parent(id=1, child=Child(id=1, size=4))
    s.add(p)
    s.commit()
    right(s, m)
    p.child = Child(id=2, size=7)
    s.commit()
    right(s, m)
    s.expire_all()
    s.add(Child(id=3, size=9, parent=p))
    s.commit()
    right(s, m)
    p.child = None
    s.commit()
    right(s, m)


class Cents(sa.types.TypeDecorator[Any]):
    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value * 100

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value // 100


@pytest.mark.parametrize("kind", [Integer, Cents])
def test_extreme_of_a_decorated_type(opened: Open, kind: Any) -> None:
    m = family(
        f"r_deco_{kind.__name__.lower()}",
        lambda: {"most": max_of("children", "cost", type_=kind)},
        lambda: {"cost": mapped_column(Cents)},
    )
    s = opened(m)
    two(s, m)
    for cost in (3, 4):
        s.add(m.Child(parent_id=2, cost=cost))
        s.commit()
        assert s.get_one(m.Parent, 2).most == cost
        right(s, m)


def test_core_over_a_table_of_another_metadata(opened: Open, engine: Engine) -> None:
    m = family("r_refl", n)
    s = opened(m)
    two(s, m)
    table = sa.Table("r_refl_child", sa.MetaData(), autoload_with=s.connection())
    with suppress(DenormalizeError):
        s.connection().execute(sa.update(table).values(size=500))
    s.commit()
    right(s, m)


def test_a_parent_that_is_a_subclass_in_the_same_table(opened: Open) -> None:
    """The aggregate belongs to a subclass in the same table; children of other rows are none of its business."""
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "r_sub_parent"
        id = mapped_column(Integer, primary_key=True)
        kind = mapped_column(String(5))
        children = relationship("Child")
        __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "p"}

    class Sub(Parent):
        n = count_of("children", type_=Integer)
        __mapper_args__ = {"polymorphic_identity": "s"}

    class Child(Base):
        __tablename__ = "r_sub_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey("r_sub_parent.id"))

    m = SimpleNamespace(Base=Base)
    s = opened(m)
    s.add_all([Parent(id=1), Sub(id=2)])
    s.commit()
    for parent in (1, 2):
        s.add(Child(parent_id=parent))
        s.commit()
    right(s, m)
    assert s.execute(sa.select(Parent.__table__.c.n).order_by(Parent.__table__.c.id)).scalars().all() in (
        [0, 1],
        [None, 1],
    )


def test_a_version_that_the_database_counts(engine: Engine) -> None:
    """Each UPDATE of the row changes it, also those of the aggregate, of which the object would know nothing."""
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "r_xmin_parent"
        id = mapped_column(Integer, primary_key=True)
        xmin = mapped_column("xmin", Integer, system=True, server_default=sa.FetchedValue())
        children = relationship("Child")
        n = count_of("children", type_=Integer)
        __mapper_args__ = {"version_id_col": xmin, "version_id_generator": False}

    class Child(Base):
        __tablename__ = "r_xmin_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey("r_xmin_parent.id"))

    with pytest.raises(ConfigurationError, match=r"Parent.n: .* Parent.xmin.* take strategy 'flush'"):
        sa.orm.configure_mappers()
    Base.registry.dispose()


class Xid(sa.types.UserDefinedType[Any]):
    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid"


def test_strategy_flush_beside_a_version_that_the_database_counts(opened: Open, engine: Engine) -> None:
    if engine.dialect.name != "postgresql":
        pytest.skip("PostgreSQL only")
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "r_xmin_parent"
        id = mapped_column(Integer, primary_key=True)
        title = mapped_column(String(20))
        xmin = mapped_column("xmin", Xid, system=True, server_default=sa.FetchedValue())
        children = relationship("Child")
        n = count_of("children", type_=Integer, strategy="flush")
        __mapper_args__ = {"version_id_col": xmin, "version_id_generator": False}

    class Child(Base):
        __tablename__ = "r_xmin_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey("r_xmin_parent.id"))

    m = SimpleNamespace(Base=Base)
    s = opened(m)
    s.add(Parent(id=1))
    s.commit()
    p = s.get_one(Parent, 1)
    s.add(Child(parent_id=1))
    s.flush()
    p.title = "x"
    s.commit()
    right(s, m)


def test_a_mapper_event_that_sets_the_measure(opened: Open) -> None:
    m = family("r_bue", n)

    @event.listens_for(m.Child, "before_update")
    def count(mapper: Any, connection: Any, target: Any) -> None:
        target.size = len(target.message)

    s = opened(m)
    two(s, m)
    s.get_one(m.Child, 1).message = "abcdefgh"
    with pytest.raises(DenormalizeError, match=r"Parent.n, Parent.total .*before_update.* validator"):
        s.commit()
    s.rollback()
    right(s, m)
    event.remove(m.Child, "before_update", count)

    @event.listens_for(m.Child.message, "set")
    def measure(target: Any, value: str, old: Any, initiator: Any) -> None:
        target.size = len(value)

    s.get_one(m.Child, 1).message = "abcdefgh"
    s.commit()
    right(s, m)
    assert s.get_one(m.Parent, 1).total == 8 + 7


def test_several_sets_of_named_parameters(opened: Open) -> None:
    """Parameter sets of a table's UPDATE hold no keys, whatever they are called."""
    m = family("r_binds", n)
    s = opened(m)
    two(s, m)
    t = m.Child.__table__
    statement = sa.update(t).where(t.c.id == bindparam("cid")).values(size=bindparam("news"))
    with pytest.raises(
        UncoveredChange, match=r"UPDATE on r_binds_child with 2 sets .* Parent.n, Parent.total"
    ):
        s.execute(statement, [{"cid": 1, "news": 50}, {"cid": 2, "news": 60}])
    with pytest.raises(UncoveredChange, match="UPDATE on r_binds_child with 2 sets"):
        s.execute(sa.update(t), [{"parent_id": 2}, {"parent_id": 1}])
    s.rollback()
    s.execute(statement, [{"cid": 1, "news": 50}])
    s.commit()
    right(s, m)
    assert s.get_one(m.Parent, 1).total == 57


def test_parameter_sets_beside_values(opened: Open) -> None:
    m = family("r_sets", n)
    s = opened(m)
    two(s, m)
    s.execute(sa.insert(m.Child).values(size=9), [{"parent_id": 1}, {"parent_id": 2}])
    s.execute(sa.update(m.Child).values(size=8), [{"id": 1, "message": "x"}])
    s.commit()
    right(s, m)
    assert (s.get_one(m.Parent, 1).total, s.get_one(m.Parent, 2).total) == (8 + 7 + 9, 9)
    with pytest.raises(ReadOnlyAggregate):
        s.execute(sa.update(m.Parent).values(n=8), [{"id": 1, "title": "x"}])


def test_core_on_a_secondary_table_in_a_mapper_event(opened: Open) -> None:
    """It looks as what the flush itself executes there."""
    Base: Any = declarative_base()
    between = sa.Table(
        "r_both",
        Base.metadata,
        sa.Column("post_id", ForeignKey("r_both_post.id"), primary_key=True),
        sa.Column("tag_id", ForeignKey("r_both_tag.id"), primary_key=True),
    )

    class Post(Base):
        __tablename__ = "r_both_post"
        id = mapped_column(Integer, primary_key=True)
        title = mapped_column(String(20))
        tags = relationship("Tag", secondary=between)
        n = count_of("tags", type_=Integer)

    class Tag(Base):
        __tablename__ = "r_both_tag"
        id = mapped_column(Integer, primary_key=True)

    @event.listens_for(Post, "after_update")
    def more(mapper: Any, connection: Any, target: Any) -> None:
        connection.execute(sa.insert(between), [{"post_id": 1, "tag_id": 2}])

    m = SimpleNamespace(Base=Base)
    s = opened(m)
    s.add_all([Post(id=1, tags=[Tag(id=1)]), Tag(id=2)])
    s.commit()
    s.get_one(Post, 1).title = "x"
    with pytest.raises(UncoveredChange, match=r"INSERT on r_both outside the unit of work .* Post.n wrong"):
        s.commit()
    s.rollback()
    right(s, m)


def test_children_that_may_come_before_their_parent() -> None:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "r_nofk_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child", primaryjoin=lambda: Parent.id == sa.orm.foreign(Child.parent_id))
        n = count_of("children", type_=Integer)

    class Child(Base):
        __tablename__ = "r_nofk_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(Integer)

    with pytest.warns(
        DenormalizeWarning, match=r"Parent.n: r_nofk_child.parent_id has no foreign key.*repair"
    ):
        sa.orm.configure_mappers()
    Base.registry.dispose()
