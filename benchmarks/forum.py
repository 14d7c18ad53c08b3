"""The data that is read in the benchmarks, and the five kinds of statement that read it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine, Executable, ForeignKey, String, func, insert, inspect, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
)

__all__ = ["CASES", "MOST_ROWS", "Base", "Case", "fill", "plain"]

MOST_ROWS = 1000
_COMMENTS_EACH = 3
_VOTES = 50_000


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "bench_authors"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(60))
    email: Mapped[str] = mapped_column(String(120))
    joined_at: Mapped[datetime]


class Article(Base):
    """The entity of eight columns."""

    __tablename__ = "bench_articles"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
    title: Mapped[str] = mapped_column(String(120))
    body: Mapped[str] = mapped_column(String(400))
    score: Mapped[int]
    rating: Mapped[float]
    published: Mapped[bool]
    created_at: Mapped[datetime]
    author: Mapped[Author] = relationship()
    comments: Mapped[list[Comment]] = relationship(order_by="Comment.id")


class Comment(Base):
    __tablename__ = "bench_comments"

    id: Mapped[int] = mapped_column(primary_key=True)
    article_id: Mapped[int] = mapped_column(ForeignKey(Article.id), index=True)
    body: Mapped[str] = mapped_column(String(200))
    written_at: Mapped[datetime]


class Vote(Base):
    __tablename__ = "bench_votes"

    id: Mapped[int] = mapped_column(primary_key=True)
    article_id: Mapped[int]
    value: Mapped[int]


@dataclass(frozen=True)
class Case:
    """A kind of statement.

    Attributes:
        name: what the table calls it.
        statement: makes the statement that gives so many rows.
        entities: True where a row is one object.
    """

    name: str
    statement: Callable[[int], Executable]
    entities: bool = True

    def fetch(self, session: Session, statement: Executable) -> Sequence[Any]:
        """All rows, as an application fetches them."""
        if self.entities:
            return session.scalars(statement).all()
        return session.execute(statement).all()


CASES = (
    Case("plain entity", lambda rows: select(Article).order_by(Article.id).limit(rows)),
    Case(
        "joined author",
        lambda rows: select(Article).options(joinedload(Article.author)).order_by(Article.id).limit(rows),
    ),
    Case(
        "selectin comments",
        lambda rows: select(Article).options(selectinload(Article.comments)).order_by(Article.id).limit(rows),
    ),
    Case(
        "columns",
        lambda rows: (
            select(Article.id, Article.title, Article.score, Article.created_at)
            .order_by(Article.id)
            .limit(rows)
        ),
        entities=False,
    ),
    Case(
        "aggregate",
        lambda rows: (
            select((Vote.article_id % rows).label("group"), func.count(Vote.id), func.sum(Vote.value))
            .group_by("group")
            .order_by("group")
        ),
        entities=False,
    ),
)


def plain(rows: Sequence[Any]) -> list[Any]:
    """The values in rows or objects, with what was loaded eagerly, to compare answers."""
    if not rows or not isinstance(rows[0], Base):
        return [tuple(row) for row in rows]
    return [_values(each) for each in rows]


def _values(entity: Base) -> dict[str, Any]:
    values = dict(inspect(entity).dict)
    for name, value in values.items():
        if isinstance(value, Base):
            values[name] = _values(value)
        elif isinstance(value, list):
            values[name] = [_values(each) for each in value]
    del values["_sa_instance_state"]
    return values


def fill(engine: Engine) -> None:
    """Make the tables and their content, the same every time; tables that are there are made anew."""
    chance = random.Random(1)
    start = datetime(2024, 1, 1)
    authors = [
        {"name": f"author {n}", "email": f"author{n}@example.org", "joined_at": start - timedelta(n)}
        for n in range(100)
    ]
    articles = [
        {
            "author_id": 1 + number % len(authors),
            "title": f"The title of article {number}",
            "body": "Some sentences that say something about it. " * chance.randint(2, 8),
            "score": chance.randint(0, 1000),
            "rating": chance.random(),
            "published": chance.random() < 0.9,
            "created_at": start + timedelta(minutes=number, microseconds=chance.randint(0, 999_999)),
        }
        for number in range(MOST_ROWS)
    ]
    comments = [
        {
            "article_id": 1 + number % MOST_ROWS,
            "body": "A remark of usual length. " * chance.randint(1, 4),
            "written_at": start + timedelta(days=1, minutes=number),
        }
        for number in range(_COMMENTS_EACH * MOST_ROWS)
    ]
    votes = [
        {"article_id": chance.randint(1, MOST_ROWS), "value": chance.randint(-1, 1)} for _ in range(_VOTES)
    ]
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for entity, content in ((Author, authors), (Article, articles), (Comment, comments), (Vote, votes)):
            connection.execute(insert(entity), content)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
