"""A forum and those who visit it: what they read and write, and how often what."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from sqlalchemy import BigInteger, Engine, ForeignKey, Integer, String, bindparam, func, insert, select, text
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
)

__all__ = ["Base", "Size", "Visitor", "fill"]

BOARDS = 20
POSTS_PER_THREAD = POSTS_PER_MEMBER = 100
ZIPF = 1.1
PAGE = 20


class Base(DeclarativeBase):
    pass


class Board(Base):
    __tablename__ = "forum_boards"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))


class Member(Base):
    __tablename__ = "forum_members"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    signature: Mapped[str] = mapped_column(String(200))


class Thread(Base):
    __tablename__ = "forum_threads"

    id: Mapped[int] = mapped_column(primary_key=True)
    board_id: Mapped[int] = mapped_column(ForeignKey("forum_boards.id"), index=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("forum_members.id"), index=True)
    title: Mapped[str] = mapped_column(String(200))
    replies: Mapped[int] = mapped_column(default=0)


class Post(Base):
    __tablename__ = "forum_posts"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    thread_id: Mapped[int] = mapped_column(ForeignKey("forum_threads.id"), index=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("forum_members.id"), index=True)
    body: Mapped[str] = mapped_column(String(2000))
    author: Mapped[Member] = relationship()


class Popularity:
    """Numbers from 1 to `size`, the n-th most popular with a probability of 1 / n ** ZIPF."""

    def __init__(self, size: int, random: Random) -> None:
        self._sums = list(itertools.accumulate(1 / rank**ZIPF for rank in range(1, size + 1)))
        self._random = random

    def __call__(self) -> int:
        return bisect.bisect_left(self._sums, self._random.random() * self._sums[-1]) + 1


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a forum, by its posts."""

    posts: int

    @property
    def threads(self) -> int:
        return self.posts // POSTS_PER_THREAD

    @property
    def members(self) -> int:
        return self.posts // POSTS_PER_MEMBER


def fill(engine: Engine, size: Size) -> None:
    """A forum with some history."""
    random = Random(1)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    member, thread = Popularity(size.members, random), Popularity(size.threads, random)
    with engine.begin() as connection:
        connection.execute(insert(Board), [{"name": f"Board {n}"} for n in range(BOARDS)])
        members = [{"name": f"Member {n}", "signature": "All the best"} for n in range(size.members)]
        connection.execute(insert(Member), members)
        threads = [
            {"board_id": n % BOARDS + 1, "author_id": member(), "title": f"Thread {n}", "replies": 0}
            for n in range(size.threads)
        ]
        connection.execute(insert(Thread), threads)
        posts = (
            {"thread_id": thread(), "author_id": member(), "body": "What I think. " * 20}
            for _ in itertools.count()
        )
        for _ in range(0, size.posts, 10_000):
            connection.execute(insert(Post), list(itertools.islice(posts, 10_000)))
    # what autovacuum does after a while, and would do in the middle of the first rounds otherwise
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("VACUUM ANALYZE"))


def statements() -> dict[str, Any]:
    """What is read, by name; built once, as one does where it matters."""
    number = bindparam("number", type_=Integer)
    writers = select(Post.author_id, func.count().label("posts")).where(Post.thread_id == number)
    activity = select(func.count(), func.count(Post.thread_id.distinct()), func.avg(func.length(Post.body)))
    posts = select(Post).order_by(Post.id.desc()).limit(PAGE)
    return {
        "thread": select(Thread).where(Thread.id == number),
        "posts": posts.where(Post.thread_id == number).options(selectinload(Post.author)),
        "writers": writers.group_by(Post.author_id).order_by(func.count().desc(), Post.author_id).limit(5),
        "member": select(Member).where(Member.id == number),
        "activity": activity.where(Post.author_id == number),
        "board": select(Thread).where(Thread.board_id == number).order_by(Thread.id.desc()).limit(PAGE),
        "posts of member": posts.where(Post.author_id == number),
    }


class Visitor:
    """One process of the forum, doing one thing after the other.

    Attributes:
        committing: seconds that ``commit()`` has taken in :meth:`write` so far.
    """

    def __init__(self, sessions: sessionmaker[Session], size: Size, cached: bool, seed: str) -> None:
        self.random = Random(seed)
        self.committing = 0.0
        self.size = size
        self.sessions = sessions
        options: dict[str, Any] = {"cache_key": True} if cached else {}
        self.statements = {
            name: statement.execution_options(**options) for name, statement in statements().items()
        }
        self.member = Popularity(size.members, self.random)
        self.thread = Popularity(size.threads, self.random)
        self.board = Popularity(BOARDS, self.random)
        self.reads: Sequence[Callable[[Session], object]] = (
            [self.show_thread] * 5
            + [self.show_member] * 3
            + [
                self.show_board,
                self.show_posts_of_member,
            ]
        )
        self.writes: Sequence[Callable[[Session], object]] = (
            [self.reply] * 12
            + [self.edit] * 4
            + [
                self.change_profile,
                self.change_profile,
                self.change_profile,
                self.open_thread,
            ]
        )

    def warm_up(self, number: int, of: int) -> None:
        """Read the share of a process in everything, once."""
        popular = self.thread, self.member, self.board
        for each in range(number + 1, max(self.size.threads, self.size.members) + 1, of):
            self.thread = self.member = self.board = lambda each=each: each  # type: ignore[assignment]
            for read in dict.fromkeys(self.reads):
                with self.sessions() as session:
                    read(session)
        self.thread, self.member, self.board = popular

    def read(self) -> None:
        with self.sessions() as session:
            self.random.choice(self.reads)(session)

    def write(self) -> None:
        with self.sessions() as session:
            self.random.choice(self.writes)(session)
            begin = time.perf_counter()
            session.commit()
            self.committing += time.perf_counter() - begin

    def show_thread(self, session: Session) -> None:
        """Its title, its last page, and who writes most in it."""
        given = {"number": self.thread()}
        session.scalars(self.statements["thread"], given).all()
        session.scalars(self.statements["posts"], given).all()
        session.execute(self.statements["writers"], given).all()

    def show_member(self, session: Session) -> None:
        given = {"number": self.member()}
        session.scalars(self.statements["member"], given).all()
        session.execute(self.statements["activity"], given).all()

    def show_board(self, session: Session) -> None:
        session.scalars(self.statements["board"], {"number": self.board()}).all()

    def show_posts_of_member(self, session: Session) -> None:
        session.scalars(self.statements["posts of member"], {"number": self.member()}).all()

    def reply(self, session: Session) -> None:
        number = self.thread()
        session.add(Post(thread_id=number, author_id=self.member(), body="I agree. " * 20))
        session.get_one(Thread, number).replies += 1

    def edit(self, session: Session) -> None:
        post = session.get_one(Post, self.random.randrange(self.size.posts) + 1)
        post.body = f"{post.body[:1000]} (edited)"

    def change_profile(self, session: Session) -> None:
        session.get_one(Member, self.member()).signature = f"Yours {self.random.random()}"

    def open_thread(self, session: Session) -> None:
        session.add(Thread(board_id=self.board(), author_id=self.member(), title="A question", replies=0))
