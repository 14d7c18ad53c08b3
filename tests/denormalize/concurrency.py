"""The concurrency proof: processes that insert, move, change and delete children of few parents, all at once.

    make denormalize-concurrency ARGS="--database postgresql --isolation 'READ COMMITTED' --operations 200000"

PostgreSQL and MariaDB, at READ COMMITTED and REPEATABLE READ, one after the other, unless one is named. At the end
every column must equal what the rows say, and with strategy "sql" no transaction may have met a deadlock. Serialization
failures, which REPEATABLE READ reports by design, are retried. The databases are those of the environment variables
QUERYCACHE_TEST_POSTGRESQL and QUERYCACHE_TEST_MARIADB; tables are made in them and dropped at the end.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import queue
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.exc import DBAPIError, SAWarning
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from tests.denormalize import models

PARENTS = 6
TOLD_EVERY = 50
"""Operations after which a process says how far it is."""
PATIENCE = 120.0
"""Seconds without a word from any process after which they are taken to be stuck."""
TOGETHER = (1, 1, 1, 1, 2, 2, 3, 5, 10, 25)
"""Operations in one flush and transaction, one of these by chance: many small transactions, and some that lock much."""
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.2
"""Seconds that a transaction waits at most after its first failure, twice as long after each further one; and at most."""
DATABASES = ("postgresql", "mariadb")
ISOLATIONS = ("READ COMMITTED", "REPEATABLE READ")
DEADLOCK = {"40P01", 1213}
SERIALIZATION = {"40001", 1020}


def error_code(error: DBAPIError) -> Any:
    return getattr(error.orig, "sqlstate", None) or (error.orig.args[0] if error.orig is not None else None)


def change(session: Session, m: Any, draw: random.Random, number: int, highest: int) -> None:
    """As many operations, each on one child. The children are read in one statement, so that the work is in the flush."""
    from_here = draw.randint(1, max(1, highest))
    query = select(m.Comment).where(m.Comment.id >= from_here).order_by(m.Comment.id).limit(number)
    children = list(session.scalars(query))
    for _ in range(number):
        what = draw.random()
        if what < 0.3 or not children:
            values = {"thread_id": draw.randint(1, PARENTS), "score": draw.choice([None, *range(-3, 20)])}
            if hasattr(m, "User"):
                values |= {"author_id": draw.randint(1, 2), "message": "word " * draw.randint(1, 5) + "end"}
            session.add(m.Comment(**values))
            continue
        child = children.pop()
        if what < 0.55:
            child.thread_id = draw.randint(1, PARENTS)
        elif what < 0.75:
            child.score, child.deleted = draw.randint(-3, 20), draw.random() < 0.3
        else:
            session.delete(child)


def work(
    url: str, made_by: str, strategy: str, isolation: str, operations: int, seed: int, results: Any
) -> None:
    warnings.simplefilter("ignore", SAWarning)  # deleting a row that another process has deleted
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # which warns of each serialization failure
    m: Any = getattr(models, made_by)(strategy)
    engine = create_engine(url, isolation_level=isolation)
    draw, pause = random.Random(seed), random.Random(-1 - seed)
    seen: Counter[str] = Counter()
    done, highest = 0, 1000
    while done < operations:
        together = min(draw.choice(TOGETHER), operations - done)
        state = draw.getstate()
        tries = 0
        while True:
            draw.setstate(state)
            # Transactions that fail together and come back together fail together again.
            time.sleep(pause.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**tries)) if tries else 0)
            tries += 1
            with Session(engine, autoflush=False) as session:
                try:
                    change(session, m, draw, together, highest)
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
        done += together
        seen["operations"] += together
        if seen["operations"] >= TOLD_EVERY or done == operations:
            results.put(seen)
            seen = Counter()
    engine.dispose()


def run(
    url: str,
    *,
    made_by: str = "forum",
    strategy: str = "sql",
    isolation: str = "READ COMMITTED",
    operations: int,
    processes: int = 8,
    seed: int = 0,
    progress: Callable[[Counter[str]], None] = lambda so_far: None,
) -> Counter[str]:
    """Run the proof; returns what was met, by name.

    Raises:
        AssertionError: a column is wrong at the end, or a process failed.
    """
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
        results: Any = context.Queue()
        share = -(-operations // processes)
        workers = [
            context.Process(
                target=work, args=(url, made_by, strategy, isolation, share, seed + n, results), daemon=True
            )
            for n in range(processes)
        ]
        for worker in workers:
            worker.start()
        total: Counter[str] = Counter()
        heard = time.monotonic()
        try:
            while total["operations"] < share * processes:
                try:
                    total.update(results.get(timeout=1))
                    heard = time.monotonic()
                except queue.Empty:
                    assert not any(worker.exitcode for worker in workers), (
                        "a process failed; see its traceback"
                    )
                    assert time.monotonic() - heard < PATIENCE, f"the processes are stuck after {dict(total)}"
                progress(total)
            for worker in workers:
                worker.join(PATIENCE)
        finally:
            for worker in workers:
                worker.kill()
        with Session(engine) as session:
            m.check(session)
            total["children left"] = len(models.rows(session, m.Comment.__table__))
        return total
    finally:
        m.Base.metadata.drop_all(engine)
        engine.dispose()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.denormalize.concurrency", description=__doc__)
    parser.add_argument("--database", choices=DATABASES, help="this one alone")
    parser.add_argument("--isolation", choices=ISOLATIONS, help="this level alone")
    parser.add_argument("--strategy", choices=["sql", "recount", "flush", "trigger"], default="sql")
    parser.add_argument("--models", choices=["counters", "forum"], default="counters")
    parser.add_argument(
        "--operations", type=int, default=50_000, help="of each database and level (default: 50000)"
    )
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="another one draws other operations")
    given = parser.parse_args()
    wrong = 0
    for database in [given.database] if given.database else DATABASES:
        variable = f"QUERYCACHE_TEST_{database.upper()}"
        url = os.environ.get(variable)
        if url is None:
            parser.error(f"set {variable} to the SQLAlchemy URL of a database to work in")
        for isolation in [given.isolation] if given.isolation else ISOLATIONS:
            title = f'{database}, {isolation}, {given.models}, strategy "{given.strategy}"'
            wrong += prove(title, url, isolation, given)
    return 1 if wrong else 0


def prove(title: str, url: str, isolation: str, given: argparse.Namespace) -> bool:
    """Run one proof and say how it goes; returns whether something is wrong."""
    started = time.perf_counter()
    told = started

    def progress(so_far: Counter[str]) -> None:
        nonlocal told
        now = time.perf_counter()
        if now - told > 5:
            told = now
            rate = so_far["operations"] / (now - started)
            print(f"  {so_far['operations']:,} of {given.operations:,} operations, {rate:.0f}/s", flush=True)

    print(f"{title}: {given.operations:,} operations, {given.processes} processes", flush=True)
    try:
        met = run(
            url,
            made_by=given.models,
            strategy=given.strategy,
            isolation=isolation,
            operations=given.operations,
            processes=given.processes,
            seed=given.seed,
            progress=progress,
        )
    except AssertionError as error:
        print(f"  WRONG: {error}", flush=True)
        return True
    retries = met["serialization failures"] + met["deadlocks"]
    deadlocked = given.strategy == "sql" and met["deadlocks"] > 0
    print(
        f"  {met['operations']:,} operations in {time.perf_counter() - started:.0f} s, {retries:,} retries, "
        f"{met['deadlocks']:,} deadlocks{' (THERE MUST BE NONE)' if deadlocked else ''}, 0 wrong parents, "
        f"{met['children left']:,} children left",
        flush=True,
    )
    return deadlocked


if __name__ == "__main__":
    sys.exit(main())
