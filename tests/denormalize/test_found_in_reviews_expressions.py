"""What reviewers have found of what declarations and statements name: columns, texts, functions."""

from __future__ import annotations

import datetime
import enum
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import (
    Boolean,
    DateTime,
    Engine,
    Enum,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    TypeDecorator,
    Uuid,
    column,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.orm import (
    Session,
    column_property,
    configure_mappers,
    declarative_base,
    mapped_column,
    relationship,
)

from querycache.denormalize import (
    UncoveredChange,
    count_of,
    expression,
    latest_of,
    max_of,
    min_of,
    python,
    sum_of,
)
from querycache.errors import ConfigurationError
from tests.denormalize.family import Open, family, n, right, two


@pytest.mark.parametrize(
    "name",
    ["Score", "score (max)", "a.b", "a,b", "x=y", "in WHERE t", "50%", 'say "so"', "back`tick", "it's"],
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


TEXTS: dict[str, Callable[[Any], Any]] = {
    "text": lambda c: text("size > 3"),
    "literal column": lambda c: literal_column("size") > 3,
    "column of no table": lambda c: column("size") > 3,
    "table as text": lambda c: c.size > select(func.count()).select_from(text("elsewhere")).scalar_subquery(),
}


@pytest.mark.parametrize("strategy", ["sql", "recount", "trigger"])
@pytest.mark.parametrize("case", TEXTS)
def test_text_does_not_tell_what_it_reads(case: str, strategy: str) -> None:
    m = family(
        f"x_text_{strategy}_{list(TEXTS).index(case)}",
        lambda: {"n": count_of("children", where=TEXTS[case], strategy=strategy, type_=Integer)},
    )
    with pytest.raises(ConfigurationError, match=r"Parent\.n: where= has the text .*columns="):
        configure_mappers()
    m.Base.registry.dispose()


def test_text_with_columns(opened: Open) -> None:
    m = family(
        "x_texted",
        lambda: {
            "n": count_of(
                "children",
                where=expression(
                    sql=lambda c: literal_column("size") > 3, python=lambda c: c.size > 3, columns=("size",)
                ),
                type_=Integer,
            )
        },
    )
    s = opened(m)
    two(s, m)
    s.get_one(m.Child, 1).size = 1
    s.commit()
    assert s.get_one(m.Parent, 1).n == 1
    right(s, m)


def test_text_that_is_a_constant(opened: Open) -> None:
    m = family(
        "x_constant",
        lambda: {
            "n": count_of(
                "children",
                where=lambda c: (
                    (c.size > literal_column("3"))
                    & (c.size < literal_column("1e5"))
                    & (c.message != text("'size'"))
                    & (literal_column("NULL").is_(None))
                ),
                type_=Integer,
            )
        },
    )
    two(opened(m), m)


MOVING: dict[str, Callable[[Any], Any]] = {
    "now": lambda c: c.at > func.now(),
    "CURRENT_TIMESTAMP": lambda c: c.at > func.current_timestamp(),
    "random": lambda c: c.size > func.random(),
    "julianday": lambda c: func.julianday(c.at) > func.julianday("now"),
    "strftime": lambda c: c.message == func.strftime("%Y"),
}


@pytest.mark.parametrize("name", MOVING)
def test_functions_that_change_by_themselves(name: str) -> None:
    m = family(
        f"x_{name.lower()}",
        lambda: {"n": count_of("children", where=MOVING[name], type_=Integer)},
        lambda: {"at": mapped_column(DateTime)},
    )
    with pytest.raises(ConfigurationError, match=rf"(?i)Parent\.n: where= calls {name}\(\).*without a write"):
        configure_mappers()
    m.Base.registry.dispose()


def test_functions_of_dates_that_are_stored() -> None:
    m = family(
        "x_dates",
        lambda: {
            "n": count_of("children", where=lambda c: func.strftime("%Y", c.at) == "2020", type_=Integer)
        },
        lambda: {"at": mapped_column(DateTime)},
    )
    configure_mappers()
    m.Base.registry.dispose()


def middle(name: str, where: Any, strategy: str = "sql") -> Any:
    """Children that hold an aggregate themselves."""

    def extra(made: Any) -> None:
        class Grandchild(made.Base):
            __tablename__ = f"{name}_grandchild"
            id = mapped_column(Integer, primary_key=True)
            child_id = mapped_column(ForeignKey(f"{name}_child.id"))

        made.Grandchild = Grandchild

    return family(
        name,
        lambda: {"n": count_of("children", where=where, strategy=strategy, type_=Integer)},
        lambda: {"grandchildren": relationship("Grandchild"), "m": count_of("grandchildren", type_=Integer)},
        extra=extra,
    )


@pytest.mark.parametrize("strategy", ["sql", "flush", "memory"])
def test_children_that_hold_an_aggregate_which_python_does_not_read(opened: Open, strategy: str) -> None:
    where = expression(sql=lambda c: c.size > 6, python=lambda c: c.size > 6)
    m = middle(f"x_holds_{strategy}", where, strategy)
    s = opened(m)
    two(s, m)
    s.get_one(m.Parent, 1)
    s.get_one(m.Child, 1).size = 8
    s.add(m.Grandchild(child_id=1))
    s.commit()
    assert (s.get_one(m.Parent, 1).n, s.get_one(m.Child, 1).m) == (2, 1)
    right(s, m)


def test_python_is_not_given_aggregates(opened: Open) -> None:
    m = middle("x_given", python(lambda c: c.m > 0))
    s = opened(m)
    s.add(m.Parent(id=1))
    s.flush()
    s.add(m.Child(parent_id=1))
    with pytest.raises(AttributeError, match="reads 'm'; it is given"):
        s.flush()


@pytest.mark.parametrize("kind", [max_of, min_of])
@pytest.mark.parametrize("type_", [Boolean(), Uuid(), LargeBinary()], ids=repr)
def test_extremes_that_postgresql_does_not_have(kind: Any, type_: Any) -> None:
    m = family(
        f"x_{kind.__name__}_{type(type_).__name__.lower()}",
        lambda: {"most": kind("children", "value", type_=type_)},
        lambda: {"value": mapped_column(type_)},
    )
    with pytest.raises(
        ConfigurationError, match=rf"Parent\.most: PostgreSQL has no .*{re.escape(repr(type_))}.* take"
    ):
        configure_mappers()
    m.Base.registry.dispose()


class Letter(enum.Enum):
    Z = "a"
    A = "b"


@pytest.mark.parametrize(
    "columns",
    [
        lambda: {"most": max_of("children", "message", strategy="flush", type_=String(20))},
        lambda: {"most": max_of("children", "letter", strategy="flush", type_=Enum(Letter))},
        lambda: {"most": latest_of("children", "size", order_by="message", strategy="flush", type_=Integer)},
    ],
    ids=["text", "enum", "order"],
)
def test_python_does_not_order_texts_as_the_database_does(columns: Any) -> None:
    m = family("x_text_order", columns, lambda: {"letter": mapped_column(Enum(Letter))})
    with pytest.raises(ConfigurationError, match=r"'flush' compares .* in Python.* take strategy 'sql'"):
        configure_mappers()
    m.Base.registry.dispose()


class InUtc(TypeDecorator[datetime.datetime]):
    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.astimezone(datetime.timezone.utc).replace(tzinfo=None)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.replace(tzinfo=datetime.timezone.utc)


@pytest.mark.filterwarnings("ignore:.*without an index")
@pytest.mark.parametrize("strategy", ["sql", "flush"])
@pytest.mark.parametrize("moment", [DateTime(timezone=True), InUtc()], ids=["plain", "decorated"])
def test_moments_with_a_timezone(opened: Open, strategy: str, moment: Any) -> None:
    """SQLite and MariaDB keep what the clock shows, and leave out where."""
    m = family(
        f"x_zones_{strategy}_{type(moment).__name__.lower()}",
        lambda: {
            "last": latest_of("children", "size", order_by="at", strategy=strategy, type_=Integer),
            "most": max_of("children", "at", strategy=strategy, type_=moment),
        },
        lambda: {"at": mapped_column(moment)},
    )
    s = opened(m)
    s.add(m.Parent(id=1))
    s.commit()
    zones = [datetime.timezone(datetime.timedelta(hours=hours)) for hours in (5, 0, -5)]
    for size, zone in enumerate(zones):
        s.add(
            m.Child(
                id=size + 1, parent_id=1, size=size, at=datetime.datetime(2020, 1, 1, 12 - size, tzinfo=zone)
            )
        )
        s.commit()
        right(s, m)
    s.add_all(
        [
            m.Child(
                id=10 + size,
                parent_id=1,
                size=10 + size,
                at=datetime.datetime(2021, 1, 1, 12 - size, tzinfo=zone),
            )
            for size, zone in enumerate(zones)
        ]
    )
    s.commit()
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "recount", "flush", "memory", "trigger"])
def test_rows_of_a_class_are_told_by_a_column(strategy: str) -> None:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "x_kind_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Small")
        n = count_of("children", type_=Integer, strategy=strategy)

    class Child(Base):
        __tablename__ = "x_kind_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(Parent.id))
        size = mapped_column(Integer)
        kind = column_property(sa.case((size < 10, "small"), else_="any"))
        __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "any"}

    class Small(Child):
        __mapper_args__ = {"polymorphic_identity": "small"}

    with pytest.raises(
        ConfigurationError, match=r"Parent\.n: .* Small .* CASE WHEN .*; take a column .* where="
    ):
        configure_mappers()
    Base.registry.dispose()


