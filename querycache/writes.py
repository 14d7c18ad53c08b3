"""The write path: what each transaction has written, and when that is made known (:mod:`querycache.phases` tells how).

Every statement that this process sends through SQLAlchemy is executed by its engine's dialect, whoever sent it: the
unit of work, bulk statements, Core on any connection, textual SQL. There it is turned into the tags it changes,
which are noted with the *database connection* (not with a Session, which Core never sees):

- statements of the unit of work: the table, and at ``after_flush`` of the same Session, when old and new values are
  known, the slots (:mod:`querycache.flushed`);
- every other INSERT, UPDATE, DELETE or DDL: a set write of its table, and of those that foreign keys change with it;
- textual SQL: what its parser finds; everything where it cannot be understood.

It is the dialect, too, that sends COMMIT, whoever asked for it, and there are both phases, around it. A statement that
commits (in autocommit mode, a textual COMMIT, DDL on MySQL) has them around itself.

The dialect's methods are wrapped, and the engine is not listened to: its events ``commit`` and the like have no
counterpart after the COMMIT, and an engine that has any listener at all takes a tenth longer for a small query.

Until its transaction ends, a Session is not answered from the cache where it has written, and fills nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Table
from sqlalchemy.engine import Connection, Dialect, Engine, TwoPhaseTransaction
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, UOWTransaction

from querycache import sa_internals
from querycache.changes import WrittenTable, changes_of, tags_of_actions
from querycache.declarations import Declarations
from querycache.errors import ConfigurationError
from querycache.flushed import FlushedRows
from querycache.phases import Phases
from querycache.regions import Regions
from querycache.statement_text import as_text, is_rewritten, may_do_more, read_rendered, read_sent
from querycache.tables import SchemaMap, is_name, set_write_tags, translated
from querycache.tags import EVERYTHING
from querycache.textual import TextStatement, read_text
from querycache.transactions import Expected, Transaction, Transactions
from querycache.wording import commits, first_word

__all__ = ["Writes"]


class Writes:
    """Notes what is written through the engines it watches, and tells the ledgers.

    Args:
        regions: whose answers are made invalid.
        declared: views, triggers, and the number of slots.
        phases: tells the ledgers.
    """

    def __init__(self, regions: Regions, declared: Declarations, phases: Phases) -> None:
        self._declared = declared
        self.phases = phases
        self._transactions = Transactions(regions)
        self._watched: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._told = f"querycache:{id(self)}"  # in the attributes of a flush: what is expected of it

    # --- where it listens ----------------------------------------------------------------------------

    def watch(self, engine: Engine) -> bool:
        """Note what is written through an engine from now on. Returns False where that was done already."""
        known = self._transactions.known(engine.dialect)
        if known.watched:
            return False
        with sa_internals.listening:
            if known.watched:
                return False
            engine = sa_internals.root_engine(engine)
            sa_internals.tap(engine, self)
            self._watched.add(engine)
            known.watched = True
            return True

    def watch_bind(self, bind: Engine | Connection) -> bool:
        """The same for what a Session is about to ask. A connection that was given may have written unseen.

        Returns True if its transactions are SERIALIZABLE unless they are told otherwise.
        """
        known = self._transactions.known(bind.dialect)
        if not known.watched:
            if isinstance(bind, Connection):
                self._watch_connection(bind)
            else:
                self.watch(bind)
        return known.serializable

    def _watch_connection(self, connection: Connection) -> None:
        if self.watch(connection.engine) and connection.in_transaction():
            self._transactions.began_unseen(connection)
            self._note(connection, [EVERYTHING])

    def unwatch(self) -> None:
        """Leave all engines alone again."""
        with sa_internals.listening:
            for engine in self._watched:
                sa_internals.untap(engine, self)
                self._transactions.known(engine.dialect).watched = False
            self._watched.clear()

    def session_listeners(self) -> Mapping[str, Any]:
        """The events of a Session, or of what makes Sessions, that matter here."""
        return {
            "after_begin": self._after_begin,
            "after_flush": self._after_flush,
        }

    # --- what readers ask ----------------------------------------------------------------------------

    def transactions(
        self, session: Session, bind: Engine | Connection, before_lookup: bool = False
    ) -> list[Transaction]:
        """The transactions that a Session takes part in, with what they have written.

        Args:
            session: whose.
            bind: what it asks now.
            before_lookup: look for transactions begun by hand, too, which only shows before anything is read.
        """
        found = []
        for connection in sa_internals.connections(session, bind):
            if not self._transactions.known(connection.dialect).watched:
                self._watch_connection(connection)
            transaction = self._transactions.look_at(connection, before_lookup)
            if transaction is not None:
                if transaction.unresolved and not sa_internals.is_flushing(session):
                    # its flush has failed, so nobody will tell of the rows
                    self._resolve(transaction, session.hash_key)
                found.append(transaction)
        return found

    def noted(self, session: Session, bind: Engine | Connection) -> list[Transaction]:
        """The same, as far as it is known without a look at the connections."""
        found = [self._transactions.of(each.info) for each in sa_internals.connections(session, bind)]
        return [transaction for transaction in found if transaction is not None]

    def note(self, session: Session, tags: Iterable[str]) -> None:
        """Make tags part of what a Session's transaction writes: they change when it commits.

        Raises:
            ConfigurationError: the Session has several databases, and is connected to none of them yet.
        """
        connections = sa_internals.connections(session)
        if not connections:
            try:
                connections = [session.connection()]
            except (UnboundExecutionError, AssertionError) as error:
                raise ConfigurationError(
                    f"session={session!r}: it is connected to no database yet, and does not say to which it belongs; call "
                    "session.connection(bind_arguments=…) before"
                ) from error
        named = set(tags)
        for connection in connections:  # of several databases: which one it is about, nobody has said
            self.watch(connection.engine)
            transaction = self._transactions.ensure(connection.info)
            transaction.named |= named
            transaction.tags |= named

    # --- statements ----------------------------------------------------------------------------------

    def asking(self, context: Any) -> bool:
        """A statement is about to run, of which nothing else matters. Returns False where the dialect itself asks."""
        dialect = context.dialect
        known = self._transactions.known(dialect)
        if not known.settled:
            if sa_internals.is_initializing(context.root_connection):
                return False
            self._transactions.settle(dialect)
        if known.old_views or "isolation_level" in context.execution_options:
            self._transactions.before_statement(context.root_connection)
        return True

    def executing(self, sql: str, context: Any) -> bool:
        """A statement is about to run.

        Returns True where it commits itself, and :meth:`executed` is to follow.
        """
        if not self.asking(context):
            return False
        dialect, connection = context.dialect, context.root_connection
        if type(sql) is not str:
            sql = as_text(sql, context)
        compiled = context.compiled
        rewritten = sql is not context.statement and is_rewritten(sql, context)
        custom = not rewritten and may_do_more(sql, context)
        # Noted before it runs: of several rows that one statement writes, some may stay when it fails.
        if compiled is None or context.is_text or rewritten or custom or sa_internals.holds_text(compiled):
            text = read_rendered(context) if custom else read_sent(sql, context)
            self._declared.note_temporary(sql, dialect.name)
            if text.begins:
                self._transactions.begin_by_hand(connection)
            elif text.rolls_back:
                self._transactions.roll_back_by_hand(connection)
            if text.commits and self._is_committing(connection, sql):
                return False  # the dialect's own COMMIT of a prepared transaction, which had its phase one
            wrote = self._note_text(connection, text) or text.commits
            if (rewritten or custom) and compiled is not None:
                wrote = self._note_compiled(connection, sql, context) or wrote
            if self._transactions.ends_savepoint(connection, first_word(sql)):
                self.commit(connection.info, dialect)
                return True
        elif context.isddl or _may_be_dml(context):
            wrote = self._note_compiled(connection, sql, context)
        elif word := sa_internals.savepoint_word(compiled.statement):
            if self._transactions.ends_savepoint(connection, word):
                self.commit(connection.info, dialect)
                return True
            if dialect.name != "sqlite":
                sa_internals.note_reading(context)
            return False
        elif compiled.statement.is_select:
            sa_internals.note_reading(context)
            return False
        else:
            # the application's own kind of statement: what it renders is all that is known of it
            self._declared.note_temporary(sql, dialect.name)
            wrote = self._note_text(connection, read_text(sql, dialect.name))
        if wrote and (
            self._transactions.is_autocommit(connection)
            or commits(sql, dialect.name)
            or (dialect.name == "sqlite" and _begins_nothing(connection, sql))
        ):
            self.commit(connection.info, dialect)
            return True
        return False

    def executed(self, context: Any, outcome: sa_internals.Outcome) -> None:
        """The statement that commits itself has run, or failed."""
        connection: Connection = context.root_connection
        self._transactions.committed_itself(connection, as_text(context.statement, context))
        transaction = self._transactions.of(connection.info)
        if transaction is not None:
            self.phases.two(transaction.marking, certain=outcome != "unknown")
            if not self._transactions.may_go_on(connection):
                self._transactions.forget(connection.info)
                if transaction.named:  # which change at the Session's commit, in autocommit mode, too
                    named = self._transactions.ensure(connection.info)
                    named.named, named.tags = transaction.named, set(transaction.named)
            # otherwise it may not have committed after all, so its tags change once more at the next COMMIT

    def failed(self, info: dict[Any, Any], is_open: bool | None) -> None:
        """A statement has failed, or its rows could not be fetched."""
        self._transactions.failed(info, is_open)

    def _is_committing(self, connection: Connection, sql: str) -> bool:
        transaction = self._transactions.of(connection.info)
        if transaction is not None and transaction.marking.tags is not None:
            return True
        two_phase = isinstance(connection.get_transaction(), TwoPhaseTransaction)
        return two_phase and (first_word(sql) == "xa" or "prepared" in sql.lower())

    def _note_compiled(self, connection: Connection, sql: str, context: Any) -> bool:
        """Note what DML or DDL writes. Returns False if that is nothing."""
        if context.isddl:
            self._declared.note_temporary(sql, connection.dialect.name)
            self._note_ddl(connection, context)
            return True
        return _may_be_dml(context) and self._note_dml(connection, context)

    def _note_dml(self, connection: Connection, context: Any) -> bool:
        """Note what a statement and its CTEs write. Returns False if that is nothing."""
        if context.execution_options.get("cache_changes_nothing"):
            return False  # it takes a lock, as one statement of querycache.denormalize does
        changes = changes_of(context)
        if not (changes.tags or changes.tables):
            return False
        transaction = self._transactions.ensure(connection.info)
        transaction.tags |= changes.tags
        flush = sa_internals.flush_of(context) if changes.tables else None
        if flush is None or sa_internals.has_other_parameters(context):  # of which its objects know nothing
            for written in changes.tables:
                transaction.tags |= written.tags
        else:
            expected = self._expected(transaction, connection, flush)
            for written in changes.tables:
                self._expect_rows(expected, written, changes.schemas, context)
        return True

    def _expected(self, transaction: Transaction, connection: Connection, flush: UOWTransaction) -> Expected:
        """What is expected of a flush on a connection."""
        session = flush.session.hash_key
        told: list[tuple[Transaction, Connection, Expected]] = flush.attributes.setdefault(self._told, [])
        known = transaction.unresolved.get(session)
        if known is not None and any(known is expected for _, _, expected in told):
            return known
        if known is not None:
            # what a flush that failed has left: this one is to tell of its own rows only
            self._resolve(transaction, session)
        expected: Expected = {}
        transaction.unresolved[session] = expected
        told.append((transaction, connection, expected))
        return expected

    @staticmethod
    def _expect_rows(expected: Expected, written: WrittenTable, schemas: SchemaMap, context: Any) -> None:
        """Have ``after_flush`` tell the rows of a table; and UPDATE, where the objects may not know them."""
        key = written.table, written.schema
        rows = expected.get(key)
        if rows is None:
            rows = expected[key] = FlushedRows(written, schemas)
        if context.isinsert:
            rows.inserting(context)
        elif context.isupdate:
            rows.setting(sa_internals.keys_set(context.compiled))
            if written.followed and not rows.moved:
                sa_internals.ask_for(context, written.table, rows.written.followed, rows.returned)

    def _note_ddl(self, connection: Connection, context: Any) -> None:
        element = getattr(context.compiled.statement, "element", None)
        table = element if isinstance(element, Table) else getattr(element, "table", None)
        if isinstance(table, Table) and is_name(table.schema, table.name):
            schemas: SchemaMap = context.execution_options.get("schema_translate_map") or {}
            name, default = (
                translated((table.schema, table.name), schemas),
                connection.dialect.default_schema_name,
            )
            self._note(connection, set_write_tags(name, default))
            # SQLite deletes all rows of a table that it drops
            self._note(connection, tags_of_actions(table, True, schemas, default))
        else:
            self._note(connection, [EVERYTHING])

    def _note_text(self, connection: Connection, text: TextStatement) -> bool:
        if text.isolates:
            self._transactions.isolate(connection, text.isolates)
        if not text.understood:
            self._note(connection, [EVERYTHING])
        default = connection.dialect.default_schema_name
        for schema, name in text.writes:
            self._note(connection, set_write_tags((schema, name), default))
            for delete in (True, False):
                self._note(connection, tags_of_actions(name, delete, {}, default))
        return bool(text.writes) or not text.understood

    def _note(self, connection: Connection, tags: Iterable[str]) -> None:
        transaction = self._transactions.ensure(connection.info)
        transaction.tags.update(tags)

    # --- the unit of work ------------------------------------------------------------------------------

    def _after_begin(self, session: Session, transaction: Any, connection: Connection) -> None:
        dialect = connection.dialect
        known = self._transactions.known(dialect)
        if not known.watched and self.watch(connection.engine):
            self._transactions.began_unseen(connection)
            if sa_internals.was_given(transaction, connection):
                self._note(connection, [EVERYTHING])
        if sa_internals.has_listeners(dialect):
            unseen = sa_internals.heed_others(dialect)
            if unseen and sa_internals.was_given(transaction, connection):
                self._note(connection, [EVERYTHING])
        if known.told:
            self._transactions.ask_driver(connection)

    def _after_flush(self, session: Session, context: UOWTransaction) -> None:
        hash_key = session.hash_key
        for transaction, connection, expected in context.attributes.pop(self._told, ()):
            if transaction.unresolved.get(hash_key) is expected:  # otherwise told as a whole already
                _tell_rows(expected, connection, context)
                self._resolve(transaction, hash_key)

    def _resolve(self, transaction: Transaction, session: int) -> None:
        """Turn tables that a Session has flushed into tags: rows where they are known, else the whole table."""
        for rows in transaction.unresolved.pop(session, {}).values():
            transaction.tags.update(rows.tags(self._declared.slots))

    # --- the end of a transaction ------------------------------------------------------------------------

    def unseen(self, info: dict[Any, Any]) -> None:
        """Statements may have run that :meth:`executing` was not told of."""
        self._transactions.ensure(info).tags.add(EVERYTHING)

    def commit(self, info: dict[Any, Any], dialect: Dialect) -> None:
        """COMMIT, or PREPARE of a two-phase transaction, is about to be sent; :meth:`end` follows it.

        Raises:
            CacheUnavailable: a cache server cannot be told, and commits are refused then.
        """
        transaction = self._transactions.of(info)
        if transaction is not None and transaction.wrote:
            for session in list(transaction.unresolved):
                self._resolve(transaction, session)  # nobody will tell of the rows any more: the whole tables
            self.phases.one(transaction.marking, transaction.tags)

    def end(self, info: dict[Any, Any], outcome: sa_internals.Outcome) -> None:
        """A transaction has ended: committed, or failed to, or rolled back. Or it was to, and is open still."""
        transaction = self._transactions.of(info) if outcome == "open" else self._transactions.end(info)
        if transaction is not None:
            self.phases.two(transaction.marking, certain=outcome != "unknown")


def _tell_rows(expected: Expected, connection: Connection, flush: UOWTransaction) -> None:
    """Have what a flush has written tell what it knows: its objects, and then the database."""
    tables: dict[Table, list[FlushedRows]] = {}
    for (table, _), rows in expected.items():
        tables.setdefault(table, []).append(rows)
    for state, deleted in sa_internals.flushed(flush):
        for table in state.mapper.tables:
            for rows in tables.get(table, ()):
                rows.add(state, deleted)
    for rows in expected.values():
        rows.look_at(connection)


def _may_be_dml(context: Any) -> bool:
    compiled = context.compiled
    return bool(context.isinsert or context.isupdate or context.isdelete or getattr(compiled, "ctes", None))


def _begins_nothing(connection: Connection, sql: str) -> bool:
    """True if a statement of SQLite commits itself, whatever transaction SQLAlchemy thinks it is in: its driver begins one
    before some kinds of statements only."""
    return not (sa_internals.in_transaction(connection) or sa_internals.begins_transaction(connection, sql))
