"""What an index should hold, worked out the slow and obvious way from the objects themselves."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.orm import LoaderCallableStatus, Session
from sqlalchemy.sql import ClauseElement

from querycache.session_index import Index, ObjectSet

UNKNOWN = object()


def column(obj: Any, key: str, persisted: bool = False) -> Any:
    """The value of a column attribute as far as the object has it in memory."""
    state = inspect(obj)
    if persisted and key in state.committed_state:
        value = state.committed_state[key]
        return UNKNOWN if isinstance(value, LoaderCallableStatus) else value
    if key in state.dict:
        value = state.dict[key]
        return UNKNOWN if isinstance(value, ClauseElement) else value
    if key in state.expired_attributes:
        return UNKNOWN
    deleted = key in state.committed_state and state.committed_state[key] is not LoaderCallableStatus.NO_VALUE
    if state.key is not None and not deleted and (key in state.callables or key == "bio"):
        return UNKNOWN
    return None  # it was never set, or was deleted, and SQLAlchemy says None without asking


def related(obj: Any, key: str, persisted: bool = False) -> Any:
    """The object or objects of a relationship as far as they are loaded."""
    state = inspect(obj)
    many = state.mapper.relationships[key].uselist
    if key not in state.dict:
        return UNKNOWN if state.key is not None else ([] if many else None)
    if persisted and key in state.committed_state:
        value = state.committed_state[key]
        return UNKNOWN if isinstance(value, LoaderCallableStatus) else value
    return state.dict[key]


def parent(obj: Any, key: str, foreign: str, persisted: bool = False) -> Any:
    """The parent by relationship: the object, or its primary key where only that is loaded."""
    if persisted and foreign in inspect(obj).committed_state:
        return column(obj, foreign, persisted)  # the relationship may be loaded by the new foreign key
    target = related(obj, key, persisted)
    state = inspect(obj)
    if target is not UNKNOWN and target is not None:
        return target
    if target is None and not persisted and key in state.dict and key in state.committed_state:
        return None
    return column(obj, foreign, persisted)


Oracle = Callable[[Any], Any]


def check(
    index: Index[Any],
    session: Session,
    keys_of: Oracle,
    values: Iterable[Any],
    persisted: bool = False,
    matches: Callable[[Any, Any], bool] = lambda key, value: bool(key == value),
) -> None:
    """Assert that every lookup answers like a look at every object.

    :param keys_of: the list of keys of an object, or UNKNOWN.
    :param values: the values to look up.
    """
    members = [
        obj
        for obj in session
        if isinstance(obj, index._mapper.class_) and (not persisted or inspect(obj).key is not None)
    ]
    keys = [(obj, keys_of(obj)) for obj in members]
    unknown = ObjectSet(obj for obj, its in keys if its is UNKNOWN)
    for value in values:
        found = index.lookup(session, value, persisted=persisted)
        known = ObjectSet(
            obj for obj, its in keys if its is not UNKNOWN and any(matches(key, value) for key in its)
        )
        where = f"{index} for {value!r}{' as of the last flush' if persisted else ''}"
        assert found.known == known, f"{where}: {describe(found.known ^ known)}"
        assert found.unknown == unknown, f"{where}: unknown {describe(found.unknown ^ unknown)}"


def describe(objects: Iterable[Any]) -> str:
    """What an object is made of, for a failure that cannot be repeated easily."""
    return "; ".join(
        f"{type(obj).__name__} key={state.key} session={state.session_id} values={state.dict} "
        f"expired={state.expired_attributes} callables={list(state.callables)} "
        f"committed={state.committed_state} deleted={state.deleted} modified={state.modified}"
        for obj in objects
        for state in [inspect(obj)]
    )


def check_structure(index: Index[Any], session: Session) -> None:
    """Assert that the index holds no empty bucket, no dead entry, and nothing twice."""
    record = index._tracker.records.get(session.hash_key)
    if record is None:
        return
    for (its_index, _), contents in record.views.items():
        assert all(contents.buckets.values()), "an empty bucket"
        for ident, keys in contents.placed.items():
            if isinstance(keys, tuple):
                assert all(ident in contents.buckets[key] for key in keys)
            else:
                assert ident in contents.unknown
        assert sum(map(len, contents.buckets.values())) == sum(
            len(keys) for keys in contents.placed.values() if isinstance(keys, tuple)
        )
        if contents.order is not None:
            assert list(contents.order) == sorted(  # type: ignore[type-var]
                key
                for key in contents.buckets
                if key is not None and not (isinstance(key, tuple) and None in key)
            )
        assert contents.footprints.keys() <= contents.unknown.keys()
        assert contents.related.keys() <= contents.placed.keys(), (
            its_index,
            contents.related,
            contents.placed,
        )
        assert {i for marks in contents.dependents.values() for i in marks} == set(contents.related)
    for entry in record._entries.values():
        assert isinstance(entry, weakref.ref) and entry.uses > 0
