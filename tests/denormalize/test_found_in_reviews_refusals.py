"""What reviewers have found of statements and mappings that were to be refused, and were not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import JSON, Engine, ForeignKey, Index, Integer, String, UniqueConstraint
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, aliased, configure_mappers, declarative_base, mapped_column, relationship

from querycache.denormalize import (
    ReadOnlyAggregate,
    UncoveredChange,
    count_of,
    latest_of,
    maintain,
    max_of,
    python,
)
from querycache.denormalize.dml import columns_written
from querycache.errors import ConfigurationError
from tests.denormalize.family import Open, family, kept, right, two

SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)


def _execute(session: Session, statement: Any, how: str, rows: Any = None) -> None:
    given = () if rows is None else (rows,)
    (session if how == "session" else session.connection()).execute(statement, *given)


def _upsert(engine: Engine, target: Any, values: Any, **setting: Any) -> Any:
    """An INSERT of a row that sets `setting` where the row is there; `new(name)` in it stands for what was to be inserted."""
    made: Any = {"sqlite": sqlite, "postgresql": postgresql}.get(engine.dialect.name, mysql).insert(target)
    made = made.values(**values) if values else made
    if engine.dialect.name in ("sqlite", "postgresql"):
        new = {name: made.excluded[name] if value is ... else value for name, value in setting.items()}
        return made.on_conflict_do_update(index_elements=["id"], set_=new)
    new = {name: made.inserted[name] if value is ... else value for name, value in setting.items()}
    return made.on_duplicate_key_update(**new)


@pytest.mark.parametrize("how", ["session", "connection"])
@pytest.mark.parametrize("rows", [None, [{"id": 1, "title": "new"}]])
def test_an_upsert_on_the_parent_sets_an_aggregate(opened: Open, engine: Engine, how: str, rows: Any) -> None:
    m = family("x_upsert", kept("sql"))
    s = opened(m)
    two(s, m)
    target = m.Parent if how == "session" else m.Parent.__table__
    for setting in ({"n": 0}, {"n": ..., "title": ..., "total": ...}):
        statement = _upsert(engine, target, None if rows else {"id": 1, "title": "new"}, **setting)
        with pytest.raises(ReadOnlyAggregate, match=r"Parent\.n .*cannot be set by INSERT"):
            _execute(s, statement, how, rows)
        s.rollback()
    _execute(s, _upsert(engine, target, None if rows else {"id": 1, "title": "new"}, title=...), how, rows)
    s.commit()
    assert (s.get_one(m.Parent, 1).title, s.get_one(m.Parent, 1).n) == ("new", 2)
    right(s, m)


@SQLITE
def test_an_upsert_that_names_the_attribute_or_column(opened: Open, engine: Engine) -> None:
    def columns() -> dict[str, Any]:
        return {"n": count_of("children", type_=Integer, name="held")}

    m = family("x_named", columns)
    s = opened(m)
    two(s, m)
    made = sqlite.insert(m.Parent).values(id=1)
    for key in (m.Parent.n, m.Parent.__table__.c.held, "held"):
        with pytest.raises(ReadOnlyAggregate):
            s.execute(made.on_conflict_do_update(index_elements=["id"], set_={key: 0}))
    right(s, m)


@SQLITE
@pytest.mark.parametrize("how", ["session", "connection"])
def test_text_that_says_from_hides_no_column(opened: Open, how: str) -> None:
    m = family("x_from", kept("sql"))
    s = opened(m)
    two(s, m)
    target: Any = m.Child if how == "session" else m.Child.__table__
    distinct = sa.text("CASE WHEN size IS DISTINCT FROM message THEN 'x' ELSE 'a, b' END")
    statement = sa.update(target).values(message=distinct, parent_id=2)
    if how == "session":
        _execute(s, statement, how)
        s.commit()
        assert s.get_one(m.Parent, 2).n == 2
    else:
        with pytest.raises(UncoveredChange):
            _execute(s, statement, how)
    parents: Any = m.Parent if how == "session" else m.Parent.__table__
    with pytest.raises(ReadOnlyAggregate, match=r"Parent\.total"):
        _execute(s, sa.update(parents).values(title=sa.text("title IS NOT DISTINCT FROM id"), total=5), how)
    s.rollback()
    _execute(s, sa.update(parents).values(title=sa.text("title IS NOT DISTINCT FROM id")), how)
    s.commit()
    right(s, m)


@SQLITE
@pytest.mark.parametrize("how", ["session", "connection"])
def test_text_in_which_nobody_can_read(opened: Open, how: str) -> None:
    m = family("x_unread", kept("sql"))
    s = opened(m)
    two(s, m)
    parents: Any = m.Parent if how == "session" else m.Parent.__table__
    statement = sa.update(parents).values(title=sa.text("'x' /* don't */"))
    with pytest.raises(UncoveredChange, match=r"cannot be told .*Parent\.n, Parent\.total must not"):
        _execute(s, statement, how)


def test_columns_written_by_all_databases() -> None:
    t = sa.Table("t", sa.MetaData(), sa.Column("id", Integer, primary_key=True), sa.Column("a", Integer))
    t.append_column(sa.Column("odd, name = x", Integer, key="odd"))
    common = sa.select(t).where(t.c.a == 4).cte("c")
    for dialect in (sqlite.dialect(), postgresql.dialect(), mysql.dialect()):
        for statement, expected in (
            (sa.insert(t).values(id=1, odd=3), {"id", "odd"}),
            (sa.insert(t).from_select(["id"], sa.select(common.c.id)), {"id"}),
            (sa.update(t).values(a=3, odd=t.c.odd + 1).where(t.c.id == sa.text("a")), {"a", "odd"}),
            (sa.update(t).values(a=sa.select(common.c.a).scalar_subquery()), {"a"}),
            (sa.update(t).values(a=sa.func.coalesce(t.c.a, 1, 2)).where(t.c.id.in_([1, 2])), {"a"}),
            (sa.update(t).values(a=1).returning(t.c.id, t.c.odd == t.c.a), {"a"}),
        ):
            if dialect.name != "mysql" or "RETURNING" not in str(statement):
                assert columns_written(statement.compile(dialect=dialect)) == expected
    alone = sa.Table("u", sa.MetaData(), sa.Column("id", Integer, primary_key=True))
    assert columns_written(sa.insert(alone).compile(dialect=sqlite.dialect(), column_keys=[])) == set()


def _heirs(strategy: str) -> SimpleNamespace:
    Base: Any = declarative_base()
    p = f"x_heirs_{strategy}"

    class Parent(Base):
        __tablename__ = f"{p}_parent"
        id = mapped_column(Integer, primary_key=True)
        kind = mapped_column(String(9))
        children = relationship("Child")
        n = count_of("children", strategy=strategy, type_=Integer)
        __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "parent"}

    class Heir(Parent):
        __tablename__ = f"{p}_heir"
        id = mapped_column(ForeignKey(f"{p}_parent.id"), primary_key=True)
        extra = mapped_column(Integer)
        __mapper_args__ = {"polymorphic_identity": "heir"}

    class Child(Base):
        __tablename__ = f"{p}_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(f"{p}_parent.id"))

    return SimpleNamespace(Base=Base, Parent=Parent, Heir=Heir, Child=Child)


@SQLITE
@pytest.mark.parametrize("strategy", ["sql", "flush", "trigger"])
def test_a_bulk_statement_on_a_joined_subclass_sets_an_aggregate(opened: Open, strategy: str) -> None:
    m = _heirs(strategy)
    s = opened(m)
    s.add(m.Heir(id=1))
    s.flush()
    s.add_all([m.Child(parent_id=1), m.Child(parent_id=1)])
    s.commit()
    for statement, row in (
        (sa.update(m.Heir), {"id": 1, "n": 7}),
        (sa.update(m.Heir), {"id": 1, "n": 7, "extra": 5}),
        (sa.insert(m.Heir), {"id": 2, "n": 7, "extra": 5}),
    ):
        with pytest.raises(ReadOnlyAggregate, match=r"Parent\.n "):
            s.execute(statement, [row])
        s.rollback()
    s.execute(sa.update(m.Heir), [{"id": 1, "extra": 5}])
    s.execute(sa.insert(m.Heir), [{"id": 2, "extra": 5}])
    s.commit()
    right(s, m)


@SQLITE
@pytest.mark.parametrize("how", ["session", "connection"])
@pytest.mark.parametrize("strategy", ["sql", "flush", "trigger"])
def test_rows_are_replaced(opened: Open, strategy: str, how: str) -> None:
    m = family(
        f"x_replace_{strategy}", kept(strategy), child=lambda: {"slot": mapped_column(Integer, unique=True)}
    )
    s = opened(m)
    two(s, m)
    s.get_one(m.Child, 1).slot, s.get_one(m.Child, 2).slot = 1, 2
    s.commit()
    parent: Any = m.Parent if how == "session" else m.Parent.__table__
    child: Any = m.Child if how == "session" else m.Child.__table__
    statements = [
        sa.insert(parent).values(id=1, title="x"),
        sa.update(parent)
        .values(id=1)
        .where(parent.__table__.c.id == 2 if how == "session" else parent.c.id == 2),
    ]
    if strategy != "trigger":
        statements += [
            sa.update(child).values(slot=1).where((m.Child if how == "session" else child.c).id == 2),
            sa.insert(child).values(id=9, parent_id=1, slot=1),
        ]
    for statement in statements:
        with pytest.raises(
            UncoveredChange, match=r"OR REPLACE on \w+ deletes .*Parent\.n.* in two statements"
        ):
            _execute(s, statement.prefix_with("OR REPLACE"), how)
        s.rollback()
    right(s, m)


class _Replace(sa.Insert):
    inherit_cache = True


@compiles(_Replace)
def _replace(element: Any, compiler: Any, **options: Any) -> str:
    return str(compiler.visit_insert(element, **options)).replace("INSERT", "REPLACE", 1)


@SQLITE
@pytest.mark.parametrize("how", ["session", "connection"])
def test_rows_are_replaced_by_a_statement_of_its_own(opened: Open, how: str) -> None:
    m = family("x_own", kept("sql"))
    s = opened(m)
    two(s, m)
    for table, values in ((m.Parent.__table__, {"id": 1}), (m.Child.__table__, {"id": 1, "parent_id": 2})):
        with pytest.raises(UncoveredChange):
            _execute(s, _Replace(table).values(**values), how)
        s.rollback()
    right(s, m)


def _refused(make: Any, match: str) -> None:
    """Declarations that are refused when the mappers configure, as any of their kind."""
    alive: list[Any] = []  # else a class may be collected before

    class Kept:
        def __init_subclass__(cls) -> None:
            alive.append(cls)

    Base: Any = declarative_base(cls=Kept)
    with pytest.raises(ConfigurationError, match=match):
        make(Base)
        configure_mappers()
    Base.registry.dispose()


@pytest.mark.parametrize("where", ["constraint", "key", "column"])
@pytest.mark.parametrize("whose", ["child", "parent"])
@pytest.mark.parametrize("strategy", ["sql", "flush", "trigger"])
def test_a_table_that_replaces_rows(strategy: str, whose: str, where: str) -> None:
    def make(Base: Any) -> None:
        def columns(mine: bool) -> dict[str, Any]:
            given: Any = {"sqlite_on_conflict_primary_key": "REPLACE"} if mine and where == "key" else {}
            found: dict[str, Any] = {"id": mapped_column(Integer, primary_key=True, **given)}
            given = {"sqlite_on_conflict_unique": "replace"} if mine and where == "column" else {}
            found["slot"] = mapped_column(Integer, unique=bool(given), **given)
            if mine and where == "constraint":
                found["__table_args__"] = (UniqueConstraint("slot", sqlite_on_conflict="REPLACE"),)
            return found

        class Parent(Base):
            __tablename__ = "parent"
            locals().update(columns(whose == "parent"))
            children = relationship("Child")
            n = count_of("children", strategy=strategy, type_=Integer)

        class Child(Base):
            __tablename__ = "child"
            locals().update(columns(whose == "child"))
            parent_id = mapped_column(ForeignKey("parent.id"))

    if (
        strategy == "trigger" and whose == "child"
    ):  # which sees them by PRAGMA recursive_triggers, as is documented
        Base: Any = declarative_base()
        make(Base)
        configure_mappers()
        Base.registry.dispose()
    else:
        _refused(make, rf"Parent\.n: {whose} has ON CONFLICT REPLACE")


@pytest.mark.parametrize("strategy", ["sql", "memory", "trigger"])
@pytest.mark.parametrize("what", ["join", "parent", "subquery", "alias"])
def test_a_class_that_is_mapped_to_no_table(strategy: str, what: str) -> None:
    def make(Base: Any) -> None:
        metadata = Base.metadata
        key = sa.Column("id", Integer, primary_key=True)
        first = sa.Table("first", metadata, key)
        if what == "parent":
            second = sa.Table("second", metadata, sa.Column("id", ForeignKey("first.id"), primary_key=True))
            second.append_column(sa.Column("n", Integer, nullable=False, default=0))
        else:
            first.append_column(sa.Column("parent_id", ForeignKey("parent.id")))
            second = sa.Table("second", metadata, sa.Column("id", ForeignKey("first.id"), primary_key=True))
        both = sa.join(first, second)

        class Joined(Base):
            if what == "subquery":
                __table__ = sa.select(first).subquery("s")
                __mapper_args__ = {"primary_key": [__table__.c.id]}
            elif what == "alias":
                __table__ = first
            else:
                __table__ = both
                id = sa.orm.column_property(first.c.id, second.c.id)
            if what == "parent":
                children = relationship("Plain")

        if what == "parent":

            class Plain(Base):
                __tablename__ = "plain"
                id = mapped_column(Integer, primary_key=True)
                parent_id = mapped_column(ForeignKey("first.id"))

            maintain(Joined, "n", count_of("children", strategy=strategy))
            return
        part = aliased(Joined, sa.select(Joined).subquery()) if what == "alias" else Joined

        class Parent(Base):
            __tablename__ = "parent"
            id = mapped_column(Integer, primary_key=True)
            n = count_of("children", strategy=strategy, type_=Integer)
            children = relationship(
                part,
                primaryjoin=lambda: Parent.id == sa.orm.foreign(part.parent_id),
                viewonly=what == "subquery",
            )

    _refused(
        make,
        "leads to an alias of Joined" if what == "alias" else r"\.n: Joined is mapped to a join or a sub",
    )


@pytest.mark.parametrize("whose", ["child", "heir", "parent"])
@pytest.mark.parametrize("strategy", ["sql", "flush", "trigger"])
def test_concrete_inheritance(strategy: str, whose: str) -> None:
    def make(Base: Any) -> None:
        class Parent(Base):
            __tablename__ = "parent"
            id = mapped_column(Integer, primary_key=True)
            children = relationship("Heir" if whose == "heir" else "Child")
            n = count_of("children", strategy=strategy, type_=Integer)

        class Child(Base):
            __tablename__ = "child"
            id = mapped_column(Integer, primary_key=True)
            parent_id = mapped_column(ForeignKey("parent.id"))

        class Heir(Parent if whose == "parent" else Child):  # type: ignore[misc]
            __tablename__ = "heir"
            id = mapped_column(Integer, primary_key=True)
            parent_id = mapped_column(ForeignKey("parent.id"))
            if whose == "parent":
                n = mapped_column(Integer)
            __mapper_args__ = {"concrete": True}

    _refused(make, r"\.n: \w+ is mapped with concrete inheritance")


def _kinds(strategy: str) -> SimpleNamespace:
    Base: Any = declarative_base()
    p = f"x_kinds_{strategy}"

    class Parent(Base):
        __tablename__ = f"{p}_parent"
        id = mapped_column(Integer, primary_key=True)
        what = mapped_column("kind", String(9))
        title = mapped_column(String(9))
        children = relationship("Child")
        __mapper_args__ = {"polymorphic_on": what, "polymorphic_identity": "parent"}

    class Heir(Parent):
        n = count_of("children", strategy=strategy, type_=Integer)
        __mapper_args__ = {"polymorphic_identity": "heir"}

    class Child(Base):
        __tablename__ = f"{p}_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(f"{p}_parent.id"))

    return SimpleNamespace(Base=Base, Parent=Parent, Heir=Heir, Child=Child)


@SQLITE
@pytest.mark.parametrize("strategy", ["sql", "flush", "memory", "trigger"])
def test_a_parent_becomes_one_of_the_subclass_with_the_aggregate(
    opened: Open, engine: Engine, strategy: str
) -> None:
    m = _kinds(strategy)
    s = opened(m)
    s.add_all([m.Parent(id=1), m.Heir(id=2)])
    s.flush()
    s.add_all([m.Child(parent_id=1), m.Child(parent_id=2), m.Child(parent_id=2)])
    s.commit()
    table = m.Parent.__table__
    for how, statement, *rows in (
        ("session", sa.update(m.Parent).where(m.Parent.id == 1).values(what="heir")),
        ("session", sa.update(m.Parent), [{"id": 1, "what": "heir"}]),
        ("session", sa.update(table).where(table.c.id == 1).values(kind="heir")),
        ("connection", sa.update(table).where(table.c.id == 1).values(kind="heir")),
        ("connection", _upsert(engine, table, {"id": 1, "kind": "heir"}, kind=...)),
    ):
        with pytest.raises(
            UncoveredChange, match=r"kind cannot be set by .* those of Heir, .*Heir\.n would be"
        ):
            _execute(s, statement, how, *rows)
        s.rollback()
    parent, heir = s.get_one(m.Parent, 1), s.get_one(m.Heir, 2)
    with pytest.raises(UncoveredChange, match=r"Parent\.what cannot be set to 'heir'"):
        parent.what = "heir"
    with pytest.raises(UncoveredChange, match=r"Heir\.what cannot be set to 'parent'"):
        heir.what = "parent"
    parent.what, heir.what, heir.title = "parent", "heir", "x"
    s.merge(m.Parent(id=1, what="parent", title="y"))
    s.execute(sa.update(m.Parent).values(title="z"))
    s.add(m.Heir(id=3, what="heir"))
    s.commit()
    right(s, m)
    assert heir.n == 2


def test_json_is_not_grouped_by_on_postgresql() -> None:
    def make(type_: Any, kind: Any = latest_of, **order: Any) -> Any:
        def declare(Base: Any) -> None:
            class Parent(Base):
                __tablename__ = "parent"
                id = mapped_column(Integer, primary_key=True)
                children = relationship("Child")
                last = kind("children", python(lambda c: c.data, columns=("data",)), type_=type_, **order)

            class Child(Base):
                __tablename__ = "child"
                id = mapped_column(Integer, primary_key=True)
                data = mapped_column(type_)
                parent_id = mapped_column(ForeignKey("parent.id"))
                __table_args__ = (Index("child_by_id", "parent_id", "id"),)

        return declare

    _refused(make(JSON(), order_by="id"), r"Parent\.last: PostgreSQL cannot group .*with_variant\(JSONB\(\)")
    _refused(make(postgresql.JSON(), order_by="id"), "PostgreSQL cannot group")
    _refused(make(postgresql.JSONB(), max_of), r"no max\(\) of JSONB")


def test_json_that_postgresql_groups_by(opened: Open) -> None:
    Base: Any = declarative_base()
    type_ = JSON().with_variant(postgresql.JSONB(), "postgresql")

    class Parent(Base):
        __tablename__ = "x_json_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child")
        last = latest_of("children", "data", order_by="id", type_=type_)

    class Child(Base):
        __tablename__ = "x_json_child"
        id = mapped_column(Integer, primary_key=True)
        data = mapped_column(type_)
        parent_id = mapped_column(ForeignKey("x_json_parent.id"))
        __table_args__ = (Index("x_json_by_id", "parent_id", "id"),)

    m = SimpleNamespace(Base=Base)
    s = opened(m)
    s.add(Parent(id=1))
    s.flush()
    s.add_all([Child(id=1, parent_id=1, data={"a": [1]}), Child(id=2, parent_id=1, data=[2])])
    s.commit()
    right(s, m)
    s.delete(s.get_one(Child, 2))
    s.commit()
    assert s.get_one(Parent, 1).last == {"a": [1]}
    right(s, m)
