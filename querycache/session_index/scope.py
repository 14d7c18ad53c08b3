"""Which sessions an index is for.

A target is whatever an application makes its sessions with: a Session class, a sessionmaker, a
scoped_session, their asyncio counterparts, or one session. An AsyncSession is a wrapper around a sync
Session which does the work, so everything below speaks of sync sessions.
"""

from __future__ import annotations

import sys
import weakref
from types import ModuleType
from typing import Any

from sqlalchemy.orm import Session, scoped_session, sessionmaker

from querycache.errors import ConfigurationError

__all__ = ["Scope", "sync_session"]


def _asyncio() -> ModuleType | None:
    """SQLAlchemy's asyncio package where the application uses it; importing it needs greenlet."""
    return sys.modules.get("sqlalchemy.ext.asyncio")


def sync_session(session: Any) -> Session:
    """The sync Session behind a Session, an AsyncSession, or the current one of a scoped_session.

    :raises ConfigurationError: for anything else.
    """
    if isinstance(session, Session):
        return session
    if isinstance(session, scoped_session):
        return sync_session(session())
    asyncio = _asyncio()
    if asyncio is not None:
        if isinstance(session, asyncio.AsyncSession):
            return session.sync_session  # type: ignore[no-any-return]
        if isinstance(session, asyncio.async_scoped_session):
            return sync_session(session())
    raise ConfigurationError(
        f"a session index looks into a Session, an AsyncSession or a scoped_session, not into {session!r}"
    )


class Scope:
    """The sessions that a target stands for."""

    def __init__(self, target: Any) -> None:
        """
        :param target: a Session class, sessionmaker, scoped_session or Session, or the asyncio counterpart of
            one of these.
        :raises ConfigurationError: if it is something else.
        """
        self.target = target
        self._session: weakref.ref[Session] | None = None
        self._class: type[Session] = Session
        self._async_class: type[Any] | None = None
        self._resolve(target)

    def __repr__(self) -> str:
        return repr(self.target)

    @property
    def event_target(self) -> type[Session] | Session | None:
        """Where to listen for SQLAlchemy's session events; None once the one session is gone.

        It can be wider than the scope, so listeners ask :meth:`covers`.
        """
        return self._class if self._session is None else self._session()

    def covers(self, session: Session) -> bool:
        """Whether the (sync) session belongs to the target."""
        if self._session is not None:
            return self._session() is session
        if not isinstance(session, self._class):
            return False
        if self._async_class is None:
            return True
        asyncio = _asyncio()
        return asyncio is not None and isinstance(asyncio.async_session(session), self._async_class)

    def _resolve(self, target: Any) -> None:
        asyncio = _asyncio()
        scoped = (scoped_session,) if asyncio is None else (scoped_session, asyncio.async_scoped_session)
        if isinstance(target, scoped):
            self._resolve(target.session_factory)
        elif isinstance(target, sessionmaker):
            self._resolve(target.class_)
        elif isinstance(target, type) and issubclass(target, Session):
            self._class = target
        elif isinstance(target, Session):
            self._session = weakref.ref(target)
            self.target = f"one {type(target).__name__}"
        elif asyncio is not None and isinstance(target, asyncio.AsyncSession):
            self._resolve(target.sync_session)
        elif asyncio is not None and isinstance(target, asyncio.async_sessionmaker):
            self._async_class = target.class_
            if not target.kw.get("sync_session_class"):
                # A class of its own, as a sessionmaker makes for itself: others may make sessions of the same one.
                shared = target.class_.sync_session_class
                target.configure(sync_session_class=type(shared.__name__, (shared,), {}))
            self._resolve(target.kw["sync_session_class"])
        elif asyncio is not None and isinstance(target, type) and issubclass(target, asyncio.AsyncSession):
            self._async_class = target
            self._resolve(self._async_class.sync_session_class)
        else:
            raise ConfigurationError(
                f"SessionIndex({self.target!r}): a session index is for a Session class, a sessionmaker, a "
                "scoped_session, a session, or the asyncio counterpart of one of these"
            )
