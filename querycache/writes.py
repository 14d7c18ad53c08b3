"""The write path, whole: what each transaction has written, and both phases of making it known.

Every statement that this process sends through SQLAlchemy passes ``after_cursor_execute`` of its engine, whoever sent
it: the unit of work, bulk statements, Core on any connection, textual SQL. There it is turned into the tags it
changes, which are noted with the *database connection* (not with a Session, which Core never sees):

- statements of the unit of work: the table, and at ``after_flush``, when old and new values are known, the slots;
- every other INSERT, UPDATE, DELETE or DDL: a set write of its table, and of those that foreign keys change with it;
- textual SQL: what its parser finds; everything where it cannot be understood.

Then come the two phases of :mod:`querycache.ledger`. **Phase one** is the engine's ``commit`` event, just before
COMMIT: every tag of the transaction is marked pending, so that no lookup hits or fills under it while the commit
becomes visible. **Phase two** gives each tag a new version. It happens at the Session's ``after_commit``, or else when
the connection begins again, is rolled back or goes back to its pool; always, also where COMMIT failed or its outcome
is unknown. A statement in autocommit mode has both phases around itself.

Until its transaction ends, a Session is not answered from the cache where it has written, and fills nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Table, event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, UOWTransaction

from querycache import sa_internals
from querycache.dependencies import Declarations, cascades, row_write_tags, set_write_tags, tracked_columns
from querycache.errors import CacheUnavailable
from querycache.events import Telemetry
from querycache.ledger import Ledger, Marks
from querycache.regions import Regions
from querycache.tags import EVERYTHING
from querycache.textual import read_text

__all__ = ["Consistency", "OnOutage", "Transaction", "Writes"]

Consistency = Literal["strict", "commit"]
OnOutage = Literal["available", "refuse"]

_SNAPSHOTS = ("REPEATABLE READ", "SERIALIZABLE", "SNAPSHOT")


@dataclass(slots=True)
class Transaction:
    """What one database connection has written since its transaction began.

    Attributes:
        tags: the tags that are changed.
        unresolved: tables written by the unit of work, whose rows ``after_flush`` will tell.
        marks: marks of phase one, by ledger; None before it.
        unmarked: ledgers that could not be reached in phase one.
        snapshot: for each ledger the version of its witness when the transaction's snapshot of the database
            began; None where each statement sees what is committed.
    """

    tags: set[str] = field(default_factory=set)
    unresolved: dict[Table, str | None] = field(default_factory=dict)
    marks: dict[Ledger, Marks] | None = None
    unmarked: list[Ledger] = field(default_factory=list)
    snapshot: dict[Ledger, int | None] | None = None

    @property
    def wrote(self) -> bool:
        return bool(self.tags or self.unresolved)

    def hides(self, tags: Iterable[str]) -> bool:
        """True if an answer that depends on these tags could lack what this transaction has written."""
        return bool(self.unresolved) or EVERYTHING in self.tags or not self.tags.isdisjoint(tags)


class Writes:
    """Notes what is written through the engines it watches, and tells the ledgers.

    Args:
        regions: whose answers are made invalid.
        declared: views, triggers, and the number of slots.
        telemetry: is told of faults.
        consistency: "strict" for both phases; "commit" for the second alone.
        on_outage: whether a COMMIT goes through ("available") or is refused ("refuse") when a cache server cannot
            be reached before it.
    """

    def __init__(
        self,
        regions: Regions,
        declared: Declarations,
        telemetry: Telemetry,
        consistency: Consistency,
        on_outage: OnOutage,
    ) -> None:
        self._regions = regions
        self._declared = declared
        self._telemetry = telemetry
        self._consistency = consistency
        self._on_outage = on_outage
        self._info_key = f"querycache:{id(self)}"
        self._lock = threading.Lock()
        self._watched: set[Engine] = set()
        self._owed: dict[Ledger, set[str]] = {}

    # --- where it listens ----------------------------------------------------------------------------

    def watch(self, engine: Engine) -> None:
        """Note what is written through an engine from now on. Watching it twice is watching it once."""
        engine = sa_internals.root_engine(engine)
        if engine in self._watched:
            return
        with self._lock:
            if engine not in self._watched:
                for name, listener in self._engine_listeners().items():
                    event.listen(engine, name, listener)
                self._watched.add(engine)

    def unwatch(self) -> None:
        """Leave all engines alone again."""
        with self._lock:
            for engine in self._watched:
                for name, listener in self._engine_listeners().items():
                    event.remove(engine, name, listener)
            self._watched.clear()

    def _engine_listeners(self) -> Mapping[str, Any]:
        return {
            "before_cursor_execute": self._before_execute,
            "after_cursor_execute": self._after_execute,
            "begin": self._begin,
            "commit": self._commit,
            "commit_twophase": self._commit_twophase,
            "rollback": self._rollback,
            "rollback_twophase": self._rollback_twophase,
            "checkin": self._checkin,
            "invalidate": self._invalidate,
        }

    def session_listeners(self) -> Mapping[str, Any]:
        """The events of a Session, or of what makes Sessions, that matter here."""
        return {
            "after_begin": self._after_begin,
            "before_flush": self._before_flush,
            "after_flush": self._after_flush,
            "after_commit": self._after_commit,
        }

    # --- what readers ask ----------------------------------------------------------------------------

    def transactions(self, session: Session) -> list[Transaction]:
        """The transactions that a Session takes part in, with what they have written."""
        found = []
        for connection in sa_internals.connections(session):
            transaction = self._of(connection)
            if transaction is not None:
                found.append(transaction)
        return found

    def owes(self, ledger: Ledger) -> bool:
        """True while a ledger could not be told of a commit; tells it, if it can be reached now."""
        if not self._owed:
            return False
        tags = self._owed.get(ledger)
        if tags is None:
            return False
        try:
            ledger.bump(sorted(tags))
        except CacheUnavailable:
            return True
        with self._lock:
            left = self._owed.get(ledger, set()) - tags
            if left:
                self._owed[ledger] = left
            else:
                self._owed.pop(ledger, None)
        return bool(left)

    def note(self, session: Session, tags: Iterable[str]) -> None:
        """Make tags part of what a Session's transaction writes: they change when it commits."""
        self._note(session.connection(), tags)

    # --- statements ----------------------------------------------------------------------------------

    def _before_execute(
        self, connection: Connection, cursor: Any, sql: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        # Noted before it runs: of several rows that one statement writes, some may stay when it fails.
        compiled = context.compiled
        if compiled is not None and not context.is_text:
            if context.isinsert or context.isupdate or context.isdelete:
                self._note_dml(connection, context)
            elif context.isddl:
                self._note_ddl(connection, compiled)
            elif getattr(compiled, "ctes", None) and sa_internals.written_in_ctes(compiled):
                self._note_tables(connection, sa_internals.written_in_ctes(compiled), context)
            else:
                return
        elif not self._note_text(connection, sql):
            return
        if sa_internals.is_autocommit(connection):
            self._phase_one(connection)

    def _after_execute(
        self, connection: Connection, cursor: Any, sql: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        if (
            context.isinsert
            or context.isupdate
            or context.isdelete
            or context.isddl
            or context.compiled is None
        ):
            transaction = self._of(connection)
            if transaction is not None and transaction.marks is not None:
                self._phase_two(connection.info)

    def _note_dml(self, connection: Connection, context: Any) -> None:
        tables = sa_internals.dml_tables(context.compiled)
        if tables is None:
            self._note(connection, [EVERYTHING])
        elif sa_internals.is_unit_of_work(context):
            transaction = self._ensure(connection)
            for table in tables:
                transaction.unresolved[table] = _schema(table, context)
        else:
            self._note_tables(connection, tables, context)

    def _note_tables(self, connection: Connection, tables: Iterable[Table], context: Any) -> None:
        delete, update = context.isdelete, context.isupdate
        default = connection.dialect.default_schema_name
        for table in tables:
            changed = {table}
            if delete:
                changed |= cascades(table, delete=True)
            if update:
                changed |= cascades(table, delete=False)
            for each in changed:
                self._note(connection, set_write_tags((_schema(each, context), each.name), default))

    def _note_ddl(self, connection: Connection, compiled: Any) -> None:
        element = getattr(compiled.statement, "element", None)
        table = element if isinstance(element, Table) else getattr(element, "table", None)
        if isinstance(table, Table):
            default = connection.dialect.default_schema_name
            self._note(connection, set_write_tags((table.schema, table.name), default))
        else:
            self._note(connection, [EVERYTHING])

    def _note_text(self, connection: Connection, sql: str) -> bool:
        text = read_text(sql, connection.dialect.name)
        if text.isolation:
            # nobody knows from now on what this transaction sees
            self._ensure(connection).snapshot = dict.fromkeys(self._regions.ledgers)
        if not text.understood:
            self._note(connection, [EVERYTHING])
        default = connection.dialect.default_schema_name
        for schema, name in text.writes:
            self._note(connection, set_write_tags((schema, name), default, anywhere=schema is None))
            for table in sa_internals.known_tables(name):
                for each in cascades(table, delete=True) | cascades(table, delete=False):
                    self._note(connection, set_write_tags((each.schema, each.name), default))
        return bool(text.writes) or not text.understood

    def _note(self, connection: Connection, tags: Iterable[str]) -> None:
        self._ensure(connection).tags.update(tags)

    def _of(self, connection: Connection) -> Transaction | None:
        found: Transaction | None = connection.info.get(self._info_key)
        return found

    def _ensure(self, connection: Connection) -> Transaction:
        info = connection.info
        transaction: Transaction | None = info.get(self._info_key)
        if transaction is None or transaction.marks is not None:
            self._phase_two(info)
            transaction = info[self._info_key] = Transaction()
        return transaction

    # --- the unit of work ------------------------------------------------------------------------------

    def _after_begin(self, session: Session, transaction: Any, connection: Connection) -> None:
        self.watch(connection.engine)

    def _before_flush(self, session: Session, context: UOWTransaction, instances: Any) -> None:
        for connection in sa_internals.connections(session):
            self._resolve(connection, {})

    def _after_flush(self, session: Session, context: UOWTransaction) -> None:
        values: dict[Table, list[tuple[str, object]] | None] = {}
        deleted: set[Table] = set()
        for state, is_delete in sa_internals.flushed(context):
            for table in state.mapper.tables:
                if not isinstance(table, Table):
                    continue
                if is_delete:
                    deleted.add(table)
                rows = values.setdefault(table, [])
                if rows is not None:
                    known = _row_values(state, table)
                    values[table] = None if known is None else rows + known
        for connection in sa_internals.connections(session):
            default = connection.dialect.default_schema_name
            written = self._of(connection)
            unresolved = dict(written.unresolved) if written is not None else {}
            self._resolve(connection, values)
            for table, schema in unresolved.items():
                changed = cascades(table, delete=False)
                if table in deleted:
                    changed |= cascades(table, delete=True)
                for each in changed:
                    self._note(connection, set_write_tags((each.schema or schema, each.name), default))

    def _resolve(
        self, connection: Connection, values: Mapping[Table, list[tuple[str, object]] | None]
    ) -> None:
        """Turn tables written by the unit of work into tags: rows where they are known, else the whole table."""
        transaction = self._of(connection)
        if transaction is None:
            return
        default = connection.dialect.default_schema_name
        for table, schema in transaction.unresolved.items():
            known = values.get(table)
            if known is None:
                transaction.tags.update(set_write_tags((schema, table.name), default))
            else:
                transaction.tags.update(row_write_tags(table, schema, known, default, self._declared.slots))
        transaction.unresolved.clear()

    # --- the end of a transaction ------------------------------------------------------------------------

    def _begin(self, connection: Connection) -> None:
        info = connection.info
        if self._info_key in info:
            self._phase_two(info)
        if sa_internals.isolation_level(connection) in _SNAPSHOTS and connection.dialect.name != "sqlite":
            self._ensure(connection).snapshot = {ledger: _witness(ledger) for ledger in self._regions.ledgers}

    def _commit(self, connection: Connection) -> None:
        self._phase_one(connection)

    def _commit_twophase(self, connection: Connection, xid: Any, is_prepared: bool) -> None:
        self._phase_one(connection)

    def _rollback(self, connection: Connection) -> None:
        self._phase_two(connection.info)

    def _rollback_twophase(self, connection: Connection, xid: Any, is_prepared: bool) -> None:
        self._phase_two(connection.info)

    def _after_commit(self, session: Session) -> None:
        # Also sent when a savepoint is released: then nothing is marked, and nothing happens.
        for connection in sa_internals.connections(session):
            transaction = self._of(connection)
            if transaction is not None and transaction.marks is not None:
                self._phase_two(connection.info)

    def _checkin(self, dbapi_connection: Any, record: Any) -> None:
        self._phase_two(record.info)

    def _invalidate(self, dbapi_connection: Any, record: Any, exception: Any) -> None:
        self._phase_two(record.info)

    def _phase_one(self, connection: Connection) -> None:
        """Mark every tag of the transaction, so that nobody is answered from the cache while it is committed."""
        transaction = self._of(connection)
        if transaction is None or not transaction.wrote:
            return
        self._resolve(connection, {})
        transaction.marks = {}
        if self._consistency == "commit":
            transaction.unmarked = list(self._regions.ledgers)
            return
        for ledger, keys in self._regions.tag_keys(transaction.tags):
            try:
                transaction.marks[ledger] = ledger.begin(keys)
            except CacheUnavailable:
                transaction.unmarked.append(ledger)
                if self._on_outage == "refuse":
                    # An exception here stops the COMMIT, but the connection would go back to its pool with the
                    # transaction open, for the next user to commit.
                    connection.connection.rollback()
                    self._phase_two(connection.info)
                    raise

    def _phase_two(self, info: dict[Any, Any]) -> None:
        """Give the tags new versions and take the marks off. Without marks, forget what was rolled back."""
        transaction: Transaction | None = info.pop(self._info_key, None)
        if transaction is None or transaction.marks is None:
            return
        for ledger, marks in transaction.marks.items():
            try:
                ledger.end(marks)
            except CacheUnavailable:
                # the marks stay: nothing that depends on them is served until they have healed
                self._telemetry.emit("error", "", "", "unavailable after commit")
        if transaction.unmarked:
            for ledger, keys in self._regions.tag_keys(transaction.tags):
                if ledger in transaction.unmarked:
                    with self._lock:
                        self._owed.setdefault(ledger, set()).update(keys)
                    if self.owes(ledger):
                        self._telemetry.emit("error", "", "", "unavailable at commit")


def _witness(ledger: Ledger) -> int | None:
    try:
        return ledger.lookup(None, ()).witness
    except CacheUnavailable:
        return None


def _schema(table: Table, context: Any) -> str | None:
    translate = context.execution_options.get("schema_translate_map") or {}
    schema: str | None = translate.get(table.schema, table.schema)
    return schema


def _row_values(state: Any, table: Table) -> list[tuple[str, object]] | None:
    """Old and new values of a flushed object's tracked columns; None where one of them is not known."""
    values: list[tuple[str, object]] = []
    for column in tracked_columns(table):
        for value in sa_internals.old_and_new(state, column):
            if value is sa_internals.UNKNOWN:
                return None
            values.append((column.name, value))
    return values
