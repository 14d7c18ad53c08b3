"""The table from which a reader chooses a strategy: each of its cells is found out here, and must be what the table says."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import (
    Boolean,
    Column,
    Computed,
    Engine,
    ForeignKey,
    Integer,
    Numeric,
    Table,
    create_engine,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import OperationalError, SAWarning
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, declarative_base, mapped_column, relationship

from querycache.denormalize import (
    UncoveredChange,
    avg_of,
    count_of,
    exists_of,
    latest_of,
    max_of,
    min_of,
    python,
    sum_of,
    trigger_sql,
)
from querycache.errors import ConfigurationError
from tests.denormalize.models import STRATEGIES

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "denormalize.md").read_text()


def table() -> dict[str, dict[str, str]]:
    """The rows of the table by their first cell, each by strategy."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCUMENT[DOCUMENT.index("## Choosing") :].splitlines()
        if line.startswith("|")
    ]
    header = [re.sub(r'[`"]|\(default\)', "", cell).strip() for cell in lines[0]]
    assert header[1:] == list(STRATEGIES)
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in lines[2:]}


def family(
    strategy: str,
    kept: Callable[[Any], Any] | None = None,
    *,
    ondelete: str | None = None,
    versioned: bool = False,
    heir: bool = False,
) -> Any:
    """A parent with one aggregate over its children, which belong to an owner too."""
    Base: Any = declarative_base()
    kept = kept or (lambda s: count_of("children", strategy=s, type_=Integer))

    class Parent(Base):
        __tablename__ = "parent"
        id = mapped_column(Integer, primary_key=True)
        version = mapped_column(Integer)
        children = relationship("Heir" if heir else "Child", back_populates="parent")
        n = kept(strategy)
        if versioned:
            __mapper_args__ = {"version_id_col": version}

    class Owner(Base):
        __tablename__ = "owner"
        id = mapped_column(Integer, primary_key=True)

    class Child(Base):
        __tablename__ = "child"
        id = mapped_column(Integer, primary_key=True)
        size = mapped_column(Integer)
        parent_id = mapped_column(ForeignKey("parent.id"), index=True)
        owner_id = mapped_column(ForeignKey("owner.id", ondelete=ondelete))
        if not heir:
            parent = relationship(Parent, back_populates="children")

    if heir:

        class Heir(Child):
            __tablename__ = "heir"
            id = mapped_column(ForeignKey("child.id"), primary_key=True)
            parent = relationship(Parent, back_populates="children")

        made = Heir
    else:
        made = Child  # type: ignore[assignment]
    return SimpleNamespace(Base=Base, Parent=Parent, Owner=Owner, Child=made)


class Database:
    """The family's tables with parents 1 and 2, in a file, and what is asked of them."""

    def __init__(self, m: Any, path: Path) -> None:
        self.m = m
        self.engine: Engine = create_engine(f"sqlite:///{path / 'family.db'}")
        event.listen(
            self.engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys = ON")
        )
        m.Base.metadata.create_all(self.engine)
        with Session(self.engine) as session:
            session.add_all([m.Parent(id=1), m.Parent(id=2), m.Owner(id=1)])
            session.flush()
            session.add(m.Child(id=1, parent=session.get_one(m.Parent, 1), owner_id=1, size=3))
            session.commit()

    def session(self) -> Session:
        """One that holds both parents, as "memory" asks for."""
        session = Session(self.engine)
        session.info["held"] = session.query(self.m.Parent).all()
        return session

    def stored(self, parent: int = 1) -> Any:
        with self.engine.connect() as connection:
            return connection.exec_driver_sql(f"SELECT n FROM parent WHERE id = {parent}").scalar_one()


Find = Callable[[str, Path], str]
CLAIMS: dict[str, Find] = {}


def claim(row: str) -> Callable[[Find], Find]:
    def add(find: Find) -> Find:
        CLAIMS[row] = find
        return find

    return add


def refused_or(strategy: str, path: Path, kept: Callable[[Any], Any] | None = None, **options: Any) -> str:
    """Whether a declaration can be configured, and then counts a new child."""
    m = family(strategy, kept, **options)
    try:
        m.Base.registry.configure()
    except ConfigurationError:
        return "refused"
    database = Database(m, path)
    assert database.stored() == 1
    return "yes"


@claim("the object shows the new value")
def _(strategy: str, path: Path) -> str:
    database = Database(family(strategy), path)
    with database.session() as session:
        parent = session.get_one(database.m.Parent, 1)
        session.autoflush = False
        parent.children.append(database.m.Child())
        at_once = parent.n == 2
        session.flush()
        assert parent.n == 2
        session.delete(parent.children[0])
        assert parent.n == 2
        session.flush()
        assert parent.n == 1
    return "at once; deletions after the flush" if at_once else "after the flush"


