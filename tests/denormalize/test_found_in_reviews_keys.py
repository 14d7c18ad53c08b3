"""What reviewers have found about keys, orphans and what the database changes by itself."""

from __future__ import annotations

from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, ForeignKey, ForeignKeyConstraint, Integer, String
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import Session, configure_mappers, declarative_base, mapped_column, relationship

from querycache.denormalize import (
    DenormalizeError,
    count_of,
    expression,
    max_of,
    python,
    repair,
    sum_of,
    trigger_sql,
    verify,
)
from querycache.errors import ConfigurationError
from tests.denormalize.family import Open, family, right
from tests.denormalize.keyed import KEYS, keyed

STRATEGIES = ["sql", "recount", "flush", "memory", "trigger"]


def forum(name: str, strategy: str) -> SimpleNamespace:
    """Threads that a forum deletes as orphans, and their comments, which they leave behind."""
    Base: Any = declarative_base()

    class Forum(Base):
        __tablename__ = f"{name}_forum"
        id = mapped_column(Integer, primary_key=True)
        threads = relationship("Thread", cascade="all, delete-orphan", back_populates="forum")

    class Thread(Base):
        __tablename__ = f"{name}_thread"
        id = mapped_column(Integer, primary_key=True)
        forum_id = mapped_column(ForeignKey(Forum.id))
        forum = relationship(Forum, back_populates="threads")
        comments = relationship("Comment")
        n = count_of("comments", strategy=strategy, type_=Integer)

    class Comment(Base):
        __tablename__ = f"{name}_comment"
        id = mapped_column(Integer, primary_key=True)
        thread_id = mapped_column(ForeignKey(Thread.id))

    return SimpleNamespace(Base=Base, Forum=Forum, Thread=Thread, Comment=Comment)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["clear", "unset"])
def test_an_orphan_leaves_its_children_behind(opened: Open, strategy: str, how: str) -> None:
    m = forum(f"k_left_{strategy}_{how}", strategy)
    s = opened(m)
    s.add(m.Forum(id=1, threads=[m.Thread(id=1, comments=[m.Comment(), m.Comment()]), m.Thread(id=2)]))
    s.commit()
    held, thread = s.get_one(m.Forum, 1), s.get_one(m.Thread, 1)
    assert thread.forum is held
    if how == "clear":
        held.threads.clear()
    else:
        thread.forum = None
    s.commit()
    assert s.get(m.Thread, 1) is None
    assert set(s.scalars(sa.select(m.Comment.thread_id))) == {None}
    right(s, m)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_in_the_place_of_an_orphan(opened: Open, strategy: str) -> None:
    """Under its key, so its row stays, and what is below it."""
    m = forum(f"k_place_{strategy}", strategy)
    s = opened(m)
    s.add(m.Forum(id=1, threads=[m.Thread(id=1, comments=[m.Comment(), m.Comment()])]))
    s.commit()
    held = s.get_one(m.Forum, 1)
    held.threads = [m.Thread(id=1)]
    try:
        s.commit()
    except DenormalizeError:
        assert strategy in ("flush", "memory")
        s.rollback()
    right(s, m)


def test_late_changes_are_no_matter_to_triggers(opened: Open) -> None:
    m = forum("k_late", "trigger")
    s = opened(m)
    s.add(m.Forum(id=1, threads=[m.Thread(id=1, comments=[m.Comment(id=1)]), m.Thread(id=2)]))
    s.commit()

    def later(session: Session, *_: Any) -> None:
        s.get_one(m.Comment, 1).thread_id = 2

    sa.event.listen(s, "before_flush", later)
    s.add(m.Comment(thread_id=1))
    s.commit()
    assert s.get_one(m.Thread, 2).n == 1
    right(s, m)


def test_one_that_only_changes_its_parent_is_no_orphan(opened: Open) -> None:
    """A change of its children that comes too late is refused as ever."""
    m = forum("k_moved", "sql")
    s = opened(m)
    s.add_all([m.Forum(id=1, threads=[m.Thread(id=1, comments=[m.Comment(id=1)])]), m.Forum(id=2)])
    s.commit()

    def later(session: Session, *_: Any) -> None:
        s.get_one(m.Comment, 1).thread_id = None

    sa.event.listen(s, "before_flush", later)
    one, other = s.get_one(m.Forum, 1), s.get_one(m.Forum, 2)
    other.threads.append(one.threads[0])
    with pytest.raises(DenormalizeError, match="was changed after"):
        s.flush()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["remove", "clear", "none", "remove_and_move"])
