"""From when to when the library listens: an application without aggregates pays nothing."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import ForeignKey, Integer, create_engine
from sqlalchemy.orm import Session, declarative_base, mapped_column, relationship

from querycache.denormalize import aggregates_of, count_of
from querycache.errors import ConfigurationError
from tests.denormalize.models import STRATEGIES

pytestmark = pytest.mark.usefixtures("small_heap")

LISTENERS = """
from sqlalchemy import create_engine
from sqlalchemy.event import registry
from sqlalchemy.orm import Session, SessionEvents, configure_mappers
from sqlalchemy.engine.events import ConnectionEvents

def of(target, events):
    names = [name for name in vars(events) if not name.startswith("_") and name != "dispatch"]
    return {name: len(list(getattr(target.dispatch, name))) for name in names}

def listeners():
    return of(Session(), SessionEvents), of(create_engine("sqlite://"), ConnectionEvents)

nothing = listeners()
from tests.denormalize.test_lifetime import family
configure_mappers()
assert listeners() == nothing, "an import alone listens to no Session"
one, other = family("sql"), family("memory")
configure_mappers()
assert listeners() != nothing
one.Base.registry.dispose()
assert listeners() != nothing, "the other plan is still kept"
other.Base.registry.dispose()
assert listeners() == nothing
again = family("trigger")
configure_mappers()
assert listeners() != nothing
"""


def family(strategy: str) -> Any:
    """A parent that counts its children."""
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child", back_populates="parent")
        n = count_of("children", strategy=strategy, type_=Integer)

    class Child(Base):
        __tablename__ = "child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey("parent.id"))
        parent = relationship(Parent, back_populates="children")

    return SimpleNamespace(Base=Base, Parent=Parent, Child=Child)


def test_sessions_are_listened_to_while_there_is_a_plan() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LISTENERS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_create_all_configures_the_mappers_and_makes_the_triggers() -> None:
    """Nothing else may have configured them before."""
    m = family("trigger")
    engine = create_engine("sqlite://")
    m.Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(m.Parent(id=1))
        session.flush()
        session.connection().exec_driver_sql("INSERT INTO child (parent_id) VALUES (1), (1)")
        assert session.get_one(m.Parent, 1).n == 2
    m.Base.registry.dispose()
    engine.dispose()


def used_and_disposed_of(strategy: str) -> list[weakref.ref[Any]]:
    m = family(strategy)
    engine = create_engine("sqlite://")
    m.Base.metadata.create_all(engine)
    with Session(engine) as session:
        parent = m.Parent(children=[m.Child(), m.Child()])
        session.add(parent)
        session.commit()
        assert parent.n == 2
    held = [weakref.ref(m.Parent), weakref.ref(m.Base.metadata), weakref.ref(aggregates_of(m.Base)[0])]
    m.Base.registry.dispose()
    with pytest.raises(ConfigurationError, match="has no aggregates"):
        aggregates_of(m.Base.metadata)
    engine.dispose()
    return held


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_disposed_of_is_kept_no_more_and_leaves_no_memory(strategy: str) -> None:
    held = used_and_disposed_of(strategy)
    gc.collect()
    gc.collect()  # what weak dictionaries held as values goes a round later
    assert [reference() for reference in held if reference() is not None] == []
