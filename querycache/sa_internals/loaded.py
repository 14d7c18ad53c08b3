"""What the objects of a Session have loaded, and how they forget what they were loaded in vain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy.orm import Session, loading

__all__ = ["Loaded", "forget_loaded_since", "loaded_objects", "loads_so_far"]


def loads_so_far() -> int:
    """A number that grows with each result that the ORM loads in this process."""
    number: int = loading._new_runid()
    return number


class Loaded(NamedTuple):
    """What an object of a Session had loaded.

    Attributes:
        names: of the attributes that it had.
        expired: whether it was expired as a whole.
        pending: by name of a collection that is not loaded what the application has added to it or removed, and what is noted
            of it in the history.
    """

    names: frozenset[str]
    expired: bool
    pending: Mapping[str, tuple[object, object]]


def loaded_objects(session: Session) -> Mapping[Any, Loaded]:
    """What a Session's objects have loaded, by their states."""
    return {state: _loaded(state) for state in session.identity_map.all_states()}


def _loaded(state: Any) -> Loaded:
    pending = state.__dict__.get("_pending_mutations")
    history = state.committed_state
    changes = (
        {name: (each, history[name]) for name, each in pending.items() if name in history} if pending else {}
    )
    return Loaded(frozenset(state.dict), state.expired, changes)


def forget_loaded_since(session: Session, before: int, loaded: Mapping[Any, Loaded] | None) -> None:
    """Forget what a Session's objects were given by results loaded since then.

    What the application has changed is left alone in objects that were there, and nothing was by loading.

    Args:
        session: whose.
        before: what :func:`loads_so_far` gave then.
        loaded: what they had loaded then, if that was noted. Without it, what was loaded into objects that were there is not
            forgotten, and nothing of those that have changed.
    """
    for state in session.identity_map.all_states():
        was = None if loaded is None else loaded.get(state)
        if was is not None:
            _forget_since(session, state, was)
        elif state.runid is not None and state.runid > before and (loaded is not None or not state.modified):
            # neither this nor the names below go on to what the object is related to, which may have been changed
            state._expire(state.dict, session.identity_map._modified)


def _forget_since(session: Session, state: Any, was: Loaded) -> None:
    instance, changed = state.obj(), state.committed_state.keys() - was.pending.keys()
    names = (state.manager.keys() & state.dict.keys()) - was.names - changed
    if instance is None or not names:
        return
    session.expire(instance, names)
    state.expired = was.expired
    for name in names & was.pending.keys():
        state._pending_mutations[name], state.committed_state[name] = was.pending[name]
