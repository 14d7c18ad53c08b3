"""What reviewers have found."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Computed, Engine, ForeignKey, Integer, String, and_, event
from sqlalchemy.orm import (
    Session,
    declarative_base,
    foreign,
    make_transient,
    mapped_column,
    relationship,
)

from querycache.denormalize import DenormalizeError, count_of, max_of, python, sum_of, verify
from querycache.errors import ConfigurationError
from tests.denormalize.family import Open, family, n, right, two


def test_computed_column_of_the_child(opened: Open) -> None:
    m = family(
        "r_comp",
        lambda: {"letters": sum_of("children", "letters", type_=Integer)},
        lambda: {"letters": mapped_column(Integer, Computed("length(message)", persisted=True))},
    )
    s = opened(m)
    two(s, m)
    s.get_one(m.Child, 1).message = "abcdefgh"
    s.commit()
    right(s, m)


def test_computed_column_bulk_update(opened: Open) -> None:
    m = family(
        "r_compb",
        lambda: {"letters": sum_of("children", "letters", type_=Integer)},
        lambda: {"letters": mapped_column(Integer, Computed("length(message)", persisted=True))},
    )
    s = opened(m)
    two(s, m)
    s.execute(sa.update(m.Child).values(message="abcdefgh"))
    s.commit()
    right(s, m)


def test_onupdate_column_of_the_child(opened: Open) -> None:
    m = family(
        "r_onup",
        lambda: {"last": sum_of("children", "rev", type_=Integer)},
        lambda: {"rev": mapped_column(Integer, default=0, onupdate=1)},
    )
    s = opened(m)
    two(s, m)
    s.get_one(m.Child, 1).message = "abcdefgh"
    s.commit()
    right(s, m)


def test_onupdate_sql_column_of_the_child(opened: Open) -> None:
    m = family(
        "r_onups",
        lambda: {"last": sum_of("children", "rev", type_=Integer)},
        lambda: {"rev": mapped_column(Integer, default=0, onupdate=sa.text("7"))},
    )
    s = opened(m)
    two(s, m)
    s.get_one(m.Child, 1).message = "abcdefgh"
    s.commit()
    right(s, m)


def test_version_of_the_child(opened: Open) -> None:
    """sum over version_id_col of the child"""
    m = family(
        "r_ver",
        lambda: {"last": sum_of("children", "ver", type_=Integer)},
        lambda: {
            "ver": (v := mapped_column(Integer, nullable=False)),
            "__mapper_args__": {"version_id_col": v},
        },
    )
    s = opened(m)
    two(s, m)
    s.get_one(m.Child, 1).message = "abcdefgh"
    s.commit()
    right(s, m)


def test_join_condition_reads_the_parent(opened: Open) -> None:
    try:
        m = family(
            "r_pj",
            n,
            parent=lambda: {"least": mapped_column(Integer, default=0)},
            rel=lambda made: {
                "primaryjoin": lambda: and_(
                    made.Parent.id == foreign(made.Child.parent_id), made.Child.size > made.Parent.least
                )
            },
        )
        sa.orm.configure_mappers()
    except ConfigurationError:
        return
    s = opened(m)
    two(s, m)
    s.get_one(m.Parent, 1).least = 6
    s.commit()
    right(s, m)


def test_a_copy_of_a_parent(opened: Open) -> None:
    m = family("r_copy", n)
    s = opened(m)
    two(s, m)
    p = s.get_one(m.Parent, 1)
    assert (p.title, p.n, p.total) == (None, 2, 12)
    s.expunge(p)
    make_transient(p)
    p.id = 77
    s.add(p)
    with suppress(DenormalizeError):
        s.commit()
    s.rollback()
    right(s, m)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_parent_in_the_place_of_one_deleted(opened: Open, loaded: bool) -> None:
    m = family(f"r_switch{loaded:d}", n)
    s = opened(m)
    two(s, m)
    p = s.get_one(m.Parent, 1)
    if loaded:
        len(p.children)
    s.delete(p)
    s.add(m.Parent(id=1))
    s.commit()
    right(s, m)


def test_a_parent_in_the_place_of_one_deleted_with_children(opened: Open) -> None:
    m = family("r_switchc", n)
    s = opened(m)
    two(s, m)
    p = s.get_one(m.Parent, 1)
    s.delete(p)
    s.add(m.Parent(id=1, children=[m.Child(id=9, size=2)]))
    s.commit()
    right(s, m)


def test_a_later_before_flush_listener_deletes_what_takes_children_along(
    opened: Open, engine: Engine
) -> None:
    def extra(made: Any) -> None:
        class Author(made.Base):
            __tablename__ = "r_late_author"
            id = mapped_column(Integer, primary_key=True)

        made.Author = Author

    m = family(
        "r_late",
        n,
        lambda: {"author_id": mapped_column(ForeignKey("r_late_author.id", ondelete="CASCADE"))},
        extra=extra,
    )
    s = opened(m)
    s.add_all([m.Author(id=1), m.Parent(id=1), m.Parent(id=2)])
    s.flush()
    s.add_all([m.Child(id=1, parent_id=1, author_id=1, size=4), m.Child(id=2, parent_id=1, size=4)])
    s.commit()

    def later(session: Session, *_: Any) -> None:
        for each in session.dirty:
            if isinstance(each, m.Parent):
                session.delete(session.get_one(m.Author, 1))

    event.listen(s, "before_flush", later)
    s.get_one(m.Parent, 2).title = "x"
    try:
        s.commit()
    except DenormalizeError:
        s.rollback()
    right(s, m)


def test_onupdate_of_the_parent_shows(opened: Open) -> None:
    m = family("r_pup", n, parent=lambda: {"rev": mapped_column(Integer, default=0, onupdate=1)})
    s = opened(m)
    s.add(m.Parent(id=2))
    s.commit()
    p = s.get_one(m.Parent, 2)
    assert p.rev == 0
    s.add(m.Child(parent_id=2))
    s.flush()
    stored = s.scalar(sa.select(m.Parent.__table__.c.rev).where(m.Parent.__table__.c.id == 2))
    assert p.rev == stored


def test_two_engines_in_one_session(tmp_path: Any) -> None:
    Base: Any = declarative_base()

    class Album(Base):
        __tablename__ = "r_album"
        id = mapped_column(Integer, primary_key=True)
        songs = relationship("Song")
        n = count_of("songs", type_=Integer)

    class Song(Base):
        __tablename__ = "r_song"
        id = mapped_column(Integer, primary_key=True)
        album_id = mapped_column(ForeignKey("r_album.id"))

    class Thread(Base):
        __tablename__ = "r_thread"
        id = mapped_column(Integer, primary_key=True)
        posts = relationship("Post")
        n = count_of("posts", type_=Integer)

    class Post(Base):
        __tablename__ = "r_thread_post"
        id = mapped_column(Integer, primary_key=True)
        thread_id = mapped_column(ForeignKey("r_thread.id"))

    engines = [sa.create_engine(f"sqlite:///{tmp_path}/{name}.db") for name in "ab"]
    for each in engines:
        Base.metadata.create_all(each)
    with Session(binds={Album: engines[0], Song: engines[0], Thread: engines[1], Post: engines[1]}) as s:
        s.add_all([Album(id=1), Thread(id=1)])
        s.commit()
        s.add(Song(album_id=1))
        s.commit()
        s.add(Post(thread_id=1))
        try:
            s.commit()
        except DenormalizeError:
            s.rollback()
        assert verify(engines[0], Album).right
        assert verify(engines[1], Thread).right


def test_a_session_that_reads_elsewhere(tmp_path: Any) -> None:
    """The routing Session of SQLAlchemy's documentation; what the follower lacks is not replicated here."""
    m = family("r_route", n)
    leader, follower = (
        sa.create_engine(f"sqlite:///{tmp_path}/{name}.db") for name in ("leader", "follower")
    )
    for each in (leader, follower):
        m.Base.metadata.create_all(each)

    class Routing(Session):
        def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Any:
            return (
                leader
                if self._flushing or isinstance(clause, (sa.Update, sa.Delete, sa.Insert))
                else follower
            )

    with Routing() as s:
        s.add_all([m.Parent(id=1), m.Parent(id=2)])
        s.flush()
        s.add_all([m.Child(id=1, parent_id=1, size=5)])
        s.commit()
        assert verify(leader, m.Base).right
        s.execute(sa.update(m.Child).values(size=9))
        s.commit()
    with Session(leader) as s:
        assert s.scalars(sa.select(m.Child.size)).all() == [9]
    assert [str(each) for each in verify(leader, m.Base).differences] == []


