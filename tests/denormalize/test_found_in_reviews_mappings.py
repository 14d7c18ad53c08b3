"""What reviewers have found about mappings: what is not loaded, joined tables, keys of the mapper's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Boolean, ForeignKey, Integer, String, event
from sqlalchemy.orm import (
    Session,
    configure_mappers,
    declarative_base,
    defer,
    load_only,
    mapped_column,
    relationship,
)

from querycache.denormalize import UncoveredChange, count_of, exists_of, maintain, max_of, repair, sum_of
from querycache.errors import ConfigurationError
from tests.denormalize.family import Open, family, kept, right, two

STRATEGIES = ["sql", "recount", "flush", "memory", "trigger"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["flush", "bulk", "load_only", "raiseload", "expired"])
def test_a_parent_is_merged_onto_one_that_is_not_loaded(
    opened: Open, engine: sa.Engine, strategy: str, how: str
) -> None:
    """The stored value stays, and is not written once more either: another may have changed it by then."""

    def columns() -> dict[str, Any]:
        made: dict[str, Any] = {"n": count_of("children", strategy=strategy, type_=Integer)}
        if strategy != "memory":  # which has counts and sums alone
            made["best"] = max_of("children", "size", strategy=strategy, type_=Integer)
            made["some"] = exists_of("children", strategy=strategy, type_=Boolean)
        return made

    name = f"m_merge_{strategy}_{how}"
    m = family(name, columns, lambda: {"__table_args__": (sa.Index(f"{name}_i", "parent_id", "size"),)})
    s = opened(m)
    two(s, m)
    cached = s.get_one(m.Parent, 1)
    s.expunge(cached)
    cached.title = "new"
    s.rollback()
    options = {"load_only": [load_only(m.Parent.title)], "raiseload": [defer(m.Parent.n, raiseload=True)]}
    parent = s.get_one(m.Parent, 1, options=options.get(how, []))
    if how == "flush":
        s.add(m.Child(id=3, parent=parent, size=9))
        s.flush()
    elif how == "bulk":
        s.execute(sa.insert(m.Child).values(id=3, parent_id=1, size=9))
    elif how == "expired":
        s.expire(parent, list(columns()))
    written: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, sql: str, *_: Any) -> None:
        if sql.startswith("UPDATE"):
            written.append(sql)

    try:
        assert s.merge(cached) is parent
        s.flush()
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    assert [sql.count("=") for sql in written] == [2], written  # the title, by the key
    assert parent.n == (3 if how in ("flush", "bulk") else 2)
    s.commit()
    with Session(engine) as other:
        assert other.get_one(m.Parent, 1).title == "new"
    right(s, m)


def joined(name: str, strategy: str, key: str = "id", base: Any = dict, heir: Any = dict) -> SimpleNamespace:
    """Threads, some of which have a table more, below a forum, with comments of their own."""
    Base: Any = declarative_base()

    class Forum(Base):
        __tablename__ = f"{name}_forum"
        id = mapped_column(Integer, primary_key=True)
        threads = relationship("Thread", back_populates="forum")
        if strategy != "trigger":
            n = count_of("threads", strategy=strategy, type_=Integer)
        if strategy in ("sql", "recount"):
            comments = count_of("threads.comments", strategy=strategy, type_=Integer)

    class Thread(Base):
        __tablename__ = f"{name}_thread"
        id = mapped_column(Integer, primary_key=True)
        kind = mapped_column(String(10))
        title = mapped_column(String(10))
        forum_id = mapped_column(ForeignKey(Forum.id))
        forum = relationship(Forum, back_populates="threads")
        comments = relationship("Comment", back_populates="thread")
        n = count_of("comments", strategy=strategy, type_=Integer)
        total = sum_of("comments", "size", strategy=strategy, type_=Integer)
        __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "thread", **base()}

    class Poll(Thread):
        __tablename__ = f"{name}_poll"
        locals()[key] = mapped_column(ForeignKey(Thread.id), primary_key=True)
        question = mapped_column(String(10))
        __mapper_args__ = {"polymorphic_identity": "poll", **heir()}

    class Comment(Base):
        __tablename__ = f"{name}_comment"
        id = mapped_column(Integer, primary_key=True)
        size = mapped_column(Integer)
        thread_id = mapped_column(ForeignKey(Thread.id))
        thread = relationship(Thread, back_populates="comments")

    return SimpleNamespace(Base=Base, Forum=Forum, Thread=Thread, Poll=Poll, Comment=Comment)


def filled(s: Session, m: SimpleNamespace) -> None:
    """Two forums, a thread and a poll in the first, with two comments each."""
    s.add_all([m.Forum(id=1), m.Forum(id=2)])
    s.flush()
    s.add_all([m.Thread(id=1, forum_id=1), m.Poll(id=2, forum_id=1)])
    s.flush()
    s.add_all([m.Comment(id=i, thread_id=i % 2 + 1, size=i) for i in (1, 2, 3, 4)])
    s.commit()
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "recount", "flush", "memory"])
@pytest.mark.parametrize("key", ["id", "poll_id"])
def test_a_child_in_two_tables_is_changed_in_the_first(opened: Open, strategy: str, key: str) -> None:
    """SQLAlchemy copies its key to the second once more, which is no change."""
    m = joined(f"m_joined_{strategy}_{key}", strategy, key)
    s = opened(m)
    filled(s, m)
    poll = s.get_one(m.Poll, 2)
    assert poll.forum.n == 2
    for name in ("title", "question"):
        setattr(poll, name, "new")
        s.commit()
    assert (poll.n, poll.title) == (2, "new")
    s.get_one(m.Comment, 1).size = 20  # which an UPDATE of the poll counts
    s.commit()
    right(s, m)
    poll.forum = s.get_one(m.Forum, 2)
    poll.title = "moved"
    s.commit()
    right(s, m)
    s.delete(s.get_one(m.Forum, 2))
    s.commit()
    assert poll.forum_id is None
    right(s, m)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["with_polymorphic", "polymorphic_load"])
def test_a_mapper_that_selects_its_subclasses_as_well(
    opened: Open, engine: sa.Engine, strategy: str, how: str
) -> None:
    """By an outer join, which PostgreSQL does not lock."""
    m = joined(
        f"m_outer_{strategy}_{how[:4]}",
        strategy,
        base=lambda: {"with_polymorphic": "*"} if how == "with_polymorphic" else {},
        heir=lambda: {"polymorphic_load": "inline"} if how == "polymorphic_load" else {},
    )
    s = opened(m)
    filled(s, m)
    forums = [s.get_one(m.Forum, key) for key in (1, 2)]  # "memory" wants them
    thread, poll = s.get_one(m.Thread, 1), s.get_one(m.Thread, 2)
    s.get_one(m.Comment, 1).thread = thread
    s.get_one(m.Comment, 4).size = 40
    s.commit()
    poll.forum = forums[1]
    s.delete(s.get_one(m.Comment, 3))
    s.commit()
    right(s, m)
    s.add_all([m.Comment(id=5, thread=poll, size=1), m.Comment(id=6, thread=thread, size=1)])
    s.commit()
    s.execute(sa.update(m.Comment).where(m.Comment.id > 4).values(size=3, thread_id=2))
    s.commit()
    assert (thread.n, poll.n) == (3, 2)
    right(s, m)
    s.close()
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {m.Thread.__table__.name} SET n = 50")
    assert repair(engine, m.Base).repaired == 2
    right(s, m)


def coded(name: str, strategy: str, table_key: bool = True) -> SimpleNamespace:
    """Threads that are mapped by another key than that of their table, or by one where it has none, between a forum and
    comments that go with them; and stickers that go with the comments."""
    Base: Any = declarative_base()
    live = strategy in ("flush", "memory")
    goes = {} if live else {"passive_deletes": True, "cascade": "all"}
    rule = None if live else "CASCADE"
    threads = sa.Table(
        f"{name}_thread",
        Base.metadata,
        *([sa.Column("id", Integer, primary_key=True, autoincrement=False)] if table_key else []),
        sa.Column("code", Integer, unique=True, nullable=False),
        sa.Column("forum_id", ForeignKey(f"{name}_forum.id")),
        sa.Column("n", Integer, nullable=False, server_default="0"),
    )

    class Forum(Base):
        __tablename__ = f"{name}_forum"
        id = mapped_column(Integer, primary_key=True)
        threads = relationship("Thread", back_populates="forum")
        n = count_of("threads" if live else "threads.comments", strategy=strategy, type_=Integer)

    class Thread(Base):
        __table__ = threads
        forum = relationship(Forum, back_populates="threads")
        comments = relationship("Comment", back_populates="thread", **goes)
        __mapper_args__ = {"primary_key": [threads.c.code]}

    class Comment(Base):
        __tablename__ = f"{name}_comment"
        id = mapped_column(Integer, primary_key=True)
        thread_code = mapped_column(ForeignKey(threads.c.code, ondelete=rule))
        thread = relationship(Thread, back_populates="comments")
        stickers = relationship("Sticker", **goes)

    class Label(Base):
        __tablename__ = f"{name}_label"
        id = mapped_column(Integer, primary_key=True)
        stickers = relationship("Sticker")
        n = count_of("stickers", strategy=strategy, type_=Integer)

    class Sticker(Base):
        __tablename__ = f"{name}_sticker"
        id = mapped_column(Integer, primary_key=True)
        comment_id = mapped_column(ForeignKey(Comment.id, ondelete=rule))
        label_id = mapped_column(ForeignKey(Label.id))

    maintain(Thread, "n", count_of("comments", strategy=strategy))
    return SimpleNamespace(
        Base=Base, Forum=Forum, Thread=Thread, Comment=Comment, Label=Label, Sticker=Sticker
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("table_key", [True, False])
def test_a_parent_mapped_by_another_key(
    opened: Open, engine: sa.Engine, strategy: str, table_key: bool
) -> None:
    if strategy == "trigger" and engine.dialect.name == "mysql":
        pytest.skip("MariaDB runs no triggers for what cascades")
    m = coded(f"m_coded_{strategy}_{table_key:d}", strategy, table_key)
    s = opened(m)
    s.add_all([m.Forum(id=1), m.Forum(id=2), m.Label(id=1)])
    s.flush()
    number = {code: {"id": 4 - code} if table_key else {} for code in (1, 2, 3)}
    s.add_all([m.Thread(code=code, forum_id=1, **number[code]) for code in (1, 2, 3)])
    s.flush()
    held = [*s.scalars(sa.select(m.Thread)), *s.scalars(sa.select(m.Forum)), s.get_one(m.Label, 1)]
    for key, code in enumerate((1, 1, 1, 3, 2), 1):
        s.add(m.Comment(id=key, thread_code=code))
        s.flush()
        s.add(m.Sticker(id=key, comment_id=key, label_id=1))
        s.commit()
        right(s, m)
    assert [s.get_one(m.Thread, code).n for code in (1, 2, 3)] == [3, 1, 1]
    s.get_one(m.Comment, 1).thread_code = 3
    s.get_one(m.Thread, 2).forum_id = 2
    s.commit()
    right(s, m)
    s.execute(sa.update(m.Comment).where(m.Comment.id == 2).values(thread_code=2))
    s.execute(sa.update(m.Thread).where(m.Thread.code == 1).values(forum_id=2))
    s.commit()
    right(s, m)
    if strategy in ("flush", "memory"):
        del held
        return
    s.delete(s.get_one(m.Thread, 3))
    s.commit()
    assert s.get_one(m.Label, 1).n == 3
    right(s, m)
    s.execute(sa.delete(m.Thread).where(m.Thread.code == 2))
    s.commit()
    right(s, m)
    s.execute(sa.delete(m.Thread.__table__))
    s.commit()
    assert s.get_one(m.Label, 1).n == 0
    right(s, m)


def test_a_bulk_update_of_the_mapped_key_is_refused(opened: Open) -> None:
    m = coded("m_codebulk", "sql")
    s = opened(m)
    s.add_all([m.Forum(id=1), m.Thread(id=1, code=2, forum_id=1)])
    s.commit()
    for target in (m.Thread, m.Thread.__table__):
        with pytest.raises(UncoveredChange, match="a bulk UPDATE of the primary key"):
            s.execute(sa.update(target).values(code=3))
    s.execute(sa.insert(m.Thread).values(id=2, code=1, forum_id=1))
    s.execute(sa.insert(m.Thread.__table__).values(id=3, code=3, forum_id=1))
    s.commit()
    right(s, m)


@pytest.mark.parametrize("what", ["aggregate", "deletion"])
def test_a_table_without_the_mapped_key_is_refused(what: str) -> None:
    """The rows to be written, or that a deletion takes along, cannot be told there."""
    Base: Any = declarative_base()

    class Thread(Base):
        __tablename__ = f"m_keyless_{what}_thread"
        id = mapped_column(Integer, primary_key=True)
        code = mapped_column(Integer, unique=True)
        comments = relationship("Comment")
        __mapper_args__ = {"primary_key": [code]}
        if what == "deletion":
            n = count_of("comments", type_=Integer)

    class Poll(Thread):
        __tablename__ = f"m_keyless_{what}_poll"
        id = mapped_column(ForeignKey(Thread.id), primary_key=True)
        if what == "aggregate":
            n = count_of("comments", type_=Integer)

    class Comment(Base):
        __tablename__ = f"m_keyless_{what}_comment"
        id = mapped_column(Integer, primary_key=True)
        thread_code = mapped_column(ForeignKey(Thread.code))
        if what == "deletion":
            poll_id = mapped_column(ForeignKey(Poll.id, ondelete="CASCADE"))

    said = {
        "aggregate": "does not hold the primary key",
        "deletion": "a deletion of rows of m_keyless_deletion_poll",
    }
    with pytest.raises(ConfigurationError, match=said[what]):
        configure_mappers()
    Base.registry.dispose()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["add", "delete", "change"])
def test_an_after_flush_listener_that_comes_first(opened: Open, strategy: str, how: str) -> None:
    """What it adds or deletes is for the next flush; what it changes SQLAlchemy would forget. The strategies that look at
    objects refuse both, as they do with what others add or delete in a flush."""
    m = family(f"m_after_{strategy}_{how}", kept(strategy))
    s = opened(m)
    two(s, m)
    parents = [s.get_one(m.Parent, key) for key in (1, 2)]
    child = s.get_one(m.Child, 1)

    def listener(session: Session, context: Any) -> None:
        if any(isinstance(each, m.Parent) for each in session.new):
            if how == "add":
                session.add(m.Child(id=9, parent_id=2, size=4))
            elif how == "delete":
                session.delete(child)
            else:
                child.size = 50

    event.listen(Session, "after_flush", listener, insert=True)
    try:
        s.add_all([m.Parent(id=3), m.Child(id=8, parent=parents[0], size=1)])
        refused = strategy != "trigger" if how == "change" else strategy in ("flush", "memory")
        if refused:
            with pytest.raises(UncoveredChange, match=r"was (added or changed|changed|deleted, .*,) after"):
                s.commit()
            s.rollback()
        elif how == "change":
            with pytest.warns(sa.exc.SAWarning, match="will not result in database updates"):
                s.commit()
        else:
            s.commit()
    finally:
        event.remove(Session, "after_flush", listener)
    found = {"add": [(3, 13), (1, 4)], "delete": [(2, 8), (0, 0)], "change": [(3, 13), (0, 0)]}[how]
    if refused:
        found = [(2, 12), (0, 0)]
    assert [(each.n, each.total) for each in parents] == found
    right(s, m)
