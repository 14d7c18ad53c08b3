"""What denormalized columns cost, beside the same work without them, with sqlalchemy-utils and with hand-written triggers.

    python -m benchmarks.denormalize [--url URL] [--rounds N] [--children N] [--flushes N] [--json]

Every way of keeping two columns (a count and a sum) is at work in a process of its own, so that none has the listeners of
another; they are asked in turns, in shuffled order. The table shows medians, their ratio to the same work without aggregates,
and how many rows of parents the work updates. On SQLite, in a file, unless another database is named; there it is
processor time that counts. "Reach" is what the project promises.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Engine, ForeignKey, Integer, create_engine, event, func, select
from sqlalchemy.orm import Session, declarative_base, mapped_column, relationship

__all__ = ["Line", "main", "measure"]

PARENTS = 100


def plain(name: str, columns: Callable[[], dict[str, Any]] = dict) -> SimpleNamespace:
    """A parent with children, `columns` added to the parent."""
    Base: Any = declarative_base()
    child_table = f"{name}_child"
    Parent = type(
        "Parent",
        (Base,),
        {
            "__tablename__": f"{name}_parent",
            "id": mapped_column(Integer, primary_key=True),
            "children": relationship("Child", back_populates="parent"),
            **columns(),
        },
    )
    Child = type(
        "Child",
        (Base,),
        {
            "__tablename__": child_table,
            "id": mapped_column(Integer, primary_key=True),
            "parent_id": mapped_column(ForeignKey(f"{name}_parent.id"), index=True),
            "score": mapped_column(Integer),
            "parent": relationship("Parent", back_populates="children"),
        },
    )
    return SimpleNamespace(name=name, Base=Base, Parent=Parent, Child=Child)


def ours(strategy: str) -> SimpleNamespace:
    from querycache.denormalize import count_of, sum_of

    return plain(
        strategy,
        lambda: {
            "n": count_of("children", strategy=strategy, type_=Integer),
            "total": sum_of("children", "score", strategy=strategy, type_=Integer),
        },
    )


def aggregated() -> SimpleNamespace:
    """The same two columns with `sqlalchemy_utils.aggregated`."""
    from sqlalchemy_utils import aggregated as keep

    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "utils_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child", back_populates="parent")

        @keep("children", mapped_column(Integer, default=0).column)
        def n(self) -> Any:
            return func.count("1")

        @keep("children", mapped_column(Integer, default=0).column)
        def total(self) -> Any:
            return func.sum(Child.score)

    class Child(Base):
        __tablename__ = "utils_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey("utils_parent.id"), index=True)
        score = mapped_column(Integer)
        parent = relationship("Parent", back_populates="children")

    return SimpleNamespace(name="aggregated", Base=Base, Parent=Parent, Child=Child)


def by_hand() -> SimpleNamespace:
    """The same two columns kept by the triggers that one would write: increments on INSERT only, as this work needs."""
    m = plain(
        "hand", lambda: {"n": mapped_column(Integer, default=0), "total": mapped_column(Integer, default=0)}
    )

    @event.listens_for(m.Base.metadata, "after_create")
    def create(metadata: Any, connection: Any, **options: Any) -> None:
        change = "UPDATE hand_parent SET n = n + 1, total = total + NEW.score WHERE id = NEW.parent_id;"
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(
                f"CREATE OR REPLACE FUNCTION hand() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {change} RETURN NULL; END$$"
            )
            body = "EXECUTE FUNCTION hand()"
        else:
            body = f"BEGIN {change} END"
        connection.exec_driver_sql(
            f"CREATE TRIGGER hand_insert AFTER INSERT ON hand_child FOR EACH ROW {body}"
        )

    return m


def clock(engine: Engine) -> float:
    """Seconds: of the processor where the database is in the process, so that what else the machine does is left out."""
    return time.process_time() if engine.dialect.name == "sqlite" else time.perf_counter()


def make(engine: Engine, m: SimpleNamespace) -> None:
    """Empty tables, and the parents."""
    m.Base.metadata.drop_all(engine)
    m.Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([m.Parent(id=n) for n in range(1, PARENTS + 1)])
        session.commit()


def one_flush(engine: Engine, m: SimpleNamespace, children: int) -> float:
    with Session(engine) as session:
        session.add_all([m.Child(parent_id=1 + n % PARENTS, score=n % 7) for n in range(children)])
        started = clock(engine)
        session.flush()
        took = clock(engine) - started
        session.commit()
    return took


def many_flushes(engine: Engine, m: SimpleNamespace, flushes: int, commit: bool) -> float:
    """Flushes of one new child each, while 50 others are loaded; a commit after each expires those."""
    with Session(engine) as session:
        session.add_all([m.Child(parent_id=1 + n, score=1) for n in range(50)])
        session.commit()
        loaded = session.scalars(select(m.Child).limit(50)).all()
        started = clock(engine)
        for n in range(flushes):
            session.add(m.Child(parent_id=1 + n % PARENTS, score=n % 7))
            if commit:
                session.commit()
            else:
                session.flush()
        took = clock(engine) - started
        assert len(loaded) == 50
        session.commit()
    return took


def read_column(engine: Engine, m: SimpleNamespace) -> float:
    """Both values of all parents, from their columns."""
    with Session(engine) as session:
        started = clock(engine)
        session.execute(select(m.Parent.id, m.Parent.n, m.Parent.total)).all()
        return clock(engine) - started


def read_by_counting(engine: Engine, m: SimpleNamespace) -> float:
    """Both values of all parents, from their children."""
    with Session(engine) as session:
        started = clock(engine)
        counted = select(m.Parent.id, func.count(m.Child.id), func.sum(m.Child.score))
        session.execute(counted.outerjoin(m.Parent.children).group_by(m.Parent.id)).all()
        return clock(engine) - started


def count_updates(engine: Engine, m: SimpleNamespace, work: Callable[[], float]) -> int:
    """The parent UPDATEs that `work` runs, one for each set of parameters."""
    seen = 0
    table = m.Parent.__tablename__

    def record(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        nonlocal seen
        if statement.startswith(f"UPDATE {table} SET") and "WHERE 0" not in statement:
            seen += len(parameters) if many else 1

    event.listen(engine, "before_cursor_execute", record)
    work()
    event.remove(engine, "before_cursor_execute", record)
    return seen


PROCESSES = 3
"""Of each way."""

WAYS: Mapping[str, Callable[[], SimpleNamespace]] = {
    "without": lambda: plain("plain"),
    **{name: (lambda name=name: ours(name)) for name in ("sql", "recount", "flush", "memory", "trigger")},  # type: ignore[misc]
    "triggers by hand": by_hand,
    "sqlalchemy-utils": aggregated,
}


def worker(way: str, url: str, children: int, flushes: int, asked: Connection) -> None:
    """One way in a process of its own: does what it is asked for, and answers with the seconds, or the number."""
    engine = create_engine(url)
    m = WAYS[way]()
    works: dict[str, Callable[[], float]] = {
        "one flush": lambda: one_flush(engine, m, children),
        "many flushes": lambda: many_flushes(engine, m, flushes, commit=False),
        "many commits": lambda: many_flushes(engine, m, flushes, commit=True),
        "columns": lambda: read_column(engine, m),
        "counting": lambda: read_by_counting(engine, m),
    }
    while (what := asked.recv()) is not None:
        kind, name = what
        if kind != "read":
            make(engine, m)
        gc.collect()
        gc.disable()
        asked.send(count_updates(engine, m, works[name]) if kind == "count" else works[name]())
        gc.enable()
    engine.dispose()


@contextmanager
def workers(url: str, children: int, flushes: int) -> Iterator[dict[str, Callable[[str, str], float]]]:
    """A function for each way that has one of its processes work, in turn; the processes end with the block.

    There are several of each way, since where its objects lie in memory makes one process some percent slower than the
    next.
    """
    context = multiprocessing.get_context("spawn")
    started = []
    asks: dict[str, Callable[[str, str], float]] = {}
    for way in WAYS:
        pipes = []
        for _ in range(PROCESSES):
            mine, its = context.Pipe()
            process = context.Process(target=worker, args=(way, url, children, flushes, its), daemon=True)
            process.start()
            its.close()
            started.append((process, mine))
            pipes.append(mine)

        turns = cycle(pipes)

        def ask(kind: str, name: str, turns: Iterator[Any] = turns) -> float:
            pipe = next(turns)
            pipe.send((kind, name))
            return float(pipe.recv())

        asks[way] = ask
    try:
        yield asks
    finally:
        for process, pipe in started:
            pipe.send(None)
            process.join()


@dataclass(frozen=True)
class Line:
    """One line of the table.

    :ivar work: what is done.
    :ivar way: how the columns are kept.
    :ivar milliseconds: the median.
    :ivar ratio: to the first line of the same work.
    :ivar updates: rows of parents that the application updates; None for a read.
    :ivar reach: what is promised of it, and whether it holds; empty where nothing is promised.
    """

    work: str
    way: str
    milliseconds: float
    ratio: float
    updates: int | None = None
    reach: str = ""
    reached: bool = True


def medians(tasks: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of each task in milliseconds, in turns in shuffled order, after one round of each process to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(-PROCESSES, rounds):
        for name in random.sample(sorted(tasks), len(tasks)):
            seconds = tasks[name]()
            if number >= 0:
                taken[name].append(1000 * seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(url: str, rounds: int, children: int, flushes: int) -> list[Line]:
    """Every line of the table.

    :param url: SQLAlchemy URL of a database to work in; tables are made and dropped.
    :param rounds: how often each work is timed.
    :param children: rows inserted in one flush.
    :param flushes: flushes of one row each.
    """
    lines: list[Line] = []
    titles = {
        "one flush": f"{children:,} children of {PARENTS} parents in one flush",
        "many flushes": f"{flushes:,} flushes of one child, with 50 children loaded",
        "many commits": f"{flushes:,} commits of one child, with 50 children loaded",
    }
    with workers(url, children, flushes) as asks:
        for name, title in titles.items():
            took = medians(
                {way: (lambda ask=ask, name=name: ask("time", name)) for way, ask in asks.items()},  # type: ignore[misc]
                rounds,
            )
            for way, milliseconds in took.items():
                updates = int(asks[way]("count", name))
                ratio = milliseconds / took["without"]
                reach, reached = "", True
                if way == "sql" and name == "one flush":
                    reach = f"<= 1.3, at most {PARENTS} UPDATEs"
                    reached = ratio <= 1.3 and updates <= PARENTS
                elif way == "sqlalchemy-utils" and name != "one flush":
                    reach = '>= 5 times "sql"'
                    reached = milliseconds >= 5 * took["sql"]
                lines.append(Line(title, way, milliseconds, ratio, updates, reach, reached))
        asks["sql"]("time", "one flush")
        reads = {
            "counting the children": lambda: asks["sql"]("read", "counting"),
            "the columns": lambda: asks["sql"]("read", "columns"),
        }
        took = medians(reads, 5 * rounds)
        for way, milliseconds in took.items():
            ratio = milliseconds / took["counting the children"]
            lines.append(Line(f"reading both values of {PARENTS} parents", way, milliseconds, ratio))
    return lines


def show(lines: list[Line]) -> str:
    """The table for people."""
    rows: list[str] = []
    work = ""
    for each in lines:
        if each.work != work:
            work = each.work
            rows += ["", f"{work:56}{'ms':>10}{'ratio':>8}{'UPDATEs':>9}  reach"]
        updates = "" if each.updates is None else f"{each.updates:,}"
        verdict = f"{each.reach}: {'yes' if each.reached else 'NO'}" if each.reach else ""
        rows.append(
            f"  {each.way:54}{each.milliseconds:10.1f}{each.ratio:8.2f}{updates:>9}  {verdict}".rstrip()
        )
    return "\n".join(rows[1:])


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print the table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.denormalize", description=__doc__)
    parser.add_argument("--url", help="SQLAlchemy URL of a database to work in; tables are made and dropped")
    parser.add_argument("--rounds", type=int, default=3 * PROCESSES)
    parser.add_argument("--children", type=int, default=10_000, help="rows inserted in one flush")
    parser.add_argument("--flushes", type=int, default=1_000, help="flushes, and commits, of one row each")
    parser.add_argument("--json", action="store_true", help="print the lines as JSON")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        url = given.url or f"sqlite:///{Path(directory) / 'benchmark.db'}"
        lines = measure(url, given.rounds, given.children, given.flushes)
    if given.json:
        print(json.dumps([asdict(each) for each in lines], indent=2))
    else:
        print(show(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