@pytest.mark.parametrize("strategy", ["recount", "flush", "memory", "trigger"])
def test_onupdate_under_other_strategies(opened: Open, strategy: str) -> None:
    try:
        m = family(
            f"r_st_{strategy}",
            lambda: {"last": sum_of("children", "rev", type_=Integer, strategy=strategy)},
            lambda: {"rev": mapped_column(Integer, default=0, onupdate=1)},
        )
        sa.orm.configure_mappers()
    except ConfigurationError:
        return
    s = opened(m)
    p = m.Parent(id=1)
    s.add(p)
    s.flush()
    s.add(m.Child(id=1, parent=p, message="x"))
    try:
        s.commit()
    except DenormalizeError:
        s.rollback()
        s.add(m.Child(id=1, parent=p, message="x", rev=0))
        s.commit()
    right(s, m)
    try:
        s.get_one(m.Child, 1).message = "abcdefgh"
        s.commit()
    except DenormalizeError:
        s.rollback()
    right(s, m)


@pytest.mark.parametrize("strategy", ["recount", "flush", "memory"])
def test_computed_under_other_strategies(opened: Open, strategy: str) -> None:
    m = family(
        f"r_cs_{strategy}",
        lambda: {"last": sum_of("children", "letters", type_=Integer, strategy=strategy)},
        lambda: {"letters": mapped_column(Integer, Computed("length(message)", persisted=True))},
    )
    try:
        sa.orm.configure_mappers()
    except ConfigurationError:
        return
    s = opened(m)
    p = m.Parent(id=1)
    s.add(p)
    s.flush()
    try:
        s.add(m.Child(id=1, parent=p, message="x"))
        s.commit()
        len(s.get_one(m.Parent, 1).children)
        s.get_one(m.Child, 1).message = "abcdefgh"
        s.commit()
    except DenormalizeError:
        s.rollback()
    right(s, m)