@claim("bulk statements through the Session")
def _(strategy: str, path: Path) -> str:
    database = Database(family(strategy), path)
    with database.session() as session:
        session.execute(insert(database.m.Child), [{"parent_id": 1}, {"parent_id": 2}])
        session.execute(update(database.m.Child).values(parent_id=2))
        session.commit()
    assert (database.stored(1), database.stored(2)) == (0, 3)
    return "yes"


@claim("Core statements past the Session")
def _(strategy: str, path: Path) -> str:
    database = Database(family(strategy), path)
    try:
        with database.engine.begin() as connection:
            connection.execute(insert(database.m.Child.__table__).values(parent_id=1))
    except UncoveredChange:
        return "refused"
    return {2: "yes", 1: "not seen"}[database.stored()]


@claim("DML inside a CTE or a from_statement()")
def _(strategy: str, path: Path) -> str:
    """SQLite has no DML inside a CTE, and is not asked where it is refused."""
    database = Database(family(strategy), path)
    child = database.m.Child
    made = insert(child).values(parent_id=1).returning(child)
    refused = 0
    with Session(database.engine) as session:
        for statement in (select(child).from_statement(made), select(made.cte("made"))):
            try:
                session.execute(statement).all()
                session.commit()
            except UncoveredChange:
                refused += 1
            except OperationalError:
                session.rollback()
    if refused == 2:
        return "refused"
    return {(2, 0): "yes", (1, 0): "not seen"}[database.stored(), refused]


@claim("textual SQL, other applications")
def _(strategy: str, path: Path) -> str:
    database = Database(family(strategy), path)
    with database.engine.begin() as connection:
        connection.execute(text("INSERT INTO child (parent_id) VALUES (1)"))
    return {2: "yes", 1: "not seen"}[database.stored()]


@claim("rows that the database deletes (ON DELETE CASCADE)")
def _(strategy: str, path: Path) -> str:
    m = family(strategy, ondelete="CASCADE")
    try:
        m.Base.registry.configure()
    except ConfigurationError:
        return "refused"
    database = Database(m, path)
    with database.session() as session:
        session.delete(session.get_one(m.Owner, 1))
        session.commit()
    assert database.stored() == 0
    return "yes" + on_mariadb(m)


def on_mariadb(m: Any) -> str:
    try:
        trigger_sql(m.Base, mysql.dialect())
    except ConfigurationError:
        return "; refused on MariaDB"
    return ""


@claim("several writers at once")
def _(strategy: str, path: Path) -> str:
    database = Database(family(strategy), path)
    with database.session() as one, database.session() as other:
        for session in (one, other):
            assert session.get_one(database.m.Parent, 1).n == 1
        for session in (one, other):
            session.add(database.m.Child(parent=session.get_one(database.m.Parent, 1)))
        one.commit()
        other.commit()
    return {3: "exact", 2: "the last one wins"}[database.stored()]


@claim("objects that are older than their rows")
def _(strategy: str, path: Path) -> str:
    database = Database(
        family(strategy, lambda s: sum_of("children", "size", strategy=s, type_=Integer)), path
    )
    with database.session() as one, database.session() as other:
        child = one.get_one(database.m.Child, 1)
        assert child.size == 3
        other.get_one(database.m.Child, 1).size = 5
        other.commit()
        child.parent = one.get_one(database.m.Parent, 2)
        one.commit()
    return "exact" if (database.stored(1), database.stored(2)) == (0, 5) else "may be wrong"


@claim("kinds of aggregate")
def _(strategy: str, path: Path) -> str:
    kinds: dict[str, Callable[[Any], Any]] = {
        "count": lambda s: count_of("children", strategy=s, type_=Integer),
        "sum": lambda s: sum_of("children", "size", strategy=s, type_=Integer),
        "min": lambda s: min_of("children", "size", strategy=s, type_=Integer),
        "max": lambda s: max_of("children", "size", strategy=s, type_=Integer),
        "avg": lambda s: avg_of("children", "size", strategy=s, type_=Numeric(10, 2)),
        "exists": lambda s: exists_of("children", strategy=s, type_=Boolean),
        "latest": lambda s: latest_of("children", "size", order_by="id", strategy=s, type_=Integer),
    }
    found = []
    for name, kept in kinds.items():
        m = family(strategy, kept)
        try:
            m.Base.registry.configure()
        except ConfigurationError:
            continue
        found.append(name)
        (path / name).mkdir()
        assert Database(m, path / name).stored() == (1 if name in ("count", "exists") else 3)
    return "all" if len(found) == len(kinds) else ", ".join(found)