def test_an_orphan_of_another_parent(opened: Open, strategy: str, how: str) -> None:
    def extra(made: Any) -> None:
        class Other(made.Base):
            __tablename__ = f"k_other_{strategy}_{how}_o"
            id = mapped_column(Integer, primary_key=True)
            children = relationship("Child", cascade="all, delete-orphan", back_populates="other")

        made.Other = Other

    m = family(
        f"k_other_{strategy}_{how}",
        lambda: {"n": count_of("children", strategy=strategy, type_=Integer)},
        lambda: {
            "other_id": mapped_column(ForeignKey(f"k_other_{strategy}_{how}_o.id")),
            "other": relationship("Other", back_populates="children"),
        },
        extra=extra,
    )
    s = opened(m)
    parent, other, child = m.Parent(id=1), m.Other(id=1), m.Child(id=1)
    child.parent, child.other = parent, other
    s.add(child)
    s.commit()
    assert parent.n == 1
    assert child.parent is parent
    assert child.other is other
    if how == "remove":
        other.children.remove(child)
    elif how == "clear":
        other.children = []
    elif how == "none":
        child.other = None
    else:  # SQLAlchemy deletes it or not, as it comes
        other.children.remove(child)
        second = m.Parent(id=2, children=[])
        s.add(second)
        second.children.append(child)
        if strategy in ("flush", "memory"):
            with pytest.raises(DenormalizeError, match="may delete it or not"):
                s.flush()
            s.rollback()
        else:
            s.commit()
        right(s, m)
        return
    s.commit()
    assert parent.n == 0
    right(s, m)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("over", "how"),
    [
        ("many-to-one", "orphan"),
        ("many-to-one", "replace"),
        ("many-to-one", "none"),
        ("many-to-many", "orphan"),
    ],
)
def test_what_goes_with_an_orphan(opened: Open, strategy: str, over: str, how: str) -> None:
    name = f"k_with_{strategy}_{over[8:]}_{how}"
    Base: Any = declarative_base()
    secondary = sa.Table(
        f"{name}_s",
        Base.metadata,
        sa.Column("post_id", ForeignKey(f"{name}_post.id"), primary_key=True),
        sa.Column("file_id", ForeignKey(f"{name}_file.id"), primary_key=True),
    )

    class Folder(Base):
        __tablename__ = f"{name}_folder"
        id = mapped_column(Integer, primary_key=True)
        files = relationship("File")
        n = count_of("files", strategy=strategy, type_=Integer)

    class File(Base):
        __tablename__ = f"{name}_file"
        id = mapped_column(Integer, primary_key=True)
        folder_id = mapped_column(ForeignKey(Folder.id))

    class Topic(Base):
        __tablename__ = f"{name}_topic"
        id = mapped_column(Integer, primary_key=True)
        posts = relationship("Post", cascade="all, delete-orphan")

    class Post(Base):
        __tablename__ = f"{name}_post"
        id = mapped_column(Integer, primary_key=True)
        topic_id = mapped_column(ForeignKey(Topic.id))
        file_id = mapped_column(ForeignKey(File.id))
        file = relationship(File, cascade="all, delete-orphan", single_parent=True)
        files = relationship(File, secondary=secondary, cascade="all, delete")

    s = opened(SimpleNamespace(Base=Base))
    topic = Topic(id=1)
    s.add_all([Folder(id=1), topic])
    s.flush()
    made = [File(folder_id=1), File(folder_id=1)]
    topic.posts = [Post(file=f) if over == "many-to-one" else Post(files=[f]) for f in made]
    s.commit()
    folder = s.get_one(Folder, 1)
    assert folder.n == 2
    if how == "orphan":
        topic.posts.pop()
    else:
        assert topic.posts[0].file
        topic.posts[0].file = File(folder_id=1) if how == "replace" else None
    try:
        s.commit()
    except DenormalizeError as error:
        assert strategy in ("flush", "memory"), error
        s.rollback()
    else:
        assert s.scalar(sa.select(sa.func.count(File.id))) == (2 if how == "replace" else 1)
    right(s, SimpleNamespace(Base=Base))


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("strategy", ["sql", "recount", "flush", "memory"])
def test_keys_of_types_that_convert(
    opened: Open, engine: Engine, strategy: str, kind: str, composite: bool
) -> None:
    m = keyed(f"kk_{strategy}_{kind}_{composite:d}", kind, strategy, composite)
    s = opened(m)
    parents = [m.Parent(key=key, **({"number": 1} if composite else {})) for key in m.made]
    for parent in parents:
        parent.children = [m.Child(key=key, parent_number=1) for key in m.made[:1]]
    if not composite:  # the key of the child has no part of its parent's
        for number, parent in enumerate(parents):
            parent.children[0].parent_number = number
    else:
        for parent, key in zip(parents, m.made, strict=True):
            parent.children[0].key = key
    s.add_all(parents)
    s.commit()
    s.delete(parents[0].children[0])
    for parent in parents[1:]:
        parent.children[0].parent_key = m.made[0]
    s.commit()
    right(s, m)
    s.execute(sa.update(m.Child).values(parent_key=m.made[1]))
    s.commit()
    for size in (1, 2, 3, 500):
        report = verify(engine, m.Base, batch=size)
        assert (report.checked, report.wrong) == ({"Parent": 4}, 0)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {m.Parent.__tablename__} SET n = 77")
    report = repair(engine, m.Base, batch=3)
    assert (report.checked, report.repaired) == ({"Parent": 4}, 4)
    right(s, m)
    s.execute(sa.delete(m.Child))
    s.commit()
    right(s, m)


