"""Indexes over the objects that are already in a Session: finding them by criteria, without SQL.

A Session knows its objects by identity only. A ``before_flush`` handler that asks "which of the orders that
are being saved belong to this customer?" has the choice between a query, which it must not flush for and
which does not see what is pending, and looking through all objects of the session. A session index answers
such questions from a dictionary::

    indexes = SessionIndex(Session)
    orders_of = indexes.index(Order.customer)

    @event.listens_for(Session, "before_flush")
    def check_credit(session, flush_context, instances):
        for customer in session.dirty:
            for order in orders_of(session, customer):
                ...

It began as the "SessionIndexing" recipe in SQLAlchemy's wiki, whose interface works here unchanged::

    @indexes.indexed(User, "user_byname")
    def user_byname(obj):
        return obj.name

    indexes.user_byname(session, "b")

An index holds every object of its class that is pending or persistent in the session, under the key that it
has at the moment of the lookup, whatever happened to it since the last one. It knows what is loaded and
nothing else: an object whose key is expired or deferred is *unknown*, and :meth:`Index.lookup` tells those
apart. It keeps no object alive. A class without an index, and a session without a lookup, pay nothing.

How it works: events mark the objects that may have changed (``tracking``), and a lookup first reads the
keys of the marked ones (``reading``, ``parts``, ``keys``) and moves them to where they belong
(``contents``). So the first lookup of an index in a session looks at all its objects, and each further one
only at what has changed since.
"""

from __future__ import annotations

from querycache.session_index.errors import IndexFunctionError, InvalidKey, UniqueConflict, UnknownKeys
from querycache.session_index.index import Index
from querycache.session_index.registry import SessionIndex
from querycache.session_index.results import Difference, Matches, ObjectSet

__all__ = [
    "Difference",
    "Index",
    "IndexFunctionError",
    "InvalidKey",
    "Matches",
    "ObjectSet",
    "SessionIndex",
    "UniqueConflict",
    "UnknownKeys",
]
