"""A changed aggregate invalidates what depends on the parent's row, in the same transaction, whoever writes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, Integer, Select, delete, insert, literal, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from querycache import QueryCache
from querycache.textual import read_text
from tests.denormalize import models

Open = Callable[..., Session]


class Forum:
    """Statements over the parents, asked through the cache and of the database."""

    def __init__(self, strategy: str, opened: Open, engine: Engine) -> None:
        self.strategy = strategy
        self.m: Any = models.counters(strategy)
        m = self.m
        with opened(m) as session:
            session.add_all([m.Forum(id=1), m.Forum(id=2)])
            session.flush()
            session.add_all([m.Thread(id=n, forum_id=1 + n % 2) for n in (1, 2, 3)])
            session.flush()
            session.add_all([m.Comment(id=n, thread_id=1 + n % 2, score=n) for n in range(1, 7)])
            session.commit()
        self.cache = QueryCache("memory://")
        self.sessions = sessionmaker(engine)
        self.cache.attach(self.sessions)
        table = m.Thread.__table__
        self.statements: dict[str, Select[Any] | Any] = {
            "columns": select(m.Thread.id, m.Thread.comment_count, m.Thread.score_sum).order_by(m.Thread.id),
            "one by its key": select(m.Thread.id, m.Thread.score_sum).where(m.Thread.id == 1),
            "beside another comment": select(m.Thread.comment_count)
            .join(m.Thread.comments)
            .where(m.Comment.id == 6),
            "core": select(table.c.id, table.c.comment_count).where(table.c.id.in_([1, 2])),
            "text": text(f"SELECT id, comment_count FROM {table.name} ORDER BY id").columns(id=Integer),
        }
        if strategy in models.ANY_PATH:
            self.statements["the parent's parent"] = select(m.Forum.id, m.Forum.score_sum).order_by(
                m.Forum.id
            )

    def ask(self, name: str, session: Session) -> tuple[list[Any], list[str]]:
        """The answer and what the cache did for it."""
        statement = self.statements[name].execution_options(cache_key=name)
        with self.cache.recording() as events:
            answer = [tuple(row) for row in session.execute(statement)]
        return answer, [each.outcome for each in events]

    def told(self, name: str, session: Session) -> list[Any]:
        """The answer of the database."""
        return [tuple(row) for row in session.execute(self.statements[name])]

    def object_counts(self) -> dict[int, Any]:
        with self.sessions() as session:
            threads = select(self.m.Thread).execution_options(cache_key="objects")
            return {
                thread.id: (thread.comment_count, thread.score_sum) for thread in session.scalars(threads)
            }


WRITES: dict[str, Callable[[Session, Any], Any]] = {
    "insert": lambda s, m: s.add(m.Comment(thread_id=1, score=10)),
    "change": lambda s, m: setattr(s.get_one(m.Comment, 2), "score", 50),
    "move": lambda s, m: setattr(s.get_one(m.Comment, 2), "thread", s.get_one(m.Thread, 2)),
    "delete": lambda s, m: s.delete(s.get_one(m.Comment, 2)),
    "bulk update": lambda s, m: s.execute(update(m.Comment).where(m.Comment.score > 1).values(score=7)),
    "bulk delete": lambda s, m: s.execute(delete(m.Comment).where(m.Comment.id < 4)),
}


@pytest.fixture(params=models.STRATEGIES)
def forum(request: pytest.FixtureRequest, opened: Open, engine: Engine) -> Iterator[Forum]:
    forum = Forum(request.param, opened, engine)
    yield forum
    forum.cache.detach(forum.sessions)


def write(forum: Forum, session: Session, how: str) -> None:
    if forum.strategy == "memory":
        session.info["kept"] = session.scalars(select(forum.m.Thread)).all()
    WRITES[how](session, forum.m)


@pytest.mark.parametrize("how", WRITES)
def test_a_cached_select_of_the_parent_is_right_after_the_commit(forum: Forum, how: str) -> None:
    before = forum.object_counts()
    with forum.sessions() as session:
        for name in forum.statements:
            forum.ask(name, session)
            assert forum.ask(name, session)[1] == ["hit"], name
    with forum.sessions() as session:
        write(forum, session, how)
        session.flush()
        for name in forum.statements:
            assert forum.ask(name, session)[0] == forum.told(name, session), f"{name}, in the transaction"
        with forum.sessions() as other:
            told = {name: forum.told(name, other) for name in forum.statements}
            if other.get_bind().dialect.name != "sqlite":
                assert {name: forum.ask(name, other)[0] for name in forum.statements} == told
        session.commit()
    with forum.sessions() as session:
        for name in forum.statements:
            answer, outcomes = forum.ask(name, session)
            assert answer == forum.told(name, session), name
            assert outcomes[-1] == "fill", name
        forum.m.check(session)
    assert forum.object_counts() != before


@pytest.mark.parametrize("how", WRITES)
def test_a_rollback_leaves_the_answers(forum: Forum, how: str) -> None:
    with forum.sessions() as session:
        for name in forum.statements:
            forum.ask(name, session)
    with forum.sessions() as session:
        write(forum, session, how)
        session.flush()
        session.rollback()
    with forum.sessions() as session:
        for name in forum.statements:
            assert forum.ask(name, session) == (forum.told(name, session), ["hit"]), name


@pytest.mark.parametrize("words", ["core", "text"])
def test_writers_past_the_session_reach_the_answers_of_triggers(
    opened: Open, engine: Engine, words: str
) -> None:
    forum = Forum("trigger", opened, engine)
    table = forum.m.Comment.__table__
    with forum.sessions() as session:
        for name in forum.statements:
            forum.ask(name, session)
    forum.cache.attach(engine)
    false = "false" if engine.dialect.name == "postgresql" else "0"
    statement = (
        insert(table).values(thread_id=1, score=3)
        if words == "core"
        else text(f"INSERT INTO {table.name} (thread_id, score, deleted) VALUES (1, 3, {false})")
    )
    with engine.begin() as connection:
        connection.execute(statement)
    with forum.sessions() as session:
        for name in forum.statements:
            assert forum.ask(name, session)[0] == forum.told(name, session), name
    forum.cache.detach(engine).detach(forum.sessions)


def test_answers_over_another_parent_survive_where_the_unit_of_work_writes_the_row(forum: Forum) -> None:
    with forum.sessions() as session:
        forum.ask("one by its key", session)
    with forum.sessions() as session:
        held = session.scalars(select(forum.m.Thread)).all()
        session.add(forum.m.Comment(thread=next(thread for thread in held if thread.id == 3), score=1))
        session.commit()
    with forum.sessions() as session:
        outcomes = forum.ask("one by its key", session)[1]
    assert (outcomes == ["hit"]) is (forum.strategy in ("flush", "memory"))


def test_a_new_child_is_noticed_without_a_parser_of_text(
    forum: Forum, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its UPDATE may go to the driver as text: the parent's answers are stale then, and no others."""
    monkeypatch.setitem(sys.modules, "sqlglot", None)
    read_text.cache_clear()
    unconcerned = select(literal(1)).execution_options(cache_key="unconcerned")
    with forum.sessions() as session:
        for _ in range(2):
            session.execute(unconcerned).all()
            forum.ask("one by its key", session)
    with forum.sessions.begin() as session:
        write(forum, session, "insert")
    with forum.sessions() as session, forum.cache.recording() as events:
        session.execute(unconcerned).all()
        assert forum.ask("one by its key", session)[0] == forum.told("one by its key", session)
    assert events[0].outcome == "hit"
    read_text.cache_clear()
