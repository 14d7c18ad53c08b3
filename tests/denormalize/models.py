"""The models of the scenario suite, made once for each strategy, and the oracles that say what their columns should hold.

The oracles read the rows and compute in plain Python, so they share nothing with the code under test. Tables are named
after the strategy, since all live in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from decimal import ROUND_HALF_UP, Decimal
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Column, ForeignKey, ForeignKeyConstraint, Index, Numeric, String, Table, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from querycache.denormalize import (
    avg_of,
    count_of,
    exists_of,
    expression,
    latest_of,
    max_of,
    min_of,
    python,
    sum_of,
)

STRATEGIES = ("sql", "recount", "flush", "memory", "trigger")
ANY_KIND = ("sql", "recount", "flush", "trigger")
ANY_PATH = ("sql", "recount", "trigger")

WORDS = expression(
    sql=lambda c: func.length(c.message) - func.length(func.replace(c.message, " ", "")) + 1,
    python=lambda c: None if c.message is None else len(c.message.split(" ")),
)
VISIBLE = expression(sql=lambda c: c.deleted.is_(False), python=lambda c: not c.deleted)
FLAGGED = expression(sql=lambda c: c.score < 0, python=lambda c: c.score is not None and c.score < 0)


def rows(session: Session, table: Any) -> list[dict[str, Any]]:
    """The rows of a table as the transaction sees them, past the identity map."""
    return [dict(row._mapping) for row in session.connection().execute(select(table))]


def forget() -> None:
    """Make the models anew when they are next asked for."""
    for made in (forum, counters, composite, tree, groups, heirs, cascades, orphans):
        made.cache_clear()


def assert_columns(
    table: Table, actual: Iterable[dict[str, Any]], expected: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    for row in actual:
        wanted = expected(row)
        found = {name: row[name] for name in wanted}
        key = tuple(row[column.name] for column in table.primary_key)
        wrong = {name: (found[name], wanted[name]) for name in wanted if found[name] != wanted[name]}
        assert not wrong, f"{table.name} {key}: (is, should be) {wrong}"


@functools.cache
def forum(strategy: str) -> SimpleNamespace:
    """User and Forum ← Thread ← Comment, with every kind that the strategy covers."""

    class Base(DeclarativeBase):
        pass

    p = f"f_{strategy}"
    kinds, paths = strategy in ANY_KIND, strategy in ANY_PATH
    s: Any = {"strategy": strategy}

    class User(Base):
        __tablename__ = f"{p}_user"
        id: Mapped[int] = mapped_column(primary_key=True)
        comments: Mapped[list[Comment]] = relationship("Comment", back_populates="author")
        comment_count: Mapped[int] = count_of("comments", **s)

    class Forum(Base):
        __tablename__ = f"{p}_forum"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str | None] = mapped_column(String(50))
        threads: Mapped[list[Thread]] = relationship("Thread", back_populates="forum")
        if paths:
            thread_count: Mapped[int] = count_of("threads", **s)
            comment_count: Mapped[int] = count_of("threads.comments", where=VISIBLE, **s)
            score_sum: Mapped[int] = sum_of("threads.comments", "score", **s)
            best: Mapped[int | None] = max_of("threads.comments", "score", **s)
            open_count: Mapped[int] = count_of("threads.comments", where=lambda c, t: t.open.is_(True), **s)

    class Thread(Base):
        __tablename__ = f"{p}_thread"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str | None] = mapped_column(String(50))
        open: Mapped[bool] = mapped_column(default=True)
        forum_id: Mapped[int | None] = mapped_column(ForeignKey(f"{p}_forum.id"))
        forum: Mapped[Forum | None] = relationship(Forum, back_populates="threads")
        comments: Mapped[list[Comment]] = relationship("Comment", back_populates="thread")
        comment_count: Mapped[int] = count_of("comments", **s)
        visible_count: Mapped[int] = count_of("comments", where=VISIBLE, **s)
        word_count: Mapped[int] = sum_of("comments", WORDS, where=VISIBLE, **s)
        score_sum: Mapped[int] = sum_of("comments", "score", **s)
        price_sum: Mapped[Decimal] = sum_of("comments", "price", type_=Numeric(12, 2), **s)
        if kinds:
            best: Mapped[int | None] = max_of("comments", "score", **s)
            worst: Mapped[int | None] = min_of("comments", "score", where=VISIBLE, **s)
            mean: Mapped[Decimal | None] = avg_of("comments", "score", type_=Numeric(10, 4), **s)
            flagged: Mapped[bool] = exists_of("comments", where=FLAGGED, **s)
            last: Mapped[str | None] = latest_of(
                "comments", "message", order_by="score", type_=String(80), **s
            )
        if strategy != "trigger":
            python_words: Mapped[int] = sum_of(
                "comments", python(lambda c: len((c.message or "").split()), columns=("message",)), **s
            )

    class Comment(Base):
        __tablename__ = f"{p}_comment"
        __table_args__ = (Index(f"{p}_by_score", "thread_id", "score"),)
        id: Mapped[int] = mapped_column(primary_key=True)
        message: Mapped[str | None] = mapped_column(String(80))
        score: Mapped[int | None]
        price: Mapped[Decimal | None] = mapped_column(Numeric(8, 2))
        deleted: Mapped[bool] = mapped_column(default=False)
        note: Mapped[str | None] = mapped_column(String(20))
        thread_id: Mapped[int | None] = mapped_column(ForeignKey(f"{p}_thread.id"))
        thread: Mapped[Thread | None] = relationship(Thread, back_populates="comments")
        author_id: Mapped[int | None] = mapped_column(ForeignKey(f"{p}_user.id"))
        author: Mapped[User | None] = relationship(User, back_populates="comments")

    def values(comments: list[dict[str, Any]], key: str) -> list[Any]:
        return [c[key] for c in comments if c[key] is not None]

    def check(session: Session) -> None:
        comments = rows(session, Comment.__table__)
        threads = rows(session, Thread.__table__)

        def of_user(user: dict[str, Any]) -> dict[str, Any]:
            return {"comment_count": sum(c["author_id"] == user["id"] for c in comments)}

        def of_thread(thread: dict[str, Any]) -> dict[str, Any]:
            mine = [c for c in comments if c["thread_id"] == thread["id"]]
            visible = [c for c in mine if not c["deleted"]]
            scores = values(mine, "score")
            expected: dict[str, Any] = {
                "comment_count": len(mine),
                "visible_count": len(visible),
                "word_count": sum(len(c["message"].split(" ")) for c in visible if c["message"] is not None),
                "score_sum": sum(scores),
                "price_sum": sum(values(mine, "price"), Decimal(0)),
            }
            if kinds:
                last = sorted(mine, key=lambda c: (c["score"] is not None, c["score"], c["id"]))
                expected |= {
                    "best": max(scores, default=None),
                    "worst": min(values(visible, "score"), default=None),
                    "mean": (Decimal(sum(scores)) / len(scores)).quantize(Decimal("0.0001"), ROUND_HALF_UP)
                    if scores
                    else None,
                    "flagged": any(score < 0 for score in scores),
                    "last": last[-1]["message"] if last else None,
                }
            if strategy != "trigger":
                expected["python_words"] = sum(len((c["message"] or "").split()) for c in mine)
            return expected

        def of_forum(forum: dict[str, Any]) -> dict[str, Any]:
            mine = {t["id"]: t for t in threads if t["forum_id"] == forum["id"]}
            below = [c for c in comments if c["thread_id"] in mine]
            return {
                "thread_count": len(mine),
                "comment_count": sum(not c["deleted"] for c in below),
                "score_sum": sum(values(below, "score")),
                "best": max(values(below, "score"), default=None),
                "open_count": sum(mine[c["thread_id"]]["open"] for c in below),
            }

        assert_columns(User.__table__, rows(session, User.__table__), of_user)
        assert_columns(Thread.__table__, threads, of_thread)
        if paths:
            assert_columns(Forum.__table__, rows(session, Forum.__table__), of_forum)

    return SimpleNamespace(
        Base=Base, User=User, Forum=Forum, Thread=Thread, Comment=Comment, check=check, strategy=strategy
    )


@functools.cache
def counters(strategy: str) -> SimpleNamespace:
    """Forum ← Thread ← Comment with additive columns only: the common case, for long runs."""

    class Base(DeclarativeBase):
        pass

    p = f"n_{strategy}"
    s: Any = {"strategy": strategy}

    class Forum(Base):
        __tablename__ = f"{p}_forum"
        id: Mapped[int] = mapped_column(primary_key=True)
        threads: Mapped[list[Thread]] = relationship("Thread", back_populates="forum")
        if strategy in ANY_PATH:
            score_sum: Mapped[int] = sum_of("threads.comments", "score", **s)

    class Thread(Base):
        __tablename__ = f"{p}_thread"
        id: Mapped[int] = mapped_column(primary_key=True)
        forum_id: Mapped[int] = mapped_column(ForeignKey(f"{p}_forum.id"))
        forum: Mapped[Forum] = relationship(Forum, back_populates="threads")
        comments: Mapped[list[Comment]] = relationship("Comment", back_populates="thread")
        comment_count: Mapped[int] = count_of("comments", **s)
        score_sum: Mapped[int] = sum_of("comments", "score", where=VISIBLE, **s)

    class Comment(Base):
        __tablename__ = f"{p}_comment"
        id: Mapped[int] = mapped_column(primary_key=True)
        score: Mapped[int | None]
        deleted: Mapped[bool] = mapped_column(default=False)
        thread_id: Mapped[int] = mapped_column(ForeignKey(f"{p}_thread.id"), index=True)
        thread: Mapped[Thread] = relationship(Thread, back_populates="comments")

    def check(session: Session) -> None:
        comments = rows(session, Comment.__table__)
        threads = rows(session, Thread.__table__)

        def total(some: list[dict[str, Any]]) -> int:
            return sum(c["score"] for c in some if c["score"] is not None)

        def of_thread(thread: dict[str, Any]) -> dict[str, Any]:
            mine = [c for c in comments if c["thread_id"] == thread["id"]]
            return {"comment_count": len(mine), "score_sum": total([c for c in mine if not c["deleted"]])}

        def of_forum(forum: dict[str, Any]) -> dict[str, Any]:
            mine = {t["id"] for t in threads if t["forum_id"] == forum["id"]}
            return {"score_sum": total([c for c in comments if c["thread_id"] in mine])}

        assert_columns(Thread.__table__, threads, of_thread)
        if strategy in ANY_PATH:
            assert_columns(Forum.__table__, rows(session, Forum.__table__), of_forum)

    return SimpleNamespace(Base=Base, Forum=Forum, Thread=Thread, Comment=Comment, check=check)


@functools.cache
def composite(strategy: str) -> SimpleNamespace:
    """Keys of two and three columns."""

    class Base(DeclarativeBase):
        pass

    p = f"c_{strategy}"
    s: Any = {"strategy": strategy}

    class Order(Base):
        __tablename__ = f"{p}_order"
        shop: Mapped[str] = mapped_column(String(10), primary_key=True)
        number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        lines: Mapped[list[Line]] = relationship("Line", back_populates="order")
        line_count: Mapped[int] = count_of("lines", **s)
        total: Mapped[int] = sum_of("lines", "amount", **s)

    class Line(Base):
        __tablename__ = f"{p}_line"
        __table_args__ = (ForeignKeyConstraint(["shop", "number"], [f"{p}_order.shop", f"{p}_order.number"]),)
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        part: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        shop: Mapped[str | None] = mapped_column(String(10))
        number: Mapped[int | None]
        amount: Mapped[int] = mapped_column(default=1)
        order: Mapped[Order | None] = relationship(Order, back_populates="lines")

    def check(session: Session) -> None:
        lines = rows(session, Line.__table__)

        def of_order(order: dict[str, Any]) -> dict[str, Any]:
            mine = [x for x in lines if (x["shop"], x["number"]) == (order["shop"], order["number"])]
            return {"line_count": len(mine), "total": sum(x["amount"] for x in mine)}

        assert_columns(Order.__table__, rows(session, Order.__table__), of_order)

    return SimpleNamespace(Base=Base, Order=Order, Line=Line, check=check)


@functools.cache
def tree(strategy: str) -> SimpleNamespace:
    """A table that refers to itself."""

    class Base(DeclarativeBase):
        pass

    p = f"t_{strategy}"
    s: Any = {"strategy": strategy}
    paths = strategy in ANY_PATH

    class Node(Base):
        __tablename__ = f"{p}_node"
        id: Mapped[int] = mapped_column(primary_key=True)
        weight: Mapped[int] = mapped_column(default=1)
        parent_id: Mapped[int | None] = mapped_column(ForeignKey(f"{p}_node.id"))
        parent: Mapped[Node | None] = relationship("Node", back_populates="children", remote_side=[id])
        children: Mapped[list[Node]] = relationship("Node", back_populates="parent")
        child_count: Mapped[int] = count_of("children", **s)
        child_weight: Mapped[int] = sum_of("children", "weight", **s)
        if paths:
            grandchild_count: Mapped[int] = count_of("children.children", **s)

    def check(session: Session) -> None:
        nodes = rows(session, Node.__table__)

        def of_node(node: dict[str, Any]) -> dict[str, Any]:
            mine = [x for x in nodes if x["parent_id"] == node["id"]]
            expected = {"child_count": len(mine), "child_weight": sum(x["weight"] for x in mine)}
            if paths:
                ids = {x["id"] for x in mine}
                expected["grandchild_count"] = sum(x["parent_id"] in ids for x in nodes)
            return expected

        assert_columns(Node.__table__, nodes, of_node)

    return SimpleNamespace(Base=Base, Node=Node, check=check)


@functools.cache
def groups(strategy: str) -> SimpleNamespace:
    """Many-to-many, from both sides, and one step beyond."""

    class Base(DeclarativeBase):
        pass

    p = f"g_{strategy}"
    s: Any = {"strategy": strategy}
    membership = Table(
        f"{p}_membership",
        Base.metadata,
        Column("group_id", ForeignKey(f"{p}_group.id"), primary_key=True),
        Column("member_id", ForeignKey(f"{p}_member.id"), primary_key=True),
    )

    class Group(Base):
        __tablename__ = f"{p}_group"
        id: Mapped[int] = mapped_column(primary_key=True)
        members: Mapped[list[Member]] = relationship("Member", secondary=membership, back_populates="groups")
        member_count: Mapped[int] = count_of("members", where=lambda m: m.active.is_(True), **s)
        age_sum: Mapped[int] = sum_of("members", "age", **s)
        oldest: Mapped[int | None] = max_of("members", "age", **s)
        letter_count: Mapped[int] = count_of("members.letters", **s)

    class Member(Base):
        __tablename__ = f"{p}_member"
        id: Mapped[int] = mapped_column(primary_key=True)
        age: Mapped[int] = mapped_column(default=30)
        active: Mapped[bool] = mapped_column(default=True)
        groups: Mapped[list[Group]] = relationship(Group, secondary=membership, back_populates="members")
        letters: Mapped[list[Letter]] = relationship(
            "Letter", back_populates="member", cascade="all, delete-orphan"
        )
        group_count: Mapped[int] = count_of("groups", **s)

    class Letter(Base):
        __tablename__ = f"{p}_letter"
        id: Mapped[int] = mapped_column(primary_key=True)
        member_id: Mapped[int] = mapped_column(ForeignKey(f"{p}_member.id"))
        member: Mapped[Member] = relationship(Member, back_populates="letters")

    def check(session: Session) -> None:
        pairs = {(x["group_id"], x["member_id"]) for x in rows(session, membership)}
        members, letters = rows(session, Member.__table__), rows(session, Letter.__table__)

        def of_group(group: dict[str, Any]) -> dict[str, Any]:
            mine = [m for m in members if (group["id"], m["id"]) in pairs]
            ids = {m["id"] for m in mine}
            return {
                "member_count": sum(m["active"] for m in mine),
                "age_sum": sum(m["age"] for m in mine),
                "oldest": max((m["age"] for m in mine), default=None),
                "letter_count": sum(x["member_id"] in ids for x in letters),
            }

        def of_member(member: dict[str, Any]) -> dict[str, Any]:
            return {"group_count": sum(pair[1] == member["id"] for pair in pairs)}

        assert_columns(Group.__table__, rows(session, Group.__table__), of_group)
        assert_columns(Member.__table__, members, of_member)

    return SimpleNamespace(
        Base=Base, Group=Group, Member=Member, Letter=Letter, membership=membership, check=check
    )


@functools.cache
def heirs(strategy: str) -> SimpleNamespace:
    """Inheritance on both sides: the column on a subclass with a table of its own, children of three classes, one in
    the same table, one in a joined table with the measure."""

    class Base(DeclarativeBase):
        pass

    p = f"h_{strategy}"
    s: Any = {"strategy": strategy}

    class Person(Base):
        __tablename__ = f"{p}_person"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(10))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}

    class Manager(Person):
        __tablename__ = f"{p}_manager"
        id: Mapped[int] = mapped_column(ForeignKey(f"{p}_person.id"), primary_key=True)
        __mapper_args__ = {"polymorphic_identity": "manager"}
        tasks: Mapped[list[Task]] = relationship("Task", back_populates="manager")
        bugs: Mapped[list[Bug]] = relationship("Bug", viewonly=False, overlaps="tasks,manager")
        task_count: Mapped[int] = count_of("tasks", **s)
        bug_count: Mapped[int] = count_of("tasks", where=lambda t: t.kind == "bug", **s)
        urgent_count: Mapped[int] = count_of("tasks", where=lambda t: t.kind == "urgent", **s)
        if strategy != "trigger":
            severity: Mapped[int] = sum_of("bugs", "severity", **s)

    class Task(Base):
        __tablename__ = f"{p}_task"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(10))
        manager_id: Mapped[int | None] = mapped_column(ForeignKey(f"{p}_manager.id"))
        manager: Mapped[Manager | None] = relationship(Manager, back_populates="tasks", overlaps="bugs")
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "task"}

    class Urgent(Task):
        __mapper_args__ = {"polymorphic_identity": "urgent"}

    class Bug(Task):
        __tablename__ = f"{p}_bug"
        id: Mapped[int] = mapped_column(ForeignKey(f"{p}_task.id"), primary_key=True)
        severity: Mapped[int] = mapped_column(default=1)
        __mapper_args__ = {"polymorphic_identity": "bug"}

    def check(session: Session) -> None:
        tasks = rows(session, Task.__table__)
        severity = {x["id"]: x["severity"] for x in rows(session, Bug.__table__)}

        def of_manager(manager: dict[str, Any]) -> dict[str, Any]:
            mine = [t for t in tasks if t["manager_id"] == manager["id"]]
            expected = {
                "task_count": len(mine),
                "bug_count": sum(t["kind"] == "bug" for t in mine),
                "urgent_count": sum(t["kind"] == "urgent" for t in mine),
            }
            if strategy != "trigger":
                expected["severity"] = sum(severity.get(t["id"], 0) for t in mine)
            return expected

        assert_columns(Manager.__table__, rows(session, Manager.__table__), of_manager)

    return SimpleNamespace(
        Base=Base, Person=Person, Manager=Manager, Task=Task, Urgent=Urgent, Bug=Bug, check=check
    )


@functools.cache
def cascades(strategy: str) -> SimpleNamespace:
    """Rows that the database deletes or detaches by itself, seen by an aggregate on another table."""

    class Base(DeclarativeBase):
        pass

    p = f"d_{strategy}"
    s: Any = {"strategy": strategy}

    class User(Base):
        __tablename__ = f"{p}_user"
        id: Mapped[int] = mapped_column(primary_key=True)
        comments: Mapped[list[Comment]] = relationship(
            "Comment", back_populates="author", passive_deletes=True
        )
        comment_count: Mapped[int] = count_of("comments", **s)
        threaded_count: Mapped[int] = count_of("comments", where=lambda c: c.quoted_id.is_not(None), **s)

    class Forum(Base):
        __tablename__ = f"{p}_forum"
        id: Mapped[int] = mapped_column(primary_key=True)
        threads: Mapped[list[Thread]] = relationship(
            "Thread", back_populates="forum", cascade="all, delete-orphan", passive_deletes=True
        )
        comment_count: Mapped[int] = count_of("threads.comments", **s)

    class Thread(Base):
        __tablename__ = f"{p}_thread"
        id: Mapped[int] = mapped_column(primary_key=True)
        forum_id: Mapped[int] = mapped_column(ForeignKey(f"{p}_forum.id", ondelete="CASCADE"))
        forum: Mapped[Forum] = relationship(Forum, back_populates="threads")
        comments: Mapped[list[Comment]] = relationship(
            "Comment", back_populates="thread", cascade="all, delete-orphan", passive_deletes=True
        )
        comment_count: Mapped[int] = count_of("comments", **s)

    class Comment(Base):
        __tablename__ = f"{p}_comment"
        id: Mapped[int] = mapped_column(primary_key=True)
        thread_id: Mapped[int] = mapped_column(ForeignKey(f"{p}_thread.id", ondelete="CASCADE"))
        thread: Mapped[Thread] = relationship(Thread, back_populates="comments")
        author_id: Mapped[int | None] = mapped_column(ForeignKey(f"{p}_user.id", ondelete="SET NULL"))
        author: Mapped[User | None] = relationship(User, back_populates="comments")
        quoted_id: Mapped[int | None] = mapped_column(ForeignKey(f"{p}_quote.id", ondelete="SET NULL"))

    class Quote(Base):
        __tablename__ = f"{p}_quote"
        id: Mapped[int] = mapped_column(primary_key=True)

    def check(session: Session) -> None:
        comments, threads = rows(session, Comment.__table__), rows(session, Thread.__table__)

        def of_user(user: dict[str, Any]) -> dict[str, Any]:
            mine = [c for c in comments if c["author_id"] == user["id"]]
            return {
                "comment_count": len(mine),
                "threaded_count": sum(c["quoted_id"] is not None for c in mine),
            }

        def of_thread(thread: dict[str, Any]) -> dict[str, Any]:
            return {"comment_count": sum(c["thread_id"] == thread["id"] for c in comments)}

        def of_forum(forum: dict[str, Any]) -> dict[str, Any]:
            mine = {t["id"] for t in threads if t["forum_id"] == forum["id"]}
            return {"comment_count": sum(c["thread_id"] in mine for c in comments)}

        assert_columns(User.__table__, rows(session, User.__table__), of_user)
        assert_columns(Thread.__table__, threads, of_thread)
        assert_columns(Forum.__table__, rows(session, Forum.__table__), of_forum)

    return SimpleNamespace(
        Base=Base, User=User, Forum=Forum, Thread=Thread, Comment=Comment, Quote=Quote, check=check
    )


@functools.cache
def orphans(strategy: str = "sql") -> SimpleNamespace:
    """Children one step below their parent, with which they go; nothing but the parent's row holds two writers apart."""

    class Base(DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = f"o_{strategy}_parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        children: Mapped[list[Child]] = relationship(
            "Child", cascade="all, delete-orphan", back_populates="parent"
        )
        n: Mapped[int] = count_of("children", strategy=strategy)

    class Child(Base):
        __tablename__ = f"o_{strategy}_child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int] = mapped_column(ForeignKey(f"o_{strategy}_parent.id"), index=True)
        parent: Mapped[Parent] = relationship(Parent, back_populates="children")

    return SimpleNamespace(Base=Base, Parent=Parent, Child=Child)
