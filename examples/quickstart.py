"""A forum, five of its queries, and what a cache does for them. Run it: ``python examples/quickstart.py``.

Makes a forum of 50 000 comments, asks each query twice (the second answer comes from the cache), times the
database against the cache, and ends with a write and the reads after it.

It needs nothing but querycache: an SQLite file in a temporary directory, and a cache in this process.
``QUERYCACHE_URL`` names another cache (``redis://localhost:6379/0``), ``QUERYCACHE_DATABASE`` another
database, as an SQLAlchemy URL; there it makes tables called ``quickstart_…``, and drops them at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, Executable, ForeignKey, String, create_engine, event, func, insert, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
)

from querycache import QueryCache, QueryCacheError

# --- The forum ------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Member(Base):
    __tablename__ = "quickstart_members"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(60))
    email: Mapped[str] = mapped_column(String(120))
    joined_at: Mapped[datetime]


class Thread(Base):
    __tablename__ = "quickstart_threads"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(120))
    comments: Mapped[list[Comment]] = relationship(order_by="Comment.id", back_populates="thread")


class Comment(Base):
    __tablename__ = "quickstart_comments"

    id: Mapped[int] = mapped_column(primary_key=True)
    thread_id: Mapped[int] = mapped_column(ForeignKey(Thread.id), index=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Member.id), index=True)
    body: Mapped[str] = mapped_column(String(400))
    score: Mapped[int]
    pinned: Mapped[bool]
    written_at: Mapped[datetime] = mapped_column(index=True)
    edited_at: Mapped[datetime | None]
    thread: Mapped[Thread] = relationship(back_populates="comments")
    author: Mapped[Member] = relationship()


# --- Five of its queries --------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """A query of the forum: its statement, and what the page that shows the answer reads from each row."""

    name: str
    statement: Executable
    shown: Callable[[Any], object]
    of_one_entity: bool = True

    @cached_property
    def cached_statement(self) -> Executable:
        """The same, but the cache may answer: this is all that is different."""
        return self.statement.execution_options(cache_key=self.name)

    def answer(self, session: Session, *, cached: bool) -> list[object]:
        """What the page shows."""
        statement = self.cached_statement if cached else self.statement
        rows = session.scalars(statement) if self.of_one_entity else session.execute(statement)
        return [self.shown(row) for row in rows]


def thread_page(name: str, thread_id: int) -> Query:
    return Query(
        name,
        select(Thread).where(Thread.id == thread_id).options(selectinload(Thread.comments)),
        lambda thread: (thread.title, [(comment.body, comment.score) for comment in thread.comments]),
    )


def queries(thread_id: int) -> list[Query]:
    return [
        Query(
            "a member, by primary key",
            select(Member).where(Member.id == 7),
            lambda member: (member.name, member.email, member.joined_at),
        ),
        Query(
            "the newest 50 comments, authors joined",
            select(Comment).options(joinedload(Comment.author)).order_by(Comment.written_at.desc()).limit(50),
            lambda comment: (comment.body, comment.written_at, comment.author.name),
        ),
        thread_page("a thread with its comments, selectinload", thread_id),
        Query(
            "the ten best authors, an aggregate",
            select(Member.name, func.count(Comment.id), func.sum(Comment.score))
            .join(Comment, Comment.author_id == Member.id)
            .group_by(Member.id, Member.name)
            .order_by(func.sum(Comment.score).desc(), Member.id)
            .limit(10),
            tuple,
            of_one_entity=False,
        ),
        Query(
            "200 rows of four columns",
            select(Comment.id, Comment.score, Comment.written_at, Member.name)
            .join(Comment.author)
            .where(Comment.pinned)
            .order_by(Comment.id)
            .limit(200),
            tuple,
            of_one_entity=False,
        ),
    ]


# --- Making the forum -----------------------------------------------------------------------------

_WORDS = ["cache", "query", "session", "commit", "index", "table", "mapper", "column", "loader", "select"]
_WORDS += ["works", "never", "always", "because", "nobody", "slowly", "again", "tomorrow", "please", "thanks"]
_CHUNK = 2_500


def make_forum(engine: Engine, comments: int) -> tuple[int, int]:
    """Fill the database; returns the numbers of members and of threads. The same content every time."""
    chance = random.Random(1)
    members, threads = max(10, comments // 100), max(5, comments // 50)
    start = datetime(2024, 1, 1)

    def words(count: int) -> str:
        return " ".join(chance.choices(_WORDS, k=count))

    def comment(number: int) -> dict[str, object]:
        written = start + timedelta(minutes=7 * number)
        return {
            "thread_id": chance.randint(1, threads),
            # some members write more than others
            "author_id": min(chance.randint(1, members), chance.randint(1, members)),
            "body": words(chance.randint(4, 30)),
            "score": chance.randint(-3, 40),
            "pinned": chance.random() < 0.05,
            "written_at": written,
            "edited_at": written + timedelta(minutes=3) if chance.random() < 0.2 else None,
        }

    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            insert(Member),
            [
                {"name": f"member {n}", "email": f"member{n}@example.org", "joined_at": start - timedelta(n)}
                for n in range(1, members + 1)
            ],
        )
        connection.execute(insert(Thread), [{"title": words(5).capitalize()} for _ in range(threads)])
        with progress("making comments", comments) as advance:
            for first in range(0, comments, _CHUNK):
                last = min(first + _CHUNK, comments)
                connection.execute(insert(Comment), [comment(number) for number in range(first, last)])
                advance(last)
    if engine.dialect.name in ("sqlite", "postgresql"):
        # statistics for the planner: the database is to be at its best
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")
    return members, threads


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal; a line at each quarter where the output goes to a file."""
    live = sys.stderr.isatty()
    quarters = 0

    def advance(done: int) -> None:
        nonlocal quarters
        if live:
            filled = 30 * done // total
            bar = "#" * filled + "." * (30 - filled)
            sys.stderr.write(f"\r  {what} [{bar}] {count(done)} of {count(total)}")
        elif 4 * done // total > quarters:
            quarters = 4 * done // total
            sys.stderr.write(f"  {what}: {count(done)} of {count(total)}\n")
        sys.stderr.flush()

    yield advance
    if live:
        sys.stderr.write("\r\x1b[2K")
        sys.stderr.flush()