@pytest.mark.parametrize("strategy", ["sql", "recount", "flush", "memory", "trigger"])
def test_reparenting_by_another_relationship(opened: Open, strategy: str) -> None:
    """A second relationship writes the same foreign key, by another column as well."""
    try:
        m = family(
            f"r_again_{strategy}",
            lambda: {"n": count_of("children", type_=Integer, strategy=strategy)},
            extra=lambda made: setattr(
                made.Parent, "others", relationship(made.Child, overlaps="children,parent")
            ),
        )
        sa.orm.configure_mappers()
    except ConfigurationError:
        return
    s = opened(m)
    two(s, m)
    a, b = s.get_one(m.Parent, 1), s.get_one(m.Parent, 2)
    try:
        b.others.append(s.get_one(m.Child, 1))
        s.commit()
        s.add(m.Child(id=50, size=1))
        s.flush()
        b.others.append(m.Child(id=51, size=1))
        a.others.remove(s.get_one(m.Child, 2))
        s.commit()
    except DenormalizeError:
        s.rollback()
    right(s, m)


def test_a_database_trigger_changes_the_measure(opened: Open, engine: Engine) -> None:
    """Declared as SQLAlchemy wants it: FetchedValue as server_onupdate."""
    if engine.dialect.name != "postgresql":
        pytest.skip("PostgreSQL only")
    m = family(
        "r_fetched",
        n,
        lambda: {"size": mapped_column(Integer, sa.FetchedValue(), server_onupdate=sa.FetchedValue())},
    )
    s = opened(m)
    two(s, m)
    s.connection().exec_driver_sql(
        "CREATE OR REPLACE FUNCTION r_fetched_f() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN NEW.size := length(NEW.message); RETURN NEW; END$$"
    )
    s.connection().exec_driver_sql(
        "CREATE OR REPLACE TRIGGER r_fetched_t BEFORE UPDATE ON r_fetched_child"
        " FOR EACH ROW EXECUTE FUNCTION r_fetched_f()"
    )
    s.get_one(m.Child, 1).message = "abcdefghi"
    s.commit()
    right(s, m)


