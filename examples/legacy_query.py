"""The classic recipe: a string on a query, and the result is found again by that string alone."""

from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from querycache import ConfigurationError, QueryCache
from querycache.legacy import CachingQuery


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


engine = create_engine("sqlite://")
Base.metadata.create_all(engine)

# type checkers take session.query() for the plain Query, hence the Any
Session: Any = sessionmaker(engine, query_cls=CachingQuery)

with Session.begin() as session:
    session.add_all([User(name="u1"), User(name="u2"), User(name="u3")])

# Without a cache the key would do nothing, silently. That is an error instead.
try:
    Session().query(User).with_cache_key("u2andu3")
except ConfigurationError as error:
    print("no cache yet:", error)

cache = QueryCache("memory://")
cache.attach(Session)
emitted: list[str] = []
event.listen(engine, "before_cursor_execute", lambda *args: emitted.append(args[2]))

session = Session()
first = session.query(User).with_cache_key("u2andu3").filter(User.name.in_(["u2", "u3"])).all()
print("asked:       ", [user.name for user in first], f"by {len(emitted)} statement")
assert len(emitted) == 1
session.close()

# A new session, the same key, and no filter: the key alone finds the two users.
session = Session()
again = session.query(User).with_cache_key("u2andu3").all()
print("by the key:  ", [user.name for user in again], f"by {len(emitted) - 1} statements")
assert [user.name for user in again] == ["u2", "u3"]
assert len(emitted) == 1

# They are this session's own objects: it may change them, and nobody else sees that before it commits.
assert all(user in session for user in again)
again[0].name = "changed, not committed"
other = Session().query(User).with_cache_key("u2andu3").first()
print("elsewhere:   ", other.name)
assert other is not again[0] and other.name == "u2"
session.rollback()

cache.invalidate(key="u2andu3")
everybody = Session().query(User).with_cache_key("u2andu3").all()
print("invalidated: ", [user.name for user in everybody], "(no filter this time, so these are stored now)")
assert len(everybody) == 3
