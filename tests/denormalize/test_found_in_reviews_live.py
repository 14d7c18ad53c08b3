"""What reviewers have found of the strategies that look at objects, "flush" and "memory"."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import ForeignKey, Integer, event
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    declarative_base,
    mapped_column,
    relationship,
)

from querycache.denormalize import UncoveredChange, count_of, expression
from tests.denormalize.family import Open, family, kept, right, two

LIVE = ("flush", "memory")


@pytest.mark.parametrize("how", ["key", "object"])
@pytest.mark.parametrize("strategy", LIVE)
def test_a_later_listener_adds_a_child(opened: Open, strategy: str, how: str) -> None:
    m = family(f"l_late_{strategy}", kept(strategy))
    s = opened(m)
    two(s, m)
    parents = [s.get_one(m.Parent, key) for key in (1, 2)]

    def later(session: Session, *_: Any) -> None:
        if not session.info.setdefault("asked", []):
            session.info["asked"].append(True)
            session.add(m.Child(parent_id=1, size=5) if how == "key" else m.Child(parent=parents[0], size=5))

    event.listen(s, "before_flush", later)
    s.add(m.Child(parent_id=2, size=3))
    if strategy == "memory":  # an event has told of it
        s.commit()
        assert (parents[0].n, parents[0].total) == (3, 17)
        right(s, m)
        return
    with pytest.raises(
        UncoveredChange, match=r"Child .* was added or changed after Parent\.n .*before_flush"
    ):
        s.commit()
    s.rollback()
    right(s, m)


@pytest.mark.filterwarnings("ignore:The `objects` parameter")
@pytest.mark.parametrize("strategy", ["sql", "flush", "memory"])
def test_a_part_of_what_is_pending_is_flushed(opened: Open, strategy: str) -> None:
    m = family(f"l_part_{strategy}", kept(strategy))
    s = opened(m)
    two(s, m)
    parent = s.get_one(m.Parent, 1)
    children = [m.Child(parent_id=1, size=5), m.Child(parent_id=1, size=7)]
    s.add_all(children)
    if strategy != "sql":
        with pytest.raises(
            UncoveredChange, match=rf"flush\(objects\) .*'{strategy}' of Parent\.n.*call flush\(\)"
        ):
            s.flush(children[:1])
    else:
        s.flush(children[:1])
    s.commit()
    assert parent.n == 4
    right(s, m)


@pytest.mark.parametrize("flushed", [True, False])
@pytest.mark.parametrize("strategy", ["sql", "flush", "memory"])
def test_a_relationship_is_set_to_what_it_still_shows(opened: Open, strategy: str, flushed: bool) -> None:
    m = family(f"l_shown_{strategy}_{flushed:d}", kept(strategy))
    s = opened(m)
    two(s, m)
    parents = [s.get_one(m.Parent, key) for key in (1, 2)]
    child = s.get_one(m.Child, 1)
    assert child.parent is parents[0]
    child.parent_id = 2
    if flushed:
        s.flush()
    child.parent = parents[0]  # no change for the unit of work
    s.commit()
    assert (child.parent_id, parents[1].n) == (2, 1)
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "flush", "memory"])
def test_there_and_back_by_the_relationship(opened: Open, strategy: str) -> None:
    m = family(f"l_back_{strategy}", kept(strategy))
    s = opened(m)
    two(s, m)
    parents = [s.get_one(m.Parent, key) for key in (1, 2)]
    child = s.get_one(m.Child, 1)
    for number in (1, 0, 1, 0, None, 1):
        child.parent = None if number is None else parents[number]
        if strategy == "memory":
            assert [parent.n for parent in parents] == [1 + (number == 0), int(number == 1)]
    s.commit()
    right(s, m)
    child.parent, child.parent_id = None, 1
    child.parent = parents[1]
    s.commit()
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "recount", "flush", "memory"])
def test_objects_that_cannot_be_hashed(opened: Open, strategy: str) -> None:
    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = f"l_data_{strategy}_parent"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        children: Mapped[list[Any]] = relationship("Child", default_factory=list, init=False)
        n: Mapped[int] = count_of("children", strategy=strategy, init=False)

    class Child(Base):
        __tablename__ = f"l_data_{strategy}_child"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        parent_id: Mapped[int | None] = mapped_column(ForeignKey(Parent.id), default=None)

    m = SimpleNamespace(Base=Base, Parent=Parent, Child=Child)
    s = opened(m)
    parent = Parent()
    parent.children.append(Child())
    s.add(parent)
    s.commit()
    parent.children.append(Child())
    s.commit()
    s.delete(parent.children[0])
    s.commit()
    assert parent.n == 1
    right(s, m)


@pytest.mark.parametrize("lazy", ["dynamic", "write_only"])
def test_memory_with_collections_that_are_not_loaded(opened: Open, lazy: str) -> None:
    m = loaded_never(f"l_lazy_{lazy}", lazy)
    s = opened(m)
    parents = [m.Parent(id=1), m.Parent(id=2)]
    s.add_all([*parents, child := m.Child(id=1, parent_id=1, size=5)])
    s.commit()

    def told() -> list[tuple[int, int]]:
        return [(parent.n, parent.total) for parent in parents]

    getattr(parents[1].children, "add" if lazy == "write_only" else "append")(child)
    s.commit()
    assert told() == [(0, 0), (1, 5)]
    child = s.get_one(m.Child, 1)
    parents[1].children.remove(child)
    s.commit()
    assert told() == [(0, 0), (0, 0)]
    right(s, m)


def loaded_never(name: str, lazy: Any) -> SimpleNamespace:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = f"{name}_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child", back_populates="parent", lazy=lazy)
        locals().update(kept("memory")())

    class Child(Base):
        __tablename__ = f"{name}_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(Parent.id))
        parent = relationship("Parent", back_populates="children")
        size = mapped_column(Integer)

    return SimpleNamespace(Base=Base, Parent=Parent, Child=Child)


def test_memory_under_asyncio_wants_what_is_changed_loaded(tmp_path: Any) -> None:
    """As docs/denormalize.md says."""
    m = family("l_async", kept("memory"))

    async def work() -> int:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'family.db'}")
        async with engine.begin() as connection:
            await connection.run_sync(m.Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            parent, child = m.Parent(id=1), m.Child(id=1, parent_id=1, size=5)
            session.add_all([parent, child])
            await session.commit()
            await session.refresh(parent)
            await session.refresh(child)
            child.size = 7
            await session.commit()
            await session.refresh(parent)
            total: int = parent.total
        await engine.dispose()
        return total

    assert asyncio.run(work()) == 7


def labelled(name: str, strategy: str) -> SimpleNamespace:
    """Children are counted by a foreign key that another relationship writes."""

    def extra(made: Any) -> None:
        class Label(made.Base):
            __tablename__ = f"{name}_label"
            id = mapped_column(Integer, primary_key=True)
            children = relationship("Child", back_populates="label")

        made.Label = Label

    where = expression(sql=lambda c: c.label_id.is_not(None), python=lambda c: c.label_id is not None)
    return family(
        name,
        lambda: {"n": count_of("children", where=where, strategy=strategy, type_=Integer)},
        lambda: {
            "label_id": mapped_column(ForeignKey(f"{name}_label.id")),
            "label": relationship("Label", back_populates="children"),
        },
        extra=extra,
    )


@pytest.mark.parametrize("strategy", LIVE)
def test_a_foreign_key_that_another_relationship_writes(opened: Open, strategy: str) -> None:
    m = labelled(f"l_label_{strategy}", strategy)
    s = opened(m)
    s.add_all([m.Parent(id=1), m.Label(id=1)])
    s.flush()
    s.add_all([m.Child(id=1, parent_id=1, label_id=1), m.Child(id=2, parent_id=1)])
    s.commit()
    right(s, m)
    label, parent, children = s.get_one(m.Label, 1), s.get_one(m.Parent, 1), s.query(m.Child).all()
    label.children.append(m.Child(id=3, parent_id=1))
    with pytest.raises(
        UncoveredChange, match=r"Child \(3,\) was added or changed after Parent\.n .*relationship"
    ):
        s.flush()
    s.rollback()
    assert parent.n + len(children) == 3
    s.delete(label)
    with pytest.raises(UncoveredChange, match=r"Child \(1,\) was added or changed after Parent\.n"):
        s.flush()
    s.rollback()
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "recount", "trigger"])
def test_a_label_goes_away(opened: Open, strategy: str) -> None:
    m = labelled(f"l_gone_{strategy}", strategy)
    s = opened(m)
    s.add_all([m.Parent(id=1), m.Label(id=1)])
    s.flush()
    s.add(m.Child(parent_id=1, label_id=1))
    s.commit()
    s.delete(s.get_one(m.Label, 1))
    s.commit()
    assert s.get_one(m.Parent, 1).n == 0
    right(s, m)


CHANGES: dict[str, dict[str, int]] = {"measure": {"size": 9}, "parent": {"parent_id": 2}}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("new", [True, False], ids=["new", "old"])
@pytest.mark.parametrize("where", ["before_flush", "mapper"])
@pytest.mark.parametrize("strategy", ["sql", "flush", "memory"])
def test_changes_of_touched_children_after_the_look(
    opened: Open, strategy: str, where: str, new: bool, what: str
) -> None:
    m = family(f"l_after_{strategy}_{where}_{new:d}_{what}", kept(strategy))
    s = opened(m)
    two(s, m)
    assert [s.get_one(m.Parent, key).n for key in (1, 2)] == [2, 0]
    change = CHANGES[what]

    def change_it(child: Any) -> None:
        for name, value in change.items():
            setattr(child, name, value)

    if where == "mapper":
        event.listen(m.Child, "before_insert", lambda mapper, connection, child: change_it(child))
        event.listen(m.Child, "before_update", lambda mapper, connection, child: change_it(child))
    else:
        event.listen(
            s,
            "before_flush",
            lambda session, *_: [
                change_it(each) for each in (*session.new, *session.dirty) if isinstance(each, m.Child)
            ],
        )
    if new:
        s.add(m.Child(id=3, parent_id=1, size=5))
    else:
        s.get_one(m.Child, 1).size = 6
    if strategy == "flush" or (strategy == "memory" and where == "mapper"):
        with pytest.raises(UncoveredChange, match=r"Child .* was added or changed after Parent\."):
            s.commit()
        s.rollback()
    else:
        s.commit()
    right(s, m)


def test_a_relationship_that_writes_what_memory_reads_but_makes_no_difference(opened: Open) -> None:
    """The child is expired when its label changes."""
    m = labelled("l_other", "memory")
    s = opened(m)
    s.add_all([m.Parent(id=1), m.Label(id=1), m.Label(id=2)])
    s.flush()
    s.add(m.Child(id=1, parent_id=1, label_id=1))
    s.commit()
    child, label = s.get_one(m.Child, 1), s.get_one(m.Label, 2)
    s.expire(child)
    child.label = label
    s.commit()
    assert (child.label_id, s.get_one(m.Parent, 1).n) == (2, 1)
    s.expire(child)
    child.label = None
    with pytest.raises(UncoveredChange, match=r"Child \(1,\) was added or changed after Parent\.n"):
        s.commit()
    s.rollback()
    right(s, m)


def test_memory_does_not_take_a_parent_that_a_relationship_still_shows(opened: Open) -> None:
    m = family("l_still", kept("memory"))
    s = opened(m)
    two(s, m)
    parent, child = s.get_one(m.Parent, 1), s.get_one(m.Child, 1)
    assert child.parent is parent
    child.parent_id = 2
    s.flush()
    s.refresh(child, ["message"])
    gc.collect()  # the other parent is not in the session any more
    child.size = 9
    s.commit()
    assert (parent.total, s.get_one(m.Parent, 2).total) == (7, 9)
    right(s, m)
