"""A forum under load: what the cache keeps, and what it brings, at several ratios of reads to writes.

    python -m tests.servers -- python -m benchmarks.workload

Eight processes read pages of a forum, whose threads, members and boards are popular after Zipf, and now and then write:
reply, edit, change a profile, open a thread; they have read every page once before. The same work is done in six ways,
by eight processes each, which work in turns of a second or two while the others pause:

- **row slots**: the library as it is;
- **table tags**: the same with every answer depending on whole tables, as query caches in this field do;
- **TTL only**: answers expire after a second and writes are not followed, so what is read may be stale;
- **limit**: the same, but nothing expires; soon every read is a hit, so no cache of this kind can bring more;
- **nothing cached**: the library is there, and no statement asks for it: what its being there costs under this load;
- **no cache**: the library is not there.

What a transaction that writes takes among all this, and its ``commit()``, is measured too. Then one process alone commits
replies, with the library, with ``consistency="commit"`` (which tells Redis after COMMIT only), with the least that could
tell Redis before COMMIT and after it (a constant command on a bare socket), and without the library, in turn; on this disk
and on one that takes a millisecond longer to confirm, as those that clouds reach by their networks do.

The processor time of an operation is that of everybody who works on it: the processes, PostgreSQL and Redis. It says
how many operations a machine can do, also where a busy one shares its processors with other work meanwhile; and, since
the three are told apart, how many a database could serve that is on a machine of its own.

PostgreSQL must commit to disk as in production, Redis is the store; both come from the environment
(``QUERYCACHE_TEST_POSTGRESQL``, ``QUERYCACHE_TEST_REDIS``). Tables ``forum_…`` are replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import redis
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session, sessionmaker

from benchmarks.visitors import Base, Size, Visitor, fill
from querycache import QueryCache, dependencies
from querycache.analysis import Analysis
from querycache.writes import Writes

POSTS = 200_000
MODES = ("row slots", "table tags", "TTL only", "limit", "nothing cached", "no cache")
READS = (90, 95, 99)
TTL = 1.0

REQUIRED_HITS = 3.0
"""Hits with row slots to hits with table tags, at 95 reads to 5 writes."""
REQUIRED_THROUGHPUT = 2.0
"""Operations a second with the cache to those without, at 95 reads to 5 writes."""
REQUIRED_COMMIT = 1.25
"""A writing commit with the library to one without, at 95 reads to 5 writes, at most. By the same number goes what is
measured with one process alone, where the database is not relieved by the cache."""


def prepare(
    mode: str, store_url: str, sessions: sessionmaker[Session], namespace: str, **arguments: Any
) -> QueryCache | None:
    """A cache of this mode, attached. Of what no user is offered, the pieces are taken out here, in this process."""
    if mode == "no cache":
        return None
    if mode == "table tags":
        dependencies.tags = _table_tags
    if mode in ("TTL only", "limit"):
        Writes.watch = lambda self, engine: False  # type: ignore[method-assign]
    # The lease only matters for the first moments of a cache on a server whose history is not known.
    arguments |= {"lease": 2.0, "ttl": TTL if mode == "TTL only" else None}
    cache = QueryCache(store_url, namespace=namespace, **arguments)
    return cache.attach(sessions)


_TAGS = dependencies.tags


def _table_tags(analysis: Analysis, *arguments: Any) -> list[str]:
    return _TAGS(dataclasses.replace(analysis, pins=()), *arguments)


# What the parent and a process tell each other, in shared memory: what it is to do; 1 while it works and 2 while it pauses;
# and what it has counted so far: operations, hits, cached statements, microseconds of its processor time and of that of
# PostgreSQL for it, transactions that wrote, and microseconds of these and of their commit().
PAUSE, WARM_UP, COUNT, STOP = range(4)


def work(
    mode: str,
    reads: int,
    urls: tuple[str, str],
    size: Size,
    namespace: str,
    number: int,
    processes: int,
    board: Any,
    go: Any,
) -> None:
    """One process: works and counts as the board says, and sleeps while it pauses."""
    engine = create_engine(urls[0], pool_size=1)
    sessions = sessionmaker(engine)
    cache = prepare(mode, urls[1], sessions, namespace)
    visitor = Visitor(sessions, size, mode not in ("nothing cached", "no cache"), f"{namespace}{number}")
    visitor.warm_up(number, processes)
    with engine.connect() as connection:
        backend = connection.scalar(text("SELECT pg_backend_pid()"))
    board[1] = 2
    while board[0] != STOP:
        if board[0] == PAUSE:
            board[1] = 2
            go.wait()
            continue
        board[1] = 1
        what, operations, writes, writing, committing = board[0], 0, 0, 0.0, visitor.committing
        before, own, database = _statements(cache), time.process_time(), backend_seconds(backend)
        while board[0] == what:
            if visitor.random.random() * 100 < reads:
                visitor.read()
            else:
                begin = time.perf_counter()
                visitor.write()
                writing += time.perf_counter() - begin
                writes += 1
            operations += 1
        if what == COUNT:
            after = _statements(cache)
            board[2] += operations
            board[3] += after[0] - before[0]
            board[4] += after[1] - before[1]
            board[5] += round((time.process_time() - own) * 1e6)
            board[6] += round((backend_seconds(backend) - database) * 1e6)
            board[7] += writes
            board[8] += round(writing * 1e6)
            board[9] += round((visitor.committing - committing) * 1e6)
    engine.dispose()


def _statements(cache: QueryCache | None) -> tuple[int, int]:
    """Hits, and cached statements, so far."""
    if cache is None:
        return 0, 0
    stats = cache.stats()
    # A miss that may not be stored is followed by a bypass with this reason: one read, two events.
    twice = sum(
        stats.reasons.get(("bypass", reason), 0) for reason in ("pending", "quarantine", "after write")
    )
    return stats.hits, stats.hits + stats.misses + stats.stale + stats.bypasses - twice


def backend_seconds(backend: Any) -> float:
    """What a connection's process in PostgreSQL has used so far, where it is on this machine."""
    stat = Path(f"/proc/{backend}/stat")
    ticks = stat.read_text().rpartition(")")[2].split()[11:13] if stat.exists() else ()
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def redis_seconds(url: str) -> float:
    """What Redis has used so far."""
    with redis.Redis.from_url(url) as client:
        info = client.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