def test_all_rows_of_a_table_count_however_their_classes_are_told(opened: Open) -> None:
    def child() -> dict[str, Any]:
        size = mapped_column(Integer)
        kind = column_property(sa.case((size < 10, "small"), else_="any"))
        return {
            "size": size,
            "kind": kind,
            "__mapper_args__": {"polymorphic_on": kind, "polymorphic_identity": "any"},
        }

    m = family("x_kinds", n, child)

    class Small(m.Child):  # type: ignore[misc, name-defined]
        __mapper_args__ = {"polymorphic_identity": "small"}

    s = opened(m)
    s.add(m.Parent(id=1))
    s.flush()
    s.add_all([m.Child(id=1, parent_id=1, size=20), Small(id=2, parent_id=1, size=2)])
    s.commit()
    s.execute(sa.update(m.Child).values(size=3).where(m.Child.id == 1))
    s.commit()
    assert (s.get_one(m.Parent, 1).n, s.get_one(m.Parent, 1).total) == (2, 5)
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "recount", "trigger"])
def test_a_row_that_becomes_one_of_a_counted_class(opened: Open, strategy: str) -> None:
    """As docs/denormalize.md says."""
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = f"x_becomes_{strategy}_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Small")
        n = count_of("children", type_=Integer, strategy=strategy)

    class Child(Base):
        __tablename__ = f"x_becomes_{strategy}_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(Parent.id))
        kind = mapped_column(String(9))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "any"}

    class Small(Child):
        __mapper_args__ = {"polymorphic_identity": "small"}

    m = SimpleNamespace(Base=Base, Parent=Parent, Child=Child)
    s = opened(m)
    s.add(Parent(id=1))
    s.flush()
    s.add_all([Child(id=1, parent_id=1), Child(id=2, parent_id=1), Small(id=3, parent_id=1)])
    s.commit()
    s.execute(sa.update(Child).values(kind="small").where(Child.id == 1))
    s.commit()
    assert s.get_one(Parent, 1).n == 2
    right(s, m)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SQLAlchemy too has something to say of it
        s.get_one(Child, 2).kind = "small"
        s.commit()
    s.expire_all()
    assert s.get_one(Parent, 1).n == (3 if strategy == "trigger" else 2)


