"""One round: workers and faults for some seconds, and then the judgement."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

from sqlalchemy import Engine, select

from querycache.phases import OnOutage
from tests.servers import Server
from tests.torture import schema, worker
from tests.torture.faults import Faults, kinds_for
from tests.torture.history import Intent, Outcome, Read, Stats, load, now
from tests.torture.judge import Illegal, Judge
from tests.torture.mutants import MUTANTS

__all__ = ["Report", "Workers", "run_round"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.torture.worker"])

PATIENCE = 30.0
"""Seconds after which a worker that was told to stop is given up."""


@dataclass
class Report:
    """What happened in some rounds.

    Attributes:
        reads: reads judged.
        rows: rows looked at in them.
        commits: commits that took place.
        refused: calls of commit that raised.
        slowest: seconds of the longest call of commit; it must be shorter than the lease.
        faults: faults injected, by kind.
        cache: what the caches counted, by outcome and reason.
        illegal: reads that nothing explains.
        seconds: of work, without starting servers and judging.
        times: when the faults were, for rounds with illegal reads; in nanoseconds.
    """

    reads: int = 0
    rows: int = 0
    commits: int = 0
    refused: int = 0
    slowest: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    cache: Counter[str] = field(default_factory=Counter)
    illegal: list[Illegal] = field(default_factory=list)
    seconds: float = 0.0
    times: list[str] = field(default_factory=list)

    @property
    def hit_ratio(self) -> float:
        lookups = self.cache["hit"] + self.cache["miss"] + self.cache["stale"]
        return self.cache["hit"] / lookups if lookups else 0.0

    def add(self, other: Report) -> None:
        self.reads += other.reads
        self.rows += other.rows
        self.commits += other.commits
        self.refused += other.refused
        self.slowest = max(self.slowest, other.slowest)
        self.faults += other.faults
        self.shapes += other.shapes
        self.cache += other.cache
        self.illegal += other.illegal
        self.seconds += other.seconds
        self.times += other.times


class Workers:
    """The processes of a round. One that is killed is replaced.

    Attributes:
        buried: for each process that was killed, when it was certain that none of its transactions goes on.
    """

    def __init__(self, settings: worker.Settings, processes: int, database: Engine) -> None:
        self._settings = settings
        self._database = database
        self._running: dict[int, tuple[BaseProcess, Any]] = {}
        self.buried: dict[int, int] = {}
        self._next = 0
        for _ in range(processes):
            self._start()

    def _start(self) -> None:
        number, self._next = self._next, self._next + 1
        order = RawArray("i", 3)
        process = _CONTEXT.Process(
            target=worker.main, args=(replace(self._settings, number=number), order), daemon=True
        )
        process.start()
        self._running[number] = (process, order)

    def wait(self) -> None:
        """Until all have begun to work."""
        while not all(order[2] for _, order in self._running.values()) and not self.ended():
            time.sleep(0.02)

    def kill(self, random: Random) -> None:
        """Kill one now."""
        number = random.choice(list(self._running))
        process, _ = self._running[number]
        process.kill()
        self._bury(number)

    def kill_at(self, point: int, random: Random) -> bool:
        """Have one kill itself when it reaches this point of a commit. False if it did not get there."""
        number = random.choice(list(self._running))
        process, order = self._running[number]
        order[1] = point
        process.join(3.0)
        order[1] = 0
        process.join(0.5)  # it may be about to, as who has flushed before COMMIT is
        if process.exitcode is None:
            return False
        self._bury(number)
        return True

    def evict_in_commit(self, random: Random) -> bool:
        """Have one make the cache server lose versions within a commit. False if it had none."""
        _, order = self._running[random.choice(list(self._running))]
        order[1] = worker.EVICT_IN_COMMIT
        deadline = time.monotonic() + 3.0
        while order[1] and time.monotonic() < deadline:
            time.sleep(0.01)
        reached = not order[1]
        order[1] = 0
        return reached

    def _bury(self, number: int) -> None:
        process, _ = self._running.pop(number)
        process.join()
        # What it had begun goes on until the database notices. Who has all the locks knows that it is over.
        with self._database.connect() as connection:
            connection.execute(select(schema.locks.c.id).order_by(schema.locks.c.id).with_for_update())
            self.buried[number] = now()
        self._start()

    def ended(self) -> dict[int, int]:
        """Those that ended although nobody told them to, with their exit codes."""
        codes = {number: process.exitcode for number, (process, _) in self._running.items()}
        return {number: code for number, code in codes.items() if code is not None}

    def stop(self) -> None:
        for _, order in self._running.values():
            order[0] = 1
        deadline = time.monotonic() + PATIENCE
        for number, (process, _) in self._running.items():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                raise AssertionError(f"worker {number} does not stop")


def run_round(
    database_url: str,
    store: Server,
    *,
    seconds: float,
    processes: int = 4,
    threads: int = 4,
    on_outage: OnOutage = "available",
    isolation: str = "READ COMMITTED",
    writes: float = 0.002,
    every: float = 2.0,
    lease: float = 2.0,
    mutant: str = "",
    seed: str = "",
) -> Report:
    """Let workers read and write for some seconds, inject faults, and judge what they have read.

    Args:
        database_url: a database whose tables ``torture_…`` may be replaced.
        store: a running server of our own, Redis or memcached.
        writes: of the workers' operations, the part that are writing transactions.
        every: seconds from one fault to the next, on average.
        lease: as given to the cache.
        mutant: the protection to switch off.
        seed: what the random choices begin with.
    """
    seed = seed or uuid4().hex[:8]
    random = Random(seed)
    kinds: Sequence[str] = kinds_for(store.name, on_outage)
    consistency: Any = "strict"
    if mutant:
        kinds = MUTANTS[mutant].faults
        isolation = MUTANTS[mutant].isolation
        consistency = MUTANTS[mutant].consistency
    # A pause must be a fault for whoever meets it; a machine that is busy for a moment must not be one.
    timeout = 0.5 if on_outage == "refuse" else 10
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="querycache-torture-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        database = worker.connect(database_url)
        stack.callback(database.dispose)
        schema.create(database)
        settings = worker.Settings(
            number=0,
            directory=directory,
            database_url=database_url,
            store_url=f"{store.url}?timeout={timeout}",
            namespace=f"torture-{uuid4().hex[:8]}",
            isolation=isolation,
            on_outage=on_outage,
            consistency=consistency,
            lease=lease,
            threads=threads,
            writes=writes,
            # What a mutant does wrong around COMMIT shows to those who read meanwhile.
            hesitation=0.15 if mutant else 0.03,
            mutant=mutant,
            seed=seed,
        )
        workers = Workers(settings, processes, database)
        workers.wait()
        start = time.monotonic()
        faults = Faults(workers, store, kinds, random)
        next_fault = start + min(every, seconds / 3)
        while time.monotonic() < start + seconds and not workers.ended():
            time.sleep(0.05)
            if time.monotonic() > next_fault:
                faults.inject()
                next_fault = time.monotonic() + faults.pause(every)
        ended = workers.ended()
        workers.stop()
        took = time.monotonic() - start
        # Empty and without a history, so that the next round on it need not begin with a quarantine.
        store.restart()
        report = _judge(directory, workers, database)
        if ended:  # and not for an exception, which that would have told
            raise AssertionError(f"workers ended, and nobody had told them to: exit codes {ended}")
        report.seconds = took
        report.faults = faults.injected
        if report.illegal:
            report.times = [f"{kind} from {begin} to {end}" for kind, begin, end in faults.times]
        return report


def _judge(directory: Path, workers: Workers, database: Engine) -> Report:
    report = Report()
    intents: list[Intent] = []
    outcomes: dict[str, Outcome] = {}
    reads: list[Read] = []
    crashes: list[str] = []
    for path in sorted(directory.iterdir()):
        last: Stats | None = None
        for record in load(path):
            if isinstance(record, Read):
                reads.append(record)
            elif isinstance(record, Intent):
                intents.append(record)
            elif isinstance(record, Outcome):
                outcomes[record.txn] = record
            elif isinstance(record, Stats):
                last = record
            else:
                crashes.append(record.trace)
        if last is not None:
            report.cache.update(last.counts)
    if crashes:
        raise AssertionError(f"{len(crashes)} threads of the workers crashed; the first:\n{crashes[0]}")
    with database.connect() as connection:
        committed = frozenset(connection.scalars(select(schema.log.c.txn)))
    judge = Judge(intents, outcomes, committed, workers.buried)
    judge.compare(schema.contents(database))
    if judge.contradictions:
        raise AssertionError(f"histories and database do not agree: {judge.contradictions[:3]}")
    judge.learn(reads)
    for read in reads:
        report.illegal.extend(judge.judge(read))
        report.shapes[read.shape] += 1
        report.rows += sum(len(part.rows) for parts in read.statements for part in parts)
    report.reads = len(reads)
    report.commits = judge.commits
    calls = {intent.txn: intent.time for intent in intents}
    report.slowest = max((each.time - calls[each.txn] for each in outcomes.values()), default=0) / 1e9
    report.refused = sum(bool(outcome.raised) for outcome in outcomes.values())
    return report