_CONTEXT = multiprocessing.get_context("forkserver")


class Crowd:
    """The processes of one mode, which work when they are told."""

    def __init__(self, mode: str, reads: int, urls: tuple[str, str], size: Size, processes: int) -> None:
        self.mode = mode
        self._urls = urls
        namespace = f"forum-{uuid4().hex[:8]}"
        self._boards = [RawArray("q", 10) for _ in range(processes)]
        self._go = _CONTEXT.Event()
        self._processes = [
            _CONTEXT.Process(
                target=work,
                args=(mode, reads, urls, size, namespace, number, processes, board, self._go),
                daemon=True,
            )
            for number, board in enumerate(self._boards)
        ]
        for process in self._processes:
            process.start()
        self._wait()

    def _wait(self) -> None:
        """Until all pause."""
        while not all(board[1] == 2 for board in self._boards):
            if any(process.exitcode for process in self._processes):
                raise SystemExit(f"a process of {self.mode!r} failed")
            time.sleep(0.002)

    def _tell(self, what: int) -> None:
        if what == PAUSE:
            self._go.clear()
        for board in self._boards:
            board[0] = what
        if what != PAUSE:
            self._go.set()

    def work(self, seconds: float, what: int = COUNT) -> dict[str, float]:
        """Work for a while: operations a second, processor microseconds of an operation (all, and those of the
        processes, PostgreSQL and Redis), hits by cached statement, and microseconds of a transaction that writes and of
        its commit(), of all processes together."""
        before, redis_before = self._sum(), redis_seconds(self._urls[1])
        begin = time.perf_counter()
        self._tell(what)
        time.sleep(seconds)
        self._tell(PAUSE)
        taken = time.perf_counter() - begin
        self._wait()
        cache = (redis_seconds(self._urls[1]) - redis_before) * 1e6
        since = [now - then for now, then in zip(self._sum(), before, strict=True)]
        done, hits, statements, own, database, writes, writing, committing = since
        return {
            "operations": done / taken,
            "processor": (own + database + cache) / max(1, done),
            "application": own / max(1, done),
            "database": database / max(1, done),
            "cache": cache / max(1, done),
            "hits": hits / statements if statements else 0.0,
            "transaction": writing / max(1, writes),
            "commit()": committing / max(1, writes),
        }

    def _sum(self) -> list[int]:
        return [sum(each) for each in zip(*(board[2:] for board in self._boards), strict=True)]

    def stop(self) -> None:
        self._tell(STOP)
        for process in self._processes:
            process.join()


