"""What reviewers have found of strategy "trigger" and its DDL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import JSON, Boolean, Engine, ForeignKey, Integer, Numeric, String, create_engine, event
from sqlalchemy.orm import Session, declarative_base, mapped_column, relationship

from querycache.denormalize import (
    avg_of,
    count_of,
    exists_of,
    latest_of,
    max_of,
    min_of,
    sum_of,
    trigger_sql,
    verify,
)
from querycache.errors import ConfigurationError
from tests.denormalize.family import family

Columns = Callable[[], dict[str, Any]]


def counted() -> dict[str, Any]:
    return {"n": count_of("children", type_=Integer, strategy="trigger")}


def wrong(engine: Engine, m: SimpleNamespace) -> list[str]:
    return [str(each) for each in verify(engine, m.Base).differences]


@contextmanager
def tables(engine: Engine, m: SimpleNamespace) -> Iterator[Session]:
    """The tables of `m`, with one parent; dropped again."""
    m.Base.metadata.create_all(engine)
    try:
        with Session(engine) as session:
            session.add(m.Parent(id=1))
            session.commit()
            yield session
    finally:
        m.Base.metadata.drop_all(engine)


@contextmanager
def schema(engine: Engine, name: str) -> Iterator[str]:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA IF EXISTS {name}")
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    try:
        yield name
    finally:
        with engine.begin() as connection:
            cascade = " CASCADE" if engine.dialect.name == "postgresql" else ""
            connection.exec_driver_sql(f"DROP SCHEMA {name}{cascade}")


def left(engine: Engine, beginning: str) -> int:
    """How many triggers and functions of that beginning there are."""
    catalogs = {
        "sqlite": ["SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND name LIKE '{0}%'"],
        "postgresql": [
            "SELECT count(*) FROM pg_trigger WHERE tgname LIKE '{0}%'",
            "SELECT count(*) FROM pg_proc WHERE proname LIKE '{0}%'",
        ],
        "mysql": ["SELECT count(*) FROM information_schema.triggers WHERE trigger_name LIKE '{0}%'"],
    }
    with engine.connect() as connection:
        return sum(
            connection.scalar(sa.text(each.format(beginning))) or 0 for each in catalogs[engine.dialect.name]
        )


def test_one_more_aggregate_leaves_the_triggers_of_the_others_their_names(engine: Engine) -> None:
    before = family("t_more", counted)
    after = family(
        "t_more",
        lambda: {"a": exists_of("children", type_=Boolean, strategy="trigger"), **counted()},
    )
    before.Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE t_more_parent ADD COLUMN a BOOLEAN NOT NULL DEFAULT FALSE")
    with tables(engine, after) as session:
        session.add(after.Child(parent_id=1))
        session.commit()
        assert wrong(engine, after) == []


ODD = r"a'\%:x;"


def test_percent_signs_in_a_condition(engine: Engine) -> None:
    m = family(
        "t_percent",
        lambda: {
            "n": count_of(
                "children", where=lambda c: c.message.like("a%"), type_=Integer, strategy="trigger"
            ),
            "even": count_of("children", where=lambda c: c.id % 2 == 0, type_=Integer, strategy="trigger"),
            "odd": count_of("children", where=lambda c: c.message == ODD, type_=Integer, strategy="trigger"),
            "any": exists_of(
                "children",
                where=lambda c: c.message.contains("%", autoescape=True),
                type_=Boolean,
                strategy="trigger",
            ),
        },
    )
    with tables(engine, m) as session:
        session.add_all(
            [m.Child(id=key, parent_id=1, message=text) for key, text in ((1, "abc"), (2, "bac"), (4, ODD))]
        )
        session.commit()
        parent = session.get_one(m.Parent, 1)
        assert (parent.n, parent.even, parent.odd, parent.any) == (2, 2, 1, True)
        assert wrong(engine, m) == []


@pytest.mark.parametrize("name", ["t order items", "select", 'T "50%"'])
def test_names_that_want_quotes(engine: Engine, name: str) -> None:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "t Group %s"
        id = mapped_column("key %", Integer, primary_key=True)
        children = relationship("Child")
        n = sum_of("children", "size", type_=Integer, strategy="trigger")
        any = exists_of("children", where=lambda c: c.size > 3, type_=Boolean, strategy="trigger")

    class Child(Base):
        __tablename__ = name
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column("a parent", ForeignKey(Parent.id))
        size = mapped_column("of %s (max)", Integer)

    m = SimpleNamespace(Base=Base, Parent=Parent, Child=Child)
    with tables(engine, m) as session:
        session.add(Child(id=1, parent_id=1, size=5))
        session.commit()
        session.get_one(Child, 1).size = 7
        session.commit()
        assert (session.get_one(Parent, 1).n, wrong(engine, m)) == (7, [])


SERVERS = [
    pytest.param("postgresql", marks=pytest.mark.server("postgresql")),
    pytest.param("mariadb", marks=pytest.mark.server("mariadb")),
]


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
def test_tables_of_another_schema(engine: Engine) -> None:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "parent"
        __table_args__ = {"schema": "t_other"}
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child")
        n = count_of("children", type_=Integer, strategy="trigger")

    class Child(Base):
        __tablename__ = "child"
        __table_args__ = {"schema": "t_other"}
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(Parent.id))

    m = SimpleNamespace(Base=Base, Parent=Parent, Child=Child)
    with schema(engine, "t_other"), tables(engine, m) as session:
        session.add(Child(parent_id=1))
        session.commit()
        assert (session.get_one(Parent, 1).n, wrong(engine, m)) == (1, [])


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
def test_schemas_that_a_connection_puts_in_place_of_others(engine: Engine) -> None:
    m = family("t_tenant", counted)
    with schema(engine, "t_tenant_a") as name, tables(engine, m):
        tenant = engine.execution_options(schema_translate_map={None: name})
        with tables(tenant, m) as session:
            session.add(m.Child(parent_id=1))
            session.commit()
            assert (session.get_one(m.Parent, 1).n, wrong(tenant, m)) == (1, [])
        assert wrong(engine, m) == []


def test_sqlite_cannot_name_a_schema_in_a_trigger() -> None:
    m = family("t_attached", counted)
    engine = create_engine("sqlite://").execution_options(schema_translate_map={None: "main"})
    with pytest.raises(ConfigurationError, match=r"Parent\.n: .* in the schema 'main', .* strategy 'sql'"):
        m.Base.metadata.create_all(engine)


def test_tables_that_are_made_one_by_one(engine: Engine) -> None:
    m = family("t_one", counted)
    other = sa.Table("t_one_other", m.Base.metadata, sa.Column("id", Integer, primary_key=True))
    m.Base.metadata.create_all(engine, tables=[other])
    m.Parent.__table__.create(engine)
    assert left(engine, "qc_t_one_parent_n") == 0
    m.Child.__table__.create(engine)
    with tables(engine, m) as session:
        session.add(m.Child(parent_id=1))
        session.commit()
        assert wrong(engine, m) == []
        session.close()
        m.Child.__table__.drop(engine)
        assert left(engine, "qc_t_one_parent_n") == 0


def crowd() -> SimpleNamespace:
    Base: Any = declarative_base()
    secondary = sa.Table(
        "t_crowd_pairs",
        Base.metadata,
        sa.Column("parent_id", ForeignKey("t_crowd_parent.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("child_id", ForeignKey("t_crowd_child.id"), primary_key=True),
    )

    class Child(Base):
        __tablename__ = "t_crowd_child"
        id = mapped_column(Integer, primary_key=True)

    class Parent(Base):
        __tablename__ = "t_crowd_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship(Child, secondary=secondary)
        n = count_of("children", type_=Integer, strategy="trigger")

    return SimpleNamespace(Base=Base, Parent=Parent, Child=Child)


def test_tables_with_rows_are_dropped_with_all_that_was_made_for_them(engine: Engine) -> None:
    m = crowd()
    with tables(engine, m) as session:
        parent = session.get_one(m.Parent, 1)
        parent.children.append(m.Child(id=1))
        session.commit()
        assert parent.n == 1
        session.commit()
        assert left(engine, "qc_t_crowd_parent_n") > 0
    assert left(engine, "qc_t_crowd_parent_n") == 0


def test_a_migration_may_run_twice_and_go_back(engine: Engine) -> None:
    m = family("t_again", counted)
    with tables(engine, m) as session:
        session.commit()

        def run(statements: list[str]) -> None:
            with engine.begin() as connection:
                for statement in statements:
                    connection.exec_driver_sql(statement)

        run(trigger_sql(m.Base, engine.dialect, drop=True))
        run(trigger_sql(m.Base, engine.dialect, drop=True))
        assert left(engine, "qc_t_again_parent_n") == 0
        run(trigger_sql(m.Base, engine.dialect))
        run(trigger_sql(m.Base, engine.dialect))
        session.add(m.Child(parent_id=1))
        session.commit()
        assert wrong(engine, m) == []


@pytest.mark.parametrize("engine", SERVERS[:1], indirect=True)
def test_truncate(engine: Engine) -> None:
    m = family(
        "t_trunc",
        lambda: {**counted(), "any": exists_of("children", type_=Boolean, strategy="trigger")},
    )
    with tables(engine, m) as session:
        session.add(m.Child(parent_id=1))
        session.commit()
        session.connection().exec_driver_sql("TRUNCATE t_trunc_child")
        session.commit()
        parent = session.get_one(m.Parent, 1)
        assert (parent.n, parent.any) == (0, False)


@pytest.mark.parametrize("recursive", [False, True])
def test_replace_on_sqlite_wants_recursive_triggers(recursive: bool) -> None:
    """As docs/denormalize.md says."""
    m = family("t_replace", counted)
    engine = create_engine("sqlite://")
    event.listen(
        engine,
        "connect",
        lambda connection, record: connection.execute(f"PRAGMA recursive_triggers = {recursive:d}"),
    )
    with tables(engine, m) as session:
        for _ in range(2):
            session.connection().exec_driver_sql("REPLACE INTO t_replace_child (id, parent_id) VALUES (1, 1)")
        session.commit()
        assert session.get_one(m.Parent, 1).n == (1 if recursive else 2)


def test_an_average_is_rounded_as_numeric_columns_are(engine: Engine) -> None:
    m = family(
        "t_mean",
        lambda: {"mean": avg_of("children", "size", type_=Numeric(12, 3), strategy="trigger")},
    )
    with tables(engine, m) as session:
        session.add_all([m.Child(parent_id=1, size=int(not number)) for number in range(16)])
        session.commit()
        assert session.get_one(m.Parent, 1).mean == Decimal("0.063")
        assert wrong(engine, m) == []


def test_the_database_of_nobody(engine: Engine) -> None:
    """A mock engine has no tables to look for."""
    m = family("t_mock", counted)
    said: list[str] = []
    mock: Any = sa.create_mock_engine(engine.url, lambda sql, *_, **__: said.append(str(sql)))
    m.Base.metadata.create_all(mock, checkfirst=False)
    m.Base.metadata.drop_all(mock, checkfirst=False)
    assert len(said) >= 4
    assert isinstance(m.Child.__table__.c.message.type, String)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_new_parent_shows_what_was_null_when_it_was_inserted(engine: Engine, at_once: bool) -> None:
    m = family(
        "t_new",
        lambda: {
            "most": max_of("children", "size", type_=Integer, strategy="trigger"),
            "mean": avg_of("children", "size", type_=Numeric(12, 2), strategy="trigger"),
            "last": latest_of("children", "size", order_by="id", type_=Integer, strategy="trigger"),
        },
        child=lambda: {
            "__table_args__": (
                sa.Index("t_new_by_size", "parent_id", "size"),
                sa.Index("t_new_by_id", "parent_id", "id"),
            )
        },
    )
    with tables(engine, m) as session:
        parent = m.Parent(id=2)
        session.add(parent)
        if not at_once:
            session.flush()
        session.add(m.Child(id=1, parent=parent, size=5))
        session.flush()
        assert (parent.most, parent.mean, parent.last) == (5, 5, 5)
        session.add(m.Child(id=2, parent_id=2, size=7))
        session.flush()
        assert (parent.most, parent.mean, parent.last) == (7, 6, 7)
        session.rollback()


def test_extremes_and_the_latest_are_rounded_as_numeric_columns_are(engine: Engine) -> None:
    def columns() -> dict[str, Any]:
        given: dict[str, Any] = {"type_": Numeric(8, 2), "strategy": "trigger"}
        return {
            "least": min_of("children", "price", **given),
            "most": max_of("children", "price", **given),
            "last": latest_of("children", "price", order_by="id", **given),
        }

    m = family(
        "t_round",
        columns,
        child=lambda: {
            "price": mapped_column(Numeric(8, 4)),
            "__table_args__": (
                sa.Index("t_round_by_price", "parent_id", "price"),
                sa.Index("t_round_by_id", "parent_id", "id"),
            ),
        },
    )
    with tables(engine, m) as session:
        for price in ("2.6781", "-1.0051", "1.0149"):
            session.add(m.Child(parent_id=1, price=Decimal(price)))
            session.commit()
            assert wrong(engine, m) == []
        stored = session.execute(sa.text("SELECT least, most, last FROM t_round_parent")).one()
        assert [str(each) for each in stored] == ["-1.01", "2.68", "1.01"]


UNEQUAL: dict[str, Callable[[Any], Any]] = {
    "json": lambda c: c.held["a"].as_integer() == 1,
    "text of json": lambda c: c.held["b"].as_string() == "it's",
    "distinct": lambda c: sa.or_(c.message.is_(None), c.size.is_distinct_from(2)),
    "not distinct": lambda c: ~c.size.is_not_distinct_from(2) & (c.id > 0),
    "dollars": lambda c: c.message != "$querycache$",
}


@pytest.mark.parametrize("case", UNEQUAL)
def test_conditions_that_a_database_writes_in_its_own_way(engine: Engine, case: str) -> None:
    given: dict[str, Any] = {"where": UNEQUAL[case], "strategy": "trigger"}
    m = family(
        "t_own_way",
        lambda: {
            "n": count_of("children", type_=Integer, **given),
            "any": exists_of("children", type_=Boolean, **given),
        },
        child=lambda: {"held": mapped_column(JSON)},
    )
    values: list[dict[str, Any]] = [
        {"size": 1, "held": {"a": 1, "b": "it's"}, "message": "abc"},
        {"size": 2, "held": {"a": 2, "b": "x"}, "message": "$querycache$"},
    ]
    with tables(engine, m) as session:
        session.add_all([m.Child(id=1, parent_id=1, **values[0]), m.Child(id=2, parent_id=1, **values[1])])
        session.commit()
        child = session.get_one(m.Child, 1)
        for kind in (values[1], values[0]):
            for name, value in kind.items():
                setattr(child, name, value)
            session.commit()
            right = 1 if kind is values[0] else 0
            assert (session.get_one(m.Parent, 1).n, session.get_one(m.Parent, 1).any) == (right, bool(right))
            assert wrong(engine, m) == []
        child.size = None
        session.commit()
        assert wrong(engine, m) == []


def test_text_that_changes_into_one_that_a_collation_calls_equal(engine: Engine) -> None:
    collation = {"sqlite": "NOCASE", "postgresql": "t_any_case"}.get(
        engine.dialect.name, "utf8mb4_general_ci"
    )
    m = family(
        "t_case",
        lambda: {
            "last": latest_of("children", "name", order_by="id", type_=String(20), strategy="trigger"),
        },
        child=lambda: {
            "name": mapped_column(String(20, collation=collation)),
            "__table_args__": (sa.Index("t_case_by_id", "parent_id", "id"),),
        },
    )
    with ExitStack() as stack:
        if engine.dialect.name == "postgresql":
            connection = stack.enter_context(engine.connect())
            connection.exec_driver_sql(
                "CREATE COLLATION IF NOT EXISTS t_any_case (provider = icu, locale = 'und-u-ks-level2',"
                " deterministic = false)"
            )
            connection.commit()
        session = stack.enter_context(tables(engine, m))
        session.add(m.Child(id=1, parent_id=1, name="abc"))
        session.commit()
        session.get_one(m.Child, 1).name = "ABC"
        session.commit()
        assert session.get_one(m.Parent, 1).last == "ABC"
        assert wrong(engine, m) == []


def test_sqlite_is_not_locked_for_rows_that_nothing_is_read_from() -> None:
    """Other databases are: flushes of several rows would meet in deadlocks."""
    engine = create_engine("sqlite://")
    sides = iter([{"cascade": "all"}, {}])
    m = family("t_locks", counted, rel=lambda m: next(sides))
    said: list[str] = []
    with tables(engine, m) as session:
        parent = session.get_one(m.Parent, 1)
        parent.children.extend(m.Child(id=key) for key in (1, 2))
        session.commit()
        children = list(parent.children)
        event.listen(engine, "before_cursor_execute", lambda *given: said.append(given[2].split("\n")[0]))
        children[0].parent_id = None
        session.flush()
        session.expire(parent, ["children"])
        session.delete(parent)
        session.flush()
        said = [each for each in said if not each.startswith(("SELECT", "RELEASE", "SAVEPOINT"))]
        assert [each.partition(" SET ")[0].partition(" WHERE ")[0] for each in said] == [
            "UPDATE t_locks_child",
            "DELETE FROM t_locks_child",
            "DELETE FROM t_locks_parent",
        ]
