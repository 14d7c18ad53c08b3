"""What reviewers have found when objects are handled in unusual ways under "flush" and "memory"."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import JSON, Boolean, ForeignKey, Integer, Numeric, String, event, update
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import Session, declarative_base, make_transient, mapped_column, relationship

from querycache.denormalize import (
    UncoveredChange,
    avg_of,
    exists_of,
    expression,
    latest_of,
    max_of,
    sum_of,
)
from tests.denormalize.family import Open, family, kept, right, two

LIVE = ("flush", "memory")


ORPHANS = {"cascade": "all, delete-orphan"}


def related(
    name: str, strategy: str, down: Mapping[str, Any], up: Mapping[str, Any] | None = MappingProxyType({})
) -> SimpleNamespace:
    """A family whose relationships a test says more about.

    Args:
        down: what is said of the collection.
        up: what is said of the relationship to the parent; None if there is none.
    """
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = f"{name}_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child", **({} if up is None else {"back_populates": "parent"}), **down)
        locals().update(kept(strategy)())

    class Child(Base):
        __tablename__ = f"{name}_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(Parent.id), index=True)
        if up is not None:
            parent = relationship("Parent", back_populates="children", **up)
        size = mapped_column(Integer)
        message = mapped_column(String(50))

    return SimpleNamespace(Base=Base, Parent=Parent, Child=Child)


def test_objects_show_values_after_the_flush_computed_them(opened: Open) -> None:
    """A bound parameter that was assigned would stay on the object."""
    m = family(
        "o_values",
        lambda: {
            "hi": max_of("children", "size", strategy="flush", type_=Integer),
            "some": exists_of("children", strategy="flush", type_=Boolean),
            "mean": avg_of("children", "size", strategy="flush", type_=Numeric(8, 2)),
            "last": latest_of("children", "size", order_by="id", strategy="flush", type_=Integer),
        },
    )
    s = opened(m, expire_on_commit=False)
    two(s, m)
    parent = s.get_one(m.Parent, 1)
    other = s.get_one(m.Parent, 2)
    s.add_all([m.Child(id=3, parent=parent, size=9), m.Child(id=4, parent_id=2, size=1)])
    s.flush()

    def shown(each: Any) -> tuple[Any, ...]:
        return each.hi, each.some, float(each.mean), each.last

    assert (shown(parent), shown(other)) == ((9, True, 7.0, 9), (1, True, 1.0, 1))
    s.add(m.Child(id=5, parent=parent, size=2))
    s.commit()
    assert shown(parent) == (9, True, 5.75, 2)
    right(s, m)


@pytest.mark.parametrize("delete_orphans", [False, True])
@pytest.mark.parametrize("strategy", ["sql", *LIVE])
def test_a_deleted_child_is_set_to_the_parent_it_has(
    opened: Open, strategy: str, delete_orphans: bool
) -> None:
    """The unit of work takes a deletion back for what has been added to a collection, not for all that is in it."""
    m = related(f"o_goes_{strategy}_{delete_orphans:d}", strategy, ORPHANS if delete_orphans else {})
    s = opened(m)
    two(s, m)
    parent = s.get_one(m.Parent, 1)
    child = next(each for each in parent.children if each.id == 1)
    child.parent = parent
    s.delete(child)
    parent.children.append(m.Child(id=3, size=1))
    s.commit()
    assert (parent.n, parent.total) == (2, 8)
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", *LIVE])
def test_a_deletion_that_a_collection_takes_back(opened: Open, strategy: str) -> None:
    """For one flush; also a collection of which the child does not know."""
    m = related(f"o_back_{strategy}", strategy, {}, None)
    s = opened(m, autoflush=False)
    parent, other = m.Parent(id=1), m.Parent(id=2)
    s.add_all([parent, other])
    s.flush()
    s.add(m.Child(id=1, parent_id=1, size=5))
    s.commit()
    child = s.get_one(m.Child, 1)
    s.delete(child)
    other.children.append(child)
    s.flush()
    assert (parent.n, other.n, other.total) == (0, 1, 5)
    right(s, m)
    s.commit()  # it is marked still
    assert (parent.n, other.n, other.total) == (0, 0, 0)
    right(s, m)


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("by", ["key", "object"])
@pytest.mark.parametrize("strategy", ["sql", *LIVE])
def test_a_child_is_moved_and_its_old_parent_deleted(
    opened: Open, strategy: str, by: str, loaded: bool
) -> None:
    m = family(f"o_moved_{strategy}_{by}_{loaded:d}", kept(strategy))
    s = opened(m, autoflush=False)
    two(s, m)
    parents = [s.get_one(m.Parent, key) for key in (1, 2)]
    child = s.get_one(m.Child, 1)
    if loaded:
        assert len(parents[0].children) == 2
    if by == "key":
        child.parent_id = 2
    else:
        child.parent = parents[1]
    s.delete(parents[0])
    s.commit()
    # For what was moved by its key, the unit of work takes the key away with the parent.
    assert (parents[1].n, parents[1].total) == ((0, 0) if by == "key" else (1, 5))
    right(s, m)


@pytest.mark.parametrize("how", ["deletes", "takes back"])
@pytest.mark.parametrize("strategy", ["sql", *LIVE])
def test_a_later_listener_decides_of_a_deletion(opened: Open, strategy: str, how: str) -> None:
    m = family(
        f"o_late_{strategy}_{how[0]}",
        kept(strategy),
        lambda: {"hidden": mapped_column(Boolean, default=False)},
    )
    s = opened(m)
    two(s, m)
    parents = [s.get_one(m.Parent, key) for key in (1, 2)]
    child = s.get_one(m.Child, 1)

    def later(session: Session, *_: Any) -> None:
        if how == "deletes":
            session.delete(child)
        else:
            session.add(child)
            child.hidden = True

    event.listen(s, "before_flush", later)
    if how == "deletes":
        child.parent_id = 2
    else:
        s.delete(child)
    if strategy == "sql":
        s.commit()
    else:
        with pytest.raises(UncoveredChange, match=r"Child \(1,\) was .*deleted.* after Parent\."):
            s.commit()
        s.rollback()
    event.remove(s, "before_flush", later)
    assert parents[0].n + parents[1].n == (1 if (strategy, how) == ("sql", "deletes") else 2)
    right(s, m)


class Refused(Exception):
    pass


@pytest.mark.parametrize("how", ["expunged", "expired", "again"])
@pytest.mark.parametrize("strategy", ["sql", *LIVE])
def test_what_a_listener_has_refused_is_not_written_later(opened: Open, strategy: str, how: str) -> None:
    m = family(
        f"o_refused_{strategy}_{how}",
        lambda: {
            **kept(strategy)(),
            **(
                {"hi": max_of("children", "size", strategy="flush", type_=Integer)}
                if strategy == "flush"
                else {}
            ),
        },
    )
    s = opened(m)
    two(s, m)
    parent, child = s.get_one(m.Parent, 1), s.get_one(m.Child, 1)

    def refuse(session: Session, *_: Any) -> None:
        raise Refused

    event.listen(s, "before_flush", refuse)
    fresh = m.Child(id=3, parent_id=1, size=100)
    if how == "expired":
        child.size = 100
    else:
        s.add(fresh)
    with pytest.raises(Refused):
        s.flush()
    event.remove(s, "before_flush", refuse)
    if how == "expunged":
        s.expunge(fresh)
    elif how == "expired":
        s.expire(child)
    s.commit()
    assert (parent.n, parent.total) == ((3, 112) if how == "again" else (2, 12))
    right(s, m)


def test_a_flush_that_flush_itself_refused(opened: Open) -> None:
    m = family("o_self", kept("flush"))
    s = opened(m)
    two(s, m)
    parent, children = s.get_one(m.Parent, 1), [s.get_one(m.Child, key) for key in (1, 2)]
    s.add(m.Child(id=3, parent_id=2, size=1))
    children[0].size = 9
    children[1].size = m.Child.size + 1
    with pytest.raises(UncoveredChange, match="given as a SQL expression"):
        s.flush()
    for child in children:
        s.expire(child)
    s.commit()
    assert (parent.n, parent.total) == (2, 12)
    right(s, m)


@functools.cache
def done(strategy: str) -> SimpleNamespace:
    return family(f"o_done_{strategy}", kept(strategy))


HANDLED: dict[str, Callable[[Session, SimpleNamespace, list[Any], Any], Any]] = {
    "a new child that is never added": lambda s, m, parents, child: m.Child(parent=parents[1], size=5),
    "a changed child is expunged": lambda s, m, parents, child: (
        setattr(child, "size", 100),
        s.expunge(child),
    ),
    "a moved child is expunged": lambda s, m, parents, child: (
        setattr(child, "parent", parents[1]),
        s.expunge(child),
    ),
    "a new child is expunged": lambda s, m, parents, child: (
        s.add(fresh := m.Child(parent=parents[0], size=4)),
        s.expunge(fresh),
    ),
    "a new child is expunged and added again": lambda s, m, parents, child: (
        s.add(fresh := m.Child(parent=parents[0], size=4)),
        s.expunge(fresh),
        s.add(fresh),
    ),
    "the parent is refreshed": lambda s, m, parents, child: (
        setattr(child, "size", 100),
        s.refresh(parents[0], with_for_update=True),
    ),
    "the parent is expired": lambda s, m, parents, child: (
        setattr(child, "parent", parents[1]),
        s.expire(parents[0]),
        setattr(child, "size", 100),
    ),
    "the parent is loaded again": lambda s, m, parents, child: (
        setattr(child, "size", 100),
        s.get(m.Parent, 1, populate_existing=True),
    ),
    "a bulk statement": lambda s, m, parents, child: (
        s.add(m.Child(parent=parents[1], size=4)),
        setattr(child, "size", 100),
        s.execute(update(m.Child).where(m.Child.id == 2).values(size=10)),
    ),
    "a copy": lambda s, m, parents, child: (
        setattr(child, "size", 9),
        s.flush(),
        make_transient(child),
        setattr(child, "id", 55),
        s.add(child),
    ),
    "moved by its key and removed": lambda s, m, parents, child: (
        setattr(child, "parent_id", 2),
        child in parents[0].children and parents[0].children.remove(child),
    ),
    "the parent is expunged": lambda s, m, parents, child: (
        setattr(child, "size", 40),
        s.expunge(parents[0]),
    ),
    "the savepoint is rolled back, and the child added again": lambda s, m, parents, child: (
        nested := s.begin_nested(),
        s.add(fresh := m.Child(parent=parents[1], size=4)),
        s.flush(),
        nested.rollback(),
        s.add(fresh),
    ),
    "merged": lambda s, m, parents, child: s.merge(m.Child(id=1, parent_id=2, size=3)),
    "orphaned and deleted": lambda s, m, parents, child: (setattr(child, "parent", None), s.delete(child)),
}


@pytest.mark.filterwarnings("ignore:Object of type <Child> not in session")
@pytest.mark.parametrize("autoflush", [True, False])
@pytest.mark.parametrize("how", HANDLED)
@pytest.mark.parametrize("strategy", ["sql", *LIVE])
def test_what_is_done_to_objects(opened: Open, strategy: str, how: str, autoflush: bool) -> None:
    """What "memory" writes does not depend on what it has heard of, and when."""
    m = done(strategy)
    s = opened(m, autoflush=autoflush)
    two(s, m)
    parents = [s.get_one(m.Parent, key) for key in (1, 2)]
    HANDLED[how](s, m, parents, s.get_one(m.Child, 1))
    s.commit()
    right(s, m)
    for child in s.query(m.Child).all():
        child.size, child.parent_id = 3, 1
    s.commit()
    right(s, m)


@pytest.mark.filterwarnings("ignore:Object of type <Child> not in session")
def test_memory_shows_what_the_session_holds(opened: Open) -> None:
    m = family("o_shows", kept("memory"))
    s = opened(m, autoflush=False)
    two(s, m)
    parents = [s.get_one(m.Parent, key) for key in (1, 2)]
    child = s.get_one(m.Child, 1)
    fresh = m.Child(parent=parents[1], size=4)
    assert parents[1].n == 0  # it is in no session
    s.add(fresh)
    assert (parents[1].n, parents[1].total) == (1, 4)
    s.expunge(fresh)
    assert (parents[1].n, parents[1].total) == (0, 0)
    s.add(m.Child(parent_id=2, size=3))
    assert (parents[1].n, parents[1].total) == (1, 3)
    child.size = 50
    assert parents[0].total == 57
    s.expunge(child)
    assert parents[0].total == 12
    alone = m.Parent(id=4, children=[moved := m.Child(size=8)])
    assert alone.n == 1
    moved.parent = parents[1]
    assert (alone.n, parents[1].n) == (0, 1)  # it may never be added
    other = m.Parent(id=3, children=[m.Child(size=8)])
    assert (other.n, other.total) == (1, 8)
    s.add(other)
    assert (other.n, other.total) == (1, 8)
    s.commit()
    assert [(each.n, each.total) for each in (*parents, other)] == [(2, 12), (1, 3), (1, 8)]
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", *LIVE])
def test_a_measure_that_is_changed_in_place(opened: Open, strategy: str) -> None:
    worth = expression(
        sql=lambda c: c.data["n"].as_integer(), python=lambda c: c.data["n"], columns=("data",)
    )
    m = family(
        f"o_place_{strategy}",
        lambda: {"total": sum_of("children", worth, strategy=strategy, type_=Integer)},
        lambda: {"data": mapped_column(MutableDict.as_mutable(JSON()))},
    )
    s = opened(m)
    s.add(m.Parent(id=1))
    s.flush()
    s.add_all([m.Child(id=key, parent_id=1, data={"n": 5}) for key in (1, 2)])
    s.commit()
    parent, child = s.get_one(m.Parent, 1), s.get_one(m.Child, 1)
    child.data["n"] = 8
    s.commit()
    assert parent.total == 13
    child.data["n"] = 9
    s.delete(child)
    s.commit()
    assert parent.total == 5
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", *LIVE])
def test_children_below_parents_of_the_base_class(opened: Open, strategy: str) -> None:
    """They have no aggregate."""
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = f"o_base_{strategy}_parent"
        id = mapped_column(Integer, primary_key=True)
        kind = mapped_column(String(9))
        children = relationship("Child", back_populates="parent")
        __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "base"}

    class Special(Parent):
        locals().update(kept(strategy)())
        __mapper_args__ = {"polymorphic_identity": "special"}

    class Child(Base):
        __tablename__ = f"o_base_{strategy}_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(Parent.id))
        parent = relationship("Parent", back_populates="children")
        size = mapped_column(Integer)

    m = SimpleNamespace(Base=Base, Parent=Parent, Special=Special, Child=Child)
    s = opened(m)
    base, special = m.Parent(id=1), m.Special(id=2)
    s.add_all([base, special])
    base.children.append(child := m.Child(id=1, size=5))
    special.children.append(m.Child(id=2, size=7))
    s.commit()
    base.children.append(m.Child(id=3, size=1))
    s.add(m.Child(id=4, size=1, parent_id=1))
    s.commit()
    child.parent = special
    s.commit()
    assert (special.n, special.total) == (2, 12)
    child.parent = base
    s.commit()
    child.size = 6
    s.commit()
    s.delete(base.children[0])
    s.commit()
    assert (special.n, special.total, "n" in base.__dict__) == (1, 7, False)
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", *LIVE])
def test_what_an_access_must_not_load(opened: Open, strategy: str) -> None:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = f"o_raise_{strategy}_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child", back_populates="parent", lazy="raise")
        locals().update(kept(strategy)())

    class Child(Base):
        __tablename__ = f"o_raise_{strategy}_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(Parent.id))
        parent = relationship("Parent", back_populates="children", lazy="raise")
        size = mapped_column(Integer, deferred=True, deferred_raiseload=True)
        message = mapped_column(String(50))

    m = SimpleNamespace(Base=Base, Parent=Parent, Child=Child)
    s = opened(m)
    two(s, m)
    s.expunge_all()
    s.get_one(m.Child, 1).parent_id = 2
    s.commit()
    s.expunge_all()
    child = s.get_one(m.Child, 1)
    child.size = 50
    s.commit()
    parents = [s.get_one(m.Parent, key) for key in (1, 2)]
    assert [(each.n, each.total) for each in parents] == [(1, 7), (1, 50)]
    s.delete(s.get_one(m.Child, 2))
    s.commit()
    assert [(each.n, each.total) for each in parents] == [(0, 0), (1, 50)]
    right(s, m)


def test_memory_shows_changes_when_something_else_is_loaded(opened: Open) -> None:
    m = family("o_load", kept("memory"), lambda: {"note": mapped_column(String(9), deferred=True)})
    s = opened(m, autoflush=False)
    two(s, m)
    parent, child = s.get_one(m.Parent, 1), s.get_one(m.Child, 1)
    child.size = 50
    assert (child.note, parent.total) == (None, 57)
    s.refresh(child, ["message"])
    assert parent.total == 57
    s.refresh(child)
    assert parent.total == 12
    child.size = 51
    s.expunge(child)
    child.size = 52  # it is detached
    s.add(child)
    assert parent.total == 12
    s.commit()
    assert parent.total == 59
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", *LIVE])
def test_a_later_listener_takes_a_change_back(opened: Open, strategy: str) -> None:
    m = family(f"o_expires_{strategy}", kept(strategy))
    s = opened(m)
    two(s, m)
    child = s.get_one(m.Child, 1)
    event.listen(s, "before_flush", lambda session, *_: session.expire(child))
    child.size, child.parent_id = 50, 2
    if strategy == "flush":
        with pytest.raises(UncoveredChange):
            s.commit()
        s.rollback()
    else:
        s.commit()
    right(s, m)


@pytest.mark.filterwarnings("ignore:Object of type <Parent> not in session")
@pytest.mark.parametrize("strategy", ["sql", *LIVE])
def test_a_child_is_put_below_a_parent_that_was_deleted(opened: Open, strategy: str) -> None:
    """The unit of work leaves its row where it is."""
    m = family(f"o_into_{strategy}", kept(strategy))
    s = opened(m, autoflush=False)
    two(s, m)
    parents, child = [s.get_one(m.Parent, key) for key in (1, 2)], s.get_one(m.Child, 1)
    s.delete(parents[1])
    s.flush()
    parents[1].children = [child]
    child.size = 6
    s.commit()
    assert (child.parent_id, parents[0].n, parents[0].total) == (1, 2, 13)
    right(s, m)
