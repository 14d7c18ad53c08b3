"""What the session index costs and what it saves.

    python -m benchmarks.session_index [--json]

Each line is a ratio of medians. The two sides of a ratio are measured in turns, in shuffled order, in one
run, and in processor time, so that what else the machine does meets both alike. The peers are a look at every
object of the session, the recipe of SQLAlchemy's wiki (written anew here, with its structure and its limits),
and a SELECT on SQLite in memory, the fastest database there is. "Reach" is what the project promises.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Engine, create_engine, event, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import StaticPool

from querycache.session_index import SessionIndex

__all__ = ["Line", "main", "measure"]


class Base(DeclarativeBase):
    pass


class Columns:
    """An entity of eight columns."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]
    city: Mapped[str]
    age: Mapped[int]
    height: Mapped[int]
    score: Mapped[float]
    note: Mapped[str | None]


class Plain(Columns, Base):
    """Has no index."""

    __tablename__ = "plain"


class Bystander(Columns, Base):
    """Has no index either, while other classes of the session have."""

    __tablename__ = "bystander"


class One(Columns, Base):
    """Has one index."""

    __tablename__ = "one"


class Five(Columns, Base):
    """Has five indexes."""

    __tablename__ = "five"


class Recipe:
    """The technique of the wiki's recipe: weak sets by (name, value), filled on load and on attach."""

    def __init__(self) -> None:
        self._listeners: list[tuple[Any, str, Callable[..., Any]]] = []

    def indexed(self, cls: type[Any], name: str, function: Callable[[Any], Any]) -> None:
        def put(session: Session, obj: Any) -> None:
            sets = session.info.setdefault("recipe", defaultdict(weakref.WeakSet))
            sets[name, function(obj)].add(obj)

        def loaded(obj: Any, context: Any) -> None:
            put(context.session, obj)

        def attached(session: Session, obj: Any) -> None:
            if isinstance(obj, cls):
                put(session, obj)

        for target, event_name, listener in ((cls, "load", loaded), (Session, "after_attach", attached)):
            event.listen(target, event_name, listener)
            self._listeners.append((target, event_name, listener))

    def find(self, session: Session, name: str, value: Any) -> set[Any]:
        sets = session.info.get("recipe", {})
        return set(sets.get((name, value), ()))

    def detach(self) -> None:
        for listener in self._listeners:
            event.remove(*listener)


@dataclass(frozen=True)
class Line:
    """One line of the table.

    :ivar what: what is compared.
    :ivar ratio: how many times as long the first takes.
    :ivar reach: what the ratio must reach, as ``">= 500"`` or ``"<= 1.15"``; empty where nothing is promised.
    :ivar first: median of the first side, in microseconds.
    :ivar second: median of the second side, in microseconds.
    """

    what: str
    ratio: float
    reach: str
    first: float
    second: float

    @property
    def reached(self) -> bool:
        """Whether the ratio is what was promised."""
        if not self.reach:
            return True
        sign, limit = self.reach.split()
        return self.ratio >= float(limit) if sign == ">=" else self.ratio <= float(limit)


Task = Callable[[], float]


def timed(function: Callable[[], object], repeat: int = 1) -> Task:
    """A task that gives the seconds that one call of a function takes."""

    def task() -> float:
        start = time.process_time()
        for _ in range(repeat):
            function()
        return (time.process_time() - start) / repeat

    return task


def medians(tasks: dict[str, Task], rounds: int) -> dict[str, float]:
    """The median of each task in seconds, all taken in turns in shuffled order."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks) * rounds
    random.shuffle(order)
    for name in order:
        gc.collect()
        taken[name].append(tasks[name]())
    return {name: statistics.median(values) for name, values in taken.items()}


def line(what: str, took: dict[str, float], first: str, second: str, reach: str = "") -> Line:
    """The line that compares two tasks."""
    return Line(what, took[first] / took[second], reach, took[first] * 1e6, took[second] * 1e6)


def make_engine(rows: int) -> Engine:
    """A database with so many rows in each table."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    values = [
        {
            "id": i,
            "name": f"name {i // 4}",
            "email": f"{i}@example.org",
            "city": f"city {i % 50}",
            "age": i % 90,
            "height": 150 + i % 50,
            "score": i / 7,
            "note": None,
        }
        for i in range(1, rows + 1)
    ]
    with engine.begin() as connection:
        for cls in (Plain, Bystander, One, Five):
            connection.execute(insert(cls), values)
    return engine


