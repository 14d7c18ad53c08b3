"""What reviewers have found when rows move by relationships, and when writes take unusual ways through the Session."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import ForeignKey, ForeignKeyConstraint, Integer, delete, event, insert, update
from sqlalchemy.orm import ORMExecuteState, Session, declarative_base, mapped_column, relationship

from querycache.denormalize import UncoveredChange, count_of
from tests.denormalize.family import Open, family, kept, right, two

EVERY = ("sql", "recount", "flush", "memory", "trigger")


def lines(name: str, strategy: str) -> SimpleNamespace:
    """Children whose primary key contains their foreign key, as the lines of an order."""
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = f"{name}_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child", back_populates="parent", order_by="Child.line")
        locals().update(kept(strategy)())

    class Child(Base):
        __tablename__ = f"{name}_child"
        parent_id = mapped_column(ForeignKey(f"{name}_parent.id"), primary_key=True)
        line = mapped_column(Integer, primary_key=True)
        parent = relationship("Parent", back_populates="children")
        size = mapped_column(Integer)

    return SimpleNamespace(Base=Base, Parent=Parent, Child=Child)


def _assigned(s: Session, m: SimpleNamespace) -> None:
    s.get_one(m.Child, (1, 1)).parent = s.get_one(m.Parent, 2)


def _appended(s: Session, m: SimpleNamespace) -> None:
    old, new = s.get_one(m.Parent, 1), s.get_one(m.Parent, 2)
    new.children.append(old.children[0])


def _changed_too(s: Session, m: SimpleNamespace) -> None:
    child = s.get_one(m.Child, (1, 1))
    child.size = 10
    child.parent = s.get_one(m.Parent, 2)


def _to_new_parent(s: Session, m: SimpleNamespace) -> None:
    s.get_one(m.Child, (1, 1)).parent = m.Parent(id=4)


def _twice(s: Session, m: SimpleNamespace) -> None:
    child = s.get_one(m.Child, (1, 1))
    child.parent = s.get_one(m.Parent, 2)
    s.flush()
    child.parent = s.get_one(m.Parent, 3)


def _deleted_then(s: Session, m: SimpleNamespace) -> None:
    child = s.get_one(m.Child, (1, 1))
    child.parent = s.get_one(m.Parent, 2)
    s.flush()
    s.delete(child)


def _beside(s: Session, m: SimpleNamespace) -> None:
    s.get_one(m.Child, (1, 2)).parent = s.get_one(m.Parent, 3)
    s.get_one(m.Child, (1, 1)).size = 20


MOVES: dict[str, Callable[[Session, SimpleNamespace], None]] = {
    "assigned": _assigned,
    "appended": _appended,
    "changed": _changed_too,
    "new": _to_new_parent,
    "twice": _twice,
    "deleted": _deleted_then,
    "beside": _beside,
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("strategy", EVERY)
def test_a_child_whose_key_holds_the_foreign_key_is_moved_by_its_relationship(
    opened: Open, strategy: str, move: str
) -> None:
    """Its new key is known only when the relationship has been flushed."""
    m = lines(f"v_{strategy}_{move}", strategy)
    s = opened(m)
    s.add_all([m.Parent(id=1), m.Parent(id=2), m.Parent(id=3)])
    s.flush()
    s.add_all([m.Child(parent_id=1, line=1, size=2), m.Child(parent_id=1, line=2, size=3)])
    s.commit()
    MOVES[move](s, m)
    s.commit()
    right(s, m)
    assert [(each.n, each.total) for each in s.query(m.Parent).order_by(m.Parent.id)][:3] == {
        "assigned": [(1, 3), (1, 2), (0, 0)],
        "appended": [(1, 3), (1, 2), (0, 0)],
        "changed": [(1, 3), (1, 10), (0, 0)],
        "new": [(1, 3), (0, 0), (0, 0)],
        "twice": [(1, 3), (0, 0), (1, 2)],
        "deleted": [(1, 3), (0, 0), (0, 0)],
        "beside": [(1, 20), (0, 0), (1, 3)],
    }[move]


def levels(name: str, strategy: str) -> SimpleNamespace:
    """Three levels, of which the key of the middle one holds its foreign key, and the last one follows that key."""
    Base: Any = declarative_base()

    class Top(Base):
        __tablename__ = f"{name}_top"
        id = mapped_column(Integer, primary_key=True)
        middles = relationship("Middle", back_populates="top")
        n = count_of("middles", strategy=strategy, type_=Integer)
        leaves = count_of("middles.leaves", strategy=strategy, type_=Integer)

    class Middle(Base):
        __tablename__ = f"{name}_middle"
        top_id = mapped_column(ForeignKey(f"{name}_top.id"), primary_key=True)
        line = mapped_column(Integer, primary_key=True)
        top = relationship("Top", back_populates="middles")
        leaves = relationship("Leaf", back_populates="middle")
        n = count_of("leaves", strategy=strategy, type_=Integer)

    class Leaf(Base):
        __tablename__ = f"{name}_leaf"
        id = mapped_column(Integer, primary_key=True)
        top_id = mapped_column(Integer)
        line = mapped_column(Integer)
        middle = relationship("Middle", back_populates="leaves")
        __table_args__ = (
            ForeignKeyConstraint(
                ["top_id", "line"],
                [f"{name}_middle.top_id", f"{name}_middle.line"],
                onupdate="CASCADE",
            ),
        )

    return SimpleNamespace(Base=Base, Top=Top, Middle=Middle, Leaf=Leaf)


@pytest.mark.parametrize("leaves", [0, 2])
@pytest.mark.parametrize("strategy", ["sql", "recount"])
def test_a_row_in_the_middle_whose_key_holds_the_foreign_key_is_moved(
    opened: Open, strategy: str, leaves: int
) -> None:
    m = levels(f"vm_{strategy}_{leaves}", strategy)
    s = opened(m)
    top, other = m.Top(id=1), m.Top(id=2)
    s.add_all([top, other])
    s.flush()
    middle = m.Middle(top=top, line=1, leaves=[m.Leaf() for _ in range(leaves)])
    s.add_all([middle, m.Middle(top=top, line=2, leaves=[m.Leaf()])])
    s.commit()
    middle.top = other
    s.commit()
    right(s, m)
    assert [(each.n, each.leaves) for each in (top, other)] == [(1, 1), (1, leaves)]
    assert middle.n == leaves


def _another_instead(state: ORMExecuteState, child: Any) -> Any:
    if state.is_delete:
        where = state.statement.whereclause
        return state.session.execute(update(child).where(where).values(size=0))
    return None


def _invoked_instead(state: ORMExecuteState, child: Any) -> Any:
    if state.is_delete:
        return state.invoke_statement(update(child).where(state.statement.whereclause).values(size=0))
    return None


def _rewritten(state: ORMExecuteState, child: Any) -> Any:
    if state.is_delete:
        state.statement = update(child).where(state.statement.whereclause).values(size=0)


def _one_before(state: ORMExecuteState, child: Any) -> Any:
    if state.is_delete:
        state.session.execute(update(child).values(size=child.size + 1))


def _flush_before(state: ORMExecuteState, child: Any) -> Any:
    if state.is_delete:
        state.session.add(child(id=3, parent_id=1, size=1))
        state.session.get_one(child, 1).size = 6
        state.session.flush()


def _one_after(state: ORMExecuteState, child: Any) -> Any:
    if state.is_delete:
        result = state.invoke_statement()
        state.session.execute(update(child).values(size=child.size + 1))
        return result
    return None


HANDLERS: dict[str, tuple[Callable[[ORMExecuteState, Any], Any], tuple[int, int]]] = {
    "another": (_another_instead, (2, 5)),
    "invoked": (_invoked_instead, (2, 5)),
    "rewritten": (_rewritten, (2, 5)),
    "before": (_one_before, (0, 0)),
    "flush": (_flush_before, (1, 1)),
    "after": (_one_after, (1, 6)),
}


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("strategy", EVERY)
def test_a_handler_that_writes_within_a_bulk_statement(opened: Open, strategy: str, handler: str) -> None:
    """A soft deletion, as a rule. What the statement does is looked at when all handlers have had their say."""
    m = family(f"vh_{strategy}_{handler}", kept(strategy))
    s = opened(m)
    two(s, m)
    handle, (n, total) = HANDLERS[handler]
    event.listen(s, "do_orm_execute", lambda state: handle(state, m.Child))
    s.execute(delete(m.Child).where(m.Child.size > 5))
    parent = s.get_one(m.Parent, 1)
    assert (parent.n, parent.total) == (n, total)
    s.commit()
    right(s, m)
    assert (parent.n, parent.total) == (n, total)


@pytest.mark.parametrize("strategy", ["sql", "flush"])
def test_a_handler_that_writes_rows_within_a_bulk_insert(opened: Open, strategy: str) -> None:
    m = family(f"vi_{strategy}", kept(strategy))
    s = opened(m)
    two(s, m)

    @event.listens_for(s, "do_orm_execute")
    def handle(state: ORMExecuteState) -> None:
        if state.is_insert:
            state.session.execute(update(m.Child).values(size=m.Child.size + 1))

    s.execute(insert(m.Child).values(id=3, parent_id=1, size=4))
    s.commit()
    right(s, m)
    assert s.get_one(m.Parent, 1).total == 18


@pytest.mark.parametrize("strategy", ["sql", "flush"])
def test_a_handler_that_answers_a_bulk_statement_on_the_connection(opened: Open, strategy: str) -> None:
    """Such a statement is as unseen there as anywhere else."""
    m = family(f"vc_{strategy}", kept(strategy))
    s = opened(m)
    two(s, m)

    @event.listens_for(s, "do_orm_execute")
    def handle(state: ORMExecuteState) -> Any:
        if state.is_delete:
            return state.session.connection().execute(update(m.Child).values(size=0))
        return None

    with pytest.raises(UncoveredChange, match="outside the unit of work"):
        s.execute(delete(m.Child))


def twins(name: str, strategy: str) -> SimpleNamespace:
    """A family with another class on the table of the children, to which the parents are related too."""

    def extra(m: SimpleNamespace) -> None:
        class Twin(m.Base):
            __table__ = m.Child.__table__
            measure = m.Child.__table__.c.size

        m.Parent.twins = relationship(Twin, overlaps="children,parent")
        m.Twin = Twin

    return family(name, kept(strategy), extra=extra)


WRITES: dict[str, Callable[[Session, SimpleNamespace], Any]] = {
    "add": lambda s, m: s.add(m.Twin(id=3, parent_id=1, measure=5)),
    "change": lambda s, m: setattr(s.get_one(m.Twin, 1), "measure", 50),
    "move": lambda s, m: setattr(s.get_one(m.Twin, 1), "parent_id", 2),
    "delete": lambda s, m: s.delete(s.get_one(m.Twin, 1)),
    "update": lambda s, m: s.execute(update(m.Twin).values(measure=9)),
    "by key": lambda s, m: s.execute(update(m.Twin), [{"id": 1, "measure": 9}]),
    "insert": lambda s, m: s.execute(insert(m.Twin), [{"id": 3, "parent_id": 1, "measure": 9}]),
    "remove": lambda s, m: s.execute(delete(m.Twin)),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("strategy", EVERY)
def test_another_class_on_the_table_of_the_children(opened: Open, strategy: str, write: str) -> None:
    """Its objects are no rows of the path: only the database sees their changes."""
    m = twins(f"vt_{strategy}_{write.replace(' ', '')}", strategy)
    s = opened(m)
    two(s, m)
    if strategy == "trigger":
        WRITES[write](s, m)
    else:
        with pytest.raises(UncoveredChange, match=r"(?s)Twin.*Child.*Parent.n.*'trigger'"):
            WRITES[write](s, m)
            s.flush()
        s.rollback()
    s.commit()
    right(s, m)


def test_another_class_on_the_table_may_read_and_change_what_does_not_matter(opened: Open) -> None:
    m = twins("vt_others", "sql")
    s = opened(m)
    two(s, m)
    twin = s.get_one(m.Twin, 1)
    twin.message = "changed"
    s.flush()
    s.execute(update(m.Twin), [{"id": 2, "message": "by key"}])
    s.execute(update(m.Twin).values(message="all"))
    s.commit()
    assert twin.message == "all"
    s.expunge_all()
    s.delete(s.get_one(m.Child, 2))
    s.get_one(m.Child, 1).size = 3
    s.commit()
    right(s, m)


def test_a_relationship_that_writes_the_rows_of_another_class_on_the_table(opened: Open) -> None:
    m = twins("vt_related", "sql")
    s = opened(m)
    two(s, m)
    s.get_one(m.Parent, 2).twins = [s.get_one(m.Twin, 1)]
    with pytest.raises(UncoveredChange, match="Twin"):
        s.flush()
    s.rollback()
    right(s, m)


def test_a_class_of_the_same_inheritance_is_no_other_class_on_the_table(opened: Open) -> None:
    """By single-table inheritance, and with a table of its own."""

    def extra(m: SimpleNamespace) -> None:
        class Special(m.Child):
            pass

        class Further(m.Child):
            __tablename__ = f"{m.Child.__tablename__}_further"
            id = mapped_column(ForeignKey(m.Child.id), primary_key=True)

        m.Special, m.Further = Special, Further

    m = family("vt_heirs", kept("sql"), extra=extra)
    s = opened(m)
    two(s, m)
    s.add_all([m.Special(id=3, parent_id=1, size=1), m.Further(id=4, parent_id=1, size=2)])
    s.commit()
    s.execute(update(m.Special).values(size=4))
    s.get_one(m.Further, 4).size = 7
    s.commit()
    right(s, m)