def test_a_new_parent_shows_the_extreme_of_its_first_child(opened: Open) -> None:
    m = family(
        "r_newp",
        lambda: {"n": count_of("children", type_=Integer), "most": max_of("children", "size", type_=Integer)},
    )
    s = opened(m)
    p = m.Parent(id=1, children=[m.Child(size=4)])
    s.add(p)
    s.flush()
    assert (p.n, p.most) == (1, 4)


@pytest.mark.parametrize("loaded", ["expired", "absent"])
def test_a_parent_loaded_within_a_savepoint_that_is_rolled_back(opened: Open, loaded: str) -> None:
    m = family(f"r_spl_{loaded}", n)
    s = opened(m)
    two(s, m)
    p = s.get_one(m.Parent, 1) if loaded == "expired" else None
    s.commit()
    nested = s.begin_nested()
    s.add(m.Child(parent_id=1, size=4))
    s.flush()
    p = s.get_one(m.Parent, 1)
    assert p.n == 3
    nested.rollback()
    assert p.n == 2


def test_rows_between_are_left_as_they_are(opened: Open, engine: Engine) -> None:
    """REPEATABLE READ on PostgreSQL writes the rows that it locks; that must not run their onupdate."""
    if engine.dialect.name != "postgresql":
        pytest.skip("PostgreSQL only")
    Base: Any = declarative_base()

    class Forum(Base):
        __tablename__ = "r_mid_forum"
        id = mapped_column(Integer, primary_key=True)
        threads = relationship("Thread")
        n = count_of("threads.comments", type_=Integer)

    class Thread(Base):
        __tablename__ = "r_mid_thread"
        id = mapped_column(Integer, primary_key=True)
        forum_id = mapped_column(ForeignKey("r_mid_forum.id"))
        edited = mapped_column(Integer, default=0, onupdate=1)
        comments = relationship("Comment")

    class Comment(Base):
        __tablename__ = "r_mid_comment"
        id = mapped_column(Integer, primary_key=True)
        thread_id = mapped_column(ForeignKey("r_mid_thread.id"))

    m = SimpleNamespace(Base=Base)
    s = opened(m)
    s.add(Forum(id=1))
    s.flush()
    s.add(Thread(id=1, forum_id=1))
    s.commit()
    s.connection(execution_options={"isolation_level": "REPEATABLE READ"})
    s.add(Comment(id=1, thread_id=1))
    s.commit()
    right(s, m)
    assert s.get_one(Thread, 1).edited == 0


def test_verify_is_no_locking_read(opened: Open, engine: Engine) -> None:
    if engine.dialect.name not in ("mysql", "mariadb"):
        pytest.skip("MariaDB only")
    m = family("r_vlock", n)
    s = opened(m)
    two(s, m)
    s.commit()
    verify(s, m.Base)
    with engine.connect() as other:
        other.exec_driver_sql("SET SESSION innodb_lock_wait_timeout = 1")
        try:
            other.execute(sa.update(m.Parent).where(m.Parent.id == 1).values(title="x"))
        finally:
            other.rollback()
            s.rollback()
            other.exec_driver_sql("SET SESSION innodb_lock_wait_timeout = 50")


