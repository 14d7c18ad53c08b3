"""Statement options: ``FromCache`` for a select, ``RelationshipCache`` for the lazy loads that come after it.

These are the options that SQLAlchemy's own example of dogpile caching made known. A page that shows many
comments of few authors loads each author once, for everybody.
"""

from sqlalchemy import ForeignKey, create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, sessionmaker

from querycache import FromCache, QueryCache, RelationshipCache


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "authors"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Comment(Base):
    __tablename__ = "comments"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
    body: Mapped[str]
    author: Mapped[Author] = relationship()


engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
Session = sessionmaker(engine)
cache = QueryCache("memory://")
cache.attach(Session)
emitted: list[str] = []
event.listen(engine, "before_cursor_execute", lambda *args: emitted.append(args[2]))

with Session.begin() as session:
    authors = [Author(name=name) for name in ("Ada", "Grace")]
    session.add_all([Comment(body=f"comment {number}", author=authors[number % 2]) for number in range(6)])


def page(*options: FromCache | RelationshipCache) -> list[str]:
    """What a page shows: every comment with the name of its author."""
    emitted.clear()
    with Session() as session:
        statement = select(Comment).options(*options).order_by(Comment.id)
        return [f"{comment.body} by {comment.author.name}" for comment in session.scalars(statement)]


expected = page()
print(f"without a cache:                  {len(emitted)} statements")
assert len(emitted) == 3

# The comments always from the database, the authors from the cache.
authors_cached = RelationshipCache(Comment.author, ttl=600)
page(authors_cached)
assert page(authors_cached) == expected
print(f"authors cached:                   {len(emitted)} statement")
assert len(emitted) == 1

# Both from the cache. (joinedload or selectinload would make one entry of them; here each author is an entry
# of its own, which any other page may use.)
both = FromCache(ttl=30), authors_cached
page(*both)
assert page(*both) == expected
print(f"comments and authors cached:      {len(emitted)} statements")
assert not emitted
