"""The classic caching recipe, for applications that use ``Session.query()``.

From SQLAlchemy 0.5 on, a subclass of ``Query`` called ``CachingQuery`` was how results were cached: a string
was put on a query, and whoever put the same string on a query was given the result that had been kept under
it. Here is that class on the cache of this library::

    Session = sessionmaker(engine, query_cls=CachingQuery)
    cache.attach(Session)

    session.query(User).with_cache_key("u2andu3").filter(User.name.in_(["u2", "u3"])).all()
    ...
    another_session.query(User).with_cache_key("u2andu3").all()     # the same two users, without SQL

The string alone decides: the second query has no filter, and gets the two users all the same. (Queries that
are never to share an answer with others take ``.execution_options(cache_key="…")`` instead.) The objects are
the Session's own, loaded from stored rows; no two Sessions ever share one.
"""

from __future__ import annotations

from typing import Any, TypeVar

from sqlalchemy.orm import Query, Session

from querycache.errors import ConfigurationError
from querycache.interceptor import Interceptor

__all__ = ["CachingQuery"]

T = TypeVar("T")
Self = TypeVar("Self", bound="CachingQuery[Any]")


class CachingQuery(Query[T]):
    """A ``Query`` whose result can be kept under a string, and found again by it.

    Give it to a sessionmaker or a Session as ``query_cls``, and attach a :class:`~querycache.QueryCache`
    there. Without :meth:`with_cache_key` it is SQLAlchemy's ``Query`` and nothing else.
    """

    def with_cache_key(self: Self, key: str) -> Self:
        """Answer this query from the cache, by this string alone.

        Whatever was stored under the string first is the answer, until it expires, a table it was read from
        is written, or ``cache.invalidate(key=…)``. Filters, parameters and limits (also that of ``first()``)
        decide what is stored, not what is found. Where something else is stored than what this query returns
        (another entity, other columns), the database is asked, with a warning.

        Of a Session with several databases (binds, shards), each has its own answer under the string.

        Where tenants, locales or roles must not share answers, give the cache a ``scope``: it is part of what is
        looked up, here as elsewhere.

        Other options are given as always: ``.execution_options(cache_ttl=60, cache_region="long")``.

        Args:
            key: any non-empty string.
        Returns:
            A query with that key.
        Raises:
            ConfigurationError: the key is no such string, or no cache is attached to the query's Session.
        """
        if not isinstance(key, str) or not key:
            raise ConfigurationError(f"with_cache_key({key!r}): give a non-empty string")
        return _checked(self.execution_options(cache_key=key, cache_exact=True))

    def with_session(self: Self, session: Session) -> Self:
        """The query on another Session; as for :meth:`with_cache_key`, a cache must be attached to it."""
        return _checked(super().with_session(session))

    # What these return is not the result of the query, so the string alone cannot stand for it: they are
    # cached under the string and their own statement.

    def get(self, ident: Any) -> Any:
        """As ``Query.get()``; of several objects asked for under one key, each is the right one."""
        return Query.get(_by_its_own_statement(self), ident)

    def count(self) -> int:
        """As ``Query.count()``; kept apart from the result that is counted."""
        return Query.count(_by_its_own_statement(self))


def _by_its_own_statement(query: Self) -> Self:
    return (
        query.execution_options(cache_exact=False) if "cache_key" in query.get_execution_options() else query
    )


def _checked(query: Self) -> Self:
    """The query, if it does without a cache or finds one at its Session."""
    session: Session | None = query.session
    key = query.get_execution_options().get("cache_key")
    if key is None or session is None:
        return query
    if not any(isinstance(handler, Interceptor) for handler in session.dispatch.do_orm_execute):
        raise ConfigurationError(
            f"a query with cache_key={key!r}, but no cache is attached to its Session. Call "
            "QueryCache.attach() with that Session, or with the sessionmaker that made it"
        )
    return query
