"""What an application does with a Result: the same with a hit as with the database, the errors included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from sqlalchemy import Engine, Result, func, select, text
from sqlalchemy.orm import Session, joinedload, selectinload, sessionmaker

from querycache import QueryCache
from tests.read_path.models import Comment, Post, Tag, User
from tests.read_path.observe import Observer, outcome_of, traffic

Sessions = Callable[[Engine], sessionmaker[Session]]

STATEMENTS: dict[str, Any] = {
    "entities": select(User).order_by(User.id),
    "one entity": select(User).where(User.id == 2),
    "nothing": select(User).where(User.id < 0),
    "columns": select(User.id, User.name, User.age).order_by(User.id),
    "one value": select(func.count(User.id)),
    "one null": select(User.age).where(User.name == "çem"),
    "same names": select(User.id, Post.id).join(User.posts).order_by(Post.id),
    "repeated rows": select(User.age, User.team_id).where(User.age == 25),
    "mixed": select(User, Post.title).join(User.posts).order_by(Post.id),
    "repeated entities": select(User).join(User.posts).order_by(Post.id),
    "joined collections": select(User).options(joinedload(User.posts)).order_by(User.id),
    "joined collection of one": select(User).options(joinedload(User.posts)).where(User.id == 1),
    "two joined collections": select(User, Post)
    .join(User.posts)
    .options(joinedload(User.comments), joinedload(Post.tags))
    .order_by(Post.id),
    "selectin": select(Post).options(selectinload(Post.comments)).order_by(Post.id),
    "core": select(Comment.__table__).order_by(Comment.__table__.c.id),
    "text": text("SELECT id, name FROM tag ORDER BY id").columns(Tag.id, Tag.name),
}


def fetch_by_and_by(result: Result[Any]) -> Any:
    return result.fetchone(), result.fetchmany(2), result.fetchmany(), result.fetchall(), result.fetchone()


def after_close(result: Result[Any]) -> Any:
    result.close()
    return result.closed, outcome_of(result.all), outcome_of(result.fetchone), list(result.keys())


def after_all(result: Result[Any]) -> Any:
    return result.all(), result.all(), outcome_of(result.one), outcome_of(result.first)


def first_then_rest(result: Result[Any]) -> Any:
    return result.first(), result.closed, outcome_of(result.all)


def frozen(result: Result[Any]) -> Any:
    again = result.freeze()
    return again().all(), outcome_of(lambda: again().scalars().all()), list(again().keys())


def rows_in_every_way(result: Result[Any]) -> Any:
    return [
        (
            row,
            row._fields,
            dict(row._mapping),
            row[0],
            row[-1],
            len(row),
            hash_of(row),
            row._asdict(),
            tuple(row),
        )
        for row in result.unique()
    ]


def hash_of(row: Any) -> Any:
    return outcome_of(lambda: hash(row) is not None)


def mappings_in_every_way(result: Result[Any]) -> Any:
    mappings = result.mappings()
    return list(mappings.keys()), mappings.fetchone(), mappings.fetchmany(1), mappings.all()


def missing_names(result: Result[Any]) -> Any:
    row = result.unique().all()[0]
    return [
        outcome_of(lambda: row.nothing),
        outcome_of(lambda: row._mapping["nothing"]),
        outcome_of(lambda: row[99]),
    ]


def in_a_block(result: Result[Any]) -> Any:
    with result as rows:
        first = outcome_of(lambda: next(iter(rows)))
    return first, outcome_of(lambda: next(iter(rows)))


CONSUMERS: dict[str, Callable[[Result[Any]], Any]] = {
    "all": lambda result: result.all(),
    "iterate": lambda result: list(result),
    "keys": lambda result: (list(result.keys()), result.closed),
    "unique": lambda result: result.unique().all(),
    "unique by": lambda result: result.unique(lambda row: str(row[0])).all(),
    "scalars": lambda result: result.scalars().all(),
    "unique scalars": lambda result: result.unique().scalars().all(),
    "scalars unique": lambda result: result.scalars().unique().all(),
    "scalars of the second": lambda result: result.scalars(1).all(),
    "one": lambda result: result.one(),
    "unique one": lambda result: result.unique().one(),
    "one or none": lambda result: result.one_or_none(),
    "scalar": lambda result: result.scalar(),
    "scalar one": lambda result: result.scalar_one(),
    "scalar one or none": lambda result: result.scalar_one_or_none(),
    "first": first_then_rest,
    "scalars first": lambda result: result.scalars().first(),
    "mappings": mappings_in_every_way,
    "unique mappings": lambda result: result.unique().mappings().all(),
    "mappings one": lambda result: result.mappings().one(),
    "partitions": lambda result: list(result.partitions(2)),
    "unique partitions": lambda result: list(result.unique().partitions(3)),
    "scalar partitions": lambda result: list(result.scalars().partitions(2)),
    "yield_per": lambda result: list(result.yield_per(2)),
    "columns": lambda result: result.columns(0).all(),
    "columns by name": lambda result: result.columns("id").all(),
    "fetch by and by": fetch_by_and_by,
    "after close": after_close,
    "after all": after_all,
    "frozen": frozen,
    "rows": rows_in_every_way,
    "missing names": missing_names,
    "in a block": in_a_block,
    "merged": lambda result: result.merge(result).all(),
}


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_result(statement: Any, sqlite_forum: Engine, cache: QueryCache, sessions: Sessions) -> None:
    maker = sessions(sqlite_forum)

    def outcomes(options: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, consume in CONSUMERS.items():
            with maker() as db:
                result = db.execute(statement, execution_options=options)
                found[name] = Observer().describe(outcome_of(lambda: consume(result)))  # noqa: B023
        return found

    expected = outcomes({})
    assert outcomes({"cache_key": True}) == expected
    with traffic(sqlite_forum) as seen:
        assert outcomes({"cache_key": True}) == expected
    assert seen.nothing
    assert cache.stats().fills == 1


def test_a_result_tells_its_statement_apart(
    sqlite_forum: Engine, cache: QueryCache, sessions: Sessions
) -> None:
    """Two results read in turns, and one left unread: they do not disturb each other."""
    maker = sessions(sqlite_forum)
    users = select(User).order_by(User.id).execution_options(cache_key=True)
    posts = select(Post).order_by(Post.id).execution_options(cache_key=True)
    for _ in range(2):
        with maker() as db:
            first, second = db.scalars(users), db.scalars(posts)
            db.scalars(users)
            assert [(each.id, other.id) for each, other in zip(first, second, strict=False)] == [
                (1, 1),
                (2, 2),
                (3, 3),
                (4, 4),
            ]
            assert [each.id for each in second] == [5]
    assert cache.stats().hits == 4