def test_one_to_one_replaced_in_memory(opened: Open) -> None:
    m = family(
        "r_onem",
        lambda: {"total": sum_of("children", "size", type_=Integer, strategy="memory")},
        rel=lambda made: {"uselist": False},
    )
    s = opened(m)
    p = m.Parent(id=1, children=m.Child(id=1, size=4))
    s.add(p)
    assert p.total == 4
    s.commit()
    p.children = m.Child(id=2, size=7)
    assert p.total == 7
    s.commit()
    right(s, m)
    p.children = None
    assert p.total == 0
    s.commit()
    right(s, m)


def families_on_two_engines(tmp_path: Any) -> tuple[Any, list[Engine]]:
    Base: Any = declarative_base()

    class Album(Base):
        __tablename__ = "r_album"
        id = mapped_column(Integer, primary_key=True)
        songs = relationship("Song")
        n = count_of("songs", type_=Integer)

    class Song(Base):
        __tablename__ = "r_song"
        id = mapped_column(Integer, primary_key=True)
        album_id = mapped_column(ForeignKey("r_album.id"))

    class Thread(Base):
        __tablename__ = "r_thread"
        id = mapped_column(Integer, primary_key=True)
        posts = relationship("Post", cascade="all")
        n = count_of("posts", type_=Integer)

    class Post(Base):
        __tablename__ = "r_thread_post"
        id = mapped_column(Integer, primary_key=True)
        thread_id = mapped_column(ForeignKey("r_thread.id"))

    engines = [sa.create_engine(f"sqlite:///{tmp_path}/{name}.db") for name in "ab"]
    for each in engines:
        Base.metadata.create_all(each)
    return SimpleNamespace(Base=Base, Album=Album, Song=Song, Thread=Thread, Post=Post), engines


def test_two_engines_in_one_flush_and_in_bulk_statements(tmp_path: Any) -> None:
    m, (one, other) = families_on_two_engines(tmp_path)
    binds = {m.Album: one, m.Song: one, m.Thread: other, m.Post: other}
    with Session(binds=binds) as s:
        s.add_all([m.Album(id=1), m.Album(id=2), m.Thread(id=1), m.Thread(id=2)])
        s.commit()
        s.add_all([m.Song(id=1, album_id=1), m.Post(id=1, thread_id=1), m.Post(id=2, thread_id=1)])
        s.commit()
        right(s, m)
        s.get_one(m.Song, 1).album_id = 2
        s.get_one(m.Post, 1).thread_id = 2
        s.commit()
        right(s, m)
        s.execute(sa.update(m.Post).values(thread_id=2))
        s.execute(sa.insert(m.Post), [{"thread_id": 1}])
        s.execute(sa.delete(m.Song))
        s.commit()
        right(s, m)
        s.delete(s.get_one(m.Thread, 2))
        s.add(m.Song(album_id=1))
        s.commit()
        right(s, m)
        assert [s.get_one(m.Album, n).n for n in (1, 2)] == [1, 0]
        assert s.get_one(m.Thread, 1).n == 1


def test_a_path_over_two_engines_is_refused(tmp_path: Any) -> None:
    m, (one, other) = families_on_two_engines(tmp_path)
    with Session(binds={m.Album: one, m.Song: other}) as s:
        s.add(m.Album(id=1))
        s.flush()
        s.add(m.Song(album_id=1))
        with pytest.raises(DenormalizeError, match=r"Album\.n.*several\s+engines"):
            s.commit()


@pytest.mark.parametrize("strategy", ["flush", "memory"])
def test_a_parent_in_the_place_of_one_deleted_is_refused(opened: Open, strategy: str) -> None:
    m = family(f"r_switch{strategy}", lambda: {"n": count_of("children", type_=Integer, strategy=strategy)})
    s = opened(m)
    p = m.Parent(id=1)
    s.add(p)
    s.commit()
    s.delete(p)
    s.add(m.Parent(id=1))
    with pytest.raises(DenormalizeError, match=r"Parent \(1,\) is deleted and added.*Parent\.n"):
        s.commit()