@claim("longer paths, many-to-many")
def _(strategy: str, path: Path) -> str:
    Base: Any = declarative_base()
    pairs = Table(
        "pairs",
        Base.metadata,
        Column("one", ForeignKey("top.id"), primary_key=True),
        Column("other", ForeignKey("friend.id"), primary_key=True),
    )

    class Top(Base):
        __tablename__ = "top"
        id = mapped_column(Integer, primary_key=True)
        middles = relationship("Middle")
        friends = relationship("Friend", secondary=pairs)
        n = count_of("middles.leaves", strategy=strategy, type_=Integer)
        f = count_of("friends", strategy=strategy, type_=Integer)

    class Friend(Base):
        __tablename__ = "friend"
        id = mapped_column(Integer, primary_key=True)

    class Middle(Base):
        __tablename__ = "middle"
        id = mapped_column(Integer, primary_key=True)
        top_id = mapped_column(ForeignKey("top.id"))
        leaves = relationship("Leaf")

    class Leaf(Base):
        __tablename__ = "leaf"
        id = mapped_column(Integer, primary_key=True)
        middle_id = mapped_column(ForeignKey("middle.id"))

    try:
        Base.registry.configure()
    except ConfigurationError:
        return "refused"
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        top = Top(middles=[Middle(leaves=[Leaf(), Leaf()]), Middle(leaves=[Leaf()])], friends=[Friend()])
        session.add(top)
        session.commit()
        assert (top.n, top.f) == (3, 1)
    return "yes"


@claim("a table that refers to itself")
def _(strategy: str, path: Path) -> str:
    Base: Any = declarative_base()

    class Node(Base):
        __tablename__ = "node"
        id = mapped_column(Integer, primary_key=True)
        above_id = mapped_column(ForeignKey("node.id"))
        below = relationship("Node")
        n = count_of("below", strategy=strategy, type_=Integer)

    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        node = Node(below=[Node(), Node(below=[Node()])])
        session.add(node)
        session.commit()
        assert (node.n, [each.n for each in node.below]) == (2, [0, 1])
    return "yes" + on_mariadb(SimpleNamespace(Base=Base))


@claim("children in a joined table")
def _(strategy: str, path: Path) -> str:
    m = family(strategy, heir=True)
    try:
        database = Database(m, path)
    except ConfigurationError:
        return "refused"
    assert database.stored() == 1
    return "yes"


@claim("measure and condition")
def _(strategy: str, path: Path) -> str:
    ways: dict[str, Callable[[Any], Any]] = {
        "SQL": lambda s: sum_of("children", lambda child: child.size * 1, strategy=s, type_=Integer),
        "Python": lambda s: sum_of("children", python(lambda child: child.size), strategy=s, type_=Integer),
    }
    found = []
    for name, kept in ways.items():
        m = family(strategy, kept)
        try:
            m.Base.registry.configure()
        except ConfigurationError:
            continue
        (path / name).mkdir()
        assert Database(m, path / name).stored() == 3
        found.append(name)
    return " or ".join(found)


@claim("SQL expressions as values")
def _(strategy: str, path: Path) -> str:
    m = family(strategy, SUM_BOTH)
    database = Database(m, path)
    with database.session() as session:
        try:
            session.get_one(m.Child, 1).size = m.Child.size + 10
            session.commit()
        except UncoveredChange:
            return "refused"
    assert database.stored() == 13
    return "yes"


def below(strategy: str, extra: str) -> Any:
    """A parent whose children have a column of the database's, and two relationships over one foreign key with `extra`."""
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child")
        if extra == "relationship":
            others = relationship("Child", overlaps="children")
        n = sum_of("children", {"relationship": "size"}.get(extra, extra), strategy=strategy, type_=Integer)

    class Child(Base):
        __tablename__ = "child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey("parent.id"))
        size = mapped_column(Integer)
        rev = mapped_column(Integer, default=0, onupdate=7)
        twice = mapped_column(Integer, Computed("size * 2"))

    return SimpleNamespace(Base=Base, Parent=Parent, Child=Child)


@claim("measures that the UPDATE itself changes (`onupdate=`, `Computed`, a version)")
def _(strategy: str, path: Path) -> str:
    found = set()
    for measure, value in (("rev", 7), ("twice", 10)):
        m = below(strategy, measure)
        try:
            m.Base.registry.configure()
        except ConfigurationError:
            found.add("refused")
            continue
        engine = create_engine("sqlite://")
        m.Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add(m.Parent(id=1, children=[m.Child(id=1, size=3)]))
            session.commit()
            session.get_one(m.Child, 1).size = 5
            session.commit()
            assert session.get_one(m.Parent, 1).n == value
        found.add("yes")
    return ", ".join(found)


