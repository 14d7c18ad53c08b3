"""A library, its readers, and the process that reads it from elsewhere.

The *readers* are the shapes in which applications ask: each is a small function that asks once and gives plain
data, with the cache or without it, so that answers can be compared. They run here, and in another process
(:mod:`tests.writes.process`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    ForeignKey,
    MetaData,
    String,
    Table,
    event,
    exists,
    func,
    insert,
    select,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    immediateload,
    joinedload,
    mapped_column,
    relationship,
    selectin_polymorphic,
    selectinload,
    subqueryload,
    with_polymorphic,
)

from querycache import QueryCache
from querycache.options import RelationshipCache

__all__ = [
    "READERS",
    "Asking",
    "Author",
    "Base",
    "Book",
    "Commit",
    "Employee",
    "Engineer",
    "Loan",
    "Manager",
    "Tag",
    "book_tag",
    "configure_sqlite",
    "fill_library",
    "read",
    "read_and_tell",
]


class Base(DeclarativeBase):
    metadata = MetaData()


class Author(Base):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))
    books: Mapped[list[Book]] = relationship(
        back_populates="author", cascade="all, delete", passive_deletes=True, order_by="Book.id"
    )


book_tag = Table(
    "book_tag",
    Base.metadata,
    Column("book_id", ForeignKey("book.id", ondelete="CASCADE"), primary_key=True),
    Column("tag_id", ForeignKey("tag.id", ondelete="CASCADE"), primary_key=True),
)


class Book(Base):
    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(40))
    price: Mapped[int]
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id", ondelete="CASCADE"))
    author: Mapped[Author] = relationship(back_populates="books")
    loans: Mapped[list[Loan]] = relationship(passive_deletes="all", order_by="Loan.id")
    tags: Mapped[list[Tag]] = relationship(
        secondary=book_tag, passive_deletes=True, back_populates="books", order_by="Tag.id"
    )


class Loan(Base):
    """A loan outlives its book: the database sets ``book_id`` to NULL."""

    __tablename__ = "loan"

    id: Mapped[int] = mapped_column(primary_key=True)
    reader: Mapped[str] = mapped_column(String(40))
    book_id: Mapped[int | None] = mapped_column(ForeignKey("book.id", ondelete="SET NULL"))


class Tag(Base):
    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))
    books: Mapped[list[Book]] = relationship(
        secondary=book_tag, passive_deletes=True, back_populates="tags", order_by="Book.id"
    )


class Employee(Base):
    __tablename__ = "employee"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    name: Mapped[str] = mapped_column(String(40))


class Manager(Employee):
    """Single-table inheritance."""

    __mapper_args__ = {"polymorphic_identity": "manager"}

    bonus: Mapped[int | None]


class Engineer(Employee):
    """Joined-table inheritance."""

    __tablename__ = "engineer"
    __mapper_args__ = {"polymorphic_identity": "engineer"}

    id: Mapped[int] = mapped_column(ForeignKey("employee.id", ondelete="CASCADE"), primary_key=True)
    skill: Mapped[str] = mapped_column(String(40))


def fill_library(connection: Connection) -> None:
    """Make the library what it is before every write, whatever it was."""
    for table in reversed(Base.metadata.sorted_tables):
        connection.execute(table.delete())
    rows: Mapping[Any, list[dict[str, object]]] = {
        Author.__table__: [{"id": n, "name": f"author {n}"} for n in (1, 2, 3)],
        Book.__table__: [
            {"id": n, "title": f"book {n}", "price": 10 * n, "author_id": 1 + n % 2} for n in (1, 2, 3, 4)
        ],
        Tag.__table__: [{"id": n, "name": f"tag {n}"} for n in (1, 2, 3)],
        book_tag: [{"book_id": b, "tag_id": t} for b, t in ((1, 1), (1, 2), (2, 1), (4, 2))],
        Loan.__table__: [{"id": n, "reader": f"reader {n}", "book_id": n} for n in (1, 2, 3)],
        Employee.__table__: [
            {"id": 1, "kind": "employee", "name": "Ann", "bonus": None},
            {"id": 2, "kind": "manager", "name": "Bob", "bonus": 5},
            {"id": 3, "kind": "engineer", "name": "Cid", "bonus": None},
            {"id": 4, "kind": "engineer", "name": "Dan", "bonus": None},
        ],
        Engineer.__table__: [{"id": 3, "skill": "C"}, {"id": 4, "skill": "D"}],
    }
    for table, values in rows.items():
        connection.execute(insert(table), values)


def configure_sqlite(engine: Engine) -> Engine:
    """Enforce foreign keys, as the other databases do."""
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def configure(connection: Any, record: object) -> None:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = OFF")

    return engine


class Commit:
    """The COMMIT of an engine, in the hands of a test. To be made before anybody attaches to the engine.

    Attributes:
        instead: what to do instead of it, given the real one and the connection; None for the real one.

    Args:
        steps: the methods of the dialect that are meant.
    """

    def __init__(self, engine: Engine, *steps: str) -> None:
        self.instead: Callable[[Callable[[Any], None], Any], None] | None = None
        for step in steps or ("do_commit",):
            setattr(engine.dialect, step, partial(self._run, getattr(engine.dialect, step)))

    def _run(self, real: Callable[..., None], connection: Any, *arguments: Any, **more: Any) -> None:
        if self.instead is None:
            real(connection, *arguments, **more)
        else:
            self.instead(lambda connection: real(connection, *arguments, **more), connection)


# --- readers --------------------------------------------------------------------------------------


class Asking:
    """How a reader asks: through the cache, or past it."""

    def __init__(self, session: Session, *, cached: bool) -> None:
        self.session = session
        self.cached = cached

    def __call__(self, statement: Any, *relationships: Any) -> Any:
        if self.cached:
            statement = statement.options(*map(RelationshipCache, relationships))
            statement = statement.execution_options(cache_key=True)
        return self.session.execute(statement)

    def rows(self, statement: Any) -> list[list[object]]:
        return sorted(map(list, self(statement)))

    def objects(self, statement: Any, *relationships: Any) -> list[Any]:
        return sorted(
            self(statement, *relationships).unique().scalars(),
            key=lambda each: (type(each).__name__, each.id),
        )


Reader = Callable[[Asking], object]


def _book(book: Book) -> list[object]:
    return [book.id, book.title, book.price, book.author_id]


def _shelves(ask: Asking, *options: Any, lazily: tuple[Any, ...] = ()) -> object:
    authors = ask.objects(select(Author).options(*options), *lazily)
    return [[author.id, author.name, [_book(book) for book in author.books]] for author in authors]


def _labels(ask: Asking, *options: Any, lazily: tuple[Any, ...] = ()) -> object:
    books = ask.objects(select(Book).options(*options), *lazily)
    return [[book.id, [[tag.id, tag.name] for tag in book.tags]] for book in books]


def _covers(ask: Asking, *options: Any, lazily: tuple[Any, ...] = ()) -> object:
    books = ask.objects(select(Book).options(*options), *lazily)
    return [[book.title, book.author.id, book.author.name] for book in books]


def _staff(ask: Asking, statement: Any) -> object:
    return [
        [type(each).__name__, each.id, each.name, getattr(each, "skill", None), getattr(each, "bonus", None)]
        for each in ask.objects(statement)
    ]


_anybody = with_polymorphic(Employee, [Engineer, Manager])
_counts = select(Book.author_id, func.count().label("books")).group_by(Book.author_id).subquery()


def _cheap() -> Any:
    return select(Book.author_id).where(Book.price < 25)


READERS: Mapping[str, Reader] = {
    "point lookup": lambda ask: list(map(_book, ask.objects(select(Book).where(Book.id == 2)))),
    "point lookup of a new row": lambda ask: list(map(_book, ask.objects(select(Book).where(Book.id == 9)))),
    "several points": lambda ask: list(map(_book, ask.objects(select(Book).where(Book.id.in_([1, 2, 9]))))),
    "by foreign key": lambda ask: list(map(_book, ask.objects(select(Book).where(Book.author_id == 1)))),
    "by other foreign key": lambda ask: ask.rows(select(Book.id, Book.price).where(Book.author_id == 3)),
    "filtered list": lambda ask: list(map(_book, ask.objects(select(Book).where(Book.price > 15)))),
    "count": lambda ask: ask.rows(select(func.count()).select_from(Book)),
    "sums": lambda ask: ask.rows(select(Book.author_id, func.count()).group_by(Book.author_id)),
    "join": lambda ask: ask.rows(select(Book.title, Author.name).join(Book.author)),
    "outer join": lambda ask: ask.rows(
        select(Loan.id, func.coalesce(Book.title, "-")).outerjoin(Book, Book.id == Loan.book_id)
    ),
    "subquery": lambda ask: ask.rows(select(Author.id, Author.name).where(Author.id.in_(_cheap()))),
    "subquery in FROM": lambda ask: ask.rows(
        select(Author.name, _counts.c.books).join(_counts, _counts.c.author_id == Author.id)
    ),
    "exists": lambda ask: ask.rows(select(Author.id).where(exists().where(Book.author_id == Author.id))),
    "CTE": lambda ask: ask.rows(
        select(Author.name).join(cte := _cheap().cte("cheap"), cte.c.author_id == Author.id)
    ),
    "union": lambda ask: ask.rows(select(Author.name).union_all(select(Book.title))),
    "lazy": lambda ask: _shelves(ask, lazily=(Author.books,)),
    "joined": lambda ask: _shelves(ask, joinedload(Author.books)),
    "selectin": lambda ask: _shelves(ask, selectinload(Author.books)),
    "subqueryload": lambda ask: _shelves(ask, subqueryload(Author.books)),
    "immediate": lambda ask: _shelves(ask, immediateload(Author.books)),
    "many-to-one, lazy": lambda ask: _covers(ask, lazily=(Book.author,)),
    "many-to-one, joined": lambda ask: _covers(ask, joinedload(Book.author)),
    "many-to-one, selectin": lambda ask: _covers(ask, selectinload(Book.author)),
    "many-to-one, subqueryload": lambda ask: _covers(ask, subqueryload(Book.author)),
    "many-to-one, immediate": lambda ask: _covers(ask, immediateload(Book.author)),
    "loans": lambda ask: [
        [book.id, [loan.reader for loan in book.loans]]
        for book in ask.objects(select(Book).options(selectinload(Book.loans)))
    ],
    "loans by foreign key": lambda ask: ask.rows(select(Loan.id).where(Loan.book_id == 2)),
    "many-to-many, lazy": lambda ask: _labels(ask, lazily=(Book.tags,)),
    "many-to-many, joined": lambda ask: _labels(ask, joinedload(Book.tags)),
    "many-to-many, selectin": lambda ask: _labels(ask, selectinload(Book.tags)),
    "many-to-many, subqueryload": lambda ask: _labels(ask, subqueryload(Book.tags)),
    "many-to-many, immediate": lambda ask: _labels(ask, immediateload(Book.tags)),
    "secondary table": lambda ask: ask.rows(select(book_tag).where(book_tag.c.tag_id == 1)),
    "inheritance": lambda ask: _staff(ask, select(Employee)),
    "with_polymorphic": lambda ask: _staff(ask, select(_anybody)),
    "selectin_polymorphic": lambda ask: _staff(
        ask, select(Employee).options(selectin_polymorphic(Employee, [Engineer, Manager]))
    ),
    "joined inheritance": lambda ask: [
        [each.id, each.name, each.skill] for each in ask.objects(select(Engineer).where(Engineer.id < 100))
    ],
    "single inheritance": lambda ask: [
        [each.id, each.name, each.bonus] for each in ask.objects(select(Manager))
    ],
    "engineer by key": lambda ask: [
        [each.id, each.name, each.skill] for each in ask.objects(select(Engineer).where(Engineer.id == 3))
    ],
}


def read(session: Session, *, cached: bool, names: Iterable[str] = READERS) -> dict[str, object]:
    """What the readers answer. The session is emptied before each, so that none profits from another."""
    answers = {}
    for name in names:
        session.expunge_all()
        answers[name] = READERS[name](Asking(session, cached=cached))
    return answers


def read_and_tell(
    session: Session, cache: QueryCache, names: Iterable[str] = READERS
) -> tuple[dict[str, object], list[str]]:
    """What the readers answer through the cache, and those of them that were not answered by it alone."""
    answers, others = {}, []
    for name in names:
        with cache.recording() as events:
            answers |= read(session, cached=True, names=(name,))
        if not events or any(event.outcome != "hit" for event in events):
            others.append(name)
    return answers, others