def measure(
    reads: int, urls: tuple[str, str], size: Size, options: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """For each mode what was measured in each round: in turns of a second or two, since a machine does not stay as fast
    as it is for longer."""
    crowds = [Crowd(mode, reads, urls, size, options.processes) for mode in MODES]
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for crowd in crowds:
        crowd.work(options.warm_up, WARM_UP)
    for turn in range(options.rounds):
        for crowd in crowds[turn % len(crowds) :] + crowds[: turn % len(crowds)]:
            found[crowd.mode].append(crowd.work(options.seconds))
        line = ", ".join(f"{mode} {found[mode][-1]['operations']:.0f}" for mode in MODES)
        _say(f"{reads}/{100 - reads} round {turn + 1} of {options.rounds}, operations/s: {line}")
    for crowd in crowds:
        crowd.stop()
    return found


def measure_commits(
    urls: tuple[str, str], size: Size, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """For each disk the microseconds of a transaction that writes a reply, of its ``commit()``, and of COMMIT alone, by
    kind."""
    visitors = {}
    for disk, delay in _DISKS.items():
        # PostgreSQL waits so long before it writes, whoever else commits
        slower = {"options": f"-c commit_delay={delay} -c commit_siblings=0"}
        for kind in _KINDS:
            engine = create_engine(urls[0], pool_size=1, connect_args=slower)
            sessions = sessionmaker(engine)
            if kind == "least":
                _tell_barely(engine, urls[1])
            elif kind != "without":
                consistency = "strict" if kind == "with" else "commit"
                prepare("row slots", urls[1], sessions, f"forum-{uuid4().hex[:8]}", consistency=consistency)
            visitors[disk, kind] = Visitor(sessions, size, False, "commits")
    times: dict[str, dict[str, list[float]]] = {
        disk: {f"{part} {kind}": [] for part in _PARTS for kind in _KINDS} for disk in _DISKS
    }
    for turn in range(options.commits + 20):
        for disk in _DISKS:
            first = turn % len(_KINDS)
            for kind in _KINDS[first:] + _KINDS[:first]:
                for flushed in (False, True):
                    visitor = visitors[disk, kind]
                    with visitor.sessions() as session:
                        begin = time.perf_counter()
                        visitor.reply(session)
                        if flushed:
                            session.flush()
                        before = time.perf_counter()
                        session.commit()
                        end = time.perf_counter()
                    if turn < 20:
                        continue
                    if flushed:
                        times[disk][f"COMMIT {kind}"].append((end - before) * 1e6)
                    else:
                        times[disk][f"commit() {kind}"].append((end - before) * 1e6)
                        times[disk][f"transaction {kind}"].append((end - begin) * 1e6)
    return {disk: {name: median(each) for name, each in found.items()} for disk, found in times.items()}


def _tell_barely(engine: Engine, url: str) -> None:
    """Have each COMMIT wait for one answer of Redis, and send it one command more after: less cannot tell other processes
    before what it commits is visible, and after. Nothing is found out about what was written."""
    engine.connect().close()  # the dialect is ready now
    address = urlsplit(url)
    server = socket.create_connection((address.hostname, address.port))
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    dialect: Any = engine.dialect
    commit, told = dialect.do_commit, False

    def do_commit(connection: Any) -> None:
        nonlocal told
        if told:
            server.recv(64)
        server.sendall(_TELL)
        server.recv(64)
        commit(connection)
        server.sendall(_TELL)
        told = True

    dialect.do_commit = do_commit


_TELL = b"*2\r\n$4\r\nINCR\r\n$13\r\nforum-commits\r\n"
_DISKS = {"this disk": 0, "a disk that takes 1 ms longer": 1000}
_KINDS = ("with", "one phase", "least", "without")
_PARTS = {
    "transaction": "a transaction that writes",
    "commit()": "its commit(), which flushes",
    "COMMIT": "commit() of what was flushed before",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workload", description=__doc__.split("\n")[0])
    parser.add_argument("--posts", type=int, default=POSTS, help=f"of the forum (default {POSTS})")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each mode in a round (default 1.5)")
    parser.add_argument(
        "--warm-up", type=float, default=5.0, help="seconds of work of each before (default 5)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="medians are of so many (default 15)")
    parser.add_argument("--commits", type=int, default=400, help="to measure what one costs (default 400)")
    parser.add_argument("--reads", type=int, choices=READS, action="append", help="percent; may be repeated")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    missing = [name for name in ("POSTGRESQL", "REDIS") if not os.environ.get(f"QUERYCACHE_TEST_{name}")]
    if missing:
        parser.error(
            f"QUERYCACHE_TEST_{missing[0]} is not set: run python -m tests.servers -- python -m benchmarks.workload"
        )
    urls = os.environ["QUERYCACHE_TEST_POSTGRESQL"], os.environ["QUERYCACHE_TEST_REDIS"]
    engine, size = create_engine(urls[0]), Size(options.posts)
    _say(f"filling a forum with {size.posts} posts")
    fill(engine, size)
    runs: dict[int, dict[str, list[dict[str, float]]]] = {}
    for reads in options.reads or READS:
        runs[reads] = measure(reads, urls, size, options)
    commits = measure_commits(urls, size, options)
    Base.metadata.drop_all(engine)
    result = _result(runs, commits)
    print(json.dumps(result) if options.json else _table(result))
    return 0


def _result(
    runs: Mapping[int, Mapping[str, Sequence[Mapping[str, float]]]],
    commits: Mapping[str, Mapping[str, float]],
) -> Any:
    workloads = []
    required: dict[str, dict[str, float]] = {}
    for reads, modes in runs.items():
        rows = {
            mode: {name: median(each[name] for each in found) for name in found[0]}
            for mode, found in modes.items()
        }
        workloads.append({"reads": reads, "writes": 100 - reads, "modes": rows})
        if reads == 95:
            required["hits, row slots to table tags, at least"] = {
                "required": REQUIRED_HITS,
                "measured": _ratio(modes, "hits", "table tags"),
            }
            required["throughput, row slots to no cache, at least"] = {
                "required": REQUIRED_THROUGHPUT,
                "measured": _ratio(modes, "operations", "no cache"),
                "by processor time": 1 / _ratio(modes, "processor", "no cache"),
                "by that of the database": 1 / _ratio(modes, "database", "no cache"),
                "of the limit": _ratio(modes, "operations", "limit"),
                "nothing cached": _ratio(modes, "operations", "no cache", "nothing cached"),
            }
            # what an application pays; the database has less to do meanwhile, unless nothing is cached
            required["writing commit among them, with to without, at most"] = {
                "required": REQUIRED_COMMIT,
                "measured": _ratio(modes, "commit()", "no cache"),
                "the whole transaction": _ratio(modes, "transaction", "no cache"),
                "nothing cached": _ratio(modes, "commit()", "no cache", "nothing cached"),
            }
    for disk, times in commits.items():
        required[f"writing commit alone on {disk}, with to without, at most"] = {
            "required": REQUIRED_COMMIT,
            "measured": times["commit() with"] / times["commit() without"],
            "in one phase": times["commit() one phase"] / times["commit() without"],
            "the least": times["commit() least"] / times["commit() without"],
            "the whole transaction": times["transaction with"] / times["transaction without"],
        }
    return {"workloads": workloads, "commits": commits, "required": required}


def _ratio(
    modes: Mapping[str, Sequence[Mapping[str, float]]], name: str, other: str, mode: str = "row slots"
) -> float:
    """The median of the ratios of runs that were made one after the other."""
    pairs = zip(modes[mode], modes[other], strict=True)
    return median(ours[name] / max(theirs[name], 1e-9) for ours, theirs in pairs)


def _table(result: Any) -> str:
    lines = [
        "reads/writes  cache           hit ratio  operations/s  to no cache  processor us  to no cache"
        "  of these application  PostgreSQL  Redis  commit() ms"
    ]
    for workload in result["workloads"]:
        base = workload["modes"]["no cache"]
        for mode, row in workload["modes"].items():
            lines.append(
                f"{workload['reads']}/{workload['writes']:<9}  {mode:<14}  {row['hits']:9.3f}  "
                f"{row['operations']:12.0f}  {row['operations'] / base['operations']:10.2f}x  "
                f"{row['processor']:12.0f}  {base['processor'] / row['processor']:10.2f}x  "
                f"{row['application']:20.0f}  {row['database']:10.0f}  {row['cache']:5.0f}  "
                f"{row['commit()'] / 1000:11.2f}"
            )
    for disk, times in result["commits"].items():
        lines += ["", f"On {disk}:"]
        for part, words in _PARTS.items():
            ours, phase, least, theirs = (times[f"{part} {kind}"] for kind in _KINDS)
            lines.append(
                f"{words}: {ours:.0f} us with the library ({phase:.0f} in one phase, {least:.0f} the least), "
                f"{theirs:.0f} us without: {ours / theirs:.2f}x ({phase / theirs:.2f}x, {least / theirs:.2f}x)"
            )
    lines.append("")
    for name, row in result["required"].items():
        further = "".join(f", {name} {row[name]:.2f}" for name in row if name not in ("required", "measured"))
        lines.append(f"{name}: required {row['required']:.2f}, measured {row['measured']:.2f}{further}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