# --- Watching and timing --------------------------------------------------------------------------

LEASE = 5.0
"""Seconds after which a writer that was killed is taken for dead. Here a commit takes milliseconds."""


@dataclass
class Seen:
    """What happened while a query was answered: the cache's decision, and the SQL that was emitted."""

    outcome: str
    statements: int
    rows: int


@dataclass
class Measured:
    """One line of the table; times in seconds, medians."""

    query: str
    rows: int
    first: str
    first_statements: int
    again: str
    again_statements: int
    database_time: float
    cache_time: float

    @property
    def ratio(self) -> float:
        return self.database_time / self.cache_time


class Watch:
    """Asks queries with an eye on the cache and on the database."""

    def __init__(self, engine: Engine, cache: QueryCache) -> None:
        self.engine = engine
        self.cache = cache
        self.Session = sessionmaker(engine)
        self.Uncached = sessionmaker(engine)
        self.statements = 0
        event.listen(engine, "before_cursor_execute", self._count)
        cache.attach(self.Session)

    def _count(self, *_: object) -> None:
        self.statements += 1

    def ask(self, query: Query) -> Seen:
        """Ask in a new Session, through the cache, and compare with what the database says."""
        before = self.statements
        with self.cache.recording() as events, self.Session() as session:
            rows = query.answer(session, cached=True)
        seen = Seen(events[0].outcome, self.statements - before, len(rows))
        with self.Uncached() as session:
            if rows != query.answer(session, cached=False):
                raise AssertionError(f"{query.name}: the answer is not what the database says")
        return seen

    def wait_until_ready(self) -> None:
        """A cache server that was just started stores nothing for the length of a lease.

        Until then, writers may be at work whose marks it has lost.
        """
        probe = Query("probe", select(Thread.id).limit(1), str)
        for attempt in range(30):
            with self.cache.recording() as events:
                self.ask(probe)
            if events[-1].outcome == "fill":
                break
            if attempt == 0:
                print("  waiting until the cache server has been up for a while ...", file=sys.stderr)
            time.sleep(LEASE / 10)

    def measure(self, query: Query, runs: int) -> Measured:
        """Ask twice, then time both."""
        first, again = self.ask(query), self.ask(query)
        times: dict[bool, list[float]] = {False: [], True: []}
        arms = list(times)
        gc.disable()
        try:
            # in turns, so that whatever else the machine does falls on both
            for _ in range(runs):
                random.shuffle(arms)
                for cached in arms:
                    times[cached].append(self._time(query, cached))
        finally:
            gc.enable()
        return Measured(
            query.name,
            first.rows,
            first.outcome,
            first.statements,
            again.outcome,
            again.statements,
            statistics.median(times[False]),
            statistics.median(times[True]),
        )

    def _time(self, query: Query, cached: bool) -> float:
        factory = self.Session if cached else self.Uncached
        start = time.perf_counter()
        with factory() as session:
            query.answer(session, cached=cached)
        return time.perf_counter() - start


# --- A write, and the next reads ------------------------------------------------------------------


@dataclass
class Reread:
    """A query asked after the write, and once more."""

    query: str
    next: Seen
    again: Seen


def write_and_read(watch: Watch, asked: Sequence[Query], thread_id: int) -> list[Reread]:
    """Add a comment to a thread, commit, and ask everything again."""
    with watch.Session.begin() as session:
        session.add(
            Comment(
                thread_id=thread_id,
                author_id=7,
                body="First!",
                score=40,
                pinned=False,
                written_at=datetime(2030, 1, 1),
            )
        )
    return [Reread(query.name, watch.ask(query), watch.ask(query)) for query in asked]