def test_what_is_changed_along_with_an_aggregate_cannot_be_a_measure() -> None:
    Base: Any = declarative_base()

    class Forum(Base):
        __tablename__ = "r_along_forum"
        id = mapped_column(Integer, primary_key=True)
        threads = relationship("Thread")
        edits = sum_of("threads", "edited", type_=Integer)

    class Thread(Base):
        __tablename__ = "r_along_thread"
        id = mapped_column(Integer, primary_key=True)
        forum_id = mapped_column(ForeignKey("r_along_forum.id"))
        edited = mapped_column(Integer, default=0, onupdate=1)
        comments = relationship("Comment")
        n = count_of("comments", type_=Integer)

    class Comment(Base):
        __tablename__ = "r_along_comment"
        id = mapped_column(Integer, primary_key=True)
        thread_id = mapped_column(ForeignKey("r_along_thread.id"))

    with pytest.raises(ConfigurationError, match=r"Forum\.edits reads Thread\.edited.*Thread\.n is kept"):
        sa.orm.configure_mappers()
    Base.registry.dispose()


@pytest.mark.parametrize("reads", ["message", "rev"])
def test_python_that_does_not_say_what_it_reads(opened: Open, reads: str) -> None:
    m = family(
        f"r_reads_{reads}",
        lambda: {
            "total": sum_of(
                "children", python(lambda c: len(str(getattr(c, reads)))), type_=Integer, strategy="flush"
            )
        },
        lambda: {"rev": mapped_column(Integer, default=0, onupdate=100)},
    )
    s = opened(m)
    two(s, m)
    s.get_one(m.Child, 1).message = "abcdefgh"
    if reads == "rev":
        with pytest.raises(DenormalizeError, match=r"Child\.rev is changed by the UPDATE itself"):
            s.commit()
        s.rollback()
    else:
        s.commit()
    right(s, m)


def test_triggers_and_a_parent_loaded_within_a_savepoint(opened: Open) -> None:
    m = family("r_splt", lambda: {"n": count_of("children", type_=Integer, strategy="trigger")})
    s = opened(m)
    two(s, m)
    for write in (
        lambda: s.add(m.Child(parent_id=1, size=4)),
        lambda: s.execute(sa.update(m.Child).values(parent_id=2)),
    ):
        s.expire_all()
        nested = s.begin_nested()
        write()
        s.flush()
        p = s.get_one(m.Parent, 1)
        assert p.n != 2
        nested.rollback()
        assert p.n == 2


def test_verify_in_a_transaction_that_has_written(opened: Open, engine: Engine) -> None:
    """Its own row shows what others have added, their children do not, but in locking reads."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer")
    m = family("r_verw", n)
    s = opened(m)
    two(s, m)
    s.scalar(sa.select(m.Parent.n).where(m.Parent.id == 2))
    with Session(engine) as other:
        other.add(m.Child(parent_id=1, size=1))
        other.commit()
    s.add(m.Child(parent_id=1, size=2))
    s.flush()
    right(s, m)


def test_the_column_of_an_heir_in_the_same_table(opened: Open) -> None:
    Base: Any = declarative_base()

    class Parent(Base):
        __tablename__ = "r_heir_parent"
        id = mapped_column(Integer, primary_key=True)
        children = relationship("Child")
        last = sum_of("children", "rev", type_=Integer)

    class Child(Base):
        __tablename__ = "r_heir_child"
        id = mapped_column(Integer, primary_key=True)
        kind = mapped_column(String(5))
        rev = mapped_column(Integer, default=0, onupdate=1)
        parent_id = mapped_column(ForeignKey("r_heir_parent.id"))
        __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "c"}

    class Heir(Child):
        wish = mapped_column(Integer)
        __mapper_args__ = {"polymorphic_identity": "h"}

    m = SimpleNamespace(Base=Base)
    s = opened(m)
    s.add(Parent(id=1, children=[Heir(id=1), Child(id=2)]))
    s.commit()
    s.get_one(Heir, 1).wish = 4
    s.commit()
    right(s, m)
    assert s.get_one(Parent, 1).last == 1
