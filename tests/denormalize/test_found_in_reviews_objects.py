"""What sceptical reviewers have found when objects are handled in unusual ways under "flush" and "memory"."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Boolean, ForeignKey, Integer, Numeric, String, event
from sqlalchemy.orm import Session, declarative_base, mapped_column, relationship

from querycache.denormalize import UncoveredChange, avg_of, count_of, exists_of, latest_of, max_of, sum_of
from tests.denormalize.family import Open, family, right, two

LIVE = ("flush", "memory")


def kept(strategy: str) -> Any:
    return lambda: {
        "n": count_of("children", strategy=strategy, type_=Integer),
        "total": sum_of("children", "size", strategy=strategy, type_=Integer),
    }


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
@pytest.mark.parametrize("strategy", ["sql", "flush"])
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
@pytest.mark.parametrize("strategy", ["sql", "flush"])
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
