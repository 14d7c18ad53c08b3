"""A process of the application under torture: some threads that read, and now and then write."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import psycopg  # noqa: F401 -- and others that each process would import, and now finds there
import pymysql  # noqa: F401
import redis
from sqlalchemy import create_engine, event, insert
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, configure_mappers, sessionmaker

import querycache.backends.memcached
import querycache.backends.redis  # noqa: F401
from querycache import QueryCache
from querycache.errors import CacheUnavailable
from querycache.phases import Consistency, OnOutage
from querycache.shared_rows import SharedRows
from tests.torture import mutants
from tests.torture.history import Crash, History, Intent, Outcome, Read, Stats, now
from tests.torture.schema import State, log
from tests.torture.shapes import choose
from tests.torture.writing import Writing

__all__ = [
    "AFTER_COMMIT",
    "BEFORE_COMMIT",
    "EVICT_IN_COMMIT",
    "FLUSH_IN_COMMIT",
    "SNAPSHOT_LEVEL",
    "Settings",
    "connect",
    "main",
]

configure_mappers()

BEFORE_COMMIT = 1
AFTER_COMMIT = 2
FLUSH_IN_COMMIT = 3
"""The points of a commit at which a worker can be told to die; at the last one it first makes Redis lose everything
before COMMIT, and dies after."""
EVICT_IN_COMMIT = 4
"""The point after COMMIT, where a worker can be told to make Redis lose the versions of all slots. It says that it has by
setting the order back to 0, and goes on."""

SNAPSHOT_LEVEL = "REPEATABLE READ"

READS = 16
"""Reads that a thread does in a row."""


@dataclass(frozen=True)
class Settings:
    """What a worker is told. Attributes that explain themselves are not explained.

    Attributes:
        number: of the process, never given twice in a round.
        directory: where its histories go.
        writes: of its operations, the part that are writing transactions.
        hesitation: the longest pause, in seconds, around some of its COMMITs.
    """

    number: int
    directory: Path
    database_url: str
    store_url: str
    namespace: str
    isolation: str
    on_outage: OnOutage
    consistency: Consistency
    lease: float
    threads: int
    writes: float
    hesitation: float
    mutant: str
    seed: str


def connect(database_url: str, isolation: str = "READ COMMITTED", **arguments: Any) -> Engine:
    """An engine whose statements do not wait for locks for ever."""
    engine = create_engine(database_url, isolation_level=isolation, **arguments)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: object) -> None:
        with connection.cursor() as cursor:
            if engine.dialect.name == "postgresql":
                cursor.execute("SET lock_timeout = '10s'")
            else:
                cursor.execute("SET innodb_lock_wait_timeout = 10")
        connection.commit()

    return engine


def main(settings: Settings, order: Any) -> None:
    """Work until told to stop.

    Args:
        order: shared memory: `order[0]` is set to 1 to stop; `order[1]` names the point of a commit at which the
            process is to kill itself; it sets `order[2]` to 1 when it begins to work.
    """
    _Worker(settings, order).run()


class _Worker:
    def __init__(self, settings: Settings, order: Any) -> None:
        self.settings = settings
        self.order = order
        logging.getLogger("querycache").setLevel(logging.ERROR)  # that servers do not answer is no news here
        mutants.apply(settings.mutant)
        self.completed = 0
        self._count_completed()
        self.engine = connect(settings.database_url, settings.isolation, pool_size=2 * settings.threads)
        self.sessions = sessionmaker(self.engine)
        self._current = threading.local()
        self._watch_commits()
        self.cache = QueryCache(
            settings.store_url,
            namespace=settings.namespace,
            consistency=settings.consistency,
            on_outage=settings.on_outage,
            lease=settings.lease,
        )
        self.cache.attach(self.sessions).attach(self.engine)

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._thread, args=(number,), daemon=True)
            for number in range(self.settings.threads)
        ]
        for thread in threads:
            thread.start()
        self.order[2] = 1
        history = History(self.settings.directory / f"{self.settings.number:04}-stats")
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(1.0)
            stats = self.cache.stats()
            history.add(
                Stats(
                    {
                        "hit": stats.hits,
                        "miss": stats.misses,
                        "stale": stats.stale,
                        "bypass": stats.bypasses,
                        "fill": stats.fills,
                        "error": stats.errors,
                        "completed": self.completed,
                        "processor": round(time.process_time() * 1e6),
                        **{
                            f"{outcome} {reason}": number
                            for (outcome, reason), number in stats.reasons.items()
                        },
                    }
                )
            )

    def _thread(self, number: int) -> None:
        history = History(self.settings.directory / f"{self.settings.number:04}-{number}")
        try:
            _Thread(self, number, history).run()
        except BaseException:
            history.add(Crash(traceback.format_exc()))
            raise
        finally:
            history.close()

    # --- the points of a commit -------------------------------------------------------------------------

    def _reached(self, point: int) -> None:
        current = self._current
        if not getattr(current, "committing", False):
            return
        if self.order[1] == FLUSH_IN_COMMIT and point == BEFORE_COMMIT:
            with redis.Redis.from_url(self.settings.store_url.partition("?")[0]) as client:
                client.flushall()
            current.doomed = True
            time.sleep(0.1)
        elif self.order[1] == EVICT_IN_COMMIT and point == AFTER_COMMIT:
            with redis.Redis.from_url(self.settings.store_url.partition("?")[0]) as client:
                client.delete(*client.scan_iter("*slot:*", count=1000), "")
            self.order[1] = 0
        elif self.order[1] == point or getattr(current, "doomed", False):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(current.hesitation)

    def _watch_commits(self) -> None:
        # The cache does its two phases around this: what happens here is between phase one and phase two.
        dialect = self.engine.dialect
        commit = dialect.do_commit

        def watched(connection: Any) -> None:
            self._reached(BEFORE_COMMIT)
            commit(connection)
            self._reached(AFTER_COMMIT)

        dialect.do_commit = watched  # type: ignore[method-assign, assignment]

    def _count_completed(self) -> None:
        """How many answers are completed with rows that others had, of which the cache itself tells nobody."""
        find = SharedRows.find

        def counted(known: SharedRows, *arguments: Any) -> Any:
            found = find(known, *arguments)
            self.completed += found is not None
            return found

        SharedRows.find = counted  # type: ignore[method-assign, assignment]

    @contextlib.contextmanager
    def committing(self, hesitation: float) -> Iterator[None]:
        """Around a call of commit, whose points are watched."""
        current = self._current
        current.committing, current.hesitation = True, hesitation
        try:
            yield
        finally:
            current.committing = False


class _Thread:
    def __init__(self, worker: _Worker, number: int, history: History) -> None:
        settings = worker.settings
        self.worker = worker
        self.history = history
        self.name = f"{settings.number}-{number}"
        self.random = Random(f"{settings.seed}-{self.name}")
        self.stamps = count(((settings.number + 1) << 36) + (number << 30))
        self.transactions = count()
        self.chosen = choose(self.random)
        self.snapshots = settings.isolation == SNAPSHOT_LEVEL

    def run(self) -> None:
        settings = self.worker.settings
        while not self.worker.order[0]:
            try:
                if self.random.random() < settings.writes * READS:
                    if self.random.random() < 0.8:
                        self.write()
                    else:
                        self.write_without_session()
                else:
                    self.read()
            except (DBAPIError, CacheUnavailable):
                # A deadlock, a snapshot that was too old, a commit that was refused: as if it had not been tried.
                pass

    # --- reading --------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Sixteen reads, in transactions of two, four or all of them."""
        many = self.random.choice((2, 4, 16))
        for _ in range(READS // many):
            with self.worker.sessions() as session:
                start = now()
                for _ in range(many):
                    self.read_one(session, start, {})

    def read_one(self, session: Session, start: int, own: dict[int, State | None]) -> None:
        # The same once more, half of the time: an answer must not go back to what was before it.
        if self.random.random() < 0.5:
            self.chosen = choose(self.random)
        name, shape, argument = self.chosen
        begin = now()
        statements = shape(session, argument)
        end = now()
        # What is loaded already would not be loaded again.
        session.expunge_all()
        self.history.add(Read(name, start if self.snapshots else begin, end, statements, dict(own)))

    # --- writing --------------------------------------------------------------------------------------------

    def write(self) -> None:
        writing = Writing(self.random, self.stamps)
        with self.worker.sessions() as session:
            start = now()
            writing.lock(session)
            for _ in range(self.random.choice((1, 1, 2, 3))):
                before = dict(writing.own)
                how = self.random.choice(("", "", "", "release", "roll back"))
                savepoint = session.begin_nested() if how else None
                writing.step(session)
                session.expunge_all()
                self.read_own(session, start, writing)
                if savepoint is not None and how == "release":
                    savepoint.commit()
                elif savepoint is not None:
                    savepoint.rollback()
                    session.expunge_all()
                    writing.own = before
                    writing.steps.append("roll back")
                    self.read_own(session, start, writing)
            end = self.random.random()
            if end < 0.1:
                session.rollback()
            elif end < 0.9:
                self.commit(session, writing)
            # else: closed with its work undone

    def read_own(self, session: Session, start: int, writing: Writing) -> None:
        for _ in range(self.random.choice((0, 1, 3))):
            self.read_one(session, start, writing.own)

    def commit(self, session: Session, writing: Writing) -> None:
        txn = f"{self.name}-{next(self.transactions)}"
        session.execute(insert(log).values(txn=txn))
        with self.decided(txn, writing), self.worker.committing(self.hesitation()):
            session.commit()

    def write_without_session(self) -> None:
        writing = Writing(self.random, self.stamps)
        txn = f"{self.name}-{next(self.transactions)}"
        connection = self.worker.engine.connect()
        try:
            connection.begin()
            writing.lock(connection)
            for _ in range(self.random.choice((1, 2))):
                writing.step(connection)
            connection.execute(insert(log).values(txn=txn))
            if self.random.random() < 0.9:
                with self.decided(txn, writing), self.worker.committing(self.hesitation()):
                    connection.commit()
        finally:
            connection.close()

    def hesitation(self) -> float:
        return self.random.random() * self.worker.settings.hesitation if self.random.random() < 0.5 else 0.0

    @contextlib.contextmanager
    def decided(self, txn: str, writing: Writing) -> Iterator[None]:
        """Note that a commit is called, and how that ends."""
        self.history.add(Intent(txn, now(), dict(writing.own), writing.steps))
        try:
            yield
        except BaseException as error:
            self.history.add(Outcome(txn, now(), type(error).__name__))
            raise
        self.history.add(Outcome(txn, now(), ""))