COLLATIONS = {
    "sqlite": ("NOCASE", "BINARY"),
    "postgresql": ("C", "en-x-icu"),
    "mysql": ("utf8mb4_bin", "utf8mb4_general_ci"),
}


def named(name: str, strategy: str, ours: str | None, theirs: str | None) -> SimpleNamespace:
    """A parent with the first and last name of its children, in columns with a collation of their own."""
    given: dict[str, Any] = {"type_": String(20, collation=ours), "strategy": strategy}
    return family(
        name,
        lambda: {
            "first": min_of("children", "name", **given),
            "last": max_of("children", "name", where=lambda c: c.size > 0, **given),
        },
        lambda: {
            "name": mapped_column(String(20, collation=theirs)),
            "__table_args__": (sa.Index(f"{name}_by_name", "parent_id", "name"),),
        },
    )


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("strategy", ["sql", "recount", "trigger"])
def test_extremes_of_texts_with_a_collation(engine: Engine, strategy: str, which: int) -> None:
    collation = COLLATIONS[engine.dialect.name][which]
    _extremes_of_texts(engine, named(f"x_coll{which}_{strategy}", strategy, collation, collation))


@pytest.mark.parametrize("strategy", ["recount", "trigger"])
def test_extremes_of_texts_whose_collations_differ(engine: Engine, strategy: str) -> None:
    ours, theirs = COLLATIONS[engine.dialect.name]
    _extremes_of_texts(engine, named(f"x_colls_{strategy}", strategy, ours, theirs))
    _extremes_of_texts(engine, named(f"x_swapped_{strategy}", strategy, theirs, ours))
    _extremes_of_texts(engine, named(f"x_our_{strategy}", strategy, None, theirs))
    _extremes_of_texts(engine, named(f"x_their_{strategy}", strategy, ours, None))


def _extremes_of_texts(engine: Engine, m: SimpleNamespace) -> None:
    """What the database itself says is least and greatest, whatever comes in which order."""
    m.Base.metadata.drop_all(engine)
    m.Base.metadata.create_all(engine)
    with Session(engine) as s:
        s.add_all([m.Parent(id=1), m.Parent(id=2)])
        s.commit()
        for parent, names in ((1, "bCaD"), (2, "BcAd")):
            for name in names:
                s.add(m.Child(parent_id=parent, name=name, size=1))
                s.commit()
                least, most = s.execute(
                    select(func.min(m.Child.name), func.max(m.Child.name)).where(m.Child.parent_id == parent)
                ).one()
                held = s.get_one(m.Parent, parent)
                assert (held.first.lower(), held.last.lower()) == (least.lower(), most.lower())
                right(s, m)
            s.execute(sa.delete(m.Child).where(m.Child.name == names[1]))
            s.commit()
            right(s, m)
    m.Base.metadata.drop_all(engine)


@pytest.mark.parametrize(("ours", "theirs"), [("C", "POSIX"), (None, "C"), ("NOCASE", None)])
def test_collations_that_differ(ours: str | None, theirs: str | None) -> None:
    m = named("x_differ", "sql", ours, theirs)
    said = f"Parent.first: .* {theirs or 'of the database'}, .* {ours or 'that of the database'}, .* collation={theirs!r}, "
    with pytest.raises(ConfigurationError, match=said):
        configure_mappers()
    m.Base.registry.dispose()