@claim("another relationship that writes the same foreign key")
def _(strategy: str, path: Path) -> str:
    m = below(strategy, "relationship")
    try:
        m.Base.registry.configure()
    except ConfigurationError:
        return "refused"
    engine = create_engine("sqlite://")
    m.Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([m.Parent(id=1, others=[m.Child(id=1, size=3)]), m.Parent(id=2)])
        session.commit()
        parent = session.get_one(m.Parent, 2)
        parent.others.append(session.get_one(m.Child, 1))
        session.commit()
        assert [session.get_one(m.Parent, n).n for n in (1, 2)] == [0, 3]
    return "yes"


def SUM_BOTH(strategy: str) -> Any:
    return sum_of("children", "size", strategy=strategy, type_=Integer)


@claim("AsyncSession")
def _(strategy: str, path: Path) -> str:
    m = family(strategy)
    Database(m, path)

    async def work() -> list[Any]:
        engine = create_async_engine(f"sqlite+aiosqlite:///{path / 'family.db'}")
        shown = []
        async with AsyncSession(engine, expire_on_commit=False) as session:
            one, two = [await session.get_one(m.Parent, n) for n in (1, 2)]
            child = m.Child(parent_id=1)
            session.add(child)
            await session.commit()
            shown.append((one.n, two.n))
            child.parent_id = 2
            await session.commit()
            shown.append((one.n, two.n))
            await session.delete(child)
            await session.commit()
            shown.append((one.n, two.n))
        await engine.dispose()
        return shown

    assert asyncio.run(work()) == [(2, 0), (1, 1), (1, 0)]
    return "yes"


@claim("a wrong value heals with the next change below it")
def _(strategy: str, path: Path) -> str:
    database = Database(family(strategy), path)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE parent SET n = 50")
    with database.session() as session:
        session.add(database.m.Child(parent=session.get_one(database.m.Parent, 1)))
        session.commit()
    return {2: "yes", 51: "no"}[database.stored()]


@claim("the parent's `version_id_col` counts up")
def _(strategy: str, path: Path) -> str:
    database = Database(family(strategy, versioned=True), path)
    with database.session() as session:
        parent = session.get_one(database.m.Parent, 1)
        before = parent.version
        session.add(database.m.Child(parent=parent))
        session.commit()
        assert database.stored() == 2
        return "yes" if parent.version == before + 1 else "no"


def cost(strategy: str, path: Path, change: Callable[[Session, Any], Any]) -> str:
    """What a flush sends beside the children's own statements, the parent being loaded."""
    database = Database(family(strategy, SUM_BOTH), path)
    with database.session() as session:
        session.get_one(database.m.Child, 1)
        seen: list[str] = []

        def record(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            own = re.match(r"(INSERT INTO|UPDATE) child", statement)
            if not own and "WHERE 0 = 1" not in statement:
                seen.append(statement.split()[0])

        change(session, database.m)
        event.listen(database.engine, "before_cursor_execute", record)
        session.flush()
        event.remove(database.engine, "before_cursor_execute", record)
    counts = [f"{seen.count(kind)} {kind}" for kind in ("SELECT", "UPDATE") if kind in seen]
    return ", ".join(counts) or "none"


@claim("SQL beside the INSERT of one child")
def _(strategy: str, path: Path) -> str:
    return cost(strategy, path, lambda s, m: s.add(m.Child(parent_id=1, size=5)))


@claim("SQL beside the INSERTs of 100 children of a parent")
def _(strategy: str, path: Path) -> str:
    return cost(strategy, path, lambda s, m: s.add_all([m.Child(parent_id=1, size=5) for _ in range(100)]))


@claim("SQL beside the UPDATE of one child")
def _(strategy: str, path: Path) -> str:
    return cost(strategy, path, lambda s, m: setattr(s.get_one(m.Child, 1), "size", 7))


WORDS = {"**take it when**", "how"}
"""Rows that advise or explain."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        # min and max without an index are warned of; what is found out here does not need one
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", SAWarning)
        yield


def test_every_row_is_held_by_a_test() -> None:
    assert set(table()) == CLAIMS.keys() | WORDS


@pytest.mark.parametrize("row", CLAIMS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_table_is_true(strategy: str, row: str, tmp_path: Path) -> None:
    assert CLAIMS[row](strategy, tmp_path) == table()[row][strategy]


def test_the_example_shows_the_same_words_for_every_strategy() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "forum_word_count.py")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    parts = re.split(r'══ strategy="(\w+)" ═+', done.stdout)[1:]
    assert parts[::2] == list(STRATEGIES)
    for part in parts[1::2]:
        words = re.findall(r"→ words in thread 1 and 2: (\d+), (\d+)", part)
        assert words == [("6", "0"), ("4", "0"), ("2", "2"), ("3", "3"), ("3", "0")]
        assert part.count("INSERT INTO comment") >= 1
