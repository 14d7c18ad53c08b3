"""What denormalized columns cost, beside the same work without them, with sqlalchemy-utils and with hand-written triggers.

    python -m benchmarks.denormalize [--url URL] [--rounds N] [--quick] [--json]

Every case is run once in each round, the cases of a round in shuffled order; the table shows medians, and their ratio to the
plain flush of the same round's work. SQLite in a file unless another database is named.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Engine, ForeignKey, Integer, create_engine, event, func, select
from sqlalchemy.orm import Session, declarative_base, mapped_column, relationship

from querycache.denormalize import count_of, sum_of

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


@dataclass
class Case:
    """One way of keeping the columns, doing one kind of work."""

    models: SimpleNamespace
    seconds: list[float]
    updates: int = 0


def make(engine: Engine, m: SimpleNamespace) -> None:
    m.Base.metadata.drop_all(engine)
    m.Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([m.Parent(id=n) for n in range(1, PARENTS + 1)])
        session.commit()


def one_flush(engine: Engine, m: SimpleNamespace, children: int) -> float:
    with Session(engine) as session:
        session.add_all([m.Child(parent_id=1 + n % PARENTS, score=n % 7) for n in range(children)])
        started = time.perf_counter()
        session.flush()
        took = time.perf_counter() - started
        session.commit()
    return took


def many_flushes(engine: Engine, m: SimpleNamespace, flushes: int) -> float:
    """Flushes of one new child each, while 50 others are loaded."""
    with Session(engine) as session:
        session.add_all([m.Child(parent_id=1 + n, score=1) for n in range(50)])
        session.commit()
        loaded = session.scalars(select(m.Child).limit(50)).all()
        started = time.perf_counter()
        for n in range(flushes):
            session.add(m.Child(parent_id=1 + n % PARENTS, score=n % 7))
            session.flush()
        took = time.perf_counter() - started
        assert len(loaded) == 50
        session.commit()
    return took


def read_column(engine: Engine, m: SimpleNamespace) -> float:
    with Session(engine) as session:
        started = time.perf_counter()
        session.execute(select(m.Parent.id, m.Parent.n, m.Parent.total)).all()
        return time.perf_counter() - started


def read_by_counting(engine: Engine, m: SimpleNamespace) -> float:
    with Session(engine) as session:
        started = time.perf_counter()
        counted = select(m.Parent.id, func.count(m.Child.id), func.sum(m.Child.score))
        session.execute(counted.outerjoin(m.Parent.children).group_by(m.Parent.id)).all()
        return time.perf_counter() - started


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


def run(engine: Engine, rounds: int, children: int, flushes: int) -> dict[str, dict[str, Any]]:
    everyone = [
        plain("plain"),
        *(ours(name) for name in ("sql", "recount", "flush", "memory", "trigger")),
        by_hand(),
    ]
    everyone.append(aggregated())
    works: dict[str, Callable[[SimpleNamespace], float]] = {
        f"{children} children of {PARENTS} parents in one flush": lambda m: one_flush(engine, m, children),
        f"{flushes} flushes with 50 children loaded": lambda m: many_flushes(engine, m, flushes),
    }
    results: dict[str, dict[str, Any]] = {}
    for title, work in works.items():
        cases = [Case(m, []) for m in everyone]
        for number in range(-1, rounds):  # the first round warms up
            for case in random.sample(cases, len(cases)):
                make(engine, case.models)
                gc.collect()
                took = work(case.models)
                if number >= 0:
                    case.seconds.append(took)
        base = statistics.median(cases[0].seconds)
        results[title] = {}
        for case in cases:
            make(engine, case.models)
            results[title][case.models.name] = {
                "milliseconds": 1000 * statistics.median(case.seconds),
                "ratio": statistics.median(case.seconds) / base,
                "parent updates": count_updates(engine, case.models, lambda case=case: work(case.models)),
            }
    kept = everyone[1]
    make(engine, kept)
    one_flush(engine, kept, children)
    reads: dict[str, list[float]] = {"the columns": [], "counting the children": []}
    for _ in range(rounds * 5):
        for name in random.sample(sorted(reads), 2):
            reads[name].append((read_column if name == "the columns" else read_by_counting)(engine, kept))
    slow = statistics.median(reads["counting the children"])
    results[f"reading both values of {PARENTS} parents"] = {
        name: {"milliseconds": 1000 * statistics.median(taken), "ratio": statistics.median(taken) / slow}
        for name, taken in reads.items()
    }
    return results


def show(results: dict[str, dict[str, Any]]) -> None:
    for title, cases in results.items():
        print(f"\n{title}")
        for name, case in cases.items():
            updates = f"{case['parent updates']:8d} parent UPDATEs" if "parent updates" in case else ""
            print(f"  {name:24}{case['milliseconds']:10.1f} ms{case['ratio']:8.2f} ×{updates}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.denormalize", description=__doc__)
    parser.add_argument("--url", help="SQLAlchemy URL of a database to work in; tables are made and dropped")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    given = parser.parse_args()
    children, flushes = (1_000, 100) if given.quick else (10_000, 1_000)
    with tempfile.TemporaryDirectory() as directory:
        engine = create_engine(given.url or f"sqlite:///{Path(directory) / 'benchmark.db'}")
        results = run(engine, given.rounds, children, flushes)
        engine.dispose()
    print(json.dumps(results, indent=2)) if given.json else show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