# --- Saying it ------------------------------------------------------------------------------------


def count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def describe(engine: Engine) -> str:
    dialect = engine.dialect
    version = ".".join(map(str, dialect.server_version_info or ()))
    if dialect.name == "sqlite" and engine.url.database:
        return f"SQLite {version}, a file of {Path(engine.url.database).stat().st_size / 2**20:.1f} MB"
    return f"{dialect.name} {version} at {engine.url.host}"


def print_table(measured: Sequence[Measured]) -> None:
    print(f"  {'':48}{'first time':14}{'again':14}{'median time':>22}")
    print(
        f"  {'query':42}{'rows':>4}  {'outcome':8}{'SQL':>4}  {'outcome':8}{'SQL':>4}"
        f"{'database':>12}{'cache':>12}{'faster':>10}"
    )
    for line in measured:
        print(
            f"  {line.query:42}{line.rows:>4}  {line.first:8}{line.first_statements:>4}"
            f"  {line.again:8}{line.again_statements:>4}"
            f"{milliseconds(line.database_time):>12}{milliseconds(line.cache_time):>12}{line.ratio:>8.1f} x"
        )
    if any(line.ratio < 1 for line in measured):
        print(
            "\n  Less than 1: SQLite answers in this process, and a small answer is nearer there than on another server.\n"
            "  A database on a server is asked over a connection as well: see the README for PostgreSQL."
        )


def run(engine: Engine, cache: QueryCache, url: str, comments: int, runs: int, as_json: bool) -> None:
    say = (lambda *_: None) if as_json else print
    say("querycache quickstart: a forum, five of its queries, and a cache\n")
    start = time.perf_counter()
    members, threads = make_forum(engine, comments)
    made_in = time.perf_counter() - start
    say(f"  database  {describe(engine)}")
    say(f"  cache     {url}")
    say(
        f"  forum     {count(members)} members, {count(threads)} threads, {count(comments)} comments, "
        f"made in {made_in:.1f} s\n"
    )
    say("What the application adds is an object, a call, and an option on the statements to be cached:\n")
    say(f"    cache = QueryCache({url!r})")
    say("    cache.attach(Session)")
    say('    session.scalars(statement.execution_options(cache_key="front page")).all()\n')
    say(
        "Each query is asked twice, in a new Session each time. Then it is timed: from the database and from\n"
        f"the cache, {runs} times each, in turns.\n"
    )
    watch = Watch(engine, cache)
    thread_id = threads // 2
    asked = queries(thread_id)
    watch.wait_until_ready()
    measured = [watch.measure(query, runs) for query in asked]
    another = thread_page("another thread with its comments", thread_id + 1)
    watch.ask(another)
    after = write_and_read(watch, [*asked, another], thread_id)
    if as_json:
        document = {
            "database": describe(engine),
            "cache": url,
            "comments": comments,
            "queries": [{**asdict(line), "ratio": line.ratio} for line in measured],
            "after_a_write": [asdict(line) for line in after],
        }
        print(json.dumps(document, indent=2))
        return
    print_table(measured)
    print("\nNow somebody writes a comment into the thread above, and commits. Everything is asked again:\n")
    print(f"  {'':48}{'after commit':14}{'again':14}")
    print(f"  {'query':42}{'rows':>4}  {'outcome':8}{'SQL':>4}  {'outcome':8}{'SQL':>4}")
    for line in after:
        print(
            f"  {line.query:42}{line.next.rows:>4}  {line.next.outcome:8}{line.next.statements:>4}"
            f"  {line.again.outcome:8}{line.again.statements:>4}"
        )
    print(
        "\nWhat the comment could have changed was asked of the database once more; what it could not, was not.\n"
        "Every answer on this page was compared with what the database says, and was equal."
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comments", type=int, default=50_000, help="size of the forum (default 50 000)")
    parser.add_argument("--runs", type=int, default=31, help="timed runs of each query (default 31)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    arguments = parser.parse_args()
    if arguments.comments < 100 or arguments.runs < 1:
        parser.error("give at least 100 comments and 1 run")
    url = os.environ.get("QUERYCACHE_URL", "memory://")
    with tempfile.TemporaryDirectory() as directory:
        database = os.environ.get("QUERYCACHE_DATABASE", f"sqlite:///{directory}/forum.db")
        try:
            # a namespace and a time to live of its own: a server that others use too is left as it was
            cache = QueryCache(url, namespace="quickstart", ttl=600, lease=LEASE)
            # answers of an earlier run; and where the server does not answer, this says so
            cache.invalidate(everything=True)
            engine = create_engine(database)
            try:
                run(engine, cache, url, arguments.comments, arguments.runs, arguments.json)
            finally:
                if "QUERYCACHE_DATABASE" in os.environ:
                    Base.metadata.drop_all(engine)
                engine.dispose()
        except (QueryCacheError, SQLAlchemyError, ImportError) as error:
            print(f"quickstart: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
