"""A family of two classes, for tests that need no more."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sqlalchemy import ForeignKey, Integer, String
from sqlalchemy.orm import Session, declarative_base, mapped_column, relationship

from querycache.denormalize import count_of, sum_of, verify

__all__ = ["Open", "family", "kept", "n", "right", "two"]

Open = Callable[..., Session]


def family(
    name: str,
    columns: Any,
    child: Any = dict,
    extra: Any = None,
    rel: Any = lambda made: {},
    parent: Any = dict,
    args: Any = dict,
) -> SimpleNamespace:
    """A parent with children under tables of a name of their own, and what a test adds to them."""
    Base: Any = declarative_base()
    made = SimpleNamespace(Base=Base)

    class Parent(Base):
        __tablename__ = f"{name}_parent"
        id = mapped_column(Integer, primary_key=True)
        title = mapped_column(String(20))
        locals().update(parent())
        children = relationship("Child", back_populates="parent", **rel(made))
        locals().update(columns())
        __mapper_args__ = args() if args is dict else args

    class Child(Base):
        __tablename__ = f"{name}_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(f"{name}_parent.id"), index=True)
        parent = relationship("Parent", back_populates="children", **rel(made))
        size = mapped_column(Integer)
        message = mapped_column(String(50))
        locals().update(child())

    made.Parent, made.Child = Parent, Child
    if extra:
        extra(made)
    return made


def kept(strategy: str) -> Callable[[], dict[str, Any]]:
    """A count and a sum, as columns for a family."""
    return lambda: {
        "n": count_of("children", strategy=strategy, type_=Integer),
        "total": sum_of("children", "size", strategy=strategy, type_=Integer),
    }


n = kept("sql")


def right(session: Session, m: SimpleNamespace) -> None:
    """All aggregates say what recounting says."""
    assert [str(each) for each in verify(session, m.Base).differences] == []


def two(session: Session, m: SimpleNamespace) -> None:
    """Two parents, the first with two children."""
    session.add_all([m.Parent(id=1), m.Parent(id=2)])
    session.flush()
    session.add_all(
        [
            m.Child(id=1, parent_id=1, size=5, message="abc"),
            m.Child(id=2, parent_id=1, size=7, message="abcd"),
        ]
    )
    session.commit()
    right(session, m)