def test_keys_that_are_not_what_they_seem(kept_sqlite: Engine) -> None:
    """SQLite does not round them; the walk over the parents must end."""
    m = keyed("k_seem", "numeric", "sql", composite=True)
    m.Base.metadata.create_all(kept_sqlite)
    with Session(kept_sqlite) as s:
        s.add_all([m.Parent(number=1, key=Decimal(i) / 3) for i in range(4)])
        s.commit()
    with pytest.raises(DenormalizeError, match="holds another key"):
        verify(kept_sqlite, m.Base, batch=2)


def courses(name: str, strategy: str = "sql", rule: str | None = "CASCADE") -> SimpleNamespace:
    """Students and courses, between them a table of which each row belongs to a term too."""
    Base: Any = declarative_base()
    secondary = sa.Table(
        f"{name}_entry",
        Base.metadata,
        sa.Column("course_id", ForeignKey(f"{name}_course.id"), primary_key=True),
        sa.Column("student_id", ForeignKey(f"{name}_student.id"), primary_key=True),
        sa.Column("term_id", ForeignKey(f"{name}_term.id", ondelete=rule)),
    )

    class Term(Base):
        __tablename__ = f"{name}_term"
        id = mapped_column(Integer, primary_key=True)

    class Student(Base):
        __tablename__ = f"{name}_student"
        id = mapped_column(Integer, primary_key=True)

    class Course(Base):
        __tablename__ = f"{name}_course"
        id = mapped_column(Integer, primary_key=True)
        students = relationship(Student, secondary=secondary)
        n = count_of("students", strategy=strategy, type_=Integer)

    return SimpleNamespace(Base=Base, secondary=secondary, Term=Term, Student=Student, Course=Course)


