"""What is known of the transaction of a database connection: what it has written, and when its snapshot began.

It is noted with the *database connection*, not with a Session: several Sessions may share one, and Core has none.

Where a transaction has a snapshot (REPEATABLE READ), the database settles with its first statement what it sees. What was
there before is remembered then, and an answer of the cache must be as old. Applications begin transactions in many ways,
some of which nobody tells of: by text, by a raw cursor, before the cache is attached. When such a snapshot began is not
known, and neither is what it may be given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Table
from sqlalchemy.engine import Connection, Dialect, TwoPhaseTransaction

from querycache import sa_internals
from querycache.flushed import FlushedRows
from querycache.ledger import Ledger, Snapshot
from querycache.phases import Marking
from querycache.regions import Regions
from querycache.tags import EVERYTHING
from querycache.textual import read_text
from querycache.wording import ENDING, first_word

__all__ = ["Expected", "Known", "Transaction", "Transactions"]

_SNAPSHOTS = ("REPEATABLE READ", "SERIALIZABLE", "SNAPSHOT")
_PERHAPS = "perhaps"
"""Said of a transaction that was begun by hand, and then given a statement that may have ended it."""


Expected = dict[tuple[Table, str | None], FlushedRows]
"""The rows that a flush has written, by table and the name of its schema."""


@dataclass(slots=True)
class Known:
    """What is known of a dialect, which holds this itself: it is to be forgotten with its engine.

    Attributes:
        watched: whether statements are noticed.
        settled: True once it is found out what its transactions see.
        old_views: True where they may keep an old view of the database for more than a statement.
        told: True where its driver may be told of isolation levels by itself.
        serializable: True if its transactions are SERIALIZABLE unless they are told otherwise.
    """

    watched: bool = False
    settled: bool = False
    old_views: bool = False
    told: bool = False
    serializable: bool = False


@dataclass(slots=True)
class Transaction:
    """What one database connection has written since its transaction began.

    Attributes:
        tags: the tags that are changed.
        named: those of them that the application has named itself.
        unresolved: what is expected of the flush of each Session, by its ``hash_key``: several may share a connection,
            and of those that the cache is not attached to nobody will tell.
        marking: what phase one has done.
        snapshot: for each ledger when the transaction's snapshot of the database began, None where that is not known; None
            where each statement sees what is committed.
    """

    tags: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    unresolved: dict[int, Expected] = field(default_factory=dict)
    marking: Marking = field(default_factory=Marking)
    snapshot: dict[Ledger, Snapshot | None] | None = None

    @property
    def wrote(self) -> bool:
        return bool(self.tags or self.unresolved)

    def hides(self, tags: Iterable[str]) -> bool:
        """True if an answer that depends on these tags could lack what this transaction has written."""
        return bool(self.unresolved) or EVERYTHING in self.tags or not self.tags.isdisjoint(tags)


class Transactions:
    """The transactions of the connections that pass by.

    Args:
        regions: whose ledgers are asked when a snapshot begins.
    """

    def __init__(self, regions: Regions) -> None:
        self._regions = regions
        self._key = f"querycache:{id(self)}"
        self._isolation_key = f"{self._key}:isolation"
        self._savepoint_key = f"{self._key}:savepoint"
        self._begun_key = f"{self._key}:begun"

    def known(self, dialect: Dialect) -> Known:
        found: Known | None = dialect.__dict__.get(self._key)
        if found is None:
            known = Known(
                told=sa_internals.is_told(dialect),
                serializable=sa_internals.is_serializable_by_default(dialect),
            )
            found = dialect.__dict__.setdefault(self._key, known)
        return found

    def of(self, info: Mapping[Any, Any]) -> Transaction | None:
        """The transaction of the connection with this ``info``; None while nothing is known of one."""
        found: Transaction | None = info.get(self._key)
        return found

    def ensure(self, info: dict[Any, Any]) -> Transaction:
        transaction = self.of(info)
        if transaction is None:
            transaction = info[self._key] = Transaction()
        return transaction

    def end(self, info: dict[Any, Any]) -> Transaction | None:
        """Forget a transaction that has ended. Returns what was known of it."""
        info.pop(self._savepoint_key, None)
        info.pop(self._begun_key, None)
        return self.forget(info)

    def forget(self, info: dict[Any, Any]) -> Transaction | None:
        """Forget what a transaction has done, and not how it began. Returns what was known."""
        known: Transaction | None = info.pop(self._key, None)
        return known

    # --- begun and ended by hand -----------------------------------------------------------------------

    def begin_by_hand(self, connection: Connection) -> None:
        """A statement of text is about to begin a transaction."""
        connection.info[self._begun_key] = True
        if self.takes_snapshots(connection):
            # perhaps at once, and in autocommit mode unlike other transactions
            self.expect_old_views(connection.dialect)
            self.before_statement(connection)

    def roll_back_by_hand(self, connection: Connection) -> None:
        connection.info.pop(self._begun_key, None)

    def committed_itself(self, connection: Connection, sql: str) -> None:
        """A statement has run, or failed, that commits itself."""
        info, word = connection.info, first_word(sql)
        begun = info.get(self._begun_key)
        is_open = sa_internals.tells_open(connection)
        if is_open is None and word in ENDING:
            is_open = read_text(sql, connection.dialect.name).begins
        if is_open is None:
            if begun is not None and word not in ("begin", "start"):
                self._begun_perhaps(info)
        elif not is_open:
            info.pop(self._begun_key, None)
        elif begun == _PERHAPS:
            info[self._begun_key] = True
        elif begun is None and sa_internals.is_autocommit(connection):
            # by one of several statements in a text, or by COMMIT AND CHAIN
            info[self._begun_key] = True
            self.began_unseen(connection)

    def failed(self, info: dict[Any, Any], is_open: bool | None) -> None:
        """A statement has failed. Some errors end a transaction at the server, as deadlocks do on MySQL.

        Args:
            is_open: whether the driver tells that one is open still.
        """
        if self._begun_key in info and not is_open:
            self._begun_perhaps(info)

    def _begun_perhaps(self, info: dict[Any, Any]) -> None:
        info[self._begun_key] = _PERHAPS
        self._see_unknown(info)

    def may_go_on(self, connection: Connection) -> bool:
        """True if after a statement that commits itself the transaction may be open still."""
        return self._begun_key in connection.info or not sa_internals.is_autocommit(connection)

    def is_autocommit(self, connection: Connection) -> bool:
        """True if each statement commits itself, or may: where the connection is set so, and nobody has said BEGIN."""
        begun = connection.info.get(self._begun_key)
        if begun == _PERHAPS:  # and what the driver tells may be from before an error
            return True
        return begun is None and sa_internals.is_autocommit(connection)

    def ends_savepoint(self, connection: Connection, word: str) -> bool:
        """True where SQLite may be about to commit: a savepoint outside of a transaction begins one."""
        if connection.dialect.name != "sqlite":
            return False
        if word == "savepoint" and not sa_internals.in_transaction(connection):
            connection.info[self._savepoint_key] = True
        return word == "release" and self._savepoint_key in connection.info

    # --- snapshots ---------------------------------------------------------------------------------------

    def settle(self, dialect: Dialect) -> None:
        """Find out, once, whether transactions of a dialect have snapshots unless they are told otherwise."""
        if dialect.name != "sqlite" and sa_internals.default_isolation_level(dialect) in _SNAPSHOTS:
            self.expect_old_views(dialect)
        known = self.known(dialect)
        known.serializable = sa_internals.is_serializable_by_default(dialect)
        known.settled = True  # only now: other threads go by it

    def expect_old_views(self, dialect: Dialect) -> None:
        """Find out what a transaction of this dialect sees whenever one begins."""
        known = self.known(dialect)
        if not known.old_views:
            sa_internals.tell_of_reading(dialect)
            known.old_views = True  # only now: other threads go by it

    def ask_driver(self, connection: Connection) -> None:
        """A transaction begins: see whether its driver was told of an isolation level by itself."""
        if sa_internals.driver_isolation_level(connection) in _SNAPSHOTS:
            self.expect_old_views(connection.dialect)

    def takes_snapshots(self, connection: Connection) -> bool:
        if connection.dialect.name == "sqlite":
            return self.known(connection.dialect).old_views
        return sa_internals.isolation_level(connection, self._begun_key in connection.info) in _SNAPSHOTS

    def isolate(self, connection: Connection, how: Literal["transaction", "session"]) -> None:
        """Text is about to set what this transaction sees, or all of this connection: nobody knows it from now on."""
        if how == "session":
            connection.info[self._isolation_key] = True
        self.expect_old_views(connection.dialect)
        self.see_unknown(connection)

    def see_unknown(self, connection: Connection) -> None:
        """Nobody knows when this transaction's snapshot began: it is given nothing, and its answers are not stored."""
        self._see_unknown(connection.info)

    def _see_unknown(self, info: dict[Any, Any]) -> None:
        self.ensure(info).snapshot = dict.fromkeys(self._regions.ledgers)

    def before_statement(self, connection: Connection) -> None:
        """What a transaction sees of the database is settled by its first statement: remember what was there before."""
        transaction = self.of(connection.info)
        if transaction is not None and transaction.snapshot is not None:
            return  # not the first
        set_by_text = self._isolation_key in connection.info
        if not set_by_text and not self.takes_snapshots(connection):
            return
        # Nobody knows when the snapshot began of a transaction that was begun unseen, by a raw cursor for example; and where
        # it is SERIALIZABLE, whatever it was told, the database must see what is read.
        two_phase = isinstance(connection.get_transaction(), TwoPhaseTransaction)  # says BEGIN by itself
        unseen = not two_phase and sa_internals.has_begun(connection)
        if set_by_text or unseen or sa_internals.is_serializable(connection):
            self.see_unknown(connection)
        else:
            snapshot: dict[Ledger, Snapshot | None] = {
                ledger: ledger.snapshot() for ledger in self._regions.ledgers
            }
            self.ensure(connection.info).snapshot = snapshot

    def began_unseen(self, connection: Connection) -> None:
        """A connection is in a transaction whose statements nobody has told of."""
        if self.takes_snapshots(connection):
            self.see_unknown(connection)

    def look_at(self, connection: Connection, before_lookup: bool) -> Transaction | None:
        """What is known of a connection's transaction, once it is seen whether one has begun that nobody has told of.

        Args:
            connection: which is watched.
            before_lookup: look for SQLite's transactions, too, which only tell before anything is read.
        """
        if connection.dialect.name == "sqlite":
            self._notice_old_view(connection, before_lookup)
        elif self.of(connection.info) is None:
            self._notice_begun(connection)
        return self.of(connection.info)

    def _notice_old_view(self, connection: Connection, before_lookup: bool) -> None:
        """See whether SQLite shows the database as it was: in a transaction begun by hand, or beside an open result.

        Its driver begins no transaction before a SELECT; applications that do make it so that each of their transactions
        has a snapshot, and this is the first time that it shows. In WAL mode a statement keeps its snapshot until it is
        read to its end, and shares it with all others of its connection, even after that has gone back to its pool.
        """
        transaction = self.of(connection.info)
        if transaction is not None and (transaction.snapshot is not None or transaction.wrote):
            return
        begun = before_lookup and sa_internals.in_transaction(connection)
        if begun or sa_internals.has_open_statement(connection):
            self.see_unknown(connection)
            if begun:
                self.expect_old_views(connection.dialect)

    def _notice_begun(self, connection: Connection) -> None:
        """See whether something that nobody has told of has begun a transaction with a snapshot, as a raw cursor may."""
        known = self.known(connection.dialect)
        if not known.settled:
            self.settle(connection.dialect)
        asked = known.old_views or "isolation_level" in connection.get_execution_options()
        if asked and self.takes_snapshots(connection) and sa_internals.has_begun(connection):
            self.see_unknown(connection)
