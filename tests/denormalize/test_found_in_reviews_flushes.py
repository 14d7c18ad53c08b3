"""What reviewers have found of statements within flushes, and of flushes after flushes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import ForeignKey, Integer, String, event
from sqlalchemy.orm import (
    Session,
    attribute_keyed_dict,
    declarative_base,
    mapped_column,
    object_session,
    relationship,
)

from querycache.denormalize import UncoveredChange, count_of
from tests.denormalize.family import Open, family, kept, right, two

SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
KEPT = ("sql", "recount", "flush", "memory")


@contextmanager
def _listening(target: Any, name: str, listener: Callable[..., Any], **options: Any) -> Iterator[None]:
    event.listen(target, name, listener, **options)
    try:
        yield
    finally:
        event.remove(target, name, listener)


def _once(then: Callable[[Session], Any]) -> Callable[..., None]:
    asked: list[bool] = []

    def listener(*given: Any) -> None:
        session = given[0] if isinstance(given[0], Session) else object_session(given[2])
        if not asked:
            asked.append(True)
            then(session)

    return listener


EVENTS = [
    "before_insert",
    "after_insert",
    "before_update",
    "after_update",
    "later before_flush",
    "early after_flush",
]


@SQLITE
@pytest.mark.parametrize("when", EVENTS)
@pytest.mark.parametrize("strategy", [*KEPT, "trigger"])
def test_a_bulk_statement_within_a_flush(opened: Open, strategy: str, when: str) -> None:
    m = family(f"y_within_{strategy}", kept(strategy))
    for do in (
        sa.update(m.Child).where(m.Child.id != 2).values(size=10),
        sa.update(m.Child).where(m.Child.id == 1).values(parent_id=2),
        sa.delete(m.Child).where(m.Child.id == 2),
        sa.insert(m.Child).values(id=50, parent_id=1, size=3),
    ):
        s = opened(m)
        two(s, m)
        listener = _once(lambda session, do=do: session.execute(do))
        target = Session if "flush" in when else m.Child
        with _listening(target, when.split()[-1], listener, **({"insert": True} if "early" in when else {})):
            s.get_one(m.Child, 1).size = 6
            s.add(m.Child(id=3, parent_id=1, size=1000))
            if strategy == "trigger":
                s.commit()
            else:
                with pytest.raises(
                    UncoveredChange, match=r"on y_\w+_child while a flush is at work.*Parent\.n"
                ):
                    s.commit()
                s.rollback()
        right(s, m)


@SQLITE
@pytest.mark.parametrize("when", ["early before_flush", "later after_flush", "after_flush_postexec"])
@pytest.mark.parametrize("strategy", KEPT)
def test_a_bulk_statement_beside_a_flush(opened: Open, strategy: str, when: str) -> None:
    m = family(f"y_beside_{strategy}", kept(strategy))
    s = opened(m)
    two(s, m)
    do = sa.update(m.Child).where(m.Child.id == 2).values(parent_id=2, size=3)
    with _listening(
        Session, when.split()[-1], _once(lambda session: session.execute(do)), insert="early" in when
    ):
        s.get_one(m.Child, 1).size = 6
        s.add(m.Child(id=3, parent_id=1, size=1000))
        s.commit()
    right(s, m)
    assert s.get_one(m.Parent, 2).total == 3


@SQLITE
@pytest.mark.parametrize("how", ["bulk", "object"])
@pytest.mark.parametrize("strategy", KEPT)
def test_another_session_on_the_connection_of_a_flush(opened: Open, strategy: str, how: str) -> None:
    m = family(f"y_other_{strategy}", kept(strategy))

    def more(mapper: Any, connection: Any, target: Any) -> None:
        with Session(connection) as other:
            if how == "bulk":
                other.execute(sa.update(m.Child).where(m.Child.id == 1).values(size=70))
            else:
                other.get_one(m.Child, 1).size = 70
            other.commit()

    s = opened(m)
    two(s, m)
    with _listening(m.Child, "after_update", more):
        s.get_one(m.Child, 1).message = "changed"
        s.get_one(m.Child, 1).size = 7
        with pytest.raises(UncoveredChange, match="while a flush is at work"):
            s.commit()
    s.rollback()
    right(s, m)


@SQLITE
@pytest.mark.parametrize("strategy", KEPT)
def test_a_flush_after_one_that_a_listener_has_ended(opened: Open, strategy: str) -> None:
    m = family(f"y_ended_{strategy}", kept(strategy))
    s = opened(m)
    two(s, m)
    s.get_one(m.Child, 1).size = 6

    def refuse(*_: Any) -> None:
        raise ValueError("not now")

    with _listening(s, "before_flush", refuse), pytest.raises(ValueError, match="not now") as kept_alive:
        s.flush()
    s.execute(sa.update(m.Child).where(m.Child.id == 2).values(size=1))
    s.commit()
    assert kept_alive.tb is not None
    right(s, m)
    assert s.get_one(m.Parent, 1).total == 7


@SQLITE
def test_a_bulk_statement_flushes_as_sqlalchemy_does(opened: Open) -> None:
    m = family("y_auto", kept("sql"))
    s = opened(m)
    two(s, m)
    s.add(m.Child(id=3, parent_id=1, size=1))
    for_all = sa.update(m.Child).values(size=10)
    s.execute(for_all, execution_options={"autoflush": False})
    assert s.new
    s.execute(for_all)
    assert not s.new
    s.commit()
    assert s.get_one(m.Parent, 1).total == 30
    right(s, m)


def _one_sided(prefix: str, strategy: str, **options: Any) -> Any:
    """A family whose children have no relationship to their parent."""
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = f"{prefix}_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child", **options)
        n = count_of("children", strategy=strategy, type_=Integer)

    class Child(Base):
        __tablename__ = f"{prefix}_child"
        id = mapped_column(Integer, primary_key=True)
        name = mapped_column(String(9))
        parent_id = mapped_column(ForeignKey(f"{prefix}_parent.id"))

    return SimpleNamespace(Base=Base, Parent=Parent, Child=Child)


@SQLITE
@pytest.mark.parametrize("strategy", [*KEPT, "trigger"])
def test_a_child_leaves_a_collection_after_another_has_taken_it(opened: Open, strategy: str) -> None:
    m = _one_sided(f"y_sided_{strategy}", strategy)
    for steps in (
        "append 0, flush, remove 1",
        "append 0, remove 1",
        "append 0, flush, remove 1, commit, clear 0",
        "append 0, flush, remove 1, flush, clear 0",
        "remove 1, append 0, flush, key 1, flush, remove 0",
        "append 0, flush, remove 1, clear 0",
        "append 0, flush, remove 1, flush, delete 0",
    ):
        s = opened(m, expire_on_commit=False)
        parents = [m.Parent(id=1), m.Parent(id=2)]
        s.add_all(parents)
        child = m.Child(id=3)
        parents[1].children.append(child)
        s.commit()
        assert [len(parent.children) for parent in parents] == [0, 1]
        for step in steps.split(", "):
            what, *which = step.split()
            parent = parents[int(which[0])] if which else None
            if what == "append":
                parent.children.append(child)
            elif what == "remove":
                parent.children.remove(child)
            elif what == "clear":
                parent.children.clear()
            elif what == "key":
                child.parent_id = parent.id
            elif what == "delete":
                s.delete(parent)
            else:
                getattr(s, what)()
        s.commit()
        right(s, m)


@SQLITE
@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("strategy", [*KEPT, "trigger"])
def test_a_deleted_child_leaves_a_collection_that_shows_it(opened: Open, strategy: str, keyed: bool) -> None:
    options = {"collection_class": attribute_keyed_dict("name")} if keyed else {}
    m = _one_sided(f"y_shows_{strategy}_{keyed:d}", strategy, **options)
    s = opened(m)
    s.add(m.Parent(id=1))
    s.flush()
    s.add_all([m.Child(id=1, name="a", parent_id=1), m.Child(id=2, name="b", parent_id=1)])
    s.commit()
    parent, child = s.get_one(m.Parent, 1), s.get_one(m.Child, 1)
    assert len(parent.children) == 2
    s.delete(child)
    s.flush()
    if keyed:
        parent.children["a"] = m.Child(id=3, name="a")
    else:
        parent.children.remove(child)
    s.commit()
    assert parent.n == 1 + keyed
    right(s, m)


@SQLITE
@pytest.mark.parametrize("strategy", KEPT)
def test_a_child_is_put_into_two_collections(opened: Open, strategy: str) -> None:
    m = _one_sided(f"y_two_{strategy}", strategy)
    s = opened(m)
    parents = [m.Parent(id=1), m.Parent(id=2)]
    child = m.Child(id=3)
    s.add_all([*parents, child])
    s.commit()
    for collection in [parent.children for parent in parents]:
        collection.append(child)
    if strategy in ("flush", "memory"):
        with pytest.raises(
            UncoveredChange, match=r"Child .*put into Parent\.children of two parents in one flush"
        ):
            s.commit()
        s.rollback()
    else:
        s.commit()
    right(s, m)