@pytest.mark.parametrize("strategy", ["sql", "recount", "trigger"])
def test_a_class_mapped_to_the_secondary_table(opened: Open, strategy: str) -> None:
    m = courses(f"k_assoc_{strategy}", strategy, rule=None)

    class Entry(m.Base):  # type: ignore[misc]
        __table__ = m.secondary

    if strategy != "trigger":
        with pytest.raises(ConfigurationError, match=r"Course\.n: Entry is mapped to .*entry"):
            configure_mappers()
        m.Base.registry.dispose()
        return
    s = opened(m)
    s.add_all([m.Course(id=1), m.Course(id=2), m.Student(id=1)])
    s.flush()
    entry = Entry(course_id=1, student_id=1)
    s.add(entry)
    s.commit()
    right(s, m)
    entry.course_id = 2
    s.commit()
    right(s, m)
    s.delete(entry)
    s.commit()
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "recount"])
@pytest.mark.parametrize("how", ["object", "statement"])
def test_rows_of_the_secondary_table_go_with_a_third(opened: Open, strategy: str, how: str) -> None:
    m = courses(f"k_third_{strategy}_{how}", strategy)
    s = opened(m)
    s.add_all([m.Course(id=1), m.Course(id=2), m.Student(id=1), m.Student(id=2), m.Term(id=1)])
    s.flush()
    rows = [(1, 1, 1), (1, 2, None), (2, 2, 1)]
    s.execute(
        sa.insert(m.secondary),
        [{"course_id": c, "student_id": t, "term_id": term} for c, t, term in rows],
    )
    s.commit()
    right(s, m)
    if how == "object":
        s.delete(s.get_one(m.Term, 1))
    else:
        s.execute(sa.delete(m.Term))
    s.commit()
    assert [course.n for course in s.scalars(sa.select(m.Course).order_by(m.Course.id))] == [1, 0]
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "recount", "trigger"])
@pytest.mark.parametrize("how", ["object", "statement"])
@pytest.mark.server("postgresql")
def test_children_whose_parent_goes_get_the_default_one(
    kept_postgresql: Engine, kept_sqlite: Engine, strategy: str, how: str
) -> None:
    """MariaDB knows no SET DEFAULT."""
    Base: Any = declarative_base()
    name = f"k_default_{strategy}_{how}"

    class Forum(Base):
        __tablename__ = f"{name}_forum"
        id = mapped_column(Integer, primary_key=True)
        threads = relationship("Thread")
        n = count_of("threads.comments", strategy=strategy, type_=Integer)

    class Thread(Base):
        __tablename__ = f"{name}_thread"
        id = mapped_column(Integer, primary_key=True)
        forum_id = mapped_column(ForeignKey(Forum.id))
        comments = relationship("Comment", passive_deletes=True)
        n = count_of("comments", strategy=strategy, type_=Integer)

    class Comment(Base):
        __tablename__ = f"{name}_comment"
        id = mapped_column(Integer, primary_key=True)
        thread_id = mapped_column(ForeignKey(Thread.id, ondelete="SET DEFAULT"), server_default="1")

    for engine in (kept_sqlite, kept_postgresql):
        Base.metadata.create_all(engine)
        with Session(engine) as s:
            s.add_all([Forum(id=1), Forum(id=2)])
            s.flush()
            s.add_all([Thread(id=1, forum_id=1), Thread(id=2, forum_id=2)])
            s.flush()
            s.add_all([Comment(id=number, thread_id=2) for number in (1, 2, 3)])
            s.commit()
            if how == "object":
                s.delete(s.get_one(Thread, 2))
            else:
                s.execute(sa.delete(Thread).where(Thread.id == 2))
            s.commit()
            assert s.get_one(Thread, 1).n == 3
            right(s, SimpleNamespace(Base=Base))


@pytest.mark.parametrize("strategy", ["flush", "memory"])
def test_a_default_parent_is_refused(strategy: str) -> None:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = f"k_nodefault_{strategy}_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child")
        n = count_of("children", strategy=strategy, type_=Integer)

    class Child(Base):
        __tablename__ = f"k_nodefault_{strategy}_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(Parent.id, ondelete="SET DEFAULT"), server_default="1")

    with pytest.raises(ConfigurationError, match="ON DELETE SET DEFAULT"):
        configure_mappers()
    Base.registry.dispose()


def labelled(name: str, rule: str, where: Any, strategy: str = "sql", own: str | None = None) -> Any:
    Base: Any = declarative_base()

    class Label(Base):
        __tablename__ = f"{name}_label"
        word = mapped_column(String(20), primary_key=True)

    class Parent(Base):
        __tablename__ = f"{name}_parent"
        id = mapped_column(String(20), primary_key=True)
        children = relationship("Child")
        n = count_of("children", where=where, strategy=strategy, type_=Integer)

    class Child(Base):
        __tablename__ = f"{name}_child"
        id = mapped_column(Integer, primary_key=True)
        parent_id = mapped_column(ForeignKey(Parent.id, onupdate=own))
        label = mapped_column(ForeignKey(Label.word, onupdate=rule))

    return SimpleNamespace(Base=Base, Label=Label, Parent=Parent, Child=Child)


@pytest.mark.parametrize("rule", ["CASCADE", "SET NULL", "SET DEFAULT"])
@pytest.mark.parametrize("strategy", ["sql", "recount"])
def test_what_on_update_changes_is_not_to_be_read(rule: str, strategy: str) -> None:
    m = labelled(f"k_onup_{strategy}_{rule[-4:]}", rule, lambda c: c.label == "spam", strategy)
    with pytest.raises(
        ConfigurationError, match=rf"Child\.label changes by ON UPDATE {rule} of k_onup.*_label"
    ):
        configure_mappers()
    m.Base.registry.dispose()


def test_on_update_of_what_is_not_read(opened: Open) -> None:
    m = labelled("k_onup_unread", "CASCADE", lambda c: c.id > 1, own="CASCADE")
    s = opened(m)
    s.add_all([m.Parent(id="a"), m.Label(word="x")])
    s.flush()
    s.add_all([m.Child(id=number, parent_id="a", label="x") for number in (1, 2, 3)])
    s.commit()
    s.get_one(m.Label, "x").word = "y"
    s.commit()
    s.get_one(m.Parent, "a").id = "b"
    s.commit()
    assert s.get_one(m.Parent, "b").n == 2
    right(s, m)


