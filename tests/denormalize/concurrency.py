"""The concurrency proof: processes that insert, move, change and delete children of few parents, all at once.

    python -m tests.denormalize.concurrency --database postgresql --isolation "READ COMMITTED" --operations 200000

At the end every column must equal what the rows say, and with strategy "sql" no transaction may have met a deadlock.
Serialization failures, which REPEATABLE READ reports by design, are retried. The database is that of the environment
variable QUERYCACHE_TEST_POSTGRESQL or QUERYCACHE_TEST_MARIADB; tables are made in it and dropped at the end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections import Counter
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.exc import DBAPIError, SAWarning
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from tests.denormalize import models

PARENTS = 6
DEADLOCK = {"40P01", 1213}
SERIALIZATION = {"40001", 1020}


def error_code(error: DBAPIError) -> Any:
    return getattr(error.orig, "sqlstate", None) or (error.orig.args[0] if error.orig is not None else None)


def change(session: Session, m: Any, draw: random.Random, highest: int) -> None:
    """One operation on one child."""
    what = draw.random()
    child = None
    if what > 0.3:
        child = session.scalars(
            select(m.Comment)
            .where(m.Comment.id >= draw.randint(1, max(1, highest)))
            .order_by(m.Comment.id)
            .limit(1)
        ).first()
    if child is None:
        values = {"thread_id": draw.randint(1, PARENTS), "score": draw.choice([None, *range(-3, 20)])}
        if hasattr(m, "User"):
            values |= {"author_id": draw.randint(1, 2), "message": "word " * draw.randint(1, 5) + "end"}
        session.add(m.Comment(**values))
    elif what < 0.55:
        child.thread_id = draw.randint(1, PARENTS)
    elif what < 0.75:
        child.score, child.deleted = draw.randint(-3, 20), draw.random() < 0.3
    else:
        session.delete(child)


def work(
    url: str, made_by: str, strategy: str, isolation: str, operations: int, seed: int, results: Any
) -> None:
    warnings.simplefilter("ignore", SAWarning)  # deleting a row that another process has deleted
    m: Any = getattr(models, made_by)(strategy)
    engine = create_engine(url, isolation_level=isolation)
    draw = random.Random(seed)
    seen: Counter[str] = Counter()
    highest = 1000
    while seen["operations"] < operations:
        together = min(draw.choice([1, 1, 1, 2, 3]), operations - seen["operations"])
        state = draw.getstate()
        while True:
            draw.setstate(state)
            with Session(engine, autoflush=False) as session:
                try:
                    for _ in range(together):
                        change(session, m, draw, highest)
                    new = list(session.new)
                    session.flush()
                    highest = max([highest, *(child.id for child in new)])
                    session.commit()
                    break
                except StaleDataError:  # the row was deleted meanwhile
                    seen["rows gone"] += 1
                    break
                except DBAPIError as error:
                    code = error_code(error)
                    if code in DEADLOCK:
                        seen["deadlocks"] += 1
                    elif code in SERIALIZATION:
                        seen["serialization failures"] += 1
                    else:
                        raise
        seen["operations"] += together
    engine.dispose()
    results.put(seen)


def run(
    url: str,
    *,
    made_by: str = "forum",
    strategy: str = "sql",
    isolation: str = "READ COMMITTED",
    operations: int,
    processes: int = 8,
) -> Counter[str]:
    """Run the proof; returns what was met, by name. Raises AssertionError if a column is wrong at the end."""
    m: Any = getattr(models, made_by)(strategy)
    m.Base.registry.configure()
    engine = create_engine(url)
    m.Base.metadata.drop_all(engine)
    m.Base.metadata.create_all(engine)
    try:
        with Session(engine) as session:
            session.add_all([m.Forum(id=1), m.Forum(id=2)])
            if hasattr(m, "User"):
                session.add_all([m.User(id=1), m.User(id=2)])
            session.add_all([m.Thread(id=n, forum_id=1 + n % 2) for n in range(1, PARENTS + 1)])
            session.commit()
        context = multiprocessing.get_context("spawn")
        results: Any = context.SimpleQueue()
        share = -(-operations // processes)
        workers = [
            context.Process(
                target=work, args=(url, made_by, strategy, isolation, share, seed, results), daemon=True
            )
            for seed in range(processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(worker.exitcode == 0 for worker in workers), "a worker failed; its traceback is above"
        total: Counter[str] = Counter()
        for _ in workers:
            total.update(results.get())
        with Session(engine) as session:
            m.check(session)
            total["children left"] = len(models.rows(session, m.Comment.__table__))
        return total
    finally:
        m.Base.metadata.drop_all(engine)
        engine.dispose()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.denormalize.concurrency", description=__doc__)
    parser.add_argument("--database", choices=["postgresql", "mariadb"], default="postgresql")
    parser.add_argument("--strategy", choices=["sql", "recount", "flush", "trigger"], default="sql")
    parser.add_argument(
        "--isolation", choices=["READ COMMITTED", "REPEATABLE READ"], default="READ COMMITTED"
    )
    parser.add_argument("--models", choices=["counters", "forum"], default="counters")
    parser.add_argument("--operations", type=int, default=200_000)
    parser.add_argument("--processes", type=int, default=8)
    given = parser.parse_args()
    variable = f"QUERYCACHE_TEST_{given.database.upper()}"
    url = os.environ.get(variable)
    if url is None:
        parser.error(f"set {variable} to the SQLAlchemy URL of a database to work in")
    started = time.perf_counter()
    met = run(
        url,
        made_by=given.models,
        strategy=given.strategy,
        isolation=given.isolation,
        operations=given.operations,
        processes=given.processes,
    )
    seconds = time.perf_counter() - started
    print(
        f"{given.database} {given.isolation} {given.models} strategy {given.strategy!r}: "
        f"every column is right; {dict(met)}, {seconds:.0f} s"
    )
    if given.strategy == "sql" and met["deadlocks"]:
        print(f"but there were {met['deadlocks']} deadlocks")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
