"""Showing new values of aggregates to the objects that a Session holds."""

from __future__ import annotations

from typing import Any

from sqlalchemy import inspect as sqlalchemy_inspect
from sqlalchemy import select
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import set_committed_value

from querycache.denormalize.aggregate import Aggregate
from querycache.denormalize.attributes import Key, attribute_columns, key_condition
from querycache.denormalize.locks import chunks, parameters
from querycache.denormalize.strategies import STRATEGIES
from querycache.denormalize.work import connection_written

__all__ = ["Shown", "renew", "show"]

Shown = dict[Any, set[str]]
"""What a rollback to a savepoint takes back: the attributes by the identity of their object."""


def show(session: Session, stale: dict[Aggregate, set[Key]], shown: Shown) -> None:
    """Have the parents that are in the session see their new values, and note in `shown` what a rollback to the savepoint
    would take back: also of parents that are loaded only until then.

    The attribute is expired, so the next access reads it; under asyncio, where an access cannot, it is read now.
    """
    by_root: dict[Any, dict[Any, list[str]]] = {}
    identities: dict[Any, Any] = {}
    held: dict[Any, Any] = {}
    nested = session.in_nested_transaction()
    for aggregate, keys in stale.items():
        root = aggregate.chain.root
        for key in keys:
            identity = identities.get((root, key))
            if identity is None:
                identity = identities[root, key] = root.identity_key_from_primary_key(key)
            if nested:
                shown.setdefault(identity, set()).update((aggregate.key, *aggregate.carried))
            if identity not in held:
                held[identity] = session.identity_map.get(identity)
            if (instance := held[identity]) is not None:
                state = sqlalchemy_inspect(instance)
                if aggregate.key in state.dict or _is_to_load(aggregate, state):
                    by_root.setdefault(root, {}).setdefault(state, []).append(aggregate.key)
                for name in aggregate.carried:
                    if name in state.dict and name not in state.committed_state:
                        by_root.setdefault(root, {}).setdefault(state, []).append(name)
    renew(session, by_root)


def _is_to_load(aggregate: Aggregate, state: Any) -> bool:
    """Whether an attribute that is not loaded must be made to, since no access would: a new parent has none where NULL was
    inserted, and the unit of work has expired what it wrote."""
    unloaded = STRATEGIES[aggregate.strategy].expires or aggregate.key not in state.expired_attributes
    return unloaded and state.mapper.isa(aggregate.chain.root)


def renew(session: Session, by_root: dict[Any, dict[Any, list[str]]], *, readable: bool = True) -> None:
    """Forget values in memory, or read them where an access later could not."""
    for root, states in by_root.items():
        if readable and session.get_bind(mapper=root).dialect.is_async:
            _read(session, root, states)
        else:
            for state, names in states.items():
                session.expire(state.object, names)


def _read(session: Session, root: Any, states: dict[Any, list[str]]) -> None:
    names = sorted({name for held in states.values() for name in held})
    keys = [attribute.key for attribute in (root.get_property_by_column(c) for c in root.primary_key)]
    columns = attribute_columns(root.class_, keys)
    statement = select(*columns, *attribute_columns(root.class_, names)).where(key_condition(columns))
    connection = connection_written(session, root)
    by_key = {state.identity: state for state in states}
    for chunk in chunks(by_key):
        for row in connection.execute(statement, parameters(chunk)):
            state = by_key[tuple(row[: len(keys)])]
            for name, value in zip(names, row[len(keys) :], strict=True):
                if name in states[state]:
                    set_committed_value(state.object, name, value)