@contextmanager
def indexed() -> Iterator[SessionIndex]:
    """One index on One, five on Five."""
    indexes = SessionIndex()
    indexes.index(One.name, name="by_name")
    indexes.index(Five.name, name="by_name")
    indexes.index(Five.city, name="by_city")
    indexes.index(Five.age, name="by_age", ordered=True)
    indexes.index(Five.city, Five.age, name="by_city_and_age")
    indexes.index(Five.email, name="by_email", where=lambda five: five.age > 45, depends_on=[Five.age])
    try:
        yield indexes
    finally:
        indexes.detach()


def measure_lookups(size: int, rounds: int) -> Iterator[Line]:
    """A lookup that finds four objects among so many, against its peers."""
    engine = make_engine(size)
    recipe = Recipe()
    recipe.indexed(One, "by_name", lambda one: one.name)
    name = f"name {size // 8}"
    with indexed() as indexes, Session(engine) as session:
        held = session.scalars(select(One)).all()
        by_name = indexes[One, "by_name"]
        found = by_name(session, name)
        assert found == recipe.find(session, "by_name", name) and 1 <= len(found) <= 4
        statement = select(One).where(One.name == name)

        def scan() -> list[One]:
            return [obj for obj in session.identity_map.values() if isinstance(obj, One) and obj.name == name]

        def change_and_find() -> None:
            held[0].name = name
            by_name(session, name)

        tasks = {
            "index": timed(lambda: by_name(session, name), 1_000),
            "scan": timed(scan, max(1, 1_000 // size)),
            "recipe": timed(lambda: recipe.find(session, "by_name", name), 1_000),
            "select": timed(lambda: session.scalars(statement).all(), 20),
            "change": timed(change_and_find, 100),
        }
        took = medians(tasks, rounds)
        recipe.detach()
        session.rollback()
    engine.dispose()
    among = f"among {size:,} objects"
    yield line(f"scan / lookup, {among}", took, "scan", "index", ">= 500" if size >= 100_000 else "")
    yield line(f"SELECT / lookup, {among}", took, "select", "index")
    yield line(f"wiki recipe / lookup, {among}", took, "recipe", "index")
    yield line(f"(change + lookup) / lookup, {among}", took, "change", "index")


def measure_independence(small: int, large: int, rounds: int) -> Iterator[Line]:
    """The same lookup in a small and in a large session, and what the first lookup costs."""
    engine = make_engine(large)
    with indexed() as indexes, Session(engine) as few, Session(engine) as many:
        by_name = indexes[One, "by_name"]
        held = [few.scalars(select(One).limit(small)).all(), many.scalars(select(One)).all()]

        def first_lookup() -> float:
            with indexed() as fresh:
                return timed(lambda: fresh[One, "by_name"](many, "name 1"))()

        took = medians(
            {
                "small": timed(lambda: by_name(few, "name 1"), 1_000),
                "large": timed(lambda: by_name(many, "name 1"), 1_000),
                "first": first_lookup,
                "scan": timed(lambda: [obj for obj in many if isinstance(obj, One) and obj.name == "name 1"]),
            },
            rounds,
        )
        del held
    engine.dispose()
    yield line(f"lookup among {large:,} / among {small:,}", took, "large", "small", "<= 1.5")
    yield line(f"first lookup among {large:,} / scan", took, "first", "scan")


def measure_loading(rows: int, rounds: int) -> Iterator[Line]:
    """Loading rows of classes with and without indexes, in sessions where the indexes are in use."""
    engine = make_engine(rows)
    with indexed() as indexes:

        def load(cls: type[Any], used: bool, then_look: bool = False) -> Task:
            def task() -> float:
                with Session(engine) as session:
                    session.connection()
                    if used:
                        for index_class, name in ((One, "by_name"), (Five, "by_name"), (Five, "by_city")):
                            indexes[index_class, name](session, "name 1")
                        for name, key in (("by_age", 1), ("by_city_and_age", ("", 1)), ("by_email", "")):
                            indexes[Five, name](session, key)
                    start = time.process_time()
                    held = session.scalars(select(cls)).all()
                    if then_look:
                        indexes[One, "by_name"](session, "name 1")
                    took = time.process_time() - start
                    assert len(held) == rows
                    return took

            return task

        took = medians(
            {
                "plain": load(Plain, used=False),
                "one": load(One, used=True),
                "five": load(Five, used=True),
                "unused": load(One, used=False),
                "bystander": load(Bystander, used=True),
                "looked up": load(One, used=True, then_look=True),
            },
            rounds,
        )
    engine.dispose()
    what = f"loading {rows:,} rows"
    yield line(f"{what}: one index / none", took, "one", "plain", "<= 1.15")
    yield line(f"{what}: five indexes / none", took, "five", "plain")
    yield line(f"{what}: one index, session without lookups / none", took, "unused", "plain")
    yield line(
        f"{what}: a class without indexes beside indexed ones / none", took, "bystander", "plain", "<= 1.05"
    )
    yield line(f"{what}, then a lookup: one index / none", took, "looked up", "plain")


def measure_setting(objects: int, rounds: int) -> Iterator[Line]:
    """Setting an attribute of objects of classes with and without indexes."""
    engine = make_engine(objects)
    with indexed() as indexes, Session(engine) as session:
        held: dict[type[Any], Any] = {
            cls: session.scalars(select(cls)).all() for cls in (Plain, Bystander, One, Five)
        }
        indexes[One, "by_name"](session, "")
        for name, key in (
            ("by_name", ""),
            ("by_city", ""),
            ("by_age", 1),
            ("by_city_and_age", ("", 1)),
            ("by_email", ""),
        ):
            indexes[Five, name](session, key)
        count = iter(range(10**9))

        def set_name(cls: type[Any]) -> Callable[[], None]:
            def change() -> None:
                value = f"new {next(count)}"
                for obj in held[cls]:
                    obj.name = value

            return change

        for cls in held:
            set_name(cls)()  # the first change after a load costs more, with and without indexes
        took = medians({cls.__name__: timed(set_name(cls)) for cls in held}, rounds)
        session.rollback()
    engine.dispose()
    what = "setting an attribute"
    yield line(f"{what}: one index / none", took, "One", "Plain")
    yield line(f"{what}: five indexes / none", took, "Five", "Plain")
    yield line(
        f"{what}: a class without indexes beside indexed ones / none", took, "Bystander", "Plain", "<= 1.05"
    )


def measure(
    sizes: tuple[int, ...] = (10, 1_000, 100_000), rows: int = 10_000, rounds: int = 15
) -> list[Line]:
    """Every line of the table.

    :param sizes: the numbers of objects in a session, ascending.
    :param rows: the number of rows that are loaded.
    :param rounds: how often each task is timed.
    """
    return [
        *(each for size in sizes for each in measure_lookups(size, rounds)),
        *measure_independence(sizes[0], sizes[-1], rounds),
        *measure_loading(rows, 2 * rounds),
        *measure_setting(min(rows, 1_000), 2 * rounds),
    ]


def show(lines: list[Line]) -> str:
    """The table for people."""
    width = max(len(each.what) for each in lines)
    rows = [f"{'':{width}}  {'ratio':>9}  {'reach':>9}  {'':4}  {'µs':>12}  {'against µs':>12}"]
    for each in lines:
        verdict = "" if not each.reach else "yes" if each.reached else "NO"
        rows.append(
            f"{each.what:{width}}  {each.ratio:9,.2f}  {each.reach:>9}  {verdict:4}  {each.first:12,.2f}  "
            f"{each.second:12,.2f}"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.session_index", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the lines as JSON")
    options = parser.parse_args(arguments)
    lines = measure()
    if options.json:
        print(json.dumps([{**asdict(each), "reached": each.reached} for each in lines], indent=2))
    else:
        print(show(lines))


if __name__ == "__main__":
    main()
