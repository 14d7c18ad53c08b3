"""Any sequence of operations leaves every column what a recount says, whatever the strategy.

Hypothesis draws the operations, over a model with three levels, conditions and NULL measures; after each commit (and each
rollback) the oracle reads all rows and computes in Python.
"""

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, create_engine, delete, event, select, update
from sqlalchemy.orm import Session

from tests.denormalize import models

SCORES = st.one_of(st.none(), st.integers(-3, 9))
THREADS = st.integers(1, 4)
MESSAGES = st.sampled_from([None, "one", "one two", "one two three four"])
PICK = st.integers(0, 1_000)


def machine(strategy: str, engine: Engine) -> type[RuleBasedStateMachine]:
    m: Any = models.forum(strategy)

    class Operations(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            with engine.begin() as connection:
                for table in reversed(m.Base.metadata.sorted_tables):
                    connection.exec_driver_sql(f"DELETE FROM {table.name}")
            self.session = Session(engine)
            self.session.add_all([m.Forum(id=1), m.Forum(id=2), m.User(id=1), m.User(id=2)])
            self.session.add_all([m.Thread(id=n, forum_id=1 + n % 2) for n in range(1, 5)])
            self.session.commit()
            # The identity map is weak, and objects that refer to each other go when the collector comes around: what is in
            # the session must depend on the operations alone.
            self.kept = [self.session.scalars(select(each)).all() for each in (m.Forum, m.User, m.Thread)]
            self.settled = True

        def comment(self, pick: int) -> Any:
            found = self.session.scalars(select(m.Comment).order_by(m.Comment.id)).all()
            return found[pick % len(found)] if found else None

        @rule(thread=THREADS, score=SCORES, message=MESSAGES, deleted=st.booleans(), by_key=st.booleans())
        def add(self, thread: int, score: Any, message: Any, deleted: bool, by_key: bool) -> None:
            values = {"score": score, "message": message, "deleted": deleted, "author_id": 1}
            if by_key:
                self.session.add(m.Comment(thread_id=thread, **values))
            else:
                self.session.get_one(m.Thread, thread).comments.append(m.Comment(**values))
            self.settled = False

        @rule(pick=PICK, score=SCORES, message=MESSAGES)
        def change(self, pick: int, score: Any, message: Any) -> None:
            if (comment := self.comment(pick)) is not None:
                comment.score, comment.message = score, message
                self.settled = False

        @rule(pick=PICK)
        def hide_or_show(self, pick: int) -> None:
            if (comment := self.comment(pick)) is not None:
                comment.deleted = not comment.deleted
                self.settled = False

        @rule(
            pick=PICK,
            thread=st.one_of(st.none(), THREADS),
            how=st.sampled_from(["object", "key", "collection"]),
        )
        def move(self, pick: int, thread: int | None, how: str) -> None:
            if (comment := self.comment(pick)) is None:
                return
            target = None if thread is None else self.session.get_one(m.Thread, thread)
            if how == "key":
                # The attribute that was loaded would win over the key, were it changed too; it is not.
                comment.thread_id = thread
                self.session.flush()
            elif how == "collection" and target is not None:
                target.comments.append(comment)
            else:
                comment.thread = target
            self.settled = False

        @rule(pick=PICK, author=st.integers(1, 2))
        def hand_over(self, pick: int, author: int) -> None:
            if (comment := self.comment(pick)) is not None:
                comment.author = self.session.get_one(m.User, author)
                self.settled = False

        @rule(pick=PICK)
        def remove(self, pick: int) -> None:
            if (comment := self.comment(pick)) is not None:
                self.session.delete(comment)
                self.settled = False

        @rule(thread=THREADS, forum=st.integers(1, 2))
        def move_thread(self, thread: int, forum: int) -> None:
            self.session.get_one(m.Thread, thread).forum_id = forum
            self.settled = False

        @rule(thread=THREADS)
        def close_thread(self, thread: int) -> None:
            found = self.session.get_one(m.Thread, thread)
            found.open = not found.open
            self.settled = False

        @rule(thread=THREADS, score=SCORES)
        def bulk_update(self, thread: int, score: Any) -> None:
            self.session.execute(update(m.Comment).where(m.Comment.thread_id == thread).values(score=score))
            self.settled = False

        @rule(one=THREADS, other=THREADS)
        def bulk_move(self, one: int, other: int) -> None:
            self.session.execute(update(m.Comment).where(m.Comment.thread_id == one).values(thread_id=other))
            self.settled = False

        @rule(score=st.integers(-3, 9))
        def bulk_delete(self, score: int) -> None:
            self.session.execute(delete(m.Comment).where(m.Comment.score == score))
            self.settled = False

        @rule()
        def flush(self) -> None:
            self.session.flush()

        @rule()
        def expire(self) -> None:
            self.session.flush()
            self.session.expire_all()

        @rule(thread=THREADS, score=SCORES, pick=PICK)
        def in_a_savepoint_taken_back(self, thread: int, score: Any, pick: int) -> None:
            with self.session.begin_nested() as savepoint:
                self.add(thread, score, "lost", False, True)
                self.move(pick, thread, "object")
                self.session.flush()
                savepoint.rollback()

        @rule()
        def commit(self) -> None:
            self.session.commit()
            self.settled = True

        @precondition(lambda self: not self.settled)
        @rule()
        def rollback(self) -> None:
            self.session.rollback()
            self.settled = True

        @invariant()
        def right(self) -> None:
            if self.settled:
                m.check(self.session)
                for thread in self.session.scalars(select(m.Thread)):
                    row = self.session.connection().execute(
                        select(m.Thread.__table__.c.comment_count).where(m.Thread.__table__.c.id == thread.id)
                    )
                    assert thread.comment_count == row.scalar_one(), "the object shows what the row holds"

        def teardown(self) -> None:
            try:
                self.session.commit()
                m.check(self.session)
            finally:
                self.session.close()

    return Operations


@pytest.mark.parametrize("strategy", models.STRATEGIES)
def test_any_sequence_of_operations(strategy: str) -> None:
    engine = create_engine("sqlite://")

    @event.listens_for(engine, "connect")
    def enforce(connection: Any, record: object) -> None:
        connection.execute("PRAGMA foreign_keys = ON")
        # The driver would open no transaction before a SAVEPOINT.
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    models.forum(strategy).Base.metadata.create_all(engine)
    run_state_machine_as_test(
        machine(strategy, engine),
        settings=settings(
            max_examples=settings().max_examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
