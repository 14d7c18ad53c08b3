"""One scenario suite over every strategy and every database: after each step the columns are what the rows say."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import SAWarning
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from querycache.denormalize import UncoveredChange
from tests.denormalize import models

Open = Callable[..., Session]


def strategies(*names: str) -> Any:
    return pytest.mark.parametrize("strategy", names or models.STRATEGIES)


def saved(session: Session, m: SimpleNamespace) -> None:
    """Flush, compare; commit, compare."""
    session.flush()
    m.check(session)
    session.commit()
    m.check(session)


@pytest.fixture
def talk(strategy: str, opened: Open) -> SimpleNamespace:
    """Two forums, three threads, two users, five comments."""
    m = models.forum(strategy)
    session = opened(m)
    f1, f2 = m.Forum(id=1), m.Forum(id=2)
    t1, t2, t3 = m.Thread(id=1, forum=f1), m.Thread(id=2, forum=f1), m.Thread(id=3, forum=f2)
    u1, u2 = m.User(id=1), m.User(id=2)
    session.add_all([f1, f2, t1, t2, t3, u1, u2])
    for number, (thread, author, message, score) in enumerate(
        [
            (t1, u1, "one two", 5),
            (t1, u2, "three", -1),
            (t2, u1, "four five six", 3),
            (t2, u2, None, None),
            (t3, u1, "x", 8),
        ]
    ):
        session.add(
            m.Comment(
                id=number + 1,
                thread=thread,
                author=author,
                message=message,
                score=score,
                price=Decimal("1.25"),
            )
        )
    saved(session, m)
    return SimpleNamespace(m=m, session=session)


@strategies()
class TestForum:
    def test_empty_parents_hold_the_empty_value(self, strategy: str, opened: Open) -> None:
        m = models.forum(strategy)
        session = opened(m)
        session.add(m.Thread(id=1))
        saved(session, m)
        assert session.get_one(m.Thread, 1).comment_count == 0

    def test_the_latest_of_equals_is_the_last_inserted(self, talk: SimpleNamespace) -> None:
        """Also where some have no key yet."""
        thread = talk.session.get_one(talk.m.Thread, 1)
        for score in (None, 5, None):
            thread.comments += [talk.m.Comment(message=text, score=score) for text in ("v w", "x y", "z")]
            saved(talk.session, talk.m)

    def test_insert(self, talk: SimpleNamespace) -> None:
        thread = talk.session.get_one(talk.m.Thread, 1)
        thread.comments.append(talk.m.Comment(message="a b c", score=2, price=Decimal("0.10")))
        saved(talk.session, talk.m)
        assert (thread.comment_count, thread.word_count, thread.score_sum) == (3, 6, 6)

    def test_objects_in_the_session_see_the_new_value_after_the_flush(self, talk: SimpleNamespace) -> None:
        thread = talk.session.get_one(talk.m.Thread, 1)
        assert thread.comment_count == 2
        talk.session.add(talk.m.Comment(message="a", thread_id=1))
        talk.session.flush()
        assert thread.comment_count == 3

    def test_insert_by_foreign_key(self, talk: SimpleNamespace) -> None:
        talk.session.add(talk.m.Comment(message="a b", score=1, thread_id=2, author_id=2))
        saved(talk.session, talk.m)

    def test_insert_without_parent(self, talk: SimpleNamespace) -> None:
        talk.session.add(talk.m.Comment(message="a b", score=1))
        saved(talk.session, talk.m)

    def test_new_parent_with_new_children(self, talk: SimpleNamespace) -> None:
        m = talk.m
        talk.session.add(
            m.Thread(id=9, forum_id=2, comments=[m.Comment(message="a", score=1), m.Comment(message="b c")])
        )
        saved(talk.session, talk.m)

    def test_change_of_the_measure(self, talk: SimpleNamespace) -> None:
        talk.session.get_one(talk.m.Comment, 1).message = "one two three four"
        talk.session.get_one(talk.m.Comment, 2).score = 11
        saved(talk.session, talk.m)

    def test_measure_to_null_and_back(self, talk: SimpleNamespace) -> None:
        comment = talk.session.get_one(talk.m.Comment, 1)
        comment.score = None
        saved(talk.session, talk.m)
        comment.score = 4
        saved(talk.session, talk.m)

    def test_change_that_does_not_matter(self, talk: SimpleNamespace) -> None:
        talk.session.get_one(talk.m.Comment, 1).note = "seen"
        saved(talk.session, talk.m)

    def test_condition_true_and_false(self, talk: SimpleNamespace) -> None:
        comment = talk.session.get_one(talk.m.Comment, 1)
        comment.deleted = True
        saved(talk.session, talk.m)
        comment.deleted = False
        saved(talk.session, talk.m)

    def test_condition_and_measure_and_parent_at_once(self, talk: SimpleNamespace) -> None:
        comment = talk.session.get_one(talk.m.Comment, 1)
        comment.deleted, comment.message, comment.score = True, "a b c d e", 99
        comment.thread = talk.session.get_one(talk.m.Thread, 3)
        comment.author = talk.session.get_one(talk.m.User, 2)
        saved(talk.session, talk.m)

    def test_move_by_relationship(self, talk: SimpleNamespace) -> None:
        talk.session.get_one(talk.m.Comment, 1).thread = talk.session.get_one(talk.m.Thread, 2)
        saved(talk.session, talk.m)

    def test_move_from_the_collection_side(self, talk: SimpleNamespace) -> None:
        t1, t2 = talk.session.get_one(talk.m.Thread, 1), talk.session.get_one(talk.m.Thread, 2)
        t2.comments.append(t1.comments[0])
        saved(talk.session, talk.m)

    def test_move_by_foreign_key(self, talk: SimpleNamespace) -> None:
        talk.session.get_one(talk.m.Comment, 1).thread_id = 3
        saved(talk.session, talk.m)

    def test_move_of_an_expired_child(self, talk: SimpleNamespace) -> None:
        comment, thread = talk.session.get_one(talk.m.Comment, 1), talk.session.get_one(talk.m.Thread, 2)
        talk.session.get_one(talk.m.Thread, 1)
        talk.session.expire_all()
        comment.thread = thread
        saved(talk.session, talk.m)

    def test_move_to_no_parent(self, talk: SimpleNamespace) -> None:
        talk.session.get_one(talk.m.Comment, 1).thread = None
        saved(talk.session, talk.m)

    def test_removed_from_the_collection(self, talk: SimpleNamespace) -> None:
        thread = talk.session.get_one(talk.m.Thread, 1)
        thread.comments.remove(thread.comments[0])
        saved(talk.session, talk.m)

    def test_collection_replaced(self, talk: SimpleNamespace) -> None:
        t1, t2 = talk.session.get_one(talk.m.Thread, 1), talk.session.get_one(talk.m.Thread, 2)
        t1.comments = [t1.comments[1], t2.comments[0], talk.m.Comment(message="new one", score=7)]
        saved(talk.session, talk.m)

    def test_there_and_back_is_no_change(self, talk: SimpleNamespace) -> None:
        comment = talk.session.get_one(talk.m.Comment, 1)
        t1, t2 = talk.session.get_one(talk.m.Thread, 1), talk.session.get_one(talk.m.Thread, 2)
        comment.thread = t2
        comment.thread = t1
        saved(talk.session, talk.m)
        comment.thread = t2
        talk.session.flush()
        comment.thread = t1
        saved(talk.session, talk.m)

    def test_move_of_a_new_child_before_the_flush(self, talk: SimpleNamespace) -> None:
        t1, t2 = talk.session.get_one(talk.m.Thread, 1), talk.session.get_one(talk.m.Thread, 2)
        comment = talk.m.Comment(message="a b", score=1, thread=t1)
        talk.session.add(comment)
        comment.thread = t2
        comment.message = "a b c"
        saved(talk.session, talk.m)

    def test_delete(self, talk: SimpleNamespace) -> None:
        talk.session.delete(talk.session.get_one(talk.m.Comment, 1))
        saved(talk.session, talk.m)

    def test_delete_all(self, talk: SimpleNamespace) -> None:
        for comment in talk.session.scalars(select(talk.m.Comment)):
            talk.session.delete(comment)
        saved(talk.session, talk.m)
        assert talk.session.get_one(talk.m.Thread, 1).comment_count == 0

    def test_move_and_delete_in_one_flush(self, talk: SimpleNamespace) -> None:
        comment = talk.session.get_one(talk.m.Comment, 1)
        comment.thread = talk.session.get_one(talk.m.Thread, 2)
        comment.score = 1000
        talk.session.delete(comment)
        saved(talk.session, talk.m)

    def test_move_by_foreign_key_and_delete_in_one_flush(self, talk: SimpleNamespace) -> None:
        comment = talk.session.get_one(talk.m.Comment, 1)
        comment.thread_id, comment.score = 2, 1000
        talk.session.delete(comment)
        saved(talk.session, talk.m)
        assert talk.session.get(talk.m.Comment, 1) is None

    def test_insert_and_delete_in_one_transaction(self, talk: SimpleNamespace) -> None:
        comment = talk.m.Comment(message="a b", score=1, thread_id=1)
        talk.session.add(comment)
        talk.session.flush()
        talk.session.delete(comment)
        saved(talk.session, talk.m)

    def test_several_saves_in_one_transaction(self, talk: SimpleNamespace) -> None:
        comment = talk.m.Comment(message="a", score=1, thread_id=1)
        talk.session.add(comment)
        for score in (2, 5, None, -3, 4):
            talk.session.flush()
            talk.m.check(talk.session)
            comment.score = score
        saved(talk.session, talk.m)

    def test_delete_of_the_parent(self, talk: SimpleNamespace) -> None:
        talk.session.delete(talk.session.get_one(talk.m.Thread, 1))
        saved(talk.session, talk.m)
        assert talk.session.get_one(talk.m.Comment, 1).thread_id is None

    def test_merge(self, talk: SimpleNamespace) -> None:
        m = talk.m
        talk.session.merge(m.Comment(id=1, message="merged words here", score=20, thread_id=1, author_id=1))
        talk.session.merge(m.Comment(id=77, message="new", score=2, thread_id=2, author_id=2, deleted=False))
        saved(talk.session, talk.m)

    def test_merge_of_a_stale_parent_keeps_the_count(self, talk: SimpleNamespace) -> None:
        thread = talk.session.get_one(talk.m.Thread, 1)
        assert thread.comment_count == 2
        talk.session.expunge(thread)
        talk.session.add(talk.m.Comment(message="a", thread_id=1))
        talk.session.commit()
        thread.title = "stale"
        merged = talk.session.merge(thread)
        saved(talk.session, talk.m)
        assert (merged.comment_count, merged.title) == (3, "stale")

    def test_rollback(self, talk: SimpleNamespace) -> None:
        thread = talk.session.get_one(talk.m.Thread, 1)
        talk.session.add(talk.m.Comment(message="a", thread=thread))
        talk.session.flush()
        talk.session.rollback()
        talk.m.check(talk.session)
        assert thread.comment_count == 2
        thread.comments.append(talk.m.Comment(message="a"))
        saved(talk.session, talk.m)

    def test_savepoint(self, talk: SimpleNamespace) -> None:
        thread = talk.session.get_one(talk.m.Thread, 1)
        talk.session.add(talk.m.Comment(message="kept", thread=thread))
        talk.session.flush()
        assert thread.comment_count == 3
        with talk.session.begin_nested() as savepoint:
            talk.session.add(talk.m.Comment(message="lost", thread=thread))
            talk.session.flush()
            assert thread.comment_count == 4
            savepoint.rollback()
        assert thread.comment_count == 3
        with talk.session.begin_nested():
            talk.session.add(talk.m.Comment(message="kept too", thread=thread))
        assert thread.comment_count == 4
        saved(talk.session, talk.m)

    def test_an_object_thrown_out_by_rollback_and_added_again(self, talk: SimpleNamespace) -> None:
        thread = talk.session.get_one(talk.m.Thread, 1)
        comment = talk.m.Comment(message="a b", thread=thread)
        talk.session.add(comment)
        talk.session.flush()
        talk.session.rollback()
        talk.session.add(comment)
        saved(talk.session, talk.m)

    def test_failed_flush(self, talk: SimpleNamespace) -> None:
        from sqlalchemy.exc import IntegrityError

        thread = talk.session.get_one(talk.m.Thread, 1)
        talk.session.add_all([talk.m.Comment(id=900, thread=thread), talk.m.Comment(id=901, author_id=12345)])
        with pytest.raises(IntegrityError):
            talk.session.flush()
        talk.session.rollback()
        talk.m.check(talk.session)
        talk.session.add(talk.m.Comment(message="a", thread_id=1))
        saved(talk.session, talk.m)

    def test_soft_delete_of_many(self, talk: SimpleNamespace) -> None:
        for comment in talk.session.scalars(select(talk.m.Comment)):
            comment.deleted = not comment.deleted
        saved(talk.session, talk.m)


@strategies(*models.ANY_KIND)
class TestStaleObjects:
    """Not "memory": it takes what the object remembers for what the row holds."""

    def test_double_delete(self, talk: SimpleNamespace, engine: Any) -> None:
        comment = talk.session.get_one(talk.m.Comment, 1)
        talk.session.expunge_all()
        talk.session.close()
        with Session(engine) as other:
            other.delete(other.get_one(talk.m.Comment, 1))
            other.commit()
        talk.session.add(comment)
        talk.session.delete(comment)
        with pytest.warns(SAWarning, match="expected to delete 1 row"):
            talk.session.commit()
        talk.m.check(talk.session)

    def test_update_of_a_row_that_is_gone(self, talk: SimpleNamespace, engine: Any) -> None:
        comment = talk.session.get_one(talk.m.Comment, 1)
        assert comment.score == 5
        talk.session.expunge_all()
        talk.session.close()
        with Session(engine) as other:
            other.delete(other.get_one(talk.m.Comment, 1))
            other.commit()
        talk.session.add(comment)
        comment.score = 50
        # "flush" finds out by itself that the row is not there to be locked.
        with pytest.raises(StaleDataError):
            talk.session.flush()
        talk.session.rollback()
        talk.m.check(talk.session)


@strategies()
class TestBulk:
    def test_update(self, talk: SimpleNamespace) -> None:
        m = talk.m
        talk.session.execute(update(m.Comment).where(m.Comment.score > 0).values(score=m.Comment.score + 100))
        saved(talk.session, m)

    def test_update_of_the_condition(self, talk: SimpleNamespace) -> None:
        talk.session.execute(update(talk.m.Comment).where(talk.m.Comment.thread_id == 1).values(deleted=True))
        saved(talk.session, talk.m)

    def test_update_that_moves(self, talk: SimpleNamespace) -> None:
        m = talk.m
        talk.session.execute(
            update(m.Comment).where(m.Comment.id.in_([1, 3])).values(thread_id=3, author_id=2)
        )
        saved(talk.session, m)

    def test_update_that_does_not_matter(self, talk: SimpleNamespace) -> None:
        talk.session.execute(update(talk.m.Comment).values(note="x"))
        saved(talk.session, talk.m)

    def test_update_by_primary_key(self, talk: SimpleNamespace) -> None:
        talk.session.execute(update(talk.m.Comment), [{"id": 1, "score": 50}, {"id": 3, "score": None}])
        saved(talk.session, talk.m)

    def test_update_with_returning(self, talk: SimpleNamespace, engine: Any) -> None:
        if engine.dialect.name == "mysql":
            return  # MariaDB has no such statement
        m = talk.m
        found = talk.session.scalars(
            update(m.Comment).where(m.Comment.id == 1).values(score=9).returning(m.Comment.score)
        ).all()
        assert found == [9]
        saved(talk.session, m)

    def test_update_of_the_middle(self, talk: SimpleNamespace) -> None:
        talk.session.execute(
            update(talk.m.Thread).where(talk.m.Thread.id == 1).values(forum_id=2, open=False)
        )
        saved(talk.session, talk.m)

    def test_delete(self, talk: SimpleNamespace) -> None:
        talk.session.execute(delete(talk.m.Comment).where(talk.m.Comment.score > 2))
        saved(talk.session, talk.m)

    def test_delete_all(self, talk: SimpleNamespace) -> None:
        talk.session.execute(delete(talk.m.Comment))
        saved(talk.session, talk.m)

    def test_query_methods(self, talk: SimpleNamespace) -> None:
        talk.session.query(talk.m.Comment).filter_by(thread_id=1).update({"score": 7})
        talk.session.query(talk.m.Comment).filter_by(thread_id=2).delete()
        saved(talk.session, talk.m)

    def test_insert_rows(self, talk: SimpleNamespace) -> None:
        talk.session.execute(
            insert(talk.m.Comment),
            [{"thread_id": 1, "message": "a b", "score": n, "author_id": 1} for n in range(4)],
        )
        saved(talk.session, talk.m)

    def test_insert_values(self, talk: SimpleNamespace) -> None:
        m = talk.m
        talk.session.execute(insert(m.Comment).values(thread_id=1, message="a b", score=3, author_id=2))
        talk.session.execute(
            insert(m.Comment).values([{"thread_id": 2, "score": 1}, {"thread_id": 1, "score": 2}])
        )
        saved(talk.session, m)

    def test_insert_returning_entities(self, talk: SimpleNamespace) -> None:
        m = talk.m
        found = talk.session.scalars(
            insert(m.Comment).returning(m.Comment), [{"thread_id": 1, "score": n} for n in range(3)]
        ).all()
        assert sorted(comment.score for comment in found) == [0, 1, 2]
        found[0].score = 40
        saved(talk.session, m)

    def test_insert_from_select(self, talk: SimpleNamespace) -> None:
        m = talk.m
        source = select(
            m.Comment.thread_id, m.Comment.message, m.Comment.score, func.coalesce(m.Comment.deleted, False)
        )
        talk.session.execute(
            insert(m.Comment).from_select(["thread_id", "message", "score", "deleted"], source)
        )
        saved(talk.session, m)

    def test_core_statements_through_the_session(self, talk: SimpleNamespace) -> None:
        table = talk.m.Comment.__table__
        talk.session.execute(table.update().where(table.c.id == 1).values(score=70))
        talk.session.execute(table.delete().where(table.c.id == 2))
        talk.session.execute(table.insert(), [{"thread_id": 3, "score": 5, "deleted": False}])
        saved(talk.session, talk.m)

    def test_pending_changes_are_flushed_first(self, talk: SimpleNamespace) -> None:
        talk.session.add(talk.m.Comment(id=50, message="a", score=1, thread_id=1))
        talk.session.execute(update(talk.m.Comment).where(talk.m.Comment.id == 50).values(score=2))
        saved(talk.session, talk.m)

    def test_objects_in_the_session_see_the_new_value(self, talk: SimpleNamespace) -> None:
        thread = talk.session.get_one(talk.m.Thread, 1)
        assert thread.comment_count == 2
        talk.session.execute(delete(talk.m.Comment).where(talk.m.Comment.thread_id == 1))
        assert thread.comment_count == 0


@strategies(*models.ANY_PATH)
class TestThreeLevels:
    def test_move_of_the_middle(self, talk: SimpleNamespace) -> None:
        talk.session.get_one(talk.m.Thread, 1).forum = talk.session.get_one(talk.m.Forum, 2)
        saved(talk.session, talk.m)

    def test_move_of_the_middle_by_foreign_key(self, talk: SimpleNamespace) -> None:
        talk.session.get_one(talk.m.Thread, 1).forum_id = 2
        saved(talk.session, talk.m)

    def test_move_of_the_middle_and_of_its_children(self, talk: SimpleNamespace) -> None:
        m, session = talk.m, talk.session
        t1, t2, t3 = (session.get_one(m.Thread, n) for n in (1, 2, 3))
        t1.forum, t3.forum = session.get_one(m.Forum, 2), session.get_one(m.Forum, 1)
        t1.comments[0].thread = t2
        t2.comments[0].thread = t3
        t2.comments[0].score = 77
        session.add(m.Comment(thread=t1, score=12))
        session.delete(session.get_one(m.Comment, 5))
        saved(session, m)

    def test_condition_on_the_middle(self, talk: SimpleNamespace) -> None:
        talk.session.get_one(talk.m.Thread, 1).open = False
        saved(talk.session, talk.m)

    def test_delete_of_the_middle(self, talk: SimpleNamespace) -> None:
        talk.session.delete(talk.session.get_one(talk.m.Thread, 1))
        saved(talk.session, talk.m)

    def test_new_chain(self, talk: SimpleNamespace) -> None:
        m = talk.m
        talk.session.add(m.Forum(id=9, threads=[m.Thread(comments=[m.Comment(score=1), m.Comment(score=9)])]))
        saved(talk.session, m)

    def test_there_and_back(self, talk: SimpleNamespace) -> None:
        thread = talk.session.get_one(talk.m.Thread, 1)
        thread.forum_id = 2
        talk.session.flush()
        talk.m.check(talk.session)
        thread.forum_id = 1
        saved(talk.session, talk.m)


@strategies()
class TestCompositeKeys:
    def test_life(self, strategy: str, opened: Open) -> None:
        m = models.composite(strategy)
        session = opened(m)
        a1, a2, b1 = m.Order(shop="a", number=1), m.Order(shop="a", number=2), m.Order(shop="b", number=1)
        session.add_all([a1, a2, b1])
        session.add_all([m.Line(id=n, part=n % 3, order=(a1, a2, b1)[n % 3], amount=n) for n in range(9)])
        saved(session, m)
        session.get_one(m.Line, (1, 1)).order = b1
        session.get_one(m.Line, (2, 2)).amount = 50
        session.delete(session.get_one(m.Line, (0, 0)))
        saved(session, m)
        session.get_one(m.Line, (4, 1)).number = 1
        saved(session, m)
        session.execute(update(m.Line).where(m.Line.part == 1).values(amount=m.Line.amount * 2))
        session.execute(delete(m.Line).where(m.Line.id == 5))
        saved(session, m)

    def test_change_of_a_childs_key(self, strategy: str, opened: Open) -> None:
        m = models.composite(strategy)
        session = opened(m)
        line = m.Line(id=1, part=1, amount=3)
        session.add(m.Order(shop="a", number=1, lines=[line, m.Line(id=2, part=1)]))
        saved(session, m)
        line.part, line.amount = 7, 4
        saved(session, m)


@strategies()
class TestSelfReference:
    def test_life(self, strategy: str, opened: Open, engine: Any) -> None:
        if strategy == "trigger" and engine.dialect.name == "mysql":
            from querycache.errors import ConfigurationError

            with pytest.raises(ConfigurationError, match="cannot update the table that it belongs to"):
                opened(models.tree(strategy))
            return
        m = models.tree(strategy)
        session = opened(m)
        a, b = m.Node(id=1), m.Node(id=2)
        c, d, e = m.Node(id=3, parent=a, weight=3), m.Node(id=4, parent=a), m.Node(id=5, weight=5)
        c.children.append(e)
        session.add_all([a, b, c, d, e])
        saved(session, m)
        c.parent = b
        saved(session, m)
        e.parent = a
        d.weight = 8
        saved(session, m)
        a.parent = b
        saved(session, m)
        session.delete(e)
        saved(session, m)


@strategies(*models.ANY_PATH)
class TestManyToMany:
    @pytest.fixture
    def club(self, strategy: str, opened: Open) -> SimpleNamespace:
        m = models.groups(strategy)
        session = opened(m)
        g1, g2 = m.Group(id=1), m.Group(id=2)
        people = [m.Member(id=n, age=20 + n, letters=[m.Letter() for _ in range(n)]) for n in range(1, 4)]
        g1.members = people[:2]
        g2.members = people[1:]
        session.add_all([g1, g2, *people])
        saved(session, m)
        return SimpleNamespace(m=m, session=session)

    def test_append_and_remove_from_either_side(self, club: SimpleNamespace) -> None:
        m, session = club.m, club.session
        g1, one, three = (
            session.get_one(m.Group, 1),
            session.get_one(m.Member, 1),
            session.get_one(m.Member, 3),
        )
        g1.members.append(three)
        saved(session, m)
        one.groups.append(session.get_one(m.Group, 2))
        saved(session, m)
        one.groups.remove(g1)
        g1.members.remove(three)
        saved(session, m)
        g1.members = [three]
        saved(session, m)

    def test_measure_and_condition(self, club: SimpleNamespace) -> None:
        m, session = club.m, club.session
        session.get_one(m.Member, 2).age = 99
        session.get_one(m.Member, 3).active = False
        saved(session, m)

    def test_move_and_change_at_once(self, club: SimpleNamespace) -> None:
        m, session = club.m, club.session
        two = session.get_one(m.Member, 2)
        two.age, two.groups = 77, [session.get_one(m.Group, 2)]
        two.letters = [m.Letter()]
        saved(session, m)

    def test_delete_of_either_side(self, club: SimpleNamespace) -> None:
        m, session = club.m, club.session
        session.delete(session.get_one(m.Member, 2))
        saved(session, m)
        session.delete(session.get_one(m.Group, 1))
        saved(session, m)

    def test_bulk_statements_on_the_secondary_table(self, club: SimpleNamespace) -> None:
        m, session = club.m, club.session
        session.execute(m.membership.insert(), [{"group_id": 1, "member_id": 3}])
        saved(session, m)
        session.execute(m.membership.delete().where(m.membership.c.member_id == 2))
        saved(session, m)
        session.expire_all()

    def test_update_of_the_secondary_table_is_refused(self, club: SimpleNamespace, strategy: str) -> None:
        m, session = club.m, club.session
        statement = m.membership.update().where(m.membership.c.member_id == 1).values(group_id=2)
        if strategy == "trigger":
            session.execute(statement)
            saved(session, m)
        else:
            with pytest.raises(UncoveredChange, match="secondary table"):
                session.execute(statement)


@strategies(*models.ANY_PATH)
class TestInheritance:
    def test_life(self, strategy: str, opened: Open) -> None:
        m = models.heirs(strategy)
        session = opened(m)
        one, two = m.Manager(id=1), m.Manager(id=2)
        session.add_all([m.Person(id=9), one, two])
        session.flush()
        session.add_all(
            [m.Task(id=1, manager=one), m.Urgent(id=2, manager=one), m.Bug(id=3, manager=two, severity=4)]
        )
        saved(session, m)
        session.get_one(m.Bug, 3).manager = one
        session.get_one(m.Urgent, 2).manager_id = 2
        saved(session, m)
        session.get_one(m.Task, 3).severity = 9
        session.delete(session.get_one(m.Task, 1))
        saved(session, m)
        session.delete(session.get_one(m.Bug, 3))
        session.add(m.Bug(id=8, manager_id=2, severity=2))
        saved(session, m)


class TestCascades:
    @pytest.fixture
    def house(self, strategy: str, opened: Open, engine: Any) -> SimpleNamespace:
        m = models.cascades(strategy)
        session = opened(m)
        session.add_all([m.User(id=1), m.User(id=2), m.Quote(id=1), m.Forum(id=1), m.Forum(id=2)])
        session.add_all([m.Thread(id=n, forum_id=1 + n % 2) for n in range(1, 5)])
        session.flush()
        session.add_all(
            [
                m.Comment(id=n, thread_id=1 + n % 4, author_id=1 + n % 2, quoted_id=1 if n % 3 else None)
                for n in range(1, 20)
            ]
        )
        saved(session, m)
        session.expunge_all()
        return SimpleNamespace(m=m, session=session)

    @strategies("sql", "recount")
    def test_delete_spreads_in_the_database(self, house: SimpleNamespace) -> None:
        m, session = house.m, house.session
        session.delete(session.get_one(m.Thread, 1))
        saved(session, m)
        session.delete(session.get_one(m.Forum, 1))
        saved(session, m)

    @strategies("sql", "recount")
    def test_on_delete_set_null(self, house: SimpleNamespace) -> None:
        m, session = house.m, house.session
        session.delete(session.get_one(m.Quote, 1))
        saved(session, m)
        session.delete(session.get_one(m.User, 1))
        saved(session, m)

    @strategies("sql", "recount")
    def test_bulk_delete_spreads_too(self, house: SimpleNamespace) -> None:
        m, session = house.m, house.session
        session.execute(delete(m.Thread).where(m.Thread.id < 3))
        saved(session, m)
        session.execute(delete(m.Forum).where(m.Forum.id == 2))
        saved(session, m)

    @strategies("sql", "recount")
    def test_orphans_take_their_children_along(self, house: SimpleNamespace) -> None:
        m, session = house.m, house.session
        forum = session.get_one(m.Forum, 1)
        forum.threads.remove(forum.threads[0])
        thread = session.get_one(m.Thread, 1)
        thread.comments.remove(thread.comments[0])
        saved(session, m)

    @strategies("trigger")
    def test_triggers_see_the_cascades_of_the_database(
        self, strategy: str, opened: Open, engine: Any
    ) -> None:
        if engine.dialect.name == "mysql":
            from querycache.errors import ConfigurationError

            with pytest.raises(ConfigurationError, match="run no triggers for ON DELETE"):
                opened(models.cascades(strategy))
            return
        m = models.cascades(strategy)
        session = opened(m)
        session.add_all(
            [
                m.User(id=1),
                m.Quote(id=1),
                m.Forum(id=1),
                m.Thread(id=1, forum_id=1),
                m.Thread(id=2, forum_id=1),
            ]
        )
        session.flush()
        session.add_all([m.Comment(id=n, thread_id=1 + n % 2, author_id=1, quoted_id=1) for n in range(1, 9)])
        saved(session, m)
        session.expunge_all()
        session.delete(session.get_one(m.Quote, 1))
        saved(session, m)
        session.delete(session.get_one(m.Thread, 1))
        saved(session, m)
        session.delete(session.get_one(m.Forum, 1))
        saved(session, m)