def test_on_update_that_takes_children_away_is_refused() -> None:
    m = labelled("k_onup_away", "CASCADE", None, own="SET NULL")
    with pytest.raises(ConfigurationError, match=r"Child\.parent_id changes by ON UPDATE SET NULL"):
        configure_mappers()
    m.Base.registry.dispose()


def test_on_update_of_what_is_read_under_trigger(kept_sqlite: Engine) -> None:
    """The database runs the triggers for what it changes by itself; MariaDB does not."""
    m = labelled("k_onup_trigger", "CASCADE", lambda c: c.label == "spam", "trigger")
    with pytest.raises(
        ConfigurationError, match=r"run no triggers for ON UPDATE CASCADE of k_onup_trigger_label"
    ):
        trigger_sql(m.Base, mysql.dialect())
    m.Base.metadata.create_all(kept_sqlite)
    with Session(kept_sqlite) as s:
        s.add_all([m.Parent(id="a"), m.Label(word="spam")])
        s.flush()
        s.add_all([m.Child(id=number, parent_id="a", label="spam") for number in (1, 2, 3)])
        s.commit()
        s.get_one(m.Label, "spam").word = "junk"
        s.commit()
        right(s, m)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("width", [1, 2])
def test_a_parent_takes_another_key(opened: Open, strategy: str, width: int) -> None:
    """Its children follow, in the database; they are no new ones of it."""
    Base: Any = declarative_base()
    name = f"k_rename_{strategy}_{width}"
    number = {"number": mapped_column(Integer, primary_key=True, autoincrement=False)} if width == 2 else {}

    class Parent(Base):
        __tablename__ = f"{name}_parent"
        locals().update(number)
        word = mapped_column(String(9), primary_key=True)
        children = relationship("Child")
        n = count_of("children", strategy=strategy, type_=Integer)
        if strategy != "memory":
            best = max_of(
                "children",
                expression(sql=lambda c: c.size, python=lambda c: c.size, columns=("size",)),
                strategy=strategy,
                type_=Integer,
            )

    class Child(Base):
        __tablename__ = f"{name}_child"
        id = mapped_column(Integer, primary_key=True)
        parent_number = mapped_column(Integer)
        parent_word = mapped_column(String(9))
        size = mapped_column(Integer)
        __table_args__ = (
            ForeignKeyConstraint(
                ["parent_number", "parent_word"][-width:],
                [f"{name}_parent.number", f"{name}_parent.word"][-width:],
                onupdate="CASCADE",
            ),
            sa.Index(f"{name}_i", *["parent_number", "parent_word"][-width:], "size"),
        )

    m = SimpleNamespace(Base=Base)
    s = opened(m)
    of = {"number": 1} if width == 2 else {}
    s.add_all([Parent(word="a", **of), Parent(word="other", **of)])
    s.flush()
    s.add_all([Child(id=i, parent_word="a", parent_number=1, size=i) for i in (1, 2, 3)])
    s.commit()
    parent = s.scalars(sa.select(Parent).where(Parent.word == "a")).one()
    assert parent.n == 3
    parent.word = "b"
    s.commit()
    assert parent.n == 3
    right(s, m)
    parent.word = "c"
    s.add(Child(id=4, parent_word="c", parent_number=1, size=9))
    s.commit()
    right(s, m)
    parent.word = "d"
    s.get_one(Child, 4).parent_word = "other"
    s.commit()
    right(s, m)
    parent.word = "e"
    s.delete(s.get_one(Child, 3))
    s.commit()
    assert parent.n == 2
    right(s, m)


@pytest.mark.parametrize("strategy", ["flush", "memory"])
def test_a_key_that_the_database_is_to_generate(opened: Open, strategy: str) -> None:
    """The object has none when these strategies compute."""
    of_key = python(lambda c: c.id, columns=("id",))
    kind = max_of if strategy == "flush" else sum_of
    m = family(
        f"k_generated_{strategy}",
        lambda: {"of_key": kind("children", of_key, strategy=strategy, type_=Integer)},
    )
    s = opened(m)
    s.add(m.Parent(id=1))
    s.commit()
    parent = s.get_one(m.Parent, 1)
    s.add(m.Child(id=7, parent=parent))
    s.commit()
    right(s, m)
    with pytest.raises(DenormalizeError, match=r"Child\.id is generated"):
        s.add(m.Child(parent=parent))
        s.flush()
    s.rollback()
    right(s, m)
