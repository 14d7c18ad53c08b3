"""Everything that a declaration can get wrong is said when the mappers configure, with the reason."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Numeric,
    SmallInteger,
    String,
    Table,
    create_engine,
)
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    declarative_base,
    mapped_column,
    registry,
    relationship,
)

from querycache.denormalize import (
    DenormalizeWarning,
    aggregates_of,
    avg_of,
    count_of,
    exists_of,
    expression,
    latest_of,
    maintain,
    max_of,
    min_of,
    python,
    sum_of,
    trigger_sql,
)
from querycache.errors import ConfigurationError


def configured(aggregate: Callable[[], Any], *, child_args: tuple[Any, ...] = (), **relation: Any) -> Any:
    """Configure a Parent with one aggregate, and its Child."""
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "parent"
        id = mapped_column(Integer, primary_key=True)
        name = mapped_column(String(20))
        children = relationship("Child", back_populates="parent", **relation)
        held = aggregate()

    class Child(Base):
        __tablename__ = "child"
        __table_args__ = child_args
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey("parent.id"))
        other_id = mapped_column(ForeignKey("other.id", ondelete="CASCADE"))
        parent = relationship(Parent, back_populates="children")
        n = mapped_column(Integer)
        text = mapped_column(String(20))
        price = mapped_column(Numeric(10, 4))

    class Other(Base):
        __tablename__ = "other"
        id = mapped_column(Integer, primary_key=True)
        n = mapped_column(Integer)

    Base.registry.configure()
    return SimpleNamespace(Base=Base, Parent=Parent, Child=Child, Other=Other)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "missing relationship": (
        lambda: count_of("kids", type_=Integer),
        "no relationship 'kids'; it has: children",
    ),
    "missing second step": (
        lambda: count_of("children.toys", type_=Integer),
        "Child has no relationship 'toys'",
    ),
    "many to one": (lambda: count_of("children.parent", type_=Integer), "from the many to the one"),
    "no path": (lambda: count_of(7, type_=Integer), "7 is not a path"),  # type: ignore[arg-type]
    "missing measure": (
        lambda: sum_of("children", "size", type_=Integer),
        "no column attribute 'size', which the measure reads",
    ),
    "missing columns": (
        lambda: sum_of("children", python(lambda c: c.n, columns=("size",)), type_=Integer),
        "no column attribute 'size'",
    ),
    "not sql": (
        lambda: sum_of("children", lambda c: 7, type_=Integer),
        "must return a SQL expression, got 7",
    ),
    "count in text": (lambda: count_of("children", type_=String(10)), "a count needs an integer column"),
    "sum of text": (lambda: sum_of("children", "text", type_=Integer), "needs a number to add up"),
    "sum of numeric in integer": (lambda: sum_of("children", "price", type_=Integer), "cannot hold sums of"),
    "fewer places": (lambda: sum_of("children", "price", type_=Numeric(10, 2)), "fewer decimal places"),
    "small sum": (lambda: sum_of("children", "n", type_=SmallInteger), "outgrow SmallInteger"),
    "average in integer": (lambda: avg_of("children", "n", type_=Integer), "needs a Numeric or Float column"),
    "exists in integer": (lambda: exists_of("children", type_=Integer), "needs a Boolean column"),
    "max of text in integer": (
        lambda: max_of("children", "text", type_=Integer),
        "cannot hold values of type",
    ),
    "order": (
        lambda: latest_of("children", "n", order_by="when", type_=Integer),
        "order_by='when' is not a column attribute",
    ),
    "table off the path": (
        lambda: count_of(
            "children", where=lambda c: Table("x", MetaData(), Column("y")).c.y == 1, type_=Integer
        ),
        "not on the path",
    ),
    "column of the parent": (
        lambda: count_of("children", where=lambda c, p: c.n > p.id, type_=Integer),
        "reads columns of the parent, id",
    ),
    "too many entities": (
        lambda: count_of("children", where=lambda c, p, g: c.n > 0, type_=Integer),
        "where= failed for Child",
    ),
    "trigger in python": (
        lambda: sum_of("children", python(lambda c: c.n), strategy="trigger", type_=Integer),
        "a trigger cannot run Python",
    ),
    "flush in sql": (
        lambda: sum_of("children", lambda c: c.n * 2, strategy="flush", type_=Integer),
        "computes in Python, and the measure is SQL only",
    ),
    "hidden cascade": (
        lambda: count_of("children", strategy="memory", type_=Integer),
        "ON DELETE CASCADE of other, which strategy 'memory' cannot see",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    aggregate, message = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        configured(aggregate)
    assert message in str(caught.value)
    assert str(caught.value).startswith("Parent.held: ")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: count_of("children", strategy="magic"), "unknown strategy 'magic'; there are 'sql'"),
        (lambda: count_of("children", default=3), "default= is set by the aggregate"),
        (lambda: count_of("children", nullable=True), "nullable= is set by the aggregate"),
        (lambda: sum_of("children", 5), "the measure must be the name of a column attribute"),  # type: ignore[arg-type]
    ],
)
def test_refused_at_once(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()


def test_viewonly_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="viewonly"):
        Base: Any = declarative_base()

        class Parent(Base):
            __tablename__ = "parent"
            id = mapped_column(Integer, primary_key=True)
            children = relationship("Child", viewonly=True)
            held = count_of("children", type_=Integer)

        class Child(Base):
            __tablename__ = "child"
            id = mapped_column(Integer, primary_key=True)
            parent_id = mapped_column(ForeignKey("parent.id"))

        Base.registry.configure()


def test_an_aggregate_of_an_aggregate_is_refused() -> None:
    Base: Any = declarative_base()

    class Forum(Base):
        __tablename__ = "forum"
        id = mapped_column(Integer, primary_key=True)
        threads = relationship("Thread")
        held = sum_of("threads", "comment_count", type_=Integer)

    class Thread(Base):
        __tablename__ = "thread"
        id = mapped_column(Integer, primary_key=True)
        forum_id = mapped_column(ForeignKey("forum.id"))
        comments = relationship("Comment")
        comment_count = count_of("comments", type_=Integer)

    class Comment(Base):
        __tablename__ = "comment"
        id = mapped_column(Integer, primary_key=True)
        thread_id = mapped_column(ForeignKey("thread.id"))

    with pytest.raises(ConfigurationError, match="is an aggregate itself"):
        Base.registry.configure()


def test_what_was_refused_is_refused_again_at_the_flush() -> None:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "parent"
        id = mapped_column(Integer, primary_key=True)
        held = count_of("nothing", type_=Integer)

    with pytest.raises(ConfigurationError):
        Base.registry.configure()
    configured(lambda: count_of("children", type_=Integer))  # others are not concerned
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Parent())
        with pytest.raises(ConfigurationError, match="no relationship 'nothing'"):
            session.flush()


@pytest.mark.parametrize("kind", [min_of, max_of])
def test_extremes_without_an_index_warn(kind: Any) -> None:
    with pytest.warns(DenormalizeWarning, match=r"without an index on child \(parent_id, n\)"):
        configured(lambda: kind("children", "n", type_=Integer))


def test_extremes_with_an_index_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configured(
            lambda: max_of("children", "n", type_=Integer),
            child_args=(Index("by_n", "parent_id", "n", "text"),),
        )


@pytest.mark.parametrize("path", ["children", lambda: "children"])
def test_paths_by_name(path: Any) -> None:
    m = configured(lambda: count_of(path, type_=Integer))
    assert [aggregate.name for aggregate in aggregates_of(m.Base)] == ["Parent.held"]
    assert aggregates_of(m.Parent.held) == aggregates_of(m.Parent) == aggregates_of(m.Base.metadata)
    with pytest.raises(ConfigurationError, match="has no aggregates"):
        aggregates_of(m.Child)


def test_both_languages() -> None:
    measure = expression(sql=lambda c: c.n + 1, python=lambda c: c.n + 1, columns=("n",))
    m = configured(lambda: sum_of("children", measure, type_=Integer))
    (aggregate,) = aggregates_of(m.Base)
    assert aggregate.in_python is False


def test_dataclass_mappings() -> None:
    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        children: Mapped[list["Child"]] = relationship("Child", default_factory=list)
        total: Mapped[int] = sum_of("children", "n", init=False)

    class Child(Base):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        n: Mapped[int]
        parent_id: Mapped[int] = mapped_column(ForeignKey("parent.id"), init=False)

    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        parent = Parent(id=1, children=[Child(n=4), Child(n=5)])
        session.add(parent)
        session.commit()
        assert parent.total == 9


def test_imperative_mappings() -> None:
    mapping = registry()
    parents = Table(
        "parent",
        mapping.metadata,
        Column("id", Integer, primary_key=True),
        Column("n", Integer, nullable=False, default=0),
    )
    children = Table(
        "child",
        mapping.metadata,
        Column("id", Integer, primary_key=True),
        Column("parent_id", ForeignKey("parent.id")),
    )

    class Parent:
        n: int

    class Child:
        pass

    mapping.map_imperatively(Parent, parents, properties={"children": relationship(Child)})
    mapping.map_imperatively(Child, children)
    with pytest.raises(ConfigurationError, match="no column attribute 'm'; it has id, n"):
        maintain(Parent, "m", count_of("children"))
    mapping.configure()
    maintain(Parent, "n", count_of("children"))
    engine = create_engine("sqlite://")
    mapping.metadata.create_all(engine)
    with Session(engine) as session:
        parent: Any = Parent()
        parent.children = [Child(), Child()]
        session.add(parent)
        session.commit()
        assert parent.n == 2


def test_python_errors_name_the_attribute() -> None:
    m = configured(lambda: sum_of("children", python(lambda c: c.parent.id), type_=Integer))
    engine = create_engine("sqlite://")
    m.Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(m.Parent(children=[m.Child(n=1)]))
        with pytest.raises(
            AttributeError, match="reads 'parent'; it is given the row's column attributes, id, "
        ):
            session.flush()


def test_float_from_python_is_refused() -> None:
    from querycache.denormalize import DenormalizeError

    m = configured(lambda: sum_of("children", python(lambda c: c.n / 2), type_=Numeric(10, 2)))
    engine = create_engine("sqlite://")
    m.Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(m.Parent(children=[m.Child(n=1)]))
        with pytest.raises(DenormalizeError, match="the measure gave a float"):
            session.flush()


def test_mariadb_would_run_no_trigger_for_a_secondary_row_that_goes_with_its_child() -> None:
    Base: Any = declarative_base()
    secondary = Table(
        "carried",
        Base.metadata,
        Column("bag", ForeignKey("bag.id"), primary_key=True),
        Column("thing", ForeignKey("thing.id", ondelete="CASCADE"), primary_key=True),
    )

    class Bag(Base):
        __tablename__ = "bag"
        id = mapped_column(Integer, primary_key=True)
        things = relationship("Thing", secondary=secondary)
        n = count_of("things", strategy="trigger", type_=Integer)

    class Thing(Base):
        __tablename__ = "thing"
        id = mapped_column(Integer, primary_key=True)

    Base.registry.configure()
    with pytest.raises(
        ConfigurationError, match=r"run no triggers for ON DELETE CASCADE of thing, .* carried"
    ):
        trigger_sql(Base, mysql.dialect())
    assert trigger_sql(Base, postgresql.dialect())
